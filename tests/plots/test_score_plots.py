"""Pictures of measured numbers: what the axes, bars, lines and legends show."""

from __future__ import annotations

import math

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

import pyrovae as pv
from pyrovae.evaluation import select_components, simulation_based_calibration
from pyrovae.evaluation.calibration import LIKELIHOOD
from pyrovae.evaluation.gaps import InferenceGaps
from pyrovae.evaluation.posterior_collapse import USED_NATS
from pyrovae.plots.figures import DATA, GREY
from pyrovae.plots.score_plots import (
    plot_calibration,
    plot_gaps,
    plot_history,
    plot_kl,
    plot_pareto_k,
    plot_selection,
)


def texts(legend_of):
    return [text.get_text() for legend in legend_of for text in legend.get_texts()]


# Training


HISTORY = [{"epoch": e, "train_bound": -100 / e, "validation_bound": -110 / e - e} for e in range(1, 31)]


@pytest.mark.parametrize("epochs", [1, 3, 30])
@pytest.mark.parametrize("held_out", [False, True])
def test_history_shows_each_curve_and_its_last_nine_tenths(labelled, epochs, held_out):
    names = ["train_bound", "validation_bound"][: 1 + held_out]
    history = [{"epoch": row["epoch"]} | {name: row[name] for name in names} for row in HISTORY[:epochs]]
    axes = labelled(plot_history(history)).axes[0]
    assert len(axes.lines) == 1 + held_out
    low, high = axes.get_ylim()
    for line, name in zip(axes.lines, names, strict=True):
        assert list(line.get_xdata()) == [row["epoch"] for row in history]
        assert list(line.get_ydata()) == [row[name] for row in history]
        later = [row[name] for row in history[epochs // 10 :]]
        assert low <= min(later) <= max(later) <= high  # all but the first tenth is in view, both curves
    assert "nats per datum" in axes.get_ylabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training data", "held-out data"][
        : 1 + held_out
    ]
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    if epochs == 1:
        assert all(line.get_marker() == "o" for line in axes.lines)  # a line of one point would not show


def test_a_constant_history_can_be_drawn(labelled):
    labelled(plot_history([{"epoch": e, "train_bound": -3.0} for e in (1, 2)]))


# KL of each dimension


def test_kl_has_a_bar_for_each_dimension_largest_first(saved):
    (axes,) = saved(plot_kl({"z": [0.2, 1.0, 0.5]})).axes
    assert [bar.get_height() for bar in axes.patches] == [1.0, 0.5, 0.2]
    assert axes.get_title() == f"z: 3 of 3 dimensions above {USED_NATS:g} nats"
    assert axes.get_xlabel() == "dimensions of z, by KL"
    assert axes.get_ylabel() == "KL (nats)"
    assert axes.get_legend() is None
    assert axes.get_xticks().tolist() == [1, 2, 3]


def test_unused_dimensions_are_grey_marked_and_counted(saved):
    (axes,) = saved(plot_kl({"z": [0.001, 0.5, -0.002, USED_NATS]})).axes
    assert [bar.get_height() for bar in axes.patches] == [0.5, USED_NATS, 0.001, 0.0]  # none below 0
    assert [to_hex(bar.get_facecolor()) for bar in axes.patches] == [DATA, GREY, GREY, GREY]
    (marks,) = axes.lines
    assert list(marks.get_xdata()) == [2, 3, 4]
    assert texts([axes.get_legend()]) == ["unused (3)"]
    assert axes.get_title().startswith("z: 1 of 4")


def test_kl_of_each_latent_has_a_panel(saved):
    figure = saved(plot_kl({"z1": [3.0, 0.0], "z2": [0.0], "z3": [1.0] * 40}))
    assert [len(axes.patches) for axes in figure.axes] == [2, 1, 40]
    assert [axes.get_title()[:8] for axes in figure.axes] == ["z1: 1 of", "z2: 0 of", "z3: 40 o"]
    assert figure.axes[1].get_xticks().tolist() == [1]  # no tick where there is no dimension
    assert len(figure.axes[2].get_xticks()) < 20


# k̂


def test_khat_histogram_counts_every_finite_one(saved):
    k = torch.cat([torch.linspace(-0.9, 1.4, 50), torch.tensor([math.inf, math.inf, -math.inf])])
    (axes,) = saved(plot_pareto_k(k)).axes
    assert sum(bar.get_height() for bar in axes.patches) == 50
    assert "53 data" in axes.get_title()
    assert "1 of them: no tail" in axes.get_title()
    assert "2 of them: no fit" in axes.get_title()
    assert sorted(line.get_xdata()[0] for line in axes.lines) == [0.5, 0.7]
    assert texts([axes.get_legend()]) == ["0.5", "0.7: unreliable above"]
    few = saved(plot_pareto_k(k, threshold=0.5 + 1 / 6)).axes[0]  # of a thousand samples
    assert texts([few.get_legend()]) == ["0.5", "0.67: unreliable above"]
    low, high = axes.get_xlim()
    assert low < -0.9
    assert high > 1.4


@pytest.mark.parametrize(("value", "text"), [(-math.inf, "no tail"), (math.inf, "no fit")])
def test_khat_counts_infinite_values_in_the_title(saved, value, text):
    (axes,) = saved(plot_pareto_k(torch.full((7,), value))).axes
    assert sum(bar.get_height() for bar in axes.patches) == 0
    assert axes.get_title() == f"k̂ of 7 data\n7 of them: {text} (k̂ = {'−' * (value < 0)}∞)"


def test_khat_title_is_one_line_where_all_are_finite(saved):
    (axes,) = saved(plot_pareto_k(torch.tensor([0.1], dtype=torch.float32))).axes
    assert axes.get_title() == "k̂ of 1 data"


# Gaps


def gaps(approximation, amortization, error=0.01):
    none = torch.zeros(1)
    parts = (-2.0, error, -1.5, error, approximation, error, amortization, error)
    return InferenceGaps(1, 1, -1.0, 0.0, "exact", *parts, none, none, none, 1, True)


def test_gaps_are_stacked_one_bar_a_pair(saved):
    figure = saved(plot_gaps({"VAE": gaps(0.2, 0.1), "IWAE": gaps(0.05, 0.3)}))
    (axes,) = figure.axes
    first, second = axes.patches[:2], axes.patches[2:]
    assert [bar.get_width() for bar in first] == [0.2, 0.05]
    assert [bar.get_x() for bar in second] == [0.2, 0.05]  # where the first ends
    assert [bar.get_width() for bar in second] == pytest.approx([0.1, 0.3])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["VAE", "IWAE"]
    low, high = axes.get_ylim()
    assert low > high  # the first on top
    assert texts(figure.legends) == ["approximation gap", "amortization gap"]
    assert axes.get_xlim()[0] == 0
    assert axes.get_xlim()[1] > 0.35 + math.hypot(0.01, 0.01)


def test_a_gap_below_zero_by_chance_is_no_bar(saved):
    (axes,) = saved(plot_gaps({"VAE": gaps(-0.01, 0.1)})).axes
    assert [bar.get_width() for bar in axes.patches] == [0, 0.1]
    assert axes.patches[1].get_x() == 0


@pytest.mark.parametrize("count", [1, 2, 6])
def test_the_legend_lies_below_the_axes(saved, count):
    figure = saved(plot_gaps({f"pair {i}": gaps(0.2, 0.1) for i in range(count)}))
    renderer = FigureCanvasAgg(figure).get_renderer()
    legend = figure.legends[0].get_window_extent(renderer)
    assert not legend.overlaps(figure.axes[0].get_tightbbox(renderer))
    assert figure.bbox.containsx(legend.x0)
    assert figure.bbox.containsy(legend.y0)


# Calibration


def test_calibration_shows_the_worst_dimensions_first(labelled):
    found = simulation_based_calibration(pv.models.VAE(6, 20, hidden_dims=(4,)), num_simulations=200)
    for kind in ("histogram", "ecdf"):
        figure = labelled(plot_calibration(found, kind=kind))
        assert len(figure.axes) == 12
    assert "the worst 12 of 21 dimensions" in figure.get_suptitle()
    panels = sorted((p, i) for i, p in enumerate(found.tests["z"].p_values + found.tests[LIKELIHOOD].p_values))
    label = LIKELIHOOD if panels[0][1] == 20 else f"z[{panels[0][1]}]"
    assert figure.axes[0].get_title().startswith(f"{label}: p = ")


def test_calibration_bars_count_every_simulation():
    found = simulation_based_calibration(pv.models.GMM(2, 2), num_simulations=200)
    for axes in plot_calibration(found).axes:
        heights = [bar.get_height() for bar in axes.patches if bar.get_height() > 1]
        assert sum(heights) >= 200  # the bars, and the band


def test_calibration_has_two_kinds_of_picture():
    found = simulation_based_calibration(pv.models.GMM(2, 2), num_simulations=20)
    with pytest.raises(ValueError, match=r"kind: .*'pie'"):
        plot_calibration(found, kind="pie")


# Numbers of components


def test_selection_has_a_panel_for_each_criterion_and_rings_the_best(labelled):
    labels = torch.arange(90) % 3
    x = 8.0 * torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])[labels] + torch.randn(90, 2)
    makers = {c: lambda k, c=c: pv.models.GMM(k, 2, covariance=c) for c in ("spherical", "diag")}
    figure = labelled(plot_selection(select_components(makers, x, (2, 3, 4), restarts=3)))
    assert [axes.get_title().split(":")[0] for axes in figure.axes] == ["BIC", "ICL", "AIC"]
    rings = [line for line in figure.axes[0].lines if line.get_markersize() == 13]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in rings] == [(3, 0)]


def test_selection_rings_nothing_where_every_fit_has_collapsed(labelled):
    x = torch.cat([torch.randn(40, 1), torch.full((5, 1), 9.0)])  # five equal rows: a component on them collapses
    found = select_components(lambda k: pv.models.GMM(k, 1), x, [2], restarts=5)
    assert not found.winners()
    assert all(line.get_markersize() != 13 for axes in labelled(plot_selection(found)).axes for line in axes.lines)
