"""Training a pair by stochastic variational inference: the checks before it, and the run of epochs and steps."""

from __future__ import annotations

import copy
import math
import signal
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm

from pyrovae.checkpoint import load_state, save_state
from pyrovae.checks import check_choice, check_positive, count, not_a_pair, pick_device
from pyrovae.infer import LOSSES, SVI, default_loss
from pyrovae.infer.lowering import product_choices, restore_product_choices
from pyrovae.infer.weights import same_random_state
from pyrovae.machine import count_products, limit_threads
from pyrovae.pair import Pair
from pyrovae.random_state import seeded
from pyrovae.training.batches import Batches, make_batches

__all__ = ["SCHEDULES", "FitResult", "Progress", "TrainingDiverged", "default_epochs", "fit", "read_progress"]

SECONDS_BETWEEN_CHECKPOINTS = 5.0
COUNTERS = ("epoch", "step", "seconds", "history", "best")
BURDA_STAGES = [(3**i - 1) // 2 / 3280 for i in range(1, 8)]  # when stages 1..7 begin: 3^0 + ... + 3^7 = 3280 epochs
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "burda": lambda progress: 10 ** (-bisect_right(BURDA_STAGES, progress) / 7),
}
"""Factors of the learning rate, as functions of the share of steps done, in [0, 1). ``burda`` has stages i = 0..7, each
three times as long as the one before, at 10^(−i/7) (Burda et al. 2016)."""


class TrainingDiverged(FloatingPointError):
    """The loss or a weight turned NaN or infinite. The pair holds the last good weights."""


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
        bounds = [f"; {name} bound {bound:.3f} nats per datum" for name, bound in _bounds(last).items()]
        stopped = "; stopped early, best weights kept" if self.stopped_early else ""
        return f"{done} in {self.seconds:.1f} s on {self.device}{''.join(bounds)}{stopped}"


def _bounds(row: dict[str, float]) -> dict[str, float]:
    return {name: row[f"{name}_bound"] for name in ("train", "validation") if f"{name}_bound" in row}


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


def read_progress(checkpoint: str | Path) -> Progress | None:
    """Read how far the run of a checkpoint has come; None where the file is missing, damaged or no training state."""
    try:
        state = load_state(checkpoint)
        options, epoch = state["options"], state["epoch"]
        finished = epoch >= options["epochs"] or _patience_is_over(epoch, state["best"], options["patience"])
        return Progress(state["history"], options["epochs"], finished)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _patience_is_over(epoch: int, best: dict[str, Any] | None, patience: int | None) -> bool:
    return patience is not None and best is not None and epoch - best["epoch"] >= patience


