"""Ops with several outputs: split, chunk, unbind, and taking one of them."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from fxfib.coloring import Value
from fxfib.passes.relations import Move, Refine, Same
from fxfib.passes.rules.base import (
    Rule,
    find_rule,
    is_tensor,
    overloads,
    register,
)
from fxfib.passes.rules.slicing import AlongAxis
from fxfib.passes.rules.taken import Taken
from fxfib.passes.rules.tracing import taken_factors

if TYPE_CHECKING:
    from fxfib.passes.backward import Adjoint, Error
    from fxfib.passes.forward import Analysis
    from fxfib.passes.rewrite import Rewriter


aten = torch.ops.aten


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
        value = analysis.color(source)
        if not value.tracked(axis) and min(lengths) < 0:
            # Where the part lies is not known, only which one it is.
            factors = [replace(f, space=("part", out.name, f.space)) for f in value.factors]
            analysis.relate(*(Same((out, own), (source, own)) for own in value.tracked_axes))
            return Value(analysis.shape(out), tuple(factors))
        start = sum(lengths[:number])
        positions = range(start, start + lengths[number])
        for own in value.tracked_axes:
            if own == axis:
                index = np.arange(positions.start, positions.stop)
                analysis.relate(Move(((out, own),), (((source, own),),), index))
            else:
                analysis.relate(Same((out, own), (source, own)))
        return Value(analysis.shape(out), tuple(taken_factors(value, axis, positions, 0)))

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """Every part's errors go back to its slice."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        for number, part in error.items():
            yield source, adjoint.moved_back(node, {number: part}, 0)

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
        value = analysis.color(source)
        for own in value.tracked_axes:
            if own != axis:
                analysis.relate(Same((out, own - (own > axis)), (source, own)))
        return Value(analysis.shape(out), tuple(taken_factors(value, axis, number, 1)))

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, Any]]:
        """Every part's errors go back to its position."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        axis = self.axis(adjoint.analysis, node)
        for number, own in error.items():
            yield source, Taken(axis, number, own)

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
