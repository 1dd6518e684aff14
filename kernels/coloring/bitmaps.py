"""Pairs of rows that no column tells apart, one bit a pair: for distances that many columns exceed.

Where a window would hold a large part of all pairs, the pairs are better ruled out 64 at a time.
Every column is cut into a few levels.  For every level there is one bit row, which marks the rows
whose level is near enough; the bits of row i are the intersection, over the columns, of the bit
rows of its levels.  Levels are coarse: the pairs that remain are candidates, and no close one is
missed.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fxfib.kernels.coloring.rows import Ints, Rows
from fxfib.kernels.coloring.threads import in_order

Bits = NDArray[np.uint8]

_LEVELS = 128
_TILE_ROWS = 4096
_TILE_COLUMNS = 2**14
_CHUNK_BYTES = 2**18
# What comparing a pair costs, and one more column of it, in the time of one pair's bit.
_PAIR_COST = 1500.0
_COLUMN_COST = 60.0
_BYTES_AT_ONCE = 2**16
_COUNTS = np.array([bin(word).count("1") for word in range(2**16)], dtype=np.uint8)


class BitMap:
    """Candidate pairs among all rows; has the methods of a `Window`."""

    def __init__(self, rows: Rows, eps: float, groups: Ints) -> None:
        """See `bounded_clusters`."""
        self.rows = rows
        self.eps = eps
        self.groups = None if groups.min() == groups.max() else groups
        sample = np.linspace(0, rows.count - 1, min(rows.count, 256)).astype(np.int64)
        everything = slice(None)
        values = rows.values(sample, everything)
        reach = rows.bounds(sample, everything).mean(axis=0) + eps / 2
        score = values.std(axis=0, dtype=np.float64) / np.where(reach > 0, reach, 1e-30)
        self.columns = np.argsort(-score, kind="stable")

    def pairs(self) -> Iterator[tuple[Ints, Ints]]:
        """Candidate pairs of row indices, tile after tile."""
        count = self.rows.count
        tiles = [
            (
                slice(start, min(start + _TILE_ROWS, count)),
                slice(first, min(first + _TILE_COLUMNS, count)),
            )
            for start in range(0, count, _TILE_ROWS)
            for first in range(start, count, _TILE_COLUMNS)
        ]
        alive = in_order(lambda tile: self._alive(*tile), tiles)
        for (here, there), bits in zip(tiles, alive, strict=True):
            for left, right in _ones(bits):
                left, right = left + here.start, right + there.start
                kept = left < right
                if self.groups is not None:
                    kept &= self.groups[left] == self.groups[right]
                yield left[kept], right[kept]

    def _alive(self, tile: slice, others: slice) -> Bits:
        """Bits [tile rows, other rows / 8]: the pairs that no column tells apart."""
        height, width = tile.stop - tile.start, others.stop - others.start
        alive = np.packbits(np.ones((1, width), dtype=bool), axis=1).repeat(height, axis=0)
        padding = np.zeros((height, -alive.shape[1] % 8), dtype=np.uint8)
        alive = np.concatenate([alive, padding], axis=1)
        total = len(self.columns)
        before, check = 1.0, 4
        for number, column in enumerate(self.columns):
            for levels, table in self._tables(int(column), tile, others, alive.shape[1]):
                _intersect(alive, levels, table)
            if number + 1 == check:
                remaining = float(_COUNTS[alive.view(np.uint16)].mean()) / 16
                if not _pays(before, remaining, check, total):
                    break
                before, check = remaining, 2 * check
        return alive

    def _tables(
        self, column: int, tile: slice, others: slice, width: int
    ) -> Iterator[tuple[Ints, Bits]]:
        """Levels of the tile's rows, and for every level the bits of the others that are near."""
        rows, columns = self.rows, np.array([column])
        here = rows.values(tile, columns)[:, 0].astype(np.float64)
        there = rows.values(others, columns)[:, 0].astype(np.float64)
        if not rows.has_bounds:
            low = min(here.min(), there.min())
            spread = max(here.max(), there.max()) - low
            # Rows at most eps apart are at most `reach` levels apart, as eps is whole levels.
            reach = max(1, int(_LEVELS * self.eps / max(spread, 1e-300))) if spread else 1
            reach = min(reach, _LEVELS)
            step = max(self.eps * (1 + 1e-9) / reach, spread / (_LEVELS - 2), 1e-300)
            own = np.floor((here - low) / step).astype(np.int64)
            levels = np.floor((there - low) / step).astype(np.int64)
            last = int(max(own.max(), levels.max()))
            upto = _upto(levels, last, width)
            every = np.arange(last + 1)
            upper = upto[np.minimum(every + reach, last) + 1]
            yield own, upper ^ upto[np.maximum(every - reach, 0)]
            return
        # Intervals overlap when each starts before the other ends; levels keep that order.
        own_reach = rows.bounds(tile, columns)[:, 0] + self.eps / 2
        other_reach = rows.bounds(others, columns)[:, 0] + self.eps / 2
        ends = [here - own_reach, here + own_reach, there - other_reach, there + other_reach]
        low = min(end.min() for end in ends)
        spread = max(end.max() for end in ends) - low
        pad = 2.0**-48 * (abs(low) + spread) + 1e-300
        step = max(spread / (_LEVELS - 2), pad)
        own_low, own_high, low_levels, high_levels = (
            np.floor((end - low + shift) / step).astype(np.int64).clip(0)
            for end, shift in zip(ends, (-pad, pad, -pad, pad), strict=True)
        )
        last = int(max(own_high.max(), high_levels.max()))
        yield own_high, _upto(low_levels, last, width)[1:]
        yield own_low, ~_upto(high_levels, last, width)[:-1]


