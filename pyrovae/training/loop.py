"""Training a pair by stochastic variational inference: the checks before it, and the run of epochs and steps."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm

from pyrovae.checkpoint import load_state, save_state
from pyrovae.checks import check_choice, check_positive, not_a_pair, pick_device
from pyrovae.infer import LOSSES, SVI, default_loss
from pyrovae.infer.lowering import product_choices, restore_product_choices
from pyrovae.infer.svi import BACKENDS
from pyrovae.infer.weights import same_random_state
from pyrovae.machine import count_products, limit_threads
from pyrovae.pair import Pair
from pyrovae.random_state import seeded
from pyrovae.training.batches import Batches, make_batches
from pyrovae.training.divergence import bad_weights, raise_divergence
from pyrovae.training.interrupts import watch_for_interrupt
from pyrovae.training.progress import FitResult, has_run_out_of_patience
from pyrovae.training.schedules import SCHEDULES, default_epochs

__all__ = ["fit"]

SECONDS_BETWEEN_CHECKPOINTS = 5.0


def fit(
    pair: Pair,
    x: Tensor | DataLoader,
    *,
    loss: ELBO | str | None = None,
    epochs: int | None = None,
    batch_size: int = 128,
    lr: float | None = None,
    schedule: str = "cosine",
    optimizer: Callable[[list[Tensor]], Optimizer] | None = None,
    validation: float | int | Tensor = 0,
    patience: int | None = None,
    binarize: bool = False,
    initialize: bool = True,
    device: str | torch.device = "auto",
    seed: int = 0,
    backend: str = "auto",
    threads: int | None = None,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    on_start: Callable[[int], object] | None = None,
    monitor: Callable[[int], Mapping[str, float]] | None = None,
) -> FitResult:
    """Train a pair by stochastic variational inference.

    Every step minimises the loss divided by the number of data, in nats per datum. Sites inside the plate ``data``
    weigh dataset / batch against global latents. The last, short batch of an epoch is used like any other.

    Args:
        pair: the model and guide, trained in place. The pair ends on the device it came from.
        x: data, shape (N, D), kept on the device; or a ``DataLoader`` that yields batches (or tuples that start with
            one), whose own batch size and order are used.
        loss: a loss or its name. None: the pair's own, or ``Trace_ELBO``.
        epochs: number of passes over the data. None: 50, or as many as make 2,000 steps.
        batch_size: number of data in a step.
        lr: first learning rate. None: the optimizer's own, or ``pair.default_lr`` for Adam.
        schedule: learning-rate schedule over all the epochs: ``constant``, ``cosine`` or ``burda``.
        optimizer: function that makes the optimizer of a list of parameters, such as
            ``lambda p: torch.optim.SGD(p, lr=0.1)``. None: Adam. With ``lr``, the groups' learning rates are scaled so
            that the first group starts there.
        validation: data held out to watch the bound: a share below 1 or a count, drawn by ``seed``; or a tensor.
        patience: number of epochs without a better validation bound after which training stops and the best weights
            are kept. None: never.
        binarize: whether to draw pixels in [0, 1] as 0 or 1, anew at every use (held-out pixels: once).
        initialize: whether to call ``pair.initialize`` with the training data first, where the pair has it.
        device: ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``.
        seed: seed of everything random here. The caller's random state is left as it was.
        backend: how a step runs, see :class:`pyrovae.infer.SVI`: ``eager``, ``compiled`` or ``cudagraph``; ``auto``
            compiles runs of 5,000 steps or more.
        threads: number of torch's threads. None: by the work of a step, see :func:`pyrovae.machine.limit_threads`; a
            resumed run keeps its number.
        progress: whether to show a progress bar. None: on a terminal.
        checkpoint: new file for the whole training state, written every few seconds and at the end.
        resume: whether to go on from ``checkpoint``, exactly as if the run had not stopped.
        on_start: called once with the number of threads, after every check and before anything is trained or written.
        monitor: called with the number of each epoch that has ended. What it returns joins that epoch's row of
            ``history``. Its time does not count, and its random numbers do not change the training's.

    Raises:
        TypeError, ValueError: bad data or options, before training starts.
        FileExistsError: ``checkpoint`` is there, and ``resume`` is False.
        FileNotFoundError: ``checkpoint`` is not there, and ``resume`` is True; or its folder is not.
        TrainingDiverged: NaN or infinity in the loss or a weight; says at which step and site.
    """
    device = pick_device(device)
    objective = _make_loss(pair, loss)
    check_positive("batch_size", batch_size, integer=True)
    check_positive("epochs", epochs, integer=True, optional=True)
    check_positive("lr", lr, optional=True)
    check_positive("threads", threads, integer=True, optional=True)
    check_choice("schedule", schedule, SCHEDULES)
    check_choice("backend", backend, BACKENDS)
    _check_optimizer(optimizer)
    _check_validation(validation, patience)
    if resume and checkpoint is None:
        raise ValueError("resume: expected checkpoint= to name the file to go on from; got None.")
    file = Path(checkpoint) if checkpoint is not None else None
    if file is not None and on_start is None:
        _check_checkpoint(file, resume)

    home = next((p.device for p in pair.parameters()), torch.device("cpu"))
    with ExitStack() as stack, seeded(seed, device), pyro.validation_enabled(False):
        data = make_batches(pair, x, validation, int(batch_size), binarize, device, seed)
        epochs = default_epochs(data.steps_per_epoch) if epochs is None else int(epochs)
        state = load_state(file, "checkpoint") if resume and file is not None else None
        start = _copy(pair.state_dict())
        try:
            pair.to(device)
            try:
                initialize = initialize and state is None
                run = _Run(pair, objective, data, optimizer, lr, schedule, epochs, initialize, backend)
                run.options |= {"batch size": int(batch_size), "patience": patience, "binarize": binarize, "seed": seed}
                if state is not None:
                    run.restore(state)
                    threads = threads or state["threads"]
                work = partial(run.count_products, int(batch_size)) if device.type == "cpu" else math.inf
                stack.enter_context(limit_threads(threads, work))
                run.threads = torch.get_num_threads()
                if on_start is not None:
                    on_start(run.threads)
                    if file is not None:  # only now: on_start may have made the folder, or cleared it of an older run
                        _check_checkpoint(file, resume)
            except BaseException:  # nothing has been trained: leave the pair as it came
                pair.load_state_dict(start, strict=False)
                raise
            return run.train(epochs, patience, progress, file, monitor)
        finally:
            pair.to(home)


def _check_checkpoint(file: Path, resume: bool) -> None:
    """Raise unless ``file`` is there to go on from, or can be made: a file that is there may hold hours of training."""
    if resume and not file.is_file():
        raise FileNotFoundError(
            f"checkpoint: expected a file to go on from; found none at {file}. Correct the name, or start with "
            "resume=False."
        )
    if not resume and file.exists():
        raise FileExistsError(
            f"checkpoint: expected a new file; {file} exists. Go on from it with resume=True, or delete or rename it."
        )
    if not file.absolute().parent.is_dir():
        raise FileNotFoundError(f"checkpoint: expected a file in a folder that exists; got {file}. Make it first.")


def _make_loss(pair: Pair, loss: ELBO | str | None) -> ELBO:
    if not isinstance(pair, Pair):
        raise TypeError(not_a_pair(pair))
    if loss is None:
        return default_loss(pair)
    if isinstance(loss, str):
        check_choice("loss", loss, LOSSES)
        return LOSSES[loss]()
    if isinstance(loss, type) or not hasattr(loss, "loss_and_grads"):
        raise TypeError(f"loss: expected a loss such as Trace_ELBO(), or its name; got {loss!r}.")
    return loss


def _check_optimizer(optimizer: Any) -> None:
    if optimizer is not None and (isinstance(optimizer, Optimizer | PyroOptim) or not callable(optimizer)):
        raise TypeError(
            "optimizer: expected a function that makes a torch.optim optimizer of a list of parameters, such as "
            f"lambda parameters: torch.optim.SGD(parameters, lr=0.1); got {type(optimizer).__name__}."
        )


def _check_validation(validation: Any, patience: Any) -> None:
    if isinstance(validation, bool) or not isinstance(validation, int | float | Tensor):
        raise TypeError(f"validation: expected a share, a count or a tensor of data; got {validation!r}.")
    check_positive("patience", patience, integer=True, optional=True)
    if patience is not None and not isinstance(validation, Tensor) and validation == 0:
        raise ValueError("patience: early stopping needs held-out data; pass validation=0.1, say.")


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


class _Run:
    """Everything that changes while a pair is trained. ``state`` copies all of it, and ``restore`` puts it back."""

    def __init__(
        self,
        pair: Pair,
        loss: ELBO,
        data: Batches,
        optimizer: Callable[[list[Tensor]], Optimizer] | None,
        lr: float | None,
        schedule: str,
        epochs: int,
        initialize: bool,
        backend: str,
    ) -> None:
        self.pair, self.data, self.factor = pair, data, SCHEDULES[schedule]
        self.lr = float(pair.default_lr if lr is None else lr)
        self.total_steps = epochs * data.steps_per_epoch
        if initialize and pair.initialize is not None:
            pair.initialize(data.sample)
        parameters: list[Tensor] = [p for p in pair.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError(f"pair: {type(pair).__name__} has no parameters to train.")
        self.optimizer = (optimizer or self._adam)(parameters)
        own = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.lr = own[0] if lr is None else self.lr
        self.base_lrs = [self.lr * rate / own[0] for rate in own]
        self.svi = SVI(
            pair.model,
            pair.guide,
            self.optimizer,
            loss,
            backend=backend,
            num_steps=self.total_steps,
            prepare=data.batch,
            dataset_size=data.size,
            checked=True,  # a resumed run records its first step too
        )
        self.num_held_out = sum(map(len, data.validation))
        size = self.num_held_out or data.size
        self.scorer = SVI(pair.model, pair.guide, self.optimizer, loss, backend="eager", dataset_size=size)
        with seeded(0, self.device):  # a loss that cannot take this pair says so here
            self.scorer.evaluate_loss(data.sample[:2])
        self.options: dict[str, Any] = {
            "pair": type(pair).__name__,
            "data": [data.size, data.sample.shape[1]],
            "held-out data": self.num_held_out,
            "loss": " ".join([type(loss).__name__, f"alpha={loss.alpha}" if hasattr(loss, "alpha") else ""]).strip(),
            "particles": getattr(loss, "num_particles", 1),
            "epochs": epochs,
            "steps": self.total_steps,
            "lr": self.lr,
            "schedule": schedule,
            "optimizer": type(self.optimizer).__name__,
            "device": self.device.type,
            "backend": backend,
        }
        self.epoch = self.step = self.threads = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] | None = None

    def _adam(self, parameters: list[Tensor]) -> Optimizer:
        on_gpu = self.device.type == "cuda"
        # Fused kernels read the learning rate as float32, whatever the default type.
        lr = torch.tensor(self.lr, dtype=torch.float32, device=self.device) if on_gpu else self.lr
        return torch.optim.Adam(parameters, lr=lr, fused=True, capturable=on_gpu)

    @property
    def device(self) -> torch.device:
        return self.data.sample.device

    def copy_weights(self) -> dict[str, Tensor]:
        return _copy(self.pair.state_dict())

    def state(self) -> dict[str, Any]:
        return {
            "pair": self.copy_weights(),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "random": self.random_state(),
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "history": list(self.history),
            "best": self.best,
            "options": self.options,
            "threads": self.threads,
            "products": product_choices(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        if "options" not in state:
            raise ValueError("resume: the checkpoint holds no training state of fit.")
        for name, now in self.options.items():
            if (then := state["options"].get(name)) != now:
                longer = (
                    " To train longer, let it end as it was started; then start a new fit from its weights, with "
                    "initialize=False and another checkpoint."
                )
                raise ValueError(
                    f"resume: the checkpoint is of a run with {name} {then}, and these options make it {now}. "
                    "Resume with everything that the run was started with."
                    f"{longer if name == 'epochs' and now > (then or 0) else ''}"
                )
        try:
            self.pair.load_state_dict(state["pair"])
        except RuntimeError as error:
            raise ValueError(
                f"resume: the checkpoint does not hold this {type(self.pair).__name__}'s weights. Resume with a pair "
                f"built with the same options. Details: {error}"
            ) from error
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:  # torch loads the learning rate onto the device where it was saved
            if isinstance(group["lr"], Tensor):
                group["lr"] = group["lr"].to(self.device)
        restore_product_choices(state["products"])
        self.set_random_state(state["random"])
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.history, self.best = list(state["history"]), state["best"]

    def random_state(self) -> dict[str, Tensor]:
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        if self.data.generator is not None:
            random["loader"] = self.data.generator.get_state()
        return random

    def set_random_state(self, random: dict[str, Tensor]) -> None:
        torch.set_rng_state(random["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], self.device)
        if self.data.generator is not None and "loader" in random:
            self.data.generator.set_state(random["loader"])

    def count_products(self, batch_size: int) -> float:
        """Count the floating-point operations in the matrix products of a loss on one batch."""
        with seeded(0, self.device):
            return count_products(lambda: self.scorer.evaluate_loss(self.data.sample[:batch_size]))

    def take_step(self, argument: Tensor) -> Tensor:
        """Update the weights once. Returns the bound before the update, nats per datum."""
        factor = self.factor(self.step / self.total_steps)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            if isinstance(group["lr"], Tensor):  # a CUDA graph reads this very tensor
                group["lr"].fill_(base * factor)
            else:
                group["lr"] = base * factor
        bound = -self.svi.step(argument)
        self.step += 1
        return bound

    def validation_bound(self) -> float:
        """Bound on the held-out data, nats per datum, with the same noise at every call."""
        total = torch.zeros((), device=self.device)
        with seeded(0, self.device):
            for batch in self.data.validation:
                total -= self.scorer.evaluate_loss(batch) * (len(batch) / self.num_held_out)
        return float(total)

    def train(
        self,
        epochs: int,
        patience: int | None,
        progress: bool | None,
        checkpoint: Path | None,
        monitor: Callable[[int], Mapping[str, float]] | None,
    ) -> FitResult:
        """Train to the last epoch. A run that is stopped inside an epoch goes back to the end of the one before it."""
        good, written = self.state(), time.monotonic()
        if checkpoint is not None:  # a run that is killed in its first epoch resumes too
            save_state(checkpoint, good)
        stopped = False
        disable = None if progress is None else not progress
        bar = tqdm(total=epochs, initial=self.epoch, unit="epoch", disable=disable, leave=False)
        try:
            with bar:
                while self.epoch < epochs and not (stopped := has_run_out_of_patience(self.epoch, self.best, patience)):
                    start = time.perf_counter()
                    row = self._one_epoch(good)
                    self.seconds += time.perf_counter() - start
                    row["seconds"] = self.seconds
                    if monitor is not None:
                        with same_random_state():
                            row |= {name: float(value) for name, value in monitor(self.epoch).items()}
                    self.history.append(row)
                    good = self.state()
                    if checkpoint is not None and time.monotonic() - written > SECONDS_BETWEEN_CHECKPOINTS:
                        save_state(checkpoint, good)
                        written = time.monotonic()
                    shown = {"train": f"{row['train_bound']:.2f}"}
                    if "validation_bound" in row:
                        shown["validation"] = f"{row['validation_bound']:.2f}"
                    bar.set_postfix(shown | {"unit": "nats/datum"})
                    bar.update()
        except KeyboardInterrupt:
            self.restore(good)
            raise
        finally:
            if checkpoint is not None:
                save_state(checkpoint, good)
        if patience is not None and self.best is not None:
            self.pair.load_state_dict(self.best["pair"])
        return FitResult(self.history, self.seconds, self.step, stopped, str(self.device))

    def _one_epoch(self, good: dict[str, Any]) -> dict[str, float]:
        total = torch.zeros((), device=self.device)
        weight = 0
        with watch_for_interrupt() as raise_if_pressed:
            for argument in self.data.arguments():
                bound = self.take_step(argument)
                raise_if_pressed()
                total += bound * len(argument)
                weight += len(argument)
                # Reading the bound waits for a GPU: there it is read once an epoch.
                if self.device.type == "cpu" and not math.isfinite(bound):
                    raise_divergence(self, good)
        train_bound = float(total) / weight
        self.epoch += 1
        row = {"epoch": self.epoch, "step": self.step, "train_bound": train_bound}
        if not math.isfinite(train_bound) or not self.weights_are_good(argument):
            raise_divergence(self, good)
        if self.data.validation:
            row["validation_bound"] = bound_now = self.validation_bound()
            if self.best is None or bound_now > self.best["bound"]:
                self.best = {"bound": bound_now, "epoch": self.epoch, "pair": self.copy_weights()}
        row["lr"] = float(self.optimizer.param_groups[0]["lr"])
        return row

    def weights_are_good(self, argument: Tensor) -> bool:
        """Return whether the weights are finite, and so is the loss that they give."""
        if bad_weights(self.pair):
            return False
        with seeded(0, self.device):
            return math.isfinite(self.svi.evaluate_loss(argument))
