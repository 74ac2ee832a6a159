"""Run folders: everything about one fit, enough to rebuild, score and resume it. Nothing in one is ever unpickled or executed."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import inspect
import json
import os
import shutil
import sys
from ast import literal_eval
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyrovae import data as datasets
from pyrovae.checks import check_choice
from pyrovae.checks_pair import observed_support
from pyrovae.data import DataSet
from pyrovae.infer import LOSSES
from pyrovae.models import DEFAULT_DATA, DEFAULT_OPTIONS, REGISTRY
from pyrovae.pair import Pair

__all__ = [
    "Config",
    "RunFolder",
    "build_loss",
    "build_pair",
    "constructor_options",
    "find_pair",
    "load_data",
    "parse_options",
]

FORMAT = 1
Binarize = str  # "dynamic" | "static" | "none"


@dataclass
class Config:
    """What a run was made of. Plain JSON."""

    pair: str
    options: dict[str, Any]
    data: str
    binarize: Binarize
    loss: str | None
    loss_options: dict[str, Any]
    fit: dict[str, Any]
    num_samples: int
    seed: int
    pair_sha256: str | None = None
    """Of the user's file, where the pair is one: it must not have changed when the run is read."""
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT


# Pairs, losses and data by name -------------------------------------------------------------------------------


def find_pair(spec: str) -> type[Pair]:
    """The class that ``spec`` names: a registered name, or ``path/to/file.py:ClassName``.

    Raises:
        ValueError: unknown name; the file has no such class.
        FileNotFoundError: no such file.
    """
    path, colon, name = spec.rpartition(":")
    if not colon or not path.endswith(".py"):
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
    module_spec.loader.exec_module(module)
    found = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Pair) and value.__module__ == module.__name__
    }
    if not found:
        raise ValueError(f"PAIR: {path} defines no subclass of pyrovae.Pair.")
    check_choice("PAIR", name, found)
    return found[name]


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
        if isinstance(known[name].default, tuple) and not isinstance(value, tuple | list):
            value = (value,)
        options[name] = value
    return options


def build_pair(spec: str, options: dict[str, Any], data_dim: int, seed: int) -> Pair:
    """Make the pair, its first weights drawn by ``seed``."""
    pair_class = find_pair(spec)
    options = DEFAULT_OPTIONS.get(spec, {}) | options
    known = constructor_options(pair_class)
    missing = [name for name, p in known.items() if p.default is p.empty and name not in options]
    if missing:
        raise ValueError(f"--set: {spec} needs {', '.join(f'{name}=...' for name in missing)}.")
    if "data_dim" in inspect.signature(pair_class).parameters:
        options = {"data_dim": data_dim} | options
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return pair_class(**options)


def build_loss(pair: Pair, name: str | None, options: dict[str, Any]) -> Any:
    """The loss that ``name`` names, or the pair's own."""
    if name is None:
        if options:
            raise ValueError(f"--{next(iter(options)).replace('_', '-')}: name the loss that it is for, with --loss.")
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


def load_data(name: str, pair: Pair | None, binarize: Binarize) -> tuple[DataSet, bool]:
    """The data set, and whether its pixels are to be drawn anew at every use.

    ``auto``: pixels are drawn anew where the pair's likelihood is over {0, 1} and the data are images.
    """
    check_choice("--binarize", binarize, ("auto", "dynamic", "static", "none"))
    if name.endswith((".csv", ".npy")):
        data = datasets.load_file(name)
    else:
        check_choice("--data", name, datasets.names())
        data = datasets.load(name, binarize=binarize == "static")
    if binarize == "auto":
        binary = pair is not None and observed_support(pair, data.train[:2]) is constraints.boolean
        grey = bool(((data.train > 0) & (data.train < 1)).any())
        return data, binary and data.image_shape is not None and grey
    return data, binarize == "dynamic"


def file_digest(spec: str) -> str | None:
    path, colon, _ = spec.rpartition(":")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if colon else None


# The folder -----------------------------------------------------------------------------------------------------


class RunFolder:
    """``config.json``, ``weights.safetensors``, ``checkpoint.safetensors``, ``history.csv``, ``scores.json``, ``pictures/``."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def weights(self) -> Path:
        return self.path / "weights.safetensors"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def pictures(self) -> Path:
        return self.path / "pictures"

    def check_free(self, overwrite: bool) -> None:
        """Raise FileExistsError where something is there; with ``overwrite``, unless it is a run folder."""
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not overwrite:
            raise FileExistsError(
                f"--out: {self.path} exists. Pass --overwrite to replace it, --resume {self.path} to go on with it, or "
                "another folder."
            )
        try:
            self.read_config()
        except (OSError, ValueError) as error:
            raise FileExistsError(
                f"--out: {self.path} exists and is no pyrovae run folder, so --overwrite leaves it alone. Pass another folder."
            ) from error

    def create(self, config: Config) -> None:
        """Make the folder anew, with its configuration."""
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        self._write_text("config.json", json.dumps(asdict(config), indent=2) + "\n")

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

    def load(self, *, with_weights: bool = True) -> tuple[Config, Pair, DataSet, bool]:
        """Rebuild the pair and its data. A user's file is imported only if it is the very one that was trained."""
        config = self.read_config()
        if ":" in config.pair and file_digest(config.pair) != config.pair_sha256:
            raise ValueError(
                f"RUN: {config.pair.rpartition(':')[0]} has changed since this run was made, so its weights may not fit. "
                "Put the old file back, or fit again."
            )
        data, _ = load_data(config.data, None, config.binarize)
        pair = build_pair(config.pair, config.options, data.data_dim, config.seed)
        if with_weights:
            pair.load(self.weights)
        return config, pair, data, config.binarize == "dynamic"

    def write_history(self, history: list[dict[str, float]]) -> None:
        names = list(dict.fromkeys(name for row in history for name in row))
        temporary = self.path / "history.csv.tmp"
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(history)
        os.replace(temporary, self.path / "history.csv")

    def write_scores(self, scores: dict[str, Any]) -> None:
        self._write_text("scores.json", json.dumps(scores, indent=2) + "\n")

    def _write_text(self, name: str, text: str) -> None:
        temporary = self.path / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.path / name)

    def draw(
        self, pair: Pair, data: DataSet, rows: Tensor, labels: Tensor | None, history: list[dict[str, float]]
    ) -> list[Path]:
        """The pictures that apply to this pair and these data. Returns the files."""
        from pyrovae.evaluate import plots  # matplotlib loads when first used
        from pyrovae.evaluate.predict import latents

        figures = {"training": plots.plot_history(history)} if len(history) > 1 else {}
        figures["samples"] = plots.plot_samples(pair, rows, image_shape=data.image_shape)
        try:
            found = latents(pair, rows[:2], mean=True, seed=0)
        except (ValueError, NotImplementedError):  # nothing to encode into
            found = {}
        continuous = {name: z for name, z in found.items() if z.is_floating_point() and z.dim() == 2}
        if continuous:
            figures["reconstructions"] = plots.plot_reconstructions(pair, rows, image_shape=data.image_shape)
        if rows.shape[1] == 2:
            figures["density"] = plots.plot_density(pair, rows)
        for name, z in continuous.items():
            if z.shape[1] == 2:
                figures["latents"] = plots.plot_latents(pair, rows, name, labels=labels)
                if data.image_shape is not None and len(found) == 1:
                    figures["manifold"] = plots.plot_manifold(pair, name, data.image_shape, data_dim=rows.shape[1])
        self.pictures.mkdir(exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(self.pictures / f"{name}.png", dpi=150)
        return [self.pictures / f"{name}.png" for name in figures]
