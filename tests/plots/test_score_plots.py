"""Pictures of scores: what is on the axes, and that a traversal moves one dimension and nothing else."""

from __future__ import annotations

import io
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from torch import nn

import pyrovae as pv
from pyrovae.evaluation.gaps import InferenceGaps
from pyrovae.evaluation.generation import latents
from pyrovae.evaluation.posterior_collapse import USED_NATS
from pyrovae.plots.pair_plots import DATA
from pyrovae.plots.score_plots import GREY, can_traverse, plot_gaps, plot_kl, plot_pareto_k, plot_traversal

SHAPE = (2, 3)
VALUES = torch.linspace(-2.5, 2.5, 11)


def drawn(figure):
    """Draw it, as saving would: what cannot be laid out warns, and warnings are errors."""
    figure.savefig(io.BytesIO(), dpi=40)
    return figure


def texts(legend_of):
    return [text.get_text() for legend in legend_of for text in legend.get_texts()]


# KL of each dimension


def test_kl_has_a_bar_for_each_dimension_largest_first():
    (axes,) = drawn(plot_kl({"z": [0.2, 1.0, 0.5]})).axes
    assert [bar.get_height() for bar in axes.patches] == [1.0, 0.5, 0.2]
    assert axes.get_title() == f"z: 3 of 3 dimensions above {USED_NATS:g} nats"
    assert axes.get_xlabel() == "dimensions of z, by KL"
    assert axes.get_ylabel() == "KL (nats)"
    assert axes.get_legend() is None
    assert axes.get_xticks().tolist() == [1, 2, 3]


def test_dead_units_are_grey_marked_and_counted():
    (axes,) = drawn(plot_kl({"z": [0.001, 0.5, -0.002, USED_NATS]})).axes
    assert [bar.get_height() for bar in axes.patches] == [0.5, USED_NATS, 0.001, 0.0]  # none below 0
    assert [to_hex(bar.get_facecolor()) for bar in axes.patches] == [DATA, GREY, GREY, GREY]
    (marks,) = axes.lines
    assert list(marks.get_xdata()) == [2, 3, 4]
    assert texts([axes.get_legend()]) == ["unused (3)"]
    assert axes.get_title().startswith("z: 1 of 4")


def test_kl_of_each_latent_has_a_panel():
    figure = drawn(plot_kl({"z1": [3.0, 0.0], "z2": [0.0], "z3": [1.0] * 40}))
    assert [len(axes.patches) for axes in figure.axes] == [2, 1, 40]
    assert [axes.get_title()[:8] for axes in figure.axes] == ["z1: 1 of", "z2: 0 of", "z3: 40 o"]
    assert figure.axes[1].get_xticks().tolist() == [1]  # no tick where there is no dimension
    assert len(figure.axes[2].get_xticks()) < 20


# k̂


def test_khat_histogram_counts_every_finite_one():
    k = torch.cat([torch.linspace(-0.9, 1.4, 50), torch.tensor([math.inf, math.inf, -math.inf])])
    (axes,) = drawn(plot_pareto_k(k)).axes
    assert sum(bar.get_height() for bar in axes.patches) == 50
    assert "53 data" in axes.get_title()
    assert "1 of them: no tail" in axes.get_title()
    assert "2 of them: no fit" in axes.get_title()
    assert sorted(line.get_xdata()[0] for line in axes.lines) == [0.5, 0.7]
    assert texts([axes.get_legend()]) == ["0.5", "0.7: unreliable above"]
    few = drawn(plot_pareto_k(k, threshold=0.5 + 1 / 6)).axes[0]  # of a thousand samples
    assert texts([few.get_legend()]) == ["0.5", "0.67: unreliable above"]
    low, high = axes.get_xlim()
    assert low < -0.9
    assert high > 1.4


@pytest.mark.parametrize(("value", "text"), [(-math.inf, "no tail"), (math.inf, "no fit")])
def test_khat_all_infinite(value, text):
    (axes,) = drawn(plot_pareto_k(torch.full((7,), value))).axes
    assert sum(bar.get_height() for bar in axes.patches) == 0
    assert axes.get_title() == f"k̂ of 7 data\n7 of them: {text} (k̂ = {'−' * (value < 0)}∞)"


def test_khat_finite_ones_need_no_remark():
    (axes,) = drawn(plot_pareto_k(torch.tensor([0.1], dtype=torch.float32))).axes
    assert axes.get_title() == "k̂ of 1 data"


# Gaps


def gaps(approximation, amortization, error=0.01):
    none = torch.zeros(1)
    parts = (-2.0, error, -1.5, error, approximation, error, amortization, error)
    return InferenceGaps(1, 1, -1.0, 0.0, "exact", *parts, none, none, none, 1, True)


def test_gaps_are_stacked_one_bar_a_pair():
    figure = drawn(plot_gaps({"VAE": gaps(0.2, 0.1), "IWAE": gaps(0.05, 0.3)}))
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


def test_a_gap_below_zero_by_chance_is_no_bar():
    (axes,) = drawn(plot_gaps({"VAE": gaps(-0.01, 0.1)})).axes
    assert [bar.get_width() for bar in axes.patches] == [0, 0.1]
    assert axes.patches[1].get_x() == 0


