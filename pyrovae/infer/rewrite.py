"""A recorded graph in a form that a CPU runs faster: float32 functions, random numbers, biases and matrix products.

The compiler calls a vector library for ``tanh`` and ``log1p``, one such call taking as long as thirty multiplications,
and adds a bias by copying it into every row first. Here they become arithmetic that the compiler fuses with what
surrounds it. All rows of a table, in their order, are no longer gathered one by one. Numbers stay those of the record
to float32 rounding, random ones too: they are drawn from the same state, which becomes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae.infer import noise
from pyrovae.infer.graphs import call, is_in_place, layout, replace, shape
from pyrovae.infer.products import is_faster_in_onednn, onednn_mm
from pyrovae.infer.reassociate import reassociate

__all__ = ["rewritten"]

aten = torch.ops.aten


def rewritten(graph: GraphModule, args: list[Tensor]) -> GraphModule:
    """``graph``, whose arguments are like ``args``, in its faster form."""
    table = _CHECKED | _FASTER | _DRAWN | (_DRAWN_FASTER if noise.can_draw() else {})
    faster = make_fx(graph, tracing_mode="fake", decomposition_table=table)(*args)
    if any(is_in_place(node) for node in faster.graph.nodes):  # without, a node is one value wherever it is read
        faster = make_fx(functionalize(faster), tracing_mode="fake")(*args)
    _read_in_order(faster)
    reassociate(faster)
    _choose_products(faster)
    faster.recompile()
    return faster


def _choose_products(graph: GraphModule) -> None:
    """Send each matrix product to the library that is faster at its shape on this machine."""
    for node in graph.graph.find_nodes(op="call_function", target=aten.mm.default):
        if node.meta["val"].dtype == torch.float32 and is_faster_in_onednn(*map(layout, node.args)):
            node.target = onednn_mm
        # A dimension more and again less keeps the compiler from making `addmm` of a product and what is added to it.
        uses = list(node.users)
        with graph.graph.inserting_after(node):
            more = call(graph, aten.unsqueeze.default, node, 0)
        with graph.graph.inserting_after(more):
            less = call(graph, aten.squeeze.dim, more, 0)
        for use in uses:
            use.replace_input_with(node, less)


def _read_in_order(graph: GraphModule) -> None:
    """All rows in their order are a copy of the table: so does an enumerated site, 0, 1, ..., pick its parameters."""
    for node in graph.graph.nodes:
        args: Any = node.args
        if node.target is aten.index.Tensor and _counts_rows(args[1], args[0]):
            source = args[0]
        elif node.target is aten.index_put.default and _counts_rows(args[1], args[0]):
            source = args[2] if args[0].target is aten.new_zeros.default else None
        else:
            source = None
        if source is not None and shape(source).numel() == shape(node).numel():
            with graph.graph.inserting_before(node):
                rows = call(graph, aten.reshape.default, source, list(shape(node)))
                replace(node, call(graph, aten.clone.default, rows, memory_format=torch.contiguous_format))


def _counts_rows(indices: Any, table: Node) -> bool:
    """Whether ``indices`` are one index alone, 0, 1, ... to the last row of ``table``, in any shape."""
    index = indices[0]
    while index is not None and index.target in (aten.view.default, aten.unsqueeze.default):
        index = index.args[0]
    return len(indices) == 1 and index.target is aten.arange.default and index.args == tuple(shape(table)[:1])


# Elementary functions -------------------------------------------------------------------------------------------

# tanh x = x P(x²) / Q(x²) on |x| <= 8.5, where it is 1 in float32: least squares in the relative error, reweighted to
# even it out (1.2e-8; a float32 evaluation is within 4e-7).
_TANH_LIMIT = 8.5
_TANH_P = (0.999999988278, 0.134132324368, 0.0035340088786, 2.12507191363e-05, 1.42687206321e-08)
_TANH_Q = (1.0, 0.467465552101, 0.026022684908, 0.000334883412843, 8.14492799972e-07)

# log(1 + e) = 2 atanh s with s = e / (2 + e), and atanh s = s R(s²) on s² <= 1/9, fitted in the same way (4e-9).
_ATANH_R = (1.0, 0.33333160, 0.20012326, 0.13982172, 0.14080727)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = x * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        value = value * x + coefficient
    return value


def _tanh(x: Tensor) -> Any:
    if x.dtype != torch.float32:
        return NotImplemented
    x = x.clamp(-_TANH_LIMIT, _TANH_LIMIT)
    square = x * x
    return (x * _polynomial(_TANH_P, square) / _polynomial(_TANH_Q, square)).clamp(-1, 1)


def _log_sigmoid(x: Tensor) -> Tensor:
    """min(0, x) - log(1 + exp(-|x|))"""
    # exp2, because the compiler keeps in memory what it computes by exp and uses twice.
    e = torch.exp2(x.abs() * -1.4426950408889634)
    s = e / (e + 2)
    return torch.minimum(x, torch.zeros_like(x)) - (s + s) * _polynomial(_ATANH_R, s * s)


def _cross_entropy(
    x: Tensor, target: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None, reduction: int = 1
) -> Any:
    plain = weight is None and pos_weight is None and reduction == 0
    if not plain or not x.dtype == target.dtype == torch.float32:
        return NotImplemented
    return (1 - target) * x - _log_sigmoid(x)


def _linear(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if bias.ndim != 1 or beta != 1 or alpha != 1:
        return NotImplemented
    return torch.mm(left, right) + bias


def _solve_triangular(
    matrix: Tensor, right: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Any:
    """With many more columns than rows, one product by the inverse: such are the densities of many data under one
    ``MultivariateNormal``. Rounding errors are those of the solve, or, in ill-conditioned matrices, three times those.
    """
    size = matrix.shape[-1]
    if not left or size < 16 or right.shape[-1] < 4 * size:
        return NotImplemented
    eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    inverse = torch.linalg.solve_triangular(matrix, eye, upper=upper, unitriangular=unitriangular)
    return inverse @ right


_FASTER: dict[Any, Callable[..., Any]] = {
    aten.tanh.default: _tanh,
    aten.binary_cross_entropy_with_logits.default: _cross_entropy,
    aten.addmm.default: _linear,
    aten.linalg_solve_triangular.default: _solve_triangular,
}


# Indices --------------------------------------------------------------------------------------------------------
# Out of bounds they are errors. Compiled, these operations take a negative one to count from the end, or go on without
# a word; the ones here that stand for them do not.


def _index_select(x: Tensor, dim: int, index: Tensor) -> Any:
    if x.ndim == 0 or index.ndim == 0:
        return NotImplemented
    return aten.index.Tensor(x, _at(x, dim, index)).contiguous()


def _index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Any:
    if x.ndim == 0 or index.ndim == 0 or alpha != 1:
        return NotImplemented
    return aten.index_put.default(x, _at(x, dim, index), source, accumulate=True).contiguous()


def _at(x: Tensor, dim: int, index: Tensor) -> list[Tensor | None]:
    none: list[Tensor | None] = [None] * x.ndim
    none[dim] = torch.where(index < 0, x.shape[dim], index)
    return none


def _scatter_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Any:
    if x.ndim == 0 or index.ndim == 0:
        return NotImplemented
    classes = torch.arange(x.shape[dim], dtype=index.dtype, device=index.device)
    checked = classes[torch.where(index < 0, x.shape[dim], index)]
    return torch.scatter_reduce(x, dim, checked, source, "sum")


def _scatter_value(x: Tensor, dim: int, index: Tensor, value: float) -> Tensor:
    return torch.scatter(x, dim, index, torch.full(index.shape, value, dtype=x.dtype, device=x.device))


_CHECKED: dict[Any, Callable[..., Any]] = {
    aten.index_select.default: _index_select,
    aten.index_add.default: _index_add,
    aten.scatter_add.default: _scatter_add,
    aten.scatter.value: _scatter_value,
}


# Random numbers -------------------------------------------------------------------------------------------------

FEWEST_NUMBERS = 4096
"""Fewer take torch no longer."""


def _is_drawn_faster(x: Tensor, generator: torch.Generator | None) -> bool:
    plain = x.dtype == torch.float32 and x.is_cpu and x.is_contiguous() and generator is None
    return plain and x.numel() >= FEWEST_NUMBERS


def _normal_(x: Tensor, mean: float = 0, std: float = 1, *, generator: torch.Generator | None = None) -> Any:
    if not _is_drawn_faster(x, generator) or (mean, std) != (0, 1):
        return NotImplemented
    return x.copy_(noise.normals(x.numel()).view(x.shape))


def _uniform_(x: Tensor, low: float = 0, high: float = 1, *, generator: torch.Generator | None = None) -> Any:
    if not _is_drawn_faster(x, generator) or (low, high) != (0, 1):
        return NotImplemented
    return x.copy_(noise.uniforms(x.numel()).view(x.shape))


def _bernoulli_(x: Tensor, p: float = 0.5, *, generator: torch.Generator | None = None) -> Any:
    """In the order of memory; what stands for it where nothing is written in place draws in the order of indices."""
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    if x.is_contiguous() or not x.permute(order).is_contiguous():
        return NotImplemented
    drawn = torch.bernoulli(torch.empty_like(x.permute(order)), p, generator=generator)
    return x.copy_(drawn.permute([order.index(dim) for dim in range(x.ndim)]))


def _bernoulli_of_one(x: Tensor, p: float = 0.5, *, generator: torch.Generator | None = None) -> Any:
    """In the order of indices, which torch's compiler does not keep to."""
    if x.is_contiguous():
        return NotImplemented
    return torch.bernoulli(torch.empty_like(x, memory_format=torch.contiguous_format), p, generator=generator)


def _bernoulli(probs: Tensor, *, generator: torch.Generator | None = None) -> Any:
    return noise.bernoullis(probs) if _is_drawn_faster(probs, generator) else NotImplemented


def _randn(size: list[int], **options: Any) -> Tensor:
    return torch.empty(size, **options).normal_()


def _rand(size: list[int], **options: Any) -> Tensor:
    return torch.empty(size, **options).uniform_()


def _randn_like(x: Tensor, **options: Any) -> Tensor:
    return torch.empty_like(x, **options).normal_()


def _rand_like(x: Tensor, **options: Any) -> Tensor:
    return torch.empty_like(x, **options).uniform_()


_DRAWN: dict[Any, Callable[..., Any]] = {
    aten.bernoulli_.float: _bernoulli_,
    aten.bernoulli.p: _bernoulli_of_one,
}
_DRAWN_FASTER: dict[Any, Callable[..., Any]] = {
    aten.normal_.default: _normal_,
    aten.uniform_.default: _uniform_,
    aten.bernoulli.default: _bernoulli,
    aten.randn.default: _randn,
    aten.rand.default: _rand,
    aten.randn_like.default: _randn_like,
    aten.rand_like.default: _rand_like,
}
