"""Calibration of a guide: ranks of true latents among its draws, on data that the model makes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrovae.checks import check_choice, check_positive, not_a_pair
from pyrovae.evaluation.generation import Simulator, two_data
from pyrovae.evaluation.measurement import Result, not_applicable, prepared, progress_bar
from pyrovae.pair import Pair

__all__ = ["LIKELIHOOD", "Calibration", "RankTest", "ecdf_band", "simulation_based_calibration"]

LIKELIHOOD = "log p(x | z)"
"""Name of the rank test of the log likelihood."""
LEVEL = 0.01  # of the verdicts, and of what lies outside the bands in pictures
UNIFORM = "no misfit found"
QUANTITY = "simulation_based_calibration"


@dataclass(frozen=True, repr=False)
class RankTest:
    """Ranks of one latent's true values among the draws: uniform on 0..L where the draws are from p(z | x)."""

    ranks: Tensor
    """(simulations, dimensions), on the CPU: how many of the L draws lie below the truth."""
    num_draws: int
    """L."""
    counts: list[list[int]]
    """The histogram of each dimension, (dimensions, bins)."""
    p_values: list[float]
    """p-value of the χ² test of uniformity, by dimension."""
    adjusted: list[float]
    """p-values adjusted for all dimensions together (Holm 1979): right however the dimensions depend on each other."""
    shift: list[float]
    """z score of the ranks' mean, by dimension: above 0 the draws are too low."""
    shape: list[float]
    """z score of the ranks' distance from their middle, by dimension: above 0 the draws are too narrow."""
    verdicts: list[str]
    """Verdict on each dimension, in words: ``no misfit found`` unless ``adjusted`` is below 0.01."""

    @property
    def p_value(self) -> float:
        """p-value of the hypothesis that the ranks of every dimension are uniform: the smallest of ``adjusted``."""
        return min(self.adjusted)

    @property
    def verdict(self) -> str:
        """Misfit that was found, and in how many dimensions."""
        found = Counter(verdict for verdict in self.verdicts if verdict != UNIFORM)
        if not found:
            return UNIFORM
        if (count := len(self.verdicts)) == 1:
            return next(iter(found))
        return "; ".join(f"{verdict} in {times} of {count} dimensions" for verdict, times in found.most_common())

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, for JSON; without the ranks themselves."""
        names = ("counts", "p_values", "adjusted", "shift", "shape", "verdicts", "p_value", "verdict")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, repr=False)
class Calibration(Result):
    """Rank tests that :func:`simulation_based_calibration` made."""

    num_simulations: int
    num_draws: int
    num_bins: int
    source: str
    """Source of the draws: ``guide`` or ``exact``."""
    tests: dict[str, RankTest]
    """Rank test of each latent, by name; under ``"log p(x | z)"`` that of the log likelihood, where it can be had."""

    @property
    def p_value(self) -> float:
        """p-value of the hypothesis that all ranks are uniform (Holm over latents)."""
        return min(1.0, len(self.tests) * min(test.p_value for test in self.tests.values()))

    @property
    def verdict(self) -> str:
        """``no misfit found``, or what is wrong with which latent."""
        wrong = [f"{name}: {test.verdict}" for name, test in self.tests.items() if test.verdict != UNIFORM]
        return "; ".join(wrong) or UNIFORM

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, for JSON; without the ranks themselves."""
        return super().to_dict() | {"p_value": self.p_value, "verdict": self.verdict}

    def _table(self) -> list[str]:
        source = "guide" if self.source == "guide" else "exact posterior"
        width = max(8, *map(len, self.tests)) + 2
        draws = f"{self.num_simulations} simulated data, {self.num_draws} draws each from the {source}"
        return [
            f"{draws}; χ² over {self.num_bins} bins, Holm over dimensions",
            f"{'ranks of':<{width}}{'dimensions':>10}{'p':>10}  verdict",
            *(f"{n:<{width}}{len(t.p_values):>10}{t.p_value:>10.3g}  {t.verdict}" for n, t in self.tests.items()),
        ]


