"""Kernels that read whole rows: hashes, and the comparison of given pairs in float64."""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fxfib.kernels.tuning import Tuned

_GROUP_FACTOR = 0x9E3779B97F4A7C15 - 2**64  # the same modulo 2^64, as int64


@triton.jit
def _pairs_close(
    rows: tl.tensor,
    absolute: tl.tensor,
    relative: tl.tensor,
    eps: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    close: tl.tensor,
    pairs: tl.tensor,
    width: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    bound_row_stride: tl.tensor,
    bound_column_stride: tl.tensor,
    ABSOLUTE: tl.constexpr,
    RELATIVE: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Operation by operation what the CPU computes, so both decide alike."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    known = pair < pairs
    i = tl.load(left + pair, mask=known, other=0)[:, None]
    k = tl.load(right + pair, mask=known, other=0)[:, None]
    precision = tl.load(eps)
    agree = tl.full((PAIRS,), 1, tl.int32)
    start = tl.full((), 0, tl.int64)
    going = tl.full((), 1, tl.int32) > 0
    while (start < width) & going:
        column = (start + tl.arange(0, COLUMNS))[None, :]
        inside = known[:, None] & (column < width)
        place = column * column_stride
        x = tl.load(rows + i * row_stride + place, mask=inside, other=0.0).to(tl.float64)
        y = tl.load(rows + k * row_stride + place, mask=inside, other=0.0).to(tl.float64)
        x_bound = tl.zeros_like(x)
        y_bound = tl.zeros_like(y)
        if ABSOLUTE:
            place = absolute + column * bound_column_stride
            x_bound = tl.load(place + i * bound_row_stride, mask=inside, other=0.0).to(tl.float64)
            y_bound = tl.load(place + k * bound_row_stride, mask=inside, other=0.0).to(tl.float64)
        if RELATIVE:
            factor = tl.load(relative + column, mask=column < width, other=0.0)
            x_bound = x_bound + tl.abs(x) * factor
            y_bound = y_bound + tl.abs(y) * factor
        is_close = tl.abs(x - y) <= x_bound + y_bound + precision
        agree = agree & tl.min((is_close | ~inside).to(tl.int32), 1)
        going = tl.max(agree, 0) > 0
        start += COLUMNS
    tl.store(close + pair, agree.to(tl.int8), mask=known)


PAIRS_CLOSE = Tuned(
    _pairs_close,
    [
        {"PAIRS": 16, "COLUMNS": 64, "num_warps": 4},
        {"PAIRS": 4, "COLUMNS": 256, "num_warps": 4},
        {"PAIRS": 32, "COLUMNS": 32, "num_warps": 4},
    ],
    {"PAIRS": 256, "COLUMNS": 64},
    ["ABSOLUTE", "RELATIVE"],
)


def pairs_close(
    rows: Tensor,
    left: Tensor,
    right: Tensor,
    eps: float = 0.0,
    bound: Tensor | None = None,
    relative: Tensor | None = None,
) -> Tensor:
    r"""Bool [pairs]: :math:`|r_{ic} - r_{kc}| \le eps + b_{ic} + b_{kc}` in every column.

    In float64, with the roundings of the CPU.

    Args:
        rows: floating [n, d], any strides.
        left: int64 [pairs].
        right: int64 [pairs].
        eps: at least 0.
        bound: floating [n, d] or [n, 1], or None for zero.
        relative: float64 [d] or None; adds ``relative[c] * abs(rows[i, c])`` to the bound.
    """
    close = torch.empty(len(left), dtype=torch.int8, device=rows.device)
    bound_strides = (0, 0)
    if bound is not None:
        # A bound of one column is read again for every column.
        bound_strides = (bound.stride(0), bound.stride(1) if bound.shape[1] > 1 else 0)
    PAIRS_CLOSE.launch(
        lambda sizes: (triton.cdiv(len(left), sizes["PAIRS"]),),
        rows,
        bound if bound is not None else rows,
        relative if relative is not None else rows,
        # Numbers given to a kernel become float32; memory does not.
        torch.tensor([eps], dtype=torch.float64, device=rows.device),
        left,
        right,
        close,
        len(left),
        rows.shape[1],
        rows.stride(0),
        rows.stride(1),
        *bound_strides,
        work=2 * len(left) * rows.shape[1],
        ABSOLUTE=bound is not None,
        RELATIVE=relative is not None,
    )
    return close != 0


@triton.jit
def _row_hashes(
    rows: tl.tensor,
    multipliers: tl.tensor,
    hashes: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = row < count
    total = tl.zeros((ROWS,), tl.int64)
    start = tl.full((), 0, tl.int64)
    while start < width:
        column = start + tl.arange(0, COLUMNS)
        present = column < width
        place = row[:, None] * row_stride + column[None, :] * column_stride
        value = tl.load(rows + place, mask=known[:, None] & present[None, :], other=0.0)
        if DOUBLE:
            value = tl.where(value == 0.0, 0.0, value)  # -0 has the bits of +0
            bits = value.to(tl.int64, bitcast=True)
            low = tl.load(multipliers + 2 * column, mask=present, other=0)
            high = tl.load(multipliers + 2 * column + 1, mask=present, other=0)
            total += tl.sum((bits & 0xFFFFFFFF) * low[None, :], 1)
            total += tl.sum(((bits >> 32) & 0xFFFFFFFF) * high[None, :], 1)
        else:
            value = value.to(tl.float32)
            value = tl.where(value == 0.0, 0.0, value)
            bits = value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
            factor = tl.load(multipliers + column, mask=present, other=0)
            total += tl.sum(bits * factor[None, :], 1)
        start += COLUMNS
    tl.store(hashes + row, total, mask=known)


ROW_HASHES = Tuned(
    _row_hashes,
    [
        {"ROWS": 8, "COLUMNS": 128, "num_warps": 4},
        {"ROWS": 4, "COLUMNS": 512, "num_warps": 4},
        {"ROWS": 1, "COLUMNS": 1024, "num_warps": 4},
        {"ROWS": 32, "COLUMNS": 64, "num_warps": 4},
    ],
    {"ROWS": 128, "COLUMNS": 64},
    ["DOUBLE"],
)


def row_hashes(rows: Tensor, groups: Tensor) -> Tensor:
    r"""Multilinear hash of the 32-bit words of every row, modulo 2^64: the hash of the CPU.

    .. math:: h_i = g_i \gamma + \sum_j m_j w_{ij} \bmod 2^{64}

    Args:
        rows: floating [n, d], any strides; half precision counts as float32.
        groups: int64 [n].

    Returns:
        int64 [n]; equal rows (+0 = -0) of one group have equal hashes, on every device.
    """
    hashes = torch.empty(rows.shape[0], dtype=torch.int64, device=rows.device)
    double = rows.dtype == torch.float64
    words = rows.shape[1] * (2 if double else 1)
    factors = np.random.default_rng(20250101).integers(0, 2**64, words, np.uint64) | np.uint64(1)
    multipliers = torch.from_numpy(factors.view(np.int64)).to(rows.device)
    ROW_HASHES.launch(
        lambda sizes: (triton.cdiv(rows.shape[0], sizes["ROWS"]),),
        rows,
        multipliers if words else hashes,
        hashes,
        rows.shape[0],
        rows.shape[1],
        rows.stride(0),
        rows.stride(1),
        work=rows.numel(),
        DOUBLE=double,
    )
    return hashes + groups * _GROUP_FACTOR
