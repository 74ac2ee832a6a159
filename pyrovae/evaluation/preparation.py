"""Preparation of a measurement: check and place the pair and its data, seed, and put everything back at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from pyrovae.checks import check_data, not_a_pair, pick_device
from pyrovae.checks_pair import check_pair
from pyrovae.infer.machine import keep_memory
from pyrovae.pair import Pair

__all__ = ["NotApplicable", "not_applicable", "prepared", "progress_bar", "seeded"]


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

    The options are those of :func:`pyrovae.evaluate`; ``at_least`` is the smallest number of data allowed. Inside, the
    pair is on the device, the random state is seeded and Pyro's validation is off. Afterwards the pair is back on its
    own device, and the caller's random state is as it was.

    Raises:
        TypeError, ValueError: not a pair, bad data, an unknown or absent device; the pair does not run on the data.
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
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            pyro.validation_enabled(False),
        ):
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
