"""Pictures of a fitted pair. Each function returns a ``Figure`` and touches no global state of matplotlib."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pyrovae.checks import check_choice, check_positive
from pyrovae.checks_pair import observed_support
from pyrovae.evaluation.generation import decode, latents, local_latents, model_latents, reconstruct, sample
from pyrovae.evaluation.mixtures import check_labels
from pyrovae.infer import log_weights
from pyrovae.infer.weights import same_random_state
from pyrovae.pair import Pair

__all__ = [
    "new_figure",
    "plot_densities",
    "plot_density",
    "plot_history",
    "plot_images",
    "plot_latents",
    "plot_manifold",
    "plot_reconstructions",
    "plot_samples",
]

DATA, MODEL = "#33658a", "#d1495b"  # told apart in grey and by colour-blind eyes


class _Figure(Figure):
    """A figure that a notebook shows even where pyplot was not loaded."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """An empty one, in inches, outside pyplot's global state."""
    return _Figure(figsize=(width, height), layout="constrained")


def _axis_names(feature_names: Sequence[str] | None, x: Tensor) -> tuple[str, ...]:
    return tuple(feature_names or [f"feature {i + 1}" for i in range(x.shape[1])])[:2]


def _name_axes(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xlabel(names[0], parse_math=False)  # a dollar sign is one
    axes.set_ylabel(names[1], parse_math=False)


def save_figures(figures: dict[str, Callable[[], Figure]], folder: Path) -> list[Path]:
    """Draw each picture into ``folder``, by name; one that fails is a line on stderr. Returns the files."""
    files = []
    for name, draw in figures.items():
        file = folder / f"{name}.png"
        try:
            folder.mkdir(exist_ok=True)
            draw().savefig(file, dpi=150)
        except Exception as error:  # a person's own pair may do anything, and the numbers are written by now
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"pictures: could not draw {name} ({reason})", file=sys.stderr)
        else:
            files.append(file)
    return files


