"""A record repeats a computation, reads every tensor anew, and refuses what it cannot hold."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyrovae.infer import record as record_module
from pyrovae.infer.record import CannotRecord, Recorded, recorded_or_itself

X = torch.arange(1.0, 4.0)


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "_warned", set())


# What a record is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torchs_context", [True, False])
def test_it_repeats_the_computation_and_draws_anew(torchs_context: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torchs_context:
        monkeypatch.delattr("torch._guards.tracing")

    def function(x: Tensor) -> Tensor:
        return x + torch.randn(3) + pyro.sample("z", dist.Normal(x, 1.0))

    record = Recorded(function, (X,))
    pyro.set_rng_seed(3)
    expected = [function(X), function(2 * X)]
    pyro.set_rng_seed(3)
    actual = [record(X), record(2 * X)]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_it_reads_tensors_anew() -> None:
    weight, table = nn.Parameter(torch.ones(3)), torch.ones(3)
    record = Recorded(lambda x: (x * weight + table + table).sum(), (X,))
    assert {id(each) for each in record.inputs} == {id(weight), id(table)}
    with torch.no_grad():
        weight.fill_(2.0)
        table.fill_(10.0)
    assert record(X) == 2 * 6 + 60
    assert not record(X).requires_grad


def test_it_holds_until_the_function_computes_something_else() -> None:
    scale, norm = [2.0], nn.BatchNorm1d(3)

    def function(x: Tensor) -> Tensor:
        norm(x.expand(2, 3))
        return x * scale[0] * torch.rand(3)

    record = Recorded(function, (X,), [norm])
    state = torch.get_rng_state()
    assert record.holds((X,))
    assert record.holds((100 * X,))
    scale[0] = 2.0 * (1 + 1e-5)  # rounding, say
    assert record.holds((X,))
    scale[0] = 2.1
    assert not record.holds((X,))
    assert norm.num_batches_tracked == 0
    assert not norm.running_mean.any()
    assert torch.equal(torch.get_rng_state(), state)


# What no record can hold --------------------------------------------------------------------------------------------


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rate", torch.tensor(2.0))
        self.calls = 0

    def count(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


REFUSED: dict[str, tuple[Callable[[Module, Tensor], Tensor], str]] = {
    "item": (lambda m, x: x * m.rate.item(), r"reads the value of a tensor.*, at test_record.py:\d+: `.*item"),
    "NumPy": (lambda m, x: x * float(np.exp(m.rate)), r"reads the values of a tensor.*, at test_record.py:\d+: `.*exp"),
    "counter": (Module.count, r"it changes the attribute Module\.calls as it runs"),
    "noise": (lambda m, x: x * random.random(), "its record computes something else"),
    "an error": (lambda m, x: x @ torch.ones(4), r"size.*, at test_record.py:\d+: `.*torch.ones"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses(name: str) -> None:
    function, match = REFUSED[name]
    module = Module()
    with pytest.raises(CannotRecord, match=match) as error:
        Recorded(lambda x: function(module, x), (X,), [module])
    assert "\n" not in str(error.value)
    assert module.calls == 0


# A record, or the function itself -----------------------------------------------------------------------------------


def test_a_function_that_cannot_be_recorded_runs_itself() -> None:
    function: Callable = lambda x: x * float(x.sum())  # noqa: E731
    with pytest.warns(RuntimeWarning, match="pyrovae: scoring runs eagerly: it reads the value of a tensor"):
        assert recorded_or_itself(function, (X,), [], "scoring", compiled=False) is function


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_error_of_the_record_is_the_functions(compiled: bool) -> None:
    table = torch.randn(3, 4)
    function: Callable = lambda rows: table.index_select(0, rows) + torch.rand(4)  # noqa: E731
    good, bad = torch.tensor([2, 0]), torch.tensor([0, 3])
    run = recorded_or_itself(function, (good,), [], "picking", compiled=compiled)
    assert run is not function
    state = torch.get_rng_state()
    expected = function(good)
    torch.set_rng_state(state)
    torch.testing.assert_close(run(good), expected)
    with pytest.raises(IndexError) as error:
        function(bad)
    with pytest.raises(IndexError, match=re.escape(str(error.value))):
        run(bad)


# Compiling ----------------------------------------------------------------------------------------------------------


def test_where_the_fast_way_fails_the_plain_one_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor

    asked: list[dict] = []

    def compile_without_cpp(graph: Callable, inputs: list, options: dict) -> Callable:
        asked.append(options)
        if "cpp_wrapper" in options:
            raise NotImplementedError("an operation that C++ cannot call")
        return graph

    monkeypatch.setattr(torch._inductor, "compile", compile_without_cpp)
    record = Recorded(torch.sin, (X,))
    record.compile((X,))
    assert ["cpp_wrapper" in options for options in asked] == [True, False]
    assert record.is_compiled
    assert torch.equal(record(X), X.sin())


@pytest.mark.slow
def test_compiled_is_recorded_and_compiling_moves_nothing() -> None:
    """Random numbers in their order too, of sizes that a compiler would like to draw in another."""
    weight, norm = nn.Parameter(torch.ones(3)), nn.BatchNorm1d(3)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        last, first = torch.randn(100_000), torch.randn(8, 3)
        loss = (norm(x) * weight * first).sum()
        return loss.detach(), loss.detach() * last, torch.randn(5000).sum(), *torch.autograd.grad(loss, [weight])

    x = torch.randn(8, 3)
    record = Recorded(function, (x,), [norm])
    state = torch.get_rng_state()
    record.compile((x,))
    assert record.is_compiled
    assert not norm.running_mean.any()
    assert torch.equal(torch.get_rng_state(), state)
    found = record(x), norm.running_mean.clone()
    norm.reset_running_stats()
    torch.set_rng_state(state)
    torch.testing.assert_close(found, (function(x), norm.running_mean), rtol=1e-4, atol=1e-3)
