"""Training: mini-batches, schedule, validation, checkpoints."""

from __future__ import annotations

import copy
import math
import signal
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from pyrovae.checkpoint import load_state, save_state
from pyrovae.checks import check_choice, check_data, check_positive, count, not_a_pair, pick_device
from pyrovae.checks_pair import check_pair, first_nonfinite_site
from pyrovae.infer import LOSSES, SVI
from pyrovae.infer.svi import BACKENDS
from pyrovae.infer.weights import same_random_state
from pyrovae.pair import Pair

__all__ = ["SCHEDULES", "FitResult", "Progress", "TrainingDiverged", "fit", "read_progress"]

SECONDS_BETWEEN_CHECKPOINTS = 5.0


BURDA_STAGES = [(3**i - 1) // 2 / 3280 for i in range(1, 8)]  # when stages 1..7 begin: 3^0 + ... + 3^7 = 3280 epochs


def _burda(progress: float) -> float:
    return 10 ** (-bisect_right(BURDA_STAGES, progress) / 7)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "burda": _burda,
}
"""Learning-rate factors as functions of the share of steps done, in [0, 1). ``burda``: stages i = 0..7, each three
times as long as the one before, at 10^(−i/7) (Burda et al. 2016)."""


DEFAULT_STEPS = 2_000


def default_epochs(steps_per_epoch: int) -> int:
    """50, or as many as make 2,000 steps: a small data set needs more."""
    return max(50, math.ceil(DEFAULT_STEPS / max(1, steps_per_epoch)))


class TrainingDiverged(FloatingPointError):
    """The loss or a weight turned NaN or infinite. The pair holds the last good weights."""


@dataclass(frozen=True, repr=False)
class FitResult:
    """What :func:`fit` did."""

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
    """That the run was started with."""
    finished: bool
    """All epochs are done, or patience has ended it."""

    def __str__(self) -> str:
        return f"after epoch {len(self.history)} of {self.epochs}" if self.history else f"in epoch 1 of {self.epochs}"


def read_progress(checkpoint: str | Path) -> Progress:
    """What a checkpoint of :func:`fit` says of its run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds no training state.
    """
    state = load_state(checkpoint)
    try:
        options, epoch = state["options"], state["epoch"]
        finished = epoch >= options["epochs"] or _is_stuck(epoch, state["best"], options["patience"])
        return Progress(state["history"], options["epochs"], finished)
    except (KeyError, TypeError) as error:
        raise ValueError(f"path: {checkpoint} holds no training state of fit.") from error


