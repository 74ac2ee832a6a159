"""The run of a comparison, from the first check to the last cell."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyrovae.checks import check_data, check_positive, count, pick_device
from pyrovae.comparison.cells import ROWS_OF_GAPS, Job, Maker, Settings, make_start, run_cell
from pyrovae.comparison.folder import ComparisonFolder
from pyrovae.comparison.methods import CLOSED_FORM, Method, find_methods, parse_method
from pyrovae.comparison.result import Cell, Comparison
from pyrovae.comparison.tables import describe_cell
from pyrovae.data import DataSet
from pyrovae.pair import Pair
from pyrovae.training.loop import default_epochs

__all__ = ["compare"]


def compare(
    pairs: Maker | Mapping[str, Maker],
    x: Tensor | DataSet,
    *,
    test: Tensor | None = None,
    methods: Sequence[str] = (),
    seeds: int = 1,
    epochs: int | None = None,
    batch_size: int = 128,
    lr: float | None = None,
    num_samples: int = 1000,
    gaps: bool = False,
    binarize: bool = False,
    device: str | torch.device = "auto",
    seed: int = 0,
    title: str | None = None,
    folder: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    config: dict[str, Any] | None = None,
    progress: bool | None = None,
    report: Callable[[str], object] | None = None,
) -> Comparison:
    """Train pairs by every method they have, from the same start and with the same budget, and score them alike.

    Each seed makes the pair anew and initialises it. All methods of that pair and seed start with the same parameters
    of the model. SVI methods share the number of passes over the data and the order of the batches. EM runs until it
    converges. The closed form, which no seed changes, runs once. A method that diverges is named under the table, and
    the others go on.

    ::

        compare(lambda **options: GMM(2, 2, **options), x, seeds=5)
        compare({"vae": lambda: VAE(64, 8), "iwae": lambda: IWAE(64, (8,))}, data, methods=["RenyiELBO:K=50"])

    Args:
        pairs: a function that makes the pair, or several functions by name. A pair whose function takes ``amortized=``
            is compared with its amortized guide and without.
        x: training data (N, D), or a data set, whose test rows are then scored where it has them.
        test: rows to score. None: the data set's test rows, or the training rows.
        methods: ``"closed-form"``, ``"EM"``, ``"default-loss"``, or losses with their options such as
            ``"RenyiELBO:K=50,alpha=0.5"``. Each trains every pair that it applies to. Empty: all that each pair has, as
            :func:`pyrovae.comparison.methods.find_methods` lists them.
        seeds: number of seeds: ``seed``, ``seed + 1``, ...
        epochs, batch_size, lr: as in :func:`pyrovae.fit`, for SVI.
        num_samples: importance samples for each scored datum.
        gaps: whether to split the gap into approximation and amortization, on at most 500 rows. Slow.
        binarize: whether to draw pixels in [0, 1] as 0 or 1: anew at every use in SVI, once for EM and for the scores.
        device, progress: as in :func:`pyrovae.fit`.
        seed: first seed. The caller's random state is left as it was.
        title: title of the table. None: the names of the pairs and of the data.
        folder: folder for tables, pictures and the cells, each written when it is done. None: nothing is written.
        overwrite: whether to replace a comparison that is in ``folder``.
        resume: whether to go on with the comparison in ``folder``: with its cells that are done, and with a training
            run that was stopped.
        config: plain JSON of the caller's, kept in the folder's ``comparison.json``.
        report: called with a line when the work begins and when each cell is done.

    Returns:
        A :class:`Comparison`, which prints as a table and has ``to_markdown()``, ``to_latex()``, ``to_csv()`` and
        ``plot()``. Its ``pairs`` are the trained pairs of the first seed.

    Raises:
        TypeError, ValueError: bad data or options, or a method that trains no pair; before work starts.
        FileExistsError: ``folder`` is not empty.
    """
    check_positive("seeds", seeds, integer=True)
    check_positive("batch_size", batch_size, integer=True)
    check_positive("num_samples", num_samples, integer=True)
    check_positive("epochs", epochs, integer=True, optional=True)
    check_positive("lr", lr, optional=True)
    pick_device(device)
    if isinstance(methods, str):
        raise TypeError(f"methods: expected a list of names; got {methods!r}. Write [{methods!r}].")
    specs = list(dict.fromkeys(parse_method(spec) for spec in methods))
    data_name, feature_names = "data", None
    if isinstance(x, DataSet):
        data_name, feature_names, test = x.name, x.feature_names, x.test if test is None else test
        x = x.train
    x = check_data(x, at_least=2)
    settings = Settings(
        x=x,
        rows=x if test is None else check_data(test, "test", data_dim=x.shape[1]),
        epochs=default_epochs(math.ceil(len(x) / batch_size)) if epochs is None else epochs,
        batch_size=batch_size,
        lr=lr,
        num_samples=num_samples,
        gaps=gaps,
        binarize=binarize,
        device=device,
    )
    jobs = _plan_jobs(pairs, settings, specs, range(seed, seed + seeds))
    described = settings.to_dict() | {"plan": [[job.pair, job.method.name, job.seed] for job in jobs]}
    store = None
    if folder is not None:
        store = ComparisonFolder(folder, jobs)
        if resume:
            store.check_same(described)
        else:
            store.create(described, config, overwrite)
    elif resume:
        raise ValueError("resume: expected folder= to name the comparison to go on with; got None.")

    report = report or (lambda line: None)
    done = 0 if store is None else sum(store.read_cell(job) is not None for job in jobs)
    found = f", {done} of them done" if done else ""
    report(f"{len(jobs)} cells of pair, method and seed{found}{f', in {folder}' if folder is not None else ''}")
    cells, trained = _run_jobs(jobs, settings, store, progress, report)
    comparison = Comparison(
        title=title or f"{', '.join(dict.fromkeys(job.pair for job in jobs))} on {data_name}",
        rows_scored="training" if test is None else "test",
        num_data=len(settings.rows),
        num_train=len(x),
        epochs=settings.epochs,
        num_samples=num_samples,
        seeds=list(range(seed, seed + seeds)),
        cells=cells,
        notes=_collect_notes(cells, len(settings.rows)),
    )
    comparison.pairs.update({comparison.label(c): pair for c, pair in zip(cells, trained, strict=False)})
    if store is not None:
        store.write(comparison, x, feature_names)
    return comparison


def _plan_jobs(pairs: Maker | Mapping[str, Maker], settings: Settings, specs: list[str], seeds: range) -> list[Job]:
    """Plan the cells, seed by seed. Every method must train some pair, and every pair needs some method."""
    plans: list[tuple[str, Maker, dict[str, Any], list[Method]]] = []
    refusals: list[dict[str, str]] = []
    for name, make in (pairs if isinstance(pairs, Mapping) else {"": pairs}).items():
        if isinstance(make, Pair) or not callable(make):
            raise TypeError(
                "pairs: expected functions that make a pair, as each seed needs a new one; got "
                f"{type(make).__name__}. Write lambda: GMM(num_components=2, data_dim=2), say."
            )
        first = make_start(make, {}, settings, seeds[0])
        options = [{"amortized": False}, {"amortized": True}] if _takes_amortized(make, first) else [{}]
        variants = [(o, make_start(make, o, settings, seeds[0]) if o else first) for o in options]
        methods, refused = find_methods(variants, settings.few, specs)
        plans.append((name or type(first).__name__.lower(), make, options[0], methods))
        refusals.append({spec: f"{plans[-1][0]}: {reason}" for spec, reason in refused.items()})
    if not plans:
        raise ValueError("pairs: expected one or more; got none.")
    for spec in set.intersection(*map(set, refusals)):
        raise ValueError(f"methods: {spec} trains no pair here. {refusals[0][spec]}.")
    for (name, _, _, methods), refused in zip(plans, refusals, strict=True):
        if not methods:
            raise ValueError(f"methods: expected one that trains {name} too. {'; '.join(refused.values())}.")
    return [
        Job(name, make, start, method, seed)
        for seed in seeds
        for name, make, start, methods in plans
        for method in methods
        if method.spec != CLOSED_FORM or seed == seeds[0]
    ]


def _takes_amortized(make: Maker, pair: Pair) -> bool:
    """Return whether ``make(amortized=...)`` chooses between two guides of ``pair``."""
    parameters = inspect.signature(make).parameters
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return "amortized" in {*parameters, *(inspect.signature(type(pair)).parameters if passes_on else ())}


def _run_jobs(
    jobs: list[Job], settings: Settings, store: ComparisonFolder | None, progress: bool | None, report: Any
) -> tuple[list[Cell], list[Pair]]:
    """Compute the cells that ``store`` does not have. Returns all cells, and the trained pairs of the first seed."""
    cells: list[Cell] = []
    pairs: list[Pair] = []
    with tqdm(total=len(jobs), unit="cell", disable=None if progress is None else not progress, leave=False) as bar:
        for number, job in enumerate(jobs, start=1):
            bar.set_description(f"{job.pair}, {job.method.name}, seed {job.seed}")
            cell = store.read_cell(job) if store is not None else None
            first = job.seed == jobs[0].seed
            if cell is None or store is None:
                checkpoint = None if store is None else store.file(job, "checkpoint.safetensors")
                cell, pair = run_cell(job, settings, checkpoint)
                if store is not None:
                    store.write_cell(job, cell, pair)
                report(f"{number}/{len(jobs)}  {describe_cell(cell)}")
            elif first:
                pair = make_start(job.make, job.method.pair_options, settings, job.seed)
                pair.load(store.file(job, "safetensors"))
            if first:
                pairs.append(pair)
            cells.append(cell)
            bar.update()
    return cells, pairs


def _collect_notes(cells: list[Cell], num_data: int) -> list[str]:
    """Return the notes under the table: of the cells, one for each pair and method; and on what the gaps are."""
    noted: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        if cell.note is not None:
            noted.setdefault((cell.pair, cell.method), []).append(cell)
    notes = []
    for first, *others in noted.values():
        more = f" (and of {count(len(others), 'more seed')})" if others else ""
        notes.append(f"{first.pair}, {first.method}, seed {first.seed}{more}: {first.note}")
    if any(cell.gap == 0 for cell in cells):
        notes.append("Where the gap is 0 the latents are summed out exactly: the ELBO is the log evidence.")
    if any(cell.amortization_gap is not None for cell in cells):
        rows = f" of the first {ROWS_OF_GAPS} rows," if num_data > ROWS_OF_GAPS else ""
        notes.append(
            f"Approximation and amortization gaps are{rows} from draws of their own: their sum is the gap to Monte "
            "Carlo error."
        )
    return notes
