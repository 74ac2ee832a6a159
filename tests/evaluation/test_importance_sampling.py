"""Pareto-k and effective sample size of guides whose weights have a known tail."""

from __future__ import annotations

import json
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from evaluation_pairs import GlobalMean

import pyrovae as pv
from pyrovae.evaluation.importance_sampling import (
    EQUAL,
    WeightQuality,
    guide_quality,
    guide_quality_of,
    k_threshold,
    summarise,
)
from pyrovae.evaluation.measurement import FLOATS_PER_CHUNK, NotApplicable

NUM_SE = 5  # standard errors allowed in statistical tests


class Narrow(pv.Pair):
    """z ~ N(0, I_2), and data that say nothing about z. The guide is N(0, ratio² I).

    Under it |z|² / (2 ratio²) is a standard exponential E, and w ∝ exp(E (1 − ratio²)): exactly Pareto, with shape
    k = 1 − ratio², E[w] = 1/(1 − k) and E[w²] = 1/(1 − 2k) in units of the least weight.
    """

    data_dim = 1

    def __init__(self, k=0.0):
        super().__init__()
        self.k = k

    def model(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([1]).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(2), math.sqrt(1 - self.k)).to_event(1))


def fitted_ppca():
    x = pv.data.load("iris").train[:40]
    pair = pv.models.PPCA(4, 2)
    pair.fit_closed_form(x)
    return pair, x


@pytest.mark.parametrize("k", [0.2, 0.6, 0.9])
def test_tail_index_is_the_known_one(k):
    """The fit shrinks k towards 0.5 by a prior worth 10 of its tail samples: (n k + 5) / (n + 10)."""
    count, num_data = 2000, 150
    found = guide_quality(Narrow(k), torch.zeros(num_data, 1), num_samples=count)
    tail = math.ceil(3 * math.sqrt(count))
    expected = (tail * k + 5) / (tail + 10)
    assert abs(found.k.mean() - expected) < NUM_SE * found.k.std() / math.sqrt(num_data)


def test_a_narrow_guide_is_unreliable_and_a_good_one_is_not():
    x = torch.zeros(60, 1)
    bad, good = guide_quality(Narrow(0.95), x), guide_quality(Narrow(0.1), x)
    assert bad.num_bad > 50
    assert bad.k_quantiles[0.5] > 0.7
    assert good.num_good == 60
    assert good.num_bad == good.num_ok == 0


@pytest.mark.parametrize(("count", "threshold"), [(25, 0.2847), (100, 0.5), (1000, 2 / 3), (2154, 0.7), (10**6, 0.7)])
def test_threshold_depends_on_the_number_of_samples(count, threshold):
    """min(1 − 1/log10 S, 0.7): with fewer samples a lighter tail is asked for."""
    assert k_threshold(count) == pytest.approx(threshold, abs=1e-4)


def test_counts_and_table_go_by_the_threshold():
    k = torch.tensor([-math.inf, 0.1, 0.45, 0.55, 0.6, 0.68, 0.72, 0.9, math.inf], dtype=torch.float64)
    whole = WeightQuality(k, torch.ones_like(k), torch.zeros_like(k))
    few, some, many = (summarise([whole], 9, count) for count in (50, 1000, 5000))
    assert [(q.num_good, q.num_ok, q.num_bad) for q in (few, some, many)] == [(2, 0, 7), (3, 2, 4), (3, 3, 3)]
    lines = [[" ".join(line.split()[:-1]) for line in repr(q).splitlines()[1:6]] for q in (few, some, many)]
    assert lines[0][:4] == ["good, k up to 0.41 2", "no tail at all 1", "unreliable, k > 0.41 7", "of these, k > 0.7 3"]
    assert lines[1] == [
        "good, k < 0.5 3",
        "no tail at all 1",
        "ok, k 0.5 to 0.67 2",
        "unreliable, k > 0.67 4",
        "of these, k > 0.7 3",
    ]
    assert lines[2][2:4] == ["ok, k 0.5 to 0.7 3", "unreliable, k > 0.7 3"]
    assert "of these" not in repr(many)


def test_scores_name_the_threshold_of_k():
    x = torch.zeros(20, 1)
    scores = pv.evaluate(Narrow(0.6), x, num_samples=100)
    assert ("k̂ above 0.5", str(scores.guide.num_bad)) in [row[:2] for row in scores.rows()]


def test_effective_sample_size_is_the_known_one():
    """K E[w]² / E[w²] = K (1 − 2k) / (1 − k)², up to terms of order 1/K."""
    k, count = 0.15, 4000
    found = guide_quality(Narrow(k), torch.zeros(100, 1), num_samples=count)
    share = found.ess / count
    assert abs(share.mean() - (1 - 2 * k) / (1 - k) ** 2) < NUM_SE * share.std() / 10
    assert found.ess.max() <= count


