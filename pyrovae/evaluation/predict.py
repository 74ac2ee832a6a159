"""What a fitted pair says: new data, reconstructions, and the data that latents decode to."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyrovae.checks import check_data, check_positive
from pyrovae.evaluation.traces import blank_data, drawn_data, is_local, unobserve
from pyrovae.infer.weights import same_random_state, sample_sites
from pyrovae.pair import Pair

__all__ = ["decode", "latents", "reconstruct", "sample"]


def sample(
    pair: Pair, num_samples: int, *, mean: bool = False, data_dim: int | None = None, seed: int | None = None
) -> Tensor:
    """Draw new data from the model, (num_samples, D); with ``mean``, E[x | z] at a drawn z (smooth pictures)."""
    check_positive("num_samples", num_samples, integer=True)
    return _run(pair, {}, blank_data(pair, num_samples, data_dim), mean, seed)


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
    sites = _model_sites(pair, blank_data(pair, 2, data_dim))
    if unknown := set(z) - set(sites):
        raise ValueError(
            f"z: the model of {type(pair).__name__} has no latent {', '.join(map(repr, sorted(unknown)))}; its sites "
            f"are {', '.join(sites)}."
        )
    local = _local(sites)
    counts = {name: len(value) for name, value in z.items() if name in local}
    if not z or len(set(counts.values())) > 1:
        raise ValueError(
            f"z: expected the same number of values of every local latent, at least one latent; got {counts}."
        )
    return _decode(pair, z, blank_data(pair, next(iter(counts.values()), 1), data_dim), mean, seed)


def reconstruct(pair: Pair, x: Tensor, *, mean: bool = True, seed: int | None = None) -> Tensor:
    """Encode and decode: z ~ q(z | x), then E[x | z] or a draw. (N, D) → (N, D)."""
    return _decode(pair, latents(pair, x, seed=seed), blank_data(pair, len(x), x.shape[1]), mean, seed)


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


def model_latents(pair: Pair, data_dim: int | None = None) -> dict[str, Tensor]:
    """By name, a draw from the model of each latent that has a value for each datum, for two data: (2, ...)."""
    sites = _model_sites(pair, blank_data(pair, 2, data_dim))
    return {name: sites[name]["value"] for name in _local(sites) if not sites[name]["infer"].get("was_observed")}


def _guide_sites(pair: Pair, x: Tensor, seed: int | None) -> dict[str, Any]:
    x = check_data(x, data_dim=getattr(pair, "data_dim", None))
    x = _placed(x, next(pair.parameters(), x))
    with torch.random.fork_rng(enabled=seed is not None), pyro.validation_enabled(False):
        if seed is not None:
            torch.manual_seed(seed)
        found = sample_sites(poutine.trace(pair.guide).get_trace(x))
    if not found:
        raise ValueError(f"pair: {type(pair).__name__}'s guide samples no latent, so there is nothing to encode into.")
    return found


@torch.no_grad()
def _model_sites(pair: Pair, x: Tensor) -> dict[str, Any]:
    with same_random_state(), pyro.validation_enabled(False):
        return sample_sites(poutine.trace(unobserve(pair.model)).get_trace(x))


def _local(sites: dict[str, Any]) -> tuple[str, ...]:
    """Of these sites, the ones in the plate ``data``."""
    return tuple(name for name, site in sites.items() if is_local(site))


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


@torch.no_grad()
def _run(pair: Pair, given: dict[str, Tensor], x: Tensor, mean: bool, seed: int | None) -> Tensor:
    """Run the model with the latents ``given`` and its data sampled, and return the data."""
    model = poutine.condition(unobserve(pair.model), data=given)
    with torch.random.fork_rng(enabled=seed is not None), pyro.validation_enabled(False):
        if seed is not None:
            torch.manual_seed(seed)
        trace = poutine.trace(model).get_trace(x)
    site: Any = next(iter(drawn_data(trace).values()), None)
    if site is None:
        raise ValueError(f"pair: the model of {type(pair).__name__} observes nothing.")
    return site["fn"].mean if mean else site["value"]
