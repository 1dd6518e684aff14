"""How fast a GPU copies, reads and compares when it does nothing else: what ours is held against.

Numbers are compared by a kernel of tiles without early exit and without a result to write but one
count a tile.  It is an ordinary kernel, not the best there could be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from measure import RIGHT, spread
from registry import CASE_COLUMNS, Case
from torch import Tensor

BLOCK = 64
# Larger than any cache.
BYTES = 2**32


@triton.jit
def _close_in_tiles(columns, found, count, width, eps, BLOCK: tl.constexpr):
    """Close pairs of one tile; `columns` is [width, count], so that loads are contiguous."""
    down = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    across = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    widest = tl.zeros((BLOCK, BLOCK), tl.float32)
    column = 0
    while column < width:  # the interpreter of triton 3.6 takes no argument for a range
        left = tl.load(columns + column * count + down)
        right = tl.load(columns + column * count + across)
        widest = tl.maximum(widest, tl.abs(left[:, None] - right[None, :]))
        column += 1
    close = tl.sum(tl.sum((widest <= eps).to(tl.int32), axis=1), axis=0)
    tl.store(found + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), close)


def close_pairs(columns: Tensor, eps: float) -> Tensor:
    """Ordered pairs of columns of a float32 ``[d, n]`` that are close, n a multiple of 64."""
    width, count = columns.shape
    tiles = count // BLOCK
    found = torch.empty(tiles, tiles, dtype=torch.int32, device=columns.device)
    _close_in_tiles[(tiles, tiles)](columns, found, count, width, eps, BLOCK=BLOCK)
    return found.sum()


def measure(rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each ceiling, in the columns of the other rows."""
    yield from _of_memory(rounds)
    columns = torch.randn(512, 16384, device="cuda")
    seconds = clocked(lambda: close_pairs(columns, 1e-2), rounds)
    yield _row("compare", columns.T, seconds, compared=columns.numel() * columns.shape[1])


def _of_memory(rounds: int) -> Iterator[dict[str, Any]]:
    source = torch.zeros(BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    # A copy reads and writes.
    yield _row("copy", source, clocked(lambda: target.copy_(source), rounds), moved=2 * BYTES)
    yield _row("read", source, clocked(lambda: source.sum(), rounds), moved=BYTES)


def clocked(run: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds by the device's own clock, after one call that is not counted."""
    run()
    seconds = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    return seconds


def _row(
    name: str, rows: Tensor, seconds: list[float], moved: int = 0, compared: int = 0
) -> dict[str, Any]:
    width = rows.shape[1] if rows.ndim == 2 else 1
    case = Case("ceiling", "random", 1, len(rows), width, "float32", "0")
    found = dict(zip(CASE_COLUMNS, case.key, strict=True)) | spread("seconds", seconds)
    found |= {"provider": name, "status": RIGHT, "rounds": len(seconds)}
    middle = sorted(seconds)[len(seconds) // 2]
    found["bytes_per_s"] = f"{moved / middle:.4g}" if moved else ""
    found["comparisons_per_s"] = f"{compared / middle:.4g}" if compared else ""
    return found
