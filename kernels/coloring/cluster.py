"""Clusters of bounded diameter: components of the closeness graph, split by complete linkage."""

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import pdist

from fxfib.errors import InputError
from fxfib.kernels.coloring.rows import Floats, Ints, Rows, value_order
from fxfib.kernels.coloring.window import all_pairs, candidates, telling_columns

# Complete linkage holds m^2 / 2 float64 distances (and scipy a copy): 3 GiB at this size.
LARGEST_COMPONENT = 20_000

_PROBES = 8
_CACHED_ELEMENTS = 2**16
_ROUNDOFF = 2.0**-52


def bounded_clusters(rows: Rows, eps: float, groups: Ints) -> Ints:
    """Clusters in which every pair of rows is close.

    Rows i and j of one group are close when :math:`|a_{ij} - a_{kj}| <= eps + b_{ij} + b_{kj}` in
    every column.  Complete linkage on the L-infinity distance, where pairs that are not close are
    infinitely far, never joins two components of the closeness graph, so it runs inside each, and
    only in those that are not cliques already.

    Args:
        rows: n > 0 distinct rows.
        eps: closeness on top of the rows' own bounds.
        groups: int64 [n]; rows of different groups are never close.

    Returns:
        int64 [n], cluster numbers in no particular order.

    Raises:
        InputError: a component that is no clique has more than `LARGEST_COMPONENT` rows.
    """
    if rows.width == 0 or rows.count == 1:
        return groups
    search = _Closeness(rows, eps)
    components = _components(search, groups)
    open_components = _not_cliques(search, components)
    clusters = components
    fresh = rows.count
    for members in open_components:
        parts = _complete_linkage(search, members)
        clusters[members] = fresh + parts
        fresh += int(parts.max()) + 1
    return clusters


