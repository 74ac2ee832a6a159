"""Where the bound loses: to the guide's family, or to amortization (Cremer, Li and Duvenaud 2018)."""

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
from tqdm.auto import tqdm

from pyrovae.checks import check_positive
from pyrovae.evaluate.prepare import NotApplicable, prepared
from pyrovae.infer.log_weights import Structure, log_weight_terms, same_random_state
from pyrovae.pair import Pair

__all__ = ["InferenceGaps", "inference_gaps"]

EXACT, SAMPLED = "exact", "importance sampling"
FEW_EFFECTIVE = 100  # samples
CHECK_PARTICLES = 256  # samples a datum, for the choice of its offsets
MOST_COMBINATIONS = 1024  # of values of discrete latents
WEIGHTS_PER_CHUNK = 2**23
FLOATS_PER_CHUNK = {"cpu": 2**21, "cuda": 2**25}  # of the widest tensor


@dataclass(frozen=True, repr=False)
class InferenceGaps:
    """What :func:`inference_gaps` measured. Nats per datum; each ``_stderr`` is Monte Carlo error, for these very data.

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
    """L[q_φ], of the pair's own guide."""
    elbo_stderr: float
    elbo_optimal: float
    """L[q*], of the guide optimised for each datum."""
    elbo_optimal_stderr: float
    approximation_gap: float
    """log p(x) − L[q*]: what no guide of this family can reach."""
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
    """Whether the bound had stopped rising, from the third to the fourth quarter of the steps."""
    notes: list[str] = field(default_factory=list)
    """What keeps these numbers from meaning what they usually do."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; without the values of each datum."""
        return {name: value for name, value in vars(self).items() if not isinstance(value, Tensor)}

    def __repr__(self) -> str:
        """A table, for reading."""
        rows = [
            ("log evidence", self.log_evidence, self.log_evidence_stderr, self.evidence),
            ("ELBO, optimal guides", self.elbo_optimal, self.elbo_optimal_stderr, ""),
            ("ELBO", self.elbo, self.elbo_stderr, ""),
            ("approximation gap", self.approximation_gap, self.approximation_gap_stderr, ""),
            ("amortization gap", self.amortization_gap, self.amortization_gap_stderr, ""),
        ]
        head = f"{self.num_data} data, {self.num_steps} steps, {self.num_samples} samples each; nats per datum"
        lines = [f"{name:<24}{value:>12.3f}  ± {error:.3f}  {note}".rstrip() for name, value, error, note in rows]
        return "\n".join([head, *lines, *(f"NOTE: {note}" for note in self.notes)])


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
    unconstrained parameters of every guide site get offsets of each datum's own, which start at zero: Adam on the
    pathwise gradient without its score term (Roeder et al. 2017), its steps averaged over their second half. Each datum
    keeps the average if its bound is the better for it, and otherwise its own start. Both bounds are then taken on
    fresh noise, common to the two: what is reported is an unbiased estimate of the bound of guides already chosen.

    For a latent whose guide depends on the data alone, the offsets reach the whole family. Where it depends on a
    latent sampled before (the second layer of an IWAE), they correct the network for each datum, and so reach a part
    of what a free conditional could. Discrete latents of the guide are summed over exactly, not sampled; where there is
    one and nothing else, q* is the exact posterior and needs no search.

    The evidence is exact where the pair has ``log_prob`` or where all is summed out. Otherwise it is importance
    sampling from q*, which on average falls below log p(x), and makes the approximation gap too small.

    Args:
        pair: the model and guide. It is left as it was.
        x: data, shape (N, D).
        num_samples: samples K a datum, for the bounds and the evidence.
        num_steps: of Adam.
        num_particles: samples a datum in each step.
        lr: Adam's learning rate. Locations move in units of the pair's own guide's scale.
        binarize: draw pixels in [0, 1] as 0 or 1 first, once.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda``.
        seed: of all samples. The caller's random state is left as it was.
        progress: show a bar; None shows it on a terminal.

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
        probe = _LocalGuides(pair, x[:2], structure)
        width = probe.width()
        if probe.is_discrete:
            num_samples = num_particles = 1
        budget = FLOATS_PER_CHUNK[x.device.type] // width
        chunk = max(1, min(len(x), budget // num_particles, WEIGHTS_PER_CHUNK // num_samples))
        at_once = max(1, budget // chunk)
        options = _Options(num_samples, num_steps, num_particles, lr, at_once, seed)
        chunks = x.split(chunk)
        disable = None if progress is None else not progress
        with tqdm(total=len(chunks) * num_steps, unit="step", disable=disable, leave=False, desc="gaps") as bar:
            found = [_measure(_LocalGuides(pair, rows, structure), options, bar.update) for rows in chunks]
        parts = {name: torch.cat([part[name] for part in found]).cpu() for name in found[0]}
        evidence = EXACT if probe.is_discrete else SAMPLED
        if pair.log_prob is not None:
            with torch.no_grad():
                parts["log_evidence"] = torch.cat([pair.log_prob(rows).double() for rows in chunks]).cpu()
            parts["log_evidence_variance"] = torch.zeros_like(parts["log_evidence"])
            parts["approximation_gap_variance"] = parts["elbo_optimal_variance"]
            evidence = EXACT
        return _result(parts, evidence, num_samples, num_steps)


# The guides of single data ----------------------------------------------------------------------------------------

_LOC_SCALE = ("loc", "scale")
FAMILIES: dict[type, tuple[str, ...]] = {
    dist.Normal: _LOC_SCALE,
    dist.LogNormal: _LOC_SCALE,
    dist.Laplace: _LOC_SCALE,
    dist.Cauchy: _LOC_SCALE,
    dist.Gumbel: _LOC_SCALE,
    dist.Logistic: _LOC_SCALE,
    dist.StudentT: ("df", *_LOC_SCALE),
    dist.MultivariateNormal: ("loc", "scale_tril"),
    dist.HalfNormal: ("scale",),
    dist.HalfCauchy: ("scale",),
    dist.Exponential: ("rate",),
    dist.Gamma: ("concentration", "rate"),
    dist.InverseGamma: ("concentration", "rate"),
    dist.Weibull: ("scale", "concentration"),
    dist.Beta: ("concentration1", "concentration0"),
    dist.Dirichlet: ("concentration",),
    dist.ContinuousBernoulli: ("logits",),
    dist.Bernoulli: ("logits",),
    dist.Categorical: ("logits",),
    dist.OneHotCategorical: ("logits",),
}
"""The parameters that span each family, none twice."""

_Offsets = dict[tuple[str, str], Tensor]  # by site and parameter

_FIXED_TRANSFORMS = (
    transforms.ExpTransform,
    transforms.SigmoidTransform,
    transforms.SoftplusTransform,
    transforms.StickBreakingTransform,
    transforms.TanhTransform,
)


class _LocalGuides(Messenger):
    """The pair's guide on ``x``, its sites' parameters moved by offsets of each datum's own.

    It draws the sites' values itself: of continuous latents from the moved distribution, while their density has the
    offsets detached, which leaves the score term out of the gradient; of discrete ones, every combination in turn.
    """

    def __init__(self, pair: Pair, x: Tensor, structure: Structure) -> None:
        super().__init__()
        self._pair, self._x, self._structure = pair, x, structure
        self.offsets: _Offsets = {}
        self._values: dict[str, Tensor] = {}  # of discrete sites: each value, (C, event)
        self._particles = 0
        self._data_axis: dict[str, int] = {}
        with torch.no_grad(), same_random_state(), poutine.block(), self:
            pair.guide(x)
        name = type(pair).__name__
        if not self.offsets:
            raise NotApplicable(
                f"inference_gaps does not apply to {name}: its guide samples nothing, so its bound is the evidence."
            )
        if self.combinations > MOST_COMBINATIONS:
            raise NotApplicable(
                f"inference_gaps does not apply to {name}: the discrete latents {', '.join(self._values)} of its guide "
                f"have {self.combinations} values together, and it sums over at most {MOST_COMBINATIONS}."
            )

    @property
    def combinations(self) -> int:
        """Of values of the discrete latents."""
        return math.prod(len(values) for values in self._values.values())

    @property
    def is_discrete(self) -> bool:
        return {site for site, _ in self.offsets} == set(self._values)

    @property
    def is_one_category(self) -> bool:
        return self.is_discrete and len(self.offsets) == 1

    def bound_and_weight(self, num_particles: int) -> tuple[Tensor, Tensor]:
        """Samples of the bound, and log-weights whose log-mean-exp is the evidence, both (K, N).

        Without discrete latents both are log w; else Σ_c q(c) log w_c and log Σ_c q(c) w_c, over their values c.
        """
        log_w, log_q = self._log_weights(num_particles)
        probability = log_q.exp()
        # A value that the guide gives no mass adds nothing, also where the model rules it out.
        bound = torch.where(probability > 0, log_w, 0.0) * probability
        return bound.sum(0), (log_w + log_q).logsumexp(0)

    def _log_weights(self, num_particles: int) -> tuple[Tensor, Tensor]:
        """log w and log q of the discrete latents, (C, K, N), C being their values."""
        self._particles = self.combinations * num_particles
        terms = log_weight_terms(
            self._pair.model, self._guide, self._x, num_particles=self._particles, structure=self._structure
        )
        log_w = terms.log_weights
        log_q = reduce(torch.add, [terms.guide[name] for name in self._values], torch.zeros_like(log_w))
        size = (self.combinations, num_particles)
        return log_w.unflatten(0, size), log_q.unflatten(0, size)

    @torch.no_grad()
    def draw(self, count: int, at_once: int) -> tuple[Tensor, Tensor]:
        """:meth:`bound_and_weight` of ``count`` particles, no more than ``at_once`` at a time, in float64."""
        found = [self.bound_and_weight(min(at_once, count - done)) for done in range(0, count, at_once)]
        bound, log_w = (torch.cat([part.double() for part in parts]) for parts in zip(*found, strict=True))
        return bound, log_w

    def choose(self, take: Tensor, one: _Offsets, other: _Offsets) -> _Offsets:
        """The offsets of ``one`` for those data that ``take``, (N,), says; for the others, those of ``other``."""
        return {
            (site, parameter): torch.where(
                take.reshape([-1 if axis == self._data_axis[site] else 1 for axis in range(offset.dim())]),
                offset,
                other[site, parameter],
            )
            for (site, parameter), offset in one.items()
        }

    @torch.no_grad()
    def exact_offsets(self) -> _Offsets:
        """Those of a single discrete site at the exact posterior: its logits move by log w."""
        log_w = self._log_weights(1)[0]  # (C, 1, N)
        ((key, offset),) = self.offsets.items()
        log_w = log_w.clamp(min=-1e4)  # a value that the model rules out: as good as no mass, and no NaN
        moved = log_w[:, 0].mT if offset.dim() > 1 else log_w[1, 0] - log_w[0, 0]
        return {key: moved.reshape(offset.shape)}

    def width(self) -> int:
        """Floats of the widest tensor, for a datum and particle.

        Raises:
            NotApplicable: the bound does not fall into one part a datum.
        """
        pair = type(self._pair).__name__
        with torch.no_grad(), same_random_state():
            self._particles = self.combinations
            terms = log_weight_terms(
                self._pair.model, self._guide, self._x, num_particles=self._particles, structure=self._structure
            )
        if terms.log_weights.shape != (self._particles, len(self._x)):
            raise NotApplicable(
                f"inference_gaps does not apply to {pair}: not all of its sites lie in the plate 'data' and no other, "
                "so there is no bound for each datum."
            )
        sites: list[Any] = [s for s in terms.model_trace.nodes.values() if s["type"] == "sample"]
        of_sites = sum(s["value"].numel() for s in sites) // len(self._x)
        of_layers = [self.combinations * p.shape[0] for p in self._pair.parameters() if p.dim() == 2]
        return max(1, of_sites, *of_layers)

    def _guide(self, x: Tensor) -> None:
        with self:
            self._pair.guide(x)

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or msg["infer"].get("_deterministic"):
            return
        name, fn, particles = msg["name"], msg["fn"], self._particles
        if not particles:
            self._meet(name, fn, msg["cond_indep_stack"])
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
        """The values of a discrete site, by particle: together the sites go through all combinations."""
        stride = self._particles
        for site, values in self._values.items():
            stride //= len(values)
            if site == name:
                break
        chosen = self._values[name]
        index = torch.arange(self._particles, device=chosen.device) // stride % len(chosen)
        return chosen[index].reshape(-1, *(1,) * (batch_rank - 1), *chosen.shape[1:])

    def _meet(self, name: str, fn: Any, plates: Any) -> None:
        pair = type(self._pair).__name__
        axes = [len(fn.batch_shape) + frame.dim for frame in plates if frame.name == "data"]
        if not axes:
            raise NotApplicable(
                f"inference_gaps does not apply to {pair}: its guide site '{name}' lies outside the plate 'data', so "
                "there is no guide for each datum."
            )
        self._data_axis[name] = axes[0]
        if not fn.support.is_discrete:
            return
        try:
            values = fn.enumerate_support(expand=False)
        except NotImplementedError:
            values = None
        if values is None or len(plates) > 1:
            raise NotApplicable(
                f"inference_gaps does not apply to {pair}: the values of its discrete guide site '{name}' "
                f"({_family_name(fn)}) cannot be summed over one by one, for each datum."
            )
        self._values[name] = values.reshape(-1, *fn.event_shape)

    def _moved(self, site: str, fn: Any, *, detached: bool) -> Any:
        """A distribution of the same class as ``fn``, with parameters moved by the site's offsets."""
        if isinstance(fn, dist.Independent):
            return self._moved(site, fn.base_dist, detached=detached).to_event(fn.reinterpreted_batch_ndims)
        if type(fn) in (dist.TransformedDistribution, torch.distributions.TransformedDistribution) and all(
            isinstance(t, _FIXED_TRANSFORMS) for t in fn.transforms
        ):
            return dist.TransformedDistribution(self._moved(site, fn.base_dist, detached=detached), fn.transforms)
        if type(fn) not in FAMILIES:
            raise NotApplicable(
                f"inference_gaps does not apply to {type(self._pair).__name__}: the distribution of its guide site "
                f"'{site}', {_family_name(fn)}, is not of a family whose parameters it knows."
            )
        values = {}
        for parameter in FAMILIES[type(fn)]:
            value = getattr(fn, parameter)
            support = fn.arg_constraints[parameter]
            value = value.expand(fn.batch_shape + value.shape[value.dim() - support.event_dim :])
            if not self._particles:
                self.offsets[site, parameter] = torch.zeros_like(value)
            offset = self.offsets[site, parameter]
            values[parameter] = _plus(fn, parameter, support, value, offset.detach() if detached else offset)
        return type(fn)(**values)


def _plus(fn: Any, parameter: str, support: constraints.Constraint, value: Tensor, offset: Tensor) -> Tensor:
    """``value`` moved in unconstrained space; a location, in units of the scale."""
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


# Optimising and measuring them ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    num_samples: int
    num_steps: int
    num_particles: int
    lr: float
    at_once: int
    """Particles in one run without gradients."""
    seed: int


def _measure(guides: _LocalGuides, options: _Options, tick: Callable[[], Any]) -> dict[str, Tensor]:
    """Of each datum, (N,): bounds and log evidence, the variances of these estimates, and the bound at the checks."""
    start = dict(guides.offsets)
    checks: dict[str, Tensor] = {}
    if guides.is_one_category:
        best = guides.exact_offsets()
    else:
        best, checks = _optimise(guides, options, tick)
    guides.offsets = start
    with same_random_state():  # the same noise for both
        own, _ = guides.draw(options.num_samples, options.at_once)
    guides.offsets = best
    bound, log_w = guides.draw(options.num_samples, options.at_once)
    evidence = log_w.logsumexp(0) - math.log(options.num_samples)
    relative = torch.exp(log_w - evidence)
    found = {"elbo": own, "elbo_optimal": bound, "amortization_gap": bound - own}
    variances = found | {"log_evidence": relative, "approximation_gap": relative - bound}  # by the delta method
    return {
        **checks,
        **{name: value.mean(0) for name, value in found.items()},
        **{f"{name}_variance": _variance_of_mean(value) for name, value in variances.items()},
        "log_evidence": evidence,
        "effective_samples": relative.sum(0).square() / relative.square().sum(0),
    }


def _optimise(guides: _LocalGuides, options: _Options, tick: Callable[[], Any]) -> tuple[_Offsets, dict[str, Tensor]]:
    """The best offsets of each datum, and the bound, (N,), at three places: ``start``; ``third`` and ``fourth``, the
    means of the offsets over the third and the fourth quarter of the steps.

    Adam's steps at a fixed rate jitter about the optimum; the mean of many does not (Polyak and Juditsky 1992).
    """
    start = dict(guides.offsets)
    moving = {key: offset.clone().requires_grad_() for key, offset in start.items()}
    leaves = list(moving.values())
    # In the offsets' units the bound curves by about 1: eps = lr makes Adam a plain descent of rate 1 near the optimum,
    # where its own normalisation would blow the last rounding error up to steps of size lr.
    adam = torch.optim.Adam(leaves, lr=options.lr, eps=options.lr)
    quarter = max(1, options.num_steps // 4)
    guides.offsets, means = moving, []
    for step in range(options.num_steps):
        bound, _ = guides.bound_and_weight(options.num_particles)
        for leaf, gradient in zip(leaves, torch.autograd.grad(-bound.mean(0).sum(), leaves), strict=True):
            leaf.grad = gradient
        adam.step()
        tick()
        left = options.num_steps - step  # 1 at the last
        if left % quarter == 0 and left <= 2 * quarter:
            means.append({key: torch.zeros_like(offset) for key, offset in start.items()})
        for key in means[-1] if means else ():
            means[-1][key] += moving[key].detach() / quarter
    third, fourth = means[0], means[-1]
    both = {key: (third[key] + fourth[key]) / 2 for key in start}
    places = {"start": start, "third": third, "fourth": fourth, "both": both}
    bounds = {name: _check(guides, offsets, options) for name, offsets in places.items()}
    best, best_bound = start, bounds["start"]
    for name in ("fourth", "both"):
        best = guides.choose(bounds[name] > best_bound, places[name], best)
        best_bound = torch.maximum(bounds[name], best_bound)
    return best, {name: bounds[name] for name in ("start", "third", "fourth")}


def _check(guides: _LocalGuides, offsets: _Offsets, options: _Options) -> Tensor:
    """The bound of each datum, (N,), with the same noise for all offsets: differences have little noise."""
    guides.offsets = offsets
    with same_random_state():
        torch.manual_seed(options.seed + 1)
        return guides.draw(CHECK_PARTICLES, options.at_once)[0].mean(0)


def _variance_of_mean(draws: Tensor) -> Tensor:
    return draws.var(0) / len(draws) if len(draws) > 1 else torch.zeros_like(draws[0])


def _result(parts: dict[str, Tensor], evidence: str, num_samples: int, num_steps: int) -> InferenceGaps:
    num_data = len(parts["elbo"])
    parts["approximation_gap"] = parts["log_evidence"] - parts["elbo_optimal"]
    numbers = {}
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
            notes.append(
                f"the {name.replace('_', ' ')} came out below zero, which it cannot be: {numbers[name]:.2g} with a "
                f"Monte Carlo error of {numbers[f'{name}_stderr']:.2g}"
            )
    return InferenceGaps(
        num_data=num_data,
        num_samples=num_samples,
        evidence=evidence,
        log_evidence_per_datum=parts["log_evidence"],
        elbo_per_datum=parts["elbo"],
        elbo_optimal_per_datum=parts["elbo_optimal"],
        num_steps=num_steps,
        converged=not rise,
        notes=notes,
        **numbers,
    )


def _still_rising(parts: dict[str, Tensor]) -> float:
    """How much the bound rose from the third to the fourth quarter of the steps; 0, if it is next to nothing."""
    if "start" not in parts:  # solved, not searched
        return 0.0
    rises = parts["fourth"] - parts["third"]
    rise, total = float(rises.mean()), float((parts["fourth"] - parts["start"]).mean())
    error = float(rises.std()) / math.sqrt(len(rises)) if len(rises) > 1 else 0.0
    return 0.0 if rise <= max(3 * error, 0.01 * total, 1e-3) else rise  # NaN has not come to rest
