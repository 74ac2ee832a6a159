"""Data sets from a user's own files."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import torch

from pyrovae.checks import check_data
from pyrovae.data.registry import DataSet

__all__ = ["load_file"]


def load_file(path: str | Path) -> DataSet:
    """Read rows of numbers from a ``.npy`` file (N, D), or from a ``.csv`` file with commas.

    The first line of a ``.csv`` file may hold the names of the columns.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something other than finite numbers in rows of equal length.
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
    with np.errstate(over="ignore"):  # a number too large for float32 turns infinite, and the check reports it
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
    try:
        rows = np.load(path, allow_pickle=False)
    except ValueError as error:
        if "pickle" not in str(error):
            raise
        raise ValueError(
            "it is no .npy file of plain numbers: damaged, or made of Python objects. Write one by "
            "numpy.save(file, rows.astype(float))"
        ) from error
    if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "biuf":
        raise ValueError(f"expected an array of real numbers; got {getattr(rows, 'dtype', type(rows).__name__)}")
    return rows


def _read_csv(path: Path) -> tuple[list[str], np.ndarray]:
    """Return the names of the columns, which are empty unless the first line has no number, and the rows."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, row) for row in reader if len(row) > 1 or any(map(str.strip, row))]
    except UnicodeDecodeError as error:
        raise ValueError("its encoding is not UTF-8: save it as UTF-8") from error
    names: list[str] = []
    if lines and any(map(str.strip, lines[0][1])) and not any(map(_is_number, lines[0][1])):
        names = [name.strip() for name in lines.pop(0)[1]]
        if not names[0]:
            raise ValueError("its first column has no name and looks like row numbers: leave it out")
    if not lines:
        raise ValueError("it has no rows")
    width = len(names or lines[0][1])
    rows = []
    for number, row in lines:
        for column, cell in enumerate(row):
            if not _is_number(cell) or not math.isfinite(float(cell)):
                named = f" {names[column]!r}" if column < len(names) else ""
                raise ValueError(
                    f"line {number}, column {column + 1}{named}: expected a number, got {cell!r}{_advice(cell)}"
                )
        if len(row) != width:
            raise ValueError(f"line {number}: expected {width} columns, got {len(row)}")
        rows.append([float(cell) for cell in row])
    return names, np.array(rows)


def _advice(cell: str) -> str:
    if ";" in cell or "\t" in cell:
        return "; separate columns by commas"
    if not cell.strip() or _is_number(cell):
        return "; remove the row, or fill the cell"
    return "; leave the column out, or write it as numbers"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
