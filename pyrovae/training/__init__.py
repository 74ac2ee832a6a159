"""Training: mini-batches, learning-rate schedules, validation, early stopping, checkpoints."""

from pyrovae.training.loop import SCHEDULES, FitResult, TrainingDiverged, fit

__all__ = ["SCHEDULES", "FitResult", "TrainingDiverged", "fit"]
