"""kl_decomposition against quadrature, closed forms, sums over categories, and theorems."""

from __future__ import annotations

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrovae as pv
from pyrovae.evaluation.decomposition import kl_decomposition
from pyrovae.evaluation.measurement import FLOATS_PER_CHUNK, NotApplicable

NUM_SE = 5  # standard errors allowed in statistical tests
PARTS = ("kl", "mutual_information", "marginal_kl", "total_correlation", "dimension_wise_kl")


class Encoded(pv.Pair):
    """z ~ N(0, I); q(z | x) = N(gain · x, scale²): the data are the means of the guide."""

    def __init__(self, latent_dim=1, *, scale=0.6, gain=1.0):
        super().__init__()
        self.data_dim, self.scale, self.gain = latent_dim, scale, gain

    def prior(self, x):
        return dist.Normal(x.new_zeros(self.data_dim), 1.0).to_event(1)

    def encoded(self, x):
        return dist.Normal(self.gain * x, self.scale).to_event(1)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(x))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encoded(x))


class Positive(Encoded):
    """The pair ``Encoded`` with exp(z) as its latent."""

    def prior(self, x):
        return dist.LogNormal(x.new_zeros(self.data_dim), 1.0).to_event(1)

    def encoded(self, x):
        return dist.LogNormal(self.gain * x, self.scale).to_event(1)


class Tilted(Encoded):
    """The pair ``Encoded`` with a guide of full covariance."""

    tril = ((0.7, 0.0), (0.5, 0.4))

    def encoded(self, x):
        return dist.MultivariateNormal(x, scale_tril=torch.tensor(self.tril).to(x))


class Elements(Encoded):
    """The pair ``Encoded`` with a plate for the dimensions of z in place of an event dim."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            with pyro.plate("dimensions", self.data_dim, dim=-2):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.mT, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("dimensions", self.data_dim, dim=-2), pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.mT, self.scale))


class Chain(pv.Pair):
    """z2 ~ N(0, 1), z1 ~ N(z2, 1); q = N(z1 | x, 0.5²) N(z2 | z1 / 2 + skip · x, 0.7²)."""

    data_dim = 1

    def __init__(self, skip=0.0):
        super().__init__()
        self.skip = skip

    def model(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x, 0.5).to_event(1))
            pyro.sample("z2", dist.Normal(0.5 * z1 + self.skip * x, 0.7).to_event(1))

    def log_joint(self, z1, z2, x):
        return normal(z1, x, 0.5) + normal(z2, 0.5 * z1 + self.skip * x, 0.7)

    def log_prior(self, z1, z2):
        return normal(z2, 0.0, 1.0) + normal(z1, z2, 1.0)


class TwoLatents(pv.Pair):
    """Two independent latents; the second is a scalar."""

    data_dim = 2

    def model(self, x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(x.new_zeros(()), 2.0))
            pyro.sample("x", dist.Normal(torch.cat([a, b.unsqueeze(-1)], -1), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(x[:, :1], 0.6).to_event(1))
            pyro.sample("b", dist.Normal(x[:, 1], 0.6))


class MixturePrior(Encoded):
    """z ~ ½ N(−1, 0.5²) + ½ N(1, 0.5²), by a component that the model marks for enumeration; x depends on both."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=x.new_zeros(2)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal((2.0 * y - 1).unsqueeze(-1), 0.5).to_event(1))
            pyro.sample("x", dist.Normal(z + y.unsqueeze(-1), 1.0).to_event(1), obs=x)


class Discrete(pv.Pair):
    """z ~ Categorical(weights); q(z | x) = Categorical(probs = x): the data are the guide's probabilities."""

    def __init__(self, weights, *, one_hot=False):
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights))
        self.data_dim, self.family = len(weights), dist.OneHotCategorical if one_hot else dist.Categorical

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.family(self.weights))
            loc = z if z.dtype.is_floating_point else nn.functional.one_hot(z, self.data_dim).to(x)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.family(x))


# What the parts should be, by quadrature in float64


def normal(z, loc, scale):
    return -0.5 * ((z - loc) / scale) ** 2 - math.log(scale * math.sqrt(2 * math.pi))


def grid(points=4001, limit=20.0):
    return torch.linspace(-limit, limit, points, dtype=torch.float64)


def integrate(log_q, log_p, cell):
    """Return (kl, mutual_information, marginal_kl) from log q(z | x_n), (N, points), and log p(z), (points,)."""
    aggregate = log_q.logsumexp(0) - math.log(len(log_q))
    mean = lambda ratio: float((log_q.exp() * ratio).sum() * cell / len(log_q))  # noqa: E731
    return mean(log_q - log_p), mean(log_q - aggregate), mean(aggregate - log_p)


