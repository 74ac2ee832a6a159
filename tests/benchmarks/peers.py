"""Compare speed with peers, side by side: each repeat times every contender in turn, and ratios are of medians.

Contenders do the same work: one SVI step (loss, gradient, Adam) of the same network on the same batch, or one EM
iteration from the same start. Peers that are not installed are left out and named.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

import pyrovae as pv
from pyrovae.infer import SVI, RenyiELBO, Trace_ELBO
from pyrovae.infer.lowering import is_faster_in_onednn, onednn_mm
from pyrovae.pair import Pair

__all__ = ["CASES", "Result", "run_cases"]

Run = Callable[[int], object]
"""Contender: a function that takes a number of steps and returns when they are done."""


@dataclass(frozen=True)
class Result:
    """Milliseconds a step, medians over repeats, by contender."""

    case: str
    shape: dict[str, Any]
    milliseconds: dict[str, float]
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Least and greatest time over repeats, by contender."""
    missing: tuple[str, ...] = ()

    def ratios(self) -> dict[str, float]:
        """Return the project's time over that of each peer. Below 1 the project is faster."""
        own = self.milliseconds[OWN]
        return {name: own / value for name, value in self.milliseconds.items() if name != OWN}

    def __str__(self) -> str:
        lines = [f"{self.case}: pyrovae {self.milliseconds[OWN]:.3f} ms a step"]
        for name, ratio in self.ratios().items():
            lines.append(f"  {ratio:6.2f} of {name} ({self.milliseconds[name]:.3f} ms)")
        if self.missing:
            lines.append(f"  not installed: {', '.join(self.missing)} ({HOW_TO_INSTALL})")
        return "\n".join(lines)


OWN = "pyrovae"
HOW_TO_INSTALL = "pip install -c constraints.txt '.[bench]'"


def run_cases(
    names: list[str] | None = None,
    *,
    repeats: int = 7,
    seconds: float = 0.3,
    device: str = "cpu",
    out: Path | None = None,
) -> Iterator[Result]:
    """Time the named cases (all of them by default) and yield each result; with ``out``, write them as JSON.

    Each contender first runs untimed, then ``repeats`` times in turn with the others for about ``seconds``.
    """
    results = []
    for name in names or list(CASES):
        shape, make = CASES[name]
        runs, missing = make(torch.device(device), **shape)
        result = Result(name, shape, *_time(runs, repeats, seconds, device), missing)
        results.append(result)
        yield result
        if out is not None:
            record = {"machine": machine(device), "results": [vars(r) | {"ratios": r.ratios()} for r in results]}
            out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def machine(device: str) -> dict[str, Any]:
    """Return what the figures were taken on: processor, GPU, versions."""
    found = {"processor": processor(), "threads": torch.get_num_threads(), "python": platform.python_version()}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    for package in ("pyrovae", "torch", "pyro-ppl", "numpyro", "jax", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _time(
    runs: dict[str, Run], repeats: int, seconds: float, device: str
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    def elapsed(run: Run, steps: int) -> float:
        start = time.perf_counter()
        run(steps)
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    steps = {}
    for name, run in runs.items():
        unit = getattr(run, "unit", 1)  # a scan runs whole epochs
        few = 5 if unit == 1 else unit
        run(2 * few)  # first steps compile, and compare what they have compiled
        steps[name] = unit * max(1, max(10, min(2000, int(seconds / elapsed(run, few)))) // unit)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(1e3 * elapsed(run, steps[name]))
    return (
        {name: statistics.median(values) for name, values in times.items()},
        {name: (min(values), max(values)) for name, values in times.items()},
    )


# Pyro and the project ---------------------------------------------------------------------------------------


def _repeat(step: Callable[[], object]) -> Run:
    def run(steps: int) -> None:
        for _ in range(steps):
            step()

    return run


def _unvalidated(run: Run) -> Run:
    def without(steps: int) -> None:
        with pyro.validation_enabled(False):
            run(steps)

    return without


def _pairs(make: Callable[[], Pair], x: Tensor, loss: Callable[[], Any], stock: Callable[[], Any]) -> dict[str, Run]:
    """Return the project, compiled and eager, and stock Pyro, on copies of one pair."""
    on_gpu = x.is_cuda

    def svi(backend: str) -> Run:
        pair = make().to(x.device)
        rate = torch.tensor(1e-3, device=x.device) if on_gpu else 1e-3  # a CUDA graph reads it from the device
        adam = torch.optim.Adam(pair.parameters(), lr=rate, fused=True, capturable=on_gpu)
        program = SVI(pair.model, pair.guide, adam, loss(), backend=backend)

        return _unvalidated(_repeat(lambda: program.step(x)))

    def pyro_itself() -> Run:
        pair = make().to(x.device)
        program = pyro.infer.SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-3}), stock())  # type: ignore[attr-defined]

        return _unvalidated(_repeat(lambda: program.step(x)))

    return {
        OWN: svi("cudagraph" if on_gpu else "compiled"),
        "pyrovae, eager": svi("eager"),
        "stock Pyro": pyro_itself(),
    }


