"""A fitted pair as an ArviZ ``InferenceData``: draws, simulated data, pointwise log likelihood."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Categorical
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyrovae.checks import check_choice, check_positive
from pyrovae.evaluate.prepare import NotApplicable, prepared
from pyrovae.infer.log_weights import PARTICLES, Structure, trace_pair
from pyrovae.pair import Pair

if TYPE_CHECKING:
    from arviz import InferenceData

__all__ = ["MAX_BYTES", "to_arviz"]

MAX_BYTES = 2**31
"""Of all groups together. Larger ones are refused before work starts."""

FLOATS_PER_CHUNK = 2**21  # of the widest tensor
EQUAL = 1e-5  # log weights that agree to this, relative to themselves, differ by rounding
TIE_BREAK = 1e-8  # nats: see _told_apart

Key = tuple[str, str]  # group, variable


def to_arviz(
    pair: Pair | Sequence[Pair],
    x: Tensor,  # (N, D)
    *,
    num_draws: int = 200,
    num_samples: int = 1000,
    log_likelihood: str = "marginal",
    predictive: bool = True,
    coords: Mapping[str, Any] | None = None,
    binarize: bool = False,
    device: str | torch.device = "auto",
    seed: int = 0,
) -> InferenceData:
    """Draws from a pair's guide and model, as ArviZ takes them. S draws, N data, D features.

    ========================  =====================================  =======================================
    group                     variables                              dims, after (chain, draw)
    ========================  =====================================  =======================================
    ``posterior``             latents, z ~ q(z | x)                  data and other plates, ``z_dim``
    ``prior``                 latents, z ~ p(z)                      the same
    ``posterior_predictive``  data, x' ~ p(x' | z), z ~ q(z | x)     data, feature
    ``prior_predictive``      data, x' ~ p(x' | z), z ~ p(z)         data, feature
    ``log_likelihood``        pointwise, nats                        data
    ``sample_stats``          ``log_weight`` log p(x, z)/q(z | x)    data (none, where a latent is global)
                              ``lp`` log p(x, z), all data together
    ``observed_data``         data                                   data, feature (and no chain or draw)
    ========================  =====================================  =======================================

    Latents that the model enumerates are drawn exactly, from p(y | x, z). A global latent has no dim ``data``. A slash
    in a name, which netCDF forbids, becomes a dot. The draws of ``posterior`` are the guide's, unweighted: where it is
    not the posterior, ``log_weight`` says by how much.

    **Which log likelihood.** ``marginal`` is log p(x_n), with the latents of the datum integrated out. It is what
    compares models with local latents (Merkle et al. 2019). It is exact where the pair has ``log_prob`` or enumerates
    all its latents: every draw holds it (told apart by 1e-8 nats, for ArviZ fits a tail to them). Else it is the
    importance estimate from ``num_samples`` samples, of which each draw leaves out its own share, log 1/(S−1) Σ_{t≠s}
    w_nt. ``az.loo`` then gives the log evidence estimated from all samples, and its k̂ is that of the importance
    weights: a high one says that the guide is too far from the posterior of that datum. With a global latent θ, draw s
    holds log p(x_n | θ_s), and ``az.loo`` is leave-one-out cross-validation as usual.

    ``conditional`` is log p(x_n | z_n), a variable for each observed site. Leaving out a datum frees its own z_n, whose
    draws then say little (a high k̂), so ``az.loo`` of it is unreliable: use it for inspection, not to compare.

    **What comparisons mean.** A pair's parameters are point estimates, so nothing is left out of the fit: without a
    global latent ``elpd_loo`` is the log score of ``x``, and ``p_loo`` is near 0, whatever the number of parameters.
    Compare pairs on data that neither was fitted to, the same ``x`` for both (for ``binarize``, the same seed). The
    importance estimate is low by about Var(w)/(2 num_samples p(x)²) nats. ``az.loo`` takes several chains for draws of
    the parameters, which restarts are not: compare one at a time. As draws are independent, ``az.loo(idata, reff=1.0)``
    spares it the effective sample size of every latent of every datum.

    Args:
        pair: the pair, or several of one kind fitted from different seeds: one chain each. Chains then differ in
            parameters, so r̂ compares restarts; latents that a model leaves unidentified (signs, order) will disagree.
        x: data, shape (N, D).
        num_draws: S, draws a chain, 2 or more.
        num_samples: importance samples a datum for the marginal log likelihood, rounded up to a multiple of S; with
            local latents beside a global one, as many for each draw. Exact log likelihoods need none.
        log_likelihood: ``marginal`` or ``conditional``.
        predictive: simulate from the model: the groups ``prior``, ``prior_predictive`` and ``posterior_predictive``.
        coords: labels by dim, such as ``{"feature": names, "data": ids}``. Others count from 0.
        binarize: draw pixels in [0, 1] as 0 or 1 first, once for all chains.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda``.
        seed: of the draws; chains differ. The caller's random state is left as it was.

    Returns:
        An ``InferenceData``. Its ``attrs`` name the pair, guide, seed and log likelihood, and say what is left out.

    Raises:
        TypeError, ValueError: bad data or options; pairs whose sites differ; more than ``MAX_BYTES`` to hold.
        NotApplicable: the model enumerates a latent that does not have one value a datum.

    References:
        Merkle, Furr and Rabe-Hesketh (2019), Bayesian comparison of latent variable models: conditional versus
        marginal likelihoods. Vehtari, Gelman and Gabry (2017), Practical Bayesian model evaluation using leave-one-out
        cross-validation and WAIC.
    """
    pairs: list[Any] = list(pair) if isinstance(pair, list | tuple) else [pair]
    if not pairs:
        raise ValueError("pair: expected a pair, or a list of pairs fitted from different seeds; got an empty one.")
    check_positive("num_draws", num_draws, integer=True)
    if num_draws < 2:
        raise ValueError(f"num_draws: expected 2 or more, for draws to have a spread; got {num_draws}.")
    check_positive("num_samples", num_samples, integer=True)
    check_choice("log_likelihood", log_likelihood, ("marginal", "conditional"))

    with prepared(pairs[0], x, binarize=binarize, device=device, seed=seed) as x:
        look = _Look.of(pairs[0], x)
    for index, other in enumerate(pairs[1:], start=1):
        with prepared(other, x, device=device, seed=seed) as rows:
            _check_same_sites(index, look, _Look.of(other, rows))
    plan = _Plan(look, num_draws, num_samples, log_likelihood, predictive)
    labels = _labels(plan, len(x), coords)
    plan.check_size(len(x), len(pairs))

    chains = []
    for index, each in enumerate(pairs, start=1):  # not the seed that binarised
        with prepared(each, x, device=device, seed=seed + index) as rows, torch.no_grad():
            chains.append(_chain(each, rows, plan))
    return _assemble(pairs, x, plan, chains, labels, seed)


@dataclass(frozen=True)
class _Variable:
    dims: tuple[str, ...]
    """After chain and draw."""
    sizes: tuple[int, ...]
    """Those of ``data`` are not known before all data come: 1."""
    itemsize: int

    @staticmethod
    def of(site: Any, num_features: int | None = None) -> _Variable:
        """``num_features``: of the data, where the site is observed."""
        name, event, frames = _clean(site["name"]), site["fn"].event_shape, _frames(site)
        dims = [f"{name}_dim"] if len(event) == 1 else [f"{name}_dim_{i}" for i in range(len(event))]
        if event == (num_features,):
            dims = ["feature"]
        sizes = [1 if frame.name == "data" else frame.size for frame in frames]
        return _Variable(
            (*(_clean(frame.name) for frame in frames), *dims), (*sizes, *event), site["value"].element_size()
        )


@dataclass(frozen=True)
class _Look:
    """What one run on a few data shows of a pair."""

    structure: Structure
    latents: dict[str, _Variable]
    observed: dict[str, _Variable]
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
    def of(pair: Pair, x: Tensor) -> _Look:
        few = x[:2]
        structure = Structure.of(pair.model, pair.guide, (few,), {})
        with torch.no_grad():
            model_trace, guide_trace = trace_pair(
                pair.model, pair.guide, (few,), {}, num_particles=1, structure=structure
            )
            free = _sites(poutine.trace(poutine.uncondition(pair.model)).get_trace(few))
        in_model, in_guide = _sites(model_trace), _sites(guide_trace)
        _check_plates(pair, structure, in_model, in_guide)
        observed = {n: s for n, s in free.items() if s["infer"].get("was_observed")}
        local = all(_is_local(site) for site in [*in_model.values(), *in_guide.values()])
        local_guide = tuple(name for name, site in in_guide.items() if _is_local(site))
        # Beside auxiliary sites a point may have a density of its own: that of a transform.
        auxiliary = any(site["infer"].get("is_auxiliary") for site in in_guide.values())
        kinds = {n: type(getattr(s["fn"], "base_dist", s["fn"])).__name__ for n, s in in_guide.items()}
        support = math.prod(len(_support(in_model[name])) for name in structure.enumerated)
        layers = [p.shape[0] for p in pair.parameters() if p.dim() == 2]
        return _Look(
            structure,
            {n: _Variable.of(s) for n, s in free.items() if n not in observed},
            {n: _Variable.of(s, x.shape[1]) for n, s in observed.items()},
            kinds,
            local,
            local_guide,
            () if auxiliary else tuple(name for name in local_guide if kinds[name] == "Delta"),
            all(_is_local(site) for site in observed.values()),
            local and pair.log_prob is not None,
            support * max([*layers, sum(s["value"].numel() for s in free.values()) // len(few), 1]),
        )


@dataclass(frozen=True)
class _Plan:
    """What to draw."""

    look: _Look
    num_draws: int
    num_samples: int
    log_likelihood: str
    predictive: bool

    def variables(self) -> dict[Key, _Variable]:
        """All with a draw dimension."""
        look, each = self.look, _Variable(("data",), (1,), 8)
        none = _Variable((), (), 8)
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

    def check_size(self, num_data: int, num_chains: int) -> None:
        draws = num_chains * self.num_draws

        def size(variables: Mapping[Key, _Variable], num_data: int) -> int:
            return sum(
                v.itemsize * math.prod(v.sizes) * (num_data if "data" in v.dims else 1) for v in variables.values()
            )

        variables = self.variables()
        a_draw = size(variables, num_data)
        if draws * a_draw <= MAX_BYTES:
            return
        kept = replace(self, predictive=False).variables()
        fixes = []
        if (fewer_draws := MAX_BYTES // (num_chains * a_draw)) >= 2:
            fixes.append(f"num_draws={fewer_draws}")
        if (fewer_data := max(0, MAX_BYTES // draws - size(variables, 0)) * num_data // a_draw) >= 1:
            fixes.append(f"fewer data, x[:{fewer_data}]")
        if self.predictive and draws * size(kept, num_data) <= MAX_BYTES:
            fixes.append("predictive=False")
        raise ValueError(
            f"num_draws: expected no more than {MAX_BYTES / 2**30:g} GiB of draws; {num_chains} x {self.num_draws} "
            f"draws of {num_data} data take {draws * a_draw / 2**30:.1f} GiB. Use {', or '.join(fixes)}."
        )


def _chain(pair: Pair, x: Tensor, plan: _Plan) -> dict[Key, Tensor]:
    """All draws from one pair, (S, ...)."""
    look, variables = plan.look, plan.variables()
    rows = max(1, FLOATS_PER_CHUNK // look.width)
    data_chunk = min(len(x), 100, rows) if look.local else len(x)
    draw_chunk = max(1, min(plan.num_draws, rows // data_chunk))
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


def _draw(pair: Pair, x: Tensor, plan: _Plan, draws: int) -> dict[Key, Tensor]:
    """``draws`` of every variable, on a chunk of data. The marginal log likelihood is still that of each draw alone."""
    look, structure = plan.look, plan.look.structure
    nesting, shape = structure.max_plate_nesting, (draws, len(x))
    found: dict[Key, Tensor] = {}

    def run(guide: Callable) -> tuple[Trace, Trace, Tensor, Tensor, Tensor, Tensor]:
        # Where nothing is sampled, one run stands for all draws.
        count = draws if look.guide else 1
        traces = trace_pair(pair.model, guide, (x,), {}, num_particles=count, structure=structure)
        log_p, log_q = (_log_probs(trace, nesting, len(x)) for trace in traces)
        return *traces, *log_p, *log_q

    def simulate(model: Callable) -> dict[str, Any]:
        plate: AbstractContextManager = nullcontext()
        if draws > 1:
            plate = pyro.plate(PARTICLES, draws, dim=-nesting - 1)
        with plate:
            return _sites(poutine.trace(model).get_trace(x))

    def keep(group: str, sites: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
        found.update({(group, n): _arranged(sites[n], value, draws, nesting) for n, value in values.items()})

    model_trace, guide_trace, local_p, global_p, local_q, global_q = run(pair.guide)
    given = {name: site["value"] for name, site in _sites(guide_trace).items() if name in look.latents}
    evidence = joint = _summed(local_p)
    if structure.enumerated:
        drawn, joint = _enumerated_draws(local_p, _sites(model_trace), structure, draws)
        given |= drawn
    keep("posterior", _sites(model_trace), given)
    log_weight = (evidence - local_q).expand(shape)
    found["sample_stats", "log_weight"] = (
        log_weight if look.local else (log_weight.sum(1) + global_p - global_q).expand(draws)
    )
    found["sample_stats", "lp"] = (joint.expand(shape).sum(1) + global_p).expand(draws)

    if plan.predictive:
        free = poutine.uncondition(pair.model)
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


# Sites of a trace, and their shapes


def _sites(trace: Trace) -> dict[str, Any]:
    """The sites with a density of their own."""
    nodes: Mapping[str, Any] = trace.nodes
    return {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and not site["infer"].get("_deterministic")
    }


def _frames(site: Any) -> list[Any]:
    """The plates of a site, from the left; draws apart."""
    frames = [f for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES]
    return sorted(frames, key=lambda frame: frame.dim)


def _clean(name: str) -> str:
    return name.replace("/", ".")


def _is_local(site: Any) -> bool:
    return any(frame.name == "data" for frame in _frames(site))


def _support(site: Any) -> Tensor:
    """(values, event ...)"""
    return site["fn"].enumerate_support(expand=False).reshape(-1, *site["fn"].event_shape)


def _arranged(site: Any, value: Tensor, draws: int, nesting: int) -> Tensor:
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


def _log_probs(trace: Trace, nesting: int, num_data: int) -> tuple[Tensor, Tensor]:
    """Log densities of local sites, (enumerated ..., draws or 1, data), and of global ones, (draws or 1,)."""
    sites = list(_sites(trace).values())
    device = next((site["value"].device for site in sites), None)
    local = torch.zeros(1, num_data, dtype=torch.float64, device=device)
    other = torch.zeros(1, dtype=torch.float64, device=device)
    for site in sites:
        term = _to_data(site, site["unscaled_log_prob"], nesting)
        if _is_local(site):
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


# The boundary


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


def _check_same_sites(index: int, first: _Look, other: _Look) -> None:
    if (expected := _sites_in_words(first)) != (found := _sites_in_words(other)):
        raise ValueError(
            f"pair[{index}]: expected the sites of pair[0], as chains are restarts of one pair: {expected}; got "
            f"{found}. Convert different pairs one by one."
        )


def _sites_in_words(look: _Look) -> str:
    words = [
        f"{name} ({', '.join(dim if dim == 'data' else str(size) for dim, size in zip(v.dims, v.sizes, strict=True))})"
        for name, v in [*look.latents.items(), *look.observed.items()]
    ]
    return f"{', '.join(words)}, with {', '.join(sorted(look.guide)) or 'nothing'} in the guide"


def _labels(plan: _Plan, num_data: int, coords: Mapping[str, Any] | None) -> dict[str, Any]:
    observed = plan.look.observed
    lengths: dict[str, int] = {}
    for v in [*plan.variables().values(), *observed.values()]:
        lengths |= {d: num_data if d == "data" else s for d, s in zip(v.dims, v.sizes, strict=True)}
    if clash := set(lengths) & {*plan.look.latents, *observed, "chain", "draw"}:
        raise ValueError(f"pair: {sorted(clash)[0]!r} names a dim and something else. Rename the site or plate.")
    labels: dict[str, Any] = {dim: list(range(length)) for dim, length in lengths.items()}
    for dim, names in (coords or {}).items():
        if dim not in lengths:
            raise ValueError(f"coords: expected dims among {', '.join(lengths)}; got {dim!r}.")
        values = list(names)
        if len(values) != lengths[dim]:
            raise ValueError(f"coords: expected {lengths[dim]} labels of {dim!r}; got {len(values)}.")
        labels[dim] = values
    return labels


def _assemble(
    pairs: Sequence[Pair],
    x: Tensor,
    plan: _Plan,
    chains: Sequence[Mapping[Key, Tensor]],
    labels: Mapping[str, Any],
    seed: int,
) -> InferenceData:
    import pyrovae

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # ArviZ announces its own future, once a day
        import arviz

    groups: dict[str, dict[str, Any]] = {}
    dims: dict[str, dict[str, list[str]]] = {}
    for (group, name), variable in plan.variables().items():
        stacked = torch.stack([chain[group, name] for chain in chains])
        groups.setdefault(group, {})[_clean(name)] = stacked.cpu().numpy()
        dims.setdefault(group, {})[_clean(name)] = list(variable.dims)
    datasets = {
        group: arviz.dict_to_dataset(values, coords=labels, dims=dims[group], library=pyrovae)
        for group, values in groups.items()
    }
    look = plan.look
    datasets["observed_data"] = arviz.dict_to_dataset(
        {_clean(name): value.cpu().numpy() for name, value in _observed(pairs[0], x, look).items()},
        coords=labels,
        dims={_clean(name): list(v.dims) for name, v in look.observed.items()},
        default_dims=[],
        library=pyrovae,
    )
    notes = ["Posterior draws are the guide's, unweighted.", "Parameters are point estimates."]
    attrs = {
        "pair": type(pairs[0]).__name__,
        "pyrovae_version": pyrovae.__version__,
        "seed": seed,
        "guide": ", ".join(f"{name}: {kind}" for name, kind in look.guide.items()) or "none",
        "enumerated": ", ".join(look.structure.enumerated) or "none",
        "log_likelihood": plan.log_likelihood_kind(),
        "left_out": plan.left_out() or "nothing",
        "notes": " ".join(notes + ["Chains are restarts."] * (len(pairs) > 1)),
    }
    return arviz.InferenceData(attrs=attrs, **datasets)


def _observed(pair: Pair, x: Tensor, look: _Look) -> dict[str, Tensor]:
    with prepared(pair, x, device=x.device), torch.no_grad():
        sites = _sites(poutine.trace(poutine.uncondition(pair.model)).get_trace(x))
    values = {name: sites[name]["infer"]["obs"].expand(sites[name]["value"].shape) for name in look.observed}
    return {name: _arranged(sites[name], v, 1, look.structure.max_plate_nesting)[0] for name, v in values.items()}
