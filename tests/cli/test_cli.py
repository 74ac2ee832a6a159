"""The ``pyrovae`` command: its help and lists, what it prints and writes, and its refusals."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call, refusal
from matplotlib.figure import Figure

import pyrovae
from pyrovae import plots
from pyrovae.cli.main import main
from pyrovae.cli.names import find_pair, parse_options
from pyrovae.data import load_file, names
from pyrovae.evaluation import ALSO, decode, latents, reconstruct
from pyrovae.infer import LOSSES
from pyrovae.models import REGISTRY

COMMANDS = ("list", "fit", "evaluate", "report", "sample", "compare", "bench", "new")
SMALL = ["--set", "latent_dim=2", "--set", "hidden_dims=8", "--epochs", "3", "--num-samples", "20"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def table(folder):
    """A user's CSV, 40 rows of two named columns."""
    rows = np.random.default_rng(0).normal(size=(40, 2)) * [1, 10] + [5, 50]
    np.savetxt("my.csv", rows, delimiter=",", header="height,weight", comments="")
    return Path("my.csv")


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A finished run on digits with a two-dimensional latent."""
    run = tmp_path_factory.mktemp("cli") / "digits"
    assert call("fit", "vae", *SMALL, "--out", run) == 0
    return run


# Help and lists


def test_help_names_every_command(capsys):
    assert call("--help") == 0
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"^  {command} +\w.*\.$", shown, re.M), command  # with a whole sentence


def test_every_command_has_help_with_a_line_for_each_option(capsys):
    for command in COMMANDS:
        assert call(command, "--help") == 0
        shown = capsys.readouterr().out
        for option in re.findall(r"^ +(?:-\w, )?(--[\w-]+)(.*)$", shown, re.M):
            assert re.search(rf"{option[0]}\b[^\n]*(\n {{20,}})?[^\n]*\w{{2,}}", shown), (command, option)


def test_no_arguments_show_help(capsys):
    assert call() in (0, 2)  # typer's own convention differs between versions
    said = capsys.readouterr()
    assert "Commands:" in said.out + said.err


def test_help_says_which_folder_resume_takes(capsys):
    for command, expected in (("fit", "RUN"), ("compare", "FOLDER")):
        assert call(command, "--help") == 0
        assert re.search(rf"--resume {expected} ", capsys.readouterr().out)


def test_version(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out.strip() == pyrovae.__version__


def test_list_names_every_pair_data_set_and_loss(capsys):
    assert call("list") == 0
    shown = capsys.readouterr().out
    pairs, rest = shown.split("Data sets")
    data, losses = rest.split("Losses")
    for section, expected in ((pairs, REGISTRY), (data, names()), (losses, LOSSES)):
        for name in expected:
            assert re.search(rf"^  {name} +\S.*", section, re.M), name
    for pair in REGISTRY.values():
        for option in set(pair.__init__.__annotations__) - {"data_dim", "return"}:
            assert f"{option}=" in pairs
    assert "``" not in shown
    assert "required" not in shown


def test_every_command_is_tested():
    text = "".join(file.read_text() for file in Path(__file__).parents[1].rglob("test_*.py"))
    shown = subprocess.run([sys.executable, "-m", "pyrovae", "--help"], capture_output=True, text=True, check=True)
    commands = re.findall(r"^  (\w+) ", shown.stdout.split("Commands:")[1], re.M)
    assert set(commands) == set(COMMANDS)
    for command in commands:
        assert f'call("{command}"' in text or f'"pyrovae", "{command}"' in text


# Refusals

COMMAS = r"--set: hidden_dims: expected whole numbers with commas, as in 200,200; got "
TABLE = {
    "pair": (["fit", "vea"], r"PAIR: expected one of gmm.*got 'vea'. Did you mean 'vae'"),
    "no pair": (["fit"], r"PAIR: expected a name.*--resume RUN; got none"),
    "data": (["fit", "vae", "--data", "digit"], r"--data: .*got 'digit'. Did you mean 'digits'"),
    "no data": (["fit", "vae", "--data", "nope"], r"--data: .*got 'nope'.*A \.csv or \.npy file of rows will do too"),
    "data file type": (["fit", "vae", "--data", "my.txt"], r"--data: .*got 'my.txt'.*A \.csv or \.npy file of rows"),
    "data file missing": (["fit", "vae", "--data", "no.csv"], r"--data: .*none at no.csv"),
    "loss": (["fit", "vae", "--loss", "Trace_ELB"], r"--loss: .*got 'Trace_ELB'. Did you mean 'Trace_ELBO'"),
    "loss option without loss": (["fit", "vae", "--alpha", "0"], r"--alpha: .*--loss"),
    "loss option of another": (["fit", "vae", "--loss", "Trace_ELBO", "--alpha", "0"], r"--alpha: Trace_ELBO has no"),
    "option": (["fit", "vae", "--set", "latentdim=2"], r"--set: .*got 'latentdim'. Did you mean 'latent_dim'"),
    "option without value": (["fit", "vae", "--set", "latent_dim"], r"--set: expected NAME=VALUE; got 'latent_dim'"),
    "option value": (["fit", "vae", "--set", "latent_dim=0"], r"latent_dim: expected a whole number, 1 or more; got 0"),
    "option word": (["fit", "vae", "--set", "likelihood=norml"], r"likelihood: .*Did you mean 'normal'"),
    "data_dim": (["fit", "vae", "--set", "data_dim=3"], r"--set: expected one of latent_dim"),
    "binarize": (["fit", "vae", "--binarize", "yes"], r"--binarize: expected one of auto, dynamic, static, none"),
    "static on a table": (["fit", "vae", "-d", "iris", "--binarize", "static"], r"binarize: .*'iris' holds no images"),
    "no class": (["fit", "my.py"], r"PAIR: which class of my.py\? Write my.py:ClassName"),
    "no file": (["fit", "my.py:My"], r"PAIR: expected a Python file; found none at my.py"),
    "run": (["evaluate", "nothing"], r"RUN: .*nothing has no config.json"),
    "run to sample": (["sample", "nothing"], r"RUN: .*nothing has no config.json"),
    "run to resume": (["fit", "--resume", "nothing"], r"--resume: .*nothing has no config.json"),
    "samples": (["evaluate", "nothing", "--num-samples", "0"], r"--num-samples: expected a whole number.*got 0"),
    "number of draws": (["sample", "nothing", "-n", "0"], r"--num: expected a whole number, 1 or more; got 0"),
    "sample file": (["sample", "nothing", "-o", "x.pdf"], r"--out: expected a .csv, .npy or .png file; got x.pdf"),
    "sample folder": (["sample", "nothing", "-o", "no/x.csv"], r"--out: expected a folder that exists; .*none at no"),
    "evaluate also": (["evaluate", "nothing", "--also", "colapse"], r"--also: .*'colapse'. Did you mean 'collapse'"),
    "report nothing": (["report"], r"RUN: expected the folder of a run, or --compare .*; got neither"),
    "report no run": (["report", "nothing"], r"RUN: expected a folder that `pyrovae fit` wrote; nothing has no"),
    "report no comparison": (["report", "--compare", "no"], r"--compare: expected .*`pyrovae compare` wrote; no has"),
    "report also": (["report", "no", "--also", "gaps"], r"--also: .*got 'gaps'. Did you mean .*'inference_gaps'"),
    "report rows": (["report", "no", "--num-data", "0"], r"--num-data: expected a whole number, 1 or more; got 0"),
    "report samples": (["report", "no", "--num-samples", "0"], r"--num-samples: expected a whole number.*got 0"),
    "report file": (["report", "no", "-o", "x.pdf"], r"--out: expected an .html file; got x.pdf"),
    "report folder": (["report", "no", "-o", "none/x.html"], r"--out: expected a folder that exists; found none"),
    "compare pair": (["compare", "gm"], r"PAIR: .*Did you mean 'gmm'"),
    "compare epochs": (["compare", "gmm", "--epochs", "0"], r"--epochs: expected a whole number, 1 or more; got 0"),
    "compare device": (["compare", "gmm", "--device", "gpu"], r"--device: expected 'auto', 'cpu' or 'cuda'; got 'gpu'"),
    "new": (["new", "my-pair.py"], r"FILE: expected a Python file such as mypair.py; got my-pair.py"),
    "new in no folder": (["new", "nodir/my.py"], r"FILE: expected a folder that exists; found none at nodir"),
    "own loss's option": (["fit", "iwae", "--num-particles", "50"], r"--num-particles: .*--set num_particles=50"),
    "negative seed": (["fit", "vae", "--seed", "-1"], r"--seed: expected a whole number from 0 to .*; got -1"),
    "large seed": (["sample", "no", "--seed", str(2**63)], r"--seed: expected .*; got 9223372036854775808"),
    "command": (["nosuch"], r"No such command 'nosuch'"),
    "number": (["fit", "vae", "--epochs", "many"], r"'--epochs'"),
    "numbers with commas": (["fit", "vae", "--set", "hidden_dims=200,x"], COMMAS + "'200,x'"),
    "nested numbers": (["fit", "iwae", "--set", "hidden_dims=(200,x)"], COMMAS + r"'\(200,x\)'"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_mistakes_are_answered_and_nothing_is_written(capsys, folder, name):
    arguments, match = TABLE[name]
    message = refusal(capsys, *arguments)
    assert re.search(match, message, re.S), message
    assert list(folder.iterdir()) == []


def test_a_mistake_in_the_shell():
    done = subprocess.run([sys.executable, "-m", "pyrovae", "fit", "vea"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("pyrovae: PAIR:")
    assert done.stderr.count("\n") == 1


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("PYROVAE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="PAIR"):
        main(["fit", "vea"])


# --set


@pytest.mark.parametrize(
    ("pair", "text", "value"),
    [
        ("vae", "latent_dim=2", 2),
        ("vae", "latent-dim=2", 2),
        ("vae", "likelihood=normal", "normal"),
        ("vae", "likelihood=continuous-bernoulli", "continuous-bernoulli"),
        ("vae", "likelihood='normal'", "normal"),
        ("vae", "hidden_dims=200,100", (200, 100)),
        ("vae", "hidden_dims=(200, 100)", (200, 100)),
        ("vae", "hidden_dims=[200]", [200]),
        ("vae", "hidden_dims=200", (200,)),
        ("vae", "hidden_dims=()", ()),
        ("gmm", "amortized=true", True),
        ("gmm", "amortized=False", False),
        ("iwae", "latent_dims=50", (50,)),
        ("iwae", "latent_dims=50,20", (50, 20)),
        ("iwae", "hidden_dims=100", ((100,),)),
        ("iwae", "hidden_dims=100,50", ((100, 50),)),
        ("iwae", "hidden_dims=((100, 50), (20, 20))", ((100, 50), (20, 20))),
        ("iwae", "hidden_dims=(100, 50), (20,)", ((100, 50), (20,))),
        ("vae", "likelihood=a=b", "a=b"),
    ],
)
def test_set_reads_values_as_the_constructor_takes_them(pair, text, value):
    assert list(parse_options(find_pair(pair), [text]).values()) == [value]


def test_set_leaves_sequences_of_words_alone():
    class Own(pyrovae.Pair):
        def __init__(self, data_dim, names=("a", "b"), anything=(), numbers=(0.5, 1)):
            super().__init__()

    for text, value in (("names=c", "c"), ("anything=c", "c"), ("numbers=c", "c")):
        assert list(parse_options(Own, [text]).values()) == [(value,)]


def test_the_last_set_wins():
    assert parse_options(find_pair("vae"), ["latent_dim=2", "latent_dim=3"]) == {"latent_dim": 3}


# A learner on digits


def test_fit_prints_what_it_does(capsys, folder, table):
    options = ["fit", "vae", *SMALL, "--data", "my.csv", "--set", "likelihood=normal"]
    assert call(*options) == 0
    shown = capsys.readouterr().out
    run = Path("runs/vae-my")
    assert "40 rows of 2 features" in shown
    assert re.search(r"vae: [\d,]+ parameters, on (cpu|cuda)", shown)
    assert "log evidence" in shown
    assert f"Writing to {run}" in shown
    files = "config.json, weights.safetensors, checkpoint.safetensors, history.csv, scores.json and pictures"
    assert f"In {run}: {files}\n" in shown
    for picture in (run / "pictures").iterdir():
        assert str(picture) in shown
    assert str(folder) not in shown

    assert call(*options) == 0
    assert Path("runs/vae-my-2").is_dir()


def test_pictures_of_images_with_a_plane_of_latents(digits_run):
    drawn = {file.stem for file in (digits_run / "pictures").iterdir()}
    assert drawn == {"training", "samples", "reconstructions", "latents", "manifold"}
    for file in (digits_run / "pictures").iterdir():
        assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_digits_are_binarised_anew_unless_told_otherwise(capsys, digits_run):
    assert json.loads((digits_run / "config.json").read_text())["binarize"] == "dynamic"
    grey = ["--set", "likelihood=continuous-bernoulli"]
    for name, options, expected in (("grey", grey, "none"), ("static", ["--binarize", "static"], "static")):
        assert call("fit", "vae", *SMALL, *options, "--epochs", "1", "-o", name) == 0
        assert json.loads(Path(name, "config.json").read_text())["binarize"] == expected
        assert call("evaluate", name) == 0


def test_evaluate_gives_the_numbers_of_fit(capsys, digits_run):
    run = Path(shutil.copytree(digits_run, "run"))
    before = json.loads((run / "scores.json").read_text())
    assert call("evaluate", run) == 0
    after = json.loads((run / "scores.json").read_text())
    before.pop("evaluation_seconds"), after.pop("evaluation_seconds")
    assert after == before
    assert f"{after['log_evidence']:.3f}" in capsys.readouterr().out
    assert call("evaluate", run, "--num-samples", 7) == 0
    assert json.loads((run / "scores.json").read_text())["num_samples"] == 7


def test_evaluate_measures_more_on_demand(capsys, digits_run):
    run = Path(shutil.copytree(digits_run, "run"))
    assert call("evaluate", run, "--also", "collapse", "--also", "mixture_scores") == 0
    shown = capsys.readouterr().out
    assert re.search(r"^Collapse: 360 data", shown, re.M)
    assert re.search(r"^LEFT OUT, Mixture scores: mixture_scores does not apply to VAE", shown, re.M)
    scores = json.loads((run / "scores.json").read_text())
    assert list(scores["also"]) == ["collapse"]
    assert list(scores["also"]["collapse"]["latents"]) == ["z"]
    assert list(scores["left_out"]) == ["mixture_scores"]
    assert scores["training_seconds"] > 0
    assert call("evaluate", run) == 0  # the weights are the same: what was measured before stays
    assert json.loads((run / "scores.json").read_text())["also"] == scores["also"]
    capsys.readouterr()
    assert call("fit", "--resume", run) == 0
    assert "The run was finished already" in capsys.readouterr().out
    assert json.loads((run / "scores.json").read_text())["also"] == scores["also"]


@pytest.mark.parametrize(
    ("command", "default"), [("evaluate", []), ("report", [name for name in ALSO if "evidence" not in name])]
)
def test_also_and_all_choose_the_measurements(monkeypatch, digits_run, command, default):
    asked = []

    def keep(pair, x, *, also, **options):
        asked.append(list(also))
        raise ValueError("enough")

    monkeypatch.setattr("pyrovae.cli.runs.evaluate", keep)
    monkeypatch.setattr("pyrovae.cli.report.evaluate", keep)
    for options in ([], ["--all"], ["--also", "collapse"], ["--also", "collapse", "--all"]):
        assert call(command, digits_run, "--num-samples", 2, *options) == 2
    assert asked == [default, list(ALSO), ["collapse"], list(ALSO)]


def test_help_names_all_that_can_be_measured(capsys):
    for command in ("evaluate", "report"):
        assert call(command, "--help") == 0
        shown = "".join(capsys.readouterr().out.split())
        assert all(name in shown for name in ALSO)


def test_report_writes_one_html_file(capsys, digits_run):
    few = ["--num-data", 20, "--num-samples", 30, "--also", "collapse"]
    assert call("report", digits_run, *few, "-o", "page.html") == 0
    assert capsys.readouterr().out == "Wrote page.html\n"
    page = Path("page.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert page.count("<img ") >= 6
    assert "Wrote" not in refusal(capsys, "report", digits_run, *few, "-o", "page.html")
    Path("folder.html").mkdir()
    message = refusal(capsys, "report", digits_run, "-o", "folder.html", "--overwrite")
    assert "--out: expected an .html file; folder.html is a folder" in message


def test_sample_writes_each_format(capsys, digits_run):
    assert call("sample", digits_run, "-n", 3) == 0
    header, *rows = csv.reader(capsys.readouterr().out.splitlines())
    assert len(header) == 64
    printed = torch.tensor([[float(cell) for cell in row] for row in rows])
    assert printed.shape == (3, 64)
    assert set(printed.unique().tolist()) <= {0.0, 1.0}

    for name in ("x.csv", "x.npy"):
        assert call("sample", digits_run, "-n", 3, "-o", name) == 0
        assert torch.equal(load_file(name).train, printed)  # the same seed, and written so that it is read back
    assert load_file("x.csv").feature_names[1] == "pixel (0, 1)"

    assert call("sample", digits_run, "-n", 3, "--seed", 1, "-o", "y.npy") == 0
    assert not np.array_equal(np.load("x.npy"), np.load("y.npy"))
    assert call("sample", digits_run, "-n", 3, "--mean", "-o", "mean.csv") == 0
    means = load_file("mean.csv").train
    assert bool(((means > 0) & (means < 1)).all())
    assert call("sample", digits_run, "-o", "x.png") == 0
    assert Path("x.png").read_bytes()[:4] == b"\x89PNG"


def test_sample_does_not_replace_a_file_unasked(capsys, digits_run):
    Path("x.csv").write_text("mine")
    assert re.search(r"--out: x.csv exists. Pass --overwrite", refusal(capsys, "sample", digits_run, "-o", "x.csv"))
    assert Path("x.csv").read_text() == "mine"
    assert call("sample", digits_run, "-o", "x.csv", "--overwrite") == 0


# Someone with an own table


def test_fit_and_sample_an_own_csv(capsys, table):
    assert call("fit", "gmm", "--data", table, "--epochs", 2, "-o", "run") == 0
    assert {file.stem for file in Path("run/pictures").iterdir()} == {"training", "samples", "density"}
    scores = json.loads(Path("run/scores.json").read_text())
    assert scores["rows"] == "train"
    assert scores["log_evidence"] == pytest.approx(scores["log_likelihood"], rel=1e-5)
    capsys.readouterr()
    assert call("sample", "run", "-n", 2) == 0
    assert capsys.readouterr().out.startswith("height,weight\n")
    assert call("sample", "run", "-o", "x.png") == 0


def test_fit_an_own_npy(folder):
    np.save("my.npy", np.random.default_rng(0).normal(size=(40, 1)))
    assert call("fit", "vae", *SMALL, "--set", "likelihood=normal", "--data", "my.npy", "-o", "run") == 0


def test_rows_of_the_training_data_are_named_as_such(capsys, table):
    for options, match in (([], r"\(train rows, held-out ones among them\)"), (["--validation", 0], r"\(train rows\)")):
        assert call("fit", "gmm", "--data", table, "--epochs", 1, *options) == 0
        assert re.search(match, capsys.readouterr().out)


@pytest.fixture
def labels_and_points(monkeypatch):
    """The axes of every figure that is written: labels, and the points of the last scatter."""
    seen = {}
    save = Figure.savefig

    def keep(self, file, **options):
        axes = self.axes[0]
        offsets = [torch.as_tensor(np.asarray(c.get_offsets())) for c in axes.collections]
        seen[Path(file).stem] = (axes.get_xlabel(), axes.get_ylabel(), offsets)
        save(self, file, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return seen


def test_a_picture_of_samples_shows_the_very_rows(labels_and_points, table):
    assert call("fit", "ppca", "--data", table, "--set", "latent_dim=1", "--epochs", 2, "-o", "run") == 0
    assert labels_and_points["samples"][:2] == labels_and_points["density"][:2] == ("height", "weight")
    for options in ([], ["--mean"]):
        assert call("sample", "run", "-n", 7, *options, "-o", "x.csv", "--overwrite") == 0
        assert call("sample", "run", "-n", 7, *options, "-o", "x.png", "--overwrite") == 0
        xlabel, ylabel, (_, drawn) = labels_and_points["x"]
        assert (xlabel, ylabel) == ("height", "weight")
        torch.testing.assert_close(drawn.float(), load_file("x.csv").train)


def test_pictures_encode_the_pixels_that_are_scored(monkeypatch):
    seen = {}
    for name in ("plot_reconstructions", "plot_latents"):
        draw = getattr(plots, name)

        def keep(pair, x, *args, name=name, draw=draw, **options):
            seen[name] = x
            return draw(pair, x, *args, **options)

        monkeypatch.setattr(plots, name, keep)
    for run in ("one", "two"):
        assert call("fit", "vae", *SMALL, "--epochs", 1, "-o", run) == 0
        assert all(set(x.unique().tolist()) == {0.0, 1.0} for x in seen.values())
        assert torch.equal(seen["plot_latents"], first := seen.setdefault("first", seen["plot_latents"]))
    assert len(first) == 360


def test_a_picture_that_fails_is_a_line(capsys, monkeypatch, table):
    def fail(*args, **options):
        raise RuntimeError("no ink")

    for name in ("plot_samples", "plot_density", "plot_responsibilities"):
        monkeypatch.setattr(plots, name, fail)
    assert call("fit", "gmm", "--data", table, "--epochs", 2, "-o", "run") == 0
    said = capsys.readouterr()
    assert said.out.index("log evidence") < said.out.index("run/pictures/training.png")
    assert "pictures: could not draw samples (no ink)\npictures: could not draw density (no ink)\n" in said.err
    assert {file.name for file in Path("run/pictures").iterdir()} == {"training.png"}
    assert Path("run/scores.json").is_file()
    assert call("compare", "gmm", "--data", table, "--epochs", 2, "-o", "out") == 0
    said = capsys.readouterr()
    assert "log evidence" in said.out
    assert "pictures: could not draw responsibilities (no ink)" in said.err


GLOBAL = """
import pyro, torch
import pyro.distributions as dist
from pyrovae import Pair

