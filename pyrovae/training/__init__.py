"""Training: mini-batches, learning-rate schedules, validation, early stopping, checkpoints."""

from pyrovae.training.divergence import TrainingDiverged
from pyrovae.training.loop import fit
from pyrovae.training.progress import FitResult
from pyrovae.training.schedules import SCHEDULES

__all__ = ["SCHEDULES", "FitResult", "TrainingDiverged", "fit"]
