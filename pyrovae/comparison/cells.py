"""Cells of a comparison: in each, a pair is made from a seed, trained by one method, and scored."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrovae.checks import pick_device
from pyrovae.comparison.methods import CLOSED_FORM, EM, Method, samples_latents
from pyrovae.comparison.result import Cell
from pyrovae.evaluation import evaluate
from pyrovae.evaluation.gaps import inference_gaps
from pyrovae.evaluation.measurement import NotApplicable
from pyrovae.evaluation.scores import importance_scores
from pyrovae.infer import fit_em
from pyrovae.pair import Pair
from pyrovae.random_state import seeded
from pyrovae.training import TrainingDiverged, fit
from pyrovae.training.pair_checks import check_pair

__all__ = ["ROWS_OF_GAPS", "Job", "Maker", "Settings", "make_start", "run_cell"]

Maker = Callable[..., Pair]
EM_ITERATIONS = 10_000
CURVE_POINTS = 20
ROWS_OF_CURVE, SAMPLES_OF_CURVE = 500, 200
ROWS_OF_GAPS = 500


@dataclass(frozen=True)
class Settings:
    """Data and options that all cells share; the options are those of :func:`compare`."""

    x: Tensor
    """Training rows, (N, D)."""
    rows: Tensor
    """Scored rows."""
    epochs: int
    batch_size: int
    lr: float | None
    num_samples: int
    gaps: bool
    binarize: bool
    device: str | torch.device

    @property
    def few(self) -> Tensor:
        """Two training rows, for a first look at a pair."""
        return self.x[:2].round() if self.binarize else self.x[:2]

    def scoring_options(self, seed: int) -> dict[str, Any]:
        """Return the arguments that every function of scores takes."""
        return {
            "num_samples": self.num_samples,
            "binarize": self.binarize,
            "device": self.device,
            "seed": seed,
            "progress": False,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, which must be the same when the comparison is resumed."""
        plain = {name: value for name, value in vars(self).items() if name not in ("x", "rows", "device")}
        return plain | {"data": [[*rows.shape, float(rows.double().sum())] for rows in (self.x, self.rows)]}


@dataclass(frozen=True)
class Job:
    """A cell that is to be computed."""

    pair: str
    make: Maker
    start_options: dict[str, Any]
    """Options of the variant whose parameters every method starts from."""
    method: Method
    seed: int


def make_start(make: Maker, options: dict[str, Any], settings: Settings, seed: int) -> Pair:
    """Make a pair, check it against the data and initialise it, all by ``seed``."""
    with seeded(seed, pick_device(settings.device)):
        pair = make(**options)
        if not isinstance(pair, Pair):
            raise TypeError(f"pairs: expected functions that make a pyrovae.Pair; one made a {type(pair).__name__}.")
        check_pair(pair, settings.x, binarize=settings.binarize)
        if pair.initialize is not None:
            torch.manual_seed(seed)  # the same numbers for all variants, whose weights have drawn more or fewer
            pair.initialize(_prepare_rows(settings, pair))
    return pair


def run_cell(job: Job, settings: Settings, checkpoint: Path | None = None) -> tuple[Cell, Pair]:
    """Compute a cell: train the pair and score it. Returns the cell and the trained pair.

    With ``checkpoint``, a training run that was stopped goes on from there. A method that fails leaves a note.
    """
    pair = make_start(job.make, job.method.pair_options, settings, job.seed)
    _copy_shared(make_start(job.make, job.start_options, settings, job.seed), pair)
    cell = Cell(job.pair, job.method.name, job.method.spec, job.seed)
    train = {CLOSED_FORM: _train_closed_form, EM: _train_em}.get(job.method.spec)
    try:
        if train is not None:
            cell = replace(cell, **train(pair, settings, job.seed))
        else:
            cell = replace(cell, **_train_svi(pair, job, settings, checkpoint))
    except (TrainingDiverged, RuntimeError) as error:
        return replace(cell, note=" ".join(str(error).split())), pair
    found = _score(pair, job, settings)
    notes = [note for note in (cell.note, found.pop("note", None)) if note]
    return replace(cell, **found, note="; ".join(notes) or None), pair


def _copy_shared(source: Pair, target: Pair) -> None:
    """Give ``target`` every parameter and buffer that it has in common with ``source``."""
    state = target.state_dict()
    state.update({k: v for k, v in source.state_dict().items() if k in state and state[k].shape == v.shape})
    target.load_state_dict(state)


def _prepare_rows(settings: Settings, pair: Pair) -> Tensor:
    """Return the training rows in the pair's precision, with pixels drawn once where asked."""
    x = settings.x.to(next(pair.parameters(), settings.x).dtype)
    return torch.bernoulli(x) if settings.binarize else x


# Training: each function returns a cell's seconds, steps, passes, trace and note ----------------------------------


