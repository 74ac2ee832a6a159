"""Saved states load as they were, survive a crash during writing, and are never unpickled."""

from __future__ import annotations

import json
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file

from pyrovae import checkpoint
from pyrovae.checkpoint import load_state, save_state


def assert_equal(first, second):
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert first.shape == second.shape
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)  # keys keep their types and order
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    else:
        assert first == second


STATE = {
    "scalars": {"int": 3, "float": 0.1, "tiny": 5e-324, "big": 2**60, "text": "naïve \n", "none": None, "yes": True},
    "tensors": {
        "float32": torch.randn(3, 2),
        "float64": torch.randn(4, dtype=torch.float64),
        "bfloat16": torch.randn(4).bfloat16(),
        "int64": torch.tensor([2**62, -1]),
        "zero-dim": torch.tensor(2.5),
        "bool": torch.tensor([True, False]),
        "uint8": torch.get_rng_state(),
        "empty": torch.zeros(0, 3),
        "transposed": torch.randn(3, 2).T,
        "of a view": torch.randn(10)[2:4],
        "a parameter": torch.nn.Parameter(torch.ones(2)),
    },
    "integer keys": {0: {"step": torch.tensor(1.0)}, 7: {}},
    "lists": [1, [2, [torch.tensor([3.0])]], {"four": 5}, []],
    "keys of ours": {"dict": 1, "tensor": "0", "a.b/c": 2, "": 3},
}


def test_a_loaded_state_equals_the_saved_one(tmp_path):
    file = tmp_path / "state"
    save_state(file, STATE)
    expected = dict(STATE)
    expected["tensors"] = {name: value.detach() for name, value in STATE["tensors"].items()}
    assert_equal(expected, load_state(file))
    assert list(tmp_path.iterdir()) == [file]  # no temporary file stays


def test_tuples_come_back_as_lists(tmp_path):
    save_state(tmp_path / "state", {"betas": (0.9, 0.999), "nested": ((1,), torch.tensor([2.0]))})
    assert load_state(str(tmp_path / "state")) == {"betas": [0.9, 0.999], "nested": [[1], torch.tensor([2.0])]}


def test_tensors_that_share_memory_can_be_saved(tmp_path):
    """Safetensors refuses them, but a state may hold them."""
    whole = torch.arange(6.0)
    save_state(tmp_path / "state", {"whole": whole, "part": whole[2:], "again": whole})
    assert_equal(load_state(tmp_path / "state"), {"whole": whole, "part": whole[2:], "again": whole})


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.SGD])
def test_a_loaded_optimizer_goes_on_as_one_never_saved(tmp_path, make):
    def train(parameters, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            sum((p - 3).square().sum() for p in parameters).backward()
            optimizer.step()

    def start():
        parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.ones(()))]
        options = {"momentum": 0.9} if make is torch.optim.SGD else {}
        return parameters, make(parameters, lr=0.1, **options)

    straight, optimizer = start()
    train(straight, optimizer, 5)
    parameters, optimizer = start()
    train(parameters, optimizer, 2)
    save_state(tmp_path / "state", {"optimizer": optimizer.state_dict(), "parameters": parameters})
    resumed, optimizer = start()
    state = load_state(tmp_path / "state")
    optimizer.load_state_dict(state["optimizer"])
    with torch.no_grad():
        for parameter, value in zip(resumed, state["parameters"], strict=True):
            parameter.copy_(value)
    train(resumed, optimizer, 3)
    for one, other in zip(straight, resumed, strict=True):
        assert torch.equal(one, other)


def test_a_loaded_random_state_draws_the_same_numbers(tmp_path):
    save_state(tmp_path / "state", {"random": torch.get_rng_state()})
    expected = torch.randn(5)
    torch.set_rng_state(load_state(tmp_path / "state")["random"])
    assert torch.equal(torch.randn(5), expected)


def test_saving_leaves_the_state_and_the_random_numbers_unchanged(tmp_path):
    before, value = torch.get_rng_state(), torch.randn(3, generator=torch.Generator().manual_seed(0))
    state = {"value": value.clone()}
    save_state(tmp_path / "state", state)
    load_state(tmp_path / "state")["value"].zero_()
    assert torch.equal(state["value"], value)
    assert torch.equal(torch.get_rng_state(), before)


# Crashes


