"""A recorded graph as compiled code: TorchInductor's, of a form of the graph that a CPU runs faster.

``tanh`` and cross-entropies become arithmetic that the compiler fuses with what surrounds it, the products of Gaussian
densities take the cheapest order, and each matrix product goes to the library that is faster at its shape. Numbers stay
those of the graph to float32 rounding.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.func import functionalize
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = [
    "compile_graph",
    "copy_of",
    "is_faster_in_onednn",
    "onednn_mm",
    "product_choices",
    "restore_product_choices",
    "torch_context",
]

aten = torch.ops.aten


def compile_graph(graph: Callable[..., Any], inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Compile ``graph`` for inputs of these shapes, strides, dtypes and devices, and run the result once on copies.

    Raises:
        Exception: whatever stops torch's compiler.
    """
    from torch import _inductor

    # Compiled and recorded noise are equal: random numbers stay those of torch's generator, in their order. (But not
    # Bernoulli's on a GPU, or of tensors that lie in another order: torch's compiler draws those in its own way.)
    options: dict[str, Any] = {"fallback_random": True, "reorder_for_peak_memory": False}

    def compiled(graph: GraphModule, options: dict[str, Any]) -> Callable[..., Any]:
        written = [node.name for node in graph.graph.find_nodes(op="placeholder") if _is_written(node)]
        names = [node.name for node in graph.graph.find_nodes(op="placeholder")]
        examples: list[Any] = [copy_of(x) if name in written else x for name, x in zip(names, inputs, strict=True)]
        with torch_context():
            run = _inductor.compile(graph, examples, options=options)
            run(*examples)
        return run

    if not any(x.is_cuda for x in inputs):
        # Calling the kernels from C++ saves a quarter of a small step. What this cannot do, the plain way may.
        with suppress(Exception), _without_compilers_log():
            return compiled(lower(graph, inputs), options | {"cpp_wrapper": True})
    return compiled(make_fx(graph, tracing_mode="fake")(*inputs), options)


def lower(graph: Callable[..., Any], inputs: Sequence[Tensor]) -> GraphModule:
    """Return ``graph`` in the form that a CPU runs faster."""
    lowered = make_fx(graph, tracing_mode="fake", decomposition_table=_CHECKED | _FASTER)(*inputs)
    if any(_is_in_place(node) for node in lowered.graph.nodes):  # without, a node is one value wherever it is read
        lowered = make_fx(functionalize(lowered), tracing_mode="fake")(*inputs)
    _reorder_products(lowered)
    _choose_libraries(lowered)
    lowered.recompile()
    return lowered


def torch_context() -> AbstractContextManager:
    """Return the context in which torch finds what it has compiled before, and records in half the time."""
    try:
        from torch._guards import TracingContext, tracing
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        return tracing(TracingContext(FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())))
    except (ImportError, TypeError):  # another torch
        return nullcontext()


def copy_of(tensor: Tensor) -> Tensor:
    """Return a copy without gradient that lies in memory as ``tensor`` does; an expanded tensor itself."""
    tensor = tensor.detach()
    if 0 in tensor.stride():
        return tensor
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


@contextmanager
def _without_compilers_log() -> Iterator[None]:
    """Silence the compiler's list of operations that it calls in a slower way."""
    logger = logging.getLogger("torch._inductor.ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _is_in_place(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _is_written(node: Node) -> bool:
    return any(
        node in use.args[3:5] if "batch_norm" in str(use.target) else _is_in_place(use) and node is use.args[0]
        for use in node.users  # the schema of batch norm does not say that it writes to its running statistics
    )


def _call(graph: GraphModule, target: OpOverload, *args: Any) -> Node:
    """Add a node that knows what it stands for."""
    node = graph.graph.call_function(target, args)
    node.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, Node) else arg for arg in args))
    return node


def _layout(node: Any) -> tuple[torch.Size, tuple[int, ...]]:
    return node.meta["val"].shape, node.meta["val"].stride()


# Elementary functions -----------------------------------------------------------------------------------------------

# tanh x = x P(x²) / Q(x²) on |x| <= 8.5, where it is 1 in float32; log(1 + e) = 2 s R(s²) with s = e / (2 + e). Least
# squares in the relative error, reweighted to even it out: 1.2e-8 and 4e-9; a float32 evaluation is within 4e-7.
_P = (0.999999988278, 0.134132324368, 0.0035340088786, 2.12507191363e-05, 1.42687206321e-08)
_Q = (1.0, 0.467465552101, 0.026022684908, 0.000334883412843, 8.14492799972e-07)
_R = (1.0, 0.33333160, 0.20012326, 0.13982172, 0.14080727)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = x * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        value = value * x + coefficient
    return value


