"""Can the guide be trusted as an importance sampler?"""

from __future__ import annotations

import torch
from pyro import poutine
from torch import Tensor

from pyrovae.checks import check_positive
from pyrovae.evaluation.pareto import GuideQuality, check_count
from pyrovae.evaluation.prepare import NotApplicable, prepared
from pyrovae.evaluation.scores import scores_of
from pyrovae.infer.weights import same_random_state, sample_sites
from pyrovae.pair import Pair

__all__ = ["guide_quality"]


def guide_quality(
    pair: Pair,
    x: Tensor,
    *,
    num_samples: int = 1000,
    binarize: bool = False,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool | None = None,
) -> GuideQuality:
    """Pareto-k̂ and effective sample size of the guide's importance weights, datum by datum.

    The largest weights w = p(x, z) / q(z | x) are fitted with a generalised Pareto distribution of shape k. Below 0.5
    importance sampling from q works as it should; above min(1 − 1/log10 K, 0.7) its estimates, and so the evidence,
    cannot be relied on, and q is a poor picture of the posterior (most of all, a too narrow one).

    Args:
        pair: the model and guide. It is left as it was.
        x: data, shape (N, D).
        num_samples: importance samples K a datum, at least 25.
        binarize: draw pixels in [0, 1] as 0 or 1 first, once.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda``.
        seed: of the samples. The caller's random state is left as it was.
        progress: show a bar; None shows it on a terminal.

    Raises:
        NotApplicable: the guide samples nothing, or discrete latents alone: then the weights have no tail.
        TypeError, ValueError: bad data or options, before work starts; weights that are NaN or infinite.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling, JMLR 25(72).
        Yao, Vehtari, Simpson and Gelman (2018), Yes, but did it work?: Evaluating variational inference.
    """
    check_positive("num_samples", num_samples, integer=True)
    check_count("num_samples", num_samples)
    with prepared(pair, x, binarize=binarize, device=device, seed=seed) as x, torch.no_grad():
        _check_latents(pair, x[:2])
        found = scores_of(pair, x, num_samples, progress).guide
    if found is None:
        raise ValueError(
            "pair: expected log-weights below infinity; got NaN or +inf. Look for the site whose log density is not "
            "finite: pyro.enable_validation(True) names it."
        )
    return found


def _check_latents(pair: Pair, few: Tensor) -> None:
    name = type(pair).__name__
    with same_random_state():
        sites = sample_sites(poutine.trace(pair.guide).get_trace(few))
    if not sites:
        raise NotApplicable(
            f"guide_quality does not apply to {name}: its guide samples nothing, so every weight is the evidence."
        )
    if all(site["fn"].support.is_discrete for site in sites.values()):
        raise NotApplicable(
            f"guide_quality does not apply to {name}: its guide samples discrete latents alone, so the weights of a "
            "datum take finitely many values and have no tail. inference_gaps compares such a guide with the posterior."
        )
