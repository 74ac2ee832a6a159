"""Rules of the house: names of modules, which room imports which, docstrings, and folders the import works from."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import pytest

import pyrovae

FILE = Path(pyrovae.__file__)
REPOSITORY = Path(__file__).parents[1]
MODULES = ["pyrovae", *(found.name for found in pkgutil.walk_packages(pyrovae.__path__, "pyrovae."))]
MODULES.remove("pyrovae.__main__")  # importing it runs the command line

# Each room, and the rooms below it that it may import. A room is a package, or a module beside the packages.
BASE = {"pair", "networks", "checks", "checkpoint", "random_state", "machine"}
BELOW = {
    "cli": {"comparison", "plots", "evaluation", "training", "infer", "models", "data", "the whole package", *BASE},
    "comparison": {"plots", "evaluation", "training", "infer", "data", *BASE},
    "plots": {"evaluation", "training", "infer", "data", *BASE},
    "evaluation": {"training", "infer", "data", *BASE},
    "training": {"infer", "data", *BASE},
    "models": {"infer", *BASE},
    "infer": BASE,
    "pair": {"networks", "checks", "checkpoint"},
    "networks": {"checks"},
    "data": {"checks", "checkpoint"},
    "checkpoint": {"checks"},
    "random_state": set(),
    "machine": set(),
    "checks": set(),
}

STARTS_OF_FRAGMENTS = """
about above after among and as at before behind below beside between but by for from how if in into it its like of on
only or over per than that their then there these this those through to under unless until what whatever when where
whether which while who whose why with within without
"""


# Modules


def is_hidden(name: str) -> bool:
    """Return whether the dotted name gives something else than the module of that name."""
    module = importlib.import_module(name)
    return reduce(getattr, name.split(".")[1:], pyrovae) is not module


def test_no_function_or_class_hides_a_module():
    assert {name for name in MODULES if is_hidden(name)} == set()


# Arrows


def room_of(module: str) -> str:
    """Return the package, or the module of the base, that a module belongs to."""
    return module.split(".")[1] if "." in module else "the whole package"


def imported_modules(node: ast.AST) -> Iterator[str]:
    """Yield names of the project's modules that the code imports, inside functions too, but not for types only."""
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        for child in node.orelse:
            yield from imported_modules(child)
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "pyrovae")
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "a relative import does not name its room"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        if node.module == "pyrovae":
            yield from (name if name in MODULES else "pyrovae" for name in names)
        elif node.module.split(".")[0] == "pyrovae":
            yield node.module
    for child in ast.iter_child_nodes(node):
        yield from imported_modules(child)


def test_rooms_import_only_rooms_below_them():
    arrows = {}
    for name in MODULES[1:]:  # the whole package collects from every room
        source = Path(importlib.import_module(name).__file__).read_text(encoding="utf-8")
        for target in imported_modules(ast.parse(source)):
            arrows.setdefault((room_of(name), room_of(target)), f"{name} imports {target}")
    upward = {(room, target) for room, target in arrows if room != target and target not in BELOW[room]}
    assert not upward, [arrows[arrow] for arrow in upward]


@pytest.mark.parametrize(
    ("code", "modules"),
    [
        ("import torch, pyrovae.infer.svi as s", ["pyrovae.infer.svi"]),
        ("from pyrovae import plots, fit", ["pyrovae.plots", "pyrovae"]),
        ("def f():\n    from pyrovae.pair import Pair", ["pyrovae.pair"]),
        ("if TYPE_CHECKING:\n    import pyrovae\nelse:\n    import pyrovae.data", ["pyrovae.data"]),
        ("from pyro import infer", []),
    ],
)
def test_imports_are_found(code, modules):
    assert list(imported_modules(ast.parse(code))) == modules


# Docstrings


def public_objects() -> dict[str, object]:
    """Return what the package, a room or a module of the base exports, by its public name: functions and classes."""
    found = {}
    for room in (*(f"pyrovae.{name}" for name in BELOW), "pyrovae"):
        module = importlib.import_module(room)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if (inspect.isclass(value) or inspect.isroutine(value)) and value not in found.values():
                found[f"{room}.{name}"] = value
    return found


def is_fragment(value: object) -> bool:
    """Return whether the docstring is missing, is the signature that a dataclass writes, or begins as a fragment."""
    text = value.__doc__ or ""
    words = text.lower().replace(":", " ").replace(",", " ").split()
    return not words or text.startswith(f"{value.__name__}(") or words[0] in STARTS_OF_FRAGMENTS.split()


def test_docstrings_begin_with_a_verb_or_a_noun():
    assert {name for name, value in public_objects().items() if is_fragment(value)} == set()


# Folders


@pytest.mark.parametrize("place", ["beside the clone", "inside the clone", "elsewhere"])
def test_the_import_gives_this_checkout_from_every_folder(place, tmp_path):
    folder = {"beside the clone": REPOSITORY.parent, "inside the clone": REPOSITORY, "elsewhere": tmp_path}[place]
    code = "import json, pyrovae; print(json.dumps([pyrovae.__file__, pyrovae.models.__file__]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package, models = (Path(path).resolve() for path in json.loads(done.stdout))
    assert package == FILE.resolve()
    assert models.is_relative_to(FILE.resolve().parents[1])
