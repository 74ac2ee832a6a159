"""What a recorded step holds fixed, what may move, and what is noticed: the contract in the docstring of ``SVI``."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from steps import Odd, Plain, adam, assert_same_run, batches, run, sgd, vae, vae_and_adam
from torch import Tensor, nn

from pyrovae import Pair
from pyrovae.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO
from pyrovae.infer import record as record_module
from pyrovae.infer import svi as svi_module

pytestmark = pytest.mark.usefixtures("uncompiled")
BOTH = ("eager", "compiled")


# What may move ------------------------------------------------------------------------------------------------------

FLOATS: dict[str, Callable[[Tensor, int], Any]] = {
    "in its place": lambda x, step: (x, 1.0 + step),
    "by keyword": lambda x, step: {"x": x, "scale": 1.0 + step},
    "a tensor": lambda x, step: (x, torch.tensor(1.0 + step)),
}


@pytest.mark.parametrize("name", [*FLOATS, pytest.param("in its place", marks=pytest.mark.slow)])
def test_a_float_argument_moves_without_a_new_record(name: str, seen: SimpleNamespace) -> None:
    calls = [FLOATS[name](x, step) for step, x in enumerate(batches())]
    assert_same_run(lambda: (pair := Plain(), adam(pair)), calls)
    assert (len(seen.records), len(seen.steps)) == (1, 5)


class Changing(Pair):
    """All sorts of things that a step depends on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.beta, self.kind = 1.0, "normal"
        self.register_buffer("weight", torch.ones(()))
        self.loc = nn.Parameter(torch.zeros(4))
        self.layer, self.more = nn.Linear(4, 4), nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)

    def encoded(self, x: Tensor) -> Tensor:
        for layer in (self.layer, self.more):
            x = layer(x.to(layer.weight.dtype)).float()
        return self.dropout(x)

    def model(self, x: Tensor) -> None:
        family = dist.Normal if self.kind == "normal" else dist.Laplace
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(4), 1.0 / (self.beta * self.weight)).to_event(1))
            pyro.sample("x", family(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc + self.encoded(x), 1.0).to_event(1))


def changing_and_sgd() -> tuple[Pair, Any]:
    pair = Changing()
    return pair, torch.optim.SGD([pair.loc, *pair.layer.parameters()], lr=0.01)


def test_a_buffer_that_is_filled_in_place_moves_without_a_new_record(seen: SimpleNamespace) -> None:
    def act(step: int, svi: SVI, pair: Any) -> None:
        pair.weight.fill_(0.1 * (step + 1))

    assert_same_run(changing_and_sgd, act=act)
    assert (len(seen.records), len(seen.steps)) == (1, 5)


# What is noticed: the step is recorded anew -------------------------------------------------------------------------


def other_strides(svi: SVI, pair: Any) -> None:
    for layer in (pair.layer, pair.more):  # one is trained, one is not
        layer.weight.data = layer.weight.data.t().contiguous().t()


