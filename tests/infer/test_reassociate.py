"""Products in another order give the same numbers, and the long ones are gone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.fx import GraphModule, Node

from pyrovae.infer.program import Program
from pyrovae.infer.rewrite import rewritten

aten = torch.ops.aten
N, D, K = 400, 20, 3


def reordered(function: Callable, *args: Tensor) -> tuple[GraphModule, GraphModule]:
    """The rewritten record of ``function``, without and with its products reordered."""
    program = Program(function, args)
    assert not program.inputs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrovae.infer.rewrite.reassociate", lambda graph: None)
        before = rewritten(program.graph, list(args))
    return before, rewritten(program.graph, list(args))


def nodes(graph: GraphModule, target: object) -> list[Node]:
    return list(graph.graph.find_nodes(op="call_function", target=target))


def long_products(graph: GraphModule, *args: Tensor) -> int:
    """How many products have a column for each datum."""
    shapes: list[torch.Size] = []

    class Watch(torch.fx.Interpreter):
        def call_function(self, target: Callable, args: tuple, kwargs: dict) -> Tensor:
            value = super().call_function(target, args, kwargs)
            if target in (aten.mm.default, aten.bmm.default):
                shapes.append(value.shape)
            return value

    Watch(graph).run(*args)
    return sum(N in shape for shape in shapes)


def gaussian_gradients(tril: Tensor, loc: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    tril, loc = tril.detach().requires_grad_(), loc.detach().requires_grad_()
    total = MultivariateNormal(loc.unsqueeze(1), scale_tril=tril.unsqueeze(1)).log_prob(x).logsumexp(0).sum()
    return (total.detach(), *torch.autograd.grad(total, (tril, loc)))


def gaussian_inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    root = torch.randn(K, D, D)
    return torch.linalg.cholesky(root @ root.mT / D + 0.3 * torch.eye(D)), torch.randn(K, D), torch.randn(N, D)


def test_gradients_of_gaussians_need_one_long_product_and_one_solve() -> None:
    args = gaussian_inputs()
    before, after = reordered(gaussian_gradients, *args)
    assert (long_products(before, *args), long_products(after, *args)) == (2, 1)
    solves = [len(nodes(graph, aten.linalg_solve_triangular.default)) for graph in (before, after)]
    assert solves == [2, 1]


def test_gradients_of_gaussians_are_as_precise_as_before() -> None:
    args = gaussian_inputs()
    before, after = reordered(gaussian_gradients, *args)
    exact = gaussian_gradients(*(x.double() for x in args))
    for old, new, value in zip(before(*args), after(*args), exact, strict=True):
        scale = value.abs().max()
        assert (old - value).abs().max() <= 2e-5 * scale  # the measure is not idle
        assert (new - value).abs().max() <= 2e-5 * scale


def factors() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(K, D, D), torch.randn(K, D, N), torch.randn(K, N, D)


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda w, c: w @ c, id="multiplied"),
        pytest.param(lambda w, c: (w @ c, w @ (2 * c)), id="multiplied twice"),
        pytest.param(lambda w, c: w.sum(-1), id="summed"),
        pytest.param(lambda w, c: w.sum(), id="summed over everything"),
        pytest.param(lambda w, c: w.sum((0, 2)), id="summed over columns and more"),
        pytest.param(lambda w, c: -w.mT.reshape(K, N, 4, 5).permute(1, 2, 0, 3).sum(0), id="views and a sum"),
        pytest.param(lambda w, c: w @ c + w.unsqueeze(0).sum(3)[0].unsqueeze(-1), id="both"),
    ],
)
def test_what_does_without_the_long_product(use: Callable) -> None:
    args = factors()
    before, after = reordered(lambda a, b, c: use(a @ b, c), *args)
    assert (long_products(before, *args), long_products(after, *args)) == (1, 0)
    for old, new in zip(*(torch.utils._pytree.tree_leaves(graph(*args)) for graph in (before, after)), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-3)  # sums of 400 · 20 numbers of order one


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda w, c: w, id="returned"),
        pytest.param(lambda w, c: (w.sum(-1), w.exp()), id="read by a function"),
        pytest.param(lambda w, c: w.square().sum(-1), id="squared before the sum"),
        pytest.param(lambda w, c: w.sum(-2), id="summed over rows"),
        pytest.param(lambda w, c: w.view(K, D, 20, N // 20).sum(-1), id="summed over some columns"),
        pytest.param(lambda w, c: w.view(K, D * N).sum(-1), id="rows and columns mixed"),
        pytest.param(lambda w, c: w @ w.mT + w @ c, id="multiplied from both sides"),
        pytest.param(lambda w, c: w @ torch.cat([c] * N, -1), id="the other product is longer"),
        pytest.param(lambda w, c: w[:, :1].contiguous() + 0 * w[:, :1], id="a part of it"),
    ],
)
def test_where_the_long_product_is_needed_it_stays(use: Callable) -> None:
    args = factors()
    before, after = reordered(lambda a, b, c: use(a @ b, c), *args)
    assert long_products(after, *args) == long_products(before, *args)
    for old, new in zip(*(torch.utils._pytree.tree_leaves(graph(*args)) for graph in (before, after)), strict=True):
        assert torch.equal(new, old)


@pytest.mark.parametrize(("rows", "columns"), [(1, N), (D, D)])
def test_products_that_would_cost_more_stay(rows: int, columns: int) -> None:
    a, b, c = torch.randn(K, rows, D), torch.randn(K, D, columns), torch.randn(K, columns, D)
    before, after = reordered(lambda a, b, c: a @ b @ c, a, b, c)
    assert torch.equal(before(a, b, c), after(a, b, c))


def test_a_factor_that_changes_in_place_is_read_when_it_was() -> None:
    def changed(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        b = b + 1
        w = a @ b
        b.mul_(2)
        return w @ c + b.sum()

    args = factors()
    _, after = reordered(changed, *args)
    torch.testing.assert_close(after(*args), changed(*args), rtol=1e-5, atol=1e-3)


def inverse(tril: Tensor, **options: bool) -> Tensor:
    return torch.linalg.solve_triangular(tril, torch.eye(D), **options)


def shifted_eye(tril: Tensor) -> Tensor:
    eye = torch.eye(D)
    eye.diagonal().add_(1)
    return torch.linalg.solve_triangular(tril, eye, upper=False) + inverse(tril.mT, upper=True) @ tril


def changed_between(tril: Tensor) -> Tensor:
    tril = tril + 0
    down = inverse(tril, upper=False)
    tril.mul_(2)
    return down + inverse(tril.mT, upper=True) @ tril


def changed_after(tril: Tensor) -> Tensor:
    down, up = inverse(tril, upper=False), inverse(tril.mT, upper=True)
    down.mul_(2)
    return up @ tril


@pytest.mark.parametrize(
    ("function", "solves"),
    [
        (lambda tril: inverse(tril, upper=False) + inverse(tril.mT, upper=True) @ tril, 1),
        (lambda tril: inverse(tril, upper=False) + inverse(tril.mT, upper=False) @ tril, 2),  # the empty triangle
        (lambda tril: inverse(tril, upper=False, unitriangular=True) + inverse(tril.mT, upper=True) @ tril, 2),
        (lambda tril: (inverse(tril, upper=False), inverse(tril.mT, upper=True)), 2),
        (lambda tril: inverse(tril, upper=False) + inverse(tril.mT, upper=True), 2),
        (shifted_eye, 2),
        (changed_between, 2),
        (changed_after, 1),
    ],
)
def test_inverses_are_shared_only_where_they_are_the_same(function: Callable, solves: int) -> None:
    tril = gaussian_inputs()[0]
    _, after = reordered(function, tril)
    assert len(nodes(after, aten.linalg_solve_triangular.default)) == solves
    torch.testing.assert_close(after(tril), function(tril), rtol=1e-5, atol=1e-6)


def test_a_gaussian_without_a_batch_is_rewritten_too() -> None:
    """Its products are of matrices, not of stacks of them."""
    tril, _, x = gaussian_inputs()
    tril = tril[0].contiguous()

    def function(tril: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        tril = tril.detach().requires_grad_()
        loss = torch.linalg.solve_triangular(tril, x.mT, upper=False).square().sum()
        return loss.detach(), *torch.autograd.grad(loss, tril)

    before, after = reordered(function, tril, x)
    assert (long_products(before, tril, x), long_products(after, tril, x)) == (2, 1)
    torch.testing.assert_close(after(tril, x), before(tril, x), rtol=1e-4, atol=1e-3)


# --- views -----------------------------------------------------------------------------------------


def test_a_detached_parameter_is_returned_detached() -> None:
    parameter = nn.Parameter(torch.randn(3))
    program = Program(lambda x: (parameter.detach(), x + 1), (torch.zeros(3),))
    program.compile((torch.zeros(3),))
    assert program.is_compiled
    assert not program(torch.zeros(3))[0].requires_grad


def transposed_in_place(x: Tensor) -> Tensor:
    y = x + 1
    z = y.detach()
    y.t_()
    return z * 1


def test_views_stay_when_their_source_is_transposed_in_place() -> None:
    x = torch.randn(3, 3)
    _, after = reordered(transposed_in_place, x)
    assert torch.equal(after(x), transposed_in_place(x))


def test_sums_of_integer_products_stay() -> None:
    a, b = torch.randint(5, (K, D, D)), torch.randint(5, (K, D, N))
    _, after = reordered(lambda a, b: (a @ b).sum(-1), a, b)
    assert torch.equal(after(a, b), (a @ b).sum(-1))
