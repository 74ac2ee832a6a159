"""Posterior collapse: which latents, and which of their dimensions, the guide uses to tell data apart."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pyrovae.checks import check_positive
from pyrovae.evaluation.decomposition import check_counts, mean_over_categories, sampled_parts
from pyrovae.evaluation.local_guide import LocalGuide, log_prob_of_categories
from pyrovae.evaluation.predict import mean_or_value
from pyrovae.evaluation.prepare import NotApplicable, prepared
from pyrovae.evaluation.traces import log_prob_per_dimension
from pyrovae.infer.weights import Structure
from pyrovae.pair import Pair

__all__ = [
    "THRESHOLDS",
    "USED_NATS",
    "Collapse",
    "LatentCollapse",
    "active_units_curve",
    "collapse",
    "judge_categories",
    "judge_dimensions",
]

USED_NATS = 0.01
"""A dimension that tells less than this about the data is idle."""

SHARE = 0.99
"""Of the information: the fewest dimensions that carry it are the ones that count."""

ACTIVE_UNIT_VARIANCE = 0.01  # Burda et al. 2016, section 5.2
THRESHOLDS = tuple(10 ** (step / 4) for step in range(-16, 1))
"""Of the variance over data of a posterior mean: 1e-4 to 1, four a decade."""

DRAWS_PER_CHUNK = 5000


@dataclass(frozen=True, repr=False)
class LatentCollapse:
    """One latent. Nats per datum; None, or an empty list, where a quantity does not apply."""

    verdict: str
    """``alive``, ``partly collapsed`` or ``collapsed``."""
    text: str
    """The verdict, with its reason, in one line."""
    size: int
    """Dimensions; of a discrete latent, categories."""
    used: int
    """How many of them the verdict counts."""
    kl: float | None
    """The latent's term of the ELBO, E_q[log q(z | ...) − log p(z | ...)]."""
    kl_per_dimension: list[float]
    """Where prior and guide factorise over dimensions."""
    information_per_dimension: list[float]
    """What each dimension tells about the data: what the verdict is about. See :func:`collapse`."""
    mean_variance: list[float]
    """Variance over data of each dimension's posterior mean."""
    active_units: int | None
    """Dimensions where that exceeds 0.01 (Burda et al. 2016)."""
    active_units_curve: list[int]
    """Dimensions where it exceeds each of ``THRESHOLDS``."""
    usage: list[float]
    """Of a discrete latent: 1/N Σ_n q(z = k | x_n)."""

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True, repr=False)
class Collapse:
    """What :func:`collapse` found."""

    num_data: int
    num_samples: int
    """Draws of z a datum; 0 where nothing is sampled."""
    latents: dict[str, LatentCollapse]
    thresholds: list[float]
    """Of each ``active_units_curve``."""
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        """A table, for reading."""
        sampled = f"{self.num_samples} samples each" if self.num_samples else "no sampling"
        lines = [f"{self.num_data} data, {sampled}; nats per datum"]
        lines.append(f"{'latent':<12}{'KL':>9}{'size':>7}{'used':>7}{'active':>8}  verdict")
        for name, one in self.latents.items():
            kl = "" if one.kl is None else f"{one.kl:.3f}"
            active = "" if one.active_units is None else one.active_units
            lines.append(f"{name:<12}{kl:>9}{one.size:>7}{one.used:>7}{active:>8}  {one.text}")
        if curves := {name: one.active_units_curve for name, one in self.latents.items() if one.active_units_curve}:
            decades = range(0, len(self.thresholds), 4)
            lines.append(
                f"{'active units where the variance exceeds':<43}"
                + "".join(f"{self.thresholds[i]:>8g}" for i in decades)
            )
            lines += [f"  {name:<41}" + "".join(f"{curve[i]:>8}" for i in decades) for name, curve in curves.items()]
        return "\n".join([*lines, *(f"NOTE: {note}" for note in self.notes)])


