"""Export of a fitted pair to ArviZ: draws, simulated data and pointwise log likelihood in an ``InferenceData``."""

from __future__ import annotations

import importlib.metadata
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Categorical
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor

from pyrovae.checks import check_choice, check_positive
from pyrovae.evaluation.measurement import chunk_sizes, not_applicable, prepared, width
from pyrovae.evaluation.sites import drawn_data, is_local, is_point, unobserve
from pyrovae.infer.weights import PARTICLES, Structure, sample_sites, trace_pair
from pyrovae.pair import Pair

if TYPE_CHECKING:
    from arviz import InferenceData

__all__ = ["MAX_BYTES", "to_arviz"]

MAX_BYTES = 2**31
"""Most bytes of all groups together. A larger result is refused before work starts."""
EQUAL = 1e-5  # log weights that agree to this, relative to themselves, differ by rounding
TIE_BREAK = 1e-8  # nats that keep equal draws of the log likelihood apart

Key = tuple[str, str]
"""Name of the group and of the variable."""


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
    """Draw from a pair's guide and model, and return the draws as ArviZ takes them. S draws, N data, D features.

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
        binarize, device, seed: as in :func:`pyrovae.evaluate`. Pixels are drawn once for all chains.

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
        layout = PairLayout.of(pairs[0], x)
    for index, other in enumerate(pairs[1:], start=1):
        with prepared(other, x, device=device, seed=seed) as rows:
            found = PairLayout.of(other, rows).in_words()
        if found != (expected := layout.in_words()):
            expected = f"expected the sites of pair[0], as chains are restarts of one pair: {expected}"
            raise ValueError(f"pair[{index}]: {expected}; got {found}. Convert different pairs one by one.")
    plan = Plan(layout, num_draws, num_samples, log_likelihood, predictive)
    labels = _labels_of_dims(plan, len(x), coords)
    _check_size(plan, len(x), len(pairs))

    chains = []
    for index, each in enumerate(pairs, start=1):  # not the seed that binarised
        with prepared(each, x, device=device, seed=seed + index) as rows, torch.no_grad():
            chains.append(draw_chain(each, rows, plan))
    return _assemble_groups(pairs, x, plan, chains, labels, seed)


def _check_size(plan: Plan, num_data: int, num_chains: int) -> None:
    """Raise ValueError, with fixes that fit, where the result would take more than ``MAX_BYTES``."""
    draws = num_chains * plan.num_draws

    def size(variables: Mapping[Key, Variable], num_data: int) -> int:
        return sum(v.itemsize * math.prod(v.sizes) * (num_data if "data" in v.dims else 1) for v in variables.values())

    variables = plan.variables()
    a_draw = size(variables, num_data)
    if draws * a_draw <= MAX_BYTES:
        return
    kept = replace(plan, predictive=False).variables()
    fixes = []
    if (fewer_draws := MAX_BYTES // (num_chains * a_draw)) >= 2:
        fixes.append(f"num_draws={fewer_draws}")
    if (fewer_data := max(0, MAX_BYTES // draws - size(variables, 0)) * num_data // a_draw) >= 1:
        fixes.append(f"fewer data, x[:{fewer_data}]")
    if plan.predictive and draws * size(kept, num_data) <= MAX_BYTES:
        fixes.append("predictive=False")
    raise ValueError(
        f"num_draws: expected no more than {MAX_BYTES / 2**30:g} GiB of draws; {num_chains} x {plan.num_draws} "
        f"draws of {num_data} data take {draws * a_draw / 2**30:.1f} GiB. Use {', or '.join(fixes)}."
    )


def _labels_of_dims(plan: Plan, num_data: int, coords: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the labels of every dim: those in ``coords``, else counted from 0."""
    observed = plan.layout.observed
    lengths: dict[str, int] = {}
    for v in [*plan.variables().values(), *observed.values()]:
        lengths |= {d: num_data if d == "data" else s for d, s in zip(v.dims, v.sizes, strict=True)}
    if clash := set(lengths) & {*plan.layout.latents, *observed, "chain", "draw"}:
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


