"""Generation of data and latents: single draws for the user, and a simulator that runs many at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.inspect import get_dependencies
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from pyrovae.checks import check_data, check_positive
from pyrovae.evaluation.measurement import chunk_sizes, not_applicable, seeded, width
from pyrovae.evaluation.sites import blank_data, drawn_data, is_local, mean_or_value, per_datum, unobserve
from pyrovae.infer.weights import PARTICLES, Structure, same_random_state, sample_sites
from pyrovae.pair import Pair

__all__ = ["Simulator", "decode", "latents", "reconstruct", "sample", "traverse"]


# One draw -----------------------------------------------------------------------------------------------------------


def sample(
    pair: Pair, num_samples: int, *, mean: bool = False, data_dim: int | None = None, seed: int | None = None
) -> Tensor:
    """Draw new data from the model, (num_samples, D); with ``mean``, E[x | z] at a drawn z (smooth pictures).

    ``data_dim`` is D, for a pair that does not say. Without a ``seed`` the caller's random state moves on.
    """
    check_positive("num_samples", num_samples, integer=True)
    return _decoded(pair, {}, blank_data(pair, num_samples, data_dim), mean, seed)


def decode(
    pair: Pair, z: dict[str, Tensor], *, mean: bool = True, data_dim: int | None = None, seed: int | None = None
) -> Tensor:
    """Return the data that the model gives at the latents ``z``, (N, D): E[x | z], or draws.

    ``z`` has a value for each datum, (N, ...), of a local latent, one in the plate ``data``; and one value for all data
    of a global latent. With global ones alone, N is 1.
    """
    sites = _model_sites(pair, data_dim)
    if unknown := ", ".join(map(repr, sorted(set(z) - set(sites)))):
        model = f"the model of {type(pair).__name__}"
        raise ValueError(f"z: {model} has no latent {unknown}; its sites are {', '.join(sites)}.")
    counts = {name: len(value) for name, value in z.items() if is_local(sites[name])}
    if not z or len(set(counts.values())) > 1:
        expected = "expected the same number of values of every local latent, at least one latent"
        raise ValueError(f"z: {expected}; got {counts}.")
    return _decoded(pair, z, blank_data(pair, next(iter(counts.values()), 1), data_dim), mean, seed)


def reconstruct(pair: Pair, x: Tensor, *, mean: bool = True, seed: int | None = None) -> Tensor:
    """Encode and decode: z ~ q(z | x), then E[x | z] or a draw. (N, D) → (N, D)."""
    return _decoded(pair, latents(pair, x, seed=seed), blank_data(pair, len(x), x.shape[1]), mean, seed)


def latents(pair: Pair, x: Tensor, *, mean: bool = False, seed: int | None = None) -> dict[str, Tensor]:
    """Draw each latent from the guide once, by name; with ``mean``, return the guide's mean of each that has one.

    A local latent has a value for each datum, (N, ...), a global one a single value.
    """
    found = guide_sites(pair, x, seed)
    return {name: mean_or_value(site["fn"], site["value"]) if mean else site["value"] for name, site in found.items()}


def model_latents(pair: Pair, data_dim: int | None = None) -> dict[str, Tensor]:
    """Draw from the model, for two data, each latent that has a value for each datum: (2, ...), by name."""
    sites = _model_sites(pair, data_dim)
    return {n: site["value"] for n, site in sites.items() if is_local(site) and not site["infer"].get("was_observed")}


@torch.no_grad()
def guide_sites(pair: Pair, x: Tensor, seed: int | None) -> dict[str, Any]:
    """Run the guide once; return its sites by name."""
    x = check_data(x, data_dim=getattr(pair, "data_dim", None))
    x = _placed(x, next(pair.parameters(), x))
    with seeded(seed):
        found = sample_sites(poutine.trace(pair.guide).get_trace(x))
    if not found:
        raise ValueError(f"pair: {type(pair).__name__}'s guide samples no latent, so there is nothing to encode into.")
    return found


@torch.no_grad()
def _model_sites(pair: Pair, data_dim: int | None) -> dict[str, Any]:
    """Run the model for two data of its own, without moving the random state."""
    with same_random_state(), pyro.validation_enabled(False):
        return sample_sites(poutine.trace(unobserve(pair.model)).get_trace(blank_data(pair, 2, data_dim)))


def _placed(value: Tensor, like: Tensor) -> Tensor:
    """Move ``value`` to the device of ``like``, and floating-point numbers to its precision."""
    return value.to(like.device, like.dtype if value.is_floating_point() else None)


@torch.no_grad()
def _decoded(pair: Pair, z: dict[str, Tensor], blank: Tensor, mean: bool, seed: int | None) -> Tensor:
    """Run the model with the latents ``z``, and return the data that it draws, or their mean."""
    model = poutine.condition(unobserve(pair.model), data={name: _placed(value, blank) for name, value in z.items()})
    with seeded(seed):
        trace = poutine.trace(model).get_trace(blank)
    site: Any = next(iter(drawn_data(trace).values()), None)
    if site is None:
        raise ValueError(f"pair: the model of {type(pair).__name__} observes nothing.")
    return site["fn"].mean if mean else site["value"]


def can_traverse(pair: Pair, x: Tensor, name: str) -> bool:
    """Return whether each datum has a value of the latent ``name``, and every real number is a possible value."""
    site = guide_sites(pair, x[:2], seed=0)[name]
    support = getattr(site["fn"].support, "base_constraint", site["fn"].support)
    return support is constraints.real and is_local(site)


def traverse(pair: Pair, x: Tensor, name: str, dimensions: Sequence[int], values: Tensor) -> Tensor:
    """Decode the first datum with one dimension of a latent at each of the values, (dimensions · values, D).

    The other dimensions and latents stay at the posterior mean. Latents whose prior depends on the moved one (the
    layers below it) are at their prior's mean given it.
    """
    with same_random_state(), pyro.validation_enabled(False), torch.no_grad():
        needs: Any = get_dependencies(pair.model, (_placed(x[:1], next(pair.parameters(), x)),))
    below = {name}
    for site, upstream in needs["prior_dependencies"].items():  # in the order of the model
        if site in needs["posterior_dependencies"] and below & upstream.keys():  # a latent, not the data
            below.add(site)
    below.remove(name)
    z = {}
    for latent, site in guide_sites(pair, x[:1], seed=0).items():
        mean = mean_or_value(site["fn"], site["value"])
        if latent not in below:
            z[latent] = mean.repeat(len(dimensions) * len(values), *[1] * (mean.dim() - 1)) if is_local(site) else mean
    for moved, dimension in zip(z[name].split(len(values)), dimensions, strict=True):
        moved[:, dimension] = values.to(moved)
    with _SitesAtMean(below):
        return decode(pair, z, data_dim=x.shape[1], seed=0)


class _SitesAtMean(Messenger):
    """Handler that sets the named sites to the means of their distributions."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self._names = names

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self._names:
            msg["value"] = mean_or_value(msg["fn"], msg["value"])


