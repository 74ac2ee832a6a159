"""Is the guide calibrated, and does the model make data like these? Ranks of true latents; replicated data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from pyrovae.checks import check_choice, check_positive, not_a_pair
from pyrovae.evaluate.predict import _blank
from pyrovae.evaluate.prepare import NotApplicable, prepared
from pyrovae.evaluate.scores import FLOATS_PER_CHUNK
from pyrovae.infer.log_weights import PARTICLES, Structure, same_random_state
from pyrovae.pair import Pair

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "LIKELIHOOD",
    "Calibration",
    "PredictiveCheck",
    "RankTest",
    "StatisticCheck",
    "default_statistics",
    "plot_calibration",
    "posterior_predictive_check",
    "simulation_based_calibration",
]

LIKELIHOOD = "log p(x | z)"
"""Name of the rank test of the log likelihood."""
LEVEL = 0.01  # of the verdicts, and of what lies outside the bands in pictures
UNIFORM = "ranks uniform"


# Simulation-based calibration


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
    """χ² test of uniformity, by dimension."""
    adjusted: list[float]
    """The same for all dimensions together (Holm 1979): right however the dimensions depend on each other."""
    shift: list[float]
    """z score of the ranks' mean, by dimension: above 0 the draws are too low."""
    shape: list[float]
    """z score of the ranks' distance from their middle, by dimension: above 0 the draws are too narrow."""
    verdicts: list[str]
    """By dimension, in words. Not ``ranks uniform`` only where ``adjusted`` is below 0.01."""

    @property
    def p_value(self) -> float:
        """Of the hypothesis that the ranks of every dimension are uniform: the smallest of ``adjusted``."""
        return min(self.adjusted)

    @property
    def verdict(self) -> str:
        """What is wrong, and in how many dimensions."""
        found = Counter(verdict for verdict in self.verdicts if verdict != UNIFORM)
        if not found:
            return UNIFORM
        if (count := len(self.verdicts)) == 1:
            return next(iter(found))
        return "; ".join(f"{verdict} in {times} of {count} dimensions" for verdict, times in found.most_common())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; without the ranks themselves."""
        names = ("counts", "p_values", "adjusted", "shift", "shape", "verdicts", "p_value", "verdict")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, repr=False)
class Calibration:
    """What :func:`simulation_based_calibration` found."""

    num_simulations: int
    num_draws: int
    num_bins: int
    source: str
    """Where the draws are from: ``guide`` or ``exact``."""
    tests: dict[str, RankTest]
    """By latent; and under ``"log p(x | z)"`` that of the log likelihood, where it can be had."""

    @property
    def p_value(self) -> float:
        """Of the hypothesis that all ranks are uniform (Holm over latents)."""
        return min(1.0, len(self.tests) * min(test.p_value for test in self.tests.values()))

    @property
    def verdict(self) -> str:
        """``ranks uniform``, or what is wrong with which latent."""
        wrong = [f"{name}: {test.verdict}" for name, test in self.tests.items() if test.verdict != UNIFORM]
        return "; ".join(wrong) or UNIFORM

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; without the ranks themselves."""
        own = {name: getattr(self, name) for name in ("num_simulations", "num_draws", "num_bins", "source")}
        return own | {
            "p_value": self.p_value,
            "verdict": self.verdict,
            "tests": {name: test.to_dict() for name, test in self.tests.items()},
        }

    def __repr__(self) -> str:
        """A table, for reading."""
        source = "guide" if self.source == "guide" else "exact posterior"
        width = max(8, *map(len, self.tests)) + 2
        lines = [
            f"{self.num_simulations} simulated data, {self.num_draws} draws each from the {source}; "
            f"χ² over {self.num_bins} bins, Holm over dimensions",
            f"{'ranks of':<{width}}{'dimensions':>10}{'p':>10}  verdict",
        ]
        for name, test in self.tests.items():
            lines.append(f"{name:<{width}}{len(test.p_values):>10}{test.p_value:>10.3g}  {test.verdict}")
        return "\n".join(lines)


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

    This is about the guide, on data *of the model*. Whether the model fits the data at hand says
    :func:`posterior_predictive_check`.

    Args:
        pair: the model and guide. It is left as it was.
        num_simulations: S.
        num_draws: L. L + 1 needs a divisor to make bins of; 99 gives 20 bins.
        num_bins: must divide L + 1; by default the most up to 20 that leave 5 simulations a bin.
        source: draws from the ``guide``, or from ``exact``, ``pair.posterior``. By default the guide, or the exact
            posterior where the guide samples nothing.
        data_dim: D, where the pair does not say.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda``.
        seed: of the simulations. The caller's random state is left as it was.
        progress: show a bar; None shows it on a terminal.

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
    few = _two_data(pair, data_dim, seed)
    with prepared(pair, few, device=device, seed=seed) as few, torch.no_grad():
        sites = _Sites(pair, few, "calibration")
        source = sites.check_source(source)
        if sites.shared:
            raise NotApplicable(
                f"calibration does not apply to {type(pair).__name__}: its latent {', '.join(sites.shared)} lies "
                "outside the data plate, so all data of a run share it. Simulate data sets, and fit a guide to each."
            )
        ranks = _ranks(sites, few, num_simulations, num_draws, source, progress)
    tests = {name: _rank_test(name, value, num_draws, num_bins) for name, value in ranks.items()}
    return Calibration(num_simulations, num_draws, num_bins, source, tests)


