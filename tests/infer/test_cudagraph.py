"""When a step is captured, replayed and captured again: on a stand-in for CUDA that runs anywhere.

Of CUDA graphs it has what decides that: capturing runs nothing, and a replay repeats what was launched with the memory
that it was launched on. What a GPU computes is tested on one, in ``test_backends``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from pyrovae.infer.cudagraph import WARM_UP, Captured, why_not
from pyrovae.infer.update import Update

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
    monkeypatch.setattr(Update, "is_capturable", True)
    for name in ("CUDAGraph", "Stream", "current_stream", "stream", "set_stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(stand_in, name))
    return stand_in


class Run:
    """A step on a parameter, whose kernels read the memory that tensors have when they are launched."""

    def __init__(self, cuda: StandIn, *, captured: bool) -> None:
        self.cuda = cuda
        self.param = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.optim = torch.optim.Adam([self.param], lr=torch.tensor(0.1), foreach=False)
        self.param.grad = torch.ones(2)
        self.optim.step()
        self.losses: list[Tensor] = []
        self._call = Captured(self.step, Update(self.optim, [self.param]), [self.param]) if captured else self.step

    def step(self, x: Tensor) -> Tensor:
        loss, memory = torch.empty(()), self.param.detach()
        group, state = self.optim.param_groups[0], self.optim.state[self.param]
        rate, mean, keep = group["lr"], state["exp_avg"], group["betas"][0]

        def kernel() -> None:
            loss.copy_((x * memory).sum())
            mean.mul_(keep).add_(x)
            memory.sub_(rate * mean)

        self.cuda.launch(kernel)
        return loss

    def __call__(self, act: Callable[[Run], None] = lambda run: None) -> list[float]:
        generator = torch.Generator().manual_seed(0)
        for step in range(STEPS):
            if step == 6:
                act(self)
            self.losses.append(self._call(torch.randn(2, generator=generator)))
        return [*map(float, self.losses), *self.param.tolist()]


def fill_rate(run: Run) -> None:
    run.optim.param_groups[0]["lr"].fill_(1.0)


def replace_rate(run: Run) -> None:
    run.optim.param_groups[0]["lr"] = torch.tensor(1.0)


def other_betas(run: Run) -> None:
    run.optim.param_groups[0]["betas"] = (0.1, 0.5)


def load_state(run: Run) -> None:
    run.optim.load_state_dict(run.optim.state_dict())
    run.optim.state[run.param]["exp_avg"].mul_(3)


def replace_one_moment(run: Run) -> None:
    run.optim.state[run.param]["exp_avg"] = torch.ones(2)


def fill_weights(run: Run) -> None:
    with torch.no_grad():
        run.param.fill_(5.0)


def move_weights(run: Run) -> None:
    run.param.data = torch.full((2,), 5.0)


@pytest.mark.parametrize(
    ("act", "captures"),
    [
        (lambda run: None, 1),
        (fill_rate, 1),
        (fill_weights, 1),
        (replace_rate, 2),
        (other_betas, 2),
        (load_state, 2),
        (replace_one_moment, 2),
        (move_weights, 2),
    ],
)
def test_a_graph_is_captured_again_when_it_would_use_what_is_no_more(
    act: Callable[[Run], None], captures: int, cuda: StandIn
) -> None:
    plain = Run(cuda, captured=False)(act)
    assert Run(cuda, captured=True)(act) == plain
    assert (cuda.captures, cuda.replays) == (captures, STEPS - WARM_UP)


def test_losses_are_kept_apart(cuda: StandIn) -> None:
    run = Run(cuda, captured=True)
    run()
    assert len({loss.data_ptr() for loss in run.losses}) == STEPS


def test_a_capture_that_fails_is_said_once_and_steps_go_on(cuda: StandIn) -> None:
    plain = Run(cuda, captured=False)()

    class Stubborn(Run):
        def step(self, x: Tensor) -> Tensor:
            self.cuda.refuse_to_capture()
            return super().step(x)

    with pytest.warns(RuntimeWarning, match=r"without a CUDA graph: operation not permitted .* capturing$") as warned:
        assert Stubborn(cuda, captured=True)() == plain
    assert len(warned) == 1
    assert (cuda.captures, cuda.replays) == (2, 0)  # the second only ends the first


def test_a_rate_that_a_graph_cannot_read_ends_the_captures(cuda: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a state dict that was saved on a CPU."""

    def load(run: Run) -> None:
        replace_rate(run)
        monkeypatch.setattr(Update, "is_capturable", False)

    plain = Run(cuda, captured=False)(load)
    monkeypatch.setattr(Update, "is_capturable", True)
    assert Run(cuda, captured=True)(load) == plain
    assert (cuda.captures, cuda.replays) == (1, 3)


def test_what_counts_the_steps_is_kept_when_the_parameters_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that was captured with other parameters goes on reading it."""
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    optim = torch.optim.Adam(params, lr=0.1, fused=True)
    update, gradients = Update(optim, params), [torch.ones(2), torch.ones(3)]
    update(params, gradients)  # the optimizer's own step, which makes its state
    added: list[Tensor] = []
    add = torch._foreach_add_
    monkeypatch.setattr(torch, "_foreach_add_", lambda steps, ones: (added.extend(ones), add(steps, ones)))
    for used in (params, params[:1], params):
        update(used, gradients[: len(used)])
    assert len({id(one) for one in added}) == 1
    assert [int(optim.state[p]["step"]) for p in params] == [4, 3]


def test_what_lies_elsewhere_is_not_captured() -> None:
    param = nn.Parameter(torch.zeros(2))
    update = Update(torch.optim.Adam([param]), [param])
    assert why_not([param], update) == "it reads a tensor that does not lie on the GPU"
    assert why_not([], update).startswith("the optimizer reads Python numbers; make it as torch.optim.Adam(")
