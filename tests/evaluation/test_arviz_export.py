"""to_arviz: draws and pointwise log likelihoods against exact answers, and ArviZ's own functions on the result."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrovae as pv
from pyrovae.evaluation import arviz_export
from pyrovae.evaluation.arviz_export import to_arviz
from pyrovae.evaluation.measurement import FLOATS_PER_CHUNK, NotApplicable
from pyrovae.infer.weights import log_weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import arviz as az

pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword")  # pandas, of az.compare

NUM_SE = 5  # standard errors allowed in statistical tests


def data(count=40, dim=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, dim, generator=generator) * torch.linspace(0.5, 2, dim)


def ppca(x, latent_dim=2):
    pair = pv.models.PPCA(x.shape[1], latent_dim)
    pair.fit_closed_form(x)
    return pair


class Wide(pv.Pair):
    """z ~ N(0, 1), x | z ~ N(z, 1) in each of D features; the guide is the posterior, widened."""

    def __init__(self, data_dim=2, widen=1.0, name="z"):
        super().__init__()
        self.data_dim, self.name = data_dim, name
        self.scale = nn.Parameter(torch.tensor(widen / math.sqrt(1 + data_dim)))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample(self.name, dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.expand(*z.shape[:-1], self.data_dim), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample(self.name, dist.Normal(x.sum(-1, keepdim=True) / (1 + self.data_dim), self.scale).to_event(1))

    def evidence(self, x):
        covariance = torch.eye(self.data_dim, dtype=torch.float64) + 1
        return dist.MultivariateNormal(torch.zeros(self.data_dim).double(), covariance).log_prob(x.double()).numpy()


class GlobalMean(pv.Pair):
    """mu ~ N(0, 3²), with ``local`` z ~ N(0, 1), x ~ N(mu + z, 1). Without z the guide of mu is its posterior."""

    data_dim = 1

    def __init__(self, local=False):
        super().__init__()
        self.local = local
        self.shift = nn.Parameter(torch.zeros(()))

    def model(self, x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 3.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0)) if self.local else 0.0
            pyro.sample("x", dist.Normal((mu + z).unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(self, x):
        variance = 1 / (len(x) + 1 / 9)
        pyro.sample("mu", dist.Normal(x.sum() * variance + self.shift, math.sqrt(variance)))
        if self.local:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x[:, 0] / 2, 0.9))


class TwoCategories(pv.Pair):
    """y1 and y2 | y1 enumerated beside a sampled z, in three and two values; features in a plate of their own."""

    data_dim = 2

    def __init__(self):
        super().__init__()
        self.odds = nn.Parameter(torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]]))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Gamma(x.new_tensor(2.0), 1.0))
            y1 = pyro.sample("y1", dist.Categorical(x.new_tensor([0.2, 0.3, 0.5])), infer={"enumerate": "parallel"})
            y2 = pyro.sample("y2", dist.Categorical(self.odds[y1]), infer={"enumerate": "parallel"})
            with pyro.plate("features", 2, dim=-1):
                pyro.sample("x", dist.Normal(y1 - 2.0 * y2 + 0.1 * z, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Gamma(x.new_tensor(2.0), 1.0))

    def posterior_of(self, x, z):
        """p(y1, y2 | x, z) by enumeration, for x (N, 2) and z (S, N): (S, N, 3, 2)."""
        mean = torch.arange(3.0)[:, None] - 2 * torch.arange(2.0) + 0.1 * z[..., None, None]
        prior = torch.tensor([0.2, 0.3, 0.5])[:, None] * self.odds.detach()
        log_p = prior.log() + dist.Normal(mean[..., None], 1.0).log_prob(x[:, None, None, :]).sum(-1)
        return log_p.flatten(-2).softmax(-1).reshape(log_p.shape)


def near(values, exact, axis):
    """Check that the mean of draws along ``axis`` equals ``exact`` to NUM_SE standard errors."""
    values = np.asarray(values, dtype=np.float64)
    error = values.std(axis, ddof=1) / math.sqrt(values.shape[axis]) + 1e-6
    np.testing.assert_array_less(np.abs(values.mean(axis) - np.asarray(exact)) / error, NUM_SE)


def near_probability(hits, exact):
    """Check that the share of hits along axis 0 equals ``exact``; a rare event may happen a few times more."""
    count, exact = len(hits), np.asarray(exact)
    error = NUM_SE * (np.sqrt(exact * (1 - exact) / count) + 1 / count)
    np.testing.assert_array_less(np.abs(hits.mean(0) - exact), error)


# What is drawn, and its names


def test_groups_dims_and_coords():
    x = data()
    idata = to_arviz(ppca(x), x, num_draws=7, coords={"feature": ["a", "b", "c"], "data": range(100, 140)})
    assert idata.groups() == [
        "posterior",
        "posterior_predictive",
        "log_likelihood",
        "sample_stats",
        "prior",
        "prior_predictive",
        "observed_data",
    ]
    for group in ("posterior", "prior"):
        assert idata[group].z.dims == ("chain", "draw", "data", "z_dim")
        assert idata[group].z.shape == (1, 7, 40, 2)
    for group in ("posterior_predictive", "prior_predictive"):
        assert idata[group].x.dims == ("chain", "draw", "data", "feature")
        assert list(idata[group].feature.values) == ["a", "b", "c"]
    assert idata.log_likelihood.x.dims == idata.sample_stats.log_weight.dims == ("chain", "draw", "data")
    assert idata.sample_stats.lp.dims == ("chain", "draw")
    assert idata.observed_data.x.dims == ("data", "feature")
    assert idata.posterior.data.values[0] == 100
    np.testing.assert_array_equal(idata.observed_data.x.values, x.numpy())
    assert idata.attrs["pair"] == "PPCA"
    assert idata.attrs["pyrovae_version"] == pv.__version__
    assert idata.attrs["guide"] == "z: MultivariateNormal"
    assert idata.attrs["left_out"] == "nothing"


def test_posterior_draws_against_the_exact_posterior():
    x = data(20)
    pair = ppca(x)
    exact = pair.posterior(x)
    z = to_arviz(pair, x, num_draws=4000).posterior.z.values[0]
    near(z, exact.mean.detach(), 0)
    near((z - exact.mean.detach().numpy()) ** 2, exact.variance.detach(), 0)


def test_prior_and_predictive_draws_against_their_moments():
    """Prior predictive x has the model's marginal moments; z of both groups theirs; x' | x has W m(x) + μ."""
    x = data(20)
    pair = ppca(x)
    idata = to_arviz(pair, x, num_draws=2000)
    near(idata.prior.z.values.reshape(-1, 2), np.zeros(2), 0)
    near(idata.prior.z.values.reshape(-1, 2) ** 2, np.ones(2), 0)
    covariance = (pair.weight @ pair.weight.mT + pair.noise_variance * torch.eye(3)).detach()
    simulated = idata.prior_predictive.x.values.reshape(-1, 3)
    near(simulated, pair.loc.detach(), 0)
    near((simulated - pair.loc.detach().numpy()) ** 2, covariance.diagonal(), 0)
    expected = pair.posterior(x).mean @ pair.weight.mT + pair.loc
    near(idata.posterior_predictive.x.values[0], expected.detach(), 0)


def test_predictive_draws_go_with_their_latents():
    """x' − z is the noise of the likelihood, independent of z, draw by draw."""
    x = data(10, 2)
    idata = to_arviz(Wide(), x, num_draws=3000)
    for latents, simulated in ((idata.posterior, idata.posterior_predictive), (idata.prior, idata.prior_predictive)):
        noise = simulated.x.values - latents.z.values
        near(noise.reshape(-1, 2) ** 2, np.ones(2), 0)
        near((noise * latents.z.values).reshape(-1, 2), np.zeros(2), 0)


