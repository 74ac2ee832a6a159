"""A faster graph computes the numbers of the record, and products go to the library that is faster."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from pyrovae.infer import machine, products
from pyrovae.infer.program import Program
from pyrovae.infer.rewrite import rewritten

aten = torch.ops.aten


def record(function: Callable, *args: Tensor) -> Program:
    return Program(function, args)


def faster(program: Program, *args: Tensor) -> GraphModule:
    return rewritten(program.graph, [*program.inputs, *args])


def calls(graph: GraphModule) -> set:
    return {node.target for node in graph.graph.nodes if node.op == "call_function"}


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A place of the test's own for what was measured."""
    file = tmp_path / "products.json"
    monkeypatch.setattr(machine, "kept", lambda what: file)
    return file


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, memory: Path) -> list:
    """How often products were measured; oneDNN takes half the time."""
    times: list = []

    def measure(*layouts: object) -> dict[str, float]:
        times.append(layouts)
        return {"blas": 1.0, "onednn": 0.5}

    monkeypatch.setattr(products, "_measure", measure)
    return times


# --- elementary functions ------------------------------------------------------------------------


def values() -> Tensor:
    small = torch.logspace(-30, 0, 20_001)
    return torch.cat([torch.linspace(-100, 100, 400_001), torch.linspace(-10, 10, 400_001), small, -small])


def test_tanh() -> None:
    x = values()
    program = record(torch.tanh, x)
    graph = faster(program, x)
    assert calls(program.graph) == {aten.tanh.default}
    assert aten.tanh.default not in calls(graph)
    y = graph(x)
    exact = x.double().tanh()
    assert ((y - exact).abs() <= 4e-7 * exact.abs()).all()
    assert (y.abs() <= 1).all()
    assert torch.equal(graph(-x), -y)
    ends = torch.full_like(x, torch.inf)
    assert torch.equal(graph(ends), torch.ones_like(x))
    assert graph(torch.full_like(x, torch.nan)).isnan().all()
    assert not graph(torch.zeros_like(x)).any()


@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
def test_cross_entropy(target: float) -> None:
    x = values()
    targets = torch.full_like(x, target)
    graph = faster(record(lambda x, t: cross_entropy(x, t, reduction="none"), x, targets), x, targets)
    assert aten.binary_cross_entropy_with_logits.default not in calls(graph)
    exact = cross_entropy(x.double(), targets.double(), reduction="none")
    error = (graph(x, targets) - exact).abs()
    eager = (cross_entropy(x, targets, reduction="none") - exact).abs()
    assert (error <= 2.5e-7 * x.abs().clamp(min=1)).all()
    assert error.max() <= 1.5 * eager.max()
    if target == 1:  # log(1 + exp(-x)) alone: relative precision however small it is
        tail = (x > 1) & (x < 80)
        assert (error[tail] <= 2e-5 * exact[tail]).all()


@pytest.mark.parametrize("extreme", [torch.inf, -torch.inf, torch.nan, 1e30, -1e30])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_cross_entropy_of_extremes_is_torchs(extreme: float, target: float) -> None:
    x, targets = torch.tensor([extreme]), torch.tensor([target])
    graph = faster(record(lambda x, t: cross_entropy(x, t, reduction="none"), x, targets), x, targets)
    expected = cross_entropy(x, targets, reduction="none")
    torch.testing.assert_close(graph(x, targets), expected, rtol=0, atol=0, equal_nan=True)


def test_what_is_left_alone() -> None:
    x, weight = torch.randn(3, 2), torch.rand(2)
    double, mean = torch.randn(3, 2, dtype=torch.float64), torch.rand(3, 2)
    bias = torch.randn(3, 2)  # one for each row
    assert aten.tanh.default in calls(faster(record(torch.tanh, double), double))
    for function in (
        lambda x: cross_entropy(x, mean, reduction="none", pos_weight=weight),
        lambda x: cross_entropy(x, mean, reduction="none", weight=weight),
        lambda x: cross_entropy(x, mean),
        lambda x: cross_entropy(x, mean.bfloat16(), reduction="none"),
    ):
        program = record(function, x)
        graph = faster(program, x)
        assert aten.binary_cross_entropy_with_logits.default in calls(graph)
        assert torch.equal(graph(*program.inputs, x), function(x))
    for function in (lambda x: torch.addmm(bias, x, x[:2]), lambda x: torch.addmm(weight, x, x[:2], beta=0.5)):
        assert aten.addmm.default in calls(faster(record(function, x), x))