def simulation_based_calibration(
    pair: Pair,
    *,
    num_simulations: int = 1000,
    num_draws: int = 99,
    num_bins: int | None = None,
    source: str | None = None,
    data_dim: int | None = None,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool | None = None,
) -> Calibration:
    """Test a guide against the model's own simulations (Talts, Betancourt, Simpson, Vehtari and Gelman 2018).

    For s = 1..S: draw (z_s, x_s) ~ p(z, x) and z_s1..z_sL ~ q(z | x_s). Where q is the posterior, the rank of each
    scalar of z_s among its L draws, #{l: z_sl < z_s}, is uniform on 0..L. Ties (discrete latents) are broken at random.
    A histogram of ranks like ∪ says that q is too narrow, like ∩ too wide, a slope that it is shifted.

    A guide that ignores x and draws from the prior has uniform ranks of z, too. So log p(x | z) is ranked beside them,
    where such a guide fails (Modrák, Moon, Kim, Bürkner, Huurre, Faltejsková, Gelman and Vehtari 2023).

    This test is about the guide, on data *of the model*. For the fit of the model to data at hand see
    :func:`~pyrovae.evaluation.posterior_predictive_check`.

    Args:
        pair: the model and guide.
        num_simulations: S.
        num_draws: L. L + 1 needs a divisor to make bins of; 99 gives 20 bins.
        num_bins: must divide L + 1; by default the most up to 20 that leave 5 simulations a bin.
        source: draws from the ``guide``, or from ``exact``, ``pair.posterior``. By default the guide, or the exact
            posterior where the guide samples nothing.
        data_dim: D, where the pair does not say.
        device, seed, progress: as in :func:`pyrovae.evaluate`.

    Raises:
        NotApplicable: a global latent, which all data of one run share; nothing to draw from.
        TypeError, ValueError: bad options, before work starts; the model or guide gives NaN.
    """
    check_positive("num_simulations", num_simulations, integer=True)
    check_positive("num_draws", num_draws, integer=True)
    num_bins = _num_bins(num_simulations, num_draws, num_bins)
    if source is not None:
        check_choice("source", source, ("guide", "exact"))
    if not isinstance(pair, Pair):
        raise TypeError(not_a_pair(pair))
    few = two_data(pair, data_dim, seed, QUANTITY)
    with prepared(pair, few, device=device, seed=seed) as few, torch.no_grad():
        simulator = Simulator(pair, few, QUANTITY)
        source = simulator.check_source(source)
        if simulator.shared:
            shared = f"its latent {', '.join(simulator.shared)} lies outside the data plate: all data of a run share it"
            raise not_applicable(QUANTITY, pair, f"{shared}. Simulate data sets, and fit a guide to each.")
        ranks = _rank_truths(simulator, few, num_simulations, num_draws, source, progress)
    tests = {name: _rank_test(name, value, num_draws, num_bins) for name, value in ranks.items()}
    return Calibration(num_simulations, num_draws, num_bins, source, tests)


def _num_bins(num_simulations: int, num_draws: int, num_bins: int | None) -> int:
    """Check or choose the number of bins."""
    possible = [b for b in range(2, num_draws + 2) if (num_draws + 1) % b == 0 and num_simulations >= 5 * b]
    if num_bins is not None:
        check_positive("num_bins", num_bins, integer=True)
        if num_bins not in possible:
            limits = f"= {num_draws + 1}, from 2 to num_simulations / 5 = {num_simulations // 5}"
            raise ValueError(f"num_bins: expected a divisor of num_draws + 1 {limits}; got {num_bins}.")
        return num_bins
    if num_simulations < 10:
        raise ValueError(f"num_simulations: expected 10 or more, 5 for each bin of ranks; got {num_simulations}.")
    if not (fitting := [b for b in possible if b <= 20]):
        divisor = f"num_draws + 1 has a divisor from 2 to {min(20, num_simulations // 5)}"
        raise ValueError(f"num_draws: expected a number for which {divisor}, to make bins of; got {num_draws}. Use 99.")
    return max(fitting)


