"""The state of Python objects and tensors at one moment, to put it back: looking at a computation runs it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import is_
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyrovae.infer.reads import CONTAINERS, MOST_MEMBERS, NUMBERS, attributes, is_of_a_library, members
from pyrovae.infer.untraceable import memory

__all__ = ["Contents", "Writes", "generators", "reached", "same_objects"]

MOST_REACHED = 2000
"""The nearest first."""
MOST_NUMBERS = 2**24
"""Larger arrays are data, which no model changes."""


def same_objects(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def reached(values: Iterable[Any]) -> Iterator[Any]:
    """The values, what containers and a user's own objects among them hold, and so on."""
    waiting, seen, left = deque(values), set(), MOST_REACHED
    while waiting and left:
        value = waiting.popleft()
        if isinstance(value, (*NUMBERS, Tensor, type, nn.Module)) or id(value) in seen:
            continue
        seen.add(id(value))
        left -= 1
        yield value
        if isinstance(value, CONTAINERS) and len(value) <= MOST_MEMBERS:
            waiting += members(value)
        elif _is_users_object(value):
            waiting += attributes(value).values()


def _is_users_object(value: Any) -> bool:
    try:
        return bool(attributes(value)) and (isinstance(value, SimpleNamespace) or not is_of_a_library(type(value)))
    except Exception:  # it does not want to be looked at
        return False


class Contents:
    """Of the containers, arrays and a user's own objects (their numbers) among what is :func:`reached`."""

    def __init__(self, things: Iterable[Any]) -> None:
        self._saved = [(thing, self._content(thing)) for thing in things if self._has_content(thing)]

    def changed(self) -> Any:
        """One that is not as it was; None where all are."""
        return next((value for value, content in self._saved if not _same(self._content(value), content)), None)

    def put_back(self) -> None:
        for value, content in self._saved:
            if _same(self._content(value), content):
                continue  # what nothing has changed may be read-only
            if isinstance(value, np.ndarray):
                value[...] = content
            elif isinstance(value, list):
                list.__setitem__(value, slice(None), content)
            elif isinstance(value, dict):
                dict.clear(value)
                dict.update(value, content)
            elif isinstance(value, set):
                set.clear(value)
                set.update(value, content)
            elif isinstance(value, deque):
                deque.clear(value)
                deque.extend(value, content)
            else:
                attributes(value).update(content)

    @staticmethod
    def _has_content(value: Any) -> bool:
        if isinstance(value, np.ndarray):
            return value.size <= MOST_NUMBERS and value.dtype != object
        if isinstance(value, CONTAINERS):
            return not isinstance(value, tuple)
        return _is_users_object(value)

    @staticmethod
    def _content(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value.copy()
        if isinstance(value, dict):
            return dict(dict.items(value))
        if isinstance(value, CONTAINERS):
            return list(members(value))
        return {name: each for name, each in attributes(value).items() if isinstance(each, NUMBERS)}


def _same(now: Any, before: Any) -> bool:
    if isinstance(now, np.ndarray):
        return now.tobytes() == before.tobytes()
    if isinstance(now, dict):
        return _same(list(now), list(before)) and _same(list(now.values()), list(before.values()))
    return same_objects(now, before) or (len(now) == len(before) and all(map(_is_equal, now, before)))


def _is_equal(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, NUMBERS) and type(one) is type(other) and one == other)


def generators(things: Iterable[Any]) -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """How to read and to set the states of Python's and NumPy's generators: the global ones, and those among things."""
    found: list[Any] = [(random.getstate, random.setstate), (np.random.get_state, np.random.set_state)]
    for value in things:
        if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
            found.append((value.getstate, value.setstate))
        elif isinstance(value, np.random.RandomState):
            found.append((value.get_state, value.set_state))
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator
            found.append((partial(getattr, bits, "state"), partial(setattr, bits, "state")))
    return found


class Writes(TorchDispatchMode):
    """Keeps what those tensors held that were there before, and are written to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[tuple[Tensor, Tensor]] = []
        self._known: WeakValueDictionary[int, Tensor] = WeakValueDictionary()  # by memory: made since, or saved

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[index] if index < len(args) else kwargs.get(argument.name)
                for tensor in given if isinstance(given, list | tuple) else [given]:
                    self._save(tensor)
        result = func(*args, **kwargs)
        results = result if isinstance(result, list | tuple) else [result]
        for tensor, of in zip(results, func._schema.returns, strict=False):
            if of.alias_info is None and _is_plain(tensor):  # no view of another
                self._known[memory(tensor)] = tensor
        return result

    def _save(self, tensor: Any) -> None:
        if _is_plain(tensor) and memory(tensor) not in self._known:
            whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
            self._known[memory(tensor)] = whole
            self.saved.append((whole, whole.clone()))

    def put_back(self) -> None:
        for tensor, value in self.saved:
            tensor.copy_(value)


def _is_plain(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.layout is torch.strided
