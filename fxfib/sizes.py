"""Sizes among the arguments of a graph: numbers, or sizes of the inputs; never of other values."""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fxfib.graph_tools import call, fixed_size, sizes_of, value_of

aten = torch.ops.aten

# They read only the shape of their second tensor.
SHAPED_AS = {
    aten.view_as.default: aten.reshape.default,
    aten.reshape_as.default: aten.reshape.default,
    aten.expand_as.default: aten.expand.default,
}


def name_sizes(graph: fx.Graph, node: fx.Node) -> None:
    """The sizes of the second tensor in place of that tensor."""
    source, other = node.args
    assert isinstance(other, fx.Node) and isinstance(node.target, torch._ops.OpOverload)
    with graph.inserting_before(node):
        sizes = sizes_of(graph, other, node)
    node.target = SHAPED_AS[node.target]
    node.args = (source, sizes)


def read_sizes_off_inputs(graph: fx.Graph) -> None:
    """No value is read for its size alone: a free one is that of an input, times a number."""
    inputs: dict[Any, tuple[fx.Node, int]] = {}
    for node in graph.find_nodes(op="placeholder"):
        if isinstance(value_of(node), Tensor):
            for axis, size in enumerate(value_of(node).shape):
                if fixed_size(size) is None:
                    inputs.setdefault(size.node.expr, (node, axis))
    first = next((node for node in graph.nodes if node.op == "call_function"), None)
    sizes: dict[Any, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=aten.sym_size.int):
        size = value_of(node)
        if node.args[0].op == "placeholder" or fixed_size(size) is not None:
            continue
        times, symbol = size.node.expr.as_coeff_Mul()
        if symbol not in inputs or not times.is_Integer:
            continue
        assert first is not None
        with graph.inserting_before(first):
            if symbol not in sizes:
                sizes[symbol] = call(graph, aten.sym_size.int, inputs[symbol], like=node)
            if size.node.expr not in sizes:
                product = (sizes[symbol], int(times))
                sizes[size.node.expr] = call(graph, operator.mul, product, like=node)
        node.replace_all_uses_with(sizes[size.node.expr])
        graph.erase_node(node)