# Importance-weighted autoencoders -----------------------------------------------------------------------------


def _autoencoder(
    device: torch.device, num_particles: int, batch: int, latent_dims: tuple[int, ...], hidden_dims: tuple
) -> tuple[dict[str, Run], tuple[str, ...]]:
    x = (torch.rand(batch, 784, generator=torch.Generator().manual_seed(0)) < 0.13).float().to(device)

    def make() -> Pair:
        torch.manual_seed(0)
        return pv.models.IWAE(784, latent_dims, hidden_dims=hidden_dims)

    def stock() -> Any:
        if num_particles == 1:
            return pyro.infer.Trace_ELBO()
        return pyro.infer.RenyiELBO(0, num_particles, vectorize_particles=True, max_plate_nesting=1)

    def loss() -> Any:
        return Trace_ELBO() if num_particles == 1 else RenyiELBO(0, num_particles)

    runs = _pairs(make, x, loss, stock)
    for name, compiled in (("PyTorch by hand, eager", False), ("PyTorch by hand, compiled", True)):
        runs[name] = _torch_by_hand(make().to(device), x, num_particles, compiled)
    missing: tuple[str, ...] = ()
    if importlib.util.find_spec("numpyro"):
        runs |= _numpyro(x, num_particles, latent_dims, hidden_dims)
    else:
        missing = ("NumPyro",)
    runs["floor: matrix products alone"] = _products(make(), x, num_particles)
    return runs, missing


