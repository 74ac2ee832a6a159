"""Export of a fitted pair to ArviZ: draws, simulated data and pointwise log likelihood in an ``InferenceData``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor

from pyrovae.checks import check_choice, check_positive
from pyrovae.evaluation.arviz_draws import Key, PairLayout, Plan, Variable, arranged, clean_name, draw_chain
from pyrovae.evaluation.measurement import prepared
from pyrovae.evaluation.sites import drawn_data, unobserve
from pyrovae.pair import Pair

if TYPE_CHECKING:
    from arviz import InferenceData

__all__ = ["MAX_BYTES", "to_arviz"]

MAX_BYTES = 2**31
"""Most bytes of all groups together. A larger result is refused before work starts."""


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
            _check_same_sites(index, layout, PairLayout.of(other, rows))
    plan = Plan(layout, num_draws, num_samples, log_likelihood, predictive)
    labels = _labels(plan, len(x), coords)
    _check_size(plan, len(x), len(pairs))

    chains = []
    for index, each in enumerate(pairs, start=1):  # not the seed that binarised
        with prepared(each, x, device=device, seed=seed + index) as rows, torch.no_grad():
            chains.append(draw_chain(each, rows, plan))
    return _assemble(pairs, x, plan, chains, labels, seed)


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


def _check_same_sites(index: int, first: PairLayout, other: PairLayout) -> None:
    if (expected := _sites_in_words(first)) != (found := _sites_in_words(other)):
        raise ValueError(
            f"pair[{index}]: expected the sites of pair[0], as chains are restarts of one pair: {expected}; got "
            f"{found}. Convert different pairs one by one."
        )


def _sites_in_words(layout: PairLayout) -> str:
    words = [
        f"{name} ({', '.join(dim if dim == 'data' else str(size) for dim, size in zip(v.dims, v.sizes, strict=True))})"
        for name, v in [*layout.latents.items(), *layout.observed.items()]
    ]
    return f"{', '.join(words)}, with {', '.join(sorted(layout.guide)) or 'nothing'} in the guide"


def _labels(plan: Plan, num_data: int, coords: Mapping[str, Any] | None) -> dict[str, Any]:
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


def _assemble(
    pairs: Sequence[Pair],
    x: Tensor,
    plan: Plan,
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
        groups.setdefault(group, {})[clean_name(name)] = stacked.cpu().numpy()
        dims.setdefault(group, {})[clean_name(name)] = list(variable.dims)
    datasets = {
        group: arviz.dict_to_dataset(values, coords=labels, dims=dims[group], library=pyrovae)
        for group, values in groups.items()
    }
    layout = plan.layout
    datasets["observed_data"] = arviz.dict_to_dataset(
        {clean_name(name): value.cpu().numpy() for name, value in _observed(pairs[0], x, layout).items()},
        coords=labels,
        dims={clean_name(name): list(v.dims) for name, v in layout.observed.items()},
        default_dims=[],
        library=pyrovae,
    )
    notes = ["Posterior draws are the guide's, unweighted.", "Parameters are point estimates."]
    attrs = {
        "pair": type(pairs[0]).__name__,
        "pyrovae_version": pyrovae.__version__,
        "seed": seed,
        "guide": ", ".join(f"{name}: {kind}" for name, kind in layout.guide.items()) or "none",
        "enumerated": ", ".join(layout.structure.enumerated) or "none",
        "log_likelihood": plan.log_likelihood_kind(),
        "left_out": plan.left_out() or "nothing",
        "notes": " ".join(notes + ["Chains are restarts."] * (len(pairs) > 1)),
    }
    return arviz.InferenceData(attrs=attrs, **datasets)


def _observed(pair: Pair, x: Tensor, layout: PairLayout) -> dict[str, Tensor]:
    with prepared(pair, x, device=x.device), torch.no_grad():
        sites = drawn_data(poutine.trace(unobserve(pair.model)).get_trace(x))
    values = {name: site["infer"]["obs"].expand(site["value"].shape) for name, site in sites.items()}
    return {name: arranged(sites[name], v, 1, layout.structure.max_plate_nesting)[0] for name, v in values.items()}
