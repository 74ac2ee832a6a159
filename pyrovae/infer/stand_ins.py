"""Tensors that stand for the Python numbers that change from step to step, so that a record reads them anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import CellType
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Place", "StandIns", "content", "is_real"]


class Place(NamedTuple):
    """Where a value is found: under a name in a namespace, or in the cell of a closure."""

    space: Any
    name: str
    owner: Any = None
    """Whose namespace it is."""

    def reader(self) -> Callable[[], Any]:
        cell = isinstance(self.space, CellType)
        return partial(content, self.space) if cell else partial(self.space.get, self.name)

    def write(self, value: Any) -> None:
        if isinstance(self.space, CellType):
            self.space.cell_contents = value
        elif isinstance(self.space, dict):
            self.space[self.name] = value
        else:  # a class's, which it only shows
            setattr(self.owner, self.name, value)

    def key(self) -> tuple[int, str]:
        return id(self.owner if isinstance(self.owner, type) else self.space), self.name

    def label(self) -> str:
        kind = self.owner if isinstance(self.owner, type) else type(self.owner)
        return self.name if self.owner is None else f"{kind.__name__}.{self.name}"


def content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty so far
        return None


def is_real(value: Any) -> bool:
    """Whether it is a real number of Python's."""
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass
class _StandIn:
    place: Place
    read: Callable[[], Any]
    number: float
    tensor: Tensor


class StandIns:
    """One for each number that moves, by the key of its place."""

    def __init__(self) -> None:
        self._all: dict[tuple[int, str], _StandIn] = {}
        self._refused: set[tuple[int, str]] = set()

    def __bool__(self) -> bool:
        return bool(self._all)

    def __contains__(self, key: tuple[int, str]) -> bool:
        return key in self._all

    def add(self, place: Place, number: float, as_tensor: Callable[[float], Tensor]) -> bool:
        """False where it was found that no tensor can stand for the number there."""
        if place.key() in self._refused:
            return False
        self._all[place.key()] = _StandIn(place, place.reader(), number, as_tensor(number))
        return True

    def refuse(self) -> None:
        """No tensor can stand for these numbers."""
        self._refused |= self._all.keys()
        self._all = {}

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

    def places(self) -> list[Place]:
        return [each.place for each in self._all.values()]

    def fingerprints(self) -> list[Any]:
        """While they are in place: what shows that a run has changed one."""
        return [(id(each.read()), each.tensor.item()) for each in self._all.values()]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The tensors lie where the numbers are."""
        stand_ins = [*self._all.values()]
        for each in stand_ins:
            each.place.write(each.tensor)
        try:
            yield
        finally:
            for each in stand_ins:
                each.place.write(each.number)
                each.tensor.fill_(each.number)

    @contextmanager
    def with_other_values(self) -> Iterator[None]:
        """A record that differs for it has read one into Python."""
        values = [(each.tensor, each.tensor.item()) for each in self._all.values()]
        for tensor, value in values:
            tensor.fill_(value / 2 or 0.5)
        try:
            yield
        finally:
            for tensor, value in values:
                tensor.fill_(value)
