"""collapse: verdicts on pairs whose answer is known, against closed forms, and the public parts of the rule."""

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
from pyrovae.evaluation.measurement import NotApplicable
from pyrovae.evaluation.posterior_collapse import (
    THRESHOLDS,
    active_units_curve,
    collapse,
    judge_categories,
    judge_dimensions,
)


class Encoded(pv.Pair):
    """z ~ N(0, I), q(z | x) = N(gains · x + shift, scales²), x | z ~ N(gains · z, 1)."""

    def __init__(self, gains, *, shift=0.0, scales=None):
        super().__init__()
        self.data_dim = len(gains)
        self.register_buffer("gains", torch.tensor(gains))
        # The posterior of data with unit variance, in each dimension.
        self.register_buffer("scales", (1 - self.gains**2).sqrt() if scales is None else torch.tensor(scales))
        self.shift = shift

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.data_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.gains * z, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.gains * x + self.shift, self.scales).to_event(1))


class Chain(pv.Pair):
    """q = N(z1 | gain · x, 1 − gain²) N(z2 | copy · z1, 1 − copy²), over the same chain of priors."""

    data_dim = 2

    def __init__(self, gain, copy):
        super().__init__()
        self.gain, self.copy = gain, copy

    def step(self, value, factor):
        return dist.Normal(factor * value, math.sqrt(1 - factor**2)).to_event(1)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            z1 = pyro.sample("z1", self.step(z2, self.copy))
            pyro.sample("x", self.step(z1, self.gain), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", self.step(x, self.gain))
            pyro.sample("z2", self.step(z1, self.copy))


class Simplex(pv.Pair):
    """z ~ Dirichlet(1, 1, 1); q = Dirichlet(1 + gain · x)."""

    data_dim = 3

    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(x.new_ones(3)))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Dirichlet(1 + self.gain * x))


class Topics(pv.Pair):
    """A category k with q(k | x) = Categorical(x), and z ~ N(0, 1) whose guide depends on k. A global latent too."""

    data_dim = 3

    def model(self, x):
        pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=x.new_zeros(3)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal((z + k).unsqueeze(-1) + 0 * x, 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(x))
            pyro.sample("z", dist.Normal(k - 1.0, 0.5))


def only(found):
    (one,) = found.latents.values()
    return one


# Pairs whose answer is known


@pytest.mark.parametrize("num_data", [20, 300])
@pytest.mark.parametrize(
    "pair",
    [
        Encoded([0.0, 0.0, 0.0]),
        Encoded([0.0, 0.0, 0.0], shift=2.0),
        Encoded([0.0, 0.0, 0.0], scales=[0.1, 0.2, 3.0]),
    ],
    ids=["the prior", "shifted", "narrow and wide"],
)
def test_guide_that_ignores_the_data_is_collapsed(pair, num_data):
    """A guide away from the prior has a KL, and still tells nothing about the data."""
    found = only(collapse(pair, torch.randn(num_data, 3)))
    assert found.verdict == "collapsed"
    assert found.used == 0
    assert found.active_units == 0
    assert found.text.startswith("collapsed: no dimension of 3 carries more than 0.01 nats")


def test_healthy_ppca_is_alive():
    x = torch.randn(200, 3) @ torch.randn(3, 8) * 2 + torch.randn(200, 8)
    pair = pv.models.PPCA(8, 3)
    pair.fit_closed_form(x)
    found = only(collapse(pair, x))
    assert found.verdict == "alive"
    assert found.used == found.active_units == 3
    assert len(found.kl_per_dimension) == 3


def test_idle_dimensions_of_ppca_are_found():
    """The exact posterior of dimensions with no weight is the prior."""
    pair = pv.models.PPCA(8, 5)
    with torch.no_grad():
        pair.weight.zero_()
        pair.weight[:2, :2] = 3 * torch.eye(2)
        pair.guide_weight.zero_()
        pair.guide_weight[:2, :2] = 0.3 * torch.eye(2)
        pair.guide_scale_tril = torch.diag(torch.tensor([0.3, 0.3, 1.0, 1.0, 1.0]))
    found = only(collapse(pair, 3 * torch.randn(200, 8)))
    assert found.text.startswith("partly collapsed: 2 of 5 dimensions carry 99% of the information")
    assert found.active_units == 2


