"""The two gaps of the bound against closed forms, and which pairs have them."""

from __future__ import annotations

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from evaluation_pairs import GlobalMean
from torch import nn
from torch.distributions import kl_divergence

import pyrovae as pv
from pyrovae.evaluation import sample
from pyrovae.evaluation.gaps import FAMILIES, inference_gaps
from pyrovae.evaluation.measurement import FLOATS_PER_CHUNK, NotApplicable

NUM_SE = 5  # standard errors allowed in statistical tests
SEARCH = 5e-3  # nats a datum that the search for the best guide may leave behind


class LinearGaussian(pv.Pair):
    """z ~ N(0, I), x | z ~ N(W z, σ² I), the columns of W not orthogonal: the posterior N(m, Λ⁻¹) has correlations.

    The guide is N(m + shift, diag(widen² / Λ_ii)). The best mean-field Gaussian has shift 0 and widen 1; with Q latents

        KL(best ‖ posterior) = ½ (Σ log Λ_ii − log |Λ|)
        L[best] − L[guide]   = ½ Q (widen² − 1 − log widen²) + ½ shiftᵀ Λ shift
    """

    noise, latent_dim, data_dim = 0.8, 3, 4

    def __init__(self, shift=0.0, widen=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
        self.shift, self.widen = shift, widen

    @property
    def precision(self):
        return torch.eye(3).to(self.weight) + self.weight.mT @ self.weight / self.noise**2

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.mT, self.noise).to_event(1), obs=x)

    def moments(self, x):
        loc = torch.linalg.solve(self.precision, (x @ self.weight / self.noise**2).mT).mT
        return loc + self.shift, self.widen * self.precision.diagonal().rsqrt()

    def guide(self, x):
        loc, scale = self.moments(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def log_prob(self, x):
        covariance = self.weight @ self.weight.mT + self.noise**2 * torch.eye(4).to(x)
        return torch.distributions.MultivariateNormal(x.new_zeros(4), covariance).log_prob(x)

    @property
    def approximation_gap(self):
        precision = self.precision.detach().double()
        return 0.5 * (precision.diagonal().log().sum() - precision.logdet()).item()

    @property
    def amortization_gap(self):
        widening = self.widen**2 - 1 - math.log(self.widen**2)
        return 0.5 * (3 * widening + self.shift**2 * self.precision.sum().item())


class Sampled(LinearGaussian):
    """The linear pair without its exact evidence."""

    log_prob = None


class FullGuide(LinearGaussian):
    """The linear pair with a guide of full covariance, whose family contains the posterior."""

    def guide(self, x):
        loc, scale = self.moments(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale.diag_embed()))


class Positive(pv.Pair):
    """log z ~ N(0, 1), x | z ~ N(log z, 1): log z | x ~ N(x / 2, 1 / 2). The guide of z is off by ``shift``."""

    data_dim = 1

    def __init__(self, shift=0.0, transformed=False):
        super().__init__()
        self.shift, self.transformed = shift, transformed

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.log().unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(self, x):
        loc, scale = x[:, 0] / 2 + self.shift, math.sqrt(0.5)
        guide = dist.LogNormal(loc, scale)
        if self.transformed:
            guide = dist.TransformedDistribution(dist.Normal(loc, scale), [dist.transforms.ExpTransform()])
        with pyro.plate("data", len(x)):
            pyro.sample("z", guide)

    def log_prob(self, x):
        return dist.Normal(0.0, math.sqrt(2)).log_prob(x[:, 0])


class GammaPoisson(pv.Pair):
    """z ~ Gamma(2, 1), x | z ~ Poisson(z): z | x ~ Gamma(2 + x, 2). The guide is off by a factor."""

    data_dim = 1

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(x.new_full((), 2.0), 1.0))
            pyro.sample("x", dist.Poisson(z.unsqueeze(-1)).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(2 + x[:, 0], x.new_full((), 2 * self.factor)))


