"""Pictures that a run folder and a report draw, each with words for those who cannot see it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from pyrovae import plots
from pyrovae.data import DataSet
from pyrovae.evaluation.generation import can_traverse, guide_sites
from pyrovae.evaluation.posterior_collapse import USED_NATS
from pyrovae.evaluation.sites import is_local
from pyrovae.pair import Pair

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyrovae.evaluation import Scores

MAX_TRAVERSED = 8  # dimensions of a latent that are shown one by one


class Picture(NamedTuple):
    """A figure to be drawn later, and what to say about it."""

    draw: Callable[[], Figure]
    alt: str  # words in place of the picture: what it shows
    caption: str = ""


def pictures_of_run(
    pair: Pair, data: DataSet, rows: Tensor, labels: Tensor | None, history: list[dict[str, float]]
) -> dict[str, Picture]:
    """Return the pictures, by name, that apply to this pair and these data."""
    shape, names = data.image_shape, data.feature_names
    found: dict[str, Picture] = {}
    if len(history) > 1:
        first, last = history[0]["train_bound"], history[-1]["train_bound"]
        found["training"] = Picture(
            partial(plots.plot_history, history),
            f"Curve of the bound over {len(history)} epochs: from {first:.2f} to {last:.2f} nats per datum.",
        )
    found["samples"] = Picture(
        partial(plots.plot_samples, pair, rows, image_shape=shape, feature_names=names),
        "A grid of images drawn from the model." if shape else "Points drawn from the model beside the data.",
        "New data: z from the prior, then the mean of p(x | z)." if shape else "New data from the model.",
    )
    sites: dict[str, Any] = {}
    with suppress(ValueError, NotImplementedError):  # nothing to encode into
        sites = guide_sites(pair, rows[:2], seed=0)
    local = {name: site["value"] for name, site in sites.items() if is_local(site)}
    continuous = {name: z for name, z in local.items() if z.is_floating_point() and z.dim() == 2}
    if continuous:
        found["reconstructions"] = Picture(
            partial(plots.plot_reconstructions, pair, rows, image_shape=shape),
            "Rows of images, each above its reconstruction." if shape else "Reconstructed against observed features.",
            "z from the guide, then the mean of p(x | z).",
        )
    if rows.shape[1] == 2 and plots.has_density(pair, rows):
        draw = partial(plots.plot_density, pair, rows, feature_names=names)
        found["density"] = Picture(draw, "The data over contours of the fitted density.")
    for name, z in continuous.items():
        if z.shape[1] == 2:
            colours = "." if labels is None else ", coloured by label."
            found["latents"] = Picture(
                partial(plots.plot_latents, pair, rows, name, labels=labels),
                f"The data's posterior means in the two dimensions of {name}{colours}",
            )
            if shape is not None and len(sites) == 1:
                found["manifold"] = Picture(
                    partial(plots.plot_manifold, pair, name, shape, data_dim=rows.shape[1]),
                    f"A grid of images decoded over the two dimensions of {name}.",
                )
    return found


def pictures_of_scores(pair: Pair, data: DataSet, rows: Tensor, scores: Scores) -> dict[str, Picture]:
    """Return the pictures, by name, of what was measured."""
    found: dict[str, Picture] = {}
    kl, shape = scores.kl_per_dimension, data.image_shape
    if kl:
        counts = {name: sum(value > USED_NATS for value in values) for name, values in kl.items()}
        used = ", ".join(f"{count} of {len(kl[name])} in {name}" for name, count in counts.items())
        unused = any(count < len(kl[name]) for name, count in counts.items())
        found["kl"] = Picture(
            partial(plots.plot_kl, kl),
            f"Bars of the KL of each latent dimension, largest first. Above {USED_NATS:g} nats: {used}.",
            "Dimensions in grey carry nothing about the data." if unused else "",
        )
        name = max(kl, key=lambda name: sum(kl[name]))
        if shape is not None and len(kl[name]) > 2 and can_traverse(pair, rows, name):
            top = sorted(range(len(kl[name])), key=lambda d: -kl[name][d])[:MAX_TRAVERSED]
            found["traversal"] = Picture(
                partial(plots.plot_traversal, pair, rows, name, shape, dimensions=top),
                f"Rows of images: each row changes one of the {len(top)} dimensions of {name} that carry most KL.",
                "The other dimensions stay at the posterior mean of the first datum.",
            )
    if scores.guide is not None and not scores.guide.is_joint:
        k, limit = scores.guide.k, f"{scores.guide.threshold:.2g}"
        found["pareto_k"] = Picture(
            partial(plots.plot_pareto_k, k, threshold=scores.guide.threshold),
            f"Histogram of Pareto k-hat over {len(k)} data; {scores.guide.num_bad} lie above {limit}.",
            f"Above {limit}, with so many samples, importance sampling from the guide is unreliable for that datum.",
        )
    if (gaps := scores.also.get("inference_gaps")) is not None:
        found["gaps"] = Picture(
            partial(plots.plot_gaps, {type(pair).__name__: gaps}),
            f"Stacked bar, nats per datum: approximation gap {gaps.approximation_gap:.3f}, amortization gap "
            f"{gaps.amortization_gap:.3f}.",
            "What the guide's family cannot reach, and what one network for all data loses on top.",
        )
    if (calibration := scores.also.get("simulation_based_calibration")) is not None:
        found["calibration"] = Picture(
            partial(plots.plot_calibration, calibration),
            f"Rank histograms of simulation-based calibration. Verdict: {calibration.verdict}.",
            "An exact posterior has uniform ranks, inside the grey band.",
        )
    return found
