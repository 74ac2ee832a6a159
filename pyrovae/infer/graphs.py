"""Nodes of recorded graphs, which know what they stand for: ``make_fx(..., tracing_mode="fake")`` notes it."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

__all__ = ["call", "is_in_place", "layout", "replace", "shape"]


def call(graph: GraphModule, target: OpOverload, *args: Any, **kwargs: Any) -> Node:
    """A new node, which knows its shape."""
    node = graph.graph.call_function(target, args, kwargs)
    node.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, Node) else arg for arg in args), **kwargs)
    return node


def replace(node: Node, new: Node) -> None:
    """Use ``new`` for ``node``, if it lies in memory in the same way: further nodes may count on that."""
    if layout(node) == layout(new):
        node.replace_all_uses_with(new)


def shape(node: Any) -> torch.Size:
    return node.meta["val"].shape


def layout(node: Any) -> tuple[torch.Size, tuple[int, ...]]:
    return node.meta["val"].shape, node.meta["val"].stride()


def is_in_place(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable
