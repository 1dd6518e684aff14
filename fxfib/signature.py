"""Affine forms: what makes two output nodes of a linear op differ.

The node ``i`` of a linear, convolution or batch-norm output is

    ``z_i = sum_j rows[i, j] * u_j + offset[i]``,

where ``u_j`` is what column ``j`` stands for: the sum over one input color at one kernel position
(Eq. 3), and the offset multiplies the constant one.  Rules return such forms, never clusters; one
place (:func:`color_form`) turns them into colors, so exact and approximate modes share all rules.

Every entry carries the bound of its own rounding: an entry that was stored as it is has none; a sum
of ``m`` stored numbers, or a product, may be off by a few unit roundoffs of the parameters' dtype
times the sum of absolute values.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from fxfib.coloring import (
    FIRST_FREE,
    Factor,
    Floats,
    Labels,
    first_appearance,
    unique_rows,
    with_constants,
)
from fxfib.kernels import collapse, color

# Two sums of stored numbers are called equal when they differ by no more than this many unit
# roundoffs times their sums of absolute values (each side contributes its own half).  Storing a
# term costs one; float64 sums also round while they are added up, in the weights' making and here.
ROUNDING_MULTIPLE = 4.0
# With so few digits unrelated rows look parallel but for rounding: there, multiples must be exact.
COARSE = 1e-5


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number: the relative error of storing one number."""
    return torch.finfo(dtype).eps / 2


@dataclass(frozen=True)
class Form:
    """Rows of an affine map along one axis of a value.

    Attributes:
        axis: the axis of the value whose nodes these are.
        rows: ``[n, d]`` floating tensor (the parameters' own dtype if nothing was computed).
        offset: float64 ``[n]``, the coefficient of the constant one.
        rows_bound: ``[n, d]`` or ``[n, 1]`` rounding bound of ``rows``; None: exact as stored.
        relative: float64 ``[d]`` or None: a further bound of ``relative[j] * |rows[i, j]|``.
        offset_bound: float64 ``[n]``.
        must_match: int64 ``[n]`` or None: nodes of different numbers read different things.
        space: what the columns mean; forms of equal space can be compared.
    """

    axis: int
    rows: torch.Tensor
    offset: Floats
    rows_bound: torch.Tensor | None
    offset_bound: Floats
    must_match: Labels | None
    space: Hashable
    relative: Floats | None = None

    def scaled(self, gain: Floats, roundoff: float) -> Form:
        """The form of ``gain_i * z_i`` (gains of any sign)."""
        if np.all(gain == 1.0):
            return self
        factor = torch.from_numpy(gain).unsqueeze(1)
        rows = self.rows.to(torch.float64) * factor
        bound = self.rows_bound
        if bound is not None:
            bound = bound * factor.abs().to(bound.dtype)
        relative = self._relative() + ROUNDING_MULTIPLE * roundoff
        offset = self.offset * gain
        offset_bound = self.offset_bound * np.abs(gain) + ROUNDING_MULTIPLE * roundoff * np.abs(
            offset
        )
        return replace(
            self,
            rows=rows,
            offset=offset,
            rows_bound=bound,
            offset_bound=offset_bound,
            relative=relative,
        )

    def _relative(self) -> Floats:
        return np.zeros(self.rows.shape[1]) if self.relative is None else self.relative

    def shifted(self, shift: Floats, roundoff: float, *, magnitude: Floats | None = None) -> Form:
        """The form of ``z_i + shift_i``; ``magnitude`` bounds the terms that made the shift."""
        if not np.any(shift) and magnitude is None:
            return self
        untouched = ~np.any(self.offset) and magnitude is None
        size = np.abs(shift) if magnitude is None else magnitude
        bound = self.offset_bound
        if not untouched:
            bound = bound + ROUNDING_MULTIPLE * roundoff * (np.abs(self.offset) + size)
        return replace(self, offset=self.offset + shift, offset_bound=bound)

    def plus(self, other: Form) -> Form:
        """The form of ``z_i + z'_i``: both rows side by side (a joint signature)."""
        rows = torch.cat([self.rows.to(torch.float64), other.rows.to(torch.float64)], 1)
        bound = relative = None
        if self.rows_bound is not None or other.rows_bound is not None:
            bound = torch.cat([dense_bound(self), dense_bound(other)], 1)
        if self.relative is not None or other.relative is not None:
            relative = np.concatenate([self._relative(), other._relative()])
        matches = [m for m in (self.must_match, other.must_match) if m is not None]
        return Form(
            self.axis,
            rows,
            self.offset + other.offset,
            bound,
            self.offset_bound + other.offset_bound,
            unique_rows(*matches) if matches else None,
            ("plus", self.space, other.space),
            relative,
        )


