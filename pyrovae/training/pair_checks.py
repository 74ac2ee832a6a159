"""Checks of a pair against data: run it on a few rows before work begins, and say what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pyrovae.infer.weights import Structure, sample_sites
from pyrovae.pair import Pair

__all__ = ["check_pair", "observed_support"]

PLATE = "Write `with pyro.plate('data', len(x)):` around what is per datum, in the model and in the guide."


def check_pair(pair: Pair, x: Tensor, argument: str = "x", *, binarize: bool = False) -> None:
    """Run the pair once on a few data, with Pyro's validation on, and raise ValueError where something is wrong.

    The guide must have every site, sites that follow the batch lie inside the plate ``data``, parameters outside Pyro's
    global store, and ``x`` in its likelihood's support. To the pair's own errors, a note adds on which rows it ran.
    """
    few = x[:2].to(next(pair.parameters(), x))
    if binarize:
        if not ((x >= 0) & (x <= 1)).all():
            raise ValueError(
                f"binarize: expected pixels of {argument} in [0, 1]; got values from {x.min():g} to {x.max():g}. "
                "Divide pixels of 0..255 by 255, or leave binarize out."
            )
        few = few.round()
    guide_trace, model_trace = _trace_pair(pair, few, argument)
    own = {id(p) for p in pair.parameters()}
    nodes: list[tuple[str, Any]] = [*guide_trace.nodes.items(), *model_trace.nodes.items()]
    for name, value in ((name, site["value"]) for name, site in nodes if site["type"] == "param"):
        if id(value.unconstrained() if hasattr(value, "unconstrained") else value) not in own:
            raise ValueError(
                f"pair: pyro.param('{name}') lives in Pyro's global store, so two instances would share it and no "
                "state_dict would hold it. Make it an nn.Parameter or a PyroParam, or wrap the functions in "
                "FunctionPair."
            )
    _check_plates(pair, few, argument, guide_trace, model_trace)
    if not binarize:
        for name, site in _observing_sites(model_trace, few).items():
            _check_support(x, few, argument, name, site["fn"].support)
    with pyro.validation_enabled(True), _name_rows("guide and the model", few, argument):
        Structure.of(pair.model, pair.guide, (few,), {})


def observed_support(pair: Pair, few: Tensor) -> constraints.Constraint | None:
    """Support of one feature at the site that observes ``few``; None where no site observes it."""
    _, trace = _trace_pair(pair, few, "the data")
    return next((_of_one_feature(site["fn"].support) for site in _observing_sites(trace, few).values()), None)


def _of_one_feature(support: constraints.Constraint) -> constraints.Constraint:
    return getattr(support, "base_constraint", support)


@contextmanager
def _name_rows(program: str, few: Tensor, argument: str) -> Iterator[None]:
    """Add to an error which rows the program ran on: torch's errors show a shape that the caller never passed."""
    try:
        yield
    except Exception as error:
        rows = f"{len(few)} row{'s' * (len(few) > 1)} of {argument}"
        error.add_note(f"while running the {program} on {rows}, shape {tuple(few.shape)}, as a first look at the pair")
        raise


def _trace_pair(pair: Pair, few: Tensor, argument: str) -> tuple[Any, Any]:
    """Run the guide and the model without gradients and validation, and leave the random state alone."""
    with torch.random.fork_rng([]), torch.no_grad(), pyro.validation_enabled(False):
        with _name_rows("guide", few, argument):
            guide_trace = poutine.trace(pair.guide).get_trace(few)
        with _name_rows("model", few, argument):
            return guide_trace, poutine.trace(poutine.replay(pair.model, trace=guide_trace)).get_trace(few)


def _observing_sites(trace: Any, few: Tensor) -> dict[str, Any]:
    sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample" and site["is_observed"]}
    return {name: site for name, site in sites.items() if site["value"] is few}


def _check_plates(pair: Pair, few: Tensor, argument: str, guide_trace: Any, model_trace: Any) -> None:
    """Raise unless all that follows the batch is inside the plate ``data``, by which objectives weigh mini-batches."""
    if suspects := _plates_of_size(len(few), guide_trace, model_trace):  # some may have this size by chance
        longer = torch.cat([few, few[:1]])
        if names := suspects & _plates_of_size(len(longer), *_trace_pair(pair, longer, argument)):
            raise ValueError(
                f"pair: expected the plate over the batch to be named 'data', by which objectives weigh mini-batches; "
                f"found {', '.join(map(repr, sorted(names)))}. {PLATE}"
            )
    for name, site in _observing_sites(model_trace, few).items():
        if not _is_per_datum(site):
            raise ValueError(
                f"model: expected site '{name}', which observes the batch, inside the plate 'data'. {PLATE}"
            )
    for name, site in sample_sites(model_trace).items():
        in_guide = guide_trace.nodes.get(name)
        if in_guide is not None and not site["is_observed"] and _is_per_datum(in_guide) != _is_per_datum(site):
            inside, outside = ("model", "guide") if _is_per_datum(site) else ("guide", "model")
            raise ValueError(
                f"{outside}: expected site '{name}' inside the plate 'data', as in the {inside}; found it outside. "
                f"{PLATE}"
            )


def _plates_of_size(size: int, *traces: Any) -> set[str]:
    """Names of the plates of this size, without the plate ``data``."""
    sites = [site for trace in traces for site in trace.nodes.values() if site["type"] == "sample"]
    frames = [frame for site in sites for frame in site["cond_indep_stack"]]
    return {frame.name for frame in frames if frame.vectorized and frame.size == size and frame.name != "data"}


def _is_per_datum(site: Any) -> bool:
    return any(frame.name == "data" for frame in site["cond_indep_stack"])


def _check_support(x: Tensor, few: Tensor, argument: str, name: str, support: constraints.Constraint) -> None:
    try:
        inside = support.check(x)
    except RuntimeError:  # its limits lie on another device, or differ between data: check the few rows instead
        x, inside = few, support.check(few)
    if inside.all():
        return
    message = (
        f"{argument}: expected values in the support of site '{name}', {_of_one_feature(support)}; got values from "
        f"{x.min():g} to {x.max():g}, outside it in {int((~inside).sum())} of {inside.numel()} data."
    )
    if _of_one_feature(support) is constraints.boolean and ((x >= 0) & (x <= 1)).all():
        message += (
            " These are grey pixels: pass binarize=True to draw each as 0 or 1 at every use, or choose a likelihood "
            "over [0, 1]."
        )
    raise ValueError(message)
