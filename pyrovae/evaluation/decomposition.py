"""Decomposition of the average KL: information about the data, and distance of the aggregate from the prior."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from pyrovae.checks import check_positive
from pyrovae.evaluation.guide_densities import GuideDensities, in_words, log_prob_of_categories
from pyrovae.evaluation.measurement import Result, not_applicable, prepared, progress_bar, runs_at_a_time
from pyrovae.pair import Pair

__all__ = ["KLDecomposition", "KLParts", "kl_decomposition"]

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
    """What :func:`kl_decomposition` found: parts for all latents together, and for each latent that stands alone."""

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
        lines = [f"{self.num_data} data, {sampled}{some}; nats per datum", *_rows(self, math.log(self.num_data))]
        if len(self.latents) > 1 or any(parts.kl is None for parts in self.latents.values()):
            for name, parts in self.latents.items():
                lines += [f"{name} alone", *_rows(parts, math.log(self.num_data), "  ")]
        return lines


LABELS = {
    "kl": "KL from the prior",
    "mutual_information": "  mutual information",
    "marginal_kl": "  KL of the aggregate",
    "total_correlation": "    total correlation",
    "dimension_wise_kl": "    dimension-wise KL",
}


def _rows(parts: KLParts, most: float, indent: str = "") -> Iterator[str]:
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
        if guide.is_exact:
            drawn, num_samples, latents = len(x), 0, _exact(guide, x)
        else:
            drawn = min(len(x), max_data)
            latents = sampled_parts(guide, x, num_samples, drawn, progress)
        parts = latents.pop("")
        return KLDecomposition(
            **vars(parts),
            num_data=len(x),
            num_drawn=drawn,
            num_samples=num_samples,
            latents=latents,
            notes=_notes(parts, latents, len(x), drawn),
        )


def check_counts(num_samples: Any, max_data: Any) -> None:
    """Raise TypeError or ValueError unless both are whole numbers of 2 or more."""
    for name, value in (("num_samples", num_samples), ("max_data", max_data)):
        check_positive(name, value, integer=True)
        if value < 2:
            raise ValueError(f"{name}: expected 2 or more, for a standard error; got {value}.")


def _check_decomposable(guide: GuideDensities, x: Tensor) -> None:
    """Raise NotApplicable unless all data have one prior in common, and the densities are known."""

    def inapplicable(reason: str) -> Exception:
        return not_applicable("kl_decomposition", guide.pair, reason)

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
        each = guide.by_dimension(fn, values[name], marginals=True) if latent.by_dimension and latent.alone else None
        if each is not None and isinstance(fn, torch.distributions.Independent):
            log_q = each.sum(-1, dtype=torch.float64)
        else:
            log_q = guide.log_prob(fn, values[name])
        total = total + log_q
        if latent.alone:
            found[name, "all"] = log_q
            if each is not None:
                found[name, "each"] = each
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
    """Return the mean over data and its standard error, from the mean and the variance of each datum's draws.

    Where all data are drawn from, only the draws vary. With a subset of R of N, drawn without replacement, the data
    vary too: (1 − R/N) · Var_n(mean_n) / R + R/N · mean_n(Var_n) / (R · num_samples).
    """
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


def _exact(guide: GuideDensities, x: Tensor) -> dict[str, KLParts]:
    """Compute the parts for a lone discrete latent by sums over its values."""
    (name,) = guide.latents
    values, log_q = log_prob_of_categories(guide, x, name)
    prior = guide.given(guide.pair.model, x[:1], {name: values}).nodes[name]["fn"]
    log_p = guide.log_prob(prior, values)
    aggregate = log_q.logsumexp(1, keepdim=True) - math.log(len(x))
    ratios = {"kl": log_q - log_p, "mutual_information": log_q - aggregate, "marginal_kl": aggregate - log_p}
    found = {(name, part): (mean_over_categories(log_q, ratio), 0.0) for part, ratio in ratios.items()}
    parts = _kl_parts(found, name)
    return {name: parts, "": parts}


def mean_over_categories(log_q: Tensor, value: Tensor) -> float:
    """Return 1/N Σ_n Σ_k q(k | x_n) value(k, n), from log q, (K, N)."""
    return float(torch.where(log_q > -math.inf, log_q.exp() * value, 0.0).sum()) / log_q.shape[1]


def _notes(parts: KLParts, latents: dict[str, KLParts], num_data: int, drawn: int) -> list[str]:
    notes = []
    if drawn < num_data:
        notes.append(
            f"z was drawn from a random subset of {drawn} of the {num_data} data (max_data); the aggregate is of all"
        )
    most = math.log(num_data)
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