class _Closeness:
    """Distances of pairs, given up on as soon as one column tells the pair apart."""

    def __init__(self, rows: Rows, eps: float) -> None:
        self.rows = rows
        self.eps = eps
        self.columns = telling_columns(rows, eps, _PROBES)
        everyone = slice(None)
        self._probe = rows.values(everyone, self.columns).astype(np.float64)
        bounds = rows.bounds(everyone, self.columns)
        self._probe_bounds = np.broadcast_to(bounds, self._probe.shape)

    def distances(self, left: Ints, right: Ints) -> Floats:
        """Float64 [pairs]: the L-infinity distance, or infinity where the pair is not close."""
        result = np.full(len(left), np.inf)
        alive = np.arange(len(left))
        for probe in range(self._probe.shape[1]):
            column, bounds = self._probe[:, probe], self._probe_bounds[:, probe]
            gap = np.abs(column[left[alive]] - column[right[alive]])
            allowed = bounds[left[alive]] + bounds[right[alive]] + self.eps
            alive = alive[gap <= allowed]
            if not len(alive):
                return result
        largest = np.zeros(len(left))
        start, step = 0, 32
        while start < self.rows.width and len(alive):
            columns = slice(start, start + step)
            alive = self._filter(left, right, alive, columns, largest)
            start, step = start + step, min(4 * step, _CACHED_ELEMENTS)
        result[alive] = largest[alive]
        return result

    def _filter(
        self, left: Ints, right: Ints, alive: Ints, columns: slice, largest: Floats
    ) -> Ints:
        """The pairs that are still close after `columns`; raises `largest` to their distance."""
        kept = []
        width = min(columns.stop, self.rows.width) - columns.start
        step = max(1, _CACHED_ELEMENTS // width)
        for start in range(0, len(alive), step):
            pairs = alive[start : start + step]
            i, j = left[pairs], right[pairs]
            gap = self.rows.values(i, columns).astype(np.float64)
            gap -= self.rows.values(j, columns)
            np.abs(gap, out=gap)
            if self.rows.has_bounds:
                allowed = self.rows.bounds(i, columns) + self.rows.bounds(j, columns) + self.eps
                close = (gap <= allowed).all(axis=1)
                furthest = gap.max(axis=1)
            else:
                furthest = gap.max(axis=1)
                close = furthest <= self.eps
            largest[pairs] = np.maximum(largest[pairs], furthest)
            kept.append(pairs[close])
        return np.concatenate(kept)


def _components(search: _Closeness, groups: Ints) -> Ints:
    """Connected components of the closeness graph.

    Pairs that are connected already are not compared, and comparison starts with few pairs, so a
    large component is found after a small part of its pairs.
    """
    count = search.rows.count
    labels = np.arange(count)
    window = candidates(search.rows, search.eps, groups, search.columns)
    for left, right in window.pairs():
        batch = 2048
        while len(left):
            apart = labels[left] != labels[right]
            left, right = left[apart], right[apart]
            i, j = left[:batch], right[:batch]
            close = np.isfinite(search.distances(i, j))
            if close.any():
                edges = labels[i[close]], labels[j[close]]
                graph = coo_array((np.ones(len(edges[0]), dtype=bool), edges), (count, count))
                labels = connected_components(graph, directed=False)[1].astype(np.int64)[labels]
            left, right = left[batch:], right[batch:]
            batch *= 2
    return labels


def _not_cliques(search: _Closeness, components: Ints) -> list[Ints]:
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
    rows = search.rows
    step = max(1, 2**22 // len(members))
    for start in range(0, rows.width, step):
        columns = slice(start, start + step)
        values = rows.values(members, columns).astype(np.float64)
        slack: float | Floats = 0.0
        low = high = values
        if rows.has_bounds:
            bounds = rows.bounds(members, columns)
            low, high = values - bounds, values + bounds
            # The ends are rounded: what only just fits is left to the comparison of pairs.
            size = np.maximum(np.abs(low), np.abs(high))
            slack = 8 * _ROUNDOFF * (np.maximum.reduceat(size, starts, axis=0) + search.eps)
        gap = np.maximum.reduceat(low, starts, axis=0) - np.minimum.reduceat(high, starts, axis=0)
        clique &= (gap <= search.eps - slack).all(axis=1)
        if not clique.any():
            break
    parts = np.split(members, starts[1:])
    return [part for part, done in zip(parts, clique, strict=True) if not done]


def _complete_linkage(search: _Closeness, members: Ints) -> Ints:
    """Cluster numbers from 0 for the rows of one component."""
    if len(members) > LARGEST_COMPONENT:
        raise InputError(
            f"color: {len(members)} rows hang together at eps={search.eps:g}, more than the "
            f"{LARGEST_COMPONENT} that complete linkage can hold in memory; use a smaller eps."
        )
    values = search.rows.values(members, slice(None))
    order = value_order(values)
    distances = _condensed(search, members[order], values[order])
    close = np.isfinite(distances)
    furthest = float(distances[close].max())
    distances[~close] = 2 * furthest + 1
    parts = fcluster(linkage(distances, "complete"), furthest, criterion="distance")
    numbers = np.empty(len(members), dtype=np.int64)
    numbers[order] = parts - 1
    return numbers


def _condensed(search: _Closeness, members: Ints, values: Floats) -> Floats:
    """Distances of all pairs of `members` in scipy's order, infinite where a pair is not close."""
    parts: list[Floats] = []
    for left, right in all_pairs(members).pairs():
        if not parts and not search.rows.has_bounds and _mostly_close(search, left, right):
            distances = pdist(values.astype(np.float64), "chebyshev")
            distances[distances > search.eps] = np.inf
            return distances
        parts.append(search.distances(left, right))
    return np.concatenate(parts)


def _mostly_close(search: _Closeness, left: Ints, right: Ints) -> bool:
    """Whether early exit would seldom happen, so that scipy's plain loop is faster."""
    step = max(1, len(left) // 256)
    return float(np.isfinite(search.distances(left[::step], right[::step])).mean()) > 0.1
