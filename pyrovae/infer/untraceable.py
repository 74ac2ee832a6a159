"""What no record can hold, and at which line: values that are read into Python, shapes that depend on values."""

from __future__ import annotations

import linecache
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.nn.functional import embedding, one_hot
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "READING",
    "Conversions",
    "NoKey",
    "Untraceable",
    "Values",
    "depth_in_libraries",
    "memory",
    "reason",
    "recordable",
    "tensors_in",
    "where",
]


class Untraceable(RuntimeError):
    """The computation is no fixed graph of tensor operations. The message says why, and at which line."""


class NoKey(Tensor):
    """Stands for a Python number, which is equal to another of its value, while a tensor is equal to itself alone."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __hash__(self) -> int:
        raise Untraceable("a number that changes is looked up by its value (in a dict, a set or a cache)")


class Values(TorchDispatchMode):
    """Refuses to read a tensor's value into Python, and operations the shape of whose result depends on values.

    And jumps (rounding, comparing) of what is computed of ``NoKey`` alone: Python computes it in double precision.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read = ""
        """What was refused first, and where."""
        self._constants: dict[int, Tensor] = {}  # made of nothing but Python numbers
        self._numbers: dict[int, Tensor] = {}  # made of nothing but those that change

    def refuse(self, reason: str) -> None:
        self.read = self.read or reason + where(sys._getframe(2))
        raise Untraceable(reason)

    def are_constant(self, values: Any) -> bool:
        return all(memory(tensor) in self._constants for tensor in tensors_in(values))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        random = torch.Tag.nondeterministic_seeded in func.tags
        fixed = func is torch.ops.aten.lift_fresh.default or (not random and self.are_constant((args, kwargs)))
        if torch.Tag.data_dependent_output in func.tags and not fixed:
            self.refuse(_READS)
        if torch.Tag.dynamic_output_shape in func.tags and not fixed:
            masks = (
                [i for i in args[1] if i is not None and i.dtype in _MASKS]
                if func is torch.ops.aten.index.Tensor
                else (args, kwargs)
            )
            if not self.are_constant(masks):
                self.refuse("the shape of a result depends on values (a boolean index, nonzero, unique)")
        among = tensors_in((args, kwargs))
        numbers = [x for x in among if isinstance(x, NoKey) or memory(x) in self._numbers]
        scalar = bool(numbers) and all(x.ndim == 0 for x in among)
        if scalar and (func.overloadpacket.__name__ in _JUMPS or kwargs.get("rounding_mode")):
            self.refuse("it rounds or compares a number that changes")
        result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            for known, belongs in ((self._constants, fixed), (self._numbers, scalar)):
                known.pop(memory(tensor), None)
                if belongs:
                    known[memory(tensor)] = tensor
        return result


class Conversions(TorchFunctionMode):
    """Refuses those that are no operations: they read memory."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self._values = values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _TO_NUMPY or (func is Tensor.tolist and not self._values.are_constant(args)):
            self._values.refuse(f"it reads the values of a tensor into Python (.{func.__name__}())")
        reads = func in (*_TO_NUMBERS, *_TO_TEXT) or (
            func in _SPLITS and _is_split_at_a_tensor(*args, **(kwargs or {}))
        )
        if reads and not self._values.are_constant(args):
            self._values.refuse(_READS)
        given = [x for x in (*args, *(kwargs or {}).values()) if not isinstance(x, Tensor)]
        if func in _FROM_NUMBERS and not self._values.are_constant(given):
            self._values.refuse("it makes a tensor of a list of tensors, or of numbers that change (use torch.stack)")
        return recordable(func)(*args, **(kwargs or {}))


_TO_NUMPY = (Tensor.numpy, Tensor.__array__, Tensor.__dlpack__)  # which may write to it, too
_TO_TEXT = (Tensor.__repr__, Tensor.__str__, Tensor.__format__)
_TO_NUMBERS = (Tensor.item, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.__bool__, Tensor.__complex__)
READING = (Tensor.tolist, *_TO_NUMBERS)
"""What reads values into Python, where they are constants."""
_SPLITS = (torch.tensor_split, Tensor.tensor_split)
_FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor, Tensor.new)
_JUMPS = {
    *("remainder", "fmod", "floor", "ceil", "round", "trunc", "frac", "floor_divide", "sign"),
    *("eq", "ne", "lt", "le", "gt", "ge"),
}
_MASKS = (torch.bool, torch.uint8)


def recordable(func: Callable) -> Callable:
    """Torch's function, or one that does the same without reading values."""
    return _one_hot if func is one_hot else func


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """On CPU torch's reads the least and the largest class, to check them; an embedding checks them too."""
    if not tensor.is_cpu or num_classes < 1 or tensor.dtype is not torch.int64 or tensor.numel() == 0:
        return one_hot(tensor, num_classes)
    classes = torch.arange(num_classes)
    return (embedding(tensor, classes.unsqueeze(-1)) == classes).to(torch.int64)


def _is_split_at_a_tensor(_: Tensor, at: Any = None, *args: Any, **kwargs: Any) -> bool:
    return any(isinstance(x, Tensor) for x in (at, *kwargs.values()))


def memory(tensor: Tensor) -> int:
    """What a tensor shares with its views."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def tensors_in(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


_READS = "it reads the value of a tensor into Python (.item(), float(), or an `if` on a tensor)"


def reason(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [type(error).__name__]
    if "_local_scalar_dense" in str(error) or "is_nonzero" in str(error):
        return _READS
    return text[0]


_LIBRARIES = (
    *(str(Path(module.__file__).parent) for module in (torch, pyro) if module.__file__),
    str(Path(__file__).parent),
    str(Path(__file__).parents[1] / "pair.py"),  # which only passes calls on
)
_TELLING = ("pyro.contrib", "pyro.distributions", "pyro.infer", "pyro.nn", "torch.distributions", "torch.nn")
"""Modules of theirs whose functions a user knows by name, or by what calls them."""
_STEPS = str(Path(__file__).with_name("svi.py"))


def depth_in_libraries(frame: FrameType) -> int:
    """How many calls of ours, Pyro's or torch's lie between it and the user's own."""
    files = (each.f_code.co_filename for each, _ in traceback.walk_stack(frame))
    return next((depth for depth, file in enumerate(files) if not file.startswith(_LIBRARIES)), 0)


def where(place: TracebackType | FrameType | None) -> str:
    """The last line of the user's own in a traceback, or in the stack of a frame; if none is, a library's function."""
    if isinstance(place, TracebackType):
        lines = [(frame, number) for frame, number in traceback.walk_tb(place)][::-1]
    else:
        lines = list(traceback.walk_stack(place))
    of_library = ""
    for frame, number in lines:
        file = frame.f_code.co_filename
        if file == _STEPS and frame.f_code.co_name == "step":  # lines further out only ask for it
            break
        if not file.startswith((*_LIBRARIES, "<")) or file.startswith(("<ipython", "<stdin>")):
            line = linecache.getline(file, number).strip()
            return f", at {Path(file).name}:{number}" + (f": `{line}`" if line else "")
        module = str(frame.f_globals.get("__name__"))
        if not of_library and module.startswith(_TELLING):
            of_library = f", in {module} ({frame.f_code.co_name})"
    return of_library