def quadrature_1d(means, scale, prior_scale=1.0):
    z = grid()
    return integrate(normal(z, means.double().unsqueeze(1), scale), normal(z, 0.0, prior_scale), float(z[1] - z[0]))


def plane(points=301, limit=7.0):
    z = grid(points, limit)
    a, b = (t.flatten() for t in torch.meshgrid(z, z, indexing="ij"))
    return a, b, float(z[1] - z[0]) ** 2


def near(found, part, exact):
    error = found.stderr[part]
    assert error > 0
    assert abs(getattr(found, part) - exact) < NUM_SE * error, part


def near_each(found, expected):
    for part, exact in zip(PARTS, expected, strict=False):
        near(found, part, exact)


# Against exact answers


@pytest.mark.parametrize("scale", [0.3, 1.5])
def test_one_dimension_against_quadrature(scale):
    x = 1.2 * torch.randn(40, 1)
    found = kl_decomposition(Encoded(scale=scale), x, num_samples=200)
    kl, information, marginal = quadrature_1d(x[:, 0], scale)
    near_each(found, (kl, information, marginal))
    assert found.total_correlation == pytest.approx(0, abs=1e-6)  # of one dimension
    assert found.dimension_wise_kl == pytest.approx(found.marginal_kl, abs=1e-6)
    assert found.mutual_information_per_dimension == pytest.approx([found.mutual_information], abs=1e-6)
    # And the KL in closed form.
    assert kl == pytest.approx(float(0.5 * (scale**2 + x.double().square().mean() - 1) - math.log(scale)), abs=1e-6)


@pytest.mark.parametrize("pair", [Encoded(2), Tilted(2)], ids=["factorised", "full covariance"])
def test_two_dimensions_against_quadrature(pair):
    """Perfectly correlated means have a total correlation, also where the guide itself correlates the dimensions."""
    x = torch.linspace(-2, 2, 9).unsqueeze(-1) * torch.tensor([1.0, -0.5])
    found = kl_decomposition(pair, x, num_samples=500)
    a, b, cell = plane()
    fn = pair.encoded(x.double().unsqueeze(1))
    log_q = fn.log_prob(torch.stack([a, b], -1))
    log_p = normal(a, 0.0, 1.0) + normal(b, 0.0, 1.0)
    kl, information, marginal = integrate(log_q, log_p, cell)
    scales = fn.stddev[0, 0].tolist()
    each = [quadrature_1d(x[:, j], scales[j]) for j in range(2)]
    near_each(found, (kl, information, marginal, marginal - each[0][2] - each[1][2], each[0][2] + each[1][2]))
    assert found.total_correlation > 0.05
    for part, column in (("mutual_information_per_dimension", 1), ("marginal_kl_per_dimension", 2)):
        for j in range(2):
            assert abs(getattr(found, part)[j] - each[j][column]) < NUM_SE * found.stderr[part][j]


def test_information_of_guides_far_apart_is_log_n():
    """Where the guides lie far apart, z names its datum: the information is log N, without error."""
    x = 100 * torch.arange(12.0).unsqueeze(-1)
    found = kl_decomposition(Encoded(), x, num_samples=2)
    assert found.mutual_information == pytest.approx(math.log(12), rel=1e-6)
    assert found.stderr["mutual_information"] < 1e-6
    assert any("near log N = 2.485" in note for note in found.notes)


def test_guide_equal_to_the_prior_tells_nothing():
    found = kl_decomposition(Encoded(3, scale=1.0, gain=0.0), torch.randn(30, 3))
    for part in PARTS:
        assert getattr(found, part) == pytest.approx(0, abs=1e-5)
    assert not any("log N" in note for note in found.notes)


def test_guide_that_ignores_the_data_has_only_a_marginal_kl():
    found = kl_decomposition(Encoded(2, scale=0.5, gain=0.0), torch.randn(30, 2), num_samples=100)
    assert found.mutual_information == pytest.approx(0, abs=1e-5)
    assert found.total_correlation == pytest.approx(0, abs=1e-5)
    near(found, "marginal_kl", 2 * (0.5 * (0.25 - 1) - math.log(0.5)))


def test_negative_estimates_are_reported_and_noted():
    """With two draws each of a guide close to the prior, some estimates must come out negative."""
    found = [kl_decomposition(Encoded(scale=0.97), 0.01 * torch.randn(5, 1), num_samples=2, seed=s) for s in range(20)]
    assert {one.kl < 0 for one in found} == {True, False}
    for one in found:
        noted = any("below 0 by Monte Carlo error; the quantity is not: KL from the prior" in n for n in one.notes)
        assert noted == (one.kl < 0)


