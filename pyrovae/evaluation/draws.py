"""What :func:`~pyrovae.evaluation.inference_data.to_arviz` holds: draws of one pair, chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Categorical
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor

from pyrovae.evaluation.prepare import NotApplicable
from pyrovae.evaluation.traces import chunk_sizes, drawn_data, is_local, is_point, unobserve, width
from pyrovae.infer.weights import PARTICLES, Structure, sample_sites, trace_pair
from pyrovae.pair import Pair

__all__ = ["Key", "Look", "Plan", "Variable", "arranged", "clean_name", "draw_chain"]

EQUAL = 1e-5  # log weights that agree to this, relative to themselves, differ by rounding
TIE_BREAK = 1e-8  # nats: see _told_apart

Key = tuple[str, str]  # group, variable


@dataclass(frozen=True)
class Variable:
    dims: tuple[str, ...]
    """After chain and draw."""
    sizes: tuple[int, ...]
    """Those of ``data`` are not known before all data come: 1."""
    itemsize: int

    @staticmethod
    def of(site: Any, num_features: int | None = None) -> Variable:
        """``num_features``: of the data, where the site is observed."""
        name, event, frames = clean_name(site["name"]), site["fn"].event_shape, _frames(site)
        dims = [f"{name}_dim"] if len(event) == 1 else [f"{name}_dim_{i}" for i in range(len(event))]
        if event == (num_features,):
            dims = ["feature"]
        sizes = [1 if frame.name == "data" else frame.size for frame in frames]
        return Variable(
            (*(clean_name(frame.name) for frame in frames), *dims), (*sizes, *event), site["value"].element_size()
        )


@dataclass(frozen=True)
class Look:
    """What one run on a few data shows of a pair."""

    structure: Structure
    latents: dict[str, Variable]
    observed: dict[str, Variable]
    guide: dict[str, str]
    """Distribution of each guide site."""
    local: bool
    """Every site lies in the plate ``data``: data are independent of each other, and come in chunks."""
    local_guide: tuple[str, ...]
    points: tuple[str, ...]
    """Local latents to which the guide gives one value: then there are no importance weights."""
    pointwise: bool
    """Every observed site lies in the plate ``data``."""
    exact: bool
    """``pair.log_prob`` is all of log p(x_n)."""
    width: int
    """Numbers that one draw of one datum takes, at the widest."""

    @staticmethod
    def of(pair: Pair, x: Tensor) -> Look:
        few = x[:2]
        structure = Structure.of(pair.model, pair.guide, (few,), {})
        with torch.no_grad():
            model_trace, guide_trace = trace_pair(
                pair.model, pair.guide, (few,), {}, num_particles=1, structure=structure
            )
            free_trace = poutine.trace(unobserve(pair.model)).get_trace(few)
        in_model, in_guide, free = (sample_sites(trace) for trace in (model_trace, guide_trace, free_trace))
        _check_plates(pair, structure, in_model, in_guide)
        observed = drawn_data(free_trace)
        local = all(is_local(site) for site in [*in_model.values(), *in_guide.values()])
        local_guide = tuple(name for name, site in in_guide.items() if is_local(site))
        # Beside auxiliary sites a point may have a density of its own: that of a transform.
        auxiliary = any(site["infer"].get("is_auxiliary") for site in in_guide.values())
        kinds = {n: type(getattr(s["fn"], "base_dist", s["fn"])).__name__ for n, s in in_guide.items()}
        return Look(
            structure,
            {n: Variable.of(s) for n, s in free.items() if n not in observed},
            {n: Variable.of(s, x.shape[1]) for n, s in observed.items()},
            kinds,
            local,
            local_guide,
            () if auxiliary else tuple(name for name in local_guide if is_point(in_guide[name])),
            all(is_local(site) for site in observed.values()),
            local and pair.log_prob is not None,
            width(pair, free_trace, len(few), enumerated=structure.enumerated),
        )


@dataclass(frozen=True)
class Plan:
    """What to draw."""

    look: Look
    num_draws: int
    num_samples: int
    log_likelihood: str
    predictive: bool

    def variables(self) -> dict[Key, Variable]:
        """All with a draw dimension."""
        look, each = self.look, Variable(("data",), (1,), 8)
        none = Variable((), (), 8)
        found = {("posterior", name): variable for name, variable in look.latents.items()}
        if self.predictive:
            found |= {("prior", name): variable for name, variable in look.latents.items()}
            for group in ("posterior_predictive", "prior_predictive"):
                found |= {(group, name): variable for name, variable in look.observed.items()}
        if not self.left_out():
            found |= {("log_likelihood", name): each for name in self.log_likelihood_names()}
        return found | {("sample_stats", "log_weight"): each if look.local else none, ("sample_stats", "lp"): none}

    def log_likelihood_names(self) -> list[str]:
        """One variable of the marginal likelihood, so that ``az.loo`` need not be told which."""
        return list(self.look.observed) if self.log_likelihood == "conditional" else ["+".join(self.look.observed)]

    def left_out(self) -> str:
        """Why there is no log likelihood; empty where there is."""
        if not self.look.pointwise:
            return "log_likelihood: not all observed sites lie in the plate 'data', so there is none for each datum"
        if self.log_likelihood == "marginal" and self.look.points and not self.look.exact:
            return (
                f"log_likelihood: the guide gives one value to {', '.join(self.look.points)}, so that its weights do "
                "not estimate log p(x); 'conditional' would apply"
            )
        return ""

    def rounds(self) -> int:
        """Runs of the guide for every draw."""
        look = self.look
        if self.log_likelihood == "conditional" or look.exact or not look.local_guide or self.left_out():
            return 1
        return -(-self.num_samples // self.num_draws) if look.local else self.num_samples

    def log_likelihood_kind(self) -> str:
        look = self.look
        if self.left_out():
            return "left out"
        if self.log_likelihood == "conditional":
            return "log p(x_n | latents)"
        given = "log p(x_n)" if look.local else "log p(x_n | global latents)"
        if look.exact or not look.local_guide:
            return f"{given}, exact"
        samples = self.rounds() * self.num_draws if look.local else self.rounds()
        return f"{given}, importance estimate from {samples} samples a datum{'' if look.local else ' and draw'}"


def draw_chain(pair: Pair, x: Tensor, plan: Plan) -> dict[Key, Tensor]:
    """All draws from one pair, (S, ...)."""
    look, variables = plan.look, plan.variables()
    data_chunk, draw_chunk = chunk_sizes(x.device, look.width, len(x), plan.num_draws, joint=not look.local)
    counts = [len(part) for part in torch.arange(plan.num_draws).split(draw_chunk)]
    parts: list[dict[Key, Tensor]] = []
    for some in x.split(data_chunk):
        drawn = [_draw(pair, some, plan, count) for count in counts]
        part = {key: torch.cat([d[key] for d in drawn]) for key in drawn[0]}
        if ("log_likelihood", name := plan.log_likelihood_names()[0]) in part and plan.log_likelihood == "marginal":
            value = part["log_likelihood", name]
            if look.local and look.local_guide and not look.exact:
                value = _without_own(value)
            part["log_likelihood", name] = _told_apart(value)
        parts.append(part)

    def joined(key: Key) -> Tensor:
        dims, values = variables[key].dims, [part[key] for part in parts]
        return torch.cat(values, 1 + dims.index("data")) if "data" in dims else reduce(torch.add, values)

    return {key: joined(key) for key in variables}


def _draw(pair: Pair, x: Tensor, plan: Plan, draws: int) -> dict[Key, Tensor]:
    """``draws`` of every variable, on a chunk of data. The marginal log likelihood is still that of each draw alone."""
    look, structure = plan.look, plan.look.structure
    nesting, shape = structure.max_plate_nesting, (draws, len(x))
    found: dict[Key, Tensor] = {}

    def run(guide: Callable) -> tuple[Trace, Trace, Tensor, Tensor, Tensor, Tensor]:
        # Where nothing is sampled, one run stands for all draws.
        count = draws if look.guide else 1
        traces = trace_pair(pair.model, guide, (x,), {}, num_particles=count, structure=structure)
        log_p, log_q = (_log_probs(trace, nesting, x) for trace in traces)
        return *traces, *log_p, *log_q

    def simulate(model: Callable) -> dict[str, Any]:
        plate: AbstractContextManager = nullcontext()
        if draws > 1:
            plate = pyro.plate(PARTICLES, draws, dim=-nesting - 1)
        with plate:
            return sample_sites(poutine.trace(model).get_trace(x))

    def keep(group: str, sites: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
        found.update({(group, n): arranged(sites[n], value, draws, nesting) for n, value in values.items()})

    model_trace, guide_trace, local_p, global_p, local_q, global_q = run(pair.guide)
    given = {name: site["value"] for name, site in sample_sites(guide_trace).items() if name in look.latents}
    evidence = joint = _summed(local_p)
    if structure.enumerated:
        drawn, joint = _enumerated_draws(local_p, sample_sites(model_trace), structure, draws)
        given |= drawn
    keep("posterior", sample_sites(model_trace), given)
    log_weight = (evidence - local_q).expand(shape)
    found["sample_stats", "log_weight"] = (
        log_weight if look.local else (log_weight.sum(1) + global_p - global_q).expand(draws)
    )
    found["sample_stats", "lp"] = (joint.expand(shape).sum(1) + global_p).expand(draws)

    if plan.predictive:
        free = unobserve(pair.model)
        sites = simulate(poutine.condition(free, data=given))
        keep("posterior_predictive", sites, {name: sites[name]["value"] for name in look.observed})
        sites = simulate(free)
        keep("prior_predictive", sites, {name: sites[name]["value"] for name in look.observed})
        keep("prior", sites, {name: sites[name]["value"] for name in look.latents})

    if plan.left_out():
        return found
    if plan.log_likelihood == "conditional":
        sites = simulate(poutine.condition(pair.model, data=given))
        for name in look.observed:
            log_prob = sites[name]["fn"].log_prob(sites[name]["value"])
            found["log_likelihood", name] = _to_data(sites[name], log_prob, nesting).expand(shape)
        return found
    if look.exact and pair.log_prob is not None:
        marginal = pair.log_prob(x).double().expand(shape)
    else:
        held = guide_trace.copy()  # a global latent stays as it was drawn
        for name, site in guide_trace.nodes.items():
            if name in look.local_guide or site["type"] != "sample":
                held.remove_node(name)
        marginal, rounds = log_weight, plan.rounds()
        for _ in range(rounds - 1):
            _, _, again_p, _, again_q, _ = run(poutine.replay(pair.guide, trace=held))
            marginal = torch.logaddexp(marginal, _summed(again_p) - again_q)
        marginal = marginal - math.log(rounds)
    found["log_likelihood", plan.log_likelihood_names()[0]] = marginal
    return found


def _without_own(log_weight: Tensor) -> Tensor:
    """log 1/(S−1) Σ_{t≠s} w_tn, (S, N): the evidence from all draws but one's own.

    The leave-one-out ratios of these, 1/Σ_{t≠s} w_t, grow with w_s and to first order linearly: their tail has the
    shape of the weights' tail, and their mean is 1/p(x_n) to O(1/S²).
    """
    count = len(log_weight)
    total = log_weight.logsumexp(0, keepdim=True)
    top = log_weight.argmax(0, keepdim=True)  # 1 − w_s/Σw loses all digits where one weight is nearly all
    others = total + torch.log1p(-(log_weight - total).exp())
    rest = log_weight.scatter(0, top, -torch.inf).logsumexp(0, keepdim=True)
    found = others.scatter(0, top, rest) - math.log(count - 1)
    mean = total - math.log(count)
    low, high = log_weight.aminmax(dim=0, keepdim=True)
    return torch.where(high - low <= EQUAL * mean.abs().clamp(min=1), mean, found)


def _told_apart(value: Tensor) -> Tensor:
    """Evenly spaced offsets over draws, of at most TIE_BREAK nats, which sum to zero.

    ArviZ cannot fit a tail to equal numbers: it gives k̂ = ∞, and ``az.loo`` warns although log p(x_n) is exact.
    """
    return value + torch.linspace(-TIE_BREAK, TIE_BREAK, len(value), dtype=value.dtype, device=value.device)[:, None]


# Shapes


def _frames(site: Any) -> list[Any]:
    """The plates of a site, from the left; draws apart."""
    frames = [f for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES]
    return sorted(frames, key=lambda frame: frame.dim)


def clean_name(name: str) -> str:
    """As netCDF takes it."""
    return name.replace("/", ".")


def _support(site: Any) -> Tensor:
    """(values, event ...)"""
    return site["fn"].enumerate_support(expand=False).reshape(-1, *site["fn"].event_shape)


def arranged(site: Any, value: Tensor, draws: int, nesting: int) -> Tensor:
    """(draws, plates of the site ..., event ...)"""
    event = site["fn"].event_shape
    batch = tuple(value.shape[: value.dim() - len(event)])
    batch = (1,) * (nesting + 1 - len(batch)) + batch
    kept = [batch[frame.dim] for frame in _frames(site)]
    return value.reshape(batch[-nesting - 1], *kept, *event).expand(draws, *kept, *event)


def _to_data(site: Any, log_prob: Tensor, nesting: int) -> Tensor:
    """Sum over all plates but ``data``: (enumerated ..., draws or 1, data); without it, (..., draws or 1)."""
    log_prob = scale_and_mask(log_prob, 1.0, site["mask"]).double()
    log_prob = log_prob.reshape((1,) * (nesting + 1 - log_prob.dim()) + log_prob.shape)
    data = [frame.dim for frame in _frames(site) if frame.name == "data"]
    dims = [dim for dim in range(-nesting, 0) if dim not in data]
    return log_prob.sum(dims) if dims else log_prob


def _log_probs(trace: Trace, nesting: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Log densities of local sites, (enumerated ..., draws or 1, data), and of global ones, (draws or 1,)."""
    sites = list(sample_sites(trace).values())
    local = torch.zeros(1, len(x), dtype=torch.float64, device=x.device)
    other = torch.zeros(1, dtype=torch.float64, device=x.device)
    for site in sites:
        term = _to_data(site, site["unscaled_log_prob"], nesting)
        if is_local(site):
            local = local + term
        else:
            other = other + term
    return local, other


