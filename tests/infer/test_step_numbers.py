"""A recorded step has the eager one's losses, weights and optimizer state, at equal noise.

Compiling takes seconds, so most tests run the program that the compiler would be given; the ``slow`` ones compile it.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import iterated, planar
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, AutoNormalizingFlow, init_to_sample
from pyro.nn import PyroModule, PyroSample
from steps import Odd, Plain, adam, assert_same_run, batches, run, sgd, store, vae, vae_and_adam
from test_pairs import CASES, build
from torch import Tensor, nn
from torch.distributions import constraints

import pyrovae as pv
from pyrovae import FunctionPair, Pair
from pyrovae.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyrovae.models import VAE
from pyrovae.training import TrainingDiverged

pytestmark = pytest.mark.usefixtures("uncompiled")
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}
BOTH = ("eager", "compiled")
PER_PARAMETER = "steps run eagerly: this pyro.optim optimizer has options for each parameter"


def enum() -> TraceEnum_ELBO:
    return TraceEnum_ELBO(strict_enumeration_warning=False)


# Every pair, every loss ---------------------------------------------------------------------------------------------

LOSSES: dict[str, Callable[[], Any]] = {
    "Trace": Trace_ELBO,
    "Trace-4": lambda: Trace_ELBO(num_particles=4),
    "Trace-2-in-turn": lambda: Trace_ELBO(num_particles=2, vectorize_particles=False),
    "MeanField-4": lambda: TraceMeanField_ELBO(num_particles=4),
    "Enum": enum,
    "Enum-4": lambda: TraceEnum_ELBO(num_particles=4, strict_enumeration_warning=False),
    "Renyi-1": lambda: RenyiELBO(num_particles=1),
    "Renyi-4": lambda: RenyiELBO(num_particles=4),
    "Renyi-half": lambda: RenyiELBO(alpha=0.5, num_particles=4),
    "Renyi-max": lambda: RenyiELBO(alpha=-math.inf, num_particles=4),
    "Renyi-in-turn": lambda: RenyiELBO(num_particles=2, vectorize_particles=False),
}


def applies(case: str, loss: str) -> bool:
    if case in ("iwae-1", "iwae-3", "gmm-tied", "gmm-spherical", "vae-grey"):  # variants of what the others cover
        return loss in ("Renyi-4", "Enum")
    if loss in ("Trace-2-in-turn", "Renyi-1", "Renyi-half", "Renyi-max", "Renyi-in-turn"):
        return case in ("gmm-amortized", "vae-normal") or (case == "gmm-full" and loss == "Renyi-1")
    if case == "gmm-amortized":  # a discrete guide has no pathwise gradient
        return not loss.startswith("MeanField")
    return loss.startswith(("Enum", "Renyi")) if case.startswith("gmm") else True


@pytest.mark.parametrize(("case", "loss"), [(c, name) for c in CASES for name in LOSSES if applies(c, name)])
def test_a_recorded_step_is_the_eager_one(case: str, loss: str, seen: SimpleNamespace) -> None:
    def setup() -> tuple[Pair, Any]:
        pair, _ = build(case)
        return pair, sgd(pair, 1e-3)  # without Adam, weights show gradients

    _, x = build(case)
    assert_same_run(setup, [x, x, x], loss=LOSSES[loss])
    assert len(seen.steps) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("case", "loss"), [("vae-bernoulli", "Renyi-4"), ("gmm-full", "Enum")])
def test_a_compiled_step_is_the_eager_one(case: str, loss: str, seen: SimpleNamespace) -> None:
    def setup() -> tuple[Pair, Any]:
        pair, _ = build(case)
        return pair, adam(pair, lr=1e-3)

    _, x = build(case)
    xs = [x, x.flip(0), x[:7], x]
    eager, compiled = (run(setup, backend, xs, loss=LOSSES[loss]) for backend in BOTH)
    torch.testing.assert_close(compiled[:2], eager[:2], rtol=2e-4, atol=2e-5)  # other libraries, another order of sums
    assert len(seen.steps) == 3
    assert [each._program is not None for each in compiled[2]._records.values()] == [True, False]


class Global(Pair):
    """A global latent beside local ones, and a discrete one among these."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
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


