"""The recorded, compiled and captured step: the numbers of the eager one, or the eager one itself and the reason why.

Compiling takes seconds, so most tests run the program that the compiler would be given; the ``slow`` ones compile it.
"""

from __future__ import annotations

import copy
import math
import random
import sys
import warnings
import weakref
from argparse import Namespace
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial, wraps
from io import StringIO
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from packaging.version import Version
from pyro import poutine
from pyro.distributions.transforms import Spline, iterated, planar
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, AutoNormalizingFlow, init_to_sample
from pyro.nn import PyroModule, PyroSample
from test_pairs import CASES, build
from torch import Tensor, nn
from torch.distributions import constraints
from torch.optim.optimizer import _global_optimizer_post_hooks

import pyrovae as pv
from pyrovae import FunctionPair, Pair
from pyrovae.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyrovae.infer import program as program_module
from pyrovae.infer import surroundings as surroundings_module
from pyrovae.infer import svi as svi_module
from pyrovae.infer import update as update_module
from pyrovae.infer.program import Program
from pyrovae.infer.reads import Reads
from pyrovae.infer.snapshot import same_objects
from pyrovae.infer.update import Update
from pyrovae.models import VAE
from pyrovae.training import TrainingDiverged

ADAM = {"lr": 0.01}


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_module, "_said", set())


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs run as they were recorded."""
    monkeypatch.setattr(Program, "compile", lambda self, args: None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The shapes of the arguments that programs were called with."""
    seen: list[tuple] = []
    call = Program.__call__

    def spy(self: Program, *args: Tensor) -> Any:
        seen.append(tuple(arg.shape for arg in args))
        return call(self, *args)

    monkeypatch.setattr(Program, "__call__", spy)
    return seen


def batches(number: int = 6, size: int = 8) -> Tensor:
    return torch.rand(number, size, 4, generator=torch.Generator().manual_seed(1)).round()


def vae() -> VAE:
    torch.manual_seed(0)
    return VAE(4, 2, hidden_dims=(5,))


def run(
    setup: Callable[[], tuple[Pair, Any]], backend: str, xs: Any = None, *, loss: Any = None, **options: Any
) -> tuple[Tensor, dict, SVI]:
    """Losses of steps at fixed noise, and the state that they lead to."""
    pair, optim = setup()
    loss = loss() if loss is not None else Trace_ELBO()
    svi = SVI(pair.model, pair.guide, optim, loss, backend=backend, **options)
    torch.manual_seed(7)
    losses = torch.stack([svi.step(x) for x in (batches() if xs is None else xs)])
    return losses, {name: value.clone() for name, value in pair.state_dict().items()}, svi


def assert_same_run(
    setup: Callable[[], tuple[Pair, Any]], xs: Any = None, *, backend: str = "compiled", **options: Any
):
    """A recorded run equals an eager one to rounding. Returns the recorded one."""
    eager, mine = run(setup, "eager", xs, **options), run(setup, backend, xs, **options)
    torch.testing.assert_close(mine[:2], eager[:2], rtol=2e-5, atol=2e-6)
    return mine[2]


def sgd(pair: Pair, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.SGD(pair.parameters(), lr=lr)


# --- values, gradients and weights: every pair, every loss ---------------------------------------

LOSSES: dict[str, Callable[[], Any]] = {
    "Trace": Trace_ELBO,
    "Trace-4": lambda: Trace_ELBO(num_particles=4),
    "Trace-2-in-turn": lambda: Trace_ELBO(num_particles=2, vectorize_particles=False),
    "MeanField-4": lambda: TraceMeanField_ELBO(num_particles=4),
    "Enum": lambda: TraceEnum_ELBO(strict_enumeration_warning=False),
    "Enum-4": lambda: TraceEnum_ELBO(num_particles=4, strict_enumeration_warning=False),
    "Renyi-1": lambda: RenyiELBO(num_particles=1),
    "Renyi-4": lambda: RenyiELBO(num_particles=4),
    "Renyi-half": lambda: RenyiELBO(alpha=0.5, num_particles=4),
    "Renyi-max": lambda: RenyiELBO(alpha=-math.inf, num_particles=4),
    "Renyi-in-turn": lambda: RenyiELBO(num_particles=2, vectorize_particles=False),
}


def applies(case: str, loss: str) -> bool:
    if loss in ("Trace-2-in-turn", "Renyi-1", "Renyi-half", "Renyi-max", "Renyi-in-turn"):
        return case in ("gmm-amortized", "vae-normal") or (case == "gmm-full" and loss == "Renyi-1")
    if case == "gmm-amortized":  # a discrete guide has no pathwise gradient
        return not loss.startswith("MeanField")
    return loss.startswith(("Enum", "Renyi")) if case.startswith("gmm") else True


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(("case", "loss"), [(c, name) for c in CASES for name in LOSSES if applies(c, name)])
def test_a_recorded_step_is_the_eager_one(case: str, loss: str, calls: list) -> None:
    def setup() -> tuple[Pair, Any]:
        pair, _ = build(case)
        return pair, sgd(pair)

    _, x = build(case)
    assert_same_run(setup, [x, x, x], loss=LOSSES[loss])  # without Adam, weights show gradients
    assert len(calls) == 2


class Global(Pair):
    """A global latent beside local ones, and a discrete one among these."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(4))
        self.rate = nn.Linear(4, 3)
        self.logits = nn.Linear(4, 2)

    def model(self, x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=torch.zeros(2)))
            u = pyro.sample("u", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            loc = mean + k.unsqueeze(-1) + u.sum(-1, keepdim=True)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(self.loc, 0.1).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=self.logits(x)))
            pyro.sample("u", dist.Normal(self.rate(x), 1.0).to_event(1))


class Subsampled(Pair):
    """Draws rows of its own data at every step; ``step`` takes no arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(4))
        self.rows = batches(1, 20)[0]

    def model(self) -> None:
        with pyro.plate("data", 20, subsample_size=5) as index:
            z = pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=self.rows[index])

    def guide(self) -> None:
        with pyro.plate("data", 20, subsample_size=5) as index:
            pyro.sample("z", dist.Normal(self.rows[index] + self.loc, 1.0).to_event(1))


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("loss", ["Trace", "Trace-4", "Trace-2-in-turn", "Renyi-4", "Renyi-in-turn"])
def test_global_and_discrete_latents_and_a_dataset_size(loss: str, calls: list) -> None:
    def setup() -> tuple[Pair, Any]:
        torch.manual_seed(0)
        pair = Global()
        return pair, sgd(pair)

    assert_same_run(setup, batches(3), loss=LOSSES[loss], dataset_size=100)
    assert len(calls) == 2


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("loss", ["Trace", "Trace-2-in-turn", "Renyi-4", "Renyi-in-turn"])
def test_a_subsampled_plate_draws_other_rows_at_each_step(loss: str, calls: list) -> None:
    results = []
    for backend in ("eager", "compiled"):
        pair = Subsampled()
        svi = SVI(pair.model, pair.guide, sgd(pair), LOSSES[loss](), backend=backend)
        torch.manual_seed(0)
        results.append(torch.stack([*(svi.step() for _ in range(5)), pair.loc.detach().sum()]))
    torch.testing.assert_close(*results)
    assert len(set(results[0].tolist())) == 6
    assert len(calls) == 4


COMPILED = {"vae-bernoulli": "Trace", "iwae-2": "Renyi-4", "gmm-full": "Enum"}


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED)
def test_a_compiled_step_is_the_eager_one(case: str) -> None:
    def setup() -> tuple[Pair, Any]:
        pair, _ = build(case)
        return pair, torch.optim.Adam(pair.parameters(), lr=1e-3, fused=True)

    _, x = build(case)
    loss = LOSSES[COMPILED[case]]
    xs = [x, x.flip(0), x[:7], x]
    eager, compiled = (run(setup, backend, xs, loss=loss) for backend in ("eager", "compiled"))
    torch.testing.assert_close(compiled[:2], eager[:2], rtol=2e-4, atol=2e-5)


# --- optimizers ----------------------------------------------------------------------------------


class Strided(VAE):
    """Beside a VAE's: gradients of other strides than their parameters', one shared by two, and an unused parameter."""

    def __init__(self) -> None:
        super().__init__(4, 2, hidden_dims=(5,))
        self.expanded, self.also, self.unused = (nn.Parameter(torch.randn(3)) for _ in range(3))
        self.transposed = nn.Parameter(torch.randn(3, 4))

    def model(self, x: Tensor) -> None:
        super().model(x)
        weight = (self.transposed.t() * torch.arange(12.0).view(4, 3)).sum()
        pyro.factor("f", -(weight + (self.expanded + self.also).sum()) * x.sum())


OPTIMIZERS: dict[str, Callable[[list], Any]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adam-fused-tensor-lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), fused=True),
    "adam-fused-options": lambda p: torch.optim.Adam(
        p, lr=0.01, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.1, fused=True
    ),
    "adam-fused-maximize": lambda p: torch.optim.Adam(p, lr=0.01, maximize=True, fused=True),
    "adam-fused-amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, fused=True),
    "adam-fused-groups": lambda p: torch.optim.Adam(
        [{"params": p[:1], "lr": 0.1}, {"params": p[1:]}], lr=0.01, fused=True
    ),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "adam-fused-decoupled": lambda p: torch.optim.Adam(
        p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True, fused=True
    ),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.001, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "factory": lambda p: lambda params: torch.optim.Adam(params, lr=0.01, fused=True),
    "pyro-adam": lambda p: pyro.optim.Adam({"lr": 0.01}),
    "pyro-adam-foreach": lambda p: pyro.optim.Adam({"lr": 0.01, "foreach": True}),
    "pyro-adam-options": lambda p: pyro.optim.Adam({"lr": 0.01, "betas": (0.5, 0.9), "weight_decay": 0.1}),
    "pyro-adamw": lambda p: pyro.optim.AdamW({"lr": 0.01}),
    "pyro-clipped-adam": lambda p: pyro.optim.ClippedAdam(
        {"lr": 0.01, "clip_norm": 0.5, "lrd": 0.9, "weight_decay": 0.1}
    ),
    "pyro-clip-args": lambda p: pyro.optim.Adam({"lr": 0.01}, {"clip_norm": 0.1}),
    "pyro-per-parameter": lambda p: pyro.optim.Adam(lambda name: {"lr": 0.1 if "bias" in name else 0.01}),
    "pyro-scheduler": lambda p: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "gamma": 0.5}
    ),
}


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "pyro-per-parameter"])
def test_every_optimizer_updates_as_it_does_eagerly(name: str, calls: list) -> None:
    def setup() -> tuple[Pair, Any]:
        torch.manual_seed(0)
        pair = Strided()
        return pair, OPTIMIZERS[name](list(pair.parameters()))

    assert_same_run(setup)
    assert len(calls) == 5


@pytest.mark.slow
def test_strided_gradients_of_a_compiled_step() -> None:
    def setup() -> tuple[Pair, Any]:
        torch.manual_seed(0)
        pair = Strided()
        return pair, torch.optim.Adam(pair.parameters(), lr=0.01, fused=True)

    assert_same_run(setup)


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("fused", [False, True])
def test_parameters_of_two_dtypes(fused: bool) -> None:
    class Mixed(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))

        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.factor("f", -(self.a**2 + self.b**2).sum() * x.sum(-1))

    def setup() -> tuple[Pair, Any]:
        pair = Mixed()
        return pair, torch.optim.Adam(pair.parameters(), lr=0.01, fused=fused)

    assert_same_run(setup)


def in_the_middle(act: Callable[[Pair, Any], Any], optim: Callable[[Pair], Any], backend: str) -> tuple:
    """Weights and optimizer state of a run in whose middle something is done to pair and optimizer, and undone again
    before its last step where it returns how."""
    pair = vae()
    optimizer = optim(pair)
    svi = SVI(pair.model, pair.guide, optimizer, Trace_ELBO(), backend=backend)
    torch.manual_seed(7)
    for step, x in enumerate(batches()):
        if step == 3:
            undo = act(pair, optimizer)
        if step == 5 and undo is not None:
            undo()
        svi.step(x)
    each = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optim_objs.values()
    return pair.state_dict(), [one.state_dict()["state"] for one in each]


def fused_adam(pair: Pair) -> torch.optim.Optimizer:
    return torch.optim.Adam(pair.parameters(), lr=0.01, fused=True)


def set_rate(pair: Pair, optim: Any) -> None:
    optim.param_groups[0]["lr"] = 0.1


def load_state(pair: Pair, optim: Any) -> None:
    state = copy.deepcopy(optim.state_dict())
    state["param_groups"][0]["lr"] = 0.1
    for each in state["state"].values():
        each["exp_avg"].mul_(3)
    optim.load_state_dict(state)


def reset_step_counts(pair: Pair, optim: Any) -> None:
    state = optim.state_dict()  # shares its tensors
    for each in state["state"].values():
        each["step"] = torch.tensor(0.0)
    optim.load_state_dict(state)


def exchange_one_moment(pair: Any, optim: Any) -> None:
    last = list(pair.parameters())[-1]
    optim.state[last]["exp_avg"] = torch.zeros_like(last)


def forget_state(pair: Any, optim: Any) -> None:
    optim.state.clear()


def other_strides(pair: Any, optim: Any) -> None:
    weight = pair.decoder[0].weight
    weight.data = weight.data.t().contiguous().t()


def load_weights(pair: Pair, optim: Any) -> None:
    pair.load_state_dict({name: value + 0.5 for name, value in pair.state_dict().items()})


def freeze(pair: Any, optim: Any) -> None:
    pair.encoder.requires_grad_(False)


def set_pyro_rates(pair: Pair, optim: Any) -> None:
    for each in optim.optim_objs.values():
        each.param_groups[0]["lr"] = 0.1


def set_one_pyro_rate(pair: Any, optim: Any) -> None:
    optim.optim_objs[next(iter(pair.decoder.parameters()))].param_groups[0]["lr"] = 0.1


def pyro_adam(pair: Pair) -> Any:
    return pyro.optim.Adam({"lr": 0.01})


def pyro_momentum(pair: Pair) -> Any:
    return pyro.optim.SGD({"lr": 0.001, "momentum": 0.9})


def scheduled(pair: Pair) -> torch.optim.Optimizer:
    optim = fused_adam(pair)
    torch.optim.lr_scheduler.ExponentialLR(optim, 0.5)
    return optim


def clamp(optim: torch.optim.Optimizer, *_: Any) -> None:
    with torch.no_grad():
        for param in optim.param_groups[0]["params"]:
            param.clamp_(-0.1, 0.1)


def clamping(step: Callable) -> Callable:
    @wraps(step)
    def clamped(self: torch.optim.Optimizer, *args: Any) -> None:
        step(self, *args)
        clamp(self)

    return clamped


def give_a_step(pair: Pair, optim: Any) -> None:
    step = optim.step

    @wraps(step)
    def clamped(*args: Any) -> None:
        step(*args)
        clamp(optim)

    optim.step = clamped


def schedule_a_step(pair: Pair, optim: Any) -> None:
    optim.step = MethodType(clamping(type(optim).step), optim)
    torch.optim.lr_scheduler.ExponentialLR(optim, 0.5)


def to_each(act: Callable[[Pair, Any], None]) -> Callable[[Pair, Any], None]:
    """It, done to each object of a ``pyro.optim`` optimizer."""

    def to_all(pair: Pair, optim: Any) -> None:
        for one in optim.optim_objs.values():
            act(pair, one)

    return to_all


def set_options(pair: Pair, optim: Any, **options: Any) -> None:
    optim.param_groups[0].update(options)


def set_tensor_rate(pair: Pair, optim: Any) -> None:
    optim.param_groups[0]["lr"] = torch.tensor(0.1)


def set_one_pyro_decay(pair: Pair, optim: Any) -> None:
    set_options(pair, next(iter(optim.optim_objs.values())), weight_decay=10.0)


def other_state(pair: Pair, optim: Any) -> None:
    optim.state = defaultdict(dict)


def clear_objects(pair: Pair, optim: Any) -> None:
    optim.optim_objs.clear()


def exchange_objects(pair: Pair, optim: Any) -> None:
    for param in optim.optim_objs:
        optim.optim_objs[param] = torch.optim.SGD([param], lr=0.001)


def clamp_by_hook(pair: Pair, optim: Any) -> None:
    optim.register_step_post_hook(clamp)


def clamp_for_a_while(pair: Pair, optim: Any) -> Callable[[], None]:
    handles = [one.register_step_post_hook(clamp) for one in optim.optim_objs.values()]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def clip(pair: Pair, optim: Any) -> None:
    for param in optim.grad_clip:
        optim.grad_clip[param] = partial(nn.utils.clip_grad_value_, clip_value=0.01)


