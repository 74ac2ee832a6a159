"""Benchmarks run, name peers that are missing, and time equal work. No test asserts a speed: noise would decide."""

import json
import re
import subprocess
import sys
from importlib.metadata import version

import peers as bench
import pytest
import run
import torch


def run_script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    run.main()


def test_bench_prints_ratios_and_writes_json(tmp_path, capsys, monkeypatch):
    out = tmp_path / "bench.json"
    cases = ["PPCA, faithful", "EM, 20,000 x 2, 5 components"]
    run_script(monkeypatch, *cases, "--repeats", "1", "--device", "cpu", "--out", str(out))
    assert "of stock Pyro" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert [result["case"] for result in record["results"]] == cases
    assert record["machine"]["torch"] == version("torch")
    for result in record["results"]:
        for peer, ratio in result["ratios"].items():
            assert ratio == result["milliseconds"]["pyrovae"] / result["milliseconds"][peer]


def test_the_command_line_runs_the_script():
    shown = subprocess.run([sys.executable, "-m", "pyrovae", "bench", "--list"], capture_output=True, text=True)
    assert shown.stdout.splitlines() == list(bench.CASES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["PPCA, faithfull"], "CASE: .*Did you mean 'PPCA, faithful'"),
        (["--repeats", "0"], "--repeats: .*got 0"),
        (["--threads", "0"], "--threads: .*got 0"),
        (["--out", "figures.csv"], "--out: expected a .json file"),
        (["--out", "no/figures.json"], "--out: expected a .json file in a folder that exists; got no/figures.json"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, *arguments)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_missing_peer_is_named(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    tiny = {"num_particles": 1, "batch": 2, "latent_dims": (2,), "hidden_dims": ((3,),)}
    runs, missing = bench._autoencoder(torch.device("cpu"), **tiny)
    assert missing == ("NumPyro",)
    shown = str(bench.Result("tiny", tiny, {"pyrovae": 1.0, "stock Pyro": 2.0}, missing=missing))
    assert shown.endswith("  not installed: NumPyro (pip install -c constraints.txt '.[bench]')")
    assert "not installed" not in str(bench.Result("tiny", tiny, {"pyrovae": 1.0}))
    assert {"pyrovae", "stock Pyro", "PyTorch by hand, eager", "floor: matrix products alone"} <= set(runs)
    for contender in runs.values():
        contender(2)


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("layers", [bench._ONE, bench._TWO], ids=["one layer", "two layers"])
def test_the_loss_by_hand_equals_that_of_the_project(num_particles, layers, monkeypatch):
    """The noise is equal, too. A contender that does other work would prove nothing."""
    seen = []

    torch.manual_seed(0)
    pair = bench.pv.models.IWAE(784, layers["latent_dims"], hidden_dims=layers["hidden_dims"])
    x = (torch.rand(4, 784) < 0.2).float()
    monkeypatch.setattr(torch, "compile", lambda function: seen.append(function) or function)
    bench._torch_by_hand(pair, x, num_particles, compiled=True)
    ours = bench.Trace_ELBO() if num_particles == 1 else bench.RenyiELBO(0, num_particles)
    ours.loss(pair.model, pair.guide, x)  # the look at the structure
    torch.manual_seed(1)
    expected = ours.loss(pair.model, pair.guide, x)
    torch.manual_seed(1)
    torch.testing.assert_close(seen[0](x).detach(), expected, rtol=1e-5, atol=1e-3)
