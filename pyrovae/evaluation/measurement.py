"""Measurement: what all measurements of a pair share, from the checks of the arguments to the table of the result."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor
from tqdm import tqdm

from pyrovae.checks import check_data, not_a_pair, pick_device
from pyrovae.infer.weights import sample_sites
from pyrovae.machine import keep_memory, limit_threads
from pyrovae.pair import Pair
from pyrovae.training.pair_checks import check_pair

FLOATS_PER_CHUNK = {"cpu": 2**20, "cuda": 2**25}
"""Numbers in the widest tensor of a chunk, by device. Fewer fit into caches and memory; more make dispatch vanish."""
DATA_PER_CHUNK = 100  # keeps small whatever has a number for each sample of each datum


class NotApplicable(ValueError):
    """A quantity that this pair does not have. Tables leave it out and name it."""


def not_applicable(quantity: str, pair: Pair, reason: str) -> NotApplicable:
    """Return the error to raise where ``quantity``, the name of a function, does not apply to the pair."""
    return NotApplicable(f"{quantity} does not apply to {type(pair).__name__}: {reason}")


@contextmanager
def prepared(
    pair: Any,
    x: Any,  # (N, D)
    *,
    at_least: int = 1,
    binarize: bool = False,
    device: str | torch.device = "auto",
    seed: int = 0,
) -> Iterator[Tensor]:
    """Check ``pair`` and ``x``, and yield ``x`` on the device, in the pair's precision, binarised once if asked.

    Inside, the pair is on the device, the random state is seeded and Pyro's validation is off. Afterwards the pair is
    back on its own device, and the caller's random state is as it was. ``at_least`` is the smallest number of data.
    """
    if not isinstance(pair, Pair):
        raise TypeError(not_a_pair(pair))
    device = pick_device(device)
    x = check_data(x, data_dim=getattr(pair, "data_dim", None), at_least=at_least)
    check_pair(pair, x, binarize=binarize)
    parameter = next(pair.parameters(), torch.zeros(()))
    home = parameter.device
    keep_memory()
    try:
        pair.to(device)
        devices = [device] if device.type == "cuda" else []
        with limit_threads(None), torch.random.fork_rng(devices), pyro.validation_enabled(False):
            torch.manual_seed(seed)
            x = x.to(device, parameter.dtype)
            yield torch.bernoulli(x) if binarize else x
    finally:
        pair.to(home)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed the random state and put it back at the end; None leaves it alone. Pyro's validation is off inside."""
    with torch.random.fork_rng(enabled=seed is not None), pyro.validation_enabled(False):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def progress_bar(
    title: str,
    progress: bool | None,
    items: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    unit: str = "chunk",
) -> tqdm:
    """Return a bar over ``items``, or one that ``update`` moves. ``progress=None`` shows it on a terminal only."""
    hide = None if progress is None else not progress
    return tqdm(items, desc=title, total=total, unit=unit, disable=hide, leave=False)


def width(pair: Pair, trace: Trace, count: int, *, enumerated: Iterable[str] = ()) -> int:
    """Return how many numbers the widest tensor has for one datum and particle: a layer's, or of all sites together.

    ``trace`` is a run of the model with ``count`` data times particles. All values of ``enumerated`` sites count.
    """
    sites = sample_sites(trace)
    values = sum(site["value"].numel() for site in sites.values()) // count
    layers = [p.shape[0] for p in pair.parameters() if p.dim() == 2]
    return max(1, values, *layers) * math.prod(len(sites[n]["fn"].enumerate_support(expand=False)) for n in enumerated)


def runs_at_a_time(device: torch.device, width: int) -> int:
    """Return how many data times particles fill a chunk of ``FLOATS_PER_CHUNK`` numbers."""
    return max(1, FLOATS_PER_CHUNK[device.type] // width)


def chunk_sizes(
    device: torch.device, width: int, num_data: int, num_particles: int, *, joint: bool, most_data: int = DATA_PER_CHUNK
) -> tuple[int, int]:
    """Return how many data and particles run at a time; ``joint`` keeps all data together, as a global latent needs."""
    fitting = runs_at_a_time(device, width)
    rows = num_data if joint else min(num_data, fitting, most_data)
    return rows, max(1, min(num_particles, fitting // rows))


class Result:
    """Base of the dataclasses that measurements return."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, for JSON, without values of each datum. Infinity and NaN become None."""
        per_datum = {n for n, value in vars(self).items() if isinstance(value, Tensor) or n.endswith("_per_datum")}
        return _plain({name: value for name, value in vars(self).items() if name not in per_datum})

    def __repr__(self) -> str:
        """Return a table for reading, with the notes below it."""
        return "\n".join([*self._table(), *(f"NOTE: {note}" for note in getattr(self, "notes", ()))])

    def _table(self) -> list[str]:
        raise NotImplementedError


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if is_dataclass(value):
        return _plain(vars(value))
    return None if isinstance(value, float) and not math.isfinite(value) else value