class GlobalMean(Pair):
    local = False

    def __init__(self, data_dim):
        super().__init__()
        self.data_dim = data_dim
        self.loc = torch.nn.Parameter(torch.zeros(data_dim))

    def model(self, x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros_like(x[0]), 10.0).to_event(1))
        with pyro.plate("data", len(x)):
            if self.local:
                mu = mu + pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)

    def guide(self, x):
        mu = pyro.sample("mu", dist.Normal(self.loc, 0.1).to_event(1))
        with pyro.plate("data", len(x)):
            if self.local:
                pyro.sample("z", dist.Normal((x - mu) / 2, 0.7).to_event(1))

class GlobalAndLocal(GlobalMean):
    local = True
"""


@pytest.mark.parametrize(
    ("name", "data"), [(n, d) for n in ("GlobalMean", "GlobalAndLocal") for d in ("iris", "my.csv")]
)
def test_a_pair_with_a_global_latent(capsys, table, name, data):
    Path("own.py").write_text(GLOBAL)
    assert call("fit", f"own.py:{name}", "--data", data, "--epochs", 2, "--num-samples", 10, "-o", "run") == 0
    assert "could not draw" not in capsys.readouterr().err
    pictures = {file.stem for file in Path("run/pictures").iterdir()}
    local = {"reconstructions"} | ({"latents"} if data == "my.csv" else set())
    assert pictures == {"training", "samples"} | (local if name == "GlobalAndLocal" else set())
    assert call("sample", "run", "-n", 3) == 0


def test_decode_with_a_global_latent(folder):
    Path("own.py").write_text(GLOBAL)
    x = torch.randn(5, 3)
    both, one = find_pair("own.py:GlobalAndLocal")(3), find_pair("own.py:GlobalMean")(3)
    z = latents(both, x, seed=0)
    assert {name: tuple(value.shape) for name, value in z.items()} == {"mu": (3,), "z": (5, 3)}
    torch.testing.assert_close(decode(both, z), z["mu"] + z["z"])
    torch.testing.assert_close(reconstruct(both, x, seed=0), z["mu"] + z["z"])
    mu = latents(one, x, seed=0)["mu"]
    torch.testing.assert_close(reconstruct(one, x, seed=0), mu.expand(5, 3))
    torch.testing.assert_close(decode(one, {"mu": mu}), mu.expand(1, 3))
    with pytest.raises(ValueError, match="no datum has a density of its own"):
        plots.plot_density(find_pair("own.py:GlobalMean")(2), x[:, :2])


CSV = {
    "a word": ("a,b\n1,2\n3,x\n", r"line 3, column 2 'b': expected a number, got 'x'; leave the column out"),
    "a hole": ("a,b\n1,2\n3,\n", r"line 3, column 2 'b': expected a number, got ''; remove the row, or fill the cell"),
    "a row of holes": ("a,b\n1,2\n,\n3,4\n", r"line 3, column 1 'a': expected a number, got ''; remove the row"),
    "a first row of holes": (",\n1,2\n", r"line 1, column 1: expected a number, got ''"),
    "latin-1": ("Größe,b\n1,2\n", r"its encoding is not UTF-8: save it as UTF-8"),
    "infinite": ("1,2\n3,inf\n", r"line 2, column 2: expected a number, got 'inf'"),
    "semicolons": ("a;b\n1;2\n", r"got '1;2'; separate columns by commas"),
    "ragged": ("1,2\n3,4,5\n", r"line 2: expected 2 columns, got 3"),
    "names": ("a,b,c\n1,2\n", r"line 2: expected 3 columns, got 2"),
    "row numbers": (",a,b\n0,1,2\n", r"first column has no name and looks like row numbers"),
    "empty": ("", r"it has no rows"),
    "only names": ("a,b\n", r"it has no rows"),
    "NaN": ("a,b\n1,2\n3,nan\n", r"line 3, column 2 'b': expected a number, got 'nan'; remove the row"),
    "too large": ("a,b\n1,1e300\n", r"finite numbers.*inf"),
    "bytes": ("a,b\n\xff\x00,1\n", r"not a table of numbers"),
}


@pytest.mark.parametrize("name", CSV)
def test_bad_csv(capsys, folder, name):
    text, match = CSV[name]
    Path("my.csv").write_text(text, encoding="latin-1")
    message = refusal(capsys, "fit", "gmm", "--data", "my.csv")
    assert message.startswith("pyrovae: --data: ")
    assert re.search(match, message), message
    assert [file.name for file in folder.iterdir()] == ["my.csv"]


NPY = {
    "rank 1": (np.zeros(5), r"\(N, D\).*\(5,\)"),
    "rank 3": (np.zeros((5, 2, 2)), r"\(N, D\).*\(5, 2, 2\)"),
    "no rows": (np.zeros((0, 2)), r"at least one datum.*\(0, 2\)"),
    "infinite": (np.full((5, 2), np.inf), r"finite"),
    "complex": (np.ones((5, 2)) * 1j, r"real numbers; got complex128"),
    "words": (np.array([["a", "b"]]), r"real numbers; got <U1"),
    "objects": (np.array([[1, "a"]], dtype=object), r"not a table of numbers \(it is no .npy file of plain numbers"),
}


@pytest.mark.parametrize("name", NPY)
def test_bad_npy(capsys, folder, name):
    rows, match = NPY[name]
    np.save("my.npy", rows)
    message = refusal(capsys, "fit", "gmm", "--data", "my.npy")
    assert message.startswith("pyrovae: --data: ")
    assert re.search(match, message), message
    assert "pickle" not in message


def test_an_npy_file_that_is_none(capsys, folder):
    Path("my.npy").write_bytes(b"\x80\x04K\x01.")  # a pickle
    message = refusal(capsys, "fit", "gmm", "--data", "my.npy")
    assert "data: my.npy is not a table of numbers" in message
    assert "pickle" not in message


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("1,2\n3,4\n", ("feature 1", "feature 2")),
        ("a,b\n1,2\n3,4\n", ("a", "b")),
        ('\ufeff"a, in m", b \r\n1,2\r\n\r\n 3 ,4.0\r\n\r\n', ("a, in m", "b")),
    ],
)
def test_good_csv(folder, text, names):
    Path("my.CSV").write_text(text, encoding="utf-8")
    data = load_file("my.CSV")
    assert data.train.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert data.feature_names == names


# Someone with an own pair


def test_new_writes_a_pair_that_trains(capsys, folder):
    assert call("new", "mypair.py") == 0
    assert "pyrovae fit mypair.py:MyPair --data digits" in capsys.readouterr().out
    assert call("fit", "mypair.py:MyPair", "--data", "digits", "--epochs", 2, "--num-samples", 10) == 0
    assert Path("runs/mypair-digits/scores.json").is_file()
    options = ["--set", "latent_dim=2", "--set", "hidden_dim=5", "--epochs", 1, "--num-samples", 10]
    assert call("fit", "mypair.py:MyPair", *options, "-o", "two") == 0
    assert Path("two/pictures/manifold.png").is_file()


def test_the_new_pair_trains_under_stock_svi(folder):
    import pyro

    assert call("new", "mypair.py") == 0
    pair = find_pair("mypair.py:MyPair")(data_dim=6)
    x = torch.bernoulli(torch.full((50, 6), 0.9))
    svi = pyro.infer.SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.02}), pyro.infer.Trace_ELBO())
    losses = [svi.step(x) for _ in range(200)]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    assert pyrovae.log_weights(pair.model, pair.guide, x, num_particles=3).shape == (3, 50)


def test_new_replaces_nothing(capsys, folder):
    Path("mypair.py").write_text("mine")
    assert "FILE: mypair.py exists. Choose another name." in refusal(capsys, "new", "mypair.py")
    assert Path("mypair.py").read_text() == "mine"


HEAD = """import pyro, torch
import pyro.distributions as dist
from pyrovae import Pair
class My(Pair):
    def __init__(self, data_dim{}):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(data_dim))
    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            {}
    def guide(self, x):
        with pyro.plate("data", len(x)):
            {}