def active_units_curve(
    posterior_means: Tensor,  # (N, dims)
    thresholds: Sequence[float] = THRESHOLDS,
) -> list[int]:
    """The number of dimensions whose posterior mean varies over data by more than each threshold (variance).

    Burda et al. (2016) count at 0.01. The curve shows how much the count depends on that choice.

    Raises:
        TypeError, ValueError: means that are not finite, of shape (N, dims) with N ≥ 2; a threshold not above 0.

    References:
        Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders, section 5.2.
    """
    variance = _check_means(posterior_means).var(0)
    for threshold in thresholds:
        check_positive("thresholds", threshold)
    return [int((variance > threshold).sum()) for threshold in thresholds]


def judge_dimensions(
    information: Sequence[float],
    mean_variance: Sequence[float],
    *,
    total: float | None = None,
    kl: float | None = None,
    kl_per_dimension: Sequence[float] = (),
) -> LatentCollapse:
    """The verdict on a latent with dimensions, by the rule of :func:`collapse`.

    Args:
        information: nats that each dimension tells about the data.
        mean_variance: variance over data of each dimension's posterior mean.
        total: nats that all dimensions together tell, if known.
        kl, kl_per_dimension: of guide from prior, if known.
    """
    verdict, reason, used = _judge(information, total)
    return LatentCollapse(
        verdict=verdict,
        text=f"{verdict}: {reason}",
        size=len(information),
        used=used,
        kl=kl,
        kl_per_dimension=list(kl_per_dimension),
        information_per_dimension=list(information),
        mean_variance=list(mean_variance),
        active_units=sum(value > ACTIVE_UNIT_VARIANCE for value in mean_variance),
        active_units_curve=[sum(value > threshold for value in mean_variance) for threshold in THRESHOLDS],
        usage=[],
    )


def _judge(information: Sequence[float], total: float | None) -> tuple[str, str, int]:
    """Verdict, reason, and the number of dimensions that count."""
    size, together = len(information), sum(max(value, 0.0) for value in information)
    telling = sum(value > USED_NATS for value in information)
    dimensions = "dimension" if size == 1 else "dimensions"
    if not telling:
        if total is not None and total > 10 * USED_NATS:
            return "partly collapsed", f"none of {size} {dimensions} tells {USED_NATS} nats, all of them {total:.2f}", 0
        return "collapsed", f"no dimension of {size} carries more than {USED_NATS} nats of information", 0
    carriers, few = (_carriers(information, share) for share in (SHARE, 0.9))
    nats = f"({together:.2f} nats{'' if size == 1 else ', summed over dimensions'})"  # not of z: dimensions share some
    if telling == size and carriers >= 0.9 * size:
        return "alive", f"{'it carries' if size == 1 else f'all {size} dimensions carry'} information {nats}", size
    used = min(carriers, telling)
    return "partly collapsed", f"{used} of {size} dimensions carry 99% of the information {nats}, {few} carry 90%", used


def _carriers(information: Sequence[float], share: float) -> int:
    """The fewest dimensions that carry this share of the information."""
    largest = sorted((max(value, 0.0) for value in information), reverse=True)
    carried = list(accumulate(largest))
    return 1 + next(i for i, value in enumerate(carried) if value >= share * carried[-1])


