"""Pairs own their parameters, save and load them, and refuse foreign files; networks start as their paper says."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints

from pyrovae import FunctionPair, Pair, fit, log_weights
from pyrovae.infer import SVI, RenyiELBO, Trace_ELBO, log_weight_terms
from pyrovae.models import VAE
from pyrovae.networks import (
    MLP,
    BernoulliNetwork,
    ContinuousBernoulliNetwork,
    NormalNetwork,
    NormalSharedScaleNetwork,
)

DIM = 3


# --- pairs as people write them -------------------------------------------------------------------


def model(x: Tensor) -> None:
    loc = pyro.param("decoder.loc", lambda: torch.zeros(DIM))
    noise = pyro.param("noise", torch.tensor(0.8), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1) + loc, noise).to_event(1), obs=x)


def guide(x: Tensor) -> None:
    slope = pyro.param("slope", torch.full((DIM,), 0.1))
    scale = pyro.param("scale", torch.tensor(0.7), constraint=constraints.interval(0.1, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x @ slope, scale))


def with_modules(seed: int = 0) -> FunctionPair:
    """Return the same pair with networks, registered by ``pyro.module``."""
    pyro.set_rng_seed(seed)
    encoder, decoder = NormalNetwork(DIM, (4,), 2), MLP(2, (4,), DIM)

    def model(x: Tensor) -> None:
        net = pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        net = pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", net(x))

    return FunctionPair(model, guide)


class WithPyroParam(Pair):
    """Pair with a ``PyroParam``, an ``nn.Parameter`` and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = PyroParam(torch.tensor(0.8), constraint=constraints.positive)
        self.loc = nn.Parameter(torch.zeros(DIM))
        self.slope = nn.Parameter(torch.full((DIM,), 0.1))
        self.scale = PyroParam(torch.tensor(0.7), constraint=constraints.interval(0.1, 2.0))
        self.register_buffer("center", torch.zeros(DIM))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = z.unsqueeze(-1) + self.loc + self.center
            pyro.sample("x", dist.Normal(loc, self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ self.slope, self.scale))


class WithPyroSample(Pair):
    """Pair with a global latent as a random attribute, beside parameters of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = PyroSample(dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
        self.noise = PyroParam(torch.tensor(0.8), constraint=constraints.positive)
        self.shift_loc, self.log_scale = nn.Parameter(torch.zeros(DIM)), nn.Parameter(torch.zeros(DIM))

    def model(self, x: Tensor) -> None:
        shift = self.shift
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(shift, self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.sample("shift", dist.Normal(self.shift_loc, self.log_scale.exp()).to_event(1))


class WithPyroModules(Pair):
    """Pair whose networks are ``PyroModule``s."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = PyroModule[nn.Linear](DIM, 2)
        self.decoder = PyroModule[nn.Sequential](PyroModule[nn.Linear](2, 4), nn.Tanh(), nn.Linear(4, DIM))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.5).to_event(1))


PAIRS: dict[str, Callable[[], Pair]] = {
    "functions": lambda: FunctionPair(model, guide),
    "functions with modules": with_modules,
    "PyroParam": WithPyroParam,
    "PyroSample": WithPyroSample,
    "PyroModule": WithPyroModules,
    "VAE": lambda: VAE(DIM, 2, hidden_dims=(4,), likelihood="normal"),
}


@pytest.fixture(params=PAIRS.values(), ids=PAIRS)
def make(request: pytest.FixtureRequest) -> Callable[[], Pair]:
    return request.param


def data(n: int = 40) -> Tensor:
    noise = torch.randn(n, DIM, generator=torch.Generator().manual_seed(0))
    return torch.tensor([3.0, -2.0, 1.0]) + noise


def train(pair: Pair, steps: int = 30, lr: float = 0.05) -> None:
    svi = SVI(pair.model, pair.guide, lambda params: torch.optim.Adam(params, lr=lr), Trace_ELBO())
    for _ in range(steps):
        svi.step(data())


