"""Multiply-accumulate operations of a captured graph, from the shapes of its values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxfib.passes.rules.base import hint

aten = torch.ops.aten

LINEAR = {aten.linear.default, aten.addmm.default, aten.mm.default, aten.bmm.default}
LINEAR |= {aten.matmul.default, aten.baddbmm.default}
CONVOLUTIONS = {
    getattr(aten, name).default
    for name in ("conv1d", "conv2d", "conv3d")
    if hasattr(getattr(aten, name), "default")
}
_TRANSPOSED = {
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}
_RECURRENT = {aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input}
_CELLS = {
    aten.lstm_cell.default,
    aten.gru_cell.default,
    aten.rnn_tanh_cell.default,
    aten.rnn_relu_cell.default,
}


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(hint(s) for s in node.meta["val"].shape)


def macs_of(
    graph_module: fx.GraphModule, shape: Callable[[fx.Node], tuple[int, ...]] = _shape
) -> int:
    """Multiply-accumulates of linear, convolution, recurrent, matrix-product and attention ops.

    Element-wise work is not counted, as is usual.  Where the batch size is dynamic the example's
    counts; the caller divides.

    Args:
        shape: sizes of a node's value, where they are not those that it carries.
    """
    return sum(macs_by_node(graph_module, shape).values())


def macs_by_node(
    graph_module: fx.GraphModule, shape: Callable[[fx.Node], tuple[int, ...]] = _shape
) -> dict[fx.Node, int]:
    """The same, op by op."""
    found: dict[fx.Node, int] = {}
    for node in graph_module.graph.nodes:
        total = 0
        if node.target in _RECURRENT:
            # Every step multiplies by every weight once.
            steps = math.prod(shape(node.args[0])[:2])
            flat = node.args[2]
            weights = [shape for shape in map(_shape, flat) if len(shape) == 2]
            total += steps * sum(map(math.prod, weights))
        elif node.target in _CELLS:
            rows = math.prod(shape(node.args[0])[:-1])
            total += rows * sum(math.prod(shape(weight)) for weight in node.args[2:4])
        tensor = node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)
        out = math.prod(shape(node)) if tensor else 0
        if not tensor:
            pass
        elif node.target in LINEAR:
            left = (
                node.args[1]
                if node.target in (aten.addmm.default, aten.baddbmm.default)
                else (node.args[0])
            )
            total += out * shape(left)[-1]
        elif node.target in CONVOLUTIONS or node.target is aten.convolution.default:
            total += out * math.prod(shape(node.args[1])[1:])
        elif node.target in _TRANSPOSED:
            total += math.prod(shape(node.args[0])) * math.prod(shape(node.args[1])[1:])
        elif node.target is aten.scaled_dot_product_attention.default:
            query, key = shape(node.args[0]), shape(node.args[1])
            total += math.prod(query) * key[-2] + out * key[-2]
        if total:
            found[node] = total
    return found
