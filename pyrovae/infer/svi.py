"""Stochastic variational inference: one step is loss, gradient, update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyrovae.checks import check_choice
from pyrovae.infer.adam import AdamOperations
from pyrovae.infer.cudagraph import Captured
from pyrovae.infer.record import PLAIN, CannotRecord, Recorded, compile_or_warn, memory, replay, warn, warn_once
from pyrovae.infer.setting import Setting
from pyrovae.infer.weights import DatasetSize

__all__ = ["BACKENDS", "SVI"]

BACKENDS = ("auto", "eager", "compiled", "cudagraph")
WORTH_COMPILING = 5000
"""Number of steps after which ``auto`` compiles: it takes about as long as they save in a small pair."""
MAX_RECORDS = 8
WIDEST = 2**21
"""Numbers in the widest tensor of a step on a CPU, up to which the update is part of its program: beside an update the
compiler keeps more of its buffers, and larger ones then fill the caches."""
FIRST_COMPARISONS = (2, 8, 32, 128, 512)
BETWEEN_COMPARISONS = 1000


class SVI:
    """Drop-in for ``pyro.infer.SVI`` that also takes the optimizers of ``torch.optim``, and compiles.

    Args:
        model, guide: a pair's two functions, or any two Pyro functions.
        optim: a ``torch.optim`` optimizer of the pair's parameters; a function that makes one of a list of parameters,
            called at the first step with those that it named; or a ``pyro.optim`` optimizer.
        loss: a loss of :mod:`pyrovae.infer`, or one of Pyro's, which runs eagerly.
        backend: ``eager``; ``compiled`` (loss, gradient and Adam recorded below Pyro as one program, and compiled);
            ``cudagraph`` (that, captured as a CUDA graph); or ``auto``, which starts eagerly and changes over to the
            fastest that works after 5,000 steps, or at once where ``num_steps`` is that many.
        num_steps: how many steps will be asked for, if that is known.
        prepare: makes the batch that model and guide take of the arguments of ``step``; part of the compiled step.
        dataset_size: N. The loss is then divided by N, and sites inside the plate ``data`` count as a subsample of N
            data (:class:`DatasetSize`).
        checked: the pair has been run with validation on, so the first step may be a recorded one.

    ``step`` returns the loss as a scalar tensor, not a float: reading it is what would wait for the device.

    **A compiled step is recorded once** for each kind of arguments (shapes, strides, dtypes and devices of tensors;
    values of bools, ints and strings) and each setting of the pair: plain attributes of its modules and its loss
    (numbers, strings, None, ``training``), which tensors are its parameters and buffers and how they lie in memory,
    what the optimizer trains and with which options. After eight records steps run eagerly, and a warning says what
    kept changing.

    **What may move.** Every tensor is read anew at each step: parameters, buffers, the optimizer's state, the learning
    rate. A float among the arguments becomes a scalar tensor. So a KL weight or a temperature that is annealed is an
    argument, ``svi.step(x, beta)``, or a buffer that changes in place, ``pair.beta.fill_(0.5)``.

    **Everything else is fixed** while recorded: globals, closures, attributes of other objects, files, the random
    numbers of NumPy and Python. What Python does then is not done again, and recording runs the pair three times.

    **What is noticed.** Reading a tensor's value into Python, a shape that depends on values, ``.numpy()``, or a plain
    attribute of the pair that changes while it runs: a warning names it and the line, and such steps run eagerly with
    the same numbers. The program is compared with the pair when it is recorded, at its steps 2, 8, 32, 128, 512 and
    every 1,000th. Where they differ, a warning says since when numbers may be off, and steps run eagerly.

    The first step runs eagerly, with Pyro's validation on. A ``pyro.optim`` optimizer with a dict of options becomes
    one ``torch.optim`` optimizer, ``svi.optim``, at the first step; with options for each parameter, clipping or a
    scheduler, steps run eagerly. A parameter that has no gradient in a step stays as it is.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: Optimizer | PyroOptim | Callable[[list[Tensor]], Optimizer],
        loss: ELBO,
        *,
        backend: str = "auto",
        num_steps: int | None = None,
        prepare: Callable[..., Any] | None = None,
        dataset_size: int | None = None,
        checked: bool = False,
    ) -> None:
        if not (isinstance(optim, Optimizer) or callable(optim)):
            raise TypeError(
                f"optim: expected a torch.optim or pyro.optim optimizer, or a function that makes one of a list of "
                f"parameters; got {type(optim).__name__}."
            )
        if isinstance(optim, torch.optim.LBFGS):
            raise TypeError("optim: LBFGS runs the loss several times a step, which SVI does not. Use Adam, or SGD.")
        if isinstance(loss, type) or not hasattr(loss, "loss_and_grads"):
            raise TypeError(f"loss: expected a loss such as Trace_ELBO(); got {loss!r}.")
        check_choice("backend", backend, BACKENDS)
        if backend == "cudagraph" and not torch.cuda.is_available():
            raise ValueError("backend: 'cudagraph' was asked for, and torch sees no CUDA device. Use backend='auto'.")
        self.model, self.guide = model, guide
        self.optim: Any = optim
        self.loss: Any = loss
        self.backend = backend
        self.num_steps, self.dataset_size, self.prepare = num_steps, dataset_size, prepare
        self._checked = checked
        self._steps = 0
        self._names_params = not isinstance(optim, Optimizer)  # each kind of call does, in an eager step
        self._forget_records()

    def _forget_records(self) -> None:
        self._parts = (self.model, self.guide, self.prepare, self.loss, self.optim)
        self._setting: Setting | None = None
        self._records: dict[Any, _RecordedStep | str] = {}  # or why there is none
        self._compiled: set[Any] = set()
        self._named: set[Any] = set()
        self._runs_eagerly = self.backend == "eager"

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_setting": None, "_records": {}, "_compiled": set()}  # copies record anew

    # Steps ----------------------------------------------------------------------------------------------------------

    def step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take one update on one batch. Return the loss before it, nats, a scalar tensor without gradient."""
        self._steps += 1
        if self._steps == 1 and self.backend != "eager" and not self._checked:
            with pyro.validation_enabled(True):
                return self._eager_step(args, kwargs)
        if not self._should_record(self._steps):
            return self._eager_step(args, kwargs)
        try:
            recorded, tensors = self._recorded(args, kwargs)
            if isinstance(recorded, _RecordedStep):
                return recorded(tensors)
        except (CannotRecord, RuntimeError, IndexError) as error:
            loss = self._eager_step(args, kwargs)  # where the pair fails too, this says how
            self._runs_eagerly, self._records = True, {}
            what = str(error) if isinstance(error, CannotRecord) else f"its record does not run: {error}"
            warn(f"pyrovae: {what}; from now on steps run eagerly.")
            return loss
        loss = self._eager_step(args, kwargs)
        if recorded is not None:
            warn_once(f"pyrovae: this step runs eagerly: {recorded}.")
        return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss on one batch, without an update."""
        with torch.no_grad(), self._handlers():
            return torch.as_tensor(self.loss.loss(self.model, self.guide, *self._prepared(args), **kwargs))

    def compile(self, *args: Any, **kwargs: Any) -> bool:
        """Record and compile the step for arguments like these now, without taking it. False where it stays eager, or
        an eager step has to name its parameters first (``pyro.optim``, or a function that makes an optimizer).
        """
        if self._runs_eagerly or not isinstance(self.optim, Optimizer):
            return False
        self._checked = True
        try:
            recorded, _ = self._recorded(args, kwargs)
        except CannotRecord as error:
            recorded = str(error)
        if isinstance(recorded, str):
            warn_once(f"pyrovae: this step runs eagerly: {recorded}.")
        return isinstance(recorded, _RecordedStep)

    def _should_record(self, step: int) -> bool:
        if any(a is not b for a, b in zip(self._parts, self._now(), strict=True)):
            self._forget_records()
        if self._runs_eagerly or _PYRO_STACK:  # handlers around the step are not recorded
            return False
        if not isinstance(self.optim, Optimizer) and self._steps > 1:
            warn_once("pyrovae: steps run eagerly: this pyro.optim optimizer has options for each parameter.")
            self._runs_eagerly = True
            return False
        return self.backend != "auto" or bool(self._records) or (self.num_steps or step) >= WORTH_COMPILING

    def _now(self) -> tuple:
        return self.model, self.guide, self.prepare, self.loss, self.optim

    @contextmanager
    def _handlers(self) -> Iterator[None]:
        if self.dataset_size is None:
            yield
        else:
            with DatasetSize(self.dataset_size), poutine.scale(scale=1 / self.dataset_size):
                yield

    def _prepared(self, args: Sequence[Any]) -> tuple:
        return tuple(args) if self.prepare is None else (self.prepare(*args),)

    def _eager_step(self, args: tuple, kwargs: dict) -> Tensor:
        if isinstance(self.optim, Optimizer):
            self.optim.zero_grad(set_to_none=True)
        if not self._names_params and hasattr(self.loss, "_bound"):
            with self._handlers():
                loss = self.loss.loss_and_grads(self.model, self.guide, *self._prepared(args), **kwargs)
            self.optim.step()
            self.optim.zero_grad(set_to_none=True)
            return torch.as_tensor(loss)
        # Parameters are those that this run names, as in Pyro, whose own losses look for them.
        with self._handlers(), poutine.trace(param_only=True) as captured:
            loss = self.loss.loss_and_grads(self.model, self.guide, *self._prepared(args), **kwargs)
        values: list[Any] = [site["value"] for site in captured.trace.nodes.values()]
        params = list(dict.fromkeys(v.unconstrained() if hasattr(v, "unconstrained") else v for v in values))
        if self._names_params:
            self._make_or_extend_optimizer(params)
        if isinstance(self.optim, PyroOptim):
            self.optim(params)
        else:
            self.optim.step()
        for param in params:
            param.grad = None
        return torch.as_tensor(loss)

    def _make_or_extend_optimizer(self, params: list[Tensor]) -> None:
        optim: Any = self.optim
        if type(optim) is PyroOptim:
            options: Any = optim.pt_optim_args
            is_plain = isinstance(options, dict) and not optim.pt_clip_args
            has_state = optim.optim_objs or optim._state_waiting_to_be_consumed
            if is_plain and not has_state and self.backend != "eager":
                make: Any = optim.pt_optim_constructor
                self.optim = make(params, **options)
        elif not isinstance(optim, Optimizer | PyroOptim):
            self.optim = optim(params)
        elif isinstance(optim, Optimizer):
            held = {id(p) for group in optim.param_groups for p in group["params"]}
            if new := [p for p in params if id(p) not in held]:
                optim.add_param_group({"params": new})
        self._parts = self._now()

    # Records --------------------------------------------------------------------------------------------------------

    def _recorded(self, args: tuple, kwargs: dict) -> tuple[_RecordedStep | str | None, Sequence[Tensor]]:
        """Return the recorded step for these arguments, or why it runs eagerly, and the tensors that it takes."""
        self._setting = setting = self._setting or Setting((self.model, self.guide, self.loss), self.optim)
        plain = not kwargs and all(type(x) is Tensor and not x.requires_grad for x in args)
        tensors, form = (args, None) if plain else _take_apart(args, kwargs, self._float_dtype)
        layouts = [(x.shape, x.stride(), x.dtype, x.device) for x in tensors]
        call = (form, self.dataset_size, *layouts)
        if self._names_params and call not in self._named:
            self._named.add(call)
            return None, tensors
        key = (setting.key(), call)
        recorded: Any = self._records.get(key, ...)
        if recorded is ...:
            if len(self._records) == MAX_RECORDS:
                raise CannotRecord(f"{self._what_changes(key)} keeps changing, and {MAX_RECORDS} steps were recorded")
            try:
                recorded = self._record(tensors, form)
            except CannotRecord as error:
                recorded = str(error)
            self._records[setting.key(), call] = recorded  # a first run may have set attributes up
        return recorded, tensors

    def _what_changes(self, key: tuple) -> str:
        assert self._setting is not None
        settings = [setting for setting, _ in self._records]
        if key[0] not in settings:
            return self._setting.difference(settings[-1], key[0]) or "the pair"
        return "the shape or a value of an argument (a float, or a tensor's value, may)"

    @property
    def _float_dtype(self) -> torch.dtype:
        """Type of a tensor that promotes others as little as the float in whose place it stands."""
        params = [p for group in self.optim.param_groups for p in group["params"]]
        kind = next((p.dtype for p in params if p.is_floating_point()), torch.float32)
        return torch.promote_types(kind, torch.get_default_dtype())

    def _record(self, tensors: Sequence[Tensor], form: Any) -> _RecordedStep:
        assert self._setting is not None
        if not hasattr(self.loss, "_bound"):
            raise CannotRecord(f"{type(self.loss).__module__}.{type(self.loss).__name__} reads tensors")
        wanted = [p for group in self.optim.param_groups for p in group["params"] if p.requires_grad]
        used: list[Tensor] = []

        def loss_and_gradients(*tensors: Tensor, as_floats: bool = False) -> tuple[Tensor, ...]:
            args, kwargs = (tensors, {}) if form is None else _put_together(tensors, form, as_floats=as_floats)
            with self._handlers():
                loss = self.loss.differentiable_loss(self.model, self.guide, *self._prepared(args), **kwargs)
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
            used[:] = [p for p, g in zip(wanted, gradients, strict=True) if g is not None]
            return (loss.detach(), *[g for g in gradients if g is not None])

        reference = partial(loss_and_gradients, as_floats=True)
        record = Recorded(loss_and_gradients, tensors, self._setting.modules, reference)
        # Another shape, a short last batch say, is recorded too, but is not worth a compiler's time.
        is_first = (kind := (self._setting.key(), form)) not in self._compiled
        recorded = _RecordedStep(record, list(used), self.optim, tensors, compiled=is_first)
        self._compiled.add(kind)
        if is_first and self.backend in ("auto", "cudagraph"):
            recorded.capture(tensors, asked=self.backend == "cudagraph")
        return recorded


