"""Access to the rows that are being colored, without copying them to float64 as a whole."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]
Index = Ints | slice


def pick(array: NDArray, index: Index, columns: Index) -> NDArray:
    """``array[index][:, columns]`` without a copy of columns that are not wanted."""
    if isinstance(index, slice) or isinstance(columns, slice):
        return array[index, columns]
    return array[index[:, None], columns]


@dataclass(frozen=True)
class Bounds:
    """What every entry may be off by: ``absolute[i, j] + relative[j] * |values[i, j]|``.

    Attributes:
        absolute: floating [n, d] or [n, 1], or None for zero.
        relative: float64 [d], or None for zero.  Numbers that were rounded need no matrix.
    """

    absolute: Floats | None
    relative: Floats | None = None

    @property
    def uniform(self) -> float | None:
        """The one relative bound below 1 of every entry, where there is no other."""
        if self.absolute is not None or self.relative is None or not len(self.relative):
            return None
        low, high = self.relative.min(), self.relative.max()
        return float(low) if low == high < 1 else None

    def at(self, values: Floats, index: Index, columns: Index) -> Floats:
        """Float64, broadcastable to `values`, which are the rows' entries at these places."""
        result: Floats = np.zeros((1, 1))
        if self.absolute is not None:
            if self.absolute.shape[1] == 1:
                result = self.absolute[index].astype(np.float64)
            else:
                result = pick(self.absolute, index, columns).astype(np.float64)
        if self.relative is not None:
            result = result + np.abs(values) * self.relative[columns]
        return result


class Rows(Protocol):
    """n rows of d values, each value known up to a bound."""

    count: int
    width: int
    has_bounds: bool

    def values(self, index: Index, columns: Index) -> Floats:
        """Floating [len(index), len(columns)], in the rows' own precision (at least float32)."""
        ...

    def bounds(self, index: Index, columns: Index) -> Floats:
        """Float64, broadcastable to `values`; zeros where the rows have no bounds."""
        ...

    def arrays(self) -> tuple[Floats, Floats | None, Floats | None]:
        """All values, their absolute bounds and their relative ones, as in `Bounds`."""
        ...


class PlainRows:
    """Rows compared as they are."""

    def __init__(self, values: Floats, bounds: Bounds | None) -> None:
        """`values`: float32 or float64 [n, d]."""
        self.count, self.width = values.shape
        self.has_bounds = bounds is not None
        self._values = values
        self._bounds = bounds

    def values(self, index: Index, columns: Index) -> Floats:
        """See `Rows.values`."""
        return pick(self._values, index, columns)

    def bounds(self, index: Index, columns: Index) -> Floats:
        """See `Rows.bounds`."""
        if self._bounds is None:
            return np.zeros((1, 1))
        return self._bounds.at(self.values(index, columns), index, columns)

    def arrays(self) -> tuple[Floats, Floats | None, Floats | None]:
        """See `Rows.arrays`."""
        if self._bounds is None:
            return self._values, None, None
        return self._values, self._bounds.absolute, self._bounds.relative


class NormalisedRows:
    r"""Rows divided by their largest absolute value m, so that proportional rows become equal.

    An error of b in the row is an error of at most :math:`(b_j + |u_j| \nu) / m` in the entry
    :math:`u_j = r_j / m`, where :math:`\nu` bounds the error of m itself (first order).  For rows
    of at most 24 significant bits the float64 quotients are equal exactly when the rows are
    proportional, so no bound is needed for exactness.
    """

    def __init__(self, values: Floats, bounds: Bounds | None, norms: Floats) -> None:
        """`norms`: float64 [n], ``abs(values).max(axis=1)``, and 1 for rows that count as zero."""
        self.count, self.width = values.shape
        self.has_bounds = bounds is not None
        self._values = values
        self._bounds = bounds
        self._norms = norms[:, None]
        if bounds is None:
            return
        if bounds.uniform is not None:
            self._norm_error = bounds.uniform * self._norms
            return
        upper = np.empty(self.count)
        lower = np.empty(self.count)
        everything = slice(None)
        for block in blocks(self.count, self.width):
            size = np.abs(values[block]).astype(np.float64)
            error = bounds.at(size, block, everything)
            upper[block] = (size + error).max(axis=1)
            lower[block] = (size - error).max(axis=1)
        self._norm_error = np.maximum(upper - norms, norms - lower)[:, None]

    def values(self, index: Index, columns: Index) -> Floats:
        """See `Rows.values`."""
        return pick(self._values, index, columns) / self._norms[index]

    def bounds(self, index: Index, columns: Index) -> Floats:
        """See `Rows.bounds`."""
        if self._bounds is None:
            return np.zeros((1, 1))
        values = pick(self._values, index, columns)
        norms = self._norms[index]
        spread = np.abs(values) / norms * self._norm_error[index]
        # Entries lie in [-1, 1]; a bound above 2 says no more than 2 does, and never overflows.
        return np.minimum((self._bounds.at(values, index, columns) + spread) / norms, 2.0)

    def arrays(self) -> tuple[Floats, Floats | None, Floats | None]:
        """See `Rows.arrays`."""
        everything = slice(None)
        values = self.values(everything, everything)
        return values, self.bounds(everything, everything) if self.has_bounds else None, None


def blocks(count: int, width: int) -> Iterator[slice]:
    """Consecutive rows, few enough at a time that temporaries stay in the cache."""
    step = max(1, 2**18 // max(1, width))
    for start in range(0, count, step):
        yield slice(start, start + step)


def by_appearance(ids: Ints) -> tuple[Ints, Ints]:
    """Number clusters in the order of their first rows; also the first row of every cluster."""
    highest = np.maximum.accumulate(ids)
    new = np.diff(highest, prepend=-1)
    if len(ids) and ids.min() >= 0 and new.max() <= 1:
        # They are numbered like this already.
        return ids, np.flatnonzero(new)
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    numbers = np.empty(len(first), dtype=np.int64)
    numbers[order] = np.arange(len(first))
    return numbers[inverse], first[order]


def distinct(rows: Rows, ids: Ints, first: Ints) -> Rows:
    """One row for every id: the values of the `first` member, the smallest bounds of all members.

    The ids count up in the order of first appearance, so without repetition they are the rows.
    The smallest bounds make every pair of *members* satisfy what the representatives satisfy.
    """
    if len(first) == rows.count:
        return rows
    everything = slice(None)
    values = rows.values(first, everything)
    if not rows.has_bounds:
        return PlainRows(values, None)
    order = np.argsort(ids, kind="stable")
    starts = np.searchsorted(ids[order], np.arange(len(first)))
    bounds = np.minimum.reduceat(rows.bounds(order, everything), starts, axis=0)
    return PlainRows(values, Bounds(bounds))


def value_order(values: Floats) -> Ints:
    """Distinct rows sorted by their first column, then by their second, and so on.

    An order that depends on the values alone, not on where the rows stand.
    """
    signed, whole = (np.int32, np.uint32) if values.dtype == np.float32 else (np.int64, np.uint64)
    # Adding +0 turns -0 into +0.  Negative numbers count down in their bits, and have the top one.
    bits = np.ascontiguousarray(values + values.dtype.type(0)).view(whole)
    top = whole(np.iinfo(signed).max) + whole(1)
    bits = np.where(bits >= top, np.invert(bits), np.bitwise_or(bits, top))
    keys = [row.tobytes() for row in bits.astype(bits.dtype.newbyteorder(">"))]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