def test_kl_and_information_of_dimensions_equal_their_closed_forms():
    """Where q(z_j) is the prior, KL and information are one: −½ log(1 − gain²), for data that are many."""
    gains = [0.9, 0.5, 0.05, 0.0]
    x = torch.randn(2000, 4)
    x = (x - x.mean(0)) / x.std(0)
    found = only(collapse(Encoded(gains), x))
    exact = [-0.5 * math.log(1 - gain**2) for gain in gains]
    assert found.kl_per_dimension == pytest.approx(exact, abs=0.02)  # 20,000 draws of a log ratio of variance 2 KL
    assert found.information_per_dimension == pytest.approx(exact, abs=0.05)  # and of 500 of the data
    assert found.mean_variance == pytest.approx([gain**2 for gain in gains], rel=1e-4)
    assert found.kl == pytest.approx(sum(found.kl_per_dimension), abs=1e-6)
    assert found.verdict == "partly collapsed"
    assert found.used == 2
    assert found.active_units == 2  # 0.05² is below 0.01


def test_active_units_are_more_generous_than_the_verdict():
    """Means with a variance of 0.0144 are active units that carry 0.007 nats each."""
    found = only(collapse(Encoded([0.9] * 3 + [0.12] * 20), torch.randn(400, 23)))
    assert found.active_units == 23
    assert found.used <= 8
    assert found.verdict == "partly collapsed"


def test_information_agrees_with_the_decomposition():
    pair, x = Encoded([0.9, 0.3]), torch.randn(60, 2)
    found = only(collapse(pair, x, num_samples=100))
    other = kl_decomposition(pair, x, num_samples=100, seed=1)
    for j in range(2):
        error = other.stderr["mutual_information_per_dimension"][j]
        difference = found.information_per_dimension[j] - other.mutual_information_per_dimension[j]
        assert abs(difference) < 5 * math.sqrt(2) * error


@pytest.mark.parametrize(
    ("gain", "copy", "verdicts"),
    [(0.9, 0.9, ("alive", "alive")), (0.9, 0.0, ("alive", "collapsed")), (0.0, 0.9, ("collapsed", "collapsed"))],
    ids=["both tell", "the upper layer ignores the lower", "the lower ignores x, and the upper copies it"],
)
@pytest.mark.parametrize("num_data", [40, 500])
def test_each_layer_gets_its_own_verdict(gain, copy, verdicts, num_data):
    found = collapse(Chain(gain, copy), torch.randn(num_data, 2))
    assert tuple(one.verdict for one in found.latents.values()) == verdicts
    assert any("z2: information from variances" in note for note in found.notes)


def test_mean_variance_of_a_deeper_layer_is_free_of_noise():
    """E[z2 | x] = copy · gain · x; the noise of the average over 10 draws of z1 is taken off its variance."""
    x = torch.randn(4000, 2)
    found = collapse(Chain(0.3, 0.9), x).latents["z2"]
    exact = (0.27**2 * x.var(0)).tolist()
    noise = 0.9**2 * (1 - 0.3**2) / 10
    # The variance of 4000 means, of variance exact + noise each.
    assert found.mean_variance == pytest.approx(exact, abs=5 * (exact[0] + noise) * math.sqrt(2 / 4000))


def test_dead_layer_of_an_iwae_is_collapsed():
    pair = pv.models.IWAE(6, (4, 3), hidden_dims=((8,), (8,)))
    x = torch.rand(100, 6).round()
    with torch.no_grad():
        for layer in pair.encoders:
            layer.network.output.weight.zero_()
    found = collapse(pair, x)
    assert [one.verdict for one in found.latents.values()] == ["collapsed", "collapsed"]


