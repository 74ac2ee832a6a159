"""Gaussian mixtures agree with outside oracles: torch's own mixture, Bayes' rule by hand, enumeration."""

import math
import re
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import pyrovae as pv
from pyrovae.models.gmm import GMM

COVARIANCES = ("full", "tied", "diag", "spherical")


def random_gmm(covariance="full", num_components=3, data_dim=2, **options):
    torch.manual_seed(0)
    gmm = GMM(num_components, data_dim, covariance=covariance, **options).double()
    for parameter in gmm.parameters():
        parameter.data.normal_()
    return gmm


def reference(gmm):
    return MixtureSameFamily(
        Categorical(gmm.weights), MultivariateNormal(gmm.loc, covariance_matrix=gmm.covariance_matrix)
    )


@pytest.fixture
def faithful():
    return pv.data.load("faithful").train.double()


@pytest.mark.parametrize("data_dim", [1, 2, 5])
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_log_prob_and_posterior_follow_bayes_rule(covariance, data_dim):
    gmm = random_gmm(covariance, data_dim=data_dim)
    x = 3 * torch.randn(50, data_dim).double()
    torch.testing.assert_close(gmm.log_prob(x), reference(gmm).log_prob(x), rtol=1e-11, atol=1e-11)

    joint = gmm.weights * reference(gmm).component_distribution.log_prob(x.unsqueeze(1)).exp()
    torch.testing.assert_close(gmm.posterior(x).probs, joint / joint.sum(-1, keepdim=True), rtol=1e-10, atol=1e-12)
    assert gmm.posterior(x).batch_shape == (50,)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_log_prob_has_the_gradient_of_the_mixture(covariance):
    gmm, x = random_gmm(covariance), torch.randn(20, 2).double()
    ours = torch.autograd.grad(gmm.log_prob(x).sum(), list(gmm.parameters()))
    theirs = torch.autograd.grad(reference(gmm).log_prob(x).sum(), list(gmm.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_log_prob_is_right_far_from_the_means_and_from_the_origin():
    gmm = GMM(2, 1).double()
    far = torch.tensor([[1e150]], dtype=torch.float64)
    assert torch.isfinite(gmm.log_prob(far)).all()

    gmm, x = random_gmm(), torch.randn(20, 2).double()
    near = gmm.log_prob(x)
    gmm.loc.data += 1e6
    torch.testing.assert_close(gmm.log_prob(x + 1e6), near, rtol=0, atol=1e-7)  # 1e6 · eps a coordinate


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_log_prob_in_float32_does_not_cancel_far_from_the_origin(covariance):
    """The oracle takes the same float32 parameters and rows, in float64."""
    gmm = random_gmm(covariance).float()
    gmm.loc.data += 1e5
    x = (1e5 + torch.randn(200, 2)).float()
    found = gmm.log_prob(x).double()
    torch.testing.assert_close(found, gmm.double().log_prob(x.double()), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_enumerated_elbo_is_the_log_likelihood(covariance):
    gmm, x = random_gmm(covariance), torch.randn(20, 2).double()
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(gmm.model, gmm.guide, x)
    assert -loss == pytest.approx(gmm.log_prob(x).sum().item(), rel=1e-12)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_amortized_elbo_by_enumeration_is_the_expectation_under_the_guide(covariance):
    gmm, x = random_gmm(covariance, amortized=True, hidden_dims=(4,)), torch.randn(20, 2).double()
    q = dist.Categorical(logits=gmm.encoder(x)).probs
    joint = gmm.weights.log() + reference(gmm).component_distribution.log_prob(x.unsqueeze(1))
    exact = (q * (joint - q.log())).sum()
    for particles in (1, 3):  # no randomness is left, so particles agree
        loss = TraceEnum_ELBO(max_plate_nesting=1, num_particles=particles, vectorize_particles=True)
        assert -loss.loss(gmm.model, gmm.guide, x) == pytest.approx(exact.item(), rel=1e-12)
    assert exact < gmm.log_prob(x).sum()


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_a_sampled_component_has_the_log_density_of_its_gaussian(covariance):
    gmm, x = random_gmm(covariance, amortized=True, hidden_dims=(4,)), torch.randn(20, 2).double()
    with pyro.plate("particles", 7, dim=-2):
        guide = pyro.poutine.trace(gmm.guide).get_trace(x)
        model = pyro.poutine.trace(pyro.poutine.replay(gmm.model, guide)).get_trace(x)
    model.compute_log_prob()
    z = guide.nodes["z"]["value"]
    assert z.shape == (7, 20)
    component = reference(gmm).component_distribution.log_prob(x.unsqueeze(1)).expand(7, -1, -1)
    expected = gmm.weights.log()[z] + component.gather(-1, z.unsqueeze(-1)).squeeze(-1)
    got = model.nodes["z"]["log_prob"] + model.nodes["x"]["log_prob"]
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("amortized", "loss"),
    [
        (False, TraceEnum_ELBO(max_plate_nesting=1)),
        (True, TraceEnum_ELBO(max_plate_nesting=1)),
        (True, Trace_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=1)),
        (True, Trace_ELBO()),
    ],
    ids=["enumerated", "amortized", "score function", "one sample"],
)
def test_stock_pyro_trains_it_from_raw_data(faithful, amortized, loss):
    pyro.set_rng_seed(0)
    gmm = GMM(2, 2, amortized=amortized)
    x = faithful.float()
    gmm.initialize(x, seed=0)
    svi = SVI(gmm.model, gmm.guide, pyro.optim.Adam({"lr": 0.02}), loss)
    losses = [svi.step(x) for _ in range(400)]
    assert math.fsum(losses[-20:]) / 20 < losses[0] - 20
    assert gmm.log_prob(x).sum() > -1160
    if isinstance(loss, TraceEnum_ELBO):  # exact, so a bound at every step
        assert min(losses) > 1130.263
        assert losses[-1] < 1140


def test_the_default_loss_is_exact(faithful):
    gmm = random_gmm()
    loss = gmm.default_loss()
    assert -loss.loss(gmm.model, gmm.guide, faithful) == pytest.approx(gmm.log_prob(faithful).sum().item(), rel=1e-12)


def test_renyi_elbo_of_it_is_finite_and_raises_no_warning(faithful):
    gmm = GMM(2, 2, amortized=True)
    x = faithful.float()
    gmm.initialize(x, seed=0)
    loss = RenyiELBO(alpha=0, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isfinite(loss.loss(gmm.model, gmm.guide, x))


def test_initialize_picks_distant_data_and_depends_on_the_seed_only():
    centres = torch.tensor([[0.0, 0.0], [1e4, 0.0], [0.0, 1.0]])  # features on very different scales
    x = centres.repeat(30, 1) + 1e-3 * torch.randn(90, 2)
    gmm, again = GMM(3, 2), GMM(3, 2)
    gmm.initialize(x, seed=3)
    again.initialize(x, seed=3)
    assert torch.equal(gmm.loc, again.loc)
    assert torch.equal(gmm.scale, again.scale)
    assert {tuple(row.round().abs().tolist()) for row in gmm.loc.detach()} == set(map(tuple, centres.tolist()))

    torch.manual_seed(3)
    again.initialize(x)
    assert torch.equal(gmm.loc, again.loc)
    before = torch.random.get_rng_state()
    gmm.initialize(x, seed=4)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("x", [torch.ones(5, 2), torch.ones(3, 2), torch.tensor([[0.1, 1.0], [0.1, 2.0], [0.1, 9.0]])])
def test_initialize_is_finite_where_data_repeat(covariance, x):
    gmm = GMM(3, 2, covariance=covariance, amortized=True)
    gmm.initialize(x, seed=0)
    assert all(torch.isfinite(value).all() for value in gmm.state_dict().values())
    assert torch.isfinite(gmm.log_prob(x)).all()


def test_num_parameters_counts_the_free_ones():
    assert [GMM(3, 4, covariance=c).num_parameters for c in COVARIANCES] == [44, 24, 26, 17]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: GMM(0, 2), ValueError, "num_components: expected a whole number"),
        (lambda: GMM(2.0, 2), TypeError, "num_components: expected a whole number"),
        (lambda: GMM(2, -1), ValueError, "data_dim: expected a whole number"),
        (lambda: GMM(2, 2, covariance="ful"), ValueError, "Did you mean 'full'"),
        (lambda: GMM(2, 2).log_prob(torch.ones(5, 1)), ValueError, re.escape("expected shape (N, 2); got (5, 1)")),
        (lambda: GMM(2, 2).initialize(torch.ones(5, 3)), ValueError, "expected 2 features"),
        (lambda: GMM(4, 2).initialize(torch.ones(3, 2)), ValueError, "got 3 data for num_components=4"),
        (lambda: GMM(2, 2).initialize(torch.full((5, 2), torch.nan)), ValueError, "NaN"),
    ],
)
def test_errors_name_the_argument_and_the_fix(call, error, match):
    with pytest.raises(error, match=match):
        call()