def _assemble_groups(
    pairs: Sequence[Pair],
    x: Tensor,
    plan: Plan,
    chains: Sequence[Mapping[Key, Tensor]],
    labels: Mapping[str, Any],
    seed: int,
) -> InferenceData:
    version = importlib.metadata.version("pyrovae")
    library = {"inference_library": "pyrovae", "inference_library_version": version}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # ArviZ announces its own future, once a day
        import arviz

    def dataset(values: Mapping[str, Tensor], variables: Mapping[str, Variable], **options: Any) -> Any:
        arrays = {name.replace("/", "."): value.cpu().numpy() for name, value in values.items()}
        dims = {name.replace("/", "."): list(variables[name].dims) for name in values}
        return arviz.dict_to_dataset(arrays, coords=labels, dims=dims, attrs=library, **options)

    groups: dict[str, dict[str, Variable]] = {}
    for (group, name), variable in plan.variables().items():
        groups.setdefault(group, {})[name] = variable
    datasets = {
        group: dataset({name: torch.stack([chain[group, name] for chain in chains]) for name in variables}, variables)
        for group, variables in groups.items()
    }
    layout, model = plan.layout, pairs[0].model
    with prepared(pairs[0], x, device=x.device), torch.no_grad():
        sites = drawn_data(poutine.trace(unobserve(model)).get_trace(x))
    observed = {name: site["infer"]["obs"].expand(site["value"].shape) for name, site in sites.items()}
    observed = {n: arranged(sites[n], v, 1, layout.structure.max_plate_nesting)[0] for n, v in observed.items()}
    datasets["observed_data"] = dataset(observed, layout.observed, default_dims=[])
    notes = ["Posterior draws are the guide's, unweighted.", "Parameters are point estimates."]
    attrs = {
        "pair": type(pairs[0]).__name__,
        "pyrovae_version": version,
        "seed": seed,
        "guide": ", ".join(f"{name}: {kind}" for name, kind in layout.guide.items()) or "none",
        "enumerated": ", ".join(layout.structure.enumerated) or "none",
        "log_likelihood": plan.log_likelihood_kind(),
        "left_out": plan.left_out() or "nothing",
        "notes": " ".join(notes + ["Chains are restarts."] * (len(pairs) > 1)),
    }
    return arviz.InferenceData(attrs=attrs, **datasets)


# What to draw ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variable:
    """Shape of one variable of the result."""

    dims: tuple[str, ...]  # names of the dims after chain and draw
    sizes: tuple[int, ...]  # size of each dim; 1 for ``data``, whose size is not known yet
    itemsize: int  # bytes of one number

    @staticmethod
    def of(site: Any, num_features: int | None = None) -> Variable:
        """Describe a site; ``num_features`` is that of the data, where the site is observed."""
        name, event, frames = site["name"].replace("/", "."), site["fn"].event_shape, _plates(site)
        dims = [f"{name}_dim"] if len(event) == 1 else [f"{name}_dim_{i}" for i in range(len(event))]
        if event == (num_features,):
            dims = ["feature"]
        dims = [*(frame.name.replace("/", ".") for frame in frames), *dims]
        sizes = [1 if frame.name == "data" else frame.size for frame in frames]
        return Variable(tuple(dims), (*sizes, *event), site["value"].element_size())


