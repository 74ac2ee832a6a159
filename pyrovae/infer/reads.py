"""What functions read besides their arguments, as far as their code tells: namespaces, single places, containers."""

from __future__ import annotations

import sys
from collections import UserList, deque
from collections.abc import Iterable, Mapping
from dis import get_instructions
from functools import cache, partial
from inspect import getattr_static
from sysconfig import get_path
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

from pyro.poutine.scale_messenger import ScaleMessenger
from torch import Tensor, nn

from pyrovae.infer.stand_ins import Place, content, kind_of_dict

__all__ = ["BOOKKEEPING", "CONTAINERS", "MOST_MEMBERS", "NUMBERS", "Reads", "attributes", "is_of_a_library", "members"]

NUMBERS = (bool, int, float, complex, str, type(None))
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
_CALLED_UNNAMED = ("__getattr__", "__getattribute__", "__getitem__", "__float__")


class Reads:
    """Attributes of the modules and objects that ``functions`` belong to, and the globals and closures that they name.

    Of other objects (``args.beta``), the attributes that a function names; of classes, modules and dicts too
    (``args["beta"]``); lists, and dicts that are read in another way, whole. So too for the functions that it calls,
    but for those of installed packages. Modules are found in containers and default arguments as well.
    """

    def __init__(self, functions: Iterable[Any]) -> None:
        self.namespaces: list[tuple[Any, dict]] = []
        """With their owners."""
        self.named: list[Place] = []
        self.containers: list[Any] = []
        """Those that are read whole."""
        self.takes_next = False
        """From an iterator, perhaps."""
        self.names: set[str] = set()
        """All that the code names."""
        self._met: set[Any] = set()
        self._owners: set[int] = set()
        self._whole: set[int] = set()
        self._entries = MOST_ENTRIES
        self._meet_all(functions)

    def _meet(self, thing: Any, caller: str | None = None) -> None:
        """What is called, and holds what is. ``caller`` names the module where it is found; None: anywhere."""
        if isinstance(thing, MethodType):
            self._meet_owner(thing.__self__)
            self._meet_method(thing.__self__, thing.__func__)
        elif isinstance(thing, ScaleMessenger):
            self._meet_owner(thing)
        elif isinstance(thing, (*NUMBERS, Tensor, type, ModuleType)) or id(thing) in self._met:
            return
        elif isinstance(thing, FunctionType):
            if caller is None or _is_followed(thing, caller):
                self._met.add(id(thing))
                self._meet_function(thing)
        elif isinstance(thing, nn.Module):
            self._met.add(id(thing))
            self._owners.add(id(thing))
            for space in (vars(thing), thing._parameters, thing._buffers, thing._modules):
                self.namespaces.append((thing, space))
            own = [v for n, v in vars(thing).items() if n not in BOOKKEEPING and isinstance(v, CONTAINERS)]
            self._meet_all([*thing.children(), *own])
            self._meet_all([*thing._forward_hooks.values(), *thing._forward_pre_hooks.values()], thing.__module__)
            self._meet_method(thing, type(thing).forward)
        elif isinstance(thing, partial):
            self._met.add(id(thing))
            self.named += [Place(thing.keywords, k) for k, v in thing.keywords.items() if isinstance(v, NUMBERS)]
            given = [*thing.args, *thing.keywords.values()]
            self._meet_all([thing.func, *given])
            if isinstance(thing.func, FunctionType):
                self._meet_attributes(thing.func.__code__, given, thing.func.__module__)
        elif isinstance(thing, CONTAINERS):
            self._met.add(id(thing))
            if len(thing) <= MOST_MEMBERS:
                self._meet_all(members(thing))
        elif isinstance(call := getattr_static(type(thing), "__call__", None), FunctionType) and _is_users(call):
            self._meet(MethodType(call, thing))

    def _meet_all(self, things: Iterable[Any], caller: str | None = None) -> None:
        for thing in things:
            self._meet(thing, caller)

    def _meet_owner(self, owner: Any) -> None:
        if isinstance(owner, nn.Module):
            self._meet(owner)
        elif id(owner) not in self._owners and (space := attributes(owner)):
            self._owners.add(id(owner))
            self.namespaces.append((owner, space))
            self._meet_all([v for v in space.values() if isinstance(v, _HOLDERS)])

    def _meet_method(self, owner: Any, method: Any) -> None:
        """Its globals, and what it names of its owner."""
        both = id(owner), id(method)
        if isinstance(method, FunctionType) and both not in self._met and _is_users(method):
            self._met.add(both)
            self._meet_function(method)
            self._meet_attributes(method.__code__, [owner], method.__module__)

    def _meet_function(self, function: FunctionType) -> None:
        code, module = function.__code__, function.__module__
        cells = list(zip(function.__closure__ or (), code.co_freevars, strict=True))
        named = {name: function.__globals__[name] for name in _globals(code) if name in function.__globals__}
        imported = [sys.modules[name] for name in _imports(code) if name in sys.modules]
        self.takes_next |= "next" in _globals(code)
        self.names |= {*_names(code), *_keys(code), *_asked(code)}
        self.named += [Place(cell, name) for cell, name in cells]
        self.named += [Place(function.__globals__, name) for name, value in named.items() if _is_value(value)]
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        if function.__defaults__:
            self.named.append(Place(function, "__defaults__"))
        contents = [content(cell) for cell, _ in cells]
        self._meet_all(contents)
        self._meet_all([*named.values(), *defaults], module)
        self._meet_attributes(code, [*contents, *named.values(), *defaults, *imported], module)

    # What a function names of the things that it reads --------------------------------------------------------

    def _meet_attributes(self, code: CodeType, things: list[Any], caller: str, depth: int = MOST_DEEP) -> None:
        """``args.beta``, ``q.guide``, ``args["beta"]``, ``args.kl[0].beta``"""
        texts = [thing for thing in things if isinstance(thing, str)]  # keys, perhaps
        for thing in things:
            both = id(thing), id(code)
            if both in self._met or isinstance(thing, (*NUMBERS, Tensor)):
                continue
            self._met.add(both)
            if isinstance(thing, dict):
                inner = self._in_dict(code, thing, texts)
            elif isinstance(thing, CONTAINERS):
                inner = self._in_container(thing)
            elif isinstance(thing, ModuleType):
                inner = self._in_module(code, thing)
            elif isinstance(thing, type):
                inner = [value for name in _names(code) for value in self._in_class(thing, thing, name)]
            else:
                inner = self._in_object(code, thing)
            self._meet_all(inner, thing.__name__ if isinstance(thing, ModuleType) else caller)
            if depth:
                self._meet_attributes(code, [x for x in inner if _has_more(x)], caller, depth - 1)

    def _in_dict(self, code: CodeType, thing: dict, texts: list[str]) -> list[Any]:
        keys = (*_keys(code), *texts, *(() if type(thing) is dict else _names(code)))
        asked = [
            key for key in dict.fromkeys(keys) if dict.__contains__(thing, key) or key in _asked_with_default(code)
        ]
        if not asked:
            return self._in_container(thing)
        self.named += [Place(thing, key) for key in asked]
        return [dict.__getitem__(thing, key) for key in asked if dict.__contains__(thing, key)]

    def _in_container(self, thing: Any) -> list[Any]:
        if len(thing) > MOST_MEMBERS:
            return []
        if isinstance(thing, list | deque | dict) and id(thing) not in self._whole and len(thing) <= self._entries:
            self._whole.add(id(thing))
            self._entries -= len(thing)
            self.containers.append(thing)
        return list(members(thing))

    def _in_module(self, code: CodeType, thing: ModuleType) -> list[Any]:
        space = vars(thing)
        named = [name for name in _names(code) if name in space]
        if _is_library(getattr(thing, "__file__", None)):
            self.named += [Place(space, name) for name in named if isinstance(space[name], NUMBERS)]
            return []
        self.named += [Place(space, name) for name in named if _is_value(space[name])]
        return [space[name] for name in named]

    def _in_class(self, owner: Any, kind: type, name: str) -> list[Any]:
        """Of methods those of parents too, which may be asked for by ``super()``."""
        having = [ancestor for ancestor in kind.__mro__ if name in vars(ancestor)]
        if not having:
            return []
        for ancestor in having:
            self._meet_method(owner, _function(vars(ancestor)[name]))
        value = vars(having[0])[name]
        if hasattr(type(value), "__get__") or (is_of_a_library(having[0]) and not isinstance(value, NUMBERS)):
            return []
        nearer = kind.__mro__[: kind.__mro__.index(having[0]) + 1]  # which may come to have it too
        self.named += [Place(vars(ancestor), name, ancestor) for ancestor in nearer]
        return [value]

    def _in_object(self, code: CodeType, thing: Any) -> list[Any]:
        space, names = attributes(thing), _names(code)
        named = [name for name in dict.fromkeys((*names, *_keys(code))) if name in space]  # vars(args)["beta"]
        slots = [name for name in names if name not in space and _is_slot(thing, name)]
        inner = [space[name] for name in named] + [getattr(thing, name, None) for name in slots]
        if id(thing) not in self._owners:  # then not all of its attributes are watched
            self.named += [Place(space, name) for name in (*named, *_asked(code))]
            self.named += [Place(thing, name) for name in slots]
        if isinstance(thing, Mapping | UserList):  # made of others
            inner += space.values()
        for name in names:
            if name not in space:
                inner += self._in_class(thing, type(thing), name)
        for name in _CALLED_UNNAMED:
            self._meet_method(thing, getattr_static(type(thing), name, None))
        return inner