class Switch(pv.Pair):
    """c ~ Bernoulli(1/2), z | c ~ N(±1, 1), x | z ~ N(z, 1). The guide q(c | x) q(z | c, x) is the posterior, the logit
    of c and the mean of z off by ``shift``.
    """

    data_dim = 1

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = shift

    def model(self, x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(logits=x.new_zeros(())))
            z = pyro.sample("z", dist.Normal(2 * c - 1, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(logits=x[:, 0] + self.shift))
            pyro.sample("z", dist.Normal((x[:, 0] + 2 * c - 1) / 2 + self.shift, math.sqrt(0.5)))

    def log_prob(self, x):
        return torch.stack([dist.Normal(m, math.sqrt(2)).log_prob(x[:, 0]) for m in (-1.0, 1.0)]).logsumexp(
            0
        ) - math.log(2)


def guided_by(make):
    """Return a pair with one latent z ~ N(0, 1) a datum, and a guide of any distribution."""

    class Guided(pv.Pair):
        data_dim = 1

        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", make(x[:, 0]))

    return Guided()


def near(value, exact, error, search=0.0):
    assert abs(value - exact) < NUM_SE * error + search


# Against closed forms


@pytest.mark.parametrize(("shift", "widen"), [(0.0, 1.0), (0.3, 1.5), (-0.3, 0.4)])
def test_both_gaps_against_closed_forms(shift, widen):
    pair = LinearGaussian(shift, widen)
    x = sample(pair, 60, seed=1)
    found = inference_gaps(pair, x, num_samples=1000, num_steps=300)
    assert found.evidence == "exact"
    assert found.log_evidence_stderr == 0
    assert found.log_evidence == pytest.approx(pair.log_prob(x).mean().item(), rel=1e-6)
    near(found.approximation_gap, pair.approximation_gap, found.approximation_gap_stderr, SEARCH)
    near(found.amortization_gap, pair.amortization_gap, found.amortization_gap_stderr, SEARCH)
    near(found.elbo, found.log_evidence - pair.approximation_gap - pair.amortization_gap, found.elbo_stderr)
    assert found.converged
    assert found.log_evidence == pytest.approx(found.elbo + found.approximation_gap + found.amortization_gap, abs=1e-9)


def test_family_that_holds_the_posterior_has_no_approximation_gap():
    """What a diagonal start loses to that family is all amortization gap."""
    pair = FullGuide()
    x = sample(pair, 60, seed=1)
    found = inference_gaps(pair, x, num_samples=500, num_steps=250)
    near(found.approximation_gap, 0, found.approximation_gap_stderr, SEARCH)
    near(found.amortization_gap, pair.approximation_gap, found.amortization_gap_stderr, SEARCH)


def test_exact_guide_has_no_gaps():
    x = pv.data.load("iris").train[:50]
    pair = pv.models.PPCA(4, 2).double()
    pair.fit_closed_form(x)
    found = inference_gaps(pair, x, num_samples=100, num_steps=100)
    assert abs(found.approximation_gap) < 1e-9
    assert abs(found.amortization_gap) < 1e-9
    assert found.converged


def test_evidence_without_log_prob_comes_from_importance_sampling():
    """The posterior is mildly correlated, so that the best mean-field guide is a good sampler."""
    pair = Sampled(shift=0.2)
    pair.weight.data *= 0.3
    x = sample(pair, 50, seed=1)
    found = inference_gaps(pair, x, num_samples=2000)
    assert found.evidence == "importance sampling"
    exact = LinearGaussian.log_prob(pair, x).mean().item()
    near(found.log_evidence, exact, found.log_evidence_stderr)
    near(found.approximation_gap, pair.approximation_gap, found.approximation_gap_stderr, SEARCH)
    assert found.approximation_gap_stderr < found.log_evidence_stderr + found.elbo_optimal_stderr
    assert not found.notes


def test_a_worse_guide_raises_the_amortization_gap_alone():
    x = sample(LinearGaussian(), 20, seed=1)
    good, bad = (inference_gaps(LinearGaussian(shift), x, num_samples=500, num_steps=200) for shift in (0.1, 0.6))
    assert bad.amortization_gap > good.amortization_gap + 0.5
    near(bad.elbo_optimal, good.elbo_optimal, good.elbo_optimal_stderr + bad.elbo_optimal_stderr, SEARCH)


@pytest.mark.parametrize("transformed", [False, True])
def test_gaps_of_a_lognormal_guide_equal_closed_forms(transformed):
    """The posterior of log z is N(x/2, 1/2); a shift d of the mean costs d² nats."""
    pair = Positive(0.5, transformed)
    found = inference_gaps(pair, torch.randn(50, 1), num_samples=500, num_steps=250)
    near(found.amortization_gap, 0.25, found.amortization_gap_stderr, SEARCH)
    near(found.approximation_gap, 0, found.approximation_gap_stderr, SEARCH)


def test_gaps_of_a_gamma_guide_equal_closed_forms():
    """The posterior is a Gamma too; its KL from the guide has a closed form."""
    pair = GammaPoisson(2.0)
    x = torch.poisson(torch.full((50, 1), 3.0))
    exact = kl_divergence(dist.Gamma(2 + x[:, 0], 4.0), dist.Gamma(2 + x[:, 0], 2.0)).mean().item()
    found = inference_gaps(pair, x, num_samples=500, num_steps=250)
    near(found.amortization_gap, exact, found.amortization_gap_stderr, SEARCH)
    near(found.approximation_gap, 0, found.approximation_gap_stderr, SEARCH)


# Discrete latents


def test_amortized_mixture_has_an_amortization_gap_only():
    """A categorical guide can be any posterior, so the optimum and all numbers are exact."""
    x = pv.data.load("faithful").train[:80]
    pair = pv.models.GMM(3, 2, amortized=True)
    pair.initialize(x, seed=0)
    found = inference_gaps(pair, x)
    assert abs(found.approximation_gap) < 1e-5
    posterior, guide = pair.posterior(x), pyro.poutine.trace(pair.guide).get_trace(x).nodes["z"]["fn"]
    exact = kl_divergence(guide, posterior).mean().item()
    assert found.amortization_gap == pytest.approx(exact, rel=1e-4)
    assert found.elbo_stderr == found.amortization_gap_stderr == 0
    assert found.num_samples == 1
    assert found.converged


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_discrete_latent_beside_a_continuous_one_is_summed_over(shift):
    """Each value of the discrete latent has its own samples of the other; q* is the exact posterior."""
    pair = Switch(shift)
    x = sample(pair, 50, seed=1)
    found = inference_gaps(pair, x, num_samples=500, num_steps=250)
    logits = x[:, 0].double()
    kl = kl_divergence(dist.Bernoulli(logits=logits + shift), dist.Bernoulli(logits=logits)).mean().item()
    near(found.amortization_gap, kl + shift**2, found.amortization_gap_stderr, SEARCH)
    near(found.approximation_gap, 0, found.approximation_gap_stderr, SEARCH)


def test_value_that_the_model_rules_out_leaves_the_optimum_finite():
    """q* gives that value no mass, so its numbers are finite; the bound of the amortized guide is −∞."""

    class Ruled(pv.Pair):
        data_dim = 1

        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Categorical(logits=x.new_tensor([0.0, -math.inf])))
                pyro.sample("x", dist.Normal(z.unsqueeze(-1).to(x), 1.0).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Categorical(logits=x.new_zeros(2)))

    x = torch.randn(5, 1)
    found = inference_gaps(Ruled(), x)
    exact = dist.Normal(0.0, 1.0).log_prob(x[:, 0]).double()
    torch.testing.assert_close(found.log_evidence_per_datum, exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.elbo_optimal_per_datum, exact, rtol=1e-6, atol=1e-6)
    assert found.elbo == -math.inf


