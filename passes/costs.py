"""What a network costs when some of its nodes are gone: parameters and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence

import numpy as np

from fxfib.coloring import Floats
from fxfib.macs import macs_by_node
from fxfib.passes.curves import Curve
from fxfib.passes.forward import Analysis
from fxfib.passes.plan import Plan
from fxfib.passes.relations import Move, Ref, Same, components


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
        tensors: list[tuple[float, list[list[int]]]] = []
        work: list[tuple[float, list[list[int]]]] = []
        graph = analysis.graph_module.graph
        macs = macs_by_node(analysis.graph_module)
        for node in graph.find_nodes(op="get_attr"):
            shape = analysis.shape(node)
            axes = [groups.get(root((node, axis)), []) for axis in range(len(shape))]
            axes = [axis for axis in axes if axis]
            if node.meta["val"].is_floating_point():
                tensors.append((float(np.prod(shape)), axes))
            for user in node.users:
                if len(shape) > 1 and user in macs:
                    work.append((macs.pop(user) / batch, axes))
        self.tensors, self.work = _Products(tensors, self.sizes), _Products(work, self.sizes)
        self.rest = sum(macs.values()) / batch

    def parameters(self, left: Floats) -> float:
        """Number of parameters, for the nodes left in every group."""
        return self.tensors.total(left)

    def macs(self, left: Floats) -> float:
        """Multiply-accumulates of one example."""
        return self.rest + self.work.total(left)

    def slope(self, left: Floats, kind: str) -> Floats:
        """How much one node less saves, in every group."""
        return (self.tensors if kind == "params" else self.work).slope(left)


class _Products:
    """Sizes that go with the parts that are left of several axes.

    Args:
        entries: a size each, and for every axis the groups whose nodes it holds.
        sizes: nodes of every group.
    """

    def __init__(self, entries: Sequence[tuple[float, list[list[int]]]], sizes: Floats) -> None:
        axes = dict.fromkeys(tuple(axis) for _, own in entries for axis in own)
        place = {axis: number for number, axis in enumerate(axes)}
        self.entries = np.array([size for size, _ in entries])
        # Which groups an axis holds; the last axis stands for none, all of which is always left.
        self.member = np.zeros((len(axes), len(sizes)))
        for axis, number in place.items():
            self.member[number, list(axis)] = 1.0
        self.whole = self.member @ sizes
        most = max((len(own) for _, own in entries), default=0)
        self.axes = np.full((len(entries), most), len(axes))
        for row, (_, own) in zip(self.axes, entries, strict=True):
            row[: len(own)] = [place[tuple(axis)] for axis in own]

    def _values(self, left: Floats) -> Floats:
        part = np.append(self.member @ left / self.whole, 1.0)
        values: Floats = self.entries * part[self.axes].prod(1)
        return values

    def total(self, left: Floats) -> float:
        """The sum, for the nodes left in every group."""
        return float(self._values(left).sum())

    def slope(self, left: Floats) -> Floats:
        """How much less the sum is for one node less of each group."""
        values = np.repeat(self._values(left)[:, None], self.axes.shape[1], 1)
        by_axis = np.bincount(self.axes.ravel(), values.ravel(), len(self.member) + 1)[:-1]
        slope: Floats = self.member.T @ (by_axis / np.maximum(self.member @ left, 1.0))
        return slope


def _tied(analysis: Analysis, held: Container[Ref]) -> Callable[[Ref], Ref]:
    """Finds, for an axis, one that stands for all that share its layout or are moved from it."""
    moved = (
        Same(out, ref)
        for move in analysis.relations
        if isinstance(move, Move)
        for out, ref in _moved(analysis, move, held)
    )
    found = components([*analysis.relations, *moved])
    return lambda ref: found.get(ref, ref)


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
