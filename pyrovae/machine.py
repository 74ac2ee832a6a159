"""The machine: memory that is kept, and how many threads a computation gets."""

from __future__ import annotations

from functools import cache

import torch

__all__ = ["keep_memory"]


@cache
def keep_memory() -> None:
    """Have this process keep the memory that it frees, up to 64 MiB, for what it allocates next.

    glibc gives back what lies free at the heap's end when that is more than twice the largest block it has freed, and
    takes it again page by page: half the time of an evaluation, at worst. Freeing a block of the greatest size that
    counts settles it (``man mallopt``, M_MMAP_THRESHOLD). Elsewhere it does nothing.
    """
    torch.empty(2**25 - 2**13, dtype=torch.uint8, device="cpu")  # never written, so it costs no memory