@dataclass(frozen=True)
class PairLayout:
    """Sites of a pair and where they lie, as one run on two data shows them."""

    structure: Structure
    latents: dict[str, Variable]
    observed: dict[str, Variable]
    guide: dict[str, str]  # distribution of each guide site
    local: bool  # every site lies in the plate ``data``: then data are independent of each other, and come in chunks
    local_guide: tuple[str, ...]  # guide sites in the plate ``data``
    points: tuple[str, ...]  # local latents to which the guide gives one value: then there are no importance weights
    pointwise: bool  # every observed site lies in the plate ``data``
    exact: bool  # ``pair.log_prob`` is all of log p(x_n)
    width: int  # numbers in the widest tensor, for one draw of one datum

    @staticmethod
    def of(pair: Pair, x: Tensor) -> PairLayout:
        """Run the pair on two data, and check the plates of its sites."""
        few, programs = x[:2], (pair.model, pair.guide)
        structure = Structure.of(*programs, (few,), {})
        with torch.no_grad():
            model_trace, guide_trace = trace_pair(*programs, (few,), {}, num_particles=1, structure=structure)
            free_trace = poutine.trace(unobserve(pair.model)).get_trace(few)
        in_model, in_guide, free = (sample_sites(trace) for trace in (model_trace, guide_trace, free_trace))
        _check_plates(pair, structure, in_model, in_guide)
        observed = drawn_data(free_trace)
        local = all(is_local(site) for site in [*in_model.values(), *in_guide.values()])
        local_guide = tuple(name for name, site in in_guide.items() if is_local(site))
        # Beside auxiliary sites, a point may be the transform of another draw, and then it has a density.
        auxiliary = any(site["infer"].get("is_auxiliary") for site in in_guide.values())
        kinds = {n: type(getattr(s["fn"], "base_dist", s["fn"])).__name__ for n, s in in_guide.items()}
        return PairLayout(
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

    def in_words(self) -> str:
        """Name the sites and their sizes."""

        def size(v: Variable) -> str:
            return ", ".join(dim if dim == "data" else str(size) for dim, size in zip(v.dims, v.sizes, strict=True))

        words = [f"{name} ({size(v)})" for name, v in [*self.latents.items(), *self.observed.items()]]
        return f"{', '.join(words)}, with {', '.join(sorted(self.guide)) or 'nothing'} in the guide"


@dataclass(frozen=True)
class Plan:
    """Plan of what to draw from a pair."""

    layout: PairLayout
    num_draws: int
    num_samples: int
    log_likelihood: str
    predictive: bool

    def variables(self) -> dict[Key, Variable]:
        """Return all variables with a draw dim."""
        layout, each = self.layout, Variable(("data",), (1,), 8)
        none = Variable((), (), 8)
        found = {("posterior", name): variable for name, variable in layout.latents.items()}
        if self.predictive:
            found |= {("prior", name): variable for name, variable in layout.latents.items()}
            for group in ("posterior_predictive", "prior_predictive"):
                found |= {(group, name): variable for name, variable in layout.observed.items()}
        if not self.left_out():
            found |= {("log_likelihood", name): each for name in self.log_likelihood_names()}
        return found | {("sample_stats", "log_weight"): each if layout.local else none, ("sample_stats", "lp"): none}

    def log_likelihood_names(self) -> list[str]:
        """Return the variables of the log likelihood: one if marginal, so that ``az.loo`` need not be told which."""
        return list(self.layout.observed) if self.log_likelihood == "conditional" else ["+".join(self.layout.observed)]

    def left_out(self) -> str:
        """Return why there is no log likelihood; empty where there is one."""
        if not self.layout.pointwise:
            return "log_likelihood: not all observed sites lie in the plate 'data', so there is none for each datum"
        if self.log_likelihood == "marginal" and self.layout.points and not self.layout.exact:
            points = f"the guide gives one value to {', '.join(self.layout.points)}"
            return f"log_likelihood: {points}, so that its weights do not estimate log p(x); 'conditional' would apply"
        return ""

    def rounds(self) -> int:
        """Return how many runs of the guide each draw takes."""
        layout = self.layout
        if self.log_likelihood == "conditional" or layout.exact or not layout.local_guide or self.left_out():
            return 1
        return -(-self.num_samples // self.num_draws) if layout.local else self.num_samples

    def log_likelihood_kind(self) -> str:
        """Say in words which log likelihood the result holds."""
        layout = self.layout
        if self.left_out():
            return "left out"
        if self.log_likelihood == "conditional":
            return "log p(x_n | latents)"
        given = "log p(x_n)" if layout.local else "log p(x_n | global latents)"
        if layout.exact or not layout.local_guide:
            return f"{given}, exact"
        samples = self.rounds() * self.num_draws if layout.local else self.rounds()
        return f"{given}, importance estimate from {samples} samples a datum{'' if layout.local else ' and draw'}"


# Draws ----------------------------------------------------------------------------------------------------------------


def draw_chain(pair: Pair, x: Tensor, plan: Plan) -> dict[Key, Tensor]:
    """Draw every variable from one pair, (S, ...)."""
    layout, variables = plan.layout, plan.variables()
    data_chunk, draw_chunk = chunk_sizes(x.device, layout.width, len(x), plan.num_draws, joint=not layout.local)
    counts = [len(part) for part in torch.arange(plan.num_draws).split(draw_chunk)]
    parts: list[dict[Key, Tensor]] = []
    for some in x.split(data_chunk):
        drawn = [_draw_chunk(pair, some, plan, count) for count in counts]
        part = {key: torch.cat([d[key] for d in drawn]) for key in drawn[0]}
        if ("log_likelihood", name := plan.log_likelihood_names()[0]) in part and plan.log_likelihood == "marginal":
            value = part["log_likelihood", name]
            if layout.local and layout.local_guide and not layout.exact:
                value = _evidence_from_others(value)
            # Evenly spaced offsets over draws, which sum to zero: ArviZ cannot fit a tail to equal numbers. It gives
            # k̂ = ∞, and ``az.loo`` warns although log p(x_n) is exact.
            offsets = torch.linspace(-TIE_BREAK, TIE_BREAK, len(value), dtype=value.dtype, device=value.device)
            part["log_likelihood", name] = value + offsets[:, None]
        parts.append(part)

    def joined(key: Key) -> Tensor:
        dims, values = variables[key].dims, [part[key] for part in parts]
        return torch.cat(values, 1 + dims.index("data")) if "data" in dims else reduce(torch.add, values)

    return {key: joined(key) for key in variables}


def _draw_chunk(pair: Pair, x: Tensor, plan: Plan, draws: int) -> dict[Key, Tensor]:
    """Draw every variable on a chunk of data. The marginal log likelihood is still that of each draw alone."""
    layout, structure = plan.layout, plan.layout.structure
    nesting, shape = structure.max_plate_nesting, (draws, len(x))
    found: dict[Key, Tensor] = {}

    def run(guide: Callable) -> tuple[Trace, Trace, Tensor, Tensor, Tensor, Tensor]:
        # Where the guide samples nothing, one run stands for all draws.
        count = draws if layout.guide else 1
        traces = trace_pair(pair.model, guide, (x,), {}, num_particles=count, structure=structure)
        log_p, log_q = (_log_probs(trace, nesting, x) for trace in traces)
        return *traces, *log_p, *log_q

    def simulate(model: Callable) -> dict[str, Any]:
        with pyro.plate(PARTICLES, draws, dim=-nesting - 1) if draws > 1 else nullcontext():
            return sample_sites(poutine.trace(model).get_trace(x))

    def keep(group: str, sites: Mapping[str, Any], names: Iterable[str]) -> None:
        found.update({(group, name): arranged(sites[name], sites[name]["value"], draws, nesting) for name in names})

    model_trace, guide_trace, local_p, global_p, local_q, global_q = run(pair.guide)
    given = {name: site["value"] for name, site in sample_sites(guide_trace).items() if name in layout.latents}
    evidence = joint = _sum_enumerated(local_p)
    if structure.enumerated:
        drawn, joint = _enumerated_draws(local_p, sample_sites(model_trace), structure, draws)
        given |= drawn
    found |= {("posterior", n): arranged(model_trace.nodes[n], value, draws, nesting) for n, value in given.items()}
    log_weight = (evidence - local_q).expand(shape)
    whole = (log_weight.sum(1) + global_p - global_q).expand(draws)
    found["sample_stats", "log_weight"] = log_weight if layout.local else whole
    found["sample_stats", "lp"] = (joint.expand(shape).sum(1) + global_p).expand(draws)

    if plan.predictive:
        free = unobserve(pair.model)
        sites = simulate(poutine.condition(free, data=given))
        keep("posterior_predictive", sites, layout.observed)
        sites = simulate(free)
        keep("prior_predictive", sites, layout.observed)
        keep("prior", sites, layout.latents)

    if plan.left_out():
        return found
    if plan.log_likelihood == "conditional":
        sites = simulate(poutine.condition(pair.model, data=given))
        for name in layout.observed:
            log_prob = sites[name]["fn"].log_prob(sites[name]["value"])
            found["log_likelihood", name] = _summed_per_datum(sites[name], log_prob, nesting).expand(shape)
        return found
    if layout.exact and pair.log_prob is not None:
        marginal = pair.log_prob(x).double().expand(shape)
    else:
        held = guide_trace.copy()  # a global latent stays as it was drawn
        for name, site in guide_trace.nodes.items():
            if name in layout.local_guide or site["type"] != "sample":
                held.remove_node(name)
        marginal, rounds = log_weight, plan.rounds()
        for _ in range(rounds - 1):
            _, _, again_p, _, again_q, _ = run(poutine.replay(pair.guide, trace=held))
            marginal = torch.logaddexp(marginal, _sum_enumerated(again_p) - again_q)
        marginal = marginal - math.log(rounds)
    found["log_likelihood", plan.log_likelihood_names()[0]] = marginal
    return found


def _evidence_from_others(log_weight: Tensor) -> Tensor:
    """Return log 1/(S−1) Σ_{t≠s} w_tn, (S, N): the evidence from all draws but one's own."""
    # The leave-one-out ratios of these, 1/Σ_{t≠s} w_t, grow with w_s and to first order linearly: their tail has the
    # shape of the weights' tail, and their mean is 1/p(x_n) to O(1/S²).
    count = len(log_weight)
    total = log_weight.logsumexp(0, keepdim=True)
    top = log_weight.argmax(0, keepdim=True)  # 1 − w_s/Σw loses all digits where one weight is nearly all
    others = total + torch.log1p(-(log_weight - total).exp())
    rest = log_weight.scatter(0, top, -torch.inf).logsumexp(0, keepdim=True)
    found = others.scatter(0, top, rest) - math.log(count - 1)
    mean = total - math.log(count)
    low, high = log_weight.aminmax(dim=0, keepdim=True)
    return torch.where(high - low <= EQUAL * mean.abs().clamp(min=1), mean, found)


# Shapes ---------------------------------------------------------------------------------------------------------------


def _plates(site: Any) -> list[Any]:
    """Return the plates of a site from the left, without that of the draws."""
    frames = [f for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES]
    return sorted(frames, key=lambda frame: frame.dim)


def arranged(site: Any, value: Tensor, draws: int, nesting: int) -> Tensor:
    """Arrange a value as (draws, plates of the site ..., event ...)."""
    event = site["fn"].event_shape
    batch = tuple(value.shape[: value.dim() - len(event)])
    batch = (1,) * (nesting + 1 - len(batch)) + batch
    kept = [batch[frame.dim] for frame in _plates(site)]
    return value.reshape(batch[-nesting - 1], *kept, *event).expand(draws, *kept, *event)


def _summed_per_datum(site: Any, log_prob: Tensor, nesting: int) -> Tensor:
    """Sum over all plates but ``data``: (enumerated ..., draws or 1, data); outside it, (..., draws or 1)."""
    log_prob = scale_and_mask(log_prob, 1.0, site["mask"]).double()
    log_prob = log_prob.reshape((1,) * (nesting + 1 - log_prob.dim()) + log_prob.shape)
    data = [frame.dim for frame in _plates(site) if frame.name == "data"]
    dims = [dim for dim in range(-nesting, 0) if dim not in data]
    return log_prob.sum(dims) if dims else log_prob


def _log_probs(trace: Trace, nesting: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return log densities of local sites, (enumerated ..., draws or 1, data), and of global ones, (draws or 1,)."""
    local = torch.zeros(1, len(x), dtype=torch.float64, device=x.device)
    other = torch.zeros(1, dtype=torch.float64, device=x.device)
    for site in sample_sites(trace).values():
        term = _summed_per_datum(site, site["unscaled_log_prob"], nesting)
        local, other = (local + term, other) if is_local(site) else (local, other + term)
    return local, other


def _sum_enumerated(local: Tensor) -> Tensor:
    """Sum enumerated latents out: (draws or 1, data)."""
    return local.flatten(0, -3).logsumexp(0) if local.dim() > 2 else local


def _enumerated_draws(
    local: Tensor, sites: Mapping[str, Any], structure: Structure, draws: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Draw the enumerated latents jointly from p(y | x, z); return them and log p(x, y, z) there, (draws, data)."""
    shape = local.shape[:-2]
    joint = local.flatten(0, -3).movedim(0, -1)  # (draws or 1, data, values)
    joint = joint.expand(draws, *joint.shape[1:])
    index = Categorical(logits=joint, validate_args=False).sample()
    found = {}
    # The enumerated sites in the order of their dims.
    names = sorted(structure.enumerated, key=lambda name: sites[name]["infer"]["_enumerate_dim"])
    for name, at in zip(names, torch.unravel_index(index, shape), strict=True):
        (frame,), fn = _plates(sites[name]), sites[name]["fn"]
        value = fn.enumerate_support(expand=False).reshape(-1, *fn.event_shape)[at]
        right = -frame.dim - 1
        left = structure.max_plate_nesting - 1 - right
        batch = (draws,) * (draws > 1) + (1,) * left + (len(at[0]),) + (1,) * right
        found[name] = value.reshape(*batch, *fn.event_shape)
    return found, joint.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def _check_plates(pair: Pair, structure: Structure, in_model: Mapping[str, Any], in_guide: Mapping[str, Any]) -> None:
    plates = {name: {frame.name for frame in _plates(site)} for name, site in in_model.items()}
    for name in structure.enumerated:
        if plates[name] != {"data"}:
            reason = f"the enumerated site '{name}' must have one value a datum, so lie in the plate 'data' alone; "
            reason += f"it lies in {sorted(plates[name])}. Sample it in the guide."
            raise not_applicable("to_arviz", pair, reason)
    for name, site in in_guide.items():
        found = {frame.name for frame in _plates(site)}
        if found != plates.get(name, found):
            where = f"lies in plates {sorted(found)}, and in the model in {sorted(plates[name])}"
            raise ValueError(f"guide: site '{name}' {where}. Sample it in the same plates.")
