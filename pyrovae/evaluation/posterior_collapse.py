"""Posterior collapse: which latents, and which of their dimensions, the guide uses to tell data apart."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pyrovae.checks import check_positive
from pyrovae.evaluation.decomposition import (
    GuideDensities,
    check_counts,
    log_prob_of_categories,
    mean_over_categories,
    sampled_parts,
)
from pyrovae.evaluation.measurement import Result, not_applicable, prepared
from pyrovae.evaluation.sites import log_prob_per_dimension, mean_or_value
from pyrovae.infer.weights import Structure
from pyrovae.pair import Pair

__all__ = ["ACTIVE_UNIT_VARIANCE", "USED_NATS", "Collapse", "LatentCollapse", "active_units_curve", "collapse"]

USED_NATS = 0.01  # information of a dimension about the data below which it is idle
SHARE = 0.99  # of the information, which the dimensions in use must carry together
ACTIVE_UNIT_VARIANCE = 0.01  # Burda et al. 2016, section 5.2
THRESHOLDS = tuple(10 ** (step / 4) for step in range(-16, 1))
"""Thresholds for the variance over data of a posterior mean: 1e-4 to 1, four a decade."""

DRAWS_PER_CHUNK = 5000


@dataclass(frozen=True, repr=False)
class LatentCollapse:
    """Verdict on one latent. Nats per datum; None, or an empty list, where a quantity does not apply."""

    verdict: str
    """``alive``, ``partly collapsed`` or ``collapsed``."""
    text: str
    """The verdict, with its reason, in one line."""
    size: int
    """Dimensions; of a discrete latent, categories."""
    used: int
    """Number of them in use, by the verdict."""
    kl: float | None = None
    """The latent's term of the ELBO, E_q[log q(z | ...) − log p(z | ...)]."""
    kl_per_dimension: list[float] = field(default_factory=list)
    """The same by dimension, where prior and guide factorise over dimensions."""
    information_per_dimension: list[float] = field(default_factory=list)
    """Information of each dimension about the data, by which the verdict is made. See :func:`collapse`."""
    mean_variance: list[float] = field(default_factory=list)
    """Variance over data of each dimension's posterior mean."""
    active_units: int | None = None
    """Number of dimensions where that exceeds 0.01 (Burda et al. 2016)."""
    active_units_curve: list[int] = field(default_factory=list)
    """Number of dimensions where it exceeds each of ``THRESHOLDS``."""
    usage: list[float] = field(default_factory=list)
    """1/N Σ_n q(z = k | x_n), of a discrete latent."""

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True, repr=False)
class Collapse(Result):
    """Verdicts that :func:`collapse` found."""

    num_data: int
    num_samples: int
    """Draws of z a datum; 0 where nothing is sampled."""
    latents: dict[str, LatentCollapse]
    thresholds: list[float]
    """Thresholds of each ``active_units_curve``."""
    notes: list[str] = field(default_factory=list)

    def _table(self) -> list[str]:
        sampled = f"{self.num_samples} samples each" if self.num_samples else "no sampling"
        lines = [f"{self.num_data} data, {sampled}; nats per datum"]
        lines.append(f"{'latent':<12}{'KL':>9}{'size':>7}{'used':>7}{'active':>8}  verdict")
        for name, one in self.latents.items():
            kl = "" if one.kl is None else f"{one.kl:.3f}"
            active = "" if one.active_units is None else one.active_units
            lines.append(f"{name:<12}{kl:>9}{one.size:>7}{one.used:>7}{active:>8}  {one.text}")
        if curves := {name: one.active_units_curve for name, one in self.latents.items() if one.active_units_curve}:
            limits = "".join(f"{threshold:>8g}" for threshold in self.thresholds[::4])  # one a decade
            lines.append(f"{'active units where the variance exceeds':<43}{limits}")
            lines += [f"  {name:<41}" + "".join(f"{n:>8}" for n in curve[::4]) for name, curve in curves.items()]
        return lines