def test_noise_gradients_and_buffers_stay_the_records() -> None:
    layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    x, targets = torch.randn(16, 4), torch.rand(16, 3).round()
    parameters = list(layers.parameters())

    def function(x: Tensor) -> tuple[Tensor, ...]:
        loss = cross_entropy(layers(x + torch.randn(16, 4)), targets, reduction="none").sum()
        return loss, *torch.autograd.grad(loss, parameters)

    program = record(function, x)
    before = torch.get_rng_state()
    graph = faster(program, x)
    assert torch.equal(torch.get_rng_state(), before)
    expected = program(x)
    torch.set_rng_state(before)
    with torch.no_grad():
        torch.testing.assert_close(graph(*program.inputs, x), expected)
    assert not calls(graph) & {aten.addmm.default, aten.tanh.default, aten.binary_cross_entropy_with_logits.default}


DRAWN: dict[str, Callable[[Tensor], Tensor]] = {
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(0.3),
    "dropout": lambda x: nn.functional.dropout(x, 0.3),
    "normal_": lambda x: torch.empty_like(x).normal_(),
    "uniform_": lambda x: torch.empty_like(x).uniform_(),
    "exponential_": lambda x: torch.empty_like(x).exponential_(),
    "geometric_": lambda x: torch.empty_like(x).geometric_(0.3),
    "cauchy_": lambda x: torch.empty_like(x).cauchy_(),
    "log_normal_": lambda x: torch.empty_like(x).log_normal_(),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.3)),
    "bernoulli of one number": lambda x: torch.bernoulli(x, 0.3),
    "poisson": lambda x: torch.poisson(torch.full_like(x, 3.0)),
}


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (0, 2, 1)])
@pytest.mark.parametrize("size", [4, 24])
def test_random_numbers_of_tensors_that_lie_in_another_order(name: str, order: tuple[int, ...], size: int) -> None:
    def function(x: Tensor) -> Tensor:
        y = x.clone()
        y += 1  # something is written in place
        return DRAWN[name]((y + 1).permute(order))

    x = torch.randn(size, size, size + 1)
    program = record(function, x)
    state = torch.get_rng_state()
    expected, after = function(x), torch.get_rng_state()
    torch.set_rng_state(state)
    torch.testing.assert_close(faster(program, x)(*program.inputs, x), expected)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.slow
def test_the_compiler_does_not_put_biases_back() -> None:
    from torch._inductor.utils import run_and_get_code

    layers, x = nn.Linear(4, 8), torch.randn(16, 4)
    program = record(lambda x: layers(x).relu(), x)
    _, (code, *_) = run_and_get_code(program.compile, (x,))
    assert program.is_compiled
    assert re.search(r"\bmm\(|_mm_out\(", code)
    assert "addmm" not in code
    torch.testing.assert_close(program(x), layers(x).relu())


# --- densities of many data ----------------------------------------------------------------------


@pytest.mark.parametrize("condition", [1e1, 1e4, 1e7])
def test_wide_triangular_solves_become_products_of_like_precision(condition: float) -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(2, 20, 20, dtype=torch.float64)).Q
    scale = torch.linalg.cholesky(basis @ torch.logspace(0, math.log10(condition), 20).double().diag() @ basis.mT)
    x = (scale @ torch.randn(2, 20, 200, dtype=torch.float64)).float()  # data of that covariance
    scale = scale.float()

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.linalg.solve_triangular(scale, x, upper=False)
        return y, torch.linalg.solve_triangular(scale.mT, y, upper=True)

    program = record(function, x)
    graph = faster(program, x)
    assert sum(node.target is aten.bmm.default for node in graph.graph.nodes) == 2
    y = torch.linalg.solve_triangular(scale.double(), x.double(), upper=False)
    exact = y, torch.linalg.solve_triangular(scale.double().mT, y, upper=True)
    for fast, eager, true in zip(graph(*program.inputs, x), function(x), exact, strict=True):
        assert (fast - true).norm() <= 5 * (eager - true).norm()


