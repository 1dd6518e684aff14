"""Pairs of rows that one number per row cannot tell apart: the sort-window prefilter.

If two rows lie within a distance in every column, they do so in each single column, and any fixed
combination of their columns differs by at most the combined distance.  So sort by one such number
and look only at neighbours whose intervals overlap: no pair is missed, no n^2 memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fxfib.kernels.coloring.bitmaps import BitMap
from fxfib.kernels.coloring.rows import Floats, Ints, Rows

PAIRS_AT_ONCE = 2**19
# Fewer rows than this are not worth a bitmap.
FEW_ROWS = 256
# Columns that are cut into cells: every one makes half as many entries again.
_MOST_CELLS = 3
_ROUNDOFF = 2.0**-52


@dataclass(frozen=True)
class Window:
    """Row ``order[p]`` may be close to the rows ``order[p + 1 : ends[p]]`` and to no later one."""

    order: Ints
    ends: Ints

    def size(self) -> int:
        """Number of candidate pairs."""
        count = len(self.ends)
        return int(self.ends.sum()) - count * (count + 1) // 2

    def pairs(self) -> Iterator[tuple[Ints, Ints]]:
        """Candidate pairs of row indices, a bounded number at a time."""
        counts = self.ends - np.arange(1, len(self.ends) + 1)
        lefts = np.flatnonzero(counts)
        counts = counts[lefts]
        totals = np.cumsum(counts)
        start = 0
        while start < len(lefts):
            before = int(totals[start - 1]) if start else 0
            stop = int(np.searchsorted(totals, before + PAIRS_AT_ONCE, side="right"))
            stop = max(stop, start + 1)
            block = counts[start:stop]
            left = np.repeat(lefts[start:stop], block)
            starts = np.repeat(np.cumsum(block) - block, block)
            right = left + 1 + np.arange(len(left)) - starts
            yield self.order[left], self.order[right]
            start = stop


def all_pairs(members: Ints) -> Window:
    """The window that rules nothing out."""
    return Window(members, np.full(len(members), len(members)))


def interval_window(centers: Floats, radii: Floats, groups: Ints) -> Window:
    """Pairs of one group whose intervals [center - radius, center + radius] overlap."""
    low, high = _padded(centers, radii)
    count = len(centers)
    if groups.min() == groups.max():
        order = np.argsort(low, kind="stable")
        return Window(order, np.searchsorted(low[order], high[order], side="right"))
    # One sweep over the starts and ends of all intervals, group after group: the number of starts
    # before an interval's end is where its window ends.
    is_end = np.repeat([False, True], count)
    sweep = np.lexsort((is_end, np.concatenate([low, high]), np.concatenate([groups, groups])))
    started = np.cumsum(~is_end[sweep])
    ends = np.empty(count, dtype=np.int64)
    closing = is_end[sweep]
    ends[sweep[closing] - count] = started[closing]
    order = sweep[~closing]
    return Window(order, ends[order])


def grid_window(intervals: Sequence[tuple[Floats, Floats]], groups: Ints) -> Window | None:
    """Pairs of one group whose intervals overlap in every column; None: too uneven for it.

    All columns but the last are cut into cells, and a row enters every cell that its intervals
    meet: two rows that overlap do so in a cell that both enter.  The last column is swept inside
    each.  A pair that meets in two cells is listed twice.

    Args:
        intervals: float64 centers and radii, [n] each, of at least two columns.
        groups: int64 [n].
    """
    entries = np.arange(len(groups))
    keys = np.zeros(len(groups), dtype=np.int64)
    cells = 1
    if groups.min() != groups.max():
        _, keys = np.unique(groups, return_inverse=True)
        cells = int(keys.max()) + 1
    for interval in intervals[:-1]:
        low, high = _padded(*interval)
        width = max(2 * float((high - low).mean()), float((high - low).max()) / 4)
        start = float(low.min())
        across = (float(high.max()) - start) / width + 1
        if not across * cells < 2.0**40:
            return None
        first = np.floor((low - start) / width).astype(np.int64)
        met = np.floor((high - start) / width).astype(np.int64) - first + 1
        copies = met[entries]
        starts = np.repeat(np.cumsum(copies) - copies, copies)
        entries, keys = np.repeat(entries, copies), np.repeat(keys, copies)
        keys = keys + cells * (first[entries] + np.arange(len(entries)) - starts)
        cells *= int(across) + 1
    centers, radii = intervals[-1]
    window = interval_window(centers[entries], radii[entries], keys)
    return Window(entries[window.order], window.ends)


def _padded(centers: Floats, radii: Floats) -> tuple[Floats, Floats]:
    """Ends of the intervals, with room for rounding here and in the comparison of pairs."""
    pad = 8 * _ROUNDOFF * (np.abs(centers) + radii) + 1e-300
    return centers - radii - pad, centers + radii + pad


def telling_columns(rows: Rows, eps: float, limit: int) -> Ints:
    """At most `limit` columns whose spread is largest against the distance that counts as close."""
    index = np.linspace(0, rows.count - 1, min(rows.count, 1024)).astype(np.int64)
    columns = np.linspace(0, rows.width - 1, min(rows.width, 64)).astype(np.int64)
    spread = rows.values(index, columns).std(axis=0, dtype=np.float64)
    if rows.width > len(columns) and not spread.any():
        columns = np.arange(rows.width)
        spread = rows.values(index[:: max(1, len(index) // 64)], columns).std(axis=0)
    reach = rows.bounds(index, columns).mean(axis=0) + eps / 2
    # Without any reach, only the spread counts.
    score = spread / np.where(reach > 0, reach, 1e-30)
    return columns[np.argsort(-score, kind="stable")[:limit]]


def candidates(rows: Rows, eps: float, groups: Ints, columns: Ints) -> Window | BitMap:
    """The narrowest of a few windows; `columns` are the most telling ones, best first.

    One column is enough for ordinary weights at a small eps, several reach further.  Weights that
    take few values (pruned, ternary) tie in every single column, and a combination of many columns
    tells them apart.  Where no window is narrow, bits rule the pairs out.
    """
    first = _coordinate(rows, eps, columns[0])
    best = interval_window(*first, groups)
    few = 4 * rows.count
    if best.size() > few and len(columns) > 1:
        # As many columns as would do if each ruled out its part of the pairs by itself; one that
        # is cut into cells lists the others about twice.
        share = 2 * best.size() / (rows.count * (rows.count - 1) / 2)
        needed = np.log(few / best.size()) / np.log(share) if share < 1 else _MOST_CELLS
        more = columns[1 : 1 + max(1, min(int(np.ceil(needed)), _MOST_CELLS))]
        grid = grid_window([first, *(_coordinate(rows, eps, c) for c in more)], groups)
        if grid is not None and grid.size() < best.size():
            best = grid
    # A combination reads many columns of all rows, as comparing that many pairs would.
    enough = max(few, rows.count * rows.width // 32)
    for chosen in (columns, slice(None)):
        if best.size() <= enough:
            break
        window = interval_window(*_combination(rows, eps, chosen), groups)
        if window.size() < best.size():
            best = window
    if rows.count >= FEW_ROWS and best.size() > rows.count**2 // 64:
        return BitMap(rows, eps, groups)
    return best


def _coordinate(rows: Rows, eps: float, column: int) -> tuple[Floats, Floats]:
    columns = np.array([column])
    everyone = slice(None)
    centers = rows.values(everyone, columns)[:, 0].astype(np.float64)
    radii = np.broadcast_to(rows.bounds(everyone, columns) + eps / 2, (rows.count, 1))[:, 0]
    return centers, radii


def _combination(rows: Rows, eps: float, columns: Ints | slice) -> tuple[Floats, Floats]:
    """A fixed combination of columns, and how far rounding and the distances can move it."""
    width = rows.width if isinstance(columns, slice) else len(columns)
    generator = np.random.default_rng(20250102)
    factors = generator.uniform(0.5, 1.5, width) * generator.choice([-1.0, 1.0], width)
    magnitudes = np.abs(factors)
    centers, radii = np.empty(rows.count), np.empty(rows.count)
    step = max(1, 2**20 // max(1, width))
    for start in range(0, rows.count, step):
        block = slice(start, start + step)
        values = rows.values(block, columns).astype(np.float64)
        reach = np.broadcast_to(rows.bounds(block, columns) + eps / 2, values.shape)
        centers[block] = values @ factors
        rounding = (width + 8) * _ROUNDOFF * (np.abs(values) @ magnitudes)
        radii[block] = (reach @ magnitudes) * (1 + (width + 8) * _ROUNDOFF) + rounding
    return centers, radii
