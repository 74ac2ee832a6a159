"""Per-datum guide: the pair's guide with parameters of each datum's own, to find the best of its family."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints, transform_to, transforms

from pyrovae.evaluation.measurement import NotApplicable, not_applicable, width
from pyrovae.infer.weights import Structure, log_weight_terms, same_random_state
from pyrovae.pair import Pair

__all__ = ["FAMILIES", "Offsets", "PerDatumGuide"]

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

_FIXED_TRANSFORMS = (
    transforms.ExpTransform,
    transforms.SigmoidTransform,
    transforms.SoftplusTransform,
    transforms.StickBreakingTransform,
    transforms.TanhTransform,
)


class PerDatumGuide(Messenger):
    """The pair's guide on ``x``, its sites' parameters moved by offsets of each datum's own.

    It draws the values of its sites itself. Continuous latents come from the moved distribution. Their density has the
    offsets detached, which leaves the score term out of the gradient. Discrete latents take every combination in turn.

    Raises:
        NotApplicable: a guide that samples nothing or too many discrete values; a site outside the data plate or of a
            family that is not in ``FAMILIES``.
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
            raise self._inapplicable(
                f"the discrete latents {', '.join(self._values)} of its guide have {self.combinations} values "
                f"together, and it sums over at most {MOST_COMBINATIONS}."
            )

    def _inapplicable(self, reason: str) -> NotApplicable:
        return not_applicable("inference_gaps", self._pair, reason)

    @property
    def combinations(self) -> int:
        """Number of combinations of values of the discrete latents."""
        return math.prod(len(values) for values in self._values.values())

    @property
    def is_discrete(self) -> bool:
        """Whether the guide samples discrete latents alone."""
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
        """Return the size of the widest tensor for a datum and particle; a particle stands for all combinations.

        Raises:
            NotApplicable: the bound does not fall into one part a datum.
        """
        with torch.no_grad(), same_random_state():
            self._particles = self.combinations
            terms = log_weight_terms(
                self._pair.model, self._guide, self._x, num_particles=self._particles, structure=self._structure
            )
        if terms.log_weights.shape != (self._particles, len(self._x)):
            raise self._inapplicable(
                "not all of its sites lie in the plate 'data' and no other, so there is no bound for each datum."
            )
        return self.combinations * width(self._pair, terms.model_trace, len(self._x) * self.combinations)

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
        stride = self._particles
        for site, values in self._values.items():
            stride //= len(values)
            if site == name:
                break
        chosen = self._values[name]
        index = torch.arange(self._particles, device=chosen.device) // stride % len(chosen)
        return chosen[index].reshape(-1, *(1,) * (batch_rank - 1), *chosen.shape[1:])

    def _register(self, name: str, fn: Any, plates: Any) -> None:
        """Note the data axis of a site and the values of a discrete one, in the first run."""
        axes = [len(fn.batch_shape) + frame.dim for frame in plates if frame.name == "data"]
        if not axes:
            raise self._inapplicable(
                f"its guide site '{name}' lies outside the plate 'data', so there is no guide for each datum."
            )
        self._data_axis[name] = axes[0]
        if not fn.support.is_discrete:
            return
        try:
            values = fn.enumerate_support(expand=False)
        except NotImplementedError:
            values = None
        if values is None or len(plates) > 1:
            raise self._inapplicable(
                f"the values of its discrete guide site '{name}' ({_family_name(fn)}) cannot be summed over one by "
                "one, for each datum."
            )
        self._values[name] = values.reshape(-1, *fn.event_shape)

    def _moved(self, site: str, fn: Any, *, detached: bool) -> Any:
        """Return a distribution of the same class as ``fn``, with parameters moved by the site's offsets."""
        if isinstance(fn, dist.Independent):
            return self._moved(site, fn.base_dist, detached=detached).to_event(fn.reinterpreted_batch_ndims)
        if type(fn) in (dist.TransformedDistribution, torch.distributions.TransformedDistribution) and all(
            isinstance(t, _FIXED_TRANSFORMS) for t in fn.transforms
        ):
            return dist.TransformedDistribution(self._moved(site, fn.base_dist, detached=detached), fn.transforms)
        if type(fn) not in FAMILIES:
            raise self._inapplicable(
                f"the distribution of its guide site '{site}', {_family_name(fn)}, is not of a family whose parameters "
                "it knows."
            )
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
