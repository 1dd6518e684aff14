"""Norms over parts of the channels: group norm and instance norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from fxfib.coloring import Factor, Value
from fxfib.passes.relations import Even, Move, Refine, Same
from fxfib.passes.rules.base import Barrier, Flavor, Rule, overloads, register
from fxfib.passes.rules.norm import LayerNorm, parameter_values
from fxfib.signature import Form, color_form

if TYPE_CHECKING:
    from fxfib.passes.backward import Adjoint, Error
    from fxfib.passes.forward import Analysis
    from fxfib.passes.rewrite import Rewriter


aten = torch.ops.aten


def scaled_by(adjoint: Adjoint, error: fx.Node, weight: Any) -> fx.Node:
    """The error times one number a channel (axis 1)."""
    if weight is None:
        return error
    if not adjoint.analysis.is_constant(weight):
        raise Barrier("its parameters are computed from the input")
    shape = [-1, *[1] * (len(adjoint.analysis.shape(error)) - 2)]
    return adjoint.call(aten.mul.Tensor, error, adjoint.call(aten.view.default, weight, shape))


@register
class GroupNorm(Rule):
    """Statistics over groups of channels and all positions; then an affine map of each channel."""

    targets = overloads("group_norm")

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        bound = analysis.arguments(node)
        source, groups = bound["input"], bound["num_groups"]
        value = analysis.color(source)
        factor = analysis.factor(source, 1)
        analysis.full(
            source, [a for a in value.tracked_axes if a != 1], "group norm mixes this axis"
        )
        if factor is None:
            return Value(value.shape)
        size = len(factor.labels)
        inside = size // groups
        norm = LayerNorm()
        result = norm.channel(analysis, node, source, 1, 0, bound["weight"], bound["bias"])
        # Nodes of different groups see different statistics.
        labels = result.keyed() * groups + np.arange(size) // inside
        group = analysis.inner(node, "groups", groups)
        within = analysis.inner(node, "within", inside)
        analysis.relate(
            Move(((node, 1),), ((group, within),), np.arange(size)),
            Refine((node, 1), np.arange(size) // inside),
            Even(within),
        )
        return Value(value.shape, (Factor((1,), labels + 2, np.ones(size), ("group", node.name)),))

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """As layer norm, group by group."""
        bound = adjoint.analysis.arguments(node)
        source, groups, eps = bound["input"], bound["num_groups"], bound["eps"]
        error = scaled_by(adjoint, error, bound["weight"])
        shape = adjoint.analysis.shape(source)
        yield source, adjoint.of(
            lambda x: torch.nn.functional.group_norm(x, groups, eps=eps), error, 0, source,
            name=str(node.target), flavors=(Flavor(0),), mixed=tuple(range(2, len(shape))),
            common=(1,), labels={1: np.arange(shape[1]) // (shape[1] // groups)},
        )  # fmt: skip

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        bound = rewriter.analysis.arguments(node)
        source, groups = bound["input"], bound["num_groups"]
        first = rewriter.first(node, 1)
        reduced = {
            p: rewriter.constant(p, {0: first})
            for p in (bound["weight"], bound["bias"])
            if p is not None
        }
        if rewriter.layout(node, 1).even:
            return rewriter.repeat(node, constants=reduced)
        rank = len(rewriter.analysis.shape(source))
        size = rewriter.size(node, 1)
        positions = list(range(2, rank))
        shape = rewriter.shape_arguments(source)
        per_group = [shape[0], groups, size // groups]
        counts = rewriter.layout(node, 1).counts.reshape(groups, -1)
        share = rewriter.new_constant(
            node,
            (counts / counts.sum(1, keepdims=True))[None],
            "share",
            dtype=source.meta["val"].dtype,
        )

        def average(value: fx.Node) -> fx.Node:
            # Over the positions first: then a number a channel is left to be weighted.
            if positions:
                value = rewriter.call(aten.mean.dim, (value, positions))
            value = rewriter.call(aten.view.default, (value, per_group))
            weighted = rewriter.call(aten.mul.Tensor, (value, share))
            return rewriter.call(aten.sum.dim_IntList, (weighted, [2], True))

        def spread(value: fx.Node) -> fx.Node:
            value = rewriter.call(aten.expand.default, (value, per_group))
            return rewriter.call(
                aten.reshape.default, (value, [shape[0], size, *[1] * len(positions)])
            )

        def by_channel(parameter: fx.Node) -> fx.Node:
            return rewriter.call(aten.view.default, (parameter, [1, size, *[1] * len(positions)]))

        x = rewriter.new(source)
        x = rewriter.call(aten.sub.Tensor, (x, spread(average(x))))
        variance = average(rewriter.call(aten.mul.Tensor, (x, x)))
        scale = rewriter.call(
            aten.rsqrt.default, (rewriter.call(aten.add.Tensor, (variance, bound["eps"])),)
        )
        scale = spread(scale)
        if bound["weight"] is not None:
            gain = by_channel(reduced[bound["weight"]])
            scale = rewriter.call(aten.mul.Tensor, (scale, gain))
        result = rewriter.call(aten.mul.Tensor, (x, scale))
        if bound["bias"] is not None:
            offset = by_channel(reduced[bound["bias"]])
            result = rewriter.call(aten.add.Tensor, (result, offset))
        return result

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.group_norm()


@register
class InstanceNorm(Rule):
    """Statistics of each channel by itself, then an affine map of each channel."""

    targets = overloads("instance_norm")
    pointwise = True

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        bound = analysis.arguments(node)
        if not bound["use_input_stats"]:
            raise Barrier("it uses running statistics", "use batch norm")
        if bound["running_mean"] is not None:
            raise Barrier("it updates running statistics", "call model.eval()")
        source = bound["input"]
        value = analysis.color(source)
        factor = analysis.factor(source, 1)
        analysis.full(source, [a for a in value.tracked_axes if a != 1], "it mixes this axis")
        if factor is None:
            return Value(value.shape)
        size = len(factor.labels)
        gamma = parameter_values(analysis, bound["weight"], size, 1.0)
        beta = parameter_values(analysis, bound["bias"], size, 0.0)
        for name in ("weight", "bias"):
            if bound[name] is not None:
                analysis.relate(Same((node, 1), (bound[name], 0)))
        analysis.relate(
            Same((node, 1), (source, 1)),
            Refine((source, 1), factor.keyed()),
        )
        table = torch.from_numpy(np.stack([np.ones(size), gamma, beta], 1))
        zero = np.zeros(size)
        form = Form(1, table, zero, None, zero, factor.keyed(), ("instance", node.name))
        return Value(value.shape, (color_form(form, size, analysis.eps, analysis.criterion),))

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """Every channel by itself, its activation being the flavor."""
        bound = adjoint.analysis.arguments(node)
        if not bound["use_input_stats"] or bound["running_mean"] is not None:
            raise Barrier("it uses running statistics", "use batch norm")
        source, eps = bound["input"], bound["eps"]
        error = scaled_by(adjoint, error, bound["weight"])
        rank = len(adjoint.analysis.shape(source))
        yield source, adjoint.of(
            lambda x: torch.nn.functional.instance_norm(x, eps=eps), error, 0, source,
            name=str(node.target), flavors=(Flavor(0),), mixed=tuple(range(2, rank)),
        )  # fmt: skip

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        bound = rewriter.analysis.arguments(node)
        first = rewriter.first(node, 1)
        return rewriter.repeat(
            node,
            constants={
                bound[name]: rewriter.constant(bound[name], {0: first})
                for name in ("weight", "bias")
                if bound[name] is not None
            },
        )

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.instance_norm()
