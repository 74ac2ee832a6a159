"""A compiled step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyrovae.infer.record import warn_once

__all__ = ["WARM_UP", "Captured"]

WARM_UP = 3


class Captured:
    """CUDA graph of ``run``: arguments are copied in, the result is copied out, and nothing waits.

    The first three calls run as they are, on the stream that is captured then: libraries set themselves up there. A
    graph reads and writes fixed addresses, so it is captured again when a tensor that it holds lies elsewhere. Random
    numbers are fresh at each replay, as if ``run`` had been called. What cannot be captured runs as it is, with one
    warning.
    """

    def __init__(self, run: Callable[..., Tensor]) -> None:
        self._run = run
        self._stream = torch.cuda.Stream()
        self._calls = 0
        self._addresses: list[int] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._failed: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._result = torch.empty(())

    def __call__(self, held: Sequence[Tensor], args: Sequence[Tensor]) -> Tensor:
        """Return ``run(*held, *args)``. ``held`` are read where they lie, and ``args`` are copied."""
        self._calls += 1
        if self._failed is not None or self._calls <= WARM_UP:
            return self._call(held, args)
        addresses = [x.data_ptr() for x in held]
        if self._graph is None or addresses != self._addresses:
            self._addresses, self._graph = addresses, None  # the old graph's memory is free for the next
            self._capture(held, args)
            if self._graph is None:
                return self._call(held, args)
        for own, arg in zip(self._inputs, args, strict=True):
            own.copy_(arg)
        self._graph.replay()
        return self._result.clone()

    def _call(self, held: Sequence[Tensor], args: Sequence[Tensor]) -> Tensor:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self._run(*held, *args)
        current.wait_stream(self._stream)
        return result.clone()

    def _capture(self, held: Sequence[Tensor], args: Sequence[Tensor]) -> None:
        current = torch.cuda.current_stream()
        self._inputs = [arg.clone() for arg in args]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._result = self._run(*held, *self._inputs)
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own
            self._failed = graph  # its memory pool refers to it
            cause = error.__context__ or error  # what stopped it; then its end failed too
            warn_once(f"pyrovae: this step runs without a CUDA graph: {str(cause).strip().splitlines()[0]}")
            return
        self._graph = graph
