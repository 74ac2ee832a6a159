"""Tables of a comparison as text, Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyrovae.comparison.result import Cell, Comparison, Row

__all__ = ["describe_cell", "lead", "to_csv", "to_latex", "to_markdown", "to_rows", "to_text"]

DECIMALS = {"seconds": 2, "steps": 1}
MISSING = "–"
LATEX = {c: rf"\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "α": r"$\alpha$",
    "∞": r"$\infty$",
    "±": r"$\pm$",
    "−": "$-$",
    MISSING: "--",
}


def to_text(comparison: Comparison) -> str:
    """Return aligned columns, with their meaning above and the notes below."""
    rows = to_rows(comparison)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    names = _num_names(comparison)
    lines = [
        "  ".join(
            text.ljust(width) if i < names else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lead(comparison), *lines, *comparison.notes])


def to_rows(comparison: Comparison) -> list[list[str]]:
    """Return the header, and a row for each pair and method."""
    names, columns = ["pair", "method"][-_num_names(comparison) :], _columns(comparison)
    return [
        [*names, *(title for title, _, _ in columns)],
        *(
            [*(getattr(row, name) for name in names), *(_number(row, name, factor) for _, name, factor in columns)]
            for row in comparison.table
        ),
    ]


def to_markdown(comparison: Comparison) -> str:
    header, *rows = ([text.replace("|", r"\|") for text in row] for row in to_rows(comparison))
    names = _num_names(comparison)
    rule = [":---"] * names + ["---:"] * (len(header) - names)
    table = [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]
    notes = ["", *(f"- {note}" for note in comparison.notes)] if comparison.notes else []
    return "\n".join([" ".join(lead(comparison)), "", *table, *notes]) + "\n"


def to_latex(comparison: Comparison) -> str:
    header, *rows = to_rows(comparison)
    names = _num_names(comparison)
    return "\n".join(
        [
            *(f"% {line}" for line in (*lead(comparison), *comparison.notes)),
            r"% needs \usepackage{booktabs}",
            rf"\begin{{tabular}}{{{'l' * names}{'r' * (len(header) - names)}}}",
            r"\toprule",
            rf"{' & '.join(map(_escaped, header))} \\",
            r"\midrule",
            *(rf"{' & '.join([*map(_escaped, row[:names]), *map(_math, row[names:])])} \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def to_csv(comparison: Comparison) -> str:
    """Return a line for each pair and method. An empty value does not apply."""
    table = comparison.table
    columns = [f"{name}{suffix}" for name in table[0].mean for suffix in ("", "_stderr")]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["pair", "method", "loss", "num_seeds", "rows", "num_data", *columns])
    for row in table:
        values = [value for name in row.mean for value in (row.mean[name], row.stderr[name])]
        start = [row.pair, row.method, row.loss, row.num_seeds, comparison.rows_scored, comparison.num_data]
        writer.writerow([*start, *values])
    return file.getvalue()


def describe_cell(cell: Cell) -> str:
    """Return the numbers of a cell and its note in one line."""
    numbers = [
        f"{label} {value:.4f}"
        for label, value in (("log evidence", cell.log_evidence), ("ELBO", cell.elbo))
        if value is not None
    ]
    numbers += [] if cell.seconds is None else [f"{cell.seconds:.2f} s", f"{cell.steps} step{'s' * (cell.steps != 1)}"]
    numbers += [] if cell.note is None else [cell.note]
    return f"{cell.pair}, {cell.method}, seed {cell.seed}: {', '.join(numbers)}"


def lead(comparison: Comparison) -> list[str]:
    """Return two lines that say what the numbers are."""
    count = len(comparison.seeds)
    seeds = f" Mean ± standard error over {count} seeds." if count > 1 else ""
    exact = [cell.exact for cell in comparison.cells if cell.log_evidence is not None]
    sampled = f"by importance sampling, {comparison.num_samples} samples"
    how = "exact" if all(exact) else f"exact where the pair has it, else {sampled}" if any(exact) else sampled
    return [
        f"{comparison.title}: {comparison.num_data} {comparison.rows_scored} rows, nats per datum; total: log evidence "
        f"of all {comparison.num_data}.{seeds}",
        f"Log evidence: {how}. SVI: {comparison.epochs} passes over the data.",
    ]


def _num_names(comparison: Comparison) -> int:
    """Return the number of leading columns that hold names: pair and method, or the method alone."""
    return 2 if comparison.num_pairs > 1 else 1


def _columns(comparison: Comparison) -> list[tuple[str, str, int]]:
    """Return title, quantity and factor of each column of numbers."""
    splits_gap = any(row.mean["amortization_gap"] is not None for row in comparison.table)
    split = [("approximation", "approximation_gap", 1), ("amortization", "amortization_gap", 1)]
    return [
        ("log evidence", "log_evidence", 1),
        ("ELBO", "elbo", 1),
        ("gap", "gap", 1),
        *(split if splits_gap else []),
        ("total", "log_evidence", comparison.num_data),
        ("seconds", "seconds", 1),
        ("steps", "steps", 1),
    ]


def _number(row: Row, name: str, factor: int) -> str:
    value, error = row.mean[name], row.stderr[name]
    if value is None:
        return MISSING
    if name == "steps" and not error:
        return f"{value:.0f}"
    decimals = DECIMALS.get(name, 4)
    text = f"{round(factor * value, decimals) + 0.0:.{decimals}f}"  # + 0.0 turns −0 into 0
    if error is None:
        return text
    return f"{text} ± {factor * error:.{decimals}f}"


def _escaped(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


def _math(number: str) -> str:
    return "--" if number == MISSING else f"${number.replace('±', chr(92) + 'pm')}$"
