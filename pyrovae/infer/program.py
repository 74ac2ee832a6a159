"""A computation below Pyro: recorded once as a graph of tensor operations, compiled, replayed.

Pyro's handlers, traces and distributions run once, while ``make_fx`` records what they do to tensors. The record has no
Python left in it, so it compiles whole. What a record cannot hold (control flow on values, Python-side state) is found
out, and the caller goes on without one.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.overrides import TorchFunctionMode

from pyrovae.infer.machine import with_tried_instructions
from pyrovae.infer.rewrite import rewritten
from pyrovae.infer.snapshot import Writes
from pyrovae.infer.stand_ins import are_kept, counted_users, other_number
from pyrovae.infer.surroundings import Surroundings
from pyrovae.infer.untraceable import (
    READING,
    Conversions,
    NoKey,
    Untraceable,
    Values,
    depth_in_libraries,
    memory,
    reason,
    recordable,
    tensors_in,
    where,
)
from pyrovae.infer.weights import same_random_state

__all__ = ["Program", "Untraceable", "or_eagerly", "say_once"]


MANY_OPERATIONS = 1500
"""Compiling takes three to four seconds for a hundred."""


class Program:
    """``function`` of tensors, recorded at ``args`` and good for arguments of the same shapes, dtypes and devices.

    Every other tensor that it touches (parameters, buffers, data) is read anew at each call, so in-place changes count.
    Random numbers are drawn anew at each call, in the order and from the generator of the original. ``surroundings``
    are those of ``function``: looking at it leaves them as they were. Numbers among them that move are read anew too.
    ``original`` is the same function where tensors among ``args`` stand for Python numbers: it takes the numbers.

    Raises:
        Untraceable: it reads a tensor's value into Python, changes Python values, or two records of it differ.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Tensor, ...],
        surroundings: Surroundings | None = None,
        original: Callable[..., Any] | None = None,
    ) -> None:
        self._surroundings = surroundings or Surroundings(function)
        self._original = original or function
        self.is_compiled = False
        with _looking():
            self._written = self._run_first(args)
            first, second = self._look_twice(function, args, has_numbers=original is not None)
            self.graph, self.inputs = first.graph, first.inputs
            # Those that a record makes are constants; the others may change.
            both = zip(first.inputs, second.inputs, strict=True)
            self.outside = [a for a, b in both if isinstance(a, Tensor) and _are_one(a, b)]
            if not self.still_holds(args):
                raise Untraceable("its record computes something else (does it set random states?)")

    def _run_first(self, args: tuple[Tensor, ...]) -> list[Tensor]:
        """What is set up at the first use is no part of a record. Returns the tensors that it writes to."""
        if self._surroundings.takes_next:
            raise Untraceable("it may take what an iterator gives next, which cannot be put back")
        writes, copies = Writes(), _copies(args)
        with self._surroundings.unchanged():
            try:
                _result(self._original, copies, writes)
            finally:
                writes.put_back()
        written, given = [tensor for tensor, _ in writes.saved], set(map(memory, copies))
        self._writes_to_arguments = any(memory(tensor) in given for tensor in written)
        return [tensor for tensor in written if memory(tensor) not in given]

    def _look_twice(
        self, function: Callable[..., Any], args: tuple[Tensor, ...], *, has_numbers: bool
    ) -> tuple[_Record, _Record]:
        surroundings, stand_ins = self._surroundings, self._surroundings.stand_ins
        with surroundings.unchanged(*self._written):
            if stand_ins or has_numbers:
                _check_stand_ins(function, self._original if has_numbers else None, args, surroundings)
            else:
                _result_without_reading(function, _copies(args))
            before, contents = surroundings.now(), surroundings.contents()
            random_state = surroundings.python_random_state()
            with stand_ins.as_tensors(other=False):
                first = _Record(function, _copies(args))
            # A record that differs for other values has read one into Python.
            with stand_ins.as_tensors(other=True):
                second = _Record(function, _copies(args, other=True))
            if (changed := contents.changed()) is not None:
                raise Untraceable(f"it changes {surroundings.label(changed)} as it runs")
            if difference := surroundings.difference(before, surroundings.now()):
                raise Untraceable(f"it changes {difference} as it runs")
            first.check_same(second)
            if random_state != surroundings.python_random_state():
                raise Untraceable("it draws random numbers of Python's or NumPy's")
        return first, second

    def compile(self, args: tuple[Tensor, ...]) -> None:
        """Compile with TorchInductor; where that cannot be done, say so once and go on with the record as it is."""
        operations = len(self.graph.graph.nodes)
        if operations > MANY_OPERATIONS:
            say_once(
                f"pyrovae: the step has {operations:,} operations (a loop over time, say), and compiling them takes "
                "minutes. backend='eager' does without."
            )
        try:
            if self._writes_to_shared_memory(args):
                raise TypeError("it writes to an argument, or to memory that two tensors share")
            with warnings.catch_warnings(), torch.no_grad(), self._surroundings.unchanged(*self._written):
                warnings.simplefilter("ignore")  # torch's, about itself
                self._run = _compiled(self.graph, [*self.inputs, *_copies(args)])
        except Exception as error:  # whatever stops a compiler, the record still runs
            lines = str(error).strip().splitlines() or [type(error).__name__]
            say_once(f"pyrovae: cannot compile the step here ({lines[0]}); it runs recorded, but not compiled.")
            return
        self.is_compiled = True

    def _writes_to_shared_memory(self, args: tuple[Tensor, ...]) -> bool:
        """Compiled code counts on inputs that do not overlap where it writes."""
        read = [memory(x) for x in (*self.inputs, *args) if isinstance(x, Tensor)]
        return self._writes_to_arguments or any(read.count(memory(tensor)) > 1 for tensor in self._written)

    def still_holds(self, args: tuple[Tensor, ...], tolerance: float = 1e-3) -> bool:
        """Whether the function is still the recorded one: something else that it reads may have changed unseen.

        Raises:
            Untraceable: the function fails, or its record does, or it cannot be looked at.
        """
        with _looking():
            with self._surroundings.unchanged(*self._written):
                expected = _result(self._original, _copies(args))
            with self._surroundings.unchanged(*self._written), torch.no_grad(), _without_autocast():
                try:
                    result = _result(partial(self.graph, *self.inputs), _copies(args))
                except Untraceable as error:  # some operations of torch's do not take what they gave
                    raise Untraceable(f"its record does not run: {error}") from error
        return _are_close(result, expected, tolerance)

    def __call__(self, *args: Tensor) -> Any:
        """
        Raises:
            Untraceable: the record fails, and nothing has changed. The function itself may say how, or do without.
            RuntimeError, IndexError: the record fails, and may have written to tensors.
        """
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            with _without_autocast():
                return self._replay(*args)
        return self._replay(*args)

    def _replay(self, *args: Tensor) -> Any:
        state = torch.default_generator.get_state()
        with torch.no_grad():
            try:
                return (self._run if self.is_compiled else self.graph)(*self.inputs, *args)
            except (RuntimeError, IndexError) as error:
                if not self._written and not self._writes_to_arguments:
                    torch.default_generator.set_state(state)
                    raise Untraceable(f"its record does not run: {reason(error)}") from error
                if self.is_compiled:  # the record fails in the same place, and says why
                    torch.default_generator.set_state(state)
                    self.graph(*[x.clone() if isinstance(x, Tensor) else x for x in (*self.inputs, *args)])
                raise


