"""The state of Python objects and tensors at one moment, to put it back: looking at a computation runs it."""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from inspect import getattr_static
from operator import is_, itemgetter
from types import MemberDescriptorType
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.distributions import Transform
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from pyrovae.infer.reads import (
    CONTAINERS,
    MOST_MEMBERS,
    NUMBERS,
    attributes,
    is_of_a_library,
    is_of_users_kind,
    members,
    own_slots,
)
from pyrovae.infer.stand_ins import Place, kind_of_dict
from pyrovae.infer.untraceable import memory

__all__ = [
    "Contents",
    "Memories",
    "Writes",
    "generators",
    "is_equal",
    "is_made_anew",
    "is_users_object",
    "own_attributes",
    "put_back",
    "put_back_names",
    "reached",
    "same_objects",
]

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
        if is_users_object(value):
            waiting += own_attributes(value).values()


def is_users_object(value: Any) -> bool:
    try:
        own_attributes(value)
        return is_of_users_kind(value)
    except Exception:  # it does not want to be looked at
        return False


def own_attributes(thing: Any) -> dict[str, Any]:
    """Those in slots too."""
    return attributes(thing) | _slots(thing)


def _slots(thing: Any) -> dict[str, Any]:
    """Those that are filled, of the user's own classes."""
    found: dict[str, Any] = {}
    for kind in type(thing).__mro__:
        for name in () if is_of_a_library(kind) else own_slots(kind):
            with suppress(AttributeError):
                found[name] = vars(kind)[name].__get__(thing)
    return found


class Contents:
    """Of the containers, arrays and a user's own objects (their attributes) among what is :func:`reached`."""

    def __init__(self, things: Iterable[Any]) -> None:
        self._saved = [(thing, read, read(thing)) for thing in things for read in _readers(thing)]

    def changed(self) -> Any:
        """One that is not as it was; None where all are. What a library's object holds is its own business."""
        return next((value for value, read, content in self._saved if _differs(value, read, content)), None)

    def put_back(self) -> None:
        for value, read, content in self._saved:
            if read is own_attributes:
                _put_back_attributes(value, content)
            elif not _same(read(value), content):  # what nothing has changed may be read-only
                _fill(value, content)


def _readers(value: Any) -> Iterator[Callable[[Any], Any]]:
    """Of what it consists in."""
    if isinstance(value, np.ndarray):
        if value.size <= MOST_NUMBERS and value.dtype != object:
            yield np.copy
    elif isinstance(value, bytearray | array):
        if len(value) <= MOST_NUMBERS:
            yield itemgetter(slice(None))
    elif isinstance(value, dict):
        yield _entries_of_dict
    elif isinstance(value, CONTAINERS) and not isinstance(value, tuple):
        yield _entries
    if is_users_object(value):
        yield own_attributes


def _entries(value: Any) -> list[Any]:
    return list(members(value))


def _entries_of_dict(value: dict) -> dict[Any, Any]:
    return dict(kind_of_dict(value).items(value))


def _fill(value: Any, content: Any) -> None:
    if isinstance(value, np.ndarray):
        value[...] = content
    elif isinstance(value, bytearray | array):
        value[:] = content
    elif isinstance(value, list):
        list.__setitem__(value, slice(None), content)
    elif isinstance(value, dict):
        kind_of_dict(value).clear(value)
        for name, each in content.items():
            kind_of_dict(value).__setitem__(value, name, each)
    elif isinstance(value, set):
        set.clear(value)
        set.update(value, content)
    elif isinstance(value, deque):
        deque.clear(value)
        deque.extend(value, content)


def put_back(place: Place, existed: bool, value: Any) -> None:
    """As it was. An object that has come is no part of a record: it was set up at its first use."""
    if existed:
        if not place.exists() or place.reader()() is not value:
            place.write(value)
    elif place.exists() and _is_plain(place.reader()()):
        place.remove()


def put_back_names(space: dict[str, Any], before: dict[str, Any]) -> None:
    for name in {**before, **space}:
        put_back(Place(space, name), name in before, before.get(name))


def _put_back_attributes(thing: Any, before: dict[str, Any]) -> None:
    space, slots = attributes(thing), _slots(thing)
    is_slot = {name: isinstance(getattr_static(type(thing), name, None), MemberDescriptorType) for name in before}
    put_back_names(space, {name: value for name, value in before.items() if not is_slot[name]})
    for name, value in before.items():
        if is_slot[name] and slots.get(name, ...) is not value:
            object.__setattr__(thing, name, value)
    for name in slots.keys() - before.keys():
        if _is_plain(slots[name]):
            object.__delattr__(thing, name)