ACTS: dict[str, tuple[Callable, Callable]] = {
    "nothing": (lambda pair, optim: None, fused_adam),
    "learning rate": (set_rate, fused_adam),
    "optimizer state": (load_state, fused_adam),
    "step counts": (reset_step_counts, fused_adam),
    "one moment": (exchange_one_moment, fused_adam),
    "no state": (forget_state, fused_adam),
    "strides": (other_strides, fused_adam),
    "weights": (load_weights, fused_adam),
    "frozen": (freeze, fused_adam),
    "frozen, not fused": (freeze, sgd),
    "learning rate, pyro": (set_pyro_rates, pyro_adam),
    "one learning rate, pyro": (set_one_pyro_rate, pyro_adam),
    "step": (give_a_step, fused_adam),
    "step beside a scheduler": (give_a_step, scheduled),
    "step under a scheduler": (schedule_a_step, fused_adam),
    "step, pyro": (to_each(give_a_step), pyro_adam),
    "options, pyro": (to_each(partial(set_options, weight_decay=10.0, betas=(0.0, 0.5))), pyro_adam),
    "another kernel, pyro": (to_each(partial(set_options, foreach=True, maximize=True)), pyro_adam),
    "momentum, pyro": (to_each(partial(set_options, momentum=0.0)), pyro_momentum),
    "one weight decay, pyro": (set_one_pyro_decay, pyro_adam),
    "tensors, pyro": (to_each(set_tensor_rate), pyro_adam),
    "optimizer state, pyro": (to_each(load_state), pyro_adam),
    "step counts, pyro": (to_each(reset_step_counts), pyro_adam),
    "no state, pyro": (to_each(forget_state), pyro_adam),
    "other state, pyro": (to_each(other_state), pyro_momentum),
    "no objects, pyro": (clear_objects, pyro_adam),
    "other objects, pyro": (exchange_objects, pyro_adam),
    "hook, pyro": (to_each(clamp_by_hook), pyro_adam),
    "hook for a while, pyro": (clamp_for_a_while, pyro_adam),
    "clipping, pyro": (clip, pyro_adam),
}


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(("act", "optim"), ACTS.values(), ids=ACTS)
def test_what_is_done_between_steps_counts(act: Callable, optim: Callable, calls: list) -> None:
    eager, mine = (in_the_middle(act, optim, backend) for backend in ("eager", "compiled"))
    torch.testing.assert_close(mine, eager, rtol=2e-5, atol=2e-6)
    assert len(calls) == 5


ON_ALL: dict[str, Callable] = {
    "hook": lambda patch, *_: patch.setitem(_global_optimizer_post_hooks, -1, clamp),
    "step of the class": lambda patch, *_: patch.setattr(torch.optim.Adam, "step", clamping(torch.optim.Adam.step)),
}


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("optim", [fused_adam, pyro_adam])
@pytest.mark.parametrize("act", ON_ALL.values(), ids=ON_ALL)
def test_what_is_done_to_all_optimizers_counts(act: Callable, optim: Callable, calls: list) -> None:
    runs = []
    for backend in ("eager", "compiled"):
        with pytest.MonkeyPatch.context() as patch:
            runs.append(in_the_middle(partial(act, patch), optim, backend))
    torch.testing.assert_close(runs[1], runs[0], rtol=2e-5, atol=2e-6)
    assert len(calls) == 5


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("optim", [fused_adam, scheduled, pyro_adam])
def test_recorded_steps_skip_the_optimizers_own(optim: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = vae()
    svi = SVI(pair.model, pair.guide, optim(pair), Trace_ELBO(), backend="compiled")
    svi.step(batches()[0])
    monkeypatch.setattr(torch.optim.Adam, "_init_group", lambda *_: pytest.fail("its own step"))
    for x in batches():
        svi.step(x)


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("lacks", ["a kernel", "hooks"])
def test_where_torch_lacks_what_the_update_uses_the_optimizer_takes_its_step(
    lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def setup() -> tuple[Pair, Any]:
        pair = vae()
        return pair, fused_adam(pair)

    expected = run(setup, "compiled")
    if lacks == "a kernel":
        monkeypatch.setattr(update_module, "_KERNELS", ("_fused_adam_", "_absent_"))
    else:
        monkeypatch.setattr(update_module, "_ALL_OPTIMIZERS_HOOKS", [{0: lambda: None}, {}])
    monkeypatch.setattr(Update, "_fused_adam", lambda *_: pytest.fail("the kernel itself"))
    torch.testing.assert_close(run(setup, "compiled")[:2], expected[:2], rtol=2e-5, atol=2e-6)


def test_a_graph_is_of_what_the_optimizer_has() -> None:
    """It is captured again where that changes, and not at all where the objects of ``pyro.optim`` differ."""
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    many, one = pyro.optim.Adam(ADAM), torch.optim.Adam(params)
    many(params)
    of_many, of_one = Update(many, params), Update(one, params)
    fixed = of_many.fixed(), of_one.fixed()
    assert same_objects(fixed[0], of_many.fixed())
    assert same_objects(fixed[1], of_one.fixed())
    many.optim_objs[params[0]].param_groups[0]["lr"] = 0.1
    one.register_step_post_hook(clamp)
    assert not of_many.fixed()
    assert not same_objects(fixed[1], of_one.fixed())
    many.optim_objs[params[1]].param_groups[0]["lr"] = 0.1
    assert len(of_many.fixed()) == len(fixed[0])
    assert not same_objects(fixed[0], of_many.fixed())


@pytest.mark.usefixtures("recorded")
def test_another_loss_counts(calls: list) -> None:
    def losses(backend: str) -> list[float]:
        pair = vae()
        svi = SVI(pair.model, pair.guide, fused_adam(pair), Trace_ELBO(), backend=backend)
        torch.manual_seed(7)
        result = []
        for step, x in enumerate(batches()):
            if step == 3:
                svi.loss = RenyiELBO(0, 4)
            result.append(svi.step(x).item())
        return result

    eager = losses("eager")
    assert not calls
    assert losses("compiled") == pytest.approx(eager, rel=1e-5)
    assert calls


@pytest.mark.usefixtures("recorded")
def test_a_scheduler_of_torch(calls: list) -> None:
    def train(backend: str) -> dict:
        pair = vae()
        optim = fused_adam(pair)
        svi = SVI(pair.model, pair.guide, optim, Trace_ELBO(), backend=backend, checked=True)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optim, 0.5)
        torch.manual_seed(7)
        for x in batches():
            svi.step(x)
            schedule.step()
        return pair.state_dict()

    torch.testing.assert_close(train("compiled"), train("eager"), rtol=2e-5, atol=2e-6)
    assert len(calls) == 6


@pytest.mark.usefixtures("recorded")
def test_hooks_of_the_optimizer_run() -> None:
    pair = vae()
    optim = fused_adam(pair)
    ran = []
    optim.register_step_post_hook(lambda *_: ran.append(1))
    svi = SVI(pair.model, pair.guide, optim, Trace_ELBO(), backend="compiled")
    for x in batches():
        svi.step(x)
    assert len(ran) == 6


@pytest.mark.usefixtures("recorded")
def test_no_gradients_are_left_behind() -> None:
    for make in OPTIMIZERS["adam"], OPTIMIZERS["adam-fused"], OPTIMIZERS["pyro-adam"]:
        pair = vae()
        svi = SVI(pair.model, pair.guide, make(list(pair.parameters())), Trace_ELBO(), backend="compiled")
        for x in batches():
            assert not svi.step(x).requires_grad
        assert all(p.grad is None for p in pair.parameters())


# --- plain functions, buffers --------------------------------------------------------------------


def plain_model(x: Tensor) -> None:
    scale = pyro.param("model.scale", torch.ones(4), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)


def plain_guide(x: Tensor) -> None:
    loc = pyro.param("guide.loc", torch.zeros(4))
    bias = pyro.param("guide.bias", lambda: torch.ones(4))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc * x + bias, 0.5).to_event(1))


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("name", ["factory", "pyro-adam", "pyro-clipped-adam", "pyro-per-parameter", "pyro-scheduler"])
def test_plain_functions(name: str, calls: list) -> None:
    results = []
    for backend in ("eager", "compiled"):
        pyro.clear_param_store()
        optim = OPTIMIZERS[name]([])
        svi = SVI(plain_model, plain_guide, optim, Trace_ELBO(), backend=backend)
        torch.manual_seed(0)
        losses = []
        for step, x in enumerate(batches()):
            losses.append(svi.step(x))
            if name == "pyro-scheduler" and step % 2:
                optim.step()
        params = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
        results.append((losses, params, optim.get_state() if name.startswith("pyro") else {}))
    torch.testing.assert_close(results[1][:2], results[0][:2], rtol=2e-5, atol=2e-6)
    assert results[0][2].keys() == results[1][2].keys()
    if name == "pyro-adam":
        torch.testing.assert_close(results[1][2], results[0][2], rtol=2e-5, atol=2e-6)
    assert len(calls) == 5


@pytest.mark.usefixtures("recorded")
def test_a_param_store_that_is_loaded_between_steps(calls: list) -> None:
    results = []
    for backend in ("eager", "compiled"):
        pyro.clear_param_store()
        svi = SVI(plain_model, plain_guide, pyro.optim.Adam(ADAM), Trace_ELBO(), backend=backend)
        torch.manual_seed(0)
        for step, x in enumerate(batches()):
            svi.step(x)
            if step == 1:
                saved = copy.deepcopy(pyro.get_param_store().get_state())
            if step == 3:
                pyro.get_param_store().set_state(saved)
        results.append({name: value.detach().clone() for name, value in pyro.get_param_store().items()})
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-6)
    assert len(calls) == 3 + 1


def coin() -> tuple[Callable, Callable]:
    """Flips one by one."""

    def model(x: Tensor) -> None:
        bias = pyro.sample("bias", dist.Beta(2.0, 2.0))
        for i in pyro.plate("flips", 8):
            pyro.sample(f"x{i}", dist.Bernoulli(bias), obs=x[i, 0])

    def guide(x: Tensor) -> None:
        counts = pyro.param("counts", torch.full((2,), 3.0), constraint=constraints.positive)
        pyro.sample("bias", dist.Beta(counts[0], counts[1]))

    return model, guide


def mixture() -> tuple[Callable, Callable]:
    """Its parameters are global latents."""

    @config_enumerate
    def model(x: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.full((3,), 2.0)))
        with pyro.plate("components", 3):
            locs = pyro.sample("locs", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(locs[z], 0.5), obs=x[:, 0])

    return model, AutoDelta(poutine.block(model, expose=["weights", "locs"]), init_loc_fn=init_to_sample)


def hidden_markov() -> tuple[Callable, Callable]:
    """One chain, of the batch's rows."""

    @config_enumerate
    def model(x: Tensor) -> None:
        rows = pyro.sample("rows", dist.Dirichlet(torch.ones(2, 2) + torch.eye(2)).to_event(1))
        state = 0
        for t in pyro.markov(range(len(x))):
            state = pyro.sample(f"state{t}", dist.Categorical(rows[state]))
            pyro.sample(f"x{t}", dist.Normal(torch.tensor([0.2, 0.8])[state], 0.3), obs=x[t, 0])

    def guide(x: Tensor) -> None:
        rows = pyro.param("rows_loc", torch.full((2, 2), 0.5), constraint=constraints.simplex)
        pyro.sample("rows", dist.Delta(rows, event_dim=2))

    return model, guide


def with_lstm() -> tuple[Callable, Callable]:
    lstm = nn.LSTM(1, 3, batch_first=True)

    def guide(x: Tensor) -> None:
        pyro.module("lstm", lstm)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(lstm(x.unsqueeze(-1))[0][..., 0], 0.5).to_event(1))

    return plain_model, guide


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("make", [coin, mixture, hidden_markov, with_lstm])
def test_programs_of_tutorials(make: Callable, calls: list) -> None:
    results = []
    for backend in ("eager", "compiled"):
        pyro.clear_param_store()
        torch.manual_seed(0)
        loss = TraceEnum_ELBO(strict_enumeration_warning=False)
        svi = SVI(*make(), pyro.optim.Adam(ADAM), loss, backend=backend)
        losses = [svi.step(x) for x in batches()]
        results.append((losses, {name: value.detach().clone() for name, value in pyro.get_param_store().items()}))
    torch.testing.assert_close(results[1], results[0], rtol=2e-5, atol=2e-6)
    assert len(calls) == 5


@pytest.mark.usefixtures("recorded")
def test_function_pair(calls: list) -> None:
    def setup() -> tuple[Pair, Any]:
        return FunctionPair(plain_model, plain_guide), lambda params: torch.optim.Adam(params, lr=0.01, fused=True)

    assert_same_run(setup)
    assert len(calls) == 5


def normed(encoder: nn.Module) -> tuple[Callable, Callable]:
    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    return plain_model, guide


class Normed(Pair):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self._functions = normed(encoder)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("kind", ["pair", "functions", "function pair"])
def test_running_statistics_move_as_they_do_eagerly(kind: str, calls: list) -> None:
    results = []
    for backend in ("eager", "compiled"):
        pyro.clear_param_store()
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        pair = Normed(encoder) if kind == "pair" else FunctionPair(*normed(encoder))
        model, guide = normed(encoder) if kind == "functions" else (pair.model, pair.guide)
        svi = SVI(model, guide, lambda params: torch.optim.Adam(params, **ADAM), Trace_ELBO(), backend=backend)
        for x in batches():
            svi.step(x)
        encoder.eval()  # and a switch is noticed
        for x in batches():
            svi.step(x)
        results.append(encoder.state_dict())
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-6)
    assert results[0]["1.num_batches_tracked"] == results[1]["1.num_batches_tracked"] == 7  # one is the first look
    assert len(calls) == 5 + 5


# --- what cannot be recorded ---------------------------------------------------------------------


class Counting:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        return 0.5 if self.calls < 4 else 1.0


class Odd(Pair):
    """A VAE of its own kind of oddness."""

    def __init__(self, odd: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.odd, self.count, self.log = (odd,), 0, []
        self.loc = nn.Parameter(torch.zeros(4))
        self.average = torch.zeros(())
        self.anneal, self.steps, self.seen, self.last = Counting(), iter(range(99)), set(), deque([1.0])
        self.array, self.by_name, self.averages = np.ones(1), {"rate": 1.0}, {"x": torch.zeros(())}
        self.table = nn.Embedding.from_pretrained(torch.ones(4, 4))
        self.numpy, self.torch = np.random.default_rng(0), torch.Generator().manual_seed(0)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        scale = self.odd[0](self, x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc + x, scale).to_event(1))


def annealed(pair: Odd, x: Tensor) -> float:
    pair.count += 1
    return 1 / pair.count


def branching(pair: Odd, x: Tensor) -> float:
    return 0.5 if pair.loc.sum() > 0.1 else 1.0


def growing(pair: Odd, x: Tensor) -> float:
    pair.log.append(len(x))
    return 1 + len(pair.log)


def filled(x: Tensor) -> Tensor:
    mask = torch.zeros(len(x), dtype=torch.bool)
    mask[:4] = x[:4, 0] > 0.5
    return mask


def remembering(pair: Odd, x: Tensor) -> float:
    pair.seen.add(len(pair.seen))
    return 0.5 if len(pair.seen) < 4 else 1.0


def queueing(pair: Odd, x: Tensor) -> float:
    pair.last.append(pair.last[-1] / 2)
    return 1 + pair.last.pop()


def queueing_on(pair: Odd, x: Tensor) -> float:
    pair.last.append(pair.last[-1] / 2)
    return 1.0 if len(pair.last) < 4 else 2.0


def counting_in_array(pair: Odd, x: Tensor) -> float:
    pair.array += 1
    return 0.5 if pair.array[0] < 4 else 1.0


def decaying_in_dict(pair: Odd, x: Tensor) -> float:
    for name in pair.by_name:
        pair.by_name[name] *= 0.5
    return 0.5 if sum(pair.by_name.values()) > 0.1 else 1.0


def seeding(pair: Odd, x: Tensor) -> float:
    torch.manual_seed(3)
    return 1.0


