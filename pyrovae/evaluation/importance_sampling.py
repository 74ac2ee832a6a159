"""Importance sampling from a pair's guide: chunks of samples, mean weights, and how far the weights can be trusted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrovae.checks import check_positive
from pyrovae.evaluation.measurement import Result, chunk_sizes, not_applicable, prepared, progress_bar, width
from pyrovae.infer.record import recorded_or_itself
from pyrovae.infer.weights import LogWeightTerms, Structure, log_weight_terms
from pyrovae.pair import Pair

__all__ = ["GuideQuality", "ImportanceSampling", "MeanWeight", "guide_quality", "guide_quality_of"]

CALLS_WORTH_COMPILING = 3000

Summary = dict[tuple[str, str], Tensor]
"""Numbers kept of one run, by kind and site."""


class ImportanceSampling:
    """Importance samples of a prepared pair. Memory does not grow with data times samples."""

    def __init__(self, pair: Pair, x: Tensor, num_samples: int) -> None:
        self._pair = pair
        self.structure = Structure.of(pair.model, pair.guide, (x[:2],), {})
        self.probe = log_weight_terms(pair.model, pair.guide, x[:2], structure=self.structure)
        """One run on two data."""
        self.num_samples = num_samples if self.probe.guide else 1  # nothing is sampled: every weight is p(x)
        size = width(pair, self.probe.model_trace, len(x[:2]), enumerated=self.structure.enumerated)
        joint = self.probe.log_weights.dim() == 1
        rows, self._particles = chunk_sizes(x.device, size, len(x), self.num_samples, joint=joint)
        self.chunks = x.split(rows)
        sites: Any = self.probe.guide_trace.nodes
        self.has_tails = any(not sites[name]["fn"].support.is_discrete for name in self.probe.guide)
        """True where the weights can have a tail: discrete latents alone give finitely many values."""

    def run(
        self, summarise: Callable[[LogWeightTerms, int], Summary], progress: bool | None
    ) -> Iterator[Iterator[Summary]]:
        """Yield for each chunk of data what ``summarise(terms, num_particles)`` keeps of each run on it."""
        rounds, rest = divmod(self.num_samples, self._particles)
        programs = self._pair.model, self._pair.guide

        def summary(rows: Tensor, particles: int) -> Summary:
            terms = log_weight_terms(*programs, rows, num_particles=particles, structure=self.structure)
            return summarise(terms, particles)

        run_full = self._compiled(summary, calls=rounds * len(self.chunks))

        def summaries(rows: Tensor) -> Iterator[Summary]:
            is_full = len(rows) == len(self.chunks[0])
            for _ in range(rounds):
                yield run_full(rows) if is_full else summary(rows, self._particles)
            if rest:
                yield summary(rows, rest)

        for rows in progress_bar("evaluate", progress, self.chunks):
            yield summaries(rows)

    def _compiled(self, summary: Callable[[Tensor, int], Summary], *, calls: int) -> Callable[[Tensor], Summary]:
        """Return ``summary`` for full chunks; compiled where there are enough calls to pay for it."""
        if calls < CALLS_WORTH_COMPILING:
            return lambda rows: summary(rows, self._particles)
        names: list[tuple[str, str]] = []

        def flat(rows: Tensor) -> tuple[Tensor, ...]:
            found = summary(rows, self._particles)
            names[:] = found
            return tuple(found.values())

        run = recorded_or_itself(flat, (self.chunks[0],), [self._pair], "evaluate", compiled=True)
        return lambda rows: dict(zip(names, run(rows), strict=True))


class MeanWeight:
    """Mean of the weights of each datum, with its error, from log w of shape (K, N)."""

    def __init__(self, log_w: Tensor) -> None:
        self.log_mean = log_w.logsumexp(0) - math.log(len(log_w))
        """log 1/K Σ_k w_k, (N,)."""
        self.relative = torch.exp(log_w - self.log_mean)
        """Weights over their mean, (K, N)."""
        self.effective = self.relative.sum(0).square() / self.relative.square().sum(0)
        """Effective number of samples, (Σ_k w_k)² / Σ_k w_k², (N,)."""
        self.variance = variance_of_mean(self.relative)
        """Variance of ``log_mean`` by the delta method, (N,); 0 with one sample."""


def variance_of_mean(draws: Tensor) -> Tensor:
    """Return the variance of the mean of K independent draws, (K, N) → (N,); 0 with one draw."""
    return draws.var(0) / len(draws) if len(draws) > 1 else torch.zeros_like(draws[0])


def stderr_over_data(per_datum: Tensor) -> float | None:
    """Return the standard error of the mean of values (N,), as an estimate for the population; None with one datum."""
    return float(per_datum.std()) / math.sqrt(len(per_datum)) if len(per_datum) > 1 else None


# Reliability ----------------------------------------------------------------------------------------------------------

GOOD_K, BAD_K = 0.5, 0.7  # Vehtari et al. 2024, Yao et al. 2018
EQUAL = 1e-3  # nats: log-weights no further apart differ by rounding
FEWEST_SAMPLES = 25  # with fewer, the tail has fewer than five weights, and cannot be fitted
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def k_threshold(num_samples: int) -> float:
    """Return the k̂ up to which S samples suffice (Vehtari et al. 2024): 0.5 with 100, 0.7 from 2,155 samples on."""
    return min(1 - 1 / math.log10(num_samples), BAD_K)


class WeightQuality(NamedTuple):
    """Tail and effective number of the weights of each datum: (N,), float64, on the CPU."""

    k: Tensor  # Pareto-k̂ of the weights; −inf where they have no tail, +inf where it cannot be fitted
    ess: Tensor  # 1 / Σ_k w̃_k² with w̃ the weights over their sum: from 1 to K
    log_evidence: Tensor  # log mean of the Pareto-smoothed weights, nats


@dataclass(frozen=True, repr=False)
class GuideQuality(Result):
    """Weights that :func:`guide_quality` judged: ``k`` and ``ess`` of each datum, or of all data if ``is_joint``."""

    num_data: int
    num_samples: int
    k: Tensor
    """Pareto-k̂, (N,): at 1/2 the weights' variance turns infinite, at 1 their mean does. −inf: no tail."""
    ess: Tensor
    """Effective sample size, (N,), from 1 to ``num_samples``."""
    log_evidence: float
    """Log evidence from Pareto-smoothed weights, nats per datum."""
    is_joint: bool
    """True where a latent is global: all data have one weight together, hence one k̂ and one effective size."""
    num_no_tail: int
    """Number with k̂ = −inf: no weight stands out, as where the guide is the posterior."""
    num_good: int
    """Number with k̂ < 0.5 and not above ``threshold``; those without a tail count here too."""
    num_ok: int
    """Number with 0.5 ≤ k̂ ≤ ``threshold``."""
    num_bad: int
    """Number with k̂ > ``threshold``: importance-sampling estimates from this guide are unreliable."""
    threshold: float
    """The k̂ up to which ``num_samples`` samples suffice: :func:`k_threshold`."""
    k_quantiles: dict[float, float]
    ess_quantiles: dict[float, float]
    notes: list[str] = field(default_factory=list)

    def _table(self) -> list[str]:
        count = len(self.k)
        what = "one weight for all data (a global latent)" if self.is_joint else f"{self.num_data} data"
        limit = f"{self.threshold:.2g}"
        rows = [
            (f"good, k < {GOOD_K}" if self.threshold > GOOD_K else f"good, k up to {limit}", self.num_good),
            ("  no tail at all", self.num_no_tail),
            *([(f"ok, k {GOOD_K} to {limit}", self.num_ok)] if self.threshold > GOOD_K else []),
            (f"unreliable, k > {limit}", self.num_bad),
        ]
        if self.threshold < BAD_K:
            rows.append((f"  of these, k > {BAD_K}", int((self.k > BAD_K).sum())))
        return [
            f"{what}, {self.num_samples} samples each",
            *(f"{label:<26}{number:>8d}  {number / count:6.1%}" for label, number in rows),
            f"{'quantiles':<22}" + "".join(f"{q:>10.0%}" for q in QUANTILES),
            f"{'Pareto k':<22}" + "".join(f"{self.k_quantiles[q]:>10.2f}" for q in QUANTILES),
            f"{'effective samples':<22}" + "".join(f"{self.ess_quantiles[q]:>10.1f}" for q in QUANTILES),
            f"{'log evidence, PSIS':<22}{self.log_evidence:>10.3f}  nats per datum",
        ]


