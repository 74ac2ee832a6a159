"""Run folders: what a run writes, what can be rebuilt and resumed from it, and what is refused and left alone."""

from __future__ import annotations

import csv
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call
from safetensors.torch import load_file, save_file

import pyrovae
from pyrovae.cli.names import build_pair
from pyrovae.cli.runs import RunFolder
from pyrovae.evaluation import evaluate

SMALL = ["--set", "latent_dim=2", "--set", "hidden_dims=8", "--set", "likelihood=normal", "--num-samples", "20"]


def fit(*arguments):
    return call("fit", "vae", *SMALL, "--data", "my.csv", *arguments)


def tree(path):
    """Every file below ``path`` with its bytes."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(Path(path).rglob("*")) if file.is_file()}


def history(run):
    with Path(run, "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def assert_same_end(first, second):
    """Two runs ended with the same weights, bit for bit, the same history and the same scores."""
    one, two = load_file(Path(first, "weights.safetensors")), load_file(Path(second, "weights.safetensors"))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
    assert without_seconds(history(first)) == without_seconds(history(second))
    scores = [json.loads(Path(run, "scores.json").read_text()) for run in (first, second)]
    assert scores[0]["log_evidence"] == scores[1]["log_evidence"]


def write_rows(path, seed=0):
    rows = np.random.default_rng(seed).normal(size=(60, 3)) * [1, 2, 3] + [5, 0, -5]
    np.savetxt(path, rows, delimiter=",", header="a,b,c", comments="")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows("my.csv")
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run on a user's table and one of a user's pair, with the files they were made from."""
    home = tmp_path_factory.mktemp("finished")
    write_rows(home / "my.csv")
    back = Path.cwd()
    os.chdir(home)
    try:
        assert fit("--epochs", "4", "--out", "run") == 0
        assert call("new", "mypair.py") == 0
        own = ["--data", "digits", "--epochs", "1", "--num-samples", "5", "--set", "hidden_dim=4", "--out", "own"]
        assert call("fit", "mypair.py:MyPair", *own) == 0
    finally:
        os.chdir(back)
    return home


@pytest.fixture
def run(finished, folder):
    """A copy of the finished run, for the test to damage."""
    return Path(shutil.copytree(finished / "run", folder / "run"))


@pytest.fixture
def own_run(finished, folder):
    """A copy of the run of a user's pair, whose file is copied too."""
    shutil.copy(finished / "mypair.py", folder)
    run = Path(shutil.copytree(finished / "own", folder / "own"))
    edit_config(run, pair=f"{folder / 'mypair.py'}:MyPair")
    return run


def edit_config(run, **changes):
    file = run / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def interrupt(monkeypatch):
    """Return a function: ``interrupt(n)`` raises Ctrl-C, or another exception, at the n-th training step from now."""
    step = pyrovae.infer.SVI.step

    def arm(at, error=KeyboardInterrupt):
        taken = 0

        def interrupted(self, *args, **kwargs):
            nonlocal taken
            taken += 1
            if taken == at:
                raise error
            return step(self, *args, **kwargs)

        monkeypatch.setattr(pyrovae.infer.SVI, "step", interrupted)

    yield arm
    monkeypatch.setattr(pyrovae.infer.SVI, "step", step)


# What a run writes


def test_a_run_writes_its_files(finished):
    run = finished / "run"
    assert {file.name for file in run.iterdir()} == {
        "config.json",
        "weights.safetensors",
        "checkpoint.safetensors",
        "history.csv",
        "scores.json",
        "pictures",
    }
    rows = history(run)
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert all(math.isfinite(float(value)) for value in row.values())
    assert {"train_bound", "validation_bound", "lr", "step", "seconds"} < set(rows[0])
    scores = json.loads((run / "scores.json").read_text())
    assert scores["num_data"] == 60
    for name in ("log_evidence", "log_evidence_stderr", "elbo", "reconstruction", "kl", "training_seconds"):
        assert math.isfinite(scores[name])
    assert scores["kl"] == pytest.approx(scores["reconstruction"] - scores["elbo"], abs=1e-4)
    pictures = {"training.png", "samples.png", "reconstructions.png", "latents.png"}
    assert {file.name for file in (run / "pictures").iterdir()} == pictures