def or_eagerly(program: Program, function: Callable[..., Any]) -> Callable[..., Any]:
    """The program, and where its record fails the function itself, which says how."""

    def run(*args: Tensor) -> Any:
        try:
            return program(*args)
        except Untraceable:
            return function(*args)

    return run


@contextmanager
def _looking() -> Iterator[None]:
    """Warnings are left to an eager step. A user's object may not want to be looked at: that is ``Untraceable``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Untraceable:
        raise
    except Exception as error:
        raise Untraceable(f"what it reads cannot be watched ({type(error).__name__}: {error})") from error


@contextmanager
def _without_autocast() -> Iterator[None]:
    """A record holds its casts."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _compiled(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    from torch import _inductor

    if not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError("it draws from a generator of its own")
    # Compiled and recorded noise are equal: random numbers stay those of torch's generator, and in their order. (On a
    # GPU all but Bernoulli's, which torch's compiler draws in a way of its own.)
    options = {"fallback_random": True, "reorder_for_peak_memory": False}

    def compile_it(graph: GraphModule, options: dict[str, Any]) -> Callable[..., Any]:
        with _torchs_context():
            run = _inductor.compile(graph, inputs, options=options)
        run(*inputs)
        return run

    if not any(x.is_cuda for x in inputs):
        # Calling the kernels from C++ saves a quarter of a small step. What this cannot do, the plain way may.
        with suppress(Exception), _quiet(), with_tried_instructions():
            return compile_it(rewritten(graph, inputs), options | {"cpp_wrapper": True})
    return compile_it(graph, options)


