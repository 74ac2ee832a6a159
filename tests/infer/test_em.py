"""Exact EM: the published maxima, monotone ascent, scikit-learn's mixtures, chunks, restarts, collapse."""

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from pyro.infer import Trace_ELBO
from sklearn.mixture import GaussianMixture

import pyrovae as pv
from pyrovae.infer.em import fit_em
from pyrovae.models.gmm import GMM
from pyrovae.models.ppca import PPCA
from pyrovae.pair import FunctionPair

COVARIANCES = ("full", "tied", "diag", "spherical")
FAITHFUL = {
    "full": (-1130.26396, 1e-5),
    "tied": (-1140.1868, 1e-4),
    "diag": (-1147.8064, 1e-4),
    "spherical": (-1709.5293, 1e-4),
}
PPCA_IRIS = {1: (-470.66946, 0.114139), 2: (-404.96278, 0.050682), 3: (-379.91463, 0.023676)}


def load(name):
    """The data as printed: float32 holds their one to three decimals only nearly."""
    return pv.data.load(name).train.double().mul(1000).round().div(1000)


def blobs(n=200, data_dim=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(4, data_dim, generator=generator).double()
    return centres[torch.arange(n) % 4] + torch.randn(n, data_dim, generator=generator).double()


def rises(trace):
    return all(b >= a - 1e-12 * max(abs(a), 1) for a, b in pairwise(trace))


# --- published maxima


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_faithful(covariance):
    x, gmm = load("faithful"), GMM(2, 2, covariance=covariance)
    result = fit_em(gmm, x, restarts=3)
    expected, tolerance = FAITHFUL[covariance]
    assert result.log_likelihood == pytest.approx(expected, abs=tolerance)
    assert result.log_likelihood == result.trace[-1] == max(result.restart_log_likelihoods)
    assert result.converged
    assert result.covariance_floor is None
    assert gmm.log_prob(x.float()).sum().item() == pytest.approx(expected, abs=1e-2)  # the pair is float32
    if covariance == "full":
        order = gmm.weights.argsort()
        np.testing.assert_allclose(gmm.weights[order].tolist(), (0.35587, 0.64413), atol=1e-5)
        np.testing.assert_allclose(gmm.loc[order].tolist(), ((2.03639, 54.47852), (4.28966, 79.96812)), atol=1.5e-5)


def test_one_component_is_the_gaussian_fit():
    x, gmm = load("faithful"), GMM(1, 2).double()
    assert fit_em(gmm, x).log_likelihood == pytest.approx(-1289.7967, abs=1e-4)
    torch.testing.assert_close(gmm.loc[0], x.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(gmm.covariance_matrix[0], torch.cov(x.mT, correction=0), rtol=1e-12, atol=0)


def test_iris_needs_restarts():
    result = fit_em(GMM(3, 4), load("iris"), restarts=10)
    assert result.log_likelihood == pytest.approx(-180.18548, abs=1e-5)
    assert result.covariance_floor is None
    assert min(result.restart_log_likelihoods) < -185


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_ppca_reaches_the_closed_form(latent_dim):
    x, ppca, exact = load("iris"), PPCA(4, latent_dim).double(), PPCA(4, latent_dim).double()
    result = fit_em(ppca, x, tol=1e-14, max_iter=3000)
    log_likelihood, noise_variance = PPCA_IRIS[latent_dim]
    assert result.log_likelihood == pytest.approx(log_likelihood, abs=1e-5)
    assert ppca.noise_variance.item() == pytest.approx(noise_variance, abs=1e-6)
    assert rises(result.trace)
    exact.fit_closed_form(x)
    torch.testing.assert_close(ppca.log_prob(x), exact.log_prob(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ppca.loc, exact.loc, rtol=1e-8, atol=0)
    assert result.log_likelihood <= exact.log_prob(x).sum().item() + 1e-9


def test_ppca_learns_the_mean_from_a_wrong_one_and_matches_its_guide():
    x, ppca = load("iris"), PPCA(4, 2).double()
    ppca.loc.data += 50
    result = fit_em(ppca, x, initialize=False, tol=1e-13, max_iter=5000)
    assert result.log_likelihood == pytest.approx(PPCA_IRIS[2][0], abs=1e-5)
    assert -Trace_ELBO().loss(ppca.model, ppca.guide, x) == pytest.approx(result.log_likelihood, rel=1e-9)


# --- the theorem, and what must not change the numbers


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_log_likelihood_never_falls_and_chunks_do_not_matter(covariance, seed):
    x = blobs(seed=seed)
    result = fit_em(GMM(4, 3, covariance=covariance), x, seed=seed, max_iter=60)
    assert rises(result.trace)
    assert result.trace[-1] > result.trace[0]
    for chunk_size in (1, 64):
        chunked = fit_em(GMM(4, 3, covariance=covariance), x, seed=seed, max_iter=10, chunk_size=chunk_size)
        np.testing.assert_allclose(chunked.trace, result.trace[: len(chunked.trace)], rtol=1e-10)


def test_ppca_chunks_do_not_matter():
    x = blobs(data_dim=6)
    results = [fit_em(PPCA(6, 2), x, max_iter=60, chunk_size=chunk_size) for chunk_size in (None, 33)]
    np.testing.assert_allclose(results[1].trace, results[0].trace, rtol=1e-12)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_batched_restarts_are_the_looped_ones(covariance):
    x = load("iris")
    options = {"max_iter": 80, "tol": 1e-8}
    gmm = GMM(3, 4, covariance=covariance).double()
    together = fit_em(gmm, x, restarts=6, seed=5, **options)
    apart = []
    for seed in range(5, 11):
        single = GMM(3, 4, covariance=covariance).double()
        apart.append((fit_em(single, x, seed=seed, **options), single))
    np.testing.assert_allclose(
        together.restart_log_likelihoods, [result.log_likelihood for result, _ in apart], rtol=1e-9
    )
    best, single = max(
        (pair for pair in apart if pair[0].covariance_floor is None), key=lambda pair: pair[0].log_likelihood
    )
    assert together.iterations == best.iterations
    np.testing.assert_allclose(together.trace, best.trace, rtol=1e-9)
    torch.testing.assert_close(gmm.loc, single.loc, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gmm.scale, single.scale, rtol=1e-6, atol=1e-8)


def test_statistics_far_from_the_origin_do_not_cancel():
    x = blobs()
    near, far = GMM(4, 3).double(), GMM(4, 3).double()
    a, b = fit_em(near, x, max_iter=30), fit_em(far, x + 1e7, max_iter=30)
    np.testing.assert_allclose(b.trace, a.trace, rtol=1e-5)
    torch.testing.assert_close(far.covariance_matrix, near.covariance_matrix, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_scikit_learn_from_the_same_start(covariance):
    x = blobs(400)
    gmm = GMM(4, 3, covariance=covariance).double()
    gmm.initialize(x, seed=0)
    precisions = torch.linalg.inv(gmm.covariance_matrix.detach())
    theirs = GaussianMixture(
        4,
        covariance_type=covariance,
        reg_covar=0,
        tol=1e-13,
        max_iter=2000,
        weights_init=gmm.weights.detach().numpy(),
        means_init=gmm.loc.detach().numpy(),
        precisions_init={
            "full": precisions,
            "tied": precisions[0],
            "diag": precisions.diagonal(dim1=-2, dim2=-1),
            "spherical": precisions[:, 0, 0],
        }[covariance].numpy(),
    ).fit(x.numpy())
    result = fit_em(gmm, x, initialize=False, tol=1e-13, max_iter=2000)
    assert result.log_likelihood == pytest.approx(theirs.score(x.numpy()) * len(x), rel=1e-9)
    np.testing.assert_allclose(gmm.posterior(x).probs.detach(), theirs.predict_proba(x.numpy()), atol=1e-4)
    assert gmm.num_parameters == theirs._n_parameters()


def test_going_on_from_where_it_stopped_is_one_run():
    x = blobs()
    gmm = GMM(4, 3).double()
    whole = fit_em(GMM(4, 3), x, max_iter=20, tol=0)
    first = fit_em(gmm, x, max_iter=8, tol=0)
    second = fit_em(gmm, x, max_iter=12, tol=0, initialize=False)
    assert (first.iterations, first.converged) == (8, False)
    np.testing.assert_allclose(first.trace + second.trace[1:], whole.trace, rtol=1e-12)


def test_same_seed_same_fit_and_no_random_number_is_taken():
    x = blobs().float()
    a, b = GMM(4, 3), GMM(4, 3)
    before = torch.random.get_rng_state()
    fit_em(a, x, restarts=2, max_iter=5)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(3)
    fit_em(b, x, restarts=2, max_iter=5)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert a.loc.dtype == torch.float32
    assert a.loc.requires_grad


def test_an_amortized_pair_keeps_its_network():
    gmm = GMM(2, 3, amortized=True)
    before = [p.clone() for p in gmm.encoder.parameters()]
    fit_em(gmm, blobs(), restarts=2, max_iter=5)
    assert all(torch.equal(p, q) for p, q in zip(gmm.encoder.parameters(), before, strict=True))


def test_the_result_says_it_in_a_line():
    result = fit_em(GMM(2, 2), load("faithful"), restarts=2)
    assert "log likelihood -1130.2640 nats (-4.1554 per datum), converged after" in str(result)
    assert "best of 2 restarts" in str(result)
    assert "NOT converged" in str(fit_em(GMM(2, 2), load("faithful"), max_iter=1))


# --- collapse


@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_duplicates_are_held_at_the_floor(covariance, restarts):
    x = torch.cat([torch.full((20, 2), 5.0), torch.randn(100, 2, generator=torch.Generator().manual_seed(0))]).double()
    gmm = GMM(2, 2, covariance=covariance).double()
    result = fit_em(gmm, x, restarts=restarts)
    assert rises(result.trace)
    assert all(torch.isfinite(value).all() for value in gmm.state_dict().values())
    if covariance == "tied":  # shared with the others: healthy
        assert result.covariance_floor is None
        return
    assert result.covariance_floor.fraction == 1e-6
    (component,) = result.covariance_floor.components
    assert gmm.weights[component].item() == pytest.approx(20 / 120, abs=1e-6)
    unit = x.var(0, correction=0)
    unit = unit.mean().expand(2) if covariance == "spherical" else unit
    variances = gmm.covariance_matrix[component].diagonal()
    torch.testing.assert_close(variances, 1e-6 * unit, rtol=1e-6, atol=0)
    assert f"collapsed components, held at 1e-06 of the data's variance: {component}" in str(result)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize(
    "x",
    [
        torch.full((6, 2), 0.1),  # all equal
        torch.tensor([[0.0, 1.0], [1.0, 3.0], [2.0, 0.5]]),  # a component a point
        torch.stack([torch.arange(30.0), 2 * torch.arange(30.0)], 1),  # on a line
        torch.stack([torch.arange(30.0), torch.full((30,), 0.1)], 1),  # a constant feature
    ],
    ids=["equal", "points", "line", "constant feature"],
)
def test_singular_data_fit_without_nan(covariance, x):
    gmm = GMM(3, 2, covariance=covariance)
    result = fit_em(gmm, x, restarts=4, max_iter=100)
    assert math.isfinite(result.log_likelihood)
    assert rises(result.trace)
    assert all(torch.isfinite(value).all() for value in gmm.state_dict().values())


def test_a_healthy_restart_beats_a_collapsed_one():
    result = fit_em(GMM(3, 4), load("iris"), restarts=10)
    assert max(result.restart_log_likelihoods) > result.log_likelihood + 10
    assert result.covariance_floor is None


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_an_empty_component_stays_where_it_is(covariance):
    x, gmm = blobs(), GMM(2, 3, covariance=covariance).double()
    gmm.initialize(x, seed=0)
    gmm.loc.data[1] = 1e6
    scale = gmm.scale.detach().clone()
    result = fit_em(gmm, x, initialize=False)
    assert rises(result.trace)
    assert gmm.weights[1] < 1e-29
    assert (gmm.loc[1] == 1e6).all()
    assert result.covariance_floor is None
    if covariance != "tied":
        torch.testing.assert_close(gmm.scale[1], scale[1])
    one = fit_em(GMM(1, 3, covariance=covariance), x)
    assert result.log_likelihood == pytest.approx(one.log_likelihood, rel=1e-9)


def test_a_start_below_the_floor_is_raised_to_it():
    x, gmm = torch.cat([torch.zeros(20, 2), blobs(50, 2) + 9]).double(), GMM(2, 2).double()
    gmm.loc.data = torch.tensor([[0.0, 0.0], [9.0, 9.0]]).double()
    gmm.scale = torch.stack([1e-9 * torch.eye(2), 3 * torch.eye(2)]).double()
    result = fit_em(gmm, x, initialize=False)
    assert result.trace[1] < result.trace[0]  # as SVI may leave it: no floor there
    assert rises(result.trace[1:])
    assert result.covariance_floor.components == (0,)


def test_ppca_on_data_without_noise():
    x = torch.randn(50, 1).double() @ torch.ones(1, 3).double()
    ppca = PPCA(3, 1).double()
    result = fit_em(ppca, x)
    assert math.isfinite(result.log_likelihood)
    assert rises(result.trace)


# --- failures


class Falling(GMM):
    def maximize(self, statistics):
        super().maximize(statistics)
        self.loc.data = self.loc + 0.5


class Overflowing(GMM):
    def expected_statistics(self, x):
        statistics = super().expected_statistics(x)
        return {**statistics, "log_likelihood": statistics["log_likelihood"] * torch.nan}


@pytest.mark.parametrize(
    ("pair", "match"), [(Falling, "Falling.expected_statistics or maximize is wrong"), (Overflowing, "is nan after 0")]
)
def test_a_failure_is_an_error_and_leaves_the_pair(pair, match):
    gmm = pair(2, 2)
    before = {name: value.clone() for name, value in gmm.state_dict().items()}
    with pytest.raises(RuntimeError, match=match):
        fit_em(gmm, load("faithful"))
    assert all(torch.equal(before[name], value) for name, value in gmm.state_dict().items())


X = torch.randn(10, 2)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: fit_em(GMM(2, 2), torch.ones(5, 3)), ValueError, "expected 2 features"),
        (lambda: fit_em(GMM(2, 2), torch.ones(5, 2).long()), TypeError, "floating-point"),
        (lambda: fit_em(GMM(2, 2), X / 0), ValueError, "NaN or infinite"),
        (lambda: fit_em(GMM(2, 2), X[:0]), ValueError, "at least one datum"),
        (lambda: fit_em(GMM(4, 2), X[:3]), ValueError, "got 3 data for num_components=4"),
        (lambda: fit_em(GMM(4, 2), X[:3], initialize=False), ValueError, "got 3 data for num_components=4"),
        (lambda: fit_em(GMM(2, 2), X, max_iter=0), ValueError, "max_iter"),
        (lambda: fit_em(GMM(2, 2), X, restarts=0), ValueError, "restarts"),
        (lambda: fit_em(GMM(2, 2), X, restarts=2, initialize=False), ValueError, "restarts: expected 1"),
        (lambda: fit_em(GMM(2, 2), X, tol=-1), ValueError, "tol"),
        (lambda: fit_em(GMM(2, 2), X, tol=math.nan), ValueError, "tol"),
        (lambda: fit_em(GMM(2, 2), X, tol="small"), TypeError, "tol"),
        (lambda: fit_em(GMM(2, 2), X, chunk_size=0), ValueError, "chunk_size"),
        (lambda: fit_em(GMM(2, 2), X, dtype=torch.int64), TypeError, "dtype"),
        (lambda: fit_em(GMM(2, 2), X, device="gpu"), ValueError, "device"),
        (lambda: fit_em(GMM(2, 2), X, device="cuda:99"), ValueError, "device"),
        (lambda: fit_em(FunctionPair(print, print), X), TypeError, "has no expected_statistics and no maximize"),
    ],
)
def test_bad_calls(call, error, match):
    with warnings.catch_warnings(), pytest.raises(error, match=match):
        call()
