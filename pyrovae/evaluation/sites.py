"""Sites of a trace, and the model run without its data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine import Trace
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor

from pyrovae.checks import check_positive
from pyrovae.infer.weights import sample_sites
from pyrovae.pair import Pair


def is_local(site: Any) -> bool:
    """Return whether the site lies in the plate ``data``."""
    return any(frame.name == "data" for frame in site["cond_indep_stack"])


def is_point(site: Any) -> bool:
    """Return whether all mass of the site lies on one value."""
    return type(getattr(site["fn"], "base_dist", site["fn"])).__name__ == "Delta"


def log_prob_per_dimension(fn: Any, value: Tensor, *, marginals: bool = False) -> Tensor | None:
    """Return the log density of each dimension, (..., dimensions); None where ``fn`` does not factorise over them.

    With ``marginals``, a multivariate normal counts too: each dimension gets its marginal density.
    """
    if marginals and isinstance(fn, (dist.MultivariateNormal, dist.LowRankMultivariateNormal)):
        return dist.Normal(fn.loc, fn.variance.sqrt()).log_prob(value)
    if not fn.event_shape:
        return fn.log_prob(value).unsqueeze(-1)
    if not isinstance(fn, torch.distributions.Independent) or fn.base_dist.event_shape:
        return None
    return fn.base_dist.log_prob(value).flatten(-len(fn.event_shape))


def per_datum(value: Tensor, axis: int, rank: int) -> Tensor:
    """Arrange a value of shape (particles, plates ..., event ...) as (particles, data, scalars).

    It has ``rank`` dims, of which some on the left may be missing. Data are at ``axis``, counted from the particles.
    """
    value = value.reshape((1,) * (rank - value.dim()) + value.shape).movedim(axis, 1)
    return value.flatten(2) if value.dim() > 2 else value.unsqueeze(-1)


def mean_or_value(fn: Any, value: Tensor) -> Tensor:
    """Return the mean of the distribution; the drawn ``value`` where it has no mean in closed form."""
    if not value.is_floating_point():  # a category has no mean
        return value
    try:
        return fn.mean
    except NotImplementedError:
        return value


class _Unobserve(UnconditionMessenger):
    def _pyro_sample(self, msg: Any) -> None:
        if not msg["infer"].get("_deterministic"):
            super()._pyro_sample(msg)


def unobserve(model: Callable) -> Callable:
    """Return the model with its data drawn: ``poutine.uncondition``, but ``pyro.deterministic`` stays as it is."""
    return _Unobserve()(model)


def drawn_data(trace: Trace) -> dict[str, Any]:
    """Return the sites, by name, whose data an :func:`unobserve`-d model drew."""
    return {name: site for name, site in sample_sites(trace).items() if site["infer"].get("was_observed")}


def blank_data(pair: Pair, count: int, data_dim: int | None) -> Tensor:
    """Return zeros, (count, D), on the pair's device: what a model runs on to draw data of its own."""
    data_dim = data_dim if data_dim is not None else getattr(pair, "data_dim", None)
    if data_dim is None:
        raise ValueError(f"data_dim: {type(pair).__name__} does not say its data_dim; pass data_dim=.")
    check_positive("data_dim", data_dim, integer=True)
    return next(pair.parameters(), torch.zeros(())).detach().new_zeros(count, data_dim)