def test_the_folder_is_enough_to_rebuild(finished, folder):
    """Pair, weights, data and scores come back from another working folder too."""
    config, pair, data = RunFolder(finished / "run").load()
    scores = evaluate(pair, data.train, num_samples=config.num_samples, seed=config.seed)
    written = json.loads((finished / "run" / "scores.json").read_text())
    assert {name: written[name] for name in scores.to_dict()} == scores.to_dict()
    for name, value in load_file(finished / "run" / "weights.safetensors").items():
        assert torch.equal(pair.state_dict()[name], value)


def test_load_run_opens_a_run_from_python(finished, folder):
    config, pair, data = pyrovae.load_run(str(finished / "run"))
    same = RunFolder(finished / "run").load()
    assert (config, data.name) == (same[0], same[2].name)
    for name, value in same[1].state_dict().items():
        assert torch.equal(pair.state_dict()[name], value)
    with pytest.raises(FileNotFoundError, match=r"^path: expected a folder that .* wrote; .* has no config\.json"):
        pyrovae.load_run(folder)


def test_evaluate_keeps_the_seconds_of_training(run):
    before = json.loads((run / "scores.json").read_text())["training_seconds"]
    assert call("evaluate", run) == 0
    assert json.loads((run / "scores.json").read_text())["training_seconds"] == before


def test_the_same_seed_gives_the_same_run_and_another_does_not(run):
    assert fit("--epochs", 4, "-o", "again") == 0
    assert_same_end("run", "again")
    assert fit("--epochs", 4, "--seed", 1, "-o", "other") == 0
    assert history("run")[0]["train_bound"] != history("other")[0]["train_bound"]

    config, trained, data = RunFolder("other").load()  # the configuration is enough to train it again, in Python
    pair = build_pair(pyrovae.models.VAE, config.options, data.data_dim, config.seed)
    pyrovae.fit(pair, data.train, **config.fit, seed=config.seed)
    for name, value in trained.state_dict().items():
        assert torch.equal(pair.state_dict()[name], value), name


# Ctrl-C, kill and --resume


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--validation", "0"],
        ["--validation", "0.25", "--patience", "2", "--lr", "0.05"],
        ["--loss", "RenyiELBO", "--alpha", "0.5", "--num-particles", "3", "--schedule", "burda"],
    ],
    ids=" ".join,
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(capsys, interrupt, options):
    options = ["--epochs", 9, "--batch-size", 16, *options]
    assert fit(*options, "-o", "whole") == 0
    interrupt(8)  # in the middle of an epoch
    assert fit(*options, "-o", "stopped") == 130
    assert "Go on with: pyrovae fit --resume stopped" in capsys.readouterr().err
    assert call("evaluate", "stopped") == 0
    assert call("sample", "stopped", "-n", 2) == 0
    interrupt(None)
    assert call("fit", "--resume", "stopped") == 0
    assert_same_end("whole", "stopped")


def test_pixels_drawn_anew_go_on_as_they_would_have(interrupt):
    options = ["fit", "vae", "--set", "hidden_dims=4", "--epochs", 2, "--num-samples", 2]
    assert call(*options, "-o", "whole") == 0
    interrupt(15)
    assert call(*options, "-o", "stopped") == 130
    interrupt(None)
    assert call("fit", "--resume", "stopped") == 0
    assert_same_end("whole", "stopped")


def test_a_stopped_run_says_where_it_stands(capsys, interrupt):
    """60 rows less 6 held out, 16 a step: 4 steps an epoch."""
    interrupt(4 * 3 + 2)
    assert fit("--epochs", 9, "--batch-size", 16, "-o", "run") == 130
    assert capsys.readouterr().err.strip() == "Stopped after epoch 3 of 9. Go on with: pyrovae fit --resume run"
    assert [int(row["epoch"]) for row in history("run")] == [1, 2, 3]

    notice = "the run was stopped after epoch 3 of 9: its weights are not fully trained"
    assert call("evaluate", "run") == 0
    assert capsys.readouterr().out.count(f"NOTE: {notice}. Go on with: pyrovae fit --resume run\n") == 1
    assert any(notice in note for note in json.loads(Path("run/scores.json").read_text())["notes"])
    assert call("report", "run", "--num-samples", 5, "--also", "collapse") == 0
    assert f"NOTE: {notice}. Go on with: pyrovae fit --resume run\n" in capsys.readouterr().out
    page = Path("run/report.html").read_text()
    assert page.count(f"T{notice[1:]}") == 1
    assert "3 of 9 epochs" in page

    interrupt(4 * 2 + 1)
    assert call("fit", "--resume", "run") == 130
    said = capsys.readouterr()
    assert "Going on in run, after epoch 3 of 9\n" in said.out
    assert "Stopped after epoch 5 of 9." in said.err
    assert len(history("run")) == 5
    interrupt(None)
    assert call("fit", "--resume", "run") == 0
    assert call("evaluate", "run") == 0
    assert call("report", "run", "--num-samples", 5, "--also", "collapse", "--overwrite") == 0
    assert "was stopped" not in capsys.readouterr().out + Path("run/report.html").read_text()


