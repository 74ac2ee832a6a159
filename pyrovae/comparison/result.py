"""Results of a comparison: a cell for each pair, method and seed, and a row for each pair and method."""

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
    """One pair, trained by one method from one seed. Nats per datum of the scored rows; None: does not apply."""

    pair: str
    method: str
    loss: str
    """Method as :func:`compare` was asked for it, see :class:`Method`."""
    seed: int
    log_evidence: float | None = None
    exact: bool = False
    """True where ``log_evidence`` is exact, False where importance sampling estimated it."""
    elbo: float | None = None
    """ELBO of the guide that the method trained, or of the exact posterior where that replaces the guide."""
    approximation_gap: float | None = None
    amortization_gap: float | None = None
    """Both gaps are those of the first 500 rows, see :func:`pyrovae.evaluation.inference_gaps`."""
    seconds: float | None = None
    """Time of training."""
    steps: int | None = None
    """Number of gradient steps, or of iterations of EM."""
    passes: int | None = None
    """Number of passes over the training data."""
    trace: dict[str, list[float]] = field(default_factory=dict)
    """Training curve: ``passes``, ``seconds`` and ``log_evidence`` (nats per datum). The log evidence is exact, of the
    training rows, where the pair has ``log_prob``; else it is that of at most 500 scored rows, from at most 200
    importance samples."""
    note: str | None = None
    """Note on a failure, or on numbers that do not mean what they usually do."""

    @property
    def gap(self) -> float | None:
        """Log evidence − ELBO, the mean over data of KL(q(z | x) ‖ p(z | x))."""
        return None if self.elbo is None or self.log_evidence is None else self.log_evidence - self.elbo


GAPS = ("gap", "approximation_gap", "amortization_gap")
QUANTITIES = ("log_evidence", "elbo", *GAPS, "seconds", "steps", "passes")


@dataclass(frozen=True)
class Row:
    """One pair and method: for each quantity its mean over seeds and the standard error of that mean."""

    pair: str
    method: str
    loss: str
    num_seeds: int
    mean: dict[str, float | None]
    stderr: dict[str, float | None]
    """Standard errors s / √n, with the sample standard deviation s; None with fewer than two seeds."""


@dataclass(frozen=True, repr=False)
class Comparison:
    """The result of :func:`compare`. It prints as its table."""

    title: str
    rows_scored: str
    """``test``, or ``training`` where there are no test rows."""
    num_data: int
    """Number of scored rows."""
    num_train: int
    epochs: int
    """Number of passes over the data in each SVI run."""
    num_samples: int
    seeds: list[int]
    cells: list[Cell]
    notes: list[str] = field(default_factory=list)
    pairs: dict[str, Pair] = field(default_factory=dict)
    """Trained pairs of the first seed, by the label of their pair and method."""

    @property
    def table(self) -> list[Row]:
        """Rows of the table, one for each pair and method."""
        groups: dict[tuple[str, str], list[Cell]] = {}
        for cell in self.cells:
            groups.setdefault((cell.pair, cell.method), []).append(cell)
        return [_make_row(group) for group in groups.values()]

    @property
    def num_pairs(self) -> int:
        return len({cell.pair for cell in self.cells})

    def label(self, of: Cell | Row) -> str:
        """Name a pair and method: by the method, with the pair before it where there are several pairs."""
        return f"{of.pair}: {of.method}" if self.num_pairs > 1 else of.method

    def __repr__(self) -> str:
        return tables.to_text(self)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """Return the table in Markdown, and write it to ``path`` where one is given."""
        return _write_text(tables.to_markdown(self), path)

    def to_latex(self, path: str | Path | None = None) -> str:
        r"""Return the table as a LaTeX ``tabular``, for ``\usepackage{booktabs}``; write it to ``path`` where given."""
        return _write_text(tables.to_latex(self), path)

    def to_csv(self, path: str | Path | None = None) -> str:
        """Return means and standard errors to full precision, a line a row; write them to ``path`` where given."""
        return _write_text(tables.to_csv(self), path)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the pairs, as plain JSON values."""
        plain = {name: value for name, value in vars(self).items() if name not in ("cells", "pairs")}
        return plain | {"cells": [asdict(cell) | {"gap": cell.gap} for cell in self.cells]}

    def plot(self) -> Figure:
        """Draw the training curves: log evidence against seconds, and against passes over the data."""
        from pyrovae.plots import plot_method_training

        return plot_method_training(self)

    def plot_gaps(self) -> Figure:
        """Draw what each method misses, as stacked bars: model, guide family, amortization."""
        from pyrovae.plots import plot_method_gaps

        return plot_method_gaps(self)


def _make_row(cells: list[Cell]) -> Row:
    first = cells[0]
    mean: dict[str, float | None] = {}
    stderr: dict[str, float | None] = {}
    for name in QUANTITIES:
        values = [float(v) for v in (getattr(cell, name) for cell in cells) if v is not None]
        mean[name] = fmean(values) if values else None
        stderr[name] = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Row(first.pair, first.method, first.loss, len(cells), mean, stderr)


def _write_text(text: str, path: str | Path | None) -> str:
    if path is not None:
        write_text(Path(path), text)
    return text