# Many draws ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def two_data(pair: Pair, data_dim: int | None, seed: int, quantity: str) -> Tensor:
    """Draw two data from the model, to try the pair on."""
    blank = blank_data(pair, 2, data_dim)
    with seeded(seed):
        trace: Any = poutine.trace(unobserve(pair.model)).get_trace(blank)
    x = trace.nodes[_observed_site(trace, pair, quantity)]["value"]
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"pair: the model of {type(pair).__name__} draws data that are NaN or infinite.")
    return x.reshape(blank.shape) if x.numel() == blank.numel() else x


def _observed_site(trace: Trace, pair: Pair, quantity: str) -> str:
    sites = drawn_data(trace)
    plates = {frame.name for site in sites.values() for frame in site["cond_indep_stack"]}
    if len(sites) != 1 or "data" not in plates:
        reason = "to simulate data, its model must observe x at one site, inside the data plate; it observes "
        raise not_applicable(quantity, pair, f"{reason}{', '.join(sites) or 'nothing'}.")
    return next(iter(sites))


class Simulator:
    """Runs of a pair's model and guide under a plate of particles.

    Values have the shapes that Pyro gives them: particles at dim −(nesting + 1) of the batch, then the pair's plates.
    """

    def __init__(self, pair: Pair, few: Tensor, quantity: str) -> None:
        """Find out from two data where the sites of the pair lie; ``quantity`` names the measurement in errors."""
        structure = Structure.of(pair.model, pair.guide, (few,), {})
        self._pair, self._quantity, self._nesting = pair, quantity, structure.max_plate_nesting
        self._device = few.device
        self._layout: dict[str, tuple[int, int]] = {}  # by site: the data dim of its batch, its event dims
        trace = self.simulate(few, {}, 1)
        sites = sample_sites(trace)
        self._width = width(pair, trace, len(few))
        for name, site in sites.items():
            for frame in site["cond_indep_stack"]:
                if frame.name == "data":
                    self._layout[name] = (frame.dim, len(site["fn"].event_shape))
        self._observed = _observed_site(trace, pair, quantity)
        latent = [name for name in sites if name != self._observed]
        self.local = [name for name in latent if name in self._layout]
        self.shared = [name for name in latent if name not in self._layout]
        self.guided = [name for name in latent if name not in structure.enumerated]
        if (drawn := tuple(self.data(trace).shape[1:])) != tuple(few.shape):
            reason = f"its model draws data of shape {drawn} at site '{self._observed}' where x has {tuple(few.shape)}."
            raise not_applicable(quantity, pair, reason)

    def check_source(self, source: str | None) -> str:
        """Return ``guide`` or ``exact``, where latents are drawn from; None chooses. NotApplicable if there is none."""
        has_posterior = self._pair.posterior is not None
        if source is None:
            source = "exact" if has_posterior and not self.guided else "guide"
        reason = ""
        if source == "guide" and not self.guided:
            fix = "Use source='exact'." if has_posterior else "Sample its latents there, or give it a posterior(x)."
            reason = f"its guide samples no latent. {fix}"
        elif source == "exact" and not has_posterior:
            reason = "it has no posterior(x), which source='exact' draws from."
        elif source == "exact" and (len(self.local) != 1 or self.shared):
            reason = "source='exact' needs just one latent, inside the data plate."
        if reason:
            raise not_applicable(self._quantity, self._pair, reason)
        return source

    def chunks(self, num_data: int, num_particles: int) -> tuple[int, int]:
        """Return how many data and particles run at a time."""
        joint = bool(self.shared)
        return chunk_sizes(self._device, self._width, num_data, num_particles, joint=joint, most_data=num_data)

    def simulate(self, x: Tensor, given: dict[str, Tensor], count: int) -> Any:
        """Run the model with the latents ``given``; other latents and the data are drawn."""
        return self._trace(unobserve(self._pair.model), x, given, count)

    def condition(self, x: Tensor, given: dict[str, Tensor], count: int) -> Any:
        """Run the model at the latents ``given`` and the data ``x``."""
        return self._trace(self._pair.model, x, given, count)

    def draw(self, x: Tensor, count: int, source: str) -> dict[str, Tensor]:
        """Draw latents given ``x``, from the guide or the exact posterior, with ``count`` particles."""
        if source == "guide":
            trace: Any = self._trace(self._pair.guide, x, {}, count)
            return {name: trace.nodes[name]["value"] for name in self.guided}
        assert self._pair.posterior is not None
        name = self.local[0]
        draws = self._pair.posterior(x).sample((count,))
        data_dim, event_dim = self._layout[name]
        batch = [count] + [1] * self._nesting
        batch[data_dim] = len(x)
        return {name: draws.reshape(*batch, *draws.shape[draws.dim() - event_dim :])}

    def replicate(self, x: Tensor, count: int, replicates: str, source: str) -> Tensor:
        """Draw data like ``x``, (count, N, D), with latents from the ``prior`` or the ``posterior``."""
        given: dict[str, Tensor] = {}
        if replicates == "posterior" or any(name in self.guided for name in self.shared):
            given = self.draw(x, count, source)
        if replicates == "prior":
            given = {name: given[name] for name in self.shared if name in given}
        return self.data(self.simulate(torch.zeros_like(x), given, count))

    def data(self, trace: Any) -> Tensor:
        """Return the data drawn in ``simulate``, (particles, N, D)."""
        return self.per_datum(self._observed, trace.nodes[self._observed]["value"])

    def log_likelihood(self, trace: Any) -> Tensor:
        """Return log p(x | z) of each datum, (particles, N, 1), nats."""
        trace.compute_log_prob(lambda name, site: name == self._observed)
        log_prob = trace.nodes[self._observed]["log_prob"]
        return self.per_datum(self._observed, log_prob, event_dim=0).sum(-1, keepdim=True)

    def per_datum(self, name: str, value: Tensor, event_dim: int | None = None) -> Tensor:
        """Arrange a value at a local site (with ``event_dim=0`` a log density) as (particles, N, scalars)."""
        data_dim, events = self._layout[name]
        batch = self._nesting + 1
        return per_datum(value, batch + data_dim, batch + (events if event_dim is None else event_dim))

    def _trace(self, function: Callable, x: Tensor, given: dict[str, Tensor], count: int) -> Any:
        particles = pyro.plate(PARTICLES, count, dim=-self._nesting - 1)
        return poutine.trace(poutine.condition(particles(function), data=given)).get_trace(x)
