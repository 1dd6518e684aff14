"""Mean, or weighted sum, over the colors of one axis."""

import torch
from torch import Tensor

from fxfib.errors import InputError
from fxfib.kernels.collapse.reference import collapse
from fxfib.kernels.dispatch import backend_of
from fxfib.kernels.labels import check_factors, check_slices

_BLOCK_ELEMENTS = 2**19


def merge(
    weight: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    axis: int = 0,
    weights: Tensor | None = None,
) -> Tensor:
    r"""One slice for every color: the average over the nodes of a fiber in Eq. 10.

    .. math:: \hat W_{c'} = \frac{1}{|c'|} \sum_{i \in c'} W_i
              \qquad\text{or, with weights,}\qquad \hat W_{c'} = \sum_{i \in c'} \omega_i W_i

    The other half of Eq. 10, the sum over the input colors, is `collapse`.  Sums are taken in
    float64 and rounded once.  The mean is the first member plus the mean deviation from it, so
    equal slices merge to the very same bits; a color of one member, of weight 1 or without weights,
    keeps its bits too.

    Args:
        weight: any floating dtype, any strides, n slices along `axis`.
        labels: int64 or int32 [n]; -1 leaves a slice out.
        num_classes: number of colors.
        axis: the axis that the labels number.
        weights: floating [n], used as they are (they need not sum to 1 in a color); None: the mean.

    Returns:
        dtype of `weight`, its shape with `num_classes` along `axis`, on its device.

    Raises:
        InputError: arguments whose dtypes, shapes or label range do not fit together, or a color
            that has no slice.
    """
    axis = check_slices("merge", weight, labels, num_classes, axis)
    labels = labels.to(device=weight.device, dtype=torch.int64)
    kept = torch.nonzero(labels >= 0).squeeze(1)
    kept_labels = labels[kept]
    counts = torch.bincount(kept_labels, minlength=num_classes)
    if bool((counts == 0).any()):
        empty = int(torch.nonzero(counts == 0)[0])
        raise InputError(f"merge: color {empty} has no slice to take the mean of.")
    if weights is not None:
        check_factors("merge", "weights", weights, labels.shape[0])
    # Stable, so the first member of every color stands first in its run.
    order = kept[torch.argsort(kept_labels, stable=True)]
    if backend_of(weight).name == "triton":
        from fxfib.kernels.merge.triton import segment_means

        if weights is not None:
            weights = weights.to(device=weight.device, dtype=torch.float64)
        return segment_means(weight, order, counts, axis, weights)
    if weights is not None:
        merged = collapse(weight, labels, num_classes, axis=axis, scale=weights)
        return merged.to(weight.dtype)

    first = order[torch.cumsum(counts, 0) - counts]
    merged = weight.index_select(axis, first)
    several = torch.nonzero(counts > 1).squeeze(1)
    if several.numel() == 0:
        return merged
    # A few colors at a time: the float64 temporaries stay small.
    slice_elements = max(1, weight.numel() // labels.shape[0])
    budget = torch.cumsum(counts[several], 0) * slice_elements // _BLOCK_ELEMENTS
    _, sizes = torch.unique_consecutive(budget, return_counts=True)
    for block in torch.split(several, sizes.tolist()):
        _write_means(merged, weight, labels, counts, block, axis)
    return merged


def _write_means(
    merged: Tensor, weight: Tensor, labels: Tensor, counts: Tensor, colors: Tensor, axis: int
) -> None:
    """Replace the first members in `merged` by means, for the given `colors` (ascending)."""
    number = torch.full((counts.shape[0] + 1,), -1, device=weight.device)
    number[colors] = torch.arange(colors.shape[0], device=weight.device)
    numbers = number[labels]  # label -1 reads the last entry, which is -1 as well
    members = torch.nonzero(numbers >= 0).squeeze(1)
    base = merged.index_select(axis, colors).to(torch.float64)
    deviation = weight.index_select(axis, members).to(torch.float64)
    deviation -= base.index_select(axis, numbers[members])
    shape = [1] * weight.dim()
    shape[axis] = colors.shape[0]
    mean = collapse(deviation, numbers[members], colors.shape[0], axis=axis)
    mean /= counts[colors].reshape(shape)
    mean += base
    merged.index_copy_(axis, colors, mean.to(weight.dtype))