@pytest.mark.parametrize("loss", ["Trace", "Trace-4", "Trace-2-in-turn", "Renyi-4", "Renyi-in-turn"])
def test_global_and_discrete_latents_and_a_dataset_size(loss: str, seen: SimpleNamespace) -> None:
    xs = [x[:size] for x, size in zip(batches(5), (8, 8, 3, 8, 3), strict=True)]  # a short batch has its own scale
    assert_same_run(lambda: (pair := Global(), sgd(pair, 1e-3)), xs, loss=LOSSES[loss], dataset_size=100)
    assert [shapes[0][0] for shapes in seen.steps] == [8, 3, 8, 3]


class Subsampled(Plain):
    """Draws rows of its own data at every step; ``step`` takes no arguments."""

    def model(self) -> None:  # type: ignore[override]
        with pyro.plate("data", 20, subsample_size=5) as index:
            z = pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=ROWS[index])

    def guide(self) -> None:  # type: ignore[override]
        with pyro.plate("data", 20, subsample_size=5) as index:
            pyro.sample("z", dist.Normal(ROWS[index] + self.loc, 1.0).to_event(1))


ROWS = batches(1, 20)[0]


@pytest.mark.parametrize("loss", ["Trace", "Trace-2-in-turn", "Renyi-4", "Renyi-in-turn"])
def test_a_subsampled_plate_draws_other_rows_at_each_step(loss: str, seen: SimpleNamespace) -> None:
    svi = assert_same_run(lambda: (pair := Subsampled(), sgd(pair, 1e-3)), [()] * 5, loss=LOSSES[loss])
    assert len(seen.steps) == 4
    assert len({float(svi.step()) for _ in range(5)}) == 5


# Programs of Pyro's tutorials ---------------------------------------------------------------------------------------


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


def mixture() -> tuple[Callable, Callable]:
    """Its parameters are global latents, and its components are summed out."""

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


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 3, batch_first=True)

    def guide(self, x: Tensor) -> None:
        pyro.module("lstm", self.lstm)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.lstm(x.unsqueeze(-1))[0][..., 0], 0.5).to_event(1))


planar_flow = partial(iterated, 2, planar)


def with_autoguide(guide: Callable) -> tuple[Callable, Callable]:
    """Bayesian regression, with the priors of Pyro's tutorial: ``expand`` makes them validate whatever the setting."""
    layer = PyroModule[nn.Linear](4, 1)
    layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 4]).to_event(2))
    layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def model(x: Tensor) -> None:
        mean = layer(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=x.sum(-1))

    return model, guide(model)


PROGRAMS: dict[str, tuple[Callable[[], tuple[Callable, Callable]], Callable[[], Any]]] = {
    "plain functions": (lambda: (plain_model, plain_guide), Trace_ELBO),
    "function pair": (lambda: ((pair := FunctionPair(plain_model, plain_guide)).model, pair.guide), Trace_ELBO),
    "mixture": (mixture, enum),
    "hidden Markov": (hidden_markov, enum),
    "LSTM": (lambda: (plain_model, Recurrent().guide), Trace_ELBO),
    "AutoNormal": (lambda: with_autoguide(AutoNormal), Trace_ELBO),
    "AutoMultivariateNormal": (lambda: with_autoguide(AutoMultivariateNormal), LOSSES["Trace-2-in-turn"]),
    "AutoDelta": (lambda: with_autoguide(AutoDelta), Trace_ELBO),
    "flow": (lambda: with_autoguide(partial(AutoNormalizingFlow, init_transform_fn=planar_flow)), Trace_ELBO),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_with_a_pyro_optimizer(name: str, seen: SimpleNamespace) -> None:
    make, loss = PROGRAMS[name]
    results = []
    for backend in BOTH:
        pyro.clear_param_store()
        torch.manual_seed(0)
        svi = SVI(*make(), pyro.optim.Adam({"lr": 0.01, "betas": (0.5, 0.9)}), loss(), backend=backend)
        results.append(([svi.step(x) for x in batches()], store()))
    torch.testing.assert_close(results[1], results[0], **TOLERANCE)
    assert len(seen.steps) == 4  # the first step makes the optimizer, the second finds that it names no others
    assert type(svi.optim) is torch.optim.Adam


PYROS_OWN: dict[str, Callable[[], Any]] = {
    "a function of options": lambda: pyro.optim.Adam(lambda name: {"lr": 0.1 if "bias" in name else 0.01}),
    "clipping": lambda: pyro.optim.Adam({"lr": 0.01}, {"clip_norm": 0.1}),
    "a scheduler": lambda: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "gamma": 0.5}
    ),
}