def _summed(local: Tensor) -> Tensor:
    """Enumerated latents summed out: (draws or 1, data)."""
    return local.flatten(0, -3).logsumexp(0) if local.dim() > 2 else local


def _enumerated_draws(
    local: Tensor, sites: Mapping[str, Any], structure: Structure, draws: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Draw the enumerated latents jointly from p(y | x, z); and log p(x, y, z) at the draws, (draws, data)."""
    shape = local.shape[:-2]
    joint = local.flatten(0, -3).movedim(0, -1)  # (draws or 1, data, values)
    joint = joint.expand(draws, *joint.shape[1:])
    index = Categorical(logits=joint, validate_args=False).sample()
    found = {}
    for name, at in zip(_by_dim(sites, structure), torch.unravel_index(index, shape), strict=True):
        (frame,) = _frames(sites[name])
        value, event = _support(sites[name])[at], sites[name]["fn"].event_shape
        right = -frame.dim - 1
        left = structure.max_plate_nesting - 1 - right
        batch = (draws,) * (draws > 1) + (1,) * left + (len(at[0]),) + (1,) * right
        found[name] = value.reshape(*batch, *event)
    return found, joint.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def _by_dim(sites: Mapping[str, Any], structure: Structure) -> list[str]:
    """The enumerated sites, in the order of their dims."""
    return sorted(structure.enumerated, key=lambda name: sites[name]["infer"]["_enumerate_dim"])


def _check_plates(pair: Pair, structure: Structure, in_model: Mapping[str, Any], in_guide: Mapping[str, Any]) -> None:
    plates = {name: {frame.name for frame in _frames(site)} for name, site in in_model.items()}
    for name in structure.enumerated:
        if plates[name] != {"data"}:
            raise NotApplicable(
                f"to_arviz does not apply to {type(pair).__name__}: the enumerated site '{name}' must have one value a "
                f"datum, so lie in the plate 'data' alone; it lies in {sorted(plates[name])}. Sample it in the guide."
            )
    for name, site in in_guide.items():
        found = {frame.name for frame in _frames(site)}
        if found != plates.get(name, found):
            raise ValueError(
                f"guide: site '{name}' lies in plates {sorted(found)}, and in the model in {sorted(plates[name])}. "
                "Sample it in the same plates."
            )