CHANGES: dict[str, Callable[[SVI, Any], Any]] = {
    "a number": lambda svi, pair: setattr(pair, "beta", 0.5),
    "a string": lambda svi, pair: setattr(pair, "kind", "laplace"),
    "a number of a module inside": lambda svi, pair: setattr(pair.dropout, "p", 0.1),
    "the training flag": lambda svi, pair: pair.eval(),
    "the training flag of a module inside": lambda svi, pair: pair.dropout.eval(),
    "a new buffer": lambda svi, pair: setattr(pair, "weight", torch.tensor(0.5)),
    "a new parameter": lambda svi, pair: setattr(pair, "loc", nn.Parameter(torch.ones(4))),
    "a new module": lambda svi, pair: setattr(pair, "more", nn.Sequential(nn.Linear(4, 4), nn.Tanh())[0]),
    "an option of the loss": lambda svi, pair: setattr(svi.loss, "num_particles", 3),
    "another loss": lambda svi, pair: setattr(svi, "loss", RenyiELBO(num_particles=2)),
    "another model": lambda svi, pair: setattr(svi, "model", Odd(float).model),
    "another optimizer": lambda svi, pair: setattr(svi, "optim", adam(pair)),
    "another prepare": lambda svi, pair: setattr(svi, "prepare", lambda x: 1 - x),
    "the dataset's size": lambda svi, pair: setattr(svi, "dataset_size", 100),
    "a frozen layer": lambda svi, pair: pair.layer.requires_grad_(False),
    "parameters added to the optimizer": lambda svi, pair: svi.optim.add_param_group(
        {"params": list(pair.more.parameters())}
    ),
    "strides": other_strides,
    "dtype": lambda svi, pair: pair.more.double(),
    "options after loading": lambda svi, pair: svi.optim.load_state_dict(
        {"state": {}, "param_groups": [svi.optim.state_dict()["param_groups"][0] | {"momentum": 0.9}]}
    ),
    "the default dtype": lambda svi, pair: torch.set_default_dtype(torch.float64),
}


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")  # eagerly, by strides
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_setting_is_recorded_anew(name: str, seen: SimpleNamespace) -> None:
    def act(step: int, svi: SVI, pair: Any) -> None:
        if step == 3:
            CHANGES[name](svi, pair)

    assert_same_run(lambda: (torch.set_default_dtype(torch.float32), changing_and_sgd())[1], act=act)
    assert (len(seen.records), len(seen.steps)) == (2, 5)


@pytest.mark.parametrize("make", [sgd, adam])
def test_autocast_is_part_of_the_setting(make: Callable, seen: SimpleNamespace) -> None:
    def act(step: int, svi: SVI, pair: Any) -> None:
        torch.set_autocast_enabled("cpu", step >= 3)

    with torch.autocast("cpu", enabled=False, cache_enabled=False):  # which restores everything
        assert_same_run(lambda: (pair := vae(), make(pair)), act=act)
    assert (len(seen.records), len(seen.steps)) == (2, 5)


TWELVE = [*batches(), *batches()]
KEEPS_CHANGING: dict[str, tuple[list, Callable[[int, SVI, Any], Any]]] = {
    r"Changing\.beta": (TWELVE, lambda i, svi, pair: setattr(pair, "beta", 1.0 + i)),
    r"Trace_ELBO\.num_particles": (TWELVE, lambda i, svi, pair: setattr(svi.loss, "num_particles", 1 + i)),
    "the optimizer's weight_decay": (TWELVE, lambda i, svi, pair: svi.optim.param_groups[0].update(weight_decay=i)),
    "the shape or a value of an argument": ([torch.ones(i, 4) for i in range(1, 13)], lambda i, svi, pair: None),
}


@pytest.mark.parametrize("what", KEEPS_CHANGING)
def test_after_eight_records_steps_run_eagerly_and_say_what_kept_changing(what: str, seen: SimpleNamespace) -> None:
    calls, act = KEEPS_CHANGING[what]
    with pytest.warns(RuntimeWarning, match=rf"{what}.* keeps changing, and 8 steps were recorded; from now") as warned:
        assert_same_run(changing_and_sgd, calls, act=act)
    assert len(warned) == 1
    assert (len(seen.records), len(seen.steps)) == (8, 8)


# What cannot be recorded --------------------------------------------------------------------------------------------


