"""log_weights: shapes, values against sums written by hand, scales, masks, enumeration, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyrovae import log_weights
from pyrovae.infer import DatasetSize, log_weight_terms
from pyrovae.infer.weights import Structure
from pyrovae.models import IWAE, VAE

NUM_SE = 5  # standard errors allowed in statistical tests
PARALLEL = {"enumerate": "parallel"}

pytestmark = pytest.mark.usefixtures("float64")


def normal_log_prob(x: Tensor, loc: Tensor | float, scale: Tensor | float) -> Tensor:
    scale = torch.as_tensor(scale)
    return -0.5 * ((x - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


# --- pairs as a user writes them -----------------------------------------------------------------


def model_local(x: Tensor) -> None:
    """z ~ N(0, 1), x | z ~ N(z, 1): the evidence is N(x | 0, 2), the posterior N(z | x/2, 1/2)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_local(x: Tensor, slope: float = 0.3, scale: float = 0.9) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, scale))


guide_exact = partial(guide_local, slope=0.5, scale=math.sqrt(0.5))


def model_global(x: Tensor) -> None:
    """A global mean, and a latent for each datum."""
    w = pyro.sample("w", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def guide_global(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.7, 0.4))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 * (w + x), 0.6))


def sampled(terms) -> Callable[[str], Tensor]:
    """The values that the guide drew."""
    return lambda name: terms.guide_trace.nodes[name]["value"]


# --- values by hand ------------------------------------------------------------------------------


def test_vae_by_hand() -> None:
    pair, x = VAE(5, 2, hidden_dims=(4,)), torch.rand(3, 5).round()
    pyro.set_rng_seed(1)
    log_w = log_weights(pair.model, pair.guide, x, num_particles=7)
    pyro.set_rng_seed(1)
    loc, log_scale = pair.encoder.network(x).chunk(2, -1)
    z = loc + log_scale.exp() * torch.randn(7, 3, 2)
    logits = pair.decoder[2](torch.tanh(pair.decoder[0](z)))
    log_likelihood = (x * logits - torch.log1p(logits.exp())).sum(-1)
    log_prior, log_q = normal_log_prob(z, 0.0, 1.0).sum(-1), normal_log_prob(z, loc, log_scale.exp()).sum(-1)
    assert log_w.shape == (7, 3)
    torch.testing.assert_close(log_w, log_likelihood + log_prior - log_q)


def test_two_layer_iwae_by_hand() -> None:
    pair, x = IWAE(4, (3, 2), hidden_dims=((5,), (4,))), torch.rand(6, 4).round()
    pyro.set_rng_seed(1)
    log_w = log_weights(pair.model, pair.guide, x, num_particles=5)
    pyro.set_rng_seed(1)
    q1 = pair.encoders[0](x)
    z1 = q1.base_dist.loc + q1.base_dist.scale * torch.randn(5, 6, 3)
    q2 = pair.encoders[1](z1)
    z2 = q2.base_dist.loc + q2.base_dist.scale * torch.randn(5, 6, 2)
    expected = (
        normal_log_prob(z2, 0.0, 1.0).sum(-1)
        + pair.decoders[0](z2).log_prob(z1)
        + pair.likelihood(z1).log_prob(x)
        - q1.log_prob(z1)
        - q2.log_prob(z2)
    )
    assert log_w.shape == (5, 6)
    torch.testing.assert_close(log_w, expected)


@pytest.mark.parametrize("num_particles", [1, 4])
def test_weights_of_the_exact_posterior_are_the_evidence(num_particles: int) -> None:
    x = torch.randn(6)
    log_w = log_weights(model_local, guide_exact, x, num_particles=num_particles)
    evidence = normal_log_prob(x, 0.0, math.sqrt(2))
    torch.testing.assert_close(log_w, evidence.expand(num_particles, 6))


def test_mean_weight_is_the_evidence() -> None:
    x = torch.tensor([-1.0, 0.5, 2.0])
    w = log_weights(model_local, guide_local, x, num_particles=100_000).exp()
    evidence = normal_log_prob(x, 0.0, math.sqrt(2)).exp()
    assert ((w.mean(0) - evidence).abs() < NUM_SE * w.std(0) / len(w) ** 0.5).all()


