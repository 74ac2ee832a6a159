"""Checks of a pair against data, before and after training goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints

from pyrovae.infer.weights import Structure
from pyrovae.pair import Pair

if TYPE_CHECKING:
    from pyrovae.infer.svi import SVI

__all__ = ["check_pair", "first_nonfinite_site", "observed_support"]


def check_pair(pair: Pair, x: Tensor, argument: str = "x", *, binarize: bool = False) -> None:
    """Run the pair once on a few data, with Pyro's validation on.

    Raises:
        ValueError: the guide misses a site; what follows the batch is not inside the plate ``data``; a parameter lives
            in Pyro's global store; ``x`` lies outside the support of its likelihood; or whatever Pyro's own validation
            finds.
        Exception: whatever the guide or the model raises, with a note that says on which rows it ran.
    """
    parameter = next(pair.parameters(), None)
    few = x[:2] if parameter is None else x[:2].to(parameter.device, parameter.dtype)
    if binarize:
        if not ((x >= 0) & (x <= 1)).all():
            raise ValueError(
                f"binarize: expected pixels of {argument} in [0, 1]; got values from {x.min():g} to {x.max():g}. "
                "Divide pixels of 0..255 by 255, or leave binarize out."
            )
        few = few.round()
    guide_trace, model_trace = _traces(pair, few, argument)
    own = {id(p) for p in pair.parameters()}
    site: Any
    for trace in (guide_trace, model_trace):
        for name, site in trace.nodes.items():
            if site["type"] == "param" and id(_unconstrained(site["value"])) not in own:
                raise ValueError(
                    f"pair: pyro.param('{name}') lives in Pyro's global store, so two instances would share it and no "
                    "state_dict would hold it. Make it an nn.Parameter or a PyroParam, or wrap the functions in "
                    "FunctionPair."
                )
    _check_plates(pair, few, argument, guide_trace, model_trace)
    if not binarize:
        for name, site in model_trace.nodes.items():
            if site["type"] == "sample" and site["is_observed"] and site["value"] is few:
                _check_support(x, few, argument, name, site["fn"].support)
    with pyro.validation_enabled(True), _noting("guide and the model", few, argument):
        Structure.of(pair.model, pair.guide, (few,), {})


def _traces(pair: Pair, few: Tensor, argument: str) -> tuple[Any, Any]:
    with torch.random.fork_rng([]), torch.no_grad(), pyro.validation_enabled(False):
        with _noting("guide", few, argument):
            guide_trace = poutine.trace(pair.guide).get_trace(few)
        with _noting("model", few, argument):
            return guide_trace, poutine.trace(poutine.replay(pair.model, trace=guide_trace)).get_trace(few)


@contextmanager
def _noting(program: str, few: Tensor, argument: str) -> Iterator[None]:
    """A batch that the caller never passed would puzzle in an error of torch's: say where it comes from."""
    try:
        yield
    except Exception as error:
        rows = f"{len(few)} row{'s' * (len(few) > 1)} of {argument}"
        error.add_note(f"while running the {program} on {rows}, shape {tuple(few.shape)}, as a first look at the pair")
        raise


def _check_plates(pair: Pair, few: Tensor, argument: str, guide_trace: Any, model_trace: Any) -> None:
    """Objectives weigh mini-batches by the plate ``data``, so all that follows the batch belongs inside it."""
    batch = len(few)
    if suspects := _plates(guide_trace, batch) | _plates(model_trace, batch):  # or of that size by chance
        longer = _traces(pair, torch.cat([few, few[:1]]), argument)
        names = suspects & (_plates(longer[0], batch + 1) | _plates(longer[1], batch + 1))
        if names:
            raise ValueError(
                f"pair: expected the plate over the batch to be named 'data', by which objectives weigh mini-batches; "
                f"found {', '.join(map(repr, sorted(names)))}. {_PLATE}"
            )
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        if site["is_observed"] and site["value"] is few and not _is_per_datum(site):
            raise ValueError(
                f"model: expected site '{name}', which observes the batch, inside the plate 'data'. {_PLATE}"
            )
        in_guide = guide_trace.nodes.get(name)
        if not site["is_observed"] and in_guide is not None and _is_per_datum(in_guide) != _is_per_datum(site):
            inside, outside = ("model", "guide") if _is_per_datum(site) else ("guide", "model")
            raise ValueError(
                f"{outside}: expected site '{name}' inside the plate 'data', as in the {inside}; found it outside. "
                f"{_PLATE}"
            )


_PLATE = "Write `with pyro.plate('data', len(x)):` around what is per datum, in the model and in the guide."


def _plates(trace: Any, batch: int) -> set[str]:
    """The other plates of that size."""
    frames = [frame for site in trace.nodes.values() if site["type"] == "sample" for frame in site["cond_indep_stack"]]
    return {frame.name for frame in frames if frame.vectorized and frame.size == batch and frame.name != "data"}


def _is_per_datum(site: Any) -> bool:
    return any(frame.name == "data" for frame in site["cond_indep_stack"])


def observed_support(pair: Pair, few: Tensor) -> constraints.Constraint | None:
    """The support of one feature at the site that observes ``few``; None where no site does."""
    with torch.random.fork_rng([]), torch.no_grad(), pyro.validation_enabled(False), _noting("model", few, "the data"):
        trace = poutine.trace(pair.model).get_trace(few)
    site: Any
    for site in trace.nodes.values():
        if site["type"] == "sample" and site["is_observed"] and site["value"] is few:
            return _of_one_feature(site["fn"].support)
    return None


def _of_one_feature(support: constraints.Constraint) -> constraints.Constraint:
    return getattr(support, "base_constraint", support)


def _unconstrained(value: Any) -> Any:
    return value.unconstrained() if hasattr(value, "unconstrained") else value


def _check_support(x: Tensor, few: Tensor, argument: str, name: str, support: constraints.Constraint) -> None:
    try:
        inside = support.check(x)
    except RuntimeError:  # its limits lie on another device, or differ from datum to datum: those at hand stand for all
        x, inside = few, support.check(few)
    if bool(inside.all()):
        return
    message = (
        f"{argument}: expected values in the support of site '{name}', {_of_one_feature(support)}; got values from "
        f"{x.min():g} to {x.max():g}, outside it in {int((~inside).sum())} of {inside.numel()} data."
    )
    if _of_one_feature(support) is constraints.boolean and bool(((x >= 0) & (x <= 1)).all()):
        message += (
            " These are grey pixels: pass binarize=True (on the command line, --binarize dynamic) to draw each as 0 or "
            "1 at every use, or choose a likelihood over [0, 1]."
        )
    raise ValueError(message)


def first_nonfinite_site(svi: SVI, batch: Tensor) -> str | None:
    """The first site, guide before model, whose value or log density is NaN or infinite; None where all are finite."""
    site: Any
    with torch.no_grad():
        guide_trace = poutine.trace(svi.guide).get_trace(batch)
        model_trace = poutine.trace(poutine.replay(svi.model, trace=guide_trace)).get_trace(batch)
        for trace in (guide_trace, model_trace):
            for name, site in trace.nodes.items():
                if site["type"] != "sample":
                    continue
                log_prob = site["fn"].log_prob(site["value"])
                if not (torch.isfinite(site["value"]).all() and torch.isfinite(log_prob).all()):
                    return name
    return None
