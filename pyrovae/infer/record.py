"""A computation below Pyro, recorded once as a graph of tensor operations and replayed.

Pyro's handlers, traces and distributions run while ``make_fx`` notes what they do to tensors. The graph has no Python
left in it, so TorchInductor compiles it whole.
"""

from __future__ import annotations

import linecache
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyrovae.infer.lowering import compile_graph, copy_of, torch_context
from pyrovae.infer.weights import same_random_state

__all__ = [
    "PLAIN",
    "CannotRecord",
    "Recorded",
    "compile_or_warn",
    "memory",
    "recorded_or_itself",
    "replay",
    "warn",
    "warn_once",
]

PLAIN = (bool, int, float, complex, str, type(None))
"""Types of Python values that a record holds fixed. Attributes of these types are watched."""


class CannotRecord(RuntimeError):
    """Error of a computation that is no fixed graph of tensor operations, or no longer the recorded one."""


class Recorded:
    """Record of the tensor operations of ``function``, for arguments that differ from ``args`` in values alone.

    Every other tensor that the function meets is read anew at each call, and random numbers are drawn anew in their
    order. Making a record runs the function three times: to let it set itself up, to record it, and to compare. Tensors
    and plain attributes of ``modules`` and torch's random states are put back each time.

    Args:
        function: of tensors, returning tensors.
        args: examples of its arguments.
        modules: those whose plain attributes must not change while it runs, and whose tensors it may write to.
        reference: the function to compare with, where ``function`` itself takes tensors in the place of floats.

    Raises:
        CannotRecord: the function reads a tensor's value into Python, makes a shape that depends on values, changes a
            plain attribute, or its record computes something else.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: Sequence[Tensor],
        modules: Sequence[nn.Module] = (),
        reference: Callable[..., Any] | None = None,
    ) -> None:
        self._reference = reference or function
        self._owners = [module for root in modules for module in root.modules()]
        self._run: Callable[..., Any] | None = None
        with self._trial():
            self._reference(*map(copy_of, args))
        unread = set(map(memory, self._tensors()))

        def watched(*args: Tensor) -> Any:
            with _RefuseReads(unread | set(map(memory, args))), _RefuseConversions():
                return function(*args)

        # oneDNN's LSTM is one operation whose gradient cannot be recorded.
        with self._trial(), torch.backends.mkldnn.flags(enabled=False), torch_context():
            graph = make_fx(watched)(*map(copy_of, args))
        if self._changed:
            raise CannotRecord(f"it changes the attribute {self._changed[0]} as it runs; a buffer may count, in place")
        self.graph, self.inputs = _lift_constants(graph)
        if not self.holds(args):
            raise CannotRecord("its record computes something else (does it use Python's or NumPy's random numbers?)")

    @property
    def is_compiled(self) -> bool:
        return self._run is not None

    def compile(self, args: Sequence[Tensor]) -> None:
        """Compile the record. Where that fails, warn once and replay it uncompiled."""
        self._run = compile_or_warn(self.graph, [*self.inputs, *args])

    def holds(self, args: Sequence[Tensor], tolerance: float = 1e-3) -> bool:
        """Return whether the function still computes what the record does, at equal noise, up to rounding."""
        with self._trial():
            expected = tree_leaves(self._reference(*map(copy_of, args)))
        with self._trial():
            found = tree_leaves(replay(self.graph, *self.inputs, *map(copy_of, args)))
        return len(found) == len(expected) and all(
            a.shape == b.shape
            and torch.allclose(
                a, b, tolerance, 0.1 * tolerance * float(b.detach().abs().nan_to_num(0, 0).max()), equal_nan=True
            )
            for a, b in zip(found, expected, strict=True)
            if b.numel()
        )

    def __call__(self, *args: Tensor) -> Any:
        return replay(self._run or self.graph, *self.inputs, *args)

    @contextmanager
    def _trial(self) -> Iterator[None]:
        """Leave the modules as they were; switch off warnings, and validation, which reads values."""
        spaces = [vars(owner) for owner in self._owners]
        before = [{name: value for name, value in space.items() if isinstance(value, PLAIN)} for space in spaces]
        held = [(tensor, tensor.detach().clone()) for tensor in self._tensors()]
        self._changed: list[str] = []
        try:
            with _unvalidated(), same_random_state(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except Exception as error:
            raise CannotRecord(f"{_reason(error)}{where(error.__traceback__)}") from error
        finally:
            for tensor, value in held:
                if not torch.equal(tensor, value):
                    tensor.data.copy_(value)
            for owner, space, values in zip(self._owners, spaces, before, strict=True):
                changed = {name: value for name, value in values.items() if space.get(name) is not value}
                space.update(changed)
                self._changed += [f"{type(owner).__name__}.{name}" for name in changed]

    def _tensors(self) -> list[Tensor]:
        return [t for m in self._owners for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]


def recorded_or_itself(
    function: Callable[..., Any], args: Sequence[Tensor], modules: Sequence[nn.Module], what: str, *, compiled: bool
) -> Callable[..., Any]:
    """Return a record of ``function``; where it cannot be recorded, itself, with a warning about ``what``.

    An error of the record is left to the function, which says how it comes about.
    """
    try:
        record = Recorded(function, args, modules)
    except CannotRecord as error:
        warn_once(f"pyrovae: {what} runs eagerly: {error}.")
        return function
    if compiled:
        record.compile(args)

    def run(*args: Tensor) -> Any:
        try:
            return record(*args)
        except (RuntimeError, IndexError):
            return function(*args)

    return run


def compile_or_warn(graph: Callable[..., Any], inputs: Sequence[Tensor]) -> Callable[..., Any] | None:
    """Return the compiled graph; None, with a warning, where it cannot be compiled."""
    try:
        with torch.no_grad(), same_random_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about itself
            return compile_graph(graph, inputs)
    except Exception as error:  # whatever stops a compiler, the record still runs
        warn_once(f"pyrovae: cannot compile the step here ({_reason(error)}); it runs recorded, but not compiled.")
        return None


def _lift_constants(graph: GraphModule) -> tuple[GraphModule, list[Tensor]]:
    """Make inputs, before the others, of the tensors that recording met."""
    nodes = list(graph.graph.nodes)
    lifted: dict[int, tuple[Any, Tensor]] = {}
    for node in nodes:
        if node.op == "get_attr":
            tensor = getattr(graph, node.target)
            if not isinstance(tensor, Tensor):
                raise CannotRecord(f"it uses a {type(tensor).__name__} of its own")
            if id(tensor) not in lifted:
                with graph.graph.inserting_before(nodes[0]):
                    lifted[id(tensor)] = (graph.graph.placeholder(f"captured_{len(lifted)}"), tensor)
            node.replace_all_uses_with(lifted[id(tensor)][0])
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph, [tensor for _, tensor in lifted.values()]


_one_at_a_time = threading.RLock()


@contextmanager
def _unvalidated() -> Iterator[None]:
    """Switch validation off, also in distributions that were made while it was on."""
    with _one_at_a_time, pyro.validation_enabled(False):
        validate = Distribution._validate_sample
        Distribution._validate_sample = lambda self, value: None  # type: ignore[method-assign]
        try:
            yield
        finally:
            Distribution._validate_sample = validate  # type: ignore[method-assign]


def replay(run: Callable[..., Any], *tensors: Any) -> Any:
    """Call ``run`` without gradients, and without autocast: a record holds its casts."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return replay(run, *tensors)
    with torch.no_grad():
        return run(*tensors)


