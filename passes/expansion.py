"""Operands that are stored small and expanded by an index where they are read.

An addition couples the nodes of all that is added: one joint layout for all of them is free of
copies, and as fine as the finest.  The other form stores an operand by its own fibers and expands
it (``index_select``) before it is added.  The same helps where a layer feeds an op that needs every
node: queries and keys of heads that cannot shrink, a value read by an unknown op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from torch import fx

from fxfib.coloring import Factor, Labels
from fxfib.macs import macs_of
from fxfib.passes.layout import Layout
from fxfib.passes.relations import (
    Even,
    Finer,
    Full,
    Keep,
    Move,
    Ref,
    Refine,
    Relation,
    Same,
    SameSize,
    components,
)

if TYPE_CHECKING:
    from fxfib.passes.forward import Analysis
    from fxfib.passes.plan import Plan

# In multiply-accumulates, as one thread of ONNX Runtime does them: a parameter, one more op, a
# number that an index moves.  Channels of an image move side by side, which is cheap, but a
# convolution is no longer fused with the addition and the ReLU behind it, and leaves its blocked
# layout; on the last axis numbers are transposed on the way.
PARAMETER = 1.0
CALL = 3e4
MOVED = 45.0
MOVED_TRANSPOSED = 30.0


@dataclass(frozen=True, eq=False)
class Edge:
    """An axis of a value as one op reads it: where an index could expand it.

    Attributes:
        own: the colors of the value by itself.
    """

    reader: fx.Node
    source: fx.Node
    axis: int
    own: Factor

    @property
    def stored(self) -> Ref:
        """The axis as it is stored."""
        return (self.source, self.axis)

    @property
    def read(self) -> Ref:
        """The axis as the reader sees it."""
        return (self.reader, self.name)

    @property
    def name(self) -> str:
        """Of the axis that the reader sees, inside its op."""
        return f"{self.source.name} axis {self.axis}"


@dataclass(frozen=True, eq=False)
class Expansion:
    """What an index does to an operand.

    Attributes:
        axis: of the operand.
        index: int64 ``[slots read]``, the stored slot of each.
        read: the layout behind it.
    """

    axis: int
    index: Labels
    read: Layout


def separated(analysis: Analysis, edges: Iterable[Edge]) -> list[Relation]:
    """The relations in which the readers of some edges see axes of their own."""
    seen: dict[fx.Node, dict[Ref, Ref]] = {}
    said = {edge.reader: list(analysis.by_node.get(edge.reader, ())) for edge in edges}
    added: list[Relation] = []
    heads = analysis.heads
    for edge in edges:
        seen.setdefault(edge.reader, {})[edge.stored] = edge.read
        # One number for all its members, or the index alone would not be enough.
        added += [Finer(edge.read, edge.stored), Refine(edge.stored, edge.own.keyed())]
        if edge.source in heads.roots:
            said[edge.reader] += heads.relations.get(edge.source, ())
        if edge.stored in heads.summed and heads.summed[edge.stored].chosen.any():
            added.append(Full(edge.read, "an index gives back what is stored, not sums of it"))
    changed = {
        id(relation): _renamed(relation, names)
        for reader, names in seen.items()
        for relation in said[reader]
    }
    return [changed.get(id(r), r) for r in analysis.relations] + added


def _renamed(relation: Relation, names: dict[Ref, Ref]) -> Relation:
    def name(ref: Ref) -> Ref:
        return names.get(ref, ref)

    match relation:
        case Same(a, b) | Finer(a, b):
            return type(relation)(name(a), name(b))
        case Full() | Refine() | Keep() | Even():
            return replace(relation, a=name(relation.a))
        case SameSize(refs, above):
            return SameSize(tuple(map(name, refs)), tuple(map(name, above)))
        case Move(out, sources, index):
            named = tuple(tuple(map(name, source)) for source in sources)
            return Move(tuple(map(name, out)), named, index)


def expansions(
    edges: Iterable[Edge], layouts: dict[Ref, Layout]
) -> dict[tuple[fx.Node, fx.Node], list[Expansion]]:
    """By reader and source, what has to be expanded; what is read as it is stored is left out."""
    found: dict[tuple[fx.Node, fx.Node], list[Expansion]] = {}
    for edge in edges:
        stored, read = layouts[edge.stored], layouts[edge.read]
        index = stored.slot[read.representative]
        assert np.all(index >= 0), "what is read is stored"
        if not np.array_equal(index, np.arange(stored.size)):
            expansion = Expansion(edge.axis, index, read)
            found.setdefault((edge.reader, edge.source), []).append(expansion)
    return found


def choose(analysis: Analysis, mode: str, solve: Callable[[Sequence[Edge]], Plan]) -> Plan:
    """The plan of a mode, for one coupled group after the other.

    Args:
        mode: ``joint``, no index; ``index``, where that makes the network smaller at all; ``auto``,
            where it saves more than the index costs.
        solve: makes a plan in which some edges are separated.
    """
    best = solve(())
    group = components(analysis.relations)
    groups: dict[Ref, list[Edge]] = {}
    for edge in analysis.edges if mode != "joint" else ():
        if _stores_less(best, edge):
            groups.setdefault(group.get(edge.stored, edge.stored), []).append(edge)
    if not groups:
        return best
    least, chosen = cost(best), list[Edge]()
    for members in groups.values():
        trial = solve([*chosen, *members])
        price = cost(trial, moved=mode == "auto")
        if price < least:
            best, least, chosen = trial, price, [*chosen, *members]
    return best


def _stores_less(joint: Plan, edge: Edge) -> bool:
    layout = joint.layout(*edge.stored)
    return len(np.unique(edge.own.keyed()[layout.slot >= 0])) < layout.size


def cost(plan: Plan, *, moved: bool = True) -> float:
    """Multiply-accumulates and parameters of one call on the example inputs, in the former.

    Args:
        moved: count what the indices cost, too.
    """
    analysis = plan.analysis
    graph_module = analysis.graph_module

    def sizes(node: fx.Node) -> tuple[int, ...]:
        shape = enumerate(analysis.shape(node))
        layouts = plan.layouts
        return tuple(layouts[node, a].size if (node, a) in layouts else n for a, n in shape)

    total = macs_of(graph_module, sizes) + PARAMETER * _parameters(plan, sizes)
    for (_, source), found in plan.expansions.items() if moved else ():
        shape = list(sizes(source))
        for expansion in found:
            shape[expansion.axis] = len(expansion.index)
            last = expansion.axis == len(shape) - 1
            total += CALL + (MOVED_TRANSPOSED if last else MOVED) * math.prod(shape)
    return total


def _parameters(plan: Plan, sizes: Callable[[fx.Node], tuple[int, ...]]) -> int:
    parameters = dict(plan.analysis.graph_module.named_parameters(remove_duplicate=False))
    nodes = plan.analysis.graph_module.graph.find_nodes(op="get_attr")
    return sum(math.prod(sizes(node)) for node in nodes if node.target in parameters)