def _is_stuck(epoch: int, best: dict[str, Any] | None, patience: int | None) -> bool:
    return patience is not None and best is not None and epoch - best["epoch"] >= patience


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
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    on_start: Callable[[], object] | None = None,
    monitor: Callable[[int], Mapping[str, float]] | None = None,
) -> FitResult:
    """Train a pair by stochastic variational inference.

    Every step minimises the loss divided by the number of data: its unit is nats per datum, and sites inside the plate
    ``data`` weigh dataset / batch against global latents. The last, short batch of an epoch is used like any other.

    Args:
        pair: the model and guide. It is trained in place and ends on the device it came from.
        x: data, shape (N, D), kept on the device; or a ``DataLoader`` that yields batches (or tuples that start with
            one), whose own batch size and order are used.
        loss: a loss, its name, or None for ``pair.default_loss()``.
        epochs: passes over the data. None: 50, or as many as make 2,000 steps, as a small data set needs more.
        batch_size: data a step.
        lr: the first learning rate. None: the optimizer's own, or ``pair.default_lr`` for Adam.
        schedule: ``constant``, ``cosine`` or ``burda``, over all the epochs.
        optimizer: makes the optimizer of a list of parameters, as ``lambda p: torch.optim.SGD(p, lr=0.1)`` does; None
            is Adam. With ``lr``, its groups are scaled so that the first starts there.
        validation: data held out to watch the bound: a share below 1, a count (both drawn by ``seed``), or a tensor.
        patience: stop after this many epochs without a better validation bound, and keep the best weights. None: never.
        binarize: draw pixels in [0, 1] anew at every use, as Bernoulli samples (held-out pixels, once).
        initialize: call ``pair.initialize`` with the training data first, where the pair has it.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda``.
        seed: of everything random here. The caller's random state is left as it was.
        backend: of the step: ``auto`` compiles runs of 5,000 steps or more, see :class:`pyrovae.infer.SVI`; ``eager``,
            ``compiled`` or ``cudagraph``.
        progress: show a bar; None shows it on a terminal.
        checkpoint: a new file to keep the whole training state in, written every few seconds and at the end of it all.
        resume: go on from ``checkpoint``, exactly as if the run had not stopped.
        on_start: called once, after every check and before anything is trained or written.
        monitor: called with the number of each epoch that has ended. What it returns joins that epoch's row of
            ``history``; its time does not count, and it does not touch the random numbers of the training.

    Raises:
        TypeError, ValueError: bad data or options, before training starts.
        FileExistsError: ``checkpoint`` is there, and ``resume`` is False.
        FileNotFoundError: ``checkpoint`` is not there, and ``resume`` is True; or its folder is not.
        TrainingDiverged: NaN or infinity in the loss or a weight; says at which step and site.
    """
    device = pick_device(device)
    objective = _make_loss(pair, loss)
    check_positive("batch_size", batch_size, integer=True)
    batch_size = int(batch_size)
    if epochs is not None:
        check_positive("epochs", epochs, integer=True)
    if lr is not None:
        check_positive("lr", lr)
        lr = float(lr)
    check_choice("schedule", schedule, SCHEDULES)
    if optimizer is not None and (isinstance(optimizer, Optimizer | PyroOptim) or not callable(optimizer)):
        raise TypeError(
            "optimizer: expected a function that makes one (of torch.optim) of a list of parameters, such as "
            f"lambda parameters: torch.optim.SGD(parameters, lr=0.1); got {type(optimizer).__name__}."
        )
    check_choice("backend", backend, BACKENDS)
    _check_validation(validation, patience)
    if resume and checkpoint is None:
        raise ValueError("resume: expected checkpoint= to name the file to go on from; got None.")
    file = Path(checkpoint) if checkpoint is not None else None
    if file is not None and on_start is None:
        _check_checkpoint(file, resume)

    home = next((p.device for p in pair.parameters()), torch.device("cpu"))
    with _seeded(seed, device), pyro.validation_enabled(False):
        data = _make_data(pair, x, validation, batch_size, binarize, device, seed)
        epochs = default_epochs(data.steps_per_epoch) if epochs is None else int(epochs)
        state = load_state(file, "checkpoint") if resume and file is not None else None
        start = _copy(pair.state_dict())
        try:
            pair.to(device)
            try:
                run = _Run(
                    pair, objective, data, optimizer, lr, schedule, epochs, initialize and state is None, backend
                )
                run.options |= {"batch size": batch_size, "patience": patience, "binarize": binarize, "seed": seed}
                run.options["backend"] = backend
                if state is not None:
                    run.restore(state)
                if on_start is not None:
                    on_start()
                    if file is not None:  # only now: it may have made the folder, or cleared it of an older run
                        _check_checkpoint(file, resume)
            except BaseException:  # nothing has been trained: leave the pair as it came
                pair.load_state_dict(start, strict=False)
                raise
            return run.go(epochs, patience, progress, file, monitor)
        finally:
            pair.to(home)


def _check_checkpoint(file: Path, resume: bool) -> None:
    """Hours of training may be in a file that is there."""
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
        return pair.default_loss()
    if isinstance(loss, str):
        check_choice("loss", loss, LOSSES)
        return LOSSES[loss]()
    if isinstance(loss, type) or not hasattr(loss, "loss_and_grads"):
        raise TypeError(f"loss: expected a loss such as Trace_ELBO(), or its name; got {loss!r}.")
    return loss


def _check_validation(validation: Any, patience: Any) -> None:
    if isinstance(validation, bool) or not isinstance(validation, int | float | Tensor):
        raise TypeError(f"validation: expected a share, a count or a tensor of data; got {validation!r}.")
    if patience is not None:
        check_positive("patience", patience, integer=True)
        if not isinstance(validation, Tensor) and validation == 0:
            raise ValueError("patience: early stopping needs held-out data; pass validation=0.1, say.")


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _interrupts() -> Iterator[Callable[[], None]]:
    """Gives a function that raises KeyboardInterrupt once Ctrl-C has been pressed.

    Python drops the exception where it comes in a weak reference's callback or in ``__del__``.
    """
    pressed = False

    def press(number: int, frame: Any) -> None:
        nonlocal pressed
        pressed = True
        signal.default_int_handler(number, frame)

    def raise_if_pressed() -> None:
        if pressed:
            raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # someone else's business
        yield raise_if_pressed
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield raise_if_pressed
    finally:
        if signal.getsignal(signal.SIGINT) is press:
            signal.signal(signal.SIGINT, signal.default_int_handler)


# Data ---------------------------------------------------------------------------------------------------------


@dataclass
class _Data:
    """What the steps of an epoch are given, how a step makes its batch of that, and what is known of the data."""

    arguments: Callable[[], Iterator[Tensor]]
    batch: Callable[[Tensor], Tensor]
    """Part of the compiled step: for data on the device, gathers rows by index and draws their pixels."""
    size: int
    steps_per_epoch: int
    sample: Tensor
    """Rows for ``initialize``."""
    validation: list[Tensor] = field(default_factory=list)
    generator: torch.Generator | None = None
    """A DataLoader's own."""


