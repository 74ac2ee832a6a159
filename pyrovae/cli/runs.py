"""Run folders: everything about one fit, to rebuild, score and resume it; and training and scoring in one.

Nothing in a run folder is unpickled or executed.
"""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pyrovae.checkpoint import load_state, write_text
from pyrovae.checks import check_positive, pick_device
from pyrovae.cli import names
from pyrovae.data import DataSet
from pyrovae.evaluation import evaluate
from pyrovae.pair import Pair
from pyrovae.training import TrainingDiverged, fit
from pyrovae.training.loop import Progress, read_progress

__all__ = ["Config", "RunFolder", "check_unchanged", "load_run", "score_run", "train_run"]

FORMAT = 1
RUN_FILES = ("weights.safetensors", "checkpoint.safetensors", "history.csv", "scores.json", "report.html")


@dataclass
class Config:
    """Pair, data and options of a run, as plain JSON."""

    pair: str
    options: dict[str, Any]
    data: str
    binarize: str
    """``dynamic``, ``static`` or ``none``."""
    loss: str | None
    loss_options: dict[str, Any]
    fit: dict[str, Any]
    """Arguments of :func:`pyrovae.fit`."""
    num_samples: int
    seed: int
    pair_sha256: str | None = None
    """SHA-256 of the user's file that holds the pair: it must not have changed when the run is read."""
    data_sha256: str | None = None
    """SHA-256 of the user's file that holds the data."""
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def __post_init__(self) -> None:
        kinds = {"pair": str, "data": str, "binarize": str, "num_samples": int, "seed": int}
        for name, kind in (kinds | {"options": dict, "loss_options": dict, "fit": dict}).items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name}: expected {kind.__name__}; got {getattr(self, name)!r}")

    @property
    def draws_pixels(self) -> bool:
        """True where pixels are drawn as 0 or 1 anew at every use."""
        return self.binarize == "dynamic"

    def shared_options(self, device: str) -> dict[str, Any]:
        """Return the arguments that training and every measurement share."""
        return {"binarize": self.draws_pixels, "device": device, "seed": self.seed}


LoadedRun = tuple[Config, Pair, DataSet]


def load_run(path: str | Path) -> tuple[Config, Pair, DataSet]:
    """Open a run folder that ``pyrovae fit`` wrote: ``config, pair, data = pyrovae.load_run("runs/vae-digits")``.

    ``pair`` has the weights of the run, ``data`` are those it was trained on, and ``config`` says how. A user's files
    are read only if they have not changed since the run.

    Raises:
        FileNotFoundError: something is missing.
        ValueError: something is damaged, foreign or has changed.
    """
    return RunFolder(path).load()