def attributes(thing: Any) -> dict[str, Any]:
    space = getattr(thing, "__dict__", None)
    return space if isinstance(space, dict) else {}


def members(container: Any) -> Iterable[Any]:
    """As they lie there, whatever kinds of lists and dicts do besides."""
    if isinstance(container, dict):
        return kind_of_dict(container).values(container)
    return list.__iter__(container) if isinstance(container, list) else container


def _is_value(thing: Any) -> bool:
    return not isinstance(thing, type | ModuleType) and not callable(thing)


def _is_slot(thing: Any, name: str) -> bool:
    member = getattr_static(type(thing), name, None)
    return isinstance(member, MemberDescriptorType) and "__slots__" in vars(member.__objclass__)


def _has_more(thing: Any) -> bool:
    if isinstance(thing, type):
        return not is_of_a_library(thing)
    slots = hasattr(type(thing), "__slots__") and not isinstance(thing, (*NUMBERS, Tensor))
    return slots or isinstance(thing, CONTAINERS) or bool(attributes(thing))


# What code says ---------------------------------------------------------------------------------------------------


@cache
def _names(code: CodeType) -> tuple[str, ...]:
    """Of globals and attributes."""
    return tuple(dict.fromkeys(name for each in _codes(code) for name in each.co_names))


@cache
def _globals(code: CodeType) -> tuple[str, ...]:
    return _arguments(code, "LOAD_GLOBAL", "LOAD_NAME")


