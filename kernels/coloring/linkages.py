"""Clusters by average linkage on cosines, and by Ward linkage on energies (scipy's linkage)."""

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fxfib.errors import InputError
from fxfib.kernels.coloring.products import Points, row_lengths
from fxfib.kernels.coloring.rows import Floats, Ints, value_order

# The linkage holds m^2 / 2 float64 distances, and scipy a copy: 3 GiB at this size.
LARGEST_LINKAGE = 20_000
# Finding components first costs a third of all distances; few rows are not worth it.
_FEW = 512
_ROUNDOFF = 2.0**-52


def cosine_clusters(values: Floats, sizes: Ints, eps: float, groups: Ints) -> Ints:
    r"""Average linkage on :math:`1 - \cos(r_i, r_k)`, cut at eps.

    The mean distance of two clusters is at most eps only if some pair's is, so no cluster crosses
    the components of the graph of such pairs, and the linkage runs inside each.

    Args:
        values: floating [n, d], rows that are not parallel; a zero row needs a group of its own.
        sizes: int64 [n], how often every row counts.
        eps: largest mean distance of two clusters that are joined.
        groups: int64 [n]; rows of different groups are never joined.

    Returns:
        int64 [n], cluster numbers in no particular order.

    Raises:
        InputError: more than `LARGEST_LINKAGE` rows hang together.
    """
    clusters = np.empty(len(values), dtype=np.int64)
    fresh = 0
    for members in _groups_by_value(values, groups):
        directions = values[members].astype(np.float64)
        directions /= np.abs(directions).max(axis=1, keepdims=True, initial=1e-300)
        directions /= np.maximum(row_lengths(directions), 1e-300)[:, None]
        for part in _components(directions, eps):
            numbers = np.zeros(len(part), dtype=np.int64)
            if len(part) > 1:
                places = np.repeat(np.arange(len(part)), sizes[members[part]])
                points = Points(directions[part][places])
                _check_size(points.count, eps)
                tree = linkage(points.condensed(), "average")
                numbers[places] = fcluster(tree, eps, criterion="distance") - 1
            clusters[members[part]] = fresh + numbers
            fresh += int(numbers.max()) + 1
    return clusters


def _components(directions: Floats, eps: float) -> list[Ints]:
    """Members of the components, in order; rows further than eps apart may hang together too."""
    count = len(directions)
    if count <= _FEW:
        return [np.arange(count)]
    points = Points(directions)
    limit = eps + points.coarse_error
    labels = np.arange(count)
    for start, block in points.blocks(coarse=True):
        left, right = np.nonzero(block <= limit)
        edges = labels[left + start], labels[right + start]
        graph = coo_array((np.ones(len(left), dtype=bool), edges), (count, count))
        number, merged = connected_components(graph, directed=False)
        labels = merged.astype(np.int64)[labels]
        if number == 1:
            break
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def energy_clusters(values: Floats, factors: Floats, sizes: Ints, eps: float, groups: Ints) -> Ints:
    r"""Ward linkage on :math:`x_i = \sqrt{f_i} r_i`, cut where the lost energy reaches its share.

    Joining A and B loses :math:`\frac{|A||B|}{|A|+|B|} |\bar x_A - \bar x_B|^2`; the nearest are
    joined first, over all groups, while the sum of losses is at most
    :math:`eps \sum_i |x_i|^2`.

    Args:
        values: floating [n, d].
        factors: float64 [n], at least 0.
        sizes: int64 [n], how often every row counts.
        eps: share of the energy that joining may lose.
        groups: int64 [n]; rows of different groups are never joined.

    Returns:
        int64 [n], cluster numbers in no particular order.

    Raises:
        InputError: a group has more than `LARGEST_LINKAGE` rows.
    """
    parts = _groups_by_value(values, groups)
    largest = np.abs(values).max(axis=1, initial=0.0).astype(np.float64)
    # No row is longer than one after this.
    unit = float((np.sqrt(factors) * largest).max()) * np.sqrt(max(1, values.shape[1]))
    trees, energy = [], 0.0
    for members in parts:
        points = values[members] * (np.sqrt(factors[members]) / max(unit, 1e-300))[:, None]
        repeated = Points(np.repeat(points, sizes[members], axis=0))
        energy += float(repeated.squares.sum())
        _check_size(repeated.count, eps)
        trees.append(np.empty((0, 4)))
        if repeated.count > 1:
            trees[-1] = linkage(np.sqrt(2 * repeated.condensed()), "ward")
    heights = np.concatenate([tree[:, 2] for tree in trees])
    of_tree = np.repeat(np.arange(len(trees)), [len(tree) for tree in trees])
    order = np.argsort(heights, kind="stable")
    lost = np.cumsum(heights[order] ** 2 / 2)
    slack = 64 * _ROUNDOFF * len(heights)
    joins = order[: int(np.searchsorted(lost, eps * energy * (1 + slack), side="right"))]
    clusters = np.empty(len(values), dtype=np.int64)
    fresh = 0
    for number, (members, tree) in enumerate(zip(parts, trees, strict=True)):
        made = tree[: int((of_tree[joins] == number).sum())]
        count = len(tree) + 1
        nodes = count + np.arange(len(made))
        ends = np.concatenate([made[:, 0], made[:, 1]]).astype(np.int64)
        edges = np.concatenate([nodes, nodes]), ends
        graph = coo_array((np.ones(len(ends), dtype=bool), edges), (2 * count, 2 * count))
        joined = connected_components(graph, directed=False)[1][:count].astype(np.int64)
        firsts = np.cumsum(sizes[members]) - sizes[members]
        clusters[members] = fresh + joined[firsts]
        fresh += 2 * count
    return clusters


def _groups_by_value(values: Floats, groups: Ints) -> list[Ints]:
    """The rows of every group, sorted by value, so that ties do not depend on their order."""
    order = value_order(values)
    order = order[np.argsort(groups[order], kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)


def _check_size(count: int, eps: float) -> None:
    if count > LARGEST_LINKAGE:
        raise InputError(
            f"color: {count} rows hang together at eps={eps:g}, more than the {LARGEST_LINKAGE} "
            f"that linkage can hold in memory; use a smaller eps."
        )