@pytest.mark.parametrize("name", PYROS_OWN)
def test_pyro_optimizers_for_each_parameter_run_eagerly_and_say_so_once(name: str, seen: SimpleNamespace) -> None:
    results = []
    for backend in BOTH:
        pyro.clear_param_store()
        optim = PYROS_OWN[name]()
        svi = SVI(plain_model, plain_guide, optim, Trace_ELBO(), backend=backend)
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            losses = [svi.step(x) for x in batches()]
        assert [PER_PARAMETER in str(each.message) for each in warned] == [True] * (backend == "compiled")
        assert svi.optim is optim
        results.append((losses, store(), optim.get_state()))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert not seen.steps


def test_each_kind_of_call_trains_the_parameters_that_it_names(seen: SimpleNamespace) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        plain_model(x)

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        loc = pyro.param("loc", torch.zeros(4)) + (0.0 if y is None else pyro.param("extra", torch.zeros(4)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc + x, 1.0).to_event(1))

    results = []
    for backend in BOTH:
        pyro.clear_param_store()
        torch.manual_seed(0)
        svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.01}), Trace_ELBO(), backend=backend)
        losses = [svi.step(x, x) if i % 4 == 3 else svi.step(x) for i, x in enumerate([*batches(), *batches()])]
        results.append((losses, store()))
    torch.testing.assert_close(*results, **TOLERANCE)
    assert len(seen.steps) == 12 - 3  # the first, and each kind's first under the optimizer of all


class Normed(Odd):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(lambda pair, x: 1.0)
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())

    def guide(self, x: Tensor) -> None:
        super().guide(self.encoder(x))


def test_running_statistics_move_once_a_step_and_eval_is_noticed(seen: SimpleNamespace) -> None:
    def act(step: int, svi: SVI, pair: Any) -> None:
        pair.train(mode=step < 6)

    svi = assert_same_run(lambda: (pair := Normed(), sgd(pair)), [*batches(), *batches()], act=act)
    assert svi.model.__self__.encoder[1].num_batches_tracked == 6 + 1  # the loss looks at a new pair once
    assert (len(seen.records), len(seen.steps)) == (2, 11)


