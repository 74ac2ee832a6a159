"""Data of a pair's own making: runs of its model and guide for many data and particles at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyrovae.evaluation.prepare import NotApplicable
from pyrovae.evaluation.traces import blank_data, chunk_sizes, drawn_data, unobserve, width
from pyrovae.infer.weights import PARTICLES, Structure, same_random_state, sample_sites
from pyrovae.pair import Pair

__all__ = ["Simulator", "two_data"]


@torch.no_grad()
def two_data(pair: Pair, data_dim: int | None, seed: int) -> Tensor:
    """Two data from the model, to try the pair on."""
    blank = blank_data(pair, 2, data_dim)
    with same_random_state(), pyro.validation_enabled(False):
        torch.manual_seed(seed)
        trace: Any = poutine.trace(unobserve(pair.model)).get_trace(blank)
    x = trace.nodes[_observed_site(trace, pair, "calibration")]["value"]
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"pair: the model of {type(pair).__name__} draws data that are NaN or infinite.")
    return x.reshape(blank.shape) if x.numel() == blank.numel() else x


def _observed_site(trace: Trace, pair: Pair, what: str) -> str:
    sites = drawn_data(trace)
    plates = {frame.name for site in sites.values() for frame in site["cond_indep_stack"]}
    if len(sites) != 1 or "data" not in plates:
        raise NotApplicable(
            f"{what} does not apply to {type(pair).__name__}: to simulate data, its model must observe x at one site, "
            f"inside the data plate; it observes {', '.join(sites) or 'nothing'}."
        )
    return next(iter(sites))


class Simulator:
    """Runs of a pair's model and guide under a plate of particles, and where their sites lie.

    Values have the shapes that Pyro gives them: particles at dim −(nesting + 1) of the batch, then the pair's plates.
    """

    def __init__(self, pair: Pair, few: Tensor, what: str) -> None:
        structure = Structure.of(pair.model, pair.guide, (few,), {})
        self._pair, self._what, self._nesting = pair, what, structure.max_plate_nesting
        self._device = few.device
        self._layout: dict[str, tuple[int, int]] = {}  # by site: the data dim of its batch, its event dims
        trace = self.simulate(few, {}, 1)
        sites = sample_sites(trace)
        self._width = width(pair, trace, len(few))
        for name, site in sites.items():
            for frame in site["cond_indep_stack"]:
                if frame.name == "data":
                    self._layout[name] = (frame.dim, len(site["fn"].event_shape))
        self._observed = _observed_site(trace, pair, what)
        latent = [name for name in sites if name != self._observed]
        self.local = [name for name in latent if name in self._layout]
        self.shared = [name for name in latent if name not in self._layout]
        self.guided = [name for name in latent if name not in structure.enumerated]
        if self.data(trace).shape[1:] != few.shape:
            raise NotApplicable(
                f"{what} does not apply to {type(pair).__name__}: its model draws data of shape "
                f"{tuple(self.data(trace).shape[1:])} at site '{self._observed}' where x has {tuple(few.shape)}."
            )

    def check_source(self, source: str | None) -> str:
        """``guide`` or ``exact``, or NotApplicable."""
        pair = type(self._pair).__name__
        exact = self._pair.posterior is not None
        if source is None:
            source = "exact" if exact and not self.guided else "guide"
        if source == "guide" and not self.guided:
            fix = "Use source='exact'." if exact else "Sample its latents in the guide, or give it a posterior(x)."
            raise NotApplicable(f"{self._what} does not apply to {pair}: its guide samples no latent. {fix}")
        if source == "exact" and (not exact or len(self.local) != 1 or self.shared):
            reason = (
                "it has no posterior(x)" if not exact else "it does not have just one latent, inside the data plate"
            )
            raise NotApplicable(f"{self._what} with source='exact' does not apply to {pair}: {reason}.")
        return source

    def chunks(self, num_data: int, num_particles: int) -> tuple[int, int]:
        """Data and particles at a time."""
        return chunk_sizes(
            self._device, self._width, num_data, num_particles, joint=bool(self.shared), most_data=num_data
        )

    def simulate(self, x: Tensor, given: dict[str, Tensor], count: int) -> Any:
        """Run the model with the latents ``given``; other latents and the data are drawn."""
        return self._trace(unobserve(self._pair.model), x, given, count)

    def condition(self, x: Tensor, given: dict[str, Tensor], count: int) -> Any:
        """Run the model at the latents ``given`` and the data ``x``."""
        return self._trace(self._pair.model, x, given, count)

    def draw(self, x: Tensor, count: int, source: str) -> dict[str, Tensor]:
        """Latents given ``x``, from the guide or the exact posterior, with ``count`` particles."""
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
        """Data (count, N, D) like ``x``."""
        given: dict[str, Tensor] = {}
        if replicates == "posterior" or any(name in self.guided for name in self.shared):
            given = self.draw(x, count, source)
        if replicates == "prior":
            given = {name: given[name] for name in self.shared if name in given}
        return self.data(self.simulate(torch.zeros_like(x), given, count))

    def data(self, trace: Any) -> Tensor:
        """The data drawn in ``simulate``, (particles, N, D)."""
        return self.per_datum(self._observed, trace.nodes[self._observed]["value"])

    def log_likelihood(self, trace: Any) -> Tensor:
        """log p(x | z) of each datum, (particles, N, 1), nats."""
        trace.compute_log_prob(lambda name, site: name == self._observed)
        log_prob = trace.nodes[self._observed]["log_prob"]
        return self.per_datum(self._observed, log_prob, event_dim=0).sum(-1, keepdim=True)

    def per_datum(self, name: str, value: Tensor, event_dim: int | None = None) -> Tensor:
        """(particles, N, scalars) of a value, or of a log density with ``event_dim=0``, at a local site."""
        data_dim, events = self._layout[name]
        events = events if event_dim is None else event_dim
        missing = self._nesting + 1 + events - value.dim()
        value = value.reshape((1,) * missing + value.shape).movedim(data_dim - events, 1)
        return value.flatten(2) if value.dim() > 2 else value.unsqueeze(-1)

    def _trace(self, function: Callable, x: Tensor, given: dict[str, Tensor], count: int) -> Any:
        particles = pyro.plate(PARTICLES, count, dim=-self._nesting - 1)
        return poutine.trace(poutine.condition(particles(function), data=given)).get_trace(x)
