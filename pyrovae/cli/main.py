"""The ``pyrovae`` command."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

# torch and pyro load when a command needs them: help is shown at once.

app = typer.Typer(
    help="Latent-variable models as Pyro model/guide pairs: fit, score, sample and compare them.",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

PairArgument = Annotated[
    str | None, typer.Argument(metavar="PAIR", help="A name from `pyrovae list`, or path/to/file.py:ClassName.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `pyrovae fit` wrote.")]
DataOption = Annotated[
    str | None, typer.Option("--data", "-d", help="A name from `pyrovae list`, or a .csv or .npy file of rows.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="NAME=VALUE", help="An option of the pair, e.g. latent_dim=2 or hidden_dims=200,200."
    ),
]
LR_HELP = "First learning rate of Adam. By default 0.02 for gmm and ppca, 0.003 for the others."
EPOCHS_HELP = "Passes over the data. By default 50, or as many as make 2,000 steps."
DeviceOption = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu or cuda.")]


def _check_seed(seed: int) -> int:
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed: expected a whole number from 0 to 2^63 − 1; got {seed}.")
    return seed


SeedOption = Annotated[int, typer.Option(help="Seed of everything random.", callback=_check_seed)]
BinarizeOption = Annotated[
    str,
    typer.Option(
        help="Pixels in [0, 1]: dynamic (drawn as 0 or 1 anew at every use), static (drawn once), none (as they are), "
        "or auto (dynamic, where the likelihood is over {0, 1} and the data are images)."
    ),
]
AlsoOption = Annotated[
    list[str] | None,
    typer.Option(
        "--also",
        help="Measure this too, once for each: collapse, kl_decomposition, inference_gaps, annealed_evidence, "
        "bidirectional_evidence, simulation_based_calibration, posterior_predictive_check, mixture_scores.",
    ),
]
EverythingOption = Annotated[bool, typer.Option("--all", help="Measure all that applies. It may take minutes.")]
SamplesOption = Annotated[int, typer.Option("--num-samples", help="Importance samples for each datum's log evidence.")]


@app.callback()
def options(
    show: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if show:
        print(version("pyrovae"))
        raise typer.Exit


@app.command("list")
def list_() -> None:
    """List pairs, data sets and losses."""
    import inspect

    from pyrovae.cli.runs import constructor_options
    from pyrovae.data import describe
    from pyrovae.infer import LOSSES
    from pyrovae.models import DEFAULT_OPTIONS, REGISTRY

    print("Pairs (options of --set in brackets)")
    for name, pair in REGISTRY.items():
        print(f"  {name:<10}{_summary(pair)}")
        shown = []
        for option, parameter in constructor_options(pair).items():
            default = parameter.default
            if default is parameter.empty:
                default = DEFAULT_OPTIONS.get(name, {}).get(option, "required")
            shown.append(f"{option}={default}".replace(" ", ""))
        print(f"  {'':<10}[{', '.join(shown)}]")
    print("\nData sets")
    for name, text in describe().items():
        print(f"  {name:<21}{text}")
    print("\nLosses")
    for name, loss in LOSSES.items():
        print(f"  {name:<21}{_summary(loss)}")
        options = [o for o in ("num_particles", "alpha") if o in inspect.signature(loss).parameters]
        print(f"  {'':<21}[{', '.join('--' + o.replace('_', '-') for o in options)}]")


def _summary(thing: Any) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0].rstrip(".:").replace("``", "")


@app.command()
def fit(
    context: typer.Context,
    pair: PairArgument = None,
    data: DataOption = None,
    settings: SetOption = None,
    loss: Annotated[str | None, typer.Option(help="A loss from `pyrovae list`; by default, the pair's own.")] = None,
    num_particles: Annotated[
        int | None, typer.Option(help="For --loss: samples of the latents for each datum.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="For --loss RenyiELBO: its order; 0 is the IWAE bound.")] = None,
    epochs: Annotated[int | None, typer.Option(help=EPOCHS_HELP)] = None,
    batch_size: Annotated[int, typer.Option(help="Data a step.")] = 128,
    lr: Annotated[float | None, typer.Option(help=LR_HELP)] = None,
    schedule: Annotated[str, typer.Option(help="Of the learning rate: constant, cosine or burda.")] = "cosine",
    validation: Annotated[
        float | None,
        typer.Option(help="Held-out share (below 1) or count. By default a tenth of the data, at most 400; 0: none."),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="Stop after this many epochs without a better held-out bound; keep the best weights."),
    ] = None,
    binarize: BinarizeOption = "auto",
    num_samples: SamplesOption = 5000,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The run folder. By default runs/PAIR-DATA, numbered.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in the folder.")] = False,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="RUN", help="Go on with a run that was stopped, exactly where it was."),
    ] = None,
) -> None:
    """Train a pair by SVI and write a run folder.

    The folder holds weights, configuration, history, scores on held-out data, and pictures.

    \b
    pyrovae fit vae --set latent_dim=2
    pyrovae fit vae --data mydata.csv --set likelihood=normal
    pyrovae fit mypair.py:MyPair --data digits --epochs 20
    pyrovae fit --resume runs/vae-digits
    """
    from pyrovae.checks import check_positive
    from pyrovae.cli.runs import (
        Config,
        RunFolder,
        absolute,
        build_loss,
        build_pair,
        default_data,
        file_digest,
        find_pair,
        load_data,
        parse_options,
        resolve_binarize,
    )
    from pyrovae.training.schedules import default_epochs

    if resume is not None:
        _check_alone(context)
        folder = RunFolder(resume)
        config, built, dataset = folder.load(with_weights=False)
        if not folder.checkpoint.is_file():
            raise FileNotFoundError(f"RUN: {folder.path} has no checkpoint to go on from. Fit again, with --overwrite.")
        _train(folder, config, built, dataset, device, resume=True)
        return
    if pair is None:
        raise ValueError("PAIR: expected a name from `pyrovae list`, file.py:ClassName, or --resume RUN; got none.")
    pair_class = find_pair(pair)
    given = parse_options(pair_class, settings or [])
    data = data or default_data(pair)
    dataset = load_data(data, binarize)
    built = build_pair(pair_class, given, dataset.data_dim, seed)
    loss_options = {k: v for k, v in {"num_particles": num_particles, "alpha": alpha}.items() if v is not None}
    build_loss(built, loss, loss_options)  # an error in it should come before anything is written
    check_positive("--batch-size", batch_size, integer=True)
    if validation is None:
        validation = min(len(dataset.train) // 10, 400)
    held_out = validation if 0 < validation < 1 else _whole("--validation", validation)
    if epochs is None:
        num_held_out = held_out * len(dataset.train) if held_out < 1 else held_out
        epochs = default_epochs(math.ceil((len(dataset.train) - num_held_out) / batch_size))
    config = Config(
        pair=absolute(pair),
        options=given,
        data=absolute(data),
        binarize=resolve_binarize(binarize, built, dataset),
        loss=loss,
        loss_options=loss_options,
        fit={
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": built.default_lr if lr is None else lr,
            "schedule": schedule,
            "validation": held_out,
            "patience": patience,
        },
        num_samples=num_samples,
        seed=seed,
        pair_sha256=file_digest(pair),
        data_sha256=file_digest(data),
        versions={name: version(name) for name in ("pyrovae", "torch", "pyro-ppl")},
    )
    folder = RunFolder(out or _numbered(Path("runs") / f"{_short(pair)}-{Path(data).stem}"))
    folder.check_free(overwrite)
    _train(folder, config, built, dataset, device, resume=False)


def _check_alone(context: typer.Context) -> None:
    """With --resume the run knows its options: refuse others, rather than ignore them."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in ("resume", "device") and source is not None and source.name == "COMMANDLINE":
            shown = {"pair": "PAIR", "settings": "--set"}.get(name, f"--{name.replace('_', '-')}")
            raise ValueError(f"--resume: the run goes on with the options that it was started with; leave {shown} out.")