def plot_history(history: Sequence[dict[str, float]]) -> Figure:
    """The bound against epochs, on training and held-out data (nats per datum)."""
    figure = new_figure(6, 4)
    axes = figure.subplots()
    epochs = [row["epoch"] for row in history]
    curves = {"training data": [row["train_bound"] for row in history]}
    if any("validation_bound" in row for row in history):
        curves["held-out data"] = [row.get("validation_bound", math.nan) for row in history]
    for (label, curve), color in zip(curves.items(), (DATA, MODEL), strict=False):
        axes.plot(epochs, curve, color=color, label=label, marker="o" if len(history) == 1 else None)
    # The first epochs are far below the rest: show what happens after them.
    later = np.array([curve[len(history) // 10 :] for curve in curves.values()])
    low, high = np.nanmin(later), np.nanmax(later)
    if high > low:
        axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    axes.set(xlabel="epoch", ylabel="bound (nats per datum)", title="Training")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def plot_images(images: Any, image_shape: tuple[int, int], *, columns: int = 10, title: str = "") -> Figure:
    """Images (N, height · width), with values in [0, 1], as one grid, dark on light.

    Raises:
        TypeError: ``images`` is no array of numbers, or ``image_shape`` no two whole numbers.
        ValueError: an image has not height · width values, or there is none.
    """
    check_positive("columns", columns, integer=True)
    height, width = _check_image_shape(image_shape)
    images = _check_images(images, height, width)
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    grid = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1), 0.15)  # light lines between
    cells = torch.zeros(rows * columns, height, width)  # the last row may have empty ones
    cells[: len(images)] = images.reshape(-1, height, width)
    for index, image in enumerate(cells.numpy()):
        top, left = (index // columns) * (height + 1), (index % columns) * (width + 1)
        grid[top : top + height, left : left + width] = image
    across = min(8.0, max(4.0, 0.8 * columns))
    figure = new_figure(across, across * grid.shape[0] / grid.shape[1] + 0.4)
    axes = figure.subplots()
    axes.imshow(grid, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
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
    """As a tensor (N, height · width), on the CPU."""
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


def plot_samples(
    pair: Pair,
    x: Tensor,
    *,
    image_shape: tuple[int, int] | None = None,
    feature_names: Sequence[str] | None = None,
    drawn: Tensor | None = None,
    seed: int = 0,
) -> Figure:
    """New data from the model: images (as pixel means), or beside the data in their first two principal components.

    ``drawn`` are rows that were drawn already, to be shown in place of new ones; no images.
    """
    if image_shape is not None:
        means = sample(pair, 100, mean=True, data_dim=x.shape[1], seed=seed)
        return plot_images(means, image_shape, title="Drawn from the model (pixel means)")
    if drawn is None:
        drawn = sample(pair, min(len(x), 1000), data_dim=x.shape[1], seed=seed)
    drawn, shown = drawn.cpu(), x[:1000].cpu()
    labels = _axis_names(feature_names, x)
    if x.shape[1] != 2:
        from sklearn.decomposition import PCA

        pca = PCA(2).fit(shown.numpy()) if x.shape[1] > 2 else None
        if pca is not None:
            shown, drawn = (torch.from_numpy(pca.transform(rows.numpy())) for rows in (shown, drawn))
            labels = ("first principal component", "second principal component")
    figure = new_figure(6, 5)
    axes = figure.subplots()
    if x.shape[1] == 1:
        bins = np.histogram_bin_edges(torch.cat([shown, drawn]).numpy(), bins=40).tolist()
        axes.hist(shown[:, 0].numpy(), bins, density=True, alpha=0.6, color=DATA, label="data")
        axes.hist(drawn[:, 0].numpy(), bins, density=True, histtype="step", color=MODEL, label="drawn from the model")
        labels = (labels[0], "density")
    else:
        axes.scatter(shown[:, 0], shown[:, 1], s=12, color=DATA, alpha=0.6, label="data")
        axes.scatter(
            drawn[:, 0],
            drawn[:, 1],
            s=14,
            color=MODEL,
            alpha=0.6,
            marker="x",
            linewidth=0.8,
            label="drawn from the model",
        )
    _name_axes(axes, labels)
    axes.set_title("Data and new data from the model")
    axes.legend()
    return figure


def plot_reconstructions(pair: Pair, x: Tensor, *, image_shape: tuple[int, int] | None = None, seed: int = 0) -> Figure:
    """Images: rows of data, each above its reconstruction. Otherwise reconstructed against observed features."""
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
    figure = new_figure(5, 5)
    axes = figure.subplots()
    axes.scatter(((rows - loc) / scale).flatten(), ((means - loc) / scale).flatten(), s=6, alpha=0.4, color=DATA)
    limits = [float(((rows - loc) / scale).min()), float(((rows - loc) / scale).max())]
    axes.plot(limits, limits, color=MODEL, linewidth=1, label="perfect")
    axes.set(
        xlabel="observed (standardised)",
        ylabel="reconstructed (standardised)",
        title="Reconstructions, all features",
    )
    axes.legend()
    return figure


def plot_density(pair: Pair, x: Tensor, *, feature_names: Sequence[str] | None = None) -> Figure:
    """2-D data and the fitted density: exact where the pair has ``log_prob``, else by importance sampling.

    Raises:
        ValueError: the pair has a global latent and no ``log_prob``: no datum has a density of its own.
    """
    title = "Data and fitted density"
    figure = plot_densities({title: pair}, x, feature_names=feature_names, width=6, height=5)
    figure.axes[0].legend()
    return figure


def plot_densities(
    pairs: dict[str, Pair],
    x: Tensor,
    *,
    feature_names: Sequence[str] | None = None,
    width: float = 4.5,
    height: float = 4,
) -> Figure:
    """:func:`plot_density` of several pairs by title, side by side."""
    figure = new_figure(width * len(pairs), height)
    for axes, (title, pair) in zip(np.atleast_1d(figure.subplots(1, len(pairs))), pairs.items(), strict=True):
        _draw_density(axes, pair, x)
        _name_axes(axes, _axis_names(feature_names, x))
        axes.set_title(title)
    return figure


@torch.no_grad()
def has_density(pair: Pair, x: Tensor) -> bool:
    """Whether each datum has a density of its own: with a global latent, only all data together have one."""
    if pair.log_prob is not None:
        return True
    few = x[:2].to(next(pair.parameters(), x))
    with same_random_state(), pyro.validation_enabled(False):
        return log_weights(pair.model, pair.guide, few, num_particles=2).dim() == 2


@torch.no_grad()
def _draw_density(axes: Axes, pair: Pair, x: Tensor, num_samples: int = 100, resolution: int = 120) -> None:
    if not has_density(pair, x):
        raise ValueError(
            f"pair: {type(pair).__name__} has a global latent, so no datum has a density of its own to draw. Give the "
            "pair a log_prob."
        )
    low, high = x.min(0).values, x.max(0).values
    margin = 0.15 * (high - low).clamp(min=1e-6)
    first, second = (
        torch.linspace(float(a), float(b), resolution) for a, b in zip(low - margin, high + margin, strict=True)
    )
    parameter = next(pair.parameters())
    grid = torch.cartesian_prod(first, second).to(parameter.device, parameter.dtype)
    if pair.log_prob is not None:
        log_density = pair.log_prob(grid)
    else:
        with torch.random.fork_rng(), pyro.validation_enabled(False):
            torch.manual_seed(0)
            weights = [
                log_weights(pair.model, pair.guide, rows, num_particles=num_samples) for rows in grid.split(1000)
            ]
        log_density = torch.cat([torch.logsumexp(w, 0) for w in weights], -1) - math.log(num_samples)
    support = observed_support(pair, grid[:2])
    if support is not None and not support.is_discrete:  # the margin may lie outside
        log_density = log_density.masked_fill(~support.check(grid).reshape(len(grid), -1).all(-1), -math.inf)
    density = log_density.reshape(resolution, resolution).T.exp().cpu()
    axes.contourf(first, second, density, levels=20, cmap="Blues")
    axes.contour(first, second, density, levels=8, colors="white", linewidths=0.5)
    axes.scatter(x[:, 0].cpu(), x[:, 1].cpu(), s=10, color=MODEL, alpha=0.7, linewidth=0, label="data")


def plot_manifold(
    pair: Pair, name: str, image_shape: tuple[int, int], *, size: int = 20, data_dim: int | None = None
) -> Figure:
    """Images decoded over a 2-D latent, at quantiles of its N(0, I) prior (Kingma and Welling 2014, fig. 4).

    Raises:
        TypeError, ValueError: the model has no such latent, or it is not 2-D; another bad option.
    """
    check_positive("size", size, integer=True)
    _check_image_shape(image_shape)
    _check_latent(name, model_latents(pair, data_dim), "model", wants_two=True)
    ticks = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.02, 0.98, size))
    parameter = next(pair.parameters())
    grid = torch.cartesian_prod(ticks.flip(0), ticks).flip(1).to(parameter.device, parameter.dtype)
    means = decode(pair, {name: grid}, data_dim=data_dim, seed=0)
    title = "Decoded from the 2-D latent, at quantiles of its prior"
    figure = plot_images(means, image_shape, columns=size, title=title)
    axes = figure.axes[0]
    axes.set_axis_on()
    axes.set(xlabel=f"{name}, first", ylabel=f"{name}, second", xticks=[], yticks=[])
    return figure


def plot_latents(
    pair: Pair,
    x: Tensor,  # (N, D)
    name: str,
    *,
    labels: Any = None,  # (N,)
    seed: int = 0,
) -> Figure:
    """The guide's means of a latent, in its first two dimensions, coloured by label where there are labels.

    Raises:
        TypeError, ValueError: the guide has no such latent, or it is not real with two dimensions or more; bad data
            or labels.
    """
    found = latents(pair, x, mean=True, seed=seed)
    _check_latent(name, {local: found[local] for local in local_latents(pair, x[:2])}, "guide")
    means = found[name].cpu().numpy()
    title, dimensions = "Posterior means of the data (guide)", means.shape[1]
    if dimensions > 2:
        title += f"\ndimensions 1 and 2 of {dimensions}"
    figure = new_figure(6, 5)
    axes = figure.subplots()
    if labels is None:
        axes.scatter(means[:, 0], means[:, 1], s=12, alpha=0.7, linewidth=0, color=DATA)
    else:
        known = check_labels(labels, len(means))
        for index, label in enumerate(np.unique(known)):
            rows = means[known == label]
            axes.scatter(rows[:, 0], rows[:, 1], s=12, alpha=0.7, linewidth=0, color=f"C{index % 10}", label=str(label))
        figure.legend(title="label", loc="outside right upper", markerscale=2)
    axes.set(xlabel=f"{name}, first", ylabel=f"{name}, second", title=title)
    return figure


def _check_latent(name: str, values: dict[str, Tensor], program: str, *, wants_two: bool = False) -> None:
    """``values`` by name, each (data, ...): the one to be shown must be real, of two dimensions or more (just two)."""
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