def test_independent_means_have_no_total_correlation():
    """For data on a product grid the aggregate factorises at every point, so there is no Monte Carlo error either."""
    x = torch.cartesian_prod(torch.tensor([-1.0, 1.0]), torch.tensor([-2.0, 0.0, 2.0]))
    found = kl_decomposition(Encoded(2), x, num_samples=20)
    assert found.total_correlation == pytest.approx(0, abs=1e-6)
    assert found.mutual_information == pytest.approx(sum(found.mutual_information_per_dimension), abs=1e-6)


def test_chained_latents_against_quadrature():
    pair, x = Chain(skip=0.8), torch.randn(10, 1)
    found = kl_decomposition(pair, x, num_samples=400)
    z1, z2, cell = plane()
    log_q = pair.log_joint(z1, z2, x.double())
    near_each(found, integrate(log_q, pair.log_prior(z1, z2), cell))
    near(found.latents["z1"], "mutual_information", quadrature_1d(x[:, 0], 0.5)[1])
    assert list(found.latents) == ["z1"]  # z2 depends on z1
    assert found.total_correlation is None
    assert found.latents["z1"].kl is None  # its prior depends on z2


@pytest.mark.parametrize("pair", [Chain(), pv.models.IWAE(1, (4, 3), hidden_dims=((5,), (5,)))], ids=["Chain", "IWAE"])
def test_deeper_layers_of_a_chain_add_no_information(pair):
    """q(z2 | z1) does not see x: it cancels in q(z1, z2 | x) / q(z1, z2), and I(n; z1, z2) = I(n; z1), draw by draw."""
    found = kl_decomposition(pair, torch.rand(30, 1).round(), num_samples=5)
    assert found.mutual_information == pytest.approx(found.latents["z1"].mutual_information, abs=1e-5)
    assert found.kl > found.mutual_information


def test_separate_latents_against_quadrature():
    x = torch.randn(20, 2)
    found = kl_decomposition(TwoLatents(), x, num_samples=200)
    near_each(found.latents["a"], quadrature_1d(x[:, 0], 0.6))
    near_each(found.latents["b"], quadrature_1d(x[:, 1], 0.6, prior_scale=2.0))
    assert found.kl == pytest.approx(sum(parts.kl for parts in found.latents.values()), abs=1e-5)
    a, b, cell = plane()
    x = x.double()
    log_q = normal(a, x[:, :1], 0.6) + normal(b, x[:, 1:], 0.6)
    near_each(found, integrate(log_q, normal(a, 0.0, 1.0) + normal(b, 0.0, 2.0), cell))


def test_information_does_not_depend_on_coordinates():
    """exp is a bijection of each dimension: all parts stay as they are, draw by draw."""
    x = torch.randn(15, 2)
    plain, positive = (kl_decomposition(pair, x) for pair in (Encoded(2), Positive(2)))
    for part in PARTS:
        assert getattr(positive, part) == pytest.approx(getattr(plain, part), abs=1e-4)


def test_enumerated_component_is_summed_out_of_the_prior():
    x = torch.randn(10, 1)
    found = kl_decomposition(MixturePrior(), x, num_samples=400)
    z = grid()
    log_p = torch.logaddexp(normal(z, -1.0, 0.5), normal(z, 1.0, 0.5)) - math.log(2)
    log_q = normal(z, x.double(), 0.6)
    near_each(found, integrate(log_q, log_p, float(z[1] - z[0])))
    assert found.dimension_wise_kl is None  # given its component, this prior is not one distribution


def test_plate_inside_a_datum_counts_as_dimensions():
    x = torch.randn(12, 2)
    found = kl_decomposition(Elements(2), x, num_samples=300)
    vector = kl_decomposition(Encoded(2), x, num_samples=300)
    for part in PARTS:
        error = math.hypot(found.stderr[part], vector.stderr[part])
        assert abs(getattr(found, part) - getattr(vector, part)) < NUM_SE * error
    assert len(found.mutual_information_per_dimension) == 2


