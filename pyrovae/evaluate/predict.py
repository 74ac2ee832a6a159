"""What a fitted pair says: new data, reconstructions, and the data that latents decode to."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyrovae.checks import check_data, check_positive
from pyrovae.infer.log_weights import same_random_state
from pyrovae.pair import Pair

__all__ = ["decode", "latents", "reconstruct", "sample"]


def sample(
    pair: Pair, num_samples: int, *, mean: bool = False, data_dim: int | None = None, seed: int | None = None
) -> Tensor:
    """Draw new data from the model, (num_samples, D); with ``mean``, E[x | z] at a drawn z (smooth pictures)."""
    check_positive("num_samples", num_samples, integer=True)
    return _run(pair, {}, _blank(pair, num_samples, data_dim), mean, seed)


def decode(
    pair: Pair,
    z: dict[str, Tensor],
    *,
    mean: bool = True,
    data_dim: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """Data that the model gives at the latents ``z``, (N, D): E[x | z], or draws.

    ``z`` has a value for each datum, (N, ...), of a local latent, one in the plate ``data``; and one value for all data
    of a global latent. With global ones alone, N is 1.
    """
    local = _local(_model_sites(pair, _blank(pair, 2, data_dim)))
    counts = {name: len(value) for name, value in z.items() if name in local}
    if not z or len(set(counts.values())) > 1:
        raise ValueError(
            f"z: expected the same number of values of every local latent, at least one latent; got {counts}."
        )
    return _decode(pair, z, _blank(pair, next(iter(counts.values()), 1), data_dim), mean, seed)


def reconstruct(pair: Pair, x: Tensor, *, mean: bool = True, seed: int | None = None) -> Tensor:
    """Encode and decode: z ~ q(z | x), then E[x | z] or a draw. (N, D) → (N, D)."""
    return _decode(pair, latents(pair, x, seed=seed), _blank(pair, len(x), x.shape[1]), mean, seed)


@torch.no_grad()
def latents(pair: Pair, x: Tensor, *, mean: bool = False, seed: int | None = None) -> dict[str, Tensor]:
    """One draw of each latent from the guide, by name; with ``mean``, the guide's mean of each that has one.

    A local latent has a value for each datum, (N, ...), a global one a single value.
    """
    found = _guide_sites(pair, x, seed)
    return {name: mean_or_value(site["fn"], site["value"]) if mean else site["value"] for name, site in found.items()}


@torch.no_grad()
def local_latents(pair: Pair, x: Tensor) -> tuple[str, ...]:
    """The names of the guide's latents that have a value for each datum."""
    return _local(_guide_sites(pair, x, seed=0))


def _guide_sites(pair: Pair, x: Tensor, seed: int | None) -> dict[str, Any]:
    x = check_data(x, data_dim=getattr(pair, "data_dim", None))
    x = _placed(x, next(pair.parameters(), x))
    with torch.random.fork_rng(enabled=seed is not None), pyro.validation_enabled(False):
        if seed is not None:
            torch.manual_seed(seed)
        found = _sample_sites(poutine.trace(pair.guide).get_trace(x))
    if not found:
        raise ValueError(f"pair: {type(pair).__name__}'s guide samples no latent, so there is nothing to encode into.")
    return found


@torch.no_grad()
def _model_sites(pair: Pair, x: Tensor) -> dict[str, Any]:
    with same_random_state(), pyro.validation_enabled(False):
        return _sample_sites(poutine.trace(poutine.uncondition(pair.model)).get_trace(x))


def _sample_sites(trace: Any) -> dict[str, Any]:
    return {n: site for n, site in trace.nodes.items() if site["type"] == "sample" and not _is_subsample(site)}


def _local(sites: dict[str, Any]) -> tuple[str, ...]:
    """Of these sites, the ones in the plate ``data``."""
    return tuple(n for n, site in sites.items() if any(f.name == "data" for f in site["cond_indep_stack"]))


def _decode(pair: Pair, z: dict[str, Tensor], blank: Tensor, mean: bool, seed: int | None) -> Tensor:
    return _run(pair, {name: _placed(value, blank) for name, value in z.items()}, blank, mean, seed)


def mean_or_value(fn: Any, value: Tensor) -> Tensor:
    """A distribution's mean; where it has none in closed form, the value drawn from it."""
    if not value.is_floating_point():  # a category has no mean
        return value
    try:
        return fn.mean
    except NotImplementedError:
        return value


def _placed(value: Tensor, like: Tensor) -> Tensor:
    """On the device of ``like``; floating-point numbers in its precision."""
    return value.to(like.device, like.dtype if value.is_floating_point() else None)


def _is_subsample(site: dict[str, Any]) -> bool:
    return type(site["fn"]).__name__ == "_Subsample"


def _blank(pair: Pair, count: int, data_dim: int | None) -> Tensor:
    data_dim = data_dim if data_dim is not None else getattr(pair, "data_dim", None)
    if data_dim is None:
        raise ValueError(f"data_dim: {type(pair).__name__} does not say its data_dim; pass data_dim=.")
    parameter = next(pair.parameters(), torch.zeros(()))
    return torch.zeros(count, data_dim, dtype=parameter.dtype, device=parameter.device)


@torch.no_grad()
def _run(pair: Pair, given: dict[str, Tensor], x: Tensor, mean: bool, seed: int | None) -> Tensor:
    """Run the model with the latents ``given`` and its data sampled, and return the data."""
    model = poutine.uncondition(pair.model)
    with torch.random.fork_rng(enabled=seed is not None), pyro.validation_enabled(False):
        if seed is not None:
            torch.manual_seed(seed)
        trace = poutine.trace(poutine.condition(model, data=given)).get_trace(x)
    sites = _sample_sites(trace)
    if unknown := set(given) - set(sites):
        raise ValueError(
            f"z: the model of {type(pair).__name__} has no latent {', '.join(map(repr, sorted(unknown)))}; its sites "
            f"are {', '.join(sites)}."
        )
    for site in sites.values():
        if site["infer"].get("was_observed"):
            return site["fn"].mean if mean else site["value"]
    raise ValueError(f"pair: the model of {type(pair).__name__} observes nothing.")
