"""Behaviour that every pair of the registry must show. A new pair is one row of CASES."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pyro
import pyro.infer
import pyro.optim
import pytest
import torch
from pyro.infer import Trace_ELBO as PyroTraceELBO
from pyro.infer import TraceEnum_ELBO as PyroTraceEnumELBO
from torch import Tensor, nn

import pyrovae as pv
from pyrovae.infer import RenyiELBO, TraceEnum_ELBO, default_loss
from pyrovae.infer.weights import Structure
from pyrovae.models import REGISTRY

N, D = 24, 6


def binary(count: int = N) -> Tensor:
    return (torch.rand(count, D, generator=torch.Generator().manual_seed(1)) < 0.4).float()


def grey(count: int = N) -> Tensor:
    return torch.rand(count, D, generator=torch.Generator().manual_seed(1))


def real(count: int = N) -> Tensor:
    noise = torch.randn(count, D, generator=torch.Generator().manual_seed(1))
    return noise @ torch.diag(torch.arange(1.0, D + 1)) + 3 * (torch.arange(count) % 2).unsqueeze(-1)


CASES: dict[str, tuple[str, dict, Callable[..., Tensor]]] = {
    "gmm-full": ("gmm", {"num_components": 2}, real),
    "gmm-tied": ("gmm", {"num_components": 2, "covariance": "tied"}, real),
    "gmm-diag": ("gmm", {"num_components": 3, "covariance": "diag"}, real),
    "gmm-spherical": ("gmm", {"num_components": 2, "covariance": "spherical"}, real),
    "gmm-amortized": ("gmm", {"num_components": 2, "amortized": True}, real),
    "ppca": ("ppca", {"latent_dim": 2}, real),
    "vae-bernoulli": ("vae", {"latent_dim": 3, "hidden_dims": (8,)}, binary),
    "vae-normal": ("vae", {"latent_dim": 3, "hidden_dims": (8, 7), "likelihood": "normal"}, real),
    "vae-grey": ("vae", {"latent_dim": 3, "hidden_dims": (), "likelihood": "continuous-bernoulli"}, grey),
    "iwae-1": ("iwae", {"latent_dims": (3,), "hidden_dims": ((8,),)}, binary),
    "iwae-2": ("iwae", {"latent_dims": (4, 2), "hidden_dims": ((8, 8), (5,))}, binary),
    "iwae-3": ("iwae", {"latent_dims": (4, 3, 2), "hidden_dims": ((8,), (6,), (5,)), "num_particles": 3}, binary),
}

cases = pytest.mark.parametrize("case", CASES)
exact_cases = pytest.mark.parametrize("case", [c for c, (name, *_) in CASES.items() if REGISTRY[name].posterior])


def build(case: str, seed: int = 0) -> tuple[pv.Pair, Tensor]:
    name, options, make_data = CASES[case]
    torch.manual_seed(seed)
    pair, x = REGISTRY[name](data_dim=D, **options), make_data()
    if pair.initialize is not None:
        pair.initialize(x)
    return pair, x


def same(a: pv.Pair, b: pv.Pair) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_every_pair_of_the_registry_is_covered() -> None:
    assert {name for name, _, _ in CASES.values()} == set(REGISTRY)
    assert {pair.__name__ for pair in REGISTRY.values()} <= set(pv.models.__all__)


@cases
def test_log_weights_have_a_particle_and_a_datum_dimension(case: str) -> None:
    pair, x = build(case)
    for particles in (1, 4):
        log_w = pv.log_weights(pair.model, pair.guide, x, num_particles=particles)
        assert log_w.shape == (particles, N)
        assert torch.isfinite(log_w).all()


@cases
def test_sites_have_the_shapes_of_the_batch(case: str) -> None:
    pair, x = build(case)
    guide = pyro.poutine.trace(pair.guide).get_trace(x)
    model = pyro.poutine.trace(pyro.poutine.replay(pair.model, trace=guide)).get_trace(x)
    for trace in (guide, model):
        for site in trace.nodes.values():
            if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample":
                assert site["fn"].batch_shape == (N,)
                assert [frame.name for frame in site["cond_indep_stack"]] == ["data"]


@cases
def test_the_gradient_reaches_every_parameter(case: str) -> None:
    pair, x = build(case)
    default_loss(pair).differentiable_loss(pair.model, pair.guide, x).backward()
    for name, parameter in pair.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


@cases
def test_the_seed_decides_what_training_finds(case: str) -> None:
    fitted = []
    for seed in (0, 0, 1):
        pair, x = build(case, seed=0)
        pv.fit(pair, x, epochs=2, batch_size=10, seed=seed)
        fitted.append(pair)
    assert same(fitted[0], fitted[1])
    assert not same(fitted[0], fitted[2])


@cases
def test_saved_weights_load_into_another_instance(case: str, tmp_path) -> None:
    pair, x = build(case)
    other, _ = build(case, seed=7)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    assert not same(pair, other)
    pair.save(tmp_path / "weights.safetensors")
    other.load(tmp_path / "weights.safetensors")
    assert same(pair, other)
    weights = []
    for each in (pair, other):
        torch.manual_seed(3)
        weights.append(pv.log_weights(each.model, each.guide, x, num_particles=2))
    assert torch.equal(*weights)


@cases
def test_two_instances_share_no_parameters(case: str) -> None:
    pair, x = build(case)
    other, _ = build(case)
    before = copy.deepcopy(other)
    pv.fit(pair, x, epochs=2)
    assert same(other, before)
    assert not {id(p) for p in pair.parameters()} & {id(p) for p in other.parameters()}
    assert not pyro.get_param_store().keys()


@cases
def test_it_trains_under_stock_pyro_svi(case: str) -> None:
    pair, x = build(case)
    enumerates = isinstance(default_loss(pair), TraceEnum_ELBO)
    stock = PyroTraceEnumELBO(max_plate_nesting=1) if enumerates else PyroTraceELBO()
    svi = pyro.infer.SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.01}), stock)
    untrained = copy.deepcopy(pair)
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert all(not torch.equal(p, q) for p, q in zip(pair.parameters(), untrained.parameters(), strict=True))
    assert not pyro.get_param_store().keys()


@cases
def test_every_bound_stays_under_the_evidence(case: str) -> None:
    """The evidence is the exact log likelihood where there is one, else a large importance-sampling estimate."""
    pair, x = build(case)
    pv.fit(pair, x, epochs=3, lr=0.01)
    with torch.no_grad():
        torch.manual_seed(0)
        log_w = pv.log_weights(pair.model, pair.guide, x, num_particles=4000)
        reference = log_w.double().logsumexp(0) - torch.tensor(4000.0).log()
        relative = (log_w - reference).exp()
        stderr = (relative.var(0) / 4000).sum().sqrt()
        if pair.log_prob is not None:
            exact = pair.log_prob(x).double()
            assert abs((reference - exact).sum()) <= 5 * stderr + 1e-4 * exact.abs().sum()
            reference, stderr = exact, torch.zeros(())
        losses = [default_loss(pair), RenyiELBO(alpha=0, num_particles=3)]
        for loss in losses:
            bounds = torch.stack([-loss.loss(pair.model, pair.guide, x) for _ in range(100)]).double()
            error = torch.sqrt(bounds.var() / 100 + stderr**2)
            assert bounds.mean() <= reference.sum() + 5 * error + 1e-5 * reference.sum().abs()


@exact_cases
def test_the_exact_posterior_gives_constant_log_weights(case: str) -> None:
    """They are log p(x, z) − log p(z | x) = log p(x) for every z."""
    pair, x = build(case)
    posterior = pair.posterior(x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior)

    log_w = pv.log_weights(pair.model, guide, x, num_particles=5)
    torch.testing.assert_close(log_w, pair.log_prob(x).expand(5, N), rtol=1e-4, atol=1e-3)


@cases
def test_it_runs_in_double_precision(case: str) -> None:
    pair, x = build(case)
    pair.double()
    result = pv.fit(pair, x.double(), epochs=1)
    assert all(p.dtype == torch.float64 for p in pair.parameters())
    assert result.history[-1]["train_bound"] < float("inf")


@cases
def test_wrong_feature_count_is_refused_before_anything_changes(case: str) -> None:
    pair, x = build(case)
    before = copy.deepcopy(pair)
    with pytest.raises(ValueError, match=f"expected {D} features.*got {D - 1}"):
        pv.fit(pair, x[:, 1:])
    assert same(pair, before)


@cases
def test_latents_that_the_guide_leaves_out_are_enumerated(case: str) -> None:
    pair, x = build(case)
    enumerated = Structure.of(pair.model, pair.guide, (x,), {}).enumerated
    assert enumerated == (("z",) if case.startswith("gmm") and case != "gmm-amortized" else ())


@pytest.mark.parametrize(
    ("options", "latent_dims", "widths"),
    [
        ({}, (50,), [[200, 200]]),
        ({"latent_dims": 5}, (5,), [[200, 200]]),
        ({"latent_dims": [5, 3]}, (5, 3), [[200, 200]] * 2),
        ({"latent_dims": (5, 3), "hidden_dims": [[200, 200]]}, (5, 3), [[200, 200]] * 2),  # as a run folder has it
        ({"latent_dims": 5, "hidden_dims": 8}, (5,), [[8]]),
        ({"latent_dims": 5, "hidden_dims": (8, 7)}, (5,), [[8, 7]]),
        ({"latent_dims": 5, "hidden_dims": ()}, (5,), [[]]),
        ({"latent_dims": (5, 3), "hidden_dims": ((8,), [7, 6])}, (5, 3), [[8], [7, 6]]),
    ],
)
def test_iwae_has_the_layers_asked_for(options: dict, latent_dims: tuple, widths: list) -> None:
    pair = pv.models.IWAE(6, **options)
    assert pair.latent_dims == latent_dims
    assert [[m.out_features for m in e.network if isinstance(m, nn.Linear)][:-1] for e in pair.encoders] == widths
    pv.evaluate(pair, torch.ones(3, 6), num_samples=1)


WRITE = r"Write hidden_dims=\(\(10,\), \(6,\)\); on the command line, --set 'hidden_dims=\(\(10,\),\(6,\)\)'"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"latent_dims": ()}, ValueError, "latent_dims: expected the size of one stochastic layer or more; got none"),
        ({"latent_dims": 2.5}, TypeError, r"latent_dims: expected a whole number, 1 or more; got 2\.5"),
        ({"latent_dims": (5, 0)}, ValueError, "latent_dims: expected a whole number, 1 or more; got 0"),
        ({"latent_dims": (5, 3), "hidden_dims": ((8,),)}, ValueError, f"hidden_dims: expected one group .* {WRITE}"),
        ({"latent_dims": (5, 3), "hidden_dims": (8, 8)}, ValueError, f"hidden_dims: .* 2 stochastic layers .* {WRITE}"),
        ({"latent_dims": (5, 3), "hidden_dims": ((8,), 8)}, ValueError, f"hidden_dims: expected one group .* {WRITE}"),
        ({"latent_dims": 5, "hidden_dims": ((8, 0),)}, ValueError, "hidden_dims: expected a whole number, 1 or more"),
    ],
)
def test_errors_of_iwae_show_how_layers_are_written(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        pv.models.IWAE(6, **options)


@pytest.mark.cuda
@cases
def test_it_trains_on_cuda(case: str) -> None:
    pair, x = build(case)
    result = pv.fit(pair, x, epochs=2, device="cuda")
    assert result.device.startswith("cuda")
    scores = pv.evaluate(pair, x, num_samples=50, device="cuda")
    here = pv.evaluate(pair, x, num_samples=50, device="cpu")
    error = (scores.log_evidence_stderr**2 + here.log_evidence_stderr**2) ** 0.5
    assert abs(scores.log_evidence - here.log_evidence) <= 5 * error + 1e-3 * abs(here.log_evidence)
