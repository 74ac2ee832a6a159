"""The ``pyrovae`` command: one function for each subcommand."""

from __future__ import annotations

import csv
import inspect
import itertools
import math
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from tqdm import tqdm
from typer import Argument, Option
from typer.core import TyperCommand

from pyrovae.checks import check_choice, check_free_folder, check_positive
from pyrovae.cli import names
from pyrovae.cli.request import Request
from pyrovae.cli.runs import Config, RunFolder, score_run, train_run
from pyrovae.comparison import compare as compare_pairs
from pyrovae.comparison.methods import split_methods
from pyrovae.data import describe
from pyrovae.evaluation import ALSO
from pyrovae.evaluation import sample as draw_data
from pyrovae.infer import LOSSES
from pyrovae.machine import limit_threads
from pyrovae.models import DEFAULT_DATA, DEFAULT_OPTIONS, REGISTRY
from pyrovae.training.loop import default_epochs

# Errors: the library names its arguments; here they become the options that a user types ------------------------

MISTAKES = (ValueError, TypeError, NotImplementedError, OSError)
"""Errors whose message tells a user what to change."""

SYNONYMS = {
    "options": ("settings",),
    "methods": ("losses",),
    "path": ("run", "resume", "out"),
    "folder": ("resume", "compare", "out"),
    "x": ("data",),
}
"""Arguments of the library, and the parameters of commands that may stand for each: the first one that was given."""


