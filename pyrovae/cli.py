"""The ``pyrovae`` command."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

# torch and pyro load when a command needs them: help is shown at once.

app = typer.Typer(
    help="Latent-variable models as Pyro model/guide pairs: fit, score, sample and compare them.",
    no_args_is_help=True,
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
DeviceOption = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu or cuda.")]
SeedOption = Annotated[int, typer.Option(help="Of everything random.")]
BinarizeOption = Annotated[
    str,
    typer.Option(
        help="Pixels in [0, 1]: dynamic (drawn as 0 or 1 anew at every use), static (drawn once), none (as they are), or auto "
        "(dynamic, where the likelihood is over {0, 1} and the data are images)."
    ),
]
SamplesOption = Annotated[int, typer.Option("--num-samples", help="Importance samples for each datum's log evidence.")]


@app.command("list")
def list_() -> None:
    """List pairs, data sets and losses."""
    import inspect

    from pyrovae.data import describe
    from pyrovae.infer import LOSSES
    from pyrovae.models import DEFAULT_OPTIONS, REGISTRY
    from pyrovae.runs import constructor_options

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
    return (thing.__doc__ or "").strip().splitlines()[0].rstrip(".")


@app.command()
def fit(
    pair: PairArgument = None,
    data: DataOption = None,
    settings: SetOption = None,
    loss: Annotated[str | None, typer.Option(help="A loss from `pyrovae list`; by default, the pair's own.")] = None,
    num_particles: Annotated[
        int | None, typer.Option(help="Of the loss: samples of the latents for each datum.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Of RenyiELBO: its order; 0 is the IWAE bound.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 50,
    batch_size: Annotated[int, typer.Option(help="Data a step.")] = 128,
    lr: Annotated[float, typer.Option(help="First learning rate of Adam.")] = 1e-3,
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run folder that is there.")] = False,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="RUN", help="Go on with a run that was stopped, exactly where it was."),
    ] = None,
) -> None:
    """Train a pair by SVI, score it on held-out data, and write a run folder with weights, history, scores and pictures."""
    from pyrovae.runs import (
        Config,
        RunFolder,
        build_loss,
        build_pair,
        default_data,
        file_digest,
        load_data,
        parse_options,
    )
    from pyrovae.runs import find_pair as find

    if resume is not None:
        if pair is not None:
            raise ValueError(f"--resume: the run knows its pair and options; leave {pair!r} out.")
        folder = RunFolder(resume)
        config, built, dataset, anew = folder.load(with_weights=False)
        if not folder.checkpoint.is_file():
            raise FileNotFoundError(f"RUN: {folder.path} has no checkpoint to go on from.")
        _train(folder, config, built, dataset, anew, device, resume=True)
        return
    if pair is None:
        raise ValueError("PAIR: name one (`pyrovae list` shows them), or pass --resume RUN.")
    options = parse_options(find(pair), settings or [])
    data = data or default_data(pair)
    first_look, _ = load_data(data, None, "none")
    built = build_pair(pair, options, first_look.data_dim, seed)
    loss_options = {k: v for k, v in {"num_particles": num_particles, "alpha": alpha}.items() if v is not None}
    build_loss(built, loss, loss_options)  # an error in it should come before anything is written
    dataset, anew = load_data(data, built, binarize)
    if validation is None:
        validation = min(len(dataset.train) // 10, 400)
    config = Config(
        pair=pair,
        options=options,
        data=data,
        binarize="dynamic" if anew else "static" if binarize == "static" else "none",
        loss=loss,
        loss_options=loss_options,
        fit={
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": lr,
            "schedule": schedule,
            "validation": int(validation) if validation >= 1 or validation == 0 else validation,
            "patience": patience,
        },
        num_samples=num_samples,
        seed=seed,
        pair_sha256=file_digest(pair),
        versions={name: version(name) for name in ("pyrovae", "torch", "pyro-ppl")},
    )
    folder = RunFolder(out or _numbered(Path("runs") / f"{_short(pair)}-{Path(data).stem}"))
    folder.check_free(overwrite)
    _train(folder, config, built, dataset, anew, device, resume=False)


def _short(pair: str) -> str:
    return pair.rpartition(":")[2].lower()


def _numbered(path: Path) -> Path:
    """``path``, or the first of path-2, path-3, ... that is free."""
    numbers = iter(range(2, sys.maxsize))
    free = path
    while free.exists():
        free = path.with_name(f"{path.name}-{next(numbers)}")
    return free


def _train(folder: Any, config: Any, pair: Any, dataset: Any, anew: bool, device: str, *, resume: bool) -> None:
    import pyrovae
    from pyrovae.checks import check_positive
    from pyrovae.runs import build_loss
    from pyrovae.train import pick_device

    check_positive("--num-samples", config.num_samples, integer=True)
    print(f"{config.pair}: {sum(p.numel() for p in pair.parameters()):,} parameters on {pick_device(device)}")
    print(f"{dataset!r}")
    print(f"  {dataset.convention}{' Pixels are drawn as 0 or 1 anew at every use.' if anew else ''}")
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
            on_start=None if resume else lambda: folder.create(config),
        )
    except (KeyboardInterrupt, FloatingPointError) as error:
        if folder.checkpoint.is_file():
            pair.save(folder.weights)
            if isinstance(error, KeyboardInterrupt):
                print(f"\nStopped. Go on with: pyrovae fit --resume {folder.path}", file=sys.stderr)
        raise
    print(result)
    pair.save(folder.weights)
    folder.write_history(result.history)
    scores = _score(folder, config, pair, dataset, anew, device, config.num_samples, seconds=result.seconds)
    rows, labels = _scored_rows(dataset)
    pictures = folder.draw(pair, dataset, rows, labels, result.history)
    print(f"\n{scores}\n\nIn {folder.path}: config.json, weights.safetensors, history.csv, scores.json and pictures")
    print("\n".join(f"  {path}" for path in pictures))


def _scored_rows(dataset: Any) -> tuple[Any, Any]:
    return (dataset.train, dataset.labels_train) if dataset.test is None else (dataset.test, dataset.labels_test)


def _score(
    folder: Any,
    config: Any,
    pair: Any,
    dataset: Any,
    anew: bool,
    device: str,
    num_samples: int,
    seconds: float | None = None,
) -> str:
    """Score on the test rows, or the training rows where there are no others; write scores.json; return the table."""
    import pyrovae

    which = "train" if dataset.test is None else "test"
    start = time.perf_counter()
    rows, _ = _scored_rows(dataset)
    scores = pyrovae.evaluate(pair, rows, num_samples=num_samples, binarize=anew, device=device, seed=config.seed)
    record = {"data": config.data, "rows": which, **scores.to_dict(), "evaluation_seconds": time.perf_counter() - start}
    if seconds is not None:
        record["training_seconds"] = seconds
    folder.write_scores(record)
    return f"Scores on {config.data} ({which} rows)\n{scores}"


@app.command()
def evaluate(run: RunArgument, num_samples: SamplesOption = 5000, device: DeviceOption = "auto") -> None:
    """Score a run again on its data, and write its scores.json."""
    from pyrovae.runs import RunFolder

    folder = RunFolder(run)
    config, pair, dataset, anew = folder.load()
    print(_score(folder, config, pair, dataset, anew, device, num_samples))


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

    from pyrovae.evaluate import sample as draw
    from pyrovae.runs import RunFolder

    if out is not None and out.suffix not in (".csv", ".npy", ".png"):
        raise ValueError(f"--out: expected a .csv, .npy or .png file; got {out}.")
    if out is not None and out.exists() and not overwrite:
        raise FileExistsError(f"--out: {out} exists. Pass --overwrite to replace it, or another name.")
    _, pair, dataset, _ = RunFolder(run).load()
    rows = draw(pair, num, mean=mean, data_dim=dataset.data_dim, seed=seed)
    names = ",".join(dataset.feature_names)
    if out is None:
        np.savetxt(sys.stdout, rows.numpy(), fmt="%.6g", delimiter=",", header=names, comments="")
        return
    if out.suffix == ".npy":
        np.save(out, rows.numpy())
    elif out.suffix == ".csv":
        np.savetxt(out, rows.numpy(), fmt="%.9g", delimiter=",", header=names, comments="")
    else:
        from pyrovae.evaluate import plots

        if dataset.image_shape is not None:
            figure = plots.plot_images(rows, dataset.image_shape, title="Drawn from the model")
        else:
            figure = plots.plot_samples(pair, dataset.train, seed=seed)
        figure.savefig(out, dpi=150)
    print(f"{len(rows)} data in {out}")


@app.command()
def compare(
    pair: Annotated[
        str, typer.Argument(metavar="PAIR", help="A name from `pyrovae list`, or path/to/file.py:ClassName.")
    ],
    data: DataOption = None,
    settings: SetOption = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data by SVI.")] = 500,
    batch_size: Annotated[int, typer.Option(help="Data a step of SVI.")] = 128,
    lr: Annotated[float, typer.Option(help="First learning rate of SVI's Adam.")] = 0.02,
    num_samples: SamplesOption = 1000,
    binarize: BinarizeOption = "auto",
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder. By default runs/compare-PAIR-DATA, numbered.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the comparison that is there.")] = False,
) -> None:
    """Fit one model by every method it has (exact EM, SVI with enumeration, SVI with an amortized guide, ...), from the same start."""
    from pyrovae.compare import compare_methods
    from pyrovae.runs import build_pair, default_data, find_pair, load_data, parse_options

    options = parse_options(find_pair(pair), settings or [])
    data = data or default_data(pair)
    first_look, _ = load_data(data, None, "none")
    built = build_pair(pair, options, first_look.data_dim, seed)
    dataset, anew = load_data(data, built, binarize)
    folder = out or _numbered(Path("runs") / f"compare-{_short(pair)}-{Path(data).stem}")
    comparison = compare_methods(
        lambda **more: build_pair(pair, options | more, dataset.data_dim, seed),
        dataset,
        title=f"{pair} on {data}",
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        num_samples=num_samples,
        binarize=anew,
        device=device,
        seed=seed,
        folder=folder,
        overwrite=overwrite,
    )
    print(f"{comparison}\n\nIn {folder}: " + ", ".join(sorted(path.name for path in folder.iterdir())))


@app.command()
def new(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The Python file to write, e.g. mypair.py.")],
) -> None:
    """Write a small working pair of your own to start from."""
    from pyrovae.template import TEMPLATE

    if file.suffix != ".py" or not file.stem.isidentifier():
        raise ValueError(f"FILE: expected a Python file such as mypair.py; got {file}.")
    if file.exists():
        raise FileExistsError(f"FILE: {file} exists. Choose another name.")
    file.write_text(TEMPLATE, encoding="utf-8")
    print(f"Wrote {file}. Train it with: pyrovae fit {file}:MyPair --data digits")


def main(arguments: list[str] | None = None) -> None:
    """Run the command. Mistakes of the user end in one line on stderr and exit code 2; PYROVAE_TRACEBACK=1 shows where."""
    run: Callable[..., Any] = app
    try:
        run(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, TypeError, NotImplementedError, OSError, FloatingPointError, RuntimeError) as error:
        if os.environ.get("PYROVAE_TRACEBACK"):
            raise
        print(f"pyrovae: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError | RuntimeError) else 2)


if __name__ == "__main__":
    main()
