"""What functions read besides their arguments, as far as their code tells: namespaces, single places, containers."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import UserList, deque
from collections.abc import Collection, Iterable, Mapping
from dis import get_instructions, hasname
from functools import cache, cached_property, partial, partialmethod
from inspect import getattr_static
from itertools import chain
from sysconfig import get_path
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.infer_config_messenger import InferConfigMessenger
from pyro.poutine.mask_messenger import MaskMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.scale_messenger import ScaleMessenger
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from pyrovae.infer.stand_ins import Place, content, kind_of_dict

__all__ = [
    *("BOOKKEEPING", "CONTAINERS", "MOST_MEMBERS", "NUMBERS", "Reads"),
    *("attributes", "is_of_a_library", "is_of_users_kind", "members", "own_slots"),
]

_COUNTED = (bool, int, float, complex, str)
NUMBERS = (*_COUNTED, type(None))
BOOKKEEPING = vars(nn.Module()).keys() - {"training"}
"""Attributes that a module keeps for itself."""
CONTAINERS = (list, tuple, set, deque, dict)
_HOLDERS = (nn.Module, *CONTAINERS)
MOST_MEMBERS = 100
"""Longer containers hold data."""
MOST_ENTRIES = 300
"""Of all containers that are watched whole."""
MOST_DEEP = 3
"""``args.a.b.c.beta``"""
_MESSENGERS = (BlockMessenger, ConditionMessenger, InferConfigMessenger, MaskMessenger, ScaleMessenger)
"""Those that keep nothing of a run."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_CALLED_BY_LIBRARIES = (Distribution, Messenger, torch.autograd.Function, Transform)
_NOT_CALLED = {
    *("__init__", "__new__", "__post_init__", "__repr__", "__str__", "__hash__", "__eq__", "__del__", "__setattr__"),
    *("__delattr__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__", "__init_subclass__"),
}
"""By a step, on an object that is there. Those of dataclasses name all fields."""