def values(pair: Pair) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in pair.state_dict().items()}


def bound(pair: Pair, seed: int = 1) -> Tensor:
    pyro.set_rng_seed(seed)
    return log_weights(pair.model, pair.guide, data(), num_particles=5).detach()


def assert_equal(one: object, other: object) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


# --- every kind of pair --------------------------------------------------------------------------


def test_log_weights_reach_every_parameter(make: Callable) -> None:
    pair, x = make(), data()
    log_w = log_weights(pair.model, pair.guide, x, num_particles=5)
    assert log_w.shape == ((5,) if isinstance(pair, WithPyroSample) else (5, len(x)))
    log_w.sum().backward()
    assert list(pair.parameters())
    for name, p in pair.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("loss", [Trace_ELBO, RenyiELBO, pyro.infer.Trace_ELBO], ids=["ELBO", "Rényi", "Pyro's"])
def test_stock_svi_trains_and_leaves_the_param_store_alone(make: Callable, loss: Callable) -> None:
    pair, x = make(), data()
    svi = pyro.infer.SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.05}), loss())
    first = svi.step(x)
    before = {name: p.detach().clone() for name, p in pair.named_parameters()}
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-5:]) / 5 < first
    for name, p in pair.named_parameters():
        assert not torch.equal(p, before[name]), name
    assert not list(pyro.get_param_store())


def test_our_svi_trains_and_leaves_the_param_store_alone(make: Callable) -> None:
    pair = make()
    log_weights(pair.model, pair.guide, data())  # parameters appear
    before = values(pair)
    train(pair)
    for name, p in pair.named_parameters():
        assert not torch.equal(p, before[name]), name
    assert not list(pyro.get_param_store())


def test_two_instances_share_no_parameters(make: Callable) -> None:
    one, other = make(), make()
    bound(one), bound(other)
    before = values(other)
    train(one)
    assert_equal(values(other), before)
    assert {p.data_ptr() for p in one.parameters()}.isdisjoint(p.data_ptr() for p in other.parameters())


@pytest.mark.parametrize("ran", [True, False], ids=["after a run", "before its first run"])
def test_saved_weights_load_to_the_last_bit(make: Callable, tmp_path: Path, ran: bool) -> None:
    pair, other = make(), make()
    train(pair)
    if ran:
        train(other, steps=3)
    pair.save(tmp_path / "weights.safetensors")
    other.load(tmp_path / "weights.safetensors")
    assert_equal(values(other), values(pair))
    assert_equal(bound(other), bound(pair))
    assert_equal(values(other), values(pair))  # the run changed nothing


def test_a_loaded_pair_trains_as_the_saved_one(make: Callable, tmp_path: Path) -> None:
    pair, other = make(), make()
    train(pair)
    pair.save(tmp_path / "weights.safetensors")
    other.load(tmp_path / "weights.safetensors")
    for p in (pair, other):
        pyro.set_rng_seed(3)
        train(p)
    assert_equal(values(other), values(pair))


def test_a_state_dict_loads_into_another_instance(make: Callable) -> None:
    pair, other = make(), make()
    train(pair)
    other.load_state_dict(pair.state_dict())
    assert_equal(bound(other), bound(pair))


def test_parameters_follow_the_dtype(make: Callable) -> None:
    pair = make()
    bound(pair)
    pair.double()
    assert all(p.dtype == torch.float64 for p in pair.parameters())
    assert log_weights(pair.model, pair.guide, data().double()).isfinite().all()


# --- functions with pyro.param -------------------------------------------------------------------


def test_function_pair_agrees_with_pyro_param() -> None:
    """It trains to the same numbers as the functions alone, whose parameters live in Pyro's store."""
    x, pair = data(), FunctionPair(model, guide)
    results = []
    for m, g in ((pair.model, pair.guide), (model, guide)):
        svi = pyro.infer.SVI(m, g, pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO())
        pyro.set_rng_seed(4)
        results.append(torch.tensor([svi.step(x) for _ in range(20)]))
    torch.testing.assert_close(results[0], results[1])
    store = pyro.get_param_store()
    for name, unconstrained in store.named_parameters():
        torch.testing.assert_close(pair.params[name.replace(".", "/")], unconstrained, check_stride=False)


