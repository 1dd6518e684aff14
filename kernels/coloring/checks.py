"""What `color` refuses."""

import math

import torch
from torch import Tensor

from fxfib.errors import InputError

CRITERIA = ("fibration", "cosine", "energy")
# Largest eps of the criteria that have one.
_LARGEST = {"cosine": 2.0, "energy": 1.0}


def check_arguments(
    rows: Tensor,
    eps: float,
    criterion: str,
    must_match: Tensor | None,
    bound: Tensor | None,
    relative: Tensor | None,
    weights: Tensor | None,
) -> None:
    """Refuse arguments of `color` that do not belong together.

    Raises:
        InputError: see `color`.
    """
    if criterion not in CRITERIA:
        raise InputError(f"color: unknown criterion {criterion!r}; known: {', '.join(CRITERIA)}.")
    if not (isinstance(eps, (int, float)) and math.isfinite(eps) and eps >= 0):
        raise InputError(f"color: eps must be a finite number that is not negative, got {eps!r}.")
    if eps > _LARGEST.get(criterion, math.inf):
        raise InputError(
            f"color: eps must be at most {_LARGEST[criterion]:g} for {criterion!r}, got {eps!r}."
        )
    if rows.dim() != 2 or not rows.is_floating_point():
        raise InputError(
            f"color: rows must be a floating-point matrix, not {rows.dtype} of shape "
            f"{tuple(rows.shape)}."
        )
    count, width = rows.shape
    # aminmax is one pass without a temporary, and NaN and infinity survive it.
    if rows.numel() and not all(math.isfinite(value) for value in torch.aminmax(rows.detach())):
        raise InputError("color: rows hold NaN or infinite values.")
    if must_match is not None and (must_match.shape != (count,) or must_match.dtype != torch.int64):
        raise InputError(
            f"color: must_match must be int64 of shape ({count},), not {must_match.dtype} of shape "
            f"{tuple(must_match.shape)}."
        )
    if bound is not None and (
        bound.shape not in ((count, width), (count, 1)) or not bound.is_floating_point()
    ):
        raise InputError(
            f"color: bound must be floating point of shape ({count}, {width}) or ({count}, 1), "
            f"not {bound.dtype} of shape {tuple(bound.shape)}."
        )
    if relative is not None and (relative.shape != (width,) or not relative.is_floating_point()):
        raise InputError(
            f"color: relative must be {width} floating-point numbers, not {relative.dtype} of "
            f"shape {tuple(relative.shape)}."
        )
    if weights is not None and (weights.shape != (count,) or not weights.is_floating_point()):
        raise InputError(
            f"color: weights must be {count} floating-point numbers, not {weights.dtype} of shape "
            f"{tuple(weights.shape)}."
        )
    for name, tensor in (("bound", bound), ("relative", relative), ("weights", weights)):
        if tensor is not None and tensor.numel():
            low, high = torch.aminmax(tensor.detach())
            if not (float(low) >= 0 and math.isfinite(float(high))):
                raise InputError(f"color: {name} must be finite and not negative.")
