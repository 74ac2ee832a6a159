"""Evaluation: scores, diagnostics, generated data and ArviZ export of a fitted pair.

The functions leave the pair and the caller's random state as they were. Their common arguments ``binarize``,
``device``, ``seed`` and ``progress`` are explained in :func:`evaluate`.
"""

from pyrovae.evaluation.ais import AnnealedEvidence, BidirectionalEvidence, annealed_evidence, bidirectional_evidence
from pyrovae.evaluation.arviz_export import to_arviz
from pyrovae.evaluation.calibration import Calibration, simulation_based_calibration
from pyrovae.evaluation.criteria import InformationCriteria, Selection, information_criteria, select_components
from pyrovae.evaluation.decomposition import KLDecomposition, kl_decomposition
from pyrovae.evaluation.full_evaluation import ALSO, evaluate
from pyrovae.evaluation.gaps import InferenceGaps, inference_gaps
from pyrovae.evaluation.generation import decode, latents, reconstruct, sample
from pyrovae.evaluation.importance_sampling import GuideQuality, guide_quality
from pyrovae.evaluation.measurement import NotApplicable
from pyrovae.evaluation.mixtures import MixtureScores, mixture_scores, responsibilities
from pyrovae.evaluation.posterior_collapse import Collapse, active_units_curve, collapse
from pyrovae.evaluation.predictive_check import PredictiveCheck, default_statistics, posterior_predictive_check
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
    "responsibilities",
    "sample",
    "select_components",
    "simulation_based_calibration",
    "to_arviz",
]
