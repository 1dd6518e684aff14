"""Movement ops need no arithmetic: number the elements, run the real op, read off where they went."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import fx

from fxfib.coloring import (
    FIRST_FREE,
    Factor,
    Labels,
    Value,
    constant_values,
    opened,
    renumbered,
    unique_rows,
    with_constants,
)
from fxfib.passes.relations import Full, Move, Ref, Refine, Same
from fxfib.passes.rules.base import (
    Barrier,
    Rule,
    find_rule,
    hint,
    is_tensor,
    overloads,
    register,
)
from fxfib.passes.rules.elementwise import Operand, joint_colors

if TYPE_CHECKING:
    from fxfib.passes.forward import Analysis
    from fxfib.passes.rewrite import Rewriter

aten = torch.ops.aten

Block = tuple[tuple[int, ...], tuple[int, ...], Labels]  # input axes, output axes, index


def example_arguments(
    node: fx.Node, source: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments with its first one replaced and sizes at the example's values."""

    def plain(argument: fx.Node) -> Any:
        value = argument.meta["val"]
        if isinstance(value, torch.Tensor):
            raise Barrier("an argument of it is computed")
        return hint(value)

    args, kwargs = fx.map_arg((node.args[1:], node.kwargs), plain)
    return (source, *args), kwargs


def strides_of(shape: tuple[int, ...]) -> list[int]:
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


def moved_factor(factor: Factor, out_axes: tuple[int, ...], index: Labels) -> Factor:
    """The coloring of the output of a movement."""
    labels = factor.labels.reshape(-1)[index]
    scales = factor.scales.reshape(-1)[index]
    return Factor(out_axes, labels, scales, ("moved", factor.space))


def move_relation(node: fx.Node, source: fx.Node, block: Block) -> Move | Same:
    """The layouts of the two sides of a movement; ``Same`` where an axis moves as a whole."""
    ins, outs, index = block
    whole = len(ins) == len(outs) == 1 and source.meta["val"].shape[ins[0]] == len(index)
    if whole and np.array_equal(index, np.arange(len(index))):
        return Same((node, outs[0]), (source, ins[0]))
    return Move(tuple((node, a) for a in outs), (tuple((source, a) for a in ins),), index)


class Movement(Rule):
    """An op that only moves elements of its first argument."""

    pointwise = True

    def move(self, analysis: Analysis, node: fx.Node, source: fx.Node) -> list[Block]:
        """Run the op on numbered elements and see where the colored axes went."""
        shape = analysis.shape(source)
        numbered = torch.arange(int(np.prod(shape)), dtype=torch.int64).reshape(shape)
        args, kwargs = example_arguments(node, numbered)
        moved = node.target(*args, **kwargs)  # type: ignore[operator]
        dynamic = {a for a in range(len(shape)) if analysis.dynamic(source, a)}
        value = analysis.color(source)
        return trace_blocks(shape, moved.numpy(), [f.axes for f in value.factors], dynamic)

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        value = analysis.color(source)
        if not value.factors:
            return Value(analysis.shape(node))
        factors = []
        for block in self.move(analysis, node, source):
            ins, outs, index = block
            factor = grid_factor(value, ins)
            assert factor is not None
            analysis.relate(move_relation(node, source, block))
            factors.append(moved_factor(factor, outs, index))
        return Value(analysis.shape(node), tuple(f for f in factors if f.axes))

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        return rewriter.repeat(node, changed=self.sizes(rewriter, node))

    def sizes(self, rewriter: Rewriter, node: fx.Node) -> dict[str, Any]:
        """Literal sizes among the arguments, recomputed for the smaller operands."""
        return {}

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.movement()


@register
class Rearrange(Movement):
    """Permute, transpose, squeeze, shuffle: no sizes among the arguments."""

    targets = overloads(
        *("permute", "transpose", "t", "squeeze", "unsqueeze", "movedim", "moveaxis", "swapaxes"),
        *("numpy_T", "mT", "adjoint", "pixel_shuffle", "pixel_unshuffle"),
        *("flatten", "ravel", "swapdims"),
    ) + (aten.repeat_interleave.self_int,)