# What cannot be recorded ------------------------------------------------------------------------------------------

_READS = "it reads the value of a tensor into Python (.item(), float(), or an `if` on a tensor)"
_CONVERSIONS = (Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.__dlpack__)


class _RefuseReads(TorchDispatchMode):
    """Refuses to read the values of tensors in ``unread`` memory, as ``make_fx`` does for what is computed of them."""

    def __init__(self, unread: set[int]) -> None:
        super().__init__()
        self._unread = unread

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags and self._unread & {
            memory(x) for x in args if isinstance(x, Tensor)
        }:
            raise CannotRecord(_READS)
        if torch.Tag.dynamic_output_shape in func.tags and (
            func is not torch.ops.aten.index.Tensor
            or any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        ):
            raise CannotRecord("the shape of a result depends on values (a boolean index, nonzero, unique)")
        return func(*args, **(kwargs or {}))


class _RefuseConversions(TorchFunctionMode):
    """Refuses what reads a tensor's memory without an operation, and records ``one_hot``, which reads its classes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CONVERSIONS:
            raise CannotRecord(f"it reads the values of a tensor into Python (.{func.__name__}())")
        if func is nn.functional.one_hot:
            return _one_hot(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """Compute ``one_hot`` without reading the classes. An embedding checks them: it fails for a wrong one."""
    if num_classes < 1 or tensor.numel() == 0:
        return nn.functional.one_hot(tensor, num_classes)
    classes = torch.arange(num_classes, device=tensor.device)
    return (nn.functional.embedding(tensor, classes.unsqueeze(-1)) == classes).to(torch.int64)


def memory(tensor: Tensor) -> int:
    """Return the storage that a tensor shares with its views."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


# Messages -----------------------------------------------------------------------------------------------------------


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    if "_local_scalar_dense" in text or "is_nonzero" in text:
        return _READS
    return text.partition("\n")[0] or type(error).__name__


_PACKAGE = str(Path(__file__).parents[1])
_LIBRARIES = (*(str(Path(module.__file__).parent) for module in (torch, pyro) if module.__file__), _PACKAGE, "<")


def _is_users(file: str) -> bool:
    """Return whether a file is the user's own. The shipped pairs count as such."""
    return not file.startswith(_LIBRARIES) or file.startswith((f"{_PACKAGE}/models", "<ipython", "<stdin>"))


def where(trace: TracebackType | None) -> str:
    """Name the user's last line in a traceback; empty where there is none."""
    for frame, number in reversed(list(traceback.walk_tb(trace))):
        file = frame.f_code.co_filename
        if _is_users(file):
            line = linecache.getline(file, number).strip()
            return f", at {Path(file).name}:{number}" + (f": `{line}`" if line else "")
    return ""


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Warn at the user's line, once a process for each message."""
    if message not in _warned:
        _warned.add(message)
        warn(message)


def warn(message: str) -> None:
    """Warn at the user's line."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_stack(sys._getframe(1))]
    depth = next((depth for depth, file in enumerate(files) if _is_users(file)), 0)
    warnings.warn(message, RuntimeWarning, stacklevel=2 + depth)
