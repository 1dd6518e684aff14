"""The plan: layouts of every axis, decided once, before anything is rewritten."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch import fx

from fxfib.coloring import FIRST_FREE, ZERO, Factor, Floats
from fxfib.passes.expansion import Edge, Expansion, choose, expansions, separated
from fxfib.passes.forward import Analysis, PendingAxis, initial_layout
from fxfib.passes.layout import Layout, MergeLayout, merge_layout
from fxfib.passes.liveness import live_nodes
from fxfib.passes.relations import Full, Keep, Ref, Refine, Relation
from fxfib.passes.rules import find_rule
from fxfib.passes.rules.linear import Embedding, LinearMap
from fxfib.passes.rules.splitting import GetItem, Split, Unbind
from fxfib.passes.solve import Solver
from fxfib.signature import Form


@dataclass
class Plan:
    """What will be merged.

    Attributes:
        analysis: the coloring it rests on.
        layouts: slots of every axis that a relation names.
        weights: for a node, what makes its members comparable (see ``Average``); missing: nothing.
        reasons: why an axis keeps its full width.
        tables: for an embedding's table that linear layers read, too, the embedding.  It is stored
            as the embedding needs it (columns averaged), and these layers count what they read.
        relations: what the layouts obey.
        expansions: by reader and source, where an index expands what is read.
        apart: slots of an axis that are there only because other axes must have its size.
        masses: for a node, how much each member counts in the average of its slot; missing: alike.
    """

    analysis: Analysis
    layouts: dict[Ref, Layout]
    weights: dict[fx.Node, Floats]
    reasons: dict[Ref, str]
    tables: dict[fx.Node, fx.Node] = field(default_factory=dict)
    relations: Sequence[Relation] = ()
    expansions: dict[tuple[fx.Node, fx.Node], list[Expansion]] = field(default_factory=dict)
    masses: dict[fx.Node, Floats] = field(default_factory=dict)
    apart: dict[Ref, int] = field(default_factory=dict)

    @cached_property
    def indexed(self) -> frozenset[Ref]:
        """Axes that are stored as they are, and expanded where they are read."""
        return frozenset(
            (source, expansion.axis)
            for (_, source), found in self.expansions.items()
            for expansion in found
        )

    def layout(self, node: fx.Node, axis: int | str) -> Layout:
        """Slots of an axis; every node its own where no relation names it."""
        ref = (node, axis)
        if ref not in self.layouts:
            size = (
                self.analysis.inner_sizes[ref]
                if isinstance(axis, str)
                else self.analysis.shape(node)[axis]
            )
            self.layouts[ref] = MergeLayout(np.arange(size), np.arange(size))
        return self.layouts[ref]


def make_plan(analysis: Analysis, round_to: int | None = None, residual: str = "joint") -> Plan:
    """Solve the relations of an analysis.

    Args:
        analysis: a finished forward coloring.
        round_to: keep every merged width a multiple of this number where the original allows it.
        residual: how values that are added are stored (:func:`fxfib.compile`).
    """
    tables = tied_tables(analysis)
    guard_shared_parameters(analysis, tables)
    live = live_nodes(analysis)
    inner = [Keep(ref, mask) for ref, mask in live.items() if isinstance(ref[1], str)]

    def solve(edges: Sequence[Edge]) -> Plan:
        relations = separated(analysis, edges) if edges else analysis.relations
        solver = Solver([*relations, *inner], lambda ref: initial_layout(analysis, live, ref))
        solver.run(round_to)
        layouts: dict[Ref, Layout] = {
            ref: merge_layout(ids, solver.keep[ref]) for ref, ids in solver.ids.items()
        }
        weights = comparable(analysis, edges)
        return Plan(
            analysis,
            layouts,
            weights,
            solver.reasons,
            tables,
            relations,
            expansions(edges, layouts),
            masses(analysis, weights),
            solver.apart,
        )

    return choose(analysis, residual, solve)


def masses(analysis: Analysis, weights: Iterable[fx.Node]) -> dict[fx.Node, Floats]:
    """How much the nodes of a value count in averages: what the policy said where it was colored.

    Args:
        weights: the values whose nodes can be averaged, every reader before what it reads.
    """
    found: dict[fx.Node, Floats] = {}
    for node in weights:
        uses = analysis.gains.get(node, [])
        # A value is colored along one axis; others are those of nodes inside an op.
        given = next((m for ref, m in analysis.policy.masses.items() if ref[0] is node), None)
        if given is None and len(uses) == 1:
            given = found.get(uses[0][0])
        if given is not None:
            found[node] = given
    return found


def comparable(analysis: Analysis, edges: Iterable[Edge] = ()) -> dict[fx.Node, Floats]:
    """For every value with one coloring, what brings its nodes to the scale of their color.

    A colored node divides by its scale.  A pending one passes through exactly one op that applied a
    gain to it (batch norm, a product with numbers), and divides by what that op's output does.
    Constants of different values may share a slot, and no average stands for them all: NaN, so that
    the first member does.

    Args:
        edges: what is stored by its own colors, although it may be pending.
    """
    weights: dict[fx.Node, Floats] = {}
    own = {edge.source: edge.own for edge in edges}
    for node in reversed(analysis.graph_module.graph.nodes):
        value = analysis.values.get(node)
        if value is None:
            continue
        if value.form is None or value.factor(value.form.axis) is not None:
            single = [f for f in value.factors if len(f.axes) == 1]
            if len(single) == 1:
                weights[node] = _to_scale(single[0])
        elif node in own:
            weights[node] = _to_scale(own[node])
        elif isinstance(value.form, (Form, PendingAxis)):
            uses = analysis.gains.get(node, [])
            if len(uses) == 1 and uses[0][0] in weights and len(node.users) == 1:
                consumer, gain = uses[0]
                weights[node] = weights[consumer] * (1.0 if gain is None else gain)
    return weights


def _to_scale(factor: Factor) -> Floats:
    scales = np.where(factor.scales == 0, 1.0, factor.scales)
    return np.where(factor.labels < FIRST_FREE, np.nan, 1.0 / scales)


def tied_tables(analysis: Analysis) -> dict[fx.Node, fx.Node]:
    """Embedding tables that are the weights of linear layers, too: the table and its embedding."""
    found = {}
    for table in analysis.graph_module.graph.find_nodes(op="get_attr"):
        embeddings, heads = [], []
        for user in table.users:
            rule = find_rule(user)
            if isinstance(rule, Embedding) and user.args[0] is table:
                embeddings.append(user)
            elif isinstance(rule, LinearMap) and not analysis.is_constant(user):
                _, weight, bias, out = rule.operands(analysis, user)
                if weight is table and bias is not table and out == 0:
                    heads.append(user)
        followed = not any(user in analysis.opaque for user in table.users)
        everybody = len(embeddings) + len(heads) == len(table.users)
        if embeddings and heads and everybody and followed:
            found[table] = embeddings[0]
    return found


def guard_shared_parameters(analysis: Analysis, tables: Mapping[fx.Node, fx.Node]) -> None:
    """A parameter read by several ops gets one decision: nothing is folded into it that is not
    the same for all of them.
    """
    graph = analysis.graph_module.graph
    parameters = [piece for node in graph.find_nodes(op="get_attr") for piece in _pieces(node)]
    for parameter in parameters:
        readers = readers_of(analysis, parameter)
        if len(readers) < 2:
            continue
        kinds = {str(reader.target) for reader in readers}
        tensors = analysis.shape(parameter)
        mixed = len(kinds) > 1 and parameter not in tables
        if mixed or any(analysis.is_constant(u) for u in parameter.users):
            reason = f"the parameter {parameter.target} is shared by different ops"
            analysis.relate(*(Full((parameter, axis), reason) for axis in range(len(tensors))))
        sources = [
            [source for source in reader.all_input_nodes if not analysis.is_constant(source)]
            for reader in readers
        ]
        for place in range(max(map(len, sources))):
            seen = [found[place] for found in sources if place < len(found)]
            # The steps of a loop read one value each, colored alike: what is folded is the same.
            if len(kinds) == 1 and len(seen) == len(readers) and _alike(analysis, seen):
                continue
            for source in seen:
                for axis, factor in analysis.factors(source).items():
                    if (source, axis) in analysis.heads.free:
                        continue  # it has no colors of its own to fold in
                    analysis.relate(
                        Refine((source, axis), factor.keyed()),
                        Keep((source, axis), factor.constant & (factor.labels != ZERO)),
                    )


def _pieces(parameter: fx.Node) -> list[fx.Node]:
    """A parameter, or the parts that it is only read in, which have nothing in common."""
    users = list(parameter.users)
    if len(users) != 1 or not isinstance(find_rule(users[0]), Split | Unbind):
        return [parameter]
    parts = list(users[0].users)
    numbers = {part.args[1] for part in parts if isinstance(find_rule(part), GetItem)}
    return parts if len(numbers) == len(parts) else [parameter]


def _alike(analysis: Analysis, sources: Sequence[fx.Node]) -> bool:
    """Whether values have the same labels and factors on the same axes."""
    first, *others = [analysis.factors(source) for source in sources]
    return all(
        first.keys() == other.keys()
        and all(
            np.array_equal(first[axis].labels, other[axis].labels)
            and np.array_equal(first[axis].scales, other[axis].scales)
            for axis in first
        )
        for other in others
    )


def readers_of(analysis: Analysis, parameter: fx.Node) -> list[fx.Node]:
    """The ops that meet a parameter with a value of the network, through constant arithmetic."""
    found: list[fx.Node] = []
    pending: Iterable[fx.Node] = [parameter]
    seen: set[fx.Node] = set()
    while pending:
        users = {user: None for node in pending for user in node.users if user not in seen}
        seen |= set(users)
        found += [u for u in users if not analysis.is_constant(u)]
        pending = [u for u in users if analysis.is_constant(u)]
    return found
