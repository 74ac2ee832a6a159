"""Which of a CPU's two libraries multiplies matrices of given shapes faster: torch's BLAS (MKL, mostly) or oneDNN."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyrovae.infer.machine import recall, remember

__all__ = ["is_faster_in_onednn", "onednn_mm"]

MARGIN = 0.9
"""oneDNN is chosen where it takes at most this part of the other's time."""
REPEATS = 5

_library = torch.library.Library("pyrovae", "DEF")
_library.define("onednn_mm(Tensor left, Tensor right) -> Tensor")


@torch.library.impl(_library, "onednn_mm", "CPU")
def _onednn_mm(left: Tensor, right: Tensor) -> Tensor:
    # The name in torch; an operator of our own, since the compiler's rule for that one asks for constant weights.
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")


@torch.library.register_fake("pyrovae::onednn_mm")
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


onednn_mm = torch.ops.pyrovae.onednn_mm.default

Layout = tuple[Sequence[int], Sequence[int]]
"""Shape and strides."""


def is_faster_in_onednn(left: Layout, right: Layout) -> bool:
    """Whether oneDNN multiplies two float32 matrices faster.

    Measured once on a machine and remembered on disk, so that later processes compile the same program.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    if 0 in (*left[0], *right[0]):
        return False
    key = f"{tuple(left[0])} {tuple(left[1])} by {tuple(right[0])} {tuple(right[1])}, {torch.get_num_threads()} threads"
    known = recall("products").get(key)
    if known is None:
        seconds = _measure(left, right)
        known = seconds["onednn"] <= MARGIN * seconds["blas"]
        remember("products", key, known)
    return known


def _measure(left: Layout, right: Layout) -> dict[str, float]:
    """Seconds a product, the least of five repeats in turn."""
    with torch.no_grad():
        a, b = (torch.empty_strided(*x, dtype=torch.float32, device="cpu").fill_(0.5) for x in (left, right))
        out = a.new_empty(a.shape[0], b.shape[1])
        products: dict[str, Callable[[], object]] = {
            "blas": lambda: torch.mm(a, b, out=out),
            "onednn": lambda: onednn_mm(a, b),
        }
        best = dict.fromkeys(products, float("inf"))
        for repeat in range(REPEATS + 1):
            for name, product in products.items():
                # The first is a warm-up, and tells how many fill a millisecond.
                calls = 1 if repeat == 0 else max(1, min(50, int(1e-3 / best[name])))
                start = time.perf_counter()
                for _ in range(calls):
                    product()
                seconds = (time.perf_counter() - start) / calls
                best[name] = seconds if repeat <= 1 else min(best[name], seconds)
        return best
