"""Annealed importance sampling against exact answers, and the theorems that make it a check."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from evaluation_pairs import GlobalMean
from pyro import poutine
from torch import nn

import pyrovae as pv
from pyrovae.evaluation import ais, evaluate, sample
from pyrovae.evaluation.ais import annealed_evidence, bidirectional_evidence
from pyrovae.evaluation.measurement import NotApplicable
from pyrovae.infer import record

NUM_SE = 5  # standard errors allowed in statistical tests


class Linear(pv.Pair):
    """z ~ N(0, I), x | z ~ N(W z, σ² I). The guide is exact, apart from ``shift`` and ``widen``."""

    data_dim, latent_dim, noise = 3, 2, 0.5

    def __init__(self, shift=0.0, widen=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 0.3], [-0.5, 0.8], [0.2, -0.4]]))
        self.shift, self.widen = shift, widen

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.mT, self.noise).to_event(1), obs=x)

    def guide(self, x):
        precision = torch.eye(self.latent_dim).to(x) + self.weight.mT @ self.weight / self.noise**2
        loc = torch.linalg.solve(precision, self.weight.mT @ x.mT / self.noise**2).mT + self.shift
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, torch.linalg.inv(precision) * self.widen**2))

    def log_prob(self, x):
        weight = self.weight.double()
        return normal_log_prob(weight @ weight.mT + self.noise**2 * torch.eye(self.data_dim).double(), x)


class TwoLayers(pv.Pair):
    """z2 ~ N(0, I), z1 | z2 ~ N(A z2, I/4), x | z1 ~ N(B z1, I/4). The guide samples z1 first, and is a poor one."""

    data_dim = 3

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.upper = nn.Parameter(torch.randn(2, 2, generator=generator))
        self.lower = nn.Parameter(torch.randn(3, 2, generator=generator))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2 @ self.upper.mT, 0.5).to_event(1))
            pyro.sample("x", dist.Normal(z1 @ self.lower.mT, 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x[:, :2], 1.0).to_event(1))
            pyro.sample("z2", dist.Normal(z1, 1.0).to_event(1))

    def log_prob(self, x):
        upper, lower, eye = self.upper.double(), self.lower.double(), torch.eye(3).double()
        of_z1 = upper @ upper.mT + 0.25 * eye[:2, :2]
        return normal_log_prob(lower @ of_z1 @ lower.mT + 0.25 * eye, x)


class Mixed(pv.Pair):
    """c ~ Categorical, z | c ~ N(m_c, s_c²), x | z, c ~ N(w_c z, σ²): summing c out ties prior and likelihood."""

    data_dim, noise = 1, 0.3

    def __init__(self):
        super().__init__()
        self.odds = nn.Parameter(torch.tensor([0.2, 0.5, 0.3]))
        self.loc = nn.Parameter(torch.tensor([-2.0, 0.5, 3.0]))
        self.scale = torch.tensor([0.5, 1.0, 0.3])
        self.weight = torch.tensor([1.0, -1.0, 2.0])

    def model(self, x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(self.odds), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(self.loc[c], self.scale[c]))
            pyro.sample("x", dist.Normal((self.weight[c] * z).unsqueeze(-1), self.noise).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0], 2.0))

    def log_prob(self, x):
        parts = dist.Normal(self.weight * self.loc, (self.weight**2 * self.scale**2 + self.noise**2).sqrt())
        return (parts.log_prob(x) + self.odds.log()).logsumexp(-1)


class Constrained(pv.Pair):
    """z from a prior with a support of its own, x | z ~ N(z_1, 0.3²), where z_1 is z or its first element."""

    data_dim, noise = 1, 0.3

    def __init__(self, prior):
        super().__init__()
        self.unit = nn.Parameter(torch.tensor(1.0))
        self.prior = prior

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior)
            z = z[..., :1] if self.prior.event_shape else z.unsqueeze(-1)
            pyro.sample("x", dist.Normal(self.unit * z, self.noise).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.prior)

    def log_prob(self, x):
        """Integrate over u, where z = exp(u), or z = sigmoid(u) in (0, 1)."""
        u = torch.linspace(-30, 10, 20_001, dtype=torch.float64)
        marginal = self.prior
        if marginal.event_shape:
            concentration = marginal.concentration
            marginal = dist.Beta(concentration[0], concentration.sum() - concentration[0])
        in_unit = marginal.support is dist.constraints.unit_interval
        # Below -15 the density of z has nothing left that float32 could tell from 0.
        z = u.sigmoid() if in_unit else u.exp()
        jacobian = (z * (1 - z)).log() if in_unit else u
        inside = torch.isfinite(marginal.log_prob(z)) & torch.isfinite(jacobian)
        log_joint = marginal.log_prob(z) + jacobian + dist.Normal(z, self.noise).log_prob(x.double())
        return log_joint[:, inside].logsumexp(-1) + math.log(u[1] - u[0])


class Parts(pv.Pair):
    """Two latents a datum in a plate of their own, x_j | z_j ~ N(z_j + a, 0.5²), and a third beside them."""

    data_dim = 2

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.3))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(self.loc, 0.5))
            with pyro.plate("parts", 2, dim=-2):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                pyro.sample("x", dist.Normal(z + a, 0.5), obs=x.mT)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("a", dist.Normal(self.loc, 1.0))
            with pyro.plate("parts", 2, dim=-2):
                pyro.sample("z", dist.Normal(x.mT, 1.0))

    def log_prob(self, x):
        return normal_log_prob(1.25 * torch.eye(2).double() + 0.25, x - self.loc)


class Discrete(pv.Pair):
    """A pair with a discrete latent that is not marked for enumeration."""

    data_dim = 1

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.5)))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(x.new_tensor(0.5)))


class TwoSites(Linear):
    """The linear pair, whose model observes x in two pieces."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = z @ self.weight.mT
            pyro.sample("x1", dist.Normal(loc[..., :1], self.noise).to_event(1), obs=x[:, :1])
            pyro.sample("x2", dist.Normal(loc[..., 1:], self.noise).to_event(1), obs=x[:, 1:])


