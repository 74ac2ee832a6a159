"""Whether what functions read besides their arguments is as it was: the numbers that a record takes for fixed."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import IOBase
from itertools import chain
from operator import itemgetter
from types import MappingProxyType, MethodType
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn

from pyrovae.infer.reads import (
    BOOKKEEPING,
    CONTAINERS,
    MOST_MEMBERS,
    Reads,
    attributes,
    is_of_a_library,
    members,
)
from pyrovae.infer.snapshot import (
    MOST_NUMBERS,
    Contents,
    Memories,
    generators,
    is_equal,
    is_made_anew,
    is_users_object,
    own_attributes,
    put_back,
    put_back_names,
    reached,
    same_objects,
)
from pyrovae.infer.stand_ins import Key, Place, StandIns, is_real, kind_of_dict
from pyrovae.infer.untraceable import Untraceable
from pyrovae.infer.weights import same_random_state

__all__ = ["Surroundings"]


_SPACES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
"""Of a module, whose entries are watched one by one."""


class State(NamedTuple):
    """What is watched, as it was at one moment."""

    places: dict[Any, Place]
    """By key. Holding on to them, and to values, keeps their ids from being given to others."""
    values: dict[Any, Any]
    """What lay there."""
    stand_ins: tuple
    ignored: frozenset[Any]
    """Keys of places that make no difference; they may in another state, where other code runs."""

    def has_places_of(self, other: State) -> bool:
        """In the same order. Keys of dicts may be tensors, which are not to be compared."""
        ignored = self.ignored | other.ignored
        order = {key: index for index, key in enumerate(key for key in other.places if key not in ignored)}
        ours = [order.get(key) for key in self.places if key not in ignored]
        return self.stand_ins == other.stand_ins and ours == list(range(len(order)))

    def different(self, other: State) -> dict[Any, Place]:
        """Where there is something else, or something in one of them only."""
        places, a, b = {**self.places, **other.places}, self.values, other.values
        differ = [key for key in places if (key in a) != (key in b) or not is_equal(a.get(key), b.get(key))]
        return {key: places[key] for key in differ if key not in self.ignored | other.ignored}


class Surroundings:
    """The numbers and objects that ``functions`` read (:class:`Reads`), the tensors that they change, generators.

    A number can be let move (:meth:`let_move`): then it counts no more, and a record reads a tensor in its place.
    """

    def __init__(self, *functions: Any) -> None:
        self._functions = functions
        self.states: list[State] = []
        """Those that have been met."""
        self._state = 0  # which of them is the last
        self._views: dict[int, _View] = {}  # of the states; none where it is to be looked at again
        self._ignored: frozenset[Any] = frozenset()  # in this state
        self.stand_ins = StandIns()
        self._view = self._look()

    def state(self) -> int:
        """A number that stands for all of it: it is the same as long as numbers are equal and objects the same."""
        if not self.stand_ins.follow():
            self._views.clear()
        # Nearly always every object is the one seen last, which this tells in a few microseconds.
        last = self._views.get(self._state)
        if last is None or not last.holds():
            self._find_state()
        return self._state

    def _find_state(self) -> None:
        """One seen before (a switch may be flipped at every step), or another."""
        moving = self.stand_ins.state()
        for state, view in reversed(self._views.items()):
            if view.moving == moving and view.holds():
                self._state, self._view, self._ignored = state, view, self.states[state].ignored
                return
        self._ignored = frozenset()
        self._view = self._look()
        now = self.now()
        same = (i for i, known in enumerate(self.states) if known.has_places_of(now) and not known.different(now))
        self._state = next(same, len(self.states))
        if self._state < len(self.states) and self.states[self._state].ignored:
            self._ignored = self.states[self._state].ignored
            self._view = self._look()
            now = self.now()
        self.states[self._state : self._state + 1] = [now]
        self._views[self._state] = self._view

    def now(self) -> State:
        """As it is now, in the places that were found when it was last asked for its number."""
        places, moving = self._places(), self.stand_ins.state()
        return State(places, {key: place.reader()() for key, place in places.items()}, moving, self._ignored)

    def idle(self, before: int, after: int) -> set[Any]:
        """Where two states differ, if it is only in what no code names; else nothing."""
        a, b = self.states[before], self.states[after]
        different = a.different(b)
        return set(different) if a.has_places_of(b) and all(map(self._is_unnamed, different.values())) else set()

    def _is_unnamed(self, place: Place) -> bool:
        if place.key() in self._view.reads.unnamed:
            return True
        of_users_object = place.owner is not None and place.space is attributes(place.owner)
        if not of_users_object or is_of_a_library(type(place.owner)):  # whose own code reads it
            return False
        return place.name not in self._view.reads.names and place.name != "training"

    def ignore(self, keys: set[Any], state: int) -> None:
        """What lies there makes no difference in this state: it counts no more."""
        known = self.states[state]
        self.states[state] = known._replace(ignored=known.ignored | keys)
        self._views.clear()

    def difference(self, before: State, after: State) -> str:
        """What differs, by name; empty where nothing does."""
        return ", ".join([place.label() for place in before.different(after).values()][:3])

    def let_move(self, before: int, after: int, as_tensor: Callable[[float], Tensor]) -> bool:
        """Have tensors stand for the numbers in which two states differ. False where there are none."""
        a, b = self.states[before], self.states[after]
        moved = False
        for key, place in a.different(b).items():
            old, new = (each.values.get(key, ...) for each in (a, b))
            whole = isinstance(old, int) and isinstance(new, int)  # counts, say: shapes and loops depend on them
            if is_real(old) and is_real(new) and not whole:
                moved |= self.stand_ins.add(place, new, as_tensor)
        self._views.clear()
        return moved

    def hold(self) -> bool:
        """No tensor can stand for the numbers that began to move last: they count again. False where none did."""
        self._views.clear()
        return self.stand_ins.refuse()

    def contents(self) -> Contents:
        """Of the containers, arrays and objects that are reached, as they are now."""
        return Contents(self._reached())

    def label(self, part: Any) -> str:
        """By which name something is found, or reached."""
        for place in self._places().values():
            value = place.reader()()
            if value is part or any(each is part for each in reached([value])):
                return place.label()
        return f"a {type(part).__name__}"

    @contextmanager
    def unchanged(self, *others: Tensor) -> Iterator[None]:
        """Put all back afterwards, ``others`` and random states too: looking at a computation runs it."""
        found, values = self._reached(), self._values()
        memories = Memories(values)
        tensors = [(x, x.detach().clone()) for x in (*filter(_may_change, values), *others)]
        attributes = [(space, dict(space)) for _, space in self._view.reads.namespaces]
        named = [(place, place.exists(), place.reader()()) for place in self._view.single]
        contents = Contents(found)
        own = [(x, x.get_state()) for x in found if isinstance(x, torch.Generator)]
        states = [(put, get()) for get, put in generators(found)]
        try:
            with same_random_state():
                yield
        finally:
            for put, state in states:
                put(state)
            for generator, state in own:
                generator.set_state(state)
            for space, attribute in attributes:
                put_back_names(space, attribute)
            contents.put_back()  # a list has its length again
            for each in named:
                put_back(*each)
            moved = memories.put_back()
            for tensor, value in tensors:
                same = (tensor == value) | ((tensor != tensor) & (value != value))
                if not bool(same.all()):  # what nothing has changed may be read-only
                    tensor.data.copy_(value)
        if moved is not None:
            raise Untraceable(f"it gives {self.label(moved)} other memory (`.data =`) as it runs")

    def python_random_state(self) -> bytes:
        """Of Python's and NumPy's generators: the global ones, and those among the surroundings."""
        return pickle.dumps([get() for get, _ in generators(self._reached())])

    @property
    def takes_next(self) -> bool:
        """Whether it may take the next of an iterator, which cannot be put back: its code names one.

        A file counts where it can be read, and the code names what reads one.
        """
        found, names = self._reached(), self._view.reads.names
        if self._view.reads.takes_next and any(map(_is_iterator, found)):
            return True
        held = [
            place.reader()()
            for place in self._places().values()
            if place.owner is None or isinstance(place.owner, type) or place.name in names
        ]
        for thing in found:
            if isinstance(thing, CONTAINERS) and len(thing) <= MOST_MEMBERS:
                held += members(thing)
            if is_users_object(thing):
                held += [value for name, value in own_attributes(thing).items() if name in names]
        reads_files = not names.isdisjoint(_OF_FILES)
        return any(_is_iterator(x) or (reads_files and _can_be_read(x)) for x in held)

    def _look(self) -> _View:
        """Find what there is to watch; a module may have come in another's place."""
        reads = Reads(self._functions)
        entries = [(each, _entries(each)) for each in reads.containers]
        keys = {(id(space), name) for _, space in reads.namespaces for name in space}
        self.stand_ins.keep(keys | {place.key() for place in chain(reads.named, *(places for _, places in entries))})
        # Containers are seen at one glance, but for those where a number moves.
        whole = [each for each, places in entries if not any(p.key() in self.stand_ins for p in places)]
        is_whole = set(map(id, whole))
        split = [place for each, places in entries if id(each) not in is_whole for place in places]
        single = [place for place in (*reads.named, *split) if self._counts(place.key())]
        attributes = [
            (space, [name for name in space if name not in BOOKKEEPING and self._is_watched(owner, space, name)])
            for owner, space in reads.namespaces
        ]
        return _View(reads, single, whole, attributes, self.stand_ins.state())

    def _is_watched(self, owner: Any, space: dict, name: str) -> bool:
        """What is set up at the first use may come to lie in a module's own spaces, and stays."""
        return name not in _SPACES and self._counts((id(space), name)) and not is_made_anew(owner, name)

    def _counts(self, key: Key) -> bool:
        return key not in self.stand_ins and key not in self._ignored

    def _places(self) -> dict[Any, Place]:
        """All that is watched, by key; of the parameter store by name, since one may take another's place."""
        attributes = [
            Place(space, name, owner)
            for owner, space in self._view.reads.namespaces
            for name in space
            if self._is_watched(owner, space, name)
        ]
        params = pyro.get_param_store()._params
        places = [*attributes, *self._view.single, *chain.from_iterable(map(_entries, self._view.whole))]
        return {place.key(): place for place in places} | {name: Place(params, name) for name in params}

    def _values(self) -> list[Any]:
        return list(self.now().values.values())

    def _reached(self) -> list[Any]:
        owners = [function.__self__ for function in self._functions if isinstance(function, MethodType)]
        return list(reached([*self._values(), *owners]))