@cache
def _imports(code: CodeType) -> tuple[str, ...]:
    return _arguments(code, "IMPORT_NAME")


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
    texts = [x for each in _codes(code) if "getattr" in each.co_names for x in each.co_consts if isinstance(x, str)]
    return tuple(dict.fromkeys(text for text in texts if text.isidentifier()))


def _codes(code: CodeType) -> list[CodeType]:
    """Its own, and those of the functions inside it."""
    return [code, *(each for inner in code.co_consts if isinstance(inner, CodeType) for each in _codes(inner))]


# Whose it is --------------------------------------------------------------------------------------------------------


def _function(member: Any) -> Any:
    """Of a property, or a static or class method; others are left as they are."""
    return member.fget if isinstance(member, property) else getattr(member, "__func__", member)


def _is_users(function: FunctionType) -> bool:
    return not (function.__module__ or "").startswith(("torch.", "pyro.", "pyrovae.infer"))


def _is_followed(function: FunctionType, caller: str) -> bool:
    return function.__module__ == caller or not _is_library(function.__code__.co_filename)


def is_of_a_library(kind: type) -> bool:
    if kind.__module__ == "__main__":  # in a notebook it has no file
        return False
    return _is_library(getattr(sys.modules.get(kind.__module__), "__file__", None))


@cache
def _is_library(file: str | None) -> bool:
    """Python's own, or installed: their numbers are fixed, and there are many."""
    installed = file is None or "site-packages" in file or "dist-packages" in file
    return installed or str(file).startswith((get_path("stdlib"), "<frozen"))
