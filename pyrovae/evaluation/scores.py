"""One set of honest numbers: evidence with its error, the bound in parts, the quality of the guide's weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyrovae.checks import check_positive
from pyrovae.evaluation.collapse import ACTIVE_UNIT_VARIANCE
from pyrovae.evaluation.pareto import FEWEST_SAMPLES, GuideQuality, WeightQuality, guide_quality_of, summarise
from pyrovae.evaluation.predict import mean_or_value
from pyrovae.evaluation.prepare import prepared, progress_bar
from pyrovae.evaluation.traces import chunk_sizes, is_point, log_prob_per_dimension, width
from pyrovae.infer.record import recorded_or_itself
from pyrovae.infer.weights import LogWeightTerms, Structure, log_weight_terms, sample_sites
from pyrovae.pair import Pair

__all__ = ["Scores", "importance_scores", "scores_of", "title_of"]

CALLS_WORTH_COMPILING = 3000

Summary = dict[tuple[str, str], Tensor]


@dataclass(frozen=True, repr=False)
class Scores:
    """What :func:`evaluate` measured. Nats per datum, unless said otherwise; None where a quantity does not apply."""

    num_data: int
    num_samples: int
    """Importance samples a datum; 0 where all latents are summed out, and nothing is sampled."""
    log_evidence: float
    """mean_n log 1/K Σ_k w_kn: in expectation below log p(x), by about Var(w)/(2K p(x)²) (Burda et al. 2016)."""
    log_evidence_stderr: float | None
    """Monte Carlo standard error of ``log_evidence`` for these very data, by the delta method; 0 where nothing is
    sampled, None with one sample, which has no error to tell."""
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
    """For latents whose prior and guide factorise over dimensions."""
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
    """The weights have a tail, and the samples are too few to fit it to: hence no ``guide``."""
    also: dict[str, Any] = field(default_factory=dict, compare=False)
    """What else was asked for, by the name of its function."""
    left_out: dict[str, str] = field(default_factory=dict)
    """What was asked for and does not apply to this pair, and why."""
    notes: list[str] = field(default_factory=list)
    """What keeps these numbers from meaning what they usually do."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON. It has no infinity and no NaN: such a number is None."""
        plain = vars(self) | {"guide": None if self.guide is None else self.guide.to_dict()}
        del plain["log_evidence_per_datum"]
        return _finite(plain | {"also": {name: result.to_dict() for name, result in self.also.items()}})

    def rows(self) -> list[tuple[str, str, str]]:
        """The table: quantity, value, remark."""
        over_data = self.log_evidence_stderr_data
        monte_carlo = self.log_evidence_stderr
        error = "one sample: Monte Carlo error unknown" if monte_carlo is None else f"± {monte_carlo:.3f} Monte Carlo"
        errors = [error] if self.num_samples else []
        errors += [] if over_data is None else [f"± {over_data:.3f} over data"]
        # With nothing sampled, evidence, exact likelihood and ELBO are one number.
        rows = [("log evidence" if self.num_samples else "log evidence, exact", self.log_evidence, ", ".join(errors))]
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
        """A table, for reading."""
        lines = [f"{name:<24}{value:>12}  {note}".rstrip() for name, value, note in self.rows()]
        absent = [
            label
            for label, value in (
                ("exact log likelihood", self.log_likelihood),
                ("reconstruction and KL", self.kl),
                ("active units", self.active_units),
            )
            if value is None
        ]
        sampled = f"{self.num_samples} sample{'s' * (self.num_samples > 1)} each" if self.num_samples else "no sampling"
        head = f"{self.num_data} data, {sampled}; nats per datum"
        foot = [f"does not apply to this pair: {', '.join(absent)}"] if absent else []
        table = "\n".join([head, *lines, *foot, *(f"NOTE: {note}" for note in self.notes)])
        more = [f"{title_of(name)}: {result!r}" for name, result in self.also.items()]
        reasons = [f"LEFT OUT, {title_of(name)}: {reason}" for name, reason in self.left_out.items()]
        return "\n\n".join([table, *more, *(["\n".join(reasons)] if reasons else [])])