def _num_bins(num_simulations: int, num_draws: int, num_bins: int | None) -> int:
    possible = [b for b in range(2, num_draws + 2) if (num_draws + 1) % b == 0 and num_simulations >= 5 * b]
    if num_bins is not None:
        check_positive("num_bins", num_bins, integer=True)
        if num_bins not in possible:
            raise ValueError(
                f"num_bins: expected a divisor of num_draws + 1 = {num_draws + 1}, from 2 to num_simulations / 5 = "
                f"{num_simulations // 5}; got {num_bins}."
            )
        return num_bins
    if num_simulations < 10:
        raise ValueError(f"num_simulations: expected 10 or more, 5 for each bin of ranks; got {num_simulations}.")
    fitting = [b for b in possible if b <= 20]
    if not fitting:
        raise ValueError(
            f"num_draws: expected a number for which num_draws + 1 has a divisor from 2 to "
            f"{min(20, num_simulations // 5)}, to make bins of; got {num_draws}. Use 99."
        )
    return max(fitting)


def _ranks(
    sites: _Sites, few: Tensor, num_simulations: int, num_draws: int, source: str, progress: bool | None
) -> dict[str, Tensor]:
    """By latent: ranks of the true values among the draws, (S, dimensions), on the CPU."""
    rows_at_a_time, draws_at_a_time = sites.chunks(num_simulations, num_draws)
    names = [name for name in sites.local if name in sites.guided or source == "exact"]
    with_likelihood = len(names) == len(sites.local)
    found: dict[str, list[Tensor]] = {}
    bar = tqdm(
        total=num_simulations * num_draws,
        unit="draw",
        disable=None if progress is None else not progress,
        leave=False,
        desc="calibration",
    )
    with bar:
        for start in range(0, num_simulations, rows_at_a_time):
            count = min(rows_at_a_time, num_simulations - start)
            simulated = sites.simulate(few.new_zeros(count, few.shape[1]), {}, 1)
            x = sites.data(simulated)[0]
            truth = {name: sites.per_datum(name, simulated.nodes[name]["value"]) for name in names}
            if with_likelihood:
                truth[LIKELIHOOD] = sites.log_likelihood(simulated)
            counts: dict[str, Any] = dict.fromkeys(truth, 0)  # draws below the truth; below or equal; NaN
            for first in range(0, num_draws, draws_at_a_time):
                draws = min(draws_at_a_time, num_draws - first)
                values = sites.draw(x, draws, source)
                scalars = {name: sites.per_datum(name, values[name]) for name in names}
                if with_likelihood:
                    scalars[LIKELIHOOD] = sites.log_likelihood(sites.condition(x, values, draws))
                for name, value in scalars.items():
                    low = high = true = truth[name]
                    if name == LIKELIHOOD:  # a sum, known to rounding: where z plays no part, all are equal
                        slack = 50 * torch.finfo(value.dtype).eps * true.abs()
                        low, high = true - slack, true + slack
                    counts[name] += torch.stack(
                        [(value < low).sum(0), (value <= high).sum(0), (value.isnan() | true.isnan()).sum(0)]
                    )
                bar.update(count * draws)
            for name, (below, up_to, bad) in counts.items():
                if bool(bad.any()):
                    raise ValueError(f"pair: {name} is NaN in a simulation, or in a draw from the {source}.")
                room = (up_to - below + 1).double()
                place = (torch.rand_like(room) * room).long().minimum(up_to - below)
                found.setdefault(name, []).append((below + place).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def _rank_test(name: str, ranks: Tensor, num_draws: int, num_bins: int) -> RankTest:
    size, levels = len(ranks), num_draws + 1
    bins = ranks * num_bins // levels
    counts = torch.zeros(ranks.shape[1], num_bins, dtype=torch.long).scatter_add_(1, bins.T, torch.ones_like(bins.T))
    expected = size / num_bins
    p_values = stats.chi2.sf(((counts - expected) ** 2 / expected).sum(1).numpy(), num_bins - 1)
    # Scores of Neyman's (1937) smooth test: Legendre polynomials of degree 1 and 2, standardised over 0..L.
    position = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels - 0.5
    shift, shape = (
        ((p - p.mean()) / p.std(correction=0).clamp(min=1e-300))[ranks].sum(0) / math.sqrt(size)
        for p in (position, position.square())
    )
    adjusted = _holm(p_values)
    verdicts = [
        UNIFORM if p >= LEVEL else _verdict(a, b, likelihood=name == LIKELIHOOD)
        for p, a, b in zip(adjusted, shift.tolist(), shape.tolist(), strict=True)
    ]
    return RankTest(
        ranks, num_draws, counts.tolist(), p_values.tolist(), adjusted, shift.tolist(), shape.tolist(), verdicts
    )


def _holm(p_values: np.ndarray) -> list[float]:
    order = np.argsort(p_values)
    steps = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(steps)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted.tolist()


def _verdict(shift: float, shape: float, *, likelihood: bool) -> str:
    if max(abs(shift), abs(shape)) < stats.norm.isf(LEVEL / 2):
        return "not uniform"
    # Where the density of the ranks is monotone, |shift| ≥ √(3/5) |shape|, and equal when all lie at one end.
    if abs(shift) >= 0.77 * abs(shape):
        if likelihood:
            return "the truth fits x better than the draws" if shift > 0 else "the draws fit x better than the truth"
        return f"shifted (draws too {'low' if shift > 0 else 'high'})"
    if likelihood:
        return "not uniform"
    return "too narrow (∪-shaped)" if shape > 0 else "too wide (∩-shaped)"


def plot_calibration(calibration: Calibration, *, kind: str = "histogram", max_panels: int = 12) -> Figure:
    """Ranks of each dimension, those with the smallest p-values first, with the band that holds 99% under uniformity.

    Args:
        calibration: what :func:`simulation_based_calibration` found.
        kind: ``histogram`` (the band holds each bar with 99%) or ``ecdf``: the ranks' cumulative distribution less the
            uniform one, with a band that holds all of it with 99% (Säilynoja, Bürkner and Vehtari 2022).
        max_panels: the most dimensions shown.
    """
    from pyrovae.evaluate.plots import _figure

    check_choice("kind", kind, ("histogram", "ecdf"))
    check_positive("max_panels", max_panels, integer=True)
    panels = [(name, test, i) for name, test in calibration.tests.items() for i in range(len(test.p_values))]
    total = len(panels)
    panels = sorted(panels, key=lambda panel: panel[1].p_values[panel[2]])[:max_panels]
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = _figure(max(4.5, 3.2 * columns), 2.6 * rows + 0.5)
    grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    band = ecdf_band(calibration.num_simulations, calibration.num_draws + 1) if kind == "ecdf" else None
    for axes, (name, test, i) in zip(grid, panels, strict=False):
        if band is None:
            _draw_histogram(axes, test.counts[i], calibration)
        else:
            _draw_ecdf(axes, test.ranks[:, i], calibration, band)
        label = name if len(test.p_values) == 1 else f"{name}[{i}]"
        axes.set_title(f"{label}: p = {test.p_values[i]:.2g}\n{test.verdicts[i]}", fontsize=9, parse_math=False)
        axes.set_xlabel("rank of the truth among the draws", fontsize=8)
        axes.tick_params(labelsize=8)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    shown = f"the worst {len(panels)} of {total} dimensions" if len(panels) < total else "all dimensions"
    figure.suptitle(f"Calibration of the {calibration.source} ({shown}); grey: 99% if uniform", fontsize=10)
    return figure


def _draw_histogram(axes: Axes, counts: list[int], calibration: Calibration) -> None:
    from pyrovae.evaluate.plots import DATA, MODEL

    size, bins = calibration.num_simulations, len(counts)
    low, high = stats.binom.ppf([LEVEL / 2, 1 - LEVEL / 2], size, 1 / bins)
    width = (calibration.num_draws + 1) / bins
    axes.axhspan(low, high, color="0.85", zorder=0)
    axes.axhline(size / bins, color=MODEL, linewidth=0.8)
    axes.bar([(i + 0.5) * width - 0.5 for i in range(bins)], counts, width=0.94 * width, color=DATA, alpha=0.8)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("simulations", fontsize=8)


def _draw_ecdf(axes: Axes, ranks: Tensor, calibration: Calibration, band: tuple[np.ndarray, np.ndarray]) -> None:
    from pyrovae.evaluate.plots import DATA, MODEL

    levels, size = calibration.num_draws + 1, calibration.num_simulations
    uniform = np.arange(1, levels) / levels
    cumulative = np.bincount(ranks.numpy(), minlength=levels).cumsum()[:-1] / size
    at = np.arange(levels - 1)
    axes.fill_between(at, band[0] / size - uniform, band[1] / size - uniform, color="0.85", step="mid")
    axes.axhline(0, color=MODEL, linewidth=0.8)
    axes.step(at, cumulative - uniform, color=DATA, where="mid")
    axes.set_ylabel("ECDF − uniform", fontsize=8)


def ecdf_band(size: int, levels: int, *, num_samples: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest counts of ranks ≤ r, r = 0..levels−2, of ``size`` uniform ranks on 0..levels−1: all counts of
    a sample lie between them with 99%.

    Each count is binomial. The tail probability that is cut from all alike is found by simulation: the 1% quantile of
    the smallest tail of a sample (Säilynoja, Bürkner and Vehtari 2022).
    """
    generator = np.random.default_rng(0)
    cumulative = generator.multinomial(size, np.full(levels, 1 / levels), size=num_samples).cumsum(1)[:, :-1]
    share = np.arange(1, levels) / levels
    tails = np.minimum(stats.binom.cdf(cumulative, size, share), stats.binom.sf(cumulative - 1, size, share)).min(1)
    cut = np.quantile(tails, LEVEL, method="lower")
    return stats.binom.ppf(cut, size, share), stats.binom.ppf(1 - cut, size, share)


# Predictive checks


@dataclass(frozen=True)
class StatisticCheck:
    """One test statistic of the data, and of the replicates."""

    name: str
    feature: int | None
    """Of a statistic with a value for each feature: the one that stands out most; then ``observed``, ``mean`` and
    ``standard_deviation`` are its."""
    observed: float
    mean: float
    """Over replicates."""
    standard_deviation: float
    p_value: float


@dataclass(frozen=True, repr=False)
class PredictiveCheck:
    """What :func:`posterior_predictive_check` found."""

    replicates: str
    """``prior`` or ``posterior``."""
    num_data: int
    num_replicates: int
    statistics: list[StatisticCheck]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        """A table, for reading."""
        of = {"prior": "new data from the model", "posterior": "drawn again at the latents of each datum"}
        names = [s.name if s.feature is None else f"{s.name}, feature {s.feature}" for s in self.statistics]
        width = max(9, *map(len, names)) + 2
        lines = [
            f"{self.num_data} data, {self.num_replicates} replicates: {of[self.replicates]}",
            f"{'statistic':<{width}}{'observed':>12}{'replicates':>14}{'± sd':>12}{'p':>9}",
        ]
        for name, s in zip(names, self.statistics, strict=True):
            values = f"{s.observed:>12.5g}{s.mean:>14.5g}{s.standard_deviation:>12.3g}{s.p_value:>9.3g}"
            lines.append(f"{name:<{width}}{values}")
        why = {
            "prior": "where the model was fitted to these data",
            "posterior": "as each datum is compared with replicates made from it",
        }
        note = f"NOTE: {why[self.replicates]}, p tends to be too large: a small one counts, a large one proves little."
        return "\n".join([*lines, note])


def default_statistics(x: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """What :func:`posterior_predictive_check` looks at: functions of a data set (N, D); one value, or one a feature.

    Mean, standard deviation, minimum, maximum and skewness of each feature, and the largest absolute correlation of
    two. Where all of ``x`` lies in [0, 1]: mean and standard deviation over data of the number of pixels on (above
    1/2). Where ``x`` is binary, the mean of a feature says all about it alone.
    """
    functions: dict[str, Callable[[Tensor], Tensor]] = {"mean": lambda x: x.mean(0)}
    if not bool(((x == 0) | (x == 1)).all()):
        functions |= {
            "standard deviation": lambda x: x.std(0, correction=0),
            "minimum": lambda x: x.amin(0),
            "maximum": lambda x: x.amax(0),
            "skewness": lambda x: _standardised(x).pow(3).mean(0),
        }
    if x.shape[1] > 1:
        functions["largest |correlation|"] = _largest_correlation
        if bool(((x >= 0) & (x <= 1)).all()):
            on = lambda x: (x > 0.5).sum(1).double()  # noqa: E731
            functions["pixels on, mean"] = lambda x: on(x).mean()
            functions["pixels on, standard deviation"] = lambda x: on(x).std(correction=0)
    return functions


def _standardised(x: Tensor) -> Tensor:
    """A constant feature becomes 0."""
    centred, scale = x - x.mean(0), x.std(0, correction=0)
    varies = scale > 1e-10 * x.abs().amax(0)
    return torch.where(varies, centred / torch.where(varies, scale, 1), 0)


def _largest_correlation(x: Tensor) -> Tensor:
    y = _standardised(x)
    return (y.mT @ y / len(x)).fill_diagonal_(0).abs().amax()


def posterior_predictive_check(
    pair: Pair,
    x: Tensor,  # (N, D)
    *,
    statistics: Mapping[str, Callable[[Tensor], Any]] | None = None,
    replicates: str = "prior",
    num_replicates: int = 500,
    binarize: bool = False,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool | None = None,
) -> PredictiveCheck:
    """Compare statistics of the data with those of data that the model makes (Rubin 1984; Gelman, Meng, Stern 1996).

    With R replicates x_1..x_R, of N rows each, a statistic with one value has the two-sided p-value

        p = min(1, 2 min(1 + #{r: T(x_r) ≤ T(x)}, 1 + #{r: T(x_r) ≥ T(x)}) / (R + 1)).

    One with a value for each feature has one p-value for all, however they depend on each other: T is standardised
    feature by feature over data and replicates together, and p = (1 + #{r: max_j |T_j(x_r)| ≥ max_j |T_j(x)|})/(R + 1).

    Replicates are

    - ``prior``: x_rn ~ p(x | z), z ~ p(z): new data from the population that the model describes. It is the check of
      a model with a latent for each datum. A global latent comes from the guide, q(z | x). If ``x`` is drawn from this
      very model, p is uniform (never too small); if the model was fitted to ``x``, p tends to be too large.
    - ``posterior``: x_rn ~ p(x | z_n), z_n ~ q(z_n | x_n): the same data over again. It asks only whether the
      likelihood fits what the latents leave over, and is conservative: each x_n is used twice.

    Args:
        pair: the model and guide. It is left as it was.
        x: the data; best held out from the fit.
        statistics: by name, functions of a data set (N, D), in float64 and on the device, that give a number or a
            vector. By default :func:`default_statistics`.
        replicates: ``prior`` or ``posterior``.
        num_replicates: R. The smallest possible p is 1 / (R + 1), or twice that; the work grows with R · N.
        binarize: draw pixels in [0, 1] as 0 or 1 first, once.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda``.
        seed: of the replicates. The caller's random state is left as it was.
        progress: show a bar; None shows it on a terminal.

    Raises:
        NotApplicable: posterior replicates, where the guide leaves out a latent and no exact posterior stands in.
        TypeError, ValueError: bad data or options; a statistic that is NaN or infinite.
    """
    check_positive("num_replicates", num_replicates, integer=True)
    check_choice("replicates", replicates, ("prior", "posterior"))
    _check_statistics(statistics)
    with prepared(pair, x, binarize=binarize, device=device, seed=seed) as x, torch.no_grad():
        sites = _Sites(pair, x[:2], "the predictive check")
        source = sites.check_source(None) if replicates == "posterior" else "guide"
        left_out = [name for name in [*sites.local, *sites.shared] if name not in sites.guided]
        if replicates == "posterior" and source == "guide" and left_out:
            raise NotApplicable(
                f"posterior replicates do not apply to {type(pair).__name__}: its guide leaves out "
                f"{', '.join(left_out)}. Use replicates='prior', or sample it in the guide."
            )
        functions = default_statistics(x) if statistics is None else statistics
        observed = {name: _value(name, function, x.double()) for name, function in functions.items()}
        found: dict[str, list[Tensor]] = {name: [] for name in functions}
        at_a_time = sites.chunks(len(x), num_replicates)
        starts = range(0, num_replicates, at_a_time[1])
        for start in tqdm(
            starts, unit="chunk", disable=None if progress is None else not progress, leave=False, desc="replicates"
        ):
            count = min(at_a_time[1], num_replicates - start)
            parts = [sites.replicate(rows, count, replicates, source) for rows in x.split(at_a_time[0])]
            for replicate in torch.cat(parts, 1):
                for name, function in functions.items():
                    found[name].append(_value(name, function, replicate.double(), like=observed[name]))
    checks = [_check(name, torch.stack([observed[name], *found[name]]).cpu()) for name in functions]
    return PredictiveCheck(replicates, len(x), num_replicates, checks)


def _check_statistics(statistics: Any) -> None:
    if statistics is None:
        return
    if not isinstance(statistics, Mapping) or not all(callable(function) for function in statistics.values()):
        raise TypeError(
            "statistics: expected a dictionary of functions of a data set (N, D) by name, such as "
            f"{{'mean': lambda x: x.mean(0)}}; got {statistics!r}."
        )
    if not statistics:
        raise ValueError("statistics: expected at least one; got none. Leave it out for the default ones.")


def _value(name: str, function: Callable[[Tensor], Any], x: Tensor, like: Tensor | None = None) -> Tensor:
    """(values,), float64."""
    value = torch.as_tensor(function(x), device=x.device).double().reshape(-1)
    if like is not None and value.shape != like.shape:
        raise ValueError(
            f"statistics: expected as many values of {name!r} for each replicate as for the data, {len(like)}; got "
            f"{len(value)}."
        )
    if value.numel() == 0:
        raise ValueError(f"statistics: expected a number or a vector from {name!r}; got nothing.")
    return value


def _check(name: str, values: Tensor) -> StatisticCheck:
    """``values``: (1 + R, features), the data's first."""
    if not bool((finite := torch.isfinite(values).all(1)).all()):
        of = "the data" if not bool(finite[0]) else f"{int((~finite).sum())} replicates"
        raise ValueError(f"statistics: expected finite numbers from {name!r}; got NaN or infinite ones for {of}.")
    mean, scale = values.mean(0), values.std(0, correction=0)
    varies = scale > 1e-12 * values.abs().amax(0)
    distance = torch.where(varies, (values - mean).abs() / torch.where(varies, scale, 1), 0)
    if values.shape[1] == 1:
        tails = (values <= values[0]).sum(), (values >= values[0]).sum()
        p_value = min(1.0, 2 * float(min(tails)) / len(values))
    else:
        largest = distance.amax(1)
        p_value = float((largest >= largest[0]).double().mean())
    worst = int(distance[0].argmax())
    replicated = values[1:, worst]
    return StatisticCheck(
        name,
        worst if values.shape[1] > 1 else None,
        float(values[0, worst]),
        float(replicated.mean()),
        float(replicated.std()) if len(replicated) > 1 else 0.0,
        p_value,
    )


# Runs of a pair


class _Unobserve(UnconditionMessenger):
    """``poutine.uncondition`` that leaves ``pyro.deterministic`` alone: its value is no draw."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["infer"].get("_deterministic"):
            super()._pyro_sample(msg)


def _observed_site(trace: Any, pair: Pair, what: str) -> str:
    """The site whose data the model draws in ``trace``."""
    names = [n for n, s in trace.nodes.items() if s["type"] == "sample" and s["infer"].get("was_observed")]
    plates = [frame.name for name in names for frame in trace.nodes[name]["cond_indep_stack"]]
    if len(names) != 1 or "data" not in plates:
        raise NotApplicable(
            f"{what} does not apply to {type(pair).__name__}: to simulate data, its model must observe x at one site, "
            f"inside the data plate; it observes {', '.join(names) or 'nothing'}."
        )
    return names[0]


@torch.no_grad()
def _two_data(pair: Pair, data_dim: int | None, seed: int) -> Tensor:
    """Two data from the model, to try the pair on."""
    blank = _blank(pair, 2, data_dim)
    with same_random_state(), pyro.validation_enabled(False):
        torch.manual_seed(seed)
        trace: Any = poutine.trace(_Unobserve()(pair.model)).get_trace(blank)
    x = trace.nodes[_observed_site(trace, pair, "calibration")]["value"]
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"pair: the model of {type(pair).__name__} draws data that are NaN or infinite.")
    return x.reshape(blank.shape) if x.numel() == blank.numel() else x


class _Sites:
    """Where a pair's sites lie, and runs of its model and guide under a plate of particles.

    Values have the shapes that Pyro gives them: particles at dim −(nesting + 1) of the batch, then the pair's plates.
    """

    def __init__(self, pair: Pair, few: Tensor, what: str) -> None:
        structure = Structure.of(pair.model, pair.guide, (few,), {})
        self._pair, self._what, self._nesting = pair, what, structure.max_plate_nesting
        self._layout: dict[str, tuple[int, int]] = {}  # by site: the data dim of its batch, its event dims
        trace = self.simulate(few, {}, 1)
        sites: dict[str, Any] = {
            name: site
            for name, site in trace.nodes.items()
            if site["type"] == "sample"
            and type(site["fn"]).__name__ != "_Subsample"
            and not site["infer"].get("_deterministic")
        }
        self._width = sum(site["value"].numel() for site in sites.values()) // len(few)
        for name, site in sites.items():
            for frame in site["cond_indep_stack"]:
                if frame.name == "data":
                    self._layout[name] = (frame.dim, len(site["fn"].event_shape))
        self._observed = _observed_site(trace, pair, what)
        latent = [name for name in sites if name != self._observed]
        self.local = [name for name in latent if name in self._layout]
        self.shared = [name for name in latent if name not in self._layout]
        self.guided = [name for name in latent if name not in structure.enumerated]
        if self.data(trace).shape[1:] != few.shape:
            raise NotApplicable(
                f"{what} does not apply to {type(pair).__name__}: its model draws data of shape "
                f"{tuple(self.data(trace).shape[1:])} at site '{self._observed}' where x has {tuple(few.shape)}."
            )

    def check_source(self, source: str | None) -> str:
        """``guide`` or ``exact``, or NotApplicable."""
        pair = type(self._pair).__name__
        exact = self._pair.posterior is not None
        if source is None:
            source = "exact" if exact and not self.guided else "guide"
        if source == "guide" and not self.guided:
            fix = "Use source='exact'." if exact else "Sample its latents in the guide, or give it a posterior(x)."
            raise NotApplicable(f"{self._what} does not apply to {pair}: its guide samples no latent. {fix}")
        if source == "exact" and (not exact or len(self.local) != 1 or self.shared):
            reason = (
                "it has no posterior(x)" if not exact else "it does not have just one latent, inside the data plate"
            )
            raise NotApplicable(f"{self._what} with source='exact' does not apply to {pair}: {reason}.")
        return source

    def chunks(self, num_data: int, num_particles: int) -> tuple[int, int]:
        """Data and particles at a time."""
        width = max([self._width, *(p.shape[0] for p in self._pair.parameters() if p.dim() == 2)])
        rows = max(1, FLOATS_PER_CHUNK // width)
        at_a_time = num_data if self.shared else min(num_data, rows)  # one value of a global latent for all data
        return at_a_time, max(1, min(num_particles, rows // at_a_time))

    def simulate(self, x: Tensor, given: dict[str, Tensor], count: int) -> Any:
        """Run the model with the latents ``given``; other latents and the data are drawn."""
        return self._trace(_Unobserve()(self._pair.model), x, given, count)

    def condition(self, x: Tensor, given: dict[str, Tensor], count: int) -> Any:
        """Run the model at the latents ``given`` and the data ``x``."""
        return self._trace(self._pair.model, x, given, count)

    def draw(self, x: Tensor, count: int, source: str) -> dict[str, Tensor]:
        """Latents given ``x``, from the guide or the exact posterior, with ``count`` particles."""
        if source == "guide":
            trace: Any = self._trace(self._pair.guide, x, {}, count)
            return {name: trace.nodes[name]["value"] for name in self.guided}
        assert self._pair.posterior is not None
        name = self.local[0]
        draws = self._pair.posterior(x).sample((count,))
        data_dim, event_dim = self._layout[name]
        batch = [count] + [1] * self._nesting
        batch[data_dim] = len(x)
        return {name: draws.reshape(*batch, *draws.shape[draws.dim() - event_dim :])}

    def replicate(self, x: Tensor, count: int, replicates: str, source: str) -> Tensor:
        """Data (count, N, D) like ``x``."""
        given: dict[str, Tensor] = {}
        if replicates == "posterior" or any(name in self.guided for name in self.shared):
            given = self.draw(x, count, source)
        if replicates == "prior":
            given = {name: given[name] for name in self.shared if name in given}
        return self.data(self.simulate(torch.zeros_like(x), given, count))

    def data(self, trace: Any) -> Tensor:
        """The data drawn in ``simulate``, (particles, N, D)."""
        return self.per_datum(self._observed, trace.nodes[self._observed]["value"])

    def log_likelihood(self, trace: Any) -> Tensor:
        """log p(x | z) of each datum, (particles, N, 1), nats."""
        trace.compute_log_prob(lambda name, site: name == self._observed)
        log_prob = trace.nodes[self._observed]["log_prob"]
        return self.per_datum(self._observed, log_prob, event_dim=0).sum(-1, keepdim=True)

    def per_datum(self, name: str, value: Tensor, event_dim: int | None = None) -> Tensor:
        """(particles, N, scalars) of a value, or of a log density with ``event_dim=0``, at a local site."""
        data_dim, events = self._layout[name]
        events = events if event_dim is None else event_dim
        missing = self._nesting + 1 + events - value.dim()
        value = value.reshape((1,) * missing + value.shape).movedim(data_dim - events, 1)
        return value.flatten(2) if value.dim() > 2 else value.unsqueeze(-1)

    def _trace(self, function: Callable, x: Tensor, given: dict[str, Tensor], count: int) -> Any:
        particles = pyro.plate(PARTICLES, count, dim=-self._nesting - 1)
        return poutine.trace(poutine.condition(particles(function), data=given)).get_trace(x)