ODDITIES = {
    "item": (lambda pair, x: x.mean().item(), r"reads the value of a tensor.*, at test_backends.py:\d+: `.*item"),
    "if": (branching, r"reads the value of a tensor.*, at test_backends.py:\d+: `return 0.5 if pair"),
    "numpy": (lambda pair, x: float(x.numpy().mean()), r"reads the values of a tensor.*, at test_backends.py:\d+"),
    "annealing": (annealed, r"it changes Odd\.count as it runs"),
    "a list": (growing, r"it changes Odd\.log as it runs"),
    "a callable": (lambda pair, x: pair.anneal(), r"it changes Odd\.anneal as it runs"),
    "a set": (remembering, r"it changes Odd\.seen as it runs"),
    "a deque": (queueing_on, r"it changes Odd\.last as it runs"),
    "an array": (counting_in_array, r"it changes Odd\.array as it runs"),
    "a dict": (decaying_in_dict, r"it changes Odd\.by_name as it runs"),
    "an iterator": (lambda pair, x: 1 / (1 + next(pair.steps)), "it may take what an iterator gives next"),
    "a seed": (seeding, "its record computes something else"),
    "a new generator": (
        lambda pair, x: 1 + torch.rand((), generator=torch.Generator().manual_seed(3)),
        "it makes a Generator each time it runs|object has no attribute",  # older ones record no generator
    ),
    "numpy noise": (lambda pair, x: 1 + np.random.rand(), r"each time it runs, at test_backends.py:\d+: `pyro.sample"),  # noqa: NPY002
    "noise of its own": (lambda pair, x: 1 + pair.numpy.random(), "each time it runs"),
    "a rare branch": (lambda pair, x: 0.5 if random.random() < 1e-3 else 1.0, "random numbers of Python's or NumPy's"),
    "a rare branch of its own": (lambda pair, x: 0.5 if pair.numpy.random() < 1e-3 else 1.0, "random numbers of"),
    "a boolean index": (
        lambda pair, x: 1 + x[x > 0.5].mean(),
        r"the shape of a result depends on values.*, at test_backends.py:\d+: `.*x > 0.5",
    ),
    "a mask filled in part": (lambda pair, x: 1 + x[filled(x)].sum(), "the shape of a result depends on values"),
    "a number of values": (lambda pair, x: 1.0 + len(torch.unique(x)), "the shape of a result depends on values"),
}


@pytest.mark.usefixtures("recorded")
def test_a_reason_that_lies_in_no_line_of_the_users_names_the_library() -> None:
    spline = Spline(4)

    def model(x: Tensor) -> None:  # whose density Pyro asks for later
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(4), 1.0), [spline]).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    pyro.clear_param_store()
    svi = SVI(model, plain_guide, pyro.optim.Adam(ADAM), Trace_ELBO(), backend="compiled")
    svi.step(batches()[0])
    with pytest.warns(RuntimeWarning, match=r"depends on values.*, in pyro\.distributions\.transforms\.spline \(_mono"):
        svi.step(batches()[1])


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(("odd", "match"), ODDITIES.values(), ids=ODDITIES)
def test_oddities_run_eagerly_and_are_named_once(odd: Callable, match: str, calls: list) -> None:
    def setup() -> tuple[Pair, Any]:
        np.random.seed(0)  # noqa: NPY002
        pair = Odd(odd)
        return pair, sgd(pair, 0.01)

    expected = run(setup, "eager")
    with pytest.warns(RuntimeWarning, match=f"this step runs eagerly: .*{match}") as warned:
        actual = run(setup, "compiled")
    assert len(warned) == 1
    torch.testing.assert_close(actual[:2], expected[:2], rtol=0, atol=0)
    assert not calls


class Arguments(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(4))

    def model(self, x: Tensor, scale: Any = 1.0) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.loc, scale).to_event(1), obs=x)

    def guide(self, x: Tensor, scale: Any = 1.0) -> None: ...


def averaging(pair: Odd, x: Tensor) -> Tensor:
    return 1 + pair.average.mul_(0.5).add_(x.mean()).clone()


def changing_its_batch(pair: Odd, x: Tensor) -> Tensor:
    return 1 + x.mul_(1.5).mean()


def averaging_in_dict(pair: Odd, x: Tensor) -> Tensor:
    return 1 + pair.averages["x"].mul_(0.5).add_(x.mean()).clone()


def moving_a_parameter(pair: Odd, x: Tensor) -> Tensor:
    pair.table.weight.data.mul_(0.5).add_(x[:4])
    return 1 + pair.table.weight.abs().mean()


RECORDED = {
    "a tensor attribute": averaging,
    "a tensor in a dict": averaging_in_dict,
    "a parameter that the pair moves": moving_a_parameter,
    "a queue as long as before": queueing,
    "the batch": changing_its_batch,
    "a generator": lambda pair, x: 1 + torch.rand((), generator=pair.torch),
    "a constant mask": lambda pair, x: 1 + x[:, torch.arange(4) < 2].mean(),
}


if Version(torch.__version__) < Version("2.13"):  # older ones record no generator of one's own
    del RECORDED["a generator"]


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("odd", RECORDED.values(), ids=RECORDED)
def test_recording_leaves_what_it_runs_with_as_it_was(odd: Callable, calls: list) -> None:
    assert_same_run(lambda: (pair := Odd(odd), sgd(pair, 0.01)))
    assert len(calls) == 5


@pytest.mark.slow
def test_compiling_leaves_what_it_runs_with_as_it_was(calls: list) -> None:
    assert_same_run(lambda: (pair := Odd(moving_a_parameter), sgd(pair, 0.01)))
    assert len(calls) == 5


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("case", ["an argument twice", "an argument that is an attribute"])
def test_an_argument_is_only_an_argument(case: str, calls: list) -> None:
    """Though the tensor that was there when the step was recorded was something else too."""
    results = []
    for backend in ("eager", "compiled"):
        scales = list(1 + batches())
        pair = Odd(lambda pair, x: pair.average.mean())
        pair.average = scales[1]
        plain = Arguments()
        used = plain if case == "an argument twice" else pair
        svi = SVI(used.model, used.guide, sgd(used, 0.01), Trace_ELBO(), backend=backend)
        torch.manual_seed(0)
        results.append(
            [
                svi.step(scales[max(step, 1)], scales[1]) if used is plain else svi.step(scales[max(step, 1)])
                for step in range(6)
            ]
        )
    torch.testing.assert_close(*results)
    assert len(calls) == 5


def modules_in(place: str, net: nn.Module) -> tuple[Callable, Callable]:
    """Model and guide, as users write them, whose module lies in this place."""

    class Holder:
        def __init__(self) -> None:
            self.net = net

        def guide(self, x: Tensor) -> None:
            encode(self.net, x)

        __call__ = guide

    def encode(net: Callable, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 1.0).to_event(1))

    nets, by_name, holder = [net], {"net": net}, Holder()

    def default(x: Tensor, net: nn.Module = net) -> None:
        encode(net, x)

    guides: dict[str, Callable] = {
        "a list": lambda x: encode(nets[0], x),
        "a dict": lambda x: encode(by_name["net"], x),
        "a default": default,
        "an object": lambda x: encode(holder.net, x),
        "an object's method": lambda x: holder.guide(x),
        "a method": holder.guide,
        "a callable object": holder,
    }
    return plain_model, guides[place]


def losses_with_another_put_there(model: Callable, put: Callable, pair: Arguments, backend: str) -> list[Tensor]:
    svi = SVI(model, pair.guide, sgd(pair, 0.01), Trace_ELBO(), backend=backend)
    losses = []
    for step, x in enumerate([*batches(), *batches()]):
        if step == 6:
            put()
        losses.append(svi.step(x))
    return losses


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    "place", ["a list", "a dict", "a default", "an object", "an object's method", "a method", "a callable object"]
)
def test_modules_are_found(place: str, calls: list) -> None:
    """Their statistics are put back after recording, and ``eval`` is noticed."""
    results = []
    for backend in ("eager", "compiled"):
        pyro.clear_param_store()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
        svi = SVI(*modules_in(place, net), lambda params: torch.optim.SGD(params, 1e-3), Trace_ELBO(), backend=backend)
        losses = [svi.step(x) for x in batches()]
        net.eval()
        losses += [svi.step(x) for x in batches()]
        results.append((losses, net.state_dict()))
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-6)
    assert len(calls) == 10


def scaled_by(pair: Pair, options: Any) -> Callable:
    return lambda x: pair.model(x, options.beta)


BETA = 1.0


@dataclass(slots=True)
class Slotted:
    beta: float

    def twice(self) -> float:
        return 2 * self.beta


class ByName(dict):
    def __getattr__(self, name: str) -> Any:
        return self[name]


class Lazy:
    def __init__(self, options: dict) -> None:
        self.__dict__["_options"] = options

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["_options"][name]


def itself() -> float:
    return itself.beta


class Annealed(Arguments):
    beta = 1.0
    rates: ClassVar = [1.0]

    class Inner:
        beta = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.options = SimpleNamespace(beta=1.0)
        self._cached_beta = 1.0
        self.betas, self.layers = [0.0, 1.0], (SimpleNamespace(beta=1.0), Slotted(1.0))

    def by_itself(self, x: Tensor) -> None:
        self.model(x, self._cached_beta)

    def by_class(self, x: Tensor) -> None:
        self.model(x, self.beta)

    def by_options(self, x: Tensor) -> None:
        self.model(x, self.options.beta)

    def by_layers(self, x: Tensor) -> None:
        self.model(x, self.betas[1] + sum(layer.beta for layer in self.layers))

    def by_global(self, x: Tensor) -> None:
        self.model(x, BETA)

    def by_inner(self, x: Tensor) -> None:
        self.model(x, self.Inner.beta + self.rates[0])

    def by_attribute(self, x: Tensor) -> None:
        self.model(x, self.anneal())


class Schedule:
    beta = 1.0

    def __init__(self) -> None:
        self.now = 1.0

    @property
    def value(self) -> float:
        return self.now

    @staticmethod
    def at_class() -> float:
        return Schedule.beta

    def __call__(self) -> float:
        return self.now


SCHEDULE = Schedule()
MODULE, HELPERS = ModuleType("configuration"), ModuleType("helpers")
HELPERS.__file__ = "helpers.py"
exec(compile("beta, nested = 1.0, {'beta': 1.0}\ndef weight(): return beta", "helpers.py", "exec"), vars(HELPERS))
WEIGHT = HELPERS.weight
PLACES = [
    *("a closure's object", "its own", "an attribute's", "its class", "a handler", "a dict", "a cell", "global"),
    *("a nested dict", "a nested object", "a class", "a static method", "a module", "a property", "a callable"),
    *("a default", "getattr", "getattr's default", "a function inside", "a partial", "a list", "a nested list"),
    *("a module's list", "an object in a tuple", "slots in a tuple", "slots", "a slotted object's method"),
    *("a method's global", "another module's function", "its function by name", "another module's dict"),
    *("a class's class", "a class's list", "a function as attribute", "a callable as attribute", "a function's own"),
    *("a dict by variable key", "a dict by attribute", "a lazy object", "a deque", "an import", "a partial's object"),
    *("a hook", "a helper's argument", "a class default", "a decorated method", "a special method", "made inside"),
]


def beta_of(holder: Any) -> float:
    return holder.beta


def passing(function: Callable) -> Callable:
    @wraps(function)
    def same(*args: Any) -> Any:
        return function(*args)

    return same


class Defaults:
    beta = 1.0


class Multiplier:
    def __rmul__(self, number: float) -> float:
        return number * SCHEDULE.now


class Made:
    def __init__(self) -> None:
        self.weight = SCHEDULE.now


