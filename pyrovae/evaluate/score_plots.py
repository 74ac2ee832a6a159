"""Pictures of what was measured: KL by dimension, k̂, inference gaps; and a latent's dimensions one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pyrovae.evaluate.collapse import USED_NATS
from pyrovae.evaluate.plots import DATA, MODEL, plot_images
from pyrovae.evaluate.predict import decode, latents, local_latents

if TYPE_CHECKING:
    from pyrovae.evaluate.gaps import InferenceGaps
    from pyrovae.pair import Pair

__all__ = ["plot_gaps", "plot_kl", "plot_pareto_k", "plot_traversal"]

GREY = "#9a9a9a"
GAP = "#e0a030"


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def plot_kl(kl_per_dimension: Mapping[str, Sequence[float]]) -> Figure:
    """The KL of each latent dimension, largest first; those below ``USED_NATS`` in grey: they carry nothing."""
    latent_names = list(kl_per_dimension)
    figure = _figure(7, 1.2 + 2.0 * len(latent_names))
    for axes, name in zip(np.atleast_1d(figure.subplots(len(latent_names), 1)), latent_names, strict=True):
        values = sorted((max(v, 0.0) for v in kl_per_dimension[name]), reverse=True)
        used = sum(v > USED_NATS for v in values)
        axes.bar(range(1, len(values) + 1), values, color=[DATA if v > USED_NATS else GREY for v in values])
        # Grey bars are too low to see: a mark under the axis shows where they are.
        dead = range(used + 1, len(values) + 1)
        if dead:
            axes.plot(
                dead, [0] * len(dead), "x", color=GREY, markersize=5, clip_on=False, label=f"unused ({len(dead)})"
            )
            axes.legend(frameon=False)
        axes.set(
            xlabel=f"dimensions of {name}, by KL",
            ylabel="KL (nats)",
            title=f"{name}: {used} of {len(values)} dimensions above {USED_NATS:g} nats",
        )
        axes.set_xlim(0.3, max(len(values), 3) + 0.7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", alpha=0.3)
    return figure


def plot_pareto_k(pareto_k: Tensor) -> Figure:
    """A histogram of k̂ over data, with the thresholds 0.5 and 0.7 (Vehtari et al. 2024)."""
    k = pareto_k[torch.isfinite(pareto_k)].double().cpu().numpy()
    figure = _figure(6, 3.2)
    axes = figure.subplots()
    low, high = (min(-0.25, float(k.min())), max(1.0, float(k.max()))) if len(k) else (-0.25, 1.0)
    edges = np.linspace(low, high, 41).tolist()
    axes.hist(k, bins=edges, color=DATA)
    for threshold, color, text in ((0.5, GAP, "0.5"), (0.7, MODEL, "0.7: unreliable above")):
        axes.axvline(threshold, color=color, linestyle="--", linewidth=1.2, label=text)
    axes.set(xlabel="Pareto k̂ of the importance weights", ylabel="data", title=f"k̂ of {len(k)} data")
    axes.legend(frameon=False)
    return figure


def plot_gaps(gaps: Mapping[str, InferenceGaps]) -> Figure:
    """Bars of what separates each ELBO from the evidence: approximation gap, then amortization gap (nats per datum)."""
    names = list(gaps)
    figure = _figure(7, 1.3 + 0.6 * len(names))
    axes = figure.subplots()
    approximation = [max(g.approximation_gap, 0.0) for g in gaps.values()]  # below 0 by Monte Carlo error
    amortization = [max(g.amortization_gap, 0.0) for g in gaps.values()]
    errors = [math.hypot(g.approximation_gap_stderr, g.amortization_gap_stderr) for g in gaps.values()]
    axes.barh(names, approximation, height=0.55, color=DATA, label="approximation gap")
    axes.barh(names, amortization, height=0.55, left=approximation, color=GAP, xerr=errors, label="amortization gap")
    axes.invert_yaxis()
    axes.set(xlabel="log evidence − ELBO (nats per datum)", xlim=(0, None))
    axes.margins(x=0.1)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.45 / (1 + 0.3 * len(names))), ncols=2)
    return figure


def plot_traversal(
    pair: Pair,
    x: Tensor,  # (1, D), or more rows, of which the first counts
    name: str,
    image_shape: tuple[int, int],
    *,
    dimensions: Sequence[int],
    steps: int = 11,
) -> Figure:
    """Images decoded as one dimension of a latent moves from −2.5 to 2.5, the others held at their posterior mean."""
    means = latents(pair, x[:1], mean=True, seed=0)
    local = local_latents(pair, x[:1])
    values = torch.linspace(-2.5, 2.5, steps)
    count = steps * len(dimensions)
    z = {
        site: value.expand(count, *value.shape[1:]).clone() if site in local else value for site, value in means.items()
    }
    for row, dimension in enumerate(dimensions):
        z[name][row * steps : (row + 1) * steps, dimension] = values.to(z[name])
    images = decode(pair, z, data_dim=x.shape[1])
    figure = plot_images(images, image_shape, columns=steps, title=f"One dimension of {name} a row, from −2.5 to 2.5")
    axes = figure.axes[0]
    axes.set_axis_on()
    axes.set(
        xlabel=f"value of the dimension of {name}", ylabel="dimensions with the most KL first", xticks=[], yticks=[]
    )
    return figure