def _whole(argument: str, number: float) -> int:
    if not number >= 0 or number % 1 != 0:
        raise ValueError(f"{argument}: expected a share between 0 and 1, or a whole number, 0 or more; got {number:g}.")
    return int(number)


def _check_parent(out: Path | None) -> None:
    """Before work that takes its time, and would be lost."""
    if out is not None and not out.parent.is_dir():
        raise FileNotFoundError(f"--out: expected a folder that exists; found none at {out.parent}. Make it first.")


def _short(pair: str) -> str:
    return pair.rpartition(":")[2].lower()


def _numbered(path: Path) -> Path:
    """``path``, or the first of path-2, path-3, ... that is free."""
    numbers = iter(range(2, sys.maxsize))
    free = path
    while free.exists():
        free = path.with_name(f"{path.name}-{next(numbers)}")
    return free


def _train(folder: Any, config: Any, pair: Any, dataset: Any, device: str, *, resume: bool) -> None:
    import torch

    import pyrovae
    from pyrovae.checks import check_positive, pick_device
    from pyrovae.cli.runs import build_loss

    check_positive("--num-samples", config.num_samples, integer=True)
    before = folder.progress() if resume else None
    epochs_before, also_before = len(folder.read_history()), folder.read_scores().get("also")
    began = False
    picked, parameters = pick_device(device), sum(p.numel() for p in pair.parameters())
    anew = config.binarize == "dynamic"

    def start() -> None:  # every check is behind us
        nonlocal began
        began = True
        if resume:  # if this is killed, the checkpoint's are the newest
            folder.weights.unlink(missing_ok=True)
            folder.history.unlink(missing_ok=True)
        else:
            folder.create(config)
        print(f"{_short(config.pair)}: {parameters:,} parameters, on {picked}")
        print(f"{dataset!r}")
        print(f"  {dataset.convention}{' Pixels are drawn as 0 or 1 anew at every use.' if anew else ''}")
        print(f"Going on in {folder.path}, {before}" if resume else f"Writing to {folder.path}", flush=True)

    try:
        result = pyrovae.fit(
            pair,
            dataset.train,
            loss=build_loss(pair, config.loss, config.loss_options),
            **config.fit,
            binarize=anew,
            device=device,
            seed=config.seed,
            checkpoint=folder.checkpoint,
            resume=resume,
            on_start=start,
        )
    except KeyboardInterrupt:
        if began and (reached := folder.progress()) is not None:  # what is there is of this run
            pair.save(folder.weights)
            folder.write_history(reached.history)
            print(f"\nStopped {reached}. Go on with: pyrovae fit --resume {folder.path}", file=sys.stderr)
        raise
    except pyrovae.TrainingDiverged:
        pair.save(folder.weights)
        if (reached := folder.progress()) is not None:
            folder.write_history(reached.history)
        print(f"The last good weights are in {folder.weights}", file=sys.stderr)
        raise
    print(result)
    pair.save(folder.weights)
    folder.write_history(result.history)
    finished = resume and len(result.history) == epochs_before
    if finished:
        print("The run was finished already: nothing was trained.")
    earlier = also_before if finished else None
    scores = _score(folder, config, pair, dataset, device, config.num_samples, seconds=result.seconds, earlier=earlier)
    print(f"\n{scores}\n", flush=True)  # before the pictures, of which one may fail
    _, rows, labels = dataset.scored
    if anew:  # the guide is shown what it was trained and scored on
        rows = torch.bernoulli(rows, generator=torch.Generator().manual_seed(config.seed))
    pictures = folder.draw(pair, dataset, rows, labels, result.history)
    files = "config.json, weights.safetensors, checkpoint.safetensors, history.csv, scores.json and pictures"
    print(f"In {folder.path}: {files}")
    print("\n".join(f"  {path}" for path in pictures))


