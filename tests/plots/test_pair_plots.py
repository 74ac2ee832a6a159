"""Pictures of pairs show the data they are given, with labels, on any shape of data."""

from __future__ import annotations

import io

import matplotlib
import numpy as np
import pyro
import pytest
import torch

import pyrovae as pv
from pyrovae.evaluation import latents, reconstruct, sample
from pyrovae.plots.pair_plots import (
    plot_densities,
    plot_density,
    plot_latents,
    plot_reconstructions,
    plot_samples,
)

SHAPE = (3, 2)  # unequal, so that a transposed image would show


def points(collection):
    return torch.as_tensor(np.asarray(collection.get_offsets()))


def test_samples_of_images_are_pixel_means(labelled, images_of):
    pair = pv.models.VAE(6, 2, hidden_dims=(4,))
    figure = labelled(plot_samples(pair, torch.zeros(5, 6), image_shape=SHAPE, seed=3))
    torch.testing.assert_close(images_of(figure, SHAPE).reshape(100, 6), sample(pair, 100, mean=True, seed=3))


@pytest.mark.parametrize("data_dim", [1, 2, 5])
def test_samples_lie_beside_the_data(labelled, data_dim):
    pair = pv.models.GMM(2, data_dim)
    x = torch.randn(60, data_dim) * torch.arange(1.0, data_dim + 1)
    axes = labelled(plot_samples(pair, x, seed=3)).axes[0]
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
def test_reconstructions_of_images_lie_below_their_data(labelled, images_of, count):
    pair = pv.models.VAE(6, 2, hidden_dims=(4,))
    x = torch.bernoulli(torch.full((count, 6), 0.5))
    figure = labelled(plot_reconstructions(pair, x, image_shape=SHAPE, seed=3))
    columns = min(10, count)
    shown = min(40, count) // columns * columns
    rows = images_of(figure, SHAPE).reshape(-1, 2, columns, 6)
    torch.testing.assert_close(rows[:, 0].reshape(-1, 6), x[:shown])
    torch.testing.assert_close(rows[:, 1].reshape(-1, 6), reconstruct(pair, x[:shown], seed=3))


def test_reconstructions_of_other_data_lie_against_what_was_observed(labelled):
    x = torch.randn(50, 4) * torch.tensor([1.0, 10.0, 100.0, 1.0])
    x[:, 3] = 2.0  # a constant feature
    pair = pv.models.VAE(4, 2, hidden_dims=(4,), likelihood="normal")
    axes = labelled(plot_reconstructions(pair, x, seed=3)).axes[0]
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
def test_density_is_the_pair_s_own_and_integrates_to_at_most_one(labelled, monkeypatch, make, dtype):
    pair, x = make(), torch.rand(30, 2, dtype=dtype)
    drawn = []

    def keep(self, first, second, density, **options):
        drawn.append((first, second, torch.as_tensor(density)))
        return original(self, first, second, density, **options)

    original = matplotlib.axes.Axes.contourf
    monkeypatch.setattr(matplotlib.axes.Axes, "contourf", keep)
    axes = labelled(plot_density(pair, x)).axes[0]
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
def test_axes_are_named_for_the_features(labelled, names):
    pair, x = pv.models.GMM(2, 2), torch.randn(30, 2)
    expected = names or ("feature 1", "feature 2")
    for figure in (plot_samples(pair, x, feature_names=names), plot_density(pair, x, feature_names=names)):
        axes = labelled(figure).axes[0]
        assert (axes.get_xlabel(), axes.get_ylabel()) == expected
    line = labelled(plot_samples(pv.models.GMM(2, 1), x[:, :1], feature_names=names and names[:1])).axes[0]
    assert (line.get_xlabel(), line.get_ylabel()) == (expected[0], "density")


def test_densities_have_one_titled_panel_each(labelled):
    x = torch.randn(30, 2)
    figure = labelled(plot_densities({"one": pv.models.GMM(1, 2), "two": pv.models.GMM(2, 2)}, x))
    assert [axes.get_title() for axes in figure.axes] == ["one", "two"]


