"""Criteria for the size of a model: BIC, AIC and ICL of pairs fitted by maximum likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from pyrovae.checks import check_choice, check_data, check_positive, not_a_pair
from pyrovae.evaluation.measurement import NotApplicable, Result, not_applicable, prepared, progress_bar, runs_at_a_time
from pyrovae.evaluation.mixtures import category_log_probs, num_categories
from pyrovae.infer.em import fit_em
from pyrovae.infer.weights import same_random_state
from pyrovae.pair import Pair

__all__ = ["CRITERIA", "Candidate", "InformationCriteria", "Selection", "information_criteria", "select_components"]

CRITERIA = ("bic", "icl", "aic")


@dataclass(frozen=True, repr=False)
class InformationCriteria(Result):
    """Criteria that :func:`information_criteria` computed. Lower criteria are better, as in scikit-learn."""

    num_data: int
    num_parameters: int
    log_likelihood: float
    """ℓ = Σ_n log p(x_n), the total in nats."""
    bic: float
    """−2 ℓ + ν log N, ν the number of free parameters (Schwarz 1978)."""
    aic: float
    """−2 ℓ + 2 ν (Akaike 1974)."""
    icl: float | None
    """−2 Σ_n log p(x_n, ẑ_n) + ν log N with ẑ_n the most probable component: BIC, and a price for components that
    overlap (Biernacki, Celeux and Govaert 2000). None without a categorical posterior."""

    def _table(self) -> list[str]:
        rows = [("log likelihood", self.log_likelihood), ("BIC", self.bic), ("ICL", self.icl), ("AIC", self.aic)]
        lines = [f"{name:<16}{value:>14.4f}" for name, value in rows if value is not None]
        head = f"{self.num_data} data, {self.num_parameters} free parameters; criteria: lower is better"
        return [head, *lines]


def information_criteria(
    pair: Pair,
    x: Tensor,  # (N, D)
    *,
    num_parameters: int | None = None,
    binarize: bool = False,
    device: str | torch.device = "auto",
    seed: int = 0,
) -> InformationCriteria:
    """Compute BIC, AIC and ICL of a pair fitted to ``x`` by maximum likelihood.

    Args:
        pair: a pair with an exact ``log_prob``, at its maximum likelihood on these data.
        x: the data it was fitted to, (N, D).
        num_parameters: ν; by default ``pair.num_parameters``.
        binarize, device, seed: as in :func:`pyrovae.evaluate`.

    Raises:
        NotApplicable: no ``log_prob``, or nobody says the number of parameters.
        TypeError, ValueError: bad data.
    """
    if num_parameters is not None:
        check_positive("num_parameters", num_parameters, integer=True)
    with prepared(pair, x, binarize=binarize, device=device, seed=seed) as x, torch.no_grad():
        if pair.log_prob is None:
            raise not_applicable("information_criteria", pair, "it has no exact log_prob(x).")
        nu = num_parameters if num_parameters is not None else getattr(pair, "num_parameters", None)
        if nu is None:
            fix = "Give it a property num_parameters, or pass num_parameters=."
            reason = f"it does not say its number of free parameters. {fix}"
            raise not_applicable("information_criteria", pair, reason)
        num_components = 0  # without a categorical posterior
        with suppress(NotApplicable):
            num_components = num_categories(pair, x[:2], "icl")
        chunks = x.split(runs_at_a_time(x.device, x.shape[1] * (num_components or 1)))
        total = float(sum(pair.log_prob(rows).double().sum() for rows in chunks))
        bic = -2 * total + nu * math.log(len(x))
        icl = None
        if num_components:
            assigned = (category_log_probs(pair.posterior(rows)).amax(-1).sum() for rows in chunks)  # type: ignore[misc]
            icl = bic - 2 * float(sum(assigned))
    return InformationCriteria(len(x), nu, total, bic, -2 * total + 2 * nu, icl)


@dataclass(frozen=True)
class Candidate:
    """One fit of :func:`select_components`."""

    family: str
    """The name of the function that made the pair; empty where there is only one."""
    num_components: int
    criteria: InformationCriteria
    converged: bool
    collapsed: tuple[int, ...]
    """Components that EM held at the covariance floor. The likelihood then shows how low the floor is, not how good the
    fit is, so this fit is never chosen."""
    pair: Pair
    """The fitted pair."""


@dataclass(frozen=True, repr=False)
class Selection(Result):
    """Fits that :func:`select_components` compared. Lower criteria are better."""

    candidates: list[Candidate]
    """All fits by BIC, the best first and collapsed ones last."""

    def best(self, criterion: str = "bic") -> Candidate:
        """Return the candidate with the lowest ``bic``, ``icl`` or ``aic``, among those that have not collapsed.

        Raises:
            ValueError: an unknown criterion; no candidate is left.
        """
        check_choice("criterion", criterion, CRITERIA)
        if (winner := self.winners().get(criterion)) is None:
            reason = f"no fit has a {criterion.upper()} to choose by: all collapsed, or have no categorical posterior"
            fix = "Try fewer components, more restarts, or a covariance with fewer parameters."
            raise ValueError(f"criterion: {reason}. {fix}")
        return winner

    def winners(self) -> dict[str, Candidate]:
        """Return the best candidate by each criterion that any fit can be chosen by."""
        found = {}
        for criterion in CRITERIA:
            value = attrgetter(f"criteria.{criterion}")
            if able := [c for c in self.candidates if not c.collapsed and value(c) is not None]:
                found[criterion] = min(able, key=value)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, for JSON."""

        def row(c: Candidate, *names: str) -> dict[str, Any]:
            return {name: getattr(c, name) for name in ("family", "num_components", *names)}

        rows = [row(c, "converged") | {"collapsed": list(c.collapsed)} | c.criteria.to_dict() for c in self.candidates]
        return {"candidates": rows, "best": {criterion: row(winner) for criterion, winner in self.winners().items()}}

    def _table(self) -> list[str]:
        winners = self.winners()
        width = max([0, *(len(c.family) + 2 for c in self.candidates if c.family)])
        shown = [name for name in CRITERIA if any(getattr(c.criteria, name) is not None for c in self.candidates)]
        lines = [
            f"{self.candidates[0].criteria.num_data} data; criteria: lower is better, * the best",
            f"{'':<{width}}components  parameters  log likelihood" + "".join(f"{n.upper():>13} " for n in shown),
        ]
        for c in self.candidates:
            line = f"{c.family:<{width}}{c.num_components:>10}{c.criteria.num_parameters:>12}"
            line += f"{c.criteria.log_likelihood:>16.4f}"
            for name in shown:
                value = getattr(c.criteria, name)
                line += f"{'–' if value is None else f'{value:.3f}':>13}{'*' if winners.get(name) is c else ' '}"
            if c.collapsed:
                line += f"  not chosen: collapsed components {', '.join(map(str, c.collapsed))}"
            elif not c.converged:
                line += "  not converged"
            lines.append(line.rstrip())
        return lines


