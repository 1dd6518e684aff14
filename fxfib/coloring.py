"""Colorings of the nodes along the axes of one value.

A *node* is one channel of one value in the graph.  Two nodes of equal color compute the same
activation for every input of the network (Eq. 4), up to one known positive factor: node ``i`` of
color ``c`` carries ``scales[i] * base(c)``.  The factor is what makes fibers of positively
homogeneous activations (ReLU, max-pool, identity) mergeable when their rows are only parallel.

Two colors are reserved in every coloring: ``ONE`` is a constant activation whose value is its
scale, ``ZERO`` is the constant zero.  With them a bias is the weight that reads the color ``ONE``.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

ONE = 0
ZERO = 1
FIRST_FREE = 2

Labels = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def unique_rows(*columns: npt.NDArray[Any]) -> Labels:
    """Number the distinct tuples of equally shaped arrays, in order of first appearance.

    Args:
        columns: arrays of one shape ``S``, integers or floats; floats compare by value.

    Returns:
        int64 array of shape ``S``; equal numbers mean equal tuples.
    """
    shape = columns[0].shape
    code = np.zeros(int(np.prod(shape)), dtype=np.int64)
    for column in columns:
        _, inverse = np.unique(column.reshape(-1), return_inverse=True)
        inverse = inverse.reshape(-1).astype(np.int64)
        width = int(inverse.max(initial=0)) + 1
        _, code = np.unique(code * width + inverse, return_inverse=True)
        code = code.reshape(-1).astype(np.int64)
    return first_appearance(code).reshape(shape)


def first_appearance(labels: Labels) -> Labels:
    """Renumber labels 0, 1, 2 ... in the order in which they first appear (row-major)."""
    flat = labels.reshape(-1)
    if flat.size == 0:
        return labels.astype(np.int64)
    _, first, inverse = np.unique(flat, return_index=True, return_inverse=True)
    rank = np.empty(first.size, dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(first.size)
    return rank[inverse.reshape(-1)].reshape(labels.shape)


def project(grid: Labels, axis: int) -> Labels:
    """Color positions along one axis of a grid: equal when their whole slices are equal."""
    if grid.size == 0:
        return np.zeros(grid.shape[axis], dtype=np.int64)
    rows = np.ascontiguousarray(np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1))
    if rows.shape[1] == 1:
        return first_appearance(rows[:, 0])
    as_bytes = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).reshape(-1)
    _, inverse = np.unique(as_bytes, return_inverse=True)
    return first_appearance(inverse.reshape(-1).astype(np.int64))


@dataclass(frozen=True)
class Factor:
    """A coloring of the positions on one axis, or jointly on several axes, of a value.

    Attributes:
        axes: the axes, ascending.
        labels: int64, of the sizes of these axes; ``ONE`` and ``ZERO`` are constants.
        scales: float64, same shape; the value of a constant, a positive factor otherwise.
        space: labels of two factors can be compared when their spaces are equal.
    """

    axes: tuple[int, ...]
    labels: Labels
    scales: Floats
    space: Hashable

    def __post_init__(self) -> None:
        assert self.labels.shape == self.scales.shape and self.labels.ndim == len(self.axes)

    @property
    def constant(self) -> npt.NDArray[np.bool_]:
        """Which nodes have one value for every input."""
        return self.labels < FIRST_FREE

    @property
    def plain(self) -> bool:
        """Whether no node carries a factor of its own (constants aside)."""
        return bool(np.all((self.scales == 1.0) | self.constant))

    def keyed(self) -> Labels:
        """Labels in which nodes agree only if their scales agree too."""
        return unique_rows(self.labels, self.scales)

    def along(self, axis: int) -> Factor:
        """The finest consequence of this joint coloring for one of its axes alone.

        Slices are equal up to one positive factor; constant where all of a slice is one number.
        """
        if len(self.axes) == 1:
            return self
        rows = (self.labels.shape[self.axes.index(axis)], -1)
        labels, values, constant = (
            np.moveaxis(array, self.axes.index(axis), 0).reshape(rows)
            for array in (self.labels, self.scales, self.constant)
        )
        if labels.shape[1] == 0:
            return discrete(axis, len(labels), renumbered(self.space))
        free = np.argmin(constant, axis=1)  # the first that is not constant
        scales = np.where(constant.all(1), 1.0, np.take_along_axis(values, free[:, None], 1)[:, 0])
        ratio = np.where(labels == ZERO, 1.0, values / scales[:, None])
        same = project(unique_rows(labels, ratio), 0) + FIRST_FREE
        single = (
            constant.all(1) & (labels == labels[:, :1]).all(1) & (values == values[:, :1]).all(1)
        )
        number = np.where(labels[:, 0] == ONE, values[:, 0], 0.0)
        same, scales = with_constants(same, scales, single, number)
        return Factor((axis,), same, scales, renumbered(self.space))


def discrete(axis: int, size: int, space: Hashable) -> Factor:
    """Every position its own color: what holds for an axis nothing is known about."""
    return Factor((axis,), np.arange(size, dtype=np.int64) + FIRST_FREE, np.ones(size), space)


_NUMBERINGS = itertools.count()


def renumbered(space: Hashable) -> Hashable:
    """A space like no other: labels numbered by appearance mean nothing to another factor."""
    return ("renumbered", next(_NUMBERINGS), space)


@dataclass
class Value:
    """What the analysis knows about one tensor of the graph.

    Attributes:
        shape: sizes, with the example's size where a dimension is dynamic.
        factors: colorings of disjoint sets of axes; an axis in none of them is *untracked*: all its
            positions are distinct.
        form: the affine form of the nodes of one axis, not yet turned into colors
            (:class:`fxfib.signature.Form`); its axis is in no factor until it is colored.
        parts: what is known of each output of an op with several.
        inner: colorings of axes that exist only inside the op, by their names.
        read: of an axis, the positions that anybody reads; colors of other axes say nothing of the
            rest.
    """

    shape: tuple[int, ...]
    factors: tuple[Factor, ...] = ()
    form: Any = None
    parts: tuple[Value, ...] | None = field(default=None)
    inner: dict[str, Factor] = field(default_factory=dict)
    read: dict[int, npt.NDArray[np.bool_]] = field(default_factory=dict)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def factor(self, axis: int) -> Factor | None:
        """The coloring that an axis takes part in; None while it is untracked or not colored."""
        for factor in self.factors:
            if axis in factor.axes:
                return factor
        return None

    def tracked(self, axis: int) -> bool:
        """Whether nodes along an axis may turn out to be equal."""
        return self.factor(axis) is not None or (self.form is not None and self.form.axis == axis)

    @property
    def tracked_axes(self) -> tuple[int, ...]:
        """The tracked axes, ascending."""
        axes = [axis for factor in self.factors for axis in factor.axes]
        if self.form is not None and self.form.axis not in axes:
            axes.append(self.form.axis)
        return tuple(sorted(axes))


def opened(factor: Factor, *, scales: bool, constants: bool, space: Hashable) -> Factor:
    """The coloring after an op that maps every node by itself.

    Args:
        scales: the op is positively homogeneous, so scales pass; otherwise nodes of different
            scale get different colors.
        constants: a constant node stays the same constant; otherwise it becomes an ordinary color.
        space: the space of the result.
    """
    labels, values = factor.labels, factor.scales
    constant = factor.constant
    if scales and constants:
        return replace(factor, space=space)
    told_apart = np.where(constant, 1.0 if constants else values, 1.0 if scales else values)
    fresh = labels
    if np.any(told_apart != 1.0) or (constant.any() and not constants):
        fresh, space = unique_rows(labels, told_apart) + FIRST_FREE, renumbered(space)
    new_scales = values if scales else np.ones_like(values)
    new_scales = np.where(constant, 1.0, new_scales)
    if constants:
        fresh = np.where(constant, labels, fresh)
        new_scales = np.where(constant, values, new_scales)
    return Factor(factor.axes, fresh, new_scales, space)


def with_constants(
    labels: Labels, scales: Floats, constant: npt.NDArray[np.bool_], values: Floats
) -> tuple[Labels, Floats]:
    """Write constants of the given values into a coloring (where ``constant`` is true)."""
    labels = np.where(constant, np.where(values == 0.0, ZERO, ONE), labels)
    scales = np.where(constant, np.where(values == 0.0, 1.0, values), scales)
    return labels.astype(np.int64), scales.astype(np.float64)


def constant_values(factor: Factor) -> Floats:
    """The value of every constant node, 0 elsewhere."""
    return np.where(factor.labels == ONE, factor.scales, 0.0)


def sizes_of(shape: Iterable[int], axes: Iterable[int]) -> tuple[int, ...]:
    """The sizes of some axes."""
    shape = tuple(shape)
    return tuple(shape[axis] for axis in axes)
