"""Mixtures: how sharp their responsibilities are, and how right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Categorical, OneHotCategorical

from pyrovae.evaluation.measurement import Result, not_applicable, prepared, runs_at_a_time
from pyrovae.evaluation.sites import is_local
from pyrovae.infer.weights import same_random_state, sample_sites
from pyrovae.pair import Pair

__all__ = ["MixtureScores", "check_labels", "mixture_scores", "responsibilities"]

CATEGORICAL = (Categorical, OneHotCategorical)


@dataclass(frozen=True, repr=False)
class MixtureScores(Result):
    """Scores that :func:`mixture_scores` measured. None where a quantity does not apply."""

    num_data: int
    num_components: int
    entropy: float
    """mean_n H(p(z | x_n)), nats per datum: 0 where each datum surely belongs to one component, at most log K."""
    effective_components: float
    """exp H(mean_n p(z | x_n)): how many equally used components would spread the data as much; 1 to K."""
    total_variation: float | None
    """mean_n ½ Σ_k |q(k | x_n) − p(k | x_n)|, of the guide's responsibilities: 0 to 1."""
    kl: float | None
    """mean_n KL(q(z | x_n) ‖ p(z | x_n)), nats per datum: what the guide costs the ELBO."""
    adjusted_rand_index: float | None
    """1 for the same partition as the labels, 0 in expectation for a random one (Hubert and Arabie 1985)."""
    normalized_mutual_information: float | None
    """I / mean of the two entropies: 0 to 1."""
    accuracy: float | None
    """Share of data in the right cluster, with clusters matched to labels one to one as well as possible."""

    def _table(self) -> list[str]:
        rows = [
            ("entropy of responsibilities", self.entropy, "nats per datum"),
            ("effective components", self.effective_components, f"of {self.num_components}"),
            ("guide: total variation", self.total_variation, "mean distance from the exact responsibilities"),
            ("guide: KL", self.kl, "nats per datum"),
            ("adjusted Rand index", self.adjusted_rand_index, ""),
            ("normalized mutual information", self.normalized_mutual_information, ""),
            ("accuracy", self.accuracy, "best matching of components and labels"),
        ]
        lines = [f"{name:<32}{value:>9.4f}  {note}".rstrip() for name, value, note in rows if value is not None]
        return [f"{self.num_data} data, {self.num_components} components", *lines]


def mixture_scores(
    pair: Pair,
    x: Tensor,  # (N, D)
    *,
    labels: Any = None,  # (N,)
    binarize: bool = False,
    device: str | torch.device = "auto",
    seed: int = 0,
) -> MixtureScores:
    """Score the responsibilities p(z | x) of a pair with one categorical latent and an exact posterior.

    Clusters are the most probable components under the exact posterior. Where the guide samples the latent, its
    responsibilities q(z | x) are compared with the exact ones.

    Args:
        pair: a pair whose ``posterior(x)`` is a ``Categorical``.
        x: data, shape (N, D).
        labels: known classes, (N,), whole numbers or names, for the clustering scores.
        binarize, device, seed: as in :func:`pyrovae.evaluate`.

    Raises:
        NotApplicable: the pair has no such posterior.
        TypeError, ValueError: bad data or labels.
    """
    with prepared(pair, x, binarize=binarize, device=device, seed=seed) as x, torch.no_grad():
        known = None if labels is None else check_labels(labels, len(x))
        num_components = num_categories(pair, x[:2], "mixture_scores")
        chunks = x.split(runs_at_a_time(x.device, x.shape[1] * num_components))
        exact = torch.cat([category_log_probs(pair.posterior(rows)) for rows in chunks])  # type: ignore[misc]
        guides = [_guide_log_probs(pair, rows, num_components) for rows in chunks]
        variation = kl = None
        if found := [guide for guide in guides if guide is not None]:
            guide = torch.cat(found)
            variation = float(0.5 * (guide.exp() - exact.exp()).abs().sum(-1).mean())
            kl = float(_sum_p_log(guide, guide - exact).mean())
        usage = exact.exp().mean(0)
        agreement = (None,) * 3 if known is None else _agreement(known, exact.argmax(-1).cpu().numpy())
        entropy, used = -float(_sum_p_log(exact, exact).mean()), math.exp(-float(torch.xlogy(usage, usage).sum()))
        return MixtureScores(len(x), num_components, entropy, used, variation, kl, *agreement)


