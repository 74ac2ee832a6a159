"""Decomposition of the average KL: information about the data, and distance of the aggregate from the prior."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.inspect import get_dependencies
from torch import Tensor

from pyrovae.checks import check_positive
from pyrovae.evaluation.measurement import Result, not_applicable, prepared, progress_bar, runs_at_a_time
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

__all__ = ["GuideDensities", "KLDecomposition", "KLParts", "LocalLatent", "kl_decomposition"]

DRAWS_PER_BLOCK = 256


@dataclass(frozen=True, repr=False)
class KLParts:
    """Parts of one average KL, nats per datum; None, or an empty list, where a part does not apply.

    ``kl`` = ``mutual_information`` + ``marginal_kl``, and ``marginal_kl`` = ``total_correlation`` +
    ``dimension_wise_kl``, to rounding: all come from the same draws.
    """

    kl: float | None
    """E_n KL(q(z | x_n) ‖ p(z)). None for a latent whose prior depends on other latents."""
    mutual_information: float
    """I(n; z) = E_n KL(q(z | x_n) ‖ q(z)): what z tells about which of the N data it encodes; at most log N."""
    marginal_kl: float | None
    """KL(q(z) ‖ p(z)), of the aggregate posterior q(z) = 1/N Σ_n q(z | x_n)."""
    total_correlation: float | None
    """KL(q(z) ‖ Π_j q(z_j)): how much the dimensions of the aggregate depend on each other."""
    dimension_wise_kl: float | None
    """Σ_j KL(q(z_j) ‖ p(z_j)), where the prior factorises over dimensions."""
    mutual_information_per_dimension: list[float]
    """I(n; z_j): near 0 for a dimension that the guide does not use."""
    marginal_kl_per_dimension: list[float]
    """KL(q(z_j) ‖ p(z_j))."""
    stderr: dict[str, float | list[float]]
    """Monte Carlo standard error of each of the above, by its name; 0 where the sum over z is exact."""


@dataclass(frozen=True, repr=False)
class KLDecomposition(KLParts, Result):
    """Parts that :func:`kl_decomposition` found, of all latents together and of each latent that stands alone."""

    num_data: int
    """N, the number of data in the aggregate."""
    num_drawn: int
    """Number of data that z was drawn from: N, or fewer (``max_data``)."""
    num_samples: int
    """Number of draws of z from each of those; 0 where the sum over z is exact."""
    latents: dict[str, KLParts]
    """Parts for each latent whose guide depends on x alone and not on another latent, by name."""
    notes: list[str] = field(default_factory=list)

    def _table(self) -> list[str]:
        sampled = "exact sums over z" if not self.num_samples else f"{self.num_samples} samples each"
        some = f" of {self.num_drawn} of them" if self.num_samples and self.num_drawn < self.num_data else ""
        lines = [f"{self.num_data} data, {sampled}{some}; nats per datum", *_part_rows(self, math.log(self.num_data))]
        if len(self.latents) > 1 or any(parts.kl is None for parts in self.latents.values()):
            for name, parts in self.latents.items():
                lines += [f"{name} alone", *_part_rows(parts, math.log(self.num_data), "  ")]
        return lines


LABELS = {
    "kl": "KL from the prior",
    "mutual_information": "  mutual information",
    "marginal_kl": "  KL of the aggregate",
    "total_correlation": "    total correlation",
    "dimension_wise_kl": "    dimension-wise KL",
}


def _part_rows(parts: KLParts, most: float, indent: str = "") -> Iterator[str]:
    """Yield a line of the table for each part that applies; ``most`` is log N."""
    for name, label in LABELS.items():
        if (value := getattr(parts, name)) is not None:
            error = f" ± {parts.stderr[name]:.3f}" if parts.stderr[name] else ""
            limit = f"  at most log N = {most:.3f}" if name == "mutual_information" else ""
            yield f"{indent + label:<28}{value:>9.3f}{error}{limit}"


def kl_decomposition(
    pair: Pair,
    x: Tensor,
    *,
    num_samples: int = 10,
    max_data: int = 2000,
    binarize: bool = False,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool | None = None,
) -> KLDecomposition:
    """Split the average KL of guide from prior by way of the aggregate posterior q(z) = 1/N Σ_n q(z | x_n).

        1/N Σ_n KL(q(z | x_n) ‖ p(z)) = I(n; z) + KL(q(z) ‖ p(z))                                 (Hoffman and Johnson)
                       KL(q(z) ‖ p(z)) = KL(q(z) ‖ Π_j q(z_j)) + Σ_j KL(q(z_j) ‖ p(z_j))             (Chen et al.)

    The second line holds where the prior factorises over dimensions; the guide's own marginals must be known (it
    factorises, or is a multivariate normal). The first holds for all latents together, however the guide chains
    them: its density at each draw is computed given each of the N data.

    For these N data the estimates are unbiased, as every datum is in the aggregate and only z is drawn. As estimates
    for the population they are biased: I(n; z) is at most log N, and lies in expectation below the information that z
    has of a new x (Poole et al. 2019). The KL of the aggregate is too large by the same amount. A note says when I(n;
    z) is near log N. Any part may come out negative by Monte Carlo error; it is given as it is, with a note.

    Where the only latent is discrete and enumerable, the sums over z are exact and nothing is drawn.

    Time grows with max_data · N · num_samples · dimensions; memory does not.

    Args:
        num_samples: draws of z a datum, 2 or more.
        max_data: where N is larger, z is drawn from a random subset of this many data. The aggregate is of all N all
            the same, so the estimates stay unbiased; the standard errors include the choice of the subset.
        pair, x, binarize, device, seed, progress: as in :func:`pyrovae.evaluate`; two data or more.

    Raises:
        TypeError, ValueError: bad data or options, before work starts.
        NotApplicable: the guide samples nothing, a latent outside the data plate, a point mass, or an auxiliary
            variable; the prior depends on x.

    References:
        Hoffman and Johnson (2016), ELBO surgery. Chen, Li, Grosse and Duvenaud (2018), Isolating sources of
        disentanglement in VAEs. Poole, Ozair, van den Oord, Alemi and Tucker (2019), On variational bounds of mutual
        information.
    """
    check_counts(num_samples, max_data)
    with prepared(pair, x, at_least=2, binarize=binarize, device=device, seed=seed) as x, torch.no_grad():
        guide = GuideDensities.of(pair, x, "kl_decomposition")
        _check_decomposable(guide, x)
        drawn = len(x) if guide.is_exact else min(len(x), max_data)
        latents = _exact_parts(guide, x) if guide.is_exact else sampled_parts(guide, x, num_samples, drawn, progress)
        parts = latents.pop("")
        num_samples = 0 if guide.is_exact else num_samples
        sizes: dict[str, Any] = {"num_data": len(x), "num_drawn": drawn, "num_samples": num_samples}
        return KLDecomposition(**vars(parts), **sizes, latents=latents, notes=_notes_on(parts, latents, len(x), drawn))


def check_counts(num_samples: Any, max_data: Any) -> None:
    """Raise TypeError or ValueError unless both are whole numbers of 2 or more."""
    for name, value in (("num_samples", num_samples), ("max_data", max_data)):
        check_positive(name, value, integer=True)
        if value < 2:
            raise ValueError(f"{name}: expected 2 or more, for a standard error; got {value}.")


def _check_decomposable(guide: GuideDensities, x: Tensor) -> None:
    """Raise NotApplicable unless all data have one prior in common, and the densities are known."""
    inapplicable = partial(not_applicable, "kl_decomposition", guide.pair)
    if guide.outside:
        raise inapplicable(f"{in_words(guide.outside)} outside the plate 'data', shared by all the data.")
    few = x[torch.linspace(0, len(x) - 1, min(len(x), 16)).long()]
    model_trace, guide_trace = guide.draw(few, 2)
    for name in guide.latents:
        if name not in model_trace.nodes:
            raise inapplicable(f"site '{name}' is auxiliary, a guide's variable that has no prior.")
    # The prior of the same draws must not change when other data are observed.
    values = {name: guide_trace.nodes[name]["value"] for name in guide.latents}
    other = guide.given(guide.pair.model, few.flip(0), values)
    for name, latent in guide.latents.items():
        if guide.structure.enumerated and not latent.fixed_prior:
            continue  # it depends on latents that the model has just drawn, too
        at, again = (guide.log_prob(trace.nodes[name]["fn"], values[name]) for trace in (model_trace, other))
        if not torch.allclose(at, again, rtol=1e-4, atol=1e-4):
            raise inapplicable(f"the prior of '{name}' depends on x, so the data have no prior in common.")


Terms = dict[tuple[str, str], Tensor]
"""Log densities by latent (its name, or "" for all together) and by "all" its dimensions or "each" of them."""


def sampled_parts(
    guide: GuideDensities, x: Tensor, num_samples: int, drawn: int, progress: bool | None, *, joint: bool = True
) -> dict[str, KLParts]:
    """Estimate the parts for each latent that stands alone, by name, and with ``joint`` for all together, under ""."""
    rows = x if drawn == len(x) else x[torch.randperm(len(x))[:drawn].to(x.device)]
    rows_a_chunk = max(1, DRAWS_PER_BLOCK // num_samples)
    blocks = x.split(runs_at_a_time(x.device, rows_a_chunk * num_samples * guide.width))
    chained = joint and not all(latent.alone for latent in guide.latents.values())
    functions = None if chained else [guide.functions(data) for data in blocks]
    means: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    variances: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    for chunk in progress_bar("KL decomposition", progress, rows.split(rows_a_chunk)):
        model_trace, guide_trace = guide.draw(chunk, num_samples)
        sites = {name: guide_trace.nodes[name] for name in guide.latents}
        values = {name: guide.flat(site["value"]) for name, site in sites.items()}
        sums: Terms = {}
        for i, data in enumerate(blocks):
            if functions is None:  # the guide run on the data at the draws, (B, 1)
                trace = guide.given(guide.pair.guide, data, values)
                given = {name: trace.nodes[name]["fn"] for name in guide.latents}
            else:
                given = functions[i]
            for key, term in _densities(guide, given, values, joint).items():
                total = term.logsumexp(1)
                sums[key] = torch.logaddexp(sums[key], total) if key in sums else total
        shape = (num_samples, len(chunk))
        log_q = {key: (total - math.log(len(x))).unflatten(0, shape) for key, total in sums.items()}
        fns, values = ({name: site[what] for name, site in sites.items()} for what in ("fn", "value"))
        own = _densities(guide, fns, values, joint)
        for key, part in _parts_of_draws(own, log_q, _priors(guide, model_trace, guide_trace, joint)).items():
            means[key].append(part.mean(0))
            variances[key].append(part.var(0))
    found = {key: _estimate(torch.cat(means[key]), torch.cat(variances[key]), num_samples, len(x)) for key in means}
    parts = {name: _kl_parts(found, name) for name, latent in guide.latents.items() if latent.alone}
    if joint:
        whole = _kl_parts(found, "")
        if len(guide.latents) == 1 and parts:
            (only,) = parts.values()
            whole = replace(only, kl=whole.kl, marginal_kl=whole.marginal_kl, stderr={**only.stderr, **whole.stderr})
        parts[""] = whole
    return parts


def _densities(guide: GuideDensities, functions: dict[str, Any], values: dict[str, Tensor], joint: bool) -> Terms:
    """Return log q(z | x), (draws, data), in float64; and that of each dimension, (draws, data, dimensions)."""
    found: Terms = {}
    total: Tensor | float = 0.0
    for name, fn in functions.items():
        latent = guide.latents[name]
        if latent.by_dimension and latent.alone:
            each = found[name, "each"] = guide.by_dimension(fn, values[name], marginals=True)
        if latent.by_dimension and latent.alone and isinstance(fn, torch.distributions.Independent):
            log_q = each.sum(-1, dtype=torch.float64)
        else:
            log_q = guide.log_prob(fn, values[name])
        total = total + log_q
        if latent.alone:
            found[name, "all"] = log_q
    if joint:
        found["", "all"] = torch.as_tensor(total)
    return found


def _priors(guide: GuideDensities, model_trace: Any, guide_trace: Any, joint: bool) -> Terms:
    """Return log p(z) at the draws, with the keys of :func:`_densities`."""
    found: Terms = {}
    for name, latent in guide.latents.items():
        if latent.alone and latent.fixed_prior:
            fn, value = model_trace.nodes[name]["fn"], guide_trace.nodes[name]["value"]
            found[name, "all"] = guide.log_prob(fn, value)
            if latent.by_dimension and latent.prior_by_dimension:
                found[name, "each"] = guide.by_dimension(fn, value)
    if joint:
        found["", "all"] = guide.log_prior(model_trace, guide_trace)
    return found


def _parts_of_draws(own: Terms, log_q: Terms, log_p: Terms) -> Terms:
    """Return each part of :class:`KLParts` at the draws, (draws, data[, dimensions]), by latent and part."""
    found: Terms = {}
    for (name, kind), aggregate in log_q.items():
        prior = log_p.get((name, kind))
        if kind == "each":
            found[name, "mutual_information_per_dimension"] = (own[name, kind] - aggregate).double()
            product = aggregate.sum(-1, dtype=torch.float64)
            found[name, "total_correlation"] = log_q[name, "all"] - product
            if prior is not None:
                found[name, "marginal_kl_per_dimension"] = (aggregate - prior).double()
                found[name, "dimension_wise_kl"] = product - log_p[name, "all"]
        else:
            found[name, "mutual_information"] = own[name, kind] - aggregate
            if prior is not None:
                found[name, "kl"] = own[name, kind] - prior
                found[name, "marginal_kl"] = aggregate - prior
    return found


def _estimate(mean: Tensor, variance: Tensor, num_samples: int, num_data: int) -> tuple[Any, Any]:
    """Return the mean over data and its standard error, from the mean and the variance of each datum's draws."""
    # Only the draws vary where all data are drawn from. With a subset of R of N, drawn without replacement, data vary
    # too: (1 − R/N) · Var_n(mean_n) / R + R/N · mean_n(Var_n) / (R · num_samples).
    fraction = len(mean) / num_data
    error = fraction * variance.mean(0) / num_samples
    if fraction < 1:
        error = error + (1 - fraction) * mean.var(0)
    return mean.mean(0).tolist(), (error / len(mean)).sqrt().tolist()