class Labelled(Plain):
    """Labels as a conditional VAE has them: one-hot, embedded, as weights of a sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.Embedding(3, 4)

    def model(self, x: Tensor, labels: Tensor) -> None:  # type: ignore[override]
        one_hot = nn.functional.one_hot(labels, 3).float()
        counts = torch.zeros(3).scatter_add(0, labels, x[:, 0])
        with pyro.plate("data", len(x)):
            loc = self.loc + self.rows(labels) + one_hot.sum(-1, keepdim=True) * counts.mean()
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_labels_are_recorded_and_a_wrong_one_is_an_error(compiled: bool, seen: SimpleNamespace) -> None:
    good = [(x, (torch.arange(8) + step) % 3) for step, x in enumerate(batches())]
    svi = assert_same_run(lambda: (pair := Labelled(), adam(pair)), good)
    assert len(seen.steps) == 5
    for bad in (3, -1):
        labels = torch.arange(8) % 3
        labels[5] = bad
        with pytest.raises(RuntimeError, match="Class values"):
            svi.step(batches()[0], labels)
    svi.step(*good[0])
    assert len(seen.steps) == 6


# Optimizers ---------------------------------------------------------------------------------------------------------


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


Adam, AdamW, SGD, RMSprop = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop
IN_THE_PROGRAM: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "plain": lambda p: Adam(p, lr=0.01),
    "fused": lambda p: Adam(p, lr=0.01, fused=True),
    "foreach": lambda p: Adam(p, lr=0.01, foreach=True),
    "tensor lr": lambda p: Adam(p, lr=torch.tensor(0.01), fused=True),
    "options": lambda p: Adam(p, lr=0.01, betas=(0.5, 0.9), eps=1e-3),
    "no momentum": lambda p: Adam(p, lr=0.01, betas=(0.0, 0.9)),
    "weight decay": lambda p: Adam(p, lr=0.01, weight_decay=0.1),
    "decoupled": lambda p: Adam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "maximize": lambda p: Adam(p, lr=0.01, maximize=True),
    "AdamW": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW, fused": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "two groups": lambda p: Adam([{"params": p[:3], "lr": 0.1}, {"params": p[3:], "betas": (0.5, 0.9)}], lr=0.01),
}
BY_ITSELF: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "amsgrad": lambda p: Adam(p, lr=0.01, amsgrad=True),
    "SGD with momentum": lambda p: SGD(p, lr=0.001, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
}


@pytest.mark.parametrize("name", [*IN_THE_PROGRAM, *BY_ITSELF])
def test_every_optimizer_updates_as_it_does_eagerly(name: str, seen: SimpleNamespace) -> None:
    def setup() -> tuple[Pair, Any]:
        torch.manual_seed(0)
        pair = Strided()
        return pair, (IN_THE_PROGRAM | BY_ITSELF)[name](list(pair.parameters()))

    svi = assert_same_run(setup)
    assert (len(seen.records), len(seen.steps)) == (1, 5)
    (recorded,) = svi._records.values()
    assert (recorded._program is not None) == (name in IN_THE_PROGRAM)
    assert all(p.grad is None for p in svi.model.__self__.parameters())


def quadratic(dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], Callable]:
    """Parameters and a model with gradients of very different sizes."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((3, 4), (5,), ())]
    scales = [torch.logspace(-6, 3, p.numel(), dtype=dtype).reshape(p.shape) for p in params]

    def model(x: Tensor) -> None:
        pyro.factor("f", -sum((s * (p - x) ** 2).sum() for p, s in zip(params, scales, strict=True)))

    return params, model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*IN_THE_PROGRAM, pytest.param("two groups", marks=pytest.mark.slow)])
def test_adam_is_torchs_own_over_fifty_steps(name: str, dtype: torch.dtype) -> None:
    """To rounding, weights and state dict: exp_avg, exp_avg_sq and step, of the same types."""
    found = []
    for backend in BOTH:
        params, model = quadratic(dtype)
        optim = IN_THE_PROGRAM[name](params)
        svi = SVI(model, lambda x: None, optim, Trace_ELBO(), backend=backend, checked=True)
        for step in range(50):
            svi.step(torch.tensor(math.sin(step), dtype=dtype))
        found.append((params, optim.state_dict()["state"]))
    torch.testing.assert_close(*found, rtol=1e-5 if dtype is torch.float32 else 1e-10, atol=1e-7)
    assert [each["step"].item() for each in found[1][1].values()] == [50] * 3


# What is done to the optimizer between steps


def load_state(svi: SVI, pair: Pair) -> None:
    state = copy.deepcopy(svi.optim.state_dict())
    state["param_groups"][0]["lr"] = 0.1
    for each in state["state"].values():
        each["exp_avg"].mul_(3)
        each["step"].zero_()
    svi.optim.load_state_dict(state)


def exchange_one_moment(svi: SVI, pair: Pair) -> None:
    last = list(pair.parameters())[-1]
    svi.optim.state[last]["exp_avg"] = torch.zeros_like(last)


def clamp(optim: torch.optim.Optimizer, *_: Any) -> None:
    with torch.no_grad():
        for param in optim.param_groups[0]["params"]:
            param.clamp_(-0.1, 0.1)