def default_epochs(steps_per_epoch: int) -> int:
    """Return 50 epochs, or as many as make 2,000 steps: a small data set needs more."""
    return max(50, math.ceil(2_000 / max(1, steps_per_epoch)))


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
    if not isinstance(pair, Pair):
        raise TypeError(not_a_pair(pair))
    if isinstance(loss, str):
        check_choice("loss", loss, LOSSES)
        loss = LOSSES[loss]()
    check_positive("batch_size", batch_size, integer=True)
    check_positive("lr", lr, optional=True)
    for name, number in {"epochs": epochs, "threads": threads, "patience": patience}.items():
        check_positive(name, number, integer=True, optional=True)
    check_choice("schedule", schedule, SCHEDULES)
    if optimizer is not None and (isinstance(optimizer, Optimizer | PyroOptim) or not callable(optimizer)):
        raise TypeError(
            "optimizer: expected a function that makes a torch.optim optimizer of a list of parameters, such as "
            f"lambda parameters: torch.optim.SGD(parameters, lr=0.1); got {type(optimizer).__name__}."
        )
    if isinstance(validation, bool) or not isinstance(validation, int | float | Tensor):
        raise TypeError(f"validation: expected a share, a count or a tensor of data; got {validation!r}.")
    if patience is not None and not isinstance(validation, Tensor) and validation == 0:
        raise ValueError("patience: early stopping needs held-out data; pass validation=0.1, say.")
    if resume and checkpoint is None:
        raise ValueError("resume: expected checkpoint= to name the file to go on from; got None.")
    file = Path(checkpoint) if checkpoint is not None else None
    state = load_state(file, "checkpoint") if resume and file is not None else None
    if file is not None and state is None and on_start is None:
        _check_new_file(file)
    batch_size = int(batch_size)
    home = next((p.device for p in pair.parameters()), torch.device("cpu"))
    with ExitStack() as stack, seeded(seed, device), pyro.validation_enabled(False):
        data = make_batches(pair, x, validation, batch_size, binarize, device, seed)
        start = copy.deepcopy(pair.state_dict())
        stack.callback(pair.to, home)
        pair.to(device)
        try:
            if initialize and state is None and pair.initialize is not None:
                pair.initialize(data.sample)
            num_epochs = default_epochs(data.steps_per_epoch) if epochs is None else int(epochs)
            options: dict[str, Any] = {"epochs": num_epochs, "schedule": schedule, "backend": backend}
            options |= {"batch size": batch_size, "patience": patience, "binarize": binarize, "seed": seed}
            run = _Run(pair, default_loss(pair) if loss is None else loss, data, optimizer, lr, options)
            if state is not None:
                run.restore(state)
                threads = threads or state["threads"]
            with seeded(0, device):  # counting the products of a loss draws noise
                loss_of_batch = partial(run.scorer.evaluate_loss, data.sample[:batch_size])
                work: Any = partial(count_products, loss_of_batch) if device.type == "cpu" else math.inf
                stack.enter_context(limit_threads(threads, work))
            run.threads = torch.get_num_threads()
            if on_start is not None:
                on_start(run.threads)
                if file is not None and state is None:  # only now: on_start may have made or cleared the folder
                    _check_new_file(file)
        except BaseException:  # nothing has been trained: leave the pair as it came
            pair.load_state_dict(start, strict=False)
            raise
        return run.train(progress, file, monitor)


def _check_new_file(file: Path) -> None:
    """Raise unless a checkpoint can be made at ``file``: one that is there may hold hours of training."""
    if file.exists():
        raise FileExistsError(
            f"checkpoint: expected a new file; {file} exists. Go on from it with resume=True, or delete or rename it."
        )
    if not file.absolute().parent.is_dir():
        raise FileNotFoundError(f"checkpoint: expected a file in a folder that exists; got {file}. Make it first.")


