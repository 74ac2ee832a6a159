"""A step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from pyrovae.infer.program import say_once
from pyrovae.infer.snapshot import same_objects
from pyrovae.infer.update import Update

__all__ = ["Captured", "why_not"]

WARM_UP = 3


class Captured:
    """``step``, captured once and replayed: arguments are copied in, the loss is copied out, and nothing waits.

    The first three steps run as they are, on the stream that is captured then: libraries set themselves up there, and
    the optimizer makes its state. A graph reads and writes fixed addresses, so it is captured again when ``update`` has
    other tensors or options, or ``tensors``, which the step reads, lie elsewhere. Random numbers are fresh at each
    replay, as if the step had run.
    """

    def __init__(self, step: Callable[..., Tensor], update: Update, tensors: Sequence[Tensor]) -> None:
        self._step, self._update, self._tensors = step, update, tensors
        self._stream = torch.cuda.Stream()
        self._steps = 0
        self._fixed: list = []
        self._addresses: list[int] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._loss = torch.empty(())
        self._failed: torch.cuda.CUDAGraph | None = None

    def __call__(self, *args: Tensor) -> Tensor:
        self._steps += 1
        if self._failed is not None or self._steps <= WARM_UP:
            return self._warm_up(*args)
        fixed = [*self._tensors, *self._update.fixed()]
        addresses = [each.data_ptr() for each in fixed if isinstance(each, Tensor)]
        if self._graph is None or addresses != self._addresses or not same_objects(fixed, self._fixed):
            self._fixed, self._addresses = fixed, addresses
            self._graph = None  # its memory is free for the next
            if self._update.is_capturable:  # a state dict may have brought a learning rate that is not on the GPU
                self._capture(*args)
            if self._graph is None:
                return self._warm_up(*args)
        for held, arg in zip(self._inputs, args, strict=True):
            held.copy_(arg)
        self._graph.replay()
        return self._loss.clone()

    def _warm_up(self, *args: Tensor) -> Tensor:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = self._step(*args)
        current.wait_stream(self._stream)
        return loss.clone()

    def _capture(self, *args: Tensor) -> None:
        current = torch.cuda.current_stream()
        self._inputs = [arg.clone() for arg in args]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._loss = self._step(*self._inputs)
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own
            self._failed = graph  # its memory pool refers to it
            self._end_capturing(current)
            cause = error.__context__ or error  # what stopped it; then its end failed too
            say_once(f"pyrovae: this step runs without a CUDA graph: {str(cause).strip().splitlines()[0]}")
            return
        self._graph = graph

    def _end_capturing(self, current: Any) -> None:
        """After a capture that fails, torch's generator takes itself to be captured, until a capture succeeds."""
        empty = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream, capture_error_mode="thread_local")
        with suppress(RuntimeError), empty:
            torch.zeros((), device=[*self._inputs, *self._tensors][0].device)
        torch.cuda.set_stream(current)


def why_not(tensors: Sequence[Tensor], update: Update) -> str:
    """Why a step that reads these tensors cannot be captured; empty where it can."""
    if not all(tensor.is_cuda for tensor in tensors):
        return "it reads a tensor that does not lie on the GPU"
    if not update.is_capturable:
        return (
            "the optimizer reads Python numbers; make it as torch.optim.Adam(parameters, "
            "lr=torch.tensor(1e-3, device='cuda'), capturable=True)"
        )
    return ""
