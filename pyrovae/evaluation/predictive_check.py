"""Predictive check: statistics of the data beside those of data that the model makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrovae.checks import check_choice, check_positive
from pyrovae.evaluation.generation import Simulator
from pyrovae.evaluation.measurement import Result, not_applicable, prepared, progress_bar
from pyrovae.pair import Pair

__all__ = ["PredictiveCheck", "StatisticCheck", "default_statistics", "posterior_predictive_check"]


@dataclass(frozen=True)
class StatisticCheck:
    """One test statistic of the data, and of the replicates."""

    name: str
    feature: int | None
    """Feature that stands out most, of a statistic with a value for each feature: ``observed``, ``mean`` and
    ``standard_deviation`` are that feature's."""
    observed: float
    mean: float
    """Mean over replicates."""
    standard_deviation: float
    p_value: float
    """p-value; where there are several values, that of the largest deviation among all, not of ``feature``'s alone."""
    num_values: int = 1


@dataclass(frozen=True, repr=False)
class PredictiveCheck(Result):
    """Statistics that :func:`posterior_predictive_check` compared."""

    replicates: str
    """``prior`` or ``posterior``."""
    num_data: int
    num_replicates: int
    statistics: list[StatisticCheck]

    def _table(self) -> list[str]:
        of = {"prior": "new data from the model", "posterior": "drawn again at the latents of each datum"}
        features = ["" if s.feature is None else f", most of all: feature {s.feature}" for s in self.statistics]
        names = [s.name + feature for s, feature in zip(self.statistics, features, strict=True)]
        width = max(9, *map(len, names)) + 2
        lines = [
            f"{self.num_data} data, {self.num_replicates} replicates: {of[self.replicates]}",
            f"{'statistic':<{width}}{'observed':>12}{'replicates':>14}{'± sd':>12}{'p':>9}",
        ]
        for name, s in zip(names, self.statistics, strict=True):
            values = f"{s.observed:>12.5g}{s.mean:>14.5g}{s.standard_deviation:>12.3g}{s.p_value:>9.3g}"
            remark = f"  p of the worst of {s.num_values}" if s.num_values > 1 else ""
            lines.append(f"{name:<{width}}{values}{remark}")
        why = {
            "prior": "where the model was fitted to these data",
            "posterior": "as each datum is compared with replicates made from it",
        }
        note = f"NOTE: {why[self.replicates]}, p tends to be too large: a small one counts, a large one proves little."
        return [*lines, note]


def default_statistics(x: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the functions of a data set (N, D) that :func:`posterior_predictive_check` uses by default, by name.

    Each gives one value, or one a feature: mean, standard deviation, minimum, maximum and skewness of each feature, and
    the largest absolute correlation of two. Where all of ``x`` lies in [0, 1], also mean and standard deviation over
    data of the number of pixels on (above 1/2). For binary ``x`` the mean is the only statistic of a single feature,
    as it determines the others.
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
    """Standardise each feature; a constant one becomes 0."""
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
        statistics: by name, functions of a data set (N, D), in float64 and on the device, that give a number or a
            vector. By default :func:`default_statistics`.
        replicates: ``prior`` or ``posterior``.
        num_replicates: R. The smallest possible p is 1 / (R + 1), or twice that; the work grows with R · N.
        pair, x, binarize, device, seed, progress: as in :func:`pyrovae.evaluate`; data best held out from the fit.

    Raises:
        NotApplicable: posterior replicates, where the guide leaves out a latent and no exact posterior stands in.
        TypeError, ValueError: bad data or options; a statistic that is NaN or infinite.
    """
    check_positive("num_replicates", num_replicates, integer=True)
    check_choice("replicates", replicates, ("prior", "posterior"))
    _check_statistics(statistics)
    with prepared(pair, x, binarize=binarize, device=device, seed=seed) as x, torch.no_grad():
        simulator = Simulator(pair, x[:2], "posterior_predictive_check")
        source = simulator.check_source(None) if replicates == "posterior" else "guide"
        left_out = [name for name in [*simulator.local, *simulator.shared] if name not in simulator.guided]
        if replicates == "posterior" and source == "guide" and left_out:
            reason = f"for posterior replicates, its guide leaves out {', '.join(left_out)}. "
            fix = "Use replicates='prior', or sample it in the guide."
            raise not_applicable("posterior_predictive_check", pair, reason + fix)
        functions = default_statistics(x) if statistics is None else statistics
        observed = {name: _value_of_statistic(name, function, x.double()) for name, function in functions.items()}
        found: dict[str, list[Tensor]] = {name: [] for name in functions}
        rows_at_a_time, replicates_at_a_time = simulator.chunks(len(x), num_replicates)
        for start in progress_bar("replicates", progress, range(0, num_replicates, replicates_at_a_time)):
            count = min(replicates_at_a_time, num_replicates - start)
            parts = [simulator.replicate(rows, count, replicates, source) for rows in x.split(rows_at_a_time)]
            for replicate in torch.cat(parts, 1):
                for name, function in functions.items():
                    found[name].append(_value_of_statistic(name, function, replicate.double(), like=observed[name]))
    checks = [_statistic_check(name, torch.stack([observed[name], *found[name]]).cpu()) for name in functions]
    return PredictiveCheck(replicates, len(x), num_replicates, checks)


def _check_statistics(statistics: Any) -> None:
    if statistics is None:
        return
    if not isinstance(statistics, Mapping) or not all(map(callable, statistics.values())):
        such_as = "such as {'mean': lambda x: x.mean(0)}"
        expected = f"expected a dictionary of functions of a data set (N, D) by name, {such_as}"
        raise TypeError(f"statistics: {expected}; got {statistics!r}.")
    if not statistics:
        raise ValueError("statistics: expected at least one; got none. Leave it out for the default ones.")


def _value_of_statistic(name: str, function: Callable[[Tensor], Any], x: Tensor, like: Tensor | None = None) -> Tensor:
    """Return the statistic of a data set, (values,), float64; ``like`` has the right number of values."""
    value = torch.as_tensor(function(x), device=x.device).double().reshape(-1)
    if like is not None and value.shape != like.shape:
        expected = f"expected as many values of {name!r} for each replicate as for the data, {len(like)}"
        raise ValueError(f"statistics: {expected}; got {len(value)}.")
    if value.numel() == 0:
        raise ValueError(f"statistics: expected a number or a vector from {name!r}; got nothing.")
    return value


def _statistic_check(name: str, values: Tensor) -> StatisticCheck:
    """Compare the values of a statistic, (1 + R, features), the data's first."""
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
        values.shape[1],
    )
