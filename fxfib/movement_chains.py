"""Chains of views and permutes that take the batch through another axis, without the detour.

``x.reshape(B * C * n, p, m, q).transpose(1, 2).reshape(B, C, n * m, p * q)`` cuts an image into
patches.  On the way channels and the batch are one axis, whose size nobody knows, although in the
end each is on its own.  Such a chain is one reshape that splits axes, one permute, and one reshape
that joins them; in these nothing is mixed that does not stay together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxfib.graph_tools import call, fixed_size, value_of

aten = torch.ops.aten

_RESHAPES = {
    aten.reshape.default,
    aten.view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
}
_PERMUTES = {aten.permute.default, aten.transpose.int, aten.t.default}


class _Unfollowed(Exception):
    """A chain that is no split, permute and join of axes."""


@dataclass(frozen=True, eq=False)
class _Atom:
    """A piece of an axis that no op of the chain cuts: ``number`` positions times a free size."""

    number: int
    symbol: Any = None  # a sympy symbol, or None

    def over(self, other: _Atom) -> _Atom | None:
        """How often the other one fits in; None where it does not."""
        if self.number % other.number or other.symbol not in (None, self.symbol):
            return None
        left = None if other.symbol is not None else self.symbol
        return _Atom(self.number // other.number, left)

    @property
    def key(self) -> tuple[int, Any]:
        """Equal for equal sizes."""
        return (self.number, self.symbol)


_UNIT = (1, None)


def _size(size: Any) -> _Atom:
    number = fixed_size(size)
    if number is not None:
        return _Atom(number)
    times, symbol = size.node.expr.as_coeff_Mul()
    if not times.is_Integer or not symbol.is_Symbol:
        raise _Unfollowed
    return _Atom(int(times), symbol)


def straighten(graph: fx.Graph) -> None:
    """Rewrites in place every chain that joins a free axis with another one and parts them again.

    Args:
        graph: functional, with ``meta["val"]`` on every node.
    """
    seen: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node in seen or not _moves(node):
            continue
        chain = [node]
        while len(chain[-1].users) == 1:
            (user,) = chain[-1].users
            if not _moves(user) or user.args[0] is not chain[-1]:
                break
            chain.append(user)
        seen.update(chain)
        if len(chain) < 3:
            continue
        try:
            _rewrite(graph, chain)
        except _Unfollowed:
            continue


def _moves(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _RESHAPES | _PERMUTES


def _rewrite(graph: fx.Graph, chain: list[fx.Node]) -> None:
    source, last = chain[0].args[0], chain[-1]
    assert isinstance(source, fx.Node)
    start = [_pieces(_size(size)) for size in value_of(source).shape]
    current = [list(axis) for axis in start]
    mixed: set[tuple[_Atom, _Atom]] = set()
    for node in chain:
        if node.target in _PERMUTES:
            current = [current[axis] for axis in _order(node, len(current))]
        else:
            shape = [_size(size) for size in value_of(node).shape]
            current, cuts = _cut([atom for axis in current for atom in axis], shape)
            start = [[p for atom in axis for p in cuts.get(atom, [atom])] for axis in start]
            pairs = {(p, q) for a, b in mixed for p in cuts.get(a, [a]) for q in cuts.get(b, [b])}
            mixed = {pair for pair in pairs if any(atom.symbol is not None for atom in pair)}
        mixed |= {
            (free, other)
            for axis in current
            for free in axis
            for other in axis
            if free.symbol is not None and other is not free
        }
    where = {atom: place for place, axis in enumerate(current) for atom in axis}
    if not any(where[free] != where[other] for free, other in mixed):
        return
    known = _known_sizes(source, chain)
    atoms = [atom for axis in start for atom in axis]
    final = [atom for axis in current for atom in axis]
    pieces = [_argument(atom, known) for atom in atoms]
    ends = [_argument(_product(axis), known) for axis in current]
    with graph.inserting_before(last):
        value = call(graph, aten.reshape.default, (source, pieces), like=last)
        order = [atoms.index(atom) for atom in final]
        value = call(graph, aten.permute.default, (value, order), like=last)
        value = call(graph, aten.reshape.default, (value, ends), like=last)
    # What reads the chain was made for its shape.
    if [_size(s).key for s in value_of(value).shape] != [
        _size(s).key for s in value_of(last).shape
    ]:
        raise AssertionError(f"{last} has another shape than before")
    last.replace_all_uses_with(value)
    for node in reversed(chain):
        graph.erase_node(node)


def _pieces(size: _Atom) -> list[_Atom]:
    return [] if size.key == _UNIT else [size]


def _order(node: fx.Node, rank: int) -> list[int]:
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [int(axis) % rank for axis in node.args[1]]  # type: ignore[union-attr, arg-type]
    one, two = (0, rank - 1) if node.target is aten.t.default else node.args[1:3]
    one, two = int(one) % rank, int(two) % rank  # type: ignore[arg-type]
    order[one], order[two] = two, one
    return order


def _cut(
    atoms: list[_Atom], shape: list[_Atom]
) -> tuple[list[list[_Atom]], dict[_Atom, list[_Atom]]]:
    """Pieces of the axes of a reshape's output, and what became of the atoms that it cuts."""
    waiting = list(reversed(atoms))
    cuts: dict[_Atom, list[_Atom]] = {}
    axes: list[list[_Atom]] = []
    origin: dict[_Atom, _Atom] = {}
    for size in shape:
        axis: list[_Atom] = []
        left = size
        while left.key != _UNIT:
            if not waiting:
                raise _Unfollowed
            atom = waiting.pop()
            rest = left.over(atom)
            if rest is None:  # the axis ends within the atom
                remainder = atom.over(left)
                if remainder is None:
                    raise _Unfollowed
                whole = origin.pop(atom, atom)
                first = _Atom(left.number, left.symbol)
                cuts[whole] = [*cuts.get(whole, [atom])[:-1], first, remainder]
                origin[remainder] = whole
                waiting.append(remainder)
                atom, rest = first, _Atom(1)
            axis.append(atom)
            left = rest
        axes.append(axis)
    if waiting:
        raise _Unfollowed
    return axes, cuts


def _product(axis: Iterable[_Atom]) -> _Atom:
    number, symbol = 1, None
    for atom in axis:
        if atom.symbol is not None and symbol is not None:
            raise _Unfollowed
        number, symbol = number * atom.number, symbol or atom.symbol
    return _Atom(number, symbol)


def _known_sizes(source: fx.Node, chain: list[fx.Node]) -> dict[Any, fx.Node]:
    """Nodes that are sizes, by the sizes they are."""
    found: dict[Any, fx.Node] = {}
    for node in chain:
        for size in node.all_input_nodes:
            value = value_of(size)
            if isinstance(value, torch.SymInt) and fixed_size(value) is None:
                found.setdefault(_size(value).key, size)
    return found


def _argument(size: _Atom, known: dict[Any, fx.Node]) -> int | fx.Node:
    if size.symbol is None:
        return size.number
    if size.key not in known:
        raise _Unfollowed
    return known[size.key]