def _rank_truths(
    simulator: Simulator, few: Tensor, num_simulations: int, num_draws: int, source: str, progress: bool | None
) -> dict[str, Tensor]:
    """Rank the true values among the draws, by latent: (S, dimensions), on the CPU."""
    rows_at_a_time, draws_at_a_time = simulator.chunks(num_simulations, num_draws)
    names = [name for name in simulator.local if name in simulator.guided or source == "exact"]
    with_likelihood = len(names) == len(simulator.local)
    found: dict[str, list[Tensor]] = {}
    with progress_bar("calibration", progress, total=num_simulations * num_draws, unit="draw") as bar:
        for start in range(0, num_simulations, rows_at_a_time):
            count = min(rows_at_a_time, num_simulations - start)
            simulated = simulator.simulate(few.new_zeros(count, few.shape[1]), {}, 1)
            x = simulator.data(simulated)[0]
            truth = {name: simulator.per_datum(name, simulated.nodes[name]["value"]) for name in names}
            if with_likelihood:
                truth[LIKELIHOOD] = simulator.log_likelihood(simulated)
            counts: dict[str, Any] = dict.fromkeys(truth, 0)  # draws below the truth; below or equal; NaN
            for first in range(0, num_draws, draws_at_a_time):
                draws = min(draws_at_a_time, num_draws - first)
                values = simulator.draw(x, draws, source)
                scalars = {name: simulator.per_datum(name, values[name]) for name in names}
                if with_likelihood:
                    scalars[LIKELIHOOD] = simulator.log_likelihood(simulator.condition(x, values, draws))
                for name, value in scalars.items():
                    counts[name] += _count_draws(value, truth[name], rounded=name == LIKELIHOOD)
                bar.update(count * draws)
            for name, (below, up_to, bad) in counts.items():
                if bool(bad.any()):
                    raise ValueError(f"pair: {name} is NaN in a simulation, or in a draw from the {source}.")
                room = (up_to - below + 1).double()
                place = (torch.rand_like(room) * room).long().minimum(up_to - below)
                found.setdefault(name, []).append((below + place).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def _count_draws(draws: Tensor, truth: Tensor, *, rounded: bool) -> Tensor:
    """Count draws below the truth, draws below or on it, and those that are NaN: (3, N, scalars)."""
    low = high = truth
    if rounded:  # a sum, known to rounding: where z plays no part, all are equal
        slack = 50 * torch.finfo(draws.dtype).eps * truth.abs()
        low, high = truth - slack, truth + slack
    return torch.stack([(draws < low).sum(0), (draws <= high).sum(0), (draws.isnan() | truth.isnan()).sum(0)])


def _rank_test(name: str, ranks: Tensor, num_draws: int, num_bins: int) -> RankTest:
    size, levels = len(ranks), num_draws + 1
    bins = ranks * num_bins // levels
    counts = torch.zeros(ranks.shape[1], num_bins, dtype=torch.long).scatter_add_(1, bins.T, torch.ones_like(bins.T))
    expected = size / num_bins
    chi2 = ((counts - expected) ** 2 / expected).sum(1).double()
    degrees = torch.tensor(num_bins - 1.0, dtype=torch.float64)
    p_values = torch.special.gammaincc(degrees / 2, chi2 / 2).numpy()
    # Scores of Neyman's (1937) smooth test: Legendre polynomials of degree 1 and 2, standardised over 0..L.
    position = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels - 0.5
    scores = [(p - p.mean()) / p.std(correction=0).clamp(min=1e-300) for p in (position, position.square())]
    shift, shape = (score[ranks].sum(0) / math.sqrt(size) for score in scores)
    adjusted = _holm(p_values)
    verdicts = [
        UNIFORM if p >= LEVEL else _verdict_on_ranks(a, b, likelihood=name == LIKELIHOOD)
        for p, a, b in zip(adjusted, shift.tolist(), shape.tolist(), strict=True)
    ]
    shapes = shift.tolist(), shape.tolist()
    return RankTest(ranks, num_draws, counts.tolist(), p_values.tolist(), adjusted, *shapes, verdicts)


def _holm(p_values: np.ndarray) -> list[float]:
    """Adjust p-values for all of them together (Holm 1979)."""
    order = np.argsort(p_values)
    steps = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(steps)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted.tolist()


def _verdict_on_ranks(shift: float, shape: float, *, likelihood: bool) -> str:
    """Say in words how ranks that are not uniform deviate, from the z scores of their mean and of their spread."""
    if max(abs(shift), abs(shape)) < NormalDist().inv_cdf(1 - LEVEL / 2):
        return "not uniform"
    # Where the density of the ranks is monotone, |shift| ≥ √(3/5) |shape|, and equal when all lie at one end.
    if abs(shift) >= 0.77 * abs(shape):
        if likelihood:
            return "the truth fits x better than the draws" if shift > 0 else "the draws fit x better than the truth"
        return f"shifted (draws too {'low' if shift > 0 else 'high'})"
    if likelihood:
        return "not uniform"
    return "too narrow (∪-shaped)" if shape > 0 else "too wide (∩-shaped)"


def ecdf_band(size: int, levels: int, *, num_samples: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Return bounds that hold all counts of ranks ≤ r, r = 0..levels−2, of ``size`` uniform ranks with 99%.

    Each count is binomial. The tail probability that is cut from all alike is found by simulation: the 1% quantile of
    the smallest tail of a sample (Säilynoja, Bürkner and Vehtari 2022).
    """
    from scipy.stats import binom

    generator = np.random.default_rng(0)
    cumulative = generator.multinomial(size, np.full(levels, 1 / levels), size=num_samples).cumsum(1)[:, :-1]
    share = np.arange(1, levels) / levels
    tails = np.minimum(binom.cdf(cumulative, size, share), binom.sf(cumulative - 1, size, share)).min(1)
    cut = np.quantile(tails, LEVEL, method="lower")
    return binom.ppf(cut, size, share), binom.ppf(1 - cut, size, share)