def _score(
    folder: Any,
    config: Any,
    pair: Any,
    dataset: Any,
    device: str,
    num_samples: int,
    seconds: float | None,
    also: Iterable[str] = (),
    earlier: dict[str, Any] | None = None,
) -> str:
    """Score on the test rows, or the training rows where there are no others; write scores.json; return the table."""
    import pyrovae

    start = time.perf_counter()
    earlier = earlier or {}
    which, rows, labels = dataset.scored
    scores = pyrovae.evaluate(
        pair,
        rows,
        num_samples=num_samples,
        also=list(also),
        labels=labels,
        binarize=config.binarize == "dynamic",
        device=device,
        seed=config.seed,
    )
    if (notice := folder.unfinished()) is not None:
        scores.notes.append(f"{notice}. Go on with: pyrovae fit --resume {folder.path}")
    record = {"data": config.data, "rows": which, **scores.to_dict(), "evaluation_seconds": time.perf_counter() - start}
    record["also"] = earlier | record["also"]  # of the same weights: what took minutes is not thrown away
    if seconds is not None:
        record["training_seconds"] = seconds
    folder.write_scores(record)
    held_out = ", held-out ones among them" if which == "train" and config.fit.get("validation") else ""
    return f"Scores on {_file_name(config.data)} ({which} rows{held_out})\n{scores}"


