"""The arguments of a step: the tensors that a program takes, and the rest, which its record holds fixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

__all__ = ["Arguments"]

_FIXED = (bool, int, float, str, type(None))


class Arguments(NamedTuple):
    """``args`` and ``kwargs``, taken apart; tensors in tuples, lists and dicts are found."""

    tensors: tuple[Tensor, ...]
    spec: TreeSpec | None = None
    """Where everything goes; None where there are tensors only, one after another."""
    kinds: tuple[type, ...] = ()
    fixed: tuple[Any, ...] = ()
    """Everything, with ``...`` in the place of each tensor."""

    @staticmethod
    def of(args: tuple, kwargs: dict, as_tensor: Callable[[float], Tensor] | None) -> Arguments:
        """Floats become tensors by ``as_tensor``; without it they are held fixed too.

        Raises:
            TypeError: there is one of another type, or a tensor that wants a gradient.
        """
        spec: TreeSpec | None = None
        leaves = list(args)
        if kwargs or not all(isinstance(arg, Tensor) for arg in args):
            leaves, spec = tree_flatten((args, kwargs))
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            raise TypeError("an argument that wants a gradient is not recorded")
        if spec is None:
            return Arguments(args)
        kinds = tuple(map(type, leaves))
        for leaf, kind in zip(leaves, kinds, strict=True):
            if not isinstance(leaf, (Tensor, *_FIXED)):
                raise TypeError(f"an argument of type {kind.__module__}.{kind.__qualname__} is not recorded")
        if as_tensor is not None:
            leaves = [as_tensor(leaf) if isinstance(leaf, float) else leaf for leaf in leaves]
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        return Arguments(tensors, spec, kinds, tuple(... if isinstance(leaf, Tensor) else leaf for leaf in leaves))

    @property
    def has_floats(self) -> bool:
        return any(issubclass(kind, float) for kind in self.kinds)

    def put_together(self, tensors: tuple[Tensor, ...], *, as_floats: bool = False) -> tuple[tuple, dict]:
        """``args`` and ``kwargs`` again, with ``tensors`` in the place of these. Floats may be floats again."""
        if self.spec is None:
            return tensors, {}
        rest = iter(tensors)
        leaves = [next(rest) if leaf is ... else leaf for leaf in self.fixed]
        if as_floats:
            leaves = [float(x) if issubclass(kind, float) else x for x, kind in zip(leaves, self.kinds, strict=True)]
        return tree_unflatten(leaves, self.spec)

    def key(self) -> tuple:
        """Arguments of one key differ in nothing but their tensors' values."""
        shapes = [(arg.shape, arg.stride(), arg.dtype, arg.device) for arg in self.tensors]
        return (self.spec, self.kinds, self.fixed, *shapes)
