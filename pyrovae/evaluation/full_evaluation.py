"""Evaluation by one call: the scores of a pair, and every other quantity on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyrovae.checks import check_choice, check_data, check_positive
from pyrovae.evaluation.ais import annealed_evidence, bidirectional_evidence
from pyrovae.evaluation.calibration import simulation_based_calibration
from pyrovae.evaluation.decomposition import kl_decomposition
from pyrovae.evaluation.gaps import inference_gaps
from pyrovae.evaluation.measurement import NotApplicable, prepared
from pyrovae.evaluation.mixtures import check_labels, mixture_scores
from pyrovae.evaluation.posterior_collapse import collapse
from pyrovae.evaluation.predictive_check import posterior_predictive_check
from pyrovae.evaluation.scores import Scores, importance_scores
from pyrovae.machine import limit_threads
from pyrovae.pair import Pair

__all__ = ["ALSO", "evaluate"]

ALSO: dict[str, tuple[Callable[..., Any], int | None]] = {
    "collapse": (collapse, None),
    "kl_decomposition": (kl_decomposition, None),
    "inference_gaps": (inference_gaps, 500),
    "annealed_evidence": (annealed_evidence, 100),
    "bidirectional_evidence": (bidirectional_evidence, None),
    "simulation_based_calibration": (simulation_based_calibration, None),
    "posterior_predictive_check": (posterior_predictive_check, None),
    "mixture_scores": (mixture_scores, None),
}
"""Quantities that :func:`evaluate` measures on demand: functions, and the most data that each takes."""
OF_THE_MODEL = ("bidirectional_evidence", "simulation_based_calibration")  # these draw their own data
OF_TWO_DATA = ("collapse", "kl_decomposition")  # these ask which datum z encodes, so they need two


def evaluate(
    pair: Pair,
    x: Tensor,
    *,
    num_samples: int = 5000,
    also: Sequence[str] | str = (),
    labels: Any = None,  # (N,)
    binarize: bool = False,
    device: str | torch.device = "auto",
    seed: int = 0,
    threads: int | None = None,
    progress: bool | None = None,
) -> Scores:
    """Score a pair on data by importance sampling from its guide, and measure other quantities on demand.

    Data and samples are taken in chunks, so memory does not grow with N · K.

    Args:
        pair: the model and guide. It is left as it was.
        x: data, shape (N, D).
        num_samples: importance samples K a datum.
        also: names of ``ALSO``, or ``"all"``. Quantities that do not apply to the pair are left out, and named.
            ``inference_gaps`` takes at most 500 of the data and ``annealed_evidence`` 100, drawn by ``seed``. Call
            the functions themselves for other settings.
        labels: classes of the data, for ``mixture_scores``.
        binarize: draw pixels in [0, 1] as 0 or 1 first, once.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda``.
        seed: seed of everything that is drawn. The caller's random state is left as it was.
        threads: number of torch's threads. None: as many as the machine allows, or the number that you have set.
        progress: show a bar; None shows it on a terminal.

    Raises:
        TypeError, ValueError: bad data or options, before work starts.
    """
    x = check_data(x, data_dim=getattr(pair, "data_dim", None))
    if not isinstance(also, str | list | tuple):
        raise TypeError(f"also: expected names of quantities, or 'all'; got {also!r}.")
    names = [also] if isinstance(also, str) else list(dict.fromkeys(also))
    for name in names:
        check_choice("also", name, ["all", *ALSO])
    if "all" in names:
        names = list(ALSO)
    if labels is not None:
        check_labels(labels, len(x))
    check_positive("threads", threads, integer=True, optional=True)
    with limit_threads(threads):
        scores = importance_scores(
            pair, x, num_samples=num_samples, binarize=binarize, device=device, seed=seed, progress=progress
        )
        if binarize and names:  # all that follows is measured on the same data
            with prepared(pair, x, binarize=True, device=device, seed=seed) as rows:
                x = rows.to(x.device)
        for name in names:
            if name in OF_TWO_DATA and len(x) < 2:
                scores.left_out[name] = f"{name} needs two data to tell apart; {type(pair).__name__} was given one."
                continue
            function, most = ALSO[name]
            settings: dict[str, Any] = {"device": device, "seed": seed}
            settings |= {"labels": labels} if name == "mixture_scores" else {"progress": progress}
            try:
                if name in OF_THE_MODEL:
                    scores.also[name] = function(pair, data_dim=x.shape[1], **settings)
                    continue
                chosen = torch.arange(len(x))
                if most is not None and len(x) > most:
                    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:most]
                found = function(pair, x[chosen], **settings)
                if name == "annealed_evidence" and scores.log_evidence_per_datum is not None:
                    found = replace(found, by_importance=float(scores.log_evidence_per_datum[chosen].mean()))
                scores.also[name] = found
            except NotApplicable as reason:
                scores.left_out[name] = str(reason)
        return scores
