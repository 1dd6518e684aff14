"""Means and weighted sums of slices on a GPU: the Triton side of `merge`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxfib.kernels.dispatch import interprets
from fxfib.kernels.tuning import Tuned


@triton.jit
def _segment_means(
    weight: tl.tensor,
    order: tl.tensor,
    starts: tl.tensor,
    counts: tl.tensor,
    factors: tl.tensor,
    merged: tl.tensor,
    positions: tl.tensor,
    inner: tl.tensor,
    segments: tl.tensor,
    outer_stride: tl.tensor,
    slice_stride: tl.tensor,
    inner_stride: tl.tensor,
    WEIGHTED: tl.constexpr,
    ALONG_SLICES: tl.constexpr,
    POSITIONS: tl.constexpr,
    SEGMENTS: tl.constexpr,
) -> None:
    """One tile of ``merged[outer, segment, inner]``, from the weight to the rounded result."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(segments, SEGMENTS)
    position = program // blocks * POSITIONS + tl.arange(0, POSITIONS)
    segment = program % blocks * SEGMENTS + tl.arange(0, SEGMENTS)
    if ALONG_SLICES:  # the last axis of a tile lies along memory
        position = position[:, None]
        segment = segment[None, :]
    else:
        position = position[None, :]
        segment = segment[:, None]
    outside = position // inner
    inside = position % inner
    base = outside * outer_stride + inside * inner_stride
    known = segment < segments
    start = tl.load(starts + segment, mask=known, other=0)
    count = tl.load(counts + segment, mask=known, other=0)
    longest = tl.max(count)

    member = tl.load(order + start, mask=known, other=0)
    wanted = known & (position < positions)
    first = tl.load(weight + base + member * slice_stride, mask=wanted, other=0.0).to(tl.float64)
    if WEIGHTED:
        total = first * tl.load(factors + member, mask=known, other=0.0)
    else:
        total = tl.zeros_like(first)
    lost = tl.zeros_like(total)
    step = tl.full((), 1, tl.int64)
    while step < longest:
        present = step < count
        member = tl.load(order + start + step, mask=present, other=0)
        wanted = present & (position < positions)
        value = tl.load(weight + base + member * slice_stride, mask=wanted, other=0.0)
        value = value.to(tl.float64)
        if WEIGHTED:
            value *= tl.load(factors + member, mask=present, other=0.0)
        else:
            value -= first
        # A color may be as long as the axis, so what each addition rounds away is added up too.
        larger = total + value
        rounded = tl.where(
            tl.abs(total) >= tl.abs(value), (total - larger) + value, (value - larger) + total
        )
        total = tl.where(present, larger, total)
        lost = tl.where(present, lost + rounded, lost)
        step += 1
    # Adding +0 would turn -0 into +0.
    total = tl.where(lost == 0.0, total, total + lost)
    if not WEIGHTED:
        total = tl.where(total == 0.0, first, first + total / tl.where(known, count, 1))
    if merged.dtype.element_ty != tl.float64:
        total = total.to(tl.float32)  # half precision by way of float32, as torch does it
    place = (outside * segments + segment) * inner + inside
    value = total.to(merged.dtype.element_ty)
    tl.store(merged + place, value, mask=known & (position < positions))


SEGMENT_MEANS = Tuned(
    _segment_means,
    [
        {"POSITIONS": 128, "SEGMENTS": 8, "num_warps": 4},
        {"POSITIONS": 32, "SEGMENTS": 32, "num_warps": 4},
        {"POSITIONS": 16, "SEGMENTS": 64, "num_warps": 4},
        {"POSITIONS": 512, "SEGMENTS": 2, "num_warps": 4},
        {"POSITIONS": 512, "SEGMENTS": 4, "num_warps": 8},
    ],
    {"POSITIONS": 64, "SEGMENTS": 64},
    ["WEIGHTED", "ALONG_SLICES"],
)


def segment_means(
    weight: Tensor, order: Tensor, counts: Tensor, axis: int, weights: Tensor | None
) -> Tensor:
    """Mean, or weighted sum, of slices of `weight` along `axis`, in one pass.

    The mean is the first member plus the mean deviation from it, so equal slices merge to the same
    bits.  Sums are compensated (Neumaier): their error is two roundoffs of float64 times the sum of
    the magnitudes, however many members there are, up to terms of second order.

    Args:
        weight: float16, bfloat16, float32 or float64, any strides.
        order: int64, the slices of segment 0, of segment 1 and so on.
        counts: int64 [segments], at least 1, their sum is the length of `order`.
        axis: from 0.
        weights: float64, one factor for every slice of `weight`; None: the mean.

    Returns:
        dtype of `weight`, contiguous, its shape with the number of segments along `axis`.
    """
    shape = list(weight.shape)
    segments = shape[axis] = len(counts)
    outer, inner = weight.shape[:axis].numel(), weight.shape[axis + 1 :].numel()
    slices = weight.detach().reshape(outer, weight.shape[axis], inner)
    # The interpreter cuts bfloat16 off instead of rounding it.
    interpreted_half = weight.dtype == torch.bfloat16 and interprets()
    stored = torch.float32 if interpreted_half else weight.dtype
    merged = torch.empty(shape, dtype=stored, device=weight.device)
    positions = outer * inner
    outer_stride, slice_stride, inner_stride = slices.stride()
    SEGMENT_MEANS.launch(
        lambda sizes: (
            triton.cdiv(positions, sizes["POSITIONS"]) * triton.cdiv(segments, sizes["SEGMENTS"]),
        ),
        slices,
        order,
        torch.cumsum(counts, 0) - counts,
        counts,
        weights if weights is not None else counts,
        merged,
        positions,
        inner,
        segments,
        outer_stride,
        slice_stride,
        inner_stride,
        work=slices.numel(),
        WEIGHTED=weights is not None,
        ALONG_SLICES=inner == 1 or abs(slice_stride) < abs(inner_stride),
    )
    return merged.to(weight.dtype)
