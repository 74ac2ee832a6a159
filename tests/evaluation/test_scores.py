"""evaluate against exact answers, and what sample, decode, reconstruct and latents return."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from evaluation_pairs import GlobalMean
from torch import nn

import pyrovae as pv
from pyrovae.evaluation import decode, evaluate, importance_sampling, latents, reconstruct, sample, scores
from pyrovae.evaluation.measurement import FLOATS_PER_CHUNK
from pyrovae.infer import log_weight_terms, log_weights, record
from pyrovae.infer.record import Recorded

NUM_SE = 5  # standard errors allowed in statistical tests


@pytest.fixture(autouse=True)
def one_thread(guard_globals):
    """Use one thread: these tensors are tiny, and threads would wait for each other."""
    torch.set_num_threads(1)


class LinearGaussian(pv.Pair):
    """z ~ N(0, I), x | z ~ N(W z, σ² I), the columns of W orthogonal: the posterior is N(m(x), diag v) in closed form.

    The guide is N(m(x) + shift, diag v · widen²). The last column of W is zero: a dead unit.
    """

    noise = 0.8

    def __init__(self, lengths=(2.0, 1.0, 0.0), data_dim=5, *, shift=0.0, widen=1.0):
        super().__init__()
        self.data_dim, self.latent_dim = data_dim, len(lengths)
        generator = torch.Generator().manual_seed(0)
        columns = torch.linalg.qr(torch.randn(data_dim, len(lengths), generator=generator)).Q
        self.weight = nn.Parameter(columns * torch.tensor(lengths))
        self.register_buffer("precision", 1 + torch.tensor(lengths).square() / self.noise**2)
        self.shift, self.widen = shift, widen

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.mT, self.noise).to_event(1), obs=x)

    def moments(self, x):
        loc = x @ self.weight / self.noise**2 / self.precision + self.shift
        return loc, (self.widen / self.precision.sqrt()).to(loc)

    def guide(self, x):
        loc, scale = self.moments(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    # What evaluate should find, in float64; means over data
    def evidence(self, x):
        weight = self.weight.detach().double()
        covariance = weight @ weight.mT + self.noise**2 * torch.eye(self.data_dim, dtype=torch.float64)
        zero = torch.zeros(self.data_dim, dtype=torch.float64)
        return torch.distributions.MultivariateNormal(zero, covariance).log_prob(x.double()).mean().item()

    def kl(self, x):
        loc, scale = (t.detach().double() for t in self.moments(x))
        return (0.5 * (scale**2 + loc**2 - 1) - scale.log()).mean(0)

    def reconstruction(self, x):
        loc, scale = (t.detach().double() for t in self.moments(x))
        weight, noise = self.weight.detach().double(), self.noise
        squares = (x.double() - loc @ weight.mT).square().sum(-1) + (scale**2 * weight.square().sum(0)).sum(-1)
        return (-0.5 * squares / noise**2 - self.data_dim * math.log(noise * math.sqrt(2 * math.pi))).mean().item()


class DeltaGuide(LinearGaussian):
    """The pair whose guide is the posterior mean itself, so every number is exact whatever the chunks."""

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(self.moments(x)[0]).to_event(1))


def draw(pair, count, seed=0):
    return sample(pair, count, seed=seed)


def standard_error(terms, num_samples):
    """Return the standard error of the mean of terms (K, N) over data and ``num_samples`` samples."""
    return (terms.double().var(0).sum() / num_samples).sqrt().item() / terms.shape[1]


# Against exact answers


def test_exact_guide_has_no_monte_carlo_error():
    """Where q is the posterior every weight is p(x): no Monte Carlo error, and ELBO = evidence = log likelihood."""
    pair = LinearGaussian()
    x = draw(pair, 50)
    found = evaluate(pair, x, num_samples=10)
    assert found.log_evidence == pytest.approx(pair.evidence(x), rel=1e-6)
    assert found.elbo == pytest.approx(found.log_evidence, rel=1e-7)
    assert found.log_evidence_stderr < 1e-6
    assert found.bits_per_dim == pytest.approx(-pair.evidence(x) / 5 / math.log(2), rel=1e-6)
    assert found.log_likelihood is None  # this pair has no log_prob


@pytest.mark.parametrize(("shift", "widen"), [(0.2, 1.3), (-0.3, 0.9)])
def test_every_part_against_its_closed_form(shift, widen):
    pair = LinearGaussian(shift=shift, widen=widen)
    x = draw(pair, 60)
    count = 2000
    found = evaluate(pair, x, num_samples=count)
    terms = log_weight_terms(pair.model, pair.guide, x, num_particles=500)
    kl = terms.guide["z"] - terms.model["z"]

    def near(value, exact, error):
        assert error > 0
        assert abs(value - exact) < NUM_SE * error

    near(found.log_evidence, pair.evidence(x), found.log_evidence_stderr)
    near(found.elbo, pair.reconstruction(x) - pair.kl(x).sum().item(), standard_error(terms.log_weights, count))
    near(found.reconstruction, pair.reconstruction(x), standard_error(terms.model["x"], count))
    near(found.kl, pair.kl(x).sum().item(), standard_error(kl, count))
    for value, exact in zip(found.kl_per_dimension["z"], pair.kl(x).tolist(), strict=True):
        near(value, exact, standard_error(kl, count))  # the sum's error bounds that of each independent part
    assert found.elbo == pytest.approx(found.reconstruction - found.kl, rel=1e-6)
    assert sum(found.kl_per_dimension["z"]) == pytest.approx(found.kl, rel=1e-6)
    assert found.kl_per_latent == {"z": pytest.approx(found.kl)}
    assert found.elbo < found.log_evidence  # Jensen, sample by sample
    assert found.elbo < pair.evidence(x)
    data_error = log_weights(pair.model, pair.guide, x, num_particles=500).logsumexp(0).std().item() / math.sqrt(60)
    assert found.log_evidence_stderr_data == pytest.approx(data_error, rel=0.05)


def test_more_samples_tighten_the_evidence_toward_the_truth():
    """E[log mean w] rises with K (Burda et al. 2016): here, by more than the errors allow for chance."""
    pair = LinearGaussian(shift=0.6, widen=1.5)
    x = draw(pair, 300)
    one, many = evaluate(pair, x, num_samples=1), evaluate(pair, x, num_samples=300)
    assert one.log_evidence == pytest.approx(one.elbo)
    assert one.log_evidence_stderr is None  # unknown from one sample
    assert one.to_dict()["log_evidence_stderr"] is None
    assert "one sample: Monte Carlo error unknown, ± " in repr(one)
    assert "± 0.000" not in repr(one)
    gap = (pair.evidence(x) - many.log_evidence, pair.evidence(x) - one.log_evidence)
    assert abs(gap[0]) < gap[1]


@pytest.mark.parametrize(("count", "missing"), [(1, True), (24, True), (25, False)])
def test_table_says_where_samples_are_too_few_for_k(count, missing):
    pair = LinearGaussian()
    for x in (draw(pair, 10), draw(pair, 1)):
        found = evaluate(pair, x, num_samples=count)
        assert (found.guide is None) == found.too_few_for_k == missing
        assert (("k̂", "–", "needs 25 samples each, or more") in found.rows()) == missing
    silent = evaluate(pv.models.GMM(3, 2), torch.randn(10, 2), num_samples=count)  # nothing is sampled: no tail
    assert "k̂" not in repr(silent)
    assert silent.log_evidence_stderr == 0


def test_stated_error_covers_the_truth():
    """Of 200 independent estimates, as many lie within z stated standard errors of the truth as a normal law says."""
    pair = LinearGaussian(lengths=(1.0, 0.5), data_dim=3, shift=0.1, widen=1.2)
    x = draw(pair, 20)
    truth, repeats = pair.evidence(x), 200
    found = [evaluate(pair, x, num_samples=200, seed=seed) for seed in range(repeats)]
    deviation = torch.tensor([(s.log_evidence - truth) / s.log_evidence_stderr for s in found])
    for z in (0.6745, 1.0, 1.96):
        expected = math.erf(z / math.sqrt(2))
        share = (deviation.abs() < z).double().mean().item()
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / repeats), z


def test_units_are_active_above_the_threshold():
    """A unit with a weight is active, one without is dead; the threshold is on the variance over data of the mean."""
    pair = LinearGaussian()
    x = draw(pair, 200)
    found = evaluate(pair, x, num_samples=5)
    assert (found.active_units, found.active_units_per_latent, found.units_per_latent) == (2, {"z": 2}, {"z": 3})
    variance = pair.moments(x)[0].detach().var(0)
    for unit in (0, 1):  # scale the data so that this unit's variance comes to lie on either side of 0.01
        scale = (scores.ACTIVE_UNIT_VARIANCE / variance[unit]).sqrt()
        active = [evaluate(pair, x * scale * f, num_samples=5).active_units for f in (0.99, 1.01)]
        assert active[1] == active[0] + 1


def test_active_units_of_two_layers_are_counted_each():
    torch.manual_seed(0)
    pair = pv.models.IWAE(6, (3, 2), hidden_dims=((4,), (4,)))
    x = torch.bernoulli(torch.full((40, 6), 0.5))
    with torch.no_grad():
        pair.encoders[1].network.output.weight.zero_()  # z2 no longer depends on z1
    found = evaluate(pair, x, num_samples=20)
    assert found.units_per_latent == {"z1": 3, "z2": 2}
    assert found.active_units_per_latent["z2"] == 0
    assert found.active_units == found.active_units_per_latent["z1"] > 0
    assert "of 5 (" in str(found)
    assert sum(found.kl_per_latent.values()) == pytest.approx(found.kl)
    assert "KL of z1" in str(found)


def test_ppca_with_its_exact_posterior_is_scored_exactly():
    """A guide with full covariance has no KL per dimension; the evidence is still exact."""
    x = torch.randn(80, 4, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5]))
    pair = pv.models.PPCA(4, 2)
    pair.fit_closed_form(x)
    found = evaluate(pair, x, num_samples=20)
    assert found.log_likelihood == pytest.approx(pair.log_prob(x).mean().item(), rel=1e-6)
    assert found.log_evidence == pytest.approx(found.log_likelihood, rel=1e-5)
    assert found.elbo == pytest.approx(found.log_likelihood, rel=1e-5)
    assert found.kl_per_dimension == {}
    assert found.units_per_latent == {"z": 2}
    assert "log likelihood, exact" in str(found)


def test_enumerated_mixture_needs_no_samples():
    torch.manual_seed(0)
    pair = pv.models.GMM(3, 2)
    x = torch.randn(130, 2)
    found = evaluate(pair, x, num_samples=50)
    assert found.log_evidence == pytest.approx(pair.log_prob(x).mean().item(), rel=1e-6)
    assert found.elbo == pytest.approx(found.log_evidence)
    assert found.log_evidence_stderr == 0
    assert found.num_samples == 0
    assert (found.reconstruction, found.kl, found.active_units) == (None, None, None)
    text = str(found)
    assert "does not apply to this pair: reconstruction and KL, active units" in text
    assert "no sampling" in text


def test_discrete_guide_is_scored():
    torch.manual_seed(0)
    pair = pv.models.GMM(3, 2, amortized=True)
    x = torch.randn(50, 2)
    found = evaluate(pair, x, num_samples=500)
    assert abs(found.log_evidence - pair.log_prob(x).mean().item()) < NUM_SE * found.log_evidence_stderr
    assert found.active_units is None  # a category has no mean
    assert found.elbo == pytest.approx(found.reconstruction - found.kl, rel=1e-6)
    # KL(q ‖ prior) in closed form; its error is at most that of log q/p, bounded by its range over three components
    logits = pair.encoder((x - pair.feature_loc) / pair.feature_scale).detach()
    q = torch.distributions.Categorical(logits=logits)
    prior = torch.distributions.Categorical(pair.weights.detach().expand(50, 3))
    terms = log_weight_terms(pair.model, pair.guide, x, num_particles=500)
    error = standard_error(terms.guide["z"] - terms.model["z"], 500)
    assert abs(found.kl - torch.distributions.kl_divergence(q, prior).mean().item()) < NUM_SE * error


@pytest.mark.parametrize("widen", [1.0, 1.5])
def test_global_latent_has_one_weight_for_all_data(widen):
    """The whole data set has one weight, and its evidence is still reported per datum."""
    x = torch.randn(150, 1, generator=torch.Generator().manual_seed(0)) + 1  # more than a chunk of local data
    pair = GlobalMean(x, widen)
    found = evaluate(pair, x, num_samples=2000)
    exact = pair.evidence(x)
    if widen == 1.0:
        assert found.log_evidence == pytest.approx(exact, rel=1e-5)
        assert found.log_evidence_stderr < 1e-5
    else:
        assert found.log_evidence_stderr > 0
        assert abs(found.log_evidence - exact) < NUM_SE * found.log_evidence_stderr
        kl = widen**2 / 2 - 0.5 - math.log(widen)  # KL(q ‖ posterior)
        error = standard_error(log_weights(pair.model, pair.guide, x, num_particles=500).unsqueeze(1), 2000) / 150
        assert abs(found.elbo - (exact - kl / 150)) < NUM_SE * error
    assert found.elbo == pytest.approx(found.reconstruction - found.kl, rel=1e-5)
    assert found.log_evidence_stderr_data is None
    assert found.active_units is None  # one value of it: no variance over data


# Chunks


@pytest.mark.parametrize("floats", [1, 40, 2**21])
def test_chunks_do_not_change_the_numbers(monkeypatch, floats):
    pair = DeltaGuide()
    x = draw(pair, 23)
    expected = evaluate(pair, x, num_samples=7).to_dict()
    monkeypatch.setitem(FLOATS_PER_CHUNK, "cpu", floats)
    found = evaluate(pair, x, num_samples=7).to_dict()
    (note,) = expected.pop("notes")
    assert "log joint density, and bounds nothing" in note
    assert found.pop("notes") == [note]
    assert found.pop("kl_per_dimension")["z"] == pytest.approx(expected.pop("kl_per_dimension")["z"], rel=1e-6)
    for name, value in expected.items():
        exact = value is None or isinstance(value, int)
        assert found[name] == (value if exact else pytest.approx(value, rel=1e-6, abs=1e-9)), name
    # which are the density of the posterior mean, by hand
    z = pair.moments(x)[0].detach().double()
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    data = torch.distributions.Normal(z @ pair.weight.detach().double().mT, pair.noise).log_prob(x.double()).sum(-1)
    assert found["log_evidence"] == pytest.approx((prior + data).mean().item(), rel=1e-6)


@pytest.mark.parametrize("floats", [1, 40, 100, 200, 2**21])
def test_every_datum_gets_every_sample(monkeypatch, floats):
    pair = LinearGaussian(shift=0.2, widen=1.2)
    x = draw(pair, 11)
    calls = []

    def counted(*args, **kwargs):
        calls.append(terms := log_weight_terms(*args, **kwargs))
        return terms

    monkeypatch.setitem(FLOATS_PER_CHUNK, "cpu", floats)
    monkeypatch.setattr(importance_sampling, "log_weight_terms", counted)
    found = evaluate(pair, x, num_samples=13)
    shapes = [terms.log_weights.shape for terms in calls[1:]]  # the first is a look at the pair
    assert sum(k * n for k, n in shapes) == 13 * 11
    assert max(k * n for k, n in shapes) * pair.data_dim <= max(floats, pair.data_dim + pair.latent_dim)
    assert abs(found.log_evidence - pair.evidence(x)) < NUM_SE * found.log_evidence_stderr


@pytest.mark.slow
def test_memory_does_not_grow_with_data_times_samples():
    """Without chunks, either call would hold several tensors of 90 MiB."""
    program = """
