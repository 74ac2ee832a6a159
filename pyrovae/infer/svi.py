"""Stochastic variational inference: one step is loss, gradient, update."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.optim import Optimizer

from pyrovae.checks import check_choice
from pyrovae.infer.arguments import Arguments
from pyrovae.infer.cudagraph import Captured, why_not
from pyrovae.infer.program import Program, Untraceable, say_once
from pyrovae.infer.snapshot import same_objects
from pyrovae.infer.surroundings import Surroundings
from pyrovae.infer.untraceable import memory
from pyrovae.infer.update import Update

__all__ = ["BACKENDS", "SVI", "DatasetSize"]

BACKENDS = ("auto", "eager", "compiled", "cudagraph")
WORTH_COMPILING = 5000
"""Steps after which ``auto`` compiles: compiling takes about as long as they save in a small pair."""
MAX_PROGRAMS = 8
"""Of one step, for different shapes; and of different Python numbers that it reads."""
BETWEEN_CHECKS = 8192
"""Steps of a program after which it is compared with the pair again; before that, at the second, eighth, 32nd, ..."""
_CHANGED = (
    "the pair computes something else than when its step was recorded, though nothing that is watched has changed "
    "(see SVI), and the last {} steps may have been those of before"
)
_LOSS_METHODS = ("loss_and_grads", "differentiable_loss", "_bound", "_particle_bound")


@dataclass
class _Recorded:
    """A step's program, how often it has run, and when it was and will be compared with the pair."""

    program: Program
    step: Callable[..., Tensor]
    runs: int = 0
    last: int = 0
    next: int = 2

    def __call__(self, *args: Tensor) -> Tensor:
        """One step. Seldom it compares first, which takes as long as three to ten steps.

        Raises:
            Untraceable: the program no longer holds, or fails.
        """
        self.runs += 1
        if self.runs == self.next:
            if not self.program.still_holds(args):
                raise Untraceable(_CHANGED.format(self.runs - self.last - 1))
            self.last, self.next = self.runs, self.next + min(3 * self.next, BETWEEN_CHECKS)
        return self.step(*args)


