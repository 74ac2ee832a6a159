"""evaluate(also=...): what applies to each kind of pair, what is left out and why, and that nothing else changes."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import random
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import pyrovae as pv
from pyrovae.evaluation import ALSO, NotApplicable, evaluate, full_evaluation
from pyrovae.evaluation.scores import importance_scores, title_of

SMALL = {
    "collapse": {"num_samples": 2},
    "kl_decomposition": {"num_samples": 2},
    "inference_gaps": {"num_samples": 20, "num_steps": 8, "num_particles": 2},
    "annealed_evidence": {"num_temperatures": 3, "num_chains": 3, "num_leapfrog": 1},
    "bidirectional_evidence": {"num_data": 4, "num_temperatures": 3, "num_chains": 3, "num_leapfrog": 1},
    "simulation_based_calibration": {"num_simulations": 20, "num_draws": 9},
    "posterior_predictive_check": {"num_replicates": 10},
    "mixture_scores": {},
}
N, D = 12, 4


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Replace the functions by themselves with few samples and steps."""
    assert SMALL.keys() == ALSO.keys()
    for name, settings in SMALL.items():
        function, most = ALSO[name]
        monkeypatch.setitem(full_evaluation.ALSO, name, (partial(function, **settings), most))


class Own(pv.Pair):
    """A pair of a user: two latents, one of them positive, and a guide of the second that depends on the first."""

    def __init__(self, data_dim: int) -> None:
        super().__init__()
        self.decoder = nn.Linear(3, data_dim)
        self.encoder = nn.Linear(data_dim, 2)

    def model(self, x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            b = pyro.sample("b", dist.LogNormal(x.new_zeros(1), 0.5).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(torch.cat([a, b], -1)), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(self.encoder(x), 0.9).to_event(1))
            pyro.sample("b", dist.LogNormal(0.1 * a[..., :1], 0.5).to_event(1))


class GlobalMean(pv.Pair):
    """One latent for all the data."""

    def __init__(self, data_dim: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(data_dim))

    def model(self, x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros_like(self.loc), 3.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample("mu", dist.Normal(self.loc, 0.3).to_event(1))


def functions() -> pv.FunctionPair:
    def model(x):
        weight = pyro.param("weight", torch.ones(D))
        noise = pyro.param("noise", torch.tensor(0.7), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * weight, noise).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.2 * x.sum(-1, keepdim=True), 0.5).to_event(1))

    return pv.FunctionPair(model, guide)


WITHOUT = {
    "vae": {"mixture_scores"},
    "iwae": {"mixture_scores"},
    "ppca": {"mixture_scores"},
    "functions": {"mixture_scores"},
    "own": {"mixture_scores"},
    "gmm": {"kl_decomposition", "inference_gaps", "annealed_evidence", "bidirectional_evidence"},
    "amortized gmm": {"annealed_evidence", "bidirectional_evidence"},
    "global": set(ALSO) - {"posterior_predictive_check"},
}
"""Quantities that do not apply, by pair."""


def build(name: str) -> tuple[pv.Pair, Tensor]:
    x = torch.randn(N, D)
    return {
        "vae": lambda: (pv.models.VAE(D, 2, hidden_dims=(5,)), torch.rand(N, D).round()),
        "iwae": lambda: (pv.models.IWAE(D, (2, 2), hidden_dims=((5,), (5,))), torch.rand(N, D).round()),
        "ppca": lambda: (pv.models.PPCA(D, 2), x),
        "functions": lambda: (functions(), x),
        "own": lambda: (Own(D), x),
        "gmm": lambda: (pv.models.GMM(2, D), x),
        "amortized gmm": lambda: (pv.models.GMM(2, D, amortized=True), x),
        "global": lambda: (GlobalMean(D), x),
    }[name]()


def run(pair: pv.Pair, x: Tensor, **options):
    return evaluate(pair, x, **{"num_samples": 30, "device": "cpu", "progress": False} | options)


CASES: dict[str, tuple] = {}


@pytest.fixture(params=WITHOUT)
def case(request, small):
    """Return name, pair, data, and all its scores."""
    if request.param not in CASES:
        pair, x = build(request.param)
        labels = torch.arange(N) % 2
        CASES[request.param] = request.param, pair, x, labels, run(pair, x, also="all", labels=labels, seed=3)
    return CASES[request.param]


