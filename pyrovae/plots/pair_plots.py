"""Pictures of data and of fitted pairs: images, new data, reconstructions, densities, latents and responsibilities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from pyrovae.checks import check_choice, check_positive
from pyrovae.evaluation.generation import decode, guide_sites, model_latents, reconstruct, sample, traverse
from pyrovae.evaluation.mixtures import check_labels, responsibilities
from pyrovae.evaluation.sites import is_local, mean_or_value
from pyrovae.infer import log_weights
from pyrovae.infer.weights import same_random_state
from pyrovae.pair import Pair
from pyrovae.plots.figures import DATA, MODEL, PALETTE, name_features, new_axes, new_figure, new_panels, plane_of
from pyrovae.training.pair_checks import observed_support

DENSITY_RESOLUTION, DENSITY_SAMPLES = 120, 100  # places along an axis; importance samples a place

# Images --------------------------------------------------------------------------------------------------------------


def plot_images(images: Any, image_shape: tuple[int, int], *, columns: int = 10, title: str = "") -> Figure:
    """Plot images (N, height · width), with values in [0, 1], as one grid, dark on light.

    Raises:
        TypeError: ``images`` is no array of numbers, or ``image_shape`` is not two whole numbers.
        ValueError: there is no image, or an image has not height · width values.
    """
    check_positive("columns", columns, integer=True)
    images = _check_images(images, image_shape)
    count, height, width = images.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    cells = torch.zeros(rows * columns, height, width)  # the last row may have empty ones
    cells[:count] = images
    lined = torch.nn.functional.pad(cells, (0, 1, 0, 1), value=0.15)  # a light line right of each and below it
    grid = lined.reshape(rows, columns, height + 1, width + 1).transpose(1, 2).flatten(2).flatten(0, 1)[:-1, :-1]
    across = min(8.0, max(4.0, 0.8 * columns))
    figure, axes = new_axes(across, across * grid.shape[0] / grid.shape[1] + 0.4)
    axes.imshow(grid.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title)
    return figure


def _check_images(images: Any, image_shape: Any) -> Tensor:
    """Return the images as a tensor (N, height, width) on the CPU."""
    if not isinstance(image_shape, Sequence) or len(image_shape) != 2:
        raise TypeError(f"image_shape: expected (height, width), such as (28, 28); got {image_shape!r}.")
    for size in image_shape:
        check_positive("image_shape", size, integer=True)
    expected = math.prod(image_shape)
    try:
        found = torch.as_tensor(images).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"images: expected an array (N, height · width); got {type(images).__name__}.") from error
    if found.dim() < 2 or found.numel() == 0:
        raise ValueError(f"images: expected shape (N, {expected}), one image a row; got {tuple(found.shape)}.")
    if (size := found[0].numel()) != expected:
        wanted = f"a height and a width whose product is {size}, the values of each image"
        raise ValueError(f"image_shape: expected {wanted}; got {tuple(image_shape)}, which makes {expected}.")
    return found.reshape(-1, *image_shape)


def plot_manifold(
    pair: Pair, name: str, image_shape: tuple[int, int], *, size: int = 20, data_dim: int | None = None
) -> Figure:
    """Plot images decoded over a 2-D latent, at quantiles of its N(0, I) prior (Kingma and Welling 2014, fig. 4).

    Raises:
        TypeError, ValueError: the model has no such latent, or it is not 2-D; another bad option.
    """
    check_positive("size", size, integer=True)
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
    """Raise ValueError unless the latent is real, with two dimensions or more; exactly two where ``wants_two``."""
    check_choice("name", name, values)
    value = values[name]
    wanted = "2 dimensions" if wants_two else "2 dimensions or more"
    if not value.is_floating_point():
        raise ValueError(f"name: expected a real latent of {wanted}; {name!r} of the {program} is discrete.")
    if value.dim() != 2 or value.shape[1] < 2 or (wants_two and value.shape[1] > 2):
        shape = value.shape[1] if value.dim() == 2 else tuple(value.shape[1:])
        fix = "Choose another, or build the pair with one of 2 dimensions."
        raise ValueError(f"name: expected a latent of {wanted}; {name!r} of the {program} has {shape}. {fix}")


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
    images = traverse(pair, x, name, dimensions, torch.linspace(-2.5, 2.5, steps))
    figure = plot_images(images, image_shape, columns=steps, title=f"One dimension of {name} a row")
    axes = figure.axes[0]
    axes.set_axis_on()
    height, width = (size + 1 for size in image_shape)  # with the line between two
    axes.set_xticks([width * (at + 0.5) - 1 for at in (0, (steps - 1) / 2, steps - 1)], ["−2.5", "0", "2.5"])
    middles = [height * (row + 0.5) - 1 for row in range(len(dimensions))]
    axes.set_yticks(middles, [f"{name}[{dimension}]" for dimension in dimensions])
    axes.tick_params(length=0)
    return figure


# Data and latents ---------------------------------------------------------------------------------------------------


def plot_samples(
    pair: Pair,
    x: Tensor,  # (N, D)
    *,
    image_shape: tuple[int, int] | None = None,
    feature_names: Sequence[str] | None = None,
    drawn: Tensor | None = None,  # (M, D)
    seed: int = 0,
) -> Figure:
    """Plot new data from the model: images as pixel means; other data beside ``x``.

    Data of more than two features are shown in the first two principal components of ``x``. ``drawn`` are rows that
    were drawn already, shown in place of new ones; they cannot be images.
    """
    if image_shape is not None:
        means = sample(pair, 100, mean=True, data_dim=x.shape[1], seed=seed)
        return plot_images(means, image_shape, title="Drawn from the model (pixel means)")
    if drawn is None:
        drawn = sample(pair, min(len(x), 1000), data_dim=x.shape[1], seed=seed)
    drawn, shown = drawn.cpu(), x[:1000].cpu()
    figure, axes = new_axes(6, 5)
    project, names = plane_of(shown, feature_names)
    shown, drawn = project(shown), project(drawn)
    old: dict[str, Any] = {"color": DATA, "label": "data", "alpha": 0.6}
    new: dict[str, Any] = {"color": MODEL, "label": "drawn from the model"}
    if x.shape[1] == 1:
        bins = np.histogram_bin_edges(torch.cat([shown, drawn]).numpy(), bins=40).tolist()
        axes.hist(shown[:, 0].numpy(), bins, density=True, **old)
        axes.hist(drawn[:, 0].numpy(), bins, density=True, histtype="step", **new)
        names = [names[0], "density"]
    else:
        axes.scatter(shown[:, 0], shown[:, 1], s=12, **old)
        axes.scatter(drawn[:, 0], drawn[:, 1], s=14, alpha=0.6, marker="x", linewidth=0.8, **new)
    name_features(axes, names)
    axes.set_title("Data and new data from the model")
    axes.legend()
    return figure


def plot_reconstructions(pair: Pair, x: Tensor, *, image_shape: tuple[int, int] | None = None, seed: int = 0) -> Figure:
    """Plot rows of images, each row above its reconstruction; other data as reconstructed against observed features."""
    if image_shape is not None:
        columns = min(10, len(x))
        rows = x[: min(40, len(x)) // columns * columns]  # whole rows
        means = reconstruct(pair, rows, seed=seed).to(rows)
        pairs = [part for both in zip(rows.split(columns), means.split(columns), strict=True) for part in both]
        title = "Data (odd rows) and their reconstructions (even rows)"
        return plot_images(torch.cat(pairs), image_shape, columns=columns, title=title)
    rows = x[:1000]
    means = reconstruct(pair, rows, seed=seed).cpu()
    rows = rows.cpu()
    loc, scale = rows.mean(0), rows.std(0, correction=0).clamp(min=1e-12)
    observed, reconstructed = ((values - loc) / scale for values in (rows, means))
    figure, axes = new_axes(5, 5)
    axes.scatter(observed.flatten(), reconstructed.flatten(), s=6, alpha=0.4, color=DATA)
    limits = [float(observed.min()), float(observed.max())]
    axes.plot(limits, limits, color=MODEL, linewidth=1, label="perfect")
    axes.set(xlabel="observed (standardised)", ylabel="reconstructed (standardised)")
    axes.set_title("Reconstructions, all features")
    axes.legend()
    return figure


def plot_density(pair: Pair, x: Tensor, *, feature_names: Sequence[str] | None = None) -> Figure:
    """Plot 2-D data over the fitted density: exact where the pair has ``log_prob``, else by importance sampling.

    Raises:
        ValueError: the pair has a global latent and no ``log_prob``: no datum has a density of its own.
    """
    title = "Data and fitted density"
    figure = plot_densities({title: pair}, x, feature_names=feature_names, width=6, height=5)
    figure.axes[0].legend()
    return figure


def plot_densities(
    pairs: Mapping[str, Pair],
    x: Tensor,  # (N, 2)
    *,
    feature_names: Sequence[str] | None = None,
    width: float = 4.5,
    height: float = 4,
) -> Figure:
    """Plot the :func:`plot_density` of several pairs, by title, side by side."""
    figure = new_figure(width * len(pairs), height)
    shown, names = x.cpu(), plane_of(x, feature_names)[1]
    for axes, (title, pair) in zip(np.atleast_1d(figure.subplots(1, len(pairs))), pairs.items(), strict=True):
        if not has_density(pair, x):
            reason = f"{type(pair).__name__} has a global latent, so no datum has a density of its own to draw"
            raise ValueError(f"pair: {reason}. Give the pair a log_prob.")
        first, second, density = _density_around(pair, x, margin=0.15)
        axes.contourf(first, second, density, levels=20, cmap="Blues")
        axes.contour(first, second, density, levels=8, colors="white", linewidths=0.5)
        axes.scatter(shown[:, 0], shown[:, 1], s=10, color=MODEL, alpha=0.7, linewidth=0, label="data")
        name_features(axes, names)
        axes.set_title(title)
    return figure


@torch.no_grad()
def has_density(pair: Pair, x: Tensor) -> bool:
    """Return whether each datum has a density of its own. With a global latent, only all data together have one."""
    if pair.log_prob is not None:
        return True
    few = x[:2].to(next(pair.parameters(), x))
    with same_random_state(), pyro.validation_enabled(False):
        return log_weights(pair.model, pair.guide, few, num_particles=2).dim() == 2


@torch.no_grad()
def _density_around(pair: Pair, x: Tensor, *, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the places along either feature and p(x) there, (second, first), in a rectangle around 2-D data."""
    low, high = x.min(0).values, x.max(0).values
    room = margin * (high - low).clamp(min=1e-6)
    limits = zip((low - room).tolist(), (high + room).tolist(), strict=True)
    first, second = (torch.linspace(start, end, DENSITY_RESOLUTION) for start, end in limits)
    points = torch.cartesian_prod(first, second).to(next(pair.parameters(), x))
    if pair.log_prob is not None:
        log_density = pair.log_prob(points)
    else:
        with torch.random.fork_rng(), pyro.validation_enabled(False):
            torch.manual_seed(0)
            chunks = points.split(1000)
            weights = [log_weights(pair.model, pair.guide, rows, num_particles=DENSITY_SAMPLES) for rows in chunks]
        log_density = torch.cat(weights, -1).logsumexp(0) - math.log(DENSITY_SAMPLES)
    support = observed_support(pair, points[:2])
    if support is not None and not support.is_discrete:  # the margin may lie outside
        log_density = log_density.masked_fill(~support.check(points).reshape(len(points), -1).all(-1), -math.inf)
    return first, second, log_density.reshape(len(first), len(second)).T.exp().cpu()