def test_a_run_that_patience_ended_is_finished(capsys):
    options = ["--epochs", 500, "--validation", "0.25", "--patience", 1, "--lr", 0.5]
    assert fit(*options, "-o", "run") == 0
    assert "stopped early" in capsys.readouterr().out
    assert call("evaluate", "run") == 0
    assert "was stopped" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [["--resume", "run"], ["vae", *SMALL, "--data", "my.csv", "-o", "run", "--overwrite"]]
)
def test_ctrl_c_before_the_first_step_leaves_the_run_as_it_was(monkeypatch, run, options):
    def stop(*args, **more):
        raise KeyboardInterrupt

    before = tree(run)
    monkeypatch.setattr("pyrovae.training.batches.check_pair", stop)
    assert call("fit", *options) == 130
    assert tree(run) == before


def test_ctrl_c_at_the_first_step_leaves_a_run_too(capsys, interrupt):
    interrupt(1)
    assert fit("--epochs", 2, "-o", "run") == 130
    assert "Stopped in epoch 1 of 2. Go on with" in capsys.readouterr().err
    assert call("evaluate", "run") == 0
    interrupt(None)
    assert call("fit", "--resume", "run") == 0
    assert len(history("run")) == 2


def test_a_resumed_run_that_fails_does_not_keep_older_weights(interrupt):
    options = ["--epochs", 9, "--batch-size", 16]
    interrupt(8)
    assert fit(*options, "-o", "run") == 130
    first = RunFolder("run").load()[1].state_dict()
    interrupt(8, MemoryError)
    assert call("fit", "--resume", "run") == 1
    assert not Path("run/weights.safetensors").exists()
    second = RunFolder("run").load()[1].state_dict()
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_finished_run_resumes_to_itself(run):
    shutil.copytree(run, "before")
    assert call("fit", "--resume", run) == 0
    assert_same_end("before", run)


LONG = ["vae", *SMALL, "--data", "my.csv", "--epochs", "200", "--batch-size", "16"]


