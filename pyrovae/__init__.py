"""Latent-variable models as Pyro model/guide pairs: mixtures, PPCA, VAEs and IWAEs, by SVI and by exact EM."""

from pyrovae import data, infer, models
from pyrovae.infer import log_weights
from pyrovae.pair import FunctionPair, Pair
from pyrovae.train import FitResult, TrainingDiverged, fit

__version__ = "0.1.0"

__all__ = [
    "FitResult",
    "FunctionPair",
    "Pair",
    "TrainingDiverged",
    "data",
    "fit",
    # "fit_em",
    "infer",
    "log_weights",
    "models",
]
