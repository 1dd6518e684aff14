"""Segmented sum over the colors of one axis."""

import numpy as np
import torch
from torch import Tensor

from fxfib.kernels.dispatch import backend_of
from fxfib.kernels.labels import check_factors, check_slices

_BLOCK_ELEMENTS = 2**19
_SHORT = 64


def collapse(
    weight: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    axis: int = 1,
    scale: Tensor | None = None,
) -> Tensor:
    r"""Sum the slices of `weight` that share a label: the sums that Eq. 3 compares.

    .. math:: \bar W_{ic} = \sum_{k \in c} s_k W_{ik}

    The sum is taken in float64 whatever the dtype of the weight, in an order that the labels alone
    decide: the same bits in every run and for every number of threads, and a rounding error that
    grows with the logarithm of the color's size.  On a GPU, where Triton runs, the order is another
    one than on the CPU, so the two results agree up to that error (see `backend_of`).

    Args:
        weight: any floating dtype, any strides, n slices along `axis`.
        labels: int64 or int32 [n]; -1 leaves a slice out.
        num_classes: number of colors; a color without slices sums to zero.
        axis: the axis that the labels number.
        scale: floating [n], one factor a slice; None means 1.

    Returns:
        float64, the shape of `weight` with `num_classes` along `axis`, on the device of `weight`.

    Raises:
        InputError: arguments whose dtypes, shapes or label range do not fit together.
    """
    axis = check_slices("collapse", weight, labels, num_classes, axis)
    labels = labels.to(device=weight.device, dtype=torch.int64)
    if scale is not None:
        check_factors("collapse", "scale", scale, labels.shape[0])
        scale = scale.to(device=weight.device, dtype=torch.float64)
    if _is_identity(labels, num_classes):
        return _scaled(weight.to(torch.float64, copy=True), scale, axis)

    order = torch.argsort(labels, stable=True)
    order = order[labels[order] >= 0]
    if backend_of(weight).name == "triton":
        from fxfib.kernels.collapse.triton import segment_sums

        counts = torch.bincount(labels[order], minlength=num_classes)
        return segment_sums(weight, order, counts, axis, scale)
    shape = list(weight.shape)
    shape[axis] = num_classes
    if weight.device.type == "cpu" and axis <= 1 and order.numel() and weight.numel():
        counts = torch.bincount(labels[order], minlength=num_classes)
        if int(counts.max()) <= _SHORT:
            if axis == 0:
                return _short_row_sums(weight, order, counts, scale, shape)
            return _short_sums(weight, order, counts, scale, shape)
    sums = torch.zeros(shape, dtype=torch.float64, device=weight.device)
    if weight.dim() == 1:
        return _add_sums(sums, weight, labels, order, axis, scale)
    # Block by block along another axis: temporaries stay small and are used again.
    across = 1 if axis == 0 else 0
    step = max(1, _BLOCK_ELEMENTS * weight.shape[across] // max(1, weight.numel()))
    for start in range(0, weight.shape[across], step):
        length = min(step, weight.shape[across] - start)
        block = weight.narrow(across, start, length)
        _add_sums(sums.narrow(across, start, length), block, labels, order, axis, scale)
    return sums


def _short_sums(
    weight: Tensor, order: Tensor, counts: Tensor, scale: Tensor | None, shape: list[int]
) -> Tensor:
    """Colors of few members, the usual case: every block is gathered once and added up in order.

    Sums of at most `_SHORT` terms need no tree, and numpy adds each segment on one thread, so the
    bits are the same for every number of threads.
    """
    sums = torch.zeros(shape, dtype=torch.float64)
    result = sums.reshape(shape[0], shape[1], -1).numpy()
    flat = weight.detach().reshape(weight.shape[0], weight.shape[1], -1)
    present = torch.nonzero(counts).reshape(-1)
    starts = (torch.cumsum(counts, 0) - counts)[present].numpy()
    factors = None if scale is None else scale[order].numpy().reshape(1, -1, 1)
    whole = present.numel() == shape[1]
    single = bool((counts <= 1).all())
    step = max(1, _BLOCK_ELEMENTS * flat.shape[0] // max(1, flat.numel()))
    for start in range(0, flat.shape[0], step):
        block = flat[start : start + step].index_select(1, order).to(torch.float64).numpy()
        if factors is not None:
            block *= factors
        if not single:
            block = np.add.reduceat(block, starts, axis=1)
        if whole:
            result[start : start + step] = block
        else:
            result[start : start + step, present.numpy()] = block
    return sums


def _short_row_sums(
    weight: Tensor, order: Tensor, counts: Tensor, scale: Tensor | None, shape: list[int]
) -> Tensor:
    """The same along the first axis: a few colors at a time, whose slices are whole rows."""
    sums = torch.zeros(shape, dtype=torch.float64)
    result = sums.reshape(shape[0], -1).numpy()
    flat = weight.detach().reshape(weight.shape[0], -1)
    present = torch.nonzero(counts).reshape(-1)
    ends = torch.cumsum(counts, 0)[present]
    starts = ends - counts[present]
    step = max(1, _BLOCK_ELEMENTS // (flat.shape[1] * int(counts.max())))
    for first in range(0, len(present), step):
        last = min(first + step, len(present)) - 1
        begin = int(starts[first])
        index = order[begin : int(ends[last])]
        rows = flat.index_select(0, index).to(torch.float64).numpy()
        if scale is not None:
            rows *= scale[index].numpy().reshape(-1, 1)
        places = (starts[first : last + 1] - begin).numpy()
        result[present[first : last + 1].numpy()] = np.add.reduceat(rows, places, axis=0)
    return sums


def _add_sums(
    sums: Tensor, weight: Tensor, labels: Tensor, order: Tensor, axis: int, scale: Tensor | None
) -> Tensor:
    """Write the sums of one block into `sums`, which holds zeros; `order` is sorted by label."""
    present, counts = torch.unique_consecutive(labels[order], return_counts=True)
    starts = torch.cumsum(counts, 0) - counts
    sums.index_copy_(axis, present, _chosen(weight, order[starts], axis, scale))
    # Most colors have one member, so only the other members are worth a tree.
    other = torch.ones_like(order, dtype=torch.bool)
    other[starts] = False
    rest = order[other]
    if rest.numel():
        added, targets = _tree_sum(_chosen(weight, rest, axis, scale), labels[rest], axis)
        sums.index_add_(axis, targets, added)
    return sums


def _chosen(weight: Tensor, index: Tensor, axis: int, scale: Tensor | None) -> Tensor:
    slices = weight.index_select(axis, index).to(torch.float64)
    return _scaled(slices, None if scale is None else scale[index], axis)


def _is_identity(labels: Tensor, num_classes: int) -> bool:
    count = labels.shape[0]
    return count == num_classes and torch.equal(labels, torch.arange(count, device=labels.device))


def _scaled(slices: Tensor, factors: Tensor | None, axis: int) -> Tensor:
    """Multiply fresh `slices` in place by one factor each."""
    if factors is None:
        return slices
    shape = [1] * slices.dim()
    shape[axis] = factors.shape[0]
    return slices.mul_(factors.reshape(shape))


def _tree_sum(slices: Tensor, labels: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Add neighbours of equal label until every label stands once; `labels` is sorted.

    Each round adds at most one slice to any other, so no two additions race for one cell and the
    result has the same bits on every device.
    """
    while True:
        _, counts = torch.unique_consecutive(labels, return_counts=True)
        if counts.numel() == labels.numel():
            return slices, labels
        starts = torch.repeat_interleave(torch.cumsum(counts, 0) - counts, counts)
        position = torch.arange(labels.shape[0], device=labels.device)
        odd = (position - starts) % 2 == 1
        left = position[~odd]
        right = position[odd]
        target = torch.searchsorted(left, right - 1)
        added = slices.index_select(axis, right)
        slices = slices.index_select(axis, left).index_add_(axis, target, added)
        labels = labels[left]