def active_units_curve(
    posterior_means: Tensor,  # (N, dims)
    thresholds: Sequence[float] = THRESHOLDS,
) -> list[int]:
    """Count the dimensions whose posterior mean varies over data by more than each threshold (variance).

    Burda et al. (2016) count at 0.01. The curve shows how much the count depends on that choice.

    Raises:
        TypeError, ValueError: means that are not finite, of shape (N, dims) with N ≥ 2; a threshold not above 0.

    References:
        Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders, section 5.2.
    """
    expected = "posterior_means: expected finite floating-point numbers of shape (N, dims), with N 2 or more; got"
    if not isinstance(posterior_means, Tensor) or not posterior_means.is_floating_point():
        raise TypeError(f"{expected} {getattr(posterior_means, 'dtype', type(posterior_means).__name__)}.")
    if posterior_means.dim() != 2 or len(posterior_means) < 2:
        raise ValueError(f"{expected} shape {tuple(posterior_means.shape)}.")
    if not posterior_means.isfinite().all():
        raise ValueError(f"{expected} {int((~posterior_means.isfinite()).sum())} that are NaN or infinite.")
    for threshold in thresholds:
        check_positive("thresholds", threshold)
    variance = posterior_means.var(0)
    return [int((variance > threshold).sum()) for threshold in thresholds]


def judge_dimensions(
    information: Sequence[float], mean_variance: Sequence[float], total: float | None = None
) -> LatentCollapse:
    """Judge a latent by the nats that each dimension, and all in ``total``, tell. The rule is :func:`collapse`'s."""
    verdict, reason, used = _verdict_on_dimensions(information, total)
    return LatentCollapse(
        verdict=verdict,
        text=f"{verdict}: {reason}",
        size=len(information),
        used=used,
        information_per_dimension=list(information),
        mean_variance=list(mean_variance),
        active_units=sum(value > ACTIVE_UNIT_VARIANCE for value in mean_variance),
        active_units_curve=[sum(value > threshold for value in mean_variance) for threshold in THRESHOLDS],
    )


def _verdict_on_dimensions(information: Sequence[float], total: float | None) -> tuple[str, str, int]:
    """Return verdict, reason, and the number of dimensions in use."""
    size, together = len(information), sum(max(value, 0.0) for value in information)
    telling = sum(value > USED_NATS for value in information)
    dimensions = "dimension" if size == 1 else "dimensions"
    if not telling and total is not None and total > 10 * USED_NATS:
        return "partly collapsed", f"none of {size} {dimensions} tells {USED_NATS} nats, all of them {total:.2f}", 0
    if not telling:
        return "collapsed", f"no dimension of {size} carries more than {USED_NATS} nats of information", 0
    carried = list(accumulate(sorted((max(value, 0.0) for value in information), reverse=True)))
    # The fewest dimensions that carry these shares of the information.
    carriers, few = (1 + sum(value < share * carried[-1] for value in carried) for share in (SHARE, 0.9))
    # Dimensions may tell the same thing, so their sum is not the information of z.
    nats = f"({together:.2f} nats{'' if size == 1 else ', summed over dimensions'})"
    if telling == size and carriers >= 0.9 * size:
        return "alive", f"{'it carries' if size == 1 else f'all {size} dimensions carry'} information {nats}", size
    used = min(carriers, telling)
    return "partly collapsed", f"{used} of {size} dimensions carry 99% of the information {nats}, {few} carry 90%", used


def judge_categories(probs: Tensor) -> LatentCollapse:
    """Judge a discrete latent from the guide's probabilities, or from a mixture's responsibilities, (N, K).

    ``collapsed`` where I(n; z) is below 0.01 nats; ``partly collapsed`` where no datum uses some category: none has
    half of its probability there, nor do all together have a whole one, Σ_n q(z = k | x_n) < 1; else ``alive``.
    """
    log_q = probs.double().log().mT
    usage = probs.double().mean(0)
    information = mean_over_categories(log_q, log_q - usage.log().unsqueeze(1))
    entropy = -float(torch.xlogy(usage, usage).sum())
    size = len(usage)
    unused = int(((probs.sum(0) < 1) & (probs.amax(0) < 0.5)).sum())
    verdict, reason, used = "alive", f"all {size} categories are in use", size - unused
    if information < USED_NATS:
        verdict, reason, used = "collapsed", f"all data have nearly one distribution over its {size} categories", 0
    elif unused:
        verdict, reason = "partly collapsed", f"no datum uses {unused} of {size} categories"
    text = f"{verdict}: {reason} ({information:.2f} nats of information, of {entropy:.2f} in the aggregate)"
    return LatentCollapse(verdict, text, size, used, information_per_dimension=[information], usage=usage.tolist())


