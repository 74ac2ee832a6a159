"""Reports: one HTML page about a run, a comparison or both, which needs no scripts and no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
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
    from matplotlib.figure import Figure

    from pyrovae.cli.runs import Config, RunFolder
    from pyrovae.data import DataSet
    from pyrovae.evaluation import Scores
    from pyrovae.pair import Pair

__all__ = ["Page", "Section", "report_comparison", "report_run"]

DPI = 110
TEMPLATE = Path(__file__).with_name("report.html")


@dataclass
class Image:
    """A picture inside a page."""

    png: str
    """Content of the PNG file, in base64."""
    width: int
    height: int
    alt: str
    caption: str = ""

    @staticmethod
    def of(png: bytes, alt: str, caption: str = "") -> Image:
        width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))  # as PNG prescribes
        return Image(base64.b64encode(png).decode(), width, height, alt, caption)


@dataclass
class Block:
    """The printed form of a result: its first line, a table in plain text, and its notes."""

    title: str
    lead: str
    table: str
    notes: list[str]

    @staticmethod
    def of(name: str, result: Any) -> Block:
        lead, *lines = repr(result).splitlines()
        notes = [line.removeprefix("NOTE: ").rstrip(".") for line in lines if line.startswith("NOTE: ")]
        table = "\n".join(line for line in lines if not line.startswith("NOTE: "))
        return Block(title_of(name), f"{lead}.", table, notes)


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
    pictures: list[Image] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not any((self.texts, self.notices, self.rows, self.blocks, self.pictures))

    def draw(self, pictures: Iterable[Picture]) -> Section:
        """Draw and add pictures. A picture that cannot be drawn is named on the page."""
        for picture in pictures:
            try:
                self.pictures.append(Image.of(_to_png(picture.draw()), picture.alt, picture.caption))
            except Exception as error:  # the page is useful without it
                self.notices.append(f"Not drawn ({picture.alt}): {type(error).__name__}: {error}")
        return self

    def add_files(self, alts: Mapping[Path, str]) -> Section:
        """Add PNG files, each with a description for those who cannot see it."""
        self.pictures += [Image.of(path.read_bytes(), alt) for path, alt in alts.items()]
        return self


@dataclass
class Page:
    title: str
    lead: str
    sections: list[Section]

    @staticmethod
    def join(pages: Sequence[Page]) -> Page:
        """Join pages into one. The sections of every page after the first begin with that page's title."""
        first, *rest = pages
        sections = list(first.sections)
        for page in rest:
            sections += [Section(page.title, texts=[page.lead]), *page.sections]
        return Page(first.title, first.lead, sections)

    def write(self, path: Path) -> None:
        """Write the page as a whole: a crash leaves the old file or the new."""
        from jinja2 import Environment

        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
        makers = ", ".join(f"{name} {number}" for name, number in versions().items())
        html = template.render(title=self.title, lead=self.lead, sections=self.sections, footer=f"Made by {makers}.")
        write_text(path, html)


def _to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def report_run(folder: RunFolder, *, num_data: int, num_samples: int | None, also: Sequence[str], device: str) -> Page:
    """Make the page of a run: facts, scores, training, samples and latents, and measurements of the guide.

    The pair is measured anew, on the rows that its run was scored on, or on ``num_data`` of them drawn at random.
    """
    config, pair, data = folder.load()
    history, seconds = folder.read_history(), folder.read_scores().get("training_seconds")
    which, rows, labels = data.scored
    num_rows = len(rows)
    generator = torch.Generator().manual_seed(config.seed)
    if len(rows) > num_data:
        chosen = torch.randperm(len(rows), generator=generator)[:num_data]
        rows, labels = rows[chosen], None if labels is None else labels[chosen]
    is_drawn = config.binarize == "dynamic"
    scores = evaluate(
        pair,
        rows,
        num_samples=num_samples or config.num_samples,
        also=also,
        labels=labels,
        binarize=is_drawn,
        device=device,
        seed=config.seed,
    )
    with prepared(
        pair, rows, binarize=is_drawn, device=device, seed=config.seed
    ) as placed:  # the same pixels as those scored
        rows = placed.cpu()
    fitted = Section(
        "What was fitted", texts=[_summarize_pair(pair)], rows=_list_facts(config, pair, data, history, seconds)
    )
    if (notice := folder.unfinished()) is not None:
        fitted.notices.append(f"{notice[0].upper()}{notice[1:]}.")
    table = Section(
        "Scores",
        texts=[_describe_measurement(scores, which, num_rows)],
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
    measured.blocks = [Block.of(name, result) for name, result in scores.also.items()]
    if scores.left_out:
        measured.texts = [f"Does not apply to this pair: {', '.join(map(title_of, scores.left_out))}."]
    sections = [section for section in (fitted, table, training, model, measured) if not section.is_empty]
    lead = f"Log evidence {scores.log_evidence:.3f} nats per datum, on {which} rows."
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
    files = {folder / name: alt for name, alt in alts.items() if (folder / name).is_file()}
    pictures = Section("Pictures").add_files(files)
    text = " ".join(lead(comparison)).removeprefix(f"{comparison.title}: ")
    return Page(comparison.title, text, [section for section in (table, pictures) if not section.is_empty])


def _describe_measurement(scores: Scores, which: str, num_rows: int) -> str:
    some = f" of {num_rows}" if scores.num_data < num_rows else ""
    drawn = ", drawn at random" if some else ""
    how = f"{scores.num_samples} importance samples each" if scores.num_samples else "exact: nothing is sampled"
    return f"{scores.num_data}{some} {which} rows{drawn}; {how}. Nats per datum."


def _summarize_pair(pair: Pair) -> str:
    return (type(pair).__doc__ or type(pair).__name__).strip().splitlines()[0]


def _list_facts(
    config: Config, pair: Pair, data: DataSet, history: list[dict[str, float]], seconds: float | None
) -> list[list[str]]:
    fit, loss = config.fit, config.loss or type(default_loss(pair)).__name__
    facts = {
        "pair": type(pair).__name__,
        "options": ", ".join(f"{k} = {v}" for k, v in config.options.items()) or "the defaults",
        "parameters": f"{sum(p.numel() for p in pair.parameters()):,}",
        "data": repr(data),
        "convention": data.convention
        + {"dynamic": " Pixels drawn as 0 or 1 anew at every use."}.get(config.binarize, ""),
        "source": data.source,
        "loss": " ".join([loss, *(f"{k}={v}" for k, v in config.loss_options.items())]),
        "training": f"{f'{len(history)} of' if history else 'up to'} {count(fit.get('epochs', 0), 'epoch')}, batches "
        f"of {fit.get('batch_size')}, Adam from learning rate {fit.get('lr')}, {fit.get('schedule')} schedule",
        "time": "" if seconds is None else f"{seconds:.1f} s",
        "seed": str(config.seed),
    }
    return [[name, value] for name, value in facts.items() if value]
