"""Calibration: the ranks' law is known for right and for wrong guides. Predictive checks: replicates against theory."""

from __future__ import annotations

import json
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from evaluation_pairs import GlobalMean
from scipy import stats
from torch import nn

import pyrovae as pv
from pyrovae.evaluation import calibration as module
from pyrovae.evaluation import sample
from pyrovae.evaluation.calibration import LIKELIHOOD, ecdf_band, simulation_based_calibration
from pyrovae.evaluation.measurement import FLOATS_PER_CHUNK, NotApplicable
from pyrovae.evaluation.predictive_check import default_statistics, posterior_predictive_check
from pyrovae.models import GMM, IWAE, PPCA, VAE

NUM_SE = 5  # standard errors allowed in statistical tests
CHANCE = 1e-4  # p-values below this fail a true hypothesis


class Linear(pv.Pair):
    """z ~ N(0, I), x_j | z ~ N(a_j z_j, 0.8²). The guide is the exact posterior, moved by ``shift`` of its standard
    deviations and ``widen`` times as wide.
    """

    noise = 0.8

    def __init__(self, lengths=(2.0, 1.0, 0.0), *, shift=0.0, widen=1.0):
        super().__init__()
        self.data_dim = len(lengths)
        self.lengths = nn.Parameter(torch.tensor(lengths))
        self.shift, self.widen = shift, widen

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.lengths), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * self.lengths, self.noise).to_event(1), obs=x)

    def moments(self, x):
        precision = 1 + (self.lengths / self.noise).square()
        return x * self.lengths / self.noise**2 / precision, precision.rsqrt()

    def guide(self, x):
        loc, scale = self.moments(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc + self.shift * scale, self.widen * scale).to_event(1))


class PriorGuide(Linear):
    """The linear pair with a guide that ignores the data."""

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros_like(self.lengths), 1.0).to_event(1))


class Rates(pv.Pair):
    """λ ~ Gamma(2, 1), x_j | λ ~ Exponential(λ) in a plate of their own; the guide is the exact Gamma posterior."""

    data_dim = 4

    def __init__(self, sharper=1.0):
        super().__init__()
        self.sharper = sharper

    def model(self, x):
        with pyro.plate("data", len(x), dim=-2):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
            pyro.deterministic("mean", 1 / rate)
            with pyro.plate("features", x.shape[1], dim=-1):
                pyro.sample("x", dist.Exponential(rate), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-2):
            total = 1 + x.sum(-1, keepdim=True)
            pyro.sample("rate", dist.Gamma(self.sharper * x.new_tensor(2.0 + x.shape[1]), self.sharper * total))


class Switch(pv.Pair):
    """z ~ Categorical(.2, .3, .5), x | z ~ N(z, 1); the guide's logits are the exact ones times ``sharper``."""

    data_dim = 1
    probs = (0.2, 0.3, 0.5)

    def __init__(self, sharper=1.0):
        super().__init__()
        self.sharper = sharper

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(x.new_tensor(self.probs)))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1).to(x), 1.0).to_event(1), obs=x)

    def guide(self, x):
        logits = x.new_tensor(self.probs).log() - 0.5 * (x - torch.arange(3).to(x)).square()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=self.sharper * logits.log_softmax(-1)))


class NaNGuide(Linear):
    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x * (math.nan if len(x) > 2 else 0), 1.0).to_event(1))


class TwoViews(pv.Pair):
    data_dim = 2

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("left", dist.Normal(z, 1.0), obs=x[:, 0])
            pyro.sample("right", dist.Normal(z, 1.0), obs=x[:, 1])

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))


def ppca():
    """Return a PPCA whose guide is the exact posterior."""
    pair = PPCA(4, 2)
    with torch.no_grad():
        pair.weight.mul_(10)
        pair.loc.copy_(torch.tensor([1.0, -2.0, 0.0, 3.0]))
    pair.match_guide()
    return pair