def normal_log_prob(covariance, x):
    zero = torch.zeros(len(covariance), dtype=torch.float64)
    return torch.distributions.MultivariateNormal(zero, covariance).log_prob(x.double())


def assert_agrees(found, pair, x):
    """Check ``found`` against the exact evidence, within the stated errors: the mean first, then each datum."""
    exact = pair.log_prob(x).detach().double()
    assert 0 < found.log_evidence_stderr < 0.1  # else the test would say nothing
    assert abs(found.log_evidence - exact.mean().item()) < NUM_SE * found.log_evidence_stderr
    assert found.log_evidence_per_datum.shape == exact.shape
    each = found.log_evidence_stderr * math.sqrt(len(x))  # the root mean square of the errors of single data
    assert (found.log_evidence_per_datum - exact).square().mean().sqrt() < 3 * each


SUPPORTS = {
    "LogNormal": dist.LogNormal(0.2, 0.7),
    "Gamma": dist.Gamma(2.0, 1.5),
    "Beta": dist.Beta(2.0, 3.0),
    "Dirichlet": dist.Dirichlet(torch.tensor([1.5, 2.0, 3.0])),
}

# Against exact answers


@pytest.mark.parametrize("pair", [Linear, TwoLayers, Mixed, Parts], ids=lambda pair: pair.__name__)
def test_annealed_evidence_agrees_with_the_exact_one(pair):
    pair = pair()
    x = 1.5 * torch.randn(40, pair.data_dim)
    assert_agrees(annealed_evidence(pair, x, num_temperatures=60, num_chains=32, num_leapfrog=5), pair, x)


@pytest.mark.parametrize("prior", SUPPORTS.values(), ids=SUPPORTS)
def test_constrained_latents_against_quadrature(prior):
    pair = Constrained(prior)
    x = sample(pair, 20, seed=1)
    assert_agrees(annealed_evidence(pair, x, num_temperatures=30, num_chains=32, num_leapfrog=5), pair, x)


def test_two_layer_iwae_against_brute_force():
    """Few pixels and a flat posterior: the mean of p(x | z) over very many draws from the prior is exact enough."""
    pair = pv.models.IWAE(4, latent_dims=(3, 2), hidden_dims=((5,), (5,)))
    x = torch.bernoulli(torch.full((10, 4), 0.5))
    z1 = torch.cat([poutine.trace(pair.model).get_trace(x[:1].expand(200_000, 4)).nodes["z1"]["value"]]).detach()
    log_prob = torch.stack([pair.likelihood(z1).log_prob(row).detach().double() for row in x])
    exact = log_prob.logsumexp(1) - math.log(len(z1))
    found = annealed_evidence(pair, x, num_temperatures=30, num_chains=32, num_leapfrog=5)
    error = ((log_prob - exact[:, None]).exp().var(1) / len(z1)).sum().sqrt().item() / len(x)
    assert abs(found.log_evidence - exact.mean().item()) < NUM_SE * math.hypot(found.log_evidence_stderr, error)