def test_smoothed_evidence_is_the_evidence():
    """p(x) = N(x | 0, 1), whatever the guide."""
    x = torch.linspace(-2, 2, 100).unsqueeze(-1)
    found = guide_quality(Narrow(0.3), x, num_samples=4000)
    exact = dist.Normal(0, 1).log_prob(x).mean().item()
    relative_sd = math.sqrt((1 - 0.3) ** 2 / (1 - 0.6) - 1)  # of one weight, from its two moments
    assert abs(found.log_evidence - exact) < NUM_SE * relative_sd / math.sqrt(4000 * 100)


@pytest.mark.filterwarnings("error")
def test_exact_guide_has_no_tail():
    """All weights are p(x) up to rounding: they have no tail, every sample counts, and no warning comes."""
    pair, x = fitted_ppca()
    found = guide_quality(pair, x, num_samples=200)
    assert (found.k == -math.inf).all()
    torch.testing.assert_close(found.ess, torch.full((40,), 200.0, dtype=torch.float64), rtol=1e-6, atol=0)
    assert found.num_good == found.num_no_tail == 40
    assert found.log_evidence == pytest.approx(pair.log_prob(x).mean().item(), abs=1e-5)
    assert "nan" not in repr(found)


def test_k_is_that_of_arviz():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz

    log_w = (torch.randn(500, 7, dtype=torch.float64) * torch.linspace(0.1, 3, 7)).double()
    smoothed, k = arviz.psislw(log_w.T.numpy(), normalize=False)
    found = guide_quality_of(log_w)
    torch.testing.assert_close(found.k, torch.as_tensor(k))
    torch.testing.assert_close(found.log_evidence, torch.as_tensor(smoothed).logsumexp(-1) - math.log(500))
    weights = log_w.softmax(0)
    torch.testing.assert_close(found.ess, 1 / weights.square().sum(0))