class Reads:
    """Attributes of the modules and objects that ``functions`` belong to, and the globals and closures that they name.

    Of other objects (``args.beta``), the attributes that any of them names; of classes, modules and dicts too
    (``args["beta"]``), and numbers that lie beside them; lists, and dicts that are read in another way, whole. So too
    for the functions that they call, but for those of installed packages. Modules are found in containers and default
    arguments as well.
    """

    def __init__(self, functions: Iterable[Any]) -> None:
        self.namespaces: list[tuple[Any, dict]] = []
        """With their owners."""
        self._met: set[Any] = set()
        self._owners: set[int] = set()
        self._of_functions: list[Place] = []
        self._codes: dict[CodeType, None] = {}
        self._texts: set[str] = set()
        """Strings that they name: keys, perhaps."""
        self._roots: list[tuple[Any, str | None]] = []
        """What they name and belong to, and in which module."""
        self._meet_all(functions)
        size = -1
        while size != (size := len(self._codes) + len(self._roots)):  # further functions name further attributes
            self._words = _Words.of(self._codes)
            self._of_things: list[Place] = []
            self._unnamed: list[Place] = []
            self.containers: list[Any] = []
            """Those that are read whole."""
            self._examine()
        named = {place.key(): place for place in (*self._of_functions, *self._of_things)}
        unnamed = {place.key(): place for place in self._unnamed if place.key() not in named}
        self.named = [*named.values(), *unnamed.values()]
        """Single places."""
        self.unnamed = set(unnamed)
        """Numbers and strings among them that lie beside what is named: a key may be a variable."""
        self.takes_next = any("next" in _globals(code) for code in self._codes)
        """From an iterator, perhaps."""
        self.names = {*self._words.names, *self._words.keys, *self._words.asked}
        """All that the code names."""
        self._roots, self._of_functions, self._of_things, self._unnamed = [], [], [], []

    # What is called, and holds what is ------------------------------------------------------------------------

    def _meet(self, thing: Any, caller: str | None = None) -> None:
        """``caller`` names the module where it is found; None: anywhere."""
        if isinstance(thing, MethodType):
            self._meet_owner(thing.__self__)
            self._meet_method(thing.__func__)
        elif isinstance(thing, _MESSENGERS):
            self._meet_owner(thing)
            self._roots += [(each, None) for each in attributes(thing).values()]
        elif isinstance(thing, (*NUMBERS, Tensor, type, ModuleType)) or id(thing) in self._met:
            return
        elif isinstance(thing, FunctionType):
            if caller is None or _is_followed(thing, caller):
                self._meet_function(thing)
            elif hasattr(thing, "__wrapped__"):  # by a library's decorator
                self._meet(thing.__wrapped__, caller)
        elif isinstance(thing, nn.Module):
            self._met.add(id(thing))
            self._owners.add(id(thing))
            self._roots.append((thing, thing.__module__))
            for space in (vars(thing), thing._parameters, thing._buffers, thing._modules):
                self.namespaces.append((thing, space))
            own = [v for n, v in vars(thing).items() if n not in BOOKKEEPING and isinstance(v, CONTAINERS)]
            self._meet_all([*thing.children(), *own])
            for name in _HOOKS:
                self._meet_all(getattr(thing, name, {}).values(), thing.__module__)
            self._meet(vars(thing).get("forward"))
            self._meet_method(getattr_static(type(thing), "forward", None))
        elif isinstance(thing, partial):
            self._met.add(id(thing))
            self._of_functions += [
                Place(thing.keywords, k) for k, v in thing.keywords.items() if isinstance(v, NUMBERS)
            ]
            given = [*thing.args, *thing.keywords.values()]
            self._meet_all([thing.func, *given])
            self._roots += [(each, getattr(thing.func, "__module__", None)) for each in given]
        elif isinstance(thing, CONTAINERS):
            self._met.add(id(thing))
            if len(thing) <= MOST_MEMBERS:
                self._meet_all(members(thing))
        elif isinstance(call := getattr_static(type(thing), "__call__", None), FunctionType) and _is_users(call):
            self._meet(MethodType(call, thing))
        elif isinstance(inner := getattr_static(thing, "__wrapped__", None), FunctionType):  # lru_cache
            self._meet(inner, caller)

    def _meet_all(self, things: Iterable[Any], caller: str | None = None) -> None:
        for thing in things:
            self._meet(thing, caller)

    def _meet_owner(self, owner: Any) -> None:
        if isinstance(owner, nn.Module):
            self._meet(owner)
        elif id(owner) not in self._owners and (space := attributes(owner)):
            self._owners.add(id(owner))
            self._roots.append((owner, type(owner).__module__))
            self.namespaces.append((owner, space))
            self._meet_all(
                [v for v in space.values() if isinstance(v, _HOLDERS) or callable(v)], type(owner).__module__
            )

    def _meet_method(self, method: Any) -> None:
        if isinstance(method, FunctionType) and _is_users(method):
            self._meet_function(method)

    def _meet_function(self, function: FunctionType) -> None:
        if id(function) in self._met:
            return
        self._met.add(id(function))
        code, module = function.__code__, function.__module__
        self._codes[code] = None
        cells = list(zip(function.__closure__ or (), code.co_freevars, strict=True))
        named = {name: function.__globals__[name] for name in _globals(code) if name in function.__globals__}
        imported = [sys.modules[name] for name in _imports(code, function.__globals__) if name in sys.modules]
        self._of_functions.append(Place(function, "__code__"))  # a notebook's autoreload puts another there
        self._of_functions += [Place(cell, name) for cell, name in cells]
        self._of_functions += [Place(function.__globals__, name) for name in named]
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        if defaults:
            self._of_functions += [Place(function, "__defaults__"), Place(function, "__kwdefaults__")]
            self._of_functions += [Place(function.__kwdefaults__, name) for name in function.__kwdefaults__ or {}]
        contents = [content(cell) for cell, _ in cells]
        self._texts |= {text for text in (*contents, *named.values()) if isinstance(text, str)}
        self._meet_all(contents)
        self._meet_all([*named.values(), *defaults], module)
        self._roots += [(each, module) for each in (*contents, *named.values(), *defaults, *imported)]

    # What they name of the things that they reach ---------------------------------------------------------------

    def _examine(self) -> None:
        """``args.beta``, ``q.guide``, ``args["beta"]``, ``args.kl[0].beta``"""
        self._entries = MOST_ENTRIES
        self._classes: dict[Any, tuple[list[Any], list[str]]] = {}
        seen: set[int] = set()
        waiting = deque((thing, module, MOST_DEEP) for thing, module in self._roots)
        while waiting:
            thing, module, depth = waiting.popleft()
            if id(thing) in seen or isinstance(thing, (*NUMBERS, Tensor)):
                continue
            seen.add(id(thing))
            inner, module = self._inner(thing), thing.__name__ if isinstance(thing, ModuleType) else module
            self._meet_all(inner, module)
            if depth:
                waiting += [(each, module, depth - 1) for each in inner if _has_more(each)]

    def _inner(self, thing: Any) -> list[Any]:
        if isinstance(thing, dict):
            return self._in_dict(thing)
        if isinstance(thing, CONTAINERS):
            return self._in_container(thing)
        if isinstance(thing, ModuleType):
            return self._in_module(thing)
        return self._in_class(thing, made=True)[0] if isinstance(thing, type) else self._in_object(thing)

    def _in_dict(self, thing: dict) -> list[Any]:
        words = self._words
        keys = words.keys | self._texts | (set() if type(thing) is dict else words.names)
        asked = [key for key in dict.keys(thing) if key in keys]
        if not asked:
            return self._in_container(thing)
        self._of_things += [Place(thing, key) for key in (*asked, *words.with_default)]
        self._meet_unnamed(thing)
        return [dict.__getitem__(thing, key) for key in asked]

    def _in_container(self, thing: Any) -> list[Any]:
        if len(thing) > MOST_MEMBERS:
            return []
        if isinstance(thing, list | deque | dict) and len(thing) <= self._entries:
            self._entries -= len(thing)
            self.containers.append(thing)
        return list(members(thing))

    def _in_module(self, thing: ModuleType) -> list[Any]:
        space = vars(thing)
        named = sorted(self._words.names & space.keys())
        if _is_library(space.get("__file__")):
            self._of_things += [Place(space, name) for name in named if isinstance(space[name], NUMBERS)]
            return []
        self._of_things += [Place(space, name) for name in named]
        return [space[name] for name in named]

    def _in_class(self, kind: type, *, made: bool = False) -> tuple[list[Any], list[str]]:
        """What is named of a class, and by which names an object of it may come to have its own. Of methods those of
        parents too, which may be asked for by ``super()``. ``made``: a step may make such objects."""
        if (kind, made) in self._classes:
            return self._classes[kind, made]
        inner, own, nearer = [], [], []
        known, by_libraries = self._words.names | self._words.asked, issubclass(kind, _CALLED_BY_LIBRARIES)
        for ancestor in kind.__mro__:
            nearer.append(ancestor)
            space, of_library = vars(ancestor), is_of_a_library(ancestor)
            named = sorted(known & space.keys())
            called = [] if of_library else [n for n in space if by_libraries or _is_called_unnamed(n, made=made)]
            for name in (*named, *called):
                self._meet_method(_function(space[name]))
            for name in named:
                if not of_library or isinstance(space[name], NUMBERS):
                    own.append(name)
                    self._of_things += [Place(vars(each), name, each) for each in nearer]
                    if not isinstance(space[name], FunctionType):
                        inner.append(space[name])
        self._classes[kind, made] = inner, own
        return inner, own

    def _in_object(self, thing: Any) -> list[Any]:
        space, words = attributes(thing), self._words
        known = words.names | words.asked | words.keys  # vars(args)["beta"]
        named = [name for name in space if name in known]
        slots = [
            name
            for kind in type(thing).__mro__
            for name in own_slots(kind)
            if name in words.names and name not in space
        ]
        inner, of_class = self._in_class(type(thing))
        if id(thing) not in self._owners:  # then not all of its attributes are watched
            missing = {name: None for name in (*of_class, *words.asked) if name not in space and name not in slots}
            self._of_things += [
                Place(space, name)
                for name in (*named, *(missing if isinstance(getattr(thing, "__dict__", None), dict) else ()))
            ]
            self._of_things += [Place(thing, name) for name in slots]
            if is_of_users_kind(thing):
                self._meet_unnamed(space)
        inner = [*inner, *(space[name] for name in named), *(getattr(thing, name, None) for name in slots)]
        if isinstance(thing, Mapping | UserList):  # made of others
            inner += space.values()
        return inner

    def _meet_unnamed(self, space: dict) -> None:
        if len(space) <= MOST_MEMBERS:
            self._unnamed += [Place(space, key) for key, value in dict.items(space) if isinstance(value, _COUNTED)]