READ, READS = "it reads the value of a tensor into Python", "it reads the values of a tensor into Python"
ODDITIES: dict[str, tuple[Callable[[Odd, Tensor], Any], str]] = {
    "item": (lambda pair, x: x.mean().item(), READ + r".*, at test_step_contract.py:\d+: `.*item"),
    "item of a parameter": (lambda pair, x: 1 + pair.loc[0].item(), READ + r".*, at test_step_contract.py:\d+"),
    "float": (lambda pair, x: float(x.mean()), READ + r".*, at test_step_contract.py:\d+: `.*float"),
    "if": (lambda pair, x: 0.5 if pair.loc.sum() > 0.1 else 1.0, READ + r".*, at test_step_contract.py:\d+"),
    "numpy": (lambda pair, x: float(x.numpy().mean()), READS + r" \(\.numpy\(\)\), at test_step_contract.py:\d+"),
    "asarray": (lambda pair, x: float(np.asarray(x).mean()), READS + ".*__array__.*, at test_step_contract.py"),
    "tolist": (lambda pair, x: max(x[:, 0].tolist()) + 1, READS + r".*\.tolist\(\)\), at test_step_contract.py"),
    "a counter": (lambda pair, x: 1 / pair.counted(), r"it changes the attribute Odd\.count as it runs"),
    "a boolean index": (lambda pair, x: 1 + x[x > 0.5].mean(), "the shape of a result depends on values.*, at test_s"),
    "nonzero": (lambda pair, x: 1.0 + len(x.nonzero()), "the shape of a result depends on values"),
    "unique": (lambda pair, x: 1.0 + len(torch.unique(x)), "the shape of a result depends on values"),
}


@pytest.mark.parametrize("name", ODDITIES)
def test_what_cannot_be_recorded_runs_eagerly_and_is_named_once(name: str, seen: SimpleNamespace) -> None:
    scale, match = ODDITIES[name]

    setup = lambda: (pair := Odd(scale), sgd(pair))  # noqa: E731
    expected = run(setup, "eager")
    with pytest.warns(RuntimeWarning, match=f"this step runs eagerly: .*{match}") as warned:
        actual = run(setup, "compiled")
    assert len(warned) == 1
    assert warned[0].filename.endswith("steps.py")  # where the step was asked for
    torch.testing.assert_close(actual[:2], expected[:2], rtol=0, atol=0)
    assert actual[2].model.__self__.count == expected[2].model.__self__.count
    assert not seen.steps


@pytest.mark.parametrize("noise", [np.random.rand, random.random])
def test_random_numbers_of_others_than_torch_run_eagerly(noise: Callable, seen: SimpleNamespace) -> None:
    with pytest.warns(RuntimeWarning, match="runs eagerly: its record computes something else.*Python's or NumPy's"):
        run(lambda: (pair := Odd(lambda pair, x: 1 + noise()), sgd(pair)), "compiled")
    assert not seen.steps


def test_a_kind_of_call_that_cannot_be_recorded_leaves_others_recorded(seen: SimpleNamespace) -> None:
    setup = lambda: (pair := Odd(lambda pair, x: 1.0 if len(x) == 8 else x.mean().item() + 1), sgd(pair))  # noqa: E731
    with pytest.warns(RuntimeWarning, match=READ) as warned:
        assert_same_run(setup, [x[: 3 if i % 3 == 2 else 8] for i, x in enumerate(TWELVE)])
    assert len(warned) == 1
    assert len(seen.steps) == 12 - 1 - 4


WRITES: dict[str, Callable[[Odd, Tensor], Any]] = {
    "a buffer": lambda pair, x: 1 + pair.average.mul_(0.5).add_(x.mean()).clone(),
    "a parameter that the pair moves": lambda pair, x: 1 + pair.table.weight.data.mul_(0.5).add_(x[:4]).abs().mean(),
    "its batch": lambda pair, x: 1 + x.mul_(1.5).mean(),
}


@pytest.mark.parametrize("name", [*WRITES, pytest.param("a parameter that the pair moves", marks=pytest.mark.slow)])
def test_recording_leaves_what_it_runs_with_as_it_was(name: str, seen: SimpleNamespace) -> None:
    """So that what the pair writes in place has moved once a step."""
    eager, mine = (run(lambda: (pair := Odd(WRITES[name]), sgd(pair)), backend) for backend in BOTH)
    torch.testing.assert_close(mine[:2], eager[:2], rtol=2e-5, atol=2e-6)
    assert len(seen.steps) == 5


