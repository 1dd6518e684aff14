"""Segmented sums on a GPU: the Triton side of `collapse`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxfib.kernels.tuning import Tuned

# Members that one program adds up in a row.  Longer colors are cut into pieces of this many, whose
# sums are summed in turn: more programs, and rounding that grows with the logarithm.
PIECE = 32


@triton.jit
def _segment_sums(
    weight: tl.tensor,
    order: tl.tensor,
    starts: tl.tensor,
    counts: tl.tensor,
    scale: tl.tensor,
    sums: tl.tensor,
    positions: tl.tensor,
    inner: tl.tensor,
    segments: tl.tensor,
    outer_stride: tl.tensor,
    slice_stride: tl.tensor,
    inner_stride: tl.tensor,
    SCALED: tl.constexpr,
    ALONG_SLICES: tl.constexpr,
    POSITIONS: tl.constexpr,
    SEGMENTS: tl.constexpr,
) -> None:
    """One tile of ``sums[outer, segment, inner]``: some positions (outer, inner), some segments.

    All segments of the tile advance together, one member at a time.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(segments, SEGMENTS)
    position = program // blocks * POSITIONS + tl.arange(0, POSITIONS)
    segment = program % blocks * SEGMENTS + tl.arange(0, SEGMENTS)
    # The last axis of a tile is the one along which neighbouring threads read: neighbours in
    # memory, either of one slice or of slices that follow one another.
    if ALONG_SLICES:
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

    # The first member is taken as it is, so that -0 stays -0 where it stands alone.
    present = count > 0
    member = tl.load(order + start, mask=present, other=0)
    wanted = present & (position < positions)
    total = tl.load(weight + base + member * slice_stride, mask=wanted, other=0.0).to(tl.float64)
    if SCALED:
        total *= tl.load(scale + member, mask=present, other=0.0)
    step = tl.full((), 1, tl.int64)
    while step < longest:
        present = step < count
        member = tl.load(order + start + step, mask=present, other=0)
        wanted = present & (position < positions)
        value = tl.load(weight + base + member * slice_stride, mask=wanted, other=0.0)
        value = value.to(tl.float64)
        if SCALED:
            value *= tl.load(scale + member, mask=present, other=0.0)
        total = tl.where(present, total + value, total)
        step += 1
    place = (outside * segments + segment) * inner + inside
    tl.store(sums + place, total, mask=known & (position < positions))


SEGMENT_SUMS = Tuned(
    _segment_sums,
    [
        {"POSITIONS": 32, "SEGMENTS": 32, "num_warps": 4},
        {"POSITIONS": 16, "SEGMENTS": 128, "num_warps": 4},
        {"POSITIONS": 128, "SEGMENTS": 16, "num_warps": 4},
        {"POSITIONS": 256, "SEGMENTS": 4, "num_warps": 4},
        {"POSITIONS": 64, "SEGMENTS": 64, "num_warps": 8},
    ],
    {"POSITIONS": 64, "SEGMENTS": 64},
    ["SCALED", "ALONG_SLICES"],
)


def segment_sums(
    weight: Tensor, order: Tensor, counts: Tensor, axis: int, scale: Tensor | None
) -> Tensor:
    """Sums of slices of `weight` along `axis`, in float64, without atomics.

    The members of a segment are added in their order, up to `PIECE` of them one after another, then
    the sums of the pieces in the same way.  The rounding error of a segment of m members is at most
    ``(PIECE - 1) * ceil(log(m, PIECE))`` roundoffs of float64 times the sum of the magnitudes (and
    one more with a scale); the bits depend on the inputs alone, not on block sizes, but they are
    not those of the CPU, which adds in another order.

    Args:
        weight: float16, bfloat16, float32 or float64, any strides.
        order: int64, the slices of segment 0, of segment 1 and so on.
        counts: int64 [segments], at least 0, their sum is the length of `order`.
        axis: from 0.
        scale: float64, one factor for every slice of `weight`, or None.

    Returns:
        float64, contiguous, the shape of `weight` with the number of segments along `axis`.
    """
    shape = list(weight.shape)
    shape[axis] = len(counts)
    outer, inner = weight.shape[:axis].numel(), weight.shape[axis + 1 :].numel()
    slices = weight.detach().reshape(outer, weight.shape[axis], inner)
    while True:
        longest = int(counts.max()) if len(counts) else 0
        if longest <= PIECE:
            return _sums(slices, order, counts, scale).reshape(shape)
        pieces = (counts + PIECE - 1) // PIECE
        starts = torch.cumsum(counts, 0) - counts
        owner = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), pieces)
        order_in_owner = torch.arange(len(owner), device=counts.device)
        order_in_owner -= (torch.cumsum(pieces, 0) - pieces)[owner]
        taken = order_in_owner * PIECE
        sizes = torch.clamp(counts[owner] - taken, max=PIECE)
        slices = _sums(slices, order, sizes, scale, starts[owner] + taken)
        order = torch.arange(len(owner), device=counts.device)
        counts, scale = pieces, None


def _sums(
    slices: Tensor,
    order: Tensor,
    counts: Tensor,
    scale: Tensor | None,
    starts: Tensor | None = None,
) -> Tensor:
    """One launch: float64 [outer, segments, inner]."""
    outer, _, inner = slices.shape
    segments = len(counts)
    sums = torch.empty((outer, segments, inner), dtype=torch.float64, device=slices.device)
    if starts is None:
        starts = torch.cumsum(counts, 0) - counts
    positions = outer * inner
    outer_stride, slice_stride, inner_stride = slices.stride()
    SEGMENT_SUMS.launch(
        lambda sizes: (
            triton.cdiv(positions, sizes["POSITIONS"]) * triton.cdiv(segments, sizes["SEGMENTS"]),
        ),
        slices,
        order if len(order) else torch.zeros(1, dtype=torch.int64, device=slices.device),
        starts,
        counts,
        scale if scale is not None else sums,
        sums,
        positions,
        inner,
        segments,
        outer_stride,
        slice_stride,
        inner_stride,
        work=slices.numel(),
        SCALED=scale is not None,
        ALONG_SLICES=inner == 1 or abs(slice_stride) < abs(inner_stride),
    )
    return sums