def collapse(
    pair: Pair,
    x: Tensor,
    *,
    num_samples: int = 10,
    max_data: int = 500,
    binarize: bool = False,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool | None = None,
) -> Collapse:
    """Say of each latent whether it is alive, partly collapsed, or collapsed.

    The verdict goes by the information of a dimension, I(n; z_j): how much z_j tells about which datum it encodes. It
    is at most the dimension's average KL. Unlike the KL, it is 0 for a guide that ignores x but is not the prior. With
    dimensions in the order of their information:

    - ``collapsed``: no dimension tells more than 0.01 nats;
    - ``alive``: every dimension does, and no more than a tenth of them share the last 1% of the sum;
    - ``partly collapsed``: the others, such as "12 of 50 dimensions carry 99% of the information", and how many of
      these carry 90%.

    The count of active units is given beside it, and is more generous: with a unit Gaussian prior, a KL of 0.005 nats
    is enough for a variance of 0.01. A rule on the average is one on most data, too: where the KL averages ε, at most a
    share δ of the data has one above ε/δ (Markov), which is the (ε, δ)-collapse of Lucas et al.

    For a latent whose guide depends on x alone and whose marginals are known, the information is that of
    :func:`~pyrovae.evaluation.kl_decomposition`, exact but for draws. Else (a deeper layer; a Dirichlet) it is
    −½ log(1 − R²), with R² the share of the dimension's variance that lies between posterior means E[z_j | x_n], less
    three standard errors; and no more than the KL, where the prior is fixed. Such a posterior mean is an average over
    draws of the layers below; the variance that this average adds is subtracted.

    A discrete latent is judged by :func:`judge_categories`: from the guide, or for a mixture without one from the
    pair's exact ``posterior``. Latents outside the plate ``data`` encode no datum and are not judged.

    Args:
        num_samples: draws of z a datum, 2 or more.
        max_data: draws for the information come from at most this many data, chosen at random; see
            :func:`~pyrovae.evaluation.kl_decomposition`.
        pair, x, binarize, device, seed, progress: as in :func:`pyrovae.evaluate`; two data or more.

    Raises:
        TypeError, ValueError: bad data or options, before work starts.
        NotApplicable: the pair has no latent in the data plate to judge.

    References:
        Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders. Lucas, Tucker, Grosse and Norouzi
        (2019), Don't blame the ELBO! He, Spokoyny, Neubig and Berg-Kirkpatrick (2019), Lagging inference networks and
        posterior collapse.
    """
    check_counts(num_samples, max_data)
    with prepared(pair, x, at_least=2, binarize=binarize, device=device, seed=seed) as x, torch.no_grad():
        structure = Structure.of(pair.model, pair.guide, (x[:2],), {})
        if summed_out := _mixture_verdict(pair, x, structure):
            return Collapse(len(x), 0, summed_out, list(THRESHOLDS))
        guide = GuideDensities.of(pair, x, "collapse")
        moments = _moments(guide, x, num_samples)
        parts = sampled_parts(guide, x, num_samples, min(len(x), max_data), progress, joint=False)
        latents, notes = {}, []
        for name, latent in guide.latents.items():
            one, known = moments[name], parts.get(name)
            if latent.alone and latent.is_category:
                probs = log_prob_of_categories(guide, x, name)[1].exp().mT
                latents[name] = replace(judge_categories(probs), kl=one.kl)
                continue
            if latent.is_category:
                notes.append(f"{name}: a category that depends on another latent; not judged")
                continue
            information = known.mutual_information_per_dimension if known else []
            if not information:
                information = one.information_from_variances(bounded=latent.fixed_prior)
                why = "have no closed form" if latent.alone else "depend on other latents"
                notes.append(f"{name}: information from variances, as its marginals given x {why}")
            total = known.mutual_information if known else None
            judged = judge_dimensions(information, one.mean_variance.tolist(), total)
            latents[name] = replace(judged, kl=one.kl, kl_per_dimension=one.kl_per_dimension)
        if not latents:
            reason = f"{'; '.join(notes)}. Sum the category out, or let its guide depend on x alone."
            raise not_applicable("collapse", pair, reason)
        if left_out := [*structure.enumerated, *guide.outside]:
            notes.append(f"not judged, as the guide has no value a datum of it: {', '.join(left_out)}")
        return Collapse(len(x), num_samples, latents, list(THRESHOLDS), notes)