def test_compile_takes_no_step(seen: SimpleNamespace) -> None:
    """And leaves parameters, buffers, random state and gradients as they were."""
    pair = Changing()
    optim = adam(pair)
    svi = SVI(pair.model, pair.guide, optim, Trace_ELBO(), backend="compiled")
    pair.loc.grad = gradient = torch.ones(4)
    before, noise = copy.deepcopy(pair.state_dict()), torch.get_rng_state()
    assert svi.compile(batches()[0])
    assert torch.equal(torch.get_rng_state(), noise)
    torch.testing.assert_close(pair.state_dict(), before, rtol=0, atol=0)
    assert pair.loc.grad is gradient
    assert torch.equal(gradient, torch.ones(4))
    assert not any(state["step"] for state in optim.state.values())
    torch.manual_seed(7)
    losses = torch.stack([svi.step(x) for x in batches()])
    assert (len(seen.records), len(seen.steps)) == (1, 6)
    expected = run(lambda: (pair := Changing(), adam(pair)), "eager")
    torch.testing.assert_close((losses, pair.state_dict()), expected[:2], rtol=2e-5, atol=2e-6)


def test_compile_says_why_not() -> None:
    pair = Plain()
    svi = SVI(lambda x: x.sum() > 0 and pair.model(x), pair.guide, sgd(pair), Trace_ELBO(), backend="compiled")
    with pytest.warns(RuntimeWarning, match=r"this step runs eagerly: it reads the value of a tensor.*x.sum"):
        assert not svi.compile(batches()[0])
    svi.step(batches()[0])
    svi.step(batches()[0])
    for optim in (partial(torch.optim.SGD, lr=0.1), pyro.optim.Adam({"lr": 0.1})):  # they have to meet their parameters
        assert not SVI(pair.model, pair.guide, optim, Trace_ELBO(), backend="compiled").compile(batches()[0])
    assert not SVI(pair.model, pair.guide, sgd(pair), Trace_ELBO(), backend="eager").compile(batches()[0])


# What is fixed, and found by comparing ------------------------------------------------------------------------------

SCALE = 1.0


@pytest.mark.parametrize("make", [sgd, adam])
def test_a_global_that_changes_is_found_by_the_comparison(
    make: Callable, seen: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svi_module, "FIRST_COMPARISONS", (4,))
    monkeypatch.setattr(svi_module, "BETWEEN_COMPARISONS", 4)
    pair = Plain()
    svi = SVI(lambda x: pair.model(x, SCALE), pair.guide, make(pair), Trace_ELBO(), backend="compiled")
    for x in batches():  # one eager step, five recorded ones
        svi.step(x)
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    before = float(svi.evaluate_loss(batches()[0]))
    assert float(svi.step(batches()[0])) != pytest.approx(before)  # it is fixed until the next comparison
    svi.step(batches()[1])
    expected = float(svi.evaluate_loss(batches()[2]))
    with pytest.warns(RuntimeWarning, match=r"a global or an attribute.*the last 3 steps may be off; from now on"):
        assert float(svi.step(batches()[2])) == pytest.approx(expected, rel=1e-6)
    assert len(seen.steps) == 7
    for x in batches():
        assert float(svi.evaluate_loss(x)) == pytest.approx(float(svi.step(x)), rel=1e-6)


def test_programs_are_compared_ever_more_rarely() -> None:
    class Stub:
        """Of a record: it counts its calls, and notes when it is compared."""

        inputs, calls, compared = (), 0, ()

        def holds(self, args: tuple) -> bool:
            self.compared += (self.calls + 1,)
            return True

        def __call__(self, *args: Tensor) -> tuple:
            self.calls += 1
            return (torch.zeros(()),)

    stub: Any = Stub()
    step = svi_module._RecordedStep(stub, [], sgd(Plain()), (), compiled=False)
    for _ in range(3500):
        step(())
    assert stub.compared == (2, 8, 32, 128, 512, 1000, 2000, 3000)