def with_a_number_in(place: str, pair: Annealed, monkeypatch: pytest.MonkeyPatch) -> tuple[Callable, Callable]:
    """A model that reads a number there, and how to change it."""
    options, by_name, cell = SimpleNamespace(beta=1.0), {"beta": 1.0}, 1.0
    outer, nested = SimpleNamespace(kl=options), {"kl": by_name}
    by_part = partial(pair.model, scale=1.0)
    for owner, name in ((Annealed, "beta"), (Schedule, "beta"), (SCHEDULE, "now")):
        monkeypatch.setattr(owner, name, 1.0)
    monkeypatch.setattr(MODULE, "beta", 1.0, raising=False)
    monkeypatch.setitem(globals(), "BETA", 1.0)
    monkeypatch.setattr(HELPERS, "beta", 1.0)
    monkeypatch.setitem(HELPERS.nested, "beta", 1.0)
    betas, slotted = [1.0, 2.0], Slotted(1.0)
    lists = {"kl": [betas]}
    monkeypatch.setattr(Annealed.Inner, "beta", 1.0)
    monkeypatch.setattr(Annealed, "rates", [1.0])
    monkeypatch.setattr(itself, "beta", 1.0, raising=False)
    monkeypatch.setitem(sys.modules, "helpers", HELPERS)
    attributes, lazy, last, key = ByName(beta=1.0), Lazy(by_name), deque([1.0]), "beta"
    pair.anneal = SCHEDULE if place == "a callable as attribute" else lambda: options.beta

    def imported(x: Tensor) -> None:
        import helpers

        pair.model(x, helpers.beta)

    def of_object(holder: Any, x: Tensor) -> None:
        pair.model(x, holder.beta)

    class Decorated(Annealed):
        @passing
        def decorated(self) -> float:
            return self.options.beta

    if place == "a decorated method":
        pair.__class__ = Decorated
    defaults, multiplier = Defaults(), Multiplier()

    if place == "a hook":
        pair.layer = nn.Identity()
        pair.layer.register_forward_hook(lambda module, args, result: result * options.beta)
    scale = poutine.scale_messenger.ScaleMessenger(1.0)

    def put_into_cell(beta: float) -> None:
        nonlocal cell
        cell = beta

    return {
        "a closure's object": (scaled_by(pair, options), partial(setattr, options, "beta")),
        "its own": (pair.by_itself, partial(setattr, pair, "_cached_beta")),
        "an attribute's": (pair.by_options, partial(setattr, pair.options, "beta")),
        "its class": (pair.by_class, partial(setattr, Annealed, "beta")),
        "a handler": (scale(pair.model), partial(setattr, scale, "scale")),
        "a dict": (lambda x: pair.model(x, by_name["beta"]), partial(by_name.__setitem__, "beta")),
        "a cell": (lambda x: pair.model(x, cell), put_into_cell),
        "global": (lambda x: pair.model(x, BETA), partial(monkeypatch.setitem, globals(), "BETA")),
        "a nested dict": (lambda x: pair.model(x, nested["kl"]["beta"]), partial(by_name.__setitem__, "beta")),
        "a nested object": (lambda x: pair.model(x, outer.kl.beta), partial(setattr, options, "beta")),
        "a class": (lambda x: pair.model(x, Schedule.beta), partial(setattr, Schedule, "beta")),
        "a static method": (lambda x: pair.model(x, Schedule.at_class()), partial(setattr, Schedule, "beta")),
        "a module": (lambda x: pair.model(x, MODULE.beta), partial(setattr, MODULE, "beta")),
        "a property": (lambda x: pair.model(x, SCHEDULE.value), partial(setattr, SCHEDULE, "now")),
        "a callable": (lambda x: pair.model(x, SCHEDULE()), partial(setattr, SCHEDULE, "now")),
        "getattr": (lambda x: pair.model(x, getattr(options, "beta")), partial(setattr, options, "beta")),  # noqa: B009
        "a default": (lambda x: pair.model(x, by_name.get("gamma", 1.0)), partial(by_name.__setitem__, "gamma")),
        "getattr's default": (
            lambda x: pair.model(x, getattr(options, "gamma", 1.0)),
            partial(setattr, options, "gamma"),
        ),
        "a function inside": (lambda x: (lambda: pair.model(x, BETA))(), partial(globals().__setitem__, "BETA")),
        "a partial": (by_part, partial(by_part.keywords.__setitem__, "scale")),
        "a list": (lambda x: pair.model(x, betas[0]), partial(betas.__setitem__, 0)),
        "a nested list": (lambda x: pair.model(x, lists["kl"][0][1]), partial(betas.__setitem__, 1)),
        "a module's list": (pair.by_layers, partial(pair.betas.__setitem__, 1)),
        "an object in a tuple": (pair.by_layers, partial(setattr, pair.layers[0], "beta")),
        "slots in a tuple": (pair.by_layers, partial(setattr, pair.layers[1], "beta")),
        "slots": (lambda x: pair.model(x, slotted.beta), partial(setattr, slotted, "beta")),
        "a slotted object's method": (lambda x: pair.model(x, slotted.twice()), partial(setattr, slotted, "beta")),
        "a method's global": (lambda x: pair.by_global(x), partial(monkeypatch.setitem, globals(), "BETA")),
        "another module's function": (lambda x: pair.model(x, HELPERS.weight()), partial(setattr, HELPERS, "beta")),
        "its function by name": (lambda x: pair.model(x, WEIGHT()), partial(setattr, HELPERS, "beta")),
        "a class's class": (pair.by_inner, partial(setattr, Annealed.Inner, "beta")),
        "a class's list": (pair.by_inner, partial(Annealed.rates.__setitem__, 0)),
        "a function as attribute": (pair.by_attribute, partial(setattr, options, "beta")),
        "a callable as attribute": (pair.by_attribute, partial(setattr, SCHEDULE, "now")),
        "a function's own": (lambda x: pair.model(x, itself()), partial(setattr, itself, "beta")),
        "a dict by variable key": (lambda x: pair.model(x, by_name[key[:]]), partial(by_name.__setitem__, "beta")),
        "a dict by attribute": (lambda x: pair.model(x, attributes.beta), partial(attributes.__setitem__, "beta")),
        "a lazy object": (lambda x: pair.model(x, lazy.beta), partial(by_name.__setitem__, "beta")),
        "a deque": (lambda x: pair.model(x, last[0]), partial(last.__setitem__, 0)),
        "an import": (imported, partial(setattr, HELPERS, "beta")),
        "a partial's object": (partial(of_object, options), partial(setattr, options, "beta")),
        "a hook": (lambda x: pair.model(x, pair.layer(torch.ones(()))), partial(setattr, options, "beta")),
        "a helper's argument": (lambda x: pair.model(x, beta_of(options)), partial(setattr, options, "beta")),
        "a class default": (lambda x: pair.model(x, defaults.beta), partial(setattr, defaults, "beta")),
        "a decorated method": (lambda x: pair.model(x, pair.decorated()), partial(setattr, pair.options, "beta")),
        "a special method": (lambda x: pair.model(x, 1.0 * multiplier), partial(setattr, SCHEDULE, "now")),
        "made inside": (lambda x: pair.model(x, Made().weight), partial(setattr, SCHEDULE, "now")),
        "another module's dict": (
            lambda x: pair.model(x, HELPERS.nested["beta"]),
            partial(HELPERS.nested.__setitem__, "beta"),
        ),
    }[place]


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("place", PLACES)
def test_numbers_of_other_objects_count(place: str, calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that change once, and then at every step."""
    results = []
    for backend in ("eager", "compiled"):
        pair = Annealed()
        model, put = with_a_number_in(place, pair, monkeypatch)
        svi = SVI(model, pair.guide, sgd(pair, 0.01), Trace_ELBO(), backend=backend)
        losses = [svi.step(x) for x in batches()[:2]]
        for step, x in enumerate([*batches(), *batches()]):
            if step in (0, *range(3, 7)):
                put(3.0 + step)
            losses.append(svi.step(x))
        results.append(losses)
    torch.testing.assert_close(*results)
    comes = place in ("a default", "getattr's default", "a class default")
    assert len(calls) == (11 if comes else 12)  # a number that comes is no number that changes


def unwatched(pair: Arguments) -> tuple[Callable, Callable]:
    """A model that reads a number which is not watched, and how to change it."""
    beta = ContextVar("beta", default=1.0)
    return lambda x: pair.model(x, beta.get()), beta.set


@pytest.mark.usefixtures("recorded")
def test_what_changes_unseen_is_found_out(calls: list) -> None:
    """At every step: before one is wrong."""
    results = []
    for backend in ("eager", "compiled"):
        pair = Arguments()
        model, put = unwatched(pair)
        svi, losses = SVI(model, pair.guide, sgd(pair, 0.01), Trace_ELBO(), backend=backend), []
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            for step, x in enumerate(batches()):
                put(1.0 + step / 2)
                losses.append(svi.step(x))
        results.append((losses, pair.loc))
    torch.testing.assert_close(*results)
    assert len(calls) == 1
    assert "computes something else than when its step was recorded" in str(warned[0].message)
    assert len(warned) == 1


@pytest.mark.usefixtures("recorded")
def test_what_changes_unseen_and_late_is_found_out(calls: list) -> None:
    for _ in range(2):  # each run says so
        calls.clear()
        pair = Arguments()
        model, put = unwatched(pair)
        svi = SVI(model, pair.guide, sgd(pair, 0.01), Trace_ELBO(), backend="compiled")
        for step in range(32):
            svi.step(batches()[step % 6])
            if step == 20:
                put(2.0)
        with pytest.warns(
            RuntimeWarning, match="the last 23 steps may have been those of before; from now on steps run eagerly"
        ):
            svi.step(batches()[0])
        assert len(calls) == 31
        svi.step(batches()[0])
        assert len(calls) == 31


@pytest.mark.usefixtures("recorded")
def test_a_pair_that_has_come_to_fail_fails(calls: list) -> None:
    pair, healthy = Arguments(), ContextVar("healthy", default=True)

    def model(x: Tensor) -> None:
        if not healthy.get():
            raise ValueError("no more")
        pair.model(x)

    svi = SVI(model, pair.guide, sgd(pair, 0.01), Trace_ELBO(), backend="compiled")
    svi.step(batches()[0])
    svi.step(batches()[0])
    token = healthy.set(False)
    with pytest.raises(ValueError, match="no more"):
        svi.step(batches()[0])
    healthy.reset(token)
    svi.step(batches()[0])
    assert len(calls) == 2


def test_programs_are_compared_with_the_pair_now_and_then() -> None:
    due: list[int] = []
    program = SimpleNamespace()
    recorded = svi_module._Recorded(program=program, step=lambda: torch.ones(()))  # type: ignore[arg-type]
    program.still_holds = lambda args: due.append(recorded.runs) or True
    for _ in range(25_000):
        recorded()
    assert due == [2, 8, 32, 128, 512, 2048, 8192, 16_384, 24_576]


UNNAMED: dict[str, Callable[[Annealed, dict[str, Any]], tuple[Callable, Callable]]] = {
    "a pair's": lambda pair, state: (lambda x: pair.model(x), partial(setattr, pair, "epoch")),
    "a dict's": lambda pair, state: (lambda x: pair.model(x, state["beta"]), partial(state.__setitem__, "epoch")),
    "an object's": lambda pair, state: (
        lambda x: pair.model(x, pair.options.beta),
        partial(setattr, pair.options, "epoch"),
    ),
}


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("place", UNNAMED)
def test_what_no_step_reads_may_change(place: str, calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what it reads: a count of epochs, say. It is compared with the pair once."""
    compared: list[Program] = []
    still_holds = Program.still_holds
    monkeypatch.setattr(
        Program, "still_holds", lambda *args, **tolerance: compared.append(args[0]) or still_holds(*args)
    )
    pair, state = Annealed(), {"beta": 1.0, "epoch": 0}
    pair.epoch = pair.options.epoch = 0
    model, put = UNNAMED[place](pair, state)
    svi = SVI(model, pair.guide, sgd(pair), Trace_ELBO(), backend="compiled")
    for epoch in range(20):
        for x in batches()[:2]:
            svi.step(x)
        put(epoch + 1)
    assert len(calls) == 39
    assert len(compared) <= 5  # when it is recorded, at the second step, the eighth and the 32nd; and at the change


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("optim", [sgd, pyro_adam])
def test_what_no_step_reads_may_change_at_every_step(optim: Callable, calls: list) -> None:
    pyro.clear_param_store()
    pair = Annealed()
    svi = SVI(pair.by_itself, pair.guide, optim(pair), Trace_ELBO(), backend="compiled")
    for step in range(20):
        pair.epoch = step
        svi.step(batches()[step % 6])
    assert len(calls) == 19


@pytest.mark.usefixtures("recorded")
def test_what_no_step_reads_may_change_together_with_a_switch(calls: list) -> None:
    pair = Annealed()
    svi = SVI(pair.by_itself, pair.guide, sgd(pair), Trace_ELBO(), backend="compiled")
    for epoch in range(10):
        pair.epoch = epoch
        for step, x in enumerate(batches()):
            pair.train(step < 4)
            svi.step(x)
    assert len(calls) >= 56


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("start", [1, 1.0])
def test_what_makes_no_difference_in_one_state_may_in_another(start: float, calls: list) -> None:
    """A schedule that is picked by its name: no code names its entries."""

    def losses(backend: str) -> list[Tensor]:
        pair, schedule = Arguments(), {"scale": 1.0, "warm": start, "late": start}
        options = SimpleNamespace(phase="warm")
        model = lambda x: pair.model(x, schedule["scale"] * schedule[options.phase])  # noqa: E731
        svi = SVI(model, pair.guide, sgd(pair), Trace_ELBO(), backend=backend)
        found = []
        for step, x in enumerate([*batches(), *batches(), *batches()]):
            if step in (5, 12, 15):
                schedule["late"] += 1  # nothing reads it at first
            if step == 9:
                options.phase = "late"
            found.append(svi.step(x))
        return found

    torch.testing.assert_close(losses("compiled"), losses("eager"))
    assert len(calls) >= 14


@pytest.mark.usefixtures("recorded")
def test_what_no_step_read_may_come_to_be_read(calls: list) -> None:
    def losses(backend: str) -> list[Tensor]:
        pair, options = Arguments(), SimpleNamespace(beta=1.0, weight=lambda: 1.0)
        svi = SVI(lambda x: pair.model(x, options.weight()), pair.guide, sgd(pair), Trace_ELBO(), backend=backend)
        found = []
        for step, x in enumerate([*batches(), *batches()]):
            if step in (3, 4, 8, 10):
                options.beta = 1.0 + step
            if step == 6:
                options.weight = lambda: options.beta
            found.append(svi.step(x))
        return found

    torch.testing.assert_close(losses("compiled"), losses("eager"))
    assert len(calls) >= 8


@pytest.mark.usefixtures("recorded")
def test_what_no_step_reads_may_change_where_nothing_can_be_recorded() -> None:
    pair = Annealed()

    def model(x: Tensor) -> None:
        if x.sum() > 0:
            pair.model(x)

    svi = SVI(model, pair.guide, sgd(pair), Trace_ELBO(), backend="compiled")

    def steps() -> None:
        for step in range(20):
            pair.epoch = step
            svi.step(batches()[0])

    with pytest.warns(RuntimeWarning, match="an `if` on a tensor"):
        steps()


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("change", ["beta", "epoch and beta"])
def test_what_is_read_by_a_variable_key_counts(change: str, calls: list) -> None:
    def losses(backend: str) -> list[Tensor]:
        pair, state, key = Arguments(), {"loc": 1.0, "beta": 1.0, "epoch": 0}, "beta"
        model = lambda x: pair.model(x, state["loc"] * state[key[:]])  # noqa: E731
        svi = SVI(model, pair.guide, sgd(pair), Trace_ELBO(), backend=backend)
        found = []
        for step, x in enumerate([*batches(), *batches()]):
            if step in (3, 7):
                state.update(dict.fromkeys(change.split(" and "), 1.0 + step))
            found.append(svi.step(x))
        return found

    torch.testing.assert_close(losses("compiled"), losses("eager"))
    assert len(calls) == 10


@pytest.mark.usefixtures("recorded")
def test_a_program_trains_its_own_parameters_after_a_look_at_another_state(calls: list) -> None:
    def losses(backend: str) -> list[Tensor]:
        pair, state, keys = Arguments(), {"loc": 1.0, "other": False}, ("other",)
        pair.first, pair.second = nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(()))
        model = lambda x: pair.model(x, state["loc"] + (pair.second if state[keys[0]] else pair.first).exp())  # noqa: E731
        svi = SVI(model, pair.guide, sgd(pair), Trace_ELBO(), backend=backend)
        found = []
        for step, x in enumerate([*batches(), *batches()]):
            state["other"] = 4 <= step < 8
            found.append(svi.step(x))
        return found

    torch.testing.assert_close(losses("compiled"), losses("eager"))
    assert len(calls) == 10


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("when", [3, 8])
def test_a_record_that_has_come_to_fail_is_given_up(when: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a step that compares it with the pair, and at one that does not."""
    monkeypatch.setattr(svi_module, "_layouts", lambda tensors: ())
    results = []
    for backend in ("eager", "compiled"):
        pair = Untrained(lambda pair, x: (x.to(pair.fixed.weight.dtype) @ pair.fixed.weight).float())
        svi = SVI(pair.model, pair.guide, trained(pair), Trace_ELBO(), backend=backend)
        losses = [float(svi.step(batches()[0])) for _ in range(when)]
        pair.fixed.double()
        with (
            pytest.warns(RuntimeWarning, match="its record does not run.*from now on")
            if svi._programs
            else nullcontext()
        ):
            losses.append(float(svi.step(batches()[0])))
        losses += [float(svi.step(batches()[0])) for _ in range(3)]
        results.append(losses)
    assert results[1] == pytest.approx(results[0], rel=1e-5)


# --- memory ---------------------------------------------------------------------------------------


class Untrained(Pair):
    """Computes the location with weights that are not trained."""

    def __init__(self, location: Callable[[Untrained, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.loc, self.fixed, self._location = nn.Parameter(torch.zeros(4)), nn.Linear(4, 4), location
        self.fixed.requires_grad_(requires_grad=False)
        self.register_buffer("ones", torch.ones(4))
        self.register_buffer("same", self.ones.view(4))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.loc + self._location(self, x), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None: ...


def trained(pair: Pair) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in pair.parameters() if p.requires_grad], lr=0.01)


def transposed(module: nn.Linear) -> None:
    module.weight.data = module.weight.data.t().contiguous().t()


LAID_OUT: dict[str, Callable[[nn.Linear], Any]] = {
    "half": nn.Module.half,
    "double": nn.Module.double,
    "strides": transposed,
    "shape": lambda module: setattr(module.weight, "data", torch.full((1, 4), 0.5)),
}


@pytest.mark.parametrize("change", LAID_OUT)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_a_step_reads_may_come_to_lie_otherwise(
    change: str, compiled: bool, calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules that are not trained too: the tensor object stays the same."""
    if not compiled:
        monkeypatch.setattr(Program, "compile", lambda self, args: None)
    results = []
    for backend in ("eager", "compiled"):
        pair = Untrained(lambda pair, x: x * pair.fixed.weight.float().mean(0))
        svi = SVI(pair.model, pair.guide, trained(pair), Trace_ELBO(), backend=backend)
        losses = []
        for step in range(7):
            losses.append(float(svi.step(batches()[step % 6])))
            if step == 3:
                LAID_OUT[change](pair.fixed)
        results.append(losses)
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert len(calls) == 6


def moving_shared_memory(pair: Untrained, x: Tensor) -> Tensor:
    pair.ones.mul_(0.9)
    return pair.same * x.mean(0)


def moving_its_argument(pair: Untrained, x: Tensor) -> Tensor:
    return pair.ones * x.add_(1.0).mean(0)


@pytest.mark.slow
@pytest.mark.parametrize("location", [moving_shared_memory, moving_its_argument])
def test_memory_that_is_shared_and_written_to_is_not_compiled(location: Callable, calls: list) -> None:
    results = []
    for backend in ("eager", "compiled"):
        pair, xs = Untrained(location), batches()
        if location is moving_its_argument:
            pair.register_buffer("ones", xs.view(-1)[:4])  # which overlaps with the batch
        svi = SVI(pair.model, pair.guide, trained(pair), Trace_ELBO(), backend=backend)
        warns = pytest.warns(RuntimeWarning, match="cannot compile .*it writes to an argument, or to memory that two")
        with warns if backend == "compiled" else nullcontext():
            results.append([float(svi.step(xs[0])) for _ in range(5)])
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert len(calls) == 4


class Tagged(Tensor): ...


def tagged(x: Tensor, weight: float) -> Tensor:
    x.weight = weight  # type: ignore[attr-defined]
    return x


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (lambda x: torch.complex(x, -x).conj().imag, "negated or conjugated"),
        (lambda x: tagged(x, 2.0), "attributes or methods of its own"),
        (lambda x: x.as_subclass(Tagged), "attributes or methods of its own"),
    ],
)
def test_a_batch_is_more_than_shape_and_values(batch: Callable[[Tensor], Tensor], reason: str, calls: list) -> None:
    results = []
    for backend in ("eager", "compiled"):
        pair = Untrained(lambda pair, x: getattr(x, "weight", 1.0) * x.mean(0))
        svi = SVI(pair.model, pair.guide, trained(pair), Trace_ELBO(), backend=backend)
        losses = [float(svi.step(x)) for x in batches()[:3]]
        with pytest.warns(RuntimeWarning, match=reason) if backend == "compiled" else nullcontext():
            losses += [float(svi.step(batch(x))) for x in batches()[3:].clone()]
        results.append(losses)
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert len(calls) == 2


@pytest.mark.usefixtures("recorded")
def test_a_batch_that_torchs_compiler_has_noted_something_on_is_a_batch(calls: list) -> None:
    pair, x = Arguments(), batches()[0]
    torch._dynamo.maybe_mark_dynamic(x, 0)
    assert x.__dict__
    svi = SVI(pair.model, pair.guide, sgd(pair), Trace_ELBO(), backend="compiled")
    for _ in range(3):
        svi.step(x)
    assert len(calls) == 2


