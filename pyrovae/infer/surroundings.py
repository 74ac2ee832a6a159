"""What functions read besides their arguments: the Python numbers and the tensors that a record takes for fixed."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dis import get_instructions
from functools import cache, partial
from inspect import getattr_static
from itertools import chain
from operator import is_, itemgetter
from sysconfig import get_path
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.scale_messenger import ScaleMessenger
from torch import Tensor, nn
from torch.distributions import Transform

from pyrovae.infer.log_weights import same_random_state
from pyrovae.infer.stand_ins import Place, StandIns, content, is_real

__all__ = ["Surroundings", "same_objects"]

_NUMBERS = (bool, int, float, complex, str, type(None))
_BOOKKEEPING = vars(nn.Module()).keys() - {"training"}
_CONTAINERS = (list, tuple, set, dict)
_HOLDERS = (nn.Module, *_CONTAINERS)
MOST_MEMBERS = 100
"""Longer containers hold data, not modules."""
MOST_DEEP = 3
"""``args.a.b.c.beta``"""
MOST_NUMBERS = 2**24
"""Larger tensors are data, which no model changes."""


class Surroundings:
    """Attributes of the modules and objects that ``functions`` belong to, and the globals and closures that they name.

    Of other objects (``args.beta``), the attributes that a function names; of lists, dicts, classes and modules the
    numbers (``args["beta"]``). So too for the functions that it calls, but for those of installed packages. Modules are
    found in containers and default arguments too; other numbers there are not seen.

    A number can be let move (:meth:`let_move`): then it counts no more, and a record reads a tensor in its place.
    """

    def __init__(self, *functions: Any) -> None:
        self._functions = functions
        self._states: list[tuple[list[Any], tuple]] = []
        self._state = 0  # which of them is the last
        self._last_glance: tuple[list[int], list[Any]] | None = None  # None: look again
        self.stand_ins = StandIns()
        self._look()

    def state(self) -> int:
        """A number that stands for all of it: it is the same as long as numbers are equal and objects the same."""
        if not self.stand_ins.follow():
            self._last_glance = None
        # Nearly always every object is the one seen last, which this tells in a few microseconds.
        glance, last = self._glance(), self._last_glance
        if glance is None or last is None or glance[0] != last[0] or not same_objects(glance[1], last[1]):
            self._look()
            values = self._values()
            key = (*(id(x) if isinstance(x, list) else _fingerprint(x) for x in values), self.stand_ins.state())
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
        names = self._names() if len(before) == len(after) <= len(self._names()) else []
        different = [name for name, a, b in zip(names, before, after, strict=False) if a != b]
        return ", ".join(different[:3]) or "an attribute"

    def let_move(self, before: int, after: int, as_tensor: Callable[[float], Tensor]) -> bool:
        """Have tensors stand for the numbers in which two states differ. False where there are none."""
        places, a, b = self._places(), self.key(before), self.key(after)
        if not len(places) <= len(a) == len(b):
            return False
        moved = False
        for place, old, new in zip(places, a, b, strict=False):
            number = place.reader()()
            whole = isinstance(old, int) and isinstance(number, int)  # counts, say: shapes and loops depend on them
            if old != new and is_real(old) and is_real(number) and not whole:
                moved |= self.stand_ins.add(place, number, as_tensor)
        self._last_glance = None
        return moved

    def hold(self) -> bool:
        """No tensor can stand for the numbers that began to move last: they count again. False where none did."""
        self._last_glance = None
        return self.stand_ins.refuse()

    @contextmanager
    def unchanged(self, *others: Any) -> Iterator[None]:
        """Put all back afterwards, tensors and random states too: looking at a computation runs it."""
        tensors = [(x, x.detach().clone()) for x in (*self._values(), *others) if _may_change(x)]
        attributes = [(space, dict(space)) for _, space in self._namespaces]
        named = [(place, place.reader()()) for place in self._named if place.exists()]
        lists = [(value, value[:]) for value in self._values() if isinstance(value, list)]
        generators = [(x, x.get_state()) for x in self._values() if isinstance(x, torch.Generator)]
        states = [(put, get()) for get, put in self._python_generators()]
        try:
            with same_random_state():
                yield
        finally:
            for put, state in states:
                put(state)
            for generator, state in generators:
                generator.set_state(state)
            for space, attribute in attributes:
                space.update({n: v for n, v in attribute.items() if isinstance(v, (*_NUMBERS, Tensor))})
            for place, value in named:
                if isinstance(value, (*_NUMBERS, Tensor)) and place.reader()() is not value:
                    place.write(value)
            for values, contents in lists:
                values[:] = contents
            for tensor, value in tensors:
                same = (tensor == value) | ((tensor != tensor) & (value != value))
                if not bool(same.all()):  # what nothing has changed may be read-only
                    tensor.data.copy_(value)

    def python_random_state(self) -> bytes:
        """Of Python's and NumPy's generators: the global ones, and those among the surroundings."""
        return pickle.dumps([get() for get, _ in self._python_generators()])

    def _python_generators(self) -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
        """How to read and to set the state of each."""
        found: list[Any] = [(random.getstate, random.setstate), (np.random.get_state, np.random.set_state)]
        for value in self._values():
            if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
                found.append((value.getstate, value.setstate))
            elif isinstance(value, np.random.RandomState):
                found.append((value.get_state, value.set_state))
            elif isinstance(value, np.random.Generator):
                bits = value.bit_generator
                found.append((partial(getattr, bits, "state"), partial(setattr, bits, "state")))
        return found

    def _look(self) -> None:
        """Find what there is to watch; a module may have come in another's place."""
        self._namespaces: list[tuple[Any, dict]] = []
        self._named: list[Place] = []
        self._met: set[Any] = set()
        self._meet_all(self._functions)
        keys = {(id(space), name) for _, space in self._namespaces for name in space}
        self.stand_ins.keep(keys | {place.key() for place in self._named})
        self._named = [place for place in self._named if place.key() not in self.stand_ins]
        self._readers = [place.reader() for place in self._named]
        named = [
            (space, [name for name in space if name not in _BOOKKEEPING and self._is_watched(owner, space, name)])
            for owner, space in self._namespaces
        ]
        self._pickers = [(itemgetter(names[0], *names), space) for space, names in named if names]

    def _is_watched(self, owner: Any, space: dict, name: str) -> bool:
        return (id(space), name) not in self.stand_ins and not _is_made_anew(owner, name)

    def _meet(self, thing: Any) -> None:
        if isinstance(thing, MethodType):
            self._meet_owner(thing.__self__)
            self._meet_method(thing.__self__, thing.__func__)
        elif isinstance(thing, ScaleMessenger):
            self._meet_owner(thing)
        elif isinstance(thing, (partial, FunctionType, *_HOLDERS)) and id(thing) not in self._met:
            self._met.add(id(thing))
            if isinstance(thing, nn.Module):
                for space in (vars(thing), thing._parameters, thing._buffers, thing._modules):
                    self._namespaces.append((thing, space))
                own = [v for n, v in vars(thing).items() if n not in _BOOKKEEPING and isinstance(v, _CONTAINERS)]
                self._meet_all([*thing.children(), *own])
                self._meet_method(thing, type(thing).forward)
            elif isinstance(thing, partial):
                self._named += [Place(thing.keywords, k) for k, v in thing.keywords.items() if isinstance(v, _NUMBERS)]
                self._meet_all([thing.func, *thing.args, *thing.keywords.values()])
            elif isinstance(thing, FunctionType):
                self._meet_function(thing)
            elif len(thing) <= MOST_MEMBERS:
                self._meet_all(dict.values(thing) if isinstance(thing, dict) else thing)
        elif isinstance(call := getattr_static(type(thing), "__call__", None), FunctionType) and _is_users(call):
            self._meet(MethodType(call, thing))

    def _meet_all(self, things: Any) -> None:
        for thing in things:
            self._meet(thing)

    def _meet_owner(self, owner: Any) -> None:
        if isinstance(owner, nn.Module):
            self._meet(owner)
        elif id(owner) not in self._met and (space := _attributes(owner)):
            self._met.add(id(owner))
            self._namespaces.append((owner, space))
            self._meet_all([v for v in space.values() if isinstance(v, _HOLDERS)])

    def _meet_method(self, owner: Any, method: Any) -> None:
        """Its globals, and what it names of its owner."""
        both = id(owner), id(method)
        if isinstance(method, FunctionType) and both not in self._met and _is_users(method):
            self._met.add(both)
            self._meet_function(method)
            self._meet_attributes(method.__code__, [owner])

    def _meet_class_attribute(self, owner: Any, kind: type, name: str) -> None:
        """A method or a number; of methods those of parents too, which may be asked for by ``super()``."""
        having = [ancestor for ancestor in kind.__mro__ if name in vars(ancestor)]
        if having and isinstance(vars(having[0])[name], _NUMBERS):
            nearer = kind.__mro__[: kind.__mro__.index(having[0]) + 1]  # which may come to have it too
            self._named += [Place(vars(ancestor), name, ancestor) for ancestor in nearer]
        for ancestor in having:
            self._meet_method(owner, _function(vars(ancestor)[name]))

    def _meet_function(self, function: FunctionType) -> None:
        code = function.__code__
        cells = list(zip(function.__closure__ or (), code.co_freevars, strict=True))
        named = {name: function.__globals__[name] for name in _names(code) if name in function.__globals__}
        self._named += [Place(cell, name) for cell, name in cells]
        self._named += [
            Place(function.__globals__, name)
            for name, value in named.items()
            if not isinstance(value, type | ModuleType) and not callable(value)
        ]
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        contents = [content(cell) for cell, _ in cells]
        met = [
            value
            for value in named.values()
            if isinstance(value, _HOLDERS)
            or (isinstance(value, FunctionType) and _is_followed(value, function))
            or (callable(value) and not isinstance(value, type | FunctionType))
        ]
        self._meet_all([*contents, *met, *(value for value in defaults if isinstance(value, _HOLDERS))])
        self._meet_attributes(code, [*contents, *named.values(), *defaults])

    def _meet_attributes(self, code: CodeType, things: list[Any], depth: int = MOST_DEEP) -> None:
        """Of objects that a function reads, what it names: ``args.beta``, ``q.guide``; of dicts, classes and modules
        the numbers, ``args["beta"]``; of lists all; and so on, ``args.kl[0].beta``."""
        for thing in things:
            both = id(thing), id(code)
            if both in self._met or isinstance(thing, (FunctionType, Tensor)):
                continue
            self._met.add(both)
            inner: list[Any] = []
            if isinstance(thing, dict):
                asked = dict.fromkeys((*_keys(code), *(value for value in things if isinstance(value, str))))
                inner = [thing[key] for key in asked if key in thing]
                self._named += [Place(thing, key) for key in asked if isinstance(thing.get(key), _NUMBERS)]
            elif isinstance(thing, list | tuple):
                inner = list(thing[:MOST_MEMBERS])
                if isinstance(thing, list):  # and what comes to be its next
                    numbers = [i for i, value in enumerate(inner) if isinstance(value, _NUMBERS)]
                    self._named += [Place(thing, i) for i in (*numbers, len(thing))]
            elif isinstance(thing, ModuleType):
                space = vars(thing)
                named = [name for name in _names(code) if name in space]
                self._named += [Place(space, name) for name in named if isinstance(space[name], _NUMBERS)]
                if not _is_library(getattr(thing, "__file__", None)):
                    inner = [space[name] for name in named]
                    self._meet_all([value for value in inner if isinstance(value, FunctionType)])
            elif isinstance(thing, type):
                for name in _names(code):
                    self._meet_class_attribute(thing, thing, name)
            else:
                space = _attributes(thing)
                slots = [name for name in _names(code) if name not in space and _is_slot(thing, name)]
                inner = [space[name] for name in _names(code) if name in space]
                inner += [getattr(thing, name, None) for name in slots]
                if id(thing) not in self._met:  # then not all of its attributes are watched
                    self._meet_named(code, space)
                    self._named += [Place(thing, name) for name in slots]
                for name in _names(code):
                    if name not in space:
                        self._meet_class_attribute(thing, type(thing), name)
            if depth:
                self._meet_attributes(code, [x for x in inner if _has_more(x)], depth - 1)

    def _meet_named(self, code: CodeType, space: dict[str, Any]) -> None:
        named = [name for name in (*_names(code), *_keys(code)) if name in space]  # vars(args)["beta"]
        self._named += [Place(space, name) for name in (*named, *_asked(code))]
        self._meet_all([space[name] for name in named if isinstance(space[name], _HOLDERS)])

    def _glance(self) -> tuple[list[int], list[Any]] | None:
        """The objects without those that ``nn.Module`` keeps for itself, nine in ten; None where one is gone."""
        try:
            attributes = [pick(space) for pick, space in self._pickers]
        except KeyError:
            return None
        lengths = [len(space) for _, space in self._namespaces]
        named = [read() for read in self._readers]
        return lengths, [*chain.from_iterable(attributes), *named, *pyro.get_param_store()._params.values()]

    def _places(self) -> list[Place]:
        """Of all that is watched, besides the parameter store."""
        attributes = [
            Place(space, name, owner)
            for owner, space in self._namespaces
            for name in space
            if self._is_watched(owner, space, name)
        ]
        return [*attributes, *self._named]

    def _values(self) -> list[Any]:
        return [*(place.reader()() for place in self._places()), *pyro.get_param_store()._params.values()]

    def _names(self) -> list[str]:
        return [*(place.label() for place in self._places()), *pyro.get_param_store()._params, "a number"]


