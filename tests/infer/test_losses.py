"""The objectives: parity with Pyro's own at equal noise, exact gradients by enumeration and quadrature, bounds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO as PyroTrace_ELBO
from pyro.infer import TraceEnum_ELBO as PyroTraceEnum_ELBO
from pyro.infer import TraceMeanField_ELBO as PyroTraceMeanField_ELBO
from pyro.infer.renyi_elbo import RenyiELBO as PyroRenyiELBO
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyrovae import Pair, log_weights
from pyrovae.infer import (
    SVI,
    DatasetSize,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceMeanField_ELBO,
    log_weight_terms,
    renyi_bound,
)
from pyrovae.models import IWAE, VAE
from pyrovae.models.gmm import GMM

NUM_SE = 5  # standard errors allowed in statistical tests
PARALLEL = {"enumerate": "parallel"}
ALPHAS = [0, 0.5, 2, -1, -math.inf, math.inf]

pytestmark = pytest.mark.usefixtures("float64")


# --- pairs ---------------------------------------------------------------------------------------


class Nested(Pair):
    """A global latent, one for each datum, and features in a plate inside."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(-0.5))
        self.slope, self.noise = nn.Parameter(torch.tensor(0.4)), nn.Parameter(torch.tensor(0.1))

    def model(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            with pyro.plate("features", x.shape[-1], dim=-1):
                pyro.sample("x", dist.Normal(z, self.noise.exp()), obs=x)

    def guide(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(self.loc, self.log_scale.exp()))
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(w + self.slope * x.mean(-1, keepdim=True), 0.6))


class Discrete(Pair):
    """A discrete latent, and a continuous one below it, whose guide depends on it."""

    def __init__(self, enumerate_: dict | None = None) -> None:
        super().__init__()
        self.infer = enumerate_ or {}
        self.prior, self.locs = nn.Parameter(torch.tensor([0.1, -0.3, 0.4])), nn.Parameter(torch.randn(3))
        self.encoder, self.shift = nn.Linear(2, 3), nn.Parameter(torch.randn(3))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=self.prior))
            z = pyro.sample("z", dist.Normal(self.locs[c], 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1) + torch.zeros(2), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=self.encoder(x)), infer=self.infer)
            pyro.sample("z", dist.Normal(self.shift[c] + x.mean(-1), 0.7))


class Mixture(Pair):
    """A mixture whose component is left to enumeration, with a latent location for each datum if asked."""

    def __init__(self, amortized: bool) -> None:
        super().__init__()
        self.amortized = amortized
        self.logits, self.locs = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3, 2))
        self.encoder = nn.Linear(2, 2)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            shift = 0.0
            if self.amortized:
                shift = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            c = pyro.sample("c", dist.Categorical(logits=self.logits), infer=PARALLEL)
            pyro.sample("x", dist.Normal(self.locs[c] + shift, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        if self.amortized:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.encoder(x), 0.8).to_event(1))


class NormalNormal(Pair):
    """z ~ N(0, 1), x | z ~ N(z, 1): log p(x) = log N(x | 0, 2), p(z | x) = N(x/2, 1/2)."""

    def __init__(self, slope: float = 0.5, scale: float = math.sqrt(0.5)) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x, self.log_scale.exp()))

    def log_prob(self, x: Tensor) -> Tensor:
        return dist.Normal(0.0, math.sqrt(2)).log_prob(x)


def vae() -> tuple[Pair, Tensor]:
    return VAE(5, 2, hidden_dims=(4,)), torch.rand(6, 5).round()


def iwae() -> tuple[Pair, Tensor]:
    return IWAE(5, (3, 2), hidden_dims=((4,), (3,))), torch.rand(6, 5).round()


def nested() -> tuple[Pair, Tensor]:
    return Nested(), torch.randn(4, 3)


def discrete() -> tuple[Pair, Tensor]:
    return Discrete(), torch.randn(6, 2)


def nesting(make: Callable) -> int:
    return 2 if make is nested else 1


# --- parity with Pyro ----------------------------------------------------------------------------


def value_and_grads(loss, pair: Pair, *args, scale: float | None = None) -> tuple[float, dict[str, Tensor]]:
    model, guide = pair.model, pair.guide
    if scale is not None:
        model, guide = poutine.scale(model, scale), poutine.scale(guide, scale)
    pair.zero_grad()
    pyro.set_rng_seed(7)
    with poutine.trace(param_only=True):  # as SVI does: Pyro's losses want to see parameters
        value = loss.loss_and_grads(model, guide, *args)
    zeros = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in pair.named_parameters()}
    return float(value), zeros


def assert_parity(ours, theirs, pair: Pair, *args, scale: float | None = None) -> None:
    expected = value_and_grads(theirs, pair, *args, scale=scale)
    actual = value_and_grads(ours, pair, *args, scale=scale)
    assert any(g.abs().sum() > 0 for g in expected[1].values())
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("make", [vae, iwae, nested, discrete])
def test_trace_elbo_is_pyros(make: Callable, num_particles: int, vectorize: bool) -> None:
    pair, x = make()
    options = {"num_particles": num_particles, "max_plate_nesting": nesting(make)}
    ours = Trace_ELBO(vectorize_particles=vectorize, **options)
    assert_parity(ours, PyroTrace_ELBO(vectorize_particles=vectorize, **options), pair, x)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("make", [vae, nested])
