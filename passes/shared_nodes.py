"""Nodes that stand in several places: in axes with one layout, and in those they are moved to.

The channels of a residual stream that is padded with zeros on its way live in all of its stages,
those that the padding adds in the later ones alone.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fxfib.coloring import Labels
from fxfib.passes.relations import Move, Ref


class Shared(NamedTuple):
    """Nodes of one axis among those of all axes that share nodes with it.

    Attributes:
        group: one number for all these axes.
        nodes: int64 ``[n]``, from 0: equal where two of these axes have the same node.
    """

    group: int
    nodes: Labels


def shared_nodes(
    sizes: Mapping[Ref, int],
    moves: Iterable[Move],
    find: Callable[[Ref], Ref],
    apart: Container[Ref],
) -> dict[Ref, Shared]:
    """Follow nodes through moves of one axis to one axis.

    Args:
        sizes: of the axes that are asked about, each standing for all with its layout.
        moves: those of a graph.
        find: for an axis the one that stands for it.
        apart: axes, found, through which nothing is followed.

    Returns:
        For every axis asked about that shares nodes with another of them.  Where two nodes of one
        axis end up as the same one (halves that are multiplied), the axes are left out.
    """
    lengths, links = dict(sizes), []
    for move in moves:
        if len(move.out) != 1 or [len(source) for source in move.sources] != [1]:
            continue
        (out,), ((source,),) = move.out, move.sources
        inner = any(isinstance(axis, str) for _, axis in (out, source))
        a, b = find(out), find(source)
        if inner or a in apart or b in apart:
            continue
        for ref, length in ((a, len(move.index)), (b, int(move.index.max(initial=-1)) + 1)):
            lengths[ref] = max(lengths.get(ref, 0), length)
        links.append((a, b, move.index))
    if not links:
        return {}
    names = list(lengths)
    place = {ref: number for number, ref in enumerate(names)}
    start = dict(zip(names, np.cumsum([0, *lengths.values()]).tolist(), strict=False))
    group = _connected(
        np.array([place[a] for a, _, _ in links]),
        np.array([place[b] for _, b, _ in links]),
        len(names),
    )
    node = _connected(
        np.concatenate([start[a] + np.flatnonzero(index >= 0) for a, _, index in links]),
        np.concatenate([start[b] + index[index >= 0] for _, b, index in links]),
        sum(lengths.values()),
    )
    found: dict[Ref, Shared] = {}
    for number in np.unique(group):
        axes = [ref for ref in sizes if group[place[ref]] == number]
        own = [node[start[ref] : start[ref] + sizes[ref]] for ref in axes]
        if len(axes) < 2 or any(len(np.unique(nodes)) < len(nodes) for nodes in own):
            continue
        different = np.unique(np.concatenate(own))  # those of other axes have no number
        for ref, nodes in zip(axes, own, strict=True):
            found[ref] = Shared(int(number), np.searchsorted(different, nodes))
    return found


def _connected(a: Labels, b: Labels, count: int) -> Labels:
    """Numbers of vertices, equal where edges from ``a`` to ``b`` lead from one to the other."""
    graph = coo_array((np.ones(len(a), bool), (a, b)), (count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)