def guide_quality(
    pair: Pair,
    x: Tensor,
    *,
    num_samples: int = 1000,
    binarize: bool = False,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool | None = None,
) -> GuideQuality:
    """Measure Pareto-k̂ and effective sample size of the guide's importance weights, datum by datum.

    The largest weights w = p(x, z) / q(z | x) are fitted with a generalised Pareto distribution of shape k. Below 0.5
    importance sampling from q works as it should. Above min(1 − 1/log10 K, 0.7) its estimates, the evidence among them,
    cannot be relied on: q is a poor picture of the posterior, most often a too narrow one.

    Args:
        num_samples: importance samples K a datum, at least 25.
        pair, x, binarize, device, seed, progress: as in :func:`pyrovae.evaluate`.

    Raises:
        NotApplicable: the guide samples nothing, or discrete latents alone: then the weights have no tail.
        TypeError, ValueError: bad data or options, before work starts; weights that are NaN or infinite.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling, JMLR 25(72).
        Yao, Vehtari, Simpson and Gelman (2018), Yes, but did it work?: Evaluating variational inference.
    """
    check_positive("num_samples", num_samples, integer=True)
    _check_num_samples("num_samples", num_samples)
    with prepared(pair, x, binarize=binarize, device=device, seed=seed) as x, torch.no_grad():
        sampling = ImportanceSampling(pair, x, num_samples)
        if not sampling.probe.guide:
            raise not_applicable("guide_quality", pair, "its guide samples nothing, so every weight is the evidence.")
        if not sampling.has_tails:
            reason = "its guide samples discrete latents alone, so the weights of a datum have no tail. "
            raise not_applicable("guide_quality", pair, f"{reason}Use inference_gaps to judge such a guide.")
        runs = sampling.run(lambda terms, particles: {("", ""): terms.log_weights.reshape(particles, -1)}, progress)
        log_w = (torch.cat([summary["", ""] for summary in summaries]) for summaries in runs)
        return summarise([guide_quality_of(part, "pair") for part in log_w], len(x), num_samples)


