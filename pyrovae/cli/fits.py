"""The work of ``pyrovae fit`` and ``pyrovae evaluate``: train, score, and write both into the run folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from pyrovae.checks import check_positive, pick_device
from pyrovae.cli.names import build_loss, short_name
from pyrovae.cli.runs import Config, RunFolder
from pyrovae.data import DataSet
from pyrovae.evaluation import evaluate
from pyrovae.pair import Pair
from pyrovae.training import TrainingDiverged, fit

__all__ = ["score_run", "train_run"]


def train_run(folder: RunFolder, config: Config, pair: Pair, data: DataSet, device: str, *, resume: bool) -> None:
    """Train a pair, or go on with its training; then score it, draw its pictures and print what was done.

    A run that is stopped or diverges leaves its last good weights and its history in the folder.
    """
    check_positive("num_samples", config.num_samples, integer=True)
    before = folder.progress() if resume else None
    epochs_before, also_before = len(folder.read_history()), folder.read_scores().get("also")
    has_begun = False
    is_drawn = config.binarize == "dynamic"
    place, parameters = pick_device(device), sum(p.numel() for p in pair.parameters())

    def start(threads: int) -> None:
        """Touch the folder. Every check has passed."""
        nonlocal has_begun
        has_begun = True
        config.fit["threads"] = threads
        if resume:  # if this is killed, the checkpoint's weights and history are the newest
            folder.weights.unlink(missing_ok=True)
            folder.history.unlink(missing_ok=True)
        else:
            folder.create(config)
        print(f"{short_name(config.pair)}: {parameters:,} parameters, on {place}")
        print(f"{data!r}")
        print(f"  {data.convention}{' Pixels are drawn as 0 or 1 anew at every use.' if is_drawn else ''}")
        print(f"Going on in {folder.path}, {before}" if resume else f"Writing to {folder.path}", flush=True)

    def save_stopped() -> None:
        pair.save(folder.weights)
        if (reached := folder.progress()) is not None:
            folder.write_history(reached.history)

    try:
        result = fit(
            pair,
            data.train,
            loss=build_loss(pair, config.loss, config.loss_options),
            **config.fit,
            binarize=is_drawn,
            device=device,
            seed=config.seed,
            checkpoint=folder.checkpoint,
            resume=resume,
            on_start=start,
        )
    except KeyboardInterrupt:
        if has_begun and (reached := folder.progress()) is not None:  # what the folder holds belongs to this run
            save_stopped()
            print(f"\nStopped {reached}. Go on with: pyrovae fit --resume {folder.path}", file=sys.stderr)
        raise
    except TrainingDiverged:
        save_stopped()
        print(f"The last good weights are in {folder.weights}", file=sys.stderr)
        raise
    print(result)
    pair.save(folder.weights)
    folder.write_history(result.history)
    was_finished = resume and len(result.history) == epochs_before
    if was_finished:
        print("The run was finished already: nothing was trained.")
    earlier = also_before if was_finished else None
    scores = score_run(
        folder, config, pair, data, device, num_samples=config.num_samples, seconds=result.seconds, earlier=earlier
    )
    print(f"\n{scores}\n", flush=True)  # before the pictures, as one of them may fail
    _, rows, labels = data.scored
    if is_drawn:  # the guide is shown pixels like those that it was trained and scored on
        rows = torch.bernoulli(rows, generator=torch.Generator().manual_seed(config.seed))
    pictures = folder.draw_pictures(pair, data, rows, labels, result.history)
    files = "config.json, weights.safetensors, checkpoint.safetensors, history.csv, scores.json and pictures"
    print(f"In {folder.path}: {files}")
    print("\n".join(f"  {path}" for path in pictures))


def score_run(
    folder: RunFolder,
    config: Config,
    pair: Pair,
    data: DataSet,
    device: str,
    *,
    num_samples: int,
    seconds: float | None,
    also: Iterable[str] = (),
    earlier: dict[str, Any] | None = None,
) -> str:
    """Score a pair on the test rows, or on the training rows where there are no others, and write scores.json.

    Args:
        seconds: time of training, for scores.json.
        also: further measurements, see :func:`pyrovae.evaluate`.
        earlier: measurements of the same weights that scores.json has kept, and keeps.

    Returns:
        The scores as a table.
    """
    start = time.perf_counter()
    which, rows, labels = data.scored
    scores = evaluate(
        pair,
        rows,
        num_samples=num_samples,
        also=list(also),
        labels=labels,
        binarize=config.binarize == "dynamic",
        device=device,
        seed=config.seed,
    )
    if (notice := folder.unfinished()) is not None:
        scores.notes.append(f"{notice}. Go on with: pyrovae fit --resume {folder.path}")
    record = {"data": config.data, "rows": which, **scores.to_dict(), "evaluation_seconds": time.perf_counter() - start}
    record["also"] = (earlier or {}) | record["also"]
    if seconds is not None:
        record["training_seconds"] = seconds
    folder.write_scores(record)
    held_out = ", held-out ones among them" if which == "train" and config.fit.get("validation") else ""
    return f"Scores on {Path(config.data).name} ({which} rows{held_out})\n{scores}"
