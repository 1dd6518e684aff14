"""Activations with parameters of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from fxfib.coloring import FIRST_FREE, Factor, Value, constant_values, unique_rows, with_constants
from fxfib.passes.relations import Same
from fxfib.passes.rules.base import Barrier, Flavor, Rule, overloads, register

if TYPE_CHECKING:
    from fxfib.passes.backward import Adjoint, Error
    from fxfib.passes.forward import Analysis
    from fxfib.passes.rewrite import Rewriter


@register
class PReLU(Rule):
    """``max(x, 0) + a min(x, 0)``, one slope a channel (axis 1) or one for all."""

    targets = overloads("prelu", "_prelu_kernel")
    pointwise = True

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        source, slope = node.args
        assert isinstance(source, fx.Node) and isinstance(slope, fx.Node)
        if not analysis.is_constant(slope) or str(node.target) != "aten.prelu.default":
            raise Barrier("its slopes are computed")
        slopes = analysis.constant(slope).to(torch.float64).numpy().reshape(-1)
        factors = []
        for axis, factor in analysis.factors(source).items():
            analysis.relate(Same((node, axis), (source, axis)))
            own = np.broadcast_to(slopes if axis == 1 else slopes[:1], factor.labels.shape)
            if axis != 1 and len(slopes) > 1:
                own = np.zeros(factor.labels.shape)
            elif len(slopes) > 1:
                analysis.relate(Same((node, axis), (slope, 0)))
            constant = factor.constant
            labels = unique_rows(factor.labels, np.where(constant, factor.scales, own))
            values = constant_values(factor)
            if len(slopes) > 1 and axis != 1:
                # A constant row meets the slope of every channel: it is constant no longer.
                scales = np.where(constant, 1.0, factor.scales)
                factors.append(
                    Factor((axis,), labels + FIRST_FREE, scales, ("prelu", node.name, axis))
                )
                continue
            values = np.where(values > 0, values, own * values)
            labels, scales = with_constants(labels + FIRST_FREE, factor.scales, constant, values)
            factors.append(Factor((axis,), labels, scales, ("prelu", node.name, axis)))
        return Value(analysis.shape(node), tuple(factors))

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """The slope depends on the sign, and on the parameter of the channel."""
        source, slope = node.args
        assert isinstance(source, fx.Node) and isinstance(slope, fx.Node)
        if not adjoint.analysis.is_constant(slope) or str(node.target) != "aten.prelu.default":
            raise Barrier("its slopes are computed")
        shape = [-1, *[1] * (len(adjoint.analysis.shape(source)) - 2)]
        view = slope
        if len(adjoint.analysis.shape(source)) > 1:
            view = adjoint.call(torch.ops.aten.view.default, slope, shape)
        yield source, adjoint.of(
            lambda x, slopes: torch.nn.functional.prelu(x, slopes.reshape(-1)),
            error, 0, source, view, name=str(node.target),
            flavors=(Flavor(0, direction=True), Flavor(1)),
        )  # fmt: skip

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        slope = node.args[1]
        assert isinstance(slope, fx.Node)
        if rewriter.analysis.shape(slope) in ((), (1,)):
            return rewriter.repeat(node)
        reduced = rewriter.constant(slope, {0: rewriter.first(node, 1)})
        return rewriter.repeat(node, constants={slope: reduced})

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.prelu()
