"""Inference: importance weights, objectives, the SVI step and exact EM. Nothing here knows a particular model."""

from pyrovae.infer.em import EMResult, fit_em
from pyrovae.infer.losses import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, default_loss, renyi_bound
from pyrovae.infer.svi import SVI
from pyrovae.infer.weights import DatasetSize, LogWeightTerms, log_weight_terms, log_weights

LOSSES = {loss.__name__: loss for loss in (Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO, RenyiELBO)}
"""Losses by name."""

__all__ = [
    "LOSSES",
    "SVI",
    "DatasetSize",
    "EMResult",
    "LogWeightTerms",
    "RenyiELBO",
    "TraceEnum_ELBO",
    "TraceMeanField_ELBO",
    "Trace_ELBO",
    "default_loss",
    "fit_em",
    "log_weight_terms",
    "log_weights",
    "renyi_bound",
]
