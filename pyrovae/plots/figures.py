"""Shared parts of every picture: figures, colours, axes and files. Nothing here changes a setting of matplotlib."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

# Both palettes are told apart by colour-blind eyes; the second is of Okabe and Ito (2008), for groups.
DATA, MODEL, GREY, GAP = "#33658a", "#d1495b", "#9a9a9a", "#e0a030"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")


class _NotebookFigure(Figure):
    """Figure that a notebook shows even where pyplot was not loaded."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches, outside pyplot's global state."""
    return _NotebookFigure(figsize=(width, height), layout="constrained")


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a :func:`new_figure` and the one panel in it."""
    figure = new_figure(width, height)
    return figure, figure.subplots()


def new_panels(count: int, columns: int, *, width: float, height: float, **options: Any) -> tuple[Figure, np.ndarray]:
    """Return a figure and its grid of panels, each of this size; panels beyond ``count`` stay blank."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = new_figure(max(4.2, width * columns), height * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    return figure, grid


def save_figures(figures: Mapping[str, Callable[[], Figure]], folder: Path) -> list[Path]:
    """Draw each figure into ``folder`` as name.png and return the files. One that fails is a line on stderr."""
    files = []
    for name, draw in figures.items():
        file = folder / f"{name}.png"
        try:
            folder.mkdir(exist_ok=True)
            draw().savefig(file, dpi=150)
        except Exception as error:  # a person's own pair may do anything, and the numbers are written by now
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"pictures: could not draw {name} ({reason})", file=sys.stderr)
        else:
            files.append(file)
    return files


def set_value_range(axes: Axes, values: np.ndarray) -> None:
    """Limit the y axis to the finite ones of these values, with a margin."""
    if len(finite := values[np.isfinite(values)]):
        low, high = finite.min(), finite.max()
        margin = 0.1 * (high - low) or 1.0
        axes.set_ylim(low - margin, high + margin)


def add_legend_below(figure: Figure, axes: Axes, max_columns: int) -> None:
    """Add a legend of what one panel shows, below all panels."""
    handles, labels = axes.get_legend_handles_labels()
    columns = min(max_columns, len(labels) or 1)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def name_features(axes: Axes, names: Sequence[str]) -> None:
    """Name both axes after features of the data. A dollar sign in a name is shown as it is."""
    axes.set_xlabel(names[0], parse_math=False)
    axes.set_ylabel(names[1], parse_math=False)


def plane_of(
    x: Tensor,  # (N, D), on the CPU
    feature_names: Sequence[str] | None,
) -> tuple[Callable[[Tensor], Tensor], list[str]]:
    """Return a function that maps rows to the columns that are drawn, and the names of the axes.

    Rows of one or two features are drawn as they are, longer ones in the first two principal components of ``x``.
    """
    if x.shape[1] <= 2:
        return lambda rows: rows, list(feature_names or [f"feature {i + 1}" for i in range(x.shape[1])])
    loc = x.double().mean(0)
    components = torch.linalg.svd(x.double() - loc, full_matrices=False).Vh[:2]
    # A component's sign is arbitrary: its largest entry is positive here, so that equal data give equal pictures.
    components = components * components.gather(1, components.abs().argmax(1, keepdim=True)).sign()
    names = ["first principal component", "second principal component"]
    return lambda rows: (rows.double() - loc) @ components.mT, names
