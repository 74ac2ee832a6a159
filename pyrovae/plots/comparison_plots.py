"""Pictures of a comparison. Each function returns a ``Figure`` and touches no global state of matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from pyro import poutine
from torch import Tensor

from pyrovae.infer.weights import same_random_state
from pyrovae.pair import Pair
from pyrovae.plots.pair_plots import new_figure

if TYPE_CHECKING:
    from pyrovae.comparison.result import Cell, Comparison

__all__ = ["plot_gaps", "plot_responsibilities", "plot_training", "responsibilities"]

# Told apart by colour-blind eyes (Okabe and Ito 2008).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
STYLES = ("-", "--", ":", "-.")


def plot_training(comparison: Comparison) -> Figure:
    """The log evidence on the way, see :class:`Cell`, against seconds and against passes over the data.

    Lines are means over seeds, bands their standard errors.
    """
    figure = new_figure(11, 5)
    panels = figure.subplots(1, 2, sharey=True)
    groups: dict[str, list[Cell]] = {}
    for cell in comparison.cells:
        if cell.trace:
            groups.setdefault(comparison.label(cell), []).append(cell)
    shown: list[np.ndarray] = []
    for index, (label, cells) in enumerate(groups.items()):
        look: dict[str, Any] = {"color": COLORS[index % len(COLORS)], "label": label, "linewidth": 1.4}
        if len(cells[0].trace["passes"]) == 1:
            (value,) = cells[0].trace["log_evidence"]
            for axes in panels:
                axes.axhline(value, linestyle=(0, (1, 1)), **look)
            shown.append(np.array([value]))
            continue
        passes, seconds, mean, error = _average(cells)
        shown.append(mean[passes > passes[-1] / 10])  # the first passes are far below: show what happens after them
        look["linestyle"] = STYLES[index // len(COLORS) % len(STYLES)]
        for axes, place in zip(panels, (seconds, passes), strict=True):
            axes.plot(place, mean, **look)
            if len(cells) > 1:
                axes.fill_between(place, mean - error, mean + error, color=look["color"], alpha=0.15, linewidth=0)
    if shown:
        low, high = np.concatenate(shown).min(), np.concatenate(shown).max()
        margin = 0.08 * (high - low) or 1.0
        panels[0].set_ylim(low - margin, high + margin)
    for axes, name in zip(panels, ("seconds", "passes over the data"), strict=True):
        axes.set_xscale("log")
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    exact = any(cell.exact for cell in comparison.cells)
    panels[0].set_ylabel(f"log evidence ({'nats per training datum' if exact else 'nats per datum, few samples'})")
    count = len(comparison.seeds)
    bands = f"; mean ± standard error over {count} seeds" if count > 1 else ""
    figure.suptitle(f"{comparison.title}: training{bands}", parse_math=False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels) or 1), frameon=False)
    return figure


def _average(cells: list[Cell]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Passes, mean seconds, mean log evidence and its standard error; a run that ended keeps its last value."""
    grid = np.array(max((cell.trace["passes"] for cell in cells), key=len), dtype=float)
    seconds, evidence = (
        np.stack([np.interp(grid, cell.trace["passes"], cell.trace[name]) for cell in cells])
        for name in ("seconds", "log_evidence")
    )
    error = evidence.std(0, ddof=1) / np.sqrt(len(cells)) if len(cells) > 1 else np.zeros(len(grid))
    return grid, seconds.mean(0), evidence.mean(0), error


def plot_gaps(comparison: Comparison) -> Figure:
    """Stacked bars of what each method misses, in nats per datum: its log evidence below the best one here, then
    the gap from evidence to ELBO, as approximation and amortization where that is known. Means over seeds."""
    rows = [row for row in comparison.table if row.mean["log_evidence"] is not None]
    figure = new_figure(9, 1.6 + 0.45 * len(rows))
    axes = figure.subplots()
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
    for (name, values), color, hatch in zip(parts.items(), COLORS, ("", "", "//", ".."), strict=False):
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
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return figure