def _kl_parts(found: dict[tuple[str, str], tuple[Any, Any]], latent: str) -> KLParts:
    """Collect the (estimate, error) of one latent; parts that are missing are None or empty."""
    parts = {part: estimate for (name, part), estimate in found.items() if name == latent}
    missing: dict[str, Any] = {f.name: [] if f.name.endswith("per_dimension") else None for f in fields(KLParts)}
    values = {part: value for part, (value, _) in parts.items()}
    return KLParts(**{**missing, **values, "stderr": {part: error for part, (_, error) in parts.items()}})


def _exact_parts(guide: GuideDensities, x: Tensor) -> dict[str, KLParts]:
    """Compute the parts for a lone discrete latent by sums over its values."""
    (name,) = guide.latents
    values, log_q = log_prob_of_categories(guide, x, name)
    prior = guide.given(guide.pair.model, x[:1], {name: values}).nodes[name]["fn"]
    log_p = guide.log_prob(prior, values)
    aggregate = log_q.logsumexp(1, keepdim=True) - math.log(len(x))
    ratios = {"kl": log_q - log_p, "mutual_information": log_q - aggregate, "marginal_kl": aggregate - log_p}
    found = {(name, part): (mean_over_categories(log_q, ratio), 0.0) for part, ratio in ratios.items()}
    return dict.fromkeys((name, ""), _kl_parts(found, name))


