"""What is found out about a machine once, and kept on disk beside the code that torch's compiler makes for it."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from pyrovae.checkpoint import write_text

__all__ = ["kept", "processor", "with_tried_instructions"]


@cache
def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def kept(what: str) -> Path:
    """The file for it: one for each torch and processor."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / f"pyrovae-{what}-{torch.__version__}-{re.sub(r'[^a-zA-Z0-9]+', '-', processor())}.json"


@contextmanager
def with_tried_instructions() -> Iterator[None]:
    """The processor's vector instructions are not tried out again, which takes torch's compiler a second a process."""
    try:
        from torch._inductor import config

        trusted = config.patch({"cpp.vec_isa_ok": True})
        known = config.cpp.vec_isa_ok is None and _all_work()
    except (ImportError, AttributeError, OSError):  # another torch, or nowhere to write: it tries them again
        known = False
    if known:
        with trusted:
            yield
    else:
        yield


@cache
def _all_work() -> bool:
    """Whether a program with any instructions that the processor names was compiled and loaded on this machine."""
    from torch._inductor import config
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list

    named = config.patch({"cpp.vec_isa_ok": True})(valid_vec_isa_list.__wrapped__)()
    if not named:
        return False
    file, names = kept("instructions"), "\n".join(map(str, named))
    if not (file.exists() and file.read_text(encoding="utf-8") == names):
        if valid_vec_isa_list() != named:  # these are tried
            return False
        write_text(file, names)
    return True
