"""Pictures of a fitted pair. Each function returns a matplotlib ``Figure`` and touches no global state of matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyrovae.evaluate.predict import decode, latents, reconstruct, sample
from pyrovae.infer import log_weights
from pyrovae.pair import Pair

__all__ = [
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


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def plot_history(history: Sequence[dict[str, float]]) -> Figure:
    """The bound against epochs, on training and held-out data (nats per datum)."""
    figure = _figure(6, 4)
    axes = figure.subplots()
    epochs = [row["epoch"] for row in history]
    axes.plot(epochs, [row["train_bound"] for row in history], color=DATA, label="training data")
    if any("validation_bound" in row for row in history):
        values = [row.get("validation_bound", math.nan) for row in history]
        axes.plot(epochs, values, color=MODEL, label="held-out data")
    # The first epochs are far below the rest: show what happens after them.
    curve = np.array([row["train_bound"] for row in history])
    if len(curve) > 10:
        low, high = (
            np.quantile(curve, 0.1),
            max(curve.max(), *(row.get("validation_bound", -math.inf) for row in history)),
        )
        axes.set_ylim(low - 0.3 * (high - low), high + 0.1 * (high - low))
    axes.set(xlabel="epoch", ylabel="bound (nats per datum)", title="Training")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def plot_images(
    images: Tensor, image_shape: tuple[int, int], *, columns: int = 10, title: str = "", gap: int = 1
) -> Figure:
    """Images (N, height · width), with values in [0, 1], as one grid."""
    height, width = image_shape
    rows = math.ceil(len(images) / columns)
    grid = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap)) * 0.5
    for index, image in enumerate(images.detach().cpu().reshape(-1, height, width).numpy()):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        grid[top : top + height, left : left + width] = image
    figure = _figure(8, 8 * grid.shape[0] / grid.shape[1] + 0.4)
    axes = figure.subplots()
    axes.imshow(grid, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title)
    return figure


def plot_samples(pair: Pair, x: Tensor, *, image_shape: tuple[int, int] | None = None, seed: int = 0) -> Figure:
    """New data from the model: images (as pixel means), or beside the data in their first two principal components."""
    if image_shape is not None:
        means = sample(pair, 100, mean=True, data_dim=x.shape[1], seed=seed)
        return plot_images(means, image_shape, title="Drawn from the model (pixel means)")
    drawn = sample(pair, min(len(x), 1000), data_dim=x.shape[1], seed=seed).cpu()
    shown = x[:1000].cpu()
    labels = ("feature 1", "feature 2")
    if x.shape[1] != 2:
        from sklearn.decomposition import PCA

        pca = PCA(2).fit(shown.numpy()) if x.shape[1] > 2 else None
        if pca is not None:
            shown, drawn = (torch.from_numpy(pca.transform(rows.numpy())) for rows in (shown, drawn))
            labels = ("first principal component", "second principal component")
    figure = _figure(6, 5)
    axes = figure.subplots()
    if x.shape[1] == 1:
        axes.hist(shown[:, 0].numpy(), bins=40, density=True, alpha=0.6, color=DATA, label="data")
        axes.hist(
            drawn[:, 0].numpy(),
            bins=40,
            density=True,
            histtype="step",
            color=MODEL,
            label="drawn from the model",
        )
        labels = ("feature 1", "density")
    else:
        axes.scatter(*shown.T.numpy(), s=12, color=DATA, alpha=0.6, label="data")
        axes.scatter(
            *drawn.T.numpy(),
            s=14,
            color=MODEL,
            alpha=0.6,
            marker="x",
            linewidth=0.8,
            label="drawn from the model",
        )
    axes.set(xlabel=labels[0], ylabel=labels[1], title="Data and new data from the model")
    axes.legend()
    return figure


def plot_reconstructions(pair: Pair, x: Tensor, *, image_shape: tuple[int, int] | None = None, seed: int = 0) -> Figure:
    """Images: rows of data, each above its reconstruction. Otherwise reconstructed against observed features."""
    if image_shape is not None:
        rows = x[:40]
        means = reconstruct(pair, rows, seed=seed)
        pairs = [
            part
            for start in range(0, len(rows), 10)
            for part in (rows[start : start + 10], means[start : start + 10].to(rows.device))
        ]
        return plot_images(torch.cat(pairs), image_shape, title="Data (odd rows) and their reconstructions (even rows)")
    rows = x[:1000]
    means = reconstruct(pair, rows, seed=seed).cpu()
    rows = rows.cpu()
    loc, scale = rows.mean(0), rows.std(0).clamp(min=1e-12)
    figure = _figure(5, 5)
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


def plot_density(pair: Pair, x: Tensor) -> Figure:
    """2-D data and the fitted density: exact where the pair has ``log_prob``, else by importance sampling."""
    figure = plot_densities({"Data and fitted density": pair}, x, width=6, height=5)
    figure.axes[0].legend()
    return figure


def plot_densities(pairs: dict[str, Pair], x: Tensor, *, width: float = 4.5, height: float = 4) -> Figure:
    """:func:`plot_density` of several pairs by title, side by side."""
    figure = _figure(width * len(pairs), height)
    for axes, (title, pair) in zip(np.atleast_1d(figure.subplots(1, len(pairs))), pairs.items(), strict=True):
        _draw_density(axes, pair, x)
        axes.set_title(title)
    return figure


@torch.no_grad()
def _draw_density(axes: Axes, pair: Pair, x: Tensor, num_samples: int = 100, resolution: int = 120) -> None:
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
        with torch.random.fork_rng():
            torch.manual_seed(0)
            weights = [
                log_weights(pair.model, pair.guide, rows, num_particles=num_samples) for rows in grid.split(1000)
            ]
        log_density = torch.cat([torch.logsumexp(w, 0) for w in weights], -1) - math.log(num_samples)
    density = log_density.reshape(resolution, resolution).T.exp().cpu()
    axes.contourf(first, second, density, levels=20, cmap="Blues")
    axes.contour(first, second, density, levels=8, colors="white", linewidths=0.5)
    axes.scatter(*x.T.cpu().numpy(), s=10, color=MODEL, alpha=0.7, linewidth=0, label="data")
    axes.set(xlabel="feature 1", ylabel="feature 2")


def plot_manifold(
    pair: Pair, name: str, image_shape: tuple[int, int], *, size: int = 20, data_dim: int | None = None
) -> Figure:
    """Images decoded on a grid over a 2-D latent, at the quantiles of its standard normal prior (Kingma and Welling 2014, fig. 4)."""
    ticks = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.02, 0.98, size))
    parameter = next(pair.parameters())
    grid = torch.cartesian_prod(ticks.flip(0), ticks).flip(1).to(parameter.device, parameter.dtype)
    means = decode(pair, {name: grid}, data_dim=data_dim)
    figure = plot_images(
        means,
        image_shape,
        columns=size,
        gap=0,
        title="Decoded from the 2-D latent, at quantiles of its prior",
    )
    return figure


def plot_latents(pair: Pair, x: Tensor, name: str, *, labels: Tensor | None = None, seed: int = 0) -> Figure:
    """The guide's means of a 2-D latent, coloured by label where there are labels."""
    means = latents(pair, x, mean=True, seed=seed)[name].cpu().numpy()
    figure = _figure(6, 5)
    axes = figure.subplots()
    options: dict[str, Any] = {"color": DATA} if labels is None else {"c": labels.cpu().numpy(), "cmap": "tab10"}
    points = axes.scatter(*means.T, s=8, alpha=0.7, linewidth=0, **options)
    if labels is not None:
        axes.legend(*points.legend_elements(), title="label", loc="best", fontsize="small")
    axes.set(xlabel=f"{name}, first", ylabel=f"{name}, second", title="Posterior means of the data (guide)")
    return figure
