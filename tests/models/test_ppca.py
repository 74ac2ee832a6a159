"""Probabilistic PCA agrees with the dense Gaussian, the published closed form and scikit-learn."""

import math
import re

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from sklearn.decomposition import PCA
from torch.distributions import MultivariateNormal

import pyrovae as pv
from pyrovae.models.ppca import PPCA

IRIS = {1: (-470.66946, 0.114139), 2: (-404.96278, 0.050682), 3: (-379.91463, 0.023676)}


def random_ppca(data_dim=5, latent_dim=2):
    torch.manual_seed(0)
    ppca = PPCA(data_dim, latent_dim).double()
    for parameter in ppca.parameters():
        parameter.data.normal_()
    return ppca


def marginal(ppca):
    covariance = ppca.weight @ ppca.weight.mT + ppca.noise_variance * torch.eye(ppca.data_dim).double()
    return MultivariateNormal(ppca.loc, covariance)


@pytest.fixture
def iris():
    return pv.data.load("iris").train.double().mul(10).round().div(10)  # float32 holds the one decimal only nearly


@pytest.mark.parametrize(("data_dim", "latent_dim"), [(2, 1), (5, 2), (7, 6)])
def test_log_prob_is_the_dense_gaussian(data_dim, latent_dim):
    ppca = random_ppca(data_dim, latent_dim)
    x = 3 * torch.randn(50, data_dim).double()
    torch.testing.assert_close(ppca.log_prob(x), marginal(ppca).log_prob(x), rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad(ppca.log_prob(x).sum(), [ppca.weight, ppca.loc, ppca.noise_variance_unconstrained])
    theirs = torch.autograd.grad(
        marginal(ppca).log_prob(x).sum(), [ppca.weight, ppca.loc, ppca.noise_variance_unconstrained]
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_log_prob_is_accurate_at_tiny_noise():
    ppca, exact = random_ppca(), random_ppca()
    ppca.noise_variance = exact.noise_variance = torch.tensor(1e-8).double()
    x = torch.randn(50, 2).double() @ ppca.weight.mT + ppca.loc + 1e-4 * torch.randn(50, 5).double()
    torch.testing.assert_close(
        ppca.float().log_prob(x.float()).double().mean(), exact.log_prob(x).mean(), rtol=1e-2, atol=0
    )
    torch.testing.assert_close(exact.log_prob(x), marginal(exact).log_prob(x), rtol=1e-5, atol=0)


def test_posterior_follows_bayes_rule():
    ppca, x = random_ppca(), torch.randn(20, 5).double()
    posterior = ppca.posterior(x)
    assert posterior.batch_shape == (20,)
    z = torch.randn(20, 2).double()
    prior = torch.distributions.Normal(0, 1).log_prob(z).sum(-1)
    likelihood = (
        torch.distributions.Normal(z @ ppca.weight.mT + ppca.loc, ppca.noise_variance.sqrt()).log_prob(x).sum(-1)
    )
    torch.testing.assert_close(
        posterior.log_prob(z), prior + likelihood - marginal(ppca).log_prob(x), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_closed_form_has_the_known_likelihoods_of_iris(iris, latent_dim):
    ppca = PPCA(4, latent_dim).double()
    ppca.fit_closed_form(iris)
    log_likelihood, noise_variance = IRIS[latent_dim]
    assert ppca.log_prob(iris).sum().item() == pytest.approx(log_likelihood, abs=1e-5)
    assert ppca.noise_variance.item() == pytest.approx(noise_variance, abs=1e-6)


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_closed_form_agrees_with_scikit_learn(iris, latent_dim):
    ppca = PPCA(4, latent_dim).double()
    ppca.fit_closed_form(iris)
    theirs = PCA(latent_dim).fit(iris.numpy())
    n = len(iris)  # scikit-learn divides by n − 1
    assert ppca.noise_variance.item() == pytest.approx(theirs.noise_variance_ * (n - 1) / n, rel=1e-10)
    covariance = marginal(ppca).covariance_matrix.detach()
    torch.testing.assert_close(covariance, torch.tensor(theirs.get_covariance()) * (n - 1) / n, rtol=1e-9, atol=1e-10)
    assert ppca.log_prob(iris).sum().item() > theirs.score(iris.numpy()) * n


def test_gradient_vanishes_at_the_closed_form(iris):
    ppca = PPCA(4, 2).double()
    ppca.fit_closed_form(iris)
    gradients = torch.autograd.grad(
        ppca.log_prob(iris).sum(), [ppca.weight, ppca.loc, ppca.noise_variance_unconstrained]
    )
    assert max(g.abs().max().item() for g in gradients) < 1e-8


def test_closed_form_is_right_with_fewer_data_than_features():
    torch.manual_seed(0)
    x = torch.randn(6, 40).double() @ torch.randn(40, 40).double() + 5
    ppca = PPCA(40, 3).double()
    ppca.fit_closed_form(x)
    theirs = PCA(3, svd_solver="full").fit(x.numpy())  # it spreads the noise over the 6 − 3 dimensions it sees
    covariance = (x - x.mean(0)).mT @ (x - x.mean(0)) / 6
    values = torch.linalg.eigvalsh(covariance).flip(0)
    assert ppca.noise_variance.item() == pytest.approx(values[3:].sum().item() / 37, rel=1e-9)
    got = torch.linalg.eigvalsh(marginal(ppca).covariance_matrix.detach()).flip(0)[:3]
    torch.testing.assert_close(got, values[:3], rtol=1e-9, atol=0)
    torch.testing.assert_close(got, torch.tensor(theirs.explained_variance_) * 5 / 6, rtol=1e-9, atol=0)


def test_matched_guide_gives_constant_log_weights(iris):
    ppca = PPCA(4, 2).double()
    ppca.fit_closed_form(iris)
    exact = ppca.log_prob(iris)
    for _ in range(3):
        guide = pyro.poutine.trace(ppca.guide).get_trace(iris)
        model = pyro.poutine.trace(pyro.poutine.replay(ppca.model, guide)).get_trace(iris)
        for trace in (guide, model):
            trace.compute_log_prob()
        weights = model.nodes["z"]["log_prob"] + model.nodes["x"]["log_prob"] - guide.nodes["z"]["log_prob"]
        torch.testing.assert_close(weights, exact, rtol=1e-10, atol=1e-10)
    for loss in (Trace_ELBO(), TraceMeanField_ELBO()):
        assert -loss.loss(ppca.model, ppca.guide, iris) == pytest.approx(exact.sum().item(), rel=1e-10)


@pytest.mark.parametrize("particles", [1, 5])
def test_stock_pyro_trains_it_from_raw_data(particles):
    x = pv.data.load("faithful").train
    exact = PPCA(2, 1)
    exact.fit_closed_form(x)
    evidence = exact.double().log_prob(x.double()).sum().item()

    pyro.set_rng_seed(0)
    ppca = PPCA(2, 1)
    ppca.initialize(x)
    loss = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)
    svi = SVI(ppca.model, ppca.guide, pyro.optim.Adam({"lr": 0.02}), loss)
    losses = [svi.step(x) for _ in range(1000)]
    assert losses[0] > -evidence + 100
    last = torch.tensor(losses[-100:])
    assert -evidence - 3 * last.std() / 10 < last.mean() < -evidence + 30


def test_initialize_depends_on_the_seed_only(iris):
    a, b = PPCA(4, 2), PPCA(4, 2)
    a.initialize(iris, seed=1)
    torch.manual_seed(1)
    b.initialize(iris)
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: PPCA(3, 3), ValueError, "latent_dim: expected a whole number below data_dim=3; got 3"),
        (lambda: PPCA(3, 0), ValueError, "latent_dim: expected a whole number"),
        (lambda: PPCA(3, 1.0), TypeError, "latent_dim: expected a whole number"),
        (lambda: PPCA(3, 1).log_prob(torch.ones(5, 1)), ValueError, re.escape("expected shape (N, 3); got (5, 1)")),
        (lambda: PPCA(3, 1).fit_closed_form(torch.ones(5, 2)), ValueError, "expected 3 features"),
        (lambda: PPCA(3, 1).fit_closed_form(torch.ones(5, 3)), ValueError, "more than latent_dim=1 dimensions"),
        (lambda: PPCA(3, 2).fit_closed_form(torch.randn(3, 3)), ValueError, "Lower latent_dim"),
        (lambda: PPCA(3, 1).initialize(torch.ones(5, 3)), ValueError, "expected data that vary"),
        (lambda: PPCA(3, 1).initialize(torch.full((5, 3), math.inf)), ValueError, "infinite"),
    ],
)
def test_errors_name_the_argument_and_the_fix(call, error, match):
    with pytest.raises(error, match=match):
        call()
