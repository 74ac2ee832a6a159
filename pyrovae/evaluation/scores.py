"""Scores of a pair: evidence with its error, the bound in parts, and how far the guide's weights can be trusted."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyrovae.checks import check_positive
from pyrovae.evaluation import importance_sampling
from pyrovae.evaluation.importance_sampling import FEWEST_SAMPLES, GuideQuality, MeanWeight, Summary, stderr_over_data
from pyrovae.evaluation.measurement import Result, prepared
from pyrovae.evaluation.posterior_collapse import ACTIVE_UNIT_VARIANCE
from pyrovae.evaluation.sites import is_point, log_prob_per_dimension, mean_or_value
from pyrovae.infer.weights import LogWeightTerms, sample_sites
from pyrovae.pair import Pair

__all__ = ["Scores", "importance_scores", "title_of"]


@dataclass(frozen=True, repr=False)
class Scores(Result):
    """Scores that :func:`evaluate` measured. Nats per datum, unless said otherwise; None where one does not apply."""

    num_data: int
    num_samples: int
    """Importance samples a datum; 0 where all latents are summed out, and nothing is sampled."""
    log_evidence: float
    """mean_n log 1/K Σ_k w_kn: in expectation below log p(x), by about Var(w)/(2K p(x)²) (Burda et al. 2016)."""
    log_evidence_stderr: float | None
    """Monte Carlo standard error of ``log_evidence`` for these very data, by the delta method. It is 0 where nothing
    is sampled, and None with one sample."""
    log_evidence_stderr_data: float | None
    """Standard error of ``log_evidence`` as an estimate for the population that the data were drawn from."""
    elbo: float
    """mean over data and samples of log w."""
    reconstruction: float | None
    """E_q[log p(x | z)]; ``elbo`` = ``reconstruction`` − ``kl``."""
    kl: float | None
    """E_q[log q(z | x) − log p(z)], summed over latents."""
    kl_per_latent: dict[str, float]
    kl_per_dimension: dict[str, list[float]]
    """KL of each dimension, for latents whose prior and guide factorise over dimensions."""
    active_units: int | None
    """Latent dimensions whose posterior mean varies over the data by more than 0.01 (variance; Burda et al. 2016)."""
    active_units_per_latent: dict[str, int]
    units_per_latent: dict[str, int]
    """Dimensions of each continuous latent, active or not."""
    log_likelihood: float | None
    """Exact log p(x), where the pair has ``log_prob``."""
    bits_per_dim: float
    """−log_evidence / (D log 2)."""
    log_evidence_per_datum: Tensor | None = field(default=None, compare=False)
    """(N,), float64, on the CPU; None with a global latent."""
    guide: GuideQuality | None = field(default=None, compare=False)
    """Pareto-k̂ and effective sample size of the weights behind ``log_evidence``, datum by datum."""
    too_few_for_k: bool = False
    """True where the weights have a tail but the samples are too few to fit it: then ``guide`` is None."""
    also: dict[str, Any] = field(default_factory=dict, compare=False)
    """Other quantities that were asked for, by the name of their function."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Quantities that were asked for and do not apply to this pair, with the reason."""
    notes: list[str] = field(default_factory=list)
    """Reasons why these numbers do not mean what they usually do."""

    def rows(self) -> list[tuple[str, str, str]]:
        """Return the table: quantity, value, remark."""
        monte_carlo = self.log_evidence_stderr if self.num_samples else None
        errors = errors_in_words(monte_carlo, self.log_evidence_stderr_data)
        if self.num_samples == 1:
            errors = f"one sample: Monte Carlo error unknown, {errors}".removesuffix(", ")
        # With nothing sampled, evidence, exact likelihood and ELBO are one number.
        rows = [("log evidence" if self.num_samples else "log evidence, exact", self.log_evidence, errors)]
        if self.num_samples:
            if self.log_likelihood is not None:
                rows.append(("log likelihood, exact", self.log_likelihood, ""))
            rows.append(("ELBO", self.elbo, ""))
        if self.reconstruction is not None and self.kl is not None:
            rows += [("  reconstruction", self.reconstruction, ""), ("  KL", self.kl, "")]
            if len(self.kl_per_latent) > 1:
                rows += [(f"    KL of {name}", kl, "") for name, kl in self.kl_per_latent.items()]
        table = [(name, f"{value:.3f}", note) for name, value, note in rows]
        table.append(("bits per dimension", f"{self.bits_per_dim:.3f}", ""))
        if self.active_units is not None:
            each = "+".join(str(count) for count in self.active_units_per_latent.values())
            detail = f" ({each})" if len(self.active_units_per_latent) > 1 else ""
            table.append(("active units", str(self.active_units), f"of {sum(self.units_per_latent.values())}{detail}"))
        if self.guide is not None:
            bad, count = self.guide.num_bad, len(self.guide.k)
            table.append((f"k̂ above {self.guide.threshold:.2g}", str(bad), f"of {count}: {_trust(bad / count)}"))
        elif self.too_few_for_k:
            table.append(("k̂", "–", f"needs {FEWEST_SAMPLES} samples each, or more"))
        return table

    def __repr__(self) -> str:
        """Return the table, then the table of each quantity in ``also``, and why others were left out."""
        more = [f"{title_of(name)}: {result!r}" for name, result in self.also.items()]
        reasons = "\n".join(f"LEFT OUT, {title_of(name)}: {reason}" for name, reason in self.left_out.items())
        return "\n\n".join([super().__repr__(), *more, *([reasons] if reasons else [])])

    def _table(self) -> list[str]:
        labels = ("exact log likelihood", "reconstruction and KL", "active units")
        values = (self.log_likelihood, self.kl, self.active_units)
        absent = [label for label, value in zip(labels, values, strict=True) if value is None]
        sampled = f"{self.num_samples} sample{'s' * (self.num_samples > 1)} each" if self.num_samples else "no sampling"
        return [
            f"{self.num_data} data, {sampled}; nats per datum",
            *(f"{name:<24}{value:>12}  {note}".rstrip() for name, value, note in self.rows()),
            *([f"does not apply to this pair: {', '.join(absent)}"] if absent else []),
        ]