def title_of(quantity: str) -> str:
    """Of a quantity that bears its function's name: for readers."""
    title = quantity.replace("_", " ").replace("kl ", "KL ")
    return title[0].upper() + title[1:]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _trust(bad: float) -> str:
    """In words, what a share of data with k̂ above the threshold means."""
    if bad <= 0.01:
        return "the guide is a good importance sampler"
    if bad <= 0.1:
        return "for a few data the evidence may be too low"
    return "the guide misses mass; the evidence may be too low"


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
    """:func:`pyrovae.evaluate` without its ``also``: one pass of importance sampling over the data."""
    check_positive("num_samples", num_samples, integer=True)
    with prepared(pair, x, binarize=binarize, device=device, seed=seed) as x, torch.no_grad():
        return scores_of(pair, x, num_samples, progress)


def scores_of(pair: Pair, x: Tensor, num_samples: int, progress: bool | None) -> Scores:
    """:func:`importance_scores` of a pair and data that are :func:`~pyrovae.evaluation.prepare.prepared`."""
    structure = Structure.of(pair.model, pair.guide, (x[:2],), {})
    probe = log_weight_terms(pair.model, pair.guide, x[:2], structure=structure)
    if not probe.guide:  # nothing is sampled: every weight is p(x)
        num_samples = 1
    size = width(pair, probe.model_trace, len(x[:2]), enumerated=structure.enumerated)
    data_chunk, particle_chunk = chunk_sizes(x.device, size, len(x), num_samples, joint=probe.log_weights.dim() == 1)

    def summarise(rows: Tensor, particles: int) -> Summary:
        return _summary(
            log_weight_terms(pair.model, pair.guide, rows, num_particles=particles, structure=structure), particles
        )

    chunks = x.split(data_chunk)
    rounds = num_samples // particle_chunk
    summarise_full = _compiled(summarise, pair, chunks[0], particle_chunk, calls=rounds * len(chunks))
    sites: Any = probe.guide_trace.nodes
    has_tails = any(not sites[name]["fn"].support.is_discrete for name in probe.guide)
    enough = num_samples >= FEWEST_SAMPLES
    parts = _Parts(fits_tails=has_tails and enough)
    for rows in progress_bar("evaluate", progress, chunks):
        parts.start()
        for _ in range(rounds):
            parts.add(summarise_full(rows) if len(rows) == data_chunk else summarise(rows, particle_chunk))
        if rest := num_samples - rounds * particle_chunk:
            parts.add(summarise(rows, rest))
        parts.finish()
    exact = None
    if pair.log_prob is not None:
        exact = float(sum(pair.log_prob(rows).double().sum() for rows in chunks)) / len(x)
    return parts.scores(
        x,
        num_samples,
        exact,
        sampled=bool(probe.guide),
        split=not structure.enumerated,
        too_few_for_k=has_tails and not enough,
        notes=_notes(probe),
    )


def _notes(probe: LogWeightTerms) -> list[str]:
    points = [name for name, site in sample_sites(probe.guide_trace).items() if is_point(site)]
    if not points:
        return []
    return [
        f"the guide puts all its mass on one value of {', '.join(points)}: what is called ELBO and evidence here is "
        "a log joint density, and bounds nothing"
    ]


def _compiled(
    summarise: Callable[[Tensor, int], Summary], pair: Pair, rows: Tensor, particles: int, *, calls: int
) -> Callable[[Tensor], Summary]:
    """``summarise`` for chunks of one size: compiled, where there are enough of them to pay for it."""
    if calls < CALLS_WORTH_COMPILING:
        return lambda rows: summarise(rows, particles)
    names: list[tuple[str, str]] = []

    def flat(rows: Tensor) -> tuple[Tensor, ...]:
        summary = summarise(rows, particles)
        names[:] = summary
        return tuple(summary.values())

    run = recorded_or_itself(flat, (rows,), [pair], "evaluate", compiled=True)
    return lambda rows: dict(zip(names, run(rows), strict=True))


def _summary(terms: LogWeightTerms, particles: int) -> Summary:
    """What :class:`_Parts` sums: ``("log_w", "")``, (K, units); ``("reconstruction", "")``, (); and of each guide site
    ``("kl", name)``, (); ``("dims", name)``, the KL by dimension; ``("mean", name)``, (data, dimensions), if any.
    """
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