def plain(value) -> bool:
    """Return whether a value consists of JSON's own types alone."""
    if isinstance(value, dict):
        return all(type(key) is str and plain(one) for key, one in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or type(value) in (str, int, float, bool)


# All of it, for every kind of pair


def test_every_quantity_is_measured_or_named_as_left_out(case):
    name, pair, _, _, scores = case
    assert set(scores.left_out) == WITHOUT[name]
    assert set(scores.also) == set(ALSO) - WITHOUT[name]
    for reason in scores.left_out.values():
        assert type(pair).__name__ in reason
        assert reason.endswith(".")


def test_each_result_is_that_of_its_own_function(case):
    _, pair, x, labels, scores = case
    for name, result in scores.also.items():
        data = {"data_dim": D} if name in full_evaluation.OF_THE_MODEL else {"x": x}
        more = {"labels": labels} if name == "mixture_scores" else {}
        alone = ALSO[name][0](pair, **data, **more, device="cpu", seed=3)
        by_importance = {}
        if name == "annealed_evidence":
            by_importance["by_importance"] = pytest.approx(float(scores.log_evidence_per_datum.mean()))
        assert result.to_dict() == alone.to_dict() | by_importance, name
    base = importance_scores(pair, x, num_samples=30, device="cpu", seed=3)
    assert dataclasses.replace(scores, left_out={}) == base  # == leaves ``also`` out
    for name in scores.left_out:
        with pytest.raises(NotApplicable):
            ALSO[name][0](pair, **({"data_dim": D} if name in full_evaluation.OF_THE_MODEL else {"x": x}), device="cpu")


def test_printed_scores_hold_every_part(case):
    *_, scores = case
    text = repr(scores)
    for name, result in scores.also.items():
        assert f"{title_of(name)}: {result!r}" in text
    for reason in scores.left_out.values():
        assert f": {reason}" in text
    for name, value, remark in scores.rows():
        assert any(line.split() == f"{name} {value} {remark}".split() for line in text.splitlines())


def test_scores_and_all_their_parts_become_json(case):
    *_, scores = case
    written = scores.to_dict()
    assert plain(written)
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    assert set(written["also"]) == set(scores.also)
    assert written["left_out"] == scores.left_out


def test_pair_and_random_state_are_left_as_they_were(case):
    _, pair, x, labels, first = case
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    states = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    torch.manual_seed(99)
    state, settings = torch.get_rng_state(), pyro.settings.get()
    again = run(pair, x, also="all", labels=labels, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], states[0])  # noqa: NPY002
    assert random.getstate() == states[1]
    assert pyro.settings.get() == settings
    assert not dict(pyro.get_param_store().items())
    assert all(torch.equal(value, before[name]) for name, value in pair.state_dict().items())
    assert again.to_dict() == first.to_dict()  # the same seed, whatever the caller's


# Choices


def test_nothing_more_is_measured_unless_asked():
    pair, x = build("vae")
    for scores in (run(pair, x), run(pair, x, also=()), run(pair, x, also=[])):
        assert (scores.also, scores.left_out) == ({}, {})
        assert scores == importance_scores(pair, x, num_samples=30, device="cpu")
        assert repr(scores) == repr(importance_scores(pair, x, num_samples=30, device="cpu"))


@pytest.mark.parametrize("also", ["collapse", ["collapse"], ("collapse", "collapse")])
def test_one_name_measures_that_quantity_alone(also):
    pair, x = build("vae")
    scores = run(pair, x, also=also)
    assert (list(scores.also), scores.left_out) == (["collapse"], {})


def test_all_among_names_means_all_in_their_order():
    pair, x = build("vae")
    assert list(run(pair, x, also=["collapse", "all"]).also) == [name for name in ALSO if name != "mixture_scores"]


def test_the_seed_reaches_every_quantity():
    pair, x = build("vae")
    one, two = (run(pair, x, also="kl_decomposition", seed=seed) for seed in (0, 1))
    assert one.log_evidence != two.log_evidence
    assert one.also["kl_decomposition"].kl != two.also["kl_decomposition"].kl


@pytest.mark.parametrize("name", ["inference_gaps", "annealed_evidence"])
def test_costly_quantities_take_a_part_of_the_data(monkeypatch, name):
    function, most = ALSO[name]
    assert most == {"inference_gaps": 500, "annealed_evidence": 100}[name]
    monkeypatch.setitem(full_evaluation.ALSO, name, (function, 5))
    pair, x = build("ppca")
    scores = run(pair, x, also=name, seed=2)
    chosen = x[torch.randperm(N, generator=torch.Generator().manual_seed(2))[:5]]
    assert scores.num_data == N
    assert scores.also[name].num_data == 5
    alone = function(pair, chosen, device="cpu", seed=2).to_dict()
    if name == "annealed_evidence":  # beside the guide's estimate for the same data
        alone["by_importance"] = pytest.approx(pair.log_prob(chosen).mean().item(), abs=0.5)
    assert scores.also[name].to_dict() == alone


