"""What is known of a machine is found out once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch._inductor import config, cpu_vec_isa

from pyrovae.infer import machine
from pyrovae.infer.machine import kept, processor, with_tried_instructions


class Instructions:
    """``valid_vec_isa_list``: those that the processor names, and of these the ones that work when tried out."""

    def __init__(self, working: list[str]) -> None:
        self.working, self.tried = working, 0

    def __call__(self) -> list[str]:
        self.tried += 1
        return self.working

    def __wrapped__(self) -> list[str]:
        assert config.cpp.vec_isa_ok is True
        return ["avx512", "avx2"]


Use = Callable[[list[str]], Instructions]


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """Begins a process on a machine of its own."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def begin(working: list[str]) -> Instructions:
        machine._all_work.cache_clear()
        instructions = Instructions(working)
        monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", instructions)
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


def test_instructions_are_tried_in_the_first_process(process: Use, tmp_path: Path) -> None:
    first = process(["avx512", "avx2"])
    assert setting() is True
    assert setting() is True
    assert first.tried == 1
    assert config.cpp.vec_isa_ok is None
    second = process(["avx512", "avx2"])
    assert setting() is True
    assert second.tried == 0
    # Another machine may have the same disk, and other instructions.
    kept("instructions").write_text("avx2", encoding="utf-8")
    third = process(["avx512", "avx2"])
    assert setting() is True
    assert third.tried == 1


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


def test_an_error_inside_passes(process: Use) -> None:
    process(["avx512", "avx2"])
    with pytest.raises(OSError, match="mine"), with_tried_instructions():
        raise OSError("mine")
    assert config.cpp.vec_isa_ok is None