class _Parts:
    """Sums over particles and data, chunk by chunk. Nothing is read from the device before ``scores``."""

    def __init__(self, *, fits_tails: bool) -> None:
        self.evidence: list[Tensor] = []  # per unit
        self.relative_variance: list[Tensor] = []
        self.elbo: list[Tensor] = []
        self.sums: Summary = {}
        self.means: dict[str, list[Tensor]] = defaultdict(list)
        self.quality: list[WeightQuality] = []
        self._fits_tails = fits_tails

    def start(self) -> None:
        self._log_w: list[Tensor] = []
        self._means: Summary = {}

    def add(self, summary: Summary) -> None:
        for key, value in summary.items():
            if key[0] == "log_w":
                self._log_w.append(value)
            else:
                sums = self._means if key[0] == "mean" else self.sums
                sums[key] = sums[key] + value if key in sums else value

    def finish(self) -> None:
        log_w = torch.cat(self._log_w)
        count = len(log_w)
        evidence = torch.logsumexp(log_w, 0) - math.log(count)
        self.evidence.append(evidence)
        self.elbo.append(log_w.mean(0))
        relative = torch.exp(log_w - evidence)
        self.relative_variance.append(relative.var(0) / count if count > 1 else torch.zeros_like(evidence))
        for (_, name), total in self._means.items():
            self.means[name].append(total / count)
        self._fits_tails = self._fits_tails and not bool((log_w.isnan() | (log_w == math.inf)).any())
        if self._fits_tails:
            self.quality.append(guide_quality_of(log_w))

    def scores(
        self,
        x: Tensor,
        num_samples: int,
        exact: float | None,
        *,
        sampled: bool,
        split: bool,
        too_few_for_k: bool,
        notes: list[str],
    ) -> Scores:
        evidence, relative_variance = torch.cat(self.evidence), torch.cat(self.relative_variance)
        num_data, total = len(x), len(x) * num_samples
        active: dict[str, int] = {}
        units: dict[str, int] = {}
        for name, means in self.means.items():
            if len(mean := torch.cat(means)) > 1:
                active[name] = int((mean.var(0) > ACTIVE_UNIT_VARIANCE).sum())
                units[name] = mean.shape[1]
        kl = {name: float(value) / total for (kind, name), value in self.sums.items() if kind == "kl"}
        dims = {name: (value / total).tolist() for (kind, name), value in self.sums.items() if kind == "dims"}
        if sampled and len(evidence) != num_data:
            effective = float((1 / (relative_variance * (num_samples - 1) / num_samples + 1 / num_samples)).min())
            notes = [
                *notes,
                f"a global latent: one weight for all the data, of {num_samples} samples effectively {effective:.1f}; "
                "below some 100 the evidence is no more than a lower bound, and its Monte Carlo error too small",
            ]
        # One weight a datum is the rule; with a global latent there is one for all of them.
        per_datum = 1 / num_data
        log_evidence = float(evidence.sum()) * per_datum
        return Scores(
            num_data=num_data,
            num_samples=num_samples if sampled else 0,
            log_evidence=log_evidence,
            log_evidence_stderr=float(relative_variance.sum().sqrt()) * per_datum
            if num_samples > 1 or not sampled
            else None,
            log_evidence_stderr_data=float(evidence.std()) / math.sqrt(num_data)
            if len(evidence) == num_data > 1
            else None,
            elbo=float(torch.cat(self.elbo).sum()) * per_datum,
            reconstruction=float(self.sums["reconstruction", ""]) / total if split else None,
            kl=sum(kl.values()) if split else None,
            kl_per_latent=kl if split else {},
            kl_per_dimension=dims,
            active_units=sum(active.values()) if active else None,
            active_units_per_latent=active,
            units_per_latent=units,
            log_likelihood=exact,
            bits_per_dim=-log_evidence / (x.shape[1] * math.log(2)),
            log_evidence_per_datum=evidence.cpu() if len(evidence) == num_data else None,
            guide=summarise(self.quality, num_data, num_samples) if self._fits_tails else None,
            too_few_for_k=too_few_for_k,
            notes=notes,
        )
