"""A computation below Pyro: recorded once as a graph of tensor operations, compiled, replayed.

Pyro's handlers, traces and distributions run once, while ``make_fx`` records what they do to tensors. The record has no
Python left in it, so it compiles whole. What a record cannot hold (control flow on values, Python-side state) is found
out, and the caller goes on without one.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae.infer.log_weights import same_random_state

__all__ = ["Program", "Untraceable", "say_once"]


class Untraceable(RuntimeError):
    """The computation is no fixed graph of tensor operations. The message says why, and at which line."""


class Program:
    """``function`` of tensors, recorded at ``args`` and good for arguments of the same shapes, dtypes and devices.

    Every other tensor that it touches (parameters, buffers, data) is read anew at each call, so in-place changes count.
    Random numbers are drawn anew at each call, in the order and from the generator of the original. ``buffers`` are
    those that ``function`` may change: looking at it does not.

    Raises:
        Untraceable: it reads a tensor's value into Python, or two records of it differ.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Tensor, ...], buffers: Sequence[Tensor] = ()) -> None:
        self._buffers = list(buffers)
        with _unchanged(self._buffers):
            self.graph, self.inputs = _record(function, args)
            again, inputs = _record(function, args)
        _check_same(self.graph, self.inputs, again, inputs)
        self._run: Callable[..., Any] = self.graph
        self.is_compiled = False

    def compile(self, args: tuple[Tensor, ...]) -> None:
        """Compile with TorchInductor; without a compiler, say so once and go on with the record as it is."""
        try:
            import torch._inductor

            with torch.no_grad(), same_random_state(), _unchanged(self._buffers):
                # Random operations stay torch's own, so that compiled and recorded noise are equal.
                run = torch._inductor.compile(self.graph, [*self.inputs, *args], options={"fallback_random": True})
                run(*self.inputs, *args)
        except Exception as error:  # whatever stops a compiler, the record still runs
            reason = str(error).strip().splitlines() or [type(error).__name__]
            say_once(f"pyrovae: cannot compile the step here ({reason[0]}); it runs recorded, but not compiled.")
            return
        self._run, self.is_compiled = run, True

    def __call__(self, *args: Tensor) -> Any:
        with torch.no_grad():
            return self._run(*self.inputs, *args)


@contextmanager
def _unchanged(buffers: list[Tensor]) -> Iterator[None]:
    """Put buffers (running means, say) back to what they were: looking at a computation runs it."""
    copies = [buffer.detach().clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, copies, strict=True):
            buffer.data.copy_(value)


_said: set[str] = set()


def say_once(message: str) -> None:
    """Warn, the first time in this process."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


# Recording ------------------------------------------------------------------------------------------------------


def _record(function: Callable[..., Any], args: tuple[Tensor, ...]) -> tuple[GraphModule, list[Tensor]]:
    """The graph of ``function``, and the tensors besides ``args`` that are its first inputs."""
    try:
        with same_random_state(), pyro.validation_enabled(False):
            graph = make_fx(function)(*args)
    except Exception as error:
        raise Untraceable(f"{_reason(error)}{_where(error.__traceback__)}") from error
    return _lift_constants(graph)


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
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph, [tensor for _, tensor in lifted.values()]


def _check_same(first: GraphModule, inputs: list[Tensor], second: GraphModule, again: list[Tensor]) -> None:
    """Python-side state (a counter, a schedule) shows as a difference between two records."""
    for a, b in zip(_lines(first), _lines(second), strict=False):
        if a != b:
            raise Untraceable(f"it does something else each time it runs: first `{a}`, then `{b}`")
    same_inputs = len(inputs) == len(again) and all(
        a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b)))
        for a, b in zip(inputs, again, strict=True)
    )
    if len(_lines(first)) != len(_lines(second)) or not same_inputs:
        raise Untraceable("it does something else each time it runs")


def _lines(graph: GraphModule) -> list[str]:
    return [line.split(";")[0].strip() for line in graph.code.splitlines()]


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [type(error).__name__]
    if "_local_scalar_dense" in str(error) or "is_nonzero" in str(error):
        return "it reads the value of a tensor into Python (.item(), float(), or an `if` on a tensor)"
    return text[0]


_LIBRARIES = tuple(
    str(Path(module.__file__).parent) for module in (torch, pyro, sys.modules[__package__]) if module.__file__
)


def _where(trace: TracebackType | None) -> str:
    """The last line of the user's own in a traceback."""
    frames = [f for f in traceback.extract_tb(trace) if not f.filename.startswith((*_LIBRARIES, "<"))]
    return f", at {Path(frames[-1].filename).name}:{frames[-1].lineno}: `{frames[-1].line}`" if frames else ""