class _Command(TyperCommand):
    """A command whose errors name its options: ``batch_size: ...`` of the library reads ``--batch-size: ...``."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except MISTAKES as error:
            if len(error.args) == 1 and isinstance(error.args[0], str):
                error.args = (_name_options(error.args[0], ctx),)
            raise


def _option_names(context: typer.Context) -> dict[str, str]:
    """Return what a user types for each parameter of a command: ``PAIR`` for ``pair``, ``--set`` for ``settings``."""
    return {
        str(p.name): str(p.metavar).rstrip(".") if p.param_type_name == "argument" else max(p.opts, key=len)
        for p in context.command.params
    }


def _name_options(message: str, context: typer.Context) -> str:
    shown = _option_names(context)
    for name, candidates in SYNONYMS.items():
        known = [candidate for candidate in candidates if candidate in shown]
        given = [candidate for candidate in known if context.params.get(candidate) is not None]
        if known:
            shown[name] = shown[(given or known[-1:])[0]]
    argument, colon, rest = message.partition(":")
    if argument in shown:
        message = f"{shown[argument]}{colon}{rest}"
    resume = f"--resume {context.params.get('out') or 'FOLDER'}"
    for written, typed in (("overwrite", "--overwrite"), ("resume", resume), ("binarize", "--binarize dynamic")):
        if written in shown:
            message = re.sub(rf"\b{written}=True\b", typed, message)
    return message


# Options that several commands share ----------------------------------------------------------------------------

app = typer.Typer(
    help="Latent-variable models as Pyro model/guide pairs: fit, score, sample and compare them.",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
command = partial(app.command, cls=_Command)


def _check_seed(seed: int) -> int:
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed: expected a whole number from 0 to 2^63 − 1; got {seed}.")
    return seed


AlsoOption = Annotated[list[str] | None, Option(help=f"Further measurement, once for each: {', '.join(ALSO)}.")]
BatchSizeOption = Annotated[int, Option(help="Number of data in a step of SVI.")]
BinarizeOption = Annotated[
    str,
    Option(
        help="Treatment of pixels in [0, 1]: dynamic (drawn as 0 or 1 anew at every use), static (drawn once), none "
        "(as they are), or auto (dynamic, where the likelihood is over {0, 1} and the data are images)."
    ),
]
DataOption = Annotated[
    str | None, Option("--data", "-d", help="Data set: a name from `pyrovae list`, or a .csv or .npy file of rows.")
]
DeviceOption = Annotated[str, Option(help="Device: auto (CUDA where there is one), cpu or cuda.")]
ThreadsOption = Annotated[
    int | None, Option(help="Number of threads. By default one for small steps, otherwise as many as allowed.")
]
EpochsOption = Annotated[
    int | None, Option(help="Passes over the data by SVI. By default 50, or as many as make 2,000 steps.")
]
EverythingOption = Annotated[bool, Option("--all", help="Measure all that applies. It may take minutes.")]
LrOption = Annotated[
    float | None, Option(help="First learning rate of Adam, for SVI. By default 0.02 for gmm and ppca, else 0.003.")
]
OverwriteOption = Annotated[bool, Option("--overwrite", help="Replace what is there.")]
RunArgument = Annotated[Path, Argument(metavar="RUN", help="A folder that `pyrovae fit` wrote.")]
RunSamplesOption = Annotated[
    int | None, Option(help="Importance samples for each datum's log evidence. By default as many as the run took.")
]
SamplesOption = Annotated[int, Option(help="Importance samples for each datum's log evidence.")]
SeedOption = Annotated[int, Option(help="Seed of everything random.", callback=_check_seed)]
SetOption = Annotated[
    list[str] | None,
    Option("--set", "-s", metavar="NAME=VALUE", help="Option of every pair that has it, e.g. hidden_dims=200,200."),
]


# Commands -------------------------------------------------------------------------------------------------------


@app.callback()
def show_version(
    show: Annotated[bool, Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if show:
        print(version("pyrovae"))
        raise typer.Exit


@command("list")
def list_() -> None:
    """List pairs, data sets and losses."""
    print("Pairs (options of --set in brackets)")
    for name, pair in REGISTRY.items():
        print(f"  {name:<10}{_summary(pair)}")
        defaults = {option: p.default for option, p in names.constructor_options(pair).items()}
        defaults |= DEFAULT_OPTIONS.get(name, {})
        shown = ", ".join(f"{option}={default}".replace(" ", "") for option, default in defaults.items())
        print(f"  {'':<10}[{shown}]")
    print("\nData sets")
    for name, text in describe().items():
        print(f"  {name:<21}{text}")
    print("\nLosses")
    for name, loss in LOSSES.items():
        print(f"  {name:<21}{_summary(loss)}")
        parameters = inspect.signature(loss).parameters
        options = {"num_particles": "--num-particles", "alpha": "--alpha"}
        print(f"  {'':<21}[{', '.join(shown for option, shown in options.items() if option in parameters)}]")


def _summary(thing: Any) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0].rstrip(".:").replace("``", "")


@command()
def fit(
    context: typer.Context,
    pair: Annotated[
        str | None, Argument(metavar="PAIR", help="A name from `pyrovae list`, or path/to/file.py:ClassName.")
    ] = None,
    data: DataOption = None,
    settings: SetOption = None,
    loss: Annotated[str | None, Option(help="Loss from `pyrovae list`. By default the pair's own.")] = None,
    num_particles: Annotated[int | None, Option(help="Samples of each datum's latents, for --loss.")] = None,
    alpha: Annotated[float | None, Option(help="Order of --loss RenyiELBO; 0 is the IWAE bound.")] = None,
    epochs: EpochsOption = None,
    batch_size: BatchSizeOption = 128,
    lr: LrOption = None,
    schedule: Annotated[str, Option(help="Learning-rate schedule: constant, cosine or burda.")] = "cosine",
    validation: Annotated[
        float | None, Option(help="Held-out data: a share or a count. By default a tenth, at most 400; 0: none.")
    ] = None,
    patience: Annotated[
        int | None, Option(help="Epochs without a better held-out bound before training stops with the best weights.")
    ] = None,
    binarize: BinarizeOption = "auto",
    num_samples: SamplesOption = 5000,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    out: Annotated[Path | None, Option("--out", "-o", help="Run folder. By default runs/PAIR-DATA, numbered.")] = None,
    overwrite: OverwriteOption = False,
    resume: Annotated[Path | None, Option(metavar="RUN", help="Go on with a stopped run, exactly as it was.")] = None,
) -> None:
    """Train a pair by SVI and write a run folder.

    The folder holds weights, configuration, history, scores on held-out data, and pictures.

    \b
    pyrovae fit vae --set latent_dim=2
    pyrovae fit vae --data mydata.csv --set likelihood=normal
    pyrovae fit mypair.py:MyPair --data digits --epochs 20
    pyrovae fit --resume runs/vae-digits
    """
    if resume is not None:
        _check_resumed_alone(context)
        folder = RunFolder(resume)
        run = folder.load(with_weights=False)
        if not folder.checkpoint.is_file():
            raise FileNotFoundError(f"resume: {resume} has no checkpoint to go on from. Fit again, with --overwrite.")
        train_run(folder, run, device, resume=True)
        return
    if pair is None:
        raise ValueError("pair: expected a name from `pyrovae list`, file.py:ClassName, or --resume RUN; got none.")
    pair_class = names.find_pair(pair)
    given = names.parse_options(pair_class, settings or [])
    data = data or DEFAULT_DATA.get(pair, "digits")
    dataset = names.load_data(data, binarize)
    built = names.build_pair(pair_class, given, dataset.data_dim, seed)
    loss_options = {k: v for k, v in {"num_particles": num_particles, "alpha": alpha}.items() if v is not None}
    check_positive("batch_size", batch_size, integer=True)
    num_data = len(dataset.train)
    held_out = min(num_data // 10, 400) if validation is None else validation
    if epochs is None:
        num_held_out = min(num_data, held_out * num_data if held_out < 1 else held_out)
        epochs = default_epochs(math.ceil((num_data - num_held_out) / batch_size))
    training: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "schedule": schedule}
    training |= {"lr": built.default_lr if lr is None else lr, "patience": patience, "threads": threads}
    training |= {"validation": held_out if held_out % 1 else int(held_out)}  # a share or a count
    config = Config(
        pair=names.absolute_name(pair),
        options=given,
        data=names.absolute_name(data),
        binarize=names.resolve_binarize(binarize, built, dataset),
        loss=loss,
        loss_options=loss_options,
        fit=training,
        num_samples=num_samples,
        seed=seed,
        pair_sha256=names.file_digest(pair),
        data_sha256=names.file_digest(data),
        versions=names.versions(),
    )
    folder = RunFolder(out or _free_path(Path("runs") / f"{names.short_name(pair)}-{Path(data).stem}"))
    check_free_folder("path", folder.path, "run", overwrite=overwrite, read=folder.read_config)
    train_run(folder, (config, built, dataset), device, resume=False)


def _check_resumed_alone(context: typer.Context) -> None:
    """Refuse other options beside --resume, rather than ignore them: the run has its own."""
    for name, shown in _option_names(context).items():
        source = context.get_parameter_source(name)
        if name not in ("resume", "device") and source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"resume: the run goes on with the options that it was started with; leave {shown} out.")


def _free_path(path: Path) -> Path:
    """Return ``path``, or the first of path-2, path-3, ... that is free."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(free for free in itertools.chain([path], numbered) if not free.exists())


