"""Importance log-weights: the one quantity that bounds, evidence and diagnostics are functions of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_site_shape
from torch import Tensor

from pyrovae.checks import check_positive

__all__ = [
    "DatasetSize",
    "LogWeightTerms",
    "Structure",
    "enumerated_bound",
    "log_weight_terms",
    "log_weights",
    "log_weights_of_traces",
    "same_random_state",
    "sample_sites",
    "trace_pair",
]

PARTICLES = "num_particles_vectorized"  # Pyro's own name for the outermost plate


@dataclass(frozen=True)
class Structure:
    """Structure of a pair, as one run shows it: how deep its plates nest, and what its guide leaves out."""

    max_plate_nesting: int
    enumerated: tuple[str, ...]  # model sites that the guide misses and that are marked for enumeration

    @staticmethod
    def of(model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Structure:
        """Run guide and model once. The random state is put back, so that noise does not depend on the look.

        Raises:
            ValueError: the guide misses a latent site of the model, or samples one that the model lacks.
        """
        with same_random_state(), poutine.block(), torch.no_grad():
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        guide_trace, model_trace = prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)
        enumerated = _check_sites_match(model_trace, guide_trace)
        sites: list[Any] = [s for t in (model_trace, guide_trace) for s in t.nodes.values() if s["type"] == "sample"]
        if is_validation_enabled():
            for trace in (guide_trace, model_trace):
                trace.compute_log_prob()
            for site in sites:
                check_site_shape(site, max_plate_nesting=math.inf)  # type: ignore[arg-type]
        dims = [f.dim for site in sites for f in site["cond_indep_stack"] if f.vectorized]
        return Structure(-min(dims, default=0), enumerated)


@contextmanager
def same_random_state() -> Iterator[None]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield


def sample_sites(trace: Trace) -> dict[str, Any]:
    """Return the sites with a density, by name: neither a plate's subsample nor a ``pyro.deterministic`` is one."""
    nodes: Any = trace.nodes
    return {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and not site["infer"].get("_deterministic")
    }


def _check_sites_match(model_trace: Trace, guide_trace: Trace) -> tuple[str, ...]:
    """Return the names of latents that are left to enumeration. Every other one must be in the guide."""
    enumerated = []
    for name, site in sample_sites(model_trace).items():
        if site["is_observed"] or name in guide_trace:
            continue
        if site["infer"].get("enumerate") != "parallel":
            raise ValueError(
                f"guide: the model samples site '{name}' and the guide does not. Observe it (obs=x) if it is "
                "the data; otherwise sample it in the guide"
                + (
                    ", or mark it infer={'enumerate': 'parallel'} in the model and use TraceEnum_ELBO."
                    if getattr(site["fn"], "has_enumerate_support", False)
                    else "."
                )
            )
        enumerated.append(name)
    for name, site in sample_sites(guide_trace).items():
        if name not in model_trace and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"guide: it samples site '{name}', which the model lacks. Name it as the model does, or mark "
                "it infer={'is_auxiliary': True}."
            )
    return tuple(enumerated)


def trace_pair(
    model: Callable, guide: Callable, args: tuple, kwargs: dict, *, num_particles: int, structure: Structure
) -> tuple[Trace, Trace]:
    """Return traces (model, guide) of ``num_particles`` vectorised particles, log densities computed.

    The particle plate lies at dim −(max_plate_nesting + 1) (absent for one particle); dims of enumerated
    sites lie to its left.
    """
    particle_dim = -structure.max_plate_nesting - 1
    if num_particles > 1:
        particles = pyro.plate(PARTICLES, num_particles, dim=particle_dim)
        model, guide = particles(model), particles(guide)
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    if structure.enumerated:
        model = EnumMessenger(first_available_dim=particle_dim - 1)(model)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    guide_trace, model_trace = prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)
    _check_sites_match(model_trace, guide_trace)
    model_trace.compute_log_prob()
    guide_trace.compute_score_parts()
    if is_validation_enabled():
        for site in [*sample_sites(model_trace).values(), *sample_sites(guide_trace).values()]:
            check_site_shape(site, structure.max_plate_nesting + (num_particles > 1))
    return model_trace, guide_trace


