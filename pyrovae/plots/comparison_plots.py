"""Pictures of a comparison: the training of its methods, and the gaps they leave."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from pyrovae.plots.figures import PALETTE, add_legend_below, new_axes, new_figure, set_value_range

if TYPE_CHECKING:
    from pyrovae.comparison.result import Cell, Comparison

__all__ = ["plot_method_gaps", "plot_method_training"]

LINE_STYLES = ("-", "--", ":", "-.")


def plot_method_training(comparison: Comparison) -> Figure:
    """Plot each method's log evidence during training, against seconds and against passes over the data.

    Lines are means over seeds, bands their standard errors. A closed form, with one value only, is a dotted line.
    """
    figure = new_figure(11, 5)
    panels = figure.subplots(1, 2, sharey=True)
    groups: dict[str, list[Cell]] = {}
    for cell in comparison.cells:
        if cell.trace:
            groups.setdefault(comparison.label(cell), []).append(cell)
    shown: list[np.ndarray] = []
    for index, (label, cells) in enumerate(groups.items()):
        style: dict[str, Any] = {"color": PALETTE[index % len(PALETTE)], "label": label, "linewidth": 1.4}
        if len(cells[0].trace["passes"]) == 1:
            shown.append(np.array(cells[0].trace["log_evidence"]))
            for axes in panels:
                axes.axhline(*shown[-1], linestyle=(0, (1, 1)), **style)
            continue
        passes, seconds, mean, error = _average(cells)
        shown.append(mean[passes > passes[-1] / 10])  # the first passes are far below: show what happens after them
        style["linestyle"] = LINE_STYLES[index // len(PALETTE) % len(LINE_STYLES)]
        for axes, places in zip(panels, (seconds, passes), strict=True):
            axes.plot(places, mean, **style)
            if len(cells) > 1:
                axes.fill_between(places, mean - error, mean + error, color=style["color"], alpha=0.15, linewidth=0)
    if shown:
        set_value_range(panels[0], np.concatenate(shown))
    for axes, name in zip(panels, ("seconds", "passes over the data"), strict=True):
        axes.set_xscale("log")
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    exact = any(cell.exact for cell in comparison.cells)
    panels[0].set_ylabel(f"log evidence ({'nats per training datum' if exact else 'nats per datum, few samples'})")
    count = len(comparison.seeds)
    bands = f"; mean ± standard error over {count} seeds" if count > 1 else ""
    figure.suptitle(f"{comparison.title}: training{bands}", parse_math=False)
    add_legend_below(figure, panels[0], max_columns=3)
    return figure


def _average(cells: list[Cell]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return passes, mean seconds, mean log evidence and its standard error. A run that ended keeps its last value."""
    passes = np.array(max((cell.trace["passes"] for cell in cells), key=len), dtype=float)
    seconds, evidence = (
        np.stack([np.interp(passes, cell.trace["passes"], cell.trace[name]) for cell in cells])
        for name in ("seconds", "log_evidence")
    )
    error = evidence.std(0, ddof=1) / np.sqrt(len(cells)) if len(cells) > 1 else np.zeros(len(passes))
    return passes, seconds.mean(0), evidence.mean(0), error


def plot_method_gaps(comparison: Comparison) -> Figure:
    """Plot what each method misses as stacked bars (nats per datum, means over seeds).

    The first part is how far its log evidence lies below the best one here. The rest is the gap from evidence to ELBO,
    split into approximation and amortization where these are known.
    """
    rows = [row for row in comparison.table if row.mean["log_evidence"] is not None]
    figure, axes = new_axes(9, 1.6 + 0.45 * len(rows))
    labels = [comparison.label(row) for row in rows]
    best = max((row.mean["log_evidence"] or 0.0 for row in rows), default=0.0)

    def part(name: str, *, unless: str | None = None) -> np.ndarray:
        values = [0.0 if unless and row.mean[unless] is not None else row.mean[name] or 0.0 for row in rows]
        return np.maximum(values, 0.0)  # below 0 by rounding or Monte Carlo error

    parts = {
        "log evidence below the best": np.array([best - (row.mean["log_evidence"] or 0.0) for row in rows]),
        "gap": part("gap", unless="amortization_gap"),
        "approximation gap": part("approximation_gap"),
        "amortization gap": part("amortization_gap"),
    }
    left = np.zeros(len(rows))
    for (name, values), color, hatch in zip(parts.items(), PALETTE, ("", "", "//", ".."), strict=False):
        if values.any() or name == "log evidence below the best":
            axes.barh(labels, values, height=0.6, left=left, color=color, label=name, hatch=hatch, edgecolor="white")
            left = left + values
    for y, total in enumerate(left):
        text = "0" if total < 5e-5 else f"{total:.4f}" if total < 1000 else f"{total:,.0f}"
        axes.annotate(text, (total, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"nats per datum, {comparison.rows_scored} rows")
    axes.set_title(f"{comparison.title}: what each method misses", parse_math=False)
    add_legend_below(figure, axes, max_columns=len(parts))
    return figure
