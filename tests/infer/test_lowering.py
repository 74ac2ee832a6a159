"""The form of a graph that a CPU runs faster computes the numbers of the plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.fx import GraphModule
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.utils._pytree import tree_leaves

from pyrovae.infer import lowering
from pyrovae.infer.lowering import is_faster_in_onednn, lower, onednn_mm, product_choices, restore_product_choices
from pyrovae.infer.record import Recorded

aten = torch.ops.aten


def lowered(record: Recorded, *args: Tensor) -> GraphModule:
    return lower(record.graph, [*record.inputs, *args])


def calls(graph: GraphModule) -> set:
    return {node.target for node in graph.graph.nodes if node.op == "call_function"}


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Nothing was measured yet."""
    made: dict[str, bool] = {}
    monkeypatch.setattr(lowering, "_choices", made)
    return made


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, choices: dict) -> list:
    """What was measured; oneDNN takes half the time."""
    asked: list = []
    monkeypatch.setattr(lowering, "_seconds_of_products", lambda *layouts: asked.append(layouts) or (1.0, 0.5))
    return asked


# Elementary functions -----------------------------------------------------------------------------------------------


def values() -> Tensor:
    small = torch.logspace(-30, 0, 20_001)
    return torch.cat([torch.linspace(-100, 100, 400_001), torch.linspace(-10, 10, 400_001), small, -small])


def test_tanh_is_as_precise_as_float32() -> None:
    x = values()
    graph = lowered(Recorded(torch.tanh, (x,)), x)
    assert aten.tanh.default not in calls(graph)
    y, exact = graph(x), x.double().tanh()
    assert ((y - exact).abs() <= 4e-7 * exact.abs()).all()
    assert (y.abs() <= 1).all()
    assert torch.equal(graph(-x), -y)
    assert torch.equal(graph(torch.full_like(x, torch.inf)), torch.ones_like(x))
    assert graph(torch.full_like(x, torch.nan)).isnan().all()
    assert not graph(torch.zeros_like(x)).any()


def elementwise(x: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(x, targets, reduction="none")


@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
def test_cross_entropy_is_as_precise_as_torchs(target: float) -> None:
    x = values()
    targets = torch.full_like(x, target)
    graph = lowered(Recorded(elementwise, (x, targets)), x, targets)
    assert aten.binary_cross_entropy_with_logits.default not in calls(graph)
    exact = elementwise(x.double(), targets.double())
    error = (graph(x, targets) - exact).abs()
    assert (error <= 2.5e-7 * x.abs().clamp(min=1)).all()
    assert error.max() <= 1.5 * (elementwise(x, targets) - exact).abs().max()
    if target == 1:  # log(1 + exp(-x)) alone: relative precision however small it is
        tail = (x > 1) & (x < 80)
        assert (error[tail] <= 2e-5 * exact[tail]).all()


def test_cross_entropy_of_extremes_is_torchs() -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, -1e30]).repeat(2)
    targets = torch.tensor([0.0, 1.0]).repeat_interleave(5)
    graph = lowered(Recorded(elementwise, (x, targets)), x, targets)
    torch.testing.assert_close(graph(x, targets), elementwise(x, targets), rtol=0, atol=0, equal_nan=True)


def test_noise_gradients_and_buffers_stay_those_of_the_record() -> None:
    layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    x, targets = torch.randn(16, 4), torch.rand(16, 3).round()
    parameters = list(layers.parameters())

    def function(x: Tensor) -> tuple[Tensor, ...]:
        loss = elementwise(layers(x + torch.randn(16, 4)), targets).sum()
        return loss, *torch.autograd.grad(loss, parameters)

    record = Recorded(function, (x,), [layers])
    before, buffers = torch.get_rng_state(), [each.clone() for each in layers.buffers()]
    graph = lowered(record, x)
    assert torch.equal(torch.get_rng_state(), before)
    expected, moved = record(x), [each.clone() for each in layers.buffers()]
    for buffer, value in zip(layers.buffers(), buffers, strict=True):
        buffer.copy_(value)
    torch.set_rng_state(before)
    with torch.no_grad():
        torch.testing.assert_close(graph(*record.inputs, x), expected)
    torch.testing.assert_close(list(layers.buffers()), moved)
    assert not calls(graph) & {aten.addmm.default, aten.binary_cross_entropy_with_logits.default}