@torch.no_grad()
def responsibilities(pair: Pair, x: Tensor) -> Tensor | None:
    """q(z | x) over the components of a mixture, (N, K): its guide's, where that samples the component; else the exact
    p(z | x). None where the pair is no mixture with one discrete latent."""
    x = x.to(next(pair.parameters(), x))
    with same_random_state(), pyro.validation_enabled(False):
        trace = poutine.trace(pair.guide).get_trace(x)
        sites: list[Any] = [s["fn"] for s in trace.nodes.values() if s["type"] == "sample"]
        found = [fn for fn in sites if isinstance(fn, torch.distributions.Categorical) and fn.batch_shape == (len(x),)]
        if not found and pair.posterior is not None:
            posterior = pair.posterior(x)
            found = [posterior] if isinstance(posterior, torch.distributions.Categorical) else []
    return found[0].probs.detach().cpu() if len(found) == 1 else None


def plot_responsibilities(
    pairs: Mapping[str, Pair], x: Tensor, *, feature_names: Sequence[str] | None = None, columns: int = 3
) -> Figure:
    """The data, coloured by the components that each pair gives them to, side by side; mixed colours: undecided.

    An amortized pair shows what its guide says, and the lines of p(x) what its model says. Data of more than two
    features are shown by their first two principal components, without lines.

    Args:
        pairs: by title.
        x: data, (N, D).
        feature_names: of the axes.
        columns: panels in a row.

    Raises:
        ValueError: a pair has no responsibilities.
    """
    shown, names = x.cpu(), list(feature_names or [f"feature {i + 1}" for i in range(x.shape[1])])
    if x.shape[1] > 2:
        centred = shown.double() - shown.double().mean(0)
        shown = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].mT
        names = ["first principal component", "second principal component"]
    elif x.shape[1] == 1:
        shown, names = torch.cat([shown, torch.zeros_like(shown)], 1), [*names, ""]
    columns = min(columns, len(pairs))
    lines = -(-len(pairs) // columns)
    figure = new_figure(4.2 * columns, 3.6 * lines + 0.3)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(pairs) :]:
        axes.set_axis_off()
    for axes, (title, pair) in zip(grid.flat, pairs.items(), strict=False):
        weights = responsibilities(pair, x)
        if weights is None:
            raise ValueError(f"pairs: {title!r} is no mixture: it has no responsibilities to show.")
        palette = torch.tensor([to_rgb(COLORS[k % len(COLORS)]) for k in range(weights.shape[1])])
        axes.scatter(shown[:, 0], shown[:, 1], s=12, c=(weights.float() @ palette).clamp(0, 1).numpy(), linewidth=0)
        if x.shape[1] == 2 and pair.log_prob is not None:
            _draw_contours(axes, pair, x)
        axes.set_title(title, parse_math=False, fontsize=10)
    figure.suptitle("Responsibilities; lines: the model's density" if x.shape[1] == 2 else "Responsibilities")
    for axes in grid[:, 0]:
        axes.set_ylabel(names[1], parse_math=False)
    for column in range(columns):
        last = grid[(len(pairs) - 1 - column) // columns, column]  # below it the grid may be empty
        last.set_xlabel(names[0], parse_math=False)
        last.tick_params(labelbottom=True)
    return figure


@torch.no_grad()
def _draw_contours(axes: Axes, pair: Any, x: Tensor, resolution: int = 100) -> None:
    low, high = x.min(0).values, x.max(0).values
    margin = 0.08 * (high - low).clamp(min=1e-6)
    first, second = (
        torch.linspace(float(a), float(b), resolution) for a, b in zip(low - margin, high + margin, strict=True)
    )
    points = torch.cartesian_prod(first, second).to(next(pair.parameters(), x))
    density = pair.log_prob(points).exp().reshape(resolution, resolution).T.cpu()
    axes.contour(first, second, density, levels=7, colors="black", linewidths=0.5, alpha=0.5)
