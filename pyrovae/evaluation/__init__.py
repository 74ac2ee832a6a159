"""Evaluation: scores, diagnostics and new data of a fitted pair."""

from pyrovae.evaluation.ais import (
    AnnealedEvidence,
    BidirectionalEvidence,
    annealed_evidence,
    bidirectional_evidence,
)
from pyrovae.evaluation.calibration import Calibration, simulation_based_calibration
from pyrovae.evaluation.collapse import Collapse, active_units_curve, collapse
from pyrovae.evaluation.criteria import (
    InformationCriteria,
    Selection,
    information_criteria,
    select_components,
)
from pyrovae.evaluation.decomposition import KLDecomposition, kl_decomposition
from pyrovae.evaluation.everything import ALSO, evaluate
from pyrovae.evaluation.gaps import InferenceGaps, inference_gaps
from pyrovae.evaluation.guide_quality import guide_quality
from pyrovae.evaluation.inference_data import to_arviz
from pyrovae.evaluation.mixtures import MixtureScores, mixture_scores
from pyrovae.evaluation.pareto import GuideQuality
from pyrovae.evaluation.predict import decode, latents, reconstruct, sample
from pyrovae.evaluation.predictive import PredictiveCheck, default_statistics, posterior_predictive_check
from pyrovae.evaluation.prepare import NotApplicable
from pyrovae.evaluation.scores import Scores

__all__ = [
    "ALSO",
    "AnnealedEvidence",
    "BidirectionalEvidence",
    "Calibration",
    "Collapse",
    "GuideQuality",
    "InferenceGaps",
    "InformationCriteria",
    "KLDecomposition",
    "MixtureScores",
    "NotApplicable",
    "PredictiveCheck",
    "Scores",
    "Selection",
    "active_units_curve",
    "annealed_evidence",
    "bidirectional_evidence",
    "collapse",
    "decode",
    "default_statistics",
    "evaluate",
    "guide_quality",
    "inference_gaps",
    "information_criteria",
    "kl_decomposition",
    "latents",
    "mixture_scores",
    "posterior_predictive_check",
    "reconstruct",
    "sample",
    "select_components",
    "simulation_based_calibration",
    "to_arviz",
]