def test_a_layer_above_goes_with_the_one_below():
    pair = pv.models.IWAE(6, (3, 2), hidden_dims=((5,), (4,)))
    x = torch.bernoulli(torch.full((5, 6), 0.5))
    idata = to_arviz(pair, x, num_draws=2000)
    assert idata.posterior.z1.shape == (1, 2000, 5, 3)
    assert idata.posterior.z2.dims[-1] == "z2_dim"
    z1 = torch.as_tensor(idata.posterior.z1.values[0])
    with torch.no_grad():
        residual = idata.posterior.z2.values[0] - pair.encoders[1](z1).mean.numpy()
    near(residual, np.zeros((5, 2)), 0)
    near(residual[..., :1] * z1.numpy(), np.zeros((5, 3)), 0)
    assert set(np.unique(idata.posterior_predictive.x.values)) == {0, 1}


def test_enumerated_component_is_drawn_from_the_exact_posterior():
    x = data(60, 2)
    pair = pv.models.GMM(3, 2)
    pair.initialize(x, seed=0)
    idata = to_arviz(pair, x, num_draws=3000)
    z = idata.posterior.z
    assert z.dims == ("chain", "draw", "data")
    assert z.dtype == np.int64
    assert idata.attrs["enumerated"] == "z"
    near_probability(z.values[0][..., None] == np.arange(3), pair.posterior(x).probs.detach())
    near(idata.posterior_predictive.x.values[0], pair.posterior(x).probs.detach() @ pair.loc.detach(), 0)
    near_probability(idata.prior.z.values.reshape(-1, 1) == np.arange(3), pair.weights.detach())