def _attributes(thing: Any) -> dict[str, Any]:
    space = getattr(thing, "__dict__", None)
    return space if isinstance(space, dict) else {}


def _is_slot(thing: Any, name: str) -> bool:
    return isinstance(getattr_static(type(thing), name, None), MemberDescriptorType)


def _has_more(thing: Any) -> bool:
    slots = hasattr(type(thing), "__slots__") and not isinstance(thing, (*_NUMBERS, Tensor))
    return slots or isinstance(thing, dict | list | tuple) or bool(_attributes(thing))


@cache
def _names(code: CodeType) -> tuple[str, ...]:
    """Of globals and attributes."""
    return tuple(dict.fromkeys(name for each in _codes(code) for name in each.co_names))


@cache
def _keys(code: CodeType) -> tuple[str, ...]:
    """``a["key"]`` and ``a.get("key")``: strings that are no names of sites, most likely."""
    between = ("CACHE", "PRECALL", "EXTENDED_ARG", "COPY", "SWAP")
    keys = []
    for each in _codes(code):
        steps = [step for step in get_instructions(each) if step.opname not in between]
        for before, step, after in zip([None, *steps], steps, [*steps[1:], None], strict=False):
            subscript = after is not None and (after.opname == "BINARY_SUBSCR" or after.argrepr == "[]")
            asked = before is not None and str(before.argval) == "get"
            if isinstance(step.argval, str) and step.opname == "LOAD_CONST" and (subscript or asked):
                keys.append(step.argval)
    return tuple(dict.fromkeys(keys))


