"""Pictures of measured numbers: of one pair's training and scores, of fits by size, and of compared methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator
from torch import Tensor

from pyrovae.checks import check_choice, check_positive
from pyrovae.evaluation.calibration import LEVEL, ecdf_band
from pyrovae.evaluation.criteria import CRITERIA
from pyrovae.evaluation.importance_sampling import BAD_K
from pyrovae.evaluation.posterior_collapse import USED_NATS
from pyrovae.plots import figures
from pyrovae.plots.figures import DATA, GAP, GREY, MODEL, PALETTE, add_legend_below, new_axes, new_figure

if TYPE_CHECKING:
    from pyrovae.comparison.result import Cell, Comparison
    from pyrovae.evaluation.calibration import Calibration
    from pyrovae.evaluation.criteria import Selection
    from pyrovae.evaluation.gaps import InferenceGaps

LINE_STYLES = ("-", "--", ":", "-.")


def plot_history(history: Sequence[dict[str, float]]) -> Figure:
    """Plot the bound against epochs, on training and held-out data (nats per datum)."""
    figure, axes = new_axes(6, 4)
    epochs = [row["epoch"] for row in history]
    curves = {"training data": [row["train_bound"] for row in history]}
    if any("validation_bound" in row for row in history):
        curves["held-out data"] = [row.get("validation_bound", math.nan) for row in history]
    for (label, curve), color in zip(curves.items(), (DATA, MODEL), strict=False):
        axes.plot(epochs, curve, color=color, label=label, marker="o" if len(history) == 1 else None)
    # The first epochs are far below the rest: show what happens after them.
    figures.set_value_range(axes, np.array([curve[len(history) // 10 :] for curve in curves.values()]))
    axes.set(xlabel="epoch", ylabel="bound (nats per datum)", title="Training")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def plot_kl(kl_per_dimension: Mapping[str, Sequence[float]]) -> Figure:
    """Plot the KL of each latent dimension, largest first. Those below ``USED_NATS`` are grey: they carry nothing."""
    latent_names = list(kl_per_dimension)
    figure = new_figure(7, 1.2 + 2.0 * len(latent_names))
    for axes, name in zip(np.atleast_1d(figure.subplots(len(latent_names), 1)), latent_names, strict=True):
        values = sorted((max(v, 0.0) for v in kl_per_dimension[name]), reverse=True)
        used = sum(v > USED_NATS for v in values)
        axes.bar(range(1, len(values) + 1), values, color=[DATA if v > USED_NATS else GREY for v in values])
        # Grey bars are too low to see: a mark under the axis shows where they are.
        dead = range(used + 1, len(values) + 1)
        if dead:
            label = f"unused ({len(dead)})"
            axes.plot(dead, [0] * len(dead), "x", color=GREY, markersize=5, clip_on=False, label=label)
            axes.legend(frameon=False)
        title = f"{name}: {used} of {len(values)} dimensions above {USED_NATS:g} nats"
        axes.set(xlabel=f"dimensions of {name}, by KL", ylabel="KL (nats)", title=title)
        axes.set_xlim(0.3, max(len(values), 3) + 0.7)
        few = len(values) <= 12
        axes.xaxis.set_major_locator(FixedLocator(range(1, len(values) + 1)) if few else MaxNLocator(integer=True))
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    return figure


def plot_pareto_k(pareto_k: Tensor, *, threshold: float = BAD_K) -> Figure:
    """Plot a histogram of k̂ over data, with 0.5 and the ``threshold`` of its number of samples (Vehtari et al. 2024).

    The title counts infinite values: −inf is a datum whose weights have no tail, +inf one that cannot be fitted.
    """
    k = pareto_k[torch.isfinite(pareto_k)].double().cpu().numpy()
    title = f"k̂ of {len(pareto_k)} data"
    for infinity, text in ((-math.inf, "no tail (k̂ = −∞)"), (math.inf, "no fit (k̂ = ∞)")):
        if count := int((pareto_k == infinity).sum()):
            title += f"\n{count} of them: {text}"
    figure, axes = new_axes(6, 3.2)
    low, high = (min(-0.25, float(k.min())), max(1.0, float(k.max()))) if len(k) else (-0.25, 1.0)
    edges = np.linspace(low, high, 41).tolist()
    axes.hist(k, bins=edges, color=DATA)
    for limit, color, text in ((0.5, GAP, "0.5"), (threshold, MODEL, f"{threshold:.2g}: unreliable above")):
        axes.axvline(limit, color=color, linestyle="--", linewidth=1.2, label=text)
    axes.set(xlabel="Pareto k̂ of the importance weights", ylabel="data", title=title, ylim=None if len(k) else (0, 1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return figure


def plot_gaps(gaps: Mapping[str, InferenceGaps]) -> Figure:
    """Plot the gap from each ELBO to the evidence as bars: approximation, then amortization (nats per datum)."""
    names = list(gaps)
    figure, axes = new_axes(7, 1.3 + 0.6 * len(names))
    approximation = [max(g.approximation_gap, 0.0) for g in gaps.values()]  # below 0 by Monte Carlo error
    amortization = [max(g.amortization_gap, 0.0) for g in gaps.values()]
    errors = [math.hypot(g.approximation_gap_stderr, g.amortization_gap_stderr) for g in gaps.values()]
    axes.barh(names, approximation, height=0.55, color=DATA, label="approximation gap")
    axes.barh(names, amortization, height=0.55, left=approximation, color=GAP, xerr=errors, label="amortization gap")
    axes.margins(x=0.1)
    axes.set(xlabel="log evidence − ELBO (nats per datum)", xlim=(0, None), ylim=(len(names) - 0.5, -0.5))
    add_legend_below(figure, axes, max_columns=2)
    return figure


def plot_calibration(calibration: Calibration, *, kind: str = "histogram", max_panels: int = 12) -> Figure:
    """Plot the ranks of each dimension, smallest p-values first, with a band that holds 99% of uniform ranks.

    Args:
        calibration: result of :func:`~pyrovae.evaluation.simulation_based_calibration`.
        kind: ``histogram`` (the band holds each bar with 99%) or ``ecdf``: the ranks' cumulative distribution less the
            uniform one, with a band that holds all of it with 99% (Säilynoja, Bürkner and Vehtari 2022).
        max_panels: largest number of dimensions shown.
    """
    check_choice("kind", kind, ("histogram", "ecdf"))
    check_positive("max_panels", max_panels, integer=True)
    panels = [(name, test, i) for name, test in calibration.tests.items() for i in range(len(test.p_values))]
    total = len(panels)
    panels = sorted(panels, key=lambda panel: panel[1].p_values[panel[2]])[:max_panels]
    figure, grid = figures.new_panels(len(panels), 4, width=3.2, height=2.6)
    band = ecdf_band(calibration.num_simulations, calibration.num_draws + 1) if kind == "ecdf" else None
    for axes, (name, test, i) in zip(grid.flat, panels, strict=False):
        if band is None:
            _draw_histogram(axes, test.counts[i], calibration)
        else:
            _draw_ecdf(axes, test.ranks[:, i], calibration, band)
        label = name if len(test.p_values) == 1 else f"{name}[{i}]"
        axes.set_title(f"{label}: p = {test.adjusted[i]:.2g}\n{test.verdicts[i]}", fontsize=9, parse_math=False)
        axes.set_xlabel("rank of the truth among the draws", fontsize=8)
        axes.tick_params(labelsize=8)
    shown = f"the worst {len(panels)} of {total} dimensions" if len(panels) < total else "all dimensions"
    figure.suptitle(f"Calibration of the {calibration.source} ({shown}); grey: 99% if uniform", fontsize=10)
    return figure


def _draw_histogram(axes: Axes, counts: list[int], calibration: Calibration) -> None:
    from scipy.stats import binom

    size, bins = calibration.num_simulations, len(counts)
    low, high = binom.ppf([LEVEL / 2, 1 - LEVEL / 2], size, 1 / bins)
    width = (calibration.num_draws + 1) / bins
    axes.axhspan(low, high, color="0.85", zorder=0)
    axes.axhline(size / bins, color=MODEL, linewidth=0.8)
    axes.bar([(i + 0.5) * width - 0.5 for i in range(bins)], counts, width=0.94 * width, color=DATA, alpha=0.8)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("simulations", fontsize=8)


def _draw_ecdf(axes: Axes, ranks: Tensor, calibration: Calibration, band: tuple[np.ndarray, np.ndarray]) -> None:
    levels, size = calibration.num_draws + 1, calibration.num_simulations
    uniform = np.arange(1, levels) / levels
    cumulative = np.bincount(ranks.numpy(), minlength=levels).cumsum()[:-1] / size
    at = np.arange(levels - 1)
    axes.fill_between(at, band[0] / size - uniform, band[1] / size - uniform, color="0.85", step="mid")
    axes.axhline(0, color=MODEL, linewidth=0.8)
    axes.step(at, cumulative - uniform, color=DATA, where="mid")
    axes.set_ylabel("ECDF − uniform", fontsize=8)


def plot_selection(selection: Selection) -> Figure:
    """Plot how far each fit lies above the best by each criterion, against the number of components.

    A ring marks the best fit; collapsed fits are crosses off the line. The scale is linear up to 10, then logarithmic.
    """
    winners = selection.winners()
    shown = [name for name in CRITERIA if any(getattr(c.criteria, name) is not None for c in selection.candidates)]
    families = sorted({c.family for c in selection.candidates})
    figure = new_figure(4.2 * len(shown), 3.8)
    for axes, criterion in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
        having = [c for c in selection.candidates if getattr(c.criteria, criterion) is not None]
        winner = winners.get(criterion)
        zero = min(getattr(c.criteria, criterion) for c in ([winner] if winner else having))
        for index, family in enumerate(families):
            fits = [c for c in having if c.family == family]
            rows = sorted((c.num_components, getattr(c.criteria, criterion) - zero, bool(c.collapsed)) for c in fits)
            sound, held = ([row[:2] for row in rows if row[2] == collapsed] for collapsed in (False, True))
            axes.plot(*np.reshape(sound, (-1, 2)).T, "o-", ms=4, color=f"C{index}", label=family)
            axes.plot(*np.reshape(held, (-1, 2)).T, "x", color=f"C{index}")
        title = criterion.upper()
        if winner is not None:
            axes.plot(winner.num_components, 0, "o", ms=13, mfc="none", mec=MODEL, mew=1.5)
            title += f": best is {winner.num_components} {winner.family}".rstrip()
        axes.set_title(title, parse_math=False)
        axes.set_yscale("symlog", linthresh=10)
        axes.set(xlabel="components", ylabel=f"{criterion.upper()} above the best")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        if any(families):
            axes.legend(fontsize=8)
    return figure


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
        figures.set_value_range(panels[0], np.concatenate(shown))
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
