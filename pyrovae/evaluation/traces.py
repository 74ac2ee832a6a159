"""What measurements share: the sites of a trace, the model run without its data, and how much fits into one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine import Trace
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor

from pyrovae.checks import check_positive
from pyrovae.infer.weights import sample_sites
from pyrovae.pair import Pair

__all__ = [
    "FLOATS_PER_CHUNK",
    "blank_data",
    "chunk_sizes",
    "drawn_data",
    "is_local",
    "is_point",
    "log_prob_per_dimension",
    "runs_at_a_time",
    "unobserve",
    "width",
]

FLOATS_PER_CHUNK = {"cpu": 2**20, "cuda": 2**25}
"""Of the widest tensor, by device: small enough for caches and memory, large enough for the dispatch to vanish."""
DATA_PER_CHUNK = 100  # what has a number for each sample of each datum stays small


# Sites


def is_local(site: Any) -> bool:
    """Whether a site lies in the plate ``data``."""
    return any(frame.name == "data" for frame in site["cond_indep_stack"])


def is_point(site: Any) -> bool:
    """Whether all mass of a site lies on one value."""
    return type(getattr(site["fn"], "base_dist", site["fn"])).__name__ == "Delta"


def log_prob_per_dimension(fn: Any, value: Tensor, *, marginals: bool = False) -> Tensor | None:
    """Log density of each dimension, (..., dimensions); None where the distribution does not factorise over them.

    With ``marginals``, that of each dimension alone, which a multivariate normal has too.
    """
    if marginals and isinstance(fn, (dist.MultivariateNormal, dist.LowRankMultivariateNormal)):
        return dist.Normal(fn.loc, fn.variance.sqrt()).log_prob(value)
    if not fn.event_shape:
        return fn.log_prob(value).unsqueeze(-1)
    if not isinstance(fn, torch.distributions.Independent) or fn.base_dist.event_shape:
        return None
    return fn.base_dist.log_prob(value).flatten(-len(fn.event_shape))


# The model without its data


class _Unobserve(UnconditionMessenger):
    def _pyro_sample(self, msg: Any) -> None:
        if not msg["infer"].get("_deterministic"):
            super()._pyro_sample(msg)


def unobserve(model: Callable) -> Callable:
    """The model, its data drawn: ``poutine.uncondition`` that leaves ``pyro.deterministic`` alone, which is no data."""
    return _Unobserve()(model)


def drawn_data(trace: Trace) -> dict[str, Any]:
    """By name, the sites whose data an :func:`unobserve`-d model drew."""
    return {name: site for name, site in sample_sites(trace).items() if site["infer"].get("was_observed")}


def blank_data(pair: Pair, count: int, data_dim: int | None) -> Tensor:
    """Zeros, (count, D), where the pair is: what a model is run on for data of its own.

    Raises:
        TypeError, ValueError: neither the pair nor ``data_dim`` says D, or D is no positive whole number.
    """
    data_dim = data_dim if data_dim is not None else getattr(pair, "data_dim", None)
    if data_dim is None:
        raise ValueError(f"data_dim: {type(pair).__name__} does not say its data_dim; pass data_dim=.")
    check_positive("data_dim", data_dim, integer=True)
    return next(pair.parameters(), torch.zeros(())).detach().new_zeros(count, data_dim)


# How much at a time


def width(pair: Pair, trace: Trace, count: int, *, enumerated: Iterable[str] = ()) -> int:
    """Numbers in the widest tensor for one datum and particle: a layer's, or the values of all sites together.

    Args:
        trace: of the model, with ``count`` data times particles.
        enumerated: sites that are summed out; all their values count at once.
    """
    sites = sample_sites(trace)
    values = sum(site["value"].numel() for site in sites.values()) // count
    layers = [p.shape[0] for p in pair.parameters() if p.dim() == 2]
    return max(1, values, *layers) * math.prod(len(sites[n]["fn"].enumerate_support(expand=False)) for n in enumerated)


def runs_at_a_time(device: torch.device, width: int) -> int:
    """Data times particles whose widest tensor has ``FLOATS_PER_CHUNK`` numbers."""
    return max(1, FLOATS_PER_CHUNK[device.type] // width)


def chunk_sizes(
    device: torch.device,
    width: int,
    num_data: int,
    num_particles: int,
    *,
    joint: bool = False,
    most_data: int = DATA_PER_CHUNK,
) -> tuple[int, int]:
    """Data and particles at a time. ``joint``: a latent is global, and then only all data together have a weight."""
    fitting = runs_at_a_time(device, width)
    rows = num_data if joint else min(num_data, fitting, most_data)
    return rows, max(1, min(num_particles, fitting // rows))
