"""Tensors that stand for the Python numbers that change from step to step, so that a record reads them anew."""

from __future__ import annotations

import gc
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from sys import getrefcount
from types import CellType
from typing import Any, NamedTuple

from torch import Tensor

from pyrovae.infer.untraceable import NoKey, Untraceable

__all__ = [
    "Key",
    "Place",
    "StandIns",
    "are_kept",
    "content",
    "counted_users",
    "is_real",
    "kind_of_dict",
    "other_number",
]

Key = tuple[int, Any]


class Place(NamedTuple):
    """Where a value is found: under a name in a namespace or an object's slots, in a list, in the cell of a closure."""

    space: Any
    name: Any
    """In a list the index."""
    owner: Any = None
    """Whose namespace it is."""

    def reader(self) -> Callable[[], Any]:
        if isinstance(self.space, CellType):
            return partial(content, self.space)
        if isinstance(self.space, list | deque):
            return partial(_entry, self.space, self.name)
        if isinstance(self.space, dict):
            return partial(dict.get, self.space, self.name)
        if isinstance(self.space, Mapping):
            return partial(self.space.get, self.name)
        return partial(getattr, self.space, self.name, None)

    def write(self, value: Any) -> None:
        if isinstance(self.space, CellType):
            self.space.cell_contents = value
        elif isinstance(self.space, list):  # whatever a kind of list or dict does besides
            list.__setitem__(self.space, self.name, value)
        elif isinstance(self.space, deque):
            deque.__setitem__(self.space, self.name, value)
        elif isinstance(self.space, dict):
            kind_of_dict(self.space).__setitem__(self.space, self.name, value)
        elif isinstance(self.owner, type):  # whose namespace only shows it
            type.__setattr__(self.owner, self.name, value)
        else:
            object.__setattr__(self.space, self.name, value)

    def remove(self) -> None:
        """What lies there, but for entries of lists."""
        if isinstance(self.space, CellType):
            del self.space.cell_contents
        elif isinstance(self.space, dict):
            kind_of_dict(self.space).__delitem__(self.space, self.name)
        elif isinstance(self.owner, type):
            type.__delattr__(self.owner, self.name)
        else:
            object.__delattr__(self.space, self.name)

    def exists(self) -> bool:
        """Whether anything lies there."""
        if isinstance(self.space, CellType):
            return self.space != CellType()
        if isinstance(self.space, list | deque):
            return self.name < len(self.space)
        if isinstance(self.space, dict):
            return dict.__contains__(self.space, self.name)
        return self.name in self.space if isinstance(self.space, Mapping) else hasattr(self.space, self.name)

    def key(self) -> Key:
        return id(self.owner if isinstance(self.owner, type) else self.space), self.name

    def label(self) -> str:
        if isinstance(self.space, list | deque):
            return f"entry {self.name} of a list"
        kind = self.owner if isinstance(self.owner, type) else type(self.owner)
        return self.name if self.owner is None else f"{kind.__name__}.{self.name}"


def content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty so far
        return None


def kind_of_dict(value: dict) -> type[dict]:
    """Whose methods to use, whatever a user's kind does besides. An OrderedDict's order is known to its own alone."""
    return OrderedDict if isinstance(value, OrderedDict) else dict


def _entry(values: list | deque, index: int) -> Any:
    if index >= len(values):
        return None
    return list.__getitem__(values, index) if isinstance(values, list) else values[index]