def start(out):
    """Start a run in its own process, and return when its first checkpoint is there."""
    command = [sys.executable, "-m", "pyrovae", "fit", *LONG, "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # the same sums, bit for bit
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    while not Path(out, "checkpoint.safetensors").is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


def test_ctrl_c_and_kill_in_the_shell():
    stopped = start("stopped")
    stopped.send_signal(signal.SIGINT)
    message = stopped.communicate(timeout=60)[1]
    killed = start("killed")
    killed.kill()
    killed.communicate(timeout=60)
    assert stopped.returncode == 130, message
    assert killed.returncode == -signal.SIGKILL
    assert re.fullmatch(r"Stopped (after|in) epoch \d+ of 200\. Go on with: .* --resume stopped", message.strip())
    assert not Path("killed", "weights.safetensors").exists()

    assert call("fit", *LONG, "-o", "whole") == 0
    for run in ("stopped", "killed"):
        assert not RunFolder(run).progress().finished  # so it was in the middle
        assert call("evaluate", run) == 0
        assert call("sample", run, "-n", 1) == 0
        assert call("fit", "--resume", run) == 0
        assert_same_end("whole", run)


@pytest.mark.parametrize(
    "options",
    [["vae"], ["--epochs", "9"], ["--set", "latent_dim=3"], ["--data", "iris"], ["--overwrite"], ["--seed", "0"]],
    ids=" ".join,
)
def test_resume_takes_no_other_options(capsys, run, options):
    before = tree(run)
    assert call("fit", *options, "--resume", run) == 2
    named = "PAIR" if options == ["vae"] else options[0]
    assert f"leave {named} out" in capsys.readouterr().err
    assert tree(run) == before


def test_resume_needs_a_checkpoint(capsys, run):
    (run / "checkpoint.safetensors").unlink()
    assert call("fit", "--resume", run) == 2
    assert "--resume: " in capsys.readouterr().err


# --out and --overwrite


def test_an_existing_run_is_replaced_only_on_request(capsys, run):
    (run / "notes.txt").write_text("mine")
    (run / "pictures" / "mine.svg").write_text("mine")
    before = tree(run)
    assert fit("--epochs", 1, "-o", run) == 2
    message = capsys.readouterr().err
    assert re.search(r"--out: \S*run exists. Pass --overwrite to replace it, --resume \S*run to go on with it", message)
    assert tree(run) == before
    assert fit("--epochs", 2, "-o", run, "--overwrite") == 0
    assert len(history(run)) == 2
    assert (run / "notes.txt").read_text() == "mine"  # what no run wrote stays
    assert (run / "pictures" / "mine.svg").read_text() == "mine"


def test_an_overwritten_run_leaves_nothing_of_the_old_one(interrupt, run):
    interrupt(1)
    assert fit("--epochs", 2, "-o", run, "--overwrite") == 130
    assert {file.name for file in run.iterdir() if file.is_file()} == {
        "config.json",
        "weights.safetensors",
        "checkpoint.safetensors",
    }
    assert list((run / "pictures").iterdir()) == []


@pytest.mark.parametrize("config", [None, "", "{}", "[1]", '{"format": 1, "model_type": "bert"}', "\x00\xff"])
def test_overwrite_leaves_other_folders_alone(capsys, folder, config):
    other = folder / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    (other / "weights.safetensors").write_text("another program's")
    if config is not None:
        (other / "config.json").write_text(config, encoding="latin-1")
    before = tree(other)
    assert fit("--epochs", 1, "-o", other, "--overwrite") == 2
    assert "no pyrovae run, so --overwrite leaves it alone" in capsys.readouterr().err
    assert tree(other) == before


def test_overwrite_leaves_a_file_alone(capsys, folder):
    assert fit("--epochs", 1, "-o", "my.csv", "--overwrite") == 2
    assert "expected a folder for the run; my.csv is a file" in capsys.readouterr().err


def test_a_run_may_go_into_an_empty_folder(folder):
    (folder / "empty").mkdir()
    assert fit("--epochs", 1, "-o", "empty") == 0


BAD = {
    "epochs": (["--epochs", "0"], r"epochs: .*got 0"),
    "lr": (["--lr", "-1"], r"lr: .*got -1"),
    "lr NaN": (["--lr", "nan"], r"lr: .*got nan"),
    "batch size": (["--batch-size", "0"], r"--batch-size: .*got 0"),
    "device": (["--device", "gpu"], r"device: .*got 'gpu'"),
    "schedule": (["--schedule", "cosin"], r"schedule: .*Did you mean 'cosine'"),
    "validation all": (["--validation", "60"], r"validation: .*count below the 60 data; got 60"),
    "validation 1.5": (["--validation", "1.5"], r"--validation: expected a share.*got 1.5"),
    "validation negative": (["--validation", "-0.1"], r"--validation: .*got -0.1"),
    "validation infinite": (["--validation", "inf"], r"--validation: .*got inf"),
    "patience": (["--patience", "0"], r"patience: .*1 or more"),
    "patience alone": (["--patience", "3", "--validation", "0"], r"patience: .*held-out"),
    "samples": (["--num-samples", "0"], r"--num-samples: .*got 0"),
    "loss": (["--loss", "Trace_ELB"], r"--loss: .*Did you mean 'Trace_ELBO'"),
    "alpha": (["--loss", "RenyiELBO", "--alpha", "1"], r"alpha"),
    "particles": (["--loss", "Trace_ELBO", "--num-particles", "0"], r"--num-particles: .*got 0"),
    "option": (["--set", "latent_dim=-2"], r"latent_dim: .*got -2"),
    "not pixels": (["--binarize", "dynamic"], r"binarize: .*\[0, 1\]"),
    "support": (["--set", "likelihood=bernoulli"], r"--data: .*over {0, 1}.*choose --set likelihood=normal"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_options_leave_the_old_run_untouched(capsys, run, name):
    options, match = BAD[name]
    before = tree(run)
    assert fit(*options, "-o", run, "--overwrite") == 2
    message = capsys.readouterr().err
    assert re.search(match, message), message
    assert tree(run) == before
    assert fit(*options, "-o", "new") == 2
    assert not Path("new").exists()


OTHERS = {
    "grey pixels": (["vae", "--binarize", "none"], r"--data: .*grey pixels: .*--binarize dynamic"),
    "loss of another kind": (["gmm", "--loss", "Trace_ELBO"], r"site 'z'.*TraceEnum_ELBO"),
    "too few data": (["gmm", "--set", "num_components=100", "--data", "my.csv"], r"as many data as components; got 54"),
    "too few features": (["ppca", "--set", "latent_dim=3", "--data", "my.csv"], r"latent_dim: .*below data_dim=3"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_bad_combinations_leave_the_old_run_untouched(capsys, run, name):
    options, match = OTHERS[name]
    before = tree(run)
    assert call("fit", *options, "-o", run, "--overwrite") == 2
    message = capsys.readouterr().err
    assert re.search(match, message), message
    assert tree(run) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is absent")
def test_an_absent_device_leaves_the_old_run_untouched(capsys, run):
    before = tree(run)
    assert fit("--device", "cuda", "-o", run, "--overwrite") == 2
    assert "device: 'cuda' was asked for, and torch sees no CUDA device" in capsys.readouterr().err
    assert tree(run) == before


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_a_file_in_place_of_the_folder_is_refused(capsys, folder, options):
    Path("mine.py").write_text("mine")
    assert fit("-o", "mine.py", *options) == 2
    message = capsys.readouterr().err
    assert "--out: expected a folder for the run; mine.py is a file" in message
    assert not re.search("--overwrite|--resume", message)
    assert Path("mine.py").read_text() == "mine"


# Damage


class Bomb:
    """Unpickling it creates a file."""

    def __reduce__(self):
        return (open, ("exploded", "w"))


DAMAGE = {
    "no configuration": ("config.json", None),
    "empty configuration": ("config.json", b""),
    "half a configuration": ("config.json", b'{"pair": "vae", "opt'),
    "foreign configuration": ("config.json", b'{"architectures": ["Bert"]}'),
    "a list": ("config.json", b"[1, 2]"),
    "bytes": ("config.json", bytes(range(128, 256))),
    "empty weights": ("weights.safetensors", b""),
    "garbled weights": ("weights.safetensors", b"\xff" * 1000),
    "pickled weights": ("weights.safetensors", pickle.dumps(Bomb())),
    "no weights at all": ("*.safetensors", None),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_run_is_refused(capsys, run, name):
    pattern, content = DAMAGE[name]
    for file in run.glob(pattern):
        file.unlink() if content is None else file.write_bytes(content)
    before = tree(run)
    for command in (["evaluate", run], ["sample", run]):
        assert call(*command) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        assert "run" in message
    assert tree(run) == before
    assert not Path("exploded").exists()


CONFIG = {
    "format": ({"format": 2}, r"format 2, and this version reads 1"),
    "unknown field": ({"colour": "red"}, r"colour"),
    "pair": ({"pair": "bert"}, r"expected one of gmm"),
    "pair's kind": ({"pair": 3}, r"pair: expected str; got 3"),
    "options": ({"options": [1]}, r"options: expected dict; got \[1\]"),
    "an option": ({"options": {"latent_dims": 2}}, r"RUN: options in .*config.json make no VAE \(.*latent_dims"),
    "an option's value": ({"options": {"latent_dim": 0}}, r"RUN: options in .*config.json make no VAE \(latent_dim"),
    "data": ({"data": "mnost"}, r"Did you mean 'mnist'"),
    "seed": ({"seed": "a"}, r"seed: expected int; got 'a'"),
    "binarize": ({"binarize": "maybe"}, r"binarize: expected one of"),
    "other sizes": ({"options": {"latent_dim": 3}}, r"weights"),
}


@pytest.mark.parametrize("name", CONFIG)
def test_a_changed_configuration_is_refused(capsys, run, name):
    changes, match = CONFIG[name]
    edit_config(run, **changes)
    assert call("evaluate", run) == 2
    message = capsys.readouterr().err
    assert re.search(match, message), message


@pytest.mark.parametrize("kind", ["empty", "garbled", "half", "pickled"])
def test_a_damaged_checkpoint_is_not_resumed(capsys, run, kind):
    whole = (run / "checkpoint.safetensors").read_bytes()
    content = {
        "empty": b"",
        "garbled": b"\xff" * 1000,
        "half": whole[: len(whole) // 2],
        "pickled": pickle.dumps(Bomb()),
    }
    (run / "checkpoint.safetensors").write_bytes(content[kind])
    before = tree(run)
    assert call("fit", "--resume", run) == 2
    assert "checkpoint.safetensors is damaged" in capsys.readouterr().err
    assert tree(run) == before
    assert not Path("exploded").exists()


def test_a_foreign_checkpoint_is_not_resumed(capsys, run):
    save_file({"weight": torch.zeros(3)}, run / "checkpoint.safetensors")
    assert call("fit", "--resume", run) == 2
    assert "no pyrovae checkpoint" in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_not_resumed(capsys, run):
    assert fit("--set", "latent_dim=1", "--epochs", 4, "-o", "other") == 0
    shutil.copy("other/checkpoint.safetensors", run)
    before = tree(run)
    assert call("fit", "--resume", run) == 2
    assert "resume: " in capsys.readouterr().err
    assert tree(run) == before


# Files that a run was made from


def test_a_changed_table_is_refused(capsys, folder):
    assert fit("--epochs", 1, "-o", "run") == 0
    write_rows("my.csv", seed=1)
    for command in (["evaluate", "run"], ["sample", "run"], ["fit", "--resume", "run"]):
        assert call(*command) == 2
        assert "my.csv has changed since this run was made" in capsys.readouterr().err
    Path("my.csv").unlink()
    assert call("evaluate", "run") == 2
    assert re.search(r"made from \S+my.csv, which is gone", capsys.readouterr().err)


def test_a_changed_pair_is_refused_and_not_imported(capsys, own_run):
    assert call("evaluate", own_run) == 0
    with Path("mypair.py").open("a") as file:
        file.write('\nopen("imported", "w")\n')
    capsys.readouterr()
    for command in (["evaluate", own_run], ["sample", own_run], ["fit", "--resume", own_run]):
        assert call(*command) == 2
        assert "mypair.py has changed since this run was made" in capsys.readouterr().err
    assert not Path("imported").exists()
    Path("mypair.py").unlink()
    assert call("sample", own_run) == 2
    assert "which is gone" in capsys.readouterr().err


def test_an_own_run_works_from_every_folder(own_run, folder, monkeypatch):
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert call("evaluate", "../own") == 0


@pytest.mark.parametrize("where", ["own/mypair.py", "own/pictures/../mypair.py", "own/pictures/mypair.py"])
def test_no_code_in_a_run_folder_is_executed(capsys, own_run, folder, where):
    (folder / where).write_text('open("imported", "w")\n' + (folder / "mypair.py").read_text())
    from pyrovae.cli.names import file_digest

    edit_config(own_run, pair=f"{where}:MyPair", pair_sha256=file_digest(f"{where}:MyPair"))
    for command in (["evaluate", own_run], ["sample", own_run], ["fit", "--resume", own_run]):
        assert call(*command) == 2
        assert "nothing in a run folder is executed" in capsys.readouterr().err
    assert not Path("imported").exists()


# Divergence

DIVERGING = """
import pyro, torch
import pyro.distributions as dist
from pyrovae import Pair

class Diverging(Pair):
    def __init__(self, data_dim):
        super().__init__()
        self.variance = torch.nn.Parameter(torch.tensor(2.5))

    def model(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("height", dist.Normal(torch.zeros_like(x), self.variance.sqrt()).to_event(1), obs=x)
"""


@pytest.fixture
def diverged(folder):
    """Adam at lr 1 takes the variance of data near 0 from 2.5 to about 1.5, 0.5 and −0.4, whose root is NaN."""
    Path("my.py").write_text(DIVERGING)
    np.save("small.npy", np.random.default_rng(0).normal(size=(20, 2)) * 0.01)
    options = ["--data", "small.npy", "--lr", 1, "--schedule", "constant", "--epochs", 9, "--batch-size", 99]
    assert call("fit", "my.py:Diverging", *options, "-o", "run") == 1
    return Path("run")


def test_a_diverging_run_says_where_and_keeps_weights(capsys, diverged):
    message = capsys.readouterr().err
    assert re.search(r"the loss turned NaN or infinite at step \d \(epoch \d\) at site 'height'", message)
    assert f"The last good weights are in {diverged}" in message
    assert "Traceback" not in message
    assert bool(torch.isfinite(load_file(diverged / "weights.safetensors")["variance"]))
    assert RunFolder(diverged).load()[1].variance.isfinite()
    assert len(history(diverged)) == len(RunFolder(diverged).progress().history) > 0


def test_the_weights_of_a_diverged_run_are_good(diverged):
    assert float(load_file(diverged / "weights.safetensors")["variance"]) > 0
    assert call("evaluate", diverged) == 0
