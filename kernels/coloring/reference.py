"""Which rows are equal: the coloring of Eq. 3, exact or up to a precision eps."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fxfib.errors import InputError
from fxfib.kernels.coloring.cluster import bounded_clusters
from fxfib.kernels.coloring.identical import identical
from fxfib.kernels.coloring.rows import (
    Bounds,
    Floats,
    Ints,
    NormalisedRows,
    PlainRows,
    Rows,
    blocks,
    by_appearance,
    distinct,
    value_order,
)

CRITERIA = ("fibration",)


@dataclass(frozen=True, eq=False)
class Coloring:
    """A partition of n rows.

    Attributes:
        labels: int64 [n], the color of every row, numbered in the order of first appearance, on the
            device of the rows.
        num_classes: number of colors.
        scales: float64 [n] when colored with ``scaled=True``, else None: row i equals ``scales[i]``
            times the first row of its color.  Positive; 1.0 for the first row of every color.
    """

    labels: Tensor
    num_classes: int
    scales: Tensor | None = None


def color(
    rows: Tensor,
    eps: float = 0.0,
    criterion: str = "fibration",
    *,
    must_match: Tensor | None = None,
    bound: Tensor | None = None,
    relative: Tensor | None = None,
    scaled: bool = False,
    weights: Tensor | None = None,
) -> Coloring:
    r"""Give two rows one color when they are equal in every column (Eq. 3 of the paper).

    .. math:: i \sim k \iff \forall c : \Big|\sum_{j \in c} W_{ij} - \sum_{j \in c} W_{kj}\Big| = 0

    where the rows are the sums already (see `collapse`).  Sums round, and eps allows for more, so
    rows i and k may share a color when, in every column,
    :math:`|r_{ic} - r_{kc}| \le eps + b_{ic} + b_{kc}`, with :math:`b` the bound, and in a color
    **every pair** does: the L-infinity diameter of a color is at most eps plus two bounds.  Where
    closeness is not transitive (chains), colors are those of complete linkage.

    With ``scaled=True`` rows that differ by a positive factor are one color too.  At eps = 0 rows
    divided by their largest absolute value :math:`m_i` are compared, with the bound
    :math:`(b_{ic} + |r_{ic}| \nu_i / m_i) / m_i`, where :math:`\nu_i` is what the bound allows
    :math:`m_i` to vary.  Without a bound that is exact for rows of at most 24 significant bits, and
    up to the rounding of one float64 division for float64 rows.  At eps > 0 proportional rows are
    grouped like this first, then the member of largest norm of every group is compared by eps.
    Rows that are zero, or nowhere above their bound, are proportional to nothing but one another.

    The partition does not depend on the order of the rows or on the number of threads.

    Args:
        rows: float16, bfloat16, float32 or float64 [n, d], finite; n and d may be 0.
        eps: at least 0, finite.
        criterion: one of `CRITERIA`.
        must_match: int64 [n]; only rows with the same number may share a color.
        bound: floating [n, d] or [n, 1], at least 0, finite; None means 0: equal bit by bit except
            that +0 equals -0.
        relative: floating [d], at least 0, finite: a further bound ``relative[c] * |rows[i, c]|``,
            for entries that were rounded, without a matrix of bounds.
        scaled: look for rows that differ by a positive factor.
        weights: floating [n], how much a row counts; a diameter does not depend on it.

    Returns:
        The coloring, its tensors on the device of `rows`.

    Raises:
        InputError: NaN or infinite rows, an unknown criterion, an eps or bound that is negative or
            not finite, shapes or dtypes that do not fit, or more than 20,000 rows in one chain of
            close rows.
    """
    _check(rows, eps, criterion, must_match, bound, relative, weights)
    values = _to_numpy(rows)
    bounds = None
    if bound is not None or relative is not None:
        bounds = Bounds(
            None if bound is None else _to_numpy(bound),
            None if relative is None else relative.detach().cpu().to(torch.float64).numpy(),
        )
    count = values.shape[0]
    groups: Ints = np.zeros(count, dtype=np.int64)
    if must_match is not None:
        groups = must_match.detach().cpu().numpy().astype(np.int64)
    if count == 0:
        empty = torch.empty(0, dtype=torch.float64, device=rows.device)
        return Coloring(empty.to(torch.int64), 0, empty if scaled else None)
    scales: Floats | None = None
    if scaled:
        ids, norms = _proportional(values, bounds, eps, groups)
        labels, first = by_appearance(ids)
        scales = norms / norms[first[labels]]
    else:
        labels, first = by_appearance(_equal(PlainRows(values, bounds), eps, groups))
    return Coloring(
        torch.from_numpy(labels).to(rows.device),
        len(first),
        None if scales is None else torch.from_numpy(scales).to(rows.device),
    )


def _equal(rows: Rows, eps: float, groups: Ints) -> Ints:
    """Cluster numbers of rows that are equal within eps and their bounds."""
    ids, first = identical(rows, groups)
    if eps == 0 and not rows.has_bounds:
        return ids
    return bounded_clusters(distinct(rows, ids, first), eps, groups[first])[ids]


def _proportional(
    values: Floats, bounds: Bounds | None, eps: float, groups: Ints
) -> tuple[Ints, Floats]:
    """Cluster numbers of rows that are equal up to a positive factor, and comparable scales."""
    count, width = values.shape
    if width == 0:
        return groups, np.ones(count)
    zero = np.ones(count, dtype=bool)
    norms = np.empty(count)
    for block in blocks(count, width):
        size = np.abs(values[block])
        norms[block] = size.max(axis=1)
        allowed = 0.0 if bounds is None else bounds.at(size, block, slice(None))
        zero[block] = (size <= allowed).all(axis=1)
    norms[zero] = 1.0
    # Zero rows get groups of their own, and share one color in each.
    _, groups = np.unique(2 * np.unique(groups, return_inverse=True)[1] + zero, return_inverse=True)
    ids = _equal(NormalisedRows(values, bounds, norms), 0.0, groups)
    ids = np.where(zero, ids.max() + 1 + groups, ids)
    ids = np.unique(ids, return_inverse=True)[1]
    if eps == 0:
        return ids, norms
    known = None if bounds is None else bounds.absolute
    largest = _largest_members(values, known, norms, ids)
    # The largest member stands for its group, so the factors inside the group are relative to it.
    factors = norms / norms[largest[ids]]
    separate = zero[largest]
    representatives = values[largest]
    representatives[separate] = 0.0
    part_bounds = bounds
    if bounds is not None and bounds.absolute is not None:
        part_bounds = replace(bounds, absolute=bounds.absolute[largest])
    parts = _equal(PlainRows(representatives, part_bounds), eps, groups[largest])
    return parts[ids], factors


def _largest_members(values: Floats, bounds: Floats | None, norms: Floats, ids: Ints) -> Ints:
    """For every id its row of largest norm; among several, values and bounds alone decide."""
    order = np.lexsort((-norms, ids))
    starts = np.searchsorted(ids[order], np.arange(int(ids.max()) + 1))
    chosen = order[starts]
    after, before = order[1:], order[:-1]
    tied = np.flatnonzero((norms[after] == norms[before]) & (ids[after] == ids[before]))
    for group in np.unique(ids[order[tied]]):
        ends = starts[group + 1] if group + 1 < len(starts) else len(order)
        members = order[starts[group] : ends]
        members = members[norms[members] == norms[members[0]]]
        known = values[members]
        if bounds is not None:
            known = np.concatenate([known, bounds[members]], axis=1)
        chosen[group] = members[value_order(known)[0]]
    return chosen


def _to_numpy(tensor: Tensor) -> Floats:
    """Contiguous float32 or float64 on the CPU, shared with the tensor where possible."""
    tensor = tensor.detach().cpu()
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.to(torch.float32)
    return tensor.contiguous().numpy()


def _check(
    rows: Tensor,
    eps: float,
    criterion: str,
    must_match: Tensor | None,
    bound: Tensor | None,
    relative: Tensor | None,
    weights: Tensor | None,
) -> None:
    if criterion not in CRITERIA:
        raise InputError(f"color: unknown criterion {criterion!r}; known: {', '.join(CRITERIA)}.")
    if not (isinstance(eps, (int, float)) and math.isfinite(eps) and eps >= 0):
        raise InputError(f"color: eps must be a finite number that is not negative, got {eps!r}.")
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
    for name, tensor in (("bound", bound), ("relative", relative)):
        if tensor is not None and tensor.numel():
            low, high = torch.aminmax(tensor.detach())
            if not (float(low) >= 0 and math.isfinite(float(high))):
                raise InputError(f"color: {name} must be finite and not negative.")
    if weights is not None and (weights.shape != (count,) or not weights.is_floating_point()):
        raise InputError(
            f"color: weights must be {count} floating-point numbers, not {weights.dtype} of shape "
            f"{tuple(weights.shape)}."
        )
