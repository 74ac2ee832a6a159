"""Checks of public arguments. Each error names the argument, what was expected, what came and the fix."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_choice", "check_data", "check_free_folder", "check_positive", "count", "not_a_pair", "pick_device"]


def count(number: int, thing: str) -> str:
    """Write a number with its noun: ``1 epoch``, ``2 epochs``."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def check_choice(argument: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError, with the nearest names, unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    shown = map(repr, choices) if any("," in choice for choice in choices) else choices
    raise ValueError(f"{argument}: expected one of {', '.join(shown)}; got {value!r}.{hint}")


def check_positive(argument: str, value: Any, *, integer: bool = False, optional: bool = False) -> None:
    """Raise unless ``value`` is a number above zero, a whole one where ``integer``, or None where ``optional``."""
    if optional and value is None:
        return
    kind = "a whole number, 1 or more" if integer else "a number above 0"
    if isinstance(value, bool) or not isinstance(value, Integral if integer else Real):
        raise TypeError(f"{argument}: expected {kind}; got {value!r}.")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{argument}: expected {kind}; got {value}.")


def check_free_folder(argument: str, folder: Path, kind: str, *, overwrite: bool, read: Callable[[], object]) -> None:
    """Raise FileExistsError unless ``folder`` is free for a new ``kind``: a run or a comparison.

    A folder is free where nothing is there, or, with ``overwrite``, where ``read`` finds an earlier ``kind``.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise FileExistsError(f"{argument}: expected a folder for the {kind}; {folder} is a file. Pass another name.")
    if not overwrite:
        raise FileExistsError(
            f"{argument}: {folder} exists. Pass overwrite=True to replace it, resume=True to go on with it, or another "
            "folder."
        )
    try:
        read()
    except (OSError, ValueError) as error:
        raise FileExistsError(
            f"{argument}: {folder} exists and holds no pyrovae {kind}, so overwrite=True leaves it alone. Pass another "
            "folder."
        ) from error


def check_data(x: Any, argument: str = "x", *, data_dim: int | None = None, at_least: int = 1) -> Tensor:
    """Return ``x`` as a finite floating-point tensor (N, D), or say what is wrong with it.

    Args:
        x: a tensor, or anything that ``torch.as_tensor`` takes.
        argument: the name of ``x`` in messages.
        data_dim: the D that a pair needs. None: any.
        at_least: the fewest rows allowed.

    Raises:
        TypeError: ``x`` is not a tensor or an array of floating-point numbers.
        ValueError: ``x`` is empty or not of rank 2, has another D, too few rows, or NaN or infinite entries.
    """
    if hasattr(x, "train") and hasattr(x, "convention"):
        raise TypeError(f"{argument}: expected a tensor of rows; got a data set. Pass its rows: {argument}.train.")
    if not isinstance(x, Tensor):
        try:
            x = torch.as_tensor(x)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{argument}: expected a floating-point tensor of shape (N, D); got {type(x).__name__}."
            ) from error
    if not x.is_floating_point():
        raise TypeError(
            f"{argument}: expected floating-point numbers; got {x.dtype}. "
            f"Use {argument}.float(), and divide pixels of 0..255 by 255."
        )
    if x.dim() != 2:
        raise ValueError(
            f"{argument}: expected shape (N, D), one datum a row; got {tuple(x.shape)}. "
            f"Flatten each datum: {argument}.reshape(len({argument}), -1)."
        )
    if x.numel() == 0:
        raise ValueError(f"{argument}: expected at least one datum and one feature; got shape {tuple(x.shape)}.")
    if data_dim is not None and x.shape[1] != data_dim:
        raise ValueError(
            f"{argument}: expected {data_dim} features, as the pair was built with data_dim={data_dim}; "
            f"got {x.shape[1]}. Build the pair with data_dim={x.shape[1]}, or select the columns it models."
        )
    if len(x) < at_least:
        raise ValueError(f"{argument}: expected at least {at_least} data; got {len(x)}.")
    bad = ~torch.isfinite(x)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{argument}: expected finite numbers; got {int(bad.sum())} NaN or infinite entries, the first "
            f"({x[row, column].item()}) in row {row}, column {column}. Remove or impute these rows."
        )
    return x


def not_a_pair(thing: Any) -> str:
    """Write the message of an error in which ``thing`` was passed for a pair."""
    if isinstance(thing, type):
        return f"pair: expected an instance; got the class {thing.__name__}. Call it: {thing.__name__}(...)."
    return f"pair: expected a pyrovae.Pair; got {type(thing).__name__}. Wrap two functions: FunctionPair(model, guide)."


def pick_device(device: str | torch.device) -> torch.device:
    """Return the device of this name: ``cpu``, ``cuda``, or ``auto``, which is CUDA where there is one.

    Raises:
        ValueError: the device is unknown or absent.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected 'auto', 'cpu' or 'cuda'; got {device!r}.") from error
    if picked.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'auto', 'cpu' or 'cuda'; got {device!r}.")
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device!r} was asked for, and torch sees no CUDA device. Use device='auto'.")
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise ValueError(f"device: {device!r} was asked for, and the last that torch sees is 'cuda:{last}'.")
    return picked
