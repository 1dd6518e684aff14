"""Clusters of bounded diameter: components of the closeness graph, split by complete linkage."""

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import pdist

from fxfib.errors import InputError
from fxfib.kernels.coloring.closeness import Closeness, PairFinder
from fxfib.kernels.coloring.rows import Floats, Ints, Rows, value_order
from fxfib.kernels.coloring.window import all_pairs, candidates

# Complete linkage holds m^2 / 2 float64 distances (and scipy a copy): 3 GiB at this size.
LARGEST_COMPONENT = 20_000

_ROUNDOFF = 2.0**-52


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
        InputError: a component that is no clique has more than `LARGEST_COMPONENT` rows.
    """
    if rows.width == 0 or rows.count == 1:
        return groups
    search = Closeness(rows, eps)
    components = _components(search, groups) if find is None else _found(rows, eps, groups, find)
    open_components = _not_cliques(search, components)
    clusters = components
    fresh = rows.count
    for members in open_components:
        parts = _complete_linkage(search, members)
        clusters[members] = fresh + parts
        fresh += int(parts.max()) + 1
    return clusters


def _components(search: Closeness, groups: Ints) -> Ints:
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


def _found(rows: Rows, eps: float, groups: Ints, find: PairFinder) -> Ints:
    """Connected components of the graph whose edges are found elsewhere."""
    values, bound, relative = rows.arrays()
    left, right = find(
        torch.from_numpy(values),
        eps,
        None if bound is None else torch.from_numpy(bound),
        None if relative is None else torch.from_numpy(relative),
        torch.from_numpy(groups),
    )
    edges = left.cpu().numpy(), right.cpu().numpy()
    graph = coo_array((np.ones(len(edges[0]), dtype=bool), edges), (rows.count, rows.count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


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


def _complete_linkage(search: Closeness, members: Ints) -> Ints:
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


def _condensed(search: Closeness, members: Ints, values: Floats) -> Floats:
    """Distances of all pairs of `members` in scipy's order, infinite where a pair is not close."""
    parts: list[Floats] = []
    for left, right in all_pairs(members).pairs():
        if not parts and not search.rows.has_bounds and _mostly_close(search, left, right):
            distances = pdist(values.astype(np.float64), "chebyshev")
            distances[distances > search.eps] = np.inf
            return distances
        parts.append(search.distances(left, right))
    return np.concatenate(parts)


def _mostly_close(search: Closeness, left: Ints, right: Ints) -> bool:
    """Whether early exit would seldom happen, so that scipy's plain loop is faster."""
    step = max(1, len(left) // 256)
    return float(np.isfinite(search.distances(left[::step], right[::step])).mean()) > 0.1