ACTS: dict[str, tuple[Callable[[SVI, Any], Any], int]] = {  # and the number of records
    "a rate": (lambda svi, pair: svi.optim.param_groups[0].update(lr=0.1), 1),
    "a rate that is a tensor": (lambda svi, pair: svi.optim.param_groups[0].update(lr=torch.tensor(0.1)), 1),
    "state": (load_state, 1),
    "no state": (lambda svi, pair: svi.optim.state.clear(), 1),
    "one moment": (exchange_one_moment, 1),
    "weights": (lambda svi, pair: pair.load_state_dict({k: v + 0.5 for k, v in pair.state_dict().items()}), 1),
    "options": (lambda svi, pair: svi.optim.param_groups[0].update(betas=(0.1, 0.5), weight_decay=1.0), 2),
    "a hook": (lambda svi, pair: svi.optim.register_step_post_hook(clamp), 2),
}


@pytest.mark.parametrize("name", [*ACTS, pytest.param("a rate that is a tensor", marks=pytest.mark.slow)])
def test_what_is_done_to_the_optimizer_between_steps_counts(name: str, seen: SimpleNamespace) -> None:
    change, records = ACTS[name]

    def act(step: int, svi: SVI, pair: Any) -> None:
        if step == 3:
            change(svi, pair)

    eager, mine = (run(vae_and_adam, backend, act=act) for backend in BOTH)
    states = [each[2].optim.state_dict()["state"] for each in (mine, eager)]
    torch.testing.assert_close((*mine[:2], states[0]), (*eager[:2], states[1]), **TOLERANCE)
    assert (len(seen.records), len(seen.steps)) == (records, 5)


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_scheduler_of_torch_sets_the_rate(tensor_lr: bool, seen: SimpleNamespace) -> None:
    def setup() -> tuple[Pair, Any]:
        pair = vae()
        optim = adam(pair, lr=torch.tensor(0.01) if tensor_lr else 0.01)
        schedules.append(torch.optim.lr_scheduler.ExponentialLR(optim, 0.5))
        return pair, optim

    def act(step: int, svi: SVI, pair: Any) -> None:
        if step:
            schedules[-1].step()  # which would warn where it had not seen the optimizer's step

    schedules: list[Any] = []
    svi = assert_same_run(setup, act=act)
    assert float(svi.optim.param_groups[0]["lr"]) == pytest.approx(0.01 * 0.5**5)
    assert (len(seen.records), len(seen.steps)) == (1, 5)


def test_parameters_of_two_dtypes_and_double_precision_by_default(float64: None, seen: SimpleNamespace) -> None:
    def setup() -> tuple[Pair, Any]:
        pair = Plain()
        pair.offset = nn.Parameter(torch.zeros(4, dtype=torch.float32))
        pair.model = lambda x: Plain.model(pair, x + pair.offset)  # type: ignore[method-assign]
        return pair, adam(pair)

    eager, mine = (run(setup, backend, batches().double()) for backend in BOTH)
    torch.testing.assert_close(mine[:2], eager[:2], rtol=1e-7, atol=1e-9)
    states = [each[2].optim.state_dict()["state"] for each in (eager, mine)]
    torch.testing.assert_close(*states, rtol=1e-7, atol=1e-9)
    assert len(seen.steps) == 5


@pytest.mark.parametrize(("first", "second"), [BOTH, BOTH[::-1]])
def test_a_state_dict_goes_from_one_backend_to_the_other(first: str, second: str) -> None:
    losses, weights, _ = run(vae_and_adam, "eager", [*batches(), *batches()])
    _, middle, svi = run(vae_and_adam, first)
    saved, noise = copy.deepcopy(svi.optim.state_dict()), torch.get_rng_state()
    pair, optim = vae_and_adam()
    pair.load_state_dict(middle)
    optim.load_state_dict(saved)
    resumed = SVI(pair.model, pair.guide, optim, Trace_ELBO(), backend=second)
    torch.set_rng_state(noise)
    rest = torch.stack([resumed.step(x) for x in batches()])
    torch.testing.assert_close((rest, pair.state_dict()), (losses[6:], weights), **TOLERANCE)
    assert saved["param_groups"] == optim.state_dict()["param_groups"]


