"""Close pairs of rows on a GPU: tiles of pairs in float32, what they leave open in float64."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxfib.kernels.coloring.triton_rows import pairs_close
from fxfib.kernels.coloring.triton_tiles import TILE, Stack, near_pairs

_ROUNDOFF = 2.0**-52
_SINGLE_ROUNDOFF = 2.0**-24
_SAMPLE = 1024


@dataclass(frozen=True)
class Matrix:
    """The arguments of `close_pairs`."""

    rows: Tensor
    eps: float = 0.0
    bound: Tensor | None = None
    relative: Tensor | None = None
    groups: Tensor | None = None


def close_pairs(
    rows: Tensor,
    eps: float,
    bound: Tensor | None = None,
    relative: Tensor | None = None,
    groups: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""All pairs i < k of one group that are close.

    .. math:: \forall c : |r_{ic} - r_{kc}| \le eps + b_{ic} + b_{kc}

    Decided in float64 like on the CPU, pair by pair; float32 only decides what no rounding can
    change.  Memory is that of the rows and of one bit a pair, never a matrix of distances.

    Args:
        rows: float16, bfloat16, float32 or float64 [n, d], finite, any strides.
        eps: at least 0.
        bound: floating [n, d] or [n, 1], at least 0, or None for zero.
        relative: floating [d], at least 0, or None: ``relative[c] * abs(rows[i, c])`` is added to
            the bound.
        groups: int64 [n]; None: all rows are one group.

    Returns:
        left and right, int64 [pairs] on the device of `rows`, sorted by left, then by right.
    """
    return close_pairs_batch([Matrix(rows, eps, bound, relative, groups)])[0]


def close_pairs_batch(matrices: Sequence[Matrix]) -> list[tuple[Tensor, Tensor]]:
    """`close_pairs` of several matrices of any sizes, their tiles in one launch.

    Args:
        matrices: all on one device.

    Returns:
        What `close_pairs` returns, for each.
    """
    if not matrices:
        return []
    sorted_rows = [_Sorted(matrix) for matrix in matrices]
    stack = _stack(matrices, sorted_rows)
    parts: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in matrices]
    for number, left, right, certain in near_pairs(stack):
        # Tiles come matrix after matrix, so pairs do too.
        counts = torch.bincount(number, minlength=len(matrices)).tolist()
        pieces = zip(left.split(counts), right.split(counts), certain.split(counts), strict=True)
        for part, count, piece in zip(parts, counts, pieces, strict=True):
            if count:
                part.append(piece)
    return [
        _confirmed(matrix, kept.order, part)
        for matrix, kept, part in zip(matrices, sorted_rows, parts, strict=True)
    ]


