"""Folders of comparisons. Each cell is written when it is done, so that a stopped comparison goes on from there."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyrovae.checkpoint import write_text
from pyrovae.checks import check_free_folder
from pyrovae.comparison.cells import Job
from pyrovae.comparison.result import Cell, Comparison
from pyrovae.pair import Pair

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FILES", "ComparisonFolder", "read_comparison"]

FORMAT = 1
TABLES = ("comparison.csv", "comparison.md", "comparison.tex")
PICTURES = ("comparison.png", "gaps.png", "responsibilities.png", "densities.png")
FILES = ("comparison.json", "report.html", *TABLES, *PICTURES)


class ComparisonFolder:
    """``comparison.json`` with all numbers, tables, pictures, and ``cells/`` with each cell's numbers and weights."""

    def __init__(self, path: str | Path, jobs: list[Job]) -> None:
        self.path = Path(path)
        self.cells = self.path / "cells"
        texts = [(job, f"{i:02d} {job.pair} {job.method.name} seed{job.seed}") for i, job in enumerate(jobs)]
        self.names = {id(job): re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") for job, text in texts}

    def create(self, settings: dict[str, Any], config: dict[str, Any] | None, overwrite: bool) -> None:
        """Make the folder. Of an earlier comparison there, delete its own files and nothing else.

        Raises:
            FileExistsError: something is there; or, with ``overwrite``, something else than a comparison.
        """
        check_free_folder("folder", self.path, "comparison", overwrite=overwrite, read=lambda: read_record(self.path))
        self.cells.mkdir(parents=True, exist_ok=True)
        for file in (*map(self.path.joinpath, FILES), *self.cells.glob("[0-9][0-9]*-*-seed*.*")):
            file.unlink(missing_ok=True)
        self._write_record(settings, config, {})

    def check_same(self, settings: dict[str, Any]) -> None:
        """Raise ValueError unless the comparison in the folder was started with these settings."""
        then, now = read_record(self.path)["settings"], json.loads(json.dumps(settings))
        for name in now:
            if then.get(name) != now[name]:
                raise ValueError(
                    f"resume: the comparison in {self.path} was started with {name} {then.get(name)}, and this is "
                    f"{now[name]}. Go on with everything as it was."
                )

    def write_cell(self, job: Job, cell: Cell, pair: Pair) -> None:
        """Write a cell that is done: its weights, then its numbers."""
        temporary = self.file(job, "safetensors.tmp")
        pair.save(temporary)
        os.replace(temporary, self.file(job, "safetensors"))
        write_text(self.file(job, "json"), json.dumps(asdict(cell)) + "\n")  # last, as it marks the cell as done
        self.file(job, "checkpoint.safetensors").unlink(missing_ok=True)

    def read_cell(self, job: Job) -> Cell | None:
        """Read the numbers of a cell; None where the cell is not done."""
        file = self.file(job, "json")
        if not (file.is_file() and self.file(job, "safetensors").is_file()):
            return None
        try:
            return Cell(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"resume: {file} is damaged ({error}). Delete it to compute its cell again.") from error

    def write(self, comparison: Comparison, x: Tensor, feature_names: tuple[str, ...] | None) -> None:
        """Write all numbers, the tables, and the pictures that apply. A picture that fails is a line on stderr."""
        from pyrovae import plots
        from pyrovae.evaluation import responsibilities

        record = read_record(self.path)
        self._write_record(record["settings"], record["config"], comparison.to_dict())
        comparison.to_csv(self.path / "comparison.csv")
        comparison.to_markdown(self.path / "comparison.md")
        comparison.to_latex(self.path / "comparison.tex")
        pairs = comparison.pairs
        figures: dict[str, Callable[[], Figure]] = {}
        if any(len(cell.trace.get("passes", [])) > 1 for cell in comparison.cells):
            figures["comparison"] = comparison.plot
        if any(row.mean["gap"] is not None for row in comparison.table):
            figures["gaps"] = comparison.plot_gaps
        if pairs and all(responsibilities(pair, x[:2]) is not None for pair in pairs.values()):
            figures["responsibilities"] = lambda: plots.plot_responsibilities(pairs, x, feature_names=feature_names)
        elif x.shape[1] == 2 and pairs and all(plots.has_density(pair, x) for pair in pairs.values()):
            figures["densities"] = lambda: plots.plot_densities(pairs, x, feature_names=feature_names)
        plots.save_figures(figures, self.path)

    def file(self, job: Job, ending: str) -> Path:
        """Return a file of this cell: ``safetensors`` (weights), ``json`` (numbers), or ``checkpoint.safetensors``, the
        state of its training until it is done."""
        return self.cells / f"{self.names[id(job)]}.{ending}"

    def _write_record(self, settings: dict[str, Any], config: dict[str, Any] | None, found: dict[str, Any]) -> None:
        cells = ",\n".join(f"    {json.dumps(cell)}" for cell in found.get("cells", []))  # one long line for each
        start = {"format": FORMAT, "finished": bool(found), "config": config, "settings": settings}
        head = json.dumps(start | found | {"cells": 0}, indent=2, ensure_ascii=False).removesuffix('"cells": 0\n}')
        write_text(self.path / "comparison.json", f'{head}"cells": [\n{cells}\n  ]\n}}\n')


def read_record(path: Path) -> dict[str, Any]:
    """Read comparison.json in a folder, or raise where it is missing, damaged or foreign."""
    file = path / "comparison.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"folder: expected a folder that `pyrovae compare` wrote; {path} has no comparison.json."
        )
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']}, and this version reads {FORMAT}")
        return {"settings": dict(record["settings"]), "config": record["config"]} | record
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"folder: {file} is damaged or no comparison ({error}).") from error


def read_comparison(path: Path) -> Comparison:
    """Read the finished comparison in a folder, without its trained pairs. Errors as in :func:`read_record`."""
    record = read_record(path)
    if not record.get("finished"):
        raise ValueError(
            f"folder: the comparison in {path} is not finished. Go on with: pyrovae compare --resume {path}"
        )
    names = {field.name for field in fields(Comparison)}
    try:
        cells = [Cell(**{name: v for name, v in cell.items() if name != "gap"}) for cell in record["cells"]]
        return Comparison(**{name: value for name, value in record.items() if name in names} | {"cells": cells})
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"folder: {path / 'comparison.json'} is damaged ({error}).") from error
