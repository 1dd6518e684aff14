"""Ops that take, turn or repeat positions along one axis."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import fx

from fxfib.coloring import (
    Factor,
    Value,
)
from fxfib.passes.relations import Full, Move, Refine, Same
from fxfib.passes.rules.base import (
    Barrier,
    hint,
    overloads,
    register,
)
from fxfib.passes.rules.movement import Movement
from fxfib.passes.rules.taken import Taken
from fxfib.passes.rules.tracing import (
    constant_factor,
    move_relations,
    moved_factor,
    taken_factors,
)

if TYPE_CHECKING:
    from fxfib.passes.backward import Adjoint, Error
    from fxfib.passes.forward import Analysis
    from fxfib.passes.rewrite import Rewriter


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

    def beside(self, analysis: Analysis, node: fx.Node, axes: tuple[int, ...]) -> Hashable:
        """Nothing, where it touches no other axis."""
        inside = self.touched(analysis, node) <= set(axes)
        return () if inside else super().beside(analysis, node, axes)


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
        if analysis.is_constant(source):
            return self.of_constant(analysis, node, source)
        value = analysis.color(source)
        numbers = [t if isinstance(t, int) else hint(t.meta["val"]) for t in times]
        own = numbers[len(numbers) - rank :]
        factors = []
        for axis, factor in analysis.factors(source).items():
            out = axis + len(times) - rank
            index = np.tile(np.arange(value.shape[axis]), own[axis])
            if isinstance(times[out], int):
                block = ((axis,), (out,), index)
                analysis.relate(*move_relations(node, source, block))
                beside = self.beside(analysis, node, (axis,))
                factors.append(moved_factor(factor, (out,), index, beside))
            else:
                analysis.full(source, [axis], "it is repeated a dynamic number of times")
        return Value(analysis.shape(node), tuple(factors))

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """Errors of the copies add."""
        source, times = node.args[0], list(node.args[1])  # type: ignore[arg-type]
        assert isinstance(source, fx.Node)
        sizes = adjoint.sizes(source)
        times = [1] * (len(sizes) - len(times)) + times
        added = len(times) - len(sizes)
        shape: list[Any] = list(times[:added])
        for number, size in zip(times[added:], sizes, strict=True):
            shape += [number, size]
        split = adjoint.call(torch.ops.aten.view.default, error, shape)
        copies = [*range(added), *range(added, len(shape), 2)]
        yield source, adjoint.call(torch.ops.aten.sum.dim_IntList, split, copies)

    def of_constant(self, analysis: Analysis, node: fx.Node, source: fx.Node) -> Value:
        """A parameter for every example of a batch: axes that are not repeated have its colors."""
        factors = []
        for own, out in self.kept(analysis, node, source).items():
            factor = constant_factor(analysis.constant(source), own, source.name)
            analysis.relate(Same((node, out), (source, own)))
            factors.append(Factor((out,), factor.labels, factor.scales, factor.space))
        return Value(analysis.shape(node), tuple(factors))

    def kept(self, analysis: Analysis, node: fx.Node, source: fx.Node) -> dict[int, int]:
        """Axes that are not repeated, and where they are in the result."""
        shape, times = analysis.shape(source), list(node.args[1])  # type: ignore[arg-type]
        added = len(times) - len(shape)
        return {
            own: own + added for own, n in enumerate(shape) if n > 1 and times[own + added] == 1
        }

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if not rewriter.analysis.is_constant(source):
            return super().rewrite(rewriter, node)
        kept = self.kept(rewriter.analysis, node, source)
        axes = {own: rewriter.first(node, out) for own, out in kept.items()}
        return rewriter.repeat(node, {source: rewriter.constant(source, axes)})


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
            factors = tuple(
                replace(f, space=("sliced", node.name, f.space))
                for f in value.factors
                if axis not in f.axes
            )
            for factor in factors:
                analysis.relate(*(Same((node, a), (source, a)) for a in factor.axes))
            return Value(analysis.shape(node), factors)
        (axis,) = self.touched(analysis, node)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        _, _, step = self.bounds(analysis, node)
        if step != 1 and analysis.value(source).tracked(axis):
            return self.every(analysis, node, source, axis)
        return super().forward(analysis, node)

    def every(self, analysis: Analysis, node: fx.Node, source: fx.Node, axis: int) -> Value:
        """Every second node, or third: groups of neighbours merge as wholes, if at all."""
        start, stop, step = self.bounds(analysis, node)
        size = analysis.shape(source)[axis]
        factors = []
        for own, factor in analysis.factors(source).items():
            if own != axis:
                analysis.relate(Same((node, own), (source, own)))
                factors.append(replace(factor, space=("sliced", node.name, factor.space)))
                continue
            factors.append(moved_factor(factor, (own,), np.arange(start, stop, step)))
            if size % step or start >= step or stop <= size - step + start:
                analysis.full(source, [axis], "it is sliced with a step")
                analysis.relate(Full((node, axis), "it is a slice with a step"))
                continue
            groups = analysis.inner(node, "groups", size // step)
            within = analysis.inner(node, "within", step)
            analysis.relate(
                Move(((source, axis),), ((groups, within),), np.arange(size)),
                Full(within, "it is sliced with a step"),
                Same((node, axis), groups),
            )
        return Value(analysis.shape(node), tuple(factors))

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
        start, _, step = self.bounds(rewriter.analysis, node)
        if step != 1:
            return {"start": start, "end": layout.size}
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
        for own in value.tracked_axes:
            if own != axis:
                analysis.relate(Same((node, own - (own > axis)), (source, own)))
        index = analysis.arguments(node)["index"]
        if isinstance(index, fx.Node):  # computed
            factors = [
                replace(
                    f, axes=tuple(a - (a > axis) for a in f.axes), space=("at", node.name, f.space)
                )
                for f in value.factors
                if axis not in f.axes
            ]
            return Value(analysis.shape(node), tuple(factors))
        position = index % value.shape[axis]
        return Value(analysis.shape(node), tuple(taken_factors(value, axis, position, 1)))

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, Any]]:
        """Zero but for the position."""
        analysis, source = adjoint.analysis, node.args[0]
        assert isinstance(source, fx.Node)
        (axis,) = self.touched(analysis, node)
        index = analysis.arguments(node)["index"]
        if isinstance(index, fx.Node) or analysis.dynamic(source, axis):
            yield from super().backward(adjoint, node, error)
        elif adjoint.wants(source):
            yield source, Taken(axis, index % analysis.shape(source)[axis], error)


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
                factors.append(replace(factor, space=("indexed", node.name, factor.space)))
            elif known:
                positions = analysis.constant(index).numpy() % value.shape[axis]
                analysis.relate(Move(((node, own),), (((source, own),),), positions))
                factors.append(moved_factor(factor, (own,), positions))
        analysis.full(index, None, "it is an index")
        return Value(analysis.shape(node), tuple(factors))

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        if not adjoint.analysis.is_constant(node.args[2]):  # type: ignore[arg-type]
            raise Barrier("it is indexed by a computed index")
        yield from super().backward(adjoint, node, error)

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
