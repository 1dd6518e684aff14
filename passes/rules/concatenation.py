"""Concatenation and stacking: operands side by side, constants among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx

from fxfib.coloring import (
    FIRST_FREE,
    Factor,
    Value,
    constant_values,
    with_constants,
)
from fxfib.passes.relations import Full, Move, Ref, Refine, Same
from fxfib.passes.rules.base import (
    Rule,
    overloads,
    register,
)
from fxfib.passes.rules.elementwise import Operand, joint_colors
from fxfib.passes.rules.tracing import constant_factor

if TYPE_CHECKING:
    from fxfib.passes.backward import Adjoint, Error
    from fxfib.passes.forward import Analysis
    from fxfib.passes.rewrite import Rewriter


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

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """Every operand gets its own piece."""
        for place, operand in adjoint.operands(node):
            yield operand, adjoint.moved_back(node, error, place)

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        axis = self.axis(rewriter.analysis, node)
        constants = reduced_operands(rewriter, node, lambda own: None if own == axis else own)
        return rewriter.repeat(node, constants)

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.concatenation()


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

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """Every operand gets its own piece."""
        for place, operand in adjoint.operands(node):
            yield operand, adjoint.moved_back(node, error, place)

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        rank = len(rewriter.analysis.shape(node))
        new = int(rewriter.analysis.arguments(node)["dim"]) % rank
        return rewriter.repeat(
            node, reduced_operands(rewriter, node, lambda own: own + (own >= new))
        )
