"""Clusters of bounded diameter: components of the closeness graph, split by complete linkage."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fxfib.kernels.coloring.bitmaps import BitMap
from fxfib.kernels.coloring.closeness import Closeness, PairFinder
from fxfib.kernels.coloring.complete import complete_linkage
from fxfib.kernels.coloring.dense import dense_linkage
from fxfib.kernels.coloring.rows import Ints, Rows, value_order
from fxfib.kernels.coloring.threads import in_order
from fxfib.kernels.coloring.window import candidates

# More pairs that may be close than these are not kept; 1 GiB with their distances.
KEPT_PAIRS = 2**25

Edges = tuple[NDArray[np.signedinteger], NDArray[np.signedinteger]]

_CACHED_ELEMENTS = 2**17
_FEW_ROWS = 64
# Where a larger share of the matrix of distances is of pairs that may be close, the matrix is made:
# joining clusters in it costs the same for every pair.  A small matrix takes 256 MiB at most.
_SMALL_MATRIX = 2**13
_SMALL_SHARE = 1 / 40
_LARGE_SHARE = 1 / 16
# Distances of chosen pairs cost about six times as much a pair as those of all pairs.
_FEW_EDGES = 1 / 16
_PIVOTS = 8
_ROUNDOFF = 2.0**-52
# What the largest, the smallest and the largest absolute value of nothing are.
_NOTHING = (-np.inf, np.inf, 0.0)


def bounded_clusters(rows: Rows, eps: float, groups: Ints, find: PairFinder | None = None) -> Ints:
    """Clusters in which every pair of rows is close.

    Rows i and j of one group are close when :math:`|a_{ij} - a_{kj}| <= eps + b_{ij} + b_{kj}` in
    every column.  Complete linkage on the L-infinity distance, where pairs that are not close are
    infinitely far, never joins two components of the closeness graph, so it runs inside each, and
    only in those that are not cliques already.

    Args:
        rows: n > 0 distinct rows.
        eps: closeness on top of the rows' own bounds.
        groups: int64 [n]; rows of different groups are never close.
        find: finds the close pairs elsewhere (on another device); None: here, and without comparing
            pairs that are connected already.

    Returns:
        int64 [n], cluster numbers in no particular order.

    Raises:
        InputError: a component too close for `KEPT_PAIRS` is too large for `dense_linkage`.
    """
    if rows.width == 0 or rows.count == 1:
        return groups
    search = Closeness(rows, eps)
    components, edges = (
        _components(search, groups) if find is None else _found(rows, eps, groups, find)
    )
    open_components = _not_cliques(search, components)
    if not open_components:
        return components
    sparse, dense = _by_density(rows.count, open_components, edges)
    clusters = components.copy()
    for part in dense:
        members = part[value_order(rows.values(part, slice(None)))]
        pairs = None
        if edges is not None and (rows.has_bounds or len(edges[0]) < _FEW_EDGES * len(part) ** 2):
            pairs = _pairs_among(rows.count, members, edges)
        clusters[members] = rows.count + members[dense_linkage(search, members, pairs)]
    if sparse and edges is not None:
        members = np.concatenate(sparse)
        members = members[value_order(rows.values(members, slice(None)))]
        left, right = _pairs_among(rows.count, members, edges)
        distances = search.distances(members[left], members[right])
        close = np.isfinite(distances)
        joined = complete_linkage(len(members), left[close], right[close], distances[close])
        clusters[members] = rows.count + members[joined]
    return clusters


def _by_density(
    count: int, components: list[Ints], edges: Edges | None
) -> tuple[list[Ints], list[Ints]]:
    """Components few of whose pairs may be close, and those with many."""
    if edges is None:
        return [], components
    of = np.full(count, len(components))
    for number, part in enumerate(components):
        of[part] = number
    pairs = np.bincount(of[edges[0]], minlength=len(components) + 1)
    sparse: list[Ints] = []
    dense: list[Ints] = []
    for part, number in zip(components, pairs[:-1].tolist(), strict=True):
        share = _SMALL_SHARE if len(part) <= _SMALL_MATRIX else _LARGE_SHARE
        many = len(part) > _FEW_ROWS and number > len(part) ** 2 * share
        (dense if many else sparse).append(part)
    return sparse, dense


def _pairs_among(count: int, members: Ints, edges: Edges) -> tuple[Ints, Ints]:
    """The edges between members, each once, as positions in `members`, the lower one first."""
    place = np.full(count, -1)
    place[members] = np.arange(len(members))
    left, right = place[edges[0]], place[edges[1]]
    inside = (left >= 0) & (right >= 0)
    left, right = left[inside], right[inside]
    # A window may list a pair twice.
    code = np.sort(np.minimum(left, right) * len(members) + np.maximum(left, right))
    code = code[np.diff(code, prepend=-1) > 0]
    return code // len(members), code % len(members)


def _components(search: Closeness, groups: Ints) -> tuple[Ints, Edges | None]:
    """Connected components of the closeness graph, and the pairs that may be its edges.

    Pairs that are connected already are not compared, and comparison starts with few pairs, so a
    large component is found after a small part of its pairs.  Too many edges are not kept.
    """
    count = search.rows.count
    labels = np.arange(count)
    edges: list[Edges] | None = []
    kept = 0
    window = candidates(search.rows, search.eps, groups, search.columns)
    if isinstance(window, BitMap) and groups.min() == groups.max() and _mostly_close(search):
        return _around_pivots(search), None
    batch = 2048
    for left, right in window.pairs():
        while len(left):
            apart = labels[left] != labels[right]
            if edges is not None:
                edges.append((left[~apart].astype(np.int32), right[~apart].astype(np.int32)))
                kept += len(edges[-1][0])
            left, right = left[apart], right[apart]
            i, k = left[:batch], right[:batch]
            close = np.isfinite(search.distances(i, k))
            i, k = i[close], k[close]
            if len(i):
                labels = _connected(count, labels[i], labels[k])[labels]
                if edges is not None:
                    edges.append((i.astype(np.int32), k.astype(np.int32)))
                    kept += len(i)
            if kept > KEPT_PAIRS:
                edges = None
            left, right = left[batch:], right[batch:]
            batch *= 2
    if edges is None:
        return labels, None
    none = np.empty(0, dtype=np.int32)
    both = zip(*edges, strict=True) if edges else ([none], [none])
    first, second = (np.concatenate(part) for part in both)
    return labels, (first, second)


def _mostly_close(search: Closeness) -> bool:
    """Whether so many pairs are close that all distances will be needed."""
    left, right = np.random.default_rng(20250103).integers(0, search.rows.count, (2, 1024))
    return float(np.isfinite(search.distances(left, right)).mean()) > 1 / 4


def _around_pivots(search: Closeness) -> Ints:
    """Connected components where a few rows are close to most others."""
    count = search.rows.count
    everyone = np.arange(count)
    labels = np.arange(count)

    def connect(row: int) -> None:
        nonlocal labels
        others = everyone[labels != labels[row]]
        others = others[np.isfinite(search.distances(np.full(len(others), row), others))]
        labels[np.isin(labels, labels[others])] = labels[row]

    for row in np.linspace(0, count - 1, _PIVOTS).astype(np.int64):
        connect(int(row))
    largest = np.bincount(labels).argmax()
    for row in np.flatnonzero(labels != largest):
        connect(int(row))
    return labels


def _connected(count: int, left: Ints, right: Ints) -> Ints:
    graph = coo_array((np.ones(len(left), dtype=bool), (left, right)), (count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _found(rows: Rows, eps: float, groups: Ints, find: PairFinder) -> tuple[Ints, Edges]:
    """The components of the graph whose edges are found elsewhere, and these."""
    values, bound, relative = rows.arrays()
    found = find(
        torch.from_numpy(values),
        eps,
        None if bound is None else torch.from_numpy(bound),
        None if relative is None else torch.from_numpy(relative),
        torch.from_numpy(groups),
    )
    left, right = (side.cpu().numpy() for side in found)
    return _connected(rows.count, left, right), (left, right)


def _not_cliques(search: Closeness, components: Ints) -> list[Ints]:
    """Members of every component that may hold a pair that is not close.

    Intervals on a line that overlap pairwise have a common point, so a component is a clique when,
    in every column, no row's lower end lies above another's upper end by more than eps.
    """
    order = np.argsort(components, kind="stable")
    ordered = components[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    sizes = np.diff(np.r_[starts, len(ordered)])
    large = sizes > 2
    if not large.any():
        return []
    members = order[np.repeat(large, sizes)]
    sizes = sizes[large]
    starts = np.cumsum(sizes) - sizes
    clique = np.ones(len(sizes), dtype=bool)
    # Components of one size are done together.
    for size in np.unique(sizes):
        which = np.flatnonzero(sizes == size)
        step = max(1, _CACHED_ELEMENTS // search.rows.width)
        chunks = [which[first : first + step] for first in range(0, len(which), step)]
        inside = [members[starts[chunk][:, None] + np.arange(size)] for chunk in chunks]
        fits = in_order(lambda part: _fits(search, part), inside)
        for chunk, result in zip(chunks, fits, strict=True):
            clique[chunk] = result
    parts = np.split(members, starts[1:])
    return [part for part, done in zip(parts, clique, strict=True) if not done]


def _fits(search: Closeness, members: Ints) -> NDArray[np.bool_]:
    """Whether each of k components, of s members, [k, s], surely is a clique."""
    rows, everything = search.rows, slice(None)
    lows, highs, largest = (np.full((len(members), rows.width), fill) for fill in _NOTHING)
    step = max(1, _CACHED_ELEMENTS // (rows.width * len(members)))
    for first in range(0, members.shape[1], step):
        part = members[:, first : first + step]
        shape = (*part.shape, rows.width)
        values = rows.values(part.ravel(), everything)
        low = high = values
        if rows.has_bounds:
            bounds = rows.bounds(part.ravel(), everything)
            low, high = values - bounds, values + bounds
            size = np.maximum(np.abs(low), np.abs(high)).reshape(shape).max(axis=1)
            np.maximum(largest, size, out=largest)
        np.maximum(lows, low.reshape(shape).max(axis=1), out=lows)
        np.minimum(highs, high.reshape(shape).min(axis=1), out=highs)
    # The ends are rounded: what only just fits is left to the comparison of pairs.
    slack = 8 * _ROUNDOFF * (largest + search.eps) if rows.has_bounds else 0.0
    return (lows - highs <= search.eps - slack).all(axis=1)