@pytest.mark.usefixtures("recorded")
def test_pyro_optim_updates_parameters_named_by_shape() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.param(f"loc {len(x)}", torch.zeros(4))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    results = []
    for backend in ("eager", "compiled"):
        pyro.clear_param_store()
        svi = SVI(model, lambda x: None, pyro.optim.SGD({"lr": 0.01}), Trace_ELBO(), backend=backend)
        results.append([float(svi.step(batches()[0][:size])) for size in (8, 8, 8, 3, 3, 3, 8, 8, 3)])
    assert results[1] == pytest.approx(results[0], rel=1e-5)


@pytest.mark.usefixtures("recorded")
@pytest.mark.filterwarnings("ignore:pyrovae. this step runs eagerly. element 0 of tensors does not require grad")
def test_without_gradients_a_step_is_the_eager_one() -> None:
    results = []
    for backend in ("eager", "compiled"):
        pair = Arguments()
        svi = SVI(pair.model, pair.guide, sgd(pair, 0.01), Trace_ELBO(), backend=backend)
        losses = []
        for step, x in enumerate(batches()):
            with torch.set_grad_enabled(step != 3):
                losses.append(float(svi.step(x)))
        results.append(losses)
    assert results[1] == pytest.approx(results[0], rel=1e-5)


@pytest.mark.usefixtures("recorded")
def test_a_svi_can_be_copied_after_compiled_steps(calls: list) -> None:
    pair = Arguments()
    scale = torch.ones(())
    svi = SVI(lambda x: pair.model(x, scale), pair.guide, sgd(pair, 0.01), Trace_ELBO(), backend="compiled")
    for x in batches():
        svi.step(x)
    copied = copy.deepcopy(svi)
    calls.clear()
    for x in batches():
        assert float(copied.step(x)) == pytest.approx(float(svi.step(x)), rel=1e-5)
    assert calls


LAYER = nn.Identity()


def scale_of(x: float) -> float:
    return x


def replaced(place: str, pair: Arguments, monkeypatch: pytest.MonkeyPatch) -> tuple[Callable, Callable]:
    """A model that reads something else than a number, and how to put another in its place."""
    by_name: dict[str, Any] = {"beta": torch.ones(()), "index": 1}
    tensors = [torch.ones(())]
    functions: list[Callable] = [lambda x: x]

    def applied(x: Tensor) -> None:
        scale: Any = 1.0
        for function in functions:
            scale = function(scale)
        pair.model(x, scale)

    def by_default(x: Tensor, scale: float = 1.0) -> None:
        pair.model(x, scale)

    def thrice(x: Any) -> Any:
        return 3 * x

    class Scale:
        def of(self, x: Any) -> Any:
            return x

    def by_object(x: Tensor) -> None:
        pair.model(x, scale.of(1.0))

    scale, layer = Scale(), nn.Identity()
    layer.forward = lambda x: functions[0](x)  # type: ignore[method-assign]
    condition = {"beta": torch.ones(())}

    def sampled(x: Tensor) -> None:
        pair.model(x, pyro.sample("beta", dist.Normal(1.0, 1.0)))

    return {
        "a global function": (
            lambda x: pair.model(x, scale_of(1.0)),
            lambda: monkeypatch.setitem(globals(), "scale_of", thrice),
        ),
        "the code of a function": (
            lambda x: pair.model(x, scale_of(1.0)),
            lambda: monkeypatch.setattr(scale_of, "__code__", (lambda x: 3 * x).__code__),
        ),
        "a global module": (
            lambda x: pair.model(x, LAYER(torch.ones(()))),
            lambda: monkeypatch.setitem(globals(), "LAYER", nn.Softplus()),
        ),
        "a method": (by_object, lambda: setattr(Scale, "of", lambda self, x: 3 * x)),
        "a method of one object": (by_object, lambda: setattr(scale, "of", thrice)),
        "a module's forward": (
            lambda x: pair.model(x, layer(torch.ones(()))),
            lambda: functions.__setitem__(0, thrice),
        ),
        "conditioned data": (
            poutine.condition(sampled, condition),
            lambda: condition.__setitem__("beta", torch.full((), 3.0)),
        ),
        "True for 1": (
            lambda x: pair.model(x, 2.0 + x.new_ones(2)[by_name["index"]].sum()),
            lambda: by_name.__setitem__("index", True),
        ),
        "a tensor in a dict": (
            lambda x: pair.model(x, by_name["beta"]),
            lambda: by_name.__setitem__("beta", torch.full((), 3.0)),
        ),
        "a tensor in a list": (
            lambda x: pair.model(x, tensors[0]),
            lambda: tensors.__setitem__(0, torch.full((), 3.0)),
        ),
        "a function in a list": (applied, lambda: functions.__setitem__(0, lambda x: 3 * x)),
        "a function more": (applied, lambda: functions.append(lambda x: 3 * x)),
        "a default argument": (by_default, lambda: setattr(by_default, "__defaults__", (3.0,))),
    }[place]


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    "place",
    [
        *("a tensor in a dict", "a tensor in a list", "a function in a list", "a function more", "a default argument"),
        *("a global function", "the code of a function", "a global module", "a method", "a method of one object"),
        *("a module's forward", "conditioned data", "True for 1"),
    ],
)
def test_what_is_replaced_counts(place: str, calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for backend in ("eager", "compiled"):
        pair = Arguments()
        with monkeypatch.context() as patch:
            results.append(losses_with_another_put_there(*replaced(place, pair, patch), pair, backend))
    torch.testing.assert_close(*results)
    assert len(calls) == 10


@pytest.mark.usefixtures("recorded")
def test_dataset_size_and_torchs_settings_count(calls: list) -> None:
    results = []
    for backend in ("eager", "compiled"):
        pair, x = Global(), torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
        pair.load_state_dict({name: torch.ones_like(value) for name, value in pair.state_dict().items()})
        options = {"dataset_size": 80, "backend": backend}
        svi = SVI(pair.model, pair.guide, sgd(pair), Trace_ELBO(), **options)  # type: ignore[arg-type]
        torch.manual_seed(0)
        losses = [svi.step(x) for _ in range(3)]
        svi.dataset_size = 800
        losses += [svi.step(x) for _ in range(3)]
        for _ in range(3):
            with torch.autocast("cpu"):
                losses.append(svi.step(x))
        results.append(losses)
    torch.testing.assert_close(*results)
    assert len(calls) == 8


class Doubled(list):
    def __getitem__(self, index: Any) -> Any:
        return 2 * super().__getitem__(index)


@pytest.mark.usefixtures("recorded")
def test_lists_of_other_kinds_and_what_only_looks_like_slots(calls: list) -> None:
    """``complex.real`` makes a new number at each look, and takes none."""
    results = []
    for backend in ("eager", "compiled"):
        doubled, number, pair = Doubled([1.0, 2.0]), 1 + 2j, Arguments()

        def model(x: Tensor, pair=pair, doubled=doubled, number=number) -> None:
            pair.model(x.real, number.real * doubled[0])

        svi = SVI(model, pair.guide, sgd(pair, 0.01), Trace_ELBO(), backend=backend)
        losses = []
        for step, x in enumerate([*batches(), *batches()]):
            if step >= 6:
                doubled[0] = 1.0 + step
            losses.append(svi.step(x))
        results.append(losses)
        assert list.__getitem__(doubled, 0) == 12.0
        assert list.__getitem__(doubled, 1) == 2.0
    torch.testing.assert_close(*results)
    assert len(calls) == 10


@pytest.mark.usefixtures("recorded")
def test_a_global_that_shares_its_name_with_an_attribute(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Arguments()
    svi = SVI(lambda x: pair.model(x, 1 + x.mean()), pair.guide, sgd(pair, 0.01), Trace_ELBO(), backend="compiled")
    for step, x in enumerate([*batches(), *batches()]):
        monkeypatch.setitem(globals(), "mean", step)
        svi.step(x)
    assert len(calls) == 11


@pytest.mark.usefixtures("recorded")
def test_hooks_on_accumulated_gradients_run(calls: list) -> None:
    pair, ran = vae(), []
    param = next(pair.parameters())
    param.register_post_accumulate_grad_hook(lambda param: ran.append(1))
    svi = SVI(pair.model, pair.guide, sgd(pair), Trace_ELBO(), backend="compiled")
    svi.step(batches()[0])
    with pytest.warns(RuntimeWarning, match="hooks that run after a gradient was accumulated are not recorded"):
        svi.step(batches()[1])
    assert ran == [1, 1]
    assert not calls


@pytest.mark.usefixtures("recorded")
def test_a_number_that_a_class_comes_to_have(calls: list) -> None:
    class Heir(Annealed):
        """Reads a number of its parent's class."""

    results = []
    for backend in ("eager", "compiled"):
        if "beta" in vars(Heir):
            del Heir.beta
        pair = Heir()
        svi = SVI(pair.by_class, pair.guide, sgd(pair, 0.01), Trace_ELBO(), backend=backend)
        losses = [svi.step(x) for x in batches()]
        Heir.beta = 3.0
        results.append(losses + [svi.step(x) for x in batches()])
    torch.testing.assert_close(*results)
    assert len(calls) == 10


class Checked(dict):
    def __setitem__(self, key: str, value: float) -> None:
        assert isinstance(value, float)
        super().__setitem__(key, value)


class Hidden:
    @property
    def __dict__(self) -> dict:  # type: ignore[override]
        raise RuntimeError("not here")


def long_list() -> Any:
    last = None
    for _ in range(3000):
        last = SimpleNamespace(next=last, beta=1.0)
    return last


@pytest.mark.usefixtures("recorded")
def test_objects_of_all_sorts(calls: list) -> None:
    """A dict that checks what it is given, a long chain of objects, things that are named as sites are."""
    config, chain, trainer = Checked(beta=1.0), long_list(), SimpleNamespace(x=None, data=0)
    pair = Arguments()

    def model(x: Tensor) -> None:
        trainer.seen = chain.next.beta
        pair.model(x, config["beta"] * chain.beta)

    def losses(backend: str) -> list[Tensor]:
        config["beta"] = chain.beta = 1.0
        pair.load_state_dict(Arguments().state_dict())
        svi = SVI(model, pair.guide, sgd(pair, 0.01), Trace_ELBO(), backend=backend)
        found = []
        for step, x in enumerate([*batches(), *batches()]):
            trainer.x, trainer.data, config["beta"] = x, step, 1.0 + step / 10
            found.append(svi.step(x))
        return found

    torch.testing.assert_close(losses("compiled"), losses("eager"))
    assert len(calls) == 10
    assert all(type(value) is float for value in (config["beta"], chain.beta))


@pytest.mark.usefixtures("recorded")
def test_what_cannot_be_looked_at_runs_eagerly(calls: list) -> None:
    hidden, pair = Hidden(), Arguments()

    def model(x: Tensor) -> None:
        pair.model(x, 1.0 if hidden else 2.0)

    svi = SVI(model, pair.guide, sgd(pair), Trace_ELBO(), backend="compiled")
    with pytest.warns(RuntimeWarning, match=r"what it reads cannot be watched \(RuntimeError: not here\)"):
        svi.step(batches()[0])
    svi.step(batches()[1])
    assert not calls


@pytest.mark.usefixtures("recorded")
def test_what_no_step_reads_may_be_hidden(calls: list) -> None:
    pair = Arguments()
    pair.things = [SimpleNamespace(hidden=Hidden())]
    svi = SVI(pair.model, pair.guide, sgd(pair), Trace_ELBO(), backend="compiled")
    for x in batches():
        svi.step(x)
    assert len(calls) == 5


@pytest.mark.usefixtures("recorded")
@pytest.mark.filterwarnings("ignore:pyrovae. this step runs eagerly")
def test_numbers_that_a_pair_keeps_stay_numbers() -> None:
    kept: dict[str, Any] = {}

    def model(x: Tensor, beta: float) -> None:
        kept["beta"] = beta
        pair.model(x, beta)

    pair = Arguments()
    svi = SVI(model, lambda x, beta: None, sgd(pair), Trace_ELBO(), backend="compiled")
    for step, x in enumerate([*batches(), *batches()]):
        svi.step(x, 1.0 + step)
    assert type(kept["beta"]) is float


@pytest.mark.usefixtures("recorded")
def test_what_else_an_object_counts_does_not_matter(calls: list) -> None:
    """A trainer, say, that the model asks for something."""

    class Trainer:
        steps, scale = 0, 2.0

        def spread(self) -> float:
            return self.scale

    trainer, pair = Trainer(), Arguments()
    svi = SVI(lambda x: pair.model(x, trainer.spread()), pair.guide, sgd(pair), Trace_ELBO(), backend="compiled")
    for x in batches():
        svi.step(x)
        trainer.steps += 1
    assert len(calls) == 5


@pytest.mark.usefixtures("recorded")
def test_a_state_that_comes_back_is_not_recorded_again(monkeypatch: pytest.MonkeyPatch, calls: list) -> None:
    made: list[Program] = []
    prepare = Program.__init__
    monkeypatch.setattr(Program, "__init__", lambda self, *args: (made.append(self), prepare(self, *args))[1])
    pair = Weighted()
    svi = SVI(lambda x: pair.kind and pair.model(x), pair.guide, sgd(pair), Trace_ELBO(), backend="compiled")
    for step in range(24):
        pair.kind = ("a", "b", "c")[step // 3 % 3]
        svi.step(batches()[step % 6])
    assert len(made) == 3
    assert len(calls) == 24 - 3


@pytest.mark.usefixtures("recorded")
def test_a_state_that_comes_back_is_known_at_a_glance(monkeypatch: pytest.MonkeyPatch) -> None:
    """What all code reads is not found out again: that takes longer than a step."""
    looks: list[Reads] = []
    monkeypatch.setattr(surroundings_module, "Reads", lambda functions: looks.append(Reads(functions)) or looks[-1])
    pair = Weighted()
    svi = SVI(pair.model, pair.guide, sgd(pair), Trace_ELBO(), backend="compiled")
    for step in range(24):
        pair.train(step % 2 == 0)
        pair.beta = float("0.5")  # another object, an equal number
        svi.step(batches()[step % 6])
    assert len(looks) <= 8  # two states, each seen first, recorded and run; not one for each of 24 steps


@pytest.mark.usefixtures("recorded")
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_data_that_cannot_be_written_to(tmp_path: Path, calls: list) -> None:
    np.save(tmp_path / "x.npy", np.array([1.0, np.nan], dtype=np.float32))

    def setup() -> tuple[Pair, Any]:
        pair = Odd(lambda pair, x: pair.average[0])
        pair.average = torch.from_numpy(np.load(tmp_path / "x.npy", mmap_mode="r"))
        return pair, sgd(pair, 0.01)

    assert_same_run(setup)
    assert len(calls) == 5


def regression() -> Callable:
    """Bayesian, with the priors of Pyro's tutorial: ``expand`` makes them validate whatever the setting."""
    layer = PyroModule[nn.Linear](4, 1)
    layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 4]).to_event(2))
    layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def model(x: Tensor) -> None:
        mean = layer(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=x.sum(-1))

    return model


GUIDES = {
    "normal": AutoNormal,
    "multivariate": AutoMultivariateNormal,
    "delta": AutoDelta,
    "flow": lambda model: AutoNormalizingFlow(model, partial(iterated, 2, planar)),
}


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("guide", GUIDES.values(), ids=GUIDES)
def test_pyros_own_guides_are_recorded(guide: Callable, calls: list) -> None:
    """Which make their plates anew at every run."""
    results = []
    for backend in ("eager", "compiled"):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model = regression()
        loss = Trace_ELBO(vectorize_particles=False)
        svi = SVI(model, guide(model), lambda params: torch.optim.Adam(params, **ADAM), loss, backend=backend)
        results.append([svi.step(x) for x in batches()])
    torch.testing.assert_close(*results)
    assert len(calls) == 5


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("fused", [False, True])
def test_parameters_that_are_added_to_the_optimizer_are_trained(fused: bool, calls: list) -> None:
    results = []
    for backend in ("eager", "compiled"):
        pair = vae()
        first, *others = pair.parameters()
        optim = torch.optim.Adam([first], lr=0.01, fused=fused)
        svi = SVI(pair.model, pair.guide, optim, Trace_ELBO(), backend=backend)
        torch.manual_seed(0)
        for step, x in enumerate(batches()):
            if step == 3:
                optim.add_param_group({"params": others})
            svi.step(x)
        results.append(pair.state_dict())
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-6)
    assert len(calls) == 5


