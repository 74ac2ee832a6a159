"""Grids of images: each image stands in its place, and a traversal moves one dimension and nothing else."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrovae as pv
from pyrovae.evaluation import decode, latents
from pyrovae.evaluation.generation import can_traverse
from pyrovae.plots.pair_plots import plot_images, plot_manifold, plot_traversal

SHAPE = (3, 2)  # unequal, so that a transposed image would show
VALUES = torch.linspace(-2.5, 2.5, 11)


@pytest.mark.parametrize(("count", "columns"), [(1, 10), (7, 10), (23, 5), (20, 10)])
def test_images_stand_in_reading_order(labelled, images_of, count, columns):
    images = torch.rand(count, 6)
    figure = labelled(plot_images(images, SHAPE, columns=columns, title="Images"))
    found = images_of(figure, SHAPE)
    assert found.shape[1] == min(columns, count)
    found = found.reshape(-1, 6)
    torch.testing.assert_close(found[:count], images)
    assert (found[count:] == 0).all()  # empty cells are blank
    assert figure.axes[0].images[0].get_clim() == (0, 1)  # grey levels are not stretched


def test_images_are_taken_as_arrays_of_any_kind(images_of):
    images = torch.rand(7, 6)
    for same in (images.numpy(), images.tolist(), images.reshape(7, *SHAPE)):
        found = images_of(plot_images(same, list(SHAPE)), SHAPE).reshape(-1, 6)
        torch.testing.assert_close(found, images)


def test_manifold_rises_along_its_axes(labelled, images_of):
    """The first latent rises from left to right, the second from bottom to top, at the quantiles of N(0, 1)."""
    pair = pv.models.VAE(6, 2, hidden_dims=(4,))
    figure = labelled(plot_manifold(pair, "z", SHAPE, size=5))
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("z, first", "z, second")
    found = images_of(figure, SHAPE).reshape(5, 5, 6)
    ticks = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.02, 0.98, 5))
    for row, column in ((0, 0), (0, 4), (4, 0), (1, 3)):
        z = torch.stack([ticks[column], ticks[4 - row]]).unsqueeze(0)
        torch.testing.assert_close(found[row, column], decode(pair, {"z": z})[0])


VAE2, VAE4 = (pv.models.VAE(6, size, hidden_dims=(4,)) for size in (2, 4))
LAYERS = pv.models.IWAE(6, (3, 2), hidden_dims=((4,), (4,)))
X = torch.ones(9, 6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plot_manifold(VAE2, "w", SHAPE), ValueError, "name: expected one of z; got 'w'"),
        (lambda: plot_manifold(VAE2, "x", SHAPE), ValueError, "name: expected one of z; got 'x'"),
        (lambda: plot_manifold(VAE4, "z", SHAPE), ValueError, "name: expected a latent of 2 dimensions; .* has 4"),
        (lambda: plot_manifold(LAYERS, "z1", SHAPE), ValueError, "name: expected a latent of 2 dimensions; .* has 3"),
        (lambda: plot_manifold(VAE2, "z", (4, 2)), ValueError, "image_shape: expected .* product is 6"),
        (lambda: plot_manifold(VAE2, "z", SHAPE, size=0), ValueError, "size: expected a whole number, 1 or more"),
        (lambda: plot_images(X, (2, 4)), ValueError, r"image_shape: .* product is 6, .* got \(2, 4\), which makes 8"),
        (lambda: plot_images(X, 6), TypeError, r"image_shape: expected \(height, width\), such as .* got 6"),
        (lambda: plot_images(X, (1.5, 4)), TypeError, "image_shape: expected a whole number"),
        (
            lambda: plot_images(X[0], SHAPE),
            ValueError,
            r"images: expected shape \(N, 6\), one image a row; got \(6,\)",
        ),
        (lambda: plot_images(X[:0], SHAPE), ValueError, r"images: expected shape .* got \(0, 6\)"),
        (lambda: plot_images("X", SHAPE), TypeError, "images: expected an array .* got str"),
        (lambda: plot_images(X, SHAPE, columns=0), ValueError, "columns: expected a whole number, 1 or more"),
    ],
)
def test_errors_name_the_argument_and_the_fix(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


# Traversals


class Layers(pv.Pair):
    """Linear pair, top → bottom → x. The latent ``side`` also acts on x, and so does ``shift``, one for all data."""

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


@pytest.fixture
def case():
    pair, x = Layers(), torch.randn(4, 6)
    return pair, x, latents(pair, x[:1], mean=True, seed=0)


def expected(pair, z, name, dimension):
    """Return the images of a row, (11, H, W), by hand: one dimension moves, latents below it take their mean."""
    z = {site: value.expand(11, -1).clone() if value.dim() == 2 else value for site, value in z.items()}
    z[name][:, dimension] = VALUES
    if name == "top":
        z["bottom"] = z["top"] @ pair.down
    return (z["bottom"] @ pair.out + z["side"] @ pair.beside + z["shift"]).detach().reshape(11, *SHAPE)


@pytest.mark.parametrize(
    ("name", "dimensions"), [("bottom", [2, 0]), ("bottom", [1]), ("side", [0, 1]), ("top", [1, 0]), ("top", [0])]
)
def test_traversal_moves_one_dimension_and_nothing_else(saved, images_of, case, name, dimensions):
    pair, x, means = case
    figure = saved(plot_traversal(pair, x, name, SHAPE, dimensions=dimensions))
    found = images_of(figure, SHAPE)
    for row, dimension in zip(found, dimensions, strict=True):
        torch.testing.assert_close(row, expected(pair, means, name, dimension))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"{name}[{d}]" for d in dimensions]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["−2.5", "0", "2.5"]
    for row, tick in enumerate(axes.get_yticks()):
        assert tick == row * (SHAPE[0] + 1) + (SHAPE[0] - 1) / 2  # the middle of its row


def test_a_dimension_without_effect_is_a_row_of_equal_images(images_of, case):
    pair, x, _ = case
    dead, live = images_of(plot_traversal(pair, x, "bottom", SHAPE, dimensions=[2, 0]), SHAPE)
    assert bool((dead == dead[0]).all())
    assert not bool((live == live[0]).all())


def test_traversal_moves_every_layer_of_the_library_s_pairs_and_draws_nothing(images_of, case):
    torch.manual_seed(0)
    vae = pv.models.VAE(6, 3, hidden_dims=(5,))
    iwae = pv.models.IWAE(6, (3, 2), hidden_dims=((5,), (4,)))
    x = torch.rand(3, 6).round()
    for pair, name in ((vae, "z"), (iwae, "z1"), (iwae, "z2")):
        state = torch.get_rng_state()
        images = images_of(plot_traversal(pair, x, name, SHAPE, dimensions=[1, 0], steps=5), SHAPE)
        assert torch.equal(torch.get_rng_state(), state)
        assert images.shape == (2, 5, *SHAPE)
        assert bool(((images > 0) & (images < 1)).all())
        assert all(not torch.equal(images[row, 0], images[row, -1]) for row in (0, 1))  # each layer moves the image
        again = images_of(plot_traversal(pair, x, name, SHAPE, dimensions=[1, 0], steps=5), SHAPE)
        assert torch.equal(images, again)  # nothing in it is drawn


def test_only_real_latents_of_each_datum_can_be_traversed(case):
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
