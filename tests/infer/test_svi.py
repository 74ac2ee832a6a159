"""SVI: the step is what a hand-written loop does, with any optimizer; stock Pyro trains our pairs with our losses."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import constraints

from pyrovae import Pair
from pyrovae.infer import (
    SVI,
    DatasetSize,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceMeanField_ELBO,
    log_weight_terms,
)
from pyrovae.models import IWAE, VAE

ADAM = {"lr": 0.01}


def small_vae() -> Pair:
    pyro.set_rng_seed(0)
    return VAE(4, 2, hidden_dims=(5,))


def batches(number: int = 6) -> Tensor:
    return torch.rand(number, 8, 4, generator=torch.Generator().manual_seed(1)).round()


def assert_same_parameters(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    torch.testing.assert_close(dict(one.named_parameters()), dict(other.named_parameters()), **tolerance)


def train(pair: Pair, svi) -> list[float]:
    pyro.set_rng_seed(2)
    return [float(svi.step(x)) for x in batches()]


def by_hand(pair: Pair) -> list[float]:
    """The loop that SVI stands for: an ELBO from torch operations, backward, update."""
    optim = torch.optim.Adam(pair.parameters(), **ADAM)
    pyro.set_rng_seed(2)
    losses = []
    for x in batches():
        q = pair.encoder(x)
        z = q.rsample()
        prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        loss = -(prior.log_prob(z) + pair.decoder(z).log_prob(x) - q.log_prob(z)).sum()
        optim.zero_grad()
        loss.backward()
        optim.step()
        losses.append(loss.item())
    return losses


def trained_by_hand() -> tuple[Pair, list[float]]:
    pair = small_vae()
    return pair, by_hand(pair)


OPTIMIZERS: dict[str, Callable[[Pair], object]] = {
    "instance": lambda pair: torch.optim.Adam(pair.parameters(), **ADAM),
    "factory": lambda pair: lambda params: torch.optim.Adam(params, **ADAM),
    "pyro.optim": lambda pair: pyro.optim.Adam(ADAM),
}


@pytest.mark.parametrize("optim", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_step_is_the_hand_written_loop(optim: Callable) -> None:
    expected, losses = trained_by_hand()
    pair = small_vae()
    actual = train(pair, SVI(pair.model, pair.guide, optim(pair), Trace_ELBO()))
    assert actual == pytest.approx(losses, rel=1e-5)
    assert_same_parameters(pair, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optim", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_pyros_loss_in_our_svi(optim: Callable) -> None:
    expected, losses = trained_by_hand()
    pair = small_vae()
    loss = pyro.infer.Trace_ELBO(max_plate_nesting=1)
    assert train(pair, SVI(pair.model, pair.guide, optim(pair), loss)) == pytest.approx(losses, rel=1e-5)
    assert_same_parameters(pair, expected, rtol=1e-4, atol=1e-6)


def test_our_loss_in_pyros_svi() -> None:
    expected, losses = trained_by_hand()
    pair = small_vae()
    svi = pyro.infer.SVI(pair.model, pair.guide, pyro.optim.Adam(ADAM), Trace_ELBO())
    assert train(pair, svi) == pytest.approx(losses, rel=1e-5)
    assert_same_parameters(pair, expected, rtol=1e-4, atol=1e-6)
    assert not list(pyro.get_param_store())


PAIRS = {
    "vae": lambda: VAE(4, 2, hidden_dims=(5,)),
    "iwae": lambda: IWAE(4, (3, 2), hidden_dims=((5,), (4,))),
}
STOCK_LOSSES = {
    "pyro Trace_ELBO": lambda: pyro.infer.Trace_ELBO(),
    "pyro TraceEnum_ELBO": lambda: pyro.infer.TraceEnum_ELBO(strict_enumeration_warning=False),
    "Trace_ELBO": lambda: Trace_ELBO(num_particles=2),
    "TraceMeanField_ELBO": lambda: TraceMeanField_ELBO(num_particles=2),
    "TraceEnum_ELBO": lambda: TraceEnum_ELBO(num_particles=2, strict_enumeration_warning=False),
    "RenyiELBO": lambda: RenyiELBO(num_particles=3),
}


@pytest.mark.parametrize("loss", STOCK_LOSSES.values(), ids=STOCK_LOSSES)
@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
def test_stock_svi_trains_pairs_and_leaves_the_param_store_alone(make: Callable, loss: Callable) -> None:
    pair = make()
    x = (torch.rand(50, 4) < torch.tensor([0.05, 0.95, 0.9, 0.1])).float()
    before = {name: p.detach().clone() for name, p in pair.named_parameters()}
    svi = pyro.infer.SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.02}), loss())
    losses = [svi.step(x) / 50 for _ in range(80)]
    assert isinstance(losses[0], float)
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.5  # nats per datum
    assert all(not torch.equal(p, before[name]) for name, p in pair.named_parameters())
    assert not list(pyro.get_param_store())
    assert math.isfinite(svi.evaluate_loss(x))


# --- plain functions with pyro.param -------------------------------------------------------------


def model(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


def guide(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(3.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    pyro.sample("w", dist.Normal(loc, scale))


@pytest.mark.parametrize("ours", [True, False], ids=["our loss", "Pyro's loss"])
@pytest.mark.parametrize(
    "optim",
    [lambda params: torch.optim.Adam(params, lr=0.05), pyro.optim.Adam({"lr": 0.05})],
    ids=["factory", "pyro.optim"],
)
def test_plain_functions(optim: Callable, ours: bool) -> None:
    """Their parameters appear at the first step and live in Pyro's store, as under stock SVI, and train alike."""
    x = 1.0 + torch.randn(8)
    results = []
    for svi in (
        SVI(model, guide, optim, Trace_ELBO() if ours else pyro.infer.Trace_ELBO(max_plate_nesting=1)),
        pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO(max_plate_nesting=1)),
    ):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        losses = torch.tensor([float(svi.step(x)) for _ in range(30)])
        results.append((losses, {name: value.detach().clone() for name, value in pyro.get_param_store().items()}))
    torch.testing.assert_close(results[0], results[1])
    assert set(results[0][1]) == {"loc", "scale"}
    assert results[0][1]["loc"] != 3.0


