"""Results of training runs, and the progress that their checkpoints record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyrovae.checkpoint import load_state
from pyrovae.checks import count

__all__ = ["FitResult", "Progress", "has_run_out_of_patience", "read_progress"]


@dataclass(frozen=True, repr=False)
class FitResult:
    """The result of :func:`pyrovae.fit`."""

    history: list[dict[str, float]]
    """A row an epoch: epoch, step, train_bound and validation_bound (nats per datum), lr, seconds."""
    seconds: float
    steps: int
    stopped_early: bool
    device: str

    def __repr__(self) -> str:
        last = self.history[-1]
        done = f"{count(int(last['epoch']), 'epoch')}, {count(self.steps, 'step')}"
        parts = [f"{done} in {self.seconds:.1f} s on {self.device}"]
        parts += [
            f"{name.removesuffix('_bound')} bound {last[name]:.3f} nats per datum"
            for name in ("train_bound", "validation_bound")
            if name in last
        ]
        return "; ".join(parts) + ("; stopped early, best weights kept" if self.stopped_early else "")


@dataclass(frozen=True)
class Progress:
    """How far the run of a checkpoint has come."""

    history: list[dict[str, float]]
    epochs: int
    """Epochs that the run was started with."""
    finished: bool
    """True where all epochs are done, or patience has ended the run."""

    def __str__(self) -> str:
        return f"after epoch {len(self.history)} of {self.epochs}" if self.history else f"in epoch 1 of {self.epochs}"


def read_progress(checkpoint: str | Path) -> Progress:
    """Read from a checkpoint of :func:`pyrovae.fit` how far its run has come.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds no training state.
    """
    state = load_state(checkpoint)
    try:
        options, epoch = state["options"], state["epoch"]
        finished = epoch >= options["epochs"] or has_run_out_of_patience(epoch, state["best"], options["patience"])
        return Progress(state["history"], options["epochs"], finished)
    except (KeyError, TypeError) as error:
        raise ValueError(f"path: {checkpoint} holds no training state of fit.") from error


def has_run_out_of_patience(epoch: int, best: dict[str, Any] | None, patience: int | None) -> bool:
    """Return whether ``patience`` epochs have passed since the best validation bound."""
    return patience is not None and best is not None and epoch - best["epoch"] >= patience
