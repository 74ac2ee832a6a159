"""Pictures show the data they are given, with labels, on any shape of data, and leave matplotlib's globals alone."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pyro
import pytest
import torch
from matplotlib.figure import Figure

import pyrovae as pv
from pyrovae.evaluation import decode, latents, reconstruct, sample
from pyrovae.plots import pair_plots as p

SHAPE = (3, 2)  # unequal, so that a transposed image would show


@pytest.fixture(autouse=True)
def one_thread(guard_globals):
    """These tensors are tiny: threads would only wait for each other."""
    torch.set_num_threads(1)


def saved(figure):
    """The figure, after a look at what every one promises: it can be written, and says what it shows."""
    assert isinstance(figure, Figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")
    for axes in figure.axes:
        assert axes.get_title()
        if not axes.images:
            assert axes.get_xlabel()
            assert axes.get_ylabel()
    return figure


def points(collection):
    return torch.as_tensor(np.asarray(collection.get_offsets()))


def cells(figure, columns, shape=SHAPE):
    """The images in the grid that the figure shows, in reading order, and what lies between them."""
    (picture,) = figure.axes[0].images
    grid, (height, width) = np.asarray(picture.get_array()), shape
    rows = (grid.shape[0] + 1) // (height + 1)
    found = [
        grid[r * (height + 1) : r * (height + 1) + height, c * (width + 1) : c * (width + 1) + width].reshape(-1)
        for r in range(rows)
        for c in range(columns)
    ]
    return torch.as_tensor(np.stack(found))


HISTORY = [{"epoch": e, "train_bound": -100 / e, "validation_bound": -110 / e - e} for e in range(1, 31)]


@pytest.mark.parametrize("epochs", [1, 3, 30])
@pytest.mark.parametrize("held_out", [False, True])
def test_history(epochs, held_out):
    names = ["train_bound", "validation_bound"][: 1 + held_out]
    history = [{"epoch": row["epoch"]} | {name: row[name] for name in names} for row in HISTORY[:epochs]]
    axes = saved(p.plot_history(history)).axes[0]
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


def test_history_without_change():
    saved(p.plot_history([{"epoch": e, "train_bound": -3.0} for e in (1, 2)]))


@pytest.mark.parametrize(("count", "columns"), [(1, 10), (7, 10), (23, 5), (20, 10)])
def test_images(count, columns):
    images = torch.rand(count, 6)
    figure = saved(p.plot_images(images, SHAPE, columns=columns, title="Images"))
    found = cells(figure, min(columns, count))
    torch.testing.assert_close(found[:count].float(), images)
    assert (found[count:] == 0).all()  # empty cells are blank
    assert figure.axes[0].images[0].get_clim() == (0, 1)  # grey levels are not stretched


def test_samples_of_images():
    pair = pv.models.VAE(6, 2, hidden_dims=(4,))
    figure = saved(p.plot_samples(pair, torch.zeros(5, 6), image_shape=SHAPE, seed=3))
    torch.testing.assert_close(cells(figure, 10).float(), sample(pair, 100, mean=True, seed=3))


@pytest.mark.parametrize("data_dim", [1, 2, 5])
def test_samples(data_dim):
    pair = pv.models.GMM(2, data_dim)
    x = torch.randn(60, data_dim) * torch.arange(1.0, data_dim + 1)
    axes = saved(p.plot_samples(pair, x, seed=3)).axes[0]
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"data", "drawn from the model"}
    drawn = sample(pair, 60, seed=3)
    if data_dim == 1:
        edges = np.histogram_bin_edges(torch.cat([x, drawn]).numpy(), bins=40)  # the same for both
        heights = [bar.get_height() for bar in axes.patches[:40]]
        assert heights == pytest.approx(np.histogram(x.numpy(), edges, density=True)[0].tolist())
        assert axes.get_ylabel() == "density"
        return
    shown, new = (points(collection) for collection in axes.collections)
    if data_dim == 2:
        torch.testing.assert_close(shown.float(), x)
        torch.testing.assert_close(new.float(), drawn)
    else:  # the data's two directions of largest variance
        values = torch.linalg.svdvals(x - x.mean(0))
        torch.testing.assert_close(shown.norm(dim=0).float(), values[:2], rtol=1e-4, atol=1e-4)
        assert "principal component" in axes.get_xlabel()


@pytest.mark.parametrize("count", [3, 10, 13, 60])
def test_reconstructions_of_images_lie_below_their_data(count):
    pair = pv.models.VAE(6, 2, hidden_dims=(4,))
    x = torch.bernoulli(torch.full((count, 6), 0.5))
    figure = saved(p.plot_reconstructions(pair, x, image_shape=SHAPE, seed=3))
    columns = min(10, count)
    shown = min(40, count) // columns * columns
    rows = cells(figure, columns).reshape(-1, 2, columns, 6).float()
    torch.testing.assert_close(rows[:, 0].reshape(-1, 6), x[:shown])
    torch.testing.assert_close(rows[:, 1].reshape(-1, 6), reconstruct(pair, x[:shown], seed=3))


def test_reconstructions():
    x = torch.randn(50, 4) * torch.tensor([1.0, 10.0, 100.0, 1.0])
    x[:, 3] = 2.0  # a constant feature
    pair = pv.models.VAE(4, 2, hidden_dims=(4,), likelihood="normal")
    axes = saved(p.plot_reconstructions(pair, x, seed=3)).axes[0]
    shown = points(axes.collections[0]).reshape(50, 4, 2)
    observed = (x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-12)
    torch.testing.assert_close(shown[:, :3, 0].float(), observed[:, :3])
    assert list(axes.lines[0].get_xdata()) == list(axes.lines[0].get_ydata())  # the diagonal


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (lambda: pv.models.GMM(2, 2), torch.float32),
        (lambda: pv.models.GMM(2, 2).double(), torch.float32),
        (lambda: pv.models.VAE(2, 2, hidden_dims=(4,), likelihood="normal"), torch.float64),
        (lambda: pv.models.VAE(2, 1, hidden_dims=(4,), likelihood="continuous-bernoulli"), torch.float32),
    ],
)
def test_density(monkeypatch, make, dtype):
    pair, x = make(), torch.rand(30, 2, dtype=dtype)
    drawn = []

    def keep(self, first, second, density, **options):
        drawn.append((first, second, torch.as_tensor(density)))
        return original(self, first, second, density, **options)

    original = matplotlib.axes.Axes.contourf
    monkeypatch.setattr(matplotlib.axes.Axes, "contourf", keep)
    axes = saved(p.plot_density(pair, x)).axes[0]
    torch.testing.assert_close(points(axes.collections[-1]).to(dtype), x)
    ((first, second, density),) = drawn
    assert first[0] < x[:, 0].min() < x[:, 0].max() < first[-1]
    if pair.log_prob is not None:  # density[i, j] is at (first[j], second[i])
        at = torch.stack([first[7], second[90]]).to(next(pair.parameters()))
        torch.testing.assert_close(density[90, 7], pair.log_prob(at.unsqueeze(0)).exp()[0].detach())
    # a density: its integral over the picture cannot exceed 1, up to the grid's error
    integral = density.sum() * (first[1] - first[0]) * (second[1] - second[0])
    assert 0 < integral < 1.05
    if "continuous" in str(make.__code__.co_consts):
        assert density[0, 0] == 0  # outside the support


@pytest.mark.parametrize("names", [None, ("$a", "b ($)")])
def test_axes_have_the_names_of_the_features(names):
    pair, x = pv.models.GMM(2, 2), torch.randn(30, 2)
    expected = names or ("feature 1", "feature 2")
    for figure in (p.plot_samples(pair, x, feature_names=names), p.plot_density(pair, x, feature_names=names)):
        axes = saved(figure).axes[0]
        assert (axes.get_xlabel(), axes.get_ylabel()) == expected
    line = saved(p.plot_samples(pv.models.GMM(2, 1), x[:, :1], feature_names=names and names[:1])).axes[0]
    assert (line.get_xlabel(), line.get_ylabel()) == (expected[0], "density")


def test_densities_side_by_side():
    x = torch.randn(30, 2)
    figure = saved(p.plot_densities({"one": pv.models.GMM(1, 2), "two": pv.models.GMM(2, 2)}, x))
    assert [axes.get_title() for axes in figure.axes] == ["one", "two"]


def test_manifold_lies_as_its_axes_say():
    """Left to right the first latent rises, bottom to top the second, at the quantiles of N(0, 1)."""
    pair = pv.models.VAE(6, 2, hidden_dims=(4,))
    figure = saved(p.plot_manifold(pair, "z", SHAPE, size=5))
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("z, first", "z, second")
    found = cells(figure, 5).reshape(5, 5, 6).float()
    ticks = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.02, 0.98, 5))
    for row, column in ((0, 0), (0, 4), (4, 0), (1, 3)):
        z = torch.stack([ticks[column], ticks[4 - row]]).unsqueeze(0)
        torch.testing.assert_close(found[row, column], decode(pair, {"z": z})[0])


@pytest.mark.parametrize("labelled", [False, True])
def test_latents(labelled):
    pair = pv.models.VAE(6, 2, hidden_dims=(4,))
    x = torch.bernoulli(torch.full((40, 6), 0.5))
    labels = torch.arange(40) % 12 if labelled else None
    figure = saved(p.plot_latents(pair, x, "z", labels=labels))
    means = latents(pair, x, mean=True)["z"]
    axes = figure.axes[0]
    if not labelled:
        torch.testing.assert_close(points(axes.collections[0]).float(), means)
        return
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [str(label) for label in range(12)]
    for label, collection in enumerate(axes.collections):
        torch.testing.assert_close(points(collection).float(), means[labels == label])
    assert not figure.legends[0].get_window_extent().overlaps(axes.get_window_extent())


@pytest.mark.parametrize(
    "make", [torch.Tensor.tolist, torch.Tensor.numpy, torch.clone], ids=["list", "array", "tensor"]
)
def test_latents_take_labels_of_any_kind(make):
    pair, x = pv.models.VAE(6, 2, hidden_dims=(4,)), torch.bernoulli(torch.full((9, 6), 0.5))
    figure = p.plot_latents(pair, x, "z", labels=make(torch.arange(9) % 3))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0", "1", "2"]
    named = p.plot_latents(pair, x.numpy(), "z", labels=["a", "b", "a"] * 3)
    assert [text.get_text() for text in named.legends[0].get_texts()] == ["a", "b"]


def test_latents_of_more_dimensions_say_which_are_shown():
    pair, x = pv.models.VAE(6, 4, hidden_dims=(4,)), torch.bernoulli(torch.full((9, 6), 0.5))
    axes = saved(p.plot_latents(pair, x, "z")).axes[0]
    assert axes.get_title() == "Posterior means of the data (guide)\ndimensions 1 and 2 of 4"
    torch.testing.assert_close(points(axes.collections[0]).float(), latents(pair, x, mean=True)["z"][:, :2])


def test_images_are_taken_as_arrays_of_any_kind():
    images = torch.rand(7, 6)
    for same in (images.numpy(), images.tolist(), images.reshape(7, *SHAPE)):
        found = cells(p.plot_images(same, list(SHAPE)), 7)
        torch.testing.assert_close(found[:7].float(), images)


VAE1, VAE2, VAE4 = (pv.models.VAE(6, size, hidden_dims=(4,)) for size in (1, 2, 4))
LAYERS = pv.models.IWAE(6, (3, 2), hidden_dims=((4,), (4,)))
X = torch.ones(9, 6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: p.plot_latents(VAE2, X, "w"), ValueError, "name: expected one of z; got 'w'"),
        (lambda: p.plot_latents(LAYERS, X, "z3"), ValueError, "name: expected one of z1, z2; got 'z3'. Did you mean"),
        (lambda: p.plot_latents(VAE1, X, "z"), ValueError, "name: expected a latent of 2 dimensions or more; 'z' of"),
        (
            lambda: p.plot_latents(VAE2, X, "z", labels=[1, 2]),
            ValueError,
            r"labels: expected shape \(9,\).* got \(2,\)",
        ),
        (lambda: p.plot_latents(VAE2, X, "z", labels=[0.5] * 9), TypeError, "labels: expected whole numbers or names"),
        (lambda: p.plot_latents(VAE2, X[:, :5], "z"), ValueError, "x: expected 6 features"),
        (lambda: p.plot_manifold(VAE2, "w", SHAPE), ValueError, "name: expected one of z; got 'w'"),
        (lambda: p.plot_manifold(VAE2, "x", SHAPE), ValueError, "name: expected one of z; got 'x'"),
        (lambda: p.plot_manifold(VAE4, "z", SHAPE), ValueError, "name: expected a latent of 2 dimensions; .* has 4"),
        (lambda: p.plot_manifold(LAYERS, "z1", SHAPE), ValueError, "name: expected a latent of 2 dimensions; .* has 3"),
        (lambda: p.plot_manifold(VAE2, "z", (4, 2)), ValueError, "image_shape: expected .* product is 6"),
        (lambda: p.plot_manifold(VAE2, "z", SHAPE, size=0), ValueError, "size: expected a whole number, 1 or more"),
        (lambda: p.plot_images(X, (2, 4)), ValueError, r"image_shape: .* product is 6, .* got \(2, 4\), which makes 8"),
        (lambda: p.plot_images(X, 6), TypeError, r"image_shape: expected \(height, width\), such as .* got 6"),
        (lambda: p.plot_images(X, (1.5, 4)), TypeError, "image_shape: expected a whole number"),
        (
            lambda: p.plot_images(X[0], SHAPE),
            ValueError,
            r"images: expected shape \(N, 6\), one image a row; got \(6,\)",
        ),
        (lambda: p.plot_images(X[:0], SHAPE), ValueError, r"images: expected shape .* got \(0, 6\)"),
        (lambda: p.plot_images("X", SHAPE), TypeError, "images: expected an array .* got str"),
        (lambda: p.plot_images(X, SHAPE, columns=0), ValueError, "columns: expected a whole number, 1 or more"),
        (lambda: p.plot_samples(VAE2, X, image_shape=(4, 4)), ValueError, "image_shape: expected .* product is 6"),
    ],
)
def test_errors_are_for_a_person(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_a_discrete_latent_is_not_drawn():
    class Amortized(pv.Pair):
        data_dim = 2

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("c", pyro.distributions.Categorical(x.new_ones(3)))
            pyro.sample("mu", pyro.distributions.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"^name: expected a real latent of 2 dimensions or more; 'c' of the guide"):
        p.plot_latents(Amortized(), torch.randn(4, 2), "c")
    with pytest.raises(ValueError, match=r"^name: expected one of c; got 'mu'\."):  # one value for all data
        p.plot_latents(Amortized(), torch.randn(4, 2), "mu")


def test_same_seed_same_picture_and_caller_s_state_stays():
    pair, x = pv.models.VAE(2, 2, hidden_dims=(4,), likelihood="normal"), torch.randn(20, 2)
    before, validation = torch.get_rng_state(), pyro.poutine.util.is_validation_enabled()

    def draw():
        figures = [p.plot_samples(pair, x), p.plot_reconstructions(pair, x), p.plot_density(pair, x)]
        buffers = [io.BytesIO() for _ in figures]
        for figure, buffer in zip(figures, buffers, strict=True):
            figure.savefig(buffer, format="png")
        return [buffer.getvalue() for buffer in buffers]

    assert draw() == draw()
    assert torch.equal(torch.get_rng_state(), before)
    assert pyro.poutine.util.is_validation_enabled() == validation


def test_no_global_state_of_matplotlib():
    """No pyplot: nothing opens, no figure is kept alive, no style is changed; nothing is imported before its use."""
    program = """