@pytest.mark.parametrize("has_labels", [False, True])
def test_latents_lie_at_the_guide_s_means_coloured_by_label(labelled, has_labels):
    pair = pv.models.VAE(6, 2, hidden_dims=(4,))
    x = torch.bernoulli(torch.full((40, 6), 0.5))
    labels = torch.arange(40) % 12 if has_labels else None
    figure = labelled(plot_latents(pair, x, "z", labels=labels))
    means = latents(pair, x, mean=True)["z"]
    axes = figure.axes[0]
    if not has_labels:
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
    figure = plot_latents(pair, x, "z", labels=make(torch.arange(9) % 3))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0", "1", "2"]
    named = plot_latents(pair, x.numpy(), "z", labels=["a", "b", "a"] * 3)
    assert [text.get_text() for text in named.legends[0].get_texts()] == ["a", "b"]


def test_latents_of_more_dimensions_say_which_are_shown(labelled):
    pair, x = pv.models.VAE(6, 4, hidden_dims=(4,)), torch.bernoulli(torch.full((9, 6), 0.5))
    axes = labelled(plot_latents(pair, x, "z")).axes[0]
    assert axes.get_title() == "Posterior means of the data (guide)\ndimensions 1 and 2 of 4"
    torch.testing.assert_close(points(axes.collections[0]).float(), latents(pair, x, mean=True)["z"][:, :2])


VAE1, VAE2 = (pv.models.VAE(6, size, hidden_dims=(4,)) for size in (1, 2))
LAYERS = pv.models.IWAE(6, (3, 2), hidden_dims=((4,), (4,)))
X = torch.ones(9, 6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plot_latents(VAE2, X, "w"), ValueError, "name: expected one of z; got 'w'"),
        (lambda: plot_latents(LAYERS, X, "z3"), ValueError, "name: expected one of z1, z2; got 'z3'. Did you mean"),
        (lambda: plot_latents(VAE1, X, "z"), ValueError, "name: expected a latent of 2 dimensions or more; 'z' of"),
        (
            lambda: plot_latents(VAE2, X, "z", labels=[1, 2]),
            ValueError,
            r"labels: expected shape \(9,\).* got \(2,\)",
        ),
        (lambda: plot_latents(VAE2, X, "z", labels=[0.5] * 9), TypeError, "labels: expected whole numbers or names"),
        (lambda: plot_latents(VAE2, X[:, :5], "z"), ValueError, "x: expected 6 features"),
        (lambda: plot_samples(VAE2, X, image_shape=(4, 4)), ValueError, "image_shape: expected .* product is 6"),
    ],
)
def test_errors_name_the_argument_and_the_fix(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_discrete_and_global_latents_are_refused():
    class Amortized(pv.Pair):
        data_dim = 2

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("c", pyro.distributions.Categorical(x.new_ones(3)))
            pyro.sample("mu", pyro.distributions.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"^name: expected a real latent of 2 dimensions or more; 'c' of the guide"):
        plot_latents(Amortized(), torch.randn(4, 2), "c")
    with pytest.raises(ValueError, match=r"^name: expected one of c; got 'mu'\."):  # one value for all data
        plot_latents(Amortized(), torch.randn(4, 2), "mu")


def test_same_seed_gives_the_same_picture_and_the_random_state_stays():
    pair, x = pv.models.VAE(2, 2, hidden_dims=(4,), likelihood="normal"), torch.randn(20, 2)
    before, validation = torch.get_rng_state(), pyro.poutine.util.is_validation_enabled()

    def draw():
        figures = [plot_samples(pair, x), plot_reconstructions(pair, x), plot_density(pair, x)]
        buffers = [io.BytesIO() for _ in figures]
        for figure, buffer in zip(figures, buffers, strict=True):
            figure.savefig(buffer, format="png")
        return [buffer.getvalue() for buffer in buffers]

    assert draw() == draw()
    assert torch.equal(torch.get_rng_state(), before)
    assert pyro.poutine.util.is_validation_enabled() == validation
