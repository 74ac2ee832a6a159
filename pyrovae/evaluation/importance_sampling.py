"""Importance sampling from a pair's guide, in chunks, and what the weights come to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyrovae.evaluation.measurement import chunk_sizes, progress_bar, width
from pyrovae.infer.record import recorded_or_itself
from pyrovae.infer.weights import LogWeightTerms, Structure, log_weight_terms
from pyrovae.pair import Pair

__all__ = ["ImportanceSampling", "MeanWeight", "Summary", "stderr_over_data", "variance_of_mean"]

CALLS_WORTH_COMPILING = 3000

Summary = dict[tuple[str, str], Tensor]
"""What is kept of one run, by kind of number and site."""


class ImportanceSampling:
    """Importance samples of a prepared pair. Memory does not grow with data times samples."""

    def __init__(self, pair: Pair, x: Tensor, num_samples: int) -> None:
        self._pair = pair
        self.structure = Structure.of(pair.model, pair.guide, (x[:2],), {})
        self.probe = log_weight_terms(pair.model, pair.guide, x[:2], structure=self.structure)
        """One run on two data."""
        self.num_samples = num_samples if self.probe.guide else 1  # nothing is sampled: every weight is p(x)
        size = width(pair, self.probe.model_trace, len(x[:2]), enumerated=self.structure.enumerated)
        joint = self.probe.log_weights.dim() == 1
        rows, self._particles = chunk_sizes(x.device, size, len(x), self.num_samples, joint=joint)
        self.chunks = x.split(rows)
        sites: Any = self.probe.guide_trace.nodes
        self.has_tails = any(not sites[name]["fn"].support.is_discrete for name in self.probe.guide)
        """Whether the weights can have a tail: discrete latents alone give finitely many values."""

    def run(
        self, summarise: Callable[[LogWeightTerms, int], Summary], progress: bool | None
    ) -> Iterator[Iterator[Summary]]:
        """Yield for each chunk of data what ``summarise(terms, num_particles)`` keeps of each run on it."""
        rounds, rest = divmod(self.num_samples, self._particles)

        def summary(rows: Tensor, particles: int) -> Summary:
            terms = log_weight_terms(
                self._pair.model, self._pair.guide, rows, num_particles=particles, structure=self.structure
            )
            return summarise(terms, particles)

        run_full = self._compiled(summary, calls=rounds * len(self.chunks))

        def summaries(rows: Tensor) -> Iterator[Summary]:
            is_full = len(rows) == len(self.chunks[0])
            for _ in range(rounds):
                yield run_full(rows) if is_full else summary(rows, self._particles)
            if rest:
                yield summary(rows, rest)

        for rows in progress_bar("evaluate", progress, self.chunks):
            yield summaries(rows)

    def _compiled(self, summary: Callable[[Tensor, int], Summary], *, calls: int) -> Callable[[Tensor], Summary]:
        """Return ``summary`` for full chunks; compiled where there are enough calls to pay for it."""
        if calls < CALLS_WORTH_COMPILING:
            return lambda rows: summary(rows, self._particles)
        names: list[tuple[str, str]] = []

        def flat(rows: Tensor) -> tuple[Tensor, ...]:
            found = summary(rows, self._particles)
            names[:] = found
            return tuple(found.values())

        run = recorded_or_itself(flat, (self.chunks[0],), [self._pair], "evaluate", compiled=True)
        return lambda rows: dict(zip(names, run(rows), strict=True))


class MeanWeight:
    """Mean of the weights of each datum, with its error, from log w of shape (K, N)."""

    def __init__(self, log_w: Tensor) -> None:
        self.log_mean = log_w.logsumexp(0) - math.log(len(log_w))
        """log 1/K Σ_k w_k, (N,)."""
        self.relative = torch.exp(log_w - self.log_mean)
        """Weights over their mean, (K, N)."""
        self.effective = self.relative.sum(0).square() / self.relative.square().sum(0)
        """Effective number of samples, (Σ_k w_k)² / Σ_k w_k², (N,)."""
        self.variance = variance_of_mean(self.relative)
        """Variance of ``log_mean`` by the delta method, (N,); 0 with one sample."""


def variance_of_mean(draws: Tensor) -> Tensor:
    """Return the variance of the mean of K independent draws, (K, N) → (N,); 0 with one draw."""
    return draws.var(0) / len(draws) if len(draws) > 1 else torch.zeros_like(draws[0])


def stderr_over_data(per_datum: Tensor) -> float | None:
    """Return the standard error of the mean of values (N,), as an estimate for the population; None with one datum."""
    return float(per_datum.std()) / math.sqrt(len(per_datum)) if len(per_datum) > 1 else None
