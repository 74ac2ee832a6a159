"""The ``pyrovae`` command: one function for each subcommand."""

from __future__ import annotations

import csv
import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from tqdm import tqdm

from pyrovae.checks import check_choice, check_positive
from pyrovae.cli import names
from pyrovae.cli.errors import MISTAKES, Command, explain_error, option_names
from pyrovae.cli.fits import score_run, train_run
from pyrovae.cli.request import Request
from pyrovae.cli.runs import Config, RunFolder
from pyrovae.cli.template import TEMPLATE
from pyrovae.comparison import compare as compare_pairs
from pyrovae.comparison.methods import parse_method, split_methods
from pyrovae.data import describe
from pyrovae.evaluation import ALSO
from pyrovae.evaluation import sample as draw_data
from pyrovae.infer import LOSSES
from pyrovae.models import DEFAULT_OPTIONS, REGISTRY
from pyrovae.training.schedules import default_epochs

app = typer.Typer(
    help="Latent-variable models as Pyro model/guide pairs: fit, score, sample and compare them.",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
command = partial(app.command, cls=Command)


def _check_seed(seed: int) -> int:
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed: expected a whole number from 0 to 2^63 − 1; got {seed}.")
    return seed


# Options that several commands share ----------------------------------------------------------------------------

AlsoOption = Annotated[
    list[str] | None,
    typer.Option(
        "--also",
        help="Further measurement, once for each: collapse, kl_decomposition, inference_gaps, annealed_evidence, "
        "bidirectional_evidence, simulation_based_calibration, posterior_predictive_check, mixture_scores.",
    ),
]
BatchSizeOption = Annotated[int, typer.Option(help="Number of data in a step of SVI.")]
BinarizeOption = Annotated[
    str,
    typer.Option(
        help="Treatment of pixels in [0, 1]: dynamic (drawn as 0 or 1 anew at every use), static (drawn once), none "
        "(as they are), or auto (dynamic, where the likelihood is over {0, 1} and the data are images)."
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option("--data", "-d", help="Data set: a name from `pyrovae list`, or a .csv or .npy file of rows."),
]
DeviceOption = Annotated[str, typer.Option(help="Device: auto (CUDA where there is one), cpu or cuda.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option(help="Number of threads. By default one for small steps, otherwise as many as the machine allows."),
]
EpochsOption = Annotated[
    int | None, typer.Option(help="Passes over the data by SVI. By default 50, or as many as make 2,000 steps.")
]
EverythingOption = Annotated[bool, typer.Option("--all", help="Measure all that applies. It may take minutes.")]
LrOption = Annotated[
    float | None,
    typer.Option(help="First learning rate of Adam, for SVI. By default 0.02 for gmm and ppca, 0.003 for the others."),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `pyrovae fit` wrote.")]
RunSamplesOption = Annotated[
    int | None,
    typer.Option(help="Importance samples for each datum's log evidence. By default as many as the run took."),
]
SamplesOption = Annotated[int, typer.Option("--num-samples", help="Importance samples for each datum's log evidence.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.", callback=_check_seed)]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="NAME=VALUE",
        help="Option of every pair that has it, e.g. latent_dim=2 or hidden_dims=200,200.",
    ),
]


# Commands -------------------------------------------------------------------------------------------------------


@app.callback()
def options(
    show: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
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
        shown = []
        for option, parameter in names.constructor_options(pair).items():
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


@command()
def fit(
    context: typer.Context,
    pair: Annotated[
        str | None, typer.Argument(metavar="PAIR", help="A name from `pyrovae list`, or path/to/file.py:ClassName.")
    ] = None,
    data: DataOption = None,
    settings: SetOption = None,
    loss: Annotated[str | None, typer.Option(help="Loss from `pyrovae list`. By default the pair's own.")] = None,
    num_particles: Annotated[
        int | None, typer.Option(help="Number of samples of the latents for each datum, for --loss.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Order of --loss RenyiELBO; 0 is the IWAE bound.")] = None,
    epochs: EpochsOption = None,
    batch_size: BatchSizeOption = 128,
    lr: LrOption = None,
    schedule: Annotated[str, typer.Option(help="Learning-rate schedule: constant, cosine or burda.")] = "cosine",
    validation: Annotated[
        float | None,
        typer.Option(
            help="Held-out data: a share below 1, or a count. By default a tenth of the data, at most 400; 0: none."
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Epochs without a better held-out bound, after which training stops and the best weights are kept."
        ),
    ] = None,
    binarize: BinarizeOption = "auto",
    num_samples: SamplesOption = 5000,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The run folder. By default runs/PAIR-DATA, numbered.")
    ] = None,
    overwrite: OverwriteOption = False,
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
    if resume is not None:
        _check_resumed_alone(context)
        folder = RunFolder(resume)
        config, built, dataset = folder.load(with_weights=False)
        if not folder.checkpoint.is_file():
            raise FileNotFoundError(
                f"resume: {folder.path} has no checkpoint to go on from. Fit again, with --overwrite."
            )
        train_run(folder, config, built, dataset, device, resume=True)
        return
    if pair is None:
        raise ValueError("pair: expected a name from `pyrovae list`, file.py:ClassName, or --resume RUN; got none.")
    pair_class = names.find_pair(pair)
    given = names.parse_options(pair_class, settings or [])
    data = data or names.default_data(pair)
    dataset = names.load_data(data, binarize)
    built = names.build_pair(pair_class, given, dataset.data_dim, seed)
    loss_options = {k: v for k, v in {"num_particles": num_particles, "alpha": alpha}.items() if v is not None}
    names.build_loss(built, loss, loss_options)  # a mistake in it is reported before anything is written
    check_positive("batch_size", batch_size, integer=True)
    check_positive("threads", threads, integer=True, optional=True)
    num_data = len(dataset.train)
    held_out = _check_share_or_count(min(num_data // 10, 400) if validation is None else validation)
    if epochs is None:
        num_held_out = held_out * num_data if held_out < 1 else held_out
        epochs = default_epochs(math.ceil((num_data - num_held_out) / batch_size))
    config = Config(
        pair=names.absolute_name(pair),
        options=given,
        data=names.absolute_name(data),
        binarize=names.resolve_binarize(binarize, built, dataset),
        loss=loss,
        loss_options=loss_options,
        fit={
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": built.default_lr if lr is None else lr,
            "schedule": schedule,
            "validation": held_out,
            "patience": patience,
            "threads": threads,
        },
        num_samples=num_samples,
        seed=seed,
        pair_sha256=names.file_digest(pair),
        data_sha256=names.file_digest(data),
        versions=names.versions(),
    )
    folder = RunFolder(out or _free_path(Path("runs") / f"{names.short_name(pair)}-{Path(data).stem}"))
    folder.check_free(overwrite)
    train_run(folder, config, built, dataset, device, resume=False)


def _check_resumed_alone(context: typer.Context) -> None:
    """Refuse other options beside --resume, rather than ignore them: the run has its own."""
    for name, shown in option_names(context).items():
        source = context.get_parameter_source(name)
        if name not in ("resume", "device") and source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"resume: the run goes on with the options that it was started with; leave {shown} out.")


def _check_share_or_count(validation: float) -> float | int:
    if 0 < validation < 1:
        return validation
    if not validation >= 0 or validation % 1 != 0:
        raise ValueError(
            f"validation: expected a share between 0 and 1, or a whole number, 0 or more; got {validation:g}."
        )
    return int(validation)


def _free_path(path: Path) -> Path:
    """Return ``path``, or the first of path-2, path-3, ... that is free."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _check_new_file(out: Path, kind: str, overwrite: bool) -> None:
    """Raise unless ``out`` can be written as ``kind``, before work that takes its time and would be lost."""
    if out.suffix not in kind.replace(",", "").split():
        raise ValueError(f"out: expected {kind} file; got {out}.")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"out: expected a folder that exists; found none at {out.parent}. Make it first.")
    if out.is_dir():
        raise IsADirectoryError(f"out: expected {kind} file; {out} is a folder.")
    if out.exists() and not overwrite:
        raise FileExistsError(f"out: {out} exists. Pass overwrite=True to replace it, or another name.")


@command()
def evaluate(
    run: RunArgument,
    num_samples: RunSamplesOption = None,
    also: AlsoOption = None,
    everything: EverythingOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Score a run again, and write its scores.json.

    \b
    pyrovae evaluate runs/vae-digits --also inference_gaps --also collapse
    """
    check_positive("num_samples", num_samples, integer=True, optional=True)
    measurements = _choose_measurements(also, everything, default=())
    folder = RunFolder(run)
    config, pair, dataset = folder.load()
    before = folder.read_scores()
    scores = score_run(
        folder,
        config,
        pair,
        dataset,
        device,
        num_samples=num_samples or config.num_samples,
        seconds=before.get("training_seconds"),
        also=measurements,
        earlier=before.get("also"),
    )
    print(scores)


def _choose_measurements(also: list[str] | None, everything: bool, default: Iterable[str]) -> list[str]:
    for name in also or []:
        check_choice("also", name, ALSO)
    if everything:
        return list(ALSO)
    return list(default) if also is None else also


@command()
def report(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="A folder that `pyrovae fit` wrote.")] = None,
    compare: Annotated[
        Path | None, typer.Option("--compare", metavar="FOLDER", help="A folder that `pyrovae compare` wrote.")
    ] = None,
    num_data: Annotated[int, typer.Option(help="Rows to measure on, drawn at random where there are more.")] = 500,
    num_samples: RunSamplesOption = None,
    also: AlsoOption = None,
    everything: EverythingOption = False,
    device: DeviceOption = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="An .html file. By default report.html in the folder.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write one HTML page about a run, a comparison or both, to send to somebody.

    The page holds its pictures, and needs no scripts and no other file. A run is measured anew, by all that applies to
    its pair except annealed importance sampling (--all adds it).

    \b
    pyrovae report runs/vae-digits
    pyrovae report --compare runs/compare-gmm-faithful
    """
    from pyrovae.cli.report import Page, report_comparison, report_run  # matplotlib is loaded when it is first needed

    if run is None and compare is None:
        raise ValueError(
            "run: expected the folder of a run, or --compare with the folder of a comparison; got neither."
        )
    check_positive("num_data", num_data, integer=True)
    check_positive("num_samples", num_samples, integer=True, optional=True)
    measurements = _choose_measurements(also, everything, default=[name for name in ALSO if "evidence" not in name])
    if out is not None:
        _check_new_file(out, "an .html", overwrite)
    folder = None if run is None else RunFolder(run)
    if folder is not None:
        folder.read_config()
    pages: list[Page] = [] if compare is None else [report_comparison(compare)]
    out = out or (run or compare or Path()) / "report.html"
    _check_new_file(out, "an .html", overwrite)
    if folder is not None:
        pages.insert(
            0, report_run(folder, num_data=num_data, num_samples=num_samples, also=measurements, device=device)
        )
    Page.join(pages).write(out)
    if folder is not None and (notice := folder.unfinished()) is not None:
        print(f"NOTE: {notice}. Go on with: pyrovae fit --resume {run}")
    print(f"Wrote {out}")


@command()
def sample(
    run: RunArgument,
    num: Annotated[int, typer.Option("--num", "-n", help="Number of data to draw.")] = 100,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A .csv, .npy or .png file. By default rows are printed.")
    ] = None,
    mean: Annotated[
        bool, typer.Option("--mean", help="Return E[x | z] at drawn latents, in place of draws of x.")
    ] = False,
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Draw new data from a run's model."""
    check_positive("num", num, integer=True)
    if out is not None:
        _check_new_file(out, "a .csv, .npy or .png", overwrite)
    _, pair, dataset = RunFolder(run).load()
    rows = draw_data(pair, num, mean=mean, data_dim=dataset.data_dim, seed=seed)
    if out is None:
        _write_csv(sys.stdout, dataset.feature_names, rows.tolist())
        return
    if out.suffix == ".npy":
        np.save(out, rows.numpy())
    elif out.suffix == ".csv":
        with out.open("w", newline="", encoding="utf-8") as file:
            _write_csv(file, dataset.feature_names, rows.tolist())
    else:
        from pyrovae import plots

        if dataset.image_shape is not None:
            figure = plots.plot_images(rows, dataset.image_shape, title="Drawn from the model")
        else:
            figure = plots.plot_samples(pair, dataset.train, feature_names=dataset.feature_names, drawn=rows)
        figure.savefig(out, dpi=150)
    print(f"Wrote {out}")


def _write_csv(file: Any, header: Iterable[str], rows: list[list[float]]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([f"{value:.9g}" for value in row] for row in rows)  # nine digits are a float32


@command()
def compare(
    context: typer.Context,
    pair: Annotated[
        list[str] | None,
        typer.Argument(metavar="PAIR...", help="Names from `pyrovae list`, or path/to/file.py:ClassName."),
    ] = None,
    data: DataOption = None,
    settings: SetOption = None,
    losses: Annotated[
        list[str] | None,
        typer.Option(
            help="Methods: EM, closed-form, default-loss, or losses such as RenyiELBO:K=50,alpha=0.5; several with "
            "commas or by repeating. By default all that each pair has."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds. The table has means and standard errors over them.")] = 1,
    epochs: EpochsOption = None,
    batch_size: BatchSizeOption = 128,
    lr: LrOption = None,
    num_samples: SamplesOption = 1000,
    gaps: Annotated[
        bool, typer.Option("--gaps", help="Split each gap into approximation and amortization. Takes its time.")
    ] = False,
    binarize: BinarizeOption = "auto",
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(help="First seed; the others follow it.", callback=_check_seed)] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder. By default runs/compare-PAIR-DATA, numbered.")
    ] = None,
    overwrite: OverwriteOption = False,
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
    if resume is not None:
        _check_resumed_alone(context)
        folder = resume
        request, dataset = Request.read(folder)
    else:
        if not pair:
            raise ValueError(
                "pair: expected names from `pyrovae list`, file.py:ClassName, or --resume FOLDER; got none."
            )
        data = data or names.default_data(pair[0])
        request, dataset = Request.make(
            pair,
            data,
            settings or [],
            binarize,
            [parse_method(method) for method in split_methods(losses or [])],
            seeds=seeds,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            num_samples=num_samples,
            gaps=gaps,
            seed=seed,
        )
        folder = out or _free_path(Path("runs") / f"compare-{'-'.join(map(names.short_name, pair))}-{Path(data).stem}")
    try:
        comparison = compare_pairs(
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
def new(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The Python file to write, e.g. mypair.py.")],
) -> None:
    """Write a small working pair to start your own from."""
    if file.suffix != ".py" or not file.stem.isidentifier():
        raise ValueError(f"file: expected a Python file such as mypair.py; got {file}.")
    if file.exists():
        raise FileExistsError(f"file: {file} exists. Choose another name.")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"file: expected a folder that exists; found none at {file.parent}. Make it first.")
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
        print(f"pyrovae: {explain_error(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, MISTAKES) else 1)
