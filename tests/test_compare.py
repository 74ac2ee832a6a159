"""``pyrovae compare``: every method from one start, the exact numbers, and what it writes."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_cli import call, refusal

import pyrovae
from pyrovae.compare import Comparison, MethodResult, plot_comparison

FAITHFUL = -1130.26396  # full covariances, two components
IRIS = -404.96278  # PPCA with two latents, closed form


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def results(folder):
    record = json.loads(Path(folder, "comparison.json").read_text())
    with Path(folder, "comparison.csv").open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    for result in record["results"]:
        row = rows[result["method"]]
        assert float(row["log_likelihood"]) == result["log_likelihood"]
        assert float(row["gap"]) == result["gap"]
    return {result["method"]: result for result in record["results"]}


def test_mixture(capsys):
    assert call("compare", "gmm", "--data", "faithful", "--epochs", 150, "-o", "out") == 0
    shown = capsys.readouterr().out
    assert re.search(r"^EM +-1130\.2640 +-1130\.2640 +0\.0000 +\d+ +\d+\.\d\d$", shown, re.M), shown
    assert "-0.0000" not in shown
    assert {file.name for file in Path("out").iterdir()} == {
        "comparison.json",
        "comparison.csv",
        "comparison.png",
        "densities.png",
    }
    found = results("out")
    assert list(found) == ["EM", "SVI, enumeration", "SVI, amortized guide"]
    for method, result in found.items():
        assert method in shown
        assert result["log_likelihood"] <= FAITHFUL + 1e-3
        assert result["elbo"] <= result["log_likelihood"] + 1e-3
        assert result["seconds"] > 0
        assert len(result["trace"]) == len(result["trace_seconds"]) > 1
    assert found["EM"]["log_likelihood"] == pytest.approx(FAITHFUL, abs=2e-4)
    assert found["SVI, enumeration"]["log_likelihood"] > FAITHFUL - 5
    assert found["SVI, amortized guide"]["gap"] > 0

    # The same start: EM's first log likelihood is the bound that enumeration begins at.
    assert found["SVI, enumeration"]["trace"][0] == pytest.approx(found["EM"]["trace"][0], abs=80)


def test_ppca_by_three_methods():
    assert (
        call("compare", "ppca", "--data", "iris", "--batch-size", 150, "--epochs", 700, "--lr", 0.05, "-o", "out") == 0
    )
    found = results("out")
    assert list(found) == ["closed form", "EM", "SVI, amortized guide"]
    for method in ("closed form", "EM"):
        assert found[method]["log_likelihood"] == pytest.approx(IRIS, abs=1e-3)
        assert found[method]["gap"] == pytest.approx(0, abs=1e-3)
    svi = found["SVI, amortized guide"]
    assert IRIS - 1 < svi["log_likelihood"] < IRIS + 1e-3
    assert 0 < svi["gap"] < 2


def test_vae(capsys):
    small = ["--set", "hidden_dims=8", "--epochs", 2, "--num-samples", 20]
    assert call("compare", "vae", *small, "-o", "out") == 0
    shown = capsys.readouterr().out
    assert "log evidence (IS)" in shown
    assert "no closed form, EM or enumeration" in shown
    assert results("out")["SVI, amortized guide"]["gap"] > 0


OWN = """
import pyro, torch
import pyro.distributions as dist
from pyrovae import Pair

class Mean(Pair):
    '''x ~ N(z + loc, 1), z ~ N(0, 1), whose exact EM sets loc to the mean. Its guide is never right by itself.'''

    def __init__(self, data_dim, shift=0.0):
        super().__init__()
        self.data_dim = data_dim
        self.loc = torch.nn.Parameter(torch.full((data_dim,), float(shift)))
        self.guide_loc = torch.nn.Parameter(torch.zeros(data_dim))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + self.loc, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - self.guide_loc) / 2, 0.5 ** 0.5).to_event(1))

    def initialize(self, x):
        pass

    def log_prob(self, x):
        return dist.Normal(self.loc, 2 ** 0.5).to_event(1).log_prob(x)

    def expected_statistics(self, x):
        return {"sum": x.sum(0), "count": torch.tensor(float(len(x))).to(x), "log_likelihood": self.log_prob(x).sum()}

    def maximize(self, statistics):
        self.loc.data = statistics["sum"] / statistics["count"]
