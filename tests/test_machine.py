"""What is known of a machine is found out once."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch._inductor import config, cpp_builder, cpu_vec_isa

from pyrovae.infer import machine
from pyrovae.infer.machine import kept, processor, with_tried_instructions


class Instructions:
    """``valid_vec_isa_list``: those that work when tried out."""

    def __init__(self, working: list[str]) -> None:
        self.working, self.tried = working, 0

    def __call__(self) -> list[str]:
        assert config.cpp.vec_isa_ok is None  # or nothing would be tried
        self.tried += 1
        return self.working


Use = Callable[..., Instructions]


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """Begins a process on a machine of its own."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def begin(working: list[str], version: str = "g++ 13") -> Instructions:
        machine._all_work.cache_clear()
        instructions = Instructions(working)
        monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", instructions)
        monkeypatch.setattr(cpu_vec_isa, "supported_vec_isa_list", ["amx", "avx512", "avx2"])
        monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: ["avx512", "avx2"])
        monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "g++")
        monkeypatch.setattr(cpp_builder, "get_compiler_version_info", lambda compiler: version)
        return instructions

    with config.patch({"cpp.vec_isa_ok": None}):
        yield begin
    machine._all_work.cache_clear()


def setting() -> bool | None:
    with with_tried_instructions():
        return config.cpp.vec_isa_ok


def test_files_tell_torch_and_processor(process: Use) -> None:
    name = kept("products").name
    assert torch.__version__ in name
    assert processor()
    assert not set(name) & set(" ()/")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept() -> None:
    """In a process of its own: what others have freed counts too."""
    program = """
import resource, torch
from pyrovae.infer.machine import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [torch.zeros(2**20) for _ in range(6)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
keep_memory()
faults()
print(faults())
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    # Twenty rounds of 6 × 1,024 pages. Without, all of them or few are taken anew, as the heap happens to lie.
    assert int(run.stdout) < 1024


def test_instructions_are_tried_in_the_first_process(process: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    first = process(["avx512", "avx2"])
    assert setting() is True
    assert setting() is True
    assert first.tried == 1
    assert config.cpp.vec_isa_ok is None
    second = process(["avx512", "avx2"])
    assert setting() is True
    assert second.tried == 0
    third = process(["avx2"], version="g++ 4")
    assert setting() is None
    assert third.tried == 1
    # Another machine may have the same disk, and other instructions.
    fourth = process(["avx2"])
    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: ["avx2"])
    assert setting() is True
    assert fourth.tried == 1


def test_instructions_that_do_not_work_are_tried_each_time(process: Use) -> None:
    for _ in range(2):
        instructions = process(["avx2"])
        assert setting() is None
        assert instructions.tried == 1
    assert not kept("instructions").exists()


@pytest.mark.parametrize("chosen", [True, False])
def test_the_users_own_setting_stays(process: Use, chosen: bool) -> None:
    instructions = process(["avx512", "avx2"])
    with config.patch({"cpp.vec_isa_ok": chosen}):
        assert setting() is chosen
    assert instructions.tried == 0


def test_another_torch_tries_them_itself(process: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    process(["avx512", "avx2"])
    monkeypatch.delattr(cpu_vec_isa, "valid_vec_isa_list")
    assert setting() is None


def test_where_nothing_can_be_written_they_are_tried(
    process: Use, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    process(["avx512", "avx2"])
    (tmp_path / "a file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "a file"))
    assert setting() is None


def test_other_processors_are_left_to_torch(process: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    instructions = process(["asimd"])
    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", list)
    assert setting() is None
    assert instructions.tried == 0


def test_without_a_compiler_nothing_is_known(process: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise RuntimeError("no compiler")

    process(["avx512", "avx2"])
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    assert setting() is None


def test_an_error_inside_passes(process: Use) -> None:
    process(["avx512", "avx2"])
    with pytest.raises(OSError, match="mine"), with_tried_instructions():
        raise OSError("mine")
    assert config.cpp.vec_isa_ok is None