def test_other_solves_are_left_alone() -> None:
    small, large = torch.eye(4).tril(), torch.eye(20).tril()
    for function, x in (
        (lambda x: torch.linalg.solve_triangular(small, x, upper=False), torch.randn(4, 200)),
        (lambda x: torch.linalg.solve_triangular(large, x, upper=False), torch.randn(20, 40)),
        (lambda x: torch.linalg.solve_triangular(large, x, upper=False, left=False), torch.randn(200, 20)),
    ):
        program = record(function, x)
        graph = faster(program, x)
        assert aten.linalg_solve_triangular.default in calls(graph)
        assert torch.equal(graph(*program.inputs, x), function(x))


# --- indices -------------------------------------------------------------------------------------

INDEXED: dict[str, Callable[[Tensor, int, Tensor], Tensor]] = {
    "index_select": lambda x, dim, index: x.index_select(dim, index[0]),
    "index_add": lambda x, dim, index: x.index_add(dim, index[0], x.narrow(dim, 0, index.shape[1])),
    "scatter_add": lambda x, dim, index: x.scatter_add(dim, index, 2 * x[:2, :2]),
    "scatter": lambda x, dim, index: torch.zeros(3, 3).scatter(dim, index, 1.0) * x,
}


@pytest.mark.parametrize("name", INDEXED)
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("transposed", [False, True])
def test_checked_indices_pick_the_same(name: str, dim: int, transposed: bool) -> None:
    x, index = torch.randn(3, 3), torch.tensor([[2, 0], [1, 1]])
    weight = nn.Parameter(torch.randn(3, 3))

    def function(x: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        result = INDEXED[name](weight.mT * x.mT if transposed else weight * x, dim, index)
        return result.detach(), *torch.autograd.grad(result.square().sum(), [weight])

    program = record(function, x, index)
    graph = faster(program, x, index)
    results = graph(*program.inputs, x, index)
    torch.testing.assert_close(results, function(x, index))
    assert [each.stride() for each in results] == [each.stride() for each in function(x, index)]


@pytest.mark.slow
def test_indices_out_of_bounds_are_errors_when_compiled_too() -> None:
    """Of torch's compiler ``scatter_add`` does nothing then, and a negative index counts from the end."""

    def function(x: Tensor, *indices: Tensor) -> tuple[Tensor, ...]:
        return tuple(pick(x, 0, index) for pick, index in zip(INDEXED.values(), indices, strict=True))

    x, good = torch.randn(3, 3), [torch.tensor([[2, 0], [1, 1]]) for _ in INDEXED]
    program = record(function, x, *good)
    program.compile((x, *good))
    assert program.is_compiled
    torch.testing.assert_close(program(x, *good), function(x, *good))
    for which in range(len(INDEXED)):
        for bad in (3, -1, 10**9):
            indices = [index.clone() for index in good]
            indices[which][0, 1] = bad
            for run in (function, program):
                with pytest.raises((RuntimeError, IndexError)):
                    run(x, *indices)


# --- rows in order -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows", [lambda: torch.arange(3), lambda: torch.arange(3).view(-1, 1), lambda: torch.arange(3)[None]]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_in_order_are_the_table(rows: Callable, transposed: bool) -> None:
    table = nn.Parameter(torch.randn(2, 3).mT if transposed else torch.randn(3, 2))

    def function(x: Tensor) -> tuple[Tensor, ...]:
        loss = (table[rows()].view(-1) * x).square().sum()
        return loss, *torch.autograd.grad(loss, [table])

    x = torch.randn(6)
    program = record(function, x)
    assert {aten.index.Tensor, aten.index_put.default} <= calls(program.graph)
    graph = faster(program, x)
    assert not {aten.index.Tensor, aten.index_put.default} & calls(graph)
    with torch.no_grad():
        torch.testing.assert_close(graph(*program.inputs, x), program(x))


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(lambda x: torch.arange(2), id="two of three"),
        pytest.param(lambda x: torch.arange(2, -1, -1), id="from the last"),
        pytest.param(lambda x: torch.arange(3) % 2, id="some twice"),
        pytest.param(lambda x: x.argsort(), id="by value"),
        pytest.param(lambda x: (torch.arange(3), torch.zeros(3, dtype=torch.long)), id="rows and columns"),
        pytest.param(lambda x: (slice(None), torch.arange(3)), id="columns"),
    ],
)
def test_other_rows_are_picked(rows: Callable) -> None:
    table = nn.Parameter(torch.randn(3, 3))

    def function(x: Tensor) -> tuple[Tensor, ...]:
        loss = table[rows(x)].square().sum()
        return loss, *torch.autograd.grad(loss, [table])

    x = torch.randn(3)
    program = record(function, x)
    graph = faster(program, x)
    assert {aten.index.Tensor, aten.index_put.default} <= calls(graph)
    with torch.no_grad():
        torch.testing.assert_close(graph(*program.inputs, x), program(x))


