"""Tutorials: text and notebook agree, notebooks were run, code uses public names only and runs.

``python tests/test_tutorials.py 01 02`` executes the texts whose names begin so (all, where none is named) and writes
their notebooks, and the last picture of each for the README.
"""

from __future__ import annotations

import ast
import base64
import importlib
import inspect
import os
import pkgutil
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import jupytext
import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
from nbclient import NotebookClient

import pyrovae
from pyrovae.infer import SVI

FOLDER = Path(__file__).parent.parent / "tutorials"
PICTURES = FOLDER / "pictures"
TUTORIALS = sorted(path.stem for path in FOLDER.glob("[!.]*.py"))
SECONDS = 180
STEPS = 5  # of the smoke test, for each SVI object
CAPS = {  # of the smoke test, on keyword arguments of public functions
    "epochs": 1,
    "max_iter": 2,
    "num_chains": 2,
    "num_temperatures": 5,
    "restarts": 3,
    "num_draws": 9,
    "num_samples": 30,
    "num_simulations": 50,
    "num_steps": 3,
}

each_tutorial = pytest.mark.parametrize("name", TUTORIALS)


def read_text(name: str) -> Any:
    return jupytext.read(FOLDER / f"{name}.py")


def read_notebook(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def execute(name: str) -> Any:
    """Return the text as a notebook that was run from top to bottom in a fresh kernel."""
    notebook = read_text(name)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # random ones would differ each time
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
    )
    # `import pyro` in a kernel without ipywidgets makes tqdm say that it will draw plain bars.
    # One thread: of two notebooks at once on two cores, the threads would spin for each other.
    client.execute(env=os.environ | {"PYTHONWARNINGS": "ignore:IProgress not found", "OMP_NUM_THREADS": "1"})
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    return notebook


def last_picture(notebook: Any) -> bytes:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return base64.b64decode([o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})][-1])


# Texts and notebooks


def test_every_tutorial_has_a_text_a_notebook_and_a_picture():
    """The folder holds nothing else."""
    found = sorted(path.name for path in FOLDER.iterdir() if not path.name.startswith((".", "__")))
    assert TUTORIALS
    assert found == sorted(["pictures", *(f"{name}.{ending}" for name in TUTORIALS for ending in ("py", "ipynb"))])
    assert sorted(path.name for path in PICTURES.iterdir()) == [f"{name}.png" for name in TUTORIALS]
    assert all(re.fullmatch(r"\d\d(-[a-z0-9]+)+", name) for name in TUTORIALS)


@each_tutorial
def test_text_and_notebook_agree(name):
    text, notebook = ([(c.cell_type, c.source) for c in n.cells] for n in (read_text(name), read_notebook(name)))
    assert notebook == text, f"run: python tests/test_tutorials.py {name}"


@each_tutorial
def test_readme_links_the_notebook_and_shows_its_last_picture(name):
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    assert f"](tutorials/{name}.ipynb)" in readme
    assert re.search(rf'<img src="tutorials/pictures/{name}\.png"[^>]* alt="[^"]+"', readme)
    assert (PICTURES / f"{name}.png").read_bytes() == last_picture(read_notebook(name))


@each_tutorial
def test_text_has_a_title_two_lines_formulas_and_a_question(name):
    """The two lines say what the tutorial teaches; the question stands at the end."""
    cells = read_text(name).cells
    prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
    assert cells[0].cell_type == cells[-1].cell_type == "markdown"
    assert re.fullmatch(r"# \S.*\n\n\S.*\n\S.*", cells[0].source), "expected a title and two lines"
    assert any("$$" in source for source in prose)
    heading, _, question = prose[-1].rpartition("## A question to try\n")
    assert heading or prose[-1].startswith("## A question to try")
    assert "?" in question