@pytest.mark.parametrize("one_hot", [False, True])
def test_discrete_latent_is_summed_exactly(one_hot):
    weights = [0.5, 0.3, 0.2]
    x = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.0, 1.0, 0.0]])
    # A Categorical keeps its probabilities off 0 by the rounding unit, so 0 counts as 1e-7.
    found = kl_decomposition(Discrete(weights, one_hot=one_hot), x)
    q, p = x.double(), torch.tensor(weights, dtype=torch.float64)
    aggregate = q.mean(0)
    assert found.kl == pytest.approx(float((torch.xlogy(q, q) - q * p.log()).sum() / 3), abs=1e-5)
    assert found.mutual_information == pytest.approx(
        float((torch.xlogy(q, q) - q * aggregate.log()).sum() / 3), abs=1e-5
    )
    assert found.marginal_kl == pytest.approx(float((aggregate * (aggregate / p).log()).sum()), abs=1e-5)
    assert found.num_samples == 0
    assert set(found.stderr.values()) == {0.0}
    assert "exact sums over z" in repr(found)


def test_amortized_mixture_is_exact():
    pair = pv.models.GMM(3, 2, amortized=True)
    x = torch.randn(50, 2)
    found = kl_decomposition(pair, x)
    q = pair.encoder(x).softmax(-1).detach().double()
    aggregate = q.mean(0)
    assert found.mutual_information == pytest.approx(float((q * (q / aggregate).log()).sum() / 50), abs=1e-6)
    assert found.marginal_kl == pytest.approx(float((aggregate * (aggregate * 3).log()).sum()), abs=1e-6)


# What holds whatever the pair


@pytest.mark.parametrize(
    ("pair", "x"),
    [
        (pv.models.VAE(6, 4, hidden_dims=(5,)), torch.ones(20, 6)),
        (pv.models.PPCA(6, 2), torch.randn(20, 6)),
        (pv.models.IWAE(6, (3, 2), hidden_dims=((5,), (5,))), torch.ones(20, 6)),
        (pv.models.GMM(2, 6, amortized=True), torch.randn(20, 6)),
        (TwoLatents(), torch.randn(20, 2)),
    ],
    ids=["VAE", "PPCA", "IWAE", "GMM", "TwoLatents"],
)
def test_parts_add_up(pair, x):
    found = kl_decomposition(pair, x)
    for parts in (found, *found.latents.values()):
        if parts.kl is not None:
            assert parts.kl == pytest.approx(parts.mutual_information + parts.marginal_kl, abs=1e-9)
        if parts.dimension_wise_kl is not None:
            total = parts.total_correlation + parts.dimension_wise_kl
            assert parts.marginal_kl == pytest.approx(total, abs=1e-9)
            assert parts.dimension_wise_kl == pytest.approx(sum(parts.marginal_kl_per_dimension), abs=1e-5)
        assert parts.mutual_information <= math.log(20) + 1e-6
    json.dumps(found.to_dict(), allow_nan=False)
    assert "mutual information" in repr(found)


def test_kl_agrees_with_evaluate():
    pair, x = pv.models.VAE(6, 4, hidden_dims=(5,)), torch.rand(100, 6).round()
    found, scores = kl_decomposition(pair, x, num_samples=100), pv.evaluate(pair, x, num_samples=2000)
    assert abs(found.kl - scores.kl) < NUM_SE * found.stderr["kl"]


@pytest.mark.parametrize("pair", [Encoded(2), Chain(skip=0.5)], ids=["one layer", "chain"])
def test_number_of_blocks_does_not_change_the_numbers(pair, monkeypatch):
    x = torch.randn(23, pair.data_dim)
    whole = kl_decomposition(pair, x)
    monkeypatch.setitem(FLOATS_PER_CHUNK, "cpu", 2000)  # a few data at a time, and a rest
    blocks = kl_decomposition(pair, x)
    for part in PARTS[:3]:
        assert getattr(blocks, part) == pytest.approx(getattr(whole, part), abs=1e-6)


def test_the_seed_decides_the_numbers():
    pair, x = Encoded(2), torch.randn(10, 2)
    state = torch.get_rng_state()
    first, second, other = (kl_decomposition(pair, x, seed=seed).kl for seed in (1, 1, 2))
    assert first == second != other
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.cuda
def test_cuda_agrees_with_the_cpu():
    x = torch.randn(50, 2)
    for pair in (Encoded(2), Chain(skip=0.5)):
        data = x[:, : pair.data_dim]
        found = [kl_decomposition(pair, data, num_samples=100, device=device) for device in ("cpu", "cuda")]
        for part in PARTS[:3]:
            error = math.hypot(*(one.stderr[part] for one in found))
            assert abs(getattr(found[0], part) - getattr(found[1], part)) < NUM_SE * error