def test_weights_are_left_alone_and_scale_does_not_matter():
    log_w = torch.randn(100, 5)
    kept = log_w.clone()
    found, moved = guide_quality_of(log_w), guide_quality_of(log_w.double() - 1000)
    assert torch.equal(log_w, kept)
    torch.testing.assert_close(moved.k, found.k, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(moved.ess, found.ess)
    torch.testing.assert_close(moved.log_evidence, found.log_evidence - 1000)
    torch.testing.assert_close(guide_quality_of(log_w[:, 0]).k, found.k[:1])  # (K,): one weight vector


def test_summary_of_chunks_is_that_of_the_whole():
    log_w = torch.randn(200, 10) * torch.linspace(0.1, 4, 10)
    whole = summarise([guide_quality_of(log_w)], 10, 200)
    chunks = summarise([guide_quality_of(part) for part in log_w.split(4, dim=1)], 10, 200)
    assert chunks.to_dict() == whole.to_dict()
    assert whole.num_good + whole.num_ok + whole.num_bad == 10
    assert whole.threshold == 1 - 1 / math.log10(200)
    assert summarise([guide_quality_of(log_w[:, 0])], 10, 200).is_joint


def test_k_of_extreme_weights_is_infinite():
    """The weights are all equal, equal at the top, all but two impossible, and all impossible."""
    log_w = torch.zeros(100, 4)
    log_w[:60, 1] = -3
    log_w[:98, 2] = -math.inf
    log_w[:, 3] = -math.inf
    found = guide_quality_of(log_w)
    assert found.k.tolist() == [-math.inf, -math.inf, math.inf, math.inf]
    exact_ess = (40 + 60 * math.exp(-3)) ** 2 / (40 + 60 * math.exp(-6))
    assert found.ess.tolist() == pytest.approx([100, exact_ess, 2, 0], rel=1e-6)
    assert found.log_evidence[3] == -math.inf
    assert guide_quality_of(log_w[:, :1] + EQUAL / 2 * torch.rand(100, 1)).k == -math.inf


def test_global_latent_has_one_weight():
    x = torch.randn(30, 1)
    exact, bad = (
        guide_quality(GlobalMean(x), x, num_samples=500),
        guide_quality(GlobalMean(x, widen=math.sqrt(0.03)), x),
    )
    assert exact.is_joint
    assert exact.k.shape == exact.ess.shape == (1,)
    assert exact.num_good == exact.num_no_tail == 1
    assert bad.num_bad == 1
    assert "one weight for all data" in repr(bad)
    covariance = torch.eye(30, dtype=torch.float64) + 9
    joint = dist.MultivariateNormal(torch.zeros(30, dtype=torch.float64), covariance).log_prob(x[:, 0].double())
    assert exact.log_evidence == pytest.approx(joint.item() / 30, abs=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: pv.models.VAE(6, 3, hidden_dims=(5,)),
        lambda: pv.models.VAE(6, 3, hidden_dims=(5,), likelihood="normal"),
        lambda: pv.models.IWAE(6, (3, 2), hidden_dims=((5,), (4,))),
        lambda: pv.models.PPCA(6, 2),
    ],
    ids=["vae", "vae-normal", "iwae", "ppca"],
)
def test_every_kind_of_pair_is_measured_reproducibly(make):
    pair, x = make(), torch.rand(7, 6).round()
    before = torch.get_rng_state()
    found = guide_quality(pair, x, num_samples=60, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.k.shape == found.ess.shape == (7,)
    assert found.num_good + found.num_ok + found.num_bad == 7
    assert torch.equal(found.k, guide_quality(pair, x, num_samples=60, seed=3).k)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["num_data"] == 7
    assert "effective samples" in repr(found)


def test_data_in_chunks_get_a_k_each(monkeypatch):
    """250 data make three chunks, and a small budget makes many runs of the particles."""
    monkeypatch.setitem(FLOATS_PER_CHUNK, "cpu", 7 * 100)
    found = guide_quality(Narrow(0.2), torch.zeros(250, 1), num_samples=100)
    assert found.k.shape == (250,)
    assert len(found.ess.unique()) == 250


def test_guide_quality_is_that_of_the_scores():
    pair, x = Narrow(0.2), torch.randn(5, 1)
    found, scores = guide_quality(pair, x, num_samples=50, seed=3), pv.evaluate(pair, x, num_samples=50, seed=3)
    assert torch.equal(found.k, scores.guide.k)
    assert found.to_dict() == scores.guide.to_dict()


def test_weights_that_are_nan_are_refused():
    class Broken(Narrow):
        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                pyro.factor("broken", torch.where(z[..., 0] > 3, math.nan, 0.0))  # in few draws
                pyro.sample("x", dist.Normal(0.0, 1.0).expand([1]).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"pair: expected log-weights below infinity; got \d+ NaN"):
        guide_quality(Broken(), torch.zeros(300, 1), num_samples=30)


def test_grey_pixels_are_binarised():
    pair = pv.models.VAE(6, 3, hidden_dims=(5,))
    assert guide_quality(pair, torch.rand(4, 6), num_samples=30, binarize=True).num_data == 4


def test_guides_whose_weights_have_no_tail_are_refused():
    x = torch.randn(10, 2)
    with pytest.raises(NotApplicable, match=r"GMM: its guide samples nothing"):
        guide_quality(pv.models.GMM(2, 2), x)
    with pytest.raises(NotApplicable, match=r"GMM: its guide samples discrete latents alone"):
        guide_quality(pv.models.GMM(2, 2, amortized=True), x)


X = torch.zeros(3, 1)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: guide_quality(Narrow(), X, num_samples=0), ValueError, "num_samples: expected a whole number"),
        (lambda: guide_quality(Narrow(), X, num_samples=24), ValueError, "num_samples: expected at least 25 samples"),
        (lambda: guide_quality(Narrow(), X, num_samples=50.5), TypeError, "num_samples: expected a whole number"),
        (lambda: guide_quality(Narrow, X), TypeError, "pair: expected an instance"),
        (lambda: guide_quality(Narrow(), torch.zeros(3, 2)), ValueError, "x: expected 1 features"),
        (lambda: guide_quality(Narrow(), X, device="tpu"), ValueError, "device: expected"),
        (lambda: guide_quality_of([0.0] * 30), TypeError, "log_weights: expected a floating-point tensor"),
        (lambda: guide_quality_of(torch.zeros(30, dtype=torch.long)), TypeError, "got torch.int64"),
        (lambda: guide_quality_of(torch.zeros(30, 2, 2)), ValueError, r"expected shape \(K, N\)"),
        (lambda: guide_quality_of(torch.zeros(30, 0)), ValueError, r"expected shape \(K, N\)"),
        (lambda: guide_quality_of(torch.zeros(24, 2)), ValueError, "log_weights: expected at least 25"),
        (lambda: guide_quality_of(torch.full((30, 2), math.nan)), ValueError, "got 60 NaN"),
        (lambda: guide_quality_of(torch.full((30,), math.inf)), ValueError, "got 30 NaN or [+]inf"),
    ],
)
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