def test_function_pair_has_gaps():
    """Its parameters appear at the first run. The guide is N(0, 1), and the posterior is N(x / 2, 1 / 2)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    x = torch.randn(40, 1)
    found = inference_gaps(pv.FunctionPair(model, guide), x, num_samples=500, num_steps=250)
    posterior, own = dist.Normal(x / 2, math.sqrt(0.5)), dist.Normal(0.0, 1.0)
    near(found.amortization_gap, kl_divergence(own, posterior).mean().item(), found.amortization_gap_stderr, SEARCH)
    near(found.approximation_gap, 0, found.approximation_gap_stderr, SEARCH)


def test_gaps_of_two_discrete_latents_agree_with_a_grid_search():
    """The guide of two coupled bits is mean-field; a search over a grid of probabilities gives its gaps."""

    class Bits(pv.Pair):
        data_dim = 1

        def model(self, x):
            with pyro.plate("data", len(x)):
                a = pyro.sample("a", dist.Bernoulli(logits=x.new_zeros(())))
                b = pyro.sample("b", dist.Bernoulli(logits=x.new_zeros(())))
                pyro.sample("x", dist.Normal((a + b + a * b).unsqueeze(-1), 1.0).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("a", dist.Bernoulli(logits=x[:, 0]))
                pyro.sample("b", dist.Bernoulli(logits=x[:, 0] - 1))

    x = torch.tensor([[0.3], [1.4], [2.5]])
    found = inference_gaps(Bits(), x, num_steps=400)
    a, b = torch.tensor([0.0, 0, 1, 1]), torch.tensor([0.0, 1, 0, 1])
    log_joint = dist.Normal(a + b + a * b, 1.0).log_prob(x) - math.log(4)  # (3, 4)
    p = torch.linspace(1e-4, 1 - 1e-4, 400, dtype=torch.float64)
    q = torch.stack([torch.outer(u, v) for u in (1 - p, p) for v in (1 - p, p)], -1)  # (400, 400, 4)
    best = torch.stack([(q * (row - q.log())).sum(-1).max() for row in log_joint.double()])
    assert found.evidence == "exact"
    assert found.log_evidence == pytest.approx(log_joint.logsumexp(-1).mean().item(), rel=1e-5)
    torch.testing.assert_close(found.elbo_optimal_per_datum, best, atol=2e-4, rtol=0)
    assert found.elbo_stderr == 0
    assert found.converged


# What it promises


@pytest.mark.parametrize(
    "make",
    [
        lambda: pv.models.VAE(6, 3, hidden_dims=(5,)),
        lambda: pv.models.VAE(6, 3, hidden_dims=(5,), likelihood="normal"),
        lambda: pv.models.VAE(6, 3, hidden_dims=(5,), likelihood="continuous-bernoulli"),
        lambda: pv.models.IWAE(6, (3, 2), hidden_dims=((5,), (4,))),
        lambda: pv.models.PPCA(6, 2),
    ],
    ids=["vae", "vae-normal", "vae-continuous-bernoulli", "iwae", "ppca"],
)
def test_gaps_of_every_kind_of_pair_are_in_order_and_reproducible(make, monkeypatch):
    """Bounds are in order, the same seed gives them again, and nothing is left changed, in several chunks."""
    pair, x = make(), torch.rand(7, 6).round()
    weights = {name: value.clone() for name, value in pair.state_dict().items()}
    state = torch.get_rng_state()
    monkeypatch.setitem(FLOATS_PER_CHUNK, "cpu", 4 * 8 * 15)
    options = {"num_samples": 200, "num_steps": 16, "seed": 3, "device": "cpu", "progress": False}
    found = inference_gaps(pair, x, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in pair.state_dict().items())
    assert all(parameter.grad is None for parameter in pair.parameters())
    assert found.amortization_gap > -NUM_SE * found.amortization_gap_stderr
    assert found.approximation_gap > -NUM_SE * found.approximation_gap_stderr
    assert (
        found.elbo_per_datum.shape == found.elbo_optimal_per_datum.shape == found.log_evidence_per_datum.shape == (7,)
    )
    assert found.elbo_per_datum.mean().item() == pytest.approx(found.elbo)
    assert inference_gaps(pair, x, **options).to_dict() == found.to_dict()
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["num_data"] == 7
    assert "amortization gap" in repr(found)


def test_offsets_correct_a_shifted_second_layer():
    """The offsets of the deeper site can take back a shift of the upper encoder's bias, datum by datum."""
    pair = pv.models.IWAE(6, (3, 2), hidden_dims=((5,), (4,)))
    x = torch.rand(15, 6).round()
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.mul_(0.3)  # near the prior, and so near the posterior
    own = inference_gaps(pair, x, num_samples=300, num_steps=200)
    with torch.no_grad():
        pair.encoders[1].network.output.bias[:2] += 1.0
    shifted = inference_gaps(pair, x, num_samples=300, num_steps=200)
    error = own.elbo_optimal_stderr + shifted.elbo_optimal_stderr
    near(shifted.elbo_optimal, own.elbo_optimal, error, 2 * SEARCH)
    assert shifted.amortization_gap > own.amortization_gap + 0.2


