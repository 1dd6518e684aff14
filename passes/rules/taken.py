"""Errors of several positions of one axis, each taken by itself: ``x[..., 0, :]``, ``x.unbind()``.

Added up, place by place, they would leave what all positions share: a value of zeros but for one
position is colored along its other axes only.  Side by side they keep what each of them has, as the
queries, keys and values of one packed projection need it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import fx

from fxfib.coloring import (
    FIRST_FREE,
    ZERO,
    Factor,
    Labels,
    Value,
    constant_values,
    renumbered,
    with_constants,
)
from fxfib.passes.rules.base import Rule
from fxfib.passes.rules.derivative import Derivative
from fxfib.passes.rules.elementwise import Operand, joint_colors
from fxfib.passes.rules.tracing import grid_factor

if TYPE_CHECKING:
    from fxfib.passes.backward import Adjoint
    from fxfib.passes.forward import Analysis


@dataclass(frozen=True)
class Taken:
    """The error of one position of an axis, on the way to its value."""

    axis: int
    position: int
    error: fx.Node


class TakenBack(Rule):
    """Zero where nothing was taken; elsewhere the errors' own colors, those of others apart."""

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        derivative, errors = node.target, cast(list[fx.Node], node.args[0])
        assert isinstance(derivative, Derivative)
        shape, axis = analysis.shape(node), derivative.context
        values = [analysis.color(error) for error in errors]
        grids = [[part(value, axes) for value in values] for axes in joined(values)]
        if not grids:
            return Value(shape)
        gains = [saved(own) for own in grids]
        best = int(np.argmax(gains))
        factors = [
            beside(own, axis, shape[axis], derivative.items)
            if place == best and gains[best] > 0
            else shared(own, axis)
            for place, own in enumerate(grids)
        ]
        return Value(shape, tuple(factors))


TAKEN_BACK = TakenBack()


def taken_back(adjoint: Adjoint, source: fx.Node, parts: list[Taken]) -> list[fx.Node]:
    """The errors of a value from those of positions of its axes, one for each axis."""
    found = []
    for axis in dict.fromkeys(taken.axis for taken in parts):
        errors: dict[int, fx.Node] = {}
        for taken in parts:
            if taken.axis == axis:
                known = errors.get(taken.position)
                errors[taken.position] = (
                    taken.error
                    if known is None
                    else adjoint.call(torch.ops.aten.add.Tensor, known, taken.error)
                )
        target = Derivative(
            partial(torch.unbind, dim=axis), 0, "unbind", TAKEN_BACK,
            items=tuple(errors), context=axis,
        )  # fmt: skip
        found.append(adjoint.call(target, list(errors.values()), source))
    return found


def joined(values: list[Value]) -> list[tuple[int, ...]]:
    """Axes that some of the values color together; an axis that none colors is in none."""
    groups: list[set[int]] = []
    for factor in (factor for value in values for factor in value.factors):
        touched = [g for g in groups if g & set(factor.axes)]
        groups = [g for g in groups if g not in touched]
        groups.append(set(factor.axes).union(*touched))
    return [tuple(sorted(group)) for group in groups]


def part(value: Value, axes: tuple[int, ...]) -> Factor:
    """The coloring of some axes of one error; all distinct where there is none."""
    found = grid_factor(value, axes)
    if found is not None:
        return found
    sizes = tuple(value.shape[a] for a in axes)
    labels = np.arange(int(np.prod(sizes)), dtype=np.int64).reshape(sizes) + FIRST_FREE
    return Factor(axes, labels, np.ones(sizes), renumbered("distinct"))


def saved(parts: list[Factor]) -> int:
    """How many more nodes are told to be alike side by side than along all parts alike."""
    count = [own.labels.size - classes(own.labels) for own in parts]
    common = parts[0].labels.size - classes(shared(parts, 0).labels)
    return sum(count) - len(parts) * common


def classes(labels: Labels) -> int:
    """How many colors there are."""
    return len(np.unique(labels))


def behind(axes: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """Axes of a value of which one position was taken, in the value."""
    return tuple(a + (a >= axis) for a in axes)


def shared(parts: list[Factor], axis: int) -> Factor:
    """What holds in every part."""
    shape = parts[0].labels.shape
    seen = [
        Operand(f.labels.ravel(), f.scales.ravel(), f.constant.ravel(), constant_values(f).ravel())
        for f in parts
    ]
    zero = np.logical_and.reduce([f.labels.ravel() == ZERO for f in parts])
    labels, scales = with_constants(*joint_colors(seen), zero, np.zeros(len(zero)))
    axes = behind(parts[0].axes, axis)
    return Factor(axes, labels.reshape(shape), scales.reshape(shape), renumbered("taken"))


def beside(parts: list[Factor], axis: int, size: int, positions: tuple[int, ...]) -> Factor:
    """The parts' own colors at their positions."""
    shape = (size, *parts[0].labels.shape)
    labels, scales = np.full(shape, ZERO, dtype=np.int64), np.ones(shape)
    start = 0
    for position, own in zip(positions, parts, strict=True):
        labels[position] = np.where(own.constant, own.labels, own.labels + start)
        scales[position] = own.scales
        start = int(labels.max(initial=0))
    others = behind(parts[0].axes, axis)
    axes = tuple(sorted((axis, *others)))
    place = axes.index(axis)
    return Factor(
        axes, np.moveaxis(labels, 0, place), np.moveaxis(scales, 0, place), renumbered("taken")
    )