class RunFolder:
    """A folder with ``config.json``, ``weights.safetensors``, ``checkpoint.safetensors``, ``history.csv``,
    ``scores.json`` and ``pictures/``. From Python, :func:`load_run` opens one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.weights = self.path / "weights.safetensors"
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.history = self.path / "history.csv"
        self.scores = self.path / "scores.json"
        self.pictures = self.path / "pictures"

    def create(self, config: Config) -> None:
        """Make the folder. Of an earlier run there, delete its own files and nothing else."""
        text = json.dumps(asdict(config), indent=2) + "\n"
        self.path.mkdir(parents=True, exist_ok=True)
        for file in (*map(self.path.joinpath, RUN_FILES), *self.pictures.glob("*.png")):
            file.unlink(missing_ok=True)
        write_text(self.config, text)

    def read_config(self) -> Config:
        """Read how the run was made, or raise where the folder is missing, damaged or foreign."""
        if not self.config.is_file():
            raise FileNotFoundError(
                f"path: expected a folder that `pyrovae fit` wrote; {self.path} has no config.json."
            )
        try:
            raw = json.loads(self.config.read_text(encoding="utf-8"))
            if raw["format"] != FORMAT:
                raise ValueError(f"format {raw['format']}, and this version reads {FORMAT}")
            return Config(**raw)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"path: {self.config} is damaged or no pyrovae configuration ({error}).") from error

    def load(self, *, with_weights: bool = True) -> LoadedRun:
        """Rebuild the pair and its data, see :func:`load_run`. Without its weights, the pair is as before training."""
        config = self.read_config()
        check_unchanged(config.pair, config.pair_sha256, self.path)
        check_unchanged(config.data, config.data_sha256, self.path)
        data = names.load_data(config.data, config.binarize)
        pair_class = names.find_pair(config.pair)
        try:
            pair = names.build_pair(pair_class, config.options, data.data_dim, config.seed)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"path: options in {self.config} make no {pair_class.__name__} ({error}). Put the run's own "
                "config.json back, or fit again."
            ) from error
        if with_weights and self.weights.is_file():
            pair.load(self.weights)
        elif with_weights and not self.checkpoint.is_file():
            raise FileNotFoundError(f"path: {self.path} has no weights: its run ended before the first checkpoint.")
        elif with_weights:
            try:  # the last good weights of a run that was killed
                pair.load_state_dict(load_state(self.checkpoint)["pair"])
            except (KeyError, RuntimeError) as error:
                raise ValueError(f"path: {self.checkpoint} does not hold this pair's weights ({error}).") from error
        return config, pair, data

    def progress(self) -> Progress | None:
        """Return how far the training has come, by its checkpoint; None where that is missing or damaged."""
        return read_progress(self.checkpoint)

    def unfinished(self) -> str | None:
        """Return a notice where the training was stopped before its end."""
        progress = self.progress()
        if progress is None or progress.finished:
            return None
        return f"the run was stopped {progress}: its weights are not fully trained"

    def write_history(self, history: list[dict[str, float]]) -> None:
        """Write a row an epoch; nothing where no epoch has ended."""
        if not history:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in history for name in row)))
        writer.writeheader()
        writer.writerows(history)
        write_text(self.history, text.getvalue())

    def read_history(self) -> list[dict[str, float]]:
        """Read the rows of the history; none where it is missing."""
        if not self.history.is_file():
            return []
        with self.history.open(newline="", encoding="utf-8") as lines:
            return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(lines)]

    def read_scores(self) -> dict[str, Any]:
        """Read scores.json; empty where it is missing or damaged."""
        try:
            return dict(json.loads(self.scores.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}


def check_unchanged(name: str, digest: str | None, folder: Path) -> None:
    """Raise unless the file of a pair or data is unchanged since the run or comparison in ``folder`` was made.

    A pair that lies in the folder itself is refused, as nothing in such a folder is executed.
    """
    file = names.file_of(name)
    if file is None:
        return
    if file.suffix == ".py" and file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"path: {file} lies in the run folder itself, and nothing in a run folder is executed.")
    if not file.is_file():
        raise FileNotFoundError(f"path: this run was made from {file}, which is gone. Put it back, or fit again.")
    if names.file_digest(name) != digest:
        raise ValueError(f"path: {file} has changed since this run was made. Put the old file back, or fit again.")


def train_run(folder: RunFolder, run: LoadedRun, device: str, *, resume: bool) -> None:
    """Train a pair, or go on with its training; then score it, draw its pictures and print what was done.

    A run that is stopped or diverges leaves its last good weights and its history in the folder.
    """
    config, pair, data = run
    check_positive("num_samples", config.num_samples, integer=True)
    before = folder.progress() if resume else None
    has_begun = False
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
        print(f"{names.short_name(config.pair)}: {parameters:,} parameters, on {place}")
        drawn = " Pixels are drawn as 0 or 1 anew at every use." if config.draws_pixels else ""
        print(f"{data!r}\n  {data.convention}{drawn}")
        print(f"Going on in {folder.path}, {before}" if resume else f"Writing to {folder.path}", flush=True)

    try:
        result = fit(
            pair,
            data.train,
            loss=names.build_loss(pair, config.loss, config.loss_options),
            **config.fit,
            **config.shared_options(device),
            checkpoint=folder.checkpoint,
            resume=resume,
            on_start=start,
        )
    except (KeyboardInterrupt, TrainingDiverged) as stop:
        if has_begun and (reached := folder.progress()) is not None:  # what the folder holds belongs to this run
            pair.save(folder.weights)
            folder.write_history(reached.history)
            notice = f"\nStopped {reached}. Go on with: pyrovae fit --resume {folder.path}"
            if isinstance(stop, TrainingDiverged):
                notice = f"The last good weights are in {folder.weights}"
            print(notice, file=sys.stderr)
        raise
    print(result)
    pair.save(folder.weights)
    folder.write_history(result.history)
    earlier: dict[str, Any] = {"training_seconds": result.seconds}
    if before is not None and before.finished:
        print("The run was finished already: nothing was trained.")
        earlier["also"] = folder.read_scores().get("also", {})
    scores = score_run(folder, run, device, earlier)
    print(f"\n{scores}\n", flush=True)  # before the pictures, as one of them may fail
    from pyrovae.plots import save_figures  # matplotlib is loaded when it is first needed
    from pyrovae.plots.run_pictures import pictures_of_run

    _, rows, labels = data.scored
    if config.draws_pixels:  # the guide is shown pixels like those that it was trained and scored on
        rows = torch.bernoulli(rows, generator=torch.Generator().manual_seed(config.seed))
    pictures = pictures_of_run(pair, data, rows, labels, result.history)
    drawn = save_figures({name: picture.draw for name, picture in pictures.items()}, folder.pictures)
    files = "config.json, weights.safetensors, checkpoint.safetensors, history.csv, scores.json and pictures"
    print(f"In {folder.path}: {files}")
    print("\n".join(f"  {path}" for path in drawn))


def score_run(
    folder: RunFolder,
    run: LoadedRun,
    device: str,
    earlier: dict,
    num_samples: int | None = None,
    also: Sequence = (),
) -> str:
    """Score a pair on the test rows, or on the training rows where there are no others; write scores.json.

    ``training_seconds`` and the further measurements in ``earlier``, scores of the same weights, are kept. Without
    ``num_samples``, each datum has as many as the run took. Returns the scores as a table.
    """
    start = time.perf_counter()
    config, pair, data = run
    which, rows, labels = data.scored
    num_samples = num_samples or config.num_samples
    scores = evaluate(pair, rows, num_samples=num_samples, also=also, labels=labels, **config.shared_options(device))
    if (notice := folder.unfinished()) is not None:
        scores.notes.append(f"{notice}. Go on with: pyrovae fit --resume {folder.path}")
    record = {"data": config.data, "rows": which, **scores.to_dict(), "evaluation_seconds": time.perf_counter() - start}
    record["also"] = (earlier.get("also") or {}) | record["also"]
    if earlier.get("training_seconds") is not None:
        record["training_seconds"] = earlier["training_seconds"]
    write_text(folder.scores, json.dumps(record, indent=2) + "\n")
    held_out = ", held-out ones among them" if which == "train" and config.fit.get("validation") else ""
    return f"Scores on {Path(config.data).name} ({which} rows{held_out})\n{scores}"
