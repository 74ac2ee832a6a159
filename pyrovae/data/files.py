"""A user's own rows, from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pyrovae.checks import check_data
from pyrovae.data.dataset import DataSet

__all__ = ["load_file"]


def load_file(path: str | Path) -> DataSet:
    """Rows of numbers from a ``.csv`` (commas; one line of names may come first) or a ``.npy`` file (N, D).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something other than finite numbers in rows of equal length.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data: expected a .csv or .npy file; found none at {path}.")
    names: tuple[str, ...] = ()
    try:
        if path.suffix == ".npy":
            rows = np.load(path, allow_pickle=False)
        else:
            with path.open(encoding="utf-8") as file:
                first = [cell.strip().strip('"') for cell in file.readline().split(",")]
            has_names = not all(_is_number(cell) for cell in first)
            names = tuple(first) if has_names else ()
            rows = np.loadtxt(path, delimiter=",", skiprows=int(has_names), ndmin=2)
        train = torch.from_numpy(np.asarray(rows, dtype=np.float32))
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"data: {path} is not a table of numbers ({error}).") from error
    check_data(train, f"data ({path.name})")
    return DataSet(
        name=path.stem,
        train=train,
        test=None,
        labels_train=None,
        labels_test=None,
        feature_names=names or tuple(f"feature {i + 1}" for i in range(train.shape[1])),
        image_shape=None,
        convention="A user's file: every row is in train; values as they are in it.",
        source=str(path),
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