def is_real(value: Any) -> bool:
    """Whether it is a real number of Python's."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def other_number(value: float, index: int) -> float:
    """Another one of the same sign, and equal ones apart."""
    return value / (2 + index) or 0.5 / (1 + index)


def counted_users(tensors: Sequence[Tensor]) -> list[int]:
    return [getrefcount(tensor) for tensor in tensors]


def are_kept(tensors: Sequence[Tensor], users: list[int]) -> list[bool]:
    """Whether more hold on to them than did. Traces refer to themselves, and go when garbage is collected."""
    if counted_users(tensors) != users:
        gc.collect()
    return [now > before for now, before in zip(counted_users(tensors), users, strict=True)]


@dataclass
class _StandIn:
    place: Place
    read: Callable[[], Any]
    number: float
    tensor: Tensor
    serial: int


class StandIns:
    """One for each number that moves, by the key of its place."""

    def __init__(self) -> None:
        self._all: dict[Key, _StandIn] = {}
        self._fresh: set[Key] = set()  # those that no record has read yet
        self._refused: set[Key] = set()
        self._serials = count()

    def __bool__(self) -> bool:
        return bool(self._all)

    def __contains__(self, key: Key) -> bool:
        return key in self._all

    def add(self, place: Place, number: float, as_tensor: Callable[[float], Tensor]) -> bool:
        """False where it was found that no tensor can stand for the number there."""
        key = place.key()
        if key in self._refused:
            return False
        self._all[key] = _StandIn(place, place.reader(), number, as_tensor(number), next(self._serials))
        self._fresh.add(key)
        return True

    def accept(self) -> None:
        """A record has been made with them."""
        self._fresh = set()

    def refuse(self) -> bool:
        """No record can be made with those that are new. False where there are none."""
        refused, self._fresh = self._fresh & self._all.keys(), set()
        self._refused |= refused
        self._all = {key: each for key, each in self._all.items() if key not in refused}
        return bool(refused)

    def keep(self, keys: set[Key]) -> None:
        """Drop the others: nothing reads their numbers any more."""
        self._all = {key: each for key, each in self._all.items() if key in keys}

    def follow(self) -> bool:
        """Read the numbers anew. False where one is no number now (None, say), and has no stand-in any more."""
        before = len(self._all)
        for key, each in [*self._all.items()]:
            number = each.read()
            if number is each.number:
                continue
            if is_real(number):
                each.number = number
                each.tensor.fill_(number)
            else:
                del self._all[key]
        return len(self._all) == before

    def state(self) -> tuple:
        """Which there are."""
        return tuple((key, each.serial) for key, each in self._all.items())

    @contextmanager
    def as_numbers(self, *, other: bool) -> Iterator[None]:
        """The numbers lie where they do, or other ones."""
        with self._in_place(self._values(other)):
            yield

    @contextmanager
    def as_tensors(self, *, other: bool, unhashable: bool = False) -> Iterator[None]:
        """The tensors lie where the numbers are, with their values or others, as objects that nothing has met.

        Raises:
            Untraceable: what ran has changed one.
        """
        placed: list[tuple[_StandIn, Tensor]] = []
        for each, value in self._values(other):
            each.tensor.fill_(value)
            alias = each.tensor.detach()
            placed.append((each, alias.as_subclass(NoKey) if unhashable else alias))
        aliases = [alias for _, alias in placed]
        with self._in_place(placed):
            versions, users = [alias._version for alias in aliases], counted_users(aliases)
            yield
            keeps = are_kept(aliases, users) if unhashable else [False] * len(aliases)  # a record holds them
            for (each, alias), version, kept in zip(placed, versions, keeps, strict=True):
                if each.read() is not alias or alias._version != version:
                    raise Untraceable(f"it changes {each.place.label()} as it runs")
                if kept:
                    raise Untraceable(f"it keeps {each.place.label()}, in a list say")

    def _values(self, other: bool) -> list[tuple[_StandIn, float]]:
        return [(x, other_number(x.number, i) if other else x.number) for i, x in enumerate(self._all.values())]

    @contextmanager
    def _in_place(self, values: Sequence[tuple[_StandIn, Any]]) -> Iterator[None]:
        try:
            for each, value in values:
                each.place.write(value)
            yield
        finally:
            for each, _ in values:
                each.place.write(each.number)
                each.tensor.fill_(each.number)