@pytest.mark.parametrize("count", [1, 2, 6])
def test_the_legend_covers_nothing(count):
    figure = drawn(plot_gaps({f"pair {i}": gaps(0.2, 0.1) for i in range(count)}))
    renderer = FigureCanvasAgg(figure).get_renderer()
    legend = figure.legends[0].get_window_extent(renderer)
    assert not legend.overlaps(figure.axes[0].get_tightbbox(renderer))
    assert figure.bbox.containsx(legend.x0)
    assert figure.bbox.containsy(legend.y0)


# Traversals


class Layers(pv.Pair):
    """top → bottom → x, all linear, and beside them a latent ``side`` that goes into x and one for all the data."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: nn.Parameter(torch.randn(*shape, generator=generator))  # noqa: E731
        self.down, self.out, self.beside, self.encode = draw(2, 3), draw(3, 6), draw(2, 6), draw(6, 3)
        self.out.data[2] = 0  # the last dimension of ``bottom`` plays no part

    def model(self, x):
        shift = pyro.sample("shift", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            bottom = pyro.sample("bottom", dist.Normal(top @ self.down, 0.5).to_event(1))
            side = pyro.sample("side", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            rate = pyro.sample("rate", dist.LogNormal(x.new_zeros(3), 1.0).to_event(1))
            mean = bottom @ self.out + side @ self.beside + shift.unsqueeze(-1) + 0 * rate.sum(-1, keepdim=True)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample("shift", dist.Normal(self.down[0, 0], 0.1))
        with pyro.plate("data", len(x)):
            bottom = pyro.sample("bottom", dist.Normal(x @ self.encode, 0.3).to_event(1))
            pyro.sample("top", dist.Normal(bottom[..., :2], 0.3).to_event(1))
            pyro.sample("side", dist.Normal(x[..., :2], 0.3).to_event(1))
            pyro.sample("rate", dist.LogNormal(x[..., :3], 0.3).to_event(1))


def cells(figure, rows):
    """The images, (rows, columns, H, W), out of the one grid that is shown."""
    grid = np.asarray(figure.axes[0].images[0].get_array())
    height, width = SHAPE
    cut = [[grid[r : r + height, c : c + width] for c in range(0, grid.shape[1], width + 1)] for r in row_tops(rows)]
    return torch.from_numpy(np.array(cut))


def row_tops(rows):
    return range(0, rows * (SHAPE[0] + 1), SHAPE[0] + 1)


@pytest.fixture
def case():
    pair, x = Layers(), torch.randn(4, 6)
    return pair, x, latents(pair, x[:1], mean=True, seed=0)


def expected(pair, z, name, dimension):
    """By hand, (11, H, W): the moved latent, what lies below it at its mean, the others where they were."""
    z = {site: value.expand(11, -1).clone() if value.dim() == 2 else value for site, value in z.items()}
    z[name][:, dimension] = VALUES
    if name == "top":
        z["bottom"] = z["top"] @ pair.down
    return (z["bottom"] @ pair.out + z["side"] @ pair.beside + z["shift"]).detach().reshape(11, *SHAPE)


@pytest.mark.parametrize(
    ("name", "dimensions"), [("bottom", [2, 0]), ("bottom", [1]), ("side", [0, 1]), ("top", [1, 0]), ("top", [0])]
)
def test_one_dimension_moves_and_the_rest_stays(case, name, dimensions):
    pair, x, means = case
    figure = drawn(plot_traversal(pair, x, name, SHAPE, dimensions=dimensions))
    found = cells(figure, len(dimensions))
    for row, dimension in zip(found, dimensions, strict=True):
        torch.testing.assert_close(row.float(), expected(pair, means, name, dimension))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"{name}[{d}]" for d in dimensions]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["−2.5", "0", "2.5"]
    for tick, top in zip(axes.get_yticks(), row_tops(len(dimensions)), strict=True):
        assert tick == top + (SHAPE[0] - 1) / 2  # the middle of its row


def test_a_dimension_without_effect_is_a_row_of_equal_images(case):
    pair, x, _ = case
    dead, live = cells(plot_traversal(pair, x, "bottom", SHAPE, dimensions=[2, 0]), 2)
    assert bool((dead == dead[0]).all())
    assert not bool((live == live[0]).all())


def test_traversal_of_pairs_that_are_there(case):
    torch.manual_seed(0)
    vae = pv.models.VAE(6, 3, hidden_dims=(5,))
    iwae = pv.models.IWAE(6, (3, 2), hidden_dims=((5,), (4,)))
    x = torch.rand(3, 6).round()
    for pair, name in ((vae, "z"), (iwae, "z1"), (iwae, "z2")):
        state = torch.get_rng_state()
        images = cells(plot_traversal(pair, x, name, SHAPE, dimensions=[1, 0], steps=5), 2)
        assert torch.equal(torch.get_rng_state(), state)
        assert images.shape == (2, 5, *SHAPE)
        assert bool(((images > 0) & (images < 1)).all())
        assert all(not torch.equal(images[row, 0], images[row, -1]) for row in (0, 1))  # each layer moves the image
        again = cells(plot_traversal(pair, x, name, SHAPE, dimensions=[1, 0], steps=5), 2)
        assert torch.equal(images, again)  # nothing in it is drawn


def test_only_real_latents_of_each_datum_are_traversed(case):
    pair, x, _ = case
    state = torch.get_rng_state()
    assert {name: can_traverse(pair, x, name) for name in ("top", "bottom", "side", "rate", "shift")} == {
        "top": True,
        "bottom": True,
        "side": True,
        "rate": False,  # −2.5 is no value of it
        "shift": False,  # one for all the data
    }
    assert torch.equal(torch.get_rng_state(), state)