class DatasetSize(Messenger):
    """Tells the sites inside the plate ``data`` how many data there are, as ``pyro.plate(..., subsample_size=)`` would.

    A pair opens its plate over the batch it is given. Under this handler the plate counts as a subsample of ``size``
    data, so every objective weighs the sites inside by dataset / batch against global latents outside.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def _pyro_sample(self, msg: Any) -> None:
        for frame in msg["cond_indep_stack"]:
            if frame.name == "data" and frame.full_size in (None, frame.size):
                msg["scale"] = msg["scale"] * (self.size / frame.size)
        msg["cond_indep_stack"] = tuple(
            frame._replace(full_size=self.size) if frame.name == "data" else frame for frame in msg["cond_indep_stack"]
        )


@dataclass(frozen=True)
class LogWeightTerms:
    """Terms of log w = Σ model − Σ guide, by site.

    ``units`` are the independent parts that have a weight each: for latents inside the ``data`` plate, the N
    data; with a global latent, the whole joint, and then the terms have shape (K,).
    """

    model: dict[str, Tensor]
    """Log density of each model site, (K, N); enumerated latents are summed out of the sites that depend on them."""
    guide: dict[str, Tensor]
    """Log density of each guide site, (K, N)."""
    score: Tensor | None
    """Sum of log q over guide sites without a pathwise gradient, unscaled, (K, N); None where all have one."""
    scale: float | Tensor
    """Dataset size / batch size, or another common scale of all sites: it multiplies *outside* any log-mean-exp."""
    model_trace: Trace
    guide_trace: Trace

    @property
    def log_weights(self) -> Tensor:
        """log w, shape (K, N)."""
        total = reduce(torch.add, self.model.values())
        return reduce(torch.sub, self.guide.values(), total)


class _Units:
    """Units of two traces: which sites lie in them, and the log densities of each.

    A unit is an element of the plates that *every* site lies in: then latents of different units are independent
    given the parameters, and each has its own weight. A scale of plates that all share multiplies outside; the
    scale of plates that only some sites lie in (local sites beside a global latent) multiplies their terms.
    """

    def __init__(self, model_trace: Trace, guide_trace: Trace, nesting: int) -> None:
        self.model_sites, self.guide_sites = ([*sample_sites(t).values()] for t in (model_trace, guide_trace))
        self.sites = self.model_sites + self.guide_sites
        self._nesting = nesting
        self._frames = {
            id(site): {f.name: f for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES}
            for site in self.sites
        }
        self.common = reduce(lambda a, b: {name: a[name] for name in a if name in b}, self._frames.values())
        self._dims = sorted(f.dim for f in self.common.values())
        self._rest = {id(site): _without_plates(site["scale"], self._frames[id(site)].values()) for site in self.sites}
        self.uniform = _all_equal(list(self._rest.values()))
        """True where all sites carry one scale besides those of their plates."""
        self.scale: float | Tensor = next(iter(self._rest.values())) if self.uniform else 1.0
        """Common scale of all sites; it multiplies outside the logarithm."""
        for frame in self.common.values():
            self.scale = self.scale * _plate_scale(frame)

    def shape(self, num_particles: int) -> tuple[int, ...]:
        return (num_particles, *(f.size for f in sorted(self.common.values(), key=lambda f: f.dim)))

    def rank(self) -> int:
        """Number of dims of a term without enumeration: particles, then units."""
        return 1 + len(self._dims)

    def plates_of(self, site: Any) -> set[str]:
        return set(self._frames[id(site)])

    def scale_of(self, site: Any) -> float:
        return float(self._rest[id(site)])

    def recycles_dims(self) -> bool:
        """Return whether latents share an enumeration dim, as along ``pyro.markov``; they cannot be summed at once."""
        dims = {s["name"]: d for s in self.sites if (d := s["infer"].get("_enumerate_dim")) is not None}
        return len(set(dims.values())) < len(dims)

    def reduce(self, log_prob: Tensor) -> Tensor:
        """Sum over plates that are no units: (..., plates ...) → (enumeration dims ..., K, units ...)."""
        log_prob = log_prob.reshape((1,) * (self._nesting + 1 - log_prob.dim()) + log_prob.shape)
        dims = [d for d in range(-self._nesting, 0) if d not in self._dims]
        return log_prob.sum(dims) if dims else log_prob

    def term(self, site: Any) -> Tensor:
        """Return the log density of a site, scaled as it counts inside a unit."""
        inside: float | Tensor = 1.0 if self.uniform else self._rest[id(site)]
        for name, frame in self._frames[id(site)].items():
            if name not in self.common:
                inside = inside * _plate_scale(frame)
        return self.reduce(scale_and_mask(site["unscaled_log_prob"], inside, site["mask"]))

    def model_terms(self, guide_trace: Trace) -> dict[str, Tensor]:
        """Return the terms by site. Those that depend on enumerated latents become one, summed over them."""
        enumerated = {
            s["name"]: s["infer"]["_enumerate_dim"] for s in self.model_sites if _is_enumerated(s, guide_trace)
        }
        terms = {site["name"]: self.term(site) for site in self.model_sites}
        if not enumerated:
            return terms
        # Plates fold into units, so dims count from the left of the particles: -1 is the dim next to them.
        dims = [dim + self._nesting + 1 - self.rank() for dim in enumerated.values()]
        depends = {
            n: t for n, t in terms.items() if any(t.dim() >= -d and t.shape[d] > 1 for d in dims) or n in enumerated
        }
        joint = torch.logsumexp(reduce(torch.add, depends.values()), dims, keepdim=True)
        while joint.dim() > self.rank() and joint.shape[0] == 1:
            joint = joint.squeeze(0)
        names = [name for name in depends if name not in enumerated] or list(depends)
        return {n: t for n, t in terms.items() if n not in depends} | {"+".join(names): joint}


def log_weights_of_traces(model_trace: Trace, guide_trace: Trace, num_particles: int, nesting: int) -> LogWeightTerms:
    """Reduce the log densities of two traces to one term a site and unit.

    Raises:
        ValueError: sites of one unit carry different ``poutine.scale``: then no bound exists.
        NotImplementedError: an enumerated site lies in a plate that other sites do not share.
    """
    units = _Units(model_trace, guide_trace, nesting)
    if units.common and not units.uniform:
        scales = ", ".join(f"{site['name']}: {units.scale_of(site):g}" for site in units.sites)
        raise ValueError(
            f"poutine.scale: sites of one datum must carry one common scale for their weights to bound the evidence; "
            f"got {scales}. Scale model and guide as a whole, or use Trace_ELBO, which weighs each site."
        )
    for site in units.model_sites:
        if _is_enumerated(site, guide_trace) and units.plates_of(site) != set(units.common):
            raise NotImplementedError(
                f"site '{site['name']}': enumeration here needs one value of it a datum, but it lies in plates "
                f"{sorted(units.plates_of(site))} and all sites share only {sorted(units.common)}. "
                "Use TraceEnum_ELBO, or sample the site in the guide."
            )
    if units.recycles_dims():
        raise NotImplementedError(
            "pyro.markov: its enumerated sites share dims, and cannot be summed out at once here. Use TraceEnum_ELBO."
        )
    model_terms = units.model_terms(guide_trace)
    guide_terms = {site["name"]: units.term(site) for site in units.guide_sites}
    # The score is that of the values drawn: it has no scale and no mask, as in Pyro.
    functions = [site["score_parts"].score_function for site in units.guide_sites]
    scores = [units.reduce(function) for function in functions if not is_identically_zero(function)]
    shape = units.shape(num_particles)
    expand = lambda terms: {name: value.expand(shape) for name, value in terms.items()}  # noqa: E731
    return LogWeightTerms(
        expand(model_terms),
        expand(guide_terms),
        reduce(torch.add, scores).expand(shape) if scores else None,
        units.scale,
        model_trace,
        guide_trace,
    )


def enumerated_bound(model_trace: Trace, guide_trace: Trace, num_particles: int, nesting: int) -> Tensor | None:
    """Return the ELBO with discrete latents summed out, where each is local to a datum; else None.

        Σ_n scale · mean_k Σ_z q(z | x_n) (log Σ_y p(x_n, y, z) − log q(z | x_n))

    z: enumerated in the guide; y: in the model. Unlike Pyro's contraction it asks nothing of the device.
    """
    units = _Units(model_trace, guide_trace, nesting)
    enumerated = [site for site in units.sites if site["infer"].get("_enumerate_dim") is not None]
    local = (
        units.uniform
        and not units.recycles_dims()
        and all(units.plates_of(site) == set(units.common) for site in enumerated)
        and not any(site["infer"].get("num_samples") or "_enum_total" in site["infer"] for site in units.sites)
    )
    in_guide = [site for site in units.guide_sites if site["infer"].get("_enumerate_dim") is not None]
    sampled = [site for site in units.guide_sites if site["infer"].get("_enumerate_dim") is None]
    if not local or any(not is_identically_zero(site["score_parts"].score_function) for site in sampled):
        return None
    cost = reduce(torch.add, units.model_terms(guide_trace).values())
    cost = reduce(torch.sub, [units.term(site) for site in units.guide_sites], cost)
    if in_guide:
        probability = reduce(torch.add, [units.reduce(site["unscaled_log_prob"]) for site in in_guide]).exp()
        cost = torch.where(probability > 0, cost, 0.0) * probability
    extra = cost.dim() - units.rank()
    shape = (*cost.shape[:extra], *units.shape(num_particles))
    return cost.expand(shape).sum() * units.scale / num_particles


def _is_enumerated(site: Any, guide_trace: Trace) -> bool:
    return site["name"] not in guide_trace and site["infer"].get("_enumerate_dim") is not None


def _plate_scale(frame: Any) -> float:
    return frame.full_size / frame.size if frame.full_size else 1.0


def _without_plates(scale: float | Tensor, frames: Any) -> float | Tensor:
    return scale / math.prod(_plate_scale(frame) for frame in frames)


def _all_equal(scales: list[float | Tensor]) -> bool:
    if any(isinstance(scale, Tensor) for scale in scales):
        # Reading a tensor waits for the device, so it is done only while validation is on.
        if not is_validation_enabled():
            return all(isinstance(scale, Tensor) for scale in scales)
        scales = [float(scale) for scale in scales]
    return all(math.isclose(scale, scales[0], rel_tol=1e-6) for scale in scales)


def log_weight_terms(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_particles: int = 1,
    structure: Structure | None = None,
    **kwargs: Any,
) -> LogWeightTerms:
    """Return the terms of :func:`log_weights` by site, from one vectorised run. ``structure`` saves another run."""
    structure = structure or Structure.of(model, guide, args, kwargs)
    traces = trace_pair(model, guide, args, kwargs, num_particles=num_particles, structure=structure)
    return log_weights_of_traces(*traces, num_particles, structure.max_plate_nesting)


def log_weights(model: Callable, guide: Callable, *args: Any, num_particles: int = 1, **kwargs: Any) -> Tensor:
    """Estimate importance log-weights of a model/guide pair.

        log w[k, n] = log p(x_n, z_kn) − log q(z_kn | x_n),   z_kn ~ q(z | x_n)

    E[w] = p(x_n): the log-mean-exp over k estimates the log evidence, the mean is the ELBO. Latents that the model
    marks for enumeration and the guide leaves out are summed out exactly. A mini-batch scale is left out.

    Args:
        model, guide: a pair's two functions, or any two Pyro functions.
        *args, **kwargs: what they are called with (the batch ``x`` of shape (N, D), for a pair).
        num_particles: K.

    Returns:
        Shape (K, N), nats; (K,) where a latent lies outside the data plate, for then only the whole batch has a weight.

    Raises:
        ValueError: K < 1; a latent that the guide misses.
    """
    check_positive("num_particles", num_particles, integer=True)
    return log_weight_terms(model, guide, *args, num_particles=num_particles, **kwargs).log_weights
