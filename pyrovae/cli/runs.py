"""Run folders: all about one fit, to rebuild, score and resume it. Nothing in one is ever unpickled or executed."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import inspect
import json
import os
import sys
from ast import literal_eval
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyrovae import data as datasets
from pyrovae.checkpoint import load_state, write_text
from pyrovae.checks import check_choice
from pyrovae.data import DataSet
from pyrovae.infer import LOSSES
from pyrovae.models import DEFAULT_DATA, DEFAULT_OPTIONS, REGISTRY
from pyrovae.pair import Pair
from pyrovae.training.pair_checks import observed_support
from pyrovae.training.progress import Progress, read_progress

__all__ = [
    "Config",
    "RunFolder",
    "absolute",
    "build_loss",
    "build_pair",
    "constructor_options",
    "default_data",
    "file_digest",
    "find_pair",
    "load_data",
    "load_run",
    "parse_options",
    "resolve_binarize",
]

FORMAT = 1
DATA_FILES = (".csv", ".npy")


@dataclass
class Config:
    """What a run was made of. Plain JSON."""

    pair: str
    options: dict[str, Any]
    data: str
    binarize: str
    """``dynamic``, ``static`` or ``none``."""
    loss: str | None
    loss_options: dict[str, Any]
    fit: dict[str, Any]
    num_samples: int
    seed: int
    pair_sha256: str | None = None
    """Of the user's file, where the pair is one: it must not have changed when the run is read."""
    data_sha256: str | None = None
    """The same of the data, where they are a file."""
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


# Pairs, losses and data by name -------------------------------------------------------------------------------


def find_pair(spec: str) -> type[Pair]:
    """The class that ``spec`` names: a registered name, or ``path/to/file.py:ClassName``.

    Raises:
        ValueError: unknown name; the file cannot be imported, or has no such class.
        FileNotFoundError: no such file.
    """
    path, name = _split(spec)
    if path is None:
        if spec.endswith(".py"):
            raise ValueError(f"PAIR: which class of {spec}? Write {spec}:ClassName.")
        check_choice("PAIR", spec, REGISTRY)
        return REGISTRY[spec]
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"PAIR: expected a Python file; found none at {path}.")
    module_spec = importlib.util.spec_from_file_location(f"pyrovae_user_{file.stem}", file)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # where dataclasses and typing look names up
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"PAIR: {path} cannot be imported. {type(error).__name__}: {error}") from error
    found = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Pair) and value.__module__ == module.__name__
    }
    if not found:
        raise ValueError(f"PAIR: {path} defines no subclass of pyrovae.Pair.")
    check_choice("PAIR", name, found)
    return found[name]


def _split(spec: str) -> tuple[str | None, str]:
    """``file.py:Name`` as its two parts; a registered name as (None, name)."""
    path, _, name = spec.rpartition(":")
    return (path, name) if path.endswith(".py") else (None, spec)


def absolute(spec: str) -> str:
    """A pair or data set that a file holds, so that it is found from every folder; a registered name as it is."""
    path, name = _split(spec)
    if path is not None:
        return f"{Path(path).resolve()}:{name}"
    return str(Path(spec).resolve()) if spec.lower().endswith(DATA_FILES) else spec


def file_digest(spec: str) -> str | None:
    """SHA-256 of the file that holds a pair or a data set; None for registered names."""
    path, _ = _split(spec)
    if path is None and spec.lower().endswith(DATA_FILES):
        path = spec
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()


def constructor_options(pair_class: type[Pair]) -> dict[str, inspect.Parameter]:
    """The constructor's arguments that a user may set; ``data_dim`` comes from the data."""
    parameters = inspect.signature(pair_class).parameters
    return {
        name: p
        for name, p in parameters.items()
        if name != "data_dim" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }


