"""A step as a CUDA graph: when it is captured, replayed and captured again, and that it computes the eager numbers.

The first part runs anywhere, on a stand-in for CUDA that has what decides this: capturing runs nothing, and a replay
repeats what was launched with the memory that it was launched on. The second part needs a GPU.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from steps import adam, batches, vae
from test_step_numbers import FIT, GREY, LOSSES, fit_in_two
from torch import Tensor

import pyrovae as pv
from pyrovae.infer import SVI, Trace_ELBO
from pyrovae.infer import svi as svi_module
from pyrovae.infer.cudagraph import WARM_UP, Captured
from pyrovae.models import VAE

pytestmark = pytest.mark.usefixtures("uncompiled")
STEPS = 9


class StandIn:
    """``torch.cuda`` as far as graphs go, counting them."""

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self._capturing: list | None = None
        self.CUDAGraph = lambda: SimpleNamespace(launched=[], replay=None)
        self.Stream = lambda: SimpleNamespace(wait_stream=lambda other: None)
        self.current_stream = self.Stream
        self.stream = nullcontext
        self.set_stream = lambda stream: None

    @contextmanager
    def graph(self, graph: SimpleNamespace, stream: object, capture_error_mode: str) -> Iterator[None]:
        self.captures += 1
        self._capturing = graph.launched
        try:
            yield
        finally:
            self._capturing = None

        def replay() -> None:
            self.replays += 1
            for kernel in graph.launched:
                kernel()

        graph.replay = replay

    def launch(self, kernel: Callable[[], object]) -> None:
        if self._capturing is None:
            kernel()
        else:
            self._capturing.append(kernel)

    def refuse_to_capture(self) -> None:
        if self._capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    for name in ("CUDAGraph", "Stream", "current_stream", "stream", "set_stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(stand_in, name))
    return stand_in


class Run:
    """A step on two tensors, whose kernels read the memory that these have when they are launched."""

    def __init__(self, cuda: StandIn, *, captured: bool) -> None:
        self.cuda = cuda
        self.weights, self.mean = torch.tensor([1.0, -2.0]), torch.zeros(2)
        self.losses: list[Tensor] = []
        capture = Captured(self.step)
        self._call = capture if captured else lambda held, args: self.step(*held, *args)

    def step(self, weights: Tensor, mean: Tensor, x: Tensor) -> Tensor:
        loss, weights, mean = torch.empty(()), weights.detach(), mean.detach()

        def kernel() -> None:
            loss.copy_((x * weights).sum())
            mean.mul_(0.9).add_(x)
            weights.sub_(0.1 * mean)

        self.cuda.launch(kernel)
        return loss

    def __call__(self, act: Callable[[Run], None] = lambda run: None) -> list[float]:
        generator = torch.Generator().manual_seed(0)
        for step in range(STEPS):
            if step == 6:
                act(self)
            x = torch.randn(2, generator=generator)  # elsewhere at each step
            self.losses.append(self._call([self.weights, self.mean], [x]))
        return [*map(float, self.losses), *self.weights.tolist()]


ACTS: dict[str, tuple[Callable[[Run], Any], int]] = {  # and the number of captures
    "nothing": (lambda run: None, 1),
    "weights in place": (lambda run: run.weights.fill_(5.0), 1),
    "weights elsewhere": (lambda run: setattr(run.weights, "data", torch.full((2,), 5.0)), 2),
    "another state": (lambda run: setattr(run, "mean", torch.ones(2)), 2),
}


@pytest.mark.parametrize("name", ACTS)
def test_a_graph_is_captured_again_when_a_tensor_lies_elsewhere(name: str, cuda: StandIn) -> None:
    act, captures = ACTS[name]
    run = Run(cuda, captured=True)
    assert run(act) == Run(cuda, captured=False)(act)
    assert (cuda.captures, cuda.replays) == (captures, STEPS - WARM_UP)
    assert len({loss.data_ptr() for loss in run.losses}) == STEPS  # losses are kept apart


def test_a_capture_that_fails_is_said_once_and_steps_go_on(cuda: StandIn) -> None:
    plain = Run(cuda, captured=False)()

    class Stubborn(Run):
        def step(self, *tensors: Tensor) -> Tensor:
            self.cuda.refuse_to_capture()
            return super().step(*tensors)

    with pytest.warns(RuntimeWarning, match=r"without a CUDA graph: operation not permitted .* capturing$") as warned:
        assert Stubborn(cuda, captured=True)() == plain
    assert len(warned) == 1
    assert (cuda.captures, cuda.replays) == (1, 0)


def test_what_does_not_lie_on_a_gpu_is_named_once_and_a_short_batch_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capture, asked = svi_module._RecordedStep.capture, []
    monkeypatch.setattr(
        svi_module._RecordedStep,
        "capture",
        lambda self, args, **options: (asked.append(len(args[0])), capture(self, args, **options)),
    )
    pair = vae()
    svi = SVI(pair.model, pair.guide, adam(pair), Trace_ELBO(), backend="cudagraph")
    svi.step(batches()[0])
    with pytest.warns(RuntimeWarning, match=r"without a CUDA graph: it needs Adam with capturable=True, and every"):
        svi.step(batches()[1])
    svi.step(batches()[2][:3])
    assert asked == [8]


# On a GPU -----------------------------------------------------------------------------------------------------------


def on_gpu(**options: Any) -> tuple[VAE, torch.optim.Optimizer, Tensor]:
    pair = vae().cuda()
    options = {"lr": torch.tensor(0.01, device="cuda"), "capturable": True} | options
    return pair, torch.optim.Adam(pair.parameters(), **options), batches(12).cuda()


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list:
    """The graphs that were replayed."""
    found: list = []
    replay = torch.cuda.CUDAGraph.replay

    def spy(self: torch.cuda.CUDAGraph) -> None:
        found.append(self)
        replay(self)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", spy)
    return found


def load_state(pair: Any, optim: Any) -> None:
    state = copy.deepcopy(optim.state_dict())
    for each in state["state"].values():
        each["exp_avg"].mul_(3)
    optim.load_state_dict(state)


GPU_ACTS: dict[str, Callable[[Any, Any], Any]] = {
    "nothing": lambda pair, optim: None,
    "rate": lambda pair, optim: optim.param_groups[0]["lr"].fill_(0.1),
    "another rate": lambda pair, optim: optim.param_groups[0].update(lr=torch.tensor(0.1, device="cuda")),
    "state": load_state,
    "weights": lambda pair, optim: pair.load_state_dict({k: v + 0.5 for k, v in pair.state_dict().items()}),
    "moved weights": lambda pair, optim: [setattr(p, "data", p.data + 0.1) for p in pair.parameters()],
}


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("act", "loss", "fused"),
    [
        *((name, "Trace", fused) for name in GPU_ACTS for fused in (False, True)),
        *(pytest.param("nothing", loss, False, marks=pytest.mark.slow) for loss in ("Trace", "Enum-4", "Renyi-4")),
    ],
)
def test_a_captured_step_is_the_eager_one(act: str, loss: str, fused: bool, replays: list) -> None:
    """And compiled, where it is slow."""
    results = []
    for backend in ("eager", "cudagraph"):
        pair, optim, xs = on_gpu(fused=fused)
        svi = SVI(pair.model, pair.guide, optim, LOSSES[loss](), backend=backend, dataset_size=50, checked=True)
        torch.manual_seed(7)
        losses = []
        for step, x in enumerate(xs):
            if step == 8:
                GPU_ACTS[act](pair, optim)
            losses += [svi.step(x), svi.step(x[:3])]  # a short batch is recorded, and not captured
        results.append((torch.stack(losses), pair.state_dict(), optim.state_dict()["state"]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert len(replays) == 12 - WARM_UP


@pytest.mark.cuda
def test_noise_is_fresh_at_every_replay_and_follows_the_seed(replays: list) -> None:
    pair, optim, xs = on_gpu(lr=0.0)
    svi = SVI(pair.model, pair.guide, optim, Trace_ELBO(), backend="cudagraph")
    for x in xs[:6]:
        svi.step(x)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append([float(svi.step(xs[0])) for _ in range(10)])
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 10
    assert len(replays) == 2 + 20


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_captured_step_never_waits_and_losses_are_kept_apart(replays: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svi_module, "FIRST_COMPARISONS", (2,))  # a comparison reads
    pair, optim, xs = on_gpu()
    svi = SVI(pair.model, pair.guide, optim, Trace_ELBO(), backend="cudagraph")
    for x in xs[:6]:
        svi.step(x)
    try:
        torch.cuda.set_sync_debug_mode("error")
        losses = []
        for x in xs[6:]:
            losses.append(svi.step(x))
            optim.param_groups[0]["lr"].fill_(0.001)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(math.isfinite(loss) for loss in losses)
    assert len({float(loss) for loss in losses}) == 6
    assert len(replays) == 2 + 6


@pytest.mark.cuda
def test_a_resumed_captured_fit_is_bit_identical(tmp_path: Path, replays: list) -> None:
    options = {"binarize": True, "device": "cuda", "backend": "cudagraph"}
    whole = vae()
    pv.fit(whole, GREY, **FIT, **options)
    assert replays
    pair, _ = fit_in_two(tmp_path / "run", GREY, 6, **options)
    torch.testing.assert_close(pair.state_dict(), whole.state_dict(), rtol=0, atol=0)