def test_function_pair_has_no_parameters_before_its_first_run() -> None:
    pair = FunctionPair(model, guide)
    assert not list(pair.parameters())
    log_weights(pair.model, pair.guide, data())
    assert sorted(pair.params) == ["decoder/loc", "noise", "scale", "slope"]


def test_constrained_parameters_stay_inside_their_constraints() -> None:
    pair = FunctionPair(model, guide)
    torch.testing.assert_close(
        log_weight_terms(pair.model, pair.guide, data()).guide_trace.nodes["z"]["fn"].scale[0], torch.tensor(0.7)
    )
    train(pair, steps=50, lr=1.0)
    scale = log_weight_terms(pair.model, pair.guide, data()).guide_trace.nodes["z"]["fn"].scale
    assert ((scale > 0.1) & (scale < 2.0)).all()


def test_parameters_without_a_start_are_refused() -> None:
    def bare(x: Tensor) -> None:
        pyro.param("loc")

    with pytest.raises(ValueError, match=r"pyro.param\('loc'\) has no initial value"):
        FunctionPair(bare, bare).model(data())


def test_function_pair_enumerates_latents_that_its_model_marks() -> None:
    def mixture(x: Tensor) -> None:
        logits, locs = pyro.param("logits", torch.zeros(2)), pyro.param("locs", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[c], 1.0), obs=x)

    pair, x = FunctionPair(mixture, lambda x: None), torch.randn(5)
    expected = torch.logaddexp(dist.Normal(-1.0, 1.0).log_prob(x), dist.Normal(1.0, 1.0).log_prob(x)) - math.log(2)
    torch.testing.assert_close(log_weights(pair.model, pair.guide, x)[0], expected)


def test_a_deep_copy_shares_no_parameters(make: Callable) -> None:
    if make is with_modules:
        pytest.skip("modules that functions close over are the caller's, and shared")
    pair = make()
    train(pair, steps=3)
    other = copy.deepcopy(pair)
    assert_equal(bound(other), bound(pair))
    before = values(other)
    train(pair)
    assert_equal(values(other), before)


# --- random attributes ---------------------------------------------------------------------------


def test_random_attributes_are_sample_sites() -> None:
    pair, x = WithPyroSample(), data()
    terms = log_weight_terms(pair.model, pair.guide, x, num_particles=4)
    shift = terms.guide_trace.nodes["shift"]["value"].squeeze(-2)  # (K, 1, D): the data plate is not around it
    assert shift.shape == (4, DIM)
    expected = (
        dist.Normal(0.0, 1.0).log_prob(shift).sum(-1)
        + dist.Normal(shift.unsqueeze(1), 0.8).log_prob(x).sum((-1, -2))
        - dist.Normal(0.0, 1.0).log_prob(shift).sum(-1)
    )
    torch.testing.assert_close(terms.log_weights, expected)


def test_running_a_pair_leaves_the_settings_of_pyro_as_they_were() -> None:
    for pair in (WithPyroSample(), WithPyroModules()):
        log_weights(pair.model, pair.guide, data())
        assert pyro.settings.get("module_local_params") is False


# --- files ---------------------------------------------------------------------------------------