@pytest.mark.parametrize("where", ["before", "half way", "rename"])
def test_a_crash_during_writing_leaves_the_old_file(tmp_path, monkeypatch, where):
    file = tmp_path / "state"
    save_state(file, {"version": 1})

    def crash(tensors, path, metadata):
        if where == "half way":
            path.write_bytes(b"half a file")
        raise OSError("no space left")

    def no_rename(*_):
        raise KeyboardInterrupt

    if where == "rename":
        monkeypatch.setattr(os, "replace", no_rename)
    else:
        monkeypatch.setattr(checkpoint, "save_file", crash)
    with pytest.raises((OSError, KeyboardInterrupt)):
        save_state(file, {"version": 2})
    assert load_state(file) == {"version": 1}
    monkeypatch.undo()
    save_state(file, {"version": 3})  # and what the crash left is no obstacle
    assert load_state(file) == {"version": 3}
    assert list(tmp_path.iterdir()) == [file]


def test_a_state_that_cannot_be_saved_leaves_the_old_file(tmp_path):
    file = tmp_path / "state"
    save_state(file, {"version": 1})
    with pytest.raises(TypeError):
        save_state(file, {"version": object()})
    assert load_state(file) == {"version": 1}
    assert list(tmp_path.iterdir()) == [file]


# Files that are not ours


class Bomb:
    """Object that creates a file when it is unpickled."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return (open, (self.file, "w"))


def with_tree(tree):
    """Return a function that writes a valid safetensors file with ``tree`` in place of a state."""
    return lambda path: save_file({"0": torch.zeros(2)}, path, metadata={"pyrovae_state": tree})


def edit(change):
    """Return a function that saves a state and then changes its bytes on disk."""

    def write(path):
        save_state(path, {"a": torch.arange(50.0), "b": 1})
        path.write_bytes(change(path.read_bytes()))

    return write


FOREIGN = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("epoch,bound\n1,-90\n"),
    "zeros": lambda path: path.write_bytes(b"\0" * 100),
    "a huge header": lambda path: path.write_bytes(struct.pack("<Q", 2**62) + b"{}"),
    "truncated": edit(lambda data: data[:-10]),
    "truncated in the header": edit(lambda data: data[:20]),
    "one byte more": edit(lambda data: data + b"x"),
    "a changed header": edit(lambda data: data.replace(b"F32", b"F99")),
    "another program's safetensors": lambda path: save_file({"weight": torch.zeros(2)}, path),
    "another program's metadata": lambda path: save_file({"w": torch.zeros(2)}, path, metadata={"format": "pt"}),
    "no JSON": with_tree("{"),
    "a number": with_tree("3"),
    "a list": with_tree("[1, 2]"),
    "a tensor": with_tree('{"tensor": "0"}'),
    "an absent tensor": with_tree('{"dict": [["a", {"tensor": "5"}]]}'),
    "another shape of object": with_tree('{"neither": 1}'),
    "no pairs": with_tree('{"dict": 3}'),
    "broken pairs": with_tree('{"dict": [["a"]]}'),
    "keys that are lists": with_tree('{"dict": [[[1], 2]]}'),
    "very deep": with_tree("[" * 100_000 + "]" * 100_000),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_damaged_and_foreign_files_are_refused(tmp_path, name):
    file = tmp_path / "state"
    FOREIGN[name](file)
    with pytest.raises(ValueError, match=r"path: .*state is damaged or is no pyrovae checkpoint"):
        load_state(file)


@pytest.mark.parametrize("write", [lambda bomb, path: path.write_bytes(pickle.dumps(bomb)), torch.save])
def test_pickles_are_never_run(tmp_path, write):
    file, mark = tmp_path / "state", tmp_path / "run"
    write(Bomb(mark), file)
    with pytest.raises(ValueError, match="damaged or is no pyrovae checkpoint"):
        load_state(file)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["absent", "folder"])
def test_an_absent_file_is_named(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=f"path: expected a checkpoint, found none at .*{name}"):
        load_state(tmp_path / name)


def test_the_header_holds_the_state_as_json(tmp_path):
    """Any reader of safetensors files can open it."""
    save_state(tmp_path / "state", {"epoch": 3})
    data = (tmp_path / "state").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert json.loads(header["__metadata__"]["pyrovae_state"]) == {"dict": [["epoch", 3]]}