@contextmanager
def _quiet() -> Iterator[None]:
    """No log of the operations that torch calls in a slower way."""
    logger = logging.getLogger("torch._inductor.ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _torchs_context() -> AbstractContextManager:
    """Without it torch compiles anew in every process, and takes twice as long to record."""
    try:
        from torch._guards import TracingContext, tracing
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        return tracing(TracingContext(FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())))
    except (ImportError, TypeError):  # torch's own business
        return nullcontext()


_said: set[str] = set()


def say_once(message: str) -> None:
    """Warn at the line that asked for it all, the first time in this process."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2 + depth_in_libraries(sys._getframe(1)))


# Recording ------------------------------------------------------------------------------------------------------


def _copies(args: tuple[Tensor, ...], *, other: bool = False) -> tuple[Tensor, ...]:
    """Arguments to look with: the computation may change them, and they may be its surroundings' or each other.

    With the same values, or with others.
    """
    copies = []
    for index, arg in enumerate(args):
        copy = arg.detach()
        if 0 not in arg.stride():  # an expanded one is not to be written to
            copy = torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device=arg.device).copy_(copy)
            if other and arg.dtype in _FLOATS:
                copy = copy.fill_(other_number(float(copy), index)) if copy.ndim == 0 else copy.div_(2 + index)
        copies.append(copy)
    return tuple(copies)


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _are_one(one: Any, other: Any) -> bool:
    """Whether they are the same, or the same memory: numbers that change are met as new objects each time."""
    numbers = isinstance(one, Tensor) and isinstance(other, Tensor) and one.ndim == other.ndim == 0
    return one is other or (numbers and memory(one) == memory(other))


_one_at_a_time = threading.RLock()


@contextmanager
def _unvalidated() -> Iterator[None]:
    """Validation reads values. Distributions that ``expand`` made validate whatever the setting."""
    with _one_at_a_time, pyro.validation_enabled(False):
        validate = Distribution._validate_sample
        Distribution._validate_sample = lambda self, value: None  # type: ignore[method-assign]
        try:
            yield
        finally:
            Distribution._validate_sample = validate  # type: ignore[method-assign]


def _result(function: Callable[..., Any], args: tuple[Tensor, ...], *modes: Any) -> tuple[Any, Tensor]:
    """Of one run, with no record; and where random numbers go on."""
    try:
        with same_random_state(), _unvalidated(), ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            return function(*args), torch.get_rng_state()
    except Exception as error:
        raise Untraceable(f"{reason(error)}{where(error.__traceback__)}") from error


def _without_keys(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Those that may stand for numbers are no keys."""
    return tuple(arg.as_subclass(NoKey) if arg.ndim == 0 else arg for arg in args)


def _result_without_reading(function: Callable[..., Any], args: tuple[Tensor, ...]) -> tuple[Any, Tensor]:
    """A record would hold fixed what is read. Recording refuses to read what it has computed, but not what it meets."""
    values = Values()
    versions = [arg._version for arg in args]
    try:
        result = _result(function, args, values, Conversions(values))
    except Untraceable:
        if not values.read:
            raise
    if values.read:  # NumPy and torch's old constructors go on when they are refused, in a way of their own
        raise Untraceable(values.read)
    if any(isinstance(arg, NoKey) and arg._version != version for arg, version in zip(args, versions, strict=True)):
        raise Untraceable("it changes an argument that is a number, in place")
    return result


def _check_stand_ins(
    function: Callable[..., Any],
    original: Callable[..., Any] | None,
    args: tuple[Tensor, ...],
    surroundings: Surroundings,
) -> None:
    """With tensors in the place of Python's numbers it must be the same function, at two values of each."""
    for other in (False, True):
        with surroundings.unchanged(), surroundings.stand_ins.as_numbers(other=other):
            expected = _result(original or function, _copies(args, other=other))
        with surroundings.unchanged(), surroundings.stand_ins.as_tensors(other=other, unhashable=True):
            copies = _copies(args, other=other)
            copies = copies if original is None else _without_keys(copies)
            numbers = [copy for copy in copies if isinstance(copy, NoKey)]
            users = counted_users(numbers)
            result = _result_without_reading(function, copies)
            if any(are_kept(numbers, users)):
                raise Untraceable("it keeps an argument that is a number, in a list say")
        if not _are_close(result, expected):
            raise Untraceable("it computes something else where a tensor stands for a Python number")


