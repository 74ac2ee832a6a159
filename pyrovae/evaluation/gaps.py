"""Gaps of the bound: what it loses to the guide's family and to amortization (Cremer, Li and Duvenaud 2018)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints, transform_to, transforms

from pyrovae.checks import check_positive
from pyrovae.evaluation import measurement
from pyrovae.evaluation.importance_sampling import MeanWeight, stderr_over_data, variance_of_mean
from pyrovae.evaluation.measurement import NotApplicable, Result, not_applicable, prepared, progress_bar
from pyrovae.infer.weights import LogWeightTerms, Structure, log_weight_terms, same_random_state
from pyrovae.pair import Pair

__all__ = ["FAMILIES", "InferenceGaps", "inference_gaps"]

EXACT, SAMPLED = "exact", "importance sampling"
FEW_EFFECTIVE = 100  # with fewer effective samples the evidence is a lower bound only
CHECK_PARTICLES = 256  # samples a datum, for the choice of its offsets
WEIGHTS_PER_CHUNK = 2**23


@dataclass(frozen=True, repr=False)
class InferenceGaps(Result):
    """Gaps that :func:`inference_gaps` measured, nats per datum; each ``_stderr`` is Monte Carlo error for these data.

    ``log_evidence`` = ``elbo`` + ``amortization_gap`` + ``approximation_gap``.
    """

    num_data: int
    num_samples: int
    """Samples a datum, for the bounds and for the evidence; 1 where the guide is discrete and all is summed out."""
    log_evidence: float
    log_evidence_stderr: float
    evidence: str
    """``exact``, or ``importance sampling``: then on average too low, and with it the approximation gap."""
    elbo: float
    """L[q_φ], the bound of the pair's own guide."""
    elbo_stderr: float
    elbo_optimal: float
    """L[q*], the bound of the guide optimised for each datum."""
    elbo_optimal_stderr: float
    approximation_gap: float
    """log p(x) − L[q*]: what no guide of this family can gain."""
    approximation_gap_stderr: float
    amortization_gap: float
    """L[q*] − L[q_φ]: what is lost to one network for all data. Too small where q* is not quite reached."""
    amortization_gap_stderr: float
    log_evidence_per_datum: Tensor
    """(N,), float64, on the CPU, as the next two."""
    elbo_per_datum: Tensor
    elbo_optimal_per_datum: Tensor
    num_steps: int
    converged: bool
    """True where the bound had stopped rising from the third to the fourth quarter of the steps."""
    notes: list[str] = field(default_factory=list)
    """Reasons why these numbers do not mean what they usually do."""

    def _table(self) -> list[str]:
        rows = [
            ("log evidence", self.log_evidence, self.log_evidence_stderr, self.evidence),
            ("ELBO, optimal guides", self.elbo_optimal, self.elbo_optimal_stderr, ""),
            ("ELBO", self.elbo, self.elbo_stderr, ""),
            ("approximation gap", self.approximation_gap, self.approximation_gap_stderr, ""),
            ("amortization gap", self.amortization_gap, self.amortization_gap_stderr, ""),
        ]
        head = f"{self.num_data} data, {self.num_steps} steps, {self.num_samples} samples each; nats per datum"
        lines = [f"{name:<24}{value:>12.3f}  ± {error:.3f}  {note}".rstrip() for name, value, error, note in rows]
        return [head, *lines]


