"""Pictures of data and of fitted pairs: new data, reconstructions, densities, latents and responsibilities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from pyro import poutine
from torch import Tensor

from pyrovae.evaluation.generation import latents, local_latents, reconstruct, sample
from pyrovae.evaluation.mixtures import check_labels
from pyrovae.infer import log_weights
from pyrovae.infer.weights import same_random_state
from pyrovae.pair import Pair
from pyrovae.plots.figures import DATA, MODEL, PALETTE, name_features, new_axes, new_figure, plane_of
from pyrovae.plots.image_plots import check_latent, plot_images
from pyrovae.training.pair_checks import observed_support

__all__ = [
    "has_density",
    "plot_densities",
    "plot_density",
    "plot_latents",
    "plot_reconstructions",
    "plot_responsibilities",
    "plot_samples",
    "responsibilities",
]


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
            raise ValueError(
                f"pair: {type(pair).__name__} has a global latent, so no datum has a density of its own to draw. Give "
                "the pair a log_prob."
            )
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
def _density_around(
    pair: Pair, x: Tensor, *, margin: float, num_samples: int = 100, resolution: int = 120
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the places along either feature and p(x) there, (second, first), in a rectangle around 2-D data."""
    low, high = x.min(0).values, x.max(0).values
    room = margin * (high - low).clamp(min=1e-6)
    limits = zip((low - room).tolist(), (high + room).tolist(), strict=True)
    first, second = (torch.linspace(start, end, resolution) for start, end in limits)
    points = torch.cartesian_prod(first, second).to(next(pair.parameters(), x))
    if pair.log_prob is not None:
        log_density = pair.log_prob(points)
    else:
        with torch.random.fork_rng(), pyro.validation_enabled(False):
            torch.manual_seed(0)
            chunks = points.split(1000)
            weights = [log_weights(pair.model, pair.guide, rows, num_particles=num_samples) for rows in chunks]
        log_density = torch.cat(weights, -1).logsumexp(0) - math.log(num_samples)
    support = observed_support(pair, points[:2])
    if support is not None and not support.is_discrete:  # the margin may lie outside
        log_density = log_density.masked_fill(~support.check(points).reshape(len(points), -1).all(-1), -math.inf)
    return first, second, log_density.reshape(resolution, resolution).T.exp().cpu()


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
    found = latents(pair, x, mean=True, seed=seed)
    check_latent(name, {local: found[local] for local in local_latents(pair, x[:2])}, "guide")
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


@torch.no_grad()
def responsibilities(pair: Pair, x: Tensor) -> Tensor | None:
    """Return q(z | x) over the components of a mixture, (N, K), on the CPU.

    It is the guide's where that samples the component, else the exact p(z | x). None where the pair is no mixture with
    one discrete latent.
    """
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
    """Plot the data side by side, coloured by the components that each pair gives them to. Mixed colours: undecided.

    An amortized pair shows what its guide says; the lines of p(x) show what its model says. Data of more than two
    features are shown in their first two principal components, without lines.

    Args:
        pairs: mixtures, by title.
        x: data, (N, D).
        feature_names: names of the axes.
        columns: number of panels in a row.

    Raises:
        ValueError: a pair has no responsibilities.
    """
    project, names = plane_of(x.cpu(), feature_names)
    shown = project(x.cpu())
    if x.shape[1] == 1:
        shown, names = torch.cat([shown, torch.zeros_like(shown)], 1), [*names, ""]
    columns = min(columns, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    figure = new_figure(4.2 * columns, 3.6 * rows + 0.3)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(pairs) :]:
        axes.set_axis_off()
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
    for column in range(columns):
        last = grid[(len(pairs) - 1 - column) // columns, column]  # below it the grid may be empty
        last.set_xlabel(names[0], parse_math=False)
        last.tick_params(labelbottom=True)
    return figure
