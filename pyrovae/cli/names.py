"""Names that a user types, of pairs, options, losses and data, and what they stand for."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from ast import literal_eval
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pyro.infer import ELBO
from torch.distributions import constraints

from pyrovae import data as datasets
from pyrovae.checks import check_choice
from pyrovae.data import DataSet
from pyrovae.infer import LOSSES, default_loss
from pyrovae.models import DEFAULT_OPTIONS, REGISTRY
from pyrovae.pair import Pair
from pyrovae.random_state import seeded
from pyrovae.training.pair_checks import observed_support

__all__ = [
    "absolute_name",
    "build_loss",
    "build_pair",
    "constructor_options",
    "file_digest",
    "file_of",
    "find_pair",
    "load_data",
    "parse_options",
    "resolve_binarize",
    "short_name",
    "versions",
]

DATA_FILES = (".csv", ".npy")


def file_of(name: str) -> Path | None:
    """Return the file that holds a pair, ``file.py:ClassName``, or data; None for a registered name."""
    path = name.rpartition(":")[0]
    if path.endswith(".py"):
        return Path(path)
    return Path(name) if name.lower().endswith(DATA_FILES) else None


def short_name(pair: str) -> str:
    """Return the name of a pair in titles and file names: ``mypair`` for ``file.py:MyPair``."""
    return pair.rpartition(":")[2].lower()


def absolute_name(name: str) -> str:
    """Return the name of a pair or data set with the full path of its file, so that every folder finds it."""
    file = file_of(name)
    if file is None:
        return name
    return f"{file.resolve()}:{name.rpartition(':')[2]}" if file.suffix == ".py" else str(file.resolve())


def file_digest(name: str) -> str | None:
    """Return the SHA-256 of the file that holds a pair or data; None for a registered name."""
    file = file_of(name)
    return None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide the numbers of a run."""
    return {name: version(name) for name in ("pyrovae", "torch", "pyro-ppl")}


def find_pair(name: str) -> type[Pair]:
    """Return the class of a pair by its registered name, or import it by ``path/to/file.py:ClassName``."""
    file = file_of(name)
    if file is None or file.suffix != ".py":
        if name.endswith(".py"):
            raise ValueError(f"pair: which class of {name}? Write {name}:ClassName.")
        check_choice("pair", name, REGISTRY)
        return REGISTRY[name]
    class_name = name.rpartition(":")[2]
    if not file.is_file():
        raise FileNotFoundError(f"pair: expected a Python file; found none at {file}.")
    spec = importlib.util.spec_from_file_location(f"pyrovae_user_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and typing look names up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"pair: {file} cannot be imported. {type(error).__name__}: {error}") from error
    pairs = {name: c for name, c in vars(module).items() if isinstance(c, type) and issubclass(c, Pair)}
    found = {name: c for name, c in pairs.items() if c.__module__ == module.__name__}
    if not found:
        raise ValueError(f"pair: {file} defines no subclass of pyrovae.Pair.")
    check_choice("pair", class_name, found)
    return found[class_name]


def constructor_options(pair_class: type[Pair]) -> dict[str, inspect.Parameter]:
    """Return the constructor's arguments that a user may set; ``data_dim`` comes from the data."""
    parameters = inspect.signature(pair_class).parameters.items()
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {name: p for name, p in parameters if name != "data_dim" and p.kind not in variadic}


def parse_options(pair_class: type[Pair], settings: list[str]) -> dict[str, Any]:
    """Read ``["latent_dim=2", "hidden_dims=200,200"]`` as arguments of the constructor, or refuse what it lacks."""
    known = constructor_options(pair_class)
    options: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"settings: expected NAME=VALUE; got {setting!r}.")
        name = name.strip().replace("-", "_")
        if not known:
            raise ValueError(f"settings: {pair_class.__name__} takes no options; got {setting!r}.")
        check_choice("settings", name, known)
        try:
            value = literal_eval(text)
        except (ValueError, SyntaxError):
            value = {"true": True, "false": False}.get(text.lower(), text)
        if isinstance(value, str) and _holds_integers(known[name].default):
            raise ValueError(f"settings: {name}: expected whole numbers with commas, as in 200,200; got {value!r}.")
        options[name] = _nest_like(known[name].default, value)
    return options