def parse_options(pair_class: type[Pair], settings: list[str]) -> dict[str, Any]:
    """``["latent_dim=2", "hidden_dims=200,200"]`` as values for the constructor."""
    known = constructor_options(pair_class)
    options: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set: expected NAME=VALUE; got {setting!r}.")
        name = name.strip().replace("-", "_")
        if not known:
            raise ValueError(f"--set: {pair_class.__name__} takes no options; got {setting!r}.")
        check_choice("--set", name, known)
        try:
            value = literal_eval(text)
        except (ValueError, SyntaxError):
            value = {"true": True, "false": False}.get(text.lower(), text)
        options[name] = _nested_like(known[name].default, value)
        if _is_of(int, known[name].default) and isinstance(value, str):
            raise ValueError(f"--set: {name}: expected whole numbers with commas, as in 200,200; got {value!r}.")
    return options


def _nested_like(default: Any, value: Any) -> Any:
    """Where several values are expected, one is a sequence of one: ``hidden_dims=200``."""
    if not isinstance(default, tuple | list):
        return value
    if not isinstance(value, tuple | list):
        value = (value,)
    if default and isinstance(default[0], tuple | list) and not any(isinstance(v, tuple | list) for v in value):
        value = (value,)
    return value


def _is_of(kind: type, value: Any) -> bool:
    """A sequence, nested or not, whose values are all of this kind."""
    return (
        isinstance(value, tuple | list) and bool(value) and all(isinstance(v, kind) or _is_of(kind, v) for v in value)
    )


def build_pair(pair_class: type[Pair], options: dict[str, Any], data_dim: int, seed: int) -> Pair:
    """Make the pair, its first weights drawn by ``seed``."""
    names = [name for name, registered in REGISTRY.items() if registered is pair_class]
    options = (DEFAULT_OPTIONS.get(names[0], {}) if names else {}) | options
    known = constructor_options(pair_class)
    missing = [name for name, p in known.items() if p.default is p.empty and name not in options]
    if missing:
        needed = " ".join(f"--set {name}=..." for name in missing)
        raise ValueError(f"--set: {pair_class.__name__} has no default for {', '.join(missing)}. Add {needed}.")
    if "data_dim" in inspect.signature(pair_class).parameters:
        options = {"data_dim": data_dim} | options
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return pair_class(**options)


def build_loss(pair: Pair, name: str | None, options: dict[str, Any]) -> Any:
    """The loss that ``name`` names, or the pair's own."""
    if name is None:
        for option, value in options.items():
            own = f" For {type(pair).__name__}'s own loss: --set {option}={value}."
            raise ValueError(
                f"--{option.replace('_', '-')}: name the loss that it is for, with --loss."
                f"{own if option in constructor_options(type(pair)) else ''}"
            )
        return pair.default_loss()
    check_choice("--loss", name, LOSSES)
    loss = LOSSES[name]
    known = inspect.signature(loss).parameters
    for option in options:
        if option not in known:
            raise ValueError(f"--{option.replace('_', '-')}: {name} has no such option.")
    return loss(**options)


def default_data(spec: str) -> str:
    return DEFAULT_DATA.get(spec, "digits")


def load_data(name: str, binarize: str) -> DataSet:
    """A data set by name, or a user's file. ``static`` draws its pixels as 0 or 1 here, once."""
    check_choice("--binarize", binarize, ("auto", "dynamic", "static", "none"))
    files = f"{', '.join(DATA_FILES[:-1])} or {DATA_FILES[-1]}"
    if name.lower().endswith(DATA_FILES):
        if binarize == "static":
            raise ValueError("--binarize: expected dynamic or none for a file; static is for image sets by name.")
        return datasets.load_file(name)
    if name not in datasets.names() and (Path(name).suffix or Path(name).exists()):
        raise ValueError(f"--data: expected a name from `pyrovae list`, or a {files} file; got {name!r}.")
    try:
        check_choice("--data", name, datasets.names())
    except ValueError as error:
        error.add_note(f"A {files} file of rows will do too.")
        raise
    return datasets.load(name, binarize=binarize == "static")