def errors_in_words(monte_carlo: float | None, over_data: float | None = None) -> str:
    """Return the standard errors that are known, as the remark behind a number."""
    errors = ((monte_carlo, "Monte Carlo"), (over_data, "over data"))
    return ", ".join(f"± {error:.3f} {source}" for error, source in errors if error is not None)


def title_of(quantity: str) -> str:
    """Return the name of a quantity's function as readers see it: ``kl_decomposition`` is "KL decomposition"."""
    title = quantity.replace("_", " ").replace("kl ", "KL ")
    return title[0].upper() + title[1:]


def _trust(bad: float) -> str:
    """Say in words what it means that this share of the data has a k̂ above the threshold."""
    if bad <= 0.01:
        return "the guide is a good importance sampler"
    return f"{'for a few data' if bad <= 0.1 else 'the guide misses mass;'} the evidence may be too low"


def importance_scores(
    pair: Pair,
    x: Tensor,
    *,
    num_samples: int,
    binarize: bool = False,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool | None = None,
) -> Scores:
    """Score a pair by one pass of importance sampling: :func:`pyrovae.evaluate` without its ``also``."""
    check_positive("num_samples", num_samples, integer=True)
    with prepared(pair, x, binarize=binarize, device=device, seed=seed) as x, torch.no_grad():
        sampling = importance_sampling.ImportanceSampling(pair, x, num_samples)
        sums = _Sums(fits_tails=sampling.has_tails and sampling.num_samples >= FEWEST_SAMPLES)
        for summaries in sampling.run(_summary, progress):
            sums.add_chunk(summaries)
        exact = None
        if pair.log_prob is not None:
            exact = float(sum(pair.log_prob(rows).double().sum() for rows in sampling.chunks)) / len(x)
        return _scores(sampling, sums, x, exact)


def _summary(terms: LogWeightTerms, particles: int) -> Summary:
    """Return log w, (K, units); the reconstruction and each latent's KL, (); KL and means by dimension where known."""
    sites = sample_sites(terms.model_trace)
    observed = [terms.model[n].double().sum() for n, site in sites.items() if site["is_observed"] and n in terms.model]
    summary = {
        ("log_w", ""): terms.log_weights.reshape(particles, -1).double(),
        ("reconstruction", ""): torch.stack(observed).sum() if observed else terms.log_weights.new_zeros(()).double(),
    }
    for name, log_q in terms.guide.items():
        log_p = terms.model.get(name, torch.zeros_like(log_q))
        summary["kl", name] = (log_q.double() - log_p.double()).sum()
        guide_site: Any = terms.guide_trace.nodes[name]
        model_site: Any = terms.model_trace.nodes.get(name)
        value, fn = guide_site["value"], guide_site["fn"]
        if value.is_floating_point() and not fn.support.is_discrete:
            mean = mean_or_value(fn, value).expand(value.shape)
            mean = mean.reshape(particles, -1, *(fn.event_shape or (1,))).flatten(2)
            summary["mean", name] = mean.sum(0)
        own = log_prob_per_dimension(fn, value)
        prior = None if model_site is None else log_prob_per_dimension(model_site["fn"], value)
        if own is not None and prior is not None:
            summary["dims", name] = (own - prior).double().flatten(0, -2).sum(0)
    return summary


