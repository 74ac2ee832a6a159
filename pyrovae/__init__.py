"""Latent-variable models as Pyro model/guide pairs: mixtures, PPCA, VAEs and IWAEs, by SVI and exact EM."""

from pyrovae import data, infer, models
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
    "data",
    "evaluate",
    "fit",
    "fit_em",
    "infer",
    "load_run",
    "log_weights",
    "models",
    "to_arviz",
]