def test_agrees_with_the_guide_of_a_trained_vae():
    data = pv.data.load("digits")
    train, x = (data.train[:400] > 0.5).float(), (data.test[:20] > 0.5).float()
    pair = pv.models.VAE(64, latent_dim=3, hidden_dims=(30,))
    pv.fit(pair, train, epochs=10, batch_size=50, device="cpu", progress=False)
    by_guide = evaluate(pair, x, num_samples=3000, device="cpu")
    found = annealed_evidence(pair, x, num_temperatures=100, num_leapfrog=5, device="cpu")
    assert found.log_evidence > by_guide.elbo  # it says more than the bound that was trained
    error = math.hypot(found.log_evidence_stderr, by_guide.log_evidence_stderr)
    assert abs(found.log_evidence - by_guide.log_evidence) < NUM_SE * error


# Theorems


@pytest.mark.parametrize("num_temperatures", [3, 10])
def test_weights_are_unbiased_in_both_directions(num_temperatures):
    """E[w] = p(x) forward, E[w] = 1 / p(x) in reverse, however few the temperatures: a single chain a datum, averaged
    over data. That fixes the transitions, the schedule and the order of both, to the last step."""
    pair = Linear()
    num_data = 4000
    settings = {"num_temperatures": num_temperatures, "num_chains": 1, "num_leapfrog": 3}
    found = bidirectional_evidence(pair, num_data, **settings, num_guide_samples=1, seed=4)
    exact = pair.log_prob(ais._simulate(pair, num_data, None, seed=4)[1]).detach()
    assert found.log_likelihood == pytest.approx(exact.mean().item(), abs=1e-5)  # these are the data
    assert found.lower_stderr is None  # unknown from one chain
    assert found.guide_stderr is None
    assert "1 sample each" in repr(found)
    for difference in (found.lower_per_datum - exact, exact - found.upper_per_datum):
        ratio = difference.exp()
        assert abs(ratio.mean().item() - 1) < NUM_SE * ratio.std().item() / math.sqrt(num_data)
        assert difference.mean() < 0  # Jensen


@pytest.mark.parametrize("pair", [Mixed(), Constrained(dist.LogNormal(0.2, 0.7))], ids=lambda p: type(p).__name__)
def test_both_bounds_enclose_the_evidence_and_their_gap_closes(pair):
    gaps = []
    for num_temperatures in (3, 12, 60):
        found = bidirectional_evidence(pair, 60, num_temperatures=num_temperatures, num_chains=8, num_leapfrog=3)
        room = NUM_SE * found.gap_stderr
        assert found.lower - room < found.log_likelihood < found.upper + room
        assert found.gap == pytest.approx(found.upper - found.lower)
        gaps.append((found.gap, found.gap_stderr))
    assert gaps[0][0] > NUM_SE * gaps[2][1]  # there is something to close, as seen with the last one's precision
    for (wide, error), (narrow, other) in pairwise(gaps):
        assert narrow < wide + NUM_SE * math.hypot(error, other)
    assert gaps[2][0] < 0.2 * gaps[0][0]


def test_a_broken_guide_changes_nothing_but_its_own_estimate():
    x = torch.randn(10, 3)
    settings = {"num_temperatures": 20, "num_chains": 4, "num_leapfrog": 3}
    good, broken = Linear(), Linear(shift=4.0, widen=0.2)
    found = [annealed_evidence(pair, x, **settings).log_evidence_per_datum for pair in (good, broken)]
    assert torch.equal(*found)
    good, broken = (bidirectional_evidence(pair, 30, **settings, num_guide_samples=100) for pair in (good, broken))
    assert torch.equal(good.upper_per_datum, broken.upper_per_datum)
    assert good.guide == pytest.approx(good.log_likelihood, abs=1e-4)
    assert broken.guide < broken.lower - 10 * broken.lower_stderr  # and so it is found out
    assert broken.guide_stderr < 0.5  # while its own error is silent


@pytest.mark.slow
def test_stated_error_covers_the_truth(monkeypatch):
    """Groups of data are independent runs: as many means lie within z stated standard errors as a normal law says."""
    captured = []

    class Captured(ais._Weights):
        def __init__(self, log_w, acceptance):
            captured.append(log_w)
            super().__init__(log_w, acceptance)

    pair, of_one, repeats = Linear(), 4, 200
    x = sample(pair, of_one * repeats, seed=2)
    monkeypatch.setattr(ais, "_Weights", Captured)
    annealed_evidence(pair, x, num_temperatures=60, num_chains=64, num_leapfrog=5)
    exact = pair.log_prob(x).detach()
    monkeypatch.undo()
    runs = [ais._Weights(log_w, 1.0) for log_w in captured[0].split(of_one, 1)]
    deviation = torch.stack(
        [(run.log_mean - truth).mean() / run.stderr for run, truth in zip(runs, exact.split(of_one), strict=True)]
    )
    for z in (0.6745, 1.0, 1.96):
        expected = math.erf(z / math.sqrt(2))
        share = (deviation.abs() < z).double().mean().item()
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / repeats), z