class Weighted(Pair):
    """A VAE with a KL weight, as a Python number and as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.beta, self.kind = 1.0, "a"
        self.read: Callable[[Any], Any] = lambda beta: beta
        self.register_buffer("weight", torch.ones(()))
        self.loc = nn.Parameter(torch.zeros(4))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0 / (self.read(self.beta) * self.weight)).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc + x, 1.0).to_event(1))


def anneal(
    change: Callable[[Any, int], None],
    backend: str,
    steps: int,
    read: Callable[[Any], Any] = lambda beta: beta,
    family: type[Weighted] | None = None,
) -> tuple[Tensor, Tensor]:
    pair = (family or Weighted)()
    pair.read = read
    svi = SVI(pair.model, pair.guide, sgd(pair, 0.01), Trace_ELBO(), backend=backend)
    torch.manual_seed(0)
    losses = []
    for step in range(steps):
        change(pair, step)
        losses.append(svi.step(batches()[step % 6]))
    return torch.stack(losses), pair.loc.detach()


def in_two_stages(pair: Weighted, step: int) -> None:
    pair.beta = 0.25 if step < 5 else 1.0


def at_every_step(pair: Weighted, step: int) -> None:
    pair.beta = min(1.0, (step + 1) / 1000)


def buffer_at_every_step(pair: Weighted, step: int) -> None:
    pair.weight.fill_((step + 1) / 1000)


def new_buffer(pair: Weighted, step: int) -> None:
    if step == 4:
        pair.weight = torch.tensor(0.5)


@pytest.mark.usefixtures("recorded")
def test_the_sign_of_zero_counts() -> None:
    results = []
    for backend in ("eager", "compiled"):
        pair, options = Arguments(), SimpleNamespace(mode=0.0)
        svi = SVI(
            lambda x, pair=pair, options=options: pair.model(x, 2.0 + math.copysign(1.0, options.mode)),
            pair.guide,
            sgd(pair),
            Trace_ELBO(),
            backend=backend,
        )
        losses = []
        for step, x in enumerate(batches()):
            options.mode = (0.0, -0.0, math.nan)[step // 3]
            losses.append(float(svi.step(x)))
        results.append(losses)
    assert results[1] == pytest.approx(results[0], rel=1e-5)


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    ("change", "number"), [(in_two_stages, 8), (at_every_step, 8), (buffer_at_every_step, 9), (new_buffer, 8)]
)
def test_numbers_that_the_user_changes_count(change: Callable, number: int, calls: list) -> None:
    torch.testing.assert_close(anneal(change, "compiled", 10), anneal(change, "eager", 10))
    assert len(calls) == number


@pytest.mark.parametrize("backend", ["compiled", "auto"])
def test_a_number_that_changes_from_the_first_step_on_is_compiled_once(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Program] = []
    monkeypatch.setattr(Program, "compile", lambda self, args: compiled.append(self))
    monkeypatch.setattr(svi_module, "WORTH_COMPILING", 5)
    torch.testing.assert_close(anneal(at_every_step, backend, 10), anneal(at_every_step, "eager", 10))
    assert len(compiled) == 1


@pytest.mark.slow
def test_a_compiled_step_reads_a_number_that_changes() -> None:
    torch.testing.assert_close(anneal(at_every_step, "compiled", 10), anneal(at_every_step, "eager", 10))


READS = r"it reads the values? of a tensor into Python.*, at test_backends.py:\d+"
JUMPS = r"it rounds or compares a number that changes, at test_backends.py:\d+"
READ_INTO_PYTHON: dict[str, tuple[Callable[[Any], Any], str]] = {
    "max": (lambda beta: max(beta, 0.004), JUMPS),
    "math": (lambda beta: math.exp(-beta), READS),
    "numpy": (lambda beta: float(np.exp(-beta)), READS),
    "an if": (lambda beta: beta if beta > 0.005 else 0.1, JUMPS),
    "a remainder": (lambda beta: 0.1 + beta % 0.004, JUMPS),
    "a floor": (lambda beta: 0.1 + beta // 0.004, JUMPS),
    "a set": (lambda beta: 1.0 + (beta in {0.003, 0.005}), "a number that changes is looked up by its value"),
    "a list": (lambda beta: torch.tensor([beta, 1.0]).sum(), "it makes a tensor of a list of tensors, or of numbers"),
    "an old list": (lambda beta: torch.Tensor([beta, 1.0]).sum(), READS),
    "an argument of torch's": (lambda beta: torch.full((), beta), READS),
    "text": (lambda beta: 1.0 + len(f"{beta:.3f}"), READS),
    "a type": (lambda beta: 2.0 + beta if isinstance(beta, float) else beta, "it computes something else where a"),
    "another type": (lambda beta: beta.hex() and beta, "'NoKey' object has no attribute 'hex'"),
}


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(("read", "reason"), READ_INTO_PYTHON.values(), ids=READ_INTO_PYTHON)
def test_a_number_that_changes_and_no_tensor_can_stand_for(read: Callable, reason: str, calls: list) -> None:
    expected = anneal(at_every_step, "eager", 20, read)
    match = rf"eagerly: Weighted\.beta changes from step to step; no tensor can stand for it: {reason}"
    with pytest.warns(RuntimeWarning, match=match) as warned:
        actual = anneal(at_every_step, "compiled", 20, read)
    assert len(warned) == 1
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert len(calls) <= 1


def counted(pair: Weighted, step: int) -> None:
    pair.beta = 1 + step


@pytest.mark.usefixtures("recorded")
def test_a_whole_number_that_changes_at_every_step_runs_eagerly(calls: list) -> None:
    expected = anneal(counted, "eager", 20)
    match = r"eagerly: Weighted\.beta changes from step to step; a tensor.* may"
    with pytest.warns(RuntimeWarning, match=match) as warned:
        actual = anneal(counted, "compiled", 20)
    assert len(warned) == 1
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def to_none_and_back(pair: Weighted, step: int) -> None:
    pair.beta = None if step in (5, 6) else (step + 1) / 10


def another_later(pair: Weighted, step: int) -> None:
    pair.beta = (step % 7 + 1) / 10
    if step > 5:
        pair.gamma = step / 2


def deleted_beside_none(pair: Weighted, step: int) -> None:
    if step == 0:
        pair.gamma = 2.0
    pair.beta = (step + 1) / 10 if step < 6 else None
    if step == 6:
        del pair.gamma


def from_zero(pair: Weighted, step: int) -> None:
    pair.beta = max(0.0, (step - 4) / 10)


class Stages(Weighted):
    """Its numbers come and go."""

    def model(self, x: Tensor) -> None:
        weight = (1.0 if self.beta is None else 0.5 + self.read(self.beta)) * getattr(self, "gamma", 1.0)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0 / weight).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def doubled_in_place(beta: Any) -> Any:
    beta *= 2
    return beta


@lru_cache
def cached(beta: Any) -> Any:
    return 2 * beta


CHANGES: dict[str, tuple[Callable, Callable, int]] = {
    "None and back": (to_none_and_back, lambda beta: beta, 9),
    "another later": (another_later, lambda beta: beta, 10),
    "deleted beside None": (deleted_beside_none, lambda beta: beta, 9),
    "cached": (at_every_step, cached, 0),
    "in place": (from_zero, doubled_in_place, 0),
    "a stream of random numbers": (from_zero, lambda beta: beta + torch.zeros(3).bernoulli_(0.5 + beta / 2).sum(), 0),
}


@pytest.mark.usefixtures("recorded")
@pytest.mark.filterwarnings("ignore:pyrovae. this step runs eagerly")
@pytest.mark.parametrize(("change", "read", "number"), CHANGES.values(), ids=CHANGES)
def test_numbers_that_come_and_go(change: Callable, read: Callable, number: int, calls: list) -> None:
    mine, eager = (anneal(change, backend, 14, read, Stages) for backend in ("compiled", "eager"))
    torch.testing.assert_close(mine, eager)
    assert len(calls) >= number


@pytest.mark.usefixtures("recorded")
def test_only_the_number_that_no_tensor_can_stand_for_is_held_fixed(calls: list) -> None:
    def change(pair: Weighted, step: int) -> None:
        pair.beta = (step + 1) / 100
        pair.dropout = 0.5 if step < 10 else 0.25

    read = lambda beta: nn.functional.dropout(torch.ones(4), pairs[-1].dropout).mean() + beta  # noqa: E731
    pairs: list[Any] = []

    class Dropping(Weighted):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = 0.5
            pairs.append(self)

    mine, eager = (anneal(change, backend, 30, read, Dropping) for backend in ("compiled", "eager"))
    torch.testing.assert_close(mine, eager)
    assert len(calls) >= 24


class Supervised(Arguments):
    """With labels, or without: then they are summed out, and there is one latent more."""

    def model(self, x: Any, y: Any = None, scale: Any = 1.0, *, kind: str = "normal", sizes: Any = (1, 1)) -> None:
        x, extra = (
            (x["x"], x["extra"]) if isinstance(x, dict) else (x[0], sum(x[1:])) if isinstance(x, list) else (x, 0.0)
        )
        means = torch.stack([self.loc - 1, self.loc + 1])
        family = dist.Normal if kind == "normal" else dist.Laplace
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.3, 0.7])), obs=y, infer={"enumerate": "parallel"})
            pyro.sample("x", family(means[y] + extra, scale * sum(sizes)).to_event(1), obs=x)

    def guide(self, *args: Any, **kwargs: Any) -> None: ...


def labels(x: Tensor) -> Tensor:
    return (x[:, 0] > 0.5).long()


CALLS: dict[str, tuple[Callable[[SVI, Tensor, int], Tensor], int]] = {
    "keyword": (lambda svi, x, step: svi.step(x, scale=1.0 + step), 11),
    "number": (lambda svi, x, step: svi.step(x, None, 1.0 + step), 11),
    "None": (lambda svi, x, step: svi.step(x, None), 11),
    "None or a tensor": (lambda svi, x, step: svi.step(x, labels(x) if step % 2 else None), 11),
    "or nothing": (lambda svi, x, step: svi.step(x, y=labels(x)) if step % 2 else svi.step(x), 11),
    "text": (lambda svi, x, step: svi.step(x, kind="normal" if step < 6 else "laplace"), 11),
    "tuples": (lambda svi, x, step: svi.step(x, sizes=(1.0 + step, 1)), 11),
    "a dict": (lambda svi, x, step: svi.step({"x": x, "extra": 0.1 * x}), 11),
    "a list": (lambda svi, x, step: svi.step([x, 0.1 * step]), 11),
    "a list of one": (lambda svi, x, step: svi.step([x]), 11),
    "whole numbers": (lambda svi, x, step: svi.step(x, None, 1 + step % 2), 11),
}


def called(call: Callable, pair: Pair, backend: str, loss: Any) -> Tensor:
    svi = SVI(pair.model, pair.guide, sgd(pair, 0.01), loss, backend=backend)
    return torch.stack([call(svi, x, step) for step, x in enumerate([*batches(), *batches()])])


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(("call", "number"), CALLS.values(), ids=CALLS)
def test_other_arguments_are_recorded(call: Callable, number: int, calls: list) -> None:
    enum = lambda: TraceEnum_ELBO(strict_enumeration_warning=False)  # noqa: E731
    mine, eager = (called(call, Supervised(), backend, enum()) for backend in ("compiled", "eager"))
    torch.testing.assert_close(mine, eager)
    assert len(calls) == number


@pytest.mark.parametrize("first", [0, 1])
def test_calls_of_two_kinds_have_each_their_structure(first: int) -> None:
    """With labels a bound sums nothing out, without them it sums them out: one loss object takes both."""
    pair, x = Supervised(), batches()[0]
    loss = RenyiELBO(num_particles=2)
    calls = [(x, labels(x)), (x,)]
    actual = [loss.loss(pair.model, pair.guide, *calls[(first + i) % 2]) for i in range(2)]
    with torch.no_grad():
        means = torch.stack([pair.loc - 1, pair.loc + 1])
        log_joint = dist.Normal(means, 2.0).log_prob(x[:, None]).sum(-1) + torch.tensor([0.3, 0.7]).log()
        bounds = [log_joint.gather(1, labels(x)[:, None]).sum(), log_joint.logsumexp(1).sum()]
    torch.testing.assert_close(actual, [-bounds[first], -bounds[1 - first]])


class Scaled(Arguments):
    """Two sites of a datum, each with a scale of its own."""

    def model(self, x: Tensor, first: float, second: float) -> None:
        with pyro.plate("data", len(x)), poutine.scale(scale=first):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            with poutine.scale(scale=second / first):
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor, first: float, second: float) -> None:
        with pyro.plate("data", len(x)), poutine.scale(scale=first):
            pyro.sample("z", dist.Normal(self.loc + x, 1.0).to_event(1))


@pytest.mark.usefixtures("recorded")
@pytest.mark.filterwarnings("ignore:pyrovae. this step runs eagerly")
def test_scales_that_were_equal_when_they_were_recorded() -> None:
    pair, x = Scaled(), batches()[0]
    svi = SVI(pair.model, pair.guide, sgd(pair), RenyiELBO(num_particles=2), backend="compiled")
    for _ in range(4):
        svi.step(x, 0.5, 0.5)
    with pytest.raises(ValueError, match="must carry one common scale"):
        svi.step(x, 0.5, 0.75)


def two_kinds_of_calls(backend: str, missing: tuple) -> tuple[list[Tensor], dict]:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        plain_model(x)

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        loc = pyro.param("loc", torch.zeros(4)) + (0.0 if y is None else pyro.param("extra", torch.zeros(4)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc + x, 1.0).to_event(1))

    pyro.clear_param_store()
    torch.manual_seed(0)
    svi = SVI(model, guide, pyro.optim.Adam(ADAM), Trace_ELBO(), backend=backend)
    given = [(x, x) if step % 4 == 3 else (x, *missing) for step, x in enumerate([*batches(), *batches()])]
    losses = [svi.step(*args) for args in given]
    return losses, {name: value.clone().detach() for name, value in pyro.get_param_store().items()}


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("missing", [(None,), ()], ids=["None", "left out"])
def test_each_kind_of_call_trains_the_parameters_that_it_names(missing: tuple, calls: list) -> None:
    torch.testing.assert_close(two_kinds_of_calls("compiled", missing), two_kinds_of_calls("eager", missing))
    assert len(calls) >= 8


@pytest.mark.usefixtures("recorded")
def test_calls_of_many_kinds_are_named(calls: list) -> None:
    def model(x: Tensor, number: int) -> None:
        plain_model(x)

    def guide(x: Tensor, number: int) -> None:
        plain_guide(x)

    svi = SVI(model, guide, pyro.optim.Adam(ADAM), Trace_ELBO(), backend="compiled")
    for step in range(8):
        svi.step(batches()[step % 6], step)
    with pytest.warns(RuntimeWarning, match="its arguments keep changing; 8 kinds were looked at.*pyro.optim"):
        svi.step(batches()[0], 8)
    assert not calls


@pytest.mark.usefixtures("recorded")
def test_a_pair_of_functions_that_cannot_be_hashed(calls: list) -> None:
    @dataclass
    class Model:
        scale: float = 1.0

        def __call__(self, x: Tensor) -> None:
            plain_model(x)

    def losses(backend: str) -> list[Tensor]:
        pyro.clear_param_store()
        torch.manual_seed(0)
        svi = SVI(Model(), plain_guide, pyro.optim.Adam(ADAM), Trace_ELBO(), backend=backend)
        return [svi.step(x) for x in batches()]

    torch.testing.assert_close(losses("compiled"), losses("eager"))
    assert len(calls) == 5


class Rooted(Arguments):
    def model(self, x: Tensor, scale: Any = 1.0) -> None:
        super().model(x, math.sqrt(scale))


@pytest.mark.usefixtures("recorded")
def test_a_float_that_no_tensor_can_stand_for_is_held_fixed(calls: list) -> None:
    call = lambda svi, x, step: svi.step(x, scale=1.0 + step % 2)  # noqa: E731
    mine, eager = (called(call, Rooted(), backend, Trace_ELBO()) for backend in ("compiled", "eager"))
    torch.testing.assert_close(mine, eager)
    assert len(calls) == 11


REFUSED_CALLS: dict[str, tuple[Callable[[SVI, Tensor, int], Tensor], str]] = {
    "handler": (lambda svi, x, step: poutine.scale(svi.step, scale=0.5 + step)(x), "handlers around it are not"),
    "gradient": (lambda svi, x, step: svi.step(x.clone().requires_grad_()), "an argument that wants a gradient is not"),
    "range": (lambda svi, x, step: svi.step(x, sizes=range(3)), r"an argument of type builtins\.range is not"),
}


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(("call", "reason"), REFUSED_CALLS.values(), ids=REFUSED_CALLS)
def test_arguments_of_other_types_and_handlers_run_eagerly(call: Callable, reason: str, calls: list) -> None:
    enum = lambda: TraceEnum_ELBO(strict_enumeration_warning=False)  # noqa: E731
    expected = called(call, Supervised(), "eager", enum())
    with pytest.warns(RuntimeWarning, match=f"this step runs eagerly: {reason} recorded") as warned:
        actual = called(call, Supervised(), "compiled", enum())
    assert len(warned) == 1
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert not calls


@pytest.mark.usefixtures("recorded")
def test_a_tensor_in_place_of_a_number_is_recorded(calls: list) -> None:
    results = []
    for backend in ("eager", "compiled"):
        pair = Arguments()
        svi = SVI(pair.model, pair.guide, sgd(pair, 0.01), Trace_ELBO(), backend=backend)
        results.append([svi.step(x, torch.tensor(1.0 + step)) for step, x in enumerate(batches())])
    torch.testing.assert_close(*results)
    assert len(calls) == 5


@pytest.mark.usefixtures("recorded")
def test_pyros_losses_run_eagerly(calls: list) -> None:
    def setup() -> tuple[Pair, Any]:
        pair = vae()
        return pair, sgd(pair)

    loss = lambda: pyro.infer.Trace_ELBO(max_plate_nesting=1)  # noqa: E731
    expected = run(setup, "eager", loss=loss)
    with pytest.warns(
        RuntimeWarning, match=r"runs eagerly: pyro.*Trace_ELBO reads tensors; use pyrovae.infer's"
    ) as warned:
        actual = run(setup, "compiled", loss=loss)
    assert len(warned) == 1
    torch.testing.assert_close(actual[:2], expected[:2], rtol=0, atol=0)
    assert not calls


class Tally:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0


@dataclass(frozen=True)
class Frozen:
    n: int = 0


@dataclass
class Kept:
    """What a step may count or remember in, as a user's own object."""

    value: Any