# --- the step's own promises ---------------------------------------------------------------------


@pytest.mark.parametrize("loss", STOCK_LOSSES.values(), ids=STOCK_LOSSES)
@pytest.mark.parametrize("optim", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_step_returns_a_scalar_tensor(optim: Callable, loss: Callable) -> None:
    pair = small_vae()
    svi = SVI(pair.model, pair.guide, optim(pair), loss())
    for value in (svi.step(batches()[0]), svi.step(batches()[1]), svi.evaluate_loss(batches()[0])):
        assert isinstance(value, Tensor)
        assert value.shape == ()
        assert not value.requires_grad


def test_the_loss_is_that_before_the_update() -> None:
    pair, x = small_vae(), batches()[0]
    svi = SVI(pair.model, pair.guide, torch.optim.SGD(pair.parameters(), lr=0.1), Trace_ELBO())
    pyro.set_rng_seed(5)
    before = svi.evaluate_loss(x)
    pyro.set_rng_seed(5)
    assert svi.step(x) == before
    pyro.set_rng_seed(5)
    assert svi.evaluate_loss(x) != before


def test_evaluate_loss_changes_nothing() -> None:
    pair, other = small_vae(), small_vae()
    svi = SVI(pair.model, pair.guide, torch.optim.Adam(pair.parameters()), RenyiELBO())
    svi.evaluate_loss(batches()[0])
    assert_same_parameters(pair, other, rtol=0, atol=0)
    assert all(p.grad is None for p in pair.parameters())


@pytest.mark.parametrize("loss", [Trace_ELBO, pyro.infer.Trace_ELBO], ids=["ours", "Pyro's"])
def test_old_gradients_are_forgotten(loss: type) -> None:
    clean, dirty = small_vae(), small_vae()
    for p in dirty.parameters():
        p.grad = torch.full_like(p, 1e3)
    for pair in (clean, dirty):
        optim = torch.optim.SGD(pair.parameters(), lr=0.01)
        train(pair, SVI(pair.model, pair.guide, optim, loss(max_plate_nesting=1)))
    assert_same_parameters(clean, dirty, rtol=0, atol=0)


def test_frozen_parameters_stay() -> None:
    pair = small_vae()
    for p in pair.decoder.parameters():
        p.requires_grad_(False)
    frozen = {name: p.clone() for name, p in pair.decoder.named_parameters()}
    train(pair, SVI(pair.model, pair.guide, torch.optim.Adam(pair.parameters(), **ADAM), Trace_ELBO()))
    torch.testing.assert_close(dict(pair.decoder.named_parameters()), frozen, rtol=0, atol=0)


def test_schedulers_see_the_optimizer() -> None:
    pair = small_vae()
    optim = torch.optim.SGD(pair.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optim, 1, gamma=0.0)
    svi = SVI(pair.model, pair.guide, optim, Trace_ELBO())
    svi.step(batches()[0])
    schedule.step()  # the rate is zero from here on
    before = {name: p.detach().clone() for name, p in pair.named_parameters()}
    svi.step(batches()[1])
    torch.testing.assert_close(dict(pair.named_parameters()), before, rtol=0, atol=0)


PAIR = VAE(4, 2, hidden_dims=(3,))
ERRORS = {
    "no optimizer": (lambda: SVI(PAIR.model, PAIR.guide, None, Trace_ELBO()), r"optim: expected.*got NoneType"),
    "a name": (lambda: SVI(PAIR.model, PAIR.guide, "adam", Trace_ELBO()), r"optim: expected.*got str"),
    "no loss": (lambda: SVI(PAIR.model, PAIR.guide, pyro.optim.Adam(ADAM), None), r"loss: expected.*got None"),
    "loss class": (
        lambda: SVI(PAIR.model, PAIR.guide, pyro.optim.Adam(ADAM), Trace_ELBO),
        r"loss: expected a loss such as Trace_ELBO\(\); got <class",
    ),
}


@pytest.mark.parametrize(("call", "match"), ERRORS.values(), ids=ERRORS)
def test_errors(call: Callable, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        call()


# --- DatasetSize ---------------------------------------------------------------------------------


def test_dataset_size_is_a_subsampled_plate() -> None:
    """The same values and gradients as ``pyro.plate(..., subsample_size=)`` around the same rows."""
    x = torch.randn(4)

    def subsampled_model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 20, subsample=torch.arange(4)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    for loss in (Trace_ELBO(num_particles=3), RenyiELBO(num_particles=3), TraceMeanField_ELBO(num_particles=3)):
        results = []
        for run in (DatasetSize(20)(model), subsampled_model):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            with poutine.trace(param_only=True) as params:
                value = loss.loss_and_grads(run, guide, x)
            grads = [site["value"].unconstrained().grad for site in params.trace.nodes.values()]
            results.append([value, *grads])
        torch.testing.assert_close(results[0], results[1])


def test_dataset_size_leaves_other_plates_and_a_subsample_of_the_models_own_alone() -> None:
    x = torch.randn(4)

    def own_subsample(x: Tensor) -> None:
        with pyro.plate("data", 12, subsample=torch.arange(4)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def other_plate(x: Tensor) -> None:
        with pyro.plate("rows", 4):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    for run, scale in ((own_subsample, 3.0), (other_plate, 1.0)):
        terms = log_weight_terms(DatasetSize(12)(run), lambda x: None, x)
        assert terms.scale == scale