@pytest.mark.parametrize(("gain", "verdict"), [(0.0, "collapsed"), (40.0, "alive")])
def test_latent_without_known_marginals_is_judged_by_variances(gain, verdict):
    found = collapse(Simplex(gain), torch.rand(200, 3))
    assert only(found).verdict == verdict
    assert any("have no closed form" in note for note in found.notes)


# Discrete latents


def test_category_beside_other_latents_is_judged_by_its_probabilities():
    """k is judged by its probabilities, z depends on k, and mu encodes no datum."""
    x = nn.functional.one_hot(torch.arange(60) % 3, 3) * 0.97 + 0.01
    found = collapse(Topics(), x)
    assert found.latents["k"].verdict == "alive"
    assert found.latents["k"].usage == pytest.approx([1 / 3] * 3, abs=1e-6)
    assert found.latents["z"].verdict == "alive"
    assert any("not judged" in note and "mu" in note for note in found.notes)


def test_mixture_without_a_guide_is_judged_by_its_posterior():
    """Two of the four components lie far from all data."""
    pair = pv.models.GMM(4, 2)
    with torch.no_grad():
        pair.loc.copy_(torch.tensor([[-5.0, 0.0], [5.0, 0.0], [0.0, 500.0], [0.0, -500.0]]))
    x = torch.randn(100, 2) + torch.tensor([5.0, 0.0]) * (torch.arange(100) % 2 * 2 - 1).unsqueeze(1)
    found = collapse(pair, x)
    one = only(found)
    assert one.text.startswith("partly collapsed: no datum uses 2 of 4 categories")
    assert one.information_per_dimension == pytest.approx([math.log(2)], abs=1e-3)
    assert found.num_samples == 0
    assert "no sampling" in repr(found)


@pytest.mark.parametrize(("gain", "verdict"), [(0.0, "collapsed"), (5.0, "alive")])
def test_amortized_mixture_is_judged_by_its_guide(gain, verdict):
    pair = pv.models.GMM(3, 2, amortized=True)
    with torch.no_grad():
        pair.encoder.output.weight.mul_(gain)
    found = only(collapse(pair, 3 * torch.randn(200, 2)))
    assert found.verdict == verdict
    assert found.kl is not None


def test_judge_categories_by_hand():
    q = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    found = judge_categories(q)
    q, mean = q.double(), q.double().mean(0)
    assert found.information_per_dimension == pytest.approx(
        [float((torch.xlogy(q, q) - torch.xlogy(q, mean)).sum() / 2)]
    )
    assert found.usage == pytest.approx(mean.tolist())
    assert (found.verdict, found.used) == ("partly collapsed", 2)
    assert judge_categories(torch.tensor([[1.0, 0.0]] * 5)).verdict == "collapsed"  # one category for all


# The rules


def test_curve_counts_units_and_never_rises():
    means = torch.randn(500, 20) * torch.logspace(-3, 1, 20)
    curve = active_units_curve(means)
    assert curve == [int((means.var(0) > threshold).sum()) for threshold in THRESHOLDS]
    assert curve == sorted(curve, reverse=True)
    assert 0.01 in THRESHOLDS
    assert active_units_curve(means, [0.01]) == [int((means.var(0) > 0.01).sum())]


@pytest.mark.parametrize(
    ("information", "verdict", "used"),
    [
        ([1.0, 2.0, 3.0], "alive", 3),
        ([1.0, 2.0, 0.005], "partly collapsed", 2),
        ([5.0, 5.0, 0.02], "partly collapsed", 2),  # above 0.01 nats, and in the last 1%
        ([0.005, 0.001, 0.0], "collapsed", 0),
        ([0.0, 0.0, 0.0], "collapsed", 0),
        ([1.0] * 200, "alive", 200),  # 198 carry 99%
        ([1.0] * 199 + [0.0], "partly collapsed", 198),
        ([3.0], "alive", 1),
        ([-1e-9, 2.0], "partly collapsed", 1),
    ],
)
def test_verdict_on_dimensions_follows_the_rule(information, verdict, used):
    found = judge_dimensions(information, [0.5] * len(information))
    assert (found.verdict, found.used) == (verdict, used)
    assert found.text.startswith(verdict)