def counted_in_module(value: Any) -> nn.Module:
    module = nn.Module()
    module.value = value
    return module


def count_in_cell() -> Callable[[], int]:
    count = (0,)

    def next_one() -> int:
        nonlocal count
        count = (count[0] + 1,)
        return count[0]

    return next_one


TALLY = (0,)


def count_globally(kept: Any) -> int:
    global TALLY
    TALLY = (TALLY[0] + 1,)
    return TALLY[0]


def push(kept: Any) -> float:
    kept.value = [*kept.value, 1]
    return len(kept.value)


def replace_frozen(kept: Any) -> float:
    kept.value = replace(kept.value, n=kept.value.n + 1)
    return kept.value.n


def add_one(kept: Any) -> float:
    kept.value = kept.value + 1
    return float(kept.value)


def add_to_array(kept: Any) -> float:
    kept.value = kept.value + 1
    return float(kept.value[0])


def add_to_tuple(kept: Any) -> float:
    kept.value = (kept.value[0] + 1,)
    return kept.value[0]


def add_attribute(kept: Any) -> float:
    kept.value += 1
    setattr(kept, f"value_{len(vars(kept))}", 1)
    return len(vars(kept))


def count_in_slot(kept: Tally) -> float:
    kept.n += 1
    return kept.n


def count_in_bytes(kept: bytearray) -> float:
    kept[0] += 1
    return kept[0]


def keep_tensor(kept: Any) -> Tensor:
    kept.value = 0.5 * kept.value + 1
    return kept.value


def add_key(kept: OrderedDict) -> float:
    kept[len(kept)] = 1.0
    return len(kept)


def move_key(kept: OrderedDict) -> float:
    first = next(iter(kept))
    kept.move_to_end(first)
    return kept[first]


def first_of(kept: Any) -> float:
    for each in kept.value:
        return each
    raise AssertionError


def of_zip(kept: Any) -> float:
    return next(zip(kept.value, range(1), strict=False))[0]


def fill_slot(kept: Any) -> float:
    if not hasattr(kept, "m"):
        kept.m = 0
    kept.m += 1
    return kept.m


class Empty:
    __slots__ = ("m",)


STATES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "a new key": (lambda: OrderedDict(a=1.0), add_key, lambda kept: [*kept.items()]),
    "keys in turn": (lambda: OrderedDict(a=1.0, b=2.0, c=3.0), move_key, lambda kept: [*kept.items()]),
    "a tuple": (lambda: counted_in_module((0,)), add_to_tuple, lambda kept: kept.value),
    "a list": (lambda: counted_in_module([]), push, lambda kept: kept.value),
    "an array": (lambda: counted_in_module(np.zeros(2)), add_to_array, lambda kept: kept.value.tolist()),
    "NumPy's number": (lambda: counted_in_module(np.float32(0)), add_one, lambda kept: kept.value),
    "a frozen object": (lambda: counted_in_module(Frozen()), replace_frozen, lambda kept: kept.value),
    "another attribute": (lambda: counted_in_module(0), add_attribute, lambda kept: len(vars(kept))),
    "a variable": (count_in_cell, lambda kept: kept(), lambda kept: kept.__closure__[0].cell_contents),
    "a global": (lambda: globals().update(TALLY=(0,)), count_globally, lambda kept: TALLY),
    "an object's tuple": (lambda: Kept((0,)), add_to_tuple, lambda kept: kept.value),
    "an object's list": (lambda: SimpleNamespace(value=[]), push, lambda kept: kept.value),
    "an object's frozen object": (lambda: Kept(Frozen()), replace_frozen, lambda kept: kept.value),
    "an object's other attribute": (lambda: Kept(0), add_attribute, lambda kept: len(vars(kept))),
    "options": (lambda: Namespace(value=0), add_one, lambda kept: kept.value),
    "slots": (Tally, count_in_slot, lambda kept: kept.n),
    "a slot that is filled": (Empty, fill_slot, lambda kept: kept.m),
    "a slotted generator": (
        lambda: Slotted(np.random.default_rng(0)),  # type: ignore[arg-type]
        lambda kept: 1 + kept.beta.random(),
        lambda kept: kept.beta.random(),
    ),
    "bytes": (lambda: bytearray(4), count_in_bytes, bytes),
    "a tensor": (lambda: Kept(torch.zeros(())), keep_tensor, lambda kept: float(kept.value)),
    "an iterator in a loop": (lambda: Kept(iter(range(1, 99))), first_of, lambda kept: next(kept.value)),
    "an iterator's method": (
        lambda: Kept(iter(range(1, 99))),
        lambda kept: kept.value.__next__(),
        lambda kept: next(kept.value),
    ),
    "an iterator zipped": (lambda: Kept(iter(range(1, 99))), of_zip, lambda kept: next(kept.value)),
    "a file": (
        lambda: Kept(StringIO("\n".join(map(str, range(1, 99))))),
        lambda kept: float(kept.value.readline()),
        lambda kept: kept.value.tell(),
    ),
}


@pytest.mark.usefixtures("recorded")
@pytest.mark.filterwarnings("ignore:pyrovae. this step runs eagerly")
@pytest.mark.parametrize(("make", "change", "shown"), STATES.values(), ids=STATES)
def test_state_of_any_kind_is_as_after_eager_steps(make: Callable, change: Callable, shown: Callable) -> None:
    """Whatever the runs did that recording takes: also where a step begins with a record."""
    results = []
    for backend in ("eager", "compiled"):
        pair, kept = Arguments(), make()

        def model(x: Tensor, pair=pair, kept=kept) -> None:
            pair.model(x, change(kept))

        svi = SVI(model, pair.guide, sgd(pair, 0.01), Trace_ELBO(), backend=backend)
        results.append(([svi.step(x) for x in batches()], shown(kept)))
    torch.testing.assert_close(*(losses for losses, _ in results))
    assert results[0][1] == results[1][1]


def moving_by_data(pair: Odd, x: Tensor) -> float:
    pair.loc.data = 0.5 * pair.loc.data + 1.0
    return 1.0


def moving_by_set(pair: Odd, x: Tensor) -> Tensor:
    with torch.no_grad():
        pair.table.weight.set_(0.5 * pair.table.weight.detach())
    return 1 + pair.table.weight.mean()


def moving_an_average(pair: Odd, x: Tensor) -> Tensor:
    pair.average.mul_(0.5)
    pair.average.data = pair.average.data + x.mean()
    return 1 + pair.average


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    ("odd", "name"),
    [(moving_by_data, "Odd.loc"), (moving_by_set, "Embedding.weight"), (moving_an_average, "Odd.average")],
)
def test_tensors_that_come_to_lie_elsewhere(odd: Callable, name: str, calls: list) -> None:
    with pytest.warns(RuntimeWarning, match=rf"eagerly: it gives {name} other memory \(`.data =`\) as it runs"):
        assert_same_run(lambda: (pair := Odd(odd), sgd(pair, 0.01)))
    assert not calls


class Offset(dist.transforms.AffineTransform):
    """Keeps the last value that it saw."""

    def __init__(self) -> None:
        super().__init__(0.0, 2.0, cache_size=1)


class Log(StringIO):
    """A file that is open for writing alone."""

    def readable(self) -> bool:
        return False


class Late:
    @cached_property
    def scale(self) -> list[float]:
        return [2.0]


def show(kept: Any, x: Tensor) -> float:
    kept.value = poutine.trace(lambda: pyro.deterministic("shown", x)).get_trace()
    return 1.0


def measure(kept: Any, x: Tensor) -> float:
    kept.value = (len(x), 3)
    return kept.value[1]


WATCHED = Kept(2.0)

MADE_ANEW: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Any]]] = {
    "a trace to be shown": (lambda: Kept(None), show),
    "an equal tuple": (lambda: Kept(None), measure),
    "a transform's cache": (Offset, lambda kept, x: 1 + kept(x).mean()),
    "a property that is kept": (Late, lambda kept, x: kept.scale[0]),
    "a log": (lambda: Kept(StringIO()), lambda kept, x: 1 + 0 * kept.value.write("a step\n")),
    "a log beside an iterator of its own": (
        lambda: Kept(Log()),
        lambda kept, x: next(iter([2.0])) + 0 * kept.value.write("a step\n"),
    ),
    "a weak proxy": (lambda: weakref.proxy(WATCHED), lambda kept, x: kept.value),
    "an iterator that it does not name": (
        lambda: SimpleNamespace(value=2.0, rows=iter(range(9))),
        lambda kept, x: kept.value,
    ),
}


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(("make", "use"), MADE_ANEW.values(), ids=MADE_ANEW)
def test_what_is_made_anew_at_each_run_is_no_state(make: Callable, use: Callable, calls: list) -> None:
    pair, kept = Arguments(), make()
    svi = SVI(lambda x: pair.model(x, use(kept, x)), pair.guide, sgd(pair), Trace_ELBO(), backend="compiled")
    for x in batches():
        svi.step(x)
    assert len(calls) == 5


class Asked(dict):
    """Knows what it was asked for, but for ``["key"]``."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.log: list[Any] = []

    def __contains__(self, key: Any) -> bool:
        self.log.append(key)
        return super().__contains__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self.log.append(key)
        return super().get(key, default)


@pytest.mark.usefixtures("recorded")
def test_watching_a_dict_does_not_ask_it(calls: list) -> None:
    pair, asked = Arguments(), Asked(beta=1.0)
    svi = SVI(lambda x: pair.model(x, asked["beta"]), pair.guide, sgd(pair), Trace_ELBO(), backend="compiled")
    for x in batches():
        svi.step(x)
    assert len(calls) == 5
    assert asked.log == []


# --- errors --------------------------------------------------------------------------------------


class WrongShape(Arguments):
    def model(self, x: Tensor, scale: Any = 1.0) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.loc, scale), obs=x)


def test_the_first_step_is_validated() -> None:
    for make, x in ((WrongShape, batches()[0]), (Arguments, torch.full((8, 4), math.nan))):
        pair = make()
        svi = SVI(pair.model, pair.guide, sgd(pair), Trace_ELBO(), backend="compiled")
        with pyro.validation_enabled(False), pytest.raises(ValueError, match=r"[Ss]hape|constraint|support"):
            svi.step(x)


@pytest.mark.usefixtures("recorded")
def test_a_later_error_is_the_eager_one() -> None:
    bad = {"features": torch.zeros(8, 3), "dtype": torch.zeros(8, 4, dtype=torch.float64)}
    for name, x in bad.items():
        messages = []
        for backend in ("eager", "compiled"):
            pair = vae()
            svi = SVI(pair.model, pair.guide, sgd(pair), Trace_ELBO(), backend=backend)
            for good in batches():
                svi.step(good)
            weights = copy.deepcopy(pair.state_dict())
            with pytest.raises((RuntimeError, ValueError)) as error:  # warnings are errors here too
                svi.step(x)
            messages.append((error.type, str(error.value)))
            torch.testing.assert_close(pair.state_dict(), weights, rtol=0, atol=0)
            svi.step(batches()[0])
        assert messages[0] == messages[1], name


class Labelled(Arguments):
    """Labels as a conditional VAE has them: one-hot, embedded, as weights of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(3, 4)

    def model(self, x: Tensor, labels: Tensor) -> None:
        one_hot = nn.functional.one_hot(labels, 3).float()
        counts = torch.zeros(3).scatter_add(0, labels, x[:, 0])
        with pyro.plate("data", len(x)):
            loc = self.loc + self.rows(labels) + one_hot.sum(-1, keepdim=True) * counts.mean()
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_labels_are_recorded_and_a_wrong_one_is_an_error(
    compiled: bool, calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(Program, "compile", lambda self, args: None)
    results: dict[str, list] = {"eager": [], "compiled": []}
    for backend, found in results.items():
        torch.manual_seed(0)
        pair = Labelled()
        svi = SVI(pair.model, lambda x, labels: None, sgd(pair), Trace_ELBO(), backend=backend)
        for step, x in enumerate(batches()):
            found.append(float(svi.step(x, (torch.arange(8) + step) % 3)))
        for bad in (3, -1):
            labels = torch.arange(8) % 3
            labels[5] = bad
            with pytest.raises(RuntimeError, match="Class values") as error:
                svi.step(batches()[0], labels)
            found.append(str(error.value))
        found.append(float(svi.step(batches()[1], torch.arange(8) % 3)))
    assert results["compiled"][:6] == pytest.approx(results["eager"][:6], rel=1e-5)
    assert results["compiled"][6:8] == results["eager"][6:8]
    assert results["compiled"][8] == pytest.approx(results["eager"][8], rel=1e-5)
    assert len(calls) == 5 + 2 + 1


def test_an_optimizer_that_runs_the_loss_itself_is_refused() -> None:
    pair = vae()
    with pytest.raises(TypeError, match=r"optim: LBFGS runs the loss several times.*Use Adam"):
        SVI(pair.model, pair.guide, torch.optim.LBFGS(pair.parameters()), Trace_ELBO())


def test_cudagraph_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pair = vae()
    with pytest.raises(ValueError, match=r"backend: 'cudagraph' was asked for, and torch sees no CUDA device"):
        SVI(pair.model, pair.guide, sgd(pair), Trace_ELBO(), backend="cudagraph")
    with pytest.raises(ValueError, match=r"backend: expected .*'jit'"):
        SVI(pair.model, pair.guide, sgd(pair), Trace_ELBO(), backend="jit")


# --- shapes --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("recorded")
def test_a_short_batch_has_its_own_record_and_the_right_scale(calls: list) -> None:
    def setup() -> tuple[Pair, Any]:
        torch.manual_seed(0)
        pair = Global()
        return pair, sgd(pair, 0.01)

    xs = [x[:size] for x, size in zip(batches(8), (8, 8, 3, 8, 3, 5, 8, 1), strict=True)]
    svi = assert_same_run(setup, xs, dataset_size=60)
    assert [shapes[0][0] for shapes in calls] == [8, 3, 8, 3, 5, 8, 1]
    assert len(svi._programs) == 4


@pytest.mark.usefixtures("recorded")
def test_strides_of_a_batch_do_not_matter() -> None:
    def setup() -> tuple[Pair, Any]:
        pair = vae()
        return pair, sgd(pair)

    x = batches()[0]
    assert_same_run(setup, [x, x, x.t().contiguous().t(), x[:1].expand(8, 4), x])


@pytest.mark.usefixtures("recorded")
def test_too_many_shapes_run_eagerly(calls: list) -> None:
    def setup() -> tuple[Pair, Any]:
        pair = Arguments()
        return pair, sgd(pair)

    xs = [torch.ones(size, 4) for size in range(1, 14)]
    with pytest.warns(RuntimeWarning, match=r"its arguments' shapes or values keep changing") as warned:
        assert_same_run(setup, xs)
    assert len(warned) == 1
    assert len(calls) == svi_module.MAX_PROGRAMS


def test_only_the_first_shape_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(Program, "compile", lambda self, args: compiled.append(args[0].shape[0]))
    pair = vae()
    svi = SVI(pair.model, pair.guide, sgd(pair), Trace_ELBO(), backend="compiled")
    for x in (batches()[0], batches()[0], batches()[0][:3], batches()[1]):
        svi.step(x)
    assert compiled == [8]


def test_what_a_short_batch_alone_reads_leaves_the_first_program_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, made = [], []
    start = Program.__init__
    monkeypatch.setattr(Program, "__init__", lambda self, *args: made.append(args[1][0].shape[0]) or start(self, *args))
    monkeypatch.setattr(Program, "compile", lambda self, args: compiled.append(args[0].shape[0]))
    pair = Untrained(lambda pair, x: x * pair.fixed.weight.mean(0) if len(x) < 8 else x)
    svi = SVI(pair.model, pair.guide, trained(pair), Trace_ELBO(), backend="compiled")
    for x in (batches()[0], batches()[0], batches()[0][:3], batches()[1], batches()[1][:3]):
        svi.step(x)
    assert made == [8, 3]
    assert compiled == [8]


# --- when ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("recorded")
def test_auto_changes_over(monkeypatch: pytest.MonkeyPatch, calls: list) -> None:
    monkeypatch.setattr(svi_module, "WORTH_COMPILING", 4)

    def setup() -> tuple[Pair, Any]:
        pair = vae()
        return pair, sgd(pair)

    counts = {}
    for num_steps in (None, 3, 4):
        calls.clear()
        assert_same_run(setup, backend="auto", num_steps=num_steps)
        counts[num_steps] = len(calls)
    assert counts == {None: 3, 3: 0, 4: 5}


@pytest.mark.usefixtures("recorded")
def test_compile_says_why_not() -> None:
    pair = Arguments()
    svi = SVI(lambda x: x.sum() > 0 and pair.model(x), pair.guide, sgd(pair), Trace_ELBO(), backend="compiled")
    with pytest.warns(RuntimeWarning, match=r"this step runs eagerly: it reads the value of a tensor.*x.sum"):
        assert not svi.compile(batches()[0])
    svi.step(batches()[0])


@pytest.mark.usefixtures("recorded")
def test_compile_takes_no_step(calls: list) -> None:
    pair = vae()
    svi = SVI(pair.model, pair.guide, fused_adam(pair), Trace_ELBO(), backend="compiled")
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert svi.compile(batches()[0])
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(pair.state_dict(), vae().state_dict(), rtol=0, atol=0)
    torch.manual_seed(7)
    for x in batches():
        svi.step(x)
    assert len(calls) == 6

    def setup() -> tuple[Pair, Any]:
        other = vae()
        return other, fused_adam(other)

    torch.testing.assert_close(pair.state_dict(), run(setup, "eager")[1], rtol=2e-5, atol=2e-6)
    assert not SVI(pair.model, pair.guide, fused_adam(pair), Trace_ELBO(), backend="eager").compile(batches()[0])


@pytest.mark.usefixtures("recorded")
def test_without_recording_steps_are_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise ImportError("no tracer here")

    monkeypatch.setattr(program_module, "make_fx", fails)

    def setup() -> tuple[Pair, Any]:
        pair = vae()
        return pair, sgd(pair)

    with pytest.warns(RuntimeWarning, match="this step runs eagerly: no tracer here"):
        assert_same_run(setup)


def test_without_a_compiler_steps_are_recorded(monkeypatch: pytest.MonkeyPatch, calls: list) -> None:
    import torch._inductor

    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch._inductor, "compile", fails)

    def setup() -> tuple[Pair, Any]:
        pair = vae()
        return pair, sgd(pair)

    with pytest.warns(RuntimeWarning, match=r"cannot compile the step here \(no C\+\+ compiler\)") as warned:
        assert_same_run(setup)
    assert len(warned) == 1
    assert len(calls) == 5


