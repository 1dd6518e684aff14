r"""Distances from matrix products that come out the same in whatever order a sum is taken.

BLAS adds in an order that depends on the shape of the matrix and on the number of threads, and
linkage breaks near-ties by the last bit.  So rows are rounded to few enough bits that nothing is
rounded when they are multiplied and summed: with :math:`|u| \le 1` and entries that are multiples
of :math:`2^{-26}`, every partial sum of :math:`\langle u, v\rangle` is a multiple of
:math:`2^{-52}` below 2, which float64 holds.  A second part takes the next bits.
"""

import math
from collections.abc import Iterator

import numpy as np

from fxfib.kernels.coloring.rows import Floats, blocks

_HIGH_BITS = 26
_BLOCK_ELEMENTS = 2**22


def row_lengths(values: Floats) -> Floats:
    """Euclidean lengths, float64 [n], the same for a row wherever it stands."""
    result = np.empty(len(values))
    for block in blocks(*values.shape):
        # Contiguous rows are summed one by one, pairwise.
        result[block] = np.sqrt(np.square(values[block], dtype=np.float64).sum(axis=1))
    return result


class Points:
    """n points of length at most one.

    Attributes:
        count: n.
        squares: float64 [n], their squared lengths.
    """

    def __init__(self, points: Floats) -> None:
        """`points`: float64 [n, d], no row longer than 1 (up to rounding)."""
        self.count, width = points.shape
        low_bits = 51 - math.ceil(math.log2(max(2, width)) / 2)
        high = np.rint(np.ldexp(points, _HIGH_BITS))
        low = np.rint(np.ldexp(points - np.ldexp(high, -_HIGH_BITS), low_bits))
        self._high = np.ldexp(high, -_HIGH_BITS)
        self._low = np.ldexp(low, -low_bits)
        # Nothing of this is rounded but the last sum.
        cross = np.einsum("ij,ij->i", self._high, self._low)
        self.squares = np.einsum("ij,ij->i", self._high, self._high) + (cross + cross)
        # What leaving out the second part may change in half a squared distance.
        self.coarse_error = 4 * 2.0 ** -(_HIGH_BITS + 1) * math.sqrt(width)

    def blocks(self, coarse: bool) -> Iterator[tuple[int, Floats]]:
        """Half the squared distances of consecutive rows from themselves and all later rows.

        Args:
            coarse: up to `coarse_error`, at a third of the work.

        Yields:
            The first row of the block, and float64 [rows, n - first], at least 0.
        """
        step = max(1, _BLOCK_ELEMENTS // max(1, self.count))
        half = self.squares / 2
        for start in range(0, self.count, step):
            block = slice(start, start + step)
            inner = self._high[block] @ self._high[start:].T
            if not coarse:
                cross = self._high[block] @ self._low[start:].T
                cross += self._low[block] @ self._high[start:].T
                inner += cross
            gap = np.add.outer(half[block], half[start:])
            gap -= inner
            yield start, np.maximum(gap, 0.0, out=gap)

    def condensed(self) -> Floats:
        """Half the squared distances of all pairs, float64 [n (n - 1) / 2], in scipy's order."""
        result = np.empty(self.count * (self.count - 1) // 2)
        place = 0
        for _, block in self.blocks(coarse=False):
            for offset, row in enumerate(block):
                part = row[offset + 1 :]
                result[place : place + len(part)] = part
                place += len(part)
        return result
