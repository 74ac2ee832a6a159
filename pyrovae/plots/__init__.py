"""Pictures of pairs and their data, of scores, of runs and of comparisons.

Each function ``plot_…`` returns a ``Figure``. None opens a window or changes a setting of matplotlib.
``import pyrovae`` loads neither this package nor matplotlib.
"""

from pyrovae.plots.comparison_plots import plot_method_gaps, plot_method_training
from pyrovae.plots.figures import new_figure, save_figures
from pyrovae.plots.image_plots import can_traverse, plot_images, plot_manifold, plot_traversal
from pyrovae.plots.pair_plots import (
    has_density,
    plot_densities,
    plot_density,
    plot_latents,
    plot_reconstructions,
    plot_responsibilities,
    plot_samples,
    responsibilities,
)
from pyrovae.plots.score_plots import plot_calibration, plot_gaps, plot_history, plot_kl, plot_pareto_k, plot_selection

__all__ = [
    "can_traverse",
    "has_density",
    "new_figure",
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
    "responsibilities",
    "save_figures",
]