def test_mean_field_elbo_is_pyros(make: Callable, num_particles: int, vectorize: bool) -> None:
    pair, x = make()
    options = {"num_particles": num_particles, "max_plate_nesting": nesting(make)}
    ours = TraceMeanField_ELBO(vectorize_particles=vectorize, **options)
    assert_parity(ours, PyroTraceMeanField_ELBO(vectorize_particles=vectorize, **options), pair, x)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize(
    "make",
    [
        lambda: (Mixture(amortized=False), torch.randn(6, 2)),
        lambda: (Mixture(amortized=True), torch.randn(6, 2)),
        lambda: (Discrete(PARALLEL), torch.randn(6, 2)),
        lambda: (Discrete({"enumerate": "sequential"}), torch.randn(2, 2)),
        discrete,
        vae,
    ],
    ids=["model-side", "model-side and amortized", "guide-side", "sequential", "sampled", "continuous"],
)
def test_enum_elbo_is_pyros(make: Callable, num_particles: int, vectorize: bool) -> None:
    pair, x = make()
    if vectorize and getattr(pair, "infer", None) == {"enumerate": "sequential"}:
        pytest.skip("sequential enumeration is for one particle at a time")
    options = {"num_particles": num_particles, "max_plate_nesting": 1, "strict_enumeration_warning": False}
    ours = TraceEnum_ELBO(vectorize_particles=vectorize, **options)
    assert_parity(ours, PyroTraceEnum_ELBO(vectorize_particles=vectorize, **options), pair, x)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("num_particles", [1, 2, 5])
@pytest.mark.parametrize("alpha", [0, 0.5, 2, -1])
@pytest.mark.parametrize("make", [vae, iwae])
def test_renyi_elbo_is_pyros(make: Callable, alpha: float, num_particles: int, vectorize: bool) -> None:
    pair, x = make()
    options = {"alpha": alpha, "num_particles": num_particles, "max_plate_nesting": 1}
    if num_particles == 1:  # Pyro 1.9.2 drops the sum over data for one vectorised particle
        vectorize = False
    ours = RenyiELBO(vectorize_particles=vectorize, **options)
    assert_parity(ours, PyroRenyiELBO(vectorize_particles=vectorize, **options), pair, x)


def test_renyi_elbo_is_pyros_with_a_global_latent() -> None:
    pair, x = nested()
    options = {"alpha": 0, "num_particles": 4, "max_plate_nesting": 2, "vectorize_particles": True}
    assert_parity(RenyiELBO(**options), PyroRenyiELBO(**options), pair, x)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_renyi_elbo_of_one_particle_is_the_elbo(alpha: float) -> None:
    pair, x = vae()
    assert_parity(RenyiELBO(alpha, num_particles=1), PyroTrace_ELBO(max_plate_nesting=1), pair, x)


class BetaVAE(VAE):
    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=4.0):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", self.decoder(z), obs=x)

    def guide(self, x: Tensor) -> None:
        with poutine.scale(scale=4.0):
            super().guide(x)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(Trace_ELBO, PyroTrace_ELBO), (TraceMeanField_ELBO, PyroTraceMeanField_ELBO)]
)
def test_beta_vae_by_scale(ours: type, theirs: type) -> None:
    pair, x = BetaVAE(5, 2, hidden_dims=(4,)), torch.rand(6, 5).round()
    assert_parity(
        ours(num_particles=2), theirs(num_particles=2, vectorize_particles=True, max_plate_nesting=1), pair, x
    )
    with pytest.raises(ValueError, match="one common scale"):
        RenyiELBO().loss(pair.model, pair.guide, x)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Trace_ELBO, PyroTrace_ELBO),
        (TraceMeanField_ELBO, PyroTraceMeanField_ELBO),
        (TraceEnum_ELBO, PyroTraceEnum_ELBO),
    ],
)
def test_mini_batch_scale_is_pyros(ours: type, theirs: type) -> None:
    pair, x = vae()
    options = {"max_plate_nesting": 1, "strict_enumeration_warning": False}
    assert_parity(ours(**options), theirs(**options), pair, x, scale=5.0)