class _Run:
    """Everything that changes while a pair is trained. ``state`` copies all of it, and ``restore`` puts it back."""

    def __init__(
        self, pair: Pair, loss: ELBO, data: Batches, optimizer: Any, lr: float | None, options: dict[str, Any]
    ) -> None:
        """Make the optimizer and both objectives. ``options`` are those that a resumed run must have in common."""
        self.pair, self.data, self.device = pair, data, data.sample.device
        self.total_steps = options["epochs"] * data.steps_per_epoch
        parameters: list[Tensor] = [p for p in pair.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError(f"pair: {type(pair).__name__} has no parameters to train.")
        first_lr = float(pair.default_lr if lr is None else lr)
        on_gpu = self.device.type == "cuda"
        if optimizer is None:
            # Fused kernels read the learning rate as float32, whatever the default type.
            rate = torch.tensor(first_lr, dtype=torch.float32, device=self.device) if on_gpu else first_lr
            optimizer = partial(torch.optim.Adam, lr=rate, fused=True, capturable=on_gpu)
        self.optimizer: Optimizer = optimizer(parameters)
        own = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.lr = own[0] if lr is None else first_lr
        self.base_lrs = [self.lr * rate / own[0] for rate in own]
        programs = (pair.model, pair.guide, self.optimizer, loss)
        recording: Any = {"num_steps": self.total_steps, "checked": True}  # a resumed run records its first step too
        self.svi = SVI(*programs, backend=options["backend"], prepare=data.batch, dataset_size=data.size, **recording)
        self.num_held_out = sum(map(len, data.validation))
        self.scorer = SVI(*programs, backend="eager", dataset_size=self.num_held_out or data.size)
        with seeded(0, self.device):  # a loss that cannot take this pair says so here
            self.scorer.evaluate_loss(data.sample[:2])
        self.options = {
            "pair": type(pair).__name__,
            "data": [data.size, data.sample.shape[1]],
            "held-out data": self.num_held_out,
            "loss": " ".join([type(loss).__name__, *([f"alpha={loss.alpha}"] if hasattr(loss, "alpha") else [])]),
            "particles": getattr(loss, "num_particles", 1),
            **options,
            "steps": self.total_steps,
            "lr": self.lr,
            "optimizer": type(self.optimizer).__name__,
            "device": self.device.type,
        }
        cuda = {"cuda": torch.cuda.default_generators[self.device.index]} if on_gpu else {}
        loader = {} if data.generator is None else {"loader": data.generator}
        self.generators: dict[str, torch.Generator] = {"cpu": torch.default_generator} | cuda | loader
        self.epoch = self.step = self.threads = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        return {
            "pair": copy.deepcopy(self.pair.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "random": self.random_state(),
            **{name: getattr(self, name) for name in COUNTERS},
            "options": self.options,
            "threads": self.threads,
            "products": product_choices(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        if "options" not in state:
            raise ValueError("resume: the checkpoint holds no training state of fit.")
        for name, now in self.options.items():
            if (then := state["options"].get(name)) != now:
                message = f"resume: the checkpoint is of a run with {name} {then}, and these options make it {now}. "
                message += "Resume with everything that the run was started with."
                if name == "epochs" and now > (then or 0):
                    message += " To train longer, let it end as it was started; then start a new fit from its weights, "
                    message += "with initialize=False and another checkpoint."
                raise ValueError(message)
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
        for name in COUNTERS:
            setattr(self, name, state[name])

    def random_state(self) -> dict[str, Tensor]:
        return {name: generator.get_state() for name, generator in self.generators.items()}

    def set_random_state(self, random: dict[str, Tensor]) -> None:
        for name in self.generators.keys() & random:
            self.generators[name].set_state(random[name])

    def train(
        self, progress: bool | None, checkpoint: Path | None, monitor: Callable[[int], Mapping[str, float]] | None
    ) -> FitResult:
        """Train to the last epoch. A run that is stopped inside an epoch goes back to the end of the one before it."""
        epochs, patience = self.options["epochs"], self.options["patience"]
        good, written = self.state(), -math.inf  # written at once: a run that is killed in its first epoch resumes too
        stopped = False
        disable = None if progress is None else not progress
        try:
            with tqdm(total=epochs, initial=self.epoch, unit="epoch", disable=disable, leave=False) as bar:
                while self.epoch < epochs and not (stopped := _patience_is_over(self.epoch, self.best, patience)):
                    if checkpoint is not None and time.monotonic() - written > SECONDS_BETWEEN_CHECKPOINTS:
                        save_state(checkpoint, good)
                        written = time.monotonic()
                    row = self._one_epoch(good)
                    if monitor is not None:
                        with same_random_state():
                            row |= {name: float(value) for name, value in monitor(self.epoch).items()}
                    self.history = [*self.history, row]  # a new list: states keep the old one
                    good = self.state()
                    bar.set_postfix({k: f"{v:.2f}" for k, v in _bounds(row).items()} | {"unit": "nats/datum"})
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
        """Train for an epoch, and return its row of the history."""
        start = time.perf_counter()
        total = torch.zeros((), device=self.device)
        weight = 0
        with _watch_for_interrupt() as is_pressed:
            for argument in self.data.arguments():
                bound = self.take_step(argument)
                if is_pressed():
                    raise KeyboardInterrupt
                total += bound * len(argument)
                weight += len(argument)
                # Reading the bound waits for a GPU: there it is read once an epoch.
                if self.device.type == "cpu" and not math.isfinite(bound):
                    self._raise_divergence(good)
        train_bound = float(total) / weight
        self.epoch += 1
        if not math.isfinite(train_bound) or not self.weights_are_good(argument):
            self._raise_divergence(good)
        row = {"epoch": self.epoch, "step": self.step, "train_bound": train_bound}
        if self.data.validation:
            with seeded(0, self.device):  # the same noise in every epoch
                parts = [self.scorer.evaluate_loss(b) * (len(b) / self.num_held_out) for b in self.data.validation]
            row["validation_bound"] = bound_now = -float(sum(parts))
            if self.best is None or bound_now > self.best["bound"]:
                weights = copy.deepcopy(self.pair.state_dict())
                self.best = {"bound": bound_now, "epoch": self.epoch, "pair": weights}
        self.seconds += time.perf_counter() - start
        return row | {"lr": float(self.optimizer.param_groups[0]["lr"]), "seconds": self.seconds}

    def take_step(self, argument: Tensor) -> Tensor:
        """Update the weights once. Returns the bound before the update, nats per datum."""
        factor = SCHEDULES[self.options["schedule"]](self.step / self.total_steps)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            if isinstance(group["lr"], Tensor):  # a CUDA graph reads this very tensor
                group["lr"].fill_(base * factor)
            else:
                group["lr"] = base * factor
        bound = -self.svi.step(argument)
        self.step += 1
        return bound

    def weights_are_good(self, argument: Tensor) -> bool:
        """Return whether the weights are finite, and so is the loss that they give."""
        if self._bad_weights():
            return False
        with seeded(0, self.device):
            return math.isfinite(self.svi.evaluate_loss(argument))

    def _bad_weights(self) -> list[str]:
        return [name for name, p in self.pair.named_parameters() if not torch.isfinite(p).all()]

    def _raise_divergence(self, good: dict[str, Any]) -> NoReturn:
        """Go back to the state ``good``, repeat the steps one by one, stop before the bad one, and name it."""
        self.restore(good)
        before = copy.deepcopy(self.pair.state_dict())
        for argument in self.data.arguments():
            weights, random = copy.deepcopy(self.pair.state_dict()), self.random_state()
            bound_is_finite = math.isfinite(self.take_step(argument))
            if bound_is_finite and self.weights_are_good(argument):
                before = weights
                continue
            what, where, step, bad = "the loss", "", self.step, self._bad_weights()
            if bound_is_finite and not bad:  # the weights after this step give a bad loss: look with them
                step += 1
            else:
                self.pair.load_state_dict(weights)
                self.set_random_state(random)
            if bound_is_finite and bad:
                what, where = "a gradient", f" in parameter '{bad[0]}'"
            if site := self._first_nonfinite_site(self.data.batch(argument)):
                where = f" at site '{site}'{where}"
            self.pair.load_state_dict(weights if bound_is_finite else before)
            raise TrainingDiverged(
                f"{what} turned NaN or infinite at step {step} (epoch {self.epoch + 1}){where}. The pair keeps the "
                f"last weights that gave a finite loss. Try a lower lr (now {self.lr:g}), or look at that site's "
                "distribution for a scale near 0 or a log of 0."
            )
        raise TrainingDiverged(
            f"the loss turned NaN or infinite in epoch {self.epoch + 1}; it did not when that was repeated."
        )

    def _first_nonfinite_site(self, batch: Tensor) -> str | None:
        """First site, guide before model, whose value or log density is NaN or infinite; None where all are finite."""
        guide_trace = poutine.trace(self.svi.guide).get_trace(batch)
        model_trace = poutine.trace(poutine.replay(self.svi.model, trace=guide_trace)).get_trace(batch)
        nodes: list[tuple[str, Any]] = [*guide_trace.nodes.items(), *model_trace.nodes.items()]
        for name, site in ((name, site) for name, site in nodes if site["type"] == "sample"):
            if not all(torch.isfinite(v).all() for v in (site["value"], site["fn"].log_prob(site["value"]))):
                return name
        return None


@contextmanager
def _watch_for_interrupt() -> Iterator[Callable[[], bool]]:
    """Give a function that returns whether Ctrl-C has been pressed: Python drops its exception inside a ``__del__``."""
    was_pressed = False

    def press(number: int, frame: Any) -> None:
        nonlocal was_pressed
        was_pressed = True
        signal.default_int_handler(number, frame)

    in_main = threading.current_thread() is threading.main_thread()
    if is_watched := in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, press)
    try:
        yield lambda: was_pressed
    finally:
        if is_watched and signal.getsignal(signal.SIGINT) is press:
            signal.signal(signal.SIGINT, signal.default_int_handler)
