"""What a network costs when some of its nodes are gone: parameters and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence

import numpy as np

from fxfib.coloring import Floats
from fxfib.macs import macs_by_node
from fxfib.passes.curves import Curve
from fxfib.passes.forward import Analysis
from fxfib.passes.plan import Plan
from fxfib.passes.relations import Move, Ref, Same


class Costs:
    """A model of sizes: every parameter is its own size times what is left of its axes' nodes.

    Good enough to rank merges; sizes that are promised are counted on the rewritten graph.

    Args:
        plan: of the exact analysis.
        curves: the values whose nodes may merge.
        batch: examples of the captured input, for multiply-accumulates of one.
    """

    def __init__(self, plan: Plan, curves: Sequence[Curve], batch: int = 1) -> None:
        analysis = plan.analysis
        root = _tied(analysis, plan.reasons)
        groups: dict[Ref, list[int]] = {}
        for number, curve in enumerate(curves):
            groups.setdefault(root(curve.ref), []).append(number)
        self.sizes = np.array([curve.size for curve in curves], dtype=np.float64)
        # Those whose nodes may not go, because an output or an op without a rule reads them.
        self.fixed = np.array(
            [any(root(ref) == root(curve.ref) for ref in plan.reasons) for curve in curves],
            dtype=bool,
        )
        self.tensors: list[tuple[float, list[list[int]]]] = []
        self.work: list[tuple[float, list[list[int]]]] = []
        graph = analysis.graph_module.graph
        macs = macs_by_node(analysis.graph_module)
        for node in graph.find_nodes(op="get_attr"):
            shape = analysis.shape(node)
            axes = [groups.get(root((node, axis)), []) for axis in range(len(shape))]
            axes = [axis for axis in axes if axis]
            if node.meta["val"].is_floating_point():
                self.tensors.append((float(np.prod(shape)), axes))
            for user in node.users:
                if len(shape) > 1 and user in macs:
                    self.work.append((macs.pop(user) / batch, axes))
        self.rest = sum(macs.values()) / batch

    def parameters(self, left: Floats) -> float:
        """Number of parameters, for the nodes left in every group."""
        return sum(self._product(size, axes, left) for size, axes in self.tensors)

    def macs(self, left: Floats) -> float:
        """Multiply-accumulates of one example."""
        return self.rest + sum(self._product(size, axes, left) for size, axes in self.work)

    def slope(self, left: Floats, kind: str) -> Floats:
        """How much one node less saves, in every group."""
        result = np.zeros(len(self.sizes))
        for size, axes in self.tensors if kind == "params" else self.work:
            value = self._product(size, axes, left)
            for axis in axes:
                total = left[axis].sum()
                for group in axis:
                    result[group] += value / max(total, 1.0)
        return result

    def _product(self, size: float, axes: list[list[int]], left: Floats) -> float:
        for axis in axes:
            size *= left[axis].sum() / self.sizes[axis].sum()
        return size


def _tied(analysis: Analysis, held: Container[Ref]) -> Callable[[Ref], Ref]:
    """Finds, for an axis, one that stands for all that share its layout or are moved from it."""
    parent: dict[Ref, Ref] = {}

    def find(ref: Ref) -> Ref:
        while parent.setdefault(ref, ref) != ref:
            parent[ref] = parent[parent[ref]]
            ref = parent[ref]
        return ref

    for relation in analysis.relations:
        if isinstance(relation, Same):
            parent[find(relation.b)] = find(relation.a)
        elif isinstance(relation, Move):
            for out, ref in _moved(analysis, relation, held):
                parent[find(ref)] = find(out)
    return find


def _moved(analysis: Analysis, move: Move, held: Container[Ref]) -> Iterator[tuple[Ref, Ref]]:
    """Output axes, and the input axes that their nodes come from.

    Of several axes that one is made of (gates and hidden nodes), those that are held stay whole.
    """
    sources: list[Ref] = []
    for source in move.sources:
        inner = [ref for ref in source if not isinstance(ref[1], str) or ref not in held]
        sources += inner or source
    for out in move.out:
        for ref in sources:
            node, axis = ref
            if len(move.out) == 1:
                # What is flattened: positions are all distinct, channels are the nodes.
                if isinstance(axis, str) or analysis.value(node).tracked(axis):
                    yield out, ref
            elif _size(analysis, ref) == _size(analysis, out):
                yield out, ref


def _size(analysis: Analysis, ref: Ref) -> int:
    node, axis = ref
    return analysis.inner_sizes[ref] if isinstance(axis, str) else analysis.shape(node)[axis]