class _View:
    """What is watched in one state, and the objects that lie there."""

    def __init__(
        self,
        reads: Reads,
        single: list[Place],
        whole: list[Any],
        attributes: list[tuple[dict, list[str]]],
        moving: tuple,
    ) -> None:
        self.reads = reads
        self.single, self.whole = single, whole
        """Places and containers besides the namespaces."""
        self.moving = moving
        spaces: dict[int, tuple[Any, list[Any]]] = {}
        others = []
        for place in single:
            if type(place.space) in (dict, MappingProxyType) and place.exists():
                spaces.setdefault(place.key()[0], (place.space, []))[1].append(place.name)
            else:
                others.append(place.reader())
        self._readers = others
        picked = [*attributes, *spaces.values()]
        self._pickers = [(itemgetter(names[0], *names), space) for space, names in picked if names]
        self._glance = self._look()

    def holds(self) -> bool:
        """Whether every object is the one that was seen, or an equal number."""
        now, seen = self._look(), self._glance
        if now is None or seen is None or now[0] != seen[0]:
            return False
        if not same_objects(now[1], seen[1]):
            if len(now[1]) != len(seen[1]) or not all(map(is_equal, now[1], seen[1])):
                return False
            self._glance = now
        return True

    def _look(self) -> tuple[list[int], list[Any]] | None:
        """The objects without those that ``nn.Module`` keeps for itself, nine in ten; None where one is gone."""
        try:
            attributes = [pick(space) for pick, space in self._pickers]
        except KeyError:
            return None
        lengths = [*(len(space) for _, space in self.reads.namespaces), *map(len, self.reads.containers)]
        named = [read() for read in self._readers]
        inside = chain.from_iterable(map(members, self.whole))
        return lengths, [*chain.from_iterable(attributes), *named, *inside, *pyro.get_param_store()._params.values()]


def _entries(container: Any) -> list[Place]:
    keys = list(kind_of_dict(container).keys(container)) if isinstance(container, dict) else range(len(container))
    return [Place(container, key) for key in keys]


def _may_change(value: Any) -> bool:
    """Whether it is a tensor that a run may write to, besides parameters."""
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or value.layout is not torch.strided:
        return False
    if value.is_nested or value.is_meta or value.is_quantized:
        return False
    return value.numel() <= MOST_NUMBERS and 0 not in value.stride()


_OF_FILES = ("next", "read", "readline", "readlines")


def _is_iterator(value: Any) -> bool:
    return issubclass(value.__class__, Iterator) and not isinstance(value, IOBase)  # a weak proxy's type looks like one


def _can_be_read(value: Any) -> bool:
    return isinstance(value, IOBase) and not value.closed and value.readable()