def test_enumerated_latents_are_drawn_jointly_given_those_sampled():
    pair, x = TwoCategories(), data(6, 2)
    idata = to_arviz(pair, x, num_draws=4000)
    assert idata.posterior_predictive.x.dims == ("chain", "draw", "data", "features")
    assert idata.observed_data.x.dims == ("data", "features")
    y1, y2, z = (idata.posterior[name].values[0] for name in ("y1", "y2", "z"))
    assert (z > 0).all()
    drawn = (y1[..., None, None] == np.arange(3)[:, None]) & (y2[..., None, None] == np.arange(2))
    exact = pair.posterior_of(x, torch.as_tensor(z)).numpy()
    error = NUM_SE * (np.sqrt((exact * (1 - exact)).sum(0)) + 1)  # z differs from draw to draw
    np.testing.assert_array_less(np.abs((drawn - exact).sum(0)), error)
    mean = y1 - 2.0 * y2 + 0.1 * z
    near(idata.posterior_predictive.x.values[0] - mean[..., None], np.zeros((6, 2)), 0)


def test_draws_of_an_amortized_category_follow_its_guide():
    x = data(30, 2)
    pair = pv.models.GMM(3, 2, amortized=True)
    idata = to_arviz(pair, x, num_draws=2000)
    with torch.no_grad():
        probs = torch.softmax(pair.encoder(x), -1)
    near_probability(idata.posterior.z.values[0][..., None] == np.arange(3), probs)


def test_one_chain_for_each_pair():
    x = data()
    pairs = [ppca(x), ppca(x)]
    with torch.no_grad():
        pairs[1].loc += 0.5
    pairs[1].match_guide()
    idata = to_arviz(pairs, x, num_draws=2000)
    assert idata.posterior.z.shape == (2, 2000, 40, 2)
    for chain, pair in enumerate(pairs):
        near(idata.posterior.z.values[chain], pair.posterior(x).mean.detach(), 0)
        np.testing.assert_allclose(idata.log_likelihood.x.values[chain].mean(0), pair.log_prob(x).detach(), rtol=1e-5)
    assert not np.array_equal(*to_arviz([pairs[0]] * 2, x, num_draws=3).posterior.z.values)