def _train_svi(pair: Pair, job: Job, settings: Settings, checkpoint: Path | None) -> dict[str, Any]:
    # Epochs that lie evenly on a logarithmic axis.
    watched = {round(settings.epochs ** (i / (CURVE_POINTS - 1))) for i in range(CURVE_POINTS)}

    def monitor(epoch: int) -> dict[str, float]:
        return {"log_evidence": _find_evidence(pair, settings, job.seed)} if epoch in watched else {}

    result = fit(
        pair,
        settings.x,
        loss=job.method.make_loss(pair),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        lr=settings.lr,
        binarize=settings.binarize,
        initialize=False,
        device=settings.device,
        seed=job.seed,
        progress=False,
        checkpoint=checkpoint,
        resume=checkpoint is not None and checkpoint.is_file(),
        monitor=monitor,
    )
    rows = [row for row in result.history if "log_evidence" in row]
    trace = {
        "passes": [row["epoch"] for row in rows],
        "seconds": [row["seconds"] for row in rows],
        "log_evidence": [row["log_evidence"] for row in rows],
    }
    return {"seconds": result.seconds, "steps": result.steps, "passes": len(result.history), "trace": trace}


def _find_evidence(pair: Pair, settings: Settings, seed: int) -> float:
    """Return a point of the training curve, see ``Cell.trace``."""
    parameter = next(pair.parameters(), settings.x)
    if pair.log_prob is not None:
        with torch.no_grad():
            return float(pair.log_prob(settings.x.to(parameter.device, parameter.dtype)).double().mean())
    few = {"num_samples": min(settings.num_samples, SAMPLES_OF_CURVE), "device": parameter.device}
    options = settings.scoring_options(seed) | few
    return importance_scores(pair, settings.rows[:ROWS_OF_CURVE], **options).log_evidence


def _train_em(pair: Pair, settings: Settings, seed: int) -> dict[str, Any]:
    with seeded(seed):
        x = _prepare_rows(settings, pair)
    result = fit_em(pair, x, initialize=False, device=settings.device, max_iter=EM_ITERATIONS)
    passes = range(1, len(result.trace) + 1)  # each finds the likelihood of the parameters that it starts with
    trace = {
        "passes": [float(i) for i in passes],
        "seconds": [result.seconds * i / len(passes) for i in passes],
        "log_evidence": [value / len(x) for value in result.trace],
    }
    note = None if result.converged else f"NOT converged after {result.iterations} iterations"
    return {
        "seconds": result.seconds,
        "steps": result.iterations,
        "passes": len(passes),
        "trace": trace,
        "note": note,
    }


def _train_closed_form(pair: Any, settings: Settings, seed: int) -> dict[str, Any]:
    began = time.perf_counter()
    pair.fit_closed_form(settings.x)
    seconds = time.perf_counter() - began
    trace: dict[str, list[float]] = {}
    if pair.log_prob is not None:
        trace = {"passes": [1.0], "seconds": [seconds], "log_evidence": [_find_evidence(pair, settings, seed)]}
    return {"seconds": seconds, "steps": 1, "passes": 1, "trace": trace}


# Scoring --------------------------------------------------------------------------------------------------------


def _score(pair: Pair, job: Job, settings: Settings) -> dict[str, Any]:
    """Return a cell's log evidence and ELBO, where the method gives them, and the parts of its gap."""
    # EM and the closed form train no guide: without an exact posterior in its place there is no ELBO.
    sums_out = not samples_latents(pair, settings.few)
    has_guide = job.method.uses_svi or hasattr(pair, "match_guide") or sums_out
    if pair.log_prob is None and not has_guide:
        return {"note": "it trains no guide, and without a log_prob of the pair nothing gives its evidence"}
    scored, rows = pair, settings.rows
    if pair.log_prob is not None:  # totals to four decimals need more than float32
        scored, rows = copy.deepcopy(pair).double(), rows.double()
    scores = evaluate(scored, rows, **settings.scoring_options(job.seed))
    exact = scores.log_likelihood is not None or scores.num_samples == 0
    evidence = scores.log_evidence if scores.log_likelihood is None else scores.log_likelihood
    found = {"log_evidence": evidence, "elbo": evidence if sums_out else scores.elbo if has_guide else None}
    bad = [name for name, value in found.items() if value is not None and not math.isfinite(value)]
    if bad:
        return {"note": f"{' and '.join(bad).replace('_', ' ')} not finite: some rows are impossible under the model"}
    if settings.gaps and job.method.uses_svi:
        found |= _split_gap(scored, rows, settings, job.seed)
    notes = list(scores.notes)
    if not exact and scores.guide is not None and scores.guide.num_bad > len(scores.guide.k) / 100:
        guide = scores.guide
        notes.append(
            f"k̂ above {guide.threshold:.2g} for {guide.num_bad} of {len(guide.k)} data, Monte Carlo error "
            f"{scores.log_evidence_stderr:.4f} and more: its evidence may be too low; raise num_samples"
        )
    return {**found, "exact": exact, "note": "; ".join(notes)}


def _split_gap(pair: Pair, rows: Tensor, settings: Settings, seed: int) -> dict[str, Any]:
    """Return the approximation and amortization gaps; nothing where they do not apply."""
    try:
        gaps = inference_gaps(pair, rows[:ROWS_OF_GAPS], **settings.scoring_options(seed))
    except NotApplicable:
        return {}
    return {"approximation_gap": gaps.approximation_gap, "amortization_gap": gaps.amortization_gap}