def test_terms_by_site() -> None:
    x = torch.randn(3)
    terms = log_weight_terms(model_local, guide_local, x, num_particles=4)
    z = sampled(terms)("z")
    torch.testing.assert_close(terms.model["z"], normal_log_prob(z, 0.0, 1.0))
    torch.testing.assert_close(terms.model["x"], normal_log_prob(x, z, 1.0))
    torch.testing.assert_close(terms.guide["z"], normal_log_prob(z, 0.3 * x, 0.9))
    torch.testing.assert_close(
        terms.log_weights, terms.model["z"] + terms.model["x"] - terms.guide["z"], rtol=0, atol=0
    )
    assert list(terms.model) == ["z", "x"]
    assert list(terms.guide) == ["z"]
    assert terms.score is None
    assert terms.scale == 1


# --- scales, global latents, nested plates -------------------------------------------------------


def global_by_hand(terms, x: Tensor, scale: float) -> Tensor:
    w, z = sampled(terms)("w").squeeze(-1), sampled(terms)("z")
    local = (
        normal_log_prob(z, w[:, None], 1.0)
        + normal_log_prob(x, z, 0.5)
        - normal_log_prob(z, 0.5 * (w[:, None] + x), 0.6)
    )
    return normal_log_prob(w, 0.0, 2.0) - normal_log_prob(w, 0.7, 0.4) + scale * local.sum(-1)


@pytest.mark.parametrize("dataset_size", [None, 5, 20])
def test_global_latents_weigh_the_whole_batch(dataset_size: int | None) -> None:
    x, model, guide = torch.randn(5), model_global, guide_global
    if dataset_size:
        model, guide = DatasetSize(dataset_size)(model), DatasetSize(dataset_size)(guide)
    terms = log_weight_terms(model, guide, x, num_particles=3)
    assert terms.log_weights.shape == (3,)
    assert terms.scale == 1  # local terms are scaled before they are added, nothing outside
    torch.testing.assert_close(terms.log_weights, global_by_hand(terms, x, (dataset_size or 5) / 5))


def test_local_latents_are_scaled_outside() -> None:
    x = torch.randn(5)
    pyro.set_rng_seed(1)
    plain = log_weights(model_local, guide_local, x, num_particles=3)
    pyro.set_rng_seed(1)
    terms = log_weight_terms(DatasetSize(20)(model_local), DatasetSize(20)(guide_local), x, num_particles=3)
    assert terms.scale == 4
    torch.testing.assert_close(terms.log_weights, plain, rtol=0, atol=0)


def test_subsampled_plate() -> None:
    x = torch.randn(10)

    def model() -> None:
        with pyro.plate("data", 10, subsample_size=4) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide() -> None:
        with pyro.plate("data", 10, subsample_size=4) as rows:
            pyro.sample("z", dist.Normal(x[rows] / 2, math.sqrt(0.5)))

    terms = log_weight_terms(model, guide, num_particles=3)
    assert terms.log_weights.shape == (3, 4)
    assert terms.scale == 2.5
    # Guide and model see the same rows, so that each weight is the evidence of one of the ten.
    distance = (terms.log_weights[0][:, None] - normal_log_prob(x, 0.0, math.sqrt(2))).abs()
    assert (distance.min(1).values < 1e-12).all()
    assert len(set(distance.argmin(1).tolist())) == 4


def test_a_plate_inside_the_data_plate_is_summed() -> None:
    x = torch.randn(4, 3)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("features", 9, subsample_size=3, subsample=torch.arange(3), dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True), 0.5))

    terms = log_weight_terms(model, guide, x, num_particles=5)
    z = sampled(terms)("z")  # (K, N, 1)
    expected = (
        normal_log_prob(z, 0.0, 1.0).squeeze(-1)
        + 3 * normal_log_prob(x, z, 1.0).sum(-1)  # three features stand for nine
        - normal_log_prob(z, x.mean(-1, keepdim=True), 0.5).squeeze(-1)
    )
    assert terms.log_weights.shape == (5, 4)
    torch.testing.assert_close(terms.log_weights, expected)