def check_labels(labels: Any, num_data: int) -> np.ndarray:
    """Return the classes of the data as an array (N,), after a check that they are whole numbers or names."""
    found = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    if found.dtype.kind not in "iubUS":
        raise TypeError(f"labels: expected whole numbers or names, one a datum; got {found.dtype}.")
    if found.shape != (num_data,):
        raise ValueError(f"labels: expected shape ({num_data},), one a datum; got {found.shape}.")
    return found


def _agreement(labels: np.ndarray, clusters: np.ndarray) -> tuple[float, float, float]:
    """Return adjusted Rand index, normalized mutual information and accuracy."""
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    table = contingency_matrix(labels, clusters)
    matched = float(table[linear_sum_assignment(table, maximize=True)].sum())
    rand, information = adjusted_rand_score(labels, clusters), normalized_mutual_info_score(labels, clusters)
    return float(rand), float(information), matched / len(labels)


def num_categories(pair: Pair, few: Tensor, quantity: str) -> int:
    """Return K, of a posterior over one category a datum. NotApplicable where the pair has no such posterior."""
    if pair.posterior is None:
        reason = "it has no posterior(x). Give it one that returns a Categorical over components."
        raise not_applicable(quantity, pair, reason)
    posterior = pair.posterior(few)
    if not isinstance(posterior, CATEGORICAL) or posterior.batch_shape != few.shape[:1]:
        found = f"a {type(posterior).__name__} of batch shape {tuple(posterior.batch_shape)}"
        raise not_applicable(quantity, pair, f"its posterior(x) is {found}, not one Categorical a datum.")
    return posterior.logits.shape[-1]


def category_log_probs(fn: Any) -> Tensor:
    """Return the normalised log probabilities of each category, (N, K), float64."""
    return fn.logits.double().log_softmax(-1)


def _sum_p_log(log_p: Tensor, log_ratio: Tensor) -> Tensor:
    """Return Σ_k p log r; where p is 0 it adds nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * log_ratio, 0).sum(-1)


def _guide_log_probs(pair: Pair, x: Tensor, num_components: int) -> Tensor | None:
    """Return log q(z | x), (N, K); None where the guide samples no categorical latent, or several."""
    categories = _guide_categories(pair, x)
    if len(categories) != 1:
        return None
    ((name, fn),) = categories.items()
    log_probs = category_log_probs(fn)
    if (size := log_probs.shape[-1]) != num_components:
        expected = f"expected a Categorical over {num_components} components, as posterior(x) has, at site '{name}'"
        raise ValueError(f"guide: {expected}; got {size}.")
    return log_probs.expand(len(x), -1)


def _guide_categories(pair: Pair, x: Tensor) -> dict[str, Any]:
    """Return the distributions of the guide's categorical latents in the plate ``data``, by name."""
    with same_random_state():
        sites = sample_sites(poutine.trace(pair.guide).get_trace(x))
    return {name: s["fn"] for name, s in sites.items() if isinstance(s["fn"], CATEGORICAL) and is_local(s)}


@torch.no_grad()
def responsibilities(pair: Pair, x: Tensor) -> Tensor | None:
    """Return q(z | x) over the components of a mixture, (N, K), on the CPU.

    It is the guide's where that samples the component, else the exact p(z | x). None where the pair is no mixture with
    one discrete latent.
    """
    x = x.to(next(pair.parameters(), x))
    with pyro.validation_enabled(False):
        found = list(_guide_categories(pair, x).values())
        if not found and pair.posterior is not None:
            found = [fn for fn in [pair.posterior(x)] if isinstance(fn, CATEGORICAL)]
    return found[0].probs.expand(len(x), -1).detach().cpu() if len(found) == 1 else None