def test_a_record_that_has_come_to_fail_is_given_up() -> None:
    """A tensor that no module holds comes to have another shape."""
    pair, table = Plain(), torch.ones(4)
    model = lambda x: pair.model(x, table.view(2, len(table) // 2).sum())  # noqa: E731
    svi = SVI(model, pair.guide, sgd(pair), Trace_ELBO(), backend="compiled")
    for x in batches():
        svi.step(x)
    table.data = torch.ones(6)
    expected = float(svi.evaluate_loss(batches()[0]))
    with pytest.warns(RuntimeWarning, match=r"its record does not run: .*from now on steps run eagerly"):
        assert float(svi.step(batches()[0])) == pytest.approx(expected, rel=1e-6)
    svi.step(batches()[1])


# Kinds of calls -----------------------------------------------------------------------------------------------------


class Supervised(Plain):
    """With labels, or without: then they are summed out."""

    def model(self, x: Any, y: Any = None, scale: Any = 1.0, *, kind: str = "normal", sizes: Any = (1, 1)) -> None:
        x, extra = (x["x"], x["extra"]) if isinstance(x, dict) else (x[0], x[1]) if isinstance(x, list) else (x, 0.0)
        means = torch.stack([self.loc - 1, self.loc + 1])
        family = dist.Normal if kind == "normal" else dist.Laplace
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.3, 0.7])), obs=y, infer={"enumerate": "parallel"})
            pyro.sample("x", family(means[y] + extra, scale * sum(sizes)).to_event(1), obs=x)

    def guide(self, *args: Any, **kwargs: Any) -> None: ...


def labels(x: Tensor) -> Tensor:
    return (x[:, 0] > 0.5).long()


CALLS: dict[str, tuple[Callable[[Tensor, int], Any], int]] = {  # and the number of records
    "None": (lambda x, step: (x, None), 1),
    "None or a tensor": (lambda x, step: (x, labels(x) if step % 2 else None), 2),
    "or nothing": (lambda x, step: {"x": x, "y": labels(x)} if step % 2 else x, 2),
    "text": (lambda x, step: {"x": x, "kind": "normal" if step < 6 else "laplace"}, 2),
    "a float in a tuple": (lambda x, step: {"x": x, "sizes": (1.0 + step, 1)}, 1),
    "a dict": (lambda x, step: ({"x": x, "extra": 0.1 * x},), 1),
    "a float in a list": (lambda x, step: ([x, 0.1 * step],), 1),
    "whole numbers": (lambda x, step: (x, None, 1 + step % 2), 2),
    "bools and numbers": (lambda x, step: (x, None, True if step % 2 else 1), 2),
    "strides": (lambda x, step: x.t().contiguous().t() if step % 2 else x, 2),
    "expanded": (lambda x, step: x[:1].expand(8, 4), 1),
}


def enum() -> TraceEnum_ELBO:
    return TraceEnum_ELBO(strict_enumeration_warning=False)


@pytest.mark.parametrize("name", CALLS)
def test_each_kind_of_arguments_has_a_record(name: str, seen: SimpleNamespace) -> None:
    call, records = CALLS[name]
    assert_same_run(
        lambda: (pair := Supervised(), sgd(pair)), [call(x, step) for step, x in enumerate(TWELVE)], loss=enum
    )
    assert (len(seen.records), len(seen.steps)) == (records, 11)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x: x.clone().requires_grad_(), "is sparse, or wants a gradient"),
        (lambda x: {"x": x, "sizes": range(3)}, r"an argument is of type builtins\.range"),
    ],
)
def test_arguments_of_other_types_run_eagerly(call: Callable, reason: str, seen: SimpleNamespace) -> None:
    with pytest.warns(RuntimeWarning, match=f"{reason}; from now on steps run eagerly") as warned:
        assert_same_run(lambda: (pair := Supervised(), sgd(pair)), [call(x) for x in TWELVE], loss=enum)
    assert len(warned) == 1
    assert not seen.steps


def test_steps_under_handlers_run_eagerly_and_those_between_recorded(seen: SimpleNamespace) -> None:
    results = []
    for backend in BOTH:
        pair = Plain()
        svi = SVI(pair.model, pair.guide, sgd(pair), Trace_ELBO(), backend=backend)
        results.append([poutine.scale(svi.step, scale=2.0)(x) if i % 2 else svi.step(x) for i, x in enumerate(TWELVE)])
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-6)
    assert (len(seen.records), len(seen.steps)) == (1, 5)


