"""Guide densities: log q(z | x_m) of draws z for many data at once, as the aggregate posterior needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.inspect import get_dependencies
from torch import Tensor

from pyrovae.evaluation.measurement import not_applicable
from pyrovae.evaluation.sites import is_local, is_point, log_prob_per_dimension, per_datum
from pyrovae.infer.weights import (
    PARTICLES,
    Structure,
    log_weights_of_traces,
    same_random_state,
    sample_sites,
    trace_pair,
)
from pyrovae.pair import Pair

__all__ = ["GuideDensities", "LocalLatent", "in_words", "log_prob_of_categories"]


@dataclass(frozen=True)
class LocalLatent:
    """What is known of one latent in the data plate."""

    alone: bool
    """Whether its guide depends on x and on no other latent."""
    by_dimension: bool
    """Whether the guide's marginals over dimensions are known."""
    fixed_prior: bool
    """Whether its prior depends on no other latent."""
    prior_by_dimension: bool
    """Whether its prior factorises over dimensions."""
    is_category: bool
    """Whether it has one value a datum, of finitely many: sums over them are exact."""


@dataclass(frozen=True)
class GuideDensities:
    """Densities of a pair's guide at draws z, for many data at once."""

    pair: Pair
    structure: Structure
    axis: int
    """Axis of the data, among batch dims with the particles first."""
    latents: dict[str, LocalLatent]
    outside: tuple[str, ...]
    """The guide's latents outside the data plate."""
    width: int
    """Numbers in the widest tensor, for a draw and a datum."""

    @staticmethod
    def of(pair: Pair, x: Tensor, quantity: str) -> GuideDensities:
        """Find out about the latents of a pair; ``quantity`` names the measurement in errors.

        Raises:
            NotApplicable: the guide samples no latent in the data plate, or one with a mask or a point mass.
        """
        few = x[:2]
        structure = Structure.of(pair.model, pair.guide, (few,), {})
        model_trace, guide_trace = trace_pair(pair.model, pair.guide, (few,), {}, num_particles=2, structure=structure)
        sampled = {name: site for name, site in sample_sites(guide_trace).items() if not site["is_observed"]}
        sites = {name: site for name, site in sampled.items() if is_local(site)}
        outside = tuple(name for name in sampled if name not in sites)
        reasons = []
        if not sampled:
            reasons.append("its guide samples no latent. Write a guide for those it sums out.")
        elif not sites:
            reasons.append(f"{in_words(outside)} outside the plate 'data', so no latent encodes a datum.")
        for name, site in sites.items():
            if is_point(site):
                reasons.append(f"the guide puts all its mass on one value of '{name}', at infinite KL.")
            elif site["mask"] is not None or model_trace.nodes.get(name, site)["mask"] is not None:
                reasons.append(f"latent '{name}' has a mask, and then no single density. Drop the mask.")
        if reasons:
            raise not_applicable(quantity, pair, reasons[0])
        guide_needs: Any = get_dependencies(pair.guide, (few,))["prior_dependencies"]
        model_needs: Any = get_dependencies(pair.model, (few,))["prior_dependencies"]
        latents = {}
        for name, site in sites.items():
            prior: Any = model_trace.nodes.get(name)
            latents[name] = LocalLatent(
                alone=set(guide_needs[name]) == {name},
                by_dimension=log_prob_per_dimension(site["fn"], site["value"], marginals=True) is not None,
                fixed_prior=set(model_needs.get(name, ())) == {name},
                prior_by_dimension=prior is not None and log_prob_per_dimension(prior["fn"], site["value"]) is not None,
                is_category=bool(site["fn"].has_enumerate_support)
                and not isinstance(site["fn"], torch.distributions.Independent)
                and site["value"].numel() == 2 * len(few) * site["fn"].event_shape.numel(),
            )
        widths = [site["value"][0].numel() // len(few) for site in sites.values()]
        if not all(latent.alone for latent in latents.values()):  # its networks run for each draw and datum
            widths += [p.shape[0] for p in pair.parameters() if p.dim() == 2]
        frames: dict[str, Any] = {f.name: f for site in sites.values() for f in site["cond_indep_stack"]}
        axis = structure.max_plate_nesting + 1 + frames["data"].dim
        return GuideDensities(pair, structure, axis, latents, outside, max(widths))

    @property
    def is_exact(self) -> bool:
        """Whether the only latent is a category with a fixed prior: then nothing need be drawn."""
        first = next(iter(self.latents.values()))
        return len(self.latents) == 1 and first.is_category and first.fixed_prior

    def draw(self, rows: Tensor, num_samples: int) -> tuple[Any, Any]:
        """Return traces (model, guide) of ``num_samples`` ≥ 2 draws for each of the rows."""
        return trace_pair(
            self.pair.model, self.pair.guide, (rows,), {}, num_particles=num_samples, structure=self.structure
        )

    def flat(self, value: Tensor) -> Tensor:
        """Flatten values of draws and rows to B = draws · rows single draws, which broadcast against data."""
        return value.movedim(self.axis, 1).flatten(0, 1).unsqueeze(1).movedim(1, self.axis)

    def functions(self, data: Tensor) -> dict[str, Any]:
        """Return q(z | x_m) of each latent that needs x alone, for all the data."""
        with same_random_state():  # so that draws do not depend on the number of blocks
            trace: Any = poutine.trace(self.pair.guide).get_trace(data)
        return {name: trace.nodes[name]["fn"] for name, latent in self.latents.items() if latent.alone}

    def given(self, function: Callable, data: Tensor, values: dict[str, Tensor]) -> Any:
        """Run the pair's model or guide on the data at given draws, (draws, data) or (draws, 1); return the trace."""
        values = {
            name: v.expand(*v.shape[: self.axis], len(data), *v.shape[self.axis + 1 :]) for name, v in values.items()
        }
        draws = pyro.plate(PARTICLES, len(next(iter(values.values()))), dim=-self.structure.max_plate_nesting - 1)
        return poutine.trace(poutine.condition(draws(function), data=values)).get_trace(data)

    def log_prob(self, fn: Any, value: Tensor) -> Tensor:
        """Return the log density, (draws, data), in float64."""
        return self.arranged(fn.log_prob(value), event_dim=0).sum(-1, dtype=torch.float64)

    def by_dimension(self, fn: Any, value: Tensor, *, marginals: bool = False) -> Tensor:
        """Return the log density of each dimension, (draws, data, dimensions)."""
        each = log_prob_per_dimension(fn, value, marginals=marginals)
        assert each is not None
        return self.arranged(each)

    def log_prior(self, model_trace: Any, guide_trace: Any) -> Tensor:
        """Return log p(z) of all latents at the draws, (draws, data); those that the guide lacks are summed out."""
        if not self.structure.enumerated:
            nodes = model_trace.nodes
            each = [self.log_prob(nodes[name]["fn"], nodes[name]["value"]) for name in self.latents]
            return torch.stack(each).sum(0)
        for site in model_trace.nodes.values():
            if site["type"] == "sample" and site["is_observed"]:
                site["unscaled_log_prob"] = torch.zeros_like(site["unscaled_log_prob"])
        num_samples = len(guide_trace.nodes[next(iter(self.latents))]["value"])
        terms = log_weights_of_traces(model_trace, guide_trace, num_samples, self.structure.max_plate_nesting).model
        total = torch.stack([term.double() for term in terms.values()]).sum(0)
        if total.dim() > 2:
            raise NotImplementedError("a plate beside 'data' that all sites lie in, together with enumerated latents.")
        return total

    def arranged(self, each: Tensor, event_dim: int = 1) -> Tensor:
        """Arrange a value as (draws, data, dimensions); elements of inner plates count as dimensions."""
        return per_datum(each, self.axis, self.structure.max_plate_nesting + 1 + event_dim)


def log_prob_of_categories(guide: GuideDensities, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return the K values of a discrete latent that stands alone, and log q(z = k | x_n), (K, N)."""
    functions = [guide.functions(data)[name] for data in x.split(1000)]
    values = functions[0].enumerate_support(expand=False)
    values = values.reshape(len(values), *(1,) * guide.structure.max_plate_nesting, *functions[0].event_shape)
    return values, torch.cat([guide.log_prob(fn, values) for fn in functions], 1)


def in_words(names: Iterable[str]) -> str:
    """Return the names quoted, as the subject of "lies"."""
    return ", ".join(f"'{name}'" for name in names) + " lies"