# Indices -----------------------------------------------------------------------------------------


INDEXED: dict[str, Callable[[Tensor, int, Tensor], Tensor]] = {
    "index_select": lambda x, dim, index: x.index_select(dim, index[0]),
    "index_add": lambda x, dim, index: x.index_add(dim, index[0], x.narrow(dim, 0, index.shape[1])),
    "scatter_add": lambda x, dim, index: x.scatter_add(dim, index, 2 * x[:2, :2]),
    "scatter": lambda x, dim, index: torch.zeros(3, 3).scatter(dim, index, 1.0) * x,
}


@pytest.mark.parametrize("name", INDEXED)
@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("transposed", [False, True])
def test_checked_indices_pick_the_same(name: str, dim: int, transposed: bool) -> None:
    x, index = torch.randn(3, 3), torch.tensor([[2, 0], [1, 1]])
    weight = nn.Parameter(torch.randn(3, 3))

    def function(x: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        result = INDEXED[name](weight.mT * x.mT if transposed else weight * x, dim, index)
        return result.detach(), *torch.autograd.grad(result.square().sum(), [weight])

    record = Recorded(function, (x, index))
    results = lowered(record, x, index)(*record.inputs, x, index)
    torch.testing.assert_close(results, function(x, index))
    assert [each.stride() for each in results] == [each.stride() for each in function(x, index)]


@pytest.mark.slow
def test_indices_out_of_bounds_are_errors_when_compiled_too() -> None:
    """To torch's compiler a negative index counts from the end."""

    def function(x: Tensor, *indices: Tensor) -> tuple[Tensor, ...]:
        return tuple(pick(x, 0, index) for pick, index in zip(INDEXED.values(), indices, strict=True))

    x, good = torch.randn(3, 3), [torch.tensor([[2, 0], [1, 1]]) for _ in INDEXED]
    record = Recorded(function, (x, *good))
    record.compile((x, *good))
    assert record.is_compiled
    torch.testing.assert_close(record(x, *good), function(x, *good))
    for which in range(len(INDEXED)):
        for bad in (3, -1, 10**9):
            indices = [index.clone() for index in good]
            indices[which][0, 1] = bad
            for run in (function, record):
                with pytest.raises((RuntimeError, IndexError)):
                    run(x, *indices)


# The library of each product ----------------------------------------------------------------------------------------


def layouts(*tensors: Tensor) -> list:
    return [(x.shape, x.stride()) for x in tensors]


@pytest.mark.parametrize("transpose", [(False, False), (True, False), (False, True), (True, True)])
def test_onednn_multiplies_matrices_of_any_strides(transpose: tuple[bool, bool]) -> None:
    left = torch.randn(7, 5).t() if transpose[0] else torch.randn(5, 7)
    right = torch.randn(3, 7).t() if transpose[1] else torch.randn(7, 3)
    torch.testing.assert_close(onednn_mm(left, right), left @ right)
    torch.library.opcheck(onednn_mm, (left, right))


@pytest.mark.slow
def test_products_go_to_the_faster_library(measured: list) -> None:
    weight, square, x = nn.Parameter(torch.randn(5, 4)), torch.randn(4, 4), torch.randn(6, 4)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        loss = (x @ square @ weight.t()).square().sum()
        return loss.detach(), *torch.autograd.grad(loss, [weight])

    record = Recorded(function, (x,))
    graph = lowered(record, x)
    assert onednn_mm in calls(graph)
    assert aten.mm.default not in calls(graph)
    assert len(measured) == 3  # two forward, and one backward to the weight
    record.compile((x,))
    assert record.is_compiled
    torch.testing.assert_close(record(x), function(x))


def test_products_of_double_precision_or_without_numbers_stay_and_a_small_gain_is_none(
    measured: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_faster_in_onednn(*layouts(torch.randn(3, 0), torch.randn(0, 4)))
    x = torch.randn(3, 3, dtype=torch.float64)
    assert aten.mm.default in calls(lowered(Recorded(lambda x: x @ x, (x,)), x))
    assert not measured
    monkeypatch.setattr(lowering, "_seconds_of_products", lambda *layouts: (1.0, 0.95))
    assert not is_faster_in_onednn(*layouts(torch.randn(2, 3), torch.randn(3, 4)))


def test_each_layout_is_measured_once_and_a_run_goes_on_with_its_choices(measured: list, choices: dict) -> None:
    shapes, other = layouts(torch.randn(2, 3), torch.randn(3, 4)), layouts(torch.randn(2, 3), torch.randn(4, 3).t())
    assert is_faster_in_onednn(*shapes)
    assert is_faster_in_onednn(*shapes)
    assert len(measured) == 1
    assert is_faster_in_onednn(*other)
    assert len(measured) == 2
    saved = product_choices()
    assert list(saved.values()) == [True, True]
    choices.clear()
    restore_product_choices(dict.fromkeys(saved, False))
    assert not is_faster_in_onednn(*shapes)
    assert len(measured) == 2
    assert all(saved.values())  # a copy


# Densities of many data: the order of products ----------------------------------------------------------------------


N, D, K = 400, 20, 3


def reordered(function: Callable, *args: Tensor) -> tuple[GraphModule, GraphModule]:
    """The lowered record of ``function``, without and with its products reordered."""
    record = Recorded(function, args)
    assert not record.inputs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering, "_reorder_products", lambda graph: None)
        before = lowered(record, *args)
    return before, lowered(record, *args)


def long_products(graph: GraphModule) -> int:
    """How many products have a column for each datum."""
    products = [node for node in graph.graph.nodes if node.target in (aten.mm.default, aten.bmm.default)]
    return sum(N in node.meta["val"].shape for node in products)


def gaussian_gradients(tril: Tensor, loc: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    tril, loc = tril.detach().requires_grad_(), loc.detach().requires_grad_()
    total = MultivariateNormal(loc.unsqueeze(1), scale_tril=tril.unsqueeze(1)).log_prob(x).logsumexp(0).sum()
    return (total.detach(), *torch.autograd.grad(total, (tril, loc)))


def gaussian_inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    root = torch.randn(K, D, D)
    return torch.linalg.cholesky(root @ root.mT / D + 0.3 * torch.eye(D)), torch.randn(K, D), torch.randn(N, D)


def test_gradients_of_gaussians_need_one_long_product_and_are_as_precise() -> None:
    args = gaussian_inputs()
    before, after = reordered(gaussian_gradients, *args)
    assert (long_products(before), long_products(after)) == (2, 1)
    exact = gaussian_gradients(*(x.double() for x in args))
    for old, new, value in zip(before(*args), after(*args), exact, strict=True):
        scale = value.abs().max()
        assert (old - value).abs().max() <= 2e-5 * scale  # the measure is not idle
        assert (new - value).abs().max() <= 2e-5 * scale


USES: dict[str, tuple[Callable[[Tensor, Tensor], Any], int]] = {
    "multiplied twice": (lambda w, c: (w @ c, w @ (2 * c)), 0),
    "summed over columns and more": (lambda w, c: w.sum((0, 2)), 0),
    "views and a sum": (lambda w, c: -w.mT.reshape(K, N, 4, 5).permute(1, 2, 0, 3).sum(0), 0),
    "both": (lambda w, c: w @ c + w.unsqueeze(0).sum(3)[0].unsqueeze(-1), 0),
    "returned": (lambda w, c: w, 1),
    "read by a function": (lambda w, c: (w.sum(-1), w.exp()), 1),
    "rows and columns mixed": (lambda w, c: w.view(K, D * N).sum(-1), 1),
    "multiplied from both sides": (lambda w, c: w @ w.mT + w @ c, 1),
    "the other product is longer": (lambda w, c: w @ torch.cat([c] * N, -1), 1),
}


@pytest.mark.parametrize("name", USES)
def test_a_long_product_goes_where_it_is_only_multiplied_or_summed(name: str) -> None:
    torch.manual_seed(0)
    use, number = USES[name]
    args = torch.randn(K, D, D), torch.randn(K, D, N), torch.randn(K, N, D)
    before, after = reordered(lambda a, b, c: use(a @ b, c), *args)
    assert (long_products(before), long_products(after)) == (1, number)
    for old, new in zip(*(tree_leaves(graph(*args)) for graph in (before, after)), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-3)  # sums of 400 · 20 numbers of order one
