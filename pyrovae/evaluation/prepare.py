"""What every measurement of a pair does first: check, place, seed; and put everything back at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from pyrovae.checks import check_data, not_a_pair, pick_device
from pyrovae.machine import keep_memory
from pyrovae.pair import Pair
from pyrovae.training.pair_checks import check_pair

__all__ = ["NotApplicable", "prepared", "progress_bar"]


class NotApplicable(ValueError):
    """A quantity that this pair does not have. Tables leave it out, and name it."""


@contextmanager
def prepared(
    pair: Any,
    x: Any,  # (N, D)
    *,
    binarize: bool = False,
    device: str | torch.device = "auto",
    seed: int = 0,
) -> Iterator[Tensor]:
    """Check ``pair`` and ``x``, and give ``x`` on the device, in the pair's precision, binarised once if asked.

    Inside, the pair is on the device, the random state is seeded, Pyro's validation is off. After it the pair is back
    on its device, and the caller's random state is as it was.

    Raises:
        TypeError, ValueError: not a pair, bad data, an unknown or absent device; the pair does not run on the data.
    """
    if not isinstance(pair, Pair):
        raise TypeError(not_a_pair(pair))
    device = pick_device(device)
    x = check_data(x, data_dim=getattr(pair, "data_dim", None))
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


def progress_bar(
    title: str,
    progress: bool | None,
    items: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    unit: str = "chunk",
) -> tqdm:
    """A bar over ``items``, or one that ``update`` moves. ``progress``: show it; None shows it on a terminal."""
    hide = None if progress is None else not progress
    return tqdm(items, desc=title, total=total, unit=unit, disable=hide, leave=False)
