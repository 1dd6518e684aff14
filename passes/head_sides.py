"""Head by head, the side of a contraction that merges, where its heads share one partition.

Heads that are turned by one table (rotary embedding) lie on one axis of channels, next to an axis
of heads.  One head may have its fibers in the queries and the next one in the keys: where both
sides are linear in what layers make, channel by channel, each head can sum the other side's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fxfib.coloring import ZERO, Labels, project, unique_rows
from fxfib.passes.heads import SummedRows
from fxfib.passes.heads_trace import squeezed
from fxfib.passes.relations import Ref
from fxfib.passes.rules.base import Mask
from fxfib.passes.summed import Summed

if TYPE_CHECKING:
    from fxfib.passes.forward import Analysis


@dataclass(frozen=True, eq=False)
class Sides:
    """One partition of the contracted channels, for all heads.

    Attributes:
        labels: int64 ``[d]``.
        read: the channels that count in some head.
        rows: what is summed, by the axis of a layer.
    """

    labels: Labels
    read: Mask
    rows: tuple[tuple[Ref, SummedRows], ...]

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(np.unique(self.labels))


@dataclass(frozen=True, eq=False)
class _Heads:
    """One side at every position of the axes that both sides share.

    Attributes:
        labels, zero: ``[*shared, d]``.
        channels: ``[*shared, n]``, the channels of the layers in it.
    """

    labels: Labels
    zero: Mask
    channels: Labels

    def spread(self, shape: tuple[int, ...]) -> _Heads:
        """Once for every position; heads that several others share are repeated."""

        def fit(array: Any) -> Any:
            for axis, size in enumerate(shape):
                if array.shape[axis] not in (1, size):
                    array = np.repeat(array, size // array.shape[axis], axis)
            return np.broadcast_to(array, (*shape, array.shape[-1])).reshape(-1, array.shape[-1])

        return _Heads(fit(self.labels), fit(self.zero), fit(self.channels))


def choose_sides(
    analysis: Analysis,
    sides: tuple[Summed, Summed],
    axes: tuple[int, int],
    shared: Sequence[tuple[int, int]],
) -> Sides | None:
    """The side that merges in every head, so that few classes are left.

    Args:
        sides: how the channels of either operand can be summed.
        axes: the contracted axis of either operand.
        shared: pairs of axes of the operands that are one axis of the product.

    Returns:
        None if a parameter on the way is summed, too: all heads share it.
    """
    found = [
        _heads(analysis, side, axis, [pair[k] for pair in shared])
        for k, (side, axis) in enumerate(zip(sides, axes, strict=True))
    ]
    left, right = found
    if left is None or right is None:
        return None
    shape = tuple(
        max(left.labels.shape[axis], right.labels.shape[axis]) for axis in range(len(shared))
    )
    left, right = left.spread(shape), right.spread(shape)
    total = sum(_lengths(analysis, sides[0]))
    members = _together(left.channels, right.channels + total)
    # Heads of equal rows merge whole, so they must have one side.
    made: dict[bytes, tuple[Labels, Labels]] = {}
    kinds: list[bytes] = []
    for places in members:
        kinds.append(left.labels[places].tobytes() + right.labels[places].tobytes())
        made[kinds[-1]] = (unique_rows(*left.labels[places]), unique_rows(*right.labels[places]))
    labels = np.zeros(left.labels.shape[1], dtype=np.int64)
    read: Mask = ~np.all(left.zero | right.zero, axis=0)
    chosen: dict[bytes, int] = {}
    for kind in sorted(made, key=lambda kind: min(_count(side[read]) for side in made[kind])):
        both = [unique_rows(labels, side) for side in made[kind]]
        chosen[kind] = int(_count(both[1][read]) < _count(both[0][read]))
        labels = both[chosen[kind]]
    rows: list[tuple[Ref, SummedRows]] = []
    for k, (side, heads) in enumerate(zip(sides, (left, right), strict=True)):
        summed = np.zeros(sum(_lengths(analysis, side)), dtype=bool)
        for kind, places in zip(kinds, members, strict=True):
            if chosen[kind] != k:
                summed[heads.channels[places]] = True
        start = 0
        for ref, length in zip(side.roots, _lengths(analysis, side), strict=True):
            own = side.rows[ref]
            mask = own.chosen & summed[start : start + length]
            rows.append((ref, replace(own, chosen=mask)))
            start += length
    return Sides(labels, read, tuple(rows))


def _count(labels: Labels) -> int:
    return len(np.unique(labels))


def _lengths(analysis: Analysis, side: Summed) -> list[int]:
    return [analysis.shape(node)[int(axis)] for node, axis in side.roots]


def _heads(analysis: Analysis, side: Summed, axis: int, shared: list[int]) -> _Heads | None:
    if set(side.rows) - set(side.roots):
        return None
    if any(np.any(rows.scales != 1.0) for rows in side.rows.values()):
        return None
    keys: list[Labels] = []
    zeros: list[Mask] = []
    start = 0
    for node, own in side.roots:
        factor = analysis.value(node).factor(int(own))
        if factor is None or (node, own) not in side.rows:
            return None
        factor = factor.along(int(own))
        keys.append(factor.keyed() + start)
        zeros.append(factor.labels == ZERO)
        start += len(factor.labels)
    key, zero = np.concatenate(keys), np.concatenate(zeros)
    terms = np.broadcast_arrays(*(squeezed(term.numpy()) for term in side.terms))
    rest = [a for a in range(terms[0].ndim) if a not in (*shared, axis)]
    order = [*shared, axis, *rest]
    # Labels are compared across heads, too: equal numbers mean equal rows.
    code = unique_rows(*(key[term] for term in terms)).transpose(order)
    nothing = np.logical_and.reduce([zero[term] for term in terms]).transpose(order)
    shape = code.shape[: len(shared) + 1]
    labels = project(code.reshape(int(np.prod(shape)), -1), 0).reshape(shape)
    channels = np.stack(terms, -1).transpose([*order, len(order)])
    return _Heads(
        labels,
        nothing.reshape(*shape, -1).all(-1),
        channels.reshape(*shape[:-1], -1),
    )


def _together(*channels: Labels) -> list[Labels]:
    """Positions, in sets that share no channel with each other."""
    count = len(channels[0])
    ends = np.concatenate([c.reshape(-1) for c in channels]) + count
    starts = np.concatenate([np.repeat(np.arange(count), c.shape[1]) for c in channels])
    size = int(ends.max(initial=0)) + 1
    edges = coo_array((np.ones(len(ends), dtype=bool), (starts, ends)), shape=(size, size))
    number = connected_components(edges, directed=False)[1][:count]
    return [np.flatnonzero(number == k) for k in np.unique(number)]
