"""Learning-rate schedules, and the default length of a training run."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable

__all__ = ["SCHEDULES", "default_epochs"]

MIN_EPOCHS, MIN_STEPS = 50, 2_000

BURDA_STAGES = [(3**i - 1) // 2 / 3280 for i in range(1, 8)]  # when stages 1..7 begin: 3^0 + ... + 3^7 = 3280 epochs


def _burda(progress: float) -> float:
    return 10 ** (-bisect_right(BURDA_STAGES, progress) / 7)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "burda": _burda,
}
"""Factors of the learning rate, as functions of the share of steps done, in [0, 1). ``burda`` has stages i = 0..7, each
three times as long as the one before, at 10^(−i/7) (Burda et al. 2016)."""


def default_epochs(steps_per_epoch: int) -> int:
    """Return 50 epochs, or as many as make 2,000 steps: a small data set needs more."""
    return max(MIN_EPOCHS, math.ceil(MIN_STEPS / max(1, steps_per_epoch)))