@cache
def _asked(code: CodeType) -> tuple[str, ...]:
    """``getattr(a, "name")``"""
    texts = [x for each in _codes(code) if "getattr" in each.co_names for x in each.co_consts if isinstance(x, str)]
    return tuple(dict.fromkeys(text for text in texts if text.isidentifier()))


def _codes(code: CodeType) -> list[CodeType]:
    """Its own, and those of the functions inside it."""
    return [code, *(each for inner in code.co_consts if isinstance(inner, CodeType) for each in _codes(inner))]


def _function(member: Any) -> Any:
    """Of a property, or a static or class method; others are left as they are."""
    return member.fget if isinstance(member, property) else getattr(member, "__func__", member)


def same_objects(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _may_change(value: Any) -> bool:
    """Whether it is a tensor that a run may write to, besides parameters."""
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or value.layout is not torch.strided:
        return False
    if value.is_nested or value.is_meta or value.is_quantized:
        return False
    return value.numel() <= MOST_NUMBERS and 0 not in value.stride()


def _is_users(function: FunctionType) -> bool:
    return not (function.__module__ or "").startswith(("torch.", "pyro.", "pyrovae.infer"))


def _is_followed(function: FunctionType, caller: FunctionType) -> bool:
    """Whether what a function reads that another calls is looked for."""
    return function.__module__ == caller.__module__ or not _is_library(function.__code__.co_filename)


@cache
def _is_library(file: str | None) -> bool:
    """Python's own, or installed: their numbers are fixed, and there are many."""
    installed = file is None or "site-packages" in file or "dist-packages" in file
    return installed or str(file).startswith((get_path("stdlib"), "<frozen"))


def _is_made_anew(owner: Any, name: str) -> bool:
    """What Pyro's guides and transforms keep of a run, and make anew in the next: plates, the last value they saw."""
    if isinstance(owner, Transform):
        return name.startswith("_cached_") or name == "_inv"
    return name == "plates" and isinstance(owner, AutoGuide)


def _fingerprint(value: Any) -> Any:
    if isinstance(value, list):
        return id(value), len(value)
    return value if isinstance(value, _NUMBERS) else id(value)