class Impossible(Pair):
    """A global choice of three, of which the guide never makes the last, and which the model does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.locs = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(3))

    def probs(self) -> Tensor:
        return torch.cat([self.logits.softmax(-1), torch.zeros(1)])

    def model(self, x: Tensor) -> None:
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6, 0.0])))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.locs[z], 1.0), obs=x[:, 0])

    def guide(self, x: Tensor) -> None:
        pyro.sample("z", dist.Categorical(self.probs()), infer=PARALLEL)


def test_impossible_outcomes_of_a_global_latent_cost_nothing() -> None:
    options = {"max_plate_nesting": 1, "strict_enumeration_warning": False}
    assert_parity(TraceEnum_ELBO(**options), PyroTraceEnum_ELBO(**options), Impossible(), torch.randn(6, 2))


class Chain(Pair):
    """A hidden Markov model of four steps, its states left to enumeration: each takes the dim of the last but one."""

    def __init__(self, history: int) -> None:
        super().__init__()
        self.history = history
        self.logits, self.locs = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            state = torch.tensor(0)
            for t in pyro.markov(range(4), history=self.history):
                previous = state if self.history else torch.tensor(0)
                state = pyro.sample(f"z{t}", dist.Categorical(logits=self.logits[previous]), infer=PARALLEL)
                pyro.sample(f"x{t}", dist.Normal(self.locs[state], 1.0), obs=x[:, t])

    def guide(self, x: Tensor) -> None: ...


@pytest.mark.parametrize("history", [0, 1])
def test_a_chain_is_pyros(history: int) -> None:
    pair, x = Chain(history), torch.randn(5, 4)
    assert_parity(TraceEnum_ELBO(max_plate_nesting=1), PyroTraceEnum_ELBO(max_plate_nesting=1), pair, x)
    with pytest.raises(NotImplementedError, match=r"pyro.markov: its enumerated sites share dims.*TraceEnum_ELBO"):
        RenyiELBO(num_particles=3).loss(pair.model, pair.guide, x)


# --- one interface -------------------------------------------------------------------------------

LOSSES = [
    Trace_ELBO(num_particles=2),
    TraceMeanField_ELBO(num_particles=2),
    TraceEnum_ELBO(num_particles=2, strict_enumeration_warning=False),
    *(RenyiELBO(alpha, num_particles=3) for alpha in ALPHAS),
    RenyiELBO(num_particles=3, vectorize_particles=False),
]
NAMES = [f"{type(loss).__name__}{getattr(loss, 'alpha', '')}" for loss in LOSSES]


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_the_three_entry_points_agree(loss) -> None:
    for make in (vae, nested) if isinstance(loss, TraceMeanField_ELBO) else (vae, discrete, nested):
        pair, x = make()
        value, grads = value_and_grads(loss, pair, x)
        pyro.set_rng_seed(7)
        plain = loss.loss(pair.model, pair.guide, x)
        pyro.set_rng_seed(7)
        differentiable = loss.differentiable_loss(pair.model, pair.guide, x)
        assert plain.shape == differentiable.shape == ()
        assert not plain.requires_grad
        params = dict(pair.named_parameters())
        by_autograd = torch.autograd.grad(differentiable, list(params.values()))
        torch.testing.assert_close([plain.item(), differentiable.item()], [value, value])
        torch.testing.assert_close(dict(zip(params, by_autograd, strict=True)), grads)


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_gradients_are_added(loss) -> None:
    pair, x = vae()
    _, once = value_and_grads(loss, pair, x)
    pyro.set_rng_seed(7)
    loss.loss_and_grads(pair.model, pair.guide, x)
    torch.testing.assert_close({n: p.grad for n, p in pair.named_parameters()}, {n: 2 * g for n, g in once.items()})


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_one_loss_for_two_pairs(loss) -> None:
    """Plates of the second nest deeper: what was learnt of the first must not be used."""
    fresh = type(loss)(
        num_particles=loss.num_particles,
        vectorize_particles=loss.vectorize_particles,
        strict_enumeration_warning=False,
        **({"alpha": loss.alpha} if isinstance(loss, RenyiELBO) else {}),
    )
    for pair, x in (vae(), nested(), vae()):
        pyro.set_rng_seed(3)
        expected = type(fresh).loss(fresh, pair.model, pair.guide, x)
        fresh._seen.clear()
        pyro.set_rng_seed(3)
        assert loss.loss(pair.model, pair.guide, x) == expected


class NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor was read on the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("amortized", [False, True], ids=["model enumerated", "guide enumerated"])
@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_nothing_waits_for_the_device(loss, amortized: bool) -> None:
    if isinstance(loss, TraceEnum_ELBO):
        pair, x = GMM(3, 2, amortized=amortized), torch.randn(6, 2)
    else:
        pair, x = vae() if isinstance(loss, TraceMeanField_ELBO) else discrete()
    loss.loss(pair.model, pair.guide, x)  # the look at the structure
    with pyro.validation_enabled(False), NoSync():
        loss.loss_and_grads(pair.model, pair.guide, x)


@pytest.mark.parametrize(
    "loss_type", [Trace_ELBO, TraceMeanField_ELBO, RenyiELBO, TraceEnum_ELBO], ids=lambda t: t.__name__
)
def test_particles_one_by_one_are_the_same_bound(loss_type: type) -> None:
    """Exactly where the guide is a point; elsewhere on average."""
    x = torch.randn(4)
    pair = NormalNormal(slope=0.2, scale=0.8)

    def point(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(pair.slope * x))

    options = {"num_particles": 3, "strict_enumeration_warning": False}
    together, apart = loss_type(**options), loss_type(vectorize_particles=False, **options)
    torch.testing.assert_close(together.loss(pair.model, point, x), apart.loss(pair.model, point, x))
    draws = torch.stack(
        [torch.stack([loss.loss(pair.model, pair.guide, x) for _ in range(300)]) for loss in (together, apart)]
    )
    difference, se = draws[0].mean() - draws[1].mean(), (draws.var(1).sum() / 300).sqrt()
    assert difference.abs() < NUM_SE * se


ERRORS = {
    "alpha = 1": (lambda: RenyiELBO(alpha=1), ValueError, r"alpha.*but 1.*Trace_ELBO"),
    "alpha = 1.0": (lambda: RenyiELBO(alpha=1.0, num_particles=3), ValueError, r"alpha.*but 1"),
    "alpha = nan": (lambda: RenyiELBO(alpha=math.nan), ValueError, r"alpha.*nan"),
    "renyi K = 0": (lambda: RenyiELBO(num_particles=0), ValueError, r"num_particles.*1 or more; got 0"),
    "elbo K = 0": (lambda: Trace_ELBO(num_particles=0), ValueError, r"num_particles.*got 0"),
    "mean field K < 0": (lambda: TraceMeanField_ELBO(num_particles=-1), ValueError, r"num_particles.*got -1"),
    "enum K = 1.5": (lambda: TraceEnum_ELBO(num_particles=1.5), TypeError, r"num_particles.*whole number"),
}


@pytest.mark.parametrize(("call", "error", "match"), ERRORS.values(), ids=ERRORS)
def test_errors(call: Callable, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("loss_type", [Trace_ELBO, RenyiELBO, TraceEnum_ELBO], ids=lambda t: t.__name__)
def test_a_pair_that_cannot_run_vectorised_is_told_so(loss_type: type) -> None:
    pair, x = NormalNormal(slope=0.2, scale=0.8), torch.randn(4)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pair.slope * x, 1.0))
        x @ torch.outer(z, z)  # takes vectors alone

    options = {"num_particles": 3, "strict_enumeration_warning": False}
    with pytest.raises(RuntimeError) as caught:
        loss_type(**options).loss(pair.model, guide, x)
    assert caught.value.__notes__ == [
        "With 3 particles at once, values have one more dim on the left. For a pair that cannot run so, give the loss "
        "vectorize_particles=False."
    ]
    loss_type(vectorize_particles=False, **options).loss(pair.model, guide, x)
    with pytest.raises(RuntimeError) as caught:
        loss_type(**options).loss(pair.model, lambda x: torch.outer(x.reshape(2, 2), x), x)
    assert not hasattr(caught.value, "__notes__")  # one particle has the same error


def test_sites_that_a_loss_cannot_treat_are_refused() -> None:
    mixture, x = Mixture(amortized=False), torch.randn(3, 2)
    for loss in (Trace_ELBO(), TraceMeanField_ELBO()):
        with pytest.raises(ValueError, match=r"site 'c' is left to enumeration.*TraceEnum_ELBO"):
            loss.loss(mixture.model, mixture.guide, x)
    pair, x = discrete()
    with pytest.raises(NotImplementedError, match=r"site 'c'.*pathwise gradient; got Categorical"):
        TraceMeanField_ELBO().loss(pair.model, pair.guide, x)
    for loss in LOSSES:
        with pytest.raises(ValueError, match=r"site 'c' and the guide does not"):
            loss.loss(pair.model, lambda x: None, x)


# --- the Rényi bound of given weights ------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0, 0.5, 2, -1, 0.999])
def test_renyi_bound_is_its_formula(alpha: float) -> None:
    log_w = torch.randn(6, 4)
    expected = (log_w.exp() ** (1 - alpha)).mean(0).log() / (1 - alpha)
    torch.testing.assert_close(renyi_bound(log_w, alpha), expected)


def test_renyi_bound_falls_with_alpha_from_the_largest_weight_to_the_least() -> None:
    log_w = 3 * torch.randn(6, 50)
    alphas = [-math.inf, -1e4, -5, -1, 0, 0.5, 0.9999, 1.0001, 2, 10, 1e4, math.inf]
    bounds = torch.stack([renyi_bound(log_w, alpha) for alpha in alphas])
    assert (bounds.diff(dim=0) <= 1e-9).all()
    torch.testing.assert_close(bounds[0], log_w.max(0).values)
    torch.testing.assert_close(bounds[-1], log_w.min(0).values)
    torch.testing.assert_close(bounds[1], bounds[0], rtol=0, atol=1e-3)
    torch.testing.assert_close(bounds[-2], bounds[-1], rtol=0, atol=1e-3)
    torch.testing.assert_close(bounds[6], log_w.mean(0), rtol=0, atol=0.01)  # α → 1: the ELBO


def test_renyi_bound_of_large_weights_is_finite() -> None:
    log_w = torch.tensor([[-1e5, 1e5], [-1e5 - 1, 1e5 - 1]])
    torch.testing.assert_close(renyi_bound(log_w, 0)[0] + 1e5, torch.tensor(math.log((1 + math.exp(-1)) / 2)))
    assert renyi_bound(log_w, 2).isfinite().all()


# --- gradients of the Rényi bound: exact expectations by enumeration and quadrature --------------


def expected_bound(log_w: Tensor, log_q: Tensor, num_particles: int, alpha: float) -> Tensor:
    """E[L_α] over K independent draws from a finite set, differentiable: weights and log probabilities, shape (S,)."""
    tuples = torch.tensor(list(itertools.product(range(len(log_q)), repeat=num_particles)))
    log_w, probability = log_w[tuples], log_q[tuples].sum(-1).exp()
    if math.isinf(alpha):
        bound = log_w.max(-1).values if alpha < 0 else log_w.min(-1).values
    else:
        bound = ((1 - alpha) * log_w).exp().mean(-1).log() / (1 - alpha)
    return (probability * bound).sum()


def assert_unbiased(samples: Tensor, exact: Tensor) -> None:
    """Rows are independent estimates."""
    se = samples.std(0) / len(samples) ** 0.5
    assert ((samples.mean(0) - exact).abs() < NUM_SE * se + 1e-12).all(), (samples.mean(0), exact, se)


REPLICAS = 20_000
X = 0.8


class Categories(Pair):
    """One datum, REPLICAS times over, each with parameters of its own: one backward pass gives as many estimates."""

    LOGITS, LOCS = torch.tensor([0.5, -0.4, 0.1], dtype=torch.float64), torch.tensor([-1.0, 0.4, 2.0])

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(self.LOGITS.repeat(REPLICAS, 1).to(torch.float64))
        self.locs = nn.Parameter(self.LOCS.repeat(REPLICAS, 1).to(torch.float64))

    def model(self) -> None:
        with pyro.plate("data", REPLICAS):
            c = pyro.sample("c", dist.Categorical(torch.ones(3)))
            loc = self.locs.expand((*c.shape, 3)).gather(-1, c.unsqueeze(-1)).squeeze(-1)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.full((REPLICAS,), X))

    def guide(self) -> None:
        with pyro.plate("data", REPLICAS):
            pyro.sample("c", dist.Categorical(logits=self.logits))

    @classmethod
    def exact(cls, num_particles: int, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
        logits, locs = cls.LOGITS.double().requires_grad_(), cls.LOCS.double().requires_grad_()
        log_q = logits.log_softmax(-1)
        log_w = dist.Normal(locs, 1.0).log_prob(torch.tensor(X)) - math.log(3) - log_q
        bound = expected_bound(log_w, log_q, num_particles, alpha)
        return (bound.detach(), *torch.autograd.grad(bound, [logits, locs]))


@pytest.mark.parametrize("num_particles", [1, 2, 3])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradient_of_discrete_guides_is_unbiased(alpha: float, num_particles: int) -> None:
    pair = Categories()
    loss = RenyiELBO(alpha, num_particles)
    value = -loss.loss_and_grads(pair.model, pair.guide) / REPLICAS
    bound, logits, locs = pair.exact(num_particles, alpha)
    assert logits.abs().min() > 1e-3  # Pyro's gradient for α = 0 is zero
    assert_unbiased(-pair.logits.grad, logits)
    assert_unbiased(-pair.locs.grad, locs)
    spread = renyi_bound(log_weights(pair.model, pair.guide, num_particles=num_particles), alpha).std()
    assert (value - bound).abs() < NUM_SE * spread / REPLICAS**0.5


def test_leave_one_out_control_variate_lowers_the_variance() -> None:
    pair = Categories()
    RenyiELBO(0, 3).loss_and_grads(pair.model, pair.guide)
    ours = pair.logits.grad.var(0)
    pair.zero_grad()
    terms = log_weight_terms(pair.model, pair.guide, num_particles=3)
    bound = renyi_bound(terms.log_weights, 0)
    (-bound - bound.detach() * terms.score.sum(0)).sum().backward()
    assert (ours < 0.7 * pair.logits.grad.var(0)).all()


class Groups(Pair):
    """A discrete latent for each group, and one for each datum: the bound is the group's, its data scaled before."""

    GROUP, DATUM, X = torch.tensor(0.4), torch.tensor([-0.3, 0.6]), torch.tensor([0.5, -1.0])
    SIZE = 6

    def __init__(self) -> None:
        super().__init__()
        self.group = nn.Parameter(self.GROUP.double().repeat(REPLICAS, 1))
        self.datum = nn.Parameter(self.DATUM.double().repeat(REPLICAS, 1))

    def model(self) -> None:
        with pyro.plate("groups", REPLICAS, dim=-2):
            g = pyro.sample("g", dist.Bernoulli(0.3))
            with pyro.plate("data", 2, dim=-1):
                c = pyro.sample("c", dist.Bernoulli(0.2 + 0.5 * g))
                pyro.sample("x", dist.Normal(c + g, 1.0), obs=self.X.double().expand(REPLICAS, 2))

    def guide(self) -> None:
        with pyro.plate("groups", REPLICAS, dim=-2):
            pyro.sample("g", dist.Bernoulli(logits=self.group))
            with pyro.plate("data", 2, dim=-1):
                pyro.sample("c", dist.Bernoulli(logits=self.datum))

    @classmethod
    def exact(cls, num_particles: int, alpha: float) -> tuple[Tensor, Tensor]:
        group, datum = cls.GROUP.double().requires_grad_(), cls.DATUM.double().requires_grad_()
        g, a, b = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).T
        c = torch.stack([a, b], -1)
        log_q_g = dist.Bernoulli(logits=group).log_prob(g)
        log_q_c = dist.Bernoulli(logits=datum).log_prob(c).sum(-1)
        log_p = dist.Bernoulli(0.2 + 0.5 * g.unsqueeze(-1)).log_prob(c)
        log_p = log_p + dist.Normal(c + g.unsqueeze(-1), 1.0).log_prob(cls.X.double())
        log_w = dist.Bernoulli(0.3).log_prob(g) - log_q_g + cls.SIZE / 2 * (log_p.sum(-1) - log_q_c)
        bound = expected_bound(log_w, log_q_g + log_q_c, num_particles, alpha)
        return torch.autograd.grad(bound, [group, datum])


