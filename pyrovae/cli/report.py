"""Reports: one HTML page about a run, a comparison or both, which needs no scripts and no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyrovae.checkpoint import write_text
from pyrovae.checks import count
from pyrovae.cli.names import versions
from pyrovae.comparison.folder import read_comparison
from pyrovae.comparison.tables import lead, to_rows
from pyrovae.evaluation import evaluate
from pyrovae.evaluation.measurement import prepared
from pyrovae.evaluation.scores import title_of
from pyrovae.infer import default_loss
from pyrovae.plots.run_pictures import Picture, pictures_of_run, pictures_of_scores

if TYPE_CHECKING:
    from pyrovae.cli.runs import Config, RunFolder
    from pyrovae.data import DataSet
    from pyrovae.pair import Pair

__all__ = ["Page", "Section", "report_comparison", "report_run", "write_pages"]

DPI = 110
TEMPLATE = Path(__file__).with_name("report.html")


@dataclass
class Section:
    """A heading with paragraphs, notices, a table, pictures and blocks, of which any may be missing."""

    title: str
    texts: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    numbers: int = 0
    """Number of columns after the first that hold numbers."""
    pictures: list[dict[str, Any]] = field(default_factory=list)
    blocks: list[dict[str, Any]] = field(default_factory=list)

    def draw(self, pictures: Iterable[Picture]) -> Section:
        """Draw and add pictures. A picture that cannot be drawn is named on the page."""
        for picture in pictures:
            buffer = io.BytesIO()
            try:
                picture.draw().savefig(buffer, format="png", dpi=DPI)
            except Exception as error:  # the page is useful without it
                self.notices.append(f"Not drawn ({picture.alt}): {type(error).__name__}: {error}")
            else:
                self.add_image(buffer.getvalue(), picture.alt, picture.caption)
        return self

    def add_image(self, png: bytes, alt: str, caption: str = "") -> None:
        """Add a PNG file; ``alt`` describes it for those who cannot see it."""
        width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))  # as PNG prescribes
        image = {"png": base64.b64encode(png).decode(), "width": width, "height": height}
        self.pictures.append(image | {"alt": alt, "caption": caption})

    def add_result(self, name: str, result: Any) -> None:
        """Add the printed form of a result: its first line, a table in plain text, and its notes."""
        lead, *lines = repr(result).splitlines()
        notes = [line.removeprefix("NOTE: ").rstrip(".") for line in lines if line.startswith("NOTE: ")]
        table = "\n".join(line for line in lines if not line.startswith("NOTE: "))
        self.blocks.append({"title": title_of(name), "lead": f"{lead}.", "table": table, "notes": notes})


@dataclass
class Page:
    """A page of a report: its title, first paragraph and sections."""

    title: str
    lead: str
    sections: list[Section]


def write_pages(pages: Sequence[Page], path: Path) -> None:
    """Write pages as one. The sections of every page after the first begin with that page's title."""
    from jinja2 import Environment

    first, *rest = pages
    sections = [*first.sections]
    for page in rest:
        sections += [Section(page.title, texts=[page.lead]), *page.sections]
    sections = [s for s in sections if any((s.texts, s.notices, s.rows, s.blocks, s.pictures))]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    makers = ", ".join(f"{name} {number}" for name, number in versions().items())
    write_text(path, template.render(title=first.title, lead=first.lead, sections=sections, makers=makers))


