"""Training that diverged: which step and which site gave the first NaN or infinity."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from pyro import poutine
from torch import Tensor

from pyrovae.pair import Pair

if TYPE_CHECKING:
    from pyrovae.infer import SVI
    from pyrovae.training.loop import _Run

__all__ = ["TrainingDiverged", "bad_weights", "raise_divergence"]


class TrainingDiverged(FloatingPointError):
    """The loss or a weight turned NaN or infinite. The pair holds the last good weights."""


def bad_weights(pair: Pair) -> list[str]:
    """Names of the parameters that hold NaN or infinity."""
    return [name for name, p in pair.named_parameters() if not bool(torch.isfinite(p).all())]


def raise_divergence(run: _Run, good: dict[str, Any]) -> NoReturn:
    """Go back to the state ``good``, repeat the steps one by one, stop before the bad one, and name it.

    Raises:
        TrainingDiverged: always.
    """
    run.restore(good)
    before = run.copy_weights()
    for argument in run.data.arguments():
        weights, random = run.copy_weights(), run.random_state()
        bound = run.take_step(argument)
        if math.isfinite(bound) and run.weights_are_good(argument):
            before = weights
            continue
        what, where, step = "the loss", "", run.step
        bad = bad_weights(run.pair)
        if math.isfinite(bound) and bad:
            what, where = "a gradient", f" in parameter '{bad[0]}'"
        if math.isfinite(bound) and not bad:  # the weights after this step give a bad loss: look with them
            step += 1
        else:
            run.pair.load_state_dict(weights)
            run.set_random_state(random)
        if site := _first_nonfinite_site(run.svi, run.data.batch(argument)):
            where = f" at site '{site}'{where}"
        run.pair.load_state_dict(weights if math.isfinite(bound) else before)
        raise TrainingDiverged(
            f"{what} turned NaN or infinite at step {step} (epoch {run.epoch + 1}){where}. The pair keeps the "
            f"last weights that gave a finite loss. Try a lower lr (now {run.lr:g}), or look at that site's "
            "distribution for a scale near 0 or a log of 0."
        )
    raise TrainingDiverged(
        f"the loss turned NaN or infinite in epoch {run.epoch + 1}; it did not when that was repeated."
    )


def _first_nonfinite_site(svi: SVI, batch: Tensor) -> str | None:
    """First site, guide before model, whose value or log density is NaN or infinite; None where all are finite."""
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
