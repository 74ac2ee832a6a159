"""What functions read besides their arguments: the Python numbers and the tensors that a record takes for fixed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from operator import is_, itemgetter
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import pyro
from torch import Tensor, nn

from pyrovae.infer.log_weights import same_random_state

__all__ = ["Surroundings", "same_objects"]

_NUMBERS = (bool, int, float, complex, str, type(None))
_BOOKKEEPING = vars(nn.Module()).keys() - {"training"}


class Surroundings:
    """Attributes of the modules and objects that ``functions`` belong to, and the globals and closures that they name.

    What lies deeper (a number in a list, a global of a helper function) is not seen.
    """

    def __init__(self, *functions: Any) -> None:
        self._functions = functions
        self._states: list[tuple[list[Any], tuple]] = []
        self._state = 0  # which of them is the last
        self._last_glance: list[Any] = []
        self._look()

    def state(self) -> int:
        """A number that stands for all of it: it is the same as long as numbers are equal and objects the same."""
        # Nearly always every object is the one seen last, which this tells in a few microseconds.
        if not same_objects(self._glance(), self._last_glance):
            self._look()
            values, key = self._values(), self.key()
            keys = [known for _, known in self._states]
            self._state = keys.index(key) if key in keys else len(keys)
            # Holding on to the objects keeps their ids from being given to others.
            self._states[self._state : self._state + 1] = [(values, key)]
            self._last_glance = self._glance()
        return self._state

    def key(self, state: int | None = None) -> tuple:
        """What a state, or what all is now, comes down to. Unlike a state it shows a list that grows."""
        return tuple(map(_fingerprint, self._values())) if state is None else self._states[state][1]

    def difference(self, before: tuple, after: tuple) -> str:
        """What differs between two keys, by name."""
        names = self._names() if len(before) == len(after) == len(self._names()) else []
        different = [name for name, a, b in zip(names, before, after, strict=False) if a != b]
        return ", ".join(different[:3]) or "an attribute"

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Put all back afterwards, buffers and random states too: looking at a computation runs it."""
        buffers = [(buffer, buffer.detach().clone()) for m in self.modules for buffer in m.buffers(recurse=False)]
        attributes = [(space, dict(space)) for _, space in self._namespaces]
        lengths = [(value, len(value)) for value in self._values() if isinstance(value, list)]
        states = random.getstate(), np.random.get_state()  # noqa: NPY002
        try:
            with same_random_state():
                yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            for space, attribute in attributes:
                space.update({n: v for n, v in attribute.items() if isinstance(v, (*_NUMBERS, Tensor))})
            for values, length in lengths:
                del values[length:]
            for buffer, value in buffers:
                buffer.data.copy_(value)

    def _look(self) -> None:
        """Find what there is to watch; a module may have come in another's place."""
        self.modules: list[nn.Module] = []
        self._namespaces: list[tuple[str, dict]] = []
        self._globals: list[tuple[dict, str]] = []
        self._cells: list[tuple[Any, str]] = []
        self._met: set[int] = set()
        self._meet_all(self._functions)
        named = [(space, [name for name in space if name not in _BOOKKEEPING]) for _, space in self._namespaces]
        self._pickers = [(itemgetter(names[0], *names), space) for space, names in named if names]

    def _meet(self, thing: Any) -> None:
        if id(thing) in self._met or isinstance(thing, type | ModuleType):
            return
        self._met.add(id(thing))
        if isinstance(thing, nn.Module):
            self.modules.append(thing)
            for space in (vars(thing), thing._parameters, thing._buffers, thing._modules):
                self._namespaces.append((type(thing).__name__, space))
            self._meet_all([*thing.children(), *(v for v in vars(thing).values() if isinstance(v, tuple))])
        elif isinstance(thing, MethodType):
            self._meet_owner(thing.__self__)
        elif isinstance(thing, partial):
            self._meet_all([thing.func, *thing.args, *thing.keywords.values()])
        elif isinstance(thing, FunctionType):
            self._meet_function(thing, thing.__code__)
        elif isinstance(thing, tuple):
            self._meet_all(thing)

    def _meet_all(self, things: Any) -> None:
        for thing in things:
            self._meet(thing)

    def _meet_owner(self, owner: Any) -> None:
        if isinstance(owner, nn.Module) or not hasattr(owner, "__dict__") or isinstance(owner, type):
            self._meet(owner)
        elif id(owner) not in self._met:
            self._met.add(id(owner))
            self._namespaces.append((type(owner).__name__, vars(owner)))
            self._meet_all([v for v in vars(owner).values() if isinstance(v, nn.Module)])

    def _meet_function(self, function: FunctionType, code: CodeType) -> None:
        cells = list(zip(function.__closure__ or (), code.co_freevars, strict=True))
        named = {name: function.__globals__[name] for name in code.co_names if name in function.__globals__}
        self._cells += cells
        self._globals += [
            (function.__globals__, name)
            for name, value in named.items()
            if not isinstance(value, type | ModuleType) and not callable(value)
        ]
        self._meet_all([_content(cell) for cell, _ in cells])
        self._meet_all([value for value in named.values() if isinstance(value, nn.Module)])

    def _glance(self) -> list[Any]:
        """The objects without those that ``nn.Module`` keeps for itself, nine in ten; empty where one is gone."""
        try:
            attributes = [pick(space) for pick, space in self._pickers]
        except KeyError:
            return []
        return [*[len(space) for _, space in self._namespaces], *chain.from_iterable(attributes), *self._others()]

    def _values(self) -> list[Any]:
        return [*chain.from_iterable([space.values() for _, space in self._namespaces]), *self._others()]

    def _others(self) -> list[Any]:
        return [
            *[space.get(name) for space, name in self._globals],
            *[_content(cell) for cell, _ in self._cells],
            *pyro.get_param_store()._params.values(),
        ]

    def _names(self) -> list[str]:
        return [
            *(f"{owner}.{name}" for owner, space in self._namespaces for name in space),
            *(name for _, name in self._globals),
            *(name for _, name in self._cells),
            *pyro.get_param_store()._params,
        ]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty so far
        return None


def same_objects(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _fingerprint(value: Any) -> Any:
    if isinstance(value, list):
        return id(value), len(value)
    return value if isinstance(value, _NUMBERS) else id(value)
