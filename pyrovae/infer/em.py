"""Exact EM: for pairs that can take expectations under p(z | x) and maximise in closed form."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pyrovae.checks import check_data, check_positive, pick_device
from pyrovae.machine import limit_threads
from pyrovae.pair import Pair

__all__ = ["CovarianceFloor", "EMResult", "fit_em"]

CPU_CHUNK = 2**20
"""Product of rows, components, features and restarts in a chunk, above which a CPU's caches are too small."""


class CovarianceFloor(NamedTuple):
    """Components that collapsed, and the smallest variance that holds them."""

    fraction: float
    """The smallest variance, as a fraction of the data's."""

    components: tuple[int, ...]
    """Numbers of the components that are held there."""


@dataclass(frozen=True, repr=False)
class EMResult:
    """Result of :func:`fit_em`. Log likelihoods are totals over the data, in nats."""

    log_likelihood: float
    """Total log likelihood of the fitted pair."""

    trace: list[float]
    """Log likelihood at the start of the best restart, and after each of its iterations."""

    converged: bool
    iterations: int
    seconds: float
    """Time of all restarts together."""

    restart_log_likelihoods: list[float]
    covariance_floor: CovarianceFloor | None
    """None where no component is held at the floor."""

    num_data: int

    def __repr__(self) -> str:
        restarts = len(self.restart_log_likelihoods)
        text = (
            f"EM: log likelihood {self.log_likelihood:.4f} nats ({self.log_likelihood / self.num_data:.4f} per datum), "
            f"{'converged' if self.converged else 'NOT converged'} after {self.iterations} iterations"
            f"{f', best of {restarts} restarts' if restarts > 1 else ''}, {self.seconds:.2f} s"
        )
        if self.covariance_floor is not None:
            fraction, components = self.covariance_floor
            which = ", ".join(map(str, components))
            text += f"; collapsed components, held at {fraction:g} of the data's variance: {which}"
        return text


