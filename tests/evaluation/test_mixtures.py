"""Mixtures: scores against closed forms and scikit-learn; the number of components of data that have one."""

from __future__ import annotations

import json
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn import metrics
from sklearn.mixture import GaussianMixture

import pyrovae as pv
from pyrovae.evaluation.criteria import information_criteria, select_components
from pyrovae.evaluation.measurement import FLOATS_PER_CHUNK, NotApplicable
from pyrovae.evaluation.mixtures import mixture_scores
from pyrovae.models import GMM, IWAE, PPCA, VAE

COVARIANCES = ("full", "tied", "diag", "spherical")


class Coins(pv.Pair):
    """All data have one posterior, ``exact``, and one guide, ``guessed``, over three components."""

    data_dim = 1

    def __init__(self, exact, guessed, one_hot=False):
        super().__init__()
        self.exact, self.guessed = torch.tensor(exact), torch.tensor(guessed)
        self.fn = dist.OneHotCategorical if one_hot else dist.Categorical

    def model(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.fn(self.exact))
            pyro.sample("x", dist.Normal(x.new_zeros(1), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.fn(self.guessed))

    def posterior(self, x):
        return self.fn(self.exact.expand(len(x), -1))


class WrongPosterior(Coins):
    def posterior(self, x):
        return dist.Categorical(torch.ones(len(x), 2))


def blobs(count=150, distance=8.0):
    """Draw from three unit Gaussians in the plane; return data and labels."""
    centres = distance * torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    labels = torch.arange(count) % 3
    return centres[labels] + torch.randn(count, 2), labels


def fitted(num_components=3, covariance="full", seed=0):
    torch.manual_seed(seed)
    x, labels = blobs(distance=3.0)
    gmm = GMM(num_components, 2, covariance=covariance).double()
    pv.fit_em(gmm, x, restarts=3)
    return gmm, x.double(), labels


def permuted(gmm, order):
    twin = GMM(gmm.num_components, gmm.data_dim, covariance=gmm.covariance).double()
    with torch.no_grad():
        twin.weights, twin.scale = gmm.weights[order], gmm.scale[order]
        twin.loc.copy_(gmm.loc[order])
    return twin


# Responsibilities and clusters


@pytest.mark.parametrize("one_hot", [False, True])
def test_scores_equal_their_closed_form(one_hot):
    p, q = (0.5, 0.25, 0.25), (0.7, 0.3, 0.0)
    found = mixture_scores(Coins(p, q, one_hot), torch.zeros(7, 1), labels=[0, 0, 0, 0, 1, 1, 2])
    assert (found.num_data, found.num_components) == (7, 3)
    assert found.entropy == pytest.approx(1.5 * math.log(2))
    assert found.effective_components == pytest.approx(2**1.5)
    assert found.total_variation == pytest.approx(0.25)
    assert found.kl == pytest.approx(0.7 * math.log(1.4) + 0.3 * math.log(1.2), rel=1e-5)
    assert (found.adjusted_rand_index, found.accuracy) == (0, pytest.approx(4 / 7))  # one cluster only


def test_the_guide_costs_the_elbo_its_kl():
    """The KL equals log p(x) − ELBO, with the component summed out of both."""
    gmm = GMM(3, 2, amortized=True).double()
    x = 2 * torch.randn(40, 2).double()
    elbo = -float(gmm.default_loss().loss(gmm.model, gmm.guide, x)) / 40
    found = mixture_scores(gmm, x)
    assert found.kl == pytest.approx(gmm.log_prob(x).mean().item() - elbo, rel=1e-9)
    assert found.kl >= 2 * found.total_variation**2  # Pinsker


def test_clustering_scores_equal_those_of_scikit_learn():
    gmm, x, labels = fitted()
    found = mixture_scores(gmm, x, labels=labels)
    clusters = gmm.posterior(x).probs.argmax(-1).numpy()
    assert found.adjusted_rand_index == pytest.approx(metrics.adjusted_rand_score(labels, clusters))
    nmi = metrics.normalized_mutual_info_score(labels, clusters)
    assert found.normalized_mutual_information == pytest.approx(nmi)
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    best = max(np.mean(np.array(order)[clusters] == labels.numpy()) for order in orders)
    assert found.accuracy == pytest.approx(best)
    assert 0.8 < best < 1
    probs = gmm.posterior(x).probs.detach()
    assert found.entropy == pytest.approx(torch.special.entr(probs).sum(-1).mean().item())
    assert found.effective_components == pytest.approx(torch.special.entr(probs.mean(0)).sum().exp().item())
    assert (found.total_variation, found.kl) == (None, None)  # no guide


def test_names_of_components_and_of_labels_do_not_matter():
    gmm, x, labels = fitted()
    names = np.array(["setosa", "virginica", "other"])[labels]
    first, second = mixture_scores(gmm, x, labels=labels), mixture_scores(permuted(gmm, [2, 0, 1]), x, labels=names)
    assert second.to_dict() == pytest.approx(first.to_dict())
    a, b = (information_criteria(pair, x).to_dict() for pair in (gmm, permuted(gmm, [2, 0, 1])))
    assert a == pytest.approx(b)


def test_more_components_than_labels_and_fewer():
    x, labels = blobs()
    for k, accuracy in ((2, 2 / 3), (4, None)):
        gmm = GMM(k, 2)
        pv.fit_em(gmm, x, restarts=5)
        found = mixture_scores(gmm, x, labels=labels)
        assert found.accuracy == pytest.approx(accuracy) if accuracy else found.accuracy < 1


def test_chunks_do_not_change_the_scores(monkeypatch):
    gmm, x, labels = fitted()
    whole = mixture_scores(gmm, x, labels=labels), information_criteria(gmm, x)
    monkeypatch.setitem(FLOATS_PER_CHUNK, "cpu", 50)
    parts = mixture_scores(gmm, x, labels=labels), information_criteria(gmm, x)
    for a, b in zip(whole, parts, strict=True):
        assert a.to_dict() == pytest.approx(b.to_dict())


def test_scores_read_as_a_table_and_as_json():
    gmm, x, labels = fitted()
    found = mixture_scores(gmm, x, labels=labels)
    assert repr(found).startswith("150 data, 3 components\nentropy of responsibilities")
    assert "guide" not in repr(found)
    assert "guide: KL" in repr(mixture_scores(GMM(3, 2, amortized=True), x.float()))
    assert json.loads(json.dumps(found.to_dict()))["accuracy"] == found.accuracy
    criteria = information_criteria(gmm, x)
    assert repr(criteria).startswith("150 data, 17 free parameters; criteria: lower is better\nlog likelihood")
    assert json.loads(json.dumps(criteria.to_dict()))["icl"] == criteria.icl


# Criteria


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_criteria_equal_those_of_scikit_learn(covariance):
    gmm, x, _ = fitted(covariance=covariance)
    theirs = GaussianMixture(3, covariance_type=covariance)
    theirs.weights_, theirs.means_ = gmm.weights.detach().numpy(), gmm.loc.detach().numpy()
    precision = torch.linalg.inv(gmm.covariance_matrix.detach())
    theirs.precisions_cholesky_ = {
        "full": lambda: torch.linalg.cholesky(precision).numpy(),
        "tied": lambda: torch.linalg.cholesky(precision)[0].numpy(),
        "diag": lambda: precision.diagonal(dim1=-2, dim2=-1).sqrt().numpy(),
        "spherical": lambda: precision[:, 0, 0].sqrt().numpy(),
    }[covariance]()
    theirs.covariances_ = {
        "full": gmm.covariance_matrix,
        "tied": gmm.covariance_matrix[0],
        "diag": gmm.covariance_matrix.diagonal(dim1=-2, dim2=-1),
        "spherical": gmm.covariance_matrix[:, 0, 0],
    }[covariance].detach().numpy()  # fmt: skip
    found = information_criteria(gmm, x)
    assert found.bic == pytest.approx(theirs.bic(x.numpy()), rel=1e-9)
    assert found.aic == pytest.approx(theirs.aic(x.numpy()), rel=1e-9)
    assert found.log_likelihood == pytest.approx(gmm.log_prob(x).sum().item(), rel=1e-12)
    # ICL: the joint of data and most probable components
    joint = gmm.log_prob(x) + gmm.posterior(x).probs.max(-1).values.log()
    assert found.icl == pytest.approx(-2 * joint.sum().item() + found.num_parameters * math.log(150), rel=1e-9)
    assert found.icl > found.bic


def test_pairs_without_components_have_no_icl():
    x = torch.randn(50, 4).double()
    ppca = PPCA(4, 2).double()
    ppca.fit_closed_form(x)
    found = information_criteria(ppca, x, num_parameters=12)
    assert found.icl is None
    assert found.bic == pytest.approx(-2 * ppca.log_prob(x).sum().item() + 12 * math.log(50))
    assert "ICL" not in repr(found)


# Selection


def test_icl_finds_two_clusters_in_old_faithful():
    """ICL charges for overlap and BIC does not: BIC takes three tied components (as in Scrucca et al. 2016)."""
    x = pv.data.load("faithful").train
    makers = {c: lambda k, c=c: GMM(k, 2, covariance=c) for c in ("full", "tied")}
    found = select_components(makers, x, range(1, 5), restarts=5)
    assert (found.best("icl").family, found.best("icl").num_components) == ("full", 2)
    assert (found.best("bic").family, found.best("bic").num_components) == ("tied", 3)
    exact = next(c for c in found.candidates if (c.family, c.num_components) == ("full", 2))
    assert exact.criteria.log_likelihood == pytest.approx(-1130.26396, abs=1e-5)
    assert exact.pair.loc.dtype == torch.float32  # as it was made
    assert information_criteria(exact.pair, x).bic == pytest.approx(exact.criteria.bic, rel=1e-5)


def test_selection_finds_three_clusters():
    x, labels = blobs()
    found = select_components(lambda k: GMM(k, 2), x, range(1, 6), restarts=5)
    assert found.best().num_components == found.best("icl").num_components == 3
    assert mixture_scores(found.best().pair, x, labels=labels).accuracy == 1
    bics = [c.criteria.bic for c in found.candidates if not c.collapsed]
    assert bics == sorted(bics)


def test_collapsed_fits_are_flagged_and_never_chosen():
    """On five equal rows a component has infinite density but for the floor, and the best criteria by far."""
    x = torch.cat([torch.randn(40, 1), torch.full((5, 1), 9.0)])
    found = select_components(lambda k: GMM(k, 1), x, (1, 2), restarts=5)
    (two,) = (c for c in found.candidates if c.num_components == 2)
    assert two.collapsed
    assert two.criteria.bic < found.best().criteria.bic
    assert found.candidates[-1] is two
    assert all(c.num_components == 1 for c in found.winners().values())
    assert "not chosen: collapsed components" in repr(found)
    assert found.to_dict()["candidates"][-1]["collapsed"] == list(two.collapsed)
    hopeless = select_components(lambda k: GMM(k, 1), x, [2], restarts=5)
    with pytest.raises(ValueError, match="criterion: no fit has a BIC to choose by"):
        hopeless.best()
    assert hopeless.winners() == {}


@pytest.mark.parametrize("latent_dim", [1, 2, 3, 4])
def test_free_parameters_of_ppca_are_the_dimensions_of_its_covariances(latent_dim):
    """The rank of the map from weights and noise to the covariance leaves the rotations out; the mean has D more."""

    def covariance(weight, noise):
        return weight @ weight.mT + noise * torch.eye(5).double()

    jacobians = torch.func.jacrev(covariance, argnums=(0, 1))(
        torch.randn(5, latent_dim).double(), torch.ones(()).double()
    )
    rank = torch.linalg.matrix_rank(torch.cat([jacobian.reshape(25, -1) for jacobian in jacobians], 1))
    assert PPCA(5, latent_dim).num_parameters == 5 + rank


def test_selection_takes_any_pair_with_em():
    """PPCA counts latent dimensions; it has no categorical posterior, and so no ICL."""
    x = torch.randn(400, 2) @ torch.tensor([[3.0, 0, 1, 0, 2], [0, 2.0, 1, 1, 0]]) + 0.5 * torch.randn(400, 5)
    found = select_components(lambda q: PPCA(5, q), x, range(1, 5), restarts=1)
    assert found.best("bic").num_components == 2
    assert list(found.winners()) == ["bic", "aic"]
    assert "ICL" not in repr(found)
    with pytest.raises(ValueError, match="no fit has"):
        found.best("icl")


def test_same_seed_same_selection_and_the_random_state_stays():
    x, _ = blobs(60)
    before = torch.get_rng_state()
    a, b = (select_components(lambda k: GMM(k, 2), x, (2, 3), restarts=2, seed=4).to_dict() for _ in range(2))
    assert a == b
    assert torch.equal(before, torch.get_rng_state())


def test_selection_reads_as_a_table_and_as_json():
    x, _ = blobs(90)
    makers = {c: lambda k, c=c: GMM(k, 2, covariance=c) for c in ("spherical", "diag")}
    found = select_components(makers, x, (2, 3, 4), restarts=3)
    lines = repr(found).split("\n")
    assert lines[0] == "90 data; criteria: lower is better, * the best"
    assert len(lines) == 2 + 6
    assert repr(found).count("*") == 1 + 3
    assert lines[2].startswith(found.best().family)
    record = json.loads(json.dumps(found.to_dict()))
    assert record["best"]["bic"] == {"family": found.best().family, "num_components": 3}


X = torch.randn(6, 2)


def no_log_prob(k):
    pair = GMM(k, 2)
    pair.log_prob = None
    return pair


class Uncounted(pv.Pair):
    def model(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1), obs=x)

    def log_prob(self, x):
        return dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1).log_prob(x)


