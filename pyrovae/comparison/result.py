"""What a comparison found: a cell for each pair, method and seed, and the table of them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from pyrovae.checkpoint import write_text
from pyrovae.comparison import tables
from pyrovae.pair import Pair

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["QUANTITIES", "Cell", "Comparison", "Row"]


@dataclass(frozen=True)
class Cell:
    """One pair, trained by one method, from one seed. Nats per datum of the scored rows; None: does not apply."""

    pair: str
    method: str
    loss: str
    """How :func:`compare` was asked for the method, see :class:`Method`."""
    seed: int
    log_evidence: float | None = None
    exact: bool = False
    """``log_evidence`` is exact; otherwise importance sampling estimated it."""
    elbo: float | None = None
    """Of the guide that the method trained, or of the exact posterior where that stands in for it."""
    approximation_gap: float | None = None
    amortization_gap: float | None = None
    """Where asked for: see :func:`pyrovae.evaluation.inference_gaps`. Of the first 500 rows."""
    seconds: float | None = None
    """Of training."""
    steps: int | None = None
    """Gradient steps, or iterations of EM."""
    passes: int | None = None
    """Passes over the training data."""
    trace: dict[str, list[float]] = field(default_factory=dict)
    """``passes``, ``seconds`` of training and ``log_evidence`` on the way, nats per datum: exact, of the training rows,
    where the pair has ``log_prob``; else of at most 500 scored rows, from at most 200 importance samples."""
    note: str | None = None
    """What went wrong, or keeps the numbers from meaning what they usually do."""

    @property
    def gap(self) -> float | None:
        """log evidence − ELBO, the mean over data of KL(q(z | x) ‖ p(z | x))."""
        return None if self.elbo is None or self.log_evidence is None else self.log_evidence - self.elbo


QUANTITIES = (
    "log_evidence",
    "elbo",
    "gap",
    "approximation_gap",
    "amortization_gap",
    "seconds",
    "steps",
    "passes",
)


@dataclass(frozen=True)
class Row:
    """One pair and method: for each quantity its mean over seeds and the standard error of that mean."""

    pair: str
    method: str
    loss: str
    num_seeds: int
    mean: dict[str, float | None]
    stderr: dict[str, float | None]
    """s / √n with the sample standard deviation s; None with fewer than two seeds."""


@dataclass(frozen=True, repr=False)
class Comparison:
    """What :func:`compare` found. Prints as its table."""

    title: str
    rows_scored: str
    """``test``, or ``training`` where there are no others."""
    num_data: int
    """Rows scored."""
    num_train: int
    epochs: int
    """Passes over the data of each SVI run."""
    num_samples: int
    seeds: list[int]
    cells: list[Cell]
    notes: list[str] = field(default_factory=list)
    pairs: dict[str, Pair] = field(default_factory=dict)
    """The trained pairs of the first seed, by method; ``pair: method`` where there are several pairs."""

    @property
    def table(self) -> list[Row]:
        groups: dict[tuple[str, str], list[Cell]] = {}
        for cell in self.cells:
            groups.setdefault((cell.pair, cell.method), []).append(cell)
        return [_row(group) for group in groups.values()]

    @property
    def num_pairs(self) -> int:
        return len({cell.pair for cell in self.cells})

    def label(self, of: Cell | Row) -> str:
        """Names a pair and method in pictures."""
        return f"{of.pair}: {of.method}" if self.num_pairs > 1 else of.method

    def __repr__(self) -> str:
        return tables.to_text(self)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """The table in Markdown; written to ``path`` where one is given."""
        return _write(tables.to_markdown(self), path)

    def to_latex(self, path: str | Path | None = None) -> str:
        r"""The table as a LaTeX ``tabular``, for ``\usepackage{booktabs}``; written to ``path`` where one is given."""
        return _write(tables.to_latex(self), path)

    def to_csv(self, path: str | Path | None = None) -> str:
        """Means and standard errors to full precision, a line a row; written to ``path`` where one is given."""
        return _write(tables.to_csv(self), path)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        plain = {name: value for name, value in vars(self).items() if name not in ("cells", "pairs")}
        return plain | {"cells": [asdict(cell) | {"gap": cell.gap} for cell in self.cells]}

    def plot(self) -> Figure:
        """The log evidence on the way, against seconds and against passes over the data."""
        from pyrovae.plots.comparison_plots import plot_training

        return plot_training(self)

    def plot_gaps(self) -> Figure:
        """What each method misses, as stacked bars: model, guide family, amortization."""
        from pyrovae.plots.comparison_plots import plot_gaps

        return plot_gaps(self)


def _row(cells: list[Cell]) -> Row:
    first = cells[0]
    mean: dict[str, float | None] = {}
    stderr: dict[str, float | None] = {}
    for name in QUANTITIES:
        values = [float(v) for v in (getattr(cell, name) for cell in cells) if v is not None]
        mean[name] = fmean(values) if values else None
        stderr[name] = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Row(first.pair, first.method, first.loss, len(cells), mean, stderr)


def _write(text: str, path: str | Path | None) -> str:
    if path is not None:
        write_text(Path(path), text)
    return text