"""
GOOD = (
    "",
    'pyro.sample("x", dist.Normal(self.loc, 1.0).to_event(1), obs=x)',
    'pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(1))',
)
SHAPE = GOOD[1].replace("self.loc", "z @ x.new_zeros(5, 2)")
OWN = {
    "syntax": ("class My(:\n", 2, r"PAIR: my.py cannot be imported. SyntaxError"),
    "import": ("import nothing_of_this_name\n", 2, r"cannot be imported. ModuleNotFoundError.*my.py, line 1\)"),
    "no pair": ("class My: pass\n", 2, r"PAIR: my.py defines no subclass of pyrovae.Pair"),
    "other name": (HEAD.format(*GOOD).replace("My", "Mine"), 2, r"PAIR: expected one of Mine; got 'My'"),
    "required option": (HEAD.format(", width", *GOOD[1:]), 2, r"--set: My has no default for width. Add width="),
    "missed site": (HEAD.format(*GOOD[:2], "pass"), 2, r"the model samples site 'z' and the guide does not"),
    "name": (HEAD.format("", "nothing", GOOD[2]), 1, r"NameError: name 'nothing' is not defined \(.*my.py, line 11\)"),
    "shape": (HEAD.format("", SHAPE, GOOD[2]), 1, r"RuntimeError: .*shapes cannot be multiplied.*my.py, line 11\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_mistakes_in_an_own_file_are_explained(capsys, folder, table, name):
    text, code, match = OWN[name]
    Path("my.py").write_text(text)
    assert call("fit", "my.py:My", "--data", table, "-o", "run") == code
    message = capsys.readouterr().err
    assert re.search(match, message, re.S), message
    assert "Traceback" not in message
    assert not Path("run").exists()


# The real thing


def test_the_installed_command(folder):
    command = Path(sys.executable).with_name("pyrovae")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = ["fit", "ppca", "--epochs", "2", "--num-samples", "10"]
    done = subprocess.run([command, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert Path("runs/ppca-iris/weights.safetensors").is_file()
    listing = f"{command} sample runs/ppca-iris -n 20000 | head -n 1"
    piped = subprocess.run(["sh", "-c", listing], capture_output=True, text=True, env=environment)
    assert piped.stdout.count(",") == 3
    assert piped.stderr == ""
