"""Where the parameters of a layer's nodes lie: rows that make them, columns that read them.

For tools that replace single nodes in place (:mod:`fxfib.breaking`).  The nodes of a layer are
followed through everything that works channel by channel, a flatten included, up to the weights
that read them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from torch import fx

from fxfib.coloring import Labels
from fxfib.passes.backward import Colored
from fxfib.passes.cover import layers
from fxfib.passes.relations import Even, Full, Keep, Move, Ref, Same
from fxfib.passes.rules.base import is_tensor


@dataclass(frozen=True)
class Place:
    """Where a node's numbers are in one parameter.

    Attributes:
        name: of the parameter or buffer.
        axis: of it.
        positions: int64 ``[nodes, m]``, along this axis.
    """

    name: str
    axis: int
    positions: Labels


@dataclass
class Unit:
    """The nodes of one layer that can be replaced one by one.

    Attributes:
        layer: its module path.
        size: how many nodes.
        incoming: what makes them (rows, biases, the parameters of a batch norm behind).
        outgoing: what reads them (columns).
        reason: why they cannot be replaced; empty if they can.
    """

    layer: str
    size: int
    incoming: list[Place] = field(default_factory=list)
    outgoing: list[Place] = field(default_factory=list)
    reason: str = ""


class _Refused(Exception):
    pass


def units_of(analysis: Colored) -> list[Unit]:
    """Every layer of the graph, with the places of its nodes or the reason why there are none."""
    found = []
    for name, calls in layers(analysis, analysis.continued.values).items():
        ref = calls[0][1]
        node, axis = ref
        size = analysis.inner_sizes[ref] if isinstance(axis, str) else analysis.shape(node)[axis]
        unit = Unit(name, size)
        try:
            if len(calls) > 1:
                raise _Refused("it is called several times")
            if isinstance(axis, str):
                raise _Refused("its nodes are read by the layer itself, at the next step")
            _follow(analysis, unit, (node, axis))
            if not unit.outgoing:
                raise _Refused("no weight reads its nodes")
            _refuse_shared(analysis, unit)
        except _Refused as stop:
            unit.incoming, unit.outgoing, unit.reason = [], [], str(stop)
        found.append(unit)
    return found


def _refuse_shared(analysis: Colored, unit: Unit) -> None:
    forward = set(analysis.continued.values)
    uses: dict[str, int] = {}
    for node in analysis.continued.values:
        if node.op == "get_attr":
            count = sum(user in forward for user in node.users)
            uses[str(node.target)] = uses.get(str(node.target), 0) + count
    for place in (*unit.incoming, *unit.outgoing):
        if uses[place.name] > 1:
            raise _Refused(f"{place.name} is used several times")


def _follow(analysis: Colored, unit: Unit, start: tuple[fx.Node, int]) -> None:
    forward = set(analysis.continued.values)
    places: dict[tuple[fx.Node, int], Labels] = {start: np.arange(unit.size)[:, None]}
    queue = deque([start])
    while queue:
        ref = queue.popleft()
        for relation in analysis.by_node.get(ref[0], ()):
            if isinstance(relation, Same):
                _incoming(analysis, unit, ref, places, relation)
        for user in ref[0].users:
            if user not in forward:
                continue
            if user.op == "output":
                raise _Refused("it is an output of the network")
            for out, positions in _through(analysis, unit, user, ref, places[ref]):
                if out not in places:
                    places[out] = positions
                    queue.append(out)
                elif not np.array_equal(places[out], positions):
                    raise _Refused(f"{user.name} lays its nodes over each other")


def _sizes_only(user: fx.Node) -> bool:
    return "sym_size" in str(user.target)


def _incoming(
    analysis: Colored, unit: Unit, ref: Ref, places: dict[tuple[fx.Node, int], Labels],
    relation: Same,
) -> None:  # fmt: skip
    for one, (source, own) in ((relation.a, relation.b), (relation.b, relation.a)):
        if one != ref or isinstance(own, str):
            continue
        if not analysis.is_constant(source):
            if (source, own) not in places:
                raise _Refused(f"its nodes meet those of {source.name}")
        elif source.op == "get_attr":
            unit.incoming.append(Place(str(source.target), own, places[ref]))  # type: ignore[index]
        else:
            raise _Refused("its parameters are computed from others")


def _through(
    analysis: Colored, unit: Unit, user: fx.Node, ref: tuple[fx.Node, int], positions: Labels
) -> list[tuple[tuple[fx.Node, int], Labels]]:
    """Where the nodes are behind one reader; its weights are recorded."""
    if _sizes_only(user):
        return []
    found: list[tuple[tuple[fx.Node, int], Labels]] = []
    relations = analysis.by_node.get(user, [])
    read = False
    for relation in relations:
        if isinstance(relation, Same) and ref in relation.refs:
            other, axis = relation.b if relation.a == ref else relation.a
            if other is user and isinstance(axis, int):
                found.append(((user, axis), positions))
            elif isinstance(axis, int) and _is_matrix(analysis, other, axis, ref):
                unit.outgoing.append(Place(str(other.target), axis, positions))
                read = True
            else:
                raise _Refused(f"{user.name} reads it by weights that are computed")
        elif isinstance(relation, Move) and ref in relation.refs:
            found.append(_moved(analysis, user, ref, positions, relation))
    if not (is_tensor(user) or read):
        raise _Refused(f"{user.name} takes it apart")
    # A weight that reads the nodes is told apart from an op whose every output depends on all.
    mixed = any(
        isinstance(r, Even) or (isinstance(r, (Full, Keep)) and r.a == ref) for r in relations
    )
    if (mixed and not read) or not (found or read) or (found and read):
        raise _Refused(f"{user.name} does not keep its nodes apart")
    return found


def _is_matrix(analysis: Colored, source: fx.Node, axis: int, ref: tuple[fx.Node, int]) -> bool:
    shape = analysis.shape(source) if source.op == "get_attr" else ()
    return len(shape) > 1 and shape[axis] == analysis.shape(ref[0])[ref[1]]


def _moved(
    analysis: Colored, user: fx.Node, ref: tuple[fx.Node, int], positions: Labels, move: Move
) -> tuple[tuple[fx.Node, int], Labels]:
    simple = len(move.out) == 1 and len(move.sources) == 1 and move.out[0][0] is user
    out = move.out[0][1]
    if not simple or isinstance(out, str) or (move.index < 0).any():
        raise _Refused(f"{user.name} rearranges its nodes")
    source = move.sources[0]
    shape = tuple(analysis.shape(node)[axis] for node, axis in source)  # type: ignore[index]
    own = np.unravel_index(move.index, shape)[source.index(ref)]
    rows = [np.flatnonzero(np.isin(own, row)) for row in positions]
    if len({len(row) for row in rows}) > 1 or not len(rows[0]):
        raise _Refused(f"{user.name} rearranges its nodes")
    return (user, out), np.stack(rows)
