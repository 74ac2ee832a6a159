"""The README is right: its set-up commands, its Python and its command lines work as written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer

import pyrovae
from pyrovae import data
from pyrovae.cli.main import app
from pyrovae.cli.runs import RUN_FILES
from pyrovae.infer import LOSSES
from pyrovae.models import REGISTRY

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


PYTHON = blocks("python")
COMMANDS = sorted({line.split("  ")[0] for line in re.findall(r"(?:^|`)(pyrovae [a-z][^`\n]*)", README, re.M)})


def test_each_of_the_two_set_up_commands_is_one_line():
    first, second = (block.strip() for block in blocks("sh"))
    for command in (first, second):
        assert "\n" not in command
        assert command.startswith("python3 -m venv ")
        assert " -c constraints.txt " in command
    assert first.endswith("pyrovae fit vae")
    assert "[test]" in second
    assert second.endswith("pytest")
    assert "torch==" in (ROOT / "constraints.txt").read_text()


def test_ci_runs_the_second_set_up_command_as_written():
    pattern = re.search(r'grep .*-E "([^"]+)" README.md', (ROOT / ".ci" / "run").read_text())
    assert pattern is not None
    assert re.findall(f"{pattern[1]}", README, re.M) == [blocks("sh")[1].strip()]


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_runs_and_prints_the_numbers_it_claims(monkeypatch, tmp_path, capsys, number):
    """Run each block as written, but with fewer epochs and samples."""
    fit, evaluate = pyrovae.fit, pyrovae.evaluate
    monkeypatch.setattr(pyrovae, "fit", lambda *args, **options: fit(*args, **options | {"epochs": 1}))
    monkeypatch.setattr(pyrovae, "evaluate", lambda *args, **options: evaluate(*args, **options | {"num_samples": 5}))
    monkeypatch.chdir(tmp_path)
    exec(compile(PYTHON[number], f"README.md, block {number}", "exec"), {"__name__": "readme", "pv": pyrovae})
    for claimed in re.findall(r"−([\d.]+) nats", PYTHON[number]):
        assert f"-{claimed}" in capsys.readouterr().out


def test_the_python_shows_how_to_write_a_pair():
    assert any("class MyPair(pv.Pair)" in block for block in PYTHON)


def test_the_written_pair_checks_its_number_of_features():
    (block,) = (block for block in PYTHON if "class MyPair" in block)
    names = {"__name__": "readme"}
    exec(block.partition("data = ")[0], names)
    with pytest.raises(ValueError, match="expected 64 features, as the pair was built with data_dim=64; got 60"):
        pyrovae.fit(names["MyPair"](data_dim=64), torch.ones(5, 60), epochs=1)


def test_every_command_is_shown():
    assert {command.split()[1] for command in COMMANDS} >= set(typer.main.get_command(app).commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_lines_use_names_that_exist(command):
    """Check the names of commands, options, pairs, data sets and losses."""
    _, name, *words = shlex.split(command)
    known = typer.main.get_command(app).commands
    assert name in known
    options = {option: parameter for parameter in known[name].params for option in parameter.opts}
    arguments, rest = [], iter(words)
    for word in rest:
        if word.startswith("-"):
            assert word in options, word
            value = None if options[word].is_flag else next(rest)
            if word == "--data" and not value.endswith((".csv", ".npy")):
                assert value in data.names()
            if word == "--loss":
                assert value in LOSSES
        else:
            arguments.append(word)
    if name in ("fit", "compare") and arguments:
        assert arguments[0] in REGISTRY or re.fullmatch(r"\w+\.py:\w+", arguments[0])


def test_every_file_of_a_run_folder_is_named():
    for name in ("config.json", "pictures/", *RUN_FILES):
        assert f"`{name}`" in README
