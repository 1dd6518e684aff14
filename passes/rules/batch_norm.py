"""Batch norm with fixed statistics: an affine map a channel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from fxfib.coloring import Value, opened
from fxfib.passes.relations import Same
from fxfib.passes.rules.activation import pass_form
from fxfib.passes.rules.base import Barrier, Flavor, Rule, overloads, register
from fxfib.passes.rules.group_norm import scaled_by
from fxfib.passes.rules.norm import parameter_values
from fxfib.signature import Form, color_form, form_of_factor

if TYPE_CHECKING:
    from fxfib.passes.backward import Adjoint, Error
    from fxfib.passes.forward import Analysis
    from fxfib.passes.rewrite import Rewriter


aten = torch.ops.aten


@register
class BatchNorm(Rule):
    """Batch norm with fixed statistics: an affine map a channel, folded into the rows before."""

    targets = overloads("batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
    pointwise = True

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        bound = analysis.arguments(node)
        if self.by_batch(bound):
            if analysis.merging:
                raise Barrier("it normalises by the statistics of the batch", "call model.eval()")
            return self.normalised(analysis, node)
        source = bound["input"]
        value = analysis.value(source)
        if not value.tracked(1):
            return self.beside(analysis, node, source)
        size = value.shape[1]
        gamma = parameter_values(analysis, bound["weight"], size, 1.0)
        beta = parameter_values(analysis, bound["bias"], size, 0.0)
        mean = parameter_values(analysis, bound["running_mean"], size, 0.0)
        variance = parameter_values(analysis, bound["running_var"], size, 1.0)
        gain = gamma / np.sqrt(variance + bound["eps"])
        for name in ("weight", "bias", "running_mean", "running_var"):
            if bound[name] is not None:
                analysis.relate(Same((node, 1), (bound[name], 0)))
        others = tuple(f for f in value.factors if 1 not in f.axes)
        if others:
            analysis.full(source, [a for f in others for a in f.axes], "batch norm")
        form = value.form
        if not isinstance(form, Form) or form.axis != 1:
            form = form_of_factor(analysis.factors(source)[1])
        shift = beta - mean * gain
        form = form.scaled(gain, analysis.roundoff).shifted(
            shift, analysis.roundoff, magnitude=np.abs(beta) + np.abs(mean * gain)
        )
        if others:
            analysis.relate(Same((node, 1), (source, 1)))
            return Value(analysis.shape(node), (), form)
        return pass_form(analysis, node, source, form, gain)

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """Fixed statistics: the error times the gain of its channel."""
        bound = adjoint.analysis.arguments(node)
        if isinstance(error, dict):
            if set(error) != {0}:
                raise Barrier("its statistics are used")
            error = error[0]
        if self.by_batch(bound):
            source, eps = bound["input"], bound["eps"]
            rank = len(adjoint.analysis.shape(source))
            yield source, adjoint.of(
                lambda x: torch.nn.functional.batch_norm(x, None, None, training=True, eps=eps),
                scaled_by(adjoint, error, bound["weight"]), 0, source, name=str(node.target),
                flavors=(Flavor(0),), mixed=(0, *range(2, rank)),
            )  # fmt: skip
            return
        shifted = adjoint.call(aten.add.Tensor, bound["running_var"], bound["eps"])
        gain = adjoint.call(aten.rsqrt.default, shifted)
        if bound["weight"] is not None:
            gain = adjoint.call(aten.mul.Tensor, gain, bound["weight"])
        source = bound["input"]
        shape = [-1, *[1] * (len(adjoint.analysis.shape(source)) - 2)]
        gain = adjoint.call(aten.view.default, gain, shape)
        yield source, adjoint.call(aten.mul.Tensor, error, gain)

    @staticmethod
    def by_batch(bound: Mapping[str, Any]) -> bool:
        """Whether statistics are those of the batch, as in training."""
        return bool(bound.get("training", False)) or bound["running_mean"] is None

    @staticmethod
    def normalised(analysis: Analysis, node: fx.Node) -> Value:
        """Statistics of each channel of the batch: equal before, equal parameters, equal after."""
        bound = analysis.arguments(node)
        source = bound["input"]
        factor = analysis.factor(source, 1)
        if factor is None:
            return Value(analysis.shape(node))
        size = len(factor.labels)
        for name in ("weight", "bias"):
            if bound[name] is not None:
                analysis.relate(Same((node, 1), (bound[name], 0)))
        analysis.relate(Same((node, 1), (source, 1)))
        gamma = parameter_values(analysis, bound["weight"], size, 1.0)
        beta = parameter_values(analysis, bound["bias"], size, 0.0)
        table = torch.from_numpy(np.stack([np.ones(size), gamma, beta], 1))
        zero = np.zeros(size)
        form = Form(1, table, zero, None, zero, factor.keyed(), ("batch", node.name))
        return Value(
            analysis.shape(node), (color_form(form, size, analysis.eps, analysis.criterion),)
        )

    @staticmethod
    def beside(analysis: Analysis, node: fx.Node, source: fx.Node) -> Value:
        """Colors along other axes: every position meets the same affine maps."""
        factors = []
        for axis, factor in analysis.factors(source).items():
            space = (str(node.target), node.name, factor.space)
            factors.append(opened(factor, scales=False, constants=False, space=space))
            analysis.relate(Same((node, axis), (source, axis)))
        return Value(analysis.shape(node), tuple(factors))

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        bound = rewriter.analysis.arguments(node)
        first, rows = rewriter.first(node, 1), rewriter.rows(node, 1)
        before = rewriter.rows(bound["input"], 1)
        reducers = {"weight": first, "bias": rows, "running_mean": before, "running_var": first}
        return rewriter.repeat(
            node,
            constants={
                bound[name]: rewriter.constant(bound[name], {0: reducer})
                for name, reducer in reducers.items()
                if bound[name] is not None
            },
        )

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.batch_norm()
