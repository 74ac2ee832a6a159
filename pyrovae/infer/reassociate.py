"""Products of a recorded graph in the order that costs least, where many data stand between few rows and columns.

The log density of N data under a Gaussian with Cholesky factor L has y = L⁻¹ (x − μ), one column a datum. Its gradient
comes back as W = L⁻ᵀ G, which is only multiplied by yᵀ and summed over data: L⁻ᵀ (G yᵀ) and L⁻ᵀ Σ G do without W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from pyrovae.infer.graphs import call, replace, shape

__all__ = ["reassociate"]

aten = torch.ops.aten

_PRODUCTS = (aten.mm.default, aten.bmm.default)
_VIEWS = {
    aten.expand.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.detach.default,
}


def reassociate(graph: GraphModule) -> None:
    """Reorder the products of ``graph``, which has no in-place operations. Numbers are equal to rounding."""
    _drop_idle_views(graph)
    _share_inverses(graph)
    for target in _PRODUCTS:
        for product in graph.graph.find_nodes(op="call_function", target=target):
            _sum_first(graph, product)
    graph.graph.eliminate_dead_code()


def _drop_idle_views(graph: GraphModule) -> None:
    """Those that leave a tensor as it is: they hide what a product is made of."""
    for node in graph.graph.nodes:
        if node.target in _VIEWS and not any(use.op == "output" for use in node.users):
            replace(node, node.args[0])
    graph.graph.eliminate_dead_code()


def _share_inverses(graph: GraphModule) -> None:
    """The inverse of a transposed matrix is the transposed inverse."""
    inverses: dict[object, Node] = {}
    for solve in graph.graph.find_nodes(op="call_function", target=aten.linalg_solve_triangular.default):
        args: Any = solve.args
        matrix, right = args
        if right.target is not aten.eye.default:
            continue
        upper = solve.kwargs["upper"]
        options = [item for item in solve.kwargs.items() if item[0] != "upper"]
        inverses.setdefault((matrix, upper, *options), solve)
        is_transposed = matrix.target is aten.transpose.int and matrix.args[1:] in ((-2, -1), (-1, -2))
        known = inverses.get((matrix.args[0], not upper, *options)) if is_transposed else None
        # Products take any layout, and what they return has memory of its own.
        if known is not None and all(use.target in _PRODUCTS for use in solve.users):
            with graph.graph.inserting_after(known):
                solve.replace_all_uses_with(call(graph, aten.transpose.int, known, -2, -1))


def _sum_first(graph: GraphModule, product: Node) -> None:
    """Never compute a product A B that is only multiplied from the right, (A B) C, or summed over columns, if that
    costs more.
    """
    args: Any = product.args
    left, right = args
    multiply: Any = product.target
    multiplied = [use for use in product.users if use.target is multiply and use.args[0] is product]
    others = [use for use in product.users if use not in multiplied]

    # Multiplications: (A B) C against A (B C), and what is summed over columns is A times one.
    (rows, columns), inner = shape(product)[-2:], shape(left)[-1]
    width = sum(shape(use)[-1] for use in multiplied)
    if inner * (columns + rows) * (width + bool(others)) >= rows * columns * (inner + width):
        return
    probe = torch.empty(columns).expand(shape(product))  # strides 0, but 1 along columns
    if not product.meta["val"].is_floating_point() or not all(_is_summed(use, probe, columns) for use in others):
        return
    for use in multiplied:
        with graph.graph.inserting_before(use):
            use.replace_all_uses_with(call(graph, multiply, left, call(graph, multiply, right, use.args[1])))
    if others:  # their sums over columns do not notice that all columns have become the mean
        with graph.graph.inserting_before(product):
            short = call(graph, multiply, left, call(graph, aten.mean.dim, right, [-1], True))
            product.replace_all_uses_with(call(graph, aten.expand.default, short, list(shape(product))))


def _is_summed(use: Any, probe: Tensor, columns: int) -> bool:
    """Whether ``use``, of a tensor laid out as ``probe``, sums over columns, after views and changes of sign."""
    if use.target in (aten.sum.dim_IntList, aten.sum.default):
        axes = use.args[1] if len(use.args) > 1 and use.args[1] else range(probe.ndim)
        return any(probe.stride(axis) == 1 and probe.shape[axis] == columns for axis in axes)
    if use.target is not aten.neg.default:
        if use.target not in _VIEWS:
            return False
        try:
            probe = use.target(probe, *use.args[1:])
        except RuntimeError:  # such a view would mix columns with rows
            return False
    return all(_is_summed(further, probe, columns) for further in use.users)