@pytest.mark.parametrize("max_data", [2000, 10], ids=["all data", "a subset"])
@pytest.mark.slow
def test_stated_errors_cover_the_truth(max_data):
    """Over 200 seeds, (estimate − exact) / stderr has mean 0 and variance 1."""
    x = torch.linspace(-2, 2, 30).unsqueeze(-1) * torch.tensor([1.0, 0.5])
    pair = Encoded(2)
    a, b, cell = plane()
    log_q = pair.encoded(x.double().unsqueeze(1)).log_prob(torch.stack([a, b], -1))
    kl, information, marginal = integrate(log_q, normal(a, 0.0, 1.0) + normal(b, 0.0, 1.0), cell)
    each = sum(quadrature_1d(x[:, j], 0.6)[2] for j in range(2))
    exact = torch.tensor([kl, information, marginal, marginal - each, each])
    found = [kl_decomposition(pair, x, num_samples=20, max_data=max_data, seed=seed) for seed in range(200)]
    value = torch.tensor([[getattr(one, part) for part in PARTS] for one in found])
    error = torch.tensor([[one.stderr[part] for part in PARTS] for one in found])
    score = (value - exact) / error
    assert (score.mean(0).abs() < NUM_SE * score.std(0) / math.sqrt(200)).all()
    # The errors themselves are estimated: a t statistic, of at least 9 degrees of freedom, is a little wider.
    assert (score.var(0) < 9 / 7 + NUM_SE * math.sqrt(3 / 200)).all()
    assert (score.var(0) > 1 - NUM_SE * math.sqrt(2 / 200)).all()
    covered = (score.abs() < 1.96).float().mean(0)
    assert (covered > 0.925 - 4 * math.sqrt(0.05 * 0.95 / 200)).all()  # t(9) covers 92.5 %


def test_subset_of_the_data_is_named():
    x = torch.randn(40, 1)
    found = kl_decomposition(Encoded(), x, num_samples=100, max_data=15)
    near_each(found, quadrature_1d(x[:, 0], 0.6))  # the aggregate is of all 40
    assert (found.num_data, found.num_drawn) == (40, 15)
    assert any("random subset of 15 of the 40 data" in note for note in found.notes)
    assert "of 15 of them" in repr(found)


# What it refuses


class Global(Encoded):
    def model(self, x):
        pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        super().model(x)

    def guide(self, x):
        pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        super().guide(x)


class PointMass(Encoded):
    def encoded(self, x):
        return dist.Delta(x).to_event(1)


class Auxiliary(Encoded):
    def guide(self, x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(x, 1.0).to_event(1), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(u, 1.0).to_event(1))


class ConditionalPrior(Encoded):
    def prior(self, x):
        return dist.Normal(x, 1.0).to_event(1)


class Masked(Encoded):
    def guide(self, x):
        with pyro.poutine.mask(mask=x[:, 0] > 0):
            super().guide(x)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (pv.models.GMM(2, 2), "does not apply to GMM: its guide samples no latent"),
        (Global(2), "'mu' lies outside the plate 'data'"),
        (PointMass(2), "all its mass on one value of 'z'"),
        (Auxiliary(2), "site 'u' is auxiliary"),
        (ConditionalPrior(2), "the prior of 'z' depends on x"),
        (Masked(2), "latent 'z' has a mask"),
    ],
)
def test_pairs_without_a_decomposition_are_refused(pair, message):
    with pytest.raises(NotApplicable, match=message):
        kl_decomposition(pair, torch.randn(10, 2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples: expected a whole number, 1 or more"),
        ({"num_samples": 1}, ValueError, "num_samples: expected 2 or more, for a standard error; got 1"),
        ({"num_samples": 2.5}, TypeError, "num_samples: expected a whole number"),
        ({"max_data": 1}, ValueError, "max_data: expected 2 or more"),
        ({"device": "tpu"}, ValueError, "device: expected 'auto', 'cpu' or 'cuda'"),
        ({"x": torch.randn(1, 2)}, ValueError, "x: expected at least 2 data"),
        ({"x": torch.randn(5, 3)}, ValueError, "x: expected 2 features"),
        ({"x": torch.full((5, 2), torch.nan)}, ValueError, "x: expected finite numbers"),
        ({"pair": Encoded}, TypeError, "pair: expected an instance; got the class Encoded"),
        ({"binarize": True}, ValueError, r"binarize: expected pixels of x in \[0, 1\]"),
    ],
)
def test_bad_input_is_refused(options, error, message):
    options = {"pair": Encoded(2), "x": torch.randn(5, 2), **options}
    with pytest.raises(error, match=message):
        kl_decomposition(options.pop("pair"), options.pop("x"), **options)