def dense_bound(form: Form) -> torch.Tensor:
    """The bound of every entry of the rows, but for the relative one."""
    shape = form.rows.shape
    if form.rows_bound is None:
        return torch.zeros(1, dtype=torch.float32).expand(shape)
    return form.rows_bound.expand(shape)


def form_of_factor(factor: Factor) -> Form:
    """Colored nodes as an affine form: ``scale_i`` times the base of their color.

    Constants become offsets.  Nodes of different colors must not merge (``must_match``): the
    one-hot of the color, as the identity shortcut of a residual block.
    """
    constant = factor.constant
    values = np.where(factor.labels == 0, factor.scales, 0.0)
    rows = torch.from_numpy(np.where(constant, 0.0, factor.scales)).unsqueeze(1)
    return Form(
        factor.axes[0],
        rows,
        np.where(constant, values, 0.0),
        None,
        np.zeros(len(values)),
        np.where(constant, 0, factor.labels),
        ("factor", factor.space),
    )


def collapse_columns(
    weight: torch.Tensor, factor: Factor | None, *, offset_constants: bool, roundoff: float
) -> tuple[torch.Tensor, torch.Tensor | None, Floats, Floats, Labels | None]:
    """Columns of a weight summed over the colors of its input (the left side of Eq. 3).

    Args:
        weight: ``[out, in, ...]``.
        factor: coloring of the input axis, None when every input is distinct.
        offset_constants: a constant input adds to the offset (no border effects); otherwise its
            column stays, one for all constants, weighted by their values.
        roundoff: unit roundoff of the parameters.

    Returns:
        rows ``[out, d]``, their bound or None, offset ``[out]``, its bound, and the color of each
        column (None when nothing was collapsed).
    """
    out = weight.shape[0]
    zero = np.zeros(out)
    if factor is None:
        return weight.reshape(out, -1), None, zero, zero, None
    labels, scales = factor.labels, factor.scales
    live = labels >= FIRST_FREE if offset_constants else labels != 1
    same = unique_rows(np.where(live, labels, -1))
    order = np.where(live, same, -1)
    kept, compact = np.unique(order[live], return_inverse=True)
    order[live] = compact.reshape(-1)
    classes = len(kept)
    column_colors = np.zeros(classes, dtype=np.int64)
    column_colors[order[live]] = labels[live]
    offset, offset_bound = zero, zero
    if offset_constants and np.any(factor.constant):
        values = np.where(labels == 0, scales, 0.0)
        taps = weight.to(torch.float64).flatten(2).sum(2) if weight.ndim > 2 else weight.double()
        magnitude = (
            weight.to(torch.float64).abs().flatten(2).sum(2) if weight.ndim > 2 else taps.abs()
        )
        offset = (taps @ torch.from_numpy(values)).numpy()
        offset_bound = (
            ROUNDING_MULTIPLE * roundoff * (magnitude @ torch.from_numpy(np.abs(values))).numpy()
        )
    if classes == len(labels) and np.all(scales == 1.0):
        return weight.reshape(out, -1), None, offset, offset_bound, column_colors
    index = torch.from_numpy(order)
    scale = None if np.all(scales == 1.0) else torch.from_numpy(scales)
    rows = collapse(weight, index, classes, axis=1, scale=scale)
    sizes = np.bincount(order[live], minlength=classes)
    summed = sizes > 1
    if scale is not None:
        summed |= np.bincount(order[live], weights=scales[live] != 1.0, minlength=classes) > 0
    # Only columns that really were sums or products may be off; the others are exact as stored.
    # Bounds need few digits; those of float64 sums are too small for fewer bits.
    narrow = torch.float32 if roundoff > 1e-9 else torch.float64
    bound = torch.zeros(rows.shape, dtype=narrow)
    chosen = torch.from_numpy(np.flatnonzero(summed))
    if len(chosen):
        relabel = np.full(classes, -1)
        relabel[np.flatnonzero(summed)] = np.arange(len(chosen))
        only = np.where(order >= 0, relabel[order], -1)
        picked = np.flatnonzero(only >= 0)
        sub_scale = None if scale is None else scale[picked].abs()
        magnitude = collapse(
            weight[:, torch.from_numpy(picked)].abs(),
            torch.from_numpy(only[picked]),
            len(chosen),
            axis=1,
            scale=sub_scale,
        )
        limit = ROUNDING_MULTIPLE * roundoff * magnitude.to(torch.float64)
        bound[:, chosen] = limit.to(narrow)
    return rows.reshape(out, -1), bound.reshape(out, -1), offset, offset_bound, column_colors


