"""Pictures of pairs and their data, of scores, of runs and of comparisons.

Each function ``plot_…`` returns a ``Figure``. None opens a window or changes a setting of matplotlib.
``import pyrovae`` loads neither this package nor matplotlib.
"""

from pyrovae.plots.figures import save_figures
from pyrovae.plots.pair_plots import (
    has_density,
    plot_densities,
    plot_density,
    plot_images,
    plot_latents,
    plot_manifold,
    plot_reconstructions,
    plot_responsibilities,
    plot_samples,
    plot_traversal,
)
from pyrovae.plots.score_plots import (
    plot_calibration,
    plot_gaps,
    plot_history,
    plot_kl,
    plot_method_gaps,
    plot_method_training,
    plot_pareto_k,
    plot_selection,
)

__all__ = [
    "has_density",
    "plot_calibration",
    "plot_densities",
    "plot_density",
    "plot_gaps",
    "plot_history",
    "plot_images",
    "plot_kl",
    "plot_latents",
    "plot_manifold",
    "plot_method_gaps",
    "plot_method_training",
    "plot_pareto_k",
    "plot_reconstructions",
    "plot_responsibilities",
    "plot_samples",
    "plot_selection",
    "plot_traversal",
    "save_figures",
]