def _is_plain(value: Any) -> bool:
    """Whether it is a number or a tensor, or consists of them alone: no object that is set up once and kept."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, (*NUMBERS, np.generic, Tensor)) and not isinstance(value, nn.Parameter)


def _differs(thing: Any, read: Callable[[Any], Any], before: Any) -> bool:
    now = read(thing)
    if read is not own_attributes:
        return not _same(now, before)
    pairs = [(now.get(name, ...), before.get(name, ...)) for name in {**before, **now} if not is_made_anew(thing, name)]
    return any(not is_equal(one, other) and (_is_state(one) or _is_state(other)) for one, other in pairs)


def _is_state(value: Any) -> bool:
    """Not what a library makes at each run: a trace, say, that is kept to be shown."""
    kinds = (*NUMBERS, *CONTAINERS, Tensor, np.generic, np.ndarray, bytearray, array)
    return isinstance(value, kinds) or is_users_object(value)


def is_made_anew(owner: Any, name: str) -> bool:
    """What Pyro's guides and transforms keep of a run, and make anew in the next: plates, the last value they saw."""
    if isinstance(owner, Transform):
        return name.startswith("_cached_") or name == "_inv"
    return name == "plates" and isinstance(owner, AutoGuide)


def _same(now: Any, before: Any) -> bool:
    if isinstance(now, np.ndarray | array):
        return now.tobytes() == before.tobytes()
    if isinstance(now, dict):
        return _same(list(now), list(before)) and _same(list(now.values()), list(before.values()))
    return same_objects(now, before) or (len(now) == len(before) and all(map(is_equal, now, before)))


def is_equal(one: Any, other: Any) -> bool:
    """Whether they are one object, or equal numbers of one type, or tuples of such."""
    if one is other or type(one) is not type(other):
        return one is other
    if type(one) is tuple:
        return len(one) == len(other) and all(map(is_equal, one, other))
    if type(one) is float:  # which tells 0 from -0, and takes nan for nan
        return one.hex() == other.hex()
    return isinstance(one, (*NUMBERS, np.generic)) and bool(one == other)


class Memories:
    """Which memory tensors have: ``x.data =`` and ``set_`` give them other memory, and do not show as writes to it."""

    def __init__(self, tensors: Iterable[Any]) -> None:
        self._saved = [(x, x.detach()) for x in tensors if _is_strided(x) and not x.is_nested and not is_lazy(x)]

    def put_back(self) -> Tensor | None:
        """Returns one that had come to have another."""
        moved = None
        for tensor, alias in self._saved:
            if _layout(tensor) != _layout(alias):
                tensor.data, moved = alias, tensor
        return moved


def _layout(tensor: Tensor) -> tuple:
    return memory(tensor), tensor.shape, tensor.stride(), tensor.storage_offset()


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


_RUNNING_MOMENTS = ("running_mean", "running_var")
"""Written by batch norm while training, though its schema does not tell."""


class Writes(TorchDispatchMode):
    """Keeps what those tensors held that were there before, and are written to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[tuple[Tensor, Tensor]] = []
        self._known: WeakValueDictionary[int, Any] = WeakValueDictionary()  # memory that was made since, or is saved

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = func._schema.arguments
        given = dict(zip([argument.name for argument in arguments], args, strict=False)) | kwargs
        written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        if given.get("training"):
            written += _RUNNING_MOMENTS
        for value in map(given.get, written):
            for tensor in value if isinstance(value, list | tuple) else [value]:
                self._save(tensor)
        result = func(*args, **kwargs)
        results = result if isinstance(result, list | tuple) else [result]
        for tensor, of in zip(results, func._schema.returns, strict=False):
            if of.alias_info is None and _is_strided(tensor):  # no view of another
                self._known[memory(tensor)] = tensor.untyped_storage()
        return result

    def _save(self, tensor: Any) -> None:
        if _is_strided(tensor) and memory(tensor) not in self._known:
            whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
            self._known[memory(tensor)] = whole.untyped_storage()
            self.saved.append((whole, whole.clone()))

    def put_back(self) -> None:
        for tensor, value in self.saved:
            tensor.copy_(value)


def _is_strided(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.layout is torch.strided