@register
class ChannelShuffle(Movement):
    """Groups and the channels in them are exchanged: both layouts must be products."""

    targets = overloads("channel_shuffle")

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        source, groups = node.args
        assert isinstance(source, fx.Node) and isinstance(groups, int)
        if analysis.value(source).tracked(1):
            size = analysis.shape(source)[1]
            group = analysis.inner(node, "groups", groups)
            inside = analysis.inner(node, "inside", size // groups)
            analysis.relate(
                Move(((source, 1),), ((group, inside),), np.arange(size)),
                Move(((node, 1),), ((inside, group),), np.arange(size)),
                Full(group, "the number of groups of a channel shuffle stays"),
            )
        return super().forward(analysis, node)


@register
class Reshape(Movement):
    """View and its kin: the literal sizes are those of the new output."""

    targets = overloads("view", "reshape", "_unsafe_view", "view_copy", "_reshape_alias")

    def sizes(self, rewriter: Rewriter, node: fx.Node) -> dict[str, Any]:
        name = "shape" if "shape" in rewriter.analysis.arguments(node) else "size"
        sizes = list(rewriter.analysis.arguments(node)[name])
        for axis, size in enumerate(sizes):
            if isinstance(size, int) and size != -1:
                sizes[axis] = rewriter.size(node, axis)
        return {name: sizes}


@register
class Unflatten(Movement):
    """One axis split into several."""

    targets = overloads("unflatten")

    def sizes(self, rewriter: Rewriter, node: fx.Node) -> dict[str, Any]:
        bound = rewriter.analysis.arguments(node)
        rank = len(rewriter.analysis.shape(node.args[0]))  # type: ignore[arg-type]
        start = bound["dim"] % rank
        sizes = [
            rewriter.size(node, start + place) if isinstance(size, int) and size != -1 else size
            for place, size in enumerate(bound["sizes"])
        ]
        return {"sizes": sizes}


@register
class Expand(Movement):
    """Broadcasting by hand; also of a constant to a dynamic size (a class token)."""

    targets = overloads("expand", "broadcast_to")

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if not analysis.is_constant(source):
            return super().forward(analysis, node)
        tensor = analysis.constant(source)
        added = len(analysis.shape(node)) - tensor.ndim
        factors = []
        for own, size in enumerate(tensor.shape):
            if size > 1:
                factor = constant_factor(tensor, own, source.name)
                axis = own + added
                analysis.relate(Same((node, axis), (source, own)))
                factors.append(Factor((axis,), factor.labels, factor.scales, factor.space))
        return Value(analysis.shape(node), tuple(factors))

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        constants = {}
        if rewriter.analysis.is_constant(source):
            shape = rewriter.analysis.shape(source)
            added = len(rewriter.analysis.shape(node)) - len(shape)
            axes = {own: rewriter.first(node, own + added) for own, n in enumerate(shape) if n > 1}
            constants[source] = rewriter.constant(source, axes)
        return rewriter.repeat(node, constants, self.sizes(rewriter, node))

    def sizes(self, rewriter: Rewriter, node: fx.Node) -> dict[str, Any]:
        sizes = list(rewriter.analysis.arguments(node)["size"])
        for axis, size in enumerate(sizes):
            if isinstance(size, int) and size != -1:
                sizes[axis] = rewriter.size(node, axis)
        return {"size": sizes}


class AlongAxis(Movement):
    """Ops with a dimension argument: safe to repeat only where that axis has its full layout."""

    axis_names: ClassVar[tuple[str, ...]] = ("dim",)

    def touched(self, analysis: Analysis, node: fx.Node) -> set[int]:
        rank = len(analysis.shape(node.args[0]))  # type: ignore[arg-type]
        found: set[int] = set()
        for name in self.axis_names:
            dims = analysis.arguments(node)[name]
            found |= {d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
        return found


@register
class Flip(AlongAxis):
    """Reversal: a channel axis keeps its full width."""

    targets = overloads("flip")
    axis_names = ("dims",)

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        analysis.full(source, self.touched(analysis, node), "it is reversed along this axis")
        return super().forward(analysis, node)


@register
class Repeat(Movement):
    """Tiling: copies of a node are different slots of one color."""

    targets = overloads("repeat", "tile")

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        times = list(node.args[1])  # type: ignore[arg-type]
        rank = len(analysis.shape(source))
        value = analysis.color(source)
        numbers = [t if isinstance(t, int) else hint(t.meta["val"]) for t in times]
        own = numbers[len(numbers) - rank :]
        factors = []
        for axis, factor in analysis.factors(source).items():
            out = axis + len(times) - rank
            index = np.tile(np.arange(value.shape[axis]), own[axis])
            if isinstance(times[out], int):
                block = ((axis,), (out,), index)
                analysis.relate(move_relation(node, source, block))
                factors.append(moved_factor(factor, (out,), index))
            else:
                analysis.full(source, [axis], "it is repeated a dynamic number of times")
        return Value(analysis.shape(node), tuple(factors))


@register
class Slice(AlongAxis):
    """``x[..., a:b:s]``: no class reaches across a boundary."""

    targets = overloads("slice", "narrow")

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        if any(isinstance(a, fx.Node) for a in node.args[2:]):
            (axis,) = self.touched(analysis, node)
            source = node.args[0]
            assert isinstance(source, fx.Node)
            analysis.full(source, [axis], "it is sliced at a computed position")
            value = analysis.color(source)
            factors = tuple(f for f in value.factors if axis not in f.axes)
            for factor in factors:
                analysis.relate(*(Same((node, a), (source, a)) for a in factor.axes))
            return Value(analysis.shape(node), factors)
        result = super().forward(analysis, node)
        (axis,) = self.touched(analysis, node)
        start, _, step = self.bounds(analysis, node)
        if step != 1:
            analysis.full(node.args[0], [axis], "it is sliced with a step")  # type: ignore[arg-type]
        return result

    def bounds(self, analysis: Analysis, node: fx.Node) -> tuple[int, int, int]:
        bound = analysis.arguments(node)
        (axis,) = self.touched(analysis, node)
        size = analysis.shape(node.args[0])[axis]  # type: ignore[arg-type]
        start = bound["start"] or 0
        if "length" in bound:
            start = start + size if start < 0 else start
            return start, start + bound["length"], 1
        stop = size if bound["end"] is None else bound["end"]
        return slice(start, stop, bound["step"]).indices(size)

    def sizes(self, rewriter: Rewriter, node: fx.Node) -> dict[str, Any]:
        if any(isinstance(a, fx.Node) for a in node.args[2:]):
            return {}
        (axis,) = self.touched(rewriter.analysis, node)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        layout = rewriter.layout(source, axis)
        if layout.identity:
            return {}
        start, _, _ = self.bounds(rewriter.analysis, node)
        begin = layout.before(start)
        if "length" in rewriter.analysis.arguments(node):
            return {"start": begin, "length": rewriter.size(node, axis)}
        return {"start": begin, "end": begin + rewriter.size(node, axis)}


@register
class Select(AlongAxis):
    """``x[..., i, ...]``: the axis disappears."""

    targets = overloads("select")

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        (axis,) = self.touched(analysis, node)
        analysis.full(source, [axis], "one position of this axis is selected")
        value = analysis.color(source)
        factors = []
        for own, factor in analysis.factors(source).items():
            if own != axis:
                out = own - (own > axis)
                analysis.relate(Same((node, out), (source, own)))
                joint = value.factor(own)
                assert joint is not None
                if axis in joint.axes:
                    analysis.relate(Refine((source, own), factor.labels))
                factors.append(Factor((out,), factor.labels, factor.scales, factor.space))
        return Value(analysis.shape(node), tuple(factors))


@register
class Roll(AlongAxis):
    """Cyclic shift: no class reaches across the cut."""

    targets = overloads("roll")
    axis_names = ("dims",)

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        bound = analysis.arguments(node)
        source = bound["self"]
        if not bound["dims"]:
            analysis.full(source, None, "it is rolled over all elements")
            return Value(analysis.shape(node))
        for axis, cut in self.cuts(analysis, node).items():
            if analysis.value(source).tracked(axis):
                size = analysis.shape(source)[axis]
                analysis.relate(Refine((source, axis), (np.arange(size) >= cut).astype(np.int64)))
        return super().forward(analysis, node)

    def cuts(self, analysis: Analysis, node: fx.Node) -> dict[int, int]:
        bound = analysis.arguments(node)
        shape = analysis.shape(bound["self"])
        return {
            d % len(shape): (-s) % shape[d]
            for s, d in zip(bound["shifts"], bound["dims"], strict=True)
        }

    def sizes(self, rewriter: Rewriter, node: fx.Node) -> dict[str, Any]:
        bound = rewriter.analysis.arguments(node)
        source = bound["self"]
        if not bound["dims"]:
            return {}
        shifts = list(bound["shifts"])
        cuts = self.cuts(rewriter.analysis, node)
        rank = len(rewriter.analysis.shape(source))
        for place, dim in enumerate(bound["dims"]):
            layout = rewriter.layout(source, dim % rank)
            if not layout.identity:
                shifts[place] = -layout.before(cuts[dim % rank])
        return {"shifts": shifts}


@register
class IndexSelect(Movement):
    """Selection of channels by a constant index: the index is rewritten."""

    targets = overloads("index_select")

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        source, dim, index = node.args
        assert isinstance(source, fx.Node) and isinstance(index, fx.Node) and isinstance(dim, int)
        value = analysis.color(source)
        axis = dim % max(value.ndim, 1)
        known = analysis.is_constant(index)
        if not known:
            analysis.full(source, [axis], "it is indexed by a computed index")
        factors = []
        for own, factor in analysis.factors(source).items():
            if own != axis:
                analysis.relate(Same((node, own), (source, own)))
                factors.append(factor)
            elif known:
                positions = analysis.constant(index).numpy() % value.shape[axis]
                analysis.relate(Move(((node, own),), (((source, own),),), positions))
                factors.append(moved_factor(factor, (own,), positions))
        analysis.full(index, None, "it is an index")
        return Value(analysis.shape(node), tuple(factors))

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        source, dim, index = node.args
        assert isinstance(source, fx.Node) and isinstance(index, fx.Node) and isinstance(dim, int)
        axis = dim % len(rewriter.analysis.shape(source))
        before, after = rewriter.layout(source, axis), rewriter.layout(node, axis)
        if before.identity and after.identity:
            return rewriter.repeat(node)
        positions = rewriter.analysis.constant(index)[torch.from_numpy(after.representative)]
        renumbered = before.slot[positions.numpy() % before.full]
        new = rewriter.new_constant(
            index, torch.from_numpy(renumbered), "slots", dtype=index.meta["val"].dtype
        )
        return rewriter.repeat(node, constants={index: new})


class Parts(AlongAxis):
    """Ops that return several slices of one axis."""

    def lengths(self, analysis: Analysis, node: fx.Node) -> list[int]:
        axis = self.axis(analysis, node)
        return [
            int(v.shape[axis]) if isinstance(v.shape[axis], int) else -1 for v in node.meta["val"]
        ]

    def axis(self, analysis: Analysis, node: fx.Node) -> int:
        (axis,) = self.touched(analysis, node)
        return axis

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        axis = self.axis(analysis, node)
        analysis.color(source)
        lengths = self.lengths(analysis, node)
        if analysis.value(source).tracked(axis):
            analysis.relate(Refine((source, axis), np.repeat(np.arange(len(lengths)), lengths)))
            starts = np.cumsum([0, *lengths[:-1]])
            analysis.relate(
                *(
                    Move(
                        (analysis.inner(node, f"part {k}", length),),
                        (((source, axis),),),
                        np.arange(start, start + length),
                    )
                    for k, (start, length) in enumerate(zip(starts, lengths, strict=True))
                )
            )
        return Value((), parts=tuple(Value(()) for _ in lengths))

    def part(self, analysis: Analysis, node: fx.Node, number: int, out: fx.Node) -> Value:
        """The value of one part, for the getitem that takes it."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        axis = self.axis(analysis, node)
        lengths = self.lengths(analysis, node)
        start = int(sum(lengths[:number])) if analysis.value(source).tracked(axis) else 0
        factors = []
        for own, factor in analysis.factors(source).items():
            if own == axis:
                index = np.arange(start, start + lengths[number])
                analysis.relate(Move(((out, own),), (((source, own),),), index))
                factors.append(moved_factor(factor, (own,), index))
            else:
                analysis.relate(Same((out, own), (source, own)))
                factors.append(factor)
        return Value(analysis.shape(out), tuple(factors))

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        axis = self.axis(rewriter.analysis, node)
        if rewriter.layout(source, axis).identity:
            return rewriter.repeat(node)
        sizes = [
            rewriter.layout(node, f"part {k}").size
            for k in range(len(self.lengths(rewriter.analysis, node)))
        ]
        return rewriter.call(aten.split_with_sizes.default, (rewriter.new(source), sizes, axis))


@register
class Split(Parts):
    """Split, chunk: consecutive slices."""

    targets = overloads("split", "split_with_sizes", "chunk", "tensor_split")


@register
class Unbind(Parts):
    """Every position of an axis by itself: the axis keeps its full width and disappears."""

    targets = overloads("unbind")

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        analysis.color(source)  # its rows may be gone when the parts are visited
        analysis.full(source, [self.axis(analysis, node)], "it is taken apart along this axis")
        return Value((), parts=tuple(Value(()) for _ in node.meta["val"]))

    def part(self, analysis: Analysis, node: fx.Node, number: int, out: fx.Node) -> Value:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        axis = self.axis(analysis, node)
        factors = []
        for own, factor in analysis.factors(source).items():
            if own != axis:
                place = own - (own > axis)
                analysis.relate(Same((out, place), (source, own)))
                factors.append(Factor((place,), factor.labels, factor.scales, factor.space))
        return Value(analysis.shape(out), tuple(factors))

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        return rewriter.repeat(node)


@register
class GetItem(Rule):
    """One output of an op with several."""

    targets = (operator.getitem,)
    pointwise = True

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        source, number = node.args
        assert isinstance(source, fx.Node)
        rule = find_rule(source)
        if not is_tensor(node):
            return Value(())
        if analysis.value(source).parts is not None:
            return rule.part(analysis, source, int(number), node)  # type: ignore[union-attr,arg-type]
        return Value(analysis.shape(node))


@register
class Concatenate(Rule):
    """Concatenation; along another axis the operands are colored jointly."""

    targets = overloads("cat", "concat", "concatenate")
    pointwise = True

    def axis(self, analysis: Analysis, node: fx.Node) -> int:
        return int(analysis.arguments(node)["dim"]) % len(analysis.shape(node))

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        operands = list(node.args[0])  # type: ignore[arg-type]
        axis = self.axis(analysis, node)
        shape = analysis.shape(node)
        factors = []
        for own in range(len(shape)):
            factor = (
                self.joined(analysis, node, operands, own)
                if own == axis
                else beside(analysis, node, operands, own, own)
            )
            if factor is not None:
                factors.append(factor)
        return Value(shape, tuple(factors))

    def joined(
        self, analysis: Analysis, node: fx.Node, operands: list[fx.Node], axis: int
    ) -> Factor | None:
        """Colors along the axis of concatenation: those of equal space are comparable."""
        found = [None if analysis.is_constant(o) else analysis.factor(o, axis) for o in operands]
        if all(f is None for f in found) or analysis.dynamic(node, axis):
            for operand in operands:
                analysis.full(operand, [axis], "it is concatenated with what is not colored")
            return None
        offsets: dict[Any, int] = {}
        widths: dict[Any, int] = {}
        for factor in found:
            if factor is not None:
                most = int(factor.labels.max(initial=FIRST_FREE)) + 1
                widths[factor.space] = max(most, widths.get(factor.space, 0))
        labels, scales, start = [], [], FIRST_FREE
        for operand, factor in zip(operands, found, strict=True):
            size = analysis.shape(operand)[axis]
            if factor is None:
                analysis.full(operand, [axis], "it is concatenated uncolored")
                labels.append(np.arange(size) + start)
                scales.append(np.ones(size))
                start += size
                continue
            if factor.space not in offsets:
                offsets[factor.space] = start - FIRST_FREE
                start += widths[factor.space]
            moved = np.where(factor.constant, factor.labels, factor.labels + offsets[factor.space])
            labels.append(moved)
            scales.append(factor.scales)
        total = sum(len(piece) for piece in labels)
        analysis.relate(
            Move(((node, axis),), tuple(((o, axis),) for o in operands), np.arange(total))
        )
        # Slots keep the order of the operands, so no class may reach across them.
        analysis.relate(
            Refine((node, axis), np.repeat(np.arange(len(labels)), [len(x) for x in labels]))
        )
        space = ("cat", node.name)
        return Factor((axis,), np.concatenate(labels), np.concatenate(scales), space)

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        axis = self.axis(rewriter.analysis, node)
        constants = reduced_operands(rewriter, node, lambda own: None if own == axis else own)
        return rewriter.repeat(node, constants)

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.concatenation()


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


def reduced_operands(
    rewriter: Rewriter, node: fx.Node, output_axis: Callable[[int], int | None]
) -> dict[fx.Node, fx.Node]:
    """Constant operands in the layout of the output; ``output_axis`` tells where an axis goes."""
    reduced = {}
    for operand in node.args[0]:  # type: ignore[union-attr]
        assert isinstance(operand, fx.Node)
        if rewriter.analysis.is_constant(operand):
            axes = {}
            for own, size in enumerate(rewriter.analysis.shape(operand)):
                out = output_axis(own)
                if size > 1 and out is not None:
                    axes[own] = rewriter.first(node, out)
            reduced[operand] = rewriter.constant(operand, axes)
    return reduced


def beside(
    analysis: Analysis, node: fx.Node, operands: list[fx.Node], own: int, out: int
) -> Factor | None:
    """Operands laid side by side along another axis: their layouts on this one must agree."""
    shape = analysis.shape(operands[0])
    if shape[own] <= 1:
        return None
    refs: list[Ref] = [(o, own) for o in operands]
    found = [
        constant_factor(analysis.constant(o), own, o.name)
        if analysis.is_constant(o)
        else analysis.factor(o, own)
        for o in operands
    ]
    if any(f is None for f in found) or all(analysis.is_constant(o) for o in operands):
        for (operand, axis), factor in zip(refs, found, strict=True):
            if factor is not None:
                analysis.relate(
                    Full((operand, axis), "it is laid beside a value whose nodes all differ")
                )
        return None
    analysis.relate(*(Same((node, out), ref) for ref in refs))
    seen = [Operand(f.labels, f.scales, f.constant, constant_values(f)) for f in found if f]
    base = seen[0]
    same = np.logical_and.reduce(
        [base.constant & o.constant & (o.values == base.values) for o in seen]
    )
    labels, scales = joint_colors(seen)
    labels, scales = with_constants(labels, scales, same, base.values)
    return Factor((out,), labels, scales, ("beside", node.name, out))


@register
class Stack(Rule):
    """Values laid side by side along a new axis."""

    targets = overloads("stack")
    pointwise = True

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        operands = list(node.args[0])  # type: ignore[arg-type]
        shape = analysis.shape(node)
        new = int(analysis.arguments(node)["dim"]) % len(shape)
        factors = []
        for own in range(len(shape) - 1):
            factor = beside(analysis, node, operands, own, own + (own >= new))
            if factor is not None:
                factors.append(factor)
        return Value(shape, tuple(factors))

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        rank = len(rewriter.analysis.shape(node))
        new = int(rewriter.analysis.arguments(node)["dim"]) % rank
        return rewriter.repeat(
            node, reduced_operands(rewriter, node, lambda own: own + (own >= new))
        )


@register
class ConstantPad(Rule):
    """Padding by a constant; along the channels it appends constant nodes."""

    targets = overloads("constant_pad_nd", "pad")
    pointwise = True

    def pads(self, analysis: Analysis, node: fx.Node) -> dict[int, tuple[int, int]]:
        pad = analysis.arguments(node)["pad"]
        if any(isinstance(p, fx.Node) for p in pad):
            raise Barrier("its padding is computed")
        rank = len(analysis.shape(node))
        return {
            rank - 1 - k: (pad[2 * k], pad[2 * k + 1])
            for k in range(len(pad) // 2)
            if pad[2 * k] or pad[2 * k + 1]
        }

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        bound = analysis.arguments(node)
        source, pads = bound["self"], self.pads(analysis, node)
        mode = bound.get("mode", "constant")
        number = float(bound["value"] or 0.0)
        if mode != "constant":
            number = float("nan")
        factors = []
        factors_in = analysis.factors(source)
        for axis, factor in factors_in.items():
            others = [a for a in pads if a != axis]
            if others:
                # Constants are constant no longer; scales survive only a padding of zeros.
                keeps = mode != "constant"
                factor = opened(
                    factor,
                    scales=keeps or number == 0.0,
                    constants=keeps,
                    space=("padded", node.name, factor.space),
                )
                zeros = factors_in[axis].labels == 1
                if number == 0.0:
                    factor = Factor(
                        factor.axes,
                        np.where(zeros, 1, factor.labels),
                        np.where(zeros, 1.0, factor.scales),
                        factor.space,
                    )
            if axis in pads:
                if mode != "constant" or min(pads[axis]) < 0:
                    raise Barrier("it pads the channels by other channels, or crops them")
                before, after = pads[axis]
                size = len(factor.labels)
                index = np.concatenate(
                    [np.full(before, -1), np.arange(size), np.full(after, -1)]
                ).astype(np.int64)
                labels, scales = with_constants(
                    np.r_[factor.labels, 0][index],
                    np.r_[factor.scales, 1.0][index],
                    (index < 0) if not others else np.zeros(len(index), dtype=bool),
                    np.full(len(index), number),
                )
                if others:
                    fresh = np.max(factor.labels, initial=1) + 1
                    labels = np.where(index < 0, 1 if number == 0.0 else fresh, labels)
                side = np.repeat([0, 1, 2], [before, size, after])
                analysis.relate(
                    Move(((node, axis),), (((source, axis),),), index), Refine((node, axis), side)
                )
                factors.append(Factor((axis,), labels, scales, ("pad", node.name, axis)))
            else:
                analysis.relate(Same((node, axis), (source, axis)))
                factors.append(factor)
        return Value(analysis.shape(node), tuple(factors))

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        bound = rewriter.analysis.arguments(node)
        source, pad = bound["self"], list(bound["pad"])
        rank = len(rewriter.analysis.shape(node))
        for axis, (before, _) in self.pads(rewriter.analysis, node).items():
            layout = rewriter.layout(node, axis)
            if layout.identity and rewriter.layout(source, axis).identity:
                continue
            first = layout.before(before)
            total = layout.size - first - rewriter.size(source, axis)
            pad[2 * (rank - 1 - axis)] = first
            pad[2 * (rank - 1 - axis) + 1] = total
        return rewriter.repeat(node, changed={"pad": pad})

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.padding()


@register
class GatedLinearUnit(Rule):
    """``a * sigmoid(b)`` of the two halves of an axis."""

    targets = overloads("glu")
    pointwise = True

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        axis = int(analysis.arguments(node)["dim"]) % len(analysis.shape(source))
        half = analysis.shape(node)[axis]
        factors = []
        for own, factor in analysis.factors(source).items():
            if own != axis:
                analysis.relate(Same((node, own), (source, own)))
                factors.append(
                    opened(factor, scales=False, constants=False, space=("glu", node.name, own))
                )
                continue
            # The second half passes through a sigmoid: its scale counts, the first half's passes.
            gate = factor.keyed()[half:]
            constant = factor.constant[:half]
            scales = np.where(constant, 1.0, factor.scales[:half])
            labels = unique_rows(
                factor.labels[:half], np.where(constant, factor.scales[:half], 1.0), gate
            )
            zero = factor.labels[:half] == 1
            labels, scales = with_constants(labels + FIRST_FREE, scales, zero, np.zeros(half))
            analysis.relate(
                Move(((node, axis),), (((source, axis),),), np.arange(half)),
                Move(((node, axis),), (((source, axis),),), np.arange(half, 2 * half)),
            )
            factors.append(Factor((axis,), labels, scales, ("glu", node.name)))
        return Value(analysis.shape(node), tuple(factors))

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.glu()