def test_unfinished_search_is_noted():
    pair = LinearGaussian(shift=1.0)
    found = inference_gaps(pair, sample(pair, 30, seed=1), num_samples=100, num_steps=40, lr=1e-3)
    assert not found.converged
    assert any("still rose" in note for note in found.notes)
    assert "Raise num_steps or lr" in repr(found)


def test_poor_importance_weights_are_noted():
    """With nearly parallel columns of W the best mean-field guide is far narrower than the posterior."""
    pair = Sampled()
    pair.weight.data = torch.ones(4, 3) + 0.1 * pair.weight.data
    found = inference_gaps(pair, sample(pair, 20, seed=1), num_samples=300, num_steps=50)
    assert any("fewer than 100 effective samples" in note for note in found.notes)


def test_negative_gap_is_noted():
    """Where the guide is the best already, a step that is too long can only lose; a gap below zero is named."""
    pair = LinearGaussian()
    found = inference_gaps(pair, sample(pair, 30, seed=1), num_samples=50, num_steps=20, seed=2)
    for name in ("approximation", "amortization"):
        value = getattr(found, f"{name}_gap")
        assert any(f"the {name} gap came out below zero" in note for note in found.notes) == (value < 0)


def test_one_datum_one_step_one_particle_are_enough():
    pair = LinearGaussian(shift=0.5)
    found = inference_gaps(pair, sample(pair, 1, seed=1), num_samples=1, num_steps=1, num_particles=1)
    assert math.isfinite(found.amortization_gap)
    assert found.elbo_stderr == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda x: dist.Laplace(x, 1.0),
        lambda x: dist.StudentT(5.0, x, 1.0),
        lambda x: dist.Gumbel(x, 1.0),
        lambda x: dist.Logistic(x, x.new_ones(())),
        lambda x: dist.TransformedDistribution(dist.Normal(x, 1.0), [dist.transforms.SigmoidTransform()]),
        lambda x: dist.Beta(x.exp(), 2.0),
        lambda x: dist.HalfNormal(x.exp()),
        lambda x: dist.Exponential(x.exp()),
        lambda x: dist.InverseGamma(3 + x.exp(), x.exp()),
        lambda x: dist.Weibull(x.exp(), 2.0),
        lambda x: dist.ContinuousBernoulli(logits=x),
    ],
    ids=lambda make: type(make(torch.zeros(2))).__name__,
)
def test_every_family_can_be_optimised(make):
    """At offsets of zero each family is itself, and the search raises the bound of a guide far from the posterior."""
    found = inference_gaps(guided_by(make), torch.randn(10, 1), num_samples=300, num_steps=50)
    assert found.amortization_gap > 0