@each_tutorial
def test_notebook_was_run_and_shows_no_error_or_path(name):
    """It was run from top to bottom, gave no warning, and has pictures of modest size."""
    cells = [cell for cell in read_notebook(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    texts = [o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in outputs]
    assert any(text.strip() for text in texts)
    for text in texts:
        assert not re.search(r"Warning\b|(?<!\w)(/[\w.-]+){3}|[A-Z]:\\", text), text
    pictures = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert pictures
    assert max(len(base64.b64decode(picture)) for picture in pictures) < 100_000


# Names


def private_names(code: str) -> list[str]:
    """Return names of pyrovae in the code that their module's ``__all__`` lacks, and attributes with an underscore."""
    known: dict[str, Any] = {}  # what names of the code stand for
    found: list[str] = []

    def take(owner: Any, name: str) -> Any:
        if not isinstance(owner, ModuleType) or owner.__name__.split(".")[0] != "pyrovae":
            return None
        if name not in getattr(owner, "__all__", ()):
            found.append(f"{owner.__name__}.{name}")
        return getattr(owner, name, None)

    def resolve(node: ast.expr) -> Any:
        if isinstance(node, ast.Attribute):
            return take(resolve(node.value), node.attr)
        return known.get(node.id) if isinstance(node, ast.Name) else None

    nodes = list(ast.walk(ast.parse(code)))
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                known[alias.asname or alias.name.split(".")[0]] = importlib.import_module(
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                known[alias.asname or alias.name] = take(importlib.import_module(node.module or "."), alias.name)
    for node in nodes:
        if isinstance(node, ast.Attribute):
            resolve(node)
            if re.match(r"_(?!_\w+__$)", node.attr):
                found.append(node.attr)
    return list(dict.fromkeys(found))


@each_tutorial
def test_code_uses_public_names_only(name):
    assert private_names("\n".join(c.source for c in read_text(name).cells if c.cell_type == "code")) == []


@pytest.mark.parametrize(
    ("code", "private"),
    [
        ("import pyrovae as pv\npv.fit(pv.models.GMM(2, 2), pv.data.load('iris').train)", []),
        ("from pyrovae.infer import SVI\nimport torch\ntorch.no_such_thing\nSVI.anything", []),
        ("import pyrovae as pv\npv.models.no_such_pair", ["pyrovae.models.no_such_pair"]),
        ("import pyrovae\npyrovae.machine.keep_memory", ["pyrovae.machine"]),
        ("from pyrovae.training.loop import make_batches", ["pyrovae.training.loop.make_batches"]),
        (
            "import pyrovae.plots\npyrovae.plots.figures.new_axes",
            ["pyrovae.plots.figures", "pyrovae.plots.figures.new_axes"],
        ),
        ("from pyrovae import infer as i\ni.say_once", ["pyrovae.infer.say_once"]),
        ("pair._posterior(x)\nsuper().__init__()", ["_posterior"]),
    ],
)
def test_private_names_are_found(code, private):
    assert private_names(code) == private


# Runs


def shortened(function: Callable) -> Callable:
    """Return the function with keyword-only arguments of at most ``CAPS`` where a tutorial itself calls it."""
    signature = inspect.signature(function)
    names = [n for n, p in signature.parameters.items() if n in CAPS and p.kind is p.KEYWORD_ONLY]

    @wraps(function)
    def wrapper(*args: Any, **options: Any) -> Any:
        if sys._getframe(1).f_globals["__name__"] != "tutorial":
            return function(*args, **options)
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        for name in names:
            bound.arguments[name] = min(bound.arguments[name] or CAPS[name], CAPS[name])
        return function(*bound.args, **bound.kwargs)

    return wrapper if names else function


def first_steps(step: Callable) -> Callable:
    """Return ``SVI.step`` that steps ``STEPS`` times and then repeats its last answer."""
    losses: WeakKeyDictionary[SVI, list[Any]] = WeakKeyDictionary()

    @wraps(step)
    def wrapper(self: SVI, *args: Any, **options: Any) -> Any:
        taken = losses.setdefault(self, [])
        if len(taken) < STEPS:
            taken.append(step(self, *args, **options))
        return taken[-1]

    return wrapper


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make public functions do little, and let ``plt.show`` draw without a window."""
    for found in pkgutil.walk_packages(pyrovae.__path__, "pyrovae."):
        importlib.import_module(found.name)
    for module in [m for n, m in sys.modules.items() if n.split(".")[0] == "pyrovae"]:
        for exported in getattr(module, "__all__", ()):
            if inspect.isfunction(function := getattr(module, exported)):
                monkeypatch.setattr(module, exported, shortened(function))
    monkeypatch.setattr(SVI, "step", first_steps(SVI.step))

    def show() -> None:
        assert plt.get_fignums()
        for number in plt.get_fignums():
            plt.figure(number).canvas.draw()
        plt.close("all")

    monkeypatch.setattr(plt, "show", show)
    backend = matplotlib.get_backend()
    plt.switch_backend("agg")
    with matplotlib.rc_context():
        yield
    plt.close("all")
    plt.switch_backend(backend)


@each_tutorial
def test_code_runs_with_few_epochs_samples_and_restarts(name, short_runs, tmp_path, monkeypatch):
    """It runs in this process, shows every figure and writes no files."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "tutorial"}
    for number, cell in enumerate(read_text(name).cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{name}, cell {number}", "exec"), names)
    assert not plt.get_fignums(), "a figure is not shown: plt.show()"
    assert not list(tmp_path.iterdir()), "a tutorial writes no files"


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS)
@each_tutorial
def test_notebook_runs_in_time(name, tmp_path, monkeypatch):
    """It runs whole, in a fresh kernel, as a reader runs it."""
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    began = time.perf_counter()
    notebook = execute(name)
    assert time.perf_counter() - began < SECONDS
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


if __name__ == "__main__":
    for tutorial in TUTORIALS:
        if not sys.argv[1:] or tutorial.startswith(tuple(sys.argv[1:])):
            written = execute(tutorial)
            nbformat.write(written, FOLDER / f"{tutorial}.ipynb")
            PICTURES.mkdir(exist_ok=True)
            (PICTURES / f"{tutorial}.png").write_bytes(last_picture(written))
            print(tutorial)
