"""The Python side of a pair that a recorded step holds fixed."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_, itemgetter
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyrovae.infer.adam import steps_by_itself
from pyrovae.infer.record import PLAIN

__all__ = ["Setting"]


class Setting:
    """Plain attributes and tensors of modules and losses, what an optimizer trains with which options, and torch's
    switches. A step is recorded for one value of all this.

    Args:
        parts: model, guide, loss: functions, methods, modules or losses.
        optimizer: the optimizer.
    """

    def __init__(self, parts: Sequence[Any], optimizer: Optimizer) -> None:
        owners = [getattr(part, "__self__", part) for part in parts]
        self.modules = list(dict.fromkeys(owner for owner in owners if isinstance(owner, nn.Module)))
        self._others = [owner for owner in owners if not isinstance(owner, nn.Module) and hasattr(owner, "__dict__")]
        self._optimizer = optimizer
        self._seen: list[Any] = []
        self._seen_layouts: list[tuple] = []
        self._keys: dict[tuple, int] = {}
        self._described: list[tuple[list[str], tuple, list[Any]]] = []  # by key: names, values, objects, kept alive
        self._key = -1
        self._find()

    def key(self) -> int:
        """Number the present setting. Nearly always every object is the one seen last, which takes microseconds."""
        try:
            values, layouts = self._values(), self._layouts()
        except KeyError:  # an attribute is gone
            values, layouts = [], []
        if layouts != self._seen_layouts or len(values) != len(self._seen) or not all(map(is_, values, self._seen)):
            self._find()
            self._seen, self._seen_layouts = self._values(), self._layouts()
            plain = [(type(x), x) if isinstance(x, (*PLAIN, tuple, torch.dtype)) else id(x) for x in self._seen]
            described = (*plain, *self._seen_layouts)
            self._key = self._keys.setdefault(described, len(self._keys))
            if self._key == len(self._described):
                self._described.append((self._names(), described, self._seen))
        return self._key

    def difference(self, one: int, other: int) -> str:
        """Name the first thing that differs between two settings; empty where they are one."""
        names, values, _ = self._described[one]
        others, other_values, _ = self._described[other]
        if names != others:
            return "which attributes and tensors the pair has"
        return next((n for n, a, b in zip(names, values, other_values, strict=True) if a != b), "")

    def _find(self) -> None:
        """List where to look."""
        modules = [module for root in self.modules for module in root.modules()]
        owners = [*modules, *self._others]
        of_owner = [(owner, [n for n, v in vars(owner).items() if isinstance(v, PLAIN)]) for owner in owners]
        options = [(group, [n for n in group if n not in ("params", "lr")]) for group in self._optimizer.param_groups]
        self._plain = [(vars(owner), itemgetter(*names, *names[:1])) for owner, names in of_owner if names]
        self._options = [itemgetter(*names, names[0]) for _, names in options]  # two or more give a tuple
        self._labels = [f"{type(owner).__name__}.{n}" for owner, names in of_owner for n in [*names, *names[:1]]]
        self._labels += [f"the optimizer's {n}" for _, names in options for n in [*names, names[0]]]
        self._spaces = [*map(vars, owners)]
        self._members = [held for m in modules for held in (m._parameters, m._buffers, m._modules)]
        self._tensors = [x for held in self._members for x in held.values() if isinstance(x, Tensor)]

    def _values(self) -> list[Any]:
        values: list[Any] = []
        for space, get in (*self._plain, *zip(self._optimizer.param_groups, self._options, strict=False)):
            values += get(space)
        values += (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.is_autocast_enabled("cuda"),
            steps_by_itself(self._optimizer),
        )
        values += map(len, self._spaces)
        for held in self._members:
            values += held.values()
        values += pyro.get_param_store()._params.values()
        for group in self._optimizer.param_groups:
            values += group["params"]
            values += [p.requires_grad for p in group["params"]]
        return values

    def _layouts(self) -> list[tuple]:
        return [(x.shape, x.stride(), x.dtype, x.device) for x in self._tensors]

    def _names(self) -> list[str]:
        """Name the values. Past the plain ones come tensors and their layouts."""
        switches = ["torch's default dtype", "torch.no_grad()", "autocast", "autocast", "a hook of the optimizer"]
        names = [*self._labels, *switches]
        return names + ["a parameter or buffer"] * (len(self._seen) + len(self._tensors) - len(names))