def _pays(before: float, remaining: float, done: int, total: int) -> bool:
    """Whether ruling more pairs out by bits is cheaper than comparing those that remain.

    Args:
        before: share of the pairs that remained after half of the columns that are done.
        remaining: share that remains now.
        done: number of columns that are done.
        total: number of all columns.
    """
    kept = (remaining / before) ** (2 / done) if before else 0.0
    gone = remaining * (1 - kept ** (total - done))
    compared = min(float(total), 1 / max(1 - kept, 1e-9))
    return gone * (_PAIR_COST + _COLUMN_COST * compared) > total - done


def _upto(levels: Ints, last: int, width: int) -> Bits:
    """Bits [last + 2, width]: in row l those whose level is below l."""
    bits = np.zeros((last + 2, width), dtype=np.uint8)
    narrow = levels.astype(np.uint8)
    below = narrow[None, :] <= np.arange(last + 1, dtype=np.uint8)[:, None]
    packed = np.packbits(below, axis=1)
    bits[1:, : packed.shape[1]] = packed
    return bits


def _intersect(alive: Bits, levels: Ints, table: Bits) -> None:
    """``alive[i] &= table[levels[i]]``, a cache's worth of rows at a time."""
    step = max(1, _CHUNK_BYTES // alive.shape[1])
    words, table = alive.view(np.uint64), np.ascontiguousarray(table).view(np.uint64)
    buffer = np.empty((step, words.shape[1]), dtype=np.uint64)
    for start in range(0, len(words), step):
        chunk = words[start : start + step]
        part = buffer[: len(chunk)]
        np.take(table, levels[start : start + step], axis=0, out=part, mode="clip")
        np.bitwise_and(chunk, part, out=chunk)


def _ones(bits: Bits) -> Iterator[tuple[Ints, Ints]]:
    """Rows and columns of the bits that are set, a bounded number at a time."""
    rows, places = np.nonzero(bits)
    for start in range(0, len(rows), _BYTES_AT_ONCE):
        chunk = slice(start, start + _BYTES_AT_ONCE)
        unpacked = np.unpackbits(bits[rows[chunk], places[chunk]][:, None], axis=1)
        which, offsets = np.nonzero(unpacked)
        yield rows[chunk][which], places[chunk][which] * 8 + offsets