def resolve_binarize(binarize: str, pair: Pair, data: DataSet) -> str:
    """What ``auto`` means: ``dynamic`` where the pair's likelihood is over {0, 1} and the data are grey images.

    Raises:
        ValueError: the likelihood is over {0, 1} and the data are real features.
    """
    x = data.train
    if observed_support(pair, x[:2]) is not constraints.boolean:
        return "none" if binarize == "auto" else binarize
    if x.min() < 0 or x.max() > 1:
        real = "--set likelihood=normal" if "likelihood" in constructor_options(type(pair)) else "another pair"
        raise ValueError(
            f"--data: the likelihood of {type(pair).__name__} is over {{0, 1}}, and {data.name} has values from "
            f"{x.min():g} to {x.max():g}. For real features choose {real}; divide pixels of 0..255 by 255."
        )
    if binarize != "auto":
        return binarize
    grey = bool(((x > 0) & (x < 1)).any())
    return "dynamic" if grey and data.image_shape is not None else "none"


# The folder -----------------------------------------------------------------------------------------------------


RUN_FILES = ("weights.safetensors", "checkpoint.safetensors", "history.csv", "scores.json", "report.html")


def load_run(path: str | Path) -> tuple[Config, Pair, DataSet]:
    """Open a run folder that ``pyrovae fit`` wrote: ``config, pair, data = pyrovae.load_run("runs/vae-digits")``.

    ``pair`` has the weights of the run and ``data`` are those it was trained on; ``config`` says how. A user's files
    are read only if they are the very ones of the run.

    Raises:
        FileNotFoundError: something is missing.
        ValueError: something is damaged, foreign or has changed.
    """
    return RunFolder(path).load()


