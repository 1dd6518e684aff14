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
from fxfib.passes.cover import layers, size_of
from fxfib.passes.forward import OUTPUT
from fxfib.passes.relations import Even, Full, Keep, Move, Ref, Same
from fxfib.passes.rules import find_rule
from fxfib.passes.rules.base import is_tensor
from fxfib.passes.rules.recurrent import Recurrent


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
    for calls in layers(analysis, analysis.continued.values):
        name, ref = calls[0]
        unit = Unit(name, size_of(analysis, ref))
        try:
            if len(calls) > 1:
                raise _Refused("it is called several times")
            _follow(analysis, unit, ref)
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


def _follow(analysis: Colored, unit: Unit, start: Ref) -> None:
    forward = set(analysis.continued.values)
    places: dict[Ref, Labels] = {start: np.arange(unit.size)[:, None]}
    queue = deque([start])
    while queue:
        ref = queue.popleft()
        if isinstance(ref[1], str):
            _inside(analysis, unit, ref, places[ref])
        for relation in () if isinstance(ref[1], str) else analysis.by_node.get(ref[0], ()):
            if isinstance(relation, Same):
                _incoming(analysis, unit, ref, places, relation)
        for user in ref[0].users:
            if user not in forward:
                continue
            if user.op == "output":
                raise _Refused(OUTPUT)
            for out, positions in _through(analysis, unit, user, ref, places[ref]):
                if out not in places:
                    places[out] = positions
                    queue.append(out)
                elif not np.array_equal(places[out], positions):
                    raise _Refused(f"{user.name} lays its nodes over each other")


def _sizes_only(user: fx.Node) -> bool:
    return "sym_size" in str(user.target)


def _incoming(
    analysis: Colored, unit: Unit, ref: Ref, places: dict[Ref, Labels], relation: Same
) -> None:  # fmt: skip
    for one, (source, own) in ((relation.a, relation.b), (relation.b, relation.a)):
        if one != ref or isinstance(own, str):
            continue
        if not analysis.is_constant(source):
            if (source, own) not in places:
                raise _Refused(f"its nodes meet those of {source.name}")
        elif source.op == "get_attr":
            unit.incoming.append(Place(str(source.target), own, places[ref]))
        else:
            raise _Refused("its parameters are computed from others")


def _through(
    analysis: Colored, unit: Unit, user: fx.Node, ref: Ref, positions: Labels
) -> list[tuple[Ref, Labels]]:
    """Where the nodes are behind one reader; its weights are recorded."""
    if _sizes_only(user):
        return []
    found: list[tuple[Ref, Labels]] = []
    relations = analysis.by_node.get(user, [])
    if isinstance(ref[1], str):
        tied = any(ref in r.refs for r in relations if isinstance(r, (Same, Move)))
        if not (tied and _read_here(analysis, user, ref)):
            return []  # another output of the op, where other layers' nodes are
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


def _read_here(analysis: Colored, user: fx.Node, ref: Ref) -> bool:
    """Whether a layer's nodes are read in one of its op's outputs, told from other layers'."""
    rule = find_rule(ref[0])
    number = int(user.args[1])  # type: ignore[arg-type]
    if number == 0 or not isinstance(rule, Recurrent):
        return True
    layers = rule.layers(analysis, ref[0])
    read = rule.rows_read(ref[0], number, len(layers), analysis.continued.added)
    own = next(layer.number for layer in layers if ref[1] in (layer.hidden, layer.output))
    if read[own] and read.sum() > 1:
        raise _Refused(f"{user.name} lays the nodes of several layers over each other")
    return bool(read[own])


def _inside(analysis: Colored, unit: Unit, ref: Ref, positions: Labels) -> None:
    """The parameters of a recurrent layer: rows by gates, columns of its own and the next layer."""
    relations = analysis.by_node.get(ref[0], [])
    if any(isinstance(r, Same) and ref in r.refs and _is_row(r, ref) for r in relations):
        raise _Refused("a projection stands between its nodes and who reads them")
    rows: Ref | None = None
    for relation in relations:
        if isinstance(relation, Move) and any(ref in source for source in relation.sources):
            (target, axis), placed = _moved(analysis, ref[0], ref, positions, relation, inside=True)
            into = unit.incoming if axis == 0 else unit.outgoing
            into.append(Place(str(target.target), axis, placed))  # type: ignore[arg-type]
            rows = (target, axis) if axis == 0 else rows
        elif isinstance(relation, Same) and ref in relation.refs:
            target, axis = relation.b if relation.a == ref else relation.a
            if target.op != "get_attr":
                raise _Refused(f"its first state, {target.name}, is computed node by node")
            unit.outgoing.append(Place(str(target.target), axis, positions))  # type: ignore[arg-type]
    for relation in relations:
        if rows is not None and isinstance(relation, Same) and rows in relation.refs:
            target, axis = relation.b if relation.a == rows else relation.a
            own = unit.incoming[0].positions
            unit.incoming.append(Place(str(target.target), axis, own))  # type: ignore[arg-type]


def _is_row(relation: Same, ref: Ref) -> bool:
    other = relation.b if relation.a == ref else relation.a
    return other[1] == 0


def _is_matrix(analysis: Colored, source: fx.Node, axis: int, ref: Ref) -> bool:
    shape = analysis.shape(source) if source.op == "get_attr" else ()
    return len(shape) > 1 and shape[axis] == size_of(analysis, ref)


def _moved(
    analysis: Colored, user: fx.Node, ref: Ref, positions: Labels, move: Move, *,
    inside: bool = False,
) -> tuple[Ref, Labels]:  # fmt: skip
    """Where a movement puts the nodes; inside an op, in one of its parameters."""
    refusal = _Refused(f"{user.name} rearranges its nodes")
    out = move.out[0]
    expected = inside or (out[0] is user and not isinstance(out[1], str))
    if len(move.out) > 1 or not expected or (move.index < 0).any():
        raise refusal
    if sum(ref in source for source in move.sources) > 1:
        raise refusal
    first = 0
    for source in move.sources:  # laid end to end
        shape = tuple(size_of(analysis, axis) for axis in source)
        if ref in source:
            break
        first += int(np.prod(shape))
    here = np.flatnonzero((move.index >= first) & (move.index < first + int(np.prod(shape))))
    own = np.unravel_index(move.index[here] - first, shape)[source.index(ref)]
    rows = [here[np.isin(own, row)] for row in positions]
    if len({len(row) for row in rows}) > 1 or not len(rows[0]):
        raise refusal
    return out, np.stack(rows)
