"""Norms that a model writes out in elementary operations become the one operation that they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxfib.graph_tools import fixed_size, value_of

aten = torch.ops.aten


def gather_norms(graph: fx.Graph) -> None:
    """Writes ``x * rsqrt(mean(x ** 2, -1) + eps)`` as ``rms_norm``, in place.

    ONNX and compilers know that op; and what its channels need is known in one place.
    """
    for node in graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        found = _rms_norm_of(node)
        if found is None:
            continue
        source, eps = found
        with graph.inserting_before(node):
            size = [fixed_size(value_of(source).shape[-1])]
            norm = graph.call_function(aten.rms_norm.default, (source, size, None, eps))
        norm.meta = dict(node.meta)
        node.replace_all_uses_with(norm)
        graph.erase_node(node)


def _rms_norm_of(node: fx.Node) -> tuple[fx.Node, float] | None:
    """What is normalised and the epsilon, where a product is an RMS norm without a weight."""
    for source, factor in (node.args[:2], node.args[1::-1]):
        if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), torch.Tensor):
            continue
        shifted = _only_input(factor, aten.rsqrt.default)
        mean = _only_input(shifted, aten.add.Tensor)
        square = _only_input(mean, aten.mean.dim)
        if square is None or not isinstance(shifted.args[1], (int, float)):  # type: ignore[union-attr]
            continue
        value = value_of(source)
        last = (value.ndim - 1, -1)
        dims, keep = [*mean.args, None, False][1:3]  # type: ignore[union-attr]
        if not isinstance(dims, (list, tuple)) or len(dims) != 1 or dims[0] not in last or not keep:
            continue
        plain = not shifted.kwargs and not mean.kwargs and len(mean.args) < 4  # type: ignore[union-attr]
        same = value.dtype == value_of(node).dtype and value.shape == value_of(node).shape
        if plain and same and fixed_size(value.shape[-1]) is not None and _squares(square, source):
            return source, float(shifted.args[1])  # type: ignore[union-attr]
    return None


def _only_input(node: Any, target: Any) -> fx.Node | None:
    """The first argument of a call that nothing but its one reader needs."""
    if not isinstance(node, fx.Node) or node.target is not target or len(node.users) != 1:
        return None
    source = node.args[0]
    return source if isinstance(source, fx.Node) else None


def _squares(node: fx.Node, source: fx.Node) -> bool:
    if len(node.users) != 1:
        return False
    if node.target is aten.pow.Tensor_Scalar:
        return node.args == (source, 2)
    if node.target is aten.mul.Tensor:
        return node.args == (source, source)
    return node.target is aten.square.default and node.args == (source,)