def _make_data(
    pair: Pair,
    x: Any,
    validation: float | int | Tensor,
    batch_size: int,
    binarize: bool,
    device: torch.device,
    seed: int,
) -> _Data:
    dtype = next((p.dtype for p in pair.parameters()), torch.get_default_dtype())

    def place(rows: Tensor) -> Tensor:
        return rows.to(device, dtype, non_blocking=True)

    def draw(rows: Tensor) -> Tensor:
        return torch.bernoulli(rows) if binarize else rows

    held_out: Tensor | None = None
    data_dim = getattr(pair, "data_dim", None)
    if isinstance(validation, Tensor):
        held_out, validation = check_data(validation, "validation", data_dim=data_dim), 0
    if isinstance(x, DataLoader):
        if held_out is None and validation:
            raise ValueError("validation: with a DataLoader, pass the held-out data themselves, as a tensor.")
        data = _loader_data(x, place, draw)
        check_data(data.sample, data_dim=data_dim)
    else:
        rows = check_data(x, data_dim=data_dim, at_least=2)
        if held_out is None and validation:
            rows, held_out = _split(rows, validation, seed)
        rows = place(rows)

        data = _Data(
            lambda: iter(torch.randperm(len(rows), device=device).split(batch_size)),
            lambda index: draw(rows[index]),
            len(rows),
            math.ceil(len(rows) / batch_size),
            rows,
        )
    check_pair(pair, data.sample, binarize=binarize)
    data.sample = draw(data.sample)
    if held_out is not None:
        held_out = place(held_out)
        check_pair(pair, held_out, "validation", binarize=binarize)
        data.validation = list(draw(held_out).split(batch_size))
    return data


def _split(rows: Tensor, validation: float | int, seed: int) -> tuple[Tensor, Tensor]:
    count = round(validation * len(rows)) if isinstance(validation, float) else validation
    if not 0 < count < len(rows):
        raise ValueError(
            f"validation: expected a share between 0 and 1, or a count below the {len(rows)} data; got {validation!r}."
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).to(rows.device)
    return rows[order[count:]], rows[order[:count]]


def _loader_data(loader: DataLoader, place: Callable[[Tensor], Tensor], draw: Callable[[Tensor], Tensor]) -> _Data:
    def raw() -> Iterator[Tensor]:
        for batch in loader:
            rows = batch[0] if isinstance(batch, list | tuple) else batch
            if not isinstance(rows, Tensor):
                raise TypeError(
                    f"x: expected the DataLoader to yield tensors of shape (batch, D); got {type(rows).__name__}."
                )
            yield rows

    try:
        steps, size = len(loader), None
        if loader.batch_size is not None:  # an epoch is what the sampler names, which may be less than the data set
            size = len(loader.dataset if isinstance(loader.dataset, IterableDataset) else loader.sampler)  # type: ignore[arg-type]
            size = steps * loader.batch_size if loader.drop_last else size
    except TypeError as error:
        if "no len" not in str(error):
            raise
        raise ValueError(
            "x: expected a DataLoader over a data set with a length; its objective needs the number of data."
        ) from error
    sample: list[Tensor] = []
    seen = 0
    for rows in raw():
        if seen < 10_000:
            sample.append(check_data(rows))
        seen += len(rows)
        if size is not None and seen >= 10_000:
            break
    if not sample:
        raise ValueError("x: expected at least one batch; the DataLoader is empty.")
    return _Data(
        lambda: map(place, raw()),
        draw,
        seen if size is None else size,
        steps,
        torch.cat(sample).to(place(sample[0])),
        generator=loader.generator or getattr(loader.sampler, "generator", None),
    )


# The run ------------------------------------------------------------------------------------------------------