class Payload:
    """Object that creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


def damaged(pair: Pair, path: Path) -> None:
    pair.save(path)
    path.write_bytes(path.read_bytes()[:-7])


def overwritten(pair: Pair, path: Path) -> None:
    pair.save(path)
    path.write_bytes(b"\xff" * 100)


def foreign(pair: Pair, path: Path) -> None:
    VAE(DIM, 2, hidden_dims=(7,)).save(path)


def partly_foreign(pair: Pair, path: Path) -> None:
    """Write weights of which all but the last fit the pair."""
    from safetensors.torch import save_file

    state = {name: torch.full_like(value, 9.0) for name, value in pair.state_dict().items()}
    last = list(state)[-1]
    save_file({**state, last: torch.zeros(*state[last].shape, 2)}, path)


BAD_FILES: dict[str, tuple[Callable, type[Exception], str]] = {
    "missing": (lambda pair, path: None, FileNotFoundError, "expected a .safetensors file, found none"),
    "a folder": (lambda pair, path: path.mkdir(), FileNotFoundError, "found none"),
    "empty": (lambda pair, path: path.touch(), ValueError, "not a readable"),
    "cut short": (damaged, ValueError, "not a readable"),
    "overwritten": (overwritten, ValueError, "not a readable"),
    "another pair's": (foreign, ValueError, "does not hold the weights of this"),
    "partly another's": (partly_foreign, ValueError, "does not hold the weights of this"),
}


@pytest.mark.parametrize(("write", "error", "match"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused_and_change_nothing(
    make: Callable, tmp_path: Path, write: Callable, error: type[Exception], match: str
) -> None:
    pair, path = make(), tmp_path / "weights.safetensors"
    train(pair, steps=2)
    if write is foreign and isinstance(pair, FunctionPair):
        pytest.skip("covered by its own test")
    before, weights = values(pair), bound(pair)
    write(pair, path)
    with pytest.raises(error, match=match):
        pair.load(path)
    assert_equal(values(pair), before)
    assert_equal(bound(pair), weights)


def test_function_pairs_refuse_the_files_of_others(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    VAE(DIM, 2, hidden_dims=(7,)).save(path)
    pair = FunctionPair(model, guide)
    for _ in range(2):  # before its first run, and after
        with pytest.raises(ValueError, match="does not hold the weights of this FunctionPair"):
            pair.load(path)
        bound(pair)
    with_modules().load_state_dict({})  # nothing yet, nothing asked for
    other = with_modules()
    bound(other)
    other.save(path)
    with pytest.raises(ValueError, match="does not hold the weights"):
        pair.load(path)
    assert sorted(pair.params) == ["decoder/loc", "noise", "scale", "slope"]


def test_load_says_that_a_file_is_a_training_checkpoint(tmp_path: Path) -> None:
    path, x = tmp_path / "c.safetensors", data()
    pair, other = VAE(DIM, 2, hidden_dims=(4,), likelihood="normal"), VAE(DIM, 2, hidden_dims=(4,), likelihood="normal")
    fit(pair, x, epochs=1, checkpoint=path, progress=False)
    before = values(other)
    with pytest.raises(
        ValueError, match=r"^path: .* is a training checkpoint\. .*fit\(.*checkpoint='.*', resume=True\)"
    ):
        other.load(path)
    assert_equal(values(other), before)
    fit(other, x, epochs=1, checkpoint=path, resume=True, progress=False)  # as the message says
    assert_equal(values(other), values(pair))


@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
def test_load_unpickles_nothing(tmp_path: Path, write: Callable) -> None:
    path, trace = tmp_path / "weights.safetensors", tmp_path / "ran"
    with path.open("wb") as file:
        write(Payload(trace), file)
    pair = VAE(DIM, 2, hidden_dims=(4,))
    before = values(pair)
    with pytest.raises(ValueError, match="not a readable"):
        pair.load(path)
    assert not trace.exists()
    assert_equal(values(pair), before)
    with path.open("rb") as file:  # the payload would have run
        torch.load(file, weights_only=False) if write is torch.save else pickle.load(file)
    assert trace.exists()


def test_buffers_are_saved(tmp_path: Path) -> None:
    pair, other = WithPyroParam(), WithPyroParam()
    pair.center.fill_(1.5)
    pair.save(tmp_path / "weights.safetensors")
    other.load(tmp_path / "weights.safetensors")
    assert_equal(other.center, torch.full((DIM,), 1.5))


def test_a_pair_without_a_model_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"Nothing has no model: write `def model\(self, x\)`"):
        type("Nothing", (Pair,), {})().model(data())


# --- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden_dims", [(), (7,), (7, 5)])
def test_mlp_has_the_layers_and_shapes_asked_for(hidden_dims: tuple[int, ...]) -> None:
    network = MLP(4, hidden_dims, 3)
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in linear] == [*hidden_dims, 3]
    assert len(network) == 2 * len(hidden_dims) + 1
    assert network(torch.randn(2, 6, 4)).shape == (2, 6, 3)
    assert network.output is linear[-1]


@pytest.mark.parametrize(
    ("network", "in_dim", "out_dim", "distribution"),
    [
        (NormalNetwork(4, (7,), 3), 4, 3, dist.Normal),
        (NormalSharedScaleNetwork(4, (7,), 3), 4, 3, dist.Normal),
        (BernoulliNetwork(4, (7,), 3), 4, 3, dist.Bernoulli),
        (ContinuousBernoulliNetwork(4, (), 3), 4, 3, dist.ContinuousBernoulli),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_networks_return_distributions(network: nn.Module, in_dim: int, out_dim: int, distribution: type) -> None:
    d = network(torch.randn(2, 6, in_dim))
    assert isinstance(d.base_dist, distribution)
    assert d.batch_shape == (2, 6)
    assert d.event_shape == (out_dim,)


def test_weights_start_glorot_uniform_and_biases_at_zero() -> None:
    """Weights lie within ±√(6 / (in + out)), and their variance is a third of this bound squared."""
    normal = NormalNetwork(300, (200,), 100)
    layers = [
        (layer, math.sqrt(6 / (layer.in_features + layer.out_features)))
        for layer in (*list(MLP(300, (200,), 100))[::2], normal.network[0])
    ]
    # The two heads of a NormalNetwork are one product, and start as two maps would.
    layers.append((normal.network.output, math.sqrt(6 / (200 + 100))))
    for layer, limit in layers:
        weight = layer.weight.detach()
        assert weight.abs().max() <= limit
        assert weight.abs().max() > 0.99 * limit
        ratio, n = weight.square().mean() / (limit**2 / 3), weight.numel()
        assert abs(ratio - 1) < 5 * math.sqrt(0.8 / n)  # var(u²) = 4/45 for u on ±1, so 4/5 of its mean squared
        assert (layer.bias == 0).all()


def test_initialized_decoders_have_the_mean_and_scale_of_the_data() -> None:
    x = torch.rand(500, DIM) * torch.tensor([1.0, 0.5, 0.1])
    z = torch.zeros(1, 2)  # biases alone
    for likelihood, statistic in (("bernoulli", x.mean(0)), ("normal", x.mean(0))):
        pair = VAE(DIM, 2, hidden_dims=(4,), likelihood=likelihood)
        pair.initialize(x)
        torch.testing.assert_close(pair.decoder(z).mean[0], statistic)
    torch.testing.assert_close(pair.decoder(z).base_dist.scale[0], x.std(0, correction=0))


def test_initialized_decoders_are_finite_at_constant_features() -> None:
    x = torch.cat([torch.zeros(50, 1), torch.ones(50, 1), torch.full((50, 1), 0.3)], 1)
    for likelihood in ("bernoulli", "normal", "continuous-bernoulli"):
        pair = VAE(DIM, 2, hidden_dims=(4,), likelihood=likelihood)
        pair.initialize(x)
        rows = x.round() if likelihood == "bernoulli" else x
        assert log_weights(pair.model, pair.guide, rows).isfinite().all()


def test_a_function_pair_of_a_module_is_refused():
    """Its parameters would leak into Pyro's store, or lose their constraints."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0)), 1.0), obs=x)

    with pytest.raises(TypeError, match=r"guide_function: .*AutoNormal.*attribute of a Pair"):
        FunctionPair(model, pyro.infer.autoguide.AutoNormal(model))
