"""Checks and small facts about label vectors that `collapse` and `merge` share."""

import torch
from torch import Tensor

from fxfib.errors import InputError


def check_slices(name: str, weight: Tensor, labels: Tensor, num_classes: int, axis: int) -> int:
    """Refuse arguments that do not belong together; return `axis` counted from the front.

    Raises:
        InputError: `weight` is not floating point, `axis` does not exist, `labels` is not an
            integer vector with one entry for every slice, or an entry is outside
            ``-1 .. num_classes - 1``.
    """
    if not weight.is_floating_point():
        raise InputError(f"{name}: the weight must be floating point, not {weight.dtype}.")
    if not -weight.dim() <= axis < weight.dim():
        raise InputError(f"{name}: a weight of shape {tuple(weight.shape)} has no axis {axis}.")
    axis %= weight.dim()
    if labels.dim() != 1 or labels.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"{name}: labels must be an integer vector, not {labels.dtype} of shape "
            f"{tuple(labels.shape)}."
        )
    if labels.shape[0] != weight.shape[axis]:
        raise InputError(
            f"{name}: {labels.shape[0]} labels for {weight.shape[axis]} slices along axis {axis}."
        )
    if num_classes < 0:
        raise InputError(f"{name}: num_classes must not be negative, got {num_classes}.")
    if labels.numel():
        low, high = (int(value) for value in torch.aminmax(labels))
        if low < -1 or high >= num_classes:
            raise InputError(
                f"{name}: labels run from {low} to {high}, allowed are -1 to {num_classes - 1}."
            )
    return axis


def check_factors(name: str, what: str, factors: Tensor, count: int) -> None:
    """Refuse a vector of per-slice factors that is not floating point of length `count`."""
    if factors.shape != (count,) or not factors.is_floating_point():
        raise InputError(
            f"{name}: {what} must be {count} floating-point numbers, not {factors.dtype} of shape "
            f"{tuple(factors.shape)}."
        )