@pytest.mark.parametrize("num_particles", [1, 3])
def test_a_plate_around_the_data_plate_is_the_unit_where_it_has_a_latent(num_particles: int) -> None:
    x = torch.randn(2, 4)  # groups, data

    def model(x: Tensor) -> None:
        with pyro.plate("groups", 6, subsample_size=2, subsample=torch.arange(2), dim=-2):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 8, subsample_size=4, subsample=torch.arange(4), dim=-1):
                z = pyro.sample("z", dist.Normal(u, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("groups", 6, subsample_size=2, subsample=torch.arange(2), dim=-2):
            pyro.sample("u", dist.Normal(x.mean(-1, keepdim=True), 0.7))
            with pyro.plate("data", 8, subsample_size=4, subsample=torch.arange(4), dim=-1):
                pyro.sample("z", dist.Normal(x, 0.8))

    terms = log_weight_terms(model, guide, x, num_particles=num_particles)
    u, z = sampled(terms)("u"), sampled(terms)("z")
    local = normal_log_prob(z, u, 1.0) + normal_log_prob(x, z, 1.0) - normal_log_prob(z, x, 0.8)
    upper = normal_log_prob(u, 0.0, 1.0) - normal_log_prob(u, x.mean(-1, keepdim=True), 0.7)
    expected = upper.squeeze(-1) + 2 * local.sum(-1)
    assert terms.log_weights.shape == (num_particles, 2)
    assert terms.scale == 3
    torch.testing.assert_close(terms.log_weights, expected.expand(num_particles, 2))


def test_units_of_two_common_plates() -> None:
    x = torch.randn(2, 4)

    def model(x: Tensor) -> None:
        with pyro.plate("groups", 2, dim=-2), pyro.plate("data", 4, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("groups", 2, dim=-2), pyro.plate("data", 4, dim=-1):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))

    log_w = log_weights(model, guide, x, num_particles=3)
    torch.testing.assert_close(log_w, normal_log_prob(x, 0.0, math.sqrt(2)).expand(3, 2, 4))


def test_one_common_scale_multiplies_outside() -> None:
    x = torch.randn(5)
    terms = log_weight_terms(poutine.scale(model_local, 3.0), poutine.scale(guide_exact, 3.0), x, num_particles=2)
    assert terms.scale == 3
    torch.testing.assert_close(terms.log_weights, normal_log_prob(x, 0.0, math.sqrt(2)).expand(2, 5))


@pytest.mark.parametrize("scale", [2.0, torch.tensor(2.0)], ids=["number", "tensor"])
def test_different_scales_in_one_datum_are_refused(scale: float | Tensor) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=scale):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"one common scale.*z: 2, x: 1.*Trace_ELBO"):
        log_weights(model, guide_local, torch.randn(3))


def test_mask_leaves_data_out() -> None:
    x, mask = torch.randn(4), torch.tensor([True, False, True, False])
    pyro.set_rng_seed(1)
    plain = log_weights(model_local, guide_local, x, num_particles=3)
    pyro.set_rng_seed(1)
    masked = log_weights(poutine.mask(model_local, mask), poutine.mask(guide_local, mask), x, num_particles=3)
    torch.testing.assert_close(masked, plain * mask, rtol=0, atol=0)


def test_deterministic_sites_are_no_part_of_the_weights() -> None:
    def model(x: Tensor) -> None:
        pyro.deterministic("shift", torch.tensor(1.0))  # outside the plate, and yet no global latent
        model_local(x)

    def guide(x: Tensor) -> None:
        pyro.deterministic("slope", torch.tensor(0.5))
        guide_exact(x)

    x = torch.randn(4)
    log_w = log_weights(model, guide, x, num_particles=2)
    torch.testing.assert_close(log_w, normal_log_prob(x, 0.0, math.sqrt(2)).expand(2, 4))


# --- enumeration ---------------------------------------------------------------------------------

WEIGHTS = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
LOCS = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64)


def model_mixture(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(WEIGHTS), infer=PARALLEL)
        pyro.sample("x", dist.Normal(LOCS[c], 1.0), obs=x)


def no_guide(x: Tensor) -> None:
    pass


@pytest.mark.parametrize("num_particles", [1, 3])
def test_mixture_is_summed_out(num_particles: int) -> None:
    x = torch.randn(5)
    log_w = log_weights(model_mixture, no_guide, x, num_particles=num_particles)
    exact = (WEIGHTS * normal_log_prob(x[:, None], LOCS, 1.0).exp()).sum(-1).log()
    torch.testing.assert_close(log_w, exact.expand(num_particles, 5))