import sys, torch
import pyrovae as pv
assert "matplotlib" not in sys.modules, "matplotlib is loaded by import pyrovae"
import matplotlib
raw = lambda: dict(dict.items(matplotlib.rcParams))  # reading the backend would choose one
before = raw()
from pyrovae.plots import pair_plots as plots
pair, x = pv.models.VAE(6, 2, hidden_dims=(4,)), torch.bernoulli(torch.full((30, 6), 0.5))
flat = pv.models.GMM(2, 2)
plots.plot_samples(pair, x, image_shape=(3, 2))
plots.plot_latents(pair, x, "z", labels=torch.arange(30) % 3)
plots.plot_manifold(pair, "z", (3, 2), size=3)
plots.plot_samples(flat, torch.randn(30, 2))
plots.plot_density(flat, torch.randn(30, 2))
plots.plot_history([{"epoch": 1, "train_bound": -1.0}])
assert "matplotlib.pyplot" not in sys.modules
assert raw() == before
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_every_plot_is_tested():
    source = Path(__file__).read_text(encoding="utf-8")
    assert all(f"p.{name}(" in source for name in p.__all__)


def test_a_notebook_shows_a_figure_without_pyplot():
    figure = p.new_figure(2, 1)
    assert figure._repr_png_().startswith(b"\x89PNG")