class RunFolder:
    """``config.json``, ``weights.safetensors``, ``checkpoint.safetensors``, ``history.csv``, ``scores.json`` and
    ``pictures/``. From Python, :func:`load_run` opens one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def weights(self) -> Path:
        return self.path / "weights.safetensors"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def history(self) -> Path:
        return self.path / "history.csv"

    @property
    def pictures(self) -> Path:
        return self.path / "pictures"

    def check_free(self, overwrite: bool) -> None:
        """Raise FileExistsError where something is there; with ``overwrite``, unless it is a run folder."""
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not self.path.is_dir():
            raise FileExistsError(f"--out: expected a folder for the run; {self.path} is a file. Pass another name.")
        if not overwrite:
            raise FileExistsError(
                f"--out: {self.path} exists. Pass --overwrite to replace it, --resume {self.path} to go on with it, or "
                "another folder."
            )
        try:
            self.read_config()
        except (OSError, ValueError) as error:
            raise FileExistsError(
                f"--out: {self.path} exists and is no pyrovae run folder, so --overwrite leaves it alone. Pass another "
                "folder."
            ) from error

    def create(self, config: Config) -> None:
        """Make the folder, or clear the one that is there of an earlier run: its files, and nothing else in it."""
        text = json.dumps(asdict(config), indent=2) + "\n"
        self.path.mkdir(parents=True, exist_ok=True)
        for file in (*map(self.path.joinpath, RUN_FILES), *self.pictures.glob("*.png")):
            file.unlink(missing_ok=True)
        self._write_text("config.json", text)

    def read_config(self) -> Config:
        """Raises FileNotFoundError or ValueError where the folder is missing, damaged or foreign."""
        file = self.path / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"RUN: expected a folder that `pyrovae fit` wrote; {self.path} has no config.json.")
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            if raw["format"] != FORMAT:
                raise ValueError(f"format {raw['format']}, and this version reads {FORMAT}")
            return Config(**raw)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"RUN: {file} is damaged or no pyrovae configuration ({error}).") from error

    def load(self, *, with_weights: bool = True) -> tuple[Config, Pair, DataSet]:
        """Rebuild the pair and its data. A user's files are read only if they are the very ones of the run.

        Raises:
            FileNotFoundError: something is missing.
            ValueError: something is damaged, foreign or has changed.
        """
        config = self.read_config()
        self.check_file(config.pair, config.pair_sha256)
        self.check_file(config.data, config.data_sha256)
        data = load_data(config.data, config.binarize)
        pair = self._build(find_pair(config.pair), config, data.data_dim)
        if with_weights and self.weights.is_file():
            pair.load(self.weights)
        elif with_weights:
            self._load_from_checkpoint(pair)
        return config, pair, data

    def _build(self, pair_class: type[Pair], config: Config, data_dim: int) -> Pair:
        file, known = self.path / "config.json", constructor_options(pair_class)
        for name in config.options:
            if name not in known:
                raise ValueError(
                    f"RUN: options in {file}: {pair_class.__name__} has no option {name!r}; it has "
                    f"{', '.join(known) or 'none'}. Put the run's own config.json back, or fit again."
                )
        try:
            return build_pair(pair_class, config.options, data_dim, config.seed)
        except (TypeError, ValueError) as error:
            raise ValueError(f"RUN: options in {file} make no {pair_class.__name__} ({error}).") from error

    def check_file(self, spec: str, digest: str | None) -> None:
        path, _ = _split(spec)
        if path is None and not spec.lower().endswith(DATA_FILES):
            return  # a registered name
        file = Path(path or spec)
        if path is not None and file.resolve().is_relative_to(self.path.resolve()):
            raise ValueError(f"RUN: {file} lies in the run folder itself, and nothing in a run folder is executed.")
        if not file.is_file():
            raise FileNotFoundError(f"RUN: this run was made from {file}, which is gone. Put it back, or fit again.")
        if file_digest(spec) != digest:
            raise ValueError(f"RUN: {file} has changed since this run was made. Put the old file back, or fit again.")

    def _load_from_checkpoint(self, pair: Pair) -> None:
        """The last good weights of a run that was killed."""
        if not self.checkpoint.is_file():
            raise FileNotFoundError(f"RUN: {self.path} has no weights: its run ended before the first checkpoint.")
        try:
            pair.load_state_dict(load_state(self.checkpoint)["pair"])
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"RUN: {self.checkpoint} does not hold the weights of this pair ({error}).") from error

    def progress(self) -> Progress | None:
        """How far the training has come, by its checkpoint; None where that is missing or damaged."""
        try:
            return read_progress(self.checkpoint)
        except (OSError, ValueError):
            return None

    def unfinished(self) -> str | None:
        """A notice where the training was stopped before its end."""
        progress = self.progress()
        if progress is None or progress.finished:
            return None
        return f"the run was stopped {progress}: its weights are not fully trained"

    def write_history(self, history: list[dict[str, float]]) -> None:
        """Write a row an epoch; nothing where there is none yet."""
        if not history:
            return
        names = list(dict.fromkeys(name for row in history for name in row))
        temporary = self.path / "history.csv.tmp"
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(history)
        os.replace(temporary, self.history)

    def read_history(self) -> list[dict[str, float]]:
        """Its rows; none where it is missing."""
        if not self.history.is_file():
            return []
        with self.history.open(newline="", encoding="utf-8") as lines:
            return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(lines)]

    def write_scores(self, scores: dict[str, Any]) -> None:
        self._write_text("scores.json", json.dumps(scores, indent=2) + "\n")

    def read_scores(self) -> dict[str, Any]:
        """What is in scores.json; nothing where it is missing or damaged."""
        try:
            return dict(json.loads((self.path / "scores.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def _write_text(self, name: str, text: str) -> None:
        write_text(self.path / name, text)

    def draw(
        self, pair: Pair, data: DataSet, rows: Tensor, labels: Tensor | None, history: list[dict[str, float]]
    ) -> list[Path]:
        """The pictures that apply to this pair and these data; one that fails is a line on stderr. Returns files."""
        from pyrovae.plots.pair_plots import save_figures  # matplotlib loads when first used
        from pyrovae.plots.run_pictures import pictures_of_run

        pictures = pictures_of_run(pair, data, rows, labels, history)
        return save_figures({name: picture.draw for name, picture in pictures.items()}, self.pictures)