def plot_latents(
    pair: Pair,
    x: Tensor,  # (N, D)
    name: str,
    *,
    labels: Any = None,  # (N,)
    seed: int = 0,
) -> Figure:
    """Plot the guide's means of a latent in its first two dimensions, coloured by label where there are labels.

    Raises:
        TypeError, ValueError: the guide has no such latent, or it is not real with two dimensions or more; bad data
            or labels.
    """
    local = {latent: site for latent, site in guide_sites(pair, x, seed).items() if is_local(site)}
    found = {latent: mean_or_value(site["fn"], site["value"]) for latent, site in local.items()}
    check_latent(name, found, "guide")
    means = found[name].cpu().numpy()
    title, dimensions = "Posterior means of the data (guide)", means.shape[1]
    if dimensions > 2:
        title += f"\ndimensions 1 and 2 of {dimensions}"
    figure, axes = new_axes(6, 5)
    dots: dict[str, Any] = {"s": 12, "alpha": 0.7, "linewidth": 0}
    if labels is None:
        axes.scatter(means[:, 0], means[:, 1], color=DATA, **dots)
    else:
        known = check_labels(labels, len(means))
        for index, label in enumerate(np.unique(known)):
            rows = means[known == label]
            axes.scatter(rows[:, 0], rows[:, 1], color=f"C{index % 10}", label=str(label), **dots)
        figure.legend(title="label", loc="outside right upper", markerscale=2)
    axes.set(xlabel=f"{name}, first", ylabel=f"{name}, second", title=title)
    return figure


