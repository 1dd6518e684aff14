"""Where every element goes: number the elements, run the real op, read the numbers off."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
import torch
from torch import fx

from fxfib.coloring import (
    FIRST_FREE,
    Factor,
    Labels,
    Value,
    renumbered,
    with_constants,
)
from fxfib.passes.relations import Move, Same
from fxfib.passes.rules.base import (
    Barrier,
    hint,
)

Block = tuple[tuple[int, ...], tuple[int, ...], Labels]  # input axes, output axes, index


def example_arguments(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments after its first one, sizes at the example's values."""

    def plain(argument: fx.Node) -> Any:
        value = argument.meta["val"]
        if isinstance(value, torch.Tensor):
            raise Barrier("an argument of it is computed")
        return hint(value)

    args, kwargs = fx.map_arg((node.args[1:], node.kwargs), plain)
    return args, kwargs


def strides_of(shape: tuple[int, ...]) -> list[int]:
    """Strides of a contiguous tensor, in elements."""
    result, step = [], 1
    for size in reversed(shape):
        result.append(step)
        step *= size
    return result[::-1]


def trace_blocks(
    shape: tuple[int, ...], moved: Labels, groups: Iterable[tuple[int, ...]], dynamic: set[int]
) -> list[Block]:
    """Which output axes carry which input axes, and from where each output position comes.

    Args:
        shape: sizes of the input.
        moved: for each output element, the linear number of the input element in it.
        groups: input axes that are colored, together or each by itself; they are joined with others
            as far as the op mixes them.
        dynamic: input axes that must not be involved (their size is not known).

    Raises:
        Barrier: the op mixes an axis of interest with one of unknown size, or is no plain movement.
    """
    if moved.size == 0:
        return []  # nothing came from anywhere
    strides = strides_of(shape)
    coordinates: dict[int, Labels] = {}

    def coordinate(axis: int) -> Labels:
        if axis not in coordinates:
            coordinates[axis] = (moved // strides[axis]) % shape[axis]
        return coordinates[axis]

    def varies(axis: int, out: int) -> bool:
        here = coordinate(axis)
        return shape[axis] > 1 and bool(np.any(here != here.take([0], axis=out)))

    together = {axis: set(group) for group in groups for axis in group}
    blocks: list[Block] = []
    done: set[int] = set()
    for seed in list(together):
        if seed in done:
            continue
        ins: set[int] = set(together[seed])
        outs: set[int] = set()
        while True:
            grown = {d for a in ins for d in range(moved.ndim) if varies(a, d)}
            more = {
                a for a in range(len(shape)) if a not in ins and any(varies(a, d) for d in grown)
            }
            more |= {b for a in more for b in together.get(a, ())} - ins
            if not more and grown == outs:
                break
            outs, ins = grown, ins | more
        if ins & dynamic:
            raise Barrier(
                "it mixes channels with the batch", "keep channels on an axis of their own"
            )
        done |= ins
        in_axes, out_axes = tuple(sorted(ins)), tuple(sorted(outs))
        number = np.zeros(moved.shape, dtype=np.int64)
        for axis in in_axes:
            number = number * shape[axis] + coordinate(axis)
        rest = tuple(d for d in range(moved.ndim) if d not in outs)
        index = number[tuple(0 if d in rest else slice(None) for d in range(moved.ndim))]
        spread = np.expand_dims(index, rest) if rest else index
        if np.any(number != spread):
            raise Barrier("it does not move whole channels")
        blocks.append((in_axes, out_axes, index))
    return blocks


def grid_factor(value: Value, axes: tuple[int, ...]) -> Factor | None:
    """One joint coloring of several axes from the colorings of some of them.

    An axis without a coloring contributes its position.  None where no axis has one.
    """
    shape = tuple(value.shape[a] for a in axes)
    found = {id(f): f for a in axes if (f := value.factor(a)) is not None}
    if not found:
        return None
    if len(found) == 1:
        only = next(iter(found.values()))
        if only.axes == axes:
            return only
    code = np.zeros(shape, dtype=np.int64)
    scales = np.ones(shape)
    constant = np.zeros(shape, dtype=bool)
    values = np.zeros(shape)

    def spread(array: Any, own: tuple[int, ...]) -> Any:
        sizes = [value.shape[a] if a in own else 1 for a in axes]
        return np.asarray(array).reshape(sizes)

    for factor in found.values():
        if not set(factor.axes) <= set(axes):
            raise Barrier("it splits axes that are colored together")
        width = int(factor.labels.max(initial=0)) + 1
        code = code * width + spread(factor.labels, factor.axes)
        scales = scales * spread(np.where(factor.constant, 1.0, factor.scales), factor.axes)
        known = spread(factor.constant, factor.axes)
        values = np.where(
            known, spread(np.where(factor.labels == 0, factor.scales, 0.0), factor.axes), values
        )
        constant = constant | known
    for axis in axes:
        if value.factor(axis) is None:
            code = code * value.shape[axis] + spread(np.arange(value.shape[axis]), (axis,))
    labels, scales = with_constants(
        code + FIRST_FREE, np.broadcast_to(scales, shape), constant, values
    )
    space = renumbered(tuple(f.space for f in found.values()))
    return Factor(axes, labels, scales, space)


def moved_factor(
    factor: Factor, out_axes: tuple[int, ...], index: Labels, beside: Hashable = ()
) -> Factor:
    """The coloring of the output of a movement.

    Args:
        beside: what was done to axes that the factor does not color; a node of which other
            positions are left, or in another order, computes something else.
    """
    labels = factor.labels.reshape(-1)[index]
    scales = factor.scales.reshape(-1)[index]
    return Factor(out_axes, labels, scales, ("moved", beside, factor.space))


def taken_factors(value: Value, axis: int, positions: int | range, shift: int) -> list[Factor]:
    """The colorings of what is at some positions of an axis.

    A joint coloring is cut, not projected: nodes that differ elsewhere may be equal here.

    Args:
        positions: of the axis; the number of one position, or a range of them.
        shift: 1 where the axis disappears, 0 where it stays.
    """
    index: Any = positions if shift else list(positions)  # type: ignore[arg-type]
    found = []
    for factor in value.factors:
        axes = tuple(a - shift * (a > axis) for a in factor.axes if not (shift and a == axis))
        if not axes:
            continue
        if axis in factor.axes:
            place = factor.axes.index(axis)
            labels = factor.labels.take(index, axis=place)
            scales = factor.scales.take(index, axis=place)
            found.append(Factor(axes, labels, scales, factor.space))
        else:
            space = ("at", axis, positions, factor.space)
            found.append(Factor(axes, factor.labels, factor.scales, space))
    return found


def move_relations(node: fx.Node, source: fx.Node, block: Block) -> list[Move | Same]:
    """The layouts of the two sides of a movement; ``Same`` where an axis moves as a whole.

    Axes that are colored together and move each by itself are related each by itself.
    """
    if len(block[0]) == len(block[1]) > 1 and (apart := _each_by_itself(source, block)):
        return [relation for part in apart for relation in move_relations(node, source, part)]
    ins, outs, index = block
    whole = len(ins) == len(outs) == 1 and source.meta["val"].shape[ins[0]] == len(index)
    if whole and np.array_equal(index, np.arange(len(index))):
        return [Same((node, outs[0]), (source, ins[0]))]
    return [Move(tuple((node, a) for a in outs), (tuple((source, a) for a in ins),), index)]


def _each_by_itself(source: fx.Node, block: Block) -> list[Block] | None:
    """The movement of every axis alone, where none of them mixes with another."""
    ins, outs, index = block
    if index.size == 0:
        return None
    sizes = [hint(source.meta["val"].shape[axis]) for axis in ins]
    parts: list[Block] = []
    for axis, coordinate in zip(ins, np.unravel_index(index, sizes), strict=True):
        moving = [
            place
            for place in range(index.ndim)
            if np.any(coordinate != coordinate.take([0], axis=place))
        ]
        if len(moving) != 1:
            return None
        (place,) = moving
        line = np.moveaxis(coordinate, place, 0).reshape(index.shape[place], -1)[:, 0]
        parts.append(((axis,), (outs[place],), line.astype(np.int64)))
    return parts if len({out for _, (out,), _ in parts}) == len(parts) else None


def constant_factor(tensor: torch.Tensor, axis: int, name: str) -> Factor:
    """The coloring of one axis of a constant: positions with equal entries are equal."""
    size = tensor.shape[axis]
    rows = tensor.movedim(axis, 0).reshape(size, -1)
    if rows.shape[1] == 1:
        values = rows[:, 0].to(torch.float64).numpy()
        known = np.ones(size, dtype=bool)
        labels, scales = with_constants(np.zeros(size, np.int64), values, known, values)
        return Factor((axis,), labels, scales, ("constant", name))
    _, equal = torch.unique(rows, dim=0, return_inverse=True)
    labels = equal.numpy().astype(np.int64) + FIRST_FREE
    return Factor((axis,), labels, np.ones(size), ("constant", name))