def _torch_by_hand(pair: Any, x: Tensor, num_particles: int, compiled: bool) -> Run:
    """Return the step as one would write it without Pyro: the same networks, the loss in tensors, fused Adam."""

    def log_normal(z: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
        return (-0.5 * ((z - loc) / log_scale.exp()) ** 2 - log_scale - 0.5 * math.log(2 * math.pi)).sum(-1)

    def loss(x: Tensor) -> Tensor:
        log_w: Any = 0.0
        zs: list[Tensor] = []
        below = x
        for encoder in pair.encoders:
            loc, log_scale = encoder.network(below).chunk(2, -1)
            shape = (num_particles, *loc.shape) if not zs and num_particles > 1 else loc.shape
            below = loc + log_scale.exp() * torch.randn(shape, device=x.device)
            log_w = log_w - log_normal(below, loc, log_scale)
            zs.append(below)
        log_w = log_w + log_normal(zs[-1], torch.zeros_like(zs[-1]), torch.zeros_like(zs[-1]))
        for decoder, low, high in zip(pair.decoders, zs[:-1], zs[1:], strict=True):
            log_w = log_w + log_normal(low, *decoder.network(high).chunk(2, -1))
        logits = nn.Sequential.forward(pair.likelihood, zs[0])
        log_w = log_w - nn.functional.binary_cross_entropy_with_logits(
            logits, x.expand(logits.shape), reduction="none"
        ).sum(-1)
        return -log_w.sum() if num_particles == 1 else -(log_w.logsumexp(0) - math.log(num_particles)).sum()

    adam = torch.optim.Adam(pair.parameters(), lr=1e-3, fused=True)
    objective = torch.compile(loss) if compiled else loss

    def step() -> None:
        adam.zero_grad(set_to_none=True)
        objective(x).backward()
        adam.step()

    return _repeat(step)


def _products(pair: Any, x: Tensor, num_particles: int) -> Run:
    """Return the step's matrix products alone, forward and backward, by the faster library."""
    networks = [e.network for e in pair.encoders] + [d.network for d in pair.decoders] + [pair.likelihood]

    def fastest(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
        layouts = [(x.shape, x.stride()) for x in (left, right)]
        product = onednn_mm if not x.is_cuda and is_faster_in_onednn(*layouts) else torch.mm
        return lambda: product(left, right)

    products: list[Callable[[], Tensor]] = []
    for position, network in enumerate(networks):
        # The first encoder sees the batch once; everything above it, once for each particle.
        rows = len(x) * (1 if position == 0 else num_particles)
        for layer in network:
            if isinstance(layer, nn.Linear):
                weight = layer.weight.detach().to(x.device)
                data = torch.randn(rows, weight.shape[1], device=x.device)
                error = torch.randn(rows, weight.shape[0], device=x.device)
                needs_input_gradient = not (position == 0 and layer is network[0])
                products += [fastest(data, weight.t()), fastest(error.t(), data)]
                if needs_input_gradient:
                    products.append(fastest(error, weight))

    def step() -> None:
        for product in products:
            product()

    return _repeat(step)


def _numpyro(x: Tensor, num_particles: int, latent_dims: tuple, hidden_dims: tuple) -> dict[str, Run]:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # of a GPU it takes three quarters at once
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as ndist

    # The same device and the same precision: its default on a GPU is TF32.
    jax.config.update("jax_platforms", "cuda" if x.is_cuda else "cpu")
    jax.config.update("jax_default_matmul_precision", "highest")
    data = jnp.asarray(x.cpu().numpy())

    def network(name: str, inputs: Any, sizes: list[int]) -> Any:
        for i, (low, high) in enumerate(pairwise(sizes)):
            bound = math.sqrt(6 / (low + high))
            key = jax.random.PRNGKey(i)
            weight = numpyro.param(
                f"{name}.{i}.weight", jax.random.uniform(key, (low, high), minval=-bound, maxval=bound)
            )
            bias = numpyro.param(f"{name}.{i}.bias", jnp.zeros(high))
            inputs = inputs @ weight + bias
            if i < len(sizes) - 2:
                inputs = jnp.tanh(inputs)
        return inputs

    def normal(name: str, inputs: Any, sizes: list[int]) -> Any:
        loc, log_scale = jnp.split(network(name, inputs, [*sizes[:-1], 2 * sizes[-1]]), 2, -1)
        return ndist.Normal(loc, jnp.exp(log_scale)).to_event(1)

    dims = [784, *latent_dims]

    def model(x: Any) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample(f"z{len(latent_dims)}", ndist.Normal(jnp.zeros(latent_dims[-1]), 1.0).to_event(1))
            for i in range(len(latent_dims) - 1, 0, -1):
                z = numpyro.sample(f"z{i}", normal(f"decoder{i}", z, [dims[i + 1], *hidden_dims[i][::-1], dims[i]]))
            logits = network("likelihood", z, [dims[1], *hidden_dims[0][::-1], 784])
            numpyro.sample("x", ndist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Any) -> None:
        with numpyro.plate("data", len(x)):
            z = x
            for i in range(len(latent_dims)):
                z = numpyro.sample(f"z{i + 1}", normal(f"encoder{i}", z, [dims[i], *hidden_dims[i], dims[i + 1]]))

    loss = numpyro.infer.Trace_ELBO() if num_particles == 1 else numpyro.infer.RenyiELBO(0, num_particles)
    svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(1e-3), loss)
    start = svi.init(jax.random.PRNGKey(0), data)
    update = jax.jit(svi.update)

    def per_step(steps: int) -> None:
        state = start
        for _ in range(steps):
            state, _ = update(state, data)
        jax.block_until_ready(state)

    epoch = 100
    scanned = jax.jit(lambda state: jax.lax.scan(lambda s, _: svi.update(s, data), state, None, length=epoch))

    def scan(steps: int) -> None:
        state = start
        for _ in range(max(1, round(steps / epoch))):
            state, _ = scanned(state)
        jax.block_until_ready(state)

    scan.unit = epoch  # type: ignore[attr-defined]
    return {"NumPyro, a step at a time": per_step, "NumPyro, lax.scan": scan}


# Mixtures and PPCA ----------------------------------------------------------------------------------------------


def _small_pair(device: torch.device, pair: str, data: str) -> tuple[dict[str, Run], tuple[str, ...]]:
    x = pv.data.load(data).train.to(device)

    def make() -> Pair:
        torch.manual_seed(0)
        built: Any = (
            pv.models.GMM(2, x.shape[1]) if pair == "gmm" else pv.models.PPCA(x.shape[1], min(2, x.shape[1] - 1))
        )
        built.initialize(x.cpu())
        return built

    def stock() -> Any:
        return pyro.infer.TraceEnum_ELBO(max_plate_nesting=1) if pair == "gmm" else pyro.infer.Trace_ELBO()

    def loss() -> Any:
        return make().default_loss() if pair == "gmm" else Trace_ELBO()

    return _pairs(make, x, loss, stock), ()


def _em(
    device: torch.device, num_data: int, data_dim: int, num_components: int
) -> tuple[dict[str, Run], tuple[str, ...]]:
    """Return an iteration of exact EM in double precision, from the same start, far from convergence."""
    import warnings

    from sklearn.mixture import GaussianMixture

    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(num_components, data_dim, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_components, (num_data,), generator=generator)
    x = centres[labels] + torch.randn(num_data, data_dim, generator=generator, dtype=torch.float64)
    x = x.to(device)
    rows = x.cpu().numpy()
    gmm = pv.models.GMM(num_components, data_dim).double()
    gmm.initialize(x.cpu(), seed=0)
    weights, means = gmm.weights.detach().numpy(), gmm.loc.detach().numpy()
    precisions = torch.linalg.inv(gmm.covariance_matrix).detach().numpy()

    def project(steps: int) -> None:
        pv.fit_em(gmm_copy(), x, max_iter=steps, tol=0.0, initialize=False, device=device.type)

    def gmm_copy() -> Any:
        copy = pv.models.GMM(num_components, data_dim).double()
        copy.load_state_dict(gmm.state_dict())
        return copy

    def sklearn(steps: int) -> None:
        mixture = GaussianMixture(
            num_components,
            max_iter=steps,
            tol=0.0,
            reg_covar=0.0,
            weights_init=weights,
            means_init=means,
            precisions_init=precisions,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mixture.fit(rows)

    return {OWN: project, "scikit-learn": sklearn}, ()


_ONE = {"latent_dims": (50,), "hidden_dims": ((200, 200),)}
_TWO = {"latent_dims": (100, 50), "hidden_dims": ((200, 200), (100, 100))}
CASES: dict[str, tuple[dict[str, Any], Callable]] = {
    "one layer, K=1, batch 20": ({"num_particles": 1, "batch": 20, **_ONE}, _autoencoder),
    "one layer, K=50, batch 20": ({"num_particles": 50, "batch": 20, **_ONE}, _autoencoder),
    "one layer, K=1, batch 100": ({"num_particles": 1, "batch": 100, **_ONE}, _autoencoder),
    "one layer, K=50, batch 100": ({"num_particles": 50, "batch": 100, **_ONE}, _autoencoder),
    "two layers, K=50, batch 20": ({"num_particles": 50, "batch": 20, **_TWO}, _autoencoder),
    "GMM, faithful": ({"pair": "gmm", "data": "faithful"}, _small_pair),
    "GMM, digits": ({"pair": "gmm", "data": "digits"}, _small_pair),
    "PPCA, faithful": ({"pair": "ppca", "data": "faithful"}, _small_pair),
    "PPCA, digits": ({"pair": "ppca", "data": "digits"}, _small_pair),
    "EM, 20,000 x 2, 5 components": ({"num_data": 20_000, "data_dim": 2, "num_components": 5}, _em),
    "EM, 100,000 x 16, 16 components": ({"num_data": 100_000, "data_dim": 16, "num_components": 16}, _em),
    "EM, 60,000 x 50, 10 components": ({"num_data": 60_000, "data_dim": 50, "num_components": 10}, _em),
}
"""The shapes of the results page, by name."""