def _tanh(x: Tensor) -> Any:
    """Compute tanh by arithmetic that the compiler fuses."""
    if x.dtype != torch.float32:
        return NotImplemented
    x = x.clamp(-8.5, 8.5)
    return (x * _polynomial(_P, x * x) / _polynomial(_Q, x * x)).clamp(-1, 1)


def _cross_entropy(
    x: Tensor, target: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None, reduction: int = 1
) -> Any:
    """Compute (1 − target) · x − log sigmoid x by arithmetic: a library's log1p takes thirty multiplications."""
    plain = weight is None and pos_weight is None and reduction == 0
    if not plain or not x.dtype == target.dtype == torch.float32:
        return NotImplemented
    e = torch.exp2(x.abs() * -1.4426950408889634)  # the compiler would keep in memory what it computes by exp
    s = e / (e + 2)
    return (1 - target) * x - torch.minimum(x, torch.zeros_like(x)) + (s + s) * _polynomial(_R, s * s)


def _linear(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """Add the bias after the product, where the compiler fuses it; ``addmm`` copies it into every row first."""
    if bias.ndim != 1 or beta != 1 or alpha != 1:
        return NotImplemented
    return torch.mm(left, right) + bias


def _solve_triangular(
    matrix: Tensor, right: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Any:
    """Multiply by the inverse where columns are many more than rows, as in the densities of many data.

    Rounding errors are those of the solve; in ill-conditioned matrices, three times those.
    """
    size = matrix.shape[-1]
    if not left or size < 16 or right.shape[-1] < 4 * size:
        return NotImplemented
    eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(matrix, eye, upper=upper, unitriangular=unitriangular) @ right


_FASTER: dict[Any, Callable[..., Any]] = {
    aten.tanh.default: _tanh,
    aten.binary_cross_entropy_with_logits.default: _cross_entropy,
    aten.addmm.default: _linear,
    aten.linalg_solve_triangular.default: _solve_triangular,
}


# Indices --------------------------------------------------------------------------------------------------------------
# An index out of bounds is an error. Compiled, these operations would take a negative one to count from the end.


def _at(x: Tensor, dim: int, index: Tensor) -> list[Tensor | None]:
    return [torch.where(index < 0, x.shape[dim], index) if axis == dim % x.ndim else None for axis in range(x.ndim)]


def _index_select(x: Tensor, dim: int, index: Tensor) -> Any:
    return aten.index.Tensor(x, _at(x, dim, index)).contiguous() if x.ndim and index.ndim else NotImplemented


def _index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Any:
    if x.ndim == 0 or index.ndim == 0 or alpha != 1:
        return NotImplemented
    return aten.index_put.default(x, _at(x, dim, index), source, accumulate=True).contiguous()


_CHECKED: dict[Any, Callable[..., Any]] = {aten.index_select.default: _index_select, aten.index_add.default: _index_add}


# The order of products ----------------------------------------------------------------------------------------------
# The log density of N data under a Gaussian with Cholesky factor L has y = L⁻¹ (x − μ), one column a datum. Its
# gradient comes back as W = L⁻ᵀ G, only multiplied by yᵀ and summed over data: L⁻ᵀ (G yᵀ) and L⁻ᵀ Σ G do without W.

_PRODUCTS = (aten.mm.default, aten.bmm.default)
_VIEWS = {
    *(aten.expand.default, aten.permute.default, aten.transpose.int, aten.t.default, aten.view.default),
    *(aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.detach.default),
}


def _reorder_products(graph: GraphModule) -> None:
    """Multiply in the order that costs least. ``graph`` has no in-place operations but at its end."""
    for node in graph.graph.nodes:  # views that change nothing hide what a product is made of
        is_inside = node.target in _VIEWS and not any(use.op == "output" for use in node.users)
        if is_inside and _layout(node) == _layout(node.args[0]):
            node.replace_all_uses_with(node.args[0])
    graph.graph.eliminate_dead_code()
    for target in _PRODUCTS:
        for product in graph.graph.find_nodes(op="call_function", target=target):
            _sum_first(graph, product)
    graph.graph.eliminate_dead_code()


def _sum_first(graph: GraphModule, product: Node) -> None:
    """Do not compute a product A B that is only multiplied from the right, (A B) C, or summed over columns, if that
    costs more.
    """
    args: Any = product.args
    left, right = args
    multiply: Any = product.target
    multiplied = [use for use in product.users if use.target is multiply and use.args[0] is product]
    others = [use for use in product.users if use not in multiplied]

    # Multiplications: (A B) C against A (B C), and what is summed over columns is A times one.
    shape = product.meta["val"].shape
    (rows, columns), inner = shape[-2:], left.meta["val"].shape[-1]
    width = sum(use.meta["val"].shape[-1] for use in multiplied)
    if inner * (columns + rows) * (width + bool(others)) >= rows * columns * (inner + width):
        return
    probe = torch.empty(columns).expand(shape)  # strides 0, but 1 along columns
    if not product.meta["val"].is_floating_point() or not all(_is_summed(use, probe, columns) for use in others):
        return
    for use in multiplied:
        with graph.graph.inserting_before(use):
            use.replace_all_uses_with(_call(graph, multiply, left, _call(graph, multiply, right, use.args[1])))
    if others:  # their sums over columns do not notice that all columns have become the mean
        with graph.graph.inserting_before(product):
            short = _call(graph, multiply, left, _call(graph, aten.mean.dim, right, [-1], True))
            product.replace_all_uses_with(_call(graph, aten.expand.default, short, list(shape)))


def _is_summed(use: Any, probe: Tensor, columns: int) -> bool:
    """Return whether ``use``, of a tensor laid out as ``probe``, sums over columns, after views and changes of sign."""
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


# The library of each product ----------------------------------------------------------------------------------------

MARGIN = 0.9
"""Part of the time of torch's BLAS (MKL, mostly) that oneDNN may take at most, to be chosen."""
REPEATS = 20
_choices: dict[str, bool] = {}

_library = torch.library.Library("pyrovae", "DEF")
_library.define("onednn_mm(Tensor left, Tensor right) -> Tensor")


@torch.library.impl(_library, "onednn_mm", "CPU")
def _onednn_mm(left: Tensor, right: Tensor) -> Tensor:
    # An operator of our own, since the compiler's rule for torch's asks for constant weights.
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")


@torch.library.register_fake("pyrovae::onednn_mm")
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


onednn_mm = torch.ops.pyrovae.onednn_mm.default


def product_choices() -> dict[str, bool]:
    """Return the measured products and whether oneDNN computes them: part of a run's checkpoint."""
    return dict(_choices)


def restore_product_choices(choices: dict[str, bool]) -> None:
    """Choose as a run did before it stopped: another library rounds differently."""
    _choices.update(choices)


def _choose_libraries(graph: GraphModule) -> None:
    """Send each matrix product to the library that is faster at its shape on this machine."""
    for node in graph.graph.find_nodes(op="call_function", target=aten.mm.default):
        if node.meta["val"].dtype == torch.float32 and is_faster_in_onednn(*map(_layout, node.args)):
            node.target = onednn_mm
        # A dimension more and again less keeps the compiler from making `addmm` of a product and what is added to it.
        uses = list(node.users)
        with graph.graph.inserting_after(node):
            more = _call(graph, aten.unsqueeze.default, node, 0)
        with graph.graph.inserting_after(more):
            less = _call(graph, aten.squeeze.dim, more, 0)
        for use in uses:
            use.replace_input_with(node, less)


def is_faster_in_onednn(left: tuple, right: tuple) -> bool:
    """Return whether oneDNN multiplies two float32 matrices of these shapes and strides faster. Measured once."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    if 0 in (*left[0], *right[0]):
        return False
    key = f"{tuple(left[0])} {tuple(left[1])} by {tuple(right[0])} {tuple(right[1])}, {torch.get_num_threads()} threads"
    if key not in _choices:
        blas, onednn = _seconds_of_products(left, right)
        _choices[key] = onednn <= MARGIN * blas
    return _choices[key]


def _seconds_of_products(left: tuple, right: tuple) -> tuple[float, float]:
    """Time a product in BLAS and in oneDNN, in turn. The least of many repeats is what other work delays least."""
    with torch.no_grad():
        a, b = (torch.empty_strided(*x, dtype=torch.float32, device="cpu").fill_(0.5) for x in (left, right))
        out = a.new_empty(a.shape[0], b.shape[1])
        best = [float("inf"), float("inf")]
        for repeat in range(REPEATS + 1):
            for index, product in enumerate((lambda: torch.mm(a, b, out=out), lambda: onednn_mm(a, b))):
                # The first is a warm-up, and tells how many fill half a millisecond.
                calls = 1 if repeat == 0 else max(1, min(50, int(5e-4 / best[index])))
                start = time.perf_counter()
                for _ in range(calls):
                    product()
                seconds = (time.perf_counter() - start) / calls
                best[index] = seconds if repeat <= 1 else min(best[index], seconds)
    return best[0], best[1]