def judge_categories(
    probs: Tensor,  # (N, K)
    *,
    kl: float | None = None,
) -> LatentCollapse:
    """The verdict on a discrete latent, from the guide's probabilities, or a mixture's responsibilities.

    ``collapsed`` where I(n; z) is below 0.01 nats; ``partly collapsed`` where no datum uses some category: none has
    half of its probability there, nor do all together have a whole one, Σ_n q(z = k | x_n) < 1; else ``alive``.
    """
    log_q = probs.double().log().mT
    usage = probs.double().mean(0)
    information = mean_over_categories(log_q, log_q - usage.log().unsqueeze(1))
    entropy = -float(torch.xlogy(usage, usage).sum())
    size = len(usage)
    unused = int(((probs.sum(0) < 1) & (probs.amax(0) < 0.5)).sum())
    if information < USED_NATS:
        verdict, reason = "collapsed", f"all data have nearly one distribution over its {size} categories"
    elif unused:
        verdict, reason = "partly collapsed", f"no datum uses {unused} of {size} categories"
    else:
        verdict, reason = "alive", f"all {size} categories are in use"
    return LatentCollapse(
        verdict=verdict,
        text=f"{verdict}: {reason} ({information:.2f} nats of information, of {entropy:.2f} in the aggregate)",
        size=size,
        used=0 if verdict == "collapsed" else size - unused,
        kl=kl,
        kl_per_dimension=[],
        information_per_dimension=[information],
        mean_variance=[],
        active_units=None,
        active_units_curve=[],
        usage=usage.tolist(),
    )


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

    What counts is the information of a dimension, I(n; z_j): how much z_j tells about which datum it encodes. It is
    at most the dimension's average KL, and unlike it, is 0 for a guide that ignores x but is not the prior. With
    dimensions in the order of their information:

    - ``collapsed``: no dimension tells more than 0.01 nats;
    - ``alive``: every dimension does, and no more than a tenth of them share the last 1% of the sum;
    - ``partly collapsed``: the others, such as "12 of 50 dimensions carry 99% of the information", and how many of
      these carry 90%.

    The count of active units is given beside it, and is more generous: of a unit Gaussian prior, a variance of 0.01 is
    met by a KL of 0.005 nats. A rule on the average is one on most data, too: where the KL averages ε, at most a share
    δ of the data has one above ε/δ (Markov), which is the (ε, δ)-collapse of Lucas et al.

    The information is that of :func:`~pyrovae.evaluation.decomposition.kl_decomposition`, exact but for draws, for a
    latent whose guide depends on x alone and whose marginals are known. Else (a deeper layer; a Dirichlet) it is
    −½ log(1 − R²), with R² the share of the dimension's variance that lies between posterior means E[z_j | x_n], less
    three standard errors; and no more than the KL, where the prior is fixed. Such a posterior mean is an average over
    draws of the layers below; the variance that this average adds is subtracted.

    A discrete latent is judged by :func:`judge_categories`: from the guide, or for a mixture without one from the
    pair's exact ``posterior``. Latents outside the plate ``data`` encode no datum and are not judged.

    Args:
        pair: the model and guide. It is left as it was.
        x: data, shape (N, D), N ≥ 2.
        num_samples: draws of z a datum, 2 or more.
        max_data: draws for the information come from at most this many data, chosen at random; see
            :func:`~pyrovae.evaluation.decomposition.kl_decomposition`.
        binarize: draw pixels in [0, 1] as 0 or 1 first, once.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda``.
        seed: of the draws. The caller's random state is left as it was.
        progress: show a bar; None shows it on a terminal.

    Raises:
        TypeError, ValueError: bad data or options, before work starts.
        NotApplicable: the pair has no latent in the data plate to judge.

    References:
        Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders. Lucas, Tucker, Grosse and Norouzi
        (2019), Don't blame the ELBO! He, Spokoyny, Neubig and Berg-Kirkpatrick (2019), Lagging inference networks and
        posterior collapse.
    """
    check_counts(num_samples, max_data)
    with prepared(pair, x, binarize=binarize, device=device, seed=seed) as x, torch.no_grad():
        if len(x) < 2:
            raise ValueError(f"x: expected at least 2 data, which z can tell apart; got {len(x)}.")
        structure = Structure.of(pair.model, pair.guide, (x[:2],), {})
        summed_out = _mixture(pair, x, structure)
        if summed_out:
            return Collapse(len(x), 0, summed_out, list(THRESHOLDS))
        guide = LocalGuide.of(pair, x, "collapse")
        measured = _measure(guide, x, num_samples)
        parts = sampled_parts(guide, x, num_samples, min(len(x), max_data), progress, joint=False)
        latents, notes = {}, []
        for name, latent in guide.latents.items():
            one = measured[name]
            if latent.alone and latent.is_category:
                probs = log_prob_of_categories(guide, x, name)[1].exp().mT
                latents[name] = judge_categories(probs, kl=one.kl)
                continue
            if latent.is_category:
                notes.append(f"{name}: a category that depends on another latent; not judged")
                continue
            known = parts.get(name)
            information = known.mutual_information_per_dimension if known else []
            if not information:
                information = one.information_from_variances(bounded=latent.fixed_prior)
                notes.append(
                    f"{name}: information from variances, as its marginals given x "
                    f"{'have no closed form' if latent.alone else 'depend on other latents'}"
                )
            latents[name] = judge_dimensions(
                information,
                one.mean_variance.tolist(),
                total=known.mutual_information if known else None,
                kl=one.kl,
                kl_per_dimension=one.kl_per_dimension,
            )
        if not latents:
            raise NotApplicable(
                f"collapse does not apply to {type(pair).__name__}: {'; '.join(notes)}. Sum the category out, or let "
                "its guide depend on x alone."
            )
        left_out = [*structure.enumerated, *guide.outside]
        if left_out:
            notes.append(f"not judged, as the guide has no value a datum of it: {', '.join(left_out)}")
        return Collapse(len(x), num_samples, latents, list(THRESHOLDS), notes)


def _mixture(pair: Pair, x: Tensor, structure: Structure) -> dict[str, LatentCollapse]:
    """The verdict on the one latent of a pair whose guide has none, from its exact posterior."""
    if len(structure.enumerated) != 1 or pair.posterior is None:
        return {}
    posteriors: list[Any] = [pair.posterior(rows) for rows in x.split(1000)]
    if not all(isinstance(posterior, torch.distributions.Categorical) for posterior in posteriors):
        return {}
    return {structure.enumerated[0]: judge_categories(torch.cat([posterior.probs for posterior in posteriors]))}


@dataclass(frozen=True)
class _Measured:
    """One latent, over all data."""

    means: Tensor
    """E[z | x_n], averaged over draws of the latents that z depends on, (N, dims)."""
    noise: Tensor
    """Variance that this average adds to the variance over data of the means, (dims,)."""
    within: Tensor
    """Mean over data of the variance of z, (dims,)."""
    kl: float | None
    kl_per_dimension: list[float]

    @property
    def mean_variance(self) -> Tensor:
        return (self.means.var(0) - self.noise).clamp(min=0)

    def information_from_variances(self, *, bounded: bool) -> list[float]:
        error = self.noise * math.sqrt(2 / (len(self.means) - 1))
        between = (self.mean_variance - 3 * error).clamp(min=0)
        share = between / (between + self.within).clamp(min=torch.finfo(between.dtype).tiny)
        found = (-0.5 * torch.log1p(-share.clamp(max=1 - 1e-12))).tolist()
        if bounded and self.kl_per_dimension:
            found = [min(pair) for pair in zip(found, self.kl_per_dimension, strict=True)]
        return found


def _measure(guide: LocalGuide, x: Tensor, num_samples: int) -> dict[str, _Measured]:
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
            z = _as_dimensions(guide, value, fn)
            mean = _as_dimensions(guide, mean_or_value(fn, value).expand(value.shape), fn)
            means[name].append(mean.mean(0))
            sums[name, "within"].append(z.var(0).sum(0))
            sums[name, "noise"].append(mean.var(0).sum(0) / num_samples)
    total = {key: torch.stack(values).sum(0) / len(x) for key, values in sums.items()}
    none = torch.zeros(0)
    return {
        name: _Measured(
            torch.cat(means[name]) if name in means else none,
            total.get((name, "noise"), none),
            total.get((name, "within"), none),
            float(total[name, "kl"]) if (name, "kl") in total else None,
            total[name, "dims"].tolist() if (name, "dims") in total else [],
        )
        for name in guide.latents
    }


def _as_dimensions(guide: LocalGuide, value: Tensor, fn: Any) -> Tensor:
    """(draws, data, dimensions), in float64."""
    event_dim = len(fn.event_shape)
    return guide.arranged(value.flatten(-event_dim) if event_dim else value.unsqueeze(-1)).double()


def _check_means(posterior_means: Any) -> Tensor:
    expected = "posterior_means: expected finite floating-point numbers of shape (N, dims), with N 2 or more; got"
    if not isinstance(posterior_means, Tensor) or not posterior_means.is_floating_point():
        raise TypeError(f"{expected} {getattr(posterior_means, 'dtype', type(posterior_means).__name__)}.")
    if posterior_means.dim() != 2 or len(posterior_means) < 2:
        raise ValueError(f"{expected} shape {tuple(posterior_means.shape)}.")
    if not posterior_means.isfinite().all():
        raise ValueError(f"{expected} {int((~posterior_means.isfinite()).sum())} that are NaN or infinite.")
    return posterior_means
