"""Random numbers drawn faster: torch's own, from the same state, which becomes the same."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pyrovae.infer import noise
from pyrovae.infer.program import Program
from pyrovae.infer.rewrite import FEWEST_NUMBERS, rewritten

COUNT = FEWEST_NUMBERS + 17
ANGLE = 3e-6  # torch rounds 2 pi u to float32 (2.4e-7), and the radius is below 6

needs_compiler = pytest.mark.skipif(not noise.can_draw(), reason="needs a C++ compiler")


def state() -> Tensor:
    return torch.default_generator.get_state()


def drawn_by(function: Callable[..., Tensor], *args: object, start: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers, and the state after them."""
    torch.default_generator.set_state(start)
    return function(*args), state()


@pytest.fixture(params=[0, 1, 300, 623, 624, 625], ids=lambda skipped: f"{skipped} skipped")
def start(request: pytest.FixtureRequest) -> Tensor:
    """A state from which some words have been taken: a block has 624."""
    torch.manual_seed(3)
    torch.rand(request.param)
    return state()


@pytest.fixture
def forgetful() -> Iterator[None]:
    """``can_draw`` finds out anew, now and after the test."""
    noise._found_to_draw.cache_clear()
    yield
    noise._found_to_draw.cache_clear()


@needs_compiler
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 623, 624, 625, 5001])
def test_numbers_and_states_are_torchs(start: Tensor, count: int) -> None:
    theirs, end = drawn_by(torch.rand, count, start=start)
    ours, own_end = drawn_by(noise.uniforms, count, start=start)
    assert torch.equal(ours, theirs)
    assert torch.equal(own_end, end)

    theirs, end = drawn_by(torch.randn, count, start=start)
    ours, own_end = drawn_by(noise.normals, count, start=start)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ANGLE)
    assert torch.equal(own_end, end)

    probs = torch.linspace(0, 1, count)
    theirs, end = drawn_by(torch.bernoulli, probs, start=start)
    ours, own_end = drawn_by(noise.bernoullis, probs, start=start)
    assert torch.equal(ours, theirs)
    assert torch.equal(own_end, end)


@needs_compiler
def test_normal_numbers_are_box_and_mullers() -> None:
    torch.manual_seed(0)
    start = state()
    u = torch.rand(2_000_000).double().reshape(-1, 2, 8)
    radius, angle = (-2 * torch.log1p(-u[:, 0])).sqrt(), 2 * math.pi * u[:, 1]
    exact = torch.stack([radius * angle.cos(), radius * angle.sin()], 1).flatten()
    z, _ = drawn_by(noise.normals, 2_000_000, start=start)
    assert (z.double() - exact).abs().max() < 1e-6
    # Far from the angle's zeros the error is relative.
    big = exact.abs() > 1
    assert ((z.double() - exact) / exact)[big].abs().max() < 5e-7


@needs_compiler
def test_the_default_dtype_and_device_do_not_matter() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert noise.uniforms(100).dtype == noise.normals(100).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@needs_compiler
@pytest.mark.parametrize("bad", [-0.1, 1.5, math.nan])
def test_a_bad_probability_is_torchs_error(bad: float) -> None:
    probs = torch.full((COUNT,), 0.5)
    probs[7] = bad
    with pytest.raises(RuntimeError) as theirs:
        torch.bernoulli(probs)
    with pytest.raises(RuntimeError) as ours:
        noise.bernoullis(probs)
    assert str(ours.value) == str(theirs.value)


@needs_compiler
@pytest.mark.usefixtures("forgetful")
def test_fake_tensors_have_no_numbers() -> None:
    with FakeTensorMode():
        assert not noise.can_draw()
        assert noise.uniforms(COUNT).shape == (COUNT,)


@needs_compiler
def test_threads_draw_one_after_another(forgetful: None) -> None:
    """What many threads draw at once is what one thread draws, the first time too."""
    torch.manual_seed(0)
    expected = {tuple(block[:4].tolist()) for block in torch.rand(40 * COUNT).split(COUNT)}
    torch.manual_seed(0)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            blocks = list(pool.map(noise.uniforms, [COUNT] * 40))
    finally:
        sys.setswitchinterval(interval)
    assert {tuple(block[:4].tolist()) for block in blocks} == expected


# In programs ----------------------------------------------------------------------------------------------------


class Draws(nn.Module):
    """Everything that is drawn faster, among what is not."""

    def forward(self, probs: Tensor) -> tuple[Tensor, ...]:
        like = torch.zeros(COUNT)
        return (
            torch.randn(3),
            torch.randn(COUNT) + torch.randn(COUNT),
            torch.empty(COUNT).normal_(),
            torch.rand(2),
            torch.rand(COUNT) * torch.rand_like(like),
            torch.randn_like(like),
            torch.empty(COUNT).uniform_(),
            torch.bernoulli(probs),
            torch.empty(COUNT).normal_(1, 2),
            torch.empty(COUNT).uniform_(2, 3),
            torch.empty(100, COUNT).t().normal_(),
            torch.randn(COUNT, dtype=torch.float64),
            torch.randn(5),
        )


OURS = {noise.uniforms, noise.normals, noise.bernoullis}


def fast_draws(program: Program, *args: Tensor) -> int:
    graph = rewritten(program.graph, [*program.inputs, *args])
    return sum(node.target in OURS for node in graph.graph.nodes)


@needs_compiler
def test_a_compiled_program_draws_what_eager_code_draws() -> None:
    torch.manual_seed(0)
    probs = torch.rand(COUNT)
    draws = Draws()
    program = Program(draws.forward, (probs,))
    assert fast_draws(program, probs) == 8
    program.compile((probs,))
    assert program.is_compiled
    for seed in (0, 1):
        torch.manual_seed(seed)
        theirs, end = draws(probs), state()
        torch.manual_seed(seed)
        for a, b in zip(program(probs), theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2 * ANGLE)
        assert torch.equal(state(), end)


@pytest.mark.usefixtures("forgetful")
def test_without_a_compiler_torch_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise OSError("no compiler")

    monkeypatch.setattr(noise, "_compiled", none)
    assert not noise.can_draw()
    probs = torch.rand(COUNT)
    start = state()
    # The operators are there: a program from the disk cache may have them.
    for ours, theirs, argument in (
        (noise.uniforms, torch.rand, COUNT),
        (noise.normals, torch.randn, COUNT),
        (noise.bernoullis, torch.bernoulli, probs),
    ):
        expected, end = drawn_by(theirs, argument, start=start)
        found, own_end = drawn_by(ours, argument, start=start)
        assert torch.equal(found, expected)
        assert torch.equal(own_end, end)
    assert fast_draws(Program(Draws().forward, (probs,)), probs) == 0


@needs_compiler
@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("name", ["uniforms", "normals", "bernoullis"])
def test_a_torch_that_draws_otherwise_is_left_to_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    true = noise._draw

    def draw(asked: str, out: Tensor, *inputs: Tensor) -> bool:
        drawn = true(asked, out, *inputs)
        if asked == name:
            out[-1] = 1 - out[-1]
        return drawn

    monkeypatch.setattr(noise, "_draw", draw)
    before = state()
    assert not noise.can_draw()
    assert torch.equal(state(), before)