def _are_close(result: tuple[Any, Tensor], expected: tuple[Any, Tensor], tolerance: float = 1e-3) -> bool:
    """To far more than rounding, and far less than another computation; with as many random numbers."""
    ours, theirs = ([x.detach() for x in tensors_in(each)] for each in (result, expected))
    if [(x.shape, x.dtype) for x in ours] != [(x.shape, x.dtype) for x in theirs]:
        return False
    return all(
        torch.allclose(
            a, b, rtol=tolerance, atol=0.1 * tolerance * float(b.abs().nan_to_num(0, 0).max()), equal_nan=True
        )
        if b.is_floating_point() and b.numel()
        else torch.equal(a, b)
        for a, b in zip(ours, theirs, strict=True)
    )


class _Record:
    """One look at ``function``: its graph, and the tensors besides ``args`` that are the graph's first inputs."""

    def __init__(self, function: Callable[..., Any], args: tuple[Tensor, ...]) -> None:
        witness = _Witness()

        def watched(*args: Tensor) -> Any:
            with witness:
                return function(*args)

        try:
            # In oneDNN an LSTM is one operation, whose gradient cannot be recorded.
            with same_random_state(), _unvalidated(), _torchs_context(), torch.backends.mkldnn.flags(enabled=False):
                graph = make_fx(watched)(*args)
        except Exception as error:
            raise Untraceable(f"{reason(error)}{where(error.__traceback__)}") from error
        self.graph, self.inputs = _lift_constants(graph)
        self._calls = witness.calls

    def check_same(self, other: _Record) -> None:
        """Python-side state (a counter, a schedule, NumPy's random numbers) shows as a difference between two looks."""
        for (call, line), (again, _) in zip(self._calls, other._calls, strict=False):
            if call != again:
                raise Untraceable(f"it does something else each time it runs{line}")
        for a, b in zip_longest(_lines(self.graph), _lines(other.graph)):
            if a != b:
                raise Untraceable(f"it does something else each time it runs: first `{a}`, then `{b}`")
        for x, y in zip(self.inputs, other.inputs, strict=True):
            if _are_one(x, y):
                continue
            if not isinstance(x, Tensor) or not isinstance(y, Tensor):
                raise Untraceable(f"it makes a {type(x).__name__} each time it runs")
            if not (x.shape == y.shape and x.dtype == y.dtype and bool(torch.equal(x, y))):
                raise Untraceable("it makes a tensor of other numbers each time it runs")


class _Witness(TorchFunctionMode):
    """Notes what torch is asked for with which numbers, and at which line."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple, str]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, bool | int | float | str | np.ndarray)]
        numbers = [x.tobytes() if isinstance(x, np.ndarray) else x for x in plain]
        self.calls.append(((func, *numbers), where(sys._getframe(1))))
        # Only constants are still read by now (`for i in pyro.plate(...)`), which torch would refuse too.
        with disable_proxy_modes_tracing() if func in READING else nullcontext():
            return recordable(func)(*args, **(kwargs or {}))


def _lift_constants(graph: GraphModule) -> tuple[GraphModule, list[Tensor]]:
    """Make inputs of the tensors that recording found lying about."""
    nodes = list(graph.graph.nodes)
    lifted: dict[int, tuple[Node, Tensor]] = {}
    for node in nodes:
        if node.op == "get_attr":
            tensor = getattr(graph, node.target)
            if id(tensor) not in lifted:
                with graph.graph.inserting_before(nodes[0]):
                    lifted[id(tensor)] = (graph.graph.placeholder(f"captured_{len(lifted)}"), tensor)
            node.replace_all_uses_with(lifted[id(tensor)][0])
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph, [tensor for _, tensor in lifted.values()]


def _lines(graph: GraphModule) -> list[str]:
    return [line.split(";")[0].strip() for line in graph.code.splitlines()]