def _check_new_file(argument: str, path: Path, kind: str, overwrite: bool | None = None) -> None:
    """Raise unless ``path`` can be written as ``kind``, before work that takes its time and would be lost."""
    if path.suffix not in kind.replace(",", "").split():
        raise ValueError(f"{argument}: expected {kind} file; got {path}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{argument}: expected a folder that exists; found none at {path.parent}. Make it.")
    if path.is_dir():
        raise IsADirectoryError(f"{argument}: expected {kind} file; {path} is a folder.")
    if path.exists() and not overwrite:
        advice = "Choose" if overwrite is None else "Pass overwrite=True to replace it, or"
        raise FileExistsError(f"{argument}: {path} exists. {advice} another name.")


@command()
def evaluate(
    run: RunArgument,
    num_samples: RunSamplesOption = None,
    also: AlsoOption = None,
    everything: EverythingOption = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Score a run again, and write its scores.json.

    \b
    pyrovae evaluate runs/vae-digits --also inference_gaps --also collapse
    """
    check_positive("num_samples", num_samples, integer=True, optional=True)
    measurements = _choose_measurements(also, everything, default=())
    folder = RunFolder(run)
    check_positive("threads", threads, integer=True, optional=True)
    with limit_threads(threads):
        print(score_run(folder, folder.load(), device, folder.read_scores(), num_samples, measurements))


def _choose_measurements(also: list[str] | None, everything: bool, default: Iterable[str]) -> list[str]:
    for name in also or []:
        check_choice("also", name, ALSO)
    return list(ALSO) if everything else list(default) if also is None else also


@command()
def report(
    run: Annotated[Path | None, Argument(metavar="RUN", help="A folder that `pyrovae fit` wrote.")] = None,
    compare: Annotated[Path | None, Option(metavar="FOLDER", help="A folder that `pyrovae compare` wrote.")] = None,
    num_data: Annotated[int, Option(help="Rows to measure on, drawn at random where there are more.")] = 500,
    num_samples: RunSamplesOption = None,
    also: AlsoOption = None,
    everything: EverythingOption = False,
    device: DeviceOption = "auto",
    out: Annotated[Path | None, Option("--out", "-o", help=".html file. By default report.html in the folder.")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write one HTML page about a run, a comparison or both, to send to somebody.

    The page holds its pictures, and needs no scripts and no other file. A run is measured anew, by all that applies to
    its pair except annealed importance sampling (--all adds it).

    \b
    pyrovae report runs/vae-digits
    pyrovae report --compare runs/compare-gmm-faithful
    """
    from pyrovae.cli.report import report_comparison, report_run, write_pages  # this loads matplotlib

    if run is None and compare is None:
        raise ValueError("run: expected the folder of a run, or --compare and the folder of a comparison; got neither.")
    check_positive("num_data", num_data, integer=True)
    check_positive("num_samples", num_samples, integer=True, optional=True)
    measurements = _choose_measurements(also, everything, default=[name for name in ALSO if "evidence" not in name])
    if out is not None:
        _check_new_file("out", out, "an .html", overwrite)
    folder = None if run is None else RunFolder(run)
    if folder is not None:
        folder.read_config()
    pages = [] if compare is None else [report_comparison(compare)]
    out = out or (run or compare or Path()) / "report.html"
    _check_new_file("out", out, "an .html", overwrite)
    if folder is not None:
        pages.insert(0, report_run(folder, measurements, num_data=num_data, num_samples=num_samples, device=device))
    write_pages(pages, out)
    if folder is not None and (notice := folder.unfinished()) is not None:
        print(f"NOTE: {notice}. Go on with: pyrovae fit --resume {run}")
    print(f"Wrote {out}")


@command()
def sample(
    run: RunArgument,
    num: Annotated[int, Option("--num", "-n", help="Number of data to draw.")] = 100,
    out: Annotated[
        Path | None, Option("--out", "-o", help="A .csv, .npy or .png file. By default rows are printed.")
    ] = None,
    mean: Annotated[bool, Option("--mean", help="Return E[x | z] at drawn latents, in place of draws of x.")] = False,
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Draw new data from a run's model."""
    check_positive("num", num, integer=True)
    if out is not None:
        _check_new_file("out", out, "a .csv, .npy or .png", overwrite)
    _, pair, dataset = RunFolder(run).load()
    rows = draw_data(pair, num, mean=mean, data_dim=dataset.data_dim, seed=seed)
    if out is None or out.suffix == ".csv":
        with nullcontext(sys.stdout) if out is None else out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(dataset.feature_names)
            writer.writerows([f"{value:.9g}" for value in row] for row in rows.tolist())  # nine digits are a float32
    elif out.suffix == ".npy":
        np.save(out, rows.numpy())
    else:
        from pyrovae import plots

        if dataset.image_shape is not None:
            figure = plots.plot_images(rows, dataset.image_shape, title="Drawn from the model")
        else:
            figure = plots.plot_samples(pair, dataset.train, feature_names=dataset.feature_names, drawn=rows)
        figure.savefig(out, dpi=150)
    if out is not None:
        print(f"Wrote {out}")


@command()
def compare(
    context: typer.Context,
    pair: Annotated[
        list[str] | None, Argument(metavar="PAIR...", help="Names from `pyrovae list`, or path/to/file.py:ClassName.")
    ] = None,
    data: DataOption = None,
    settings: SetOption = None,
    losses: Annotated[
        list[str] | None,
        Option(
            help="Methods: EM, closed-form, default-loss, or losses such as RenyiELBO:K=50,alpha=0.5; several with "
            "commas or by repeating. By default all that each pair has."
        ),
    ] = None,
    seeds: Annotated[int, Option(help="Number of seeds. The table has means and standard errors over them.")] = 1,
    epochs: EpochsOption = None,
    batch_size: BatchSizeOption = 128,
    lr: LrOption = None,
    num_samples: SamplesOption = 1000,
    gaps: Annotated[bool, Option("--gaps", help="Split each gap into approximation and amortization. Slow.")] = False,
    binarize: BinarizeOption = "auto",
    device: DeviceOption = "auto",
    seed: Annotated[int, Option(help="First seed; the others follow it.", callback=_check_seed)] = 0,
    out: Annotated[Path | None, Option("--out", "-o", help="Folder. By default runs/compare-PAIR-DATA[-N].")] = None,
    overwrite: OverwriteOption = False,
    resume: Annotated[Path | None, Option(metavar="FOLDER", help="Go on with a stopped comparison.")] = None,
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
    if resume is not None:
        _check_resumed_alone(context)
        folder = resume
        request, dataset = Request.read(folder)
    elif not pair:
        raise ValueError("pair: expected names from `pyrovae list`, file.py:ClassName, or --resume FOLDER; got none.")
    else:
        data = data or DEFAULT_DATA.get(pair[0], "digits")
        options: dict[str, Any] = {"seeds": seeds, "epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
        options |= {"num_samples": num_samples, "gaps": gaps, "methods": split_methods(losses or [])}
        request, dataset = Request.make(pair, data, settings or [], binarize, options)
        folder = out or _free_path(Path("runs") / f"compare-{'-'.join(map(names.short_name, pair))}-{Path(data).stem}")
    try:
        comparison = compare_pairs(
            request.makers(dataset),
            dataset,
            **request.settings,
            device=device,
            folder=folder,
            overwrite=overwrite,
            resume=resume is not None,
            config=asdict(request),
            report=tqdm.write,
        )
    except KeyboardInterrupt:
        if (folder / "comparison.json").is_file():
            print(f"\nStopped. Go on with: pyrovae compare --resume {folder}", file=sys.stderr)
        raise
    print(f"\n{comparison}\n\nIn {folder}: " + ", ".join(sorted(path.name for path in folder.iterdir())))


@command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Time the project and its peers side by side on this machine: SVI steps and EM iterations.

    Takes minutes. Ratios below 1 say that pyrovae is faster. For options: pyrovae bench --help.
    """
    script = Path(__file__).parents[2] / "tests/benchmarks/run.py"
    if not script.is_file():
        raise ValueError("bench: expected a clone of the repository, whose tests/benchmarks/ holds the peers' code.")
    raise typer.Exit(subprocess.run([sys.executable, str(script), *context.args], check=False).returncode)


@command()
def new(file: Annotated[Path, Argument(metavar="FILE", help="The Python file to write, e.g. mypair.py.")]) -> None:
    """Write a small working pair to start your own from."""
    if file.suffix != ".py" or not file.stem.isidentifier():
        raise ValueError(f"file: expected a Python file such as mypair.py; got {file}.")
    _check_new_file("file", file, "a .py")
    file.write_bytes(Path(__file__).with_name("mypair.txt").read_bytes())
    print(f"Wrote {file}. Train it with: pyrovae fit {file}:MyPair --data digits")


def main(arguments: list[str] | None = None) -> None:
    """Run the command. A user's mistake ends in a line on stderr and exit code 2; PYROVAE_TRACEBACK=1 shows where."""
    try:
        app(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("PYROVAE_TRACEBACK"):
            raise
        print(f"pyrovae: {_explain_error(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, MISTAKES) else 1)


def _explain_error(error: Exception) -> str:
    """Return the message, with the line of the user's own file that the error came from."""
    speaks_to_users = isinstance(error, (*MISTAKES, FloatingPointError))
    text = str(error) if speaks_to_users else f"{type(error).__name__}: {error}"
    frames: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        for frame, line in traceback.walk_tb(cause.__traceback__):
            if frame.f_globals.get("__name__", "").startswith("pyrovae_user_"):
                frames.append(f"{frame.f_code.co_filename}, line {line}")
        cause = cause.__cause__
    if frames or not speaks_to_users:
        text += f"{_space(text)}({frames[-1] if frames else 'PYROVAE_TRACEBACK=1 shows where'})"
    return _space(str(error)).join([text, *getattr(error, "__notes__", [])])


def _space(text: str) -> str:
    return "\n" if "\n" in text else " "  # Pyro's messages may end in a table of shapes
