"""The machine: how many threads a computation gets, and memory that is kept."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["allowed_threads", "count_products", "keep_memory", "limit_threads"]

WORTH_THREADS = 50e6
"""Operations in the matrix products of a loss, above which a second thread saves more than a tenth of the time."""

_at_import = torch.get_num_threads()


def allowed_threads() -> int:
    """Count the threads that this process may keep busy: its cores, or its control group's share of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(cores, _quota())))


def _quota(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Read the cores' worth of time that a container may use; infinite where nothing limits it."""
    try:
        if (root / "cpu.max").is_file():  # version 2
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return math.inf if quota == "max" or float(quota) <= 0 else float(quota) / float(period)
    except (OSError, ValueError):
        return math.inf


def count_products(function: Callable[[], object]) -> float:
    """Run ``function`` and count the floating-point operations of its matrix products and convolutions."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@contextmanager
def limit_threads(threads: int | None, work: Callable[[], float] | float = math.inf) -> Iterator[int]:
    """Set torch's threads for a while, and put them back. Gives their number.

    One thread where the work of a step is too small to gain from more: on a busy machine, or in a container with a
    quota, threads that wait for each other make a small step ten times slower. Otherwise as many as are allowed. The
    choice depends on nothing else, so that a seed gives the same bits.

    Args:
        threads: the number; None chooses. A number that the user has set (``torch.set_num_threads``,
            ``OMP_NUM_THREADS``, ``MKL_NUM_THREADS``) is kept.
        work: floating-point operations of a loss, or a function that counts them.
    """
    before = torch.get_num_threads()
    if threads is None and _is_users(before):
        yield before
        return
    if threads is None:
        work = work() if callable(work) else work
        threads = allowed_threads() if work >= WORTH_THREADS else 1
    try:
        torch.set_num_threads(threads)
        yield threads
    finally:
        torch.set_num_threads(before)


def _is_users(threads: int) -> bool:
    """Return whether somebody has chosen this number, and not torch itself."""
    if any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")):
        return True
    cores = {len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0, os.cpu_count() or 1}
    return threads != _at_import or threads not in cores | {core // 2 for core in cores}


@cache
def keep_memory() -> None:
    """Have this process keep the memory that it frees, up to 64 MiB, for what it allocates next.

    glibc gives back what lies free at the heap's end when that is more than twice the largest block it has freed, and
    takes it again page by page: half the time of an evaluation, at worst. Freeing a block of the greatest size that
    counts settles it (``man mallopt``, M_MMAP_THRESHOLD). Elsewhere it does nothing.
    """
    torch.empty(2**25 - 2**13, dtype=torch.uint8, device="cpu")  # never written, so it costs no memory