@pytest.mark.usefixtures("recorded")
def test_evaluate_loss_between_recorded_steps(calls: list) -> None:
    pair = vae()
    svi = SVI(pair.model, pair.guide, sgd(pair), Trace_ELBO(), backend="compiled")
    for x in batches():
        svi.step(x)
        pair.eval()
        state = torch.get_rng_state()
        before = svi.evaluate_loss(x)
        torch.set_rng_state(state)
        pair.train()
        assert svi.step(x) == pytest.approx(float(before), rel=1e-5)
    assert len(calls) == 11


# --- fit -----------------------------------------------------------------------------------------

GREY = torch.rand(50, 4, generator=torch.Generator().manual_seed(2))
FIT = {"epochs": 4, "batch_size": 16, "seed": 3, "backend": "compiled"}


def fit_in_two(
    file: Any, monkeypatch: pytest.MonkeyPatch, rows: Tensor, after: int, **options: Any
) -> tuple[Pair, Any]:
    """A fit that is interrupted after some steps, and resumed with a fresh pair."""
    step, seen = SVI.step, []

    def stopping(self: SVI, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(1)
        if len(seen) > after:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SVI, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        pv.fit(vae(), rows, checkpoint=file, **FIT, **options)
    monkeypatch.setattr(SVI, "step", step)
    pair = vae()
    return pair, pv.fit(pair, rows, checkpoint=file, resume=True, **FIT, **options)


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(("after", "binarize"), [(2, False), (6, True), (13, False)])
def test_a_resumed_fit_is_bit_identical(
    tmp_path: Any, monkeypatch: Any, after: int, binarize: bool, calls: list
) -> None:
    rows = GREY if binarize else GREY.round()
    whole = vae()
    history = pv.fit(whole, rows, binarize=binarize, **FIT).history
    assert len(calls) == 4 * 4  # every step is a recorded one
    pair, resumed = fit_in_two(tmp_path / "run", monkeypatch, rows, after, binarize=binarize)
    torch.testing.assert_close(pair.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert [row["train_bound"] for row in resumed.history] == [row["train_bound"] for row in history]


@pytest.mark.slow
def test_a_resumed_compiled_fit_is_bit_identical(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = vae()
    pv.fit(whole, GREY, binarize=True, **FIT)
    pair, _ = fit_in_two(tmp_path / "run", monkeypatch, GREY, 6, binarize=True)
    torch.testing.assert_close(pair.state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.usefixtures("recorded")
def test_fit_equals_the_eager_fit(calls: list) -> None:
    eager, mine, again = vae(), vae(), vae()
    options = FIT | {"validation": 10, "binarize": True}
    histories = [
        pv.fit(pair, GREY, **(options | {"backend": backend})).history
        for pair, backend in ((eager, "eager"), (mine, "compiled"), (again, "compiled"))
    ]
    torch.testing.assert_close(mine.state_dict(), eager.state_dict(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine.state_dict(), again.state_dict(), rtol=0, atol=0)
    for a, b in zip(histories[0], histories[1], strict=True):
        assert a["train_bound"] == pytest.approx(b["train_bound"], rel=1e-4)
        assert a["validation_bound"] == pytest.approx(b["validation_bound"], rel=1e-4)
    assert {shapes[0] for shapes in calls} == {(16,), (8,)}  # indices: gathering and drawing pixels are in the step


@pytest.mark.usefixtures("recorded")
def test_fit_auto(monkeypatch: pytest.MonkeyPatch, calls: list) -> None:
    pv.fit(vae(), GREY.round(), **(FIT | {"backend": "auto"}))
    assert not calls
    monkeypatch.setattr(svi_module, "WORTH_COMPILING", 16)
    pv.fit(vae(), GREY.round(), **(FIT | {"backend": "auto"}))
    assert len(calls) == 16


class Bursting(VAE):
    """Its loss turns NaN when a clock, a buffer, reaches 7."""

    def __init__(self) -> None:
        super().__init__(4, 2, hidden_dims=(5,))
        self.register_buffer("clock", torch.zeros(()))

    def model(self, x: Tensor) -> None:
        super().model(x)
        self.clock.add_(1)
        pyro.factor("late", torch.where(self.clock > 12, math.nan, 0.0).expand(()))


@pytest.mark.usefixtures("recorded")
def test_divergence_is_explained_as_it_is_eagerly() -> None:
    messages = []
    for backend in ("eager", "compiled"):
        torch.manual_seed(0)
        pair = Bursting()
        with pytest.raises(TrainingDiverged) as error:
            pv.fit(pair, GREY.round(), loss=Trace_ELBO(), **(FIT | {"backend": backend}))
        messages.append(str(error.value))
        assert all(torch.isfinite(p).all() for p in pair.parameters())
    assert "site 'late'" in messages[0]
    assert messages[0] == messages[1]


@pytest.mark.slow
def test_compiled_and_eager_fits_reach_the_same_evidence() -> None:
    rows = pv.data.load("digits").train[:600]
    scores = []
    for backend in ("eager", "compiled"):
        torch.manual_seed(0)
        pair = VAE(64, 4, hidden_dims=(30,))
        pv.fit(pair, rows, epochs=30, batch_size=50, binarize=True, backend=backend)  # the same noise, but for rounding
        scores.append(pv.evaluate(pair, rows.round(), num_samples=200))
    error = math.hypot(scores[0].log_evidence_stderr, scores[1].log_evidence_stderr)
    assert abs(scores[0].log_evidence - scores[1].log_evidence) <= 2 * error


# --- CUDA ----------------------------------------------------------------------------------------


def on_gpu(lr: float = 0.01) -> tuple[VAE, torch.optim.Optimizer, Tensor]:
    pair = vae().cuda()
    rate = torch.tensor(lr, device="cuda")
    return pair, torch.optim.Adam(pair.parameters(), lr=rate, fused=True, capturable=True), batches(12).cuda()


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list:
    seen: list = []
    replay = torch.cuda.CUDAGraph.replay

    def spy(self: torch.cuda.CUDAGraph) -> None:
        seen.append(self)
        replay(self)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", spy)
    return seen


def step_through(svi: SVI, xs: Tensor) -> None:
    for x in xs:
        svi.step(x)


def equal_on_gpu(act: Callable, replays: list, loss: Callable = Trace_ELBO) -> None:
    """A captured run, with something done in the middle, equals an eager one at equal noise."""
    results = []
    for backend in ("eager", "cudagraph"):
        pair, optim, xs = on_gpu()
        svi = SVI(pair.model, pair.guide, optim, loss(), backend=backend)
        torch.manual_seed(7)
        losses = []
        for step, x in enumerate(xs):
            if step == 8:
                act(pair, optim)
            losses.append(svi.step(x))
        results.append((torch.stack(losses), pair.state_dict(), optim.state_dict()["state"]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert len(replays) == 12 - 1 - 3  # the first step is eager, three warm up


def fill_rate(pair: Pair, optim: Any) -> None:
    optim.param_groups[0]["lr"].fill_(0.1)


def replace_rate(pair: Pair, optim: Any) -> None:
    optim.param_groups[0]["lr"] = torch.tensor(0.1, device="cuda")


def other_betas(pair: Pair, optim: Any) -> None:
    optim.param_groups[0]["betas"] = (0.1, 0.5)


def load_on_gpu(pair: Pair, optim: Any) -> None:
    state = copy.deepcopy(optim.state_dict())
    for each in state["state"].values():
        each["exp_avg"].mul_(3)
    optim.load_state_dict(state)


def move_weights(pair: Pair, optim: Any) -> None:
    for parameter in pair.parameters():
        parameter.data = parameter.data + 0.1


GPU_ACTS = {
    "nothing": lambda pair, optim: None,
    "rate": fill_rate,
    "another rate": replace_rate,
    "betas": other_betas,
    "state": load_on_gpu,
    "weights": load_weights,
    "moved weights": move_weights,
}


@pytest.mark.cuda
@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("act", GPU_ACTS.values(), ids=GPU_ACTS)
def test_a_captured_step_is_the_eager_one(act: Callable, replays: list) -> None:
    equal_on_gpu(act, replays)


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("loss", ["Trace", "MeanField-4", "Enum-4", "Renyi-4"])
def test_a_compiled_and_captured_step_is_the_eager_one(loss: str, replays: list) -> None:
    equal_on_gpu(GPU_ACTS["nothing"], replays, LOSSES[loss])


@pytest.mark.cuda
@pytest.mark.usefixtures("recorded")
def test_noise_is_fresh_at_every_replay_and_follows_the_seed(replays: list) -> None:
    pair, optim, xs = on_gpu(lr=0.0)
    svi = SVI(pair.model, pair.guide, optim, Trace_ELBO(), backend="cudagraph")
    for x in xs[:6]:
        svi.step(x)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append([float(svi.step(xs[0])) for _ in range(10)])
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 10
    assert len(replays) == 2 + 20


@pytest.mark.cuda
@pytest.mark.usefixtures("recorded")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_captured_step_never_waits(replays: list) -> None:
    pair, optim, xs = on_gpu()
    svi = SVI(pair.model, pair.guide, optim, Trace_ELBO(), backend="cudagraph")
    for x in xs[:6]:
        svi.step(x)
    total = torch.zeros((), device="cuda")
    try:
        torch.cuda.set_sync_debug_mode("error")
        for x in xs[6:]:
            total += svi.step(x)
            optim.param_groups[0]["lr"].fill_(0.001)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(total)
    assert len(replays) == 2 + 6


@pytest.mark.cuda
@pytest.mark.usefixtures("recorded")
def test_losses_of_captured_steps_are_kept_apart() -> None:
    pair, optim, xs = on_gpu()
    svi = SVI(pair.model, pair.guide, optim, Trace_ELBO(), backend="cudagraph")
    losses = [svi.step(x) for x in xs]
    assert len({float(loss) for loss in losses}) == len(xs)


@pytest.mark.cuda
@pytest.mark.usefixtures("recorded")
def test_short_batches_are_captured_too(replays: list) -> None:
    results = []
    for backend in ("eager", "cudagraph"):
        pair, optim, xs = on_gpu()
        svi = SVI(pair.model, pair.guide, optim, Trace_ELBO(), backend=backend, dataset_size=50)
        torch.manual_seed(7)
        losses = [svi.step(rows) for x in xs for rows in (x, x[:3])]
        results.append((torch.stack(losses), pair.state_dict()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert len(set(map(id, replays))) == 2


@pytest.mark.cuda
@pytest.mark.usefixtures("recorded")
def test_what_cannot_be_captured_is_named_and_runs(replays: list) -> None:
    pair, _, xs = on_gpu()
    optim = torch.optim.Adam(pair.parameters(), lr=0.01, fused=True)
    svi = SVI(pair.model, pair.guide, optim, Trace_ELBO(), backend="cudagraph")
    with pytest.warns(RuntimeWarning, match=r"without a CUDA graph: the optimizer reads Python numbers") as warned:
        step_through(svi, xs)
    assert len(warned) == 1
    pair, optim, xs = on_gpu()
    pair.weight = torch.tensor(1.0)  # a scalar on the CPU, which a graph would hold fixed
    model = lambda x: poutine.scale(pair.model, scale=pair.weight)(x)  # noqa: E731
    svi = SVI(model, pair.guide, optim, Trace_ELBO(), backend="cudagraph")
    with pytest.warns(RuntimeWarning, match=r"without a CUDA graph: it reads a tensor that does not lie on the GPU"):
        step_through(svi, xs)
    assert not replays


@pytest.mark.cuda
@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("name", ["pyro-adam", "pyro-clipped-adam", "sgd-momentum", "rmsprop"])
def test_other_optimizers_on_a_gpu(name: str) -> None:
    results = []
    for backend in ("eager", "auto"):
        pair, _, xs = on_gpu()
        optim = OPTIMIZERS[name](list(pair.parameters()))
        svi = SVI(pair.model, pair.guide, optim, Trace_ELBO(), backend=backend, num_steps=svi_module.WORTH_COMPILING)
        torch.manual_seed(7)
        results.append((torch.stack([svi.step(x) for x in xs]), pair.state_dict()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.usefixtures("recorded")
def test_a_resumed_captured_fit_is_bit_identical(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, replays: list) -> None:
    monkeypatch.setitem(FIT, "backend", "cudagraph")
    whole = vae()
    pv.fit(whole, GREY, binarize=True, device="cuda", **FIT)
    assert replays
    pair, _ = fit_in_two(tmp_path / "run", monkeypatch, GREY, 6, binarize=True, device="cuda")
    torch.testing.assert_close(pair.state_dict(), whole.state_dict(), rtol=0, atol=0)