def plot_responsibilities(
    pairs: Mapping[str, Pair], x: Tensor, *, feature_names: Sequence[str] | None = None, columns: int = 3
) -> Figure:
    """Plot the data side by side, coloured by the components that each pair gives them to. Mixed colours: undecided.

    An amortized pair shows what its guide says; the lines of p(x) show what its model says. Data of more than two
    features are shown in their first two principal components, without lines. There are ``columns`` panels in a row.

    Raises:
        ValueError: a pair has no responsibilities.
    """
    project, names = plane_of(x.cpu(), feature_names)
    shown = project(x.cpu())
    if x.shape[1] == 1:
        shown, names = torch.cat([shown, torch.zeros_like(shown)], 1), [*names, ""]
    figure, grid = new_panels(len(pairs), columns, width=4.2, height=3.6, sharex=True, sharey=True)
    for axes, (title, pair) in zip(grid.flat, pairs.items(), strict=False):
        weights = responsibilities(pair, x)
        if weights is None:
            raise ValueError(f"pairs: {title!r} is no mixture: it has no responsibilities to show.")
        palette = torch.tensor([to_rgb(PALETTE[k % len(PALETTE)]) for k in range(weights.shape[1])])
        axes.scatter(shown[:, 0], shown[:, 1], s=12, c=(weights.float() @ palette).clamp(0, 1).numpy(), linewidth=0)
        if x.shape[1] == 2 and pair.log_prob is not None:
            axes.contour(*_density_around(pair, x, margin=0.08), levels=7, colors="black", linewidths=0.5, alpha=0.5)
        axes.set_title(title, parse_math=False, fontsize=10)
    figure.suptitle("Responsibilities; lines: the model's density" if x.shape[1] == 2 else "Responsibilities")
    for axes in grid[:, 0]:
        axes.set_ylabel(names[1], parse_math=False)
    for column in range(len(grid[0])):
        last = grid[(len(pairs) - 1 - column) // len(grid[0]), column]  # below it the grid may be empty
        last.set_xlabel(names[0], parse_math=False)
        last.tick_params(labelbottom=True)
    return figure