def mean_over_categories(log_q: Tensor, value: Tensor) -> float:
    """Return 1/N Σ_n Σ_k q(k | x_n) value(k, n), from log q, (K, N)."""
    return float(torch.where(log_q > -math.inf, log_q.exp() * value, 0.0).sum()) / log_q.shape[1]


def _notes_on(parts: KLParts, latents: dict[str, KLParts], num_data: int, drawn: int) -> list[str]:
    notes, most = [], math.log(num_data)
    if drawn < num_data:
        subset = f"a random subset of {drawn} of the {num_data} data (max_data)"
        notes.append(f"z was drawn from {subset}; the aggregate is of all")
    if parts.mutual_information > most - math.log(2):
        notes.append(
            f"mutual information is near log N = {most:.3f}, the most that {num_data} data can show: for the "
            "population it is a lower bound, and the KL of the aggregate an upper one"
        )
    below = _below_zero(parts)
    if len(latents) > 1 or None in (parts.kl for parts in latents.values()):
        below += [f"{label} of {name}" for name, alone in latents.items() for label in _below_zero(alone)]
    if below:
        notes.append(f"below 0 by Monte Carlo error; the quantity is not: {', '.join(below)}")
    return notes


def _below_zero(parts: KLParts) -> list[str]:
    """Name the parts that came out negative."""
    below = [label.strip() for name, label in LABELS.items() if (getattr(parts, name) or 0.0) < 0]
    for name in ("mutual_information_per_dimension", "marginal_kl_per_dimension"):
        values = getattr(parts, name)
        if count := sum(value < 0 for value in values):
            below.append(f"{name.replace('_', ' ').replace('kl', 'KL')} ({count} of {len(values)})")
    return below