@pytest.mark.parametrize(
    ("call", "exception", "match"),
    [
        (lambda: mixture_scores(GMM, X), TypeError, "pair: expected an instance"),
        (lambda: mixture_scores(GMM(2, 3), X), ValueError, "x: expected 3 features"),
        (lambda: mixture_scores(VAE(2, 1, likelihood="normal"), X), NotApplicable, "VAE: it has no posterior"),
        (lambda: mixture_scores(PPCA(2, 1), X), NotApplicable, "PPCA: its posterior.* MultivariateNormal"),
        (lambda: mixture_scores(GMM(2, 2), X, labels=[0, 1]), ValueError, r"labels: expected shape \(6,\)"),
        (lambda: mixture_scores(GMM(2, 2), X, labels=torch.zeros(6)), TypeError, "labels: .*float32"),
        (
            lambda: mixture_scores(WrongPosterior((0.3, 0.3, 0.4), (0.3, 0.3, 0.4)), X[:, :1]),
            ValueError,
            "guide: expected a Categorical over 2 components.*got 3",
        ),
        (lambda: information_criteria(Uncounted(), X), NotApplicable, "Uncounted: .*number of free parameters"),
        (
            lambda: information_criteria(IWAE(2, (1,), hidden_dims=((2,),)), X.sign().clamp(min=0)),
            NotApplicable,
            "IWAE: it has no exact log_prob",
        ),
        (lambda: information_criteria(GMM(2, 2), X, num_parameters=0), ValueError, "num_parameters: "),
        (lambda: select_components(GMM(2, 2), X, [2]), TypeError, "make: expected a function"),
        (lambda: select_components(3, X, [2]), TypeError, "make: expected a function"),
        (lambda: select_components({}, X, [2]), TypeError, "make: expected a function"),
        (lambda: select_components(lambda k: k, X, [2]), TypeError, "make: expected a pyrovae.Pair; got int"),
        (lambda: select_components(lambda k: GMM(k, 2), X, 3), TypeError, "counts: "),
        (lambda: select_components(lambda k: GMM(k, 2), X, []), ValueError, "counts: .*at least one"),
        (lambda: select_components(lambda k: GMM(k, 2), X, [0]), ValueError, "counts: "),
        (lambda: select_components(lambda k: GMM(k, 2), X, [2, 7]), ValueError, "counts: .*6; got 7"),
        (lambda: select_components(lambda k: GMM(k, 2), X, [1], restarts=0), ValueError, "restarts: "),
        (lambda: select_components(lambda k: GMM(k, 2), X[0], [1]), ValueError, "x: expected shape"),
        (lambda: select_components(lambda k: VAE(2, k), X, [1]), TypeError, "VAE has no expected_statistics"),
        (lambda: select_components(no_log_prob, X, [1]), NotApplicable, "GMM: it has no exact log_prob"),
        (
            lambda: select_components(lambda k: GMM(k, 2), X, [1], restarts=1).best("dic"),
            ValueError,
            "criterion: expected one of bic, icl, aic",
        ),
    ],
)
def test_bad_calls_are_refused(call, exception, match):
    with pytest.raises(exception, match=match):
        call()


@pytest.mark.cuda
def test_scores_and_criteria_agree_on_the_gpu():
    gmm, x, labels = fitted()
    for a, b in (
        (mixture_scores(gmm, x, labels=labels, device=d).to_dict() for d in ("cpu", "cuda")),
        (information_criteria(gmm, x, device=d).to_dict() for d in ("cpu", "cuda")),
    ):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert value == (b[name] if value is None else pytest.approx(b[name], rel=1e-9)), name
    found = select_components(lambda k: GMM(k, 2), x, (2, 3), restarts=3, device="cuda")
    assert found.best().pair.loc.device.type == "cpu"
