"""The tail of importance weights, and their effective number."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "BAD_K",
    "FEWEST_SAMPLES",
    "GuideQuality",
    "WeightQuality",
    "check_count",
    "guide_quality_of",
    "k_threshold",
    "summarise",
]

GOOD_K, BAD_K = 0.5, 0.7  # Vehtari et al. 2024, Yao et al. 2018
EQUAL = 1e-3  # nats: log-weights no further apart differ by rounding
FEWEST_SAMPLES = 25  # five in the tail, the fewest that it can be fitted to
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def k_threshold(num_samples: int) -> float:
    """min(1 − 1/log10 S, 0.7): the k̂ up to which S samples suffice; 0.7 from 2,155 samples on, 0.5 with 100.

    Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling, JMLR 25(72).
    """
    return min(1 - 1 / math.log10(num_samples), BAD_K)


class WeightQuality(NamedTuple):
    """Of each datum, (N,), float64, on the CPU."""

    k: Tensor
    """Pareto-k̂ of the weights; −inf where they have no tail, +inf where it cannot be fitted."""
    ess: Tensor
    """1 / Σ_k w̃_k² with w̃ the weights over their sum: from 1 to K."""
    log_evidence: Tensor
    """log mean of the Pareto-smoothed weights, nats."""


@dataclass(frozen=True, repr=False)
class GuideQuality:
    """What :func:`~pyrovae.evaluation.guide_quality.guide_quality` measured.

    ``k`` and ``ess`` are of each datum; of all together where ``is_joint``.
    """

    num_data: int
    num_samples: int
    k: Tensor
    """Pareto-k̂, (N,): at 1/2 the weights' variance turns infinite, at 1 their mean does. −inf: no tail."""
    ess: Tensor
    """Effective sample size, (N,), from 1 to ``num_samples``."""
    log_evidence: float
    """From Pareto-smoothed weights, nats per datum."""
    is_joint: bool
    """A global latent: one weight for all the data together, hence one k̂ and one effective size."""
    num_no_tail: int
    """k̂ = −inf: no weight stands out, as where the guide is the posterior."""
    num_good: int
    """k̂ < 0.5 and not above ``threshold``, those without a tail among them."""
    num_ok: int
    """0.5 ≤ k̂ ≤ ``threshold``."""
    num_bad: int
    """k̂ > ``threshold``: the guide's importance-sampling estimates are unreliable."""
    threshold: float
    """The k̂ up to which ``num_samples`` samples suffice: :func:`k_threshold`."""
    k_quantiles: dict[float, float]
    ess_quantiles: dict[float, float]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; without the values of each datum. A quantile of k̂ that is infinite is None."""
        plain = {name: value for name, value in vars(self).items() if not isinstance(value, Tensor)}
        finite = {str(q): k if math.isfinite(k) else None for q, k in self.k_quantiles.items()}
        return plain | {"k_quantiles": finite, "ess_quantiles": {str(q): n for q, n in self.ess_quantiles.items()}}

    def __repr__(self) -> str:
        """A table, for reading."""
        count = len(self.k)
        what = "one weight for all data (a global latent)" if self.is_joint else f"{self.num_data} data"
        lines = [f"{what}, {self.num_samples} samples each"]
        limit = f"{self.threshold:.2g}"
        rows = [
            (f"good, k < {GOOD_K}" if self.threshold > GOOD_K else f"good, k up to {limit}", self.num_good),
            ("  no tail at all", self.num_no_tail),
            *([(f"ok, k {GOOD_K} to {limit}", self.num_ok)] if self.threshold > GOOD_K else []),
            (f"unreliable, k > {limit}", self.num_bad),
        ]
        if self.threshold < BAD_K:
            rows.append((f"  of these, k > {BAD_K}", int((self.k > BAD_K).sum())))
        for label, number in rows:
            lines.append(f"{label:<26}{number:>8d}  {number / count:6.1%}")
        lines.append(f"{'quantiles':<22}" + "".join(f"{q:>10.0%}" for q in QUANTILES))
        lines.append(f"{'Pareto k':<22}" + "".join(f"{self.k_quantiles[q]:>10.2f}" for q in QUANTILES))
        lines.append(f"{'effective samples':<22}" + "".join(f"{self.ess_quantiles[q]:>10.1f}" for q in QUANTILES))
        lines.append(f"{'log evidence, PSIS':<22}{self.log_evidence:>10.3f}  nats per datum")
        return "\n".join([*lines, *(f"NOTE: {note}" for note in self.notes)])


def guide_quality_of(log_weights: Tensor) -> WeightQuality:
    """Pareto-k̂ and effective sample size of weights at hand: log w of shape (K, N), or (K,), → (N,) each.

    k̂ is ArviZ's ``psislw``. Where no weight stands out from the bulk (all are equal, as an exact guide's are, or the
    largest is shared by a fifth of them) it is −inf: there is no tail.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: not of shape (K, N) or (K,); K below 25; NaN or +inf among them.
    """
    if not isinstance(log_weights, Tensor) or not log_weights.is_floating_point():
        what = log_weights.dtype if isinstance(log_weights, Tensor) else type(log_weights).__name__
        raise TypeError(f"log_weights: expected a floating-point tensor of shape (K, N); got {what}.")
    if log_weights.dim() not in (1, 2) or log_weights.numel() == 0:
        raise ValueError(f"log_weights: expected shape (K, N) or (K,); got {tuple(log_weights.shape)}.")
    check_count("log_weights", len(log_weights))
    log_w = log_weights.detach().double().reshape(len(log_weights), -1)
    if bad := int((log_w.isnan() | (log_w == math.inf)).sum()):
        raise ValueError(
            f"log_weights: expected numbers below infinity; got {bad} NaN or +inf. Look for the site whose log density "
            "is not finite: pyro.enable_validation(True) names it."
        )
    count = len(log_w)
    log_sum = log_w.logsumexp(0)
    ess = torch.exp(2 * log_sum - (2 * log_w).logsumexp(0)).nan_to_num(0.0)  # every weight 0: none counts
    tail = min(math.ceil(min(count / 5, 3 * math.sqrt(count))), count - 1)  # ArviZ fits the largest of this number
    top = log_w.topk(tail + 1, dim=0).values
    k, smoothed = _psis(log_w.T.cpu().numpy())
    no_tail = (top[0] - top[-1] <= EQUAL).cpu()
    k = torch.where(no_tail, -math.inf, k)
    evidence = torch.where(no_tail, log_sum.cpu(), smoothed) - math.log(count)
    impossible = log_sum.cpu() == -math.inf
    return WeightQuality(torch.where(impossible, math.inf, k), ess.cpu(), torch.where(impossible, -math.inf, evidence))


def _psis(log_weights: np.ndarray) -> tuple[Tensor, Tensor]:  # (N, K)
    """k̂ and the log sum of the smoothed weights, (N,) each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # ArviZ's, about its own future
        from arviz import psislw
    with np.errstate(all="ignore"):
        smoothed, k = psislw(log_weights, normalize=False)
    return torch.as_tensor(k, dtype=torch.float64).reshape(-1), torch.as_tensor(smoothed).logsumexp(-1)


def summarise(parts: Sequence[WeightQuality], num_data: int, num_samples: int) -> GuideQuality:
    """Counts and quantiles of what :func:`guide_quality_of` found in chunks of the data.

    One weight for more than one datum is that of a global latent.
    """
    of = WeightQuality(*map(torch.cat, zip(*parts, strict=True)))
    threshold = k_threshold(num_samples)
    bad = of.k > threshold
    at = torch.tensor(QUANTILES, dtype=torch.float64)
    # Infinities have an order and no mean: of k̂ the quantiles are data, not points between two.
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


def check_count(argument: str, count: int) -> None:
    """Raise ValueError where ``count`` samples are too few to fit a tail to."""
    if count < FEWEST_SAMPLES:
        raise ValueError(
            f"{argument}: expected at least {FEWEST_SAMPLES} samples a datum, to fit the tail of their weights; got "
            f"{count}. A thousand are usual."
        )
