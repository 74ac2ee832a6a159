"""What is known of a machine is found out once."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor import cpp_builder, cpu_vec_isa
from torch._inductor.cpu_vec_isa import VecAVX2, VecAVX512, VecISA

from pyrovae.infer.machine import kept, processor, with_tried_instructions


class Compiler:
    """Stands in for trying: which programs work, and how many were tried."""

    def __init__(self) -> None:
        self.version, self.works, self.tried = "g++ 13", True, 0

    def check_build(self, instructions: VecISA, code: str) -> bool:
        self.tried += 1
        return self.works


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """On a machine where nothing is known yet."""
    made = Compiler()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(VecISA, "check_build", lambda self, code: made.check_build(self, code))
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "g++")
    monkeypatch.setattr(cpp_builder, "get_compiler_version_info", lambda name: made.version)
    return made


def works(instructions: VecISA, code: str = "int main() {}") -> bool:
    with with_tried_instructions():
        return instructions.check_build(code)


def test_files_tell_torch_and_processor(compiler: Compiler) -> None:
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


def test_instructions_that_work_are_tried_once(compiler: Compiler) -> None:
    assert works(VecAVX2())
    assert works(VecAVX2())
    assert compiler.tried == 1


@pytest.mark.parametrize("other", ["instructions", "flags", "program", "compiler"])
def test_others_are_tried_too(compiler: Compiler, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    works(VecAVX2())
    if other == "compiler":
        compiler.version = "g++ 4"
    if other == "flags":
        monkeypatch.setattr(VecAVX2, "_arch_flags", "-mavx2 -mfma -mavx512bf16")
    compiler.works = False
    assert not works(
        VecAVX512() if other == "instructions" else VecAVX2(), "int f();" if other == "program" else "int main() {}"
    )
    assert compiler.tried == 2


def test_instructions_that_do_not_work_are_tried_each_time(compiler: Compiler) -> None:
    compiler.works = False
    assert not works(VecAVX2())
    assert not works(VecAVX2())
    assert compiler.tried == 2
    compiler.works = True
    assert works(VecAVX2())


@pytest.mark.parametrize("content", ["{ damaged", "[]", '{"x": 1}'])
def test_a_damaged_record_is_written_anew(compiler: Compiler, content: str) -> None:
    kept("instructions").write_text(content)
    assert works(VecAVX2())
    assert works(VecAVX2())
    assert compiler.tried == 1


def test_where_nothing_can_be_written_they_are_tried(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "a file"))
    assert works(VecAVX2())
    assert works(VecAVX2())
    assert compiler.tried == 2


def test_without_a_compiler_torch_finds_out(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    compiler.works = False
    assert not works(VecAVX2())
    assert compiler.tried == 1
    assert not kept("instructions").exists()


def test_another_torch_does_as_it_does(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cpu_vec_isa, "VecISA")
    with with_tried_instructions():
        assert VecAVX2().check_build("")
    assert compiler.tried == 1


def test_torch_is_as_it_was_afterwards(compiler: Compiler) -> None:
    before = VecISA.check_build
    with with_tried_instructions():
        assert VecISA.check_build is not before
    assert VecISA.check_build is before
    with pytest.raises(OSError, match="mine"), with_tried_instructions():
        raise OSError("mine")
    assert VecISA.check_build is before


def test_all_that_torch_tries_is_remembered() -> None:
    """With this machine's own compiler and instructions: a second process starts none to try them."""
    program = """
import subprocess
from torch._inductor import cpu_vec_isa
from pyrovae.infer.machine import with_tried_instructions

run, tried = subprocess.run, []
subprocess.run = lambda *args, **kwargs: tried.append(args[0][:2]) or run(*args, **kwargs)
with with_tried_instructions():
    found = cpu_vec_isa.valid_vec_isa_list()
print(len([call for call in tried if call[1] == "-c"]), *map(str, found), sep=",")
"""
    first, second = (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert second.split(",")[0] == "0"
    assert second.split(",")[1:] == first.split(",")[1:]