"""


def test_an_own_pair(capsys):
    Path("mine.py").write_text(OWN)
    x = np.random.default_rng(0).normal(size=(50, 2)) + np.array([3, -2])
    np.save("x.npy", x)
    options = ["--data", "x.npy", "--set", "shift=1", "--epochs", 600, "--lr", 0.05]
    assert call("compare", "mine.py:Mean", *options) == 0
    assert "mean on x.npy: 50 data" in capsys.readouterr().out
    record = json.loads(Path("runs/compare-mean-x/comparison.json").read_text())
    em, svi = record["results"]
    exact = -0.5 * (np.log(4 * np.pi) * x.size + ((x - x.mean(0)) ** 2).sum() / 2)
    assert em["method"] == "EM"
    assert em["log_likelihood"] == pytest.approx(exact, abs=1e-3)
    assert em["elbo"] is None  # EM trains no guide
    assert svi["log_likelihood"] == pytest.approx(exact, abs=0.1)
    assert svi["elbo"] == pytest.approx(exact, abs=0.1)
    assert Path("runs/compare-mean-x/densities.png").is_file()


def test_amortized_set_by_hand_changes_nothing(capsys):
    assert call("compare", "gmm", "--set", "amortized=true", "--epochs", 2, "-o", "out") == 0
    assert list(results("out")) == ["EM", "SVI, enumeration", "SVI, amortized guide"]


def test_em_that_did_not_converge_is_marked(capsys, monkeypatch):
    fit_em = pyrovae.fit_em
    options = ["compare", "gmm", "--data", "faithful", "--epochs", 1]
    assert call(*options) == 0
    assert "converged" not in capsys.readouterr().out
    monkeypatch.setattr(pyrovae, "fit_em", lambda *args, **more: fit_em(*args, **more | {"max_iter": 2}))
    assert call(*options) == 0
    assert "\nEM: NOT converged after 2 iterations\n" in capsys.readouterr().out


def test_a_file_is_no_folder(capsys):
    Path("mine.py").write_text("mine")
    message = refusal(capsys, "compare", "gmm", "--epochs", 1, "-o", "mine.py")
    assert "--out: expected a folder for the comparison; mine.py is a file" in message
    assert "--overwrite" not in message


def test_an_existing_folder(capsys):
    options = ["compare", "ppca", "--epochs", 1, "--num-samples", 5, "-o", "out"]
    other = Path("out")
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert "--out: out exists. Pass --overwrite" in refusal(capsys, *options)
    assert "holds no comparison" in refusal(capsys, *options, "--overwrite")
    assert [file.name for file in other.iterdir()] == ["notes.txt"]
    (other / "notes.txt").unlink()
    assert call(*options) == 0
    (other / "notes.txt").write_text("mine")
    (other / "densities.png").write_text("of an earlier comparison")
    assert call(*options, "--overwrite") == 0
    assert {file.name for file in other.iterdir()} == {
        "notes.txt",
        "comparison.json",
        "comparison.csv",
        "comparison.png",
    }


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--lr", "0"], "--lr: expected a number above 0"),
        (["--batch-size", "0"], "--batch-size"),
        (["--num-samples", "0"], "--num-samples"),
        (["--set", "num_components=300"], "as many data as components; got 272"),
        (["--data", "iris", "--binarize", "dynamic"], r"binarize: .*\[0, 1\]"),
    ],
)
def test_bad_options_write_nothing(capsys, folder, options, match):
    assert re.search(match, refusal(capsys, "compare", "gmm", *options))
    assert list(folder.iterdir()) == []


def test_grey_pixels_are_named_and_not_printed(capsys, folder):
    message = refusal(capsys, "compare", "vae", "--binarize", "none")
    assert "grey pixels" in message
    assert len(message) < 600


def test_bars_start_at_zero_and_have_no_rounding_below_it():
    results = [
        MethodResult("closed form", -10.0, -10.0 + 1e-9, 0.1, 1),
        MethodResult("EM", -10.0, -10.0, 0.1, 3, [0.0, 0.1, 0.2], [-20.0, -11.0, -10.0]),
        MethodResult("SVI", -1500.0, -1600.0, 0.3, 3, [0.1, 0.2, 0.3], [-2000.0, -1700.0, -1600.0]),
    ]
    bars, _ = plot_comparison(Comparison("t", 5, True, results)).axes
    assert bars.get_xlim()[0] == 0
    assert [text.get_text() for text in bars.texts] == ["0", "0", "1,590"]
    assert "-0.0000" not in str(Comparison("t", 5, True, results))
