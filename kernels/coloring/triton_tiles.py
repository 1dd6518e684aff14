"""Tiles of row pairs: which pairs may be close, which surely are, one bit a pair."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxfib.kernels.tuning import Tuned

# Rows of a tile.  Its columns are cut further, as autotuning likes, by a multiple of 32.
TILE = 128
WORDS = TILE // 32

# Tiles a launch: 4 KiB of bits each, so 256 MiB.
_TILES_AT_ONCE = 2**16
_WORDS_AT_ONCE = 2**20


@triton.jit
def _packed(bits: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tensor:
    """int32 [ROWS, COLUMNS // 32]: bit j of a word is the truth of its column j."""
    words = tl.reshape(bits.to(tl.int32), (ROWS, COLUMNS // 32, 32))
    return tl.sum(words << tl.arange(0, 32)[None, None, :], 2)


@triton.jit
def _close_tiles(
    values: tl.tensor,
    wide: tl.tensor,
    reach: tl.tensor,
    slack: tl.tensor,
    groups: tl.tensor,
    relative: tl.tensor,
    matrices: tl.tensor,
    tiles: tl.tensor,
    near: tl.tensor,
    sure: tl.tensor,
    found: tl.tensor,
    WIDE: tl.constexpr,
    RELATIVE: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    r"""Pairs (left, right) of one tile, or of one vertical part of it.

    Follows :math:`\max_c (|x_{ic} - x_{kc}| - \rho_{ic} - \rho_{kc})` in float32, where
    :math:`\rho` is half of eps, the bound and the slack, which is more than rounding can have moved
    it.  Above 0 the pair is apart; below twice the slack it is close; between, float64 decides.
    """
    PARTS: tl.constexpr = TILE // COLUMNS
    program = tl.program_id(0).to(tl.int64)
    tile = program // PARTS
    part = program % PARTS
    matrix = tl.load(tiles + 3 * tile)
    first = tl.load(matrices + 5 * matrix)
    first_row = tl.load(matrices + 5 * matrix + 1)
    first_column = tl.load(matrices + 5 * matrix + 2)
    count = tl.load(matrices + 5 * matrix + 3)
    width = tl.load(matrices + 5 * matrix + 4)

    left = tl.load(tiles + 3 * tile + 1) * TILE + tl.arange(0, TILE)
    right = tl.load(tiles + 3 * tile + 2) * TILE + part * COLUMNS + tl.arange(0, COLUMNS)
    is_left = left < count
    is_right = right < count
    left_group = tl.load(groups + first_row + left, mask=is_left, other=-1)
    right_group = tl.load(groups + first_row + right, mask=is_right, other=-2)
    left_slack = tl.load(slack + first_row + left, mask=is_left, other=0.0)
    right_slack = tl.load(slack + first_row + right, mask=is_right, other=0.0)
    left_reach = left_slack + tl.load(reach + first_row + left, mask=is_left, other=0.0)
    right_reach = right_slack + tl.load(reach + first_row + right, mask=is_right, other=0.0)

    # Pairs that do not count are apart from the start, so that no mask stays in registers.
    wanted = (left[:, None] < right[None, :]) & (left_group[:, None] == right_group[None, :])
    excess = tl.where(wanted, float("-inf"), float("inf"))
    column = tl.full((), 0, tl.int64)
    going = tl.min(tl.min(excess, 1), 0) <= 0.0
    while (column < width) & going:
        for step in tl.static_range(CHUNK):
            # Beyond the last column it is looked at again, which changes nothing.
            here = tl.minimum(column + step, width - 1)
            place = first + here * count
            x = tl.load(values + place + left, mask=is_left, other=0.0).to(tl.float32)
            y = tl.load(values + place + right, mask=is_right, other=0.0).to(tl.float32)
            x_reach = left_reach
            y_reach = right_reach
            if RELATIVE:
                factor = tl.load(relative + first_column + here)
                x_reach = x_reach + factor * tl.abs(x)
                y_reach = y_reach + factor * tl.abs(y)
            if WIDE:
                x_reach = x_reach + tl.load(wide + place + left, mask=is_left, other=0.0)
                y_reach = y_reach + tl.load(wide + place + right, mask=is_right, other=0.0)
            gap = tl.abs(x[:, None] - y[None, :]) - (x_reach[:, None] + y_reach[None, :])
            excess = tl.maximum(excess, gap)
        column += CHUNK
        going = tl.min(tl.min(excess, 1), 0) <= 0.0

    word = part * (COLUMNS // 32) + tl.arange(0, COLUMNS // 32)
    hits = tl.zeros((COLUMNS // 32,), tl.int32)
    # Words of tiles in which nothing was found are never read.
    if going:
        words = _packed(excess <= 0.0, TILE, COLUMNS)
        place = (tile * (TILE // 32) + word)[None, :] * TILE + tl.arange(0, TILE)[:, None]
        tl.store(near + place, words)
        hits = tl.sum((words != 0).to(tl.int32), 0)
        certain = excess < -2.0 * (left_slack[:, None] + right_slack[None, :])
        tl.store(sure + place, _packed(certain, TILE, COLUMNS))
    tl.store(found + tile * (TILE // 32) + word, hits)


CLOSE_TILES = Tuned(
    _close_tiles,
    [
        {"COLUMNS": 64, "CHUNK": 4, "num_warps": 8},
        {"COLUMNS": 64, "CHUNK": 4, "num_warps": 4},
        {"COLUMNS": 128, "CHUNK": 4, "num_warps": 8},
        {"COLUMNS": 128, "CHUNK": 4, "num_warps": 16},
        {"COLUMNS": 128, "CHUNK": 8, "num_warps": 16},
        {"COLUMNS": 32, "CHUNK": 8, "num_warps": 4},
    ],
    {"COLUMNS": 128, "CHUNK": 4},
    ["WIDE", "RELATIVE"],
)


@dataclass(frozen=True)
class Stack:
    """Many matrices of different sizes, one after another in shared buffers.

    Matrix m has n rows of d columns.  Its rows are sorted by group, then by a telling column, and
    its columns the most telling first.

    Attributes:
        values: float16, bfloat16 or float32; d times n numbers of each matrix, column after column.
        wide: float32, like `values`: what the bound adds in every entry; None for zero.
        reach: float32 [rows of all], half of eps plus the bound of the row.
        slack: float32 [rows of all], finite: more than float32 can have moved half of a pair.
        groups: int32 [rows of all], only compared.
        relative: float32 [columns of all]; None for zero.
        matrices: int64 [matrices, 5]: where its values, rows and columns begin, n, d.
        tiles: int64 [tiles, 3]: matrix, first tile of rows, second tile of rows.
    """

    values: Tensor
    wide: Tensor | None
    reach: Tensor
    slack: Tensor
    groups: Tensor
    relative: Tensor | None
    matrices: Tensor
    tiles: Tensor


def near_pairs(stack: Stack) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Pairs that may be close: matrix, left, right, and whether they surely are.

    int64 [pairs] three times and bool [pairs], left and right as places in the sorted rows, every
    pair once.  A launch for every 65,536 tiles, which is one for all but very large inputs.
    """
    for start in range(0, len(stack.tiles), _TILES_AT_ONCE):
        tiles = stack.tiles[start : start + _TILES_AT_ONCE].contiguous()
        device = tiles.device
        near = torch.empty((len(tiles), WORDS, TILE), dtype=torch.int32, device=device)
        sure = torch.empty_like(near)
        found = torch.empty((len(tiles), WORDS), dtype=torch.int32, device=device)
        _launch(stack, tiles, near, sure, found)
        hits = torch.nonzero(found)
        step = _WORDS_AT_ONCE // TILE
        for some in torch.split(hits, step) if len(hits) else ():
            tile, word = some.unbind(1)
            yield _unpacked(tiles[tile], word, near[tile, word], sure[tile, word])


def _launch(stack: Stack, tiles: Tensor, near: Tensor, sure: Tensor, found: Tensor) -> None:
    CLOSE_TILES.launch(
        lambda sizes: (len(tiles) * (TILE // sizes["COLUMNS"]),),
        stack.values,
        stack.wide if stack.wide is not None else stack.reach,
        stack.reach,
        stack.slack,
        stack.groups,
        stack.relative if stack.relative is not None else stack.reach,
        stack.matrices,
        tiles,
        near,
        sure,
        found,
        work=len(tiles) * TILE * TILE,
        WIDE=stack.wide is not None,
        RELATIVE=stack.relative is not None,
        TILE=TILE,
    )


def _unpacked(
    tiles: Tensor, word: Tensor, near: Tensor, sure: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pairs of one word column of each tile; `near` and `sure` are [len(tiles), TILE]."""
    which, row = torch.nonzero(near, as_tuple=True)
    shifts = torch.arange(32, dtype=torch.int32, device=near.device)
    bits = (near[which, row][:, None] >> shifts) & 1
    entry, bit = torch.nonzero(bits, as_tuple=True)
    which, row = which[entry], row[entry]
    certain = (sure[which, row] >> bit.to(torch.int32)) & 1
    matrix, left, right = tiles[which].unbind(1)
    return matrix, left * TILE + row, right * TILE + word[which] * 32 + bit, certain != 0
