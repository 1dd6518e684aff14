"""Where attention heads lie: which channels of which linear layers meet in a product of two values.

The channels of a query, a key or a value are cut into heads by a view, and every head may merge
other channels than the next one.  A layout of one axis cannot say that, so each head gets an axis
of its own, inside the op that joins it, and the flat axes of the linear layers are these axes end
to end.  What lies between only moves channels: the elements are numbered and the real ops are run
on the numbers (:mod:`fxfib.passes.heads_trace`), so no pattern of views is assumed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import fx

from fxfib.coloring import Factor, Floats, Labels
from fxfib.passes.heads_trace import (
    Contraction,
    Passage,
    Role,
    Unfollowed,
    is_product,
    roles_of,
)
from fxfib.passes.relations import Move, Ref, Relation, Same, SameSize
from fxfib.passes.rules import find_rule
from fxfib.passes.rules.base import Mask
from fxfib.passes.rules.splitting import Split

if TYPE_CHECKING:
    from fxfib.passes.forward import Analysis


@dataclass(frozen=True, eq=False)
class SummedRows:
    """Nodes of an axis that their readers sum.

    Attributes:
        chosen: which nodes.
        scales: the factor by which each reaches the sum.
        places: which term of the sum each is; merged nodes of one place are equal heads' channels.
    """

    chosen: Mask
    scales: Floats
    places: Labels


@dataclass
class Heads:
    """All heads of a graph that have axes of their own.

    Attributes:
        contractions, passages: by the op that joins the heads.
        relations: what must hold, by the node that says it.
        free: axes whose layout follows from the heads' alone, whatever their own colors.
        reasons: for an op whose heads keep their size, why.
        roots: the linear layers, and the axis of their outputs.
        carriers: what lies between them and the ops, or behind the ops.
        flats: where the heads of a passage lie end to end again.
        colors: of the roots, once they are known; without their biases in ``unshifted``.
        summed: for an axis of a layer's outputs, which of them are summed where those they meet
            are merged.
        read: for an op, which positions of an operand's axis it reads.
    """

    contractions: dict[fx.Node, Contraction] = field(default_factory=dict)
    passages: dict[fx.Node, Passage] = field(default_factory=dict)
    relations: dict[fx.Node, list[Relation]] = field(default_factory=dict)
    free: set[Ref] = field(default_factory=set)
    reasons: dict[fx.Node, list[str]] = field(default_factory=dict)
    roots: dict[fx.Node, int] = field(default_factory=dict)
    carriers: set[fx.Node] = field(default_factory=set)
    flats: dict[fx.Node, Passage] = field(default_factory=dict)
    colors: dict[fx.Node, Factor] = field(default_factory=dict)
    unshifted: dict[fx.Node, Factor] = field(default_factory=dict)
    summed: dict[Ref, SummedRows] = field(default_factory=dict)
    read: dict[fx.Node, list[tuple[Ref, Mask]]] = field(default_factory=dict)

    @property
    def roles(self) -> list[Role]:
        return [*self.contractions.values(), *self.passages.values()]

    def sum_rows(self, ref: Ref, rows: SummedRows) -> None:
        """Some outputs of a layer are summed, not averaged, where they merge."""
        old = self.summed.get(ref)
        if old is not None:
            rows = SummedRows(
                old.chosen | rows.chosen,
                np.where(rows.chosen, rows.scales, old.scales),
                np.where(rows.chosen, rows.places, old.places),
            )
        self.summed[ref] = rows


def find_heads(analysis: Analysis) -> Heads:
    """Find all products of two values whose channels linear layers make."""
    heads = Heads()
    roles: list[Role] = []
    for node in analysis.graph_module.graph.nodes:
        if node in analysis.barriers or node in analysis.whole:
            continue
        if is_product(analysis, node):
            found, reasons = roles_of(analysis, node)
            roles += found
            if reasons:
                heads.reasons[node] = reasons
    for role in roles:
        for ref, depth in zip(role.refs(), role.depths(), strict=True):
            analysis.inner(role.core, str(ref[1]), depth)
    for role in _exclusive(analysis, roles, heads):
        if isinstance(role, Contraction):
            heads.contractions[role.core] = role
        else:
            heads.passages[role.core] = role
            heads.carriers |= set(role.path)
            heads.flats[role.flat] = role
            _tie_behind(heads, role)
    for core, contraction in heads.contractions.items():
        if len(contraction.pairs) > 1:
            refs = tuple(contraction.refs())
            heads.relations.setdefault(core, []).append(SameSize(refs))
    return heads


def _exclusive(analysis: Analysis, roles: list[Role], heads: Heads) -> list[Role]:
    """The roles whose linear layers nothing else reads, and are made of whole heads.

    Records what holds on the way from these layers to the ops.
    """
    while True:
        wrong: dict[int, str] = {}
        allowed = {role.core for role in roles}
        for role in roles:
            allowed |= {node for operand in role.operands for node in operand.path}
        for role in roles:
            for operand in role.operands:
                for node in (operand.root, *operand.path):
                    other = next((user for user in node.users if user not in allowed), None)
                    if other is not None:
                        wrong[id(role)] = f"{other.name} reads {node.name}, too"
        of_root: dict[fx.Node, list[Role]] = {}
        for role in roles:
            for root in dict.fromkeys(operand.root for operand in role.operands):
                of_root.setdefault(root, []).append(role)
        found: list[tuple[fx.Node, list[Relation]]] = []
        for root, readers in of_root.items():
            try:
                found += _tie_before(analysis, root, readers)
            except Unfollowed as stop:
                for role in readers:
                    wrong.setdefault(id(role), str(stop))
        if not wrong:
            break
        for role in roles:
            if id(role) in wrong:
                heads.reasons.setdefault(role.core, []).append(wrong[id(role)])
        roles = [role for role in roles if id(role) not in wrong]
    for node, relations in found:
        heads.relations.setdefault(node, []).extend(relations)
        for relation in relations:
            if isinstance(relation, Same):
                heads.free.add(relation.a)
            elif isinstance(relation, Move):
                heads.free |= set(relation.out)
        if node in of_root:
            heads.roots[node] = len(analysis.shape(node)) - 1
        else:
            heads.carriers.add(node)
    return roles


def _tie_before(
    analysis: Analysis, root: fx.Node, roles: Iterable[Role]
) -> list[tuple[fx.Node, list[Relation]]]:
    """What holds between a layer's outputs, and the values they are moved to, and its heads.

    Raises:
        Unfollowed: its outputs are not heads side by side, or a head is cut on its way.
    """
    width = analysis.shape(root)[-1]
    head = np.full(width, -1)
    within = np.zeros(width, dtype=np.int64)
    refs: list[Ref] = []
    numbers: dict[fx.Node, Labels | None] = {}
    for role in roles:
        for operand, ref, row in role.heads():
            if operand.root is root:
                if np.any(head[row] >= 0):
                    raise Unfollowed(f"a head of {root.name} is read twice")
                head[row], within[row] = len(refs), np.arange(len(row))
                refs.append(ref)
        for operand in role.operands:
            if operand.root is root:
                numbers |= dict.fromkeys(operand.path) | operand.numbers
    if np.any(head < 0):
        raise Unfollowed(f"not all outputs of {root.name} are heads")
    found: list[tuple[fx.Node, list[Relation]]] = []
    for node, array in numbers.items():
        relations: list[Relation] = []
        if array is not None:
            relations = _tie_value(analysis, node, head[array], within[array], refs)
        if isinstance(find_rule(node), Split):
            relations += _parts(analysis, node)
        found.append((node, relations))
    return found


def _tie_value(
    analysis: Analysis, node: fx.Node, head: Labels, within: Labels, refs: list[Ref]
) -> list[Relation]:
    """The axis of a value that holds whole heads."""
    shape = analysis.shape(node)
    axes = [a for a in range(within.ndim) if np.any(within != within.take([0], axis=a))]
    if not axes:
        return []
    if len(axes) > 1:
        raise Unfollowed(f"heads are cut at {node.name}")
    (axis,) = axes
    size = shape[axis]
    line = np.moveaxis(head, axis, -1).reshape(-1, size)
    place = np.moveaxis(within, axis, -1).reshape(-1, size)[0]
    starts = np.flatnonzero(place == 0)
    depths = np.diff(np.r_[starts, size])
    expected = np.concatenate([np.arange(depth) for depth in depths])
    cut = not np.array_equal(place, expected) or np.any(
        line != np.repeat(line[:, starts], depths, 1)
    )
    sizes = [analysis.inner_sizes[refs[h]] for h in line[0, starts]]
    if cut or sizes != depths.tolist():
        raise Unfollowed(f"heads are cut at {node.name}")
    blocks = [refs[h] for h in line[0, starts]]
    relations: list[Relation] = []
    if len(blocks) == 1:
        relations.append(Same((node, axis), blocks[0]))
    else:
        sources = tuple((ref,) for ref in blocks)
        relations.append(Move(((node, axis),), sources, np.arange(size)))
    for place in starts:
        # Heads at one place of the axis, at different places of the others.
        others = tuple(refs[h] for h in np.unique(line[:, place]))
        if len(others) > 1:
            relations.append(SameSize(others))
    return relations


def _parts(analysis: Analysis, node: fx.Node) -> list[Relation]:
    """The parts of a split along an axis that holds heads."""
    rule = find_rule(node)
    assert isinstance(rule, Split)
    source, axis = node.args[0], rule.axis(analysis, node)
    assert isinstance(source, fx.Node)
    relations: list[Relation] = []
    start = 0
    for k, length in enumerate(rule.lengths(analysis, node)):
        if length < 0:
            return []
        part = analysis.inner(node, f"part {k}", length)
        index = np.arange(start, start + length)
        relations.append(Move((part,), (((source, axis),),), index))
        start += length
    return relations


def _tie_behind(heads: Heads, passage: Passage) -> None:
    """Behind the op every head is on an axis of its own, until all lie end to end."""
    refs = passage.refs()
    for node, axis in passage.axes.items():
        heads.free.add((node, axis))
        heads.relations.setdefault(node, []).append(Same((node, axis), refs[0]))
    if len(refs) > 1:
        heads.relations.setdefault(passage.core, []).append(SameSize(tuple(refs)))
    sources = tuple((refs[k],) for k in passage.blocks)
    size = len(passage.blocks) * passage.rows.shape[1]
    move = Move(((passage.flat, passage.flat_axis),), sources, np.arange(size))
    heads.relations.setdefault(passage.flat, []).append(move)