@pytest.mark.parametrize("num_particles", [1, 4])
def test_enumeration_beside_an_amortized_latent(num_particles: int) -> None:
    """Two discrete latents, of which one depends on the other, below a continuous one; features in an inner plate."""
    x = torch.randn(5, 2)
    transition = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Categorical(WEIGHTS), infer=PARALLEL)
            d = pyro.sample("d", dist.Categorical(transition[c]), infer=PARALLEL)
            with pyro.plate("features", 2, dim=-1):
                pyro.sample("x", dist.Normal(LOCS[c] * z + d, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True), 0.5))

    terms = log_weight_terms(model, guide, x, num_particles=num_particles)
    z = sampled(terms)("z")
    joint = torch.stack(
        [
            WEIGHTS[c].log() + transition[c, d].log() + normal_log_prob(x, LOCS[c] * z + d, 1.0).sum(-1)
            for c in range(3)
            for d in range(2)
        ]
    )
    other = normal_log_prob(z, 0.0, 1.0) - normal_log_prob(z, x.mean(-1, keepdim=True), 0.5)
    expected = joint.logsumexp(0) + other.squeeze(-1)
    torch.testing.assert_close(terms.log_weights, expected.expand(num_particles, 5))


def test_a_marked_site_that_the_guide_samples_is_sampled() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(torch.full((3,), 1 / 3)), infer=PARALLEL)

    x = torch.randn(4)
    terms = log_weight_terms(model_mixture, guide, x, num_particles=6)
    c = sampled(terms)("c")
    assert c.shape == (6, 4)
    expected = WEIGHTS[c].log() + normal_log_prob(x, LOCS[c], 1.0) + math.log(3)
    torch.testing.assert_close(terms.log_weights, expected)
    torch.testing.assert_close(terms.score, torch.full((6, 4), -math.log(3)))


def test_enumeration_beside_a_global_latent_is_refused() -> None:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS), infer=PARALLEL)
            pyro.sample("x", dist.Normal(w + LOCS[c], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(NotImplementedError, match=r"site 'c'.*TraceEnum_ELBO"):
        log_weights(model, guide, torch.randn(3))


# --- errors, random state ------------------------------------------------------------------------


def guide_with_more(x: Tensor) -> None:
    guide_local(x)
    pyro.sample("y", dist.Normal(0.0, 1.0))


ERRORS = {
    "missing continuous site": (model_local, no_guide, {}, ValueError, r"site 'z'.*the guide does not"),
    "missing discrete site": (
        lambda x: pyro.sample("c", dist.Bernoulli(0.5)),
        no_guide,
        {},
        ValueError,
        r"site 'c'.*mark it infer=.*TraceEnum_ELBO",
    ),
    "extra site": (model_local, guide_with_more, {}, ValueError, r"site 'y', which the model lacks"),
    "K = 0": (model_local, guide_local, {"num_particles": 0}, ValueError, "num_particles.*1 or more; got 0"),
    "K < 0": (model_local, guide_local, {"num_particles": -3}, ValueError, "num_particles.*got -3"),
    "K = 2.5": (model_local, guide_local, {"num_particles": 2.5}, TypeError, "num_particles.*whole number"),
    "K = True": (model_local, guide_local, {"num_particles": True}, TypeError, "num_particles.*got True"),
    "K = '5'": (model_local, guide_local, {"num_particles": "5"}, TypeError, "num_particles.*got '5'"),
}


@pytest.mark.parametrize(("model", "guide", "options", "error", "match"), ERRORS.values(), ids=ERRORS)
def test_errors(model, guide, options: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        log_weights(model, guide, torch.randn(3), **options)


def test_auxiliary_guide_sites_are_allowed() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u))

    x = torch.randn(3)
    terms = log_weight_terms(model_local, guide, x, num_particles=2)
    torch.testing.assert_close(terms.log_weights, normal_log_prob(x, sampled(terms)("z"), 1.0))


def test_the_look_at_the_structure_leaves_the_noise_alone() -> None:
    x = torch.randn(3)
    structure = Structure.of(model_local, guide_local, (x,), {})
    pyro.set_rng_seed(1)
    known = log_weight_terms(model_local, guide_local, x, num_particles=4, structure=structure).log_weights
    pyro.set_rng_seed(1)
    unknown = log_weights(model_local, guide_local, x, num_particles=4)
    torch.testing.assert_close(known, unknown, rtol=0, atol=0)
    assert structure == Structure(max_plate_nesting=1, enumerated=())


def test_weights_are_differentiable() -> None:
    pair, x = VAE(4, 2, hidden_dims=(3,)), torch.rand(3, 4).round()
    log_weights(pair.model, pair.guide, x, num_particles=2).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pair.parameters())