# Densities of the guide -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalLatent:
    """Facts about one latent in the data plate."""

    alone: bool  # its guide depends on x and on no other latent
    by_dimension: bool  # the guide's marginals over dimensions are known
    fixed_prior: bool  # its prior depends on no other latent
    prior_by_dimension: bool  # its prior factorises over dimensions
    is_category: bool  # it has one value a datum, of finitely many: sums over them are exact


@dataclass(frozen=True)
class GuideDensities:
    """Densities of a pair's guide at draws z, for many data at once."""

    pair: Pair
    structure: Structure
    axis: int  # axis of the data, among batch dims with the particles first
    latents: dict[str, LocalLatent]
    outside: tuple[str, ...]  # the guide's latents outside the data plate
    width: int  # numbers in the widest tensor, for a draw and a datum

    @staticmethod
    def of(pair: Pair, x: Tensor, quantity: str) -> GuideDensities:
        """Find out about the latents of a pair. NotApplicable, with the name of the quantity, where it has none."""
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
            fn, value = site["fn"], site["value"]
            latents[name] = LocalLatent(
                alone=set(guide_needs[name]) == {name},
                by_dimension=log_prob_per_dimension(fn, value, marginals=True) is not None,
                fixed_prior=set(model_needs.get(name, ())) == {name},
                prior_by_dimension=prior is not None and log_prob_per_dimension(prior["fn"], value) is not None,
                is_category=bool(fn.has_enumerate_support)
                and not isinstance(fn, torch.distributions.Independent)
                and value.numel() == 2 * len(few) * fn.event_shape.numel(),
            )
        widths = [site["value"][0].numel() // len(few) for site in sites.values()]
        if not all(latent.alone for latent in latents.values()):  # its networks run for each draw and datum
            widths += [p.shape[0] for p in pair.parameters() if p.dim() == 2]
        frames: dict[str, Any] = {f.name: f for site in sites.values() for f in site["cond_indep_stack"]}
        axis = structure.max_plate_nesting + 1 + frames["data"].dim
        return GuideDensities(pair, structure, axis, latents, outside, max(widths))

    @property
    def is_exact(self) -> bool:
        """Return whether the only latent is a category with a fixed prior: then nothing need be drawn."""
        first = next(iter(self.latents.values()))
        return len(self.latents) == 1 and first.is_category and first.fixed_prior

    def draw(self, rows: Tensor, num_samples: int) -> tuple[Any, Any]:
        """Return traces (model, guide) of ``num_samples`` ≥ 2 draws for each of the rows."""
        programs = self.pair.model, self.pair.guide
        return trace_pair(*programs, (rows,), {}, num_particles=num_samples, structure=self.structure)

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
        at = self.axis
        values = {n: v.expand(*v.shape[:at], len(data), *v.shape[at + 1 :]) for n, v in values.items()}
        draws = pyro.plate(PARTICLES, len(next(iter(values.values()))), dim=-self.structure.max_plate_nesting - 1)
        return poutine.trace(poutine.condition(draws(function), data=values)).get_trace(data)

    def log_prob(self, fn: Any, value: Tensor) -> Tensor:
        """Return the log density, (draws, data), in float64."""
        return self.arranged(fn.log_prob(value), event_dim=0).sum(-1, dtype=torch.float64)

    def by_dimension(self, fn: Any, value: Tensor, *, marginals: bool = False) -> Tensor:
        """Return the log density of each dimension, (draws, data, dimensions)."""
        each: Any = log_prob_per_dimension(fn, value, marginals=marginals)
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