class _Sums:
    """Sums over particles and data. Apart from the fit of tails, nothing is read from the device here."""

    def __init__(self, *, fits_tails: bool) -> None:
        self.evidence: list[Tensor] = []  # per unit, as are the next two
        self.relative_variance: list[Tensor] = []
        self.elbo: list[Tensor] = []
        self.means: dict[str, list[Tensor]] = defaultdict(list)
        self.total: Summary = {}
        self.quality: list[importance_sampling.WeightQuality] = []
        self.fits_tails = fits_tails

    def add_chunk(self, summaries: Iterable[Summary]) -> None:
        parts: list[Tensor] = []
        means: Summary = {}
        for summary in summaries:
            parts.append(summary.pop(("log_w", "")))
            for key, value in summary.items():
                sums = means if key[0] == "mean" else self.total
                sums[key] = sums[key] + value if key in sums else value
        log_w = torch.cat(parts)
        weight = MeanWeight(log_w)
        self.evidence.append(weight.log_mean)
        self.relative_variance.append(weight.variance)
        self.elbo.append(log_w.mean(0))
        for (_, name), total in means.items():
            self.means[name].append(total / len(log_w))
        self.fits_tails = self.fits_tails and not bool((log_w.isnan() | (log_w == math.inf)).any())
        if self.fits_tails:
            self.quality.append(importance_sampling.guide_quality_of(log_w))


def _scores(sampling: importance_sampling.ImportanceSampling, sums: _Sums, x: Tensor, exact: float | None) -> Scores:
    evidence, relative_variance = torch.cat(sums.evidence), torch.cat(sums.relative_variance)
    num_data, num_samples, sampled = len(x), sampling.num_samples, bool(sampling.probe.guide)
    has_split = not sampling.structure.enumerated  # a latent that is summed out ties prior and likelihood together
    has_unit_per_datum = len(evidence) == num_data  # with a global latent, all data are one unit
    total = num_data * num_samples
    means = {name: mean for name, parts in sums.means.items() if len(mean := torch.cat(parts)) > 1}
    active = {name: int((mean.var(0) > ACTIVE_UNIT_VARIANCE).sum()) for name, mean in means.items()}
    kl = {name: float(value) / total for (kind, name), value in sums.total.items() if kind == "kl"}
    notes = []
    if points := [name for name, site in sample_sites(sampling.probe.guide_trace).items() if is_point(site)]:
        notes.append(
            f"the guide puts all its mass on one value of {', '.join(points)}: what is called ELBO and evidence here "
            "is a log joint density, and bounds nothing"
        )
    if sampled and not has_unit_per_datum:
        effective = float((1 / (relative_variance * (num_samples - 1) / num_samples + 1 / num_samples)).min())
        notes.append(
            f"a global latent: one weight for all the data, of {num_samples} samples effectively {effective:.1f}; "
            "below some 100 the evidence is no more than a lower bound, and its Monte Carlo error too small"
        )
    log_evidence = float(evidence.sum()) * (1 / num_data)
    has_error = num_samples > 1 or not sampled
    return Scores(
        num_data=num_data,
        num_samples=num_samples if sampled else 0,
        log_evidence=log_evidence,
        log_evidence_stderr=float(relative_variance.sum().sqrt()) * (1 / num_data) if has_error else None,
        log_evidence_stderr_data=stderr_over_data(evidence) if has_unit_per_datum else None,
        elbo=float(torch.cat(sums.elbo).sum()) * (1 / num_data),
        reconstruction=float(sums.total["reconstruction", ""]) / total if has_split else None,
        kl=sum(kl.values()) if has_split else None,
        kl_per_latent=kl if has_split else {},
        kl_per_dimension={n: (v / total).tolist() for (kind, n), v in sums.total.items() if kind == "dims"},
        active_units=sum(active.values()) if active else None,
        active_units_per_latent=active,
        units_per_latent={name: mean.shape[1] for name, mean in means.items()},
        log_likelihood=exact,
        bits_per_dim=-log_evidence / (x.shape[1] * math.log(2)),
        log_evidence_per_datum=evidence.cpu() if has_unit_per_datum else None,
        guide=importance_sampling.summarise(sums.quality, num_data, num_samples) if sums.fits_tails else None,
        too_few_for_k=sampling.has_tails and num_samples < FEWEST_SAMPLES,
        notes=notes,
    )
