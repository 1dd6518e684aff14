"""Gated linear units: one half of an axis times the sigmoid of the other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from fxfib.coloring import (
    FIRST_FREE,
    Factor,
    Value,
    opened,
    unique_rows,
    with_constants,
)
from fxfib.passes.relations import Move, Same
from fxfib.passes.rules.base import (
    Rule,
    overloads,
    register,
)

if TYPE_CHECKING:
    from fxfib.passes.backward import Adjoint, Error
    from fxfib.passes.forward import Analysis


aten = torch.ops.aten


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

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """The halves written out: a product of one with the sigmoid of the other."""
        source, dim = node.args[0], adjoint.analysis.arguments(node)["dim"]
        assert isinstance(source, fx.Node)
        axis = int(dim) % len(adjoint.analysis.shape(source))
        half = adjoint.analysis.shape(node)[axis]
        start = len(adjoint.nodes)
        first = adjoint.call(aten.slice.Tensor, source, axis, 0, half)
        second = adjoint.call(aten.slice.Tensor, source, axis, half, 2 * half)
        gate = adjoint.call(aten.sigmoid.default, second)
        result = adjoint.call(aten.mul.Tensor, first, gate)
        yield from adjoint.through(node, error, result, start)

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.glu()