def nearby_short(scales: Floats, tolerance: Floats) -> Floats:
    """Scales that are a short number but for rounding, as that number; the others as they are.

    Nodes that are made of several must have equal ratios of scales, and 2 is not 2 + 4e-16.
    """
    mantissa, exponent = np.frexp(scales)
    short = np.ldexp(np.round(mantissa * 2**12) / 2**12, exponent)
    return np.where(np.abs(short - scales) <= tolerance * np.abs(scales), short, scales)


def scale_tolerance(
    rows: torch.Tensor,
    bound: torch.Tensor | None,
    relative: torch.Tensor | None,
    labels: Labels,
    roundoff: float,
) -> Floats:
    """How far a scale may be off, relatively: it is a ratio of two largest entries of rows.

    Only nodes that share their color have a scale other than one, so only their rows are read.
    """
    result = np.full(len(labels), 8 * roundoff)
    _, first, inverse, sizes = np.unique(
        labels, return_index=True, return_inverse=True, return_counts=True
    )
    shared = np.flatnonzero(sizes[inverse] > 1)
    if (bound is None and relative is None) or not rows.shape[1] or not len(shared):
        return result
    chosen = torch.from_numpy(shared)
    size, place = rows[chosen].abs().max(1, keepdim=True)
    own = np.zeros(len(labels))
    if bound is not None:
        of_largest = bound.expand(rows.shape)[chosen].gather(1, place).to(torch.float64)
        own[shared] += (of_largest / size.to(torch.float64).clamp(min=1e-300)).squeeze(1).numpy()
    if relative is not None:
        own[shared] += relative[place.squeeze(1)].numpy()
    return result + own + own[first][inverse]


def color_form(
    form: Form,
    size: int,
    eps: float,
    criterion: str,
    roundoff: float = 0.0,
) -> Factor:
    """Turn an affine form into colors: equal rows and offsets, equal color.

    A node whose row is zero (within its rounding bound) is the constant of its offset.  At every
    eps, rows that are parallel by a positive factor are one color with scales (exactly parallel);
    eps then merges the largest members.

    Args:
        form: the affine form of ``size`` nodes.
        eps: fiber precision of the criterion, 0 for exact.
        criterion: as in :func:`fxfib.kernels.color`.
        roundoff: unit roundoff of the parameters; 0: a scale is as exact as its rows are.
    """
    axis, space = form.axis, ("colored", form.space, id(form))
    if size == 0:
        return Factor((axis,), np.zeros(0, np.int64), np.zeros(0), space)
    constant = zero_rows(form)
    # A constant that is zero but for rounding is the zero: padding and products keep that one.
    none = constant & (np.abs(form.offset) <= form.offset_bound)
    form = replace(form, offset=np.where(none, 0.0, form.offset)) if none.any() else form
    form = _equal_constants(form, constant & ~none)
    table, bound, relative, match = _table(form)
    if eps > 0 and criterion != "fibration":
        labels = _linked(table, eps, criterion, bound, relative, match, constant) + FIRST_FREE
        labels, scales = with_constants(labels, np.ones(size), constant, form.offset)
        return Factor((axis,), labels, scales, space)
    # Step one: equal rows.  Members of one color then share one scale exactly, whatever rounding.
    exact = color(table, 0.0, criterion, must_match=match, bound=bound, relative=relative)
    equal = exact.labels.numpy()
    if exact.num_classes < size:
        chosen = torch.from_numpy(np.unique(equal, return_index=True)[1])
        table = table[chosen]
        match = None if match is None else match[chosen]
        bound = None if bound is None else bound[chosen]
    if 0 < roundoff < COARSE:
        # A multiple of a stored row was rounded when it was stored.
        stored = torch.full(
            (table.shape[1],), ROUNDING_MULTIPLE / 2 * roundoff, dtype=torch.float64
        )
        relative = stored if relative is None else torch.maximum(relative, stored)
    heads = color(
        table, eps, criterion, must_match=match, bound=bound, relative=relative, scaled=True
    )
    assert heads.scales is not None
    tolerance = scale_tolerance(table, bound, relative, heads.labels.numpy(), roundoff)
    labels = heads.labels.numpy()[equal] + FIRST_FREE
    scales = nearby_short(heads.scales.numpy(), tolerance)[equal]
    labels, scales = with_constants(labels, scales, constant, form.offset)
    return Factor((axis,), labels, scales, space)


