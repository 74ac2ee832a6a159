"""Pictures of what was measured: KL by dimension, k̂, inference gaps; and a latent's dimensions one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator
from pyro import poutine
from pyro.infer.inspect import get_dependencies
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from pyrovae.evaluation.generation import decode, latents, local_latents
from pyrovae.evaluation.guide_reliability import BAD_K
from pyrovae.evaluation.posterior_collapse import USED_NATS
from pyrovae.evaluation.sites import mean_or_value
from pyrovae.infer.weights import same_random_state
from pyrovae.plots.pair_plots import DATA, MODEL, new_figure, plot_images

if TYPE_CHECKING:
    from pyrovae.evaluation.gaps import InferenceGaps
    from pyrovae.pair import Pair

__all__ = ["plot_gaps", "plot_kl", "plot_pareto_k", "plot_traversal"]

GREY = "#9a9a9a"
GAP = "#e0a030"


def plot_kl(kl_per_dimension: Mapping[str, Sequence[float]]) -> Figure:
    """The KL of each latent dimension, largest first; those below ``USED_NATS`` in grey: they carry nothing."""
    latent_names = list(kl_per_dimension)
    figure = new_figure(7, 1.2 + 2.0 * len(latent_names))
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
        axes.xaxis.set_major_locator(
            FixedLocator(range(1, len(values) + 1)) if len(values) <= 12 else MaxNLocator(integer=True)
        )
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    return figure


def plot_pareto_k(pareto_k: Tensor, *, threshold: float = BAD_K) -> Figure:
    """A histogram of k̂ over data, with 0.5 and the ``threshold`` of its number of samples (Vehtari et al. 2024).

    Infinite ones are counted in the title: −inf is a datum whose weights have no tail, +inf one that cannot be fitted.
    """
    k = pareto_k[torch.isfinite(pareto_k)].double().cpu().numpy()
    title = f"k̂ of {len(pareto_k)} data"
    for infinity, text in ((-math.inf, "no tail (k̂ = −∞)"), (math.inf, "no fit (k̂ = ∞)")):
        if count := int((pareto_k == infinity).sum()):
            title += f"\n{count} of them: {text}"
    figure = new_figure(6, 3.2)
    axes = figure.subplots()
    low, high = (min(-0.25, float(k.min())), max(1.0, float(k.max()))) if len(k) else (-0.25, 1.0)
    edges = np.linspace(low, high, 41).tolist()
    axes.hist(k, bins=edges, color=DATA)
    for limit, color, text in ((0.5, GAP, "0.5"), (threshold, MODEL, f"{threshold:.2g}: unreliable above")):
        axes.axvline(limit, color=color, linestyle="--", linewidth=1.2, label=text)
    axes.set(xlabel="Pareto k̂ of the importance weights", ylabel="data", title=title, ylim=None if len(k) else (0, 1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return figure


def plot_gaps(gaps: Mapping[str, InferenceGaps]) -> Figure:
    """Bars of what separates each ELBO from the evidence: approximation gap, then amortization gap (nats per datum)."""
    names = list(gaps)
    figure = new_figure(7, 1.3 + 0.6 * len(names))
    axes = figure.subplots()
    approximation = [max(g.approximation_gap, 0.0) for g in gaps.values()]  # below 0 by Monte Carlo error
    amortization = [max(g.amortization_gap, 0.0) for g in gaps.values()]
    errors = [math.hypot(g.approximation_gap_stderr, g.amortization_gap_stderr) for g in gaps.values()]
    axes.barh(names, approximation, height=0.55, color=DATA, label="approximation gap")
    axes.barh(names, amortization, height=0.55, left=approximation, color=GAP, xerr=errors, label="amortization gap")
    axes.margins(x=0.1)
    axes.set(xlabel="log evidence − ELBO (nats per datum)", xlim=(0, None), ylim=(len(names) - 0.5, -0.5))
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
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
    """Images decoded as one dimension of a latent moves from −2.5 to 2.5, the others held at their posterior mean.

    Latents whose prior depends on the moved one (the layers below it) are at their prior's mean given it.
    """
    means = latents(pair, x[:1], mean=True, seed=0)
    local = local_latents(pair, x[:1])
    below = _below(pair, x[:1], name)
    values = torch.linspace(-2.5, 2.5, steps)
    count = steps * len(dimensions)
    z = {
        site: value.expand(count, *value.shape[1:]).clone() if site in local else value
        for site, value in means.items()
        if site not in below
    }
    for row, dimension in enumerate(dimensions):
        z[name][row * steps : (row + 1) * steps, dimension] = values.to(z[name])
    with _AtMean(below):
        images = decode(pair, z, data_dim=x.shape[1], seed=0)
    figure = plot_images(images, image_shape, columns=steps, title=f"One dimension of {name} a row")
    axes = figure.axes[0]
    axes.set_axis_on()
    height, width = (size + 1 for size in image_shape)  # with the line between two
    axes.set_xticks([width * (at + 0.5) - 1 for at in (0, (steps - 1) / 2, steps - 1)], ["−2.5", "0", "2.5"])
    axes.set_yticks(
        [height * (row + 0.5) - 1 for row in range(len(dimensions))],
        [f"{name}[{dimension}]" for dimension in dimensions],
    )
    axes.tick_params(length=0)
    return figure


def can_traverse(pair: Pair, x: Tensor, name: str) -> bool:
    """Whether the latent has a value for each datum, and may be any real number."""
    with same_random_state(), pyro.validation_enabled(False), torch.no_grad():
        site: Any = poutine.trace(pair.guide).get_trace(x[:2].to(next(pair.parameters(), x))).nodes[name]
    support = getattr(site["fn"].support, "base_constraint", site["fn"].support)
    return support is constraints.real and any(frame.name == "data" for frame in site["cond_indep_stack"])


def _below(pair: Pair, x: Tensor, name: str) -> set[str]:
    """The latents whose prior depends on the latent ``name``, by way of others or not."""
    with same_random_state(), pyro.validation_enabled(False), torch.no_grad():
        needs: Any = get_dependencies(pair.model, (x.to(next(pair.parameters(), x)),))
    found = {name}
    for site, upstream in needs["prior_dependencies"].items():  # in the order of the model
        if site in needs["posterior_dependencies"] and found & upstream.keys():  # a latent, not the data
            found.add(site)
    return found - {name}


class _AtMean(Messenger):
    """These sites take the mean of their distribution."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self._names = names

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self._names:
            msg["value"] = mean_or_value(msg["fn"], msg["value"])