def inference_gaps(
    pair: Pair,
    x: Tensor,
    *,
    num_samples: int = 5000,
    num_steps: int = 500,
    num_particles: int = 8,
    lr: float = 0.1,
    binarize: bool = False,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool | None = None,
) -> InferenceGaps:
    """Split what the bound loses into the part of the guide's family and the part of amortization.

        log p(x) − L[q_φ] = (log p(x) − L[q*]) + (L[q*] − L[q_φ])
                            approximation gap    amortization gap

    q_φ(z | x) is the pair's guide and q* the best guide of the same family for each datum. To find it, the
    unconstrained parameters of every guide site get offsets of each datum's own, which start at zero. Adam moves them
    along the pathwise gradient without its score term (Roeder et al. 2017), and its steps are averaged over their
    second half. Each datum keeps the average if its bound is the better for it, and otherwise its own start. Both
    bounds are then estimated on fresh noise, common to the two, so they are unbiased for the guides chosen before.

    For a latent whose guide depends on the data alone, the offsets reach the whole family. Where it depends on a
    latent sampled before (the second layer of an IWAE), they correct the network for each datum, and so reach only a
    part of what a free conditional could. Discrete latents of the guide are summed over exactly, not sampled. A guide
    of one discrete latent and nothing else needs no search: q* is the exact posterior.

    The evidence is exact where the pair has ``log_prob`` or where all is summed out. Otherwise it is importance
    sampling from q*, which on average falls below log p(x), and makes the approximation gap too small.

    Args:
        num_samples: samples K a datum, for the bounds and the evidence.
        num_steps: steps of Adam.
        num_particles: samples a datum in each step.
        lr: Adam's learning rate. Locations move in units of the pair's own guide's scale.
        pair, x, binarize, device, seed, progress: as in :func:`pyrovae.evaluate`.

    Raises:
        NotApplicable: the guide samples nothing; a latent lies outside the data plate; a guide site's distribution is
            of no known family, or has too many values to sum over.
        TypeError, ValueError: bad data or options, before work starts.

    References:
        Cremer, Li and Duvenaud (2018), Inference suboptimality in variational autoencoders.
        Polyak and Juditsky (1992), Acceleration of stochastic approximation by averaging.
        Roeder, Wu and Duvenaud (2017), Sticking the landing.
    """
    for name, value in (("num_samples", num_samples), ("num_steps", num_steps), ("num_particles", num_particles)):
        check_positive(name, value, integer=True)
    check_positive("lr", lr)
    with prepared(pair, x, binarize=binarize, device=device, seed=seed) as x:
        structure = Structure.of(pair.model, pair.guide, (x[:2],), {})
        probe = PerDatumGuide(pair, x[:2], structure)
        fitting = measurement.runs_at_a_time(x.device, probe.width())
        if probe.is_discrete:
            num_samples = num_particles = 1
        chunk = max(1, min(len(x), fitting // num_particles, WEIGHTS_PER_CHUNK // num_samples))
        at_once = max(1, fitting // chunk)
        options = _Options(num_samples, num_steps, num_particles, lr, at_once, seed)
        chunks = x.split(chunk)
        with progress_bar("gaps", progress, total=len(chunks) * num_steps, unit="step") as bar:
            found = [_measure(PerDatumGuide(pair, rows, structure), options, bar.update) for rows in chunks]
        parts = {name: torch.cat([part[name] for part in found]).cpu() for name in found[0]}
        evidence = EXACT if probe.is_discrete else SAMPLED
        if pair.log_prob is not None:
            with torch.no_grad():
                parts["log_evidence"] = torch.cat([pair.log_prob(rows).double() for rows in chunks]).cpu()
            parts["log_evidence_variance"] = torch.zeros_like(parts["log_evidence"])
            parts["approximation_gap_variance"] = parts["elbo_optimal_variance"]
            evidence = EXACT
        return _gaps_of_parts(parts, evidence, num_samples, num_steps)


@dataclass(frozen=True)
class _Options:
    num_samples: int
    num_steps: int
    num_particles: int
    lr: float
    at_once: int  # most particles in one run without gradients
    seed: int


def _measure(guide: PerDatumGuide, options: _Options, tick: Callable[[], Any]) -> dict[str, Tensor]:
    """Measure for each datum, (N,), bounds and log evidence, the variances of both, and the search's bounds."""
    start = dict(guide.offsets)
    is_solved = guide.is_discrete and len(guide.offsets) == 1
    best, checks = (guide.exact_offsets(), {}) if is_solved else _optimise(guide, options, tick)
    guide.offsets = start
    with same_random_state():  # the same noise for both
        own, _ = guide.draw(options.num_samples, options.at_once)
    guide.offsets = best
    bound, log_w = guide.draw(options.num_samples, options.at_once)
    weight = MeanWeight(log_w)
    found = {"elbo": own, "elbo_optimal": bound, "amortization_gap": bound - own}
    # By the delta method, the relative weights have the errors of the log evidence.
    variances = found | {"log_evidence": weight.relative, "approximation_gap": weight.relative - bound}
    return {
        **checks,
        **{name: value.mean(0) for name, value in found.items()},
        **{f"{name}_variance": variance_of_mean(value) for name, value in variances.items()},
        "log_evidence": weight.log_mean,
        "effective_samples": weight.effective,
    }


def _optimise(guide: PerDatumGuide, options: _Options, tick: Callable[[], Any]) -> tuple[Offsets, dict[str, Tensor]]:
    """Search for the best offsets of each datum; return them and the bound, (N,), at ``start`` and two means."""
    # The means are of the offsets over the third and the fourth quarter of the steps. Adam's steps at a fixed rate
    # jitter about the optimum; the mean of many does not (Polyak and Juditsky 1992).
    start = dict(guide.offsets)
    moving = {key: offset.clone().requires_grad_() for key, offset in start.items()}
    leaves = list(moving.values())
    # In the offsets' units the bound curves by about 1: eps = lr makes Adam a plain descent of rate 1 near the optimum,
    # where its own normalisation would blow the last rounding error up to steps of size lr.
    adam = torch.optim.Adam(leaves, lr=options.lr, eps=options.lr)
    quarter = max(1, options.num_steps // 4)
    guide.offsets, means = moving, []
    for step in range(options.num_steps):
        bound, _ = guide.bound_and_weight(options.num_particles)
        for leaf, gradient in zip(leaves, torch.autograd.grad(-bound.mean(0).sum(), leaves), strict=True):
            leaf.grad = gradient
        adam.step()
        tick()
        left = options.num_steps - step  # steps left, this one among them
        if left % quarter == 0 and left <= 2 * quarter:
            means.append({key: torch.zeros_like(offset) for key, offset in start.items()})
        for key in means[-1] if means else ():
            means[-1][key] += moving[key].detach() / quarter
    third, fourth = means[0], means[-1]
    both = {key: (third[key] + fourth[key]) / 2 for key in start}
    places = {"start": start, "third": third, "fourth": fourth, "both": both}
    bounds = {name: _bound_at(guide, offsets, options) for name, offsets in places.items()}
    best, best_bound = start, bounds["start"]
    for name in ("fourth", "both"):
        best = guide.choose(bounds[name] > best_bound, places[name], best)
        best_bound = torch.maximum(bounds[name], best_bound)
    return best, bounds


def _bound_at(guide: PerDatumGuide, offsets: Offsets, options: _Options) -> Tensor:
    """Estimate the bound of each datum, (N,). All offsets get the same noise, so differences have little of it."""
    guide.offsets = offsets
    with same_random_state():
        torch.manual_seed(options.seed + 1)
        return guide.draw(CHECK_PARTICLES, options.at_once)[0].mean(0)


def _gaps_of_parts(parts: dict[str, Tensor], evidence: str, num_samples: int, num_steps: int) -> InferenceGaps:
    num_data = len(parts["elbo"])
    parts["approximation_gap"] = parts["log_evidence"] - parts["elbo_optimal"]
    numbers: dict[str, Any] = {}
    for name in ("log_evidence", "elbo", "elbo_optimal", "approximation_gap", "amortization_gap"):
        numbers[name] = float(parts[name].mean())
        numbers[f"{name}_stderr"] = float(parts[f"{name}_variance"].sum().sqrt()) / num_data
    notes = []
    if rise := _still_rising(parts):
        notes.append(
            f"the bound of the optimised guides still rose, by {rise:.3f} between the third and the fourth quarter of "
            "the steps: the amortization gap is too small and the approximation gap too large. Raise num_steps or lr"
        )
    if low := int((parts["effective_samples"] < FEW_EFFECTIVE).sum()) if evidence == SAMPLED else 0:
        notes.append(
            f"for {low} of {num_data} data the evidence rests on fewer than {FEW_EFFECTIVE} effective samples: it is "
            "no more than a lower bound there, its Monte Carlo error too small, and the approximation gap too small"
        )
    for name in ("approximation_gap", "amortization_gap"):
        if numbers[name] < 0:
            error = f"{numbers[name]:.2g} with a Monte Carlo error of {numbers[f'{name}_stderr']:.2g}"
            notes.append(f"the {name.replace('_', ' ')} came out below zero, which it cannot be: {error}")
    per_datum: dict[str, Any] = {f"{name}_per_datum": parts[name] for name in ("log_evidence", "elbo", "elbo_optimal")}
    return InferenceGaps(
        num_data=num_data,
        num_samples=num_samples,
        evidence=evidence,
        num_steps=num_steps,
        converged=not rise,
        notes=notes,
        **numbers,
        **per_datum,
    )


def _still_rising(parts: dict[str, Tensor]) -> float:
    """Return how much the bound rose from the third to the fourth quarter of the steps; 0 if next to nothing."""
    if "start" not in parts:  # q* was not searched for
        return 0.0
    rises = parts["fourth"] - parts["third"]
    rise, total = float(rises.mean()), float((parts["fourth"] - parts["start"]).mean())
    error = stderr_over_data(rises) or 0.0
    return 0.0 if rise <= max(3 * error, 0.01 * total, 1e-3) else rise  # NaN counts as still rising


# The guide of each datum ----------------------------------------------------------------------------------------------

MOST_COMBINATIONS = 1024  # of values of discrete latents

_SECOND_NAMES = ("probs", "covariance_matrix", "precision_matrix")  # of what logits and scale_tril say already
FAMILIES: dict[type, tuple[str, ...]] = {
    family: tuple(parameter for parameter in family.arg_constraints if parameter not in _SECOND_NAMES)
    for family in (
        *(dist.Normal, dist.LogNormal, dist.Laplace, dist.Cauchy, dist.Gumbel, dist.Logistic, dist.StudentT),
        *(dist.MultivariateNormal, dist.HalfNormal, dist.HalfCauchy, dist.Exponential, dist.Gamma, dist.InverseGamma),
        *(dist.Weibull, dist.Beta, dist.Dirichlet, dist.ContinuousBernoulli),
        *(dist.Bernoulli, dist.Categorical, dist.OneHotCategorical),
    )
}
"""Parameters that span each family, with none redundant."""

Offsets = dict[tuple[str, str], Tensor]
"""Offsets of unconstrained parameters, by site and parameter."""

_FIXED_NAMES = ("Exp", "Sigmoid", "Softplus", "StickBreaking", "Tanh")
_FIXED_TRANSFORMS = tuple(getattr(transforms, f"{name}Transform") for name in _FIXED_NAMES)


class PerDatumGuide(Messenger):
    """The pair's guide on ``x``, its sites' parameters moved by offsets of each datum's own.

    It draws the values of its sites itself. Continuous latents come from the moved distribution. Their density has the
    offsets detached, which leaves the score term out of the gradient. Discrete latents take every combination in turn.
    """

    def __init__(self, pair: Pair, x: Tensor, structure: Structure) -> None:
        super().__init__()
        self._pair, self._x, self._structure = pair, x, structure
        self.offsets: Offsets = {}
        self._values: dict[str, Tensor] = {}  # of each discrete site, (C, event)
        self._particles = 0
        self._data_axis: dict[str, int] = {}
        with torch.no_grad(), same_random_state(), poutine.block(), self:
            pair.guide(x)
        if not self.offsets:
            raise self._inapplicable("its guide samples nothing, so its bound is the evidence.")
        if self.combinations > MOST_COMBINATIONS:
            size = f"{self.combinations} values together, and it sums over at most {MOST_COMBINATIONS}"
            raise self._inapplicable(f"the discrete latents {', '.join(self._values)} of its guide have {size}.")

    def _inapplicable(self, reason: str) -> NotApplicable:
        return not_applicable("inference_gaps", self._pair, reason)

    @property
    def combinations(self) -> int:
        """Number of combinations of values of the discrete latents."""
        return math.prod(len(values) for values in self._values.values())

    @property
    def is_discrete(self) -> bool:
        """Return whether the guide samples discrete latents alone."""
        return {site for site, _ in self.offsets} == set(self._values)

    def bound_and_weight(self, num_particles: int) -> tuple[Tensor, Tensor]:
        """Draw samples of the bound, and log-weights whose log-mean-exp is the evidence, both (K, N).

        Without discrete latents both are log w; else Σ_c q(c) log w_c and log Σ_c q(c) w_c, over their values c.
        """
        log_w, log_q = self._log_weights(num_particles)
        probability = log_q.exp()
        # Where the guide has no mass, a value adds nothing, even if the model rules it out (log w = −∞).
        bound = torch.where(probability > 0, log_w, 0.0) * probability
        return bound.sum(0), (log_w + log_q).logsumexp(0)

    def _log_weights(self, num_particles: int) -> tuple[Tensor, Tensor]:
        """Return log w and log q of the discrete latents, (C, K, N), with C combinations of their values."""
        terms = self._terms(num_particles)
        log_w = terms.log_weights
        log_q = reduce(torch.add, [terms.guide[name] for name in self._values], torch.zeros_like(log_w))
        size = (self.combinations, num_particles)
        return log_w.unflatten(0, size), log_q.unflatten(0, size)

    def _terms(self, num_particles: int) -> LogWeightTerms:
        self._particles = count = self.combinations * num_particles
        return log_weight_terms(self._pair.model, self._guide, self._x, num_particles=count, structure=self._structure)

    @torch.no_grad()
    def draw(self, count: int, at_once: int) -> tuple[Tensor, Tensor]:
        """Draw :meth:`bound_and_weight` of ``count`` particles, at most ``at_once`` at a time, in float64."""
        found = [self.bound_and_weight(min(at_once, count - done)) for done in range(0, count, at_once)]
        bound, log_w = (torch.cat([part.double() for part in parts]) for parts in zip(*found, strict=True))
        return bound, log_w

    def choose(self, take: Tensor, one: Offsets, other: Offsets) -> Offsets:
        """Return the offsets of ``one`` for the data where ``take``, (N,), is true, and of ``other`` elsewhere."""
        return {
            (site, parameter): torch.where(
                take.reshape([-1 if axis == self._data_axis[site] else 1 for axis in range(offset.dim())]),
                offset,
                other[site, parameter],
            )
            for (site, parameter), offset in one.items()
        }

    @torch.no_grad()
    def exact_offsets(self) -> Offsets:
        """Return the offsets that make a single discrete site the exact posterior: its logits move by log w."""
        log_w = self._log_weights(1)[0]  # (C, 1, N)
        ((key, offset),) = self.offsets.items()
        log_w = log_w.clamp(min=-1e4)  # a value that the model rules out gets next to no mass, without NaN
        moved = log_w[:, 0].mT if offset.dim() > 1 else log_w[1, 0] - log_w[0, 0]
        return {key: moved.reshape(offset.shape)}

    def width(self) -> int:
        """Return the size of the widest tensor for a datum and particle; a particle stands for all combinations."""
        with torch.no_grad(), same_random_state():
            terms = self._terms(1)
        if terms.log_weights.shape != (self.combinations, len(self._x)):
            reason = "not all of its sites lie in the plate 'data' and no other, so there is no bound for each datum."
            raise self._inapplicable(reason)
        return self.combinations * measurement.width(self._pair, terms.model_trace, len(self._x) * self.combinations)

    def _guide(self, x: Tensor) -> None:
        with self:
            self._pair.guide(x)

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or msg["infer"].get("_deterministic"):
            return
        name, fn, particles = msg["name"], msg["fn"], self._particles
        if not particles:
            self._register(name, fn, msg["cond_indep_stack"])
        shape = (particles,) + (1,) * self._structure.max_plate_nesting if particles > 1 else ()
        moved = self._moved(name, fn, detached=False)
        moved = moved.expand(torch.broadcast_shapes(moved.batch_shape, shape))
        if name in self._values:
            value = self._enumerated(name, len(moved.batch_shape)) if particles > 1 else moved.sample()
            msg["value"], msg["fn"] = value.expand(moved.batch_shape + moved.event_shape), moved
        else:
            msg["value"], msg["fn"] = moved.rsample(), self._moved(name, fn, detached=True)
        msg["done"] = True

    def _enumerated(self, name: str, batch_rank: int) -> Tensor:
        """Return the values of a discrete site by particle; together the sites go through all combinations."""
        names, chosen = list(self._values), self._values[name]
        before = math.prod(len(self._values[other]) for other in names[: names.index(name) + 1])
        index = torch.arange(self._particles, device=chosen.device) // (self._particles // before) % len(chosen)
        return chosen[index].reshape(-1, *(1,) * (batch_rank - 1), *chosen.shape[1:])

    def _register(self, name: str, fn: Any, plates: Any) -> None:
        """Note the data axis of a site and the values of a discrete one, in the first run."""
        axes = [len(fn.batch_shape) + frame.dim for frame in plates if frame.name == "data"]
        if not axes:
            reason = f"its guide site '{name}' lies outside the plate 'data', so there is no guide for each datum."
            raise self._inapplicable(reason)
        self._data_axis[name] = axes[0]
        if fn.support.is_discrete:
            if not fn.has_enumerate_support or len(plates) > 1:
                what = f"discrete guide site '{name}' ({_family_name(fn)})"
                raise self._inapplicable(f"the values of its {what} cannot be summed over one by one, for each datum.")
            self._values[name] = fn.enumerate_support(expand=False).reshape(-1, *fn.event_shape)

    def _moved(self, site: str, fn: Any, *, detached: bool) -> Any:
        """Return a distribution of the same class as ``fn``, with parameters moved by the site's offsets."""
        if isinstance(fn, dist.Independent):
            return self._moved(site, fn.base_dist, detached=detached).to_event(fn.reinterpreted_batch_ndims)
        is_transformed = type(fn) in (dist.TransformedDistribution, torch.distributions.TransformedDistribution)
        if is_transformed and all(isinstance(t, _FIXED_TRANSFORMS) for t in fn.transforms):
            return dist.TransformedDistribution(self._moved(site, fn.base_dist, detached=detached), fn.transforms)
        if type(fn) not in FAMILIES:
            what = f"the distribution of its guide site '{site}', {_family_name(fn)}"
            raise self._inapplicable(f"{what}, is not of a family whose parameters it knows.")
        values = {}
        for parameter in FAMILIES[type(fn)]:
            value = getattr(fn, parameter)
            support = fn.arg_constraints[parameter]
            value = value.expand(fn.batch_shape + value.shape[value.dim() - support.event_dim :])
            if not self._particles:
                self.offsets[site, parameter] = torch.zeros_like(value)
            offset = self.offsets[site, parameter]
            values[parameter] = _shifted(fn, parameter, support, value, offset.detach() if detached else offset)
        return type(fn)(**values)


def _shifted(fn: Any, parameter: str, support: constraints.Constraint, value: Tensor, offset: Tensor) -> Tensor:
    """Return ``value`` moved in unconstrained space; a location moves in units of the scale."""
    if parameter == "loc" and isinstance(fn, dist.MultivariateNormal):
        return value + (fn.scale_tril @ offset.unsqueeze(-1)).squeeze(-1)
    if parameter == "loc":
        return value + fn.scale * offset
    transform = transform_to(support)
    return transform(transform.inv(value) + offset)


def _family_name(fn: Any) -> str:
    while isinstance(fn, dist.Independent):
        fn = fn.base_dist
    return type(fn).__name__