def test_temperatures_rise_from_zero_to_one_symmetrically():
    betas = ais._schedule(40)
    assert (betas[0], betas[-1], len(betas)) == (0, 1, 41)
    assert (betas.diff() > 0).all()
    torch.testing.assert_close(betas, 1 - betas.flip(0))


# How it is computed

QUICK = {"num_temperatures": 6, "num_chains": 3, "num_leapfrog": 2}


def test_same_seed_same_numbers_and_nothing_is_left_behind():
    pair, x = Linear(), torch.randn(7, 3)
    weight = pair.weight.detach().clone()
    for function, data in ((annealed_evidence, x), (bidirectional_evidence, 7)):
        state = torch.get_rng_state()
        first, again, other = (json.dumps(function(pair, data, **QUICK, seed=s).to_dict()) for s in (1, 1, 2))
        assert first == again != other
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(pair.weight, weight)
    assert pair.weight.grad is None
    assert pair.weight.requires_grad
    assert torch.is_grad_enabled()


def test_recorded_and_eager_runs_agree(monkeypatch):
    pair = Mixed()
    x = torch.randn(5, pair.data_dim)
    eager = annealed_evidence(pair, x, **QUICK)
    monkeypatch.setattr(ais, "CALLS_WORTH_RECORDING", 0)
    recorded = annealed_evidence(pair, x, **QUICK)
    torch.testing.assert_close(eager.log_evidence_per_datum, recorded.log_evidence_per_datum, rtol=1e-4, atol=1e-4)


def test_a_model_that_cannot_be_recorded_runs_eagerly_and_says_so(monkeypatch):
    class Reads(Linear):
        def model(self, x):
            if self.weight.sum() > 100:
                raise AssertionError
            super().model(x)

    monkeypatch.setattr(ais, "CALLS_WORTH_RECORDING", 0)
    monkeypatch.setattr(record, "_warned", set())
    x = torch.randn(5, 3)
    with pytest.warns(RuntimeWarning, match="annealing runs eagerly: it reads the value of a tensor"):
        annealed_evidence(Reads(), x, **QUICK)


def test_all_chunks_have_one_size_and_no_row_counts_twice(monkeypatch):
    """17 data in chunks of 5 make 4 chunks of 5: three rows are added and dropped again."""
    pair, x = Linear(), torch.randn(17, 3)
    sizes = set()

    def gradient(self, u, x, beta, own=ais.Density.gradient):
        sizes.add((u.shape, x.shape))
        return own(self, u, x, beta)

    monkeypatch.setattr(ais.measurement, "runs_at_a_time", lambda device, width: 5 * 32)
    monkeypatch.setattr(ais.Density, "gradient", gradient)
    monkeypatch.setattr(ais, "CALLS_WORTH_RECORDING", math.inf)
    found = annealed_evidence(pair, x, num_temperatures=40, num_chains=32, num_leapfrog=3)
    assert sizes == {((32, 5, 2), (5, 3))}
    assert_agrees(found, pair, x)


def test_packing_inverts_the_unpacking_of_latents():
    """``pack`` inverts what the model is given, with plates inside a datum, event dims and the data axis."""
    pair, x = Parts(), torch.randn(4, 2)
    latents = ais.Latents(pair, poutine.trace(pair.model).get_trace(x))
    density = ais.Density(latents)
    u = density.draw(x, 3)
    assert (u.shape, latents.dim) == ((3, 4, 3), 3)
    _, given = density.terms(pair.model, u, x)
    assert given.shape == (3, 4)
    trace = density.terms(pair.model, u, x)[0].model_trace
    assert trace.nodes["z"]["value"].shape == (3, 2, 4)
    torch.testing.assert_close(latents.pack(trace), u)


def test_double_precision_function_pairs_and_binarized_pixels_work(float64):
    weight = torch.randn(3, 2)

    def model(x):
        w = pyro.param("weight", weight)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ w.mT).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    pair = pv.FunctionPair(model, guide)
    x = torch.full((50, 3), 0.5)
    found = annealed_evidence(pair, x, **QUICK, binarize=True)
    assert found.log_evidence_per_datum.unique().numel() == 50
    assert -3 * math.log(4) < found.log_evidence < 0
    found = bidirectional_evidence(pair, 5, **QUICK, data_dim=3)
    assert found.num_data == 5
    with pytest.raises(ValueError, match=r"data_dim: FunctionPair does not say its data_dim; pass data_dim=\."):
        bidirectional_evidence(pair, 5, **QUICK)


