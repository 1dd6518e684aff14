"""Complete linkage of rows most of which are close: all distances, in half the memory.

The matrix holds float32, which orders distances correctly but for ties.  Those are settled in
float64 from the largest and the smallest value of every cluster in every column: two clusters are
as far apart as these are.
"""

from collections.abc import Iterator

import numpy as np
from scipy.spatial.distance import cdist

from fxfib.errors import InputError
from fxfib.kernels.coloring.closeness import Closeness
from fxfib.kernels.coloring.rows import Floats, Ints

# The matrix takes 4 GiB at this size.
LARGEST_DENSE = 2**15

_BLOCK_ROWS = 512

Pairs = tuple[Ints, Ints]


def dense_linkage(search: Closeness, members: Ints, pairs: Pairs | None = None) -> Ints:
    """Complete linkage, ties as in `complete_linkage`.

    Args:
        search: what is close.
        members: int64 [m], rows in the order of their values.
        pairs: positions in `members` of all pairs that may be close, each once; None: all pairs.

    Returns:
        int64 [m]: the first member of every member's cluster, as a position in `members`.

    Raises:
        InputError: more than `LARGEST_DENSE` members.
    """
    if len(members) > LARGEST_DENSE:
        raise InputError(
            f"color: {len(members)} rows hang together at eps={search.eps:g}, too closely and more "
            f"than the {LARGEST_DENSE} whose distances fit in memory; use a smaller eps."
        )
    low = search.rows.values(members, slice(None)).astype(np.float64)
    if pairs is None:
        table = _distances(search, members, low)
    else:
        table = _known_distances(search, members, pairs)
    clusters = _Clusters(table, low)
    joined = np.arange(len(members))
    for start in range(len(members)):
        chain = [start] if joined[start] == start else []
        while chain:
            here = chain[-1]
            there = clusters.nearest(here)
            if there is None:
                break
            if len(chain) < 2 or there != chain[-2]:
                chain.append(there)
                continue
            del chain[-2:]
            first, second = min(here, there), max(here, there)
            clusters.join(first, second)
            joined[second] = first
            if not chain:
                chain.append(first)
    # A cluster that was joined stands behind the one it was joined to.
    for item in range(len(joined)):
        joined[item] = joined[joined[item]]
    return joined


class _Clusters:
    """Distances of clusters, each known by its first member; infinite where not all is close.

    A join changes a row and a column of the matrix, and writing columns is slow.  So a row learns
    of the joins of others only when it is read: the distance to a cluster is the largest of the
    distances to those it is made of.
    """

    def __init__(self, distances: Floats, values: Floats) -> None:
        """`distances`: float32 [m, m], changed; `values`: float64 [m, d], changed."""
        count = len(distances)
        self._distances = distances
        self._low, self._high = values, values.copy()
        self._cluster = np.arange(count)
        self._joined = np.empty(count, dtype=np.int64)
        self._joins = 0
        self._known_joins = np.zeros(count, dtype=np.int64)

    def nearest(self, here: int) -> int | None:
        """The nearest cluster, of several equally near ones the first; None if none is close."""
        row = self._row(here)
        there = int(row.argmin())
        if row[there] == np.inf:
            return None
        tied = there + np.flatnonzero(row[there:] == row[there])
        if len(tied) == 1:
            return there
        gap = np.maximum(
            self._high[here] - self._low[tied], self._high[tied] - self._low[here]
        ).max(axis=1)
        return int(tied[gap.argmin()])

    def join(self, first: int, second: int) -> None:
        """Make `second` a part of `first`."""
        row = self._row(first)
        np.maximum(row, self._row(second), out=row)
        row[[first, second]] = np.inf
        self._cluster[self._cluster == second] = first
        self._joined[self._joins] = second
        self._joins += 1
        self._known_joins[first] = self._joins
        np.minimum(self._low[first], self._low[second], out=self._low[first])
        np.maximum(self._high[first], self._high[second], out=self._high[first])

    def _row(self, here: int) -> Floats:
        """Distances to all clusters, after all joins."""
        row = self._distances[here]
        gone = self._joined[self._known_joins[here] : self._joins]
        if len(gone):
            np.maximum.at(row, self._cluster[gone], row[gone])
            row[gone] = np.inf
            self._known_joins[here] = self._joins
        return row


def _known_distances(search: Closeness, members: Ints, pairs: Pairs) -> Floats:
    """As `_distances`, where it is known which pairs may be close."""
    count = len(members)
    table = np.full((count, count), np.inf, dtype=np.float32)
    left, right = pairs
    gap = search.distances(members[left], members[right])
    table[left, right] = gap
    table[right, left] = gap
    return table


def _distances(search: Closeness, members: Ints, values: Floats) -> Floats:
    """Float32 [m, m]: infinite on the diagonal and where a pair is not close."""
    count = len(members)
    table = np.empty((count, count), dtype=np.float32)
    slack = _slack(search, members)
    for rows, others in _blocks(count):
        gap = cdist(values[rows], values[others], "chebyshev")
        far = gap > search.eps
        if slack is not None:
            # Where its bounds may make up for what a pair is too far apart, every column is asked.
            left, right = np.nonzero(far & (gap <= search.eps + slack[rows, None] + slack[others]))
            found = search.distances(members[rows][left], members[others][right])
            far[left, right] = np.isinf(found)
        gap[far] = np.inf
        table[rows, others] = gap
        table[others, rows] = gap.T
    np.fill_diagonal(table, np.inf)
    return table


def _slack(search: Closeness, members: Ints) -> Floats | None:
    """The largest bound of every row, a little more than it is; None where there are no bounds."""
    if not search.rows.has_bounds:
        return None
    slack = np.empty(len(members))
    for start in range(0, len(members), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        slack[part] = search.rows.bounds(members[part], slice(None)).max(1)
    return slack * (1 + 1e-6)


def _blocks(count: int) -> Iterator[tuple[slice, slice]]:
    """Blocks on and above the diagonal."""
    for start in range(0, count, _BLOCK_ROWS):
        rows = slice(start, min(start + _BLOCK_ROWS, count))
        for first in range(start, count, _BLOCK_ROWS):
            yield rows, slice(first, min(first + _BLOCK_ROWS, count))
