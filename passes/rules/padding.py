"""Padding: new positions hold a constant or copies of others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from fxfib.coloring import (
    Factor,
    Value,
    opened,
    with_constants,
)
from fxfib.passes.relations import Move, Refine, Same
from fxfib.passes.rules.base import (
    Barrier,
    Rule,
    overloads,
    register,
)

if TYPE_CHECKING:
    from fxfib.passes.backward import Adjoint, Error
    from fxfib.passes.forward import Analysis
    from fxfib.passes.rewrite import Rewriter


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

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """What was padded is cut off again."""
        bound = adjoint.analysis.arguments(node)
        pad = list(bound["pad"])
        if bound.get("mode", "constant") != "constant":
            mixed = tuple(self.pads(adjoint.analysis, node))
            yield bound["self"], adjoint.derivative(node, error, 0, mixed=mixed)
            return

        def trace(x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(x, pad, value=-1)

        yield bound["self"], adjoint.moved_back(node, error, 0, trace)

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
