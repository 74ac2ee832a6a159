"""Evaluation: scores, new data and pictures of a fitted pair."""

from pyrovae.evaluate.predict import decode, latents, reconstruct, sample
from pyrovae.evaluate.scores import Scores, evaluate

__all__ = ["Scores", "decode", "evaluate", "latents", "reconstruct", "sample"]
