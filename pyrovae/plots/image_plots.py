"""Pictures made of images in a grid: data, draws, and what a pair decodes as its latents move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer.inspect import get_dependencies
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from pyrovae.checks import check_choice, check_positive
from pyrovae.evaluation.generation import decode, latents, local_latents, model_latents
from pyrovae.evaluation.sites import mean_or_value
from pyrovae.infer.weights import same_random_state
from pyrovae.pair import Pair
from pyrovae.plots.figures import new_axes

__all__ = ["can_traverse", "check_latent", "plot_images", "plot_manifold", "plot_traversal"]


def plot_images(images: Any, image_shape: tuple[int, int], *, columns: int = 10, title: str = "") -> Figure:
    """Plot images (N, height · width), with values in [0, 1], as one grid, dark on light.

    Raises:
        TypeError: ``images`` is no array of numbers, or ``image_shape`` is not two whole numbers.
        ValueError: there is no image, or an image has not height · width values.
    """
    check_positive("columns", columns, integer=True)
    height, width = _check_image_shape(image_shape)
    images = _check_images(images, height, width)
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    cells = torch.zeros(rows * columns, height, width)  # the last row may have empty ones
    cells[: len(images)] = images.reshape(-1, height, width)
    lined = torch.nn.functional.pad(cells, (0, 1, 0, 1), value=0.15)  # a light line right of each and below it
    grid = lined.reshape(rows, columns, height + 1, width + 1).transpose(1, 2).flatten(2).flatten(0, 1)[:-1, :-1]
    across = min(8.0, max(4.0, 0.8 * columns))
    figure, axes = new_axes(across, across * grid.shape[0] / grid.shape[1] + 0.4)
    axes.imshow(grid.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title)
    return figure


def _check_image_shape(image_shape: Any) -> tuple[int, int]:
    if not isinstance(image_shape, Sequence) or len(image_shape) != 2:
        raise TypeError(f"image_shape: expected (height, width), such as (28, 28); got {image_shape!r}.")
    for size in image_shape:
        check_positive("image_shape", size, integer=True)
    height, width = image_shape
    return height, width


def _check_images(images: Any, height: int, width: int) -> Tensor:
    """Return the images as a tensor (N, height · width) on the CPU."""
    try:
        found = torch.as_tensor(images).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"images: expected an array (N, height · width); got {type(images).__name__}.") from error
    if found.dim() < 2 or found.numel() == 0:
        raise ValueError(f"images: expected shape (N, {height * width}), one image a row; got {tuple(found.shape)}.")
    if (size := found[0].numel()) != height * width:
        raise ValueError(
            f"image_shape: expected a height and a width whose product is {size}, the values of each image; got "
            f"{(height, width)}, which makes {height * width}."
        )
    return found.reshape(len(found), -1)


def plot_manifold(
    pair: Pair, name: str, image_shape: tuple[int, int], *, size: int = 20, data_dim: int | None = None
) -> Figure:
    """Plot images decoded over a 2-D latent, at quantiles of its N(0, I) prior (Kingma and Welling 2014, fig. 4).

    Raises:
        TypeError, ValueError: the model has no such latent, or it is not 2-D; another bad option.
    """
    check_positive("size", size, integer=True)
    _check_image_shape(image_shape)
    check_latent(name, model_latents(pair, data_dim), "model", wants_two=True)
    ticks = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.02, 0.98, size))
    grid = torch.cartesian_prod(ticks.flip(0), ticks).flip(1).to(next(pair.parameters()))
    images = decode(pair, {name: grid}, data_dim=data_dim, seed=0)
    title = "Decoded from the 2-D latent, at quantiles of its prior"
    figure = plot_images(images, image_shape, columns=size, title=title)
    axes = figure.axes[0]
    axes.set_axis_on()
    axes.set(xlabel=f"{name}, first", ylabel=f"{name}, second", xticks=[], yticks=[])
    return figure


def check_latent(name: str, values: dict[str, Tensor], program: str, *, wants_two: bool = False) -> None:
    """Raise ValueError unless ``name`` is among the latents ``values`` of the program and can be drawn in a plane.

    It must be real and have two dimensions or more; exactly two, where ``wants_two``.
    """
    check_choice("name", name, values)
    value = values[name]
    wanted = "2 dimensions" if wants_two else "2 dimensions or more"
    if not value.is_floating_point():
        raise ValueError(f"name: expected a real latent of {wanted}; {name!r} of the {program} is discrete.")
    if value.dim() != 2 or value.shape[1] < 2 or (wants_two and value.shape[1] > 2):
        shape = value.shape[1] if value.dim() == 2 else tuple(value.shape[1:])
        raise ValueError(
            f"name: expected a latent of {wanted}; {name!r} of the {program} has {shape}. Choose another, or build "
            "the pair with one of 2 dimensions."
        )


def plot_traversal(
    pair: Pair,
    x: Tensor,  # (1, D), or more rows, of which only the first counts
    name: str,
    image_shape: tuple[int, int],
    *,
    dimensions: Sequence[int],
    steps: int = 11,
) -> Figure:
    """Plot images decoded as one dimension of a latent moves from −2.5 to 2.5, a row for each of ``dimensions``.

    The other dimensions and latents stay at the posterior mean of the first datum. Latents whose prior depends on the
    moved one (the layers below it) are at their prior's mean given it.
    """
    means = latents(pair, x[:1], mean=True, seed=0)
    local = local_latents(pair, x[:1])
    below = _latents_below(pair, x[:1], name)
    values = torch.linspace(-2.5, 2.5, steps)
    count = steps * len(dimensions)
    z = {
        site: value.expand(count, *value.shape[1:]).clone() if site in local else value
        for site, value in means.items()
        if site not in below
    }
    for row, dimension in enumerate(dimensions):
        z[name][row * steps : (row + 1) * steps, dimension] = values.to(z[name])
    with _SitesAtMean(below):
        images = decode(pair, z, data_dim=x.shape[1], seed=0)
    figure = plot_images(images, image_shape, columns=steps, title=f"One dimension of {name} a row")
    axes = figure.axes[0]
    axes.set_axis_on()
    height, width = (size + 1 for size in image_shape)  # with the line between two
    axes.set_xticks([width * (at + 0.5) - 1 for at in (0, (steps - 1) / 2, steps - 1)], ["−2.5", "0", "2.5"])
    middles = [height * (row + 0.5) - 1 for row in range(len(dimensions))]
    axes.set_yticks(middles, [f"{name}[{dimension}]" for dimension in dimensions])
    axes.tick_params(length=0)
    return figure


def can_traverse(pair: Pair, x: Tensor, name: str) -> bool:
    """Return whether each datum has a value of the latent ``name``, and every real number is a possible value."""
    with same_random_state(), pyro.validation_enabled(False), torch.no_grad():
        site: Any = poutine.trace(pair.guide).get_trace(x[:2].to(next(pair.parameters(), x))).nodes[name]
    support = getattr(site["fn"].support, "base_constraint", site["fn"].support)
    return support is constraints.real and any(frame.name == "data" for frame in site["cond_indep_stack"])


def _latents_below(pair: Pair, x: Tensor, name: str) -> set[str]:
    """Return the latents whose prior depends on the latent ``name``, directly or through other latents."""
    with same_random_state(), pyro.validation_enabled(False), torch.no_grad():
        needs: Any = get_dependencies(pair.model, (x.to(next(pair.parameters(), x)),))
    found = {name}
    for site, upstream in needs["prior_dependencies"].items():  # in the order of the model
        if site in needs["posterior_dependencies"] and found & upstream.keys():  # a latent, not the data
            found.add(site)
    return found - {name}


class _SitesAtMean(Messenger):
    """Handler that sets the named sites to the means of their distributions."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self._names = names

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self._names:
            msg["value"] = mean_or_value(msg["fn"], msg["value"])
