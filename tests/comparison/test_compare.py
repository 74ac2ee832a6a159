"""Comparisons: methods start alike, numbers are exact, tables are right, and a stopped comparison is resumed."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from command_line import call, refusal

import pyrovae as pv
from pyrovae.comparison import Cell, Comparison, cells, compare
from pyrovae.comparison.methods import find_methods, parse_method, split_methods
from pyrovae.evaluation import responsibilities
from pyrovae.infer import LOSSES
from pyrovae.models import GMM, PPCA, VAE
from pyrovae.plots import plot_method_gaps, plot_method_training, plot_responsibilities
from pyrovae.training.loop import _Run

FAITHFUL = -1130.26396  # full covariances, two components
IRIS = -404.96278  # PPCA with two latents, closed form
MIXTURE = [
    "EM",
    "SVI, enumeration",
    "SVI, amortized: enumeration",
    "SVI, amortized: score function",
    "SVI, amortized: VIMCO, K=5",
]
FILES = {"cells", "comparison.json", "comparison.csv", "comparison.md", "comparison.tex", "comparison.png", "gaps.png"}

mixture = partial(GMM, 2, 2)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def faithful():
    return pv.data.load("faithful")


def by_method(comparison):
    return {cell.method: cell for cell in comparison.cells}


# What is found


def test_mixture_by_every_method(capsys):
    assert call("compare", "gmm", "--data", "faithful", "--epochs", 40, "-o", "out") == 0
    shown = capsys.readouterr().out
    assert re.search(r"^EM +-4\.1554 +-4\.1554 +0\.0000 +-1130\.2640 +\d+\.\d\d +\d+$", shown, re.M), shown
    assert "-0.0000" not in shown
    assert "gmm on faithful: 272 training rows, nats per datum" in shown
    assert {file.name for file in Path("out").iterdir()} == FILES | {"responsibilities.png"}
    record = json.loads(Path("out/comparison.json").read_text())
    assert record["finished"]
    found = {cell["method"]: cell for cell in record["cells"]}
    assert list(found) == MIXTURE
    for method, cell in found.items():
        assert f"gmm, {method}, seed 0: log evidence" in shown
        assert cell["exact"]
        assert cell["log_evidence"] * 272 <= FAITHFUL + 1e-3
        assert cell["elbo"] <= cell["log_evidence"] + 1e-9
        assert cell["seconds"] > 0
        trace = cell["trace"]
        assert {len(column) for column in trace.values()} == {cell["passes"] if method == "EM" else 16}
        assert trace["passes"][0] == 1
        assert trace["passes"][-1] == cell["passes"]
        assert trace["seconds"] == sorted(trace["seconds"])
        assert trace["log_evidence"][-1] == pytest.approx(cell["log_evidence"], abs=1e-5)
    assert found["EM"]["log_evidence"] * 272 == pytest.approx(FAITHFUL, abs=2e-4)
    assert found["SVI, enumeration"]["gap"] == 0
    assert found["SVI, amortized: enumeration"]["gap"] > 0


def test_ppca_by_three_methods():
    data = pv.data.load("iris")
    result = compare(partial(PPCA, 4, 2), data, batch_size=150, epochs=500, lr=0.05, seeds=2, num_samples=50)
    assert [(cell.method, cell.seed) for cell in result.cells] == [
        ("closed form", 0),  # no seed changes it
        ("EM", 0),
        ("SVI, Trace_ELBO", 0),
        ("EM", 1),
        ("SVI, Trace_ELBO", 1),
    ]
    closed, em, svi = result.table
    for row in (closed, em):
        assert row.mean["log_evidence"] * 150 == pytest.approx(IRIS, abs=1e-3)
        assert row.mean["gap"] == pytest.approx(0, abs=1e-5)
    assert (closed.num_seeds, closed.stderr["gap"]) == (1, None)
    assert IRIS - 1 < svi.mean["log_evidence"] * 150 < IRIS + 1e-3
    assert 0 < svi.mean["gap"] * 150 < 2


def test_images_and_two_pairs_on_test_rows(capsys):
    small = ["--set", "hidden_dims=8", "--set", "latent_dims=5", "--epochs", 2, "--num-samples", 20]
    assert call("compare", "vae", "iwae", *small, "-o", "out") == 0
    shown = capsys.readouterr().out
    assert "vae (hidden_dims=(8,)), iwae (hidden_dims=((8,),), latent_dims=(5,)) on digits: 360 test rows" in shown
    assert "by importance sampling, 20 samples" in shown
    rows = list(csv.DictReader(io.StringIO(Path("out/comparison.csv").read_text())))
    losses = ["Trace_ELBO", "TraceMeanField_ELBO", "RenyiELBO:K=5"]
    assert [(row["pair"], row["loss"]) for row in rows] == [(p, loss) for p in ("vae", "iwae") for loss in losses]
    config = json.loads(Path("out/comparison.json").read_text())["config"]
    assert config["options"] == {"vae": {"hidden_dims": [8]}, "iwae": {"hidden_dims": [[8]], "latent_dims": [5]}}
    assert config["binarize"] == "dynamic"


def test_gaps_are_split_on_request(faithful):
    result = compare(mixture, faithful, methods=["EM", "Trace_ELBO"], epochs=30, gaps=True)
    em, svi = result.cells
    assert em.amortization_gap is None
    # The guide's family, every categorical, holds the posterior: all that is lost is lost to amortization.
    assert svi.approximation_gap == pytest.approx(0, abs=1e-4)
    assert svi.amortization_gap == pytest.approx(svi.gap, abs=0.02)
    assert "amortization" in repr(result)
    legend = plot_method_gaps(result).legends[0]
    assert "amortization gap" in [text.get_text() for text in legend.get_texts()]


# One start, one budget


def test_all_methods_start_alike_and_use_the_loss_that_is_named(monkeypatch, faithful):
    seen = []

    def watch(function):
        def watched(pair, x, *, loss=None, **options):
            parameters = {k: v.clone() for k, v in pair.state_dict().items()}
            kind = None if loss is None else (type(loss).__name__, loss.num_particles)
            seen.append((options.get("seed"), kind, getattr(pair, "amortized", None), parameters))
            options |= {} if loss is None else {"loss": loss}
            return function(pair, x, **options)

        return watched

    monkeypatch.setattr(cells, "fit", watch(cells.fit))
    monkeypatch.setattr(cells, "fit_em", watch(cells.fit_em))
    before = torch.get_rng_state()
    result = compare(mixture, faithful, epochs=1, seeds=2, seed=3, num_samples=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert [kind for _, kind, _, _ in seen[:5]] == [
        None,
        ("TraceEnum_ELBO", 1),
        ("TraceEnum_ELBO", 1),
        ("Trace_ELBO", 1),
        ("RenyiELBO", 5),
    ]
    assert [amortized for _, _, amortized, _ in seen[:5]] == [False, False, True, True, True]
    assert [seed for seed, _, _, _ in seen if seed is not None] == [3] * 4 + [4] * 4
    for group in (seen[:5], seen[5:]):
        first, encoders = group[0][3], [p for _, _, amortized, p in group if amortized]
        for _, _, _, parameters in group:
            assert all(torch.equal(parameters[name], value) for name, value in first.items())
        for parameters in encoders:
            assert all(torch.equal(parameters[name], value) for name, value in encoders[0].items())
            assert parameters["feature_loc"].abs().sum() > 0  # initialised
    assert not torch.equal(seen[0][3]["loc"], seen[5][3]["loc"])  # another seed, another start
    assert {cell.passes for cell in result.cells if cell.method != "EM"} == {1}
    assert {cell.steps for cell in result.cells if cell.method != "EM"} == {3}


def test_means_and_standard_errors(faithful):
    result = compare(mixture, faithful, methods=["TraceEnum_ELBO"], epochs=3, seeds=4, num_samples=5)
    plain, amortized = result.table
    assert (plain.method, amortized.method) == tuple(MIXTURE[1:3])
    for row in result.table:
        found = [cell for cell in result.cells if cell.method == row.method]
        assert [cell.seed for cell in found] == [0, 1, 2, 3]
        for name in ("log_evidence", "elbo", "gap", "seconds", "steps"):
            values = np.array([getattr(cell, name) for cell in found])
            assert row.mean[name] == pytest.approx(values.mean())
            assert row.stderr[name] == pytest.approx(values.std(ddof=1) / 2)
    assert list(result.pairs) == MIXTURE[1:3]
    assert -result.pairs[MIXTURE[1]].log_prob(faithful.train).mean().item() == pytest.approx(
        -result.cells[0].log_evidence, rel=1e-5
    )


# Methods


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("Trace_ELBO", "Trace_ELBO"),
        ("Trace_ELBO:K=1", "Trace_ELBO"),
        ("Trace_ELBO:K=3", "Trace_ELBO:K=3"),
        ("RenyiELBO:num_particles=50, alpha=0.5", "RenyiELBO:K=50,alpha=0.5"),
        ("RenyiELBO:alpha=-inf", "RenyiELBO:alpha=-inf"),
        ("RenyiELBO:K=2,alpha=0", "RenyiELBO"),
        ("closed-form", "closed-form"),
    ],
)
def test_a_method_has_one_normal_name(given, normal):
    assert parse_method(given) == normal == parse_method(normal)


def test_names_are_split_at_commas_but_not_their_options():
    assert split_methods(["Trace_ELBO,RenyiELBO:K=5,alpha=0.5", "EM closed-form"]) == [
        "Trace_ELBO",
        "RenyiELBO:K=5,alpha=0.5",
        "EM",
        "closed-form",
    ]


def test_tables_name_loss_particles_and_alpha():
    x = torch.rand(4, 3)
    vae = VAE(3, 2, hidden_dims=(4,), likelihood="continuous-bernoulli")
    specs = ["RenyiELBO:K=50,alpha=0.5", "Trace_ELBO:K=3", "default-loss", "RenyiELBO", "EM"]
    methods, refused = find_methods([({}, vae)], x, specs)
    assert [(m.name, m.spec) for m in methods] == [
        ("SVI, RenyiELBO, K=50, α=0.5", "RenyiELBO:K=50,alpha=0.5"),
        ("SVI, Trace_ELBO, K=3", "Trace_ELBO:K=3"),
        ("SVI, TraceMeanField_ELBO", "TraceMeanField_ELBO"),
        ("SVI, RenyiELBO, K=2", "RenyiELBO"),
    ]
    assert list(refused) == ["EM"]
    loss = methods[0].make_loss(vae)
    assert (type(loss), loss.num_particles, loss.alpha) == (LOSSES["RenyiELBO"], 50, 0.5)
    assert methods[0].make_loss(vae) is not loss


class GlobalMean(pv.Pair):
    """mu ~ N(0, 1) is shared by all data, so there is one weight for all, which evaluate warns of."""

    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(1))

    def model(self, x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros_like(x[0]), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample("mu", dist.Normal(self.loc, 0.2).to_event(1))


def test_a_note_appears_once_for_each_method():
    result = compare(GlobalMean, torch.randn(30, 1), methods=["Trace_ELBO"], epochs=2, num_samples=9, seeds=3)
    assert re.search(
        r"^globalmean, SVI, Trace_ELBO, seed 0 \(and of 2 more seeds\): a global latent", repr(result), re.M
    )
    assert len(result.notes) == 1


class Own(pv.Pair):
    """A pair with a closed form and a loss that pyrovae does not have: by default only these two train it."""

    data_dim = 1

    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(1))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + self.loc, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - self.loc) / 2, 0.5**0.5).to_event(1))

    def default_loss(self):
        return pyro.infer.Trace_ELBO()

    def fit_closed_form(self, x):
        self.loc.data = x.mean(0)


def test_a_users_loss_is_compared_and_missing_evidence_is_noted():
    result = compare(Own, torch.randn(30, 1) + 2, epochs=2, num_samples=3)
    closed, svi = result.cells
    assert (svi.method, svi.loss) == ("SVI, own loss", "default-loss")
    assert svi.log_evidence == pytest.approx(svi.elbo, abs=1e-5)
    assert not svi.exact
    assert closed.log_evidence is None  # it has no log_prob, and its guide may be anything
    assert "own, closed form, seed 0: it trains no guide" in repr(result)
    assert re.search(r"^closed form +– +– +– +– +0\.00 +1$", repr(result), re.M)


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


def test_a_users_pair_is_compared_from_its_file(capsys):
    Path("mine.py").write_text(OWN)
    x = np.random.default_rng(0).normal(size=(50, 2)) + np.array([3, -2])
    np.save("x.npy", x)
    options = ["--data", "x.npy", "--set", "shift=1", "--epochs", 400, "--lr", 0.05]
    assert call("compare", "mine.py:Mean", *options) == 0
    assert "mean (shift=1) on x.npy: 50 training rows" in capsys.readouterr().out
    record = json.loads(Path("runs/compare-mean-x/comparison.json").read_text())
    em, svi = record["cells"]
    exact = (-0.5 * (np.log(4 * np.pi) * x.size + ((x - x.mean(0)) ** 2).sum() / 2)) / 50
    assert em["method"] == "EM"
    assert em["log_evidence"] == pytest.approx(exact, abs=1e-5)
    assert em["elbo"] is None  # EM trains no guide
    assert svi["log_evidence"] == pytest.approx(exact, abs=2e-3)
    assert svi["elbo"] == pytest.approx(exact, abs=2e-3)
    assert Path("runs/compare-mean-x/densities.png").is_file()

    Path("mine.py").write_text(OWN + "\n")
    message = refusal(capsys, "compare", "--resume", "runs/compare-mean-x")
    assert "mine.py has changed" in message


def test_amortized_set_by_hand_changes_nothing():
    assert call("compare", "gmm", "--set", "amortized=true", "--epochs", 1, "-o", "out") == 0
    record = json.loads(Path("out/comparison.json").read_text())
    assert [cell["method"] for cell in record["cells"]] == MIXTURE


# What goes wrong on the way


def test_em_that_did_not_converge_is_marked(monkeypatch, faithful):
    monkeypatch.setattr(cells, "EM_ITERATIONS", 2)
    result = compare({"old": mixture}, faithful, methods=["EM"])
    assert "\nold, EM, seed 0: NOT converged after 2 iterations" in repr(result)
    assert result.cells[0].log_evidence is not None


def test_a_method_that_diverges_is_a_note_and_the_others_go_on(monkeypatch, faithful):
    def fail(*args, loss, **options):
        if type(loss).__name__ == "Trace_ELBO":
            raise pv.TrainingDiverged("the loss turned NaN at step 7")
        return fit(*args, loss=loss, **options)

    fit = cells.fit
    monkeypatch.setattr(cells, "fit", fail)
    result = compare(mixture, faithful, epochs=2, num_samples=5, folder="out")
    failed = by_method(result)["SVI, amortized: score function"]
    assert (failed.log_evidence, failed.seconds) == (None, None)
    assert by_method(result)["SVI, amortized: VIMCO, K=5"].log_evidence is not None
    assert "gmm, SVI, amortized: score function, seed 0: the loss turned NaN at step 7" in repr(result)
    assert Path("out/gaps.png").is_file()


def without_seconds(comparison):
    return [(c.method, c.seed, c.log_evidence, c.elbo, c.steps, c.trace.get("log_evidence")) for c in comparison.cells]


def test_a_stopped_comparison_goes_on_to_the_same_table(monkeypatch, faithful):
    options = {"epochs": 6, "seeds": 2, "num_samples": 5, "methods": ["EM", "TraceEnum_ELBO"]}
    whole = compare(mixture, faithful, **options)
    epochs, one_epoch = iter(range(100)), _Run._one_epoch

    def stop(*args):
        if next(epochs) == 15:  # in the third training run
            raise KeyboardInterrupt
        return one_epoch(*args)

    monkeypatch.setattr(_Run, "_one_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        compare(mixture, faithful, folder="out", **options)
    assert not json.loads(Path("out/comparison.json").read_text())["finished"]
    assert len(list(Path("out/cells").glob("*.json"))) == 4
    assert len(list(Path("out/cells").glob("*.checkpoint.safetensors"))) == 1
    monkeypatch.setattr(_Run, "_one_epoch", one_epoch)

    lines = []
    result = compare(mixture, faithful, folder="out", resume=True, report=lines.append, **options)
    assert without_seconds(result) == without_seconds(whole)
    assert lines[0] == "6 cells of pair, method and seed, 4 of them done, in out"
    assert [line.split("  ")[0] for line in lines[1:]] == ["5/6", "6/6"]
    assert not list(Path("out/cells").glob("*.checkpoint.safetensors"))
    for label, pair in result.pairs.items():  # of the first seed, from the folder
        for name, value in whole.pairs[label].state_dict().items():
            assert torch.equal(pair.state_dict()[name], value)
    with pytest.raises(ValueError, match="resume: the comparison in out was started with epochs 6, and this is 7"):
        compare(mixture, faithful, folder="out", resume=True, **options | {"epochs": 7})


def test_the_command_resumes_a_stopped_comparison(capsys, monkeypatch):
    options = ["compare", "ppca", "--epochs", 2, "--num-samples", 5, "--seeds", 2]
    assert call(*options, "-o", "whole") == 0
    run_cell, count = cells.run_cell, iter(range(100))
    from pyrovae.comparison import run

    def stop(*args):
        if next(count) == 2:
            raise KeyboardInterrupt
        return run_cell(*args)

    monkeypatch.setattr(run, "run_cell", stop)
    assert call(*options, "-o", "out") == 130
    assert "Stopped. Go on with: pyrovae compare --resume out" in capsys.readouterr().err
    assert "leave --epochs out" in refusal(capsys, "compare", "--resume", "out", "--epochs", "3")
    assert call("compare", "--resume", "out") == 0
    assert "ppca on iris" in capsys.readouterr().out
    found, expected = (json.loads(Path(f, "comparison.json").read_text())["cells"] for f in ("out", "whole"))
    assert [c["log_evidence"] for c in found] == [c["log_evidence"] for c in expected]

    (Path("out/cells") / "00-ppca-closed-form-seed0.json").write_text("{")
    assert "is damaged" in refusal(capsys, "compare", "--resume", "out")


# Tables and pictures


@pytest.fixture
def made_up():
    """A comparison of two pairs and two seeds, with a missing number and names with every special character."""
    trace = {"passes": [1.0, 2.0], "seconds": [0.1, 0.2], "log_evidence": [-20.0, -11.0]}
    found = []
    for seed, shift in ((0, 0.0), (1, 0.5)):
        found += [
            Cell("a_b", "EM", "EM", seed, -10.0 - shift, True, -10.0 - shift + 1e-9, None, None, 0.1, 3, 4, trace),
            Cell("c|d", "SVI, 5%, α=0.5", "x", seed, -12.0, True, -1500.0, None, None, 0.2, 9, 2, trace),
            Cell("c|d", "closed form", "closed-form", seed, note="no, it did not"),
        ]
    return Comparison("t & u", "test", 10, 20, 2, 7, [0, 1], found, notes=["a note"])


def test_text_table_is_aligned(made_up):
    lines = repr(made_up).splitlines()
    assert lines[0] == (
        "t & u: 10 test rows, nats per datum; total: log evidence of all 10. Mean ± standard error over 2 seeds."
    )
    assert re.fullmatch(
        r"a_b +EM +-10\.2500 ± 0\.2500 +-10\.2500 ± 0\.2500 +0\.0000 ± 0\.0000 +-102\.5000 ± 2\.5000 +0\.10 ± 0\.00 +3",
        lines[3],
    )
    assert re.fullmatch(r"c\|d +closed form( +–){6}", lines[5])
    assert len({len(line) for line in lines[2:6]}) == 1  # aligned
    assert lines[-1] == "a note"


def test_csv_has_means_and_standard_errors(made_up):
    path = Path("t.csv")
    rows = list(csv.DictReader(io.StringIO(made_up.to_csv(path))))
    assert path.read_text() == made_up.to_csv()
    assert [row["pair"] for row in rows] == ["a_b", "c|d", "c|d"]
    assert float(rows[0]["log_evidence"]) == -10.25
    assert float(rows[0]["log_evidence_stderr"]) == pytest.approx(0.25)
    assert rows[2]["log_evidence"] == ""
    assert (rows[0]["rows"], rows[0]["num_data"], rows[0]["num_seeds"]) == ("test", "10", "2")


def test_markdown_table_escapes_bars(made_up):
    table = [line for line in made_up.to_markdown().splitlines() if line.startswith("|")]
    columns = [re.split(r"(?<!\\)\|", line.strip("|")) for line in table]
    assert {len(row) for row in columns} == {8}
    assert columns[1] == [*[" :--- "] * 2, *[" ---: "] * 6]
    assert columns[3][0].strip() == r"c\|d"


def test_latex_table_escapes_special_characters(made_up):
    text = made_up.to_latex(Path("t.tex"))
    assert Path("t.tex").read_text() == text
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    body = [line for line in lines if line.endswith(r"\\")]
    assert lines[0] == r"\begin{tabular}{llrrrrrr}"
    assert lines[-1] == r"\end{tabular}"
    assert {len(re.split(r"(?<!\\)&", line)) for line in body} == {8}
    assert r"a\_b & EM & $-10.2500 \pm 0.2500$" in body[1]
    assert r"SVI, 5\%, $\alpha$=0.5" in body[2]
    assert "--" in body[3]
    assert re.search(r"% .*\\usepackage\{booktabs\}", text)
    for line in body:
        assert line.count("$") % 2 == 0
        assert line.isascii()


def test_a_comparison_is_plain_json(made_up):
    assert json.loads(json.dumps(made_up.to_dict()))["cells"][0]["gap"] == pytest.approx(-1e-9)


def test_bars_start_at_zero_and_have_no_rounding_below_it(made_up):
    (bars,) = made_up.plot_gaps().axes
    assert bars.get_xlim()[0] == 0
    assert [text.get_text() for text in bars.texts] == ["0", "1,490"]
    assert [text.get_text() for text in bars.get_yticklabels()] == ["a_b: EM", "c|d: SVI, 5%, α=0.5"]


def test_curves_against_seconds_and_passes(made_up):
    seconds, passes = plot_method_training(made_up).axes
    assert (seconds.get_xlabel(), passes.get_xlabel()) == ("seconds", "passes over the data")
    for axes, places in ((seconds, [0.1, 0.2]), (passes, [1, 2])):
        for line in axes.lines:
            np.testing.assert_allclose(line.get_xdata(), places)
            np.testing.assert_allclose(line.get_ydata(), [-20, -11])
        assert len(axes.collections) == 2  # bands


def test_responsibilities_are_the_guides_or_exact(faithful):
    x = faithful.train
    exact, amortized = GMM(2, 2), GMM(2, 2, amortized=True)
    for pair in (exact, amortized):
        pair.initialize(x, seed=0)
    torch.testing.assert_close(responsibilities(exact, x), exact.posterior(x).probs.detach())
    logits = amortized.encoder((x - amortized.feature_loc) / amortized.feature_scale)
    torch.testing.assert_close(responsibilities(amortized, x), logits.softmax(-1).detach())
    assert responsibilities(PPCA(2, 1), x) is None
    figure = plot_responsibilities({"exact": exact, "guide": amortized}, x, feature_names=faithful.feature_names)
    assert [axes.get_title() for axes in figure.axes] == ["exact", "guide"]
    with pytest.raises(ValueError, match="pairs: 'ppca' is no mixture"):
        plot_responsibilities({"ppca": PPCA(2, 1)}, x)


def test_responsibilities_in_more_dimensions():
    x = pv.data.load("iris").train
    pair = GMM(3, 4)
    pair.initialize(x, seed=0)
    (axes,) = plot_responsibilities({"iris": pair}, x).axes
    assert axes.get_xlabel() == "first principal component"
    assert len(axes.collections) == 1


# Refusals


def test_a_file_in_place_of_the_folder_is_refused(capsys):
    Path("mine.py").write_text("mine")
    message = refusal(capsys, "compare", "gmm", "--epochs", 1, "-o", "mine.py")
    assert "--out: expected a folder for the comparison; mine.py is a file" in message
    assert "--overwrite" not in message


def test_only_a_comparison_is_overwritten(capsys):
    options = ["compare", "ppca", "--epochs", 1, "--num-samples", 5, "-o", "out"]
    other = Path("out")
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert "--out: out exists. Pass --overwrite" in refusal(capsys, *options)
    assert "holds no pyrovae comparison" in refusal(capsys, *options, "--overwrite")
    assert [file.name for file in other.iterdir()] == ["notes.txt"]
    (other / "notes.txt").unlink()
    assert call(*options, "--seeds", 2) == 0
    (other / "notes.txt").write_text("mine")
    (other / "densities.png").write_text("of an earlier comparison")
    assert call(*options, "--overwrite") == 0
    assert {file.name for file in other.iterdir()} == FILES | {"notes.txt"}
    assert len(list((other / "cells").iterdir())) == 2 * 3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["gmm", "--lr", "0"], "--lr: expected a number above 0"),
        (["gmm", "--batch-size", "0"], "--batch-size"),
        (["gmm", "--num-samples", "0"], "--num-samples"),
        (["gmm", "--seeds", "0"], "--seeds: expected a whole number, 1 or more; got 0"),
        (["gmm", "--set", "num_components=300"], "as many data as components; got 272"),
        (["gmm", "--set", "latent_dim=3"], "--set: expected one of num_components.*got 'latent_dim'"),
        (["vae", "iwae", "--set", "latentdim=3"], "--set: .*got 'latentdim'. Did you mean 'latent_dim'"),
        (["gmm", "--data", "iris", "--binarize", "dynamic"], r"binarize: .*\[0, 1\]"),
        (["gmm", "--losses", "Trace_ELB"], "--losses: expected one of closed-form, EM.*Did you mean 'Trace_ELBO'"),
        (["gmm", "--losses", "Trace_ELBO:alpha=1"], "--losses: Trace_ELBO takes K, as in .*got 'alpha=1'"),
        (["gmm", "--losses", "EM:K=3"], "--losses: EM takes no options"),
        (["gmm", "--losses", "RenyiELBO:K=many"], "--losses: expected a whole number in 'RenyiELBO:K=many'"),
        (["gmm", "--losses", "RenyiELBO:alpha=1"], "--losses: 'RenyiELBO:alpha=1': alpha: expected any number but 1"),
        (["gmm", "--losses", "closed-form"], r"--losses: closed-form trains no pair here. gmm: it has"),
        (["gmm", "--losses", "TraceMeanField_ELBO"], "_ELBO trains no pair here. gmm: site 'z'.*pathwise"),
        (
            ["gmm", "vae", "-d", "iris", "--set", "likelihood=normal", "--losses", "EM"],
            r"--losses: expected one that trains vae too. vae: it has no expected_statistics",
        ),
        (["gmm", "gmm"], "PAIR: expected pairs of different names; got gmm, gmm"),
        (["vae", "ppca", "-d", "digits"], r"PAIR: expected likelihoods over.*vae over {0, 1}, ppca over reals"),
        ([], "PAIR: expected names from .*got none"),
        (["--resume", "nothing"], "--resume: expected a folder .*nothing has no comparison.json"),
    ],
)  # fmt: skip
def test_bad_options_write_nothing(capsys, folder, options, match):
    message = refusal(capsys, "compare", *options)
    assert re.search(match, message, re.S), message
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("pairs", "options", "error", "match"),
    [
        (GMM(2, 2), {}, TypeError, "pairs: expected functions that make a pair.*got GMM"),
        ({"a": 3}, {}, TypeError, "pairs: expected functions.*got int"),
        (lambda: 3, {}, TypeError, "pairs: expected functions that make a pyrovae.Pair; one made a int"),
        ({}, {}, ValueError, "pairs: expected one or more; got none"),
        (mixture, {"methods": "EM"}, TypeError, r"methods: expected a list of names; got 'EM'. Write \['EM'\]"),
        (mixture, {"methods": [3]}, TypeError, "methods: expected names such as 'EM'.*got 3"),
        (mixture, {"seeds": 0}, ValueError, "seeds: expected a whole number, 1 or more"),
        (mixture, {"epochs": 1.5}, TypeError, "epochs: expected a whole number"),
        (mixture, {"device": "tpu"}, ValueError, "device: expected"),
        (mixture, {"resume": True}, ValueError, "resume: expected folder= to name the comparison"),
        (mixture, {"test": torch.zeros(3, 5)}, ValueError, "test: expected 2 features"),
        (mixture, {"folder": "no", "resume": True}, FileNotFoundError, "no has no comparison.json"),
    ],
)
def test_bad_arguments_write_nothing(folder, faithful, pairs, options, error, match):
    with pytest.raises(error, match=match) as caught:
        compare(
            pairs, faithful.train, **{"folder": "out"} | ({"folder": None} if "resume" in options else {}) | options
        )
    assert "--" not in str(caught.value)  # the words of the command line
    assert list(folder.iterdir()) == []


def test_grey_pixels_are_named_and_not_printed(capsys):
    message = refusal(capsys, "compare", "vae", "--binarize", "none")
    assert "grey pixels" in message
    assert len(message) < 600


def test_numbers_that_are_not_finite_are_a_note(monkeypatch, faithful):
    def nothing(*args, **options):
        return evaluate(*args, **options).__class__(**vars(evaluate(*args, **options)) | {"log_likelihood": -math.inf})

    evaluate = cells.evaluate
    monkeypatch.setattr(cells, "evaluate", nothing)
    result = compare(mixture, faithful, methods=["EM"])
    assert result.cells[0].log_evidence is None
    assert "log evidence" in result.cells[0].note