def guide_quality_of(log_weights: Tensor, argument: str = "log_weights") -> WeightQuality:
    """Measure Pareto-k̂ and effective sample size of weights at hand: log w of shape (K, N), or (K,), → (N,) each.

    k̂ is ArviZ's ``psislw``. It is −inf where no weight stands out from the bulk: all are equal, as an exact guide's
    are, or a fifth of them share the largest value. Then there is no tail.
    """
    if not isinstance(log_weights, Tensor) or not log_weights.is_floating_point():
        what = log_weights.dtype if isinstance(log_weights, Tensor) else type(log_weights).__name__
        raise TypeError(f"{argument}: expected a floating-point tensor of shape (K, N); got {what}.")
    if log_weights.dim() not in (1, 2) or log_weights.numel() == 0:
        raise ValueError(f"{argument}: expected shape (K, N) or (K,); got {tuple(log_weights.shape)}.")
    _check_num_samples(argument, len(log_weights))
    log_w = log_weights.detach().double().reshape(len(log_weights), -1)
    if bad := int((log_w.isnan() | (log_w == math.inf)).sum()):
        fix = "Look for the site whose log density is not finite: pyro.enable_validation(True) names it."
        raise ValueError(f"{argument}: expected log-weights below infinity; got {bad} NaN or +inf. {fix}")
    count = len(log_w)
    log_sum = log_w.logsumexp(0)
    ess = torch.exp(2 * log_sum - (2 * log_w).logsumexp(0)).nan_to_num(0.0)  # every weight 0: none counts
    tail = min(math.ceil(min(count / 5, 3 * math.sqrt(count))), count - 1)  # ArviZ fits this many of the largest
    top = log_w.topk(tail + 1, dim=0).values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # ArviZ announces its own future
        from arviz import psislw
    with np.errstate(all="ignore"):
        found = psislw(log_w.T.cpu().numpy(), normalize=False)
    smoothed, k = torch.as_tensor(found[0]).logsumexp(-1), torch.as_tensor(found[1], dtype=torch.float64).reshape(-1)
    no_tail = (top[0] - top[-1] <= EQUAL).cpu()
    k = torch.where(no_tail, -math.inf, k)
    evidence = torch.where(no_tail, log_sum.cpu(), smoothed) - math.log(count)
    impossible = log_sum.cpu() == -math.inf
    return WeightQuality(torch.where(impossible, math.inf, k), ess.cpu(), torch.where(impossible, -math.inf, evidence))


def summarise(parts: Sequence[WeightQuality], num_data: int, num_samples: int) -> GuideQuality:
    """Count and order what :func:`guide_quality_of` found in chunks. A global latent has one weight for all data."""
    of = WeightQuality(*map(torch.cat, zip(*parts, strict=True)))
    threshold = k_threshold(num_samples)
    bad = of.k > threshold
    at = torch.tensor(QUANTILES, dtype=torch.float64)
    # Infinite k̂ cannot be averaged, so its quantiles are values that occur.
    of_k = torch.quantile(of.k, at, interpolation="nearest")
    notes = []
    if unfitted := int((of.k == math.inf).sum()):
        notes.append(f"in {unfitted} of {len(of.k)} too few weights stand out to fit a tail: k̂ counts as infinite")
    return GuideQuality(
        num_data=num_data,
        num_samples=num_samples,
        k=of.k,
        ess=of.ess,
        log_evidence=float(of.log_evidence.sum()) / num_data,
        is_joint=len(of.k) == 1 < num_data,
        num_no_tail=int((of.k == -math.inf).sum()),
        num_good=int(((of.k < GOOD_K) & ~bad).sum()),
        num_ok=int(((of.k >= GOOD_K) & ~bad).sum()),
        num_bad=int(bad.sum()),
        threshold=threshold,
        k_quantiles=dict(zip(QUANTILES, of_k.tolist(), strict=True)),
        ess_quantiles=dict(zip(QUANTILES, torch.quantile(of.ess, at).tolist(), strict=True)),
        notes=notes,
    )


def _check_num_samples(argument: str, count: int) -> None:
    if count < FEWEST_SAMPLES:
        expected = f"expected at least {FEWEST_SAMPLES} samples a datum, to fit the tail of their weights"
        raise ValueError(f"{argument}: {expected}; got {count}. A thousand are usual.")
