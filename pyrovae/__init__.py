"""Latent-variable models as Pyro model/guide pairs: mixtures, PPCA, VAEs and IWAEs, by SVI and exact EM."""

from pyrovae import data, infer, models
from pyrovae.evaluate import Scores, evaluate
from pyrovae.infer import EMResult, fit_em, log_weights
from pyrovae.pair import FunctionPair, Pair
from pyrovae.train import FitResult, TrainingDiverged, fit

__version__ = "0.1.0"

__all__ = [
    "EMResult",
    "FitResult",
    "FunctionPair",
    "Pair",
    "Scores",
    "TrainingDiverged",
    "data",
    "evaluate",
    "fit",
    "fit_em",
    "infer",
    "log_weights",
    "models",
]