import resource, torch, pyrovae as pv
from pyrovae.evaluation import evaluate
from evaluation_pairs import GlobalMean
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
vae = pv.models.VAE(784, 10, hidden_dims=(16,))
x, wide = torch.bernoulli(torch.full((300, 784), 0.3)), torch.randn(60_000, 1)
mean = GlobalMean(wide)
evaluate(vae, x[:20], num_samples=2)
evaluate(mean, wide[:20], num_samples=2)
before = peak()
evaluate(vae, x, num_samples=100)
evaluate(mean, wide, num_samples=400)
print(peak() - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=__file__.rpartition("/")[0]
    )
    assert float(run.stdout) < 150  # MiB


# What comes back


def test_scores_are_plain_and_readable():
    pair = LinearGaussian(shift=0.1)
    found = evaluate(pair, draw(pair, 30), num_samples=20)
    plain = found.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    text = str(found)
    for part in ("30 data, 20 samples each; nats per datum", "log evidence", "Monte Carlo", "over data", "ELBO", "KL"):
        assert part in text
    assert f"{found.log_evidence:.3f}" in text
    assert "2  of 3" in text
    assert "does not apply to this pair: exact log likelihood" in text
    assert max(map(len, text.splitlines())) < 100


def test_one_datum_is_scored():
    pair = LinearGaussian(shift=0.1)
    found = evaluate(pair, draw(pair, 1), num_samples=20)
    assert found.log_evidence_stderr_data is None
    assert found.active_units is None
    json.dumps(found.to_dict(), allow_nan=False)
    assert "20 samples each" in str(found)