def test_every_family_is_spanned_by_parameters_it_has():
    for family, parameters in FAMILIES.items():
        assert set(parameters) <= set(family.arg_constraints), family


def test_pairs_without_gaps_are_refused():
    x = torch.randn(6, 2)
    for pair, data, match in (
        (pv.models.GMM(2, 2), x, "GMM: its guide samples nothing"),
        (GlobalMean(x[:, :1]), x[:, :1], "GlobalMean: its guide site 'mu' lies outside the plate 'data'"),
        (guided_by(lambda x: dist.Delta(x)), x[:, :1], "guide site 'z', Delta, is not of a family"),
        (guided_by(lambda x: dist.Uniform(x - 1, x + 1)), x[:, :1], "guide site 'z', Uniform, is not of a family"),
        (guided_by(lambda x: dist.Poisson(x.exp())), x[:, :1], r"discrete guide site 'z' \(Poisson\)"),
        (pv.models.GMM(1025, 2, amortized=True), x, "z of its guide have 1025 values"),
    ):
        with pytest.raises(NotApplicable, match=match):
            inference_gaps(pair, data)


X = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: inference_gaps(LinearGaussian(), X, num_samples=0),
            ValueError,
            "num_samples: expected a whole number",
        ),
        (lambda: inference_gaps(LinearGaussian(), X, num_steps=1.5), TypeError, "num_steps: expected a whole number"),
        (lambda: inference_gaps(LinearGaussian(), X, num_particles=-1), ValueError, "num_particles: expected"),
        (lambda: inference_gaps(LinearGaussian(), X, lr=0), ValueError, "lr: expected a number above 0"),
        (lambda: inference_gaps(LinearGaussian, X), TypeError, "pair: expected an instance"),
        (lambda: inference_gaps(LinearGaussian(), X[:, :3]), ValueError, "x: expected 4 features"),
        (lambda: inference_gaps(LinearGaussian(), X + math.nan), ValueError, "x: expected finite numbers"),
        (lambda: inference_gaps(LinearGaussian(), X, device="tpu"), ValueError, "device: expected"),
    ],
)
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
