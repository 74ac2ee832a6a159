"""Run folders: everything about one fit, to rebuild, score and resume it. Nothing in one is unpickled or executed."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pyrovae.checkpoint import load_state, write_text
from pyrovae.checks import check_free_folder
from pyrovae.cli.names import build_pair, constructor_options, file_digest, file_of, find_pair, load_data
from pyrovae.data import DataSet
from pyrovae.pair import Pair
from pyrovae.training.progress import Progress, read_progress

__all__ = ["Config", "RunFolder", "check_unchanged", "load_run"]

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
        for kind, names in (
            (str, ("pair", "data", "binarize")),
            (int, ("num_samples", "seed")),
            (dict, ("options", "loss_options", "fit")),
        ):
            for name in names:
                if not isinstance(getattr(self, name), kind):
                    raise TypeError(f"{name}: expected {kind.__name__}; got {getattr(self, name)!r}")


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

    def check_free(self, overwrite: bool) -> None:
        """Raise FileExistsError where something is there; with ``overwrite``, unless it is a run folder."""
        check_free_folder("path", self.path, "run", overwrite=overwrite, read=self.read_config)

    def create(self, config: Config) -> None:
        """Make the folder. Of an earlier run there, delete its own files and nothing else."""
        text = json.dumps(asdict(config), indent=2) + "\n"
        self.path.mkdir(parents=True, exist_ok=True)
        for file in (*map(self.path.joinpath, RUN_FILES), *self.pictures.glob("*.png")):
            file.unlink(missing_ok=True)
        write_text(self.config, text)

    def read_config(self) -> Config:
        """Read how the run was made.

        Raises:
            FileNotFoundError, ValueError: the folder is missing, damaged or foreign.
        """
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

    def load(self, *, with_weights: bool = True) -> tuple[Config, Pair, DataSet]:
        """Rebuild the pair and its data, see :func:`load_run`. Without its weights, the pair is as before training."""
        config = self.read_config()
        check_unchanged(config.pair, config.pair_sha256, self.path)
        check_unchanged(config.data, config.data_sha256, self.path)
        data = load_data(config.data, config.binarize)
        pair = self._build_pair(find_pair(config.pair), config, data.data_dim)
        if with_weights and self.weights.is_file():
            pair.load(self.weights)
        elif with_weights:
            self._load_from_checkpoint(pair)
        return config, pair, data

    def _build_pair(self, pair_class: type[Pair], config: Config, data_dim: int) -> Pair:
        known = constructor_options(pair_class)
        for name in config.options:
            if name not in known:
                raise ValueError(
                    f"path: options in {self.config}: {pair_class.__name__} has no option {name!r}; it has "
                    f"{', '.join(known) or 'none'}. Put the run's own config.json back, or fit again."
                )
        try:
            return build_pair(pair_class, config.options, data_dim, config.seed)
        except (TypeError, ValueError) as error:
            raise ValueError(f"path: options in {self.config} make no {pair_class.__name__} ({error}).") from error

    def _load_from_checkpoint(self, pair: Pair) -> None:
        """Load the last good weights of a run that was killed."""
        if not self.checkpoint.is_file():
            raise FileNotFoundError(f"path: {self.path} has no weights: its run ended before the first checkpoint.")
        try:
            pair.load_state_dict(load_state(self.checkpoint)["pair"])
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"path: {self.checkpoint} does not hold the weights of this pair ({error}).") from error

    def progress(self) -> Progress | None:
        """Return how far the training has come, by its checkpoint; None where that is missing or damaged."""
        try:
            return read_progress(self.checkpoint)
        except (OSError, ValueError):
            return None

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

    def write_scores(self, scores: dict[str, Any]) -> None:
        write_text(self.scores, json.dumps(scores, indent=2) + "\n")

    def read_scores(self) -> dict[str, Any]:
        """Read scores.json; empty where it is missing or damaged."""
        try:
            return dict(json.loads(self.scores.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def draw_pictures(
        self, pair: Pair, data: DataSet, rows: Tensor, labels: Tensor | None, history: list[dict[str, float]]
    ) -> list[Path]:
        """Draw the pictures that apply to this pair and these data, and return their files.

        A picture that fails is a line on stderr.
        """
        from pyrovae.plots import save_figures  # matplotlib is loaded when it is first needed
        from pyrovae.plots.run_pictures import pictures_of_run

        pictures = pictures_of_run(pair, data, rows, labels, history)
        return save_figures({name: picture.draw for name, picture in pictures.items()}, self.pictures)


def check_unchanged(name: str, digest: str | None, folder: Path) -> None:
    """Raise unless the file of a pair or data is unchanged since the run or comparison in ``folder`` was made.

    A pair that lies in the folder itself is refused, as nothing in such a folder is executed.
    """
    file = file_of(name)
    if file is None:
        return
    if file.suffix == ".py" and file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"path: {file} lies in the run folder itself, and nothing in a run folder is executed.")
    if not file.is_file():
        raise FileNotFoundError(f"path: this run was made from {file}, which is gone. Put it back, or fit again.")
    if file_digest(name) != digest:
        raise ValueError(f"path: {file} has changed since this run was made. Put the old file back, or fit again.")