def _file_name(data: str) -> str:
    return Path(data).name


@app.command()
def evaluate(
    run: RunArgument,
    num_samples: Annotated[
        int | None,
        typer.Option(help="Importance samples for each datum's log evidence; by default, as many as the run took."),
    ] = None,
    also: AlsoOption = None,
    everything: EverythingOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Score a run again, and write its scores.json.

    \b
    pyrovae evaluate runs/vae-digits --also inference_gaps --also collapse
    """
    from pyrovae.checks import check_positive
    from pyrovae.cli.runs import RunFolder

    if num_samples is not None:
        check_positive("--num-samples", num_samples, integer=True)
    names = _also(also, everything, default=())
    folder = RunFolder(run)
    config, pair, dataset = folder.load()
    before = folder.read_scores()
    seconds, earlier = before.get("training_seconds"), before.get("also")
    print(_score(folder, config, pair, dataset, device, num_samples or config.num_samples, seconds, names, earlier))


def _also(also: list[str] | None, everything: bool, default: Iterable[str]) -> list[str]:
    from pyrovae.checks import check_choice
    from pyrovae.evaluation import ALSO

    for name in also or []:
        check_choice("--also", name, ALSO)
    if everything:
        return list(ALSO)
    return list(default) if also is None else also


@app.command()
def report(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="A folder that `pyrovae fit` wrote.")] = None,
    compare: Annotated[
        Path | None, typer.Option("--compare", metavar="FOLDER", help="A folder that `pyrovae compare` wrote.")
    ] = None,
    num_data: Annotated[int, typer.Option(help="Rows to measure on, drawn at random where there are more.")] = 500,
    num_samples: Annotated[
        int | None,
        typer.Option(help="Importance samples for each datum; by default, as many as the run took."),
    ] = None,
    also: AlsoOption = None,
    everything: EverythingOption = False,
    device: DeviceOption = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="An .html file; by default report.html there.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that is there.")] = False,
) -> None:
    """Write one HTML page about a run, a comparison or both, to send to somebody.

    The page holds its pictures, and needs no scripts and no other file. A run is measured anew, by all that applies to
    its pair except annealed importance sampling (--all adds it).

    \b
    pyrovae report runs/vae-digits
    pyrovae report --compare runs/compare-gmm-faithful
    """
    from pyrovae.checks import check_positive
    from pyrovae.cli.report import Page, report_comparison, report_run
    from pyrovae.cli.runs import RunFolder
    from pyrovae.evaluation import ALSO

    if run is None and compare is None:
        raise ValueError(
            "RUN: expected the folder of a run, or --compare with the folder of a comparison; got neither."
        )
    check_positive("--num-data", num_data, integer=True)
    if num_samples is not None:
        check_positive("--num-samples", num_samples, integer=True)
    names = _also(also, everything, default=[name for name in ALSO if "evidence" not in name])
    _check_parent(out)
    out = out or (run or compare or Path()) / "report.html"
    if out.suffix != ".html":
        raise ValueError(f"--out: expected an .html file; got {out}.")
    if run is not None:
        RunFolder(run).read_config()
    pages: list[Page] = [] if compare is None else [report_comparison(compare)]
    if out.exists() and not overwrite:
        raise FileExistsError(f"--out: {out} exists. Pass --overwrite to replace it, or another name.")
    if out.is_dir():
        raise IsADirectoryError(f"--out: expected an .html file; {out} is a folder.")
    if run is not None:
        pages.insert(
            0, report_run(RunFolder(run), num_data=num_data, num_samples=num_samples, also=names, device=device)
        )
    Page.joined(pages).write(out)
    if run is not None and (notice := RunFolder(run).unfinished()) is not None:
        print(f"NOTE: {notice}. Go on with: pyrovae fit --resume {run}")
    print(f"Wrote {out}")


@app.command()
def sample(
    run: RunArgument,
    num: Annotated[int, typer.Option("--num", "-n", help="How many data to draw.")] = 100,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A .csv, .npy or .png file; by default, rows are printed.")
    ] = None,
    mean: Annotated[bool, typer.Option("--mean", help="E[x | z] at drawn latents, in place of draws.")] = False,
    seed: SeedOption = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that is there.")] = False,
) -> None:
    """Draw new data from a run's model."""
    import numpy as np

    from pyrovae.checks import check_positive
    from pyrovae.cli.runs import RunFolder
    from pyrovae.evaluation import sample as draw

    check_positive("--num", num, integer=True)
    if out is not None and out.suffix not in (".csv", ".npy", ".png"):
        raise ValueError(f"--out: expected a .csv, .npy or .png file; got {out}.")
    _check_parent(out)
    if out is not None and out.exists() and not overwrite:
        raise FileExistsError(f"--out: {out} exists. Pass --overwrite to replace it, or another name.")
    _, pair, dataset = RunFolder(run).load()
    rows = draw(pair, num, mean=mean, data_dim=dataset.data_dim, seed=seed)
    if out is None:
        _write_csv(sys.stdout, dataset.feature_names, rows.tolist())
        return
    if out.suffix == ".npy":
        np.save(out, rows.numpy())
    elif out.suffix == ".csv":
        with out.open("w", newline="", encoding="utf-8") as file:
            _write_csv(file, dataset.feature_names, rows.tolist())
    else:
        from pyrovae.plots import pair_plots as plots

        if dataset.image_shape is not None:
            figure = plots.plot_images(rows, dataset.image_shape, title="Drawn from the model")
        else:
            figure = plots.plot_samples(pair, dataset.train, feature_names=dataset.feature_names, drawn=rows)
        figure.savefig(out, dpi=150)
    print(f"Wrote {out}")


def _write_csv(file: Any, names: Iterable[str], rows: list[list[float]]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([f"{value:.9g}" for value in row] for row in rows)  # nine digits are a float32


@app.command()
def compare(
    context: typer.Context,
    pair: Annotated[
        list[str] | None,
        typer.Argument(metavar="PAIR...", help="Names from `pyrovae list`, or path/to/file.py:ClassName."),
    ] = None,
    data: DataOption = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="NAME=VALUE", help="An option of every pair that has it."),
    ] = None,
    losses: Annotated[
        list[str] | None,
        typer.Option(
            help="EM, closed-form, default-loss, or losses such as RenyiELBO:K=50,alpha=0.5; several with commas or by "
            "repeating. By default, what each pair has."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many: the table has means and standard errors over them.")] = 1,
    epochs: Annotated[int | None, typer.Option(help=f"By SVI. {EPOCHS_HELP}")] = None,
    batch_size: Annotated[int, typer.Option(help="Data a step of SVI.")] = 128,
    lr: Annotated[float | None, typer.Option(help=f"By SVI. {LR_HELP}")] = None,
    num_samples: SamplesOption = 1000,
    gaps: Annotated[
        bool, typer.Option("--gaps", help="Split each gap into approximation and amortization. Takes its time.")
    ] = False,
    binarize: BinarizeOption = "auto",
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(help="The first seed; the others follow it.", callback=_check_seed)] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder. By default runs/compare-PAIR-DATA, numbered.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the comparison that is there.")] = False,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="FOLDER", help="Go on with a comparison that was stopped, where it was."),
    ] = None,
) -> None:
    """Train pairs by every method they have, and compare them.

    For each seed, all methods of a pair start with the same parameters and make as many passes over the data; EM goes
    on until it converges. Mixtures: EM, SVI with enumeration, and with an amortized guide by enumeration, score
    function and VIMCO. PPCA: closed form, EM, SVI. Others: Trace_ELBO, TraceMeanField_ELBO (analytic KL), RenyiELBO.
    Test rows are scored, where there are any. The folder holds tables (CSV, Markdown, LaTeX), pictures and all numbers.

    \b
    pyrovae compare gmm --data faithful --seeds 5
    pyrovae compare vae iwae --data digits --losses Trace_ELBO,RenyiELBO:K=50
    pyrovae compare ppca --data mydata.csv --set latent_dim=3
    pyrovae compare --resume runs/compare-gmm-faithful
    """
    from tqdm import tqdm

    from pyrovae.checks import check_positive
    from pyrovae.cli.runs import default_data
    from pyrovae.comparison import compare as run
    from pyrovae.comparison.methods import parse_method, split_methods
    from pyrovae.comparison.request import Request

    if resume is not None:
        _check_alone(context)
        folder = resume
        request, dataset = Request.read(folder)
    else:
        if not pair:
            raise ValueError(
                "PAIR: expected names from `pyrovae list`, file.py:ClassName, or --resume FOLDER; got none."
            )
        for name, value in (("--seeds", seeds), ("--batch-size", batch_size), ("--num-samples", num_samples)):
            check_positive(name, value, integer=True)
        if epochs is not None:
            check_positive("--epochs", epochs, integer=True)
        if lr is not None:
            check_positive("--lr", lr)
        data = data or default_data(pair[0])
        short = [_short(spec) for spec in pair]
        request, dataset = Request.of(
            pair,
            data,
            settings or [],
            binarize,
            [parse_method(spec, "--losses") for spec in split_methods(losses or [])],
            title=_file_name(data),
            seeds=seeds,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            num_samples=num_samples,
            gaps=gaps,
            seed=seed,
        )
        folder = out or _numbered(Path("runs") / f"compare-{'-'.join(short)}-{Path(data).stem}")
    try:
        comparison = run(
            request.makers(dataset),
            dataset,
            methods=request.methods,
            **request.settings,
            binarize=request.binarize == "dynamic",
            device=device,
            folder=folder,
            overwrite=overwrite,
            resume=resume is not None,
            config=request.to_dict(),
            report=tqdm.write,
        )
    except KeyboardInterrupt:
        if (folder / "comparison.json").is_file():
            print(f"\nStopped. Go on with: pyrovae compare --resume {folder}", file=sys.stderr)
        raise
    print(f"\n{comparison}\n\nIn {folder}: " + ", ".join(sorted(path.name for path in folder.iterdir())))


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Time the project and its peers side by side on this machine: SVI steps and EM iterations.

    Takes minutes. Ratios below 1 say that pyrovae is faster. For options: pyrovae bench --help.
    """
    script = Path(__file__).parents[2] / "tests/benchmarks/run.py"
    if not script.is_file():
        raise ValueError("bench: expected a clone of the repository, whose tests/benchmarks/ holds the peers' code.")
    raise typer.Exit(subprocess.run([sys.executable, str(script), *context.args], check=False).returncode)


@app.command()
def new(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The Python file to write, e.g. mypair.py.")],
) -> None:
    """Write a small working pair to start your own from."""
    from pyrovae.cli.template import TEMPLATE

    if file.suffix != ".py" or not file.stem.isidentifier():
        raise ValueError(f"FILE: expected a Python file such as mypair.py; got {file}.")
    if file.exists():
        raise FileExistsError(f"FILE: {file} exists. Choose another name.")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"FILE: expected a folder that exists; found none at {file.parent}. Make it first.")
    file.write_text(TEMPLATE, encoding="utf-8")
    print(f"Wrote {file}. Train it with: pyrovae fit {file}:MyPair --data digits")


def main(arguments: list[str] | None = None) -> None:
    """Run the command. A user's mistake ends in a line on stderr and exit code 2; PYROVAE_TRACEBACK=1 shows where."""
    run: Callable[..., Any] = app
    try:
        run(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("PYROVAE_TRACEBACK"):
            raise
        print(f"pyrovae: {_explain(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError | TypeError | NotImplementedError | OSError) else 1)


def _explain(error: Exception) -> str:
    """The message, and the line of the user's own file that it came from."""
    meant = isinstance(error, ValueError | TypeError | NotImplementedError | OSError | FloatingPointError)
    text = str(error) if meant else f"{type(error).__name__}: {error}"
    frames: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        for frame, line in traceback.walk_tb(cause.__traceback__):
            if frame.f_globals.get("__name__", "").startswith("pyrovae_user_"):
                frames.append(f"{frame.f_code.co_filename}, line {line}")
        cause = cause.__cause__
    where = [] if meant and not frames else [f"({frames[-1] if frames else 'PYROVAE_TRACEBACK=1 shows where'})"]
    space = "\n" if "\n" in text else " "  # Pyro adds a table of shapes
    return space.join([text, *where, *getattr(error, "__notes__", [])])