def report_run(folder: RunFolder, also: Sequence[str], *, num_data: int, num_samples: int | None, device: str) -> Page:
    """Make the page of a run: facts, scores, training, samples and latents, and measurements of the guide.

    The pair is measured anew, on the rows that its run was scored on, or on ``num_data`` of them drawn at random.
    """
    config, pair, data = folder.load()
    history = folder.read_history()
    which, rows, labels = data.scored
    num_rows = len(rows)
    if num_rows > num_data:
        chosen = torch.randperm(num_rows, generator=torch.Generator().manual_seed(config.seed))[:num_data]
        rows, labels = rows[chosen], None if labels is None else labels[chosen]
    num_samples = num_samples or config.num_samples
    scores = evaluate(pair, rows, num_samples=num_samples, also=also, labels=labels, **config.shared_options(device))
    with prepared(pair, rows, **config.shared_options(device)) as placed:  # the same pixels as those scored
        rows = placed.cpu()
    facts = _list_facts(config, pair, data, history, folder.read_scores().get("training_seconds"))
    summary = (type(pair).__doc__ or type(pair).__name__).strip().splitlines()[0]
    fitted = Section("What was fitted", texts=[summary], rows=facts)
    if (notice := folder.unfinished()) is not None:
        fitted.notices.append(f"{notice[0].upper()}{notice[1:]}.")
    how = f"{scores.num_samples} importance samples each" if scores.num_samples else "exact: nothing is sampled"
    some = f" of {num_rows} {which} rows, drawn at random" if scores.num_data < num_rows else f" {which} rows"
    table = Section(
        "Scores",
        texts=[f"{scores.num_data}{some}; {how}. Nats per datum."],
        head=["quantity", "value", "remark"],
        rows=[[name.strip(), value, note] for name, value, note in scores.rows()],
        numbers=1,
        notices=scores.notes,
    )
    pictures = pictures_of_run(pair, data, rows, labels, history)
    training = Section("Training").draw([pictures.pop("training")] if "training" in pictures else [])
    model = Section("The model and its latents").draw(pictures.values())
    measured = Section("The guide and the latents, measured")
    measured.draw(pictures_of_scores(pair, data, rows, scores).values())
    for name, result in scores.also.items():
        measured.add_result(name, result)
    if scores.left_out:
        measured.texts = [f"Does not apply to this pair: {', '.join(map(title_of, scores.left_out))}."]
    lead = f"Log evidence {scores.log_evidence:.3f} nats per datum, on {which} rows."
    sections = [fitted, table, training, model, measured]
    return Page(f"{type(pair).__name__} on {Path(config.data).name}", lead, sections)


def report_comparison(folder: Path) -> Page:
    """Make the page of a comparison: its table and its pictures."""
    comparison = read_comparison(folder)
    header, *rows = [[cell.replace("± ", "±\N{NO-BREAK SPACE}") for cell in row] for row in to_rows(comparison)]
    table = Section("Methods", head=header, rows=rows, numbers=len(header) - 1, texts=comparison.notes)
    methods = ", ".join(dict.fromkeys(row.method for row in comparison.table))
    alts = {
        "comparison.png": f"Curves of the log evidence against seconds and against passes over the data: {methods}.",
        "gaps.png": f"Stacked bars of what each method misses, in nats per datum: {methods}.",
        "responsibilities.png": "The data, coloured by the component that each method finds most probable.",
        "densities.png": "The data over contours of the density that each method fitted.",
    }
    pictures = Section("Pictures")
    for name, alt in alts.items():
        if (folder / name).is_file():
            pictures.add_image((folder / name).read_bytes(), alt)
    text = " ".join(lead(comparison)).removeprefix(f"{comparison.title}: ")
    return Page(comparison.title, text, [table, pictures])


def _list_facts(
    config: Config, pair: Pair, data: DataSet, history: list[dict[str, float]], seconds: float | None
) -> list[list[str]]:
    drawn = " Pixels drawn as 0 or 1 anew at every use." if config.draws_pixels else ""
    fit, loss = config.fit, config.loss or type(default_loss(pair)).__name__
    facts = {
        "pair": type(pair).__name__,
        "options": ", ".join(f"{k} = {v}" for k, v in config.options.items()) or "the defaults",
        "parameters": f"{sum(p.numel() for p in pair.parameters()):,}",
        "data": repr(data),
        "convention": f"{data.convention}{drawn}",
        "source": data.source,
        "loss": " ".join([loss, *(f"{k}={v}" for k, v in config.loss_options.items())]),
        "training": f"{f'{len(history)} of' if history else 'up to'} {count(fit.get('epochs', 0), 'epoch')}, batches "
        f"of {fit.get('batch_size')}, Adam from learning rate {fit.get('lr')}, {fit.get('schedule')} schedule",
        "time": "" if seconds is None else f"{seconds:.1f} s",
        "seed": str(config.seed),
    }
    return [[name, value] for name, value in facts.items() if value]