class _Run:
    """Everything that changes while a pair is trained; ``state`` and ``restore`` hold all of it."""

    def __init__(
        self,
        pair: Pair,
        loss: ELBO,
        data: _Data,
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
            checked=True,  # so that a resumed run records its first step too
        )
        self.num_held_out = sum(map(len, data.validation))
        size = self.num_held_out or data.size
        self.scorer = SVI(pair.model, pair.guide, self.optimizer, loss, backend="eager", dataset_size=size)
        with _seeded(0, self.device):  # a loss that cannot take this pair says so here
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
        }
        self.epoch = self.step = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] | None = None

    def _adam(self, parameters: list[Tensor]) -> Optimizer:
        on_gpu = self.device.type == "cuda"
        # Fused kernels read it as float32, whatever the default.
        lr = torch.tensor(self.lr, dtype=torch.float32, device=self.device) if on_gpu else self.lr
        return torch.optim.Adam(parameters, lr=lr, fused=True, capturable=on_gpu)

    def state(self) -> dict[str, Any]:
        return {
            "pair": _copy(self.pair.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "random": self.random_state(),
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "history": list(self.history),
            "best": self.best,
            "options": self.options,
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
        for group in self.optimizer.param_groups:  # torch leaves what is no state where it was saved
            if isinstance(group["lr"], Tensor):
                group["lr"] = group["lr"].to(self.device)
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

    @property
    def device(self) -> torch.device:
        return self.data.sample.device

    def take_step(self, argument: Tensor) -> Tensor:
        """One update; returns the bound before it, nats per datum."""
        factor = self.factor(self.step / self.total_steps)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            if isinstance(group["lr"], Tensor):  # a CUDA graph reads it
                group["lr"].fill_(base * factor)
            else:
                group["lr"] = base * factor
        bound = -self.svi.step(argument)
        self.step += 1
        return bound

    def validation_bound(self) -> float:
        """The bound on the held-out data, nats per datum, with the same noise at every call."""
        total = torch.zeros((), device=self.device)
        with _seeded(0, self.device):
            for batch in self.data.validation:
                total -= self.scorer.evaluate_loss(batch) * (len(batch) / self.num_held_out)
        return float(total)

    def go(
        self,
        epochs: int,
        patience: int | None,
        progress: bool | None,
        checkpoint: Path | None,
        monitor: Callable[[int], Mapping[str, float]] | None,
    ) -> FitResult:
        good, written = self.state(), time.monotonic()
        if checkpoint is not None:  # a run that is killed in its first epoch resumes too
            save_state(checkpoint, good)
        stopped = False
        bar = tqdm(
            total=epochs,
            initial=self.epoch,
            unit="epoch",
            disable=None if progress is None else not progress,
            leave=False,
        )
        try:
            with bar:
                while self.epoch < epochs and not (stopped := _is_stuck(self.epoch, self.best, patience)):
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
        with _interrupts() as raise_if_pressed:
            for argument in self.data.arguments():
                bound = self.take_step(argument)
                raise_if_pressed()
                total += bound * len(argument)
                weight += len(argument)
                # Reading the bound waits for a GPU: there, look once an epoch.
                if self.device.type == "cpu" and not math.isfinite(bound):
                    self._explain_divergence(good)
        train_bound = float(total) / weight
        self.epoch += 1
        row = {"epoch": self.epoch, "step": self.step, "train_bound": train_bound}
        if not math.isfinite(train_bound) or not self._weights_are_good(argument):
            self._explain_divergence(good)
        if self.data.validation:
            row["validation_bound"] = bound_now = self.validation_bound()
            if self.best is None or bound_now > self.best["bound"]:
                self.best = {"bound": bound_now, "epoch": self.epoch, "pair": _copy(self.pair.state_dict())}
        row["lr"] = float(self.optimizer.param_groups[0]["lr"])
        return row

    def _weights_are_good(self, argument: Tensor) -> bool:
        """They are finite, and so is the loss that they give."""
        if self._bad_weights():
            return False
        with _seeded(0, self.device):
            return math.isfinite(self.svi.evaluate_loss(argument))

    def _bad_weights(self) -> list[str]:
        return [name for name, p in self.pair.named_parameters() if not bool(torch.isfinite(p).all())]

    def _explain_divergence(self, good: dict[str, Any]) -> None:
        """Go back to the last good state and repeat the steps one by one, to stop before the bad one and name it."""
        self.restore(good)
        before = _copy(self.pair.state_dict())
        for argument in self.data.arguments():
            weights, random = _copy(self.pair.state_dict()), self.random_state()
            bound = self.take_step(argument)
            if math.isfinite(bound) and self._weights_are_good(argument):
                before = weights
                continue
            what, where, step = "the loss", "", self.step
            if not math.isfinite(bound):  # the weights before this step already gave it
                self.pair.load_state_dict(weights)
                self.set_random_state(random)
                weights = before
            elif bad := self._bad_weights():
                what, where = "a gradient", f" in parameter '{bad[0]}'"
                self.pair.load_state_dict(weights)
                self.set_random_state(random)
            else:  # the weights after it do
                step += 1
            if site := first_nonfinite_site(self.svi, self.data.batch(argument)):
                where = f" at site '{site}'{where}"
            self.pair.load_state_dict(weights)
            raise TrainingDiverged(
                f"{what} turned NaN or infinite at step {step} (epoch {self.epoch + 1}){where}. The pair keeps the "
                f"last weights that gave a finite loss. Try a lower lr (now {self.lr:g}), or look at that site's "
                "distribution for a scale near 0 or a log of 0."
            )
        raise TrainingDiverged(
            f"the loss turned NaN or infinite in epoch {self.epoch + 1}; it did not when that was repeated."
        )
