"""Which pairs of rows are close: a window of candidates, each given up once a column differs."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fxfib.kernels.coloring.rows import Bounds, Floats, Ints, PlainRows, Rows
from fxfib.kernels.coloring.window import candidates, telling_columns

_PROBES = 8
_CACHED_ELEMENTS = 2**16

# Finds the close pairs of rows, as `close_pairs` does.
PairFinder = Callable[[Tensor, float, Tensor | None, Tensor | None, Tensor], tuple[Tensor, Tensor]]


def close_pairs(
    rows: Tensor, eps: float, bound: Tensor | None, relative: Tensor | None, groups: Tensor
) -> tuple[Tensor, Tensor]:
    r"""All pairs i < k of one group that are close.

    .. math:: \forall c : |r_{ic} - r_{kc}| \le eps + b_{ic} + b_{kc}

    What a device has to supply: the rest of a coloring needs only the rows in these pairs.

    Args:
        rows: floating [n, d], d > 0, distinct.
        eps: at least 0.
        bound: floating [n, d] or [n, 1], or None for zero.
        relative: float64 [d] or None: ``relative[c] * abs(rows[i, c])`` is added to the bound.
        groups: int64 [n].

    Returns:
        left and right, int64 [pairs], every pair once, in no particular order.
    """
    bounds = None
    if bound is not None or relative is not None:
        bounds = Bounds(
            None if bound is None else bound.numpy(),
            None if relative is None else relative.numpy(),
        )
    search = Closeness(PlainRows(rows.numpy(), bounds), eps)
    codes = [np.empty(0, dtype=np.int64)]
    for i, k in candidates(search.rows, eps, groups.numpy(), search.columns).pairs():
        close = np.isfinite(search.distances(i, k))
        i, k = i[close], k[close]
        codes.append(np.minimum(i, k) * len(rows) + np.maximum(i, k))
    # A window may list a pair twice.
    pairs = np.unique(np.concatenate(codes))
    return torch.from_numpy(pairs // len(rows)), torch.from_numpy(pairs % len(rows))


class Closeness:
    """Distances of pairs, given up on as soon as one column tells the pair apart."""

    def __init__(self, rows: Rows, eps: float) -> None:
        self.rows = rows
        self.eps = eps
        self.columns = telling_columns(rows, eps, _PROBES)
        everyone = slice(None)
        # One column after the other, each contiguous.
        self._probe = rows.values(everyone, self.columns).T.astype(np.float64)
        bounds = rows.bounds(everyone, self.columns).T
        self._probe_bounds = np.broadcast_to(bounds, self._probe.shape)

    def distances(self, left: Ints, right: Ints) -> Floats:
        """Float64 [pairs]: the L-infinity distance, or infinity where the pair is not close."""
        result = np.full(len(left), np.inf)
        alive = np.arange(len(left))
        i, k = left, right
        for column, bounds in zip(self._probe, self._probe_bounds, strict=True):
            gap = column[i]
            gap -= column[k]
            allowed: float | Floats = self.eps
            if self.rows.has_bounds:
                allowed = bounds[i] + bounds[k] + self.eps
            close = np.flatnonzero(np.abs(gap, out=gap) <= allowed)
            if len(close) < len(alive):
                alive, i, k = alive[close], i[close], k[close]
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