def test_only_the_first_shape_is_compiled(monkeypatch: pytest.MonkeyPatch, seen: SimpleNamespace) -> None:
    compiled = []
    monkeypatch.setattr(svi_module, "compile_or_warn", lambda graph, inputs: compiled.append(len(inputs[-1])))
    assert_same_run(vae_and_adam, [x[:n] for x, n in zip(batches(), (8, 8, 3, 8, 3, 8), strict=True)])
    assert compiled == [8]
    assert [shapes[0][0] for shapes in seen.records] == [8, 3]


# When ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_steps", "recorded"), [(None, 3), (3, 0), (4, 5)])
def test_auto_changes_over_when_it_is_worth_compiling(
    num_steps: int | None, recorded: int, monkeypatch: pytest.MonkeyPatch, seen: SimpleNamespace
) -> None:
    monkeypatch.setattr(svi_module, "WORTH_COMPILING", 4)
    assert_same_run(vae_and_adam, backend="auto", num_steps=num_steps)
    assert len(seen.steps) == recorded


def test_pyros_losses_run_eagerly(seen: SimpleNamespace) -> None:
    with pytest.warns(RuntimeWarning, match=r"runs eagerly: pyro.*Trace_ELBO reads tensors") as warned:
        assert_same_run(vae_and_adam, loss=lambda: pyro.infer.Trace_ELBO(max_plate_nesting=1))
    assert len(warned) == 1
    assert not seen.steps


@pytest.mark.parametrize("x", [torch.zeros(8, 4, 1), torch.full((8, 4), math.nan)], ids=["shape", "value"])
def test_the_first_step_is_validated(x: Tensor) -> None:
    pair = Plain()
    svi = SVI(pair.model, pair.guide, sgd(pair), Trace_ELBO(), backend="compiled")
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=r"[Ss]hape|constraint|support"):
        svi.step(x)


@pytest.mark.parametrize("bad", [torch.zeros(8, 3), torch.zeros(8, 4, dtype=torch.float64)], ids=["features", "dtype"])
def test_a_later_error_is_the_eager_one_and_recorded_steps_go_on(bad: Tensor, seen: SimpleNamespace) -> None:
    messages = []
    for backend in BOTH:
        pair, optim = vae_and_adam()
        svi = SVI(pair.model, pair.guide, optim, Trace_ELBO(), backend=backend)
        for good in batches():
            svi.step(good)
        weights = copy.deepcopy(pair.state_dict())
        with pytest.raises((RuntimeError, ValueError)) as error:
            svi.step(bad)
        messages.append((error.type, str(error.value)))
        torch.testing.assert_close(pair.state_dict(), weights, rtol=0, atol=0)
        svi.step(batches()[0])
    assert messages[0] == messages[1]
    assert len(seen.steps) == 6


# Without torch's internals ------------------------------------------------------------------------------------------


def test_where_torch_cannot_record_steps_run_eagerly(monkeypatch: pytest.MonkeyPatch, seen: SimpleNamespace) -> None:
    monkeypatch.delattr(record_module, "make_fx")
    with pytest.warns(RuntimeWarning, match="this step runs eagerly: name 'make_fx' is not defined") as warned:
        assert_same_run(vae_and_adam)
    assert len(warned) == 1
    assert not seen.steps


@pytest.mark.parametrize("setup", [vae_and_adam, lambda: (pair := vae(), sgd(pair, 1e-3))], ids=["adam", "sgd"])
def test_where_torch_cannot_compile_steps_run_recorded(setup: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor

    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no C++ compiler\nand more of it")

    monkeypatch.undo()  # of the fixture that compiles nothing
    monkeypatch.setattr(record_module, "_warned", set())
    monkeypatch.setattr(torch._inductor, "compile", fails)
    with pytest.warns(RuntimeWarning, match=r"cannot compile the step here \(no C\+\+ compiler\); it runs") as warned:
        svi = assert_same_run(setup)
    assert len(warned) == 1
    assert svi._records