def _equal_constants(form: Form, constant: npt.NDArray[np.bool_]) -> Form:
    """Constants that are equal but for rounding get one value."""
    chosen = np.flatnonzero(constant)
    if len(chosen) < 2 or not form.offset_bound[chosen].any():
        return form
    offset = form.offset.copy()
    column, bound = (torch.from_numpy(a[chosen]).unsqueeze(1) for a in (offset, form.offset_bound))
    labels = color(column, 0.0, bound=bound).labels.numpy()
    offset[chosen] = offset[chosen][np.unique(labels, return_index=True)[1]][labels]
    return replace(form, offset=offset)


def _linked(
    table: torch.Tensor,
    eps: float,
    criterion: str,
    bound: torch.Tensor | None,
    relative: torch.Tensor | None,
    match: torch.Tensor | None,
    constant: npt.NDArray[np.bool_],
) -> Labels:
    """Colors by linkage, of the nodes that are not constant; zeros for those."""
    chosen = torch.from_numpy(np.flatnonzero(~constant))
    labels = np.zeros(len(table), np.int64)
    if not len(chosen):
        return labels
    found = color(
        table[chosen],
        eps,
        criterion,
        must_match=None if match is None else match[chosen],
        bound=None if bound is None else bound[chosen],
        relative=relative,
    )
    labels[chosen.numpy()] = found.labels.numpy()
    return labels


def _table(
    form: Form,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """What is compared: rows with their offsets, bound, relative bound, what must match."""
    rows = form.rows
    table = rows if rows.dtype == torch.float64 else rows.to(torch.float32)
    bound = form.rows_bound
    relative = None if form.relative is None else torch.from_numpy(form.relative)
    if np.any(form.offset) or form.offset_bound.any():
        table = torch.cat([table, torch.from_numpy(form.offset).unsqueeze(1)], 1)
        if relative is not None:
            relative = torch.cat([relative, torch.zeros(1, dtype=torch.float64)])
        if bound is not None or form.offset_bound.any():
            last = torch.from_numpy(form.offset_bound).unsqueeze(1)
            bound = dense_bound(form)
            bound = torch.cat([bound, last.to(bound.dtype)], 1)
    match = None if form.must_match is None else torch.from_numpy(form.must_match)
    return table, bound, relative, match


def plain_labels(form: Form, eps: float, criterion: str) -> Labels:
    """Labels 0, 1, ... of nodes with equal rows and offsets; neither scales nor constants."""
    if len(form.offset) == 0:
        return np.zeros(0, np.int64)
    table, bound, relative, match = _table(form)
    # Other criteria know directions; what follows here is not homogeneous, so equal means equal.
    chosen = criterion if eps > 0 else "fibration"
    found = color(table, eps, chosen, must_match=match, bound=bound, relative=relative)
    return first_appearance(found.labels.numpy())


def zero_rows(form: Form) -> npt.NDArray[np.bool_]:
    """Which rows are zero, or nowhere more than their rounding."""
    few = slice(None, None, max(1, form.rows.shape[1] // 8))
    result = ~_above_rounding(form, few).any(dim=1)
    # A few entries tell almost every row from zero; the others are read as a whole.
    rest = torch.nonzero(result).squeeze(1)
    if len(rest):
        bound = None if form.rows_bound is None else form.rows_bound[rest]
        only = replace(form, rows=form.rows[rest], rows_bound=bound)
        result[rest] = ~_above_rounding(only, slice(None)).any(dim=1)
    return np.asarray(result.numpy())


def _above_rounding(form: Form, columns: slice) -> torch.Tensor:
    rows = form.rows[:, columns]
    if form.rows_bound is None:
        return rows != 0
    return rows.abs() > form.rows_bound.expand(form.rows.shape)[:, columns]