def select_components(
    make: Callable[[int], Pair] | Mapping[str, Callable[[int], Pair]],
    x: Tensor,  # (N, D)
    counts: Iterable[int],
    *,
    restarts: int = 10,
    max_iter: int = 1000,
    tol: float = 1e-10,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool | None = None,
) -> Selection:
    """Fit a pair by exact EM for each number of components, and compare BIC, ICL and AIC.

        select_components(lambda k: GMM(k, 2), x, range(1, 7)).best("icl").num_components
        select_components({c: lambda k, c=c: GMM(k, 2, covariance=c) for c in ("full", "diag")}, x, range(1, 7))

    BIC finds the number of components that describe the density, ICL the number of clusters that lie apart; AIC
    tends to take too many. Fits with components at the covariance floor are reported, and never chosen.

    Args:
        make: builds an untrained pair of k components (or k latent dimensions, ...); or several such by name, to be
            compared with each other. The pair needs EM, ``log_prob`` and ``num_parameters``.
        x: the data.
        counts: the k to try.
        restarts, max_iter, tol: of :func:`pyrovae.fit_em`, which works in float64.
        device, seed, progress: as in :func:`pyrovae.evaluate`.

    Raises:
        NotApplicable: a pair without ``log_prob`` or number of parameters.
        TypeError: ``make`` does not make pairs; a pair without EM.
        ValueError: bad data or options.
    """
    makers = dict(make) if isinstance(make, Mapping) else {"": make}
    if not makers or not all(callable(maker) and not isinstance(maker, Pair) for maker in makers.values()):
        expected = "expected a function of the number of components, lambda k: GMM(k, data_dim), or a dictionary of"
        raise TypeError(f"make: {expected} such functions by name; got {make!r}.")
    x = check_data(x)
    numbers = _check_counts(counts, len(x))
    runs = [(family, k) for family in makers for k in numbers]
    candidates = []
    for family, k in progress_bar("components", progress, runs, unit="fit"):
        with same_random_state():
            torch.manual_seed(seed)
            pair = makers[family](k)
        if not isinstance(pair, Pair):
            raise TypeError(f"make: {not_a_pair(pair).removeprefix('pair: ')}")
        dtype = next((p.dtype for p in pair.parameters()), torch.float32)
        pair.double()
        result = fit_em(pair, x, restarts=restarts, max_iter=max_iter, tol=tol, seed=seed, device=device)
        criteria = information_criteria(pair, x, device=device)
        pair.to(dtype=dtype)
        collapsed = result.covariance_floor.components if result.covariance_floor is not None else ()
        candidates.append(Candidate(family, k, criteria, result.converged, collapsed, pair))
    return Selection(sorted(candidates, key=lambda c: (bool(c.collapsed), c.criteria.bic)))


def _check_counts(counts: Any, num_data: int) -> list[int]:
    """Check the numbers of components, and drop repeated ones."""
    if isinstance(counts, (str, bytes)) or not isinstance(counts, Iterable):
        raise TypeError(f"counts: expected whole numbers of components, such as range(1, 7); got {counts!r}.")
    found = list(dict.fromkeys(counts))
    if not found:
        raise ValueError("counts: expected at least one number of components; got none.")
    for k in found:
        check_positive("counts", k, integer=True)
    if max(found) > num_data:
        raise ValueError(f"counts: expected at most as many components as data, {num_data}; got {max(found)}.")
    return found