class SVI:
    """A drop-in for ``pyro.infer.SVI`` that also takes the optimizers of ``torch.optim``, and compiles.

    Args:
        model, guide: a pair's two functions, or any two Pyro functions.
        optim: a ``torch.optim`` optimizer of the pair's parameters; a function that makes one of a list of parameters
            (called at the first step, with the parameters that the first run named); or a ``pyro.optim`` optimizer.
        loss: a loss of :mod:`pyrovae.infer`, or one of Pyro's.
        backend: ``eager``; ``compiled`` (loss and gradient recorded once below Pyro and compiled, then one fused
            update); ``cudagraph`` (that, captured as a CUDA graph); or ``auto``, which starts eagerly and changes over
            to the fastest that works after 5,000 steps, or at once where ``num_steps`` is that many.
        num_steps: how many steps will be asked for, if that is known.
        prepare: makes the batch that model and guide take of the arguments of ``step``; part of the compiled step.
        checked: the pair has been run with validation on, so the first step may be a recorded one.
        dataset_size: N. The loss is then divided by N, and sites inside the plate ``data`` count as a subsample of N
            data (:class:`DatasetSize`).

    ``step`` returns the loss as a scalar tensor, not a float: reading it is what would wait for the device.

    The first step runs eagerly, with Pyro's validation on; recorded steps do not validate values. They read
    parameters, buffers and other tensors anew, and a learning rate too, but hold Python numbers fixed. When an
    attribute of one of the pair's modules changes (a KL weight, a switch such as ``training``), or a global, a
    closure variable or what model or guide name of another object (``args.beta``, ``args["beta"]``), the step is
    recorded again; from then on a tensor of the parameters' precision stands for a float that has changed, and it
    may change at every step. So it is for a float among the arguments, from the first step on. Where no tensor can
    stand for it (``max(0.1, beta)``, ``beta % 1``), what keeps changing runs eagerly. Where a number changes that no
    code names (a count of epochs beside them), the program is compared with the pair once, and goes on if it holds.

    Sets, arrays, lists of more than 100 entries, what functions of installed packages read, and hooks that are
    registered between steps are not watched. Therefore a program is compared with the pair at its second, eighth,
    32nd, ... and every 8192nd step; where they differ, steps run eagerly from then on, with a warning.

    Python code whose effect is no tensor (a hook that fills a list) runs while a step is recorded or compared, and
    not otherwise. What cannot be recorded is named in one warning, and runs eagerly with the same numbers.

    A parameter that has no gradient in a step stays as it is; Pyro's own SVI moves it on by Adam's momentum.
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
        self.model, self.guide, self.optim = model, guide, optim
        self.loss: Any = loss
        self.backend = backend
        self.num_steps, self.dataset_size, self.prepare = num_steps, dataset_size, prepare
        self._checked = checked
        self._steps = 0
        self._unsaid = ""
        self._parts: list[Any] = []
        self._surroundings: Surroundings | None = None
        self._call: tuple = ()
        self._forget()

    def _forget(self) -> None:
        """What steps have found out: the parameters, the programs and for which states of the surroundings they are."""
        self._params: list[Tensor] = []
        self._named: dict[Any, list[Tensor]] = {}  # by state of the surroundings and kind of call, for pyro.optim
        self._update: Update | None = None
        self._states: list[int] = []
        self._programs: dict[Any, _Recorded | None] = {}
        self._others: dict[Any, list[Tensor]] = {}  # by setting and arguments: what the program reads besides these
        self._gave_up = False
        self._why_held = ""  # no tensor stands for a number that changes
        self._fixed_floats: dict[Any, str] = {}  # kinds of calls where no tensor can stand for them, and why

    def __getstate__(self) -> dict[str, Any]:
        """Copies find out anew."""
        blank = object.__new__(SVI)
        vars(blank).update(vars(self), _parts=[], _surroundings=None, _call=())
        blank._forget()
        return vars(blank)

    # Steps ------------------------------------------------------------------------------------------------------

    def step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One update on one batch. Returns the loss before it, nats, a scalar tensor without gradient."""
        self._steps += 1
        self._call = () if isinstance(self.optim, Optimizer) else _kind(args, kwargs)
        self._unsaid = ""
        if self._steps == 1 and self.backend != "eager" and not self._checked:
            with pyro.validation_enabled(True):
                loss = self._eager_step(*args, **kwargs)
        else:
            program = self._program(args, kwargs) if self._wants_program(self._steps) else None
            try:
                loss = self._eager_step(*args, **kwargs) if program is None else program()
            except Untraceable as error:
                loss = self._eager_step(*args, **kwargs)  # where the pair fails too, this says how
                self._give_up()
                warnings.warn(f"pyrovae: {error}; from now on steps run eagerly.", RuntimeWarning, stacklevel=2)
        if self._surroundings is None and self._wants_program(self._steps + 1) and not _PYRO_STACK:
            watched = self._watch()
            self._states += [] if watched is None else [watched[1]]  # the next step sees what has changed since
        self._say()  # an error of the step itself comes first
        return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss on one batch, without an update."""
        with torch.no_grad(), self._handlers():
            return torch.as_tensor(self.loss.loss(self.model, self.guide, *self._prepared(args), **kwargs))

    def compile(self, *args: Any, **kwargs: Any) -> bool:
        """Record and compile the step for arguments like these now, without taking it. False where it stays eager, or
        an eager step has to name its parameters first (``pyro.optim``, or a function that makes an optimizer).
        """
        if self.backend == "eager" or not isinstance(self.optim, Optimizer):
            return False
        self._checked, self._unsaid = True, ""
        program = self._program(args, kwargs)
        self._say()
        return program is not None

    def _say(self) -> None:
        if self._unsaid:
            say_once(f"pyrovae: this step runs eagerly: {self._unsaid}.")

    def _wants_program(self, step: int) -> bool:
        if self.backend == "eager" or self._gave_up:
            return False
        if self.backend != "auto":
            return True
        return bool(self._programs) or (self.num_steps or step) >= WORTH_COMPILING

    @contextmanager
    def _handlers(self) -> Iterator[None]:
        if self.dataset_size is None:
            yield
        else:
            with DatasetSize(self.dataset_size), poutine.scale(scale=1 / self.dataset_size):
                yield

    def _prepared(self, args: tuple) -> tuple:
        return args if self.prepare is None else (self.prepare(*args),)

    def _eager_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._handlers():
            return self._update_eagerly(*self._prepared(args), **kwargs)

    def _update_eagerly(self, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(self.optim, Optimizer):
            self.optim.zero_grad(set_to_none=True)
        if isinstance(self.optim, Optimizer) and hasattr(self.loss, "_bound"):
            loss = self.loss.loss_and_grads(self.model, self.guide, *args, **kwargs)
            self.optim.step()
            self.optim.zero_grad(set_to_none=True)
            return loss
        # Parameters are those that this run names, as in Pyro.
        with poutine.trace(param_only=True) as captured:
            loss = self.loss.loss_and_grads(self.model, self.guide, *args, **kwargs)
        named: list[Any] = [site["value"] for site in captured.trace.nodes.values()]
        params = list(dict.fromkeys(v.unconstrained() if hasattr(v, "unconstrained") else v for v in named))
        if not isinstance(self.optim, Optimizer | PyroOptim):
            self.optim = self.optim(params)
        if isinstance(self.optim, PyroOptim):
            self.optim(params)
        else:
            self.optim.step()
        for param in params:
            param.grad = None
        self._params = params
        if self.backend != "eager" and not self._gave_up:
            kinds = {call for _, call in self._named}
            if self._call in kinds or len(kinds) < MAX_PROGRAMS:
                state = 0 if self._surroundings is None else self._surroundings.state()
                self._named[state, self._call] = params
            else:
                self._unsaid = self._unsaid or (
                    f"its arguments keep changing; {MAX_PROGRAMS} kinds were looked at, each of which has to name its "
                    "parameters first with pyro.optim"
                )
        return torch.as_tensor(loss)

    # Programs ---------------------------------------------------------------------------------------------------

    def _program(self, args: tuple, kwargs: dict) -> Callable[[], Tensor] | None:
        """The recorded step on these arguments; None where there is none."""
        if _PYRO_STACK:
            self._unsaid = "handlers around it are not recorded"
            return None
        if (watched := self._watch()) is None:
            return None
        surroundings, state = watched
        try:
            fixed = Arguments.of(args, kwargs)
        except TypeError as error:
            self._unsaid = str(error)
            return None
        if state not in self._states:
            idle = {known: keys for known in reversed(self._states) if (keys := surroundings.idle(known, state))}
            named = next((self._named[known, self._call] for known in idle if (known, self._call) in self._named), None)
            if named is not None:
                self._named.setdefault((state, self._call), named)
            like = next((known for known in idle if self._holds(known, fixed)), None)
            if like is not None:
                surroundings.ignore(idle[like], like)
                state = surroundings.state()
                self._states += [] if state in self._states else [state]
            elif not self._meets(surroundings, state) and (self._gave_up or not idle or self._has_program(idle)):
                return None
        params = self._trained(state)
        if params is None:
            return None
        arguments = self._with_tensors(fixed)
        signature = self._signature(state, params, arguments)
        recorded: Any = self._programs.get(signature, ...)  # one look: to hash it takes microseconds
        if recorded is ...:
            if len(self._programs) == MAX_PROGRAMS:
                why = self._fixed_floats.get(fixed.call(), "")
                self._unsaid = why or f"its arguments' shapes or values keep changing; {MAX_PROGRAMS} were looked at"
                return None
            # Another shape, a short last batch say, is recorded too, but is not worth a compiler's time.
            first = next((known for known in self._programs if known[:4] == signature[:4]), signature)
            compile_it = first[5:] == signature[5:]
            moving = surroundings.stand_ins.state()
            recorded = self._record(arguments, params, compile_it=compile_it)
            if surroundings.stand_ins.state() != moving:  # a number that moved is held fixed again
                self._unsaid = ""
                return None
            if recorded is None and arguments is not fixed:
                why = f"no tensor can stand for a float among its arguments: {self._unsaid}"
                recorded = self._record(fixed, params, compile_it=compile_it)
                if recorded is not None:
                    self._unsaid, self._fixed_floats[fixed.call()] = "", why
                    arguments = fixed
            if recorded is not None:
                others = [x for x in recorded.program.outside if all(x is not p for p in params)]
                self._others[signature[0], arguments.key()] = others
            self._programs[self._signature(state, params, arguments)] = recorded
        return None if recorded is None else partial(recorded, *arguments.tensors)

    def _signature(self, state: int, params: list[Tensor], arguments: Arguments) -> tuple:
        """What programs are good for."""
        setting, key = (state, self.dataset_size, *_torchs_settings()), arguments.key()
        spec, kinds, *rest = key
        return (setting, _layouts(params), spec, kinds, _layouts(self._others.get((setting, key), [])), *rest)

    def _has_program(self, states: Container[int]) -> bool:
        return any(program is not None and key[0][0] in states for key, program in self._programs.items())

    def _with_tensors(self, arguments: Arguments) -> Arguments:
        """Tensors stand for floats, where they can."""
        if not arguments.has_floats or arguments.call() in self._fixed_floats:
            return arguments
        return arguments.with_floats_as_tensors(self._as_tensor)

    def _holds(self, state: int, arguments: Arguments) -> bool:
        """Whether the program of another state, which differs in what no code names, holds in this one."""
        params = self._trained(state)
        arguments = self._with_tensors(arguments)
        recorded = None if params is None else self._programs.get(self._signature(state, params, arguments))
        try:
            return recorded is not None and recorded.program.still_holds(arguments.tensors, tolerance=1e-6)
        except Untraceable:
            return False

    def _give_up(self) -> None:
        """Steps run eagerly from now on. What they were watched with need not be kept."""
        self._gave_up = True
        self._surroundings, self._states, self._programs = None, [], {}

    def _watch(self) -> tuple[Surroundings, int] | None:
        """What the parts read, and its state. None where they are new parts, or it cannot be looked at."""
        parts = [self.model, self.guide, self.prepare, self.loss, self.optim]
        known = self._surroundings
        try:
            if known is not None and same_objects(parts, self._parts):
                return known, known.state()
            self._parts = parts
            of_loss = [getattr(self.loss, name) for name in _LOSS_METHODS if hasattr(self.loss, name)]
            self._surroundings = found = Surroundings(self.model, self.guide, self.prepare, *of_loss)
            if known is not None:  # One eager step: the new ones may name other parameters.
                self._forget()
                return None
            return found, found.state()
        except Exception as error:  # of a user's object that does not want to be looked at
            self._unsaid = f"what it reads cannot be watched ({type(error).__name__}: {error})"
            self._give_up()
            return None

    def _trained(self, state: int) -> list[Tensor] | None:
        """The parameters of such a step. With ``pyro.optim`` an eager step names them: None until one has."""
        if not isinstance(self.optim, Optimizer):
            return self._named.get((state, self._call))
        grouped = [p for group in self.optim.param_groups for p in group["params"]]
        if not same_objects(grouped, self._params):
            self._params, self._update, self._programs, self._others = grouped, None, {}, {}
        return self._params

    def _as_tensor(self, value: float) -> Tensor:
        """A number as a tensor that promotes others as little as the number would."""
        params = self._trained(self._states[-1]) or []
        like = next((p for p in params if p.is_floating_point()), torch.empty(()))
        dtype = torch.promote_types(like.dtype, torch.get_default_dtype())
        return torch.full((), value, dtype=dtype, device=like.device)

    def _meets(self, surroundings: Surroundings, state: int) -> bool:
        """Whether to record in a state of the surroundings that no step has seen."""
        if self._states and surroundings.let_move(self._states[-1], state, self._as_tensor):
            state = surroundings.state()
        if len(self._states) >= MAX_PROGRAMS:
            before, after = surroundings.states[self._states[-1]], surroundings.states[state]
            names = surroundings.difference(before, after) or "an attribute"
            why = self._why_held or "a tensor (a buffer of the pair, say) may, in place"
            if any(self._programs.values()) or not self._programs:  # else why it cannot be recorded has been said
                self._unsaid = f"{names} changes from step to step; {why}"
            self._give_up()
            return False
        self._states.append(state)
        return len(self._states) == 1  # else one eager step: the state may change again

    def _record(self, arguments: Arguments, params: list[Tensor], *, compile_it: bool) -> _Recorded | None:
        assert self._surroundings is not None
        if not hasattr(self.loss, "_bound"):
            self._unsaid = f"{type(self.loss).__module__}.{type(self.loss).__name__} reads tensors; use pyrovae.infer's"
            return None
        wanted = [p for p in params if p.requires_grad]
        if not wanted:
            self._unsaid = "no parameter wants a gradient"
            return None
        if any(p._post_accumulate_grad_hooks for p in wanted):
            self._unsaid = "hooks that run after a gradient was accumulated are not recorded"
            return None
        used: list[Tensor] = []
        form = arguments._replace(tensors=())  # a record need not hold on to a batch

        def loss_and_gradients(*tensors: Tensor, as_floats: bool = False) -> tuple[Tensor, ...]:
            args, kwargs = form.put_together(tensors, as_floats=as_floats)
            with self._handlers():
                loss = self.loss.differentiable_loss(self.model, self.guide, *self._prepared(args), **kwargs)
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
            used[:] = [p for p, g in zip(wanted, gradients, strict=True) if g is not None]
            return (loss.detach(), *_owned([g for g in gradients if g is not None], used))

        try:
            has_stand_ins = arguments.has_floats and not any(isinstance(x, float) for x in arguments.fixed)
            original = partial(loss_and_gradients, as_floats=True) if has_stand_ins else None
            program = Program(loss_and_gradients, arguments.tensors, self._surroundings, original)
        except Untraceable as error:
            if self._surroundings.hold():
                self._why_held = f"no tensor can stand for it: {error}"
            self._unsaid = str(error)
            return None
        self._surroundings.stand_ins.accept()
        trained = list(used)  # to look at the pair again, when it may have become another, names others
        if compile_it:
            program.compile(arguments.tensors)
        if self._update is None or not isinstance(self.optim, Optimizer):  # each kind of call names its own
            self._update = Update(self.optim, params)
        update = self._update

        def step(*tensors: Tensor) -> Tensor:
            loss, *gradients = program(*tensors)
            update(trained, gradients)
            return loss

        read = [*arguments.tensors, *program.outside]
        if self.backend == "compiled" or not any(tensor.is_cuda for tensor in read):
            return _Recorded(program, step)
        if reason := why_not(read, update):
            if self.backend == "cudagraph":
                say_once(f"pyrovae: this step runs without a CUDA graph: {reason}.")
            return _Recorded(program, step)
        return _Recorded(program, Captured(step, update, program.inputs))


def _layouts(tensors: list[Tensor]) -> tuple:
    """How what a program reads besides its arguments lies in memory: compiled code counts on it."""
    return tuple([(x.requires_grad, x.shape, x.stride(), x.dtype) for x in tensors])


def _torchs_settings() -> tuple:
    cast = [torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return torch.get_default_dtype(), torch.is_grad_enabled(), *cast


def _kind(args: tuple, kwargs: dict) -> tuple:
    """Names of parameters may depend on shapes."""
    try:
        arguments = Arguments.of(args, kwargs)
    except TypeError:  # not recorded
        return ()
    return arguments.call(), *arguments.shapes()


def _owned(gradients: list[Tensor], params: list[Tensor]) -> list[Tensor]:
    """As ``backward`` leaves gradients and fused kernels need them: strides of the parameters, memory of their own."""
    owned: list[Tensor] = []
    for gradient, param in zip(gradients, params, strict=True):
        shared = memory(gradient) in map(memory, owned)
        if shared or gradient.stride() != param.stride():
            gradient = torch.empty_like(param).copy_(gradient)
        owned.append(gradient)
    return owned


class DatasetSize(Messenger):
    """Tells the sites inside the plate ``data`` how many data there are, as ``pyro.plate(..., subsample_size=)`` would.

    A pair opens its plate over the batch it is given. Under this handler the plate counts as a subsample of ``size``
    data, so every objective weighs the sites inside by dataset / batch against global latents outside.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def _pyro_sample(self, msg: Any) -> None:
        for frame in msg["cond_indep_stack"]:
            if frame.name == "data" and frame.full_size in (None, frame.size):
                msg["scale"] = msg["scale"] * (self.size / frame.size)
        msg["cond_indep_stack"] = tuple(
            frame._replace(full_size=self.size) if frame.name == "data" else frame for frame in msg["cond_indep_stack"]
        )
