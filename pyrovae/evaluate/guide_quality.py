"""Can the guide be trusted as an importance sampler? The tail of its weights, and their effective number."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyrovae.checks import check_positive
from pyrovae.evaluate.prepare import NotApplicable, prepared
from pyrovae.infer.log_weights import LogWeightTerms, Structure, log_weight_terms
from pyrovae.pair import Pair

__all__ = ["GuideQuality", "WeightQuality", "guide_quality", "guide_quality_of", "summarise"]

GOOD_K, BAD_K = 0.5, 0.7  # Vehtari et al. 2024, Yao et al. 2018
EQUAL = 1e-3  # nats: log-weights no further apart differ by rounding
FEWEST_SAMPLES = 25  # five in the tail, the fewest that it can be fitted to
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
FLOATS_PER_CHUNK = 2**21  # of the widest tensor


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
    """What :func:`guide_quality` measured. ``k`` and ``ess`` are of each datum; of one where ``is_joint``."""

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
    """k̂ < 0.5, those without a tail among them."""
    num_ok: int
    """0.5 ≤ k̂ ≤ 0.7."""
    num_bad: int
    """k̂ > 0.7: the guide's importance-sampling estimates are unreliable."""
    threshold: float
    """min(1 − 1/log10 K, 0.7): the k̂ up to which ``num_samples`` samples suffice (Vehtari et al. 2024)."""
    num_above_threshold: int
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
        for label, number in (
            ("good, k < 0.5", self.num_good),
            ("  no tail at all", self.num_no_tail),
            ("ok, k 0.5 to 0.7", self.num_ok),
            ("unreliable, k > 0.7", self.num_bad),
            (f"too few samples, k > {self.threshold:.2f}", self.num_above_threshold),
        ):
            lines.append(f"{label:<26}{number:>8d}  {number / count:6.1%}")
        lines.append(f"{'quantiles':<22}" + "".join(f"{q:>10.0%}" for q in QUANTILES))
        lines.append(f"{'Pareto k':<22}" + "".join(f"{self.k_quantiles[q]:>10.2f}" for q in QUANTILES))
        lines.append(f"{'effective samples':<22}" + "".join(f"{self.ess_quantiles[q]:>10.1f}" for q in QUANTILES))
        lines.append(f"{'log evidence, PSIS':<22}{self.log_evidence:>10.3f}  nats per datum")
        return "\n".join([*lines, *(f"NOTE: {note}" for note in self.notes)])


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
    """Pareto-k̂ and effective sample size of the guide's importance weights, datum by datum.

    The largest weights w = p(x, z) / q(z | x) are fitted with a generalised Pareto distribution of shape k. Below 0.5
    importance sampling from q works as it should; above 0.7 its estimates, and so the evidence, cannot be relied on,
    and q is a poor picture of the posterior (most of all, a too narrow one).

    Args:
        pair: the model and guide. It is left as it was.
        x: data, shape (N, D).
        num_samples: importance samples K a datum, at least 25.
        binarize: draw pixels in [0, 1] as 0 or 1 first, once.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda``.
        seed: of the samples. The caller's random state is left as it was.
        progress: show a bar; None shows it on a terminal.

    Raises:
        NotApplicable: the guide samples nothing, or discrete latents alone: then the weights have no tail.
        TypeError, ValueError: bad data or options, before work starts; weights that are NaN or infinite.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling.
        Yao, Vehtari, Simpson and Gelman (2018), Yes, but did it work?: Evaluating variational inference.
    """
    check_positive("num_samples", num_samples, integer=True)
    _check_count("num_samples", num_samples)
    with prepared(pair, x, binarize=binarize, device=device, seed=seed) as x, torch.no_grad():
        structure = Structure.of(pair.model, pair.guide, (x[:2],), {})
        probe = log_weight_terms(pair.model, pair.guide, x[:2], structure=structure)
        _check_latents(pair, probe)
        is_joint = probe.log_weights.dim() == 1
        rows, particles = _chunks(pair, probe, len(x), num_samples, is_joint)
        chunks = x.split(rows)
        disable = None if progress is None else not progress
        found = []
        for chunk in tqdm(chunks, unit="chunk", disable=disable, leave=False, desc="guide quality"):
            log_w = [
                log_weight_terms(
                    pair.model, pair.guide, chunk, num_particles=min(particles, num_samples - done), structure=structure
                ).log_weights
                for done in range(0, num_samples, particles)
            ]
            found.append(guide_quality_of(torch.cat(log_w).reshape(num_samples, -1)))
    return summarise(found, len(x), num_samples)


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
    _check_count("log_weights", len(log_weights))
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
    threshold = min(1 - 1 / math.log10(num_samples), BAD_K)
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
        num_good=int((of.k < GOOD_K).sum()),
        num_ok=int(((of.k >= GOOD_K) & (of.k <= BAD_K)).sum()),
        num_bad=int((of.k > BAD_K).sum()),
        threshold=threshold,
        num_above_threshold=int((of.k > threshold).sum()),
        k_quantiles=dict(zip(QUANTILES, of_k.tolist(), strict=True)),
        ess_quantiles=dict(zip(QUANTILES, torch.quantile(of.ess, at).tolist(), strict=True)),
        notes=notes,
    )


def _check_count(argument: str, count: int) -> None:
    if count < FEWEST_SAMPLES:
        raise ValueError(
            f"{argument}: expected at least {FEWEST_SAMPLES} samples a datum, to fit the tail of their weights; got "
            f"{count}. A thousand are usual."
        )


def _check_latents(pair: Pair, probe: LogWeightTerms) -> None:
    name = type(pair).__name__
    if not probe.guide:
        raise NotApplicable(
            f"guide_quality does not apply to {name}: its guide samples nothing, so every weight is the evidence."
        )
    sites: Any = probe.guide_trace.nodes
    if all(sites[site]["fn"].support.is_discrete for site in probe.guide):
        raise NotApplicable(
            f"guide_quality does not apply to {name}: its guide samples discrete latents alone, so the weights of a "
            "datum take finitely many values and have no tail. inference_gaps compares such a guide with the posterior."
        )


def _chunks(pair: Pair, probe: LogWeightTerms, num_data: int, num_samples: int, is_joint: bool) -> tuple[int, int]:
    """Data and particles at a time, so that data · particles · width stays near FLOATS_PER_CHUNK."""
    sites: list[Any] = [s for s in probe.model_trace.nodes.values() if s["type"] == "sample"]
    of_sites = sum(s["value"][0].numel() if s["value"].dim() else 1 for s in sites)
    widest = max([of_sites, *(p.shape[0] for p in pair.parameters() if p.dim() == 2)])
    fitting = max(1, FLOATS_PER_CHUNK // widest)
    rows = num_data if is_joint else min(num_data, fitting, 100)
    return rows, max(1, min(num_samples, fitting // rows))
