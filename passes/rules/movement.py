"""Ops that only move elements: permute, view, reshape, expand, channel shuffle."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from fxfib.coloring import (
    Factor,
    Value,
)
from fxfib.passes.relations import Full, Move, Same
from fxfib.passes.rules.base import (
    Barrier,
    Rule,
    find_rule,
    overloads,
    register,
)
from fxfib.passes.rules.tracing import (
    Block,
    constant_factor,
    example_arguments,
    grid_factor,
    move_relations,
    moved_factor,
    trace_blocks,
)

if TYPE_CHECKING:
    from fxfib.passes.backward import Adjoint, Error
    from fxfib.passes.forward import Analysis
    from fxfib.passes.rewrite import Rewriter


aten = torch.ops.aten


class Movement(Rule):
    """An op that only moves elements of its first argument."""

    pointwise = True

    def move(self, analysis: Analysis, node: fx.Node, source: fx.Node) -> list[Block]:
        """Run the op on numbered elements and see where the colored axes went.

        Repeated blocks of a network ask the same again and again, so answers are remembered.
        """
        shape = analysis.shape(source)
        dynamic = {a for a in range(len(shape)) if analysis.dynamic(source, a)}
        groups = tuple(f.axes for f in analysis.color(source).factors)
        args, kwargs = example_arguments(node)
        key = (node.target, repr(args), repr(kwargs), shape, groups, frozenset(dynamic))
        if key not in analysis.traces:
            numbered = torch.arange(int(np.prod(shape)), dtype=torch.int64).reshape(shape)
            moved = node.target(numbered, *args, **kwargs)  # type: ignore[operator]
            try:
                analysis.traces[key] = trace_blocks(shape, moved.numpy(), groups, dynamic)
            except Barrier as stop:
                analysis.traces[key] = stop
        found = analysis.traces[key]
        if isinstance(found, Barrier):
            raise Barrier(found.reason, found.remedy)
        return found

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
            analysis.relate(*move_relations(node, source, block))
            factors.append(moved_factor(factor, outs, index, self.beside(analysis, node, ins)))
        return Value(analysis.shape(node), tuple(f for f in factors if f.axes))

    def beside(self, analysis: Analysis, node: fx.Node, axes: tuple[int, ...]) -> Hashable:
        """What the op does to all other axes: different answers where that may differ."""
        return (str(node.target), repr(node.args[1:]), repr(node.kwargs))

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """Every element's error goes back to where the element came from."""
        if adjoint.wants(node.args[0]):
            yield node.args[0], adjoint.moved_back(node, error, 0)  # type: ignore[misc]

    def expands(self, analysis: Analysis, node: fx.Node) -> bool:
        """Right behind a layer: its rows are fewer, and all that follows sees them expanded."""
        source = node.args[0]
        rule = find_rule(source) if isinstance(source, fx.Node) else None
        return rule is not None and any(True for _ in rule.produces(analysis, source))  # type: ignore[arg-type]

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

    targets = (
        *overloads(
            *(
                "permute",
                "transpose",
                "t",
                "squeeze",
                "unsqueeze",
                "movedim",
                "moveaxis",
                "swapaxes",
            ),
            *("numpy_T", "mT", "adjoint", "pixel_shuffle", "pixel_unshuffle"),
            *("flatten", "ravel", "swapdims"),
        ),
        aten.repeat_interleave.self_int,
    )

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        if node.target is not aten.repeat_interleave.self_int:
            yield from super().backward(adjoint, node, error)
            return
        bound = adjoint.analysis.arguments(node)
        source, times, dim = bound["self"], bound["repeats"], bound["dim"]
        if dim is None or not isinstance(times, int):
            raise Barrier("it repeats all elements, or a computed number of times")
        sizes = adjoint.sizes(source)
        axis = dim % len(sizes)
        split = adjoint.call(
            aten.view.default, error, [*sizes[: axis + 1], times, *sizes[axis + 1 :]]
        )
        yield source, adjoint.call(aten.sum.dim_IntList, split, [axis + 1])


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

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """Errors of the copies add."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        yield source, adjoint.sum_to(error, source)

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