def fit_em(
    pair: Pair,
    x: Tensor,  # (N, D)
    *,
    max_iter: int = 1000,
    tol: float = 1e-10,
    restarts: int = 1,
    seed: int = 0,
    initialize: bool = True,
    dtype: torch.dtype = torch.float64,
    chunk_size: int | None = None,
    device: str | torch.device = "auto",
    threads: int | None = None,
    progress: bool = False,
) -> EMResult:
    """Fit a pair by exact EM (Dempster, Laird and Rubin 1977) and leave the best fit in it.

    Each iteration sums ``pair.expected_statistics(chunk)`` over chunks of the data and calls
    ``pair.maximize(statistics)``. The total log likelihood ℓ = Σ_n log p(x_n) never goes down. A run ends when
    an iteration raises it by at most ``tol · max(|ℓ|, N)``: ``tol`` is the relative change of the log likelihood per
    datum, or the absolute change where that is below one nat.

    The arithmetic is in ``dtype``, on a copy; the pair keeps its own dtype and device, and an error or an interrupt
    leaves it as it was. Where the pair has ``match_guide()``, its guide is set to the exact posterior at the end.

    A pair takes part by two methods:

    - ``expected_statistics(x)``: tensors that add over chunks, Σ log p(x) among them as ``"log_likelihood"``;
    - ``maximize(statistics)``: sets the parameters that maximise the expected log joint.

    With ``batched_em = True`` both must work when every parameter and buffer carries one more, leading dimension:
    all restarts then run as one. If the pair has a boolean buffer ``floored``, one entry a component, and a number
    ``covariance_floor``, collapsed components are reported, and a restart with one wins only when all have one: its
    likelihood says how small the floor is, not how good the fit is.

    Args:
        pair: the pair to fit.
        x: the data.
        max_iter: the most iterations of each restart.
        tol: see above.
        restarts: runs from different starts, of which the best stays.
        seed: restart r draws its start, ``pair.initialize(x)``, from seed + r.
        initialize: False goes on from the pair's present parameters.
        dtype: of the arithmetic.
        chunk_size: rows that are converted, moved to the device and worked on at a time. By default all data are
            converted and moved once.
        device: where to compute; ``auto`` takes CUDA when present.
        threads: torch's threads; None chooses by the work of an iteration (:func:`pyrovae.machine.limit_threads`).
        progress: show a bar with the log likelihood per datum.

    Raises:
        TypeError: the pair has no EM, or an argument has the wrong type.
        ValueError: bad data (fewer than components, NaN, ...) or a bad argument.
        RuntimeError: the log likelihood went down, or is not finite.
    """
    _check_arguments(pair, max_iter, tol, restarts, initialize, dtype, chunk_size)
    check_positive("threads", threads, integer=True, optional=True)
    device = pick_device(device)
    check_data(x, data_dim=getattr(pair, "data_dim", None))
    num_components = getattr(pair, "num_components", 1)
    if len(x) < num_components:
        raise ValueError(
            f"x: expected at least as many data as components; got {len(x)} data for num_components={num_components}. "
            f"Build the pair with num_components={len(x)} or fewer."
        )
    began = time.perf_counter()
    x = torch.as_tensor(x).detach()
    batched = restarts > 1 and getattr(pair, "batched_em", False)
    if chunk_size is None:
        x = x.to(device, dtype)
        width = num_components * x.shape[1] * (restarts if batched else 1)
        chunk_size = max(CPU_CHUNK // width, 256) if device.type == "cpu" else len(x)

    def chunks() -> Iterable[Tensor]:
        return (chunk.to(device, dtype) for chunk in x.split(chunk_size))

    work: Any = copy.deepcopy(pair).to(device, dtype)
    rows, dim = min(len(x), chunk_size), x.shape[1]
    operations = 2 * rows * num_components * dim * (dim + OVERHEAD) * (restarts if batched else 1)
    with limit_threads(threads, operations), torch.no_grad(), tqdm(desc="EM", unit="it", disable=not progress) as bar:
        starts = []
        for r in range(restarts):
            if initialize:
                with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                    torch.manual_seed(seed + r)
                    work.initialize(x)
            starts.append({name: tensor.detach().clone() for name, tensor in _tensors(work).items()})

        groups = [starts] if batched else [[start] for start in starts]
        runs = [run for group in groups for run in _climb(work, group, chunks, len(x), max_iter, tol, bar)]
        best = max(runs, key=lambda run: (not run.collapsed, run.trace[-1]))

        _assign(work, best.state)
        if hasattr(work, "match_guide"):
            work.match_guide()
        fitted = _tensors(work)
        for name, tensor in _tensors(pair).items():
            tensor.copy_(fitted[name])

    return EMResult(
        log_likelihood=best.trace[-1],
        trace=best.trace,
        converged=best.converged,
        iterations=len(best.trace) - 1,
        seconds=time.perf_counter() - began,
        restart_log_likelihoods=[run.trace[-1] for run in runs],
        covariance_floor=CovarianceFloor(work.covariance_floor, best.collapsed) if best.collapsed else None,
        num_data=len(x),
    )


OVERHEAD = 200
"""Cost of exponentials and sums beside a product, in multiplications a feature."""


@dataclass
class _Run:
    """Log likelihoods of one restart and, once it has ended, its parameters and buffers."""

    trace: list[float] = field(default_factory=list)
    converged: bool = False
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def collapsed(self) -> tuple[int, ...]:
        return tuple(self.state["floored"].nonzero().flatten().tolist()) if "floored" in self.state else ()


def _climb(
    work: Any,  # a pair with EM
    starts: list[dict[str, Tensor]],
    chunks: Callable[[], Iterable[Tensor]],
    num_data: int,
    max_iter: int,
    tol: float,
    bar: tqdm,
) -> list[_Run]:
    """Run EM from each start. Several starts are stacked along a leading dimension, which a run leaves as it ends."""
    stacked = len(starts) > 1
    _assign(work, {name: torch.stack([s[name] for s in starts]) for name in starts[0]} if stacked else starts[0])
    runs = [_Run() for _ in starts]
    active = runs  # the run in each row

    for iteration in range(max_iter + 1):
        statistics: dict[str, Tensor] = {}
        for chunk in chunks():
            for name, value in work.expected_statistics(chunk).items():
                statistics[name] = statistics[name] + value if name in statistics else value
        # Rounding in a log likelihood grows with the condition of the covariances: hence half the digits.
        rounding = torch.finfo(statistics["log_likelihood"].dtype).eps ** 0.5

        state, going = _tensors(work), []
        for row, log_likelihood in enumerate(statistics["log_likelihood"].reshape(-1).tolist()):
            run = active[row]
            change = log_likelihood - run.trace[-1] if run.trace else math.inf
            unit = max(abs(log_likelihood), num_data)
            if not math.isfinite(log_likelihood):
                raise RuntimeError(
                    f"x: the log likelihood is {log_likelihood} after {iteration} iterations of EM. The data may be "
                    "too far from the starting parameters, or too large to square: standardise each feature."
                )
            fell = change < -rounding * unit
            if fell and not ("floored" in state and state["floored"].any()):  # a start may lie below the floor
                raise RuntimeError(
                    f"pair: iteration {iteration} of EM lowered the log likelihood from {run.trace[-1]} to "
                    f"{log_likelihood}. EM cannot: {type(work).__name__}.expected_statistics or maximize is wrong."
                )
            run.trace.append(log_likelihood)
            run.converged = change <= tol * unit and not fell
            if run.converged or iteration == max_iter:
                run.state = {name: (t[row] if stacked else t).detach().clone() for name, t in state.items()}
            else:
                going.append(row)

        bar.update()
        bar.set_postfix_str(f"{max(run.trace[-1] for run in runs) / num_data:.6f} nats per datum")
        if not going:
            break
        if len(going) < len(active):
            active = [active[row] for row in going]
            statistics = {name: value[going] for name, value in statistics.items()}
            _assign(work, {name: tensor[going] for name, tensor in state.items()})
        work.maximize(statistics)
    return runs


def _tensors(pair: Pair) -> dict[str, Tensor]:
    return {**dict(pair.named_parameters()), **dict(pair.named_buffers())}


def _assign(pair: Pair, state: dict[str, Tensor]) -> None:
    for name, tensor in _tensors(pair).items():
        tensor.data = state[name].clone()


def _check_arguments(
    pair: Any, max_iter: Any, tol: Any, restarts: Any, initialize: bool, dtype: Any, chunk_size: Any
) -> None:
    missing = [name for name in ("expected_statistics", "maximize") if not callable(getattr(pair, name, None))]
    if missing:
        raise TypeError(
            f"pair: expected a pair with EM; {type(pair).__name__} has no {' and no '.join(missing)}. "
            "Define them, or train it by SVI: pyrovae.fit(pair, x)."
        )
    if initialize and not callable(getattr(pair, "initialize", None)):
        raise TypeError(f"pair: {type(pair).__name__} has no initialize(x). Define it, or pass initialize=False.")
    check_positive("max_iter", max_iter, integer=True)
    check_positive("restarts", restarts, integer=True)
    if chunk_size is not None:
        check_positive("chunk_size", chunk_size, integer=True)
    if isinstance(tol, bool) or not isinstance(tol, (int, float)):
        raise TypeError(f"tol: expected a number, 0 or more; got {tol!r}.")
    if not tol >= 0:
        raise ValueError(f"tol: expected a number, 0 or more; got {tol}.")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point dtype, such as torch.float64; got {dtype!r}.")
    if restarts > 1 and not initialize:
        raise ValueError(
            f"restarts: expected 1 with initialize=False, as every restart would begin alike; got {restarts}."
        )