@pytest.mark.parametrize("alpha", [0, 0.5])
def test_gradient_of_discrete_guides_is_unbiased_where_local_terms_are_scaled(alpha: float) -> None:
    """The score of a draw is not scaled, whatever the scale of its log density in the weight."""
    pair = Groups()
    sized = DatasetSize(pair.SIZE)
    RenyiELBO(alpha, 2).loss_and_grads(sized(pair.model), sized(pair.guide))
    group, datum = pair.exact(2, alpha)
    assert_unbiased(-pair.group.grad.squeeze(-1), group)
    assert_unbiased(-pair.datum.grad, datum)


class Mixed(Pair):
    """A discrete and a continuous latent; in the guide, either depends on the other."""

    START = {"logit": 0.3, "slope": 0.8, "low": -0.5, "high": 0.9}  # noqa: RUF012

    def __init__(self, discrete_first: bool) -> None:
        super().__init__()
        self.discrete_first = discrete_first
        for name, value in self.START.items():
            setattr(self, name, nn.Parameter(torch.full((REPLICAS,), value)))

    def model(self) -> None:
        with pyro.plate("data", REPLICAS):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(z * (1 + c), 1.0), obs=torch.full((REPLICAS,), X))

    def guide(self) -> None:
        with pyro.plate("data", REPLICAS):
            if self.discrete_first:
                c = pyro.sample("c", dist.Bernoulli(logits=self.logit))
                pyro.sample("z", dist.Normal(self.low + c * (self.high - self.low) + self.slope, 0.7))
            else:
                z = pyro.sample("z", dist.Normal(self.low + self.high, 0.7))
                pyro.sample("c", dist.Bernoulli(logits=self.logit + self.slope * z))

    def exact(self, alpha: float) -> tuple[Tensor, ...]:
        """Two particles: all pairs of Gauss-Hermite nodes and of values of c."""
        params = {name: torch.tensor(value, requires_grad=True) for name, value in self.START.items()}
        logit, slope, low, high = params.values()
        nodes, weights = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(60))
        c, noise = torch.tensor([[0.0], [1.0]]), nodes.expand(2, -1)
        if self.discrete_first:
            loc = low + c * (high - low) + slope
            z = loc + 0.7 * noise
            log_q_c = dist.Bernoulli(logits=logit).log_prob(c).expand_as(z)
        else:
            loc = low + high
            z = loc + 0.7 * noise
            log_q_c = dist.Bernoulli(logits=logit + slope * z).log_prob(c)
        log_w = (
            dist.Normal(0.0, 1.0).log_prob(z)
            + dist.Bernoulli(0.4).log_prob(c)
            + dist.Normal(z * (1 + c), 1.0).log_prob(torch.tensor(X))
            - log_q_c
            - dist.Normal(loc, 0.7).log_prob(z)
        ).flatten()
        # The nodes' own weights are constants, the probabilities of c depend on the parameters.
        log_probability = (log_q_c + (weights / weights.sum()).log()).flatten()
        bound = expected_bound(log_w, log_probability, 2, alpha)
        return torch.autograd.grad(bound, list(params.values()))