class _Words(NamedTuple):
    """What code names."""

    names: frozenset[str]
    """Attributes, and globals."""
    keys: frozenset[str]
    with_default: frozenset[str]
    """Keys that ``get`` asks for."""
    asked: frozenset[str]
    """By ``getattr``."""

    @staticmethod
    def of(codes: Collection[CodeType]) -> _Words:
        finders = (_names, _keys, _asked_with_default, _asked)
        return _Words(*(frozenset(chain.from_iterable(map(find, codes))) for find in finders))


def attributes(thing: Any) -> dict[str, Any]:
    space = getattr(thing, "__dict__", None)
    return space if isinstance(space, dict) else {}


def members(container: Any) -> Iterable[Any]:
    """As they lie there, whatever kinds of lists and dicts do besides."""
    if isinstance(container, dict):
        kind = kind_of_dict(container)
        return chain(kind.keys(container), kind.values(container))
    return list.__iter__(container) if isinstance(container, list) else container


def own_slots(kind: type) -> list[str]:
    """Without those of its parents."""
    members = vars(kind).items() if "__slots__" in vars(kind) else ()
    return [name for name, member in members if isinstance(member, MemberDescriptorType)]


def _is_called_unnamed(name: str, *, made: bool) -> bool:
    return name.startswith("__") and name.endswith("__") and (made or name not in _NOT_CALLED)