class _RecordedStep:
    """Record of loss and gradient, and the update: part of the compiled program where it is Adam's."""

    def __init__(
        self, record: Recorded, params: list[Tensor], optimizer: Optimizer, args: Sequence[Tensor], *, compiled: bool
    ) -> None:
        self._record, self._params, self._optimizer = record, params, optimizer
        self._runs, self._compared, self._next = 0, 0, FIRST_COMPARISONS[0]
        self._adam: AdamOperations | None = None
        self._program: Callable[..., Tensor] | None = None
        self._captured: Captured | None = None
        if not compiled:
            return
        shapes = [node.meta["tensor_meta"].shape for node in record.graph.graph.nodes if "tensor_meta" in node.meta]
        is_wide = params[0].device.type == "cpu" and max((shape.numel() for shape in shapes), default=0) > WIDEST
        if AdamOperations.can_replace(optimizer) and not is_wide:
            self._adam = AdamOperations(optimizer, params)
            moved = [*params, *self._adam.tensors()]
            owners = [memory(x) for x in (*record.inputs, *self._adam.tensors(), *args)]
            if all(owners.count(memory(x)) == 1 for x in moved):  # compiled code writes to no memory that two share
                self._places = [next(i for i, x in enumerate(record.inputs) if x is p) for p in params]
                held = [*record.inputs, *self._adam.tensors()]
                self._number = len(held)
                self._program = compile_or_warn(self._with_update, [*held, *args])
                return
        record.compile(args)

    def _with_update(self, *tensors: Tensor) -> Tensor:
        assert self._adam is not None
        first, last = len(self._record.inputs), self._number
        inputs, state, args = tensors[:first], tensors[first:last], tensors[last:]
        loss, *gradients = self._record.graph(*inputs, *args)
        self._adam.update([inputs[place] for place in self._places], gradients, state)
        return loss

    def capture(self, args: Sequence[Tensor], *, asked: bool) -> None:
        """Run as a CUDA graph from now on, if everything lies on the GPU."""
        held = self._record.inputs + ([] if self._adam is None else self._adam.tensors())
        if self._program is not None and all(x.is_cuda for x in (*held, *args)):
            self._captured = Captured(self._program)
        elif asked:
            warn_once(
                "pyrovae: this step runs without a CUDA graph: it needs Adam with capturable=True, and every tensor on "
                "the GPU."
            )

    def __call__(self, args: Sequence[Tensor]) -> Tensor:
        """Take the step.

        Raises:
            CannotRecord: it was time to compare, and the pair computes something else now.
        """
        self._runs += 1
        if self._runs == self._next:
            if not self._record.holds(args):
                raise CannotRecord(
                    "the pair computes something else than when its step was recorded (did a global or an attribute of "
                    f"another object change?), and the last {self._runs - self._compared - 1} steps may be off"
                )
            later = [step for step in FIRST_COMPARISONS if step > self._runs]
            self._compared = self._runs
            self._next = later[0] if later else (self._runs // BETWEEN_COMPARISONS + 1) * BETWEEN_COMPARISONS
        if self._program is not None and self._adam is not None:
            held = self._record.inputs + self._adam.tensors()
            if self._captured is not None:
                return replay(self._captured, held, args)
            return replay(self._program, *held, *args)
        loss, *gradients = self._record(*args)
        for param, gradient in zip(self._params, _owned(gradients, self._params), strict=True):
            param.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss


def _owned(gradients: list[Tensor], params: list[Tensor]) -> list[Tensor]:
    """Lay gradients out as ``backward`` does: with the strides of the parameters, in memory of their own."""
    owned: list[Tensor] = []
    for gradient, param in zip(gradients, params, strict=True):
        if gradient.stride() != param.stride() or memory(gradient) in map(memory, owned):
            gradient = torch.empty_like(param).copy_(gradient)
        owned.append(gradient)
    return owned


# Arguments ----------------------------------------------------------------------------------------------------------


def _take_apart(args: tuple, kwargs: dict, float_dtype: torch.dtype) -> tuple[list[Tensor], tuple]:
    """Return the tensors among arguments, floats among them, and the rest, which a record holds fixed."""
    leaves, spec = tree_flatten((args, kwargs))
    fixed = tuple([float if isinstance(x, float) else ... if isinstance(x, Tensor) else x for x in leaves])
    for x in fixed:
        if x is not ... and x is not float and not isinstance(x, PLAIN):
            raise CannotRecord(f"an argument is of type {type(x).__module__}.{type(x).__qualname__}")
    like = next((x for x in leaves if isinstance(x, Tensor)), torch.empty(()))
    tensors = [
        torch.full((), x, dtype=float_dtype, device=like.device) if isinstance(x, float) else x
        for x in leaves
        if isinstance(x, Tensor | float)
    ]
    if any(x.layout is not torch.strided or x.requires_grad for x in tensors):
        raise CannotRecord("an argument is sparse, or wants a gradient")
    return tensors, (spec, fixed, tuple(map(type, fixed)))


def _put_together(tensors: Sequence[Tensor], form: tuple, *, as_floats: bool) -> tuple[Sequence[Any], dict[str, Any]]:
    """Return the arguments again, with ``tensors`` in their places."""
    spec, fixed, _ = form
    rest = iter(tensors)
    leaves = [
        (float(next(rest)) if as_floats else next(rest)) if x is float else next(rest) if x is ... else x for x in fixed
    ]
    return tree_unflatten(leaves, spec)