@pytest.mark.parametrize("discrete_first", [True, False])
@pytest.mark.parametrize("alpha", [0, 0.5, -1])
def test_gradient_of_mixed_guides_is_unbiased(alpha: float, discrete_first: bool) -> None:
    pair = Mixed(discrete_first)
    RenyiELBO(alpha, 2).loss_and_grads(pair.model, pair.guide)
    for name, exact in zip(pair.START, pair.exact(alpha), strict=True):
        assert_unbiased(-getattr(pair, name).grad, exact)


def test_impossible_values_leave_the_gradient_finite() -> None:
    """A weight of zero in one particle says nothing about another's baseline."""
    logits = torch.zeros(200, requires_grad=True)

    def model() -> None:
        with pyro.plate("data", 200):
            c = pyro.sample("c", dist.Bernoulli(0.5))
            pyro.factor("x", torch.where(c == 1, 0.0, -math.inf))

    def guide() -> None:
        with pyro.plate("data", 200):
            pyro.sample("c", dist.Bernoulli(logits=logits))

    torch.manual_seed(0)
    log_w = log_weights(model, guide, num_particles=2)
    possible = log_w.isfinite().any(0)
    torch.manual_seed(0)
    RenyiELBO(0, 2).loss_and_grads(model, guide)
    assert 100 < possible.sum() < 200
    assert logits.grad[possible].isfinite().all()


