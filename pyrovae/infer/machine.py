"""What is found out about a machine once, and kept on disk beside the code that torch's compiler makes for it."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import torch

from pyrovae.checkpoint import write_text

__all__ = ["keep_memory", "kept", "processor", "with_tried_instructions"]


@cache
def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


@cache
def keep_memory() -> None:
    """Have this process keep the memory that it frees, up to 64 MiB, for what it allocates next.

    glibc gives back what lies free at the heap's end when that is more than twice the largest block it has freed, and
    takes it again page by page: half the time of an evaluation, at worst. Freeing a block of the greatest size that
    counts settles it (``man mallopt``, M_MMAP_THRESHOLD). Elsewhere it does nothing.
    """
    torch.empty(2**25 - 2**13, dtype=torch.uint8, device="cpu")  # never written, so it costs no memory


def kept(what: str) -> Path:
    """The file for it: one for each torch and processor."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / f"pyrovae-{what}-{torch.__version__}-{re.sub(r'[^a-zA-Z0-9]+', '-', processor())}"


@contextmanager
def with_tried_instructions() -> Iterator[None]:
    """The processor's vector instructions are not tried out again, which takes torch's compiler a second a process."""
    try:
        from torch._inductor import config

        known = config.cpp.vec_isa_ok is None and _all_work()
        trusting = config.patch({"cpp.vec_isa_ok": True}) if known else nullcontext()
    except Exception:  # another torch, no compiler, nowhere to write: torch does as it does
        trusting = nullcontext()
    with trusting:
        yield


@cache
def _all_work() -> bool:
    """Whether this compiler's programs ran on this machine with whatever instructions the processor names."""
    from torch._inductor import cpp_builder, cpu_vec_isa

    flags = cpu_vec_isa.x86_isa_checker()  # of no other processors
    named = [str(isa) for isa in cpu_vec_isa.supported_vec_isa_list if all(x in flags for x in str(isa).split())]
    if not named:
        return False
    record = "\n".join([cpp_builder.get_compiler_version_info(cpp_builder.get_cpp_compiler()), *named])
    file = kept("instructions")
    if not (file.exists() and file.read_text(encoding="utf-8") == record):
        if list(map(str, cpu_vec_isa.valid_vec_isa_list())) != named:  # torch tries them
            return False
        write_text(file, record)
    return True