def changed_index(x: Tensor) -> Tensor:
    index = torch.arange(3)
    index[0] = 2
    return x[index]


def changed_base(x: Tensor) -> Tensor:
    index = torch.arange(3)
    column = index.view(-1, 1)
    index.add_(1).remainder_(3)
    return x[column]


@pytest.mark.parametrize(
    "function",
    [
        changed_index,
        changed_base,
        pytest.param(lambda x: torch.linalg.cholesky(x)[torch.arange(3)].mT, id="columns first"),
        pytest.param(lambda x: x.mT.contiguous().mT[torch.arange(3)].mT @ x, id="stored transposed"),
        pytest.param(lambda x: x[0][torch.arange(3)] @ x[1], id="a factor of a product"),
    ],
)
def test_rows_in_order_are_told_from_others(function: Callable) -> None:
    root = torch.randn(3, 3, 3)
    x = root @ root.mT + torch.eye(3)
    program = record(function, x)
    result, expected = faster(program, x)(*program.inputs, x), function(x)
    assert torch.equal(result, expected)
    assert result.stride() == expected.stride()


def test_rows_in_order_are_a_copy() -> None:
    """In the compiled program too: what it returned stays as it was when the table changes."""
    table = nn.Parameter(torch.randn(3, 2))

    def function(x: Tensor) -> tuple[Tensor, ...]:
        moved, rows = table.detach()[torch.arange(3)], table[torch.arange(3)]
        moved += x
        return moved, rows.detach(), *torch.autograd.grad((rows * x).sum(), [table])

    x = torch.ones(2)
    program = record(function, x)
    program.compile((x,))
    assert program.is_compiled
    before = table.detach().clone()
    results = program(x)
    assert torch.equal(table, before)
    kept = [result.clone() for result in results]
    with torch.no_grad():
        table += 10
    results[-1].add_(5)
    torch.testing.assert_close(kept, [before + 1, before, torch.ones(3, 2)])
    torch.testing.assert_close(list(results[:2]), kept[:2])


# --- products ------------------------------------------------------------------------------------


def layouts(*tensors: Tensor) -> list:
    return [(x.shape, x.stride()) for x in tensors]


@pytest.mark.parametrize("transpose", [(False, False), (True, False), (False, True), (True, True)])
def test_onednn_multiplies_matrices_of_any_strides(transpose: tuple[bool, bool]) -> None:
    left = torch.randn(7, 5).t() if transpose[0] else torch.randn(5, 7)
    right = torch.randn(3, 7).t() if transpose[1] else torch.randn(7, 3)
    torch.testing.assert_close(products.onednn_mm(left, right), left @ right)
    torch.library.opcheck(products.onednn_mm, (left, right))