def _mixture_verdict(pair: Pair, x: Tensor, structure: Structure) -> dict[str, LatentCollapse]:
    """Judge the one latent of a mixture whose guide samples nothing, from its exact posterior; else nothing."""
    if len(structure.enumerated) != 1 or pair.posterior is None:
        return {}
    posteriors: list[Any] = [pair.posterior(rows) for rows in x.split(1000)]
    if not all(isinstance(posterior, torch.distributions.Categorical) for posterior in posteriors):
        return {}
    return {structure.enumerated[0]: judge_categories(torch.cat([posterior.probs for posterior in posteriors]))}


@dataclass(frozen=True)
class _Moments:
    """Means and variances of one latent, over all data."""

    means: Tensor  # E[z | x_n], averaged over draws of the latents that z depends on, (N, dims)
    noise: Tensor  # variance that this average adds to the variance over data of the means, (dims,)
    within: Tensor  # mean over data of the variance of z, (dims,)
    kl: float | None
    kl_per_dimension: list[float]

    @property
    def mean_variance(self) -> Tensor:
        return (self.means.var(0) - self.noise).clamp(min=0)

    def information_from_variances(self, *, bounded: bool) -> list[float]:
        """Return −½ log(1 − R²) of each dimension; with ``bounded``, no more than its KL."""
        error = self.noise * math.sqrt(2 / (len(self.means) - 1))
        between = (self.mean_variance - 3 * error).clamp(min=0)
        share = between / (between + self.within).clamp(min=torch.finfo(between.dtype).tiny)
        found = (-0.5 * torch.log1p(-share.clamp(max=1 - 1e-12))).tolist()
        if bounded and self.kl_per_dimension:
            found = [min(pair) for pair in zip(found, self.kl_per_dimension, strict=True)]
        return found


def _moments(guide: GuideDensities, x: Tensor, num_samples: int) -> dict[str, _Moments]:
    means: dict[str, list[Tensor]] = defaultdict(list)
    sums: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    for rows in x.split(max(1, DRAWS_PER_CHUNK // num_samples)):
        model_trace, guide_trace = guide.draw(rows, num_samples)
        for name, latent in guide.latents.items():
            site: Any = guide_trace.nodes[name]
            fn, value, prior = site["fn"], site["value"], model_trace.nodes.get(name)
            if prior is not None and (latent.fixed_prior or not guide.structure.enumerated):
                ratio = guide.log_prob(fn, value) - guide.log_prob(prior["fn"], value)
                sums[name, "kl"].append(ratio.mean(0).sum(0))
                own, other = (log_prob_per_dimension(f, value) for f in (fn, prior["fn"]))
                own = log_prob_per_dimension(fn, value, marginals=True) if own is None else own
                if own is not None and other is not None:
                    dims = guide.arranged(own).double() - guide.arranged(other).double()
                    sums[name, "dims"].append(dims.mean(0).sum(0))
            if latent.is_category:
                continue
            mean = mean_or_value(fn, value).expand(value.shape)
            z, mean = (guide.arranged(part, len(fn.event_shape)).double() for part in (value, mean))
            means[name].append(mean.mean(0))
            sums[name, "within"].append(z.var(0).sum(0))
            sums[name, "noise"].append(mean.var(0).sum(0) / num_samples)
    total = {key: torch.stack(values).sum(0) / len(x) for key, values in sums.items()}
    none = torch.zeros(0)

    def moments(name: str) -> _Moments:
        mean = torch.cat(means[name]) if name in means else none
        noise, within, dims = (total.get((name, kind), none) for kind in ("noise", "within", "dims"))
        kl = float(total[name, "kl"]) if (name, "kl") in total else None
        return _Moments(mean, noise, within, kl, dims.tolist())

    return {name: moments(name) for name in guide.latents}