def test_results_read_as_tables_and_as_json():
    pair = Linear()
    found = annealed_evidence(pair, torch.randn(7, 3), **QUICK)
    assert repr(found).splitlines()[0] == "7 data, 3 chains, 6 temperatures, 2 steps; nats per datum"
    assert f"log evidence, annealed  {found.log_evidence:>12.3f}  ± {found.log_evidence_stderr:.3f} Mon" in repr(found)
    assert found.to_dict()["log_evidence_per_datum"] == found.log_evidence_per_datum.tolist()
    assert 0 < found.acceptance <= 1
    assert 1 <= found.effective_sample_size <= 3
    found = bidirectional_evidence(pair, 7, **QUICK)
    labels = [line[:24].strip() for line in repr(found).splitlines()[1:8]]
    assert labels == [
        "log evidence, upper",
        "log likelihood, exact",
        "log evidence, lower",
        "gap",
        "log evidence, guide",
        "acceptance",
        "effective chains",
    ]
    assert json.loads(json.dumps(found.to_dict()))["num_data"] == 7


def test_uneven_weights_are_noted():
    """Two temperatures are little more than importance sampling from the prior, far from a sharp posterior."""
    pair = pv.models.PPCA(4, 2)
    x = pv.data.load("iris").train[:20]
    pair.fit_closed_form(x)
    found = annealed_evidence(pair, x, num_temperatures=2, num_leapfrog=2)
    assert "NOTE: of 16 chains effectively" in repr(found)


# Bad input


@pytest.mark.parametrize(
    ("pair", "match"),
    [
        (lambda: pv.models.GMM(2, 3), "GMM: it has no continuous latent, so its evidence is exact already"),
        (lambda: pv.models.GMM(2, 3, amortized=True), "GMM: it has no continuous latent"),
        (lambda: GlobalMean(torch.zeros(5, 1)), "GlobalMean: its latent 'mu' lies outside the plate 'data'"),
        (Discrete, "Discrete: its latent 'z' is discrete.*infer={'enumerate': 'parallel'}"),
    ],
)
def test_pairs_without_annealed_evidence_are_refused(pair, match):
    pair = pair()
    with pytest.raises(NotApplicable, match=match):
        annealed_evidence(pair, torch.randn(5, pair.data_dim), **QUICK)
    with pytest.raises(NotApplicable, match=match):
        bidirectional_evidence(pair, 5, **QUICK)


def test_simulation_needs_one_observed_site():
    pair = TwoSites()
    assert annealed_evidence(pair, torch.randn(5, 3), **QUICK).num_data == 5
    with pytest.raises(NotApplicable, match=r"bidirectional_evidence does not apply to TwoSites.*'x1': \(5, 1\)"):
        bidirectional_evidence(pair, 5, **QUICK)


X = torch.zeros(5, 3)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: annealed_evidence(Linear(), X, num_temperatures=0), ValueError, "num_temperatures: expected a whole"),
        (
            lambda: annealed_evidence(Linear(), X, num_temperatures=1),
            ValueError,
            "num_temperatures: expected 2 or more",
        ),
        (lambda: annealed_evidence(Linear(), X, num_chains=2.0), TypeError, "num_chains: expected a whole number"),
        (lambda: annealed_evidence(Linear(), X, num_leapfrog=-1), ValueError, "num_leapfrog: expected a whole number"),
        (lambda: annealed_evidence(Linear(), X[:, :2]), ValueError, "x: expected 3 features"),
        (lambda: annealed_evidence(Linear(), X / 0), ValueError, "x: expected finite numbers"),
        (lambda: annealed_evidence(Linear(), X - 1, binarize=True), ValueError, "binarize: expected pixels"),
        (lambda: annealed_evidence(Linear, X), TypeError, "pair: expected an instance; got the class Linear"),
        (lambda: annealed_evidence(Linear(), X, device="tpu"), ValueError, "device: expected 'auto'"),
        (lambda: bidirectional_evidence(Linear(), 0), ValueError, "num_data: expected a whole number"),
        (lambda: bidirectional_evidence(Linear(), X), TypeError, "num_data: expected a whole number"),
        (lambda: bidirectional_evidence(Linear(), num_guide_samples=0), ValueError, "num_guide_samples: expected"),
        (lambda: bidirectional_evidence(Linear(), data_dim=1.5), TypeError, "data_dim: expected a whole number"),
        (lambda: bidirectional_evidence(Linear), TypeError, "pair: expected an instance; got the class Linear"),
    ],
)
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