def _nest_like(default: Any, value: Any) -> Any:
    """Make a sequence of one value where the default is a sequence: ``hidden_dims=200``."""
    if not isinstance(default, tuple | list):
        return value
    value = value if isinstance(value, tuple | list) else (value,)
    is_nested = bool(default) and isinstance(default[0], tuple | list)
    return (value,) if is_nested and not any(isinstance(v, tuple | list) for v in value) else value


def _holds_integers(value: Any) -> bool:
    """Return whether ``value`` is a sequence, nested or not, of whole numbers alone."""
    is_filled = isinstance(value, tuple | list) and len(value) > 0
    return is_filled and all(isinstance(v, int) or _holds_integers(v) for v in value)


def build_pair(pair_class: type[Pair], options: dict[str, Any], data_dim: int, seed: int) -> Pair:
    """Make a pair for data of ``data_dim`` features, its first weights drawn by ``seed``."""
    names = [name for name, registered in REGISTRY.items() if registered is pair_class]
    options = (DEFAULT_OPTIONS.get(names[0], {}) if names else {}) | options
    known = constructor_options(pair_class)
    missing = [name for name, p in known.items() if p.default is p.empty and name not in options]
    if missing:
        raise ValueError(
            f"options: {pair_class.__name__} has no default for {', '.join(missing)}. "
            f"Add {' '.join(f'{name}=...' for name in missing)}."
        )
    if "data_dim" in inspect.signature(pair_class).parameters:
        options = {"data_dim": data_dim} | options
    with seeded(seed):
        return pair_class(**options)


def build_loss(pair: Pair, name: str | None, options: dict[str, Any]) -> ELBO:
    """Make the loss of this name with options that it takes, or, without a name and options, the pair's own."""
    if name is None:
        for option, value in options.items():
            own = f" For {type(pair).__name__}'s own loss: --set {option}={value}."
            raise ValueError(
                f"{option}: name the loss that it is for, with --loss."
                f"{own if option in constructor_options(type(pair)) else ''}"
            )
        return default_loss(pair)
    check_choice("loss", name, LOSSES)
    for option in options:
        if option not in inspect.signature(LOSSES[name]).parameters:
            raise ValueError(f"{option}: {name} has no such option.")
    return LOSSES[name](**options)


def load_data(name: str, binarize: str) -> DataSet:
    """Load a data set by name, or a user's file. ``static`` draws its pixels as 0 or 1 here, once."""
    check_choice("binarize", binarize, ("auto", "dynamic", "static", "none"))
    if file_of(name) is not None:
        if binarize == "static":
            raise ValueError("binarize: expected dynamic or none for a file; static is for image sets by name.")
        return datasets.load_file(name)
    try:
        check_choice("data", name, datasets.names())
    except ValueError as error:
        error.add_note(f"A {' or '.join(DATA_FILES)} file of rows will do too.")
        raise
    return datasets.load(name, binarize=binarize == "static")


def resolve_binarize(binarize: str, pair: Pair, data: DataSet) -> str:
    """Resolve ``auto``: ``dynamic`` where the likelihood is over {0, 1} and the data are grey images, else ``none``.

    A likelihood over {0, 1} is refused for data outside [0, 1].
    """
    x = data.train
    if observed_support(pair, x[:2]) is not constraints.boolean:
        return "none" if binarize == "auto" else binarize
    if x.min() < 0 or x.max() > 1:
        real = "--set likelihood=normal" if "likelihood" in constructor_options(type(pair)) else "another pair"
        raise ValueError(
            f"data: the likelihood of {type(pair).__name__} is over {{0, 1}}, and {data.name} has values from "
            f"{x.min():g} to {x.max():g}. For real features choose {real}; divide pixels of 0..255 by 255."
        )
    if binarize != "auto":
        return binarize
    grey = bool(((x > 0) & (x < 1)).any())
    return "dynamic" if grey and data.image_shape is not None else "none"