def _confirmed(
    matrix: Matrix, order: Tensor, parts: list[tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """The pairs that are close, as row numbers in order."""
    if not parts:
        none = torch.empty(0, dtype=torch.int64, device=order.device)
        return none, none
    i, k = (order[torch.cat([part[side] for part in parts])] for side in (0, 1))
    left, right = torch.minimum(i, k), torch.maximum(i, k)
    certain = torch.cat([part[2] for part in parts])
    open_pairs = torch.nonzero(~certain).squeeze(1)
    if len(open_pairs):
        relative = None if matrix.relative is None else matrix.relative.to(torch.float64)
        certain[open_pairs] = pairs_close(
            matrix.rows.detach(),
            left[open_pairs],
            right[open_pairs],
            matrix.eps,
            None if matrix.bound is None else matrix.bound.detach(),
            relative,
        )
        left, right = left[certain], right[certain]
    by_row = torch.argsort(left * matrix.rows.shape[0] + right)
    return left[by_row], right[by_row]


class _Sorted:
    """Rows of a matrix in an order in which close rows are never far apart.

    Attributes:
        order: int64 [n], by group, then by the lower end of the row's interval in one column.
        columns: int64 [d], the most telling first.
        groups: int32 [n], in that order, numbered from 0.
        ends: int64 [tiles]: tile a of rows may hold partners of rows in tiles a to ends[a] - 1.
    """

    def __init__(self, matrix: Matrix) -> None:
        rows = matrix.rows.detach()
        count, width = rows.shape
        device = rows.device
        self.columns = _telling_columns(matrix)
        low = high = torch.zeros(count, dtype=torch.float64, device=device)
        if width and count:
            first = self.columns[:1]
            center = rows[:, first].to(torch.float64).squeeze(1)
            radius = torch.full_like(center, matrix.eps / 2)
            if matrix.bound is not None:
                bound = matrix.bound.detach()
                radius += bound[:, first if bound.shape[1] > 1 else [0]].squeeze(1)
            if matrix.relative is not None:
                radius += matrix.relative.to(torch.float64)[first] * center.abs()
            pad = 8 * _ROUNDOFF * (center.abs() + radius) + 1e-300
            low, high = center - radius - pad, center + radius + pad
        self.order = torch.argsort(low)
        self.groups = torch.zeros(count, dtype=torch.int64, device=device)
        if matrix.groups is not None:
            self.order = self.order[torch.argsort(matrix.groups[self.order], stable=True)]
            ordered = matrix.groups[self.order]
            self.groups = torch.unique_consecutive(ordered, return_inverse=True)[1]
        self.ends = _window_ends(self.groups, low[self.order], high[self.order])


def _window_ends(groups: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """For every tile of rows one past the last tile that may hold partners of its rows.

    Rows are sorted by (group, low).  A partner's low is at most the row's high, in one group, so it
    does not come after the place of (last group of the tile, largest high of the tile).
    """
    count = len(low)
    starts = torch.arange(0, count, TILE, device=low.device)
    if not count:
        return starts
    padded = torch.full((len(starts) * TILE,), -torch.inf, dtype=high.dtype, device=high.device)
    padded[:count] = high
    furthest = padded.reshape(-1, TILE).amax(1)
    last = groups[torch.clamp(starts + TILE, max=count) - 1]
    # Binary search for all tiles at once.
    begin, end = starts, torch.full_like(starts, count)
    for _ in range(count.bit_length()):
        middle = torch.clamp((begin + end) // 2, max=count - 1)
        group = groups[middle]
        before = (group < last) | ((group == last) & (low[middle] <= furthest))
        going = begin < end
        begin = torch.where(going & before, middle + 1, begin)
        end = torch.where(going & ~before, middle, end)
    return (begin + TILE - 1) // TILE


def _telling_columns(matrix: Matrix) -> Tensor:
    """All columns, those first whose spread is largest against what counts as close."""
    rows = matrix.rows.detach()
    count, width = rows.shape
    index = torch.linspace(0, max(0, count - 1), min(count, _SAMPLE), device=rows.device).long()
    if not count or not width:
        return torch.arange(width, device=rows.device)
    sample = rows[index].to(torch.float64)
    spread = sample.std(0, correction=0)
    reach = torch.full_like(spread, matrix.eps / 2)
    if matrix.bound is not None:
        reach += matrix.bound.detach()[index].to(torch.float64).mean(0)
    if matrix.relative is not None:
        reach += matrix.relative.to(torch.float64) * sample.abs().mean(0)
    return torch.argsort(spread / torch.clamp(reach, min=1e-30), descending=True, stable=True)


def _stack(matrices: Sequence[Matrix], sorted_rows: Sequence[_Sorted]) -> Stack:
    """All matrices in the buffers that the kernel reads."""
    device = matrices[0].rows.device
    dtypes = {matrix.rows.dtype for matrix in matrices}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    dtype = torch.float32 if dtype == torch.float64 else dtype
    shapes = [matrix.rows.shape for matrix in matrices]
    values = torch.empty(sum(n * d for n, d in shapes), dtype=dtype, device=device)
    wide = relative = None
    if any(matrix.bound is not None and matrix.bound.shape[1] > 1 for matrix in matrices):
        wide = torch.zeros(len(values), dtype=torch.float32, device=device)
    if any(matrix.relative is not None for matrix in matrices):
        relative = torch.zeros(sum(d for _, d in shapes), dtype=torch.float32, device=device)
    table, tiles, reaches, slacks = [], [], [], []
    value = row = column = 0
    for number, (matrix, kept) in enumerate(zip(matrices, sorted_rows, strict=True)):
        count, width = matrix.rows.shape
        table.append((value, row, column, count, width))
        here = slice(value, value + count * width)
        values[here].view(width, count).copy_(_turned(matrix.rows, kept))
        reach, size = _reach(matrix)
        if wide is not None and matrix.bound is not None and matrix.bound.shape[1] > 1:
            wide[here].view(width, count).copy_(_turned(matrix.bound, kept))
        if relative is not None and matrix.relative is not None:
            relative[column : column + width] = matrix.relative[kept.columns]
        reaches.append(reach[kept.order].to(torch.float32))
        slacks.append((16 * _SINGLE_ROUNDOFF * size[kept.order] + 1e-36).to(torch.float32))
        first = torch.arange(len(kept.ends), device=device)
        tiles.append(torch.stack([torch.full_like(first, number), first, kept.ends - first], 1))
        value, row, column = value + count * width, row + count, column + width
    return Stack(
        values,
        wide,
        torch.cat(reaches),
        torch.cat(slacks),
        torch.cat([kept.groups for kept in sorted_rows]).to(torch.int32),
        relative,
        torch.tensor(table, dtype=torch.int64, device=device),
        _all_tiles(torch.cat(tiles)),
    )


def _all_tiles(runs: Tensor) -> Tensor:
    """int64 [tiles, 3] (matrix, a, b) from [runs, 3] (matrix, a, number of tiles b from a on)."""
    number, first, counts = runs.unbind(1)
    owner = torch.repeat_interleave(torch.arange(len(runs), device=runs.device), counts)
    place = torch.arange(len(owner), device=runs.device) - (torch.cumsum(counts, 0) - counts)[owner]
    return torch.stack([number[owner], first[owner], first[owner] + place], 1)


def _turned(entries: Tensor, kept: _Sorted) -> Tensor:
    """Column after column, both in the order of `kept`."""
    return entries.detach()[kept.order].t()[kept.columns]


def _reach(matrix: Matrix) -> tuple[Tensor, Tensor]:
    """Float64 [n]: half of eps plus the row's own bound, and the largest number of the row.

    The latter bounds what float32 has to do with: entries, and all that is added to the reach.
    """
    rows = matrix.rows.detach()
    count, width = rows.shape
    reach = torch.full((count,), matrix.eps / 2, dtype=torch.float64, device=rows.device)
    if not width or not count:
        return reach, reach
    size = rows.abs().amax(1).to(torch.float64)
    largest = size.clone()
    if matrix.relative is not None:
        largest += matrix.relative.to(torch.float64).max() * size
    if matrix.bound is not None:
        bound = matrix.bound.detach()
        if bound.shape[1] == 1:
            reach += bound.squeeze(1)
        else:
            largest += bound.amax(1)
    return reach, largest + reach