def test_the_seed_decides_and_the_callers_state_stays():
    pair = LinearGaussian(shift=0.3)
    x = draw(pair, 10)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (evaluate(pair, x, num_samples=5, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.log_evidence != other.log_evidence
    assert torch.equal(torch.get_rng_state(), before)
    assert not pair.weight.grad
    for on in (True, False):
        with pyro.validation_enabled(on):
            evaluate(pair, x, num_samples=2)
            assert dist.Normal(0.0, 1.0)._validate_args == on


def test_binarize_and_precision():
    torch.manual_seed(0)
    grey = torch.rand(20, 6)
    pair = pv.models.VAE(6, 2, hidden_dims=(4,))
    with pytest.raises(ValueError, match="grey pixels"):
        evaluate(pair, grey, num_samples=2)
    first, again = (evaluate(pair, grey, num_samples=50, binarize=True) for _ in range(2))
    assert first == again
    double = evaluate(pair.double(), grey, num_samples=50, binarize=True)
    assert pair.encoder.network.output.weight.dtype == torch.float64
    assert abs(double.log_evidence - first.log_evidence) < 1  # other noise in another precision


def test_binarize_draws_pixels_at_their_grey_levels():
    """Under p(pixel = 1) = 0.8 the evidence tells how many pixels of grey level 0.3 were drawn as 1."""

    class Pixels(pv.Pair):
        data_dim = 50

        def model(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Bernoulli(0.8).expand([50]).to_event(1), obs=x)

    found = evaluate(Pixels(), torch.full((200, 50), 0.3), num_samples=1, binarize=True)
    share = (found.log_evidence / 50 - math.log(0.2)) / math.log(4)
    assert abs(share - 0.3) < NUM_SE * math.sqrt(0.3 * 0.7 / 10_000)


def test_pair_without_data_dim_and_function_pair_are_scored():
    def model(x):
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    x = torch.randn(9, 3)
    found = evaluate(pv.FunctionPair(model, lambda x: None), x, num_samples=10)
    assert found.log_evidence == pytest.approx(dist.Normal(0.0, 1.0).log_prob(x).sum(-1).mean().item(), rel=1e-5)


good = torch.zeros(4, 5)
BAD = {
    "no pair": (lambda: nn.Linear(5, 5), {}, TypeError, "pair: expected a pyrovae.Pair; got Linear"),
    "NaN": (LinearGaussian, {"x": good / 0}, ValueError, "x: expected finite"),
    "empty": (LinearGaussian, {"x": torch.zeros(0, 5)}, ValueError, "x: .*at least one datum"),
    "rank": (LinearGaussian, {"x": torch.zeros(5)}, ValueError, r"x: .*\(N, D\)"),
    "features": (LinearGaussian, {"x": torch.zeros(4, 3)}, ValueError, "x: expected 5 features.*got 3"),
    "integers": (LinearGaussian, {"x": good.long()}, TypeError, "x: .*torch.int64"),
    "K = 0": (LinearGaussian, {"num_samples": 0}, ValueError, "num_samples: .*1 or more; got 0"),
    "K = 1.5": (LinearGaussian, {"num_samples": 1.5}, TypeError, "num_samples: expected a whole number"),
    "device": (LinearGaussian, {"device": "gpu"}, ValueError, "device: expected 'auto'"),
    "grey": (lambda: pv.models.VAE(5, 2), {"x": good + 0.5}, ValueError, "x: .*binarize=True"),
    "binarize": (lambda: pv.models.VAE(5, 2), {"x": good + 5, "binarize": True}, ValueError, "binarize: "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_of_evaluate_are_refused(name):
    make, options, exception, match = BAD[name]
    with pytest.raises(exception, match=match):
        evaluate(make(), **{"x": good, "num_samples": 3} | options)


# sample, decode, reconstruct, latents

PAIRS = {
    "vae": lambda: pv.models.VAE(6, 2, hidden_dims=(4,)),
    "vae normal": lambda: pv.models.VAE(6, 2, hidden_dims=(4,), likelihood="normal"),
    "vae continuous-bernoulli": lambda: pv.models.VAE(6, 2, hidden_dims=(4,), likelihood="continuous-bernoulli"),
    "iwae": lambda: pv.models.IWAE(6, (3, 2), hidden_dims=((4,), (4,))),
    "ppca": lambda: pv.models.PPCA(6, 2),
    "gmm": lambda: pv.models.GMM(2, 6),
    "gmm amortized": lambda: pv.models.GMM(2, 6, amortized=True),
    "double": lambda: pv.models.VAE(6, 2, hidden_dims=(4,)).double(),
}


@pytest.mark.parametrize("name", PAIRS)
def test_generated_data_have_right_shapes_seeds_and_means(name):
    pair = PAIRS[name]()
    x = torch.bernoulli(torch.full((5, 6), 0.5))
    for mean in (False, True):
        first, again, other = (sample(pair, 7, mean=mean, seed=seed) for seed in (1, 1, 2))
        assert first.shape == (7, 6)
        assert first.dtype == next(pair.parameters()).dtype
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert not first.requires_grad
    if name in ("vae", "iwae", "double"):
        assert set(sample(pair, 7).unique().tolist()) == {0.0, 1.0}
        means = sample(pair, 7, mean=True)
        assert ((means > 0) & (means < 1)).all()
    if name == "gmm":
        with pytest.raises(ValueError, match="guide samples no latent"):
            latents(pair, x)
        return
    z = latents(pair, x, seed=3)
    assert {n: v.shape for n, v in z.items()} == {
        "iwae": {"z1": (5, 3), "z2": (5, 2)},
        "gmm amortized": {"z": (5,)},
    }.get(name, {"z": (5, 2)})
    assert all(torch.equal(value, latents(pair, x, seed=3)[n]) for n, value in z.items())
    assert decode(pair, z).shape == (5, 6)
    assert torch.equal(reconstruct(pair, x, seed=3), decode(pair, z))
    assert reconstruct(pair, x, mean=False).shape == (5, 6)
    means = latents(pair, x, mean=True, seed=3)
    assert {n: v.shape for n, v in means.items()} == {n: v.shape for n, v in z.items()}
    before = torch.get_rng_state()
    sample(pair, 2, seed=0)
    latents(pair, x, seed=0)
    reconstruct(pair, x, seed=0)
    assert torch.equal(torch.get_rng_state(), before)  # with a seed, the caller's state stays


def test_decode_is_the_decoder_and_latents_are_the_encoder():
    pair, x = LinearGaussian(), torch.randn(4, 5)
    z = torch.randn(4, 3)
    torch.testing.assert_close(decode(pair, {"z": z}), (z @ pair.weight.mT).detach())
    torch.testing.assert_close(latents(pair, x, mean=True)["z"], pair.moments(x)[0].detach())
    draws = decode(pair, {"z": z[:1].expand(20_000, 3)}, mean=False)
    error = pair.noise / math.sqrt(20_000)
    assert (draws.mean(0) - (z[0] @ pair.weight.mT).detach()).abs().max() < NUM_SE * error


def test_samples_follow_the_model():
    pair = LinearGaussian(lengths=(2.0, 1.0), data_dim=3)
    draws = sample(pair, 40_000, seed=0)
    covariance = (pair.weight @ pair.weight.mT).detach() + pair.noise**2 * torch.eye(3)
    # the variance of a sample covariance: (C_ii C_jj + C_ij²) / N
    diagonal = covariance.diagonal()
    error = ((diagonal.unsqueeze(0) * diagonal.unsqueeze(1) + covariance**2) / 40_000).sqrt()
    assert ((draws.T.cov() - covariance).abs() < NUM_SE * error).all()


@pytest.mark.parametrize(
    ("call", "exception", "match"),
    [
        (lambda pair: sample(pair, 0), ValueError, "num_samples: .*1 or more"),
        (lambda pair: sample(pair, 2.5), TypeError, "num_samples: "),
        (lambda pair: decode(pair, {}), ValueError, "z: .*at least one latent"),
        (lambda pair: decode(pair, {"Z": torch.zeros(3, 3)}), ValueError, "z: .*no latent 'Z'; its sites are z, x"),
        (lambda pair: latents(pair, torch.zeros(2, 4)), ValueError, "x: expected 5 features"),
        (lambda pair: reconstruct(pair, torch.zeros(2, 5).int()), TypeError, "x: .*torch.int32"),
    ],
)
def test_bad_calls_of_generation_are_refused(call, exception, match):
    with pytest.raises(exception, match=match):
        call(LinearGaussian())


class WithDeterministic(LinearGaussian):
    """The same pair; model and guide also name a value that they compute."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            loc = pyro.deterministic("loc", z @ self.weight.mT, event_dim=1)
            pyro.sample("x", dist.Normal(loc, self.noise).to_event(1), obs=x)

    def guide(self, x):
        loc, scale = self.moments(x)
        with pyro.plate("data", len(x)):
            pyro.deterministic("encoded", loc, event_dim=1)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def test_deterministic_value_is_neither_data_nor_latent():
    pair, plain, x = WithDeterministic(), LinearGaussian(), torch.randn(4, 5)
    assert list(latents(pair, x)) == ["z"]
    z = {"z": torch.randn(4, 3)}
    for mean in (False, True):
        assert torch.equal(sample(pair, 7, mean=mean, seed=0), sample(plain, 7, mean=mean, seed=0))
        assert torch.equal(decode(pair, z, mean=mean, seed=0), decode(plain, z, mean=mean, seed=0))
        assert torch.equal(reconstruct(pair, x, mean=mean, seed=0), reconstruct(plain, x, mean=mean, seed=0))
    with pytest.raises(ValueError, match="no latent 'loc'; its sites are z, x"):
        decode(pair, {"loc": torch.zeros(4, 5)})
    assert evaluate(pair, x, num_samples=20) == evaluate(plain, x, num_samples=20)


def test_reconstruct_leaves_auxiliary_variables_of_the_guide_out():
    class Auxiliary(LinearGaussian):
        def guide(self, x):
            loc, scale = self.moments(x)
            with pyro.plate("data", len(x)):
                u = pyro.sample("u", dist.Normal(loc, scale).to_event(1), infer={"is_auxiliary": True})
                pyro.sample("z", dist.Delta(u).to_event(1))

    x = torch.randn(4, 5)
    assert torch.equal(reconstruct(Auxiliary(), x, seed=0), reconstruct(LinearGaussian(), x, seed=0))


def test_pair_without_data_dim_needs_it_as_an_argument():
    class NoSize(pv.Pair):
        def model(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1), obs=x)

    with pytest.raises(ValueError, match="data_dim: NoSize does not say its data_dim; pass data_dim="):
        sample(NoSize(), 3)
    assert sample(NoSize(), 3, data_dim=4).shape == (3, 4)


# The compiled inner loop


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["vae", "iwae", "ppca"])
def test_compiled_scores_equal_the_eager_ones(name, compiles, monkeypatch):
    """The noise is equal. Chunks of data and particles that do not fill up stay eager."""
    monkeypatch.setitem(FLOATS_PER_CHUNK, "cpu", 400)
    if not compiles:
        monkeypatch.setattr(Recorded, "compile", lambda self, args: None)
    options = {"iwae": {"latent_dims": (3, 2), "hidden_dims": ((5,), (4,))}, "ppca": {"latent_dim": 2}}
    torch.manual_seed(0)
    pair = pv.models.REGISTRY[name](6, **options.get(name, {"latent_dim": 3, "hidden_dims": (5,)}))
    x = (torch.rand(11, 6) < 0.5).float()
    eager = pv.evaluate(pair, x, num_samples=47).to_dict()
    monkeypatch.setattr(importance_sampling, "CALLS_WORTH_COMPILING", 1)
    made = []
    monkeypatch.setattr(record, "Recorded", lambda *args: made.append(Recorded(*args)) or made[-1])
    compiled = pv.evaluate(pair, x, num_samples=47).to_dict()
    assert len(made) == 1
    assert made[0].is_compiled == compiles
    assert compiled.keys() == eager.keys()
    for quantity, value in eager.items():
        torch.testing.assert_close(compiled[quantity], value, rtol=1e-4, atol=1e-5)


def test_a_pair_that_cannot_be_recorded_is_scored_eagerly(monkeypatch):
    class Reads(pv.models.VAE):
        def model(self, x):
            float(x.sum())
            super().model(x)

    x = (torch.rand(11, 6) < 0.5).float()
    torch.manual_seed(0)
    pair = Reads(6, 2, hidden_dims=(4,))
    eager = pv.evaluate(pair, x, num_samples=20)
    monkeypatch.setattr(importance_sampling, "CALLS_WORTH_COMPILING", 1)
    with pytest.warns(RuntimeWarning, match=r"evaluate runs eagerly: it reads the value of a tensor.*test_scores.py"):
        assert pv.evaluate(pair, x, num_samples=20) == eager


def test_a_global_latent_says_how_few_samples_its_one_weight_rests_on():
    x = torch.randn(30, 1, generator=torch.Generator().manual_seed(0))
    exact, wide = (evaluate(GlobalMean(x, widen=widen), x, num_samples=400) for widen in (1.0, 3.0))
    (few,) = wide.notes
    effective = float(few.split("effectively ")[1].split(";")[0])
    assert 50 < effective < 350
    assert "effectively 400.0" in exact.notes[0]  # the guide is the posterior: all weights are equal
    assert f"NOTE: {few}" in str(wide)


def test_table_has_one_evidence_where_nothing_is_sampled():
    shown = str(evaluate(pv.models.GMM(2, 2), torch.randn(9, 2)))
    assert "log evidence, exact" in shown
    assert "Monte Carlo" not in shown
    assert "ELBO" not in shown