def test_grey_pixels_are_drawn_for_every_quantity():
    pair, _ = build("vae")
    scores = run(pair, torch.rand(N, D), also="all", binarize=True)
    assert len(scores.also) == len(ALSO) - 1


def test_labels_reach_the_mixture_and_only_it():
    pair, x = build("gmm")
    found = run(pair, x, also=["mixture_scores", "collapse"], labels=["a", "b"] * (N // 2)).also["mixture_scores"]
    assert found.accuracy is not None
    assert run(pair, x, also="mixture_scores").also["mixture_scores"].accuracy is None


def test_one_datum_leaves_out_what_needs_two():
    pair, x = build("own")
    scores = run(pair, x[:1], also="all")
    assert set(scores.left_out) == {"collapse", "kl_decomposition", "mixture_scores"}
    assert "two data" in scores.left_out["collapse"]
    json.dumps(scores.to_dict(), allow_nan=False)


def test_arrays_and_lists_are_taken_as_data():
    pair, x = build("ppca")
    also = [name for name in ALSO if "evidence" not in name]
    assert run(pair, x.numpy(), also=also).to_dict() == run(pair, x.tolist(), also=also).to_dict()


# JSON has no infinity


def test_infinities_become_none():
    pair, x = build("ppca")
    scores = run(pair, x, also="posterior_predictive_check")
    check = scores.also["posterior_predictive_check"]
    strange = dataclasses.replace(
        scores,
        log_evidence=-math.inf,
        log_evidence_stderr=math.nan,
        bits_per_dim=math.inf,
        kl_per_dimension={"z": [1.0, math.inf]},
        also={"posterior_predictive_check": dataclasses.replace(check, num_data=math.inf)},
    )
    written = json.loads(json.dumps(strange.to_dict(), allow_nan=False))
    assert [written[name] for name in ("log_evidence", "log_evidence_stderr", "bits_per_dim")] == [None] * 3
    assert written["kl_per_dimension"] == {"z": [1.0, None]}
    assert written["also"]["posterior_predictive_check"]["num_data"] is None
    assert written["elbo"] == scores.elbo


def test_exact_guide_has_no_tail_and_becomes_json():
    pair, x = build("ppca")
    with torch.no_grad():
        pair.weight.zero_()  # z plays no part, and the posterior is the prior
    pair.match_guide()
    scores = run(pair, x, also="all")
    assert scores.guide is not None
    assert scores.guide.num_no_tail == N
    json.dumps(scores.to_dict(), allow_nan=False)


# Mistakes

MISTAKES = {
    "nearest name": ({"also": "colapse"}, ValueError, r"also: expected one of all, collapse.*Did you mean 'collapse'"),
    "one of several": ({"also": ["collapse", "gaps"]}, ValueError, r"also: .*'gaps'. Did you mean .*'inference_gaps'"),
    "too few labels": ({"labels": [0, 1]}, ValueError, rf"labels: expected shape .{N},., one a datum; got .2,."),
    "too many labels": ({"labels": [0] * (N + 1)}, ValueError, rf"labels: .*{N},.*; got .{N + 1},."),
    "labels that are no classes": ({"labels": torch.zeros(N)}, TypeError, r"labels: expected whole numbers or names"),
    "samples": ({"num_samples": 0}, ValueError, r"num_samples: expected a whole number, 1 or more; got 0"),
    "device": ({"device": "gpu"}, ValueError, r"device: expected 'auto', 'cpu' or 'cuda'"),
    "data": ({"x": torch.zeros(3, D + 1)}, ValueError, rf"x: expected {D} features"),
    "a data set": ({"x": pv.data.load("iris")}, TypeError, r"x: expected a tensor of rows; got a data set"),
    "words": ({"x": ["a"], "also": "all"}, TypeError, r"x: expected a floating-point tensor"),
    "no pair": ({"pair": pv.models.VAE}, TypeError, r"pair: expected an instance; got the class VAE"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused_before_work_starts(monkeypatch, name):
    changed, error, match = MISTAKES[name]
    monkeypatch.setattr(pv.models.GMM, "log_prob", lambda *_: pytest.fail("work started"))
    pair, x = build("gmm")
    arguments = {"pair": pair, "x": x} | changed
    with pytest.raises(error, match=match):
        run(**arguments)


def test_every_name_is_public_and_documented():
    public = importlib.import_module("pyrovae.evaluation")
    for name, (function, _) in ALSO.items():
        assert function.func is getattr(public, name)  # a partial, here
        assert name in public.__all__
