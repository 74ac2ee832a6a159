"""What is found out about a machine once, and kept on disk beside the code that torch's compiler makes for it."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pyrovae.checkpoint import write_text

__all__ = ["keep_memory", "kept", "processor", "recall", "remember", "with_tried_instructions"]


@cache
def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


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


def recall(what: str) -> dict[str, bool]:
    """The answers that this process and earlier ones found, by question."""
    try:
        known = json.loads(kept(what).read_text(encoding="utf-8"))
    except (ImportError, OSError, ValueError):  # none so far, or damaged
        return {}
    return known if isinstance(known, dict) else {}


def remember(what: str, question: str, answer: bool) -> None:
    """Keep an answer for later processes; where it cannot be written, they find out again."""
    with suppress(ImportError, OSError):
        write_text(kept(what), json.dumps(recall(what) | {question: answer}, indent=1))  # others find out too


@contextmanager
def with_tried_instructions() -> Iterator[None]:
    """Vector instructions that worked in a program of this compiler's are not tried again, which takes torch's compiler
    up to a second and a half in each process."""
    try:
        from torch._inductor.cpu_vec_isa import VecISA

        asked = VecISA.check_build
    except (ImportError, AttributeError):  # another torch, which does as it does
        yield
        return

    def check_build(self: Any, code: str) -> bool:
        question = _question(self, code)
        if not question or recall("instructions").get(question) is not True:
            if not asked(self, code):  # perhaps by chance: it is not remembered
                return False
            if question:
                remember("instructions", question, True)
        return True

    VecISA.check_build = check_build  # type: ignore[method-assign]
    try:
        yield
    finally:
        VecISA.check_build = asked  # type: ignore[method-assign]


def _question(instructions: Any, code: str) -> str:
    """Names the program ``code`` for these instructions, and its compiler; empty where torch does not tell."""
    try:
        from torch._inductor import cpp_builder

        compiler = cpp_builder.get_compiler_version_info(cpp_builder.get_cpp_compiler())
        program = "\n".join([compiler, instructions.build_arch_flags(), code])
    except Exception:  # no compiler, another torch
        return ""
    return f"{instructions}: {hashlib.sha256(program.encode()).hexdigest()}"
