"""The arguments of a step: the tensors that a program takes, and the rest, which its record holds fixed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

__all__ = ["Arguments", "kind_of_call"]

_FIXED = (bool, int, float, str, type(None))


class Arguments(NamedTuple):
    """``args`` and ``kwargs``, taken apart; tensors in tuples, lists and dicts are found."""

    tensors: tuple[Tensor, ...]
    spec: Any = None
    """Where everything goes; None where there are tensors only, one after another."""
    kinds: tuple[type, ...] = ()
    fixed: tuple[Any, ...] = ()
    """Everything, with ``...`` in the place of each tensor."""

    @staticmethod
    def of(args: tuple, kwargs: dict) -> Arguments:
        """
        Raises:
            TypeError: there is one of another type, or a tensor that is more than shape and values.
        """
        leaves, spec = _leaves(args, kwargs)
        tensors = tuple([leaf for leaf in leaves if isinstance(leaf, Tensor)])
        for tensor in tensors:
            if tensor.requires_grad:
                raise TypeError("an argument that wants a gradient is not recorded")
            if tensor.layout is not torch.strided or tensor.is_nested:
                raise TypeError("a sparse or nested argument is not recorded")
            if tensor.is_neg() or tensor.is_conj():
                raise TypeError("an argument that is negated or conjugated when read is not recorded (see resolve_neg)")
            # torch.compile notes something there too, under private names.
            own = [name for name in tensor.__dict__ if not name.startswith("_")]
            if type(tensor) not in (Tensor, nn.Parameter) or own:
                raise TypeError("a tensor with attributes or methods of its own, as an argument, is not recorded")
        if spec == (len(tensors), ()):
            return Arguments(tensors)
        kinds = tuple(map(type, leaves))
        for leaf, kind in zip(leaves, kinds, strict=True):
            if not isinstance(leaf, (Tensor, *_FIXED)):
                raise TypeError(f"an argument of type {kind.__module__}.{kind.__qualname__} is not recorded")
        return Arguments(tensors, spec, kinds, tuple(... if isinstance(leaf, Tensor) else leaf for leaf in leaves))

    @property
    def has_floats(self) -> bool:
        return any(issubclass(kind, float) for kind in self.kinds)

    def call(self) -> tuple:
        """Calls of one kind differ in tensors and floats alone."""
        fixed = tuple(... if isinstance(leaf, float) else leaf for leaf in self.fixed)
        return (len(self.tensors) if self.spec is None else self.spec), self.kinds, fixed

    def with_floats_as_tensors(self, as_tensor: Callable[[float], Tensor]) -> Arguments:
        given = iter(self.tensors)
        leaves = [
            next(given) if leaf is ... else as_tensor(leaf) if isinstance(leaf, float) else leaf for leaf in self.fixed
        ]
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        return self._replace(tensors=tensors, fixed=self.call()[2])

    def put_together(self, tensors: tuple[Tensor, ...], *, as_floats: bool = False) -> tuple[tuple, dict]:
        """``args`` and ``kwargs`` again, with ``tensors`` in the place of these. Floats may be floats again."""
        if self.spec is None:
            return tensors, {}
        rest = iter(tensors)
        leaves = [next(rest) if leaf is ... else leaf for leaf in self.fixed]
        if as_floats:
            leaves = [float(x) if issubclass(kind, float) else x for x, kind in zip(leaves, self.kinds, strict=True)]
        if isinstance(self.spec, TreeSpec):
            return tree_unflatten(leaves, self.spec)
        number, names = self.spec
        return tuple(leaves[:number]), dict(zip(names, leaves[number:], strict=True))

    def shapes(self) -> list[tuple]:
        return [(arg.shape, arg.stride(), arg.dtype, arg.device) for arg in self.tensors]

    def key(self) -> tuple:
        """Arguments of one key differ in nothing but their tensors' values."""
        return (self.spec, self.kinds, self.fixed, *self.shapes())


def kind_of_call(args: tuple, kwargs: dict) -> Hashable:
    """Which arguments are tensors or numbers, one standing for the other, which are None, and what switches say."""
    leaves, spec = _leaves(args, kwargs)
    return spec, tuple(
        [x if isinstance(x, bool) else Tensor if isinstance(x, Tensor | int | float) else type(x) for x in leaves]
    )


def _leaves(args: tuple, kwargs: dict) -> tuple[list[Any], Any]:
    """The arguments that are no containers, and where they go."""
    leaves = [*args, *kwargs.values()]
    if any(isinstance(leaf, tuple | list | dict) for leaf in leaves):
        return tree_flatten((args, kwargs))  # ten times slower
    return leaves, (len(args), tuple(kwargs))