def test_a_copy_after_recorded_steps_goes_on_by_itself(seen: SimpleNamespace) -> None:
    pair, optim = vae_and_adam()
    svi = SVI(pair.model, pair.guide, optim, Trace_ELBO(), backend="compiled")
    for x in batches():
        svi.step(x)
    copied, weights, noise = copy.deepcopy(svi), copy.deepcopy(pair.state_dict()), torch.get_rng_state()
    losses = [copied.step(x) for x in batches()]
    torch.testing.assert_close(pair.state_dict(), weights, rtol=0, atol=0)
    torch.set_rng_state(noise)
    torch.testing.assert_close([svi.step(x) for x in batches()], losses, rtol=0, atol=0)
    torch.testing.assert_close(copied.model.__self__.state_dict(), pair.state_dict(), rtol=0, atol=0)
    assert (len(seen.records), len(seen.steps)) == (2, 5 + 6 + 6)


# fit ----------------------------------------------------------------------------------------------------------------

GREY = torch.rand(50, 4, generator=torch.Generator().manual_seed(2))
FIT: dict[str, Any] = {"epochs": 4, "batch_size": 16, "seed": 3}


def fit_in_two(folder: Path, rows: Tensor, after: int, **options: Any) -> tuple[Pair, Any]:
    """A fit that is interrupted after some steps, and resumed with a fresh pair."""
    step, taken = SVI.step, []

    def stopping(self: SVI, *args: Any, **kwargs: Any) -> Tensor:
        taken.append(1)
        if len(taken) > after:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SVI, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            pv.fit(vae(), rows, checkpoint=folder, **FIT, **options)
    pair = vae()
    return pair, pv.fit(pair, rows, checkpoint=folder, resume=True, **FIT, **options)


@pytest.mark.parametrize(
    ("backend", "after"),
    [("eager", 6), ("compiled", 2), ("compiled", 13), pytest.param("compiled", 6, marks=pytest.mark.slow)],
)
def test_a_resumed_fit_is_bit_identical(tmp_path: Path, backend: str, after: int, seen: SimpleNamespace) -> None:
    binarize = after == 6
    rows = GREY if binarize else GREY.round()
    whole = vae()
    history = pv.fit(whole, rows, binarize=binarize, backend=backend, **FIT).history
    assert len(seen.steps) == (4 * 4 if backend == "compiled" else 0)  # every step is a recorded one
    pair, resumed = fit_in_two(tmp_path / "run", rows, after, binarize=binarize, backend=backend)
    torch.testing.assert_close(pair.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert [row["train_bound"] for row in resumed.history] == [row["train_bound"] for row in history]


def test_fit_equals_the_eager_fit(seen: SimpleNamespace) -> None:
    pairs = {backend: vae() for backend in BOTH}
    options = FIT | {"validation": 10, "binarize": True}
    histories = [pv.fit(pair, GREY, backend=backend, **options).history for backend, pair in pairs.items()]
    torch.testing.assert_close(pairs["compiled"].state_dict(), pairs["eager"].state_dict(), rtol=1e-4, atol=1e-5)
    for a, b in zip(*histories, strict=True):
        assert a["train_bound"] == pytest.approx(b["train_bound"], rel=1e-4)
        assert a["validation_bound"] == pytest.approx(b["validation_bound"], rel=1e-4)
    assert {shapes[0] for shapes in seen.steps} == {(16,), (8,)}  # indices: gathering rows is in the step


class Bursting(VAE):
    """Its loss turns NaN when a clock, a buffer, passes 12."""

    def __init__(self) -> None:
        super().__init__(4, 2, hidden_dims=(5,))
        self.register_buffer("clock", torch.zeros(()))

    def model(self, x: Tensor) -> None:
        super().model(x)
        self.clock.add_(1)
        pyro.factor("late", torch.where(self.clock > 12, math.nan, 0.0).expand(()))


def test_divergence_is_explained_as_it_is_eagerly(seen: SimpleNamespace) -> None:
    messages = []
    for backend in BOTH:
        torch.manual_seed(0)
        pair = Bursting()
        with pytest.raises(TrainingDiverged) as error:
            pv.fit(pair, GREY.round(), loss=Trace_ELBO(), backend=backend, **FIT)
        messages.append(str(error.value))
        assert all(torch.isfinite(p).all() for p in pair.parameters())
    assert seen.steps
    assert "site 'late'" in messages[0]
    assert messages[0] == messages[1]
