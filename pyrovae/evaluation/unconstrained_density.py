"""Unconstrained density: a model's log density as a function of unconstrained latents, for Hamiltonian chains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import biject_to

from pyrovae.evaluation.measurement import NotApplicable, not_applicable
from pyrovae.evaluation.sites import per_datum
from pyrovae.infer.weights import PARTICLES, LogWeightTerms, log_weights_of_traces, sample_sites
from pyrovae.pair import Pair

__all__ = ["Density", "Latents"]


@dataclass(frozen=True)
class _Site:
    plates: tuple[int, ...]  # sizes of the plates inside a datum
    axis: int  # axis of the data in (chains, plates ...)
    event: tuple[int, ...]  # event shape of the unconstrained value
    columns: slice  # its place in the vector u


class Latents:
    """The continuous latents of a datum as one unconstrained vector u, shape (chains, data, dim)."""

    def __init__(self, pair: Pair, trace: Trace) -> None:
        """Read the layout of the latents from a run of the model.

        Raises:
            NotApplicable: see :func:`~pyrovae.evaluation.annealed_evidence`.
        """
        self._pair = pair
        sites = sample_sites(trace)
        observed = {n for n, s in sites.items() if s["is_observed"] or s["infer"].get("was_observed")}
        hidden = {name: site for name, site in sites.items() if name not in observed}
        self.enumerated = tuple(name for name, s in hidden.items() if s["infer"].get("enumerate") == "parallel")
        self.nesting = -min((f.dim for s in sites.values() for f in s["cond_indep_stack"] if f.vectorized), default=0)
        self.sites: dict[str, _Site] = {}
        self.dim = 0
        for name, site in hidden.items():
            frames = {f.name: f for f in site["cond_indep_stack"] if f.vectorized}
            if "data" not in frames:
                raise self.inapplicable(
                    f"its latent '{name}' lies outside the plate 'data', so data have no evidence of their own. "
                    "evaluate(...) estimates the evidence of all data together"
                )
            if name not in self.enumerated:
                self.sites[name] = self._site(name, site, frames)
                self.dim = self.sites[name].columns.stop
        if not self.sites:
            raise self.inapplicable(
                "it has no continuous latent, so its evidence is exact already, by summing the discrete ones out: "
                "evaluate(...).log_evidence with a guide that leaves them out, or log_prob"
            )

    def inapplicable(self, reason: str) -> NotApplicable:
        """Return the error to raise where chains cannot run on these latents."""
        return not_applicable("annealed_evidence", self._pair, f"{reason}.")

    def _site(self, name: str, site: Any, frames: dict[str, Any]) -> _Site:
        support = site["fn"].support
        if support.is_discrete:
            raise self.inapplicable(
                f"its latent '{name}' is discrete, and Hamiltonian chains need gradients. Mark it "
                "infer={'enumerate': 'parallel'} in the model, and it is summed out"
            )
        try:
            raw = biject_to(support).inv(site["value"])
        except NotImplementedError as error:
            raise self.inapplicable(f"no smooth map is known onto the support of '{name}', {support}") from error
        event = raw.shape[len(site["fn"].batch_shape) :]
        axis = self.nesting + 1 + frames["data"].dim
        plates = [1] * self.nesting
        for frame in frames.values():
            plates[frame.dim] = frame.size
        del plates[axis - 1]
        return _Site(tuple(plates), axis, event, slice(self.dim, self.dim + math.prod(plates) * event.numel()))

    def pack(self, trace: Trace) -> Tensor:
        """Return u of a run of the model."""
        parts = []
        for name, site in self.sites.items():
            node: Any = trace.nodes[name]
            raw = biject_to(node["fn"].support).inv(node["value"])
            parts.append(per_datum(raw, site.axis, self.nesting + 1 + len(site.event)))
        return torch.cat(parts, -1)

    def unpack(self, name: str, u: Tensor) -> Tensor:
        """Return the part of u for one site, shape (chains, plates ..., event ...)."""
        site = self.sites[name]
        return u[..., site.columns].reshape(*u.shape[:2], *site.plates, *site.event).movedim(1, site.axis)

    def per_datum(self, name: str, terms: Tensor) -> Tensor:
        """Sum the terms of each datum: (chains, plates ..., rest ...) → (chains, data)."""
        return per_datum(terms, self.sites[name].axis, terms.dim()).sum(-1)


class _Given(Messenger):
    """Give the latents their values from u, and add up log |det dz/du|, (chains, data)."""

    def __init__(self, latents: Latents, u: Tensor) -> None:
        super().__init__()
        self._latents, self._u = latents, u
        self.log_det = u.new_zeros(u.shape[:2])

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self._latents.sites:
            return
        transform, raw = biject_to(msg["fn"].support), self._latents.unpack(name, self._u)
        msg["value"] = transform(raw)
        msg["done"] = True
        self.log_det = self.log_det + self._latents.per_datum(name, transform.log_abs_det_jacobian(raw, msg["value"]))


class Density:
    """log p(z) + log |det dz/du| and log p(x | z) as functions of u, with their gradient."""

    def __init__(self, pair: Pair, latents: Latents) -> None:
        self.pair, self.latents = pair, latents

    def draw(self, x: Tensor, num_chains: int) -> Tensor:
        """Draw latents from the prior; return their u."""
        return self.latents.pack(poutine.trace(self._chains(self.pair.model, num_chains)).get_trace(x))

    def value(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(z) + log |det dz/du| and log p(x | z), both (chains, data)."""
        found, log_det = self.terms(self.pair.model, u, x)
        terms, zero = found.model, torch.zeros_like(log_det)
        if not self.latents.enumerated:
            prior = sum((terms[name] for name in self.latents.sites), zero)
            likelihood = sum((term for name, term in terms.items() if name not in self.latents.sites), zero)
        else:  # a latent that is summed out may tie the two together, so the prior is summed by itself
            unobserved = poutine.block(self.pair.model, hide_fn=lambda site: site.get("is_observed", False))
            prior = sum(self.terms(unobserved, u, x)[0].model.values(), zero)
            likelihood = sum(terms.values(), zero) - prior
        return prior + log_det, likelihood

    def gradient(self, u: Tensor, x: Tensor, beta: Tensor) -> Tensor:
        """Return d/du (log p(z) + log |det dz/du| + β log p(x | z)), the shape of u."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            prior, likelihood = self.value(u, x)
            return torch.autograd.grad((prior + beta * likelihood).sum(), u)[0]

    def _chains(self, model: Callable, num_chains: int) -> Callable:
        return pyro.plate(PARTICLES, num_chains, dim=-self.latents.nesting - 1)(model)

    def terms(self, model: Callable, u: Tensor, x: Tensor) -> tuple[LogWeightTerms, Tensor]:
        """Return the log density of each site, and log |det dz/du|."""
        model = self._chains(model, len(u))
        if self.latents.enumerated:
            model = EnumMessenger(first_available_dim=-self.latents.nesting - 2)(model)
        given = _Given(self.latents, u)
        trace = prune_subsample_sites(poutine.trace(given(model)).get_trace(x))
        trace.compute_log_prob()
        # No guide: enumerated latents are summed out, the others keep their own terms.
        return log_weights_of_traces(trace, Trace(), len(u), self.latents.nesting), given.log_det