@pytest.mark.slow
def test_products_go_to_the_faster_library(measured: list) -> None:
    weight = nn.Parameter(torch.randn(5, 4))

    def function(x: Tensor) -> tuple[Tensor, ...]:
        loss = (x @ weight.t()).square().sum()
        return loss, *torch.autograd.grad(loss, [weight])

    x = torch.randn(6, 4)
    program = record(function, x)
    graph = faster(program, x)
    assert products.onednn_mm in calls(graph)
    assert aten.mm.default not in calls(graph)
    assert len(measured) == 2  # forward, and backward to the weight
    program.compile((x,))
    assert program.is_compiled
    torch.testing.assert_close(program(x), (function(x)[0].detach(), function(x)[1]))


@pytest.mark.slow
def test_products_of_products_compile() -> None:
    weight, x = torch.randn(4, 4), torch.randn(3, 4)
    program = record(lambda x: x @ weight @ weight, x)
    torch.testing.assert_close(faster(program, x)(*program.inputs, x), x @ weight @ weight)
    program.compile((x,))
    assert program.is_compiled
    torch.testing.assert_close(program(x), x @ weight @ weight)


def test_products_without_numbers(measured: list) -> None:
    assert not products.is_faster_in_onednn(*layouts(torch.randn(3, 0), torch.randn(0, 4)))
    assert not measured


def test_measuring_is_in_single_precision_whatever_the_default(memory: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert products._measure(((4, 3), (3, 1)), ((3, 2), (2, 1))).keys() == {"blas", "onednn"}
    finally:
        torch.set_default_dtype(torch.float32)


def test_products_in_double_precision_are_left_alone(measured: list) -> None:
    x = torch.randn(3, 3, dtype=torch.float64)
    assert aten.mm.default in calls(faster(record(lambda x: x @ x, x), x))
    assert not measured


def test_measuring_runs_both_libraries_and_leaves_the_generator_alone(memory: Path) -> None:
    shapes = layouts(torch.randn(20, 30), torch.randn(40, 30).t())
    before = torch.get_rng_state()
    seconds = products._measure(*shapes)
    assert torch.equal(torch.get_rng_state(), before)
    assert seconds.keys() == {"blas", "onednn"}
    assert all(0 < time < 1 for time in seconds.values())


def test_what_was_measured_is_remembered(measured: list, memory: Path) -> None:
    shapes = layouts(torch.randn(2, 3), torch.randn(3, 4))
    assert products.is_faster_in_onednn(*shapes)
    assert products.is_faster_in_onednn(*shapes)
    assert len(measured) == 1
    other = layouts(torch.randn(2, 3), torch.randn(4, 3).t())  # other strides
    assert products.is_faster_in_onednn(*other)
    assert len(measured) == 2
    memory.write_text("{ damaged")
    assert products.is_faster_in_onednn(*shapes)
    assert len(measured) == 3


def test_a_small_gain_is_none(monkeypatch: pytest.MonkeyPatch, memory: Path) -> None:
    monkeypatch.setattr(products, "_measure", lambda *layouts: {"blas": 1.0, "onednn": 0.95})
    assert not products.is_faster_in_onednn(*layouts(torch.randn(2, 3), torch.randn(3, 4)))


def test_where_nothing_can_be_kept_it_is_measured_anew(measured: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "kept", lambda what: Path("/no such folder") / what)
    shapes = layouts(torch.randn(2, 3), torch.randn(3, 4))
    assert products.is_faster_in_onednn(*shapes)
    assert products.is_faster_in_onednn(*shapes)
    assert len(measured) == 2


def test_without_onednn_products_stay_where_they_are(measured: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not products.is_faster_in_onednn(*layouts(torch.randn(2, 3), torch.randn(3, 4)))
    assert not measured
