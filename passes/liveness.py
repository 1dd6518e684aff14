"""Which nodes anybody reads: a node whose outgoing weights are all zero can be dropped."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import fx

from fxfib.passes.forward import Analysis
from fxfib.passes.relations import Ref
from fxfib.passes.rules import find_rule
from fxfib.passes.rules.base import is_tensor, tied_inputs

Mask = npt.NDArray[np.bool_]


def live_nodes(analysis: Analysis) -> dict[Ref, Mask]:
    """For every tracked axis, the nodes that can influence an output of the graph."""
    live: dict[Ref, Mask] = {}

    def mark(node: fx.Node, axis: int, mask: Mask | None = None) -> None:
        ref = (node, axis)
        size = analysis.shape(node)[axis]
        old = live.setdefault(ref, np.zeros(size, dtype=bool))
        live[ref] = old | (np.ones(size, dtype=bool) if mask is None else mask)

    def mark_inputs(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if is_tensor(source):
                for axis in analysis.value(source).tracked_axes:
                    mark(source, axis)

    for node in reversed(analysis.graph_module.graph.nodes):
        if node.op == "output":
            mark_inputs(node)
        if node.op != "call_function" or analysis.is_constant(node):
            continue
        rule = None if node in analysis.opaque else find_rule(node)
        several = rule is not None and rule.pointwise and not is_tensor(node)
        if several and analysis.value(node).parts is not None:
            continue  # the parts of a split are followed one by one
        # A node without relations is a barrier, or has nothing tracked: it reads everything.
        if rule is None or node not in analysis.by_node:
            if node.users:
                mark_inputs(node)
            continue
        if rule.pointwise:
            alive = {
                axis: live.get((node, axis), np.zeros(analysis.shape(node)[axis], dtype=bool))
                for axis in analysis.value(node).tracked_axes
            }
            reached = set()
            for (source, place), mask in tied_inputs(analysis, node, alive):
                reached.add((source, place))
                if isinstance(place, int):
                    mark(source, place, mask)
            for source in node.all_input_nodes:
                if is_tensor(source):
                    for axis in analysis.value(source).tracked_axes:
                        if (source, axis) not in reached:
                            mark(source, axis)
            continue
        said = dict(rule.reads(analysis, node, live))
        # Of axes inside the op only the op itself can tell.
        live.update({ref: mask for ref, mask in said.items() if isinstance(ref[1], str)})
        for source in node.all_input_nodes:
            if is_tensor(source):
                for axis in analysis.value(source).tracked_axes:
                    mark(source, axis, said.get((source, axis)))
    return live