def _has_more(thing: Any) -> bool:
    if isinstance(thing, type):
        return not is_of_a_library(thing)
    slots = hasattr(type(thing), "__slots__") and not isinstance(thing, (*NUMBERS, Tensor))
    return slots or isinstance(thing, CONTAINERS) or bool(attributes(thing))


# What code says ---------------------------------------------------------------------------------------------------


@cache
def _names(code: CodeType) -> tuple[str, ...]:
    """Of globals and attributes that it does more with than to write them."""
    steps = [step for each in _codes(code) for step in get_instructions(each) if step.opcode in hasname]
    return tuple(dict.fromkeys(str(step.argval) for step in steps if not step.opname.startswith("STORE_")))


@cache
def _globals(code: CodeType) -> tuple[str, ...]:
    return _arguments(code, "LOAD_GLOBAL", "LOAD_NAME")


def _imports(code: CodeType, namespace: dict[str, Any]) -> list[str]:
    """From anywhere, or from the package of the module with that namespace."""
    names = _arguments(code, "IMPORT_NAME")
    return [*names, *(f"{namespace.get('__package__')}.{name}".rstrip(".") for name in names)]


@cache
def _arguments(code: CodeType, *operations: str) -> tuple[str, ...]:
    steps = [step for each in _codes(code) for step in get_instructions(each)]
    return tuple(dict.fromkeys(str(step.argval) for step in steps if step.opname in operations))


@cache
def _keys(code: CodeType) -> tuple[str, ...]:
    """``a["key"]`` and ``a.get("key")``: strings that are no names of sites, most likely."""
    return tuple(dict.fromkeys(key for key, _ in _subscripts(code)))


@cache
def _asked_with_default(code: CodeType) -> tuple[str, ...]:
    return tuple(key for key, by_get in _subscripts(code) if by_get)


@cache
def _subscripts(code: CodeType) -> tuple[tuple[str, bool], ...]:
    """The keys, and whether ``get`` asks for them."""
    between = ("CACHE", "PRECALL", "EXTENDED_ARG", "COPY", "SWAP")
    keys = []
    for each in _codes(code):
        steps = [step for step in get_instructions(each) if step.opname not in between]
        for before, step, after in zip([None, *steps], steps, [*steps[1:], None], strict=False):
            subscript = after is not None and (after.opname == "BINARY_SUBSCR" or after.argrepr == "[]")
            asked = before is not None and str(before.argval) == "get"
            if isinstance(step.argval, str) and step.opname == "LOAD_CONST" and (subscript or asked):
                keys.append((step.argval, asked))
    return tuple(keys)


@cache
def _asked(code: CodeType) -> tuple[str, ...]:
    """``getattr(a, "name")``"""
    asking = [each for each in _codes(code) if {"getattr", "hasattr", "attrgetter"} & {*each.co_names}]
    constants = [x for each in asking for x in each.co_consts]
    texts = chain(constants, *(x for x in constants if isinstance(x, tuple)))
    return tuple(dict.fromkeys(text for text in texts if isinstance(text, str) and text.isidentifier()))


def _codes(code: CodeType) -> list[CodeType]:
    """Its own, and those of the functions inside it."""
    return [code, *(each for inner in code.co_consts if isinstance(inner, CodeType) for each in _codes(inner))]


# Whose it is --------------------------------------------------------------------------------------------------------


def _function(member: Any) -> Any:
    """Of a property, a static or class method and the like; others are left as they are."""
    if isinstance(member, property):
        return member.fget
    if isinstance(member, staticmethod | classmethod):
        return _function(member.__func__)
    return _function(member.func) if isinstance(member, partialmethod | cached_property) else member


def _is_users(function: FunctionType) -> bool:
    return not (function.__module__ or "").startswith(("torch.", "pyro.", "pyrovae.infer"))


def _is_followed(function: FunctionType, caller: str) -> bool:
    return function.__module__ == caller or not _is_library(function.__code__.co_filename)


def is_of_users_kind(thing: Any) -> bool:
    """Or one that Python has for a user's attributes."""
    return isinstance(thing, SimpleNamespace | Namespace) or not is_of_a_library(type(thing))


def is_of_a_library(kind: type) -> bool:
    if kind.__module__ == "__main__":  # in a notebook it has no file
        return False
    return _is_library(getattr(sys.modules.get(kind.__module__), "__file__", None))


@cache
def _is_library(file: str | None) -> bool:
    """Python's own, or installed: their numbers are fixed, and there are many."""
    installed = file is None or "site-packages" in file or "dist-packages" in file
    return installed or str(file).startswith((get_path("stdlib"), "<frozen"))
