"""Recording of a function of tensors, so that its many calls run without Pyro's Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyrovae.infer.program import Program, Untraceable, or_eagerly, say_once
from pyrovae.infer.surroundings import Surroundings

__all__ = ["recorded"]


def recorded(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], reads: tuple[Callable, ...], title: str, *, compiles: bool
) -> Callable[..., Any]:
    """Return ``function`` recorded, for inputs of these shapes, and compiled if asked.

    Where it cannot be recorded, say so once and return the function itself.

    Args:
        function: a function of tensors that returns a tensor or a tuple of tensors.
        inputs: example inputs.
        reads: the models and guides that the function runs, whose parameters and settings it reads.
        title: what runs, for the message.
        compiles: whether to compile the record.
    """
    try:
        program = Program(function, inputs, Surroundings(*reads))
    except Untraceable as error:
        say_once(f"pyrovae: {title} runs eagerly: {error}.")
        return function
    if compiles:
        program.compile(inputs)
    return or_eagerly(program, function)