def test_many_dimensions_that_tell_little_each_are_not_called_collapsed():
    found = judge_dimensions([0.009] * 500, [0.02] * 500, total=4.0)
    assert found.text == "partly collapsed: none of 500 dimensions tells 0.01 nats, all of them 4.00"


# Results and refusals


def test_result_reads_as_a_table_and_as_json():
    found = collapse(Encoded([0.9, 0.0]), torch.randn(50, 2))
    text = repr(found)
    assert "partly collapsed: 1 of 2 dimensions carry 99% of the information" in text
    assert "active units where the variance exceeds" in text
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["latents"]["z"]["active_units_curve"] == found.latents["z"].active_units_curve
    assert len(data["thresholds"]) == len(data["latents"]["z"]["active_units_curve"])


def test_random_state_stays_and_the_seed_decides():
    pair, x = Encoded([0.9, 0.0]), torch.randn(20, 2)
    state = torch.get_rng_state()
    assert collapse(pair, x, seed=3).to_dict() == collapse(pair, x, seed=3).to_dict()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.cuda
def test_cuda_gives_the_verdicts_of_the_cpu():
    x = torch.randn(200, 2)
    for pair in (Encoded([0.9, 0.0]), Chain(0.9, 0.0), pv.models.GMM(2, 2)):
        found = [collapse(pair, x, device=device).latents for device in ("cpu", "cuda")]
        assert [one.verdict for one in found[0].values()] == [one.verdict for one in found[1].values()]


class Nested(Topics):
    """The only local latent is a category that depends on a global one."""

    def model(self, x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=x.new_zeros(3)))
            pyro.sample("x", dist.Normal((mu + k).unsqueeze(-1) + 0 * x, 1.0).to_event(1), obs=x)

    def guide(self, x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=x * mu.unsqueeze(-1)))


class OnlyGlobal(pv.Pair):
    data_dim = 3

    def model(self, x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu.unsqueeze(-1) + 0 * x, 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))


class Summed(OnlyGlobal):
    """A pair whose latent is summed out, without a ``posterior``."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=x.new_zeros(3)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(k.unsqueeze(-1) + 0 * x, 1.0).to_event(1), obs=x)

    def guide(self, x):
        pass


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (OnlyGlobal(), "collapse does not apply to OnlyGlobal: 'mu' lies outside the plate 'data'"),
        (Nested(), "collapse does not apply to Nested: k: a category that depends on another latent"),
        (Summed(), "collapse does not apply to Summed: its guide samples no latent"),
    ],
)
def test_pairs_without_a_latent_to_judge_are_refused(pair, message):
    with pytest.raises(NotApplicable, match=message):
        collapse(pair, torch.rand(10, 3))


PAIR, X = Encoded([0.9, 0.0]), torch.ones(5, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: collapse(PAIR, X, num_samples=1), ValueError, "num_samples: expected 2 or more"),
        (lambda: collapse(PAIR, X, max_data=0), ValueError, "max_data: expected a whole number, 1 or more"),
        (lambda: collapse(PAIR, X[:1]), ValueError, "x: expected at least 2 data"),
        (lambda: collapse(PAIR, X[:, :1]), ValueError, "x: expected 2 features"),
        (lambda: collapse(Encoded, X), TypeError, "pair: expected an instance"),
        (lambda: active_units_curve([1.0]), TypeError, "posterior_means: expected finite .* got list"),
        (lambda: active_units_curve(X.long()), TypeError, "got torch.int64"),
        (lambda: active_units_curve(X[0]), ValueError, r"posterior_means: .* got shape \(2,\)"),
        (lambda: active_units_curve(X * math.nan), ValueError, "got 10 that are NaN or infinite"),
        (lambda: active_units_curve(X, [-1.0]), ValueError, "thresholds: expected a number above 0"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
