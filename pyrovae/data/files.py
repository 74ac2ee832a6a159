"""A user's own rows, from a file."""

from __future__ import annotations

import csv
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
    names: list[str] = []
    try:
        if path.suffix.lower() == ".npy":
            rows = _read_npy(path)
        else:
            names, rows = _read_csv(path)
    except (ValueError, OSError, EOFError, csv.Error) as error:
        raise ValueError(f"data: {path} is not a table of numbers ({error}).") from error
    with np.errstate(over="ignore"):  # what a float32 cannot hold turns infinite, and the check reports it
        train = check_data(torch.from_numpy(rows.astype(np.float32)), "data")
    return DataSet(
        name=path.stem,
        train=train,
        test=None,
        labels_train=None,
        labels_test=None,
        feature_names=tuple(names or [f"feature {i + 1}" for i in range(train.shape[1])]),
        image_shape=None,
        convention="A user's file: every row is in train; values as they are in it.",
        source=str(path),
    )


def _read_npy(path: Path) -> np.ndarray:
    rows = np.load(path, allow_pickle=False)
    if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "biuf":
        raise ValueError(f"expected an array of real numbers; got {getattr(rows, 'dtype', type(rows).__name__)}")
    return rows


def _read_csv(path: Path) -> tuple[list[str], np.ndarray]:
    """The names, where the first line has no number, and the rows."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = [(number, row) for number, row in enumerate(csv.reader(file), start=1) if any(map(str.strip, row))]
    names: list[str] = []
    if lines and not any(map(_is_number, lines[0][1])):
        names = [name.strip() for name in lines.pop(0)[1]]
        if not names[0]:
            raise ValueError("its first column has no name and looks like row numbers: leave it out")
    if not lines:
        raise ValueError("it has no rows")
    width = len(names or lines[0][1])
    rows = []
    for number, row in lines:
        if bad := [cell for cell in row if not _is_number(cell)]:
            hint = "; separate columns by commas" if ";" in bad[0] or "\t" in bad[0] else ""
            raise ValueError(f"line {number}: expected numbers, got {bad[0]!r}{hint}")
        if len(row) != width:
            raise ValueError(f"line {number}: expected {width} columns, got {len(row)}")
        rows.append([float(cell) for cell in row])
    return names, np.array(rows)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