def test_a_pair_of_functions_is_exported():
    def model(x):
        loc = pyro.param("loc", lambda: torch.zeros(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(loc + z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("shift", lambda: torch.zeros(())), 1.0).expand([len(x)]))

    idata = to_arviz(pv.FunctionPair(model, guide), data(5, 1), num_draws=4)
    assert idata.posterior.z.dims == ("chain", "draw", "data")
    assert idata.attrs["pair"] == "FunctionPair"


@pytest.mark.parametrize("floats", [1, 60, 700])
def test_chunks_change_nothing_but_noise(monkeypatch, floats):
    """Chunks go down to one draw of one datum; where the guide is the posterior, every weight is the evidence."""
    monkeypatch.setitem(FLOATS_PER_CHUNK, "cpu", floats)
    x = data(7, 2)
    pair = Wide()
    idata = to_arviz(pair, x, num_draws=11, num_samples=22)
    assert idata.posterior_predictive.x.shape == (1, 11, 7, 2)
    np.testing.assert_allclose(idata.sample_stats.log_weight.values[0], np.tile(pair.evidence(x), (11, 1)), rtol=1e-5)
    np.testing.assert_allclose(idata.log_likelihood.x.values[0, 3], pair.evidence(x), rtol=1e-5)
    z = torch.as_tensor(idata.posterior.z.values[0])
    joint = dist.Normal(0.0, 1.0).log_prob(z).sum((1, 2)) + dist.Normal(z, 1.0).log_prob(x).sum((1, 2))
    np.testing.assert_allclose(idata.sample_stats.lp.values[0], joint, rtol=1e-5)
    two = to_arviz(TwoCategories(), x, num_draws=11, num_samples=11)
    assert two.posterior.y1.shape == (1, 11, 7)
    assert len(np.unique(two.posterior.z.values)) == 77


# Log likelihoods


def test_marginal_log_likelihood_is_exact_where_the_pair_knows_it():
    x = data()
    gmm = pv.models.GMM(2, 3)
    gmm.initialize(x, seed=0)
    for pair in (ppca(x), gmm):
        for pairs in (pair, [pair, pair]):
            idata = to_arviz(pairs, x, num_draws=50)
            found = idata.log_likelihood.x.values[0]
            np.testing.assert_allclose(found, np.tile(pair.log_prob(x).detach(), (50, 1)), rtol=1e-6)
            assert "exact" in idata.attrs["log_likelihood"]
            loo = az.loo(idata)  # without a warning
            assert loo.elpd_loo == pytest.approx(pair.log_prob(x).sum().item(), rel=1e-6)
            assert abs(loo.p_loo) < 1e-6


@pytest.mark.parametrize("num_samples", [1, 4000])
def test_marginal_log_likelihood_estimates_the_evidence(num_samples):
    """A guide wider than the posterior has bounded weights: w/p(x) has mean 1 and its variance in closed form."""
    x, widen, draws = data(30, 2), 1.5, 500
    pair = Wide(widen=widen)
    idata = to_arviz(pair, x, num_draws=draws, num_samples=num_samples)
    samples = max(num_samples, draws)
    # E_q[(p/q)²] for two Gaussians of one mean, of variance ratio r² : r² / sqrt(2 r² − 1)
    variance = widen**2 / math.sqrt(2 * widen**2 - 1) - 1
    each = np.exp(idata.log_likelihood.x.values[0].mean(0) - pair.evidence(x)) - 1
    assert np.abs(each).max() < NUM_SE * math.sqrt(variance / samples)
    assert abs(each.mean()) < NUM_SE * math.sqrt(variance / samples / len(x))
    total = az.loo(idata).elpd_loo - pair.evidence(x).sum()
    assert abs(total) < NUM_SE * math.sqrt(variance * len(x) / samples)
    near(np.exp(idata.sample_stats.log_weight.values[0] - pair.evidence(x)), np.ones(30), 0)


def test_each_draw_leaves_out_its_own_weight():
    log_weight = torch.randn(6, 4, dtype=torch.float64) * 3
    log_weight[2, 1] += 200  # nearly all of the sum
    found = arviz_export._evidence_from_others(log_weight)
    for s in range(6):
        others = torch.cat([log_weight[:s], log_weight[s + 1 :]])
        assert torch.allclose(found[s], others.logsumexp(0) - math.log(5), rtol=1e-12)


def test_k_hat_of_loo_is_that_of_the_weights():
    """A guide narrower than the posterior has heavy weights, and az.loo warns of their tail."""
    x = data(40, 2)
    idata = to_arviz(Wide(widen=0.7), x, num_draws=2000, num_samples=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = az.loo(idata, pointwise=True).pareto_k.values
    weights = az.psislw(idata.sample_stats.log_weight.values[0].T.copy())[1]
    assert np.abs(found - weights).max() < 0.05
    assert 0.3 < found.mean() < 0.7  # in theory 1 − 0.7² = 0.51


@pytest.mark.parametrize("scale", [1, 20])
def test_weights_that_differ_by_rounding_raise_no_warning(scale):
    """The guide is the posterior, but the pair has no ``log_prob``, so rounding makes the weights differ."""
    x = scale * data(40, 2)
    pair = Wide()
    assert az.loo(to_arviz(pair, x)).elpd_loo == pytest.approx(pair.evidence(x).sum(), rel=1e-5)


def test_conditional_log_likelihood_is_that_at_the_draws():
    x = data(20, 2)
    idata = to_arviz(Wide(), x, num_draws=30, log_likelihood="conditional")
    z = torch.as_tensor(idata.posterior.z.values[0])
    np.testing.assert_allclose(idata.log_likelihood.x.values[0], dist.Normal(z, 1.0).log_prob(x).sum(-1), rtol=1e-5)
    assert idata.attrs["log_likelihood"] == "log p(x_n | latents)"
    pair, x = TwoCategories(), data(6, 2)
    idata = to_arviz(pair, x, num_draws=30, log_likelihood="conditional")
    y1, y2, z = (torch.as_tensor(idata.posterior[name].values[0]) for name in ("y1", "y2", "z"))
    exact = dist.Normal((y1 - 2.0 * y2 + 0.1 * z).unsqueeze(-1), 1.0).log_prob(x).sum(-1)
    np.testing.assert_allclose(idata.log_likelihood.x.values[0], exact, rtol=1e-4, atol=1e-5)


def test_enumerated_latents_are_summed_out_of_weights():
    """The weights are those of ``log_weights``."""
    pair, x = TwoCategories(), data(6, 2)
    idata = to_arviz(pair, x, num_draws=2000)
    with torch.no_grad():
        other = log_weights(pair.model, pair.guide, x, num_particles=2000).double().exp()
    found = np.exp(idata.sample_stats.log_weight.values[0])
    near(found - found.mean(0) + (found.mean(0) - other.mean(0).numpy()) / math.sqrt(2), np.zeros(6), 0)


def test_loo_of_a_global_latent_is_the_exact_one():
    """With mu's exact posterior az.loo is leave-one-out cross-validation: Σ log p(x_n | x_-n), in closed form."""
    x = data(25, 1)
    rest, precision = x.double().sum() - x.double(), len(x) - 1 + 1 / 9
    exact = dist.Normal(rest / precision, math.sqrt(1 + 1 / precision)).log_prob(x.double()).sum().item()
    found = []
    for seed in range(8):
        idata = to_arviz(GlobalMean(), x, num_draws=500, predictive=False, seed=100 * seed)
        found.append(az.loo(idata).elpd_loo)
    near(np.array(found), exact, 0)
    assert np.std(found) < 0.1
    assert idata.posterior.mu.dims == idata.sample_stats.log_weight.dims == ("chain", "draw")
    assert "global" in idata.attrs["log_likelihood"]
    assert np.ptp(idata.sample_stats.log_weight.values) < 1e-3  # the guide is the posterior: the evidence of all data


def test_local_latents_beside_a_global_one_are_integrated_out():
    """x | mu ~ N(mu, 2): each draw's estimate of p(x_n | mu_s) is unbiased."""
    x = data(8, 1)
    idata = to_arviz(GlobalMean(local=True), x, num_draws=200, num_samples=20)
    mu = torch.as_tensor(idata.posterior.mu.values[0]).double()
    exact = dist.Normal(mu[:, None], math.sqrt(2.0)).log_prob(x[:, 0].double()).numpy()
    ratio = np.exp(idata.log_likelihood.x.values[0] - exact)
    near(ratio, np.ones(8), 0)
    assert ratio.std() < 0.3
    assert idata.posterior.z.dims == ("chain", "draw", "data")
    assert idata.prior.mu.dims == ("chain", "draw")
    assert idata.sample_stats.log_weight.dims == ("chain", "draw")


def test_a_guide_of_one_value_has_no_marginal_log_likelihood():
    class Point(Wide):
        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Delta(x.mean(-1, keepdim=True)).to_event(1))

    x = data(5, 2)
    idata = to_arviz(Point(), x, num_draws=3)
    assert "log_likelihood" not in idata.groups()
    assert "guide gives one value to z" in idata.attrs["left_out"]
    assert "log_likelihood" in to_arviz(Point(), x, num_draws=3, log_likelihood="conditional").groups()


# ArviZ on the result


def test_arviz_compares_as_the_evidence_does():
    x = data(60, 4)
    pairs = {str(q): ppca(x, q) for q in (1, 3)}
    table = az.compare({name: to_arviz(pair, x, num_draws=100) for name, pair in pairs.items()})
    exact = {name: pair.log_prob(x).sum().item() for name, pair in pairs.items()}
    assert list(table.index) == sorted(exact, key=exact.get, reverse=True)
    for name, value in exact.items():
        assert table.elpd_loo[name] == pytest.approx(value, rel=1e-6)
    assert not table.warning.any()


@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")  # of ArviZ, by matplotlib 3.11
def test_arviz_summary_and_pictures():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    x = data(15, 2)
    idata = to_arviz([Wide(widen=1.1), Wide(widen=1.1)], x, num_draws=60)
    summary = az.summary(idata, var_names=["z"])
    assert len(summary) == 15
    assert summary.r_hat.max() < 1.2
    az.plot_ppc(idata, num_pp_samples=10, random_seed=0)
    az.plot_ppc(idata, group="prior", num_pp_samples=10, random_seed=0)
    az.plot_forest(idata, var_names=["z"], coords={"data": [0, 1]})
    plt.close("all")
    assert az.loo(idata).n_samples == 120


@pytest.mark.parametrize(
    "make", [lambda: Wide(), TwoCategories, lambda: GlobalMean(local=True), lambda: Wide(name="a/z")]
)
def test_netcdf_round_trip(tmp_path, make):
    pair = make()
    idata = to_arviz([pair, pair], data(5, pair.data_dim), num_draws=4, num_samples=3)
    idata.to_netcdf(str(tmp_path / "draws.nc"))
    back = az.from_netcdf(str(tmp_path / "draws.nc"))
    assert back.groups() == idata.groups()
    for group in idata.groups():
        assert back[group].identical(idata[group])
    assert dict(back.attrs) == dict(idata.attrs)


# State, options, errors


def test_pair_and_random_state_are_left_as_they_were():
    x = data(6, 2)
    pair = Wide().double()
    before, grad = torch.get_rng_state(), torch.is_grad_enabled()
    first, second = to_arviz(pair, x, num_draws=5, seed=3), to_arviz(pair, x, num_draws=5, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.is_grad_enabled() == grad
    assert first.posterior.z.dtype == np.float64
    assert all(first[group].drop_attrs().identical(second[group].drop_attrs()) for group in first.groups())
    assert not first.posterior.z.equals(to_arviz(pair, x, num_draws=5, seed=4).posterior.z)


def test_pixels_are_binarised_once_for_all_chains():
    pairs = [pv.models.VAE(6, 2, hidden_dims=(4,)) for _ in range(2)]
    x = torch.rand(50, 6)
    idata = to_arviz(pairs, x, num_draws=3, binarize=True)
    pixels = torch.as_tensor(idata.observed_data.x.values)
    assert set(pixels.unique().tolist()) == {0, 1}
    assert (pixels <= x.ceil()).all()
    idata = to_arviz(pairs, x, num_draws=3, binarize=True, log_likelihood="conditional")
    for chain, pair in enumerate(pairs):
        with torch.no_grad():
            exact = pair.decoder(torch.as_tensor(idata.posterior.z.values[chain])).log_prob(pixels)
        np.testing.assert_allclose(idata.log_likelihood.x.values[chain], exact, rtol=1e-5)


def test_arviz_is_imported_late_and_its_announcement_kept_back(tmp_path):
    code = (
        "import sys, torch, pyrovae as pv\n"
        "from pyrovae.evaluation.arviz_export import to_arviz\n"
        "assert 'arviz' not in sys.modules\n"
        "to_arviz(pv.models.PPCA(3, 1), torch.randn(4, 3), num_draws=2)\n"
    )
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}  # there it announces once a day
    done = subprocess.run([sys.executable, "-W", "error::FutureWarning", "-c", code], env=env, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_without_simulation_there_are_no_predictive_groups():
    x = data(6, 2)
    idata = to_arviz(Wide(), x, num_draws=5, predictive=False)
    assert idata.groups() == ["posterior", "log_likelihood", "sample_stats", "observed_data"]


class PlateOfCategories(pv.Pair):
    data_dim = 2

    def model(self, x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("features", 2, dim=-1):
            y = pyro.sample("y", dist.Bernoulli(x.new_tensor(0.5)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)


X = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: to_arviz([], X), ValueError, "pair: expected a pair, or a list"),
        (lambda: to_arviz(Wide, X), TypeError, "Call it: Wide"),
        (lambda: to_arviz([Wide(), 3], X), TypeError, "expected a pyrovae.Pair; got int"),
        (
            lambda: to_arviz([Wide(), Wide(name="y")], X),
            ValueError,
            r"pair\[1\]: expected the sites of pair\[0\].*z \(data, 1\)",
        ),
        (lambda: to_arviz([Wide(), Wide(3)], X), ValueError, "expected 3 features"),
        (
            lambda: to_arviz([pv.models.GMM(2, 2), pv.models.GMM(2, 2, amortized=True)], X),
            ValueError,
            r"nothing in the guide; got .* with z in the guide",
        ),
        (lambda: to_arviz(Wide(), X, num_draws=1), ValueError, "num_draws: expected 2 or more"),
        (lambda: to_arviz(Wide(), X, num_draws=2.5), TypeError, "num_draws: expected a whole number"),
        (lambda: to_arviz(Wide(), X, num_samples=0), ValueError, "num_samples: expected a whole number"),
        (lambda: to_arviz(Wide(), X, log_likelihood="margin"), ValueError, "Did you mean 'marginal'"),
        (lambda: to_arviz(Wide(), X[:, 0]), ValueError, "x: expected shape"),
        (lambda: to_arviz(Wide(), X, device="tpu"), ValueError, "device: expected"),
        (lambda: to_arviz(Wide(), X, coords={"features": [1, 2]}), ValueError, "coords: expected dims among .*feature"),
        (lambda: to_arviz(Wide(), X, coords={"feature": ["a"]}), ValueError, "expected 2 labels of 'feature'; got 1"),
        (lambda: to_arviz(Wide(name="feature"), X), ValueError, "'feature' names a dim"),
        (lambda: to_arviz(PlateOfCategories(), X), NotApplicable, "'y' must have one value a datum"),
    ],
)
def test_bad_calls_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_too_large_is_refused_before_work_with_fixes_that_fit(monkeypatch):
    x = data(100, 2)
    monkeypatch.setattr(arviz_export, "MAX_BYTES", 100_000)
    # a draw of a datum: z 4 + 4, x 8 + 8, log likelihood 8, log weight 8; lp 8 a draw
    with pytest.raises(ValueError, match=r"num_draws=24, or fewer data, x\[:12\].") as caught:
        to_arviz(Wide(), x)
    assert "predictive" not in str(caught.value).split("Use")[1]
    to_arviz(Wide(), x, num_draws=24)
    with pytest.raises(ValueError, match="num_draws=24"):
        to_arviz(Wide(), x, num_draws=25)
    to_arviz(Wide(), x[:12])
    with pytest.raises(ValueError, match="or predictive=False"):
        to_arviz(Wide(), x, num_draws=40)
    to_arviz(Wide(), x, num_draws=40, predictive=False)


@pytest.mark.cuda
def test_export_runs_on_cuda():
    x = data(20, 2)
    idata = to_arviz(TwoCategories(), x, num_draws=50, device="cuda")
    assert idata.posterior.y1.shape == (1, 50, 20)
    assert np.isfinite(idata.log_likelihood.x.values).all()