# --- bounds --------------------------------------------------------------------------------------


def mean_and_se(draws: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    draws = torch.stack([torch.as_tensor(draw) for draw in draws])
    return draws.mean(), draws.std() / len(draws) ** 0.5


def subsampled(pair: NormalNormal, x: Tensor, size: int) -> tuple[Callable, Callable]:
    def model() -> None:
        with pyro.plate("data", len(x), subsample_size=size) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide() -> None:
        with pyro.plate("data", len(x), subsample_size=size) as rows:
            pyro.sample("z", dist.Normal(pair.slope * x[rows], pair.log_scale.exp()))

    return model, guide


@pytest.mark.parametrize("vectorize", [True, False])
def test_bound_holds_under_a_subsampled_plate(vectorize: bool) -> None:
    pair, x = NormalNormal(slope=0.2, scale=1.2), 2 * torch.randn(20)
    evidence = pair.log_prob(x).sum()
    draws = 400 if vectorize else 150
    options = {"alpha": 0, "num_particles": 10, "vectorize_particles": vectorize, "max_plate_nesting": 1}
    ours, se = mean_and_se(-RenyiELBO(**options).loss(*subsampled(pair, x, 4)) for _ in range(draws))
    exact = renyi_bound(log_weights(pair.model, pair.guide, x.repeat(5000), num_particles=10), 0)
    assert evidence - ours > -NUM_SE * se
    assert (ours - 20 * exact.mean()).abs() < NUM_SE * (se + 20 * exact.std() / len(exact) ** 0.5)
    # Pyro 1.9.2 takes the logarithm of a mean of w⁵ and exceeds the evidence.
    theirs, their_se = mean_and_se(-PyroRenyiELBO(**options).loss(*subsampled(pair, x, 4)) for _ in range(draws))
    assert theirs - evidence > NUM_SE * their_se


@pytest.mark.parametrize("vectorize", [True, False])
def test_particles_share_their_subsample(vectorize: bool) -> None:
    """With the exact posterior each weight is a datum's evidence: weights of different data must not be averaged."""
    x = torch.tensor([0.0, 0.0, 5.0, 5.0])
    pair = NormalNormal()
    loss = RenyiELBO(0, num_particles=8, vectorize_particles=vectorize)
    bounds = torch.stack([-loss.loss(*subsampled(pair, x, 1)) for _ in range(40)])
    distance = (bounds[:, None] - 4 * pair.log_prob(x)).abs().min(1).values
    assert distance.max() < 1e-9


def test_bound_holds_under_one_common_scale() -> None:
    pair, x = NormalNormal(slope=0.2, scale=1.2), 2 * torch.randn(4)
    evidence = 5 * pair.log_prob(x).sum()
    scaled = poutine.scale(pair.model, 5.0), poutine.scale(pair.guide, 5.0)
    options = {"alpha": 0, "num_particles": 10, "vectorize_particles": True, "max_plate_nesting": 1}
    ours, se = mean_and_se(-RenyiELBO(**options).loss(*scaled, x) for _ in range(300))
    exact = renyi_bound(log_weights(pair.model, pair.guide, x.repeat(20_000, 1).T.flatten(), num_particles=10), 0)
    assert evidence - ours > -NUM_SE * se
    by_datum = exact.reshape(4, -1)
    reference_se = 5 * (by_datum.var(1).sum() / by_datum.shape[1]).sqrt()
    assert (ours - 5 * by_datum.mean(1).sum()).abs() < NUM_SE * (se + reference_se)
    theirs, their_se = mean_and_se(-PyroRenyiELBO(**options).loss(*scaled, x) for _ in range(300))
    assert theirs - evidence > NUM_SE * their_se  # Pyro 1.9.2


def test_bound_rises_with_the_particles_and_stays_below_the_evidence() -> None:
    pair, replicas = NormalNormal(slope=0.1, scale=1.3), 20_000
    x = torch.full((replicas,), 1.5)
    evidence = pair.log_prob(x[0])
    bounds, errors = [], []
    for num_particles in (1, 2, 5, 20, 100):
        pyro.set_rng_seed(num_particles)
        mean = -RenyiELBO(0, num_particles).loss(pair.model, pair.guide, x) / replicas
        pyro.set_rng_seed(num_particles)
        draws = renyi_bound(log_weights(pair.model, pair.guide, x, num_particles=num_particles), 0)
        torch.testing.assert_close(mean, draws.mean())
        bounds.append(mean)
        errors.append(draws.std() / replicas**0.5)
    bounds, errors = torch.stack(bounds).detach(), torch.stack(errors).detach()
    # The ELBO in closed form: evidence − KL(q ‖ posterior).
    kl = torch.distributions.kl_divergence(dist.Normal(0.15, 1.3), dist.Normal(0.75, math.sqrt(0.5)))
    assert (bounds[0] - (evidence - kl)).abs() < NUM_SE * errors[0]
    assert (bounds.diff() > -NUM_SE * (errors[1:] ** 2 + errors[:-1] ** 2).sqrt()).all()
    assert (bounds < evidence + NUM_SE * errors).all()
    assert evidence - bounds[-1] < 0.1 * (evidence - bounds[0])


def test_mean_field_elbo_where_the_guide_goes_the_other_way() -> None:
    """The guide of a deep model samples bottom-up: a closed-form KL of its first layer is wrong (Pyro takes it)."""
    pair, x = iwae()
    with torch.no_grad():
        for p in pair.parameters():
            p.mul_(2)
        log_w = log_weights(pair.model, pair.guide, x, num_particles=100_000).sum(1)
        expected, expected_se = log_w.mean(), log_w.std() / len(log_w) ** 0.5
        ours = TraceMeanField_ELBO(num_particles=100)
        mean, se = mean_and_se(-ours.loss(pair.model, pair.guide, x) for _ in range(200))
        assert (mean - expected).abs() < NUM_SE * (se**2 + expected_se**2).sqrt()
        theirs = PyroTraceMeanField_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1)
        with pytest.warns(UserWarning, match="mean field"):
            wrong, wrong_se = mean_and_se(-theirs.loss(pair.model, pair.guide, x) for _ in range(200))
        assert (wrong - expected).abs() > 2 * NUM_SE * (wrong_se**2 + expected_se**2).sqrt()
        # The upper layer's closed form does lower the variance.
        assert se * 200**0.5 < log_w.std() / 100**0.5


