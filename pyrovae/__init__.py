"""Latent-variable models as Pyro model/guide pairs: mixtures, PPCA, VAEs and IWAEs, by SVI and exact EM."""

from importlib import import_module
from typing import Any

from pyrovae import comparison, data, evaluation, infer, models, networks, training
from pyrovae.cli.runs import load_run
from pyrovae.comparison import Comparison, compare
from pyrovae.evaluation import Scores, evaluate, to_arviz
from pyrovae.infer import EMResult, fit_em, log_weights
from pyrovae.pair import FunctionPair, Pair
from pyrovae.training import FitResult, TrainingDiverged, fit

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "EMResult",
    "FitResult",
    "FunctionPair",
    "Pair",
    "Scores",
    "TrainingDiverged",
    "compare",
    "comparison",
    "data",
    "evaluate",
    "evaluation",
    "fit",
    "fit_em",
    "infer",
    "load_run",
    "log_weights",
    "models",
    "networks",
    "plots",
    "to_arviz",
    "training",
]


def __getattr__(name: str) -> Any:
    """Import ``plots`` when it is first used, for matplotlib takes half a second."""
    if name == "plots":
        return import_module("pyrovae.plots")
    raise AttributeError(f"module 'pyrovae' has no attribute {name!r}")