def functions():
    """Return the linear pair as two plain functions."""
    twin = Linear()

    def model(x):
        return Linear.model(twin, x)

    def guide(x):
        return Linear.guide(twin, x)

    pair = pv.FunctionPair(model, guide)
    pair.data_dim = 3
    return pair


# Ranks


EXACT = {
    "linear": Linear,
    "no data in it": lambda: Linear((0.0, 0.0)),  # log p(x | z) is equal for all z: ties
    "ppca": ppca,
    "gamma, plates": Rates,
    "categories": Switch,
    "mixture, exact": lambda: GMM(3, 2),
    "functions": functions,
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_posteriors_have_uniform_ranks(name):
    found = simulation_based_calibration(EXACT[name](), num_simulations=2000)
    assert found.p_value > CHANCE
    for test in found.tests.values():
        assert test.ranks.min() >= 0
        assert test.ranks.max() <= 99
        for column, counts, p_value in zip(test.ranks.T, test.counts, test.p_values, strict=True):
            histogram = torch.bincount(column * 20 // 100, minlength=20)
            assert counts == histogram.tolist()
            assert p_value == pytest.approx(stats.chisquare(histogram.numpy()).pvalue)
        z_scores = np.abs([*test.shift, *test.shape])
        assert (z_scores < NUM_SE).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppca", "categories"])
def test_p_values_of_exact_posteriors_are_uniform(name):
    """Over 150 seeds the test rejects as often as its level says."""
    pair = EXACT[name]()
    found = [simulation_based_calibration(pair, num_simulations=400, seed=seed) for seed in range(150)]
    for key, test in found[0].tests.items():
        for i in range(len(test.p_values)):
            assert stats.kstest([f.tests[key].p_values[i] for f in found], "uniform").pvalue > CHANCE
            for z in ("shift", "shape"):
                assert stats.kstest([getattr(f.tests[key], z)[i] for f in found], "norm").pvalue > CHANCE
    overall = np.array([f.p_value for f in found])
    assert (overall < 0.1).sum() <= stats.binom.isf(CHANCE, len(found), 0.1)  # Holm: at most


@pytest.mark.parametrize(("shift", "widen"), [(0.0, 0.6), (0.0, 1.7), (0.5, 1.0), (-0.3, 0.8)])
def test_ranks_follow_their_law(shift, widen):
    """A truth t ~ N(0, 1) posterior deviations off has rank Binomial(L, Φ((t − shift) / widen)), here by quadrature."""
    found = simulation_based_calibration(Linear((2.0, 1.0), shift=shift, widen=widen), num_simulations=4000)
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    below = stats.norm.cdf((nodes - shift) / widen)
    law = stats.binom.pmf(np.arange(100)[:, None], 99, below) @ weights / math.sqrt(2 * math.pi)
    expected = 4000 * law.reshape(20, 5).sum(1)
    for counts in found.tests["z"].counts:
        assert stats.chisquare(counts, expected * 4000 / expected.sum()).pvalue > CHANCE


@pytest.mark.parametrize(
    ("pair", "verdict"),
    [
        (lambda: Linear((2.0,), widen=0.6), "too narrow (∪-shaped)"),
        (lambda: Linear((2.0,), widen=1.8), "too wide (∩-shaped)"),
        (lambda: Linear((2.0,), shift=0.5), "shifted (draws too high)"),
        (lambda: Linear((2.0,), shift=-0.5), "shifted (draws too low)"),
        (lambda: Linear((2.0,), shift=-8.0), "shifted (draws too low)"),  # all ranks at one end are no ∪
        (lambda: Linear((2.0, 1.0, 1.0), widen=0.6), "too narrow (∪-shaped) in 3 of 3 dimensions"),
        (lambda: Rates(sharper=3.0), "too narrow (∪-shaped)"),
        (lambda: Switch(sharper=4.0), "too narrow (∪-shaped)"),
    ],
)
def test_verdict_names_what_is_wrong_with_a_guide(pair, verdict):
    found = simulation_based_calibration(pair(), num_simulations=2000)
    test = next(iter(found.tests.values()))
    assert test.p_value < 1e-10
    assert test.verdict == verdict
    assert f": {verdict}" in found.verdict
    assert found.p_value < 1e-10


def test_a_guide_that_ignores_the_data_fails_by_the_likelihood():
    """The ranks of z are uniform, as z and its draws both come from p(z); those of the likelihood are not."""
    found = simulation_based_calibration(PriorGuide((2.0, 1.0)))
    assert found.tests["z"].p_value > CHANCE
    assert found.tests[LIKELIHOOD].p_value < 1e-10
    assert found.tests[LIKELIHOOD].verdict == "the truth fits x better than the draws"
    narrow = simulation_based_calibration(Linear((20.0, 20.0), widen=0.1))  # the posterior is the likelihood
    assert narrow.tests[LIKELIHOOD].verdict == "the draws fit x better than the truth"


def test_p_values_are_adjusted_by_holm():
    adjusted = module._holm(np.array([0.01, 0.5, 0.02, 0.04]))
    np.testing.assert_allclose(adjusted, [0.04, 0.5, 0.06, 0.08])  # 4·.01, .5, 3·.02, 2·.04
    np.testing.assert_allclose(module._holm(np.array([0.6, 0.5])), [1.0, 1.0])
    found = simulation_based_calibration(Linear(), num_simulations=100)
    z, likelihood = found.tests["z"], found.tests[LIKELIHOOD]
    assert z.p_value == pytest.approx(min(1, 3 * min(z.p_values)))
    assert found.p_value == pytest.approx(min(1, 2 * min(z.p_value, likelihood.p_value)))


def test_exact_posterior_is_the_source_where_the_guide_samples_nothing():
    """The exact posterior stands in where there is no guide; a matched guide and the exact posterior are one."""
    mixture = GMM(2, 2)
    assert simulation_based_calibration(mixture, num_simulations=100).source == "exact"
    pair = ppca()
    a, b = (simulation_based_calibration(pair, num_simulations=100, source=s) for s in ("guide", "exact"))
    assert (a.source, b.source) == ("guide", "exact")
    assert a.p_value > CHANCE
    assert b.p_value > CHANCE


def test_two_layers_and_a_sampled_category_are_ranked():
    pair = IWAE(12, (3, 2), hidden_dims=((8,), (8,)))
    found = simulation_based_calibration(pair, num_simulations=200)
    assert {name: test.ranks.shape for name, test in found.tests.items()} == {
        "z1": (200, 3),
        "z2": (200, 2),
        LIKELIHOOD: (200, 1),
    }
    assert found.verdict != "no misfit found"  # untrained
    amortized = simulation_based_calibration(GMM(3, 2, amortized=True))
    assert (amortized.source, list(amortized.tests)) == ("guide", ["z", LIKELIHOOD])


@pytest.mark.parametrize("name", ["linear", "gamma, plates", "mixture, exact"])
def test_ranks_are_uniform_whatever_the_chunk_size(name, monkeypatch):
    monkeypatch.setitem(FLOATS_PER_CHUNK, "cpu", 400)  # fewer simulations than S at a time, and one draw
    found = simulation_based_calibration(EXACT[name](), num_simulations=300, num_draws=9)
    assert found.p_value > CHANCE
    assert all(len(test.ranks) == 300 for test in found.tests.values())
    monkeypatch.setitem(FLOATS_PER_CHUNK, "cpu", 300 * 12 * 4)  # draws in several parts, with a rest
    assert simulation_based_calibration(EXACT[name](), num_simulations=300, num_draws=9).p_value > CHANCE


def test_most_bins_that_divide_the_ranks_are_chosen():
    bins = lambda s, l: simulation_based_calibration(ppca(), num_simulations=s, num_draws=l).num_bins  # noqa: E731, E741
    assert (bins(1000, 99), bins(60, 99), bins(100, 6), bins(10, 1)) == (20, 10, 7, 2)
    assert simulation_based_calibration(ppca(), num_bins=4).num_bins == 4


def test_same_seed_same_ranks_and_nothing_is_left_behind():
    pair = VAE(6, 2, hidden_dims=(4,))
    pair.eval()
    state, before = {k: v.clone() for k, v in pair.state_dict().items()}, torch.get_rng_state()
    a, b, c = (simulation_based_calibration(pair, num_simulations=50, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in pair.state_dict().items())
    for name in a.tests:
        assert torch.equal(a.tests[name].ranks, b.tests[name].ranks)
    assert not torch.equal(a.tests["z"].ranks, c.tests["z"].ranks)
    x = sample(pair, 20, seed=0)
    first, again, other = (posterior_predictive_check(pair, x, num_replicates=20, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert torch.equal(before, torch.get_rng_state())


def test_calibration_reads_as_a_table_and_as_json():
    found = simulation_based_calibration(Linear(widen=0.5), num_simulations=500)
    text = repr(found)
    assert text.startswith("500 simulated data, 99 draws each from the guide; χ² over 20 bins")
    assert "z                      3" in text.replace(text.split("\n")[0], "")
    assert "too narrow (∪-shaped) in " in text
    record = json.loads(json.dumps(found.to_dict()))
    assert record["verdict"] == found.verdict
    assert record["tests"]["z"]["counts"] == found.tests["z"].counts
    assert "ranks" not in record["tests"]["z"]


def test_ecdf_band_holds_all_of_a_uniform_sample_with_99_percent():
    low, high = ecdf_band(200, 50)
    samples = np.random.default_rng(1).integers(0, 50, (4000, 200))
    counts = (samples[:, :, None] <= np.arange(49)).sum(1)
    inside = ((counts >= low) & (counts <= high)).all(1).sum()
    # the band is itself from 4000 samples; discreteness makes it somewhat wider
    error = math.sqrt(2 * 0.01 * 0.99 / 4000)
    assert 0.99 - NUM_SE * error < inside / 4000 < 0.99 + NUM_SE * error


# Predictive checks


def check(found, name):
    return next(s for s in found.statistics if s.name == name)


def test_default_statistics_equal_those_of_scipy():
    x = torch.distributions.Gamma(2.0, 1.0).sample((50, 3)).double()
    x[:, 2] = 4.0  # constant
    found = {name: function(x) for name, function in default_statistics(x).items()}
    assert list(found) == ["mean", "standard deviation", "minimum", "maximum", "skewness", "largest |correlation|"]
    np.testing.assert_allclose(found["mean"], x.numpy().mean(0))
    np.testing.assert_allclose(found["standard deviation"], x.numpy().std(0))
    np.testing.assert_allclose(found["minimum"], x.numpy().min(0))
    np.testing.assert_allclose(found["maximum"], x.numpy().max(0))
    np.testing.assert_allclose(found["skewness"][:2], stats.skew(x.numpy()[:, :2]))
    assert found["skewness"][2] == 0
    assert found["largest |correlation|"] == pytest.approx(abs(np.corrcoef(x[:, 0], x[:, 1])[0, 1]))
    binary = (x > 2).double()
    found = {name: function(binary) for name, function in default_statistics(binary).items()}
    assert list(found) == ["mean", "largest |correlation|", "pixels on, mean", "pixels on, standard deviation"]
    assert found["pixels on, mean"] == pytest.approx(binary.sum(1).mean().item())


def test_prior_replicates_follow_the_model():
    """T = the mean of a feature: N(μ, C_jj / N) over replicates, whatever the data."""
    pair, count = ppca(), 1000
    x = torch.zeros(50, 4)
    statistics = {"first": lambda x: x[:, 0].mean(), "all": lambda x: x.mean(0)}
    found = posterior_predictive_check(pair, x, statistics=statistics, num_replicates=count)
    covariance = (pair.weight @ pair.weight.mT).detach() + pair.noise_variance.item() * torch.eye(4)
    for feature, row in ((0, found.statistics[0]), (found.statistics[1].feature, found.statistics[1])):
        scale = math.sqrt(covariance[feature, feature] / 50)
        assert abs(row.mean - pair.loc[feature].item()) < NUM_SE * scale / math.sqrt(count)
        assert row.standard_deviation == pytest.approx(scale, rel=NUM_SE / math.sqrt(2 * count))
        assert row.observed == 0
    assert found.statistics[0].p_value < 0.05  # the first feature's mean is 1
    assert found.statistics[1].p_value == pytest.approx(1 / (count + 1))  # the others' are −2, 0, 3
    assert found.statistics[1].feature in (1, 3)


def test_posterior_replicates_follow_the_guide():
    """x_rep = a z + noise, z ~ N(m(x), v): the mean over data of x_rep has mean a·m̄ and variance (a² v + σ²) / N."""
    pair, count = Linear((2.0, 1.0)), 1000
    x = 5 + torch.randn(40, 2)
    first = {"first": lambda x: x[:, 0].mean()}
    (row,) = posterior_predictive_check(
        pair, x, statistics=first, replicates="posterior", num_replicates=count
    ).statistics
    loc, scale = pair.moments(x)
    error = math.sqrt((4 * scale[0].item() ** 2 + 0.64) / 40)
    assert abs(row.mean - 2 * loc[:, 0].mean().item()) < NUM_SE * error / math.sqrt(count)
    assert row.standard_deviation == pytest.approx(error, rel=NUM_SE / math.sqrt(2 * count))


def test_a_missing_correlation_is_found():
    """A mixture with one diagonal component has every mean and deviation right, and no correlation."""
    z = torch.randn(300, 1)
    x = torch.cat([z + 0.5 * torch.randn(300, 1), z + 0.5 * torch.randn(300, 1), torch.randn(300, 1)], 1)
    pairs = {c: GMM(1, 3, covariance=c) for c in ("diag", "full")}
    for pair in pairs.values():
        pv.fit_em(pair, x)
    wrong, right = (posterior_predictive_check(pair, x, num_replicates=400) for pair in pairs.values())
    assert check(wrong, "largest |correlation|").p_value == pytest.approx(2 / 401)
    for name in ("mean", "standard deviation"):
        assert check(wrong, name).p_value > 0.5  # fitted
    assert check(right, "largest |correlation|").p_value > 0.05


def test_mixtures_replicate_within_their_clusters():
    """Clusters at −10 and 10: posterior replicates keep every datum in its own; prior ones draw the shares anew."""
    pair = GMM(2, 1, covariance="diag")
    with torch.no_grad():
        pair.loc.copy_(torch.tensor([[-10.0], [10.0]]))
    x = torch.cat([torch.full((30, 1), -10.0), torch.full((70, 1), 10.0)])
    share = {"share": lambda x: (x > 0).double().mean()}
    found = {
        r: posterior_predictive_check(pair, x, statistics=share, replicates=r).statistics[0]
        for r in ("prior", "posterior")
    }
    assert found["posterior"].mean == pytest.approx(0.7)
    assert found["posterior"].standard_deviation == pytest.approx(0, abs=1e-12)
    assert found["posterior"].p_value == 1  # ties on both sides
    assert found["prior"].mean == pytest.approx(0.5, abs=NUM_SE * 0.05 / math.sqrt(500))
    assert found["prior"].standard_deviation == pytest.approx(0.05, rel=NUM_SE / math.sqrt(1000))
    assert found["prior"].p_value == pytest.approx(2 / 501)


@pytest.mark.parametrize("replicates", ["prior", "posterior"])
def test_a_global_latent_comes_from_the_guide(replicates):
    x = 7 + torch.randn(30, 1)
    pair = GlobalMean(x)
    mean = {"mean": lambda x: x.mean()}
    (row,) = posterior_predictive_check(pair, x, statistics=mean, replicates=replicates, num_replicates=1000).statistics
    scale = math.sqrt(pair.scale**2 + 1 / 30)
    assert abs(row.mean - pair.loc.item()) < NUM_SE * scale / math.sqrt(1000)
    assert row.standard_deviation == pytest.approx(scale, rel=NUM_SE / math.sqrt(2000))


def test_p_values_of_the_true_model_are_uniform_and_posterior_ones_conservative():
    pair, repeats = ppca(), 100
    sides = {"prior": [], "posterior": []}
    statistics = {"one": lambda x: x[:, 0].mean(), "each": lambda x: x.mean(0)}
    for seed in range(repeats):
        x = sample(pair, 20, seed=1000 + seed)
        for r, rows in sides.items():
            found = posterior_predictive_check(
                pair, x, statistics=statistics, replicates=r, num_replicates=99, seed=seed
            )
            rows.append([s.p_value for s in found.statistics])
    for p_values in np.array(sides["prior"]).T:
        # discrete: p takes multiples of 1/100 or 2/100, and its law at those is the uniform one
        assert stats.kstest(p_values - np.random.default_rng(0).uniform(0, 0.01, repeats), "uniform").pvalue > CHANCE
    for p_values in np.array(sides["posterior"]).T:
        assert (p_values <= 0.1).sum() <= stats.binom.isf(CHANCE, repeats, 0.1)
        assert np.var(p_values) < 1 / 12


def test_replicates_in_chunks_follow_the_model(monkeypatch):
    pair = Linear((2.0, 1.0))
    x = sample(pair, 30, seed=0)
    monkeypatch.setitem(FLOATS_PER_CHUNK, "cpu", 40)  # rows in parts, one replicate at a time
    for r in ("prior", "posterior"):
        found = posterior_predictive_check(pair, x, replicates=r, num_replicates=50)
        assert all(s.p_value > 2 / 51 for s in found.statistics)
    globals_ = 7 + torch.randn(30, 1)
    mean = {"sd": lambda x: x.std()}
    (row,) = posterior_predictive_check(GlobalMean(globals_), globals_, statistics=mean, num_replicates=50).statistics
    assert row.mean == pytest.approx(1, abs=NUM_SE / math.sqrt(60))  # one mu for all rows, not one for each part


@pytest.mark.parametrize(
    "pair",
    [lambda: VAE(6, 2, hidden_dims=(4,)), lambda: IWAE(6, (3, 2), hidden_dims=((4,), (4,))), lambda: GMM(2, 6)],
)
@pytest.mark.parametrize("replicates", ["prior", "posterior"])
def test_check_runs_for_every_kind_of_pair_and_one_datum(pair, replicates):
    x = torch.rand(5, 6)
    for rows in (x, x[:1]):
        found = posterior_predictive_check(pair(), rows, replicates=replicates, num_replicates=9, binarize=True)
        assert all(0.1 <= s.p_value <= 1 for s in found.statistics)
    assert found.statistics[0].name == "mean"


def test_predictive_check_reads_as_a_table_and_as_json():
    pair = ppca()
    found = posterior_predictive_check(pair, sample(pair, 25, seed=0), num_replicates=99)
    text = repr(found)
    assert text.startswith("25 data, 99 replicates: new data from the model\nstatistic ")
    assert f"mean, most of all: feature {found.statistics[0].feature}" in text
    remarks = [line.partition("  p of the worst of ")[2] for line in text.splitlines()[2:-1]]
    assert remarks == [
        str(pair.data_dim) if s.feature is not None else "" for s in found.statistics
    ]  # not of one feature
    assert json.loads(json.dumps(found.to_dict()))["statistics"][0]["name"] == "mean"
    assert "made from it" in repr(
        posterior_predictive_check(pair, sample(pair, 5, seed=0), replicates="posterior", num_replicates=3)
    )


@pytest.mark.parametrize(
    ("call", "exception", "match"),
    [
        (lambda: simulation_based_calibration(Linear), TypeError, "pair: expected an instance"),
        (lambda: simulation_based_calibration(Linear(), num_simulations=0), ValueError, "num_simulations: .*1 or more"),
        (lambda: simulation_based_calibration(Linear(), num_simulations=9), ValueError, "num_simulations: .*10 or"),
        (lambda: simulation_based_calibration(Linear(), num_draws=9.0), TypeError, "num_draws: "),
        (lambda: simulation_based_calibration(Linear(), num_draws=100), ValueError, "num_draws: .*divisor.*Use 99"),
        (lambda: simulation_based_calibration(Linear(), num_bins=7), ValueError, "num_bins: .*divisor of .* 100"),
        (lambda: simulation_based_calibration(Linear(), source="prior"), ValueError, "source: .*'prior'"),
        (lambda: simulation_based_calibration(Linear(), source="exact"), NotApplicable, "Linear: it has no posterior"),
        (lambda: simulation_based_calibration(GMM(2, 2), source="guide"), NotApplicable, "Use source='exact'"),
        (lambda: simulation_based_calibration(Linear(), device="tpu"), ValueError, "device: "),
        (lambda: simulation_based_calibration(NaNGuide()), ValueError, "pair: z is NaN"),
        (lambda: simulation_based_calibration(TwoViews()), NotApplicable, "at one site,.* observes left, right"),
        (
            lambda: simulation_based_calibration(GlobalMean(torch.zeros(5, 1))),
            NotApplicable,
            "latent mu lies outside the data plate",
        ),
        (lambda: posterior_predictive_check(Linear, torch.zeros(4, 3)), TypeError, "pair: expected an instance"),
        (lambda: posterior_predictive_check(Linear(), torch.zeros(4, 2)), ValueError, "x: expected 3 features"),
        (
            lambda: posterior_predictive_check(Linear(), torch.zeros(4, 3), replicates="both"),
            ValueError,
            "replicates: .*'both'",
        ),
        (
            lambda: posterior_predictive_check(Linear(), torch.zeros(4, 3), num_replicates=0),
            ValueError,
            "num_replicates: ",
        ),
        (
            lambda: posterior_predictive_check(Linear(), torch.zeros(4, 3), statistics=[torch.mean]),
            TypeError,
            "statistics: expected a dictionary",
        ),
        (
            lambda: posterior_predictive_check(Linear(), torch.zeros(4, 3), statistics={}),
            ValueError,
            "statistics: expected at least one",
        ),
        (
            lambda: posterior_predictive_check(
                Linear(), torch.zeros(4, 3), statistics={"log": lambda x: x.log().sum()}
            ),
            ValueError,
            "statistics: expected finite numbers from 'log'; got .* for the data",
        ),
        (
            lambda: posterior_predictive_check(Linear(), torch.zeros(4, 3), statistics={"on": lambda x: x[x == 0]}),
            ValueError,
            "statistics: expected as many values of 'on' .*, 12; got 0",
        ),
    ],
)
def test_bad_calls_are_refused(call, exception, match):
    with pytest.raises(exception, match=match):
        call()


@pytest.mark.cuda
def test_calibration_and_check_run_on_the_gpu():
    pair = ppca()
    found = simulation_based_calibration(pair, device="cuda")
    assert found.p_value > CHANCE
    assert next(pair.parameters()).device.type == "cpu"
    x = sample(pair, 100, seed=0)
    for r in ("prior", "posterior"):
        checks = posterior_predictive_check(pair, x, replicates=r, device="cuda")
        assert all(s.p_value > CHANCE for s in checks.statistics)