# --- a conjugate model is recovered --------------------------------------------------------------


class GlobalMean(Pair):
    """w ~ N(0, 1), x_n | w ~ N(w, 1): the posterior is N(Σx / (N+1), 1 / (N+1))."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.tensor(8.0)), nn.Parameter(torch.tensor(0.5))

    def model(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.sample("w", dist.Normal(self.loc, self.log_scale.exp()))


# Few particles: the guide's gradient of the importance-weighted bound drowns in noise as K grows (Rainforth et al.
# 2018).
CONJUGATE = [
    Trace_ELBO(num_particles=5),
    TraceMeanField_ELBO(num_particles=5),
    TraceEnum_ELBO(num_particles=5, strict_enumeration_warning=False),
    RenyiELBO(0, num_particles=2),
    RenyiELBO(0.5, num_particles=2),
    RenyiELBO(2, num_particles=2),
    RenyiELBO(math.inf, num_particles=2),
]


def train(pair: Pair, loss, x: Tensor, steps: int = 800) -> None:
    # Gradients at the start are hundreds of times those near the end: forget them soon.
    optim = torch.optim.Adam(pair.parameters(), lr=0.2, betas=(0.9, 0.95))
    svi = SVI(pair.model, pair.guide, optim, loss)
    decay = torch.optim.lr_scheduler.ExponentialLR(optim, 0.005 ** (1 / steps))  # from 0.2 to 0.001
    with pyro.validation_enabled(False):
        for _ in range(steps):
            svi.step(x)
            decay.step()


@pytest.mark.slow
@pytest.mark.parametrize("loss", CONJUGATE, ids=lambda loss: f"{type(loss).__name__}{getattr(loss, 'alpha', '')}")
def test_conjugate_global_mean_is_recovered(loss) -> None:
    """From a guide two hundred nats away to within 0.05, where the bound is the evidence to within 0.05."""
    pair, x = GlobalMean(), 1.0 + torch.randn(8)
    evidence = dist.MultivariateNormal(torch.zeros(8), torch.eye(8) + torch.ones(8, 8)).log_prob(x)
    posterior = dist.Normal(x.sum() / 9, 1 / 3)

    def gap(pair: GlobalMean) -> Tensor:
        return torch.distributions.kl_divergence(dist.Normal(pair.loc, pair.log_scale.exp()), posterior)

    assert gap(pair) > 200
    train(pair, loss, x)
    assert gap(pair) < 0.05
    bound, se = mean_and_se(-loss.loss(pair.model, pair.guide, x) for _ in range(200))
    assert (bound - evidence).abs() < 0.05 + NUM_SE * se


@pytest.mark.slow
@pytest.mark.parametrize("loss", [Trace_ELBO(num_particles=5), RenyiELBO(0, num_particles=2)], ids=["elbo", "iwae"])
def test_conjugate_amortized_posterior_is_recovered(loss) -> None:
    pair, x = NormalNormal(slope=-3.0, scale=5.0), torch.randn(50)
    train(pair, loss, x)
    assert abs(pair.slope - 0.5) < 0.05
    assert abs(pair.log_scale.exp() - math.sqrt(0.5)) < 0.05
    bound, se = mean_and_se(-loss.loss(pair.model, pair.guide, x) / 50 for _ in range(200))
    assert (bound - pair.log_prob(x).mean()).abs() < 0.01 + NUM_SE * se


def test_discrete_posterior_is_recovered_by_enumeration() -> None:
    pair, x = Discrete(PARALLEL), torch.randn(4, 2)
    elbo = TraceEnum_ELBO(num_particles=4)
    # All but the guide's probabilities is held: the best guide over c then is a softmax of expected log weights.
    c = torch.arange(3).repeat(4, 1)

    with torch.no_grad():
        z = pair.shift[c] + x.mean(-1, keepdim=True) + 0.7 * torch.randn(20_000, 4, 3)
        log_w = (
            pair.prior.log_softmax(-1)
            + dist.Normal(pair.locs, 1.0).log_prob(z)
            + dist.Normal(z.unsqueeze(-1), 1.0).log_prob(x.unsqueeze(1)).sum(-1)
            - dist.Normal(pair.shift + x.mean(-1, keepdim=True), 0.7).log_prob(z)
        )
        evidence = log_w.mean(0).logsumexp(-1)  # max over q(c) of the ELBO
        se = (log_w.std(0) / 20_000**0.5).max()
        best = log_w.mean(0).log_softmax(-1)
    logits = nn.Parameter(best.clone())

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=logits), infer=PARALLEL)
            pyro.sample("z", dist.Normal(pair.shift[c] + x.mean(-1), 0.7))

    grads, values = [], []
    for _ in range(300):
        logits.grad = None
        values.append(-elbo.loss_and_grads(pair.model, guide, x))
        grads.append(logits.grad.clone())
    values, grads = torch.stack(values), torch.stack(grads)
    assert (values.mean() - evidence.sum()).abs() < NUM_SE * (values.std() / 300**0.5 + 4 * se)
    # The gradient vanishes there, but for the noise of its estimate and of the optimum's.
    assert (grads.mean(0).abs() < NUM_SE * (grads.std(0) / 300**0.5 + se)).all()
