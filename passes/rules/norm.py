"""Normalisations: folded into the rows before them, or with statistics that count merged nodes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from fxfib.coloring import Factor, Floats, Value, opened
from fxfib.passes.relations import Even, Keep, Move, Refine, Same
from fxfib.passes.rules.base import Barrier, PerChannel, Rule, is_tensor, overloads, register
from fxfib.passes.rules.elementwise import pass_form
from fxfib.signature import Form, color_form, form_of_factor

if TYPE_CHECKING:
    from fxfib.passes.forward import Analysis
    from fxfib.passes.rewrite import Rewriter

aten = torch.ops.aten


def _numbers(analysis: Analysis, node: Any, size: int, default: float) -> Floats:
    if node is None:
        return np.full(size, default)
    if not analysis.is_constant(node):
        raise Barrier("its parameters are computed from the input")
    return analysis.constant(node).to(torch.float64).numpy()


@register
class BatchNorm(Rule):
    """Batch norm with fixed statistics: one affine map a channel, folded into the rows before it."""

    targets = overloads("batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
    pointwise = True

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        bound = analysis.arguments(node)
        if bound.get("training", False) or bound["running_mean"] is None:
            raise Barrier("it normalises by the statistics of the batch", "call model.eval()")
        source = bound["input"]
        value = analysis.value(source)
        if not value.tracked(1):
            return self.beside(analysis, node, source)
        size = value.shape[1]
        gamma = _numbers(analysis, bound["weight"], size, 1.0)
        beta = _numbers(analysis, bound["bias"], size, 0.0)
        mean = _numbers(analysis, bound["running_mean"], size, 0.0)
        variance = _numbers(analysis, bound["running_var"], size, 1.0)
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


class AxisNorm(Rule):
    """Layer and RMS norm: statistics over the last axes, then an affine map of each position."""

    centered = True

    def operands(
        self, analysis: Analysis, node: fx.Node
    ) -> tuple[fx.Node, int, Any, Any, float | None]:
        bound = analysis.arguments(node)
        return (
            bound["input"],
            len(bound["normalized_shape"]),
            bound["weight"],
            bound.get("bias"),
            bound["eps"],
        )

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        source, count, weight, bias, _ = self.operands(analysis, node)
        value = analysis.color(source)
        rank = value.ndim
        normalized = set(range(rank - count, rank))
        inside = sorted(normalized & set(value.tracked_axes))
        if len(inside) > 1 or (inside and len(value.factor(inside[0]).axes) > 1):  # type: ignore[union-attr]
            analysis.full(source, inside, "the norm works along several colored axes")
            inside = []
        factors = []
        for axis, factor in analysis.factors(source).items():
            if axis in normalized:
                continue
            space = (str(node.target), node.name, factor.space)
            factors.append(opened(factor, scales=False, constants=False, space=space))
            analysis.relate(Same((node, axis), (source, axis)))
            analysis.relate(Refine((source, axis), factor.keyed()))
        for axis in inside:
            own = axis - (rank - count)
            factors.append(self.channel(analysis, node, source, axis, own, weight, bias))
        return Value(value.shape, tuple(factors))

    def channel(
        self,
        analysis: Analysis,
        node: fx.Node,
        source: fx.Node,
        axis: int,
        own: int,
        weight: Any,
        bias: Any,
    ) -> Factor:
        """Equal color in, equal affine row: equal color out.  Every node counts in the statistics."""
        factor = analysis.factors(source)[axis]
        size = len(factor.labels)
        analysis.relate(
            Same((node, axis), (source, axis)),
            Refine((source, axis), factor.keyed()),
            Keep((source, axis), np.ones(size, dtype=bool)),
            Even((source, axis)),
        )
        affine = []
        for parameter in (weight, bias):
            if parameter is None:
                continue
            if not analysis.is_constant(parameter):
                raise Barrier("its parameters are computed from the input")
            analysis.relate(Same((node, axis), (parameter, own)))
            rows = analysis.constant(parameter).movedim(own, 0).reshape(size, -1)
            affine.append(rows.to(torch.float64))
        rows = torch.cat(affine, 1) if affine else torch.zeros(size, 0, dtype=torch.float64)
        ones = torch.ones(size, 1, dtype=torch.float64)  # nothing here is constant or parallel
        zero = np.zeros(size)
        form = Form(
            axis,
            torch.cat([ones, rows], 1),
            zero,
            None,
            zero,
            factor.keyed(),
            (str(node.target), node.name, factor.space),
        )
        return color_form(form, size, analysis.eps, analysis.criterion)

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        source, count, weight, bias, eps = self.operands(rewriter.analysis, node)
        rank = len(rewriter.analysis.shape(source))
        axes = range(rank - count, rank)
        merged = [a for a in axes if not rewriter.layout(node, a).identity]
        reduced = {
            p: rewriter.constant(p, {a - (rank - count): rewriter.first(node, a) for a in merged})
            for p in (weight, bias)
            if p is not None
        }
        if all(rewriter.layout(node, a).even for a in merged):
            shape = [rewriter.size(node, a) for a in axes]
            return rewriter.repeat(node, constants=reduced, changed={"normalized_shape": shape})
        (axis,) = merged
        x = rewriter.new(source)
        share = rewriter.counts(node, axis, rank)
        others = [a for a in axes if a != axis]

        def average(value: fx.Node) -> fx.Node:
            weighted = rewriter.call(aten.mul.Tensor, (value, share))
            total = rewriter.call(aten.sum.dim_IntList, (weighted, [axis], True))
            return rewriter.call(aten.mean.dim, (total, others, True)) if others else total

        if self.centered:
            x = rewriter.call(aten.sub.Tensor, (x, average(x)))
        variance = average(rewriter.call(aten.mul.Tensor, (x, x)))
        if eps is None:
            eps = torch.finfo(source.meta["val"].dtype).eps
        shifted = rewriter.call(aten.add.Tensor, (variance, eps))
        result = rewriter.call(aten.mul.Tensor, (x, rewriter.call(aten.rsqrt.default, (shifted,))))
        if weight is not None:
            result = rewriter.call(aten.mul.Tensor, (result, reduced[weight]))
        if bias is not None:
            result = rewriter.call(aten.add.Tensor, (result, reduced[bias]))
        return result

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.axis_norm(self.centered)


@register
class LayerNorm(AxisNorm):
    """Layer norm."""

    targets = overloads("layer_norm")


@register
class RMSNorm(AxisNorm):
    """RMS norm: no mean, no bias."""

    targets = overloads("rms_norm")
    centered = False


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
        positions = list(range(3, rank + 1))
        shape = rewriter.shape_arguments(source)
        split = rewriter.call(
            aten.view.default,
            (rewriter.new(source), [shape[0], groups, size // groups, *shape[2:]]),
        )
        counts = rewriter.layout(node, 1).counts.reshape(groups, -1)
        share = rewriter.new_constant(
            node,
            (counts / counts.sum(1, keepdims=True)).reshape(1, groups, -1, *[1] * len(positions)),
            "share",
            dtype=source.meta["val"].dtype,
        )

        def average(value: fx.Node) -> fx.Node:
            weighted = rewriter.call(aten.mul.Tensor, (value, share))
            total = rewriter.call(aten.sum.dim_IntList, (weighted, [2], True))
            return rewriter.call(aten.mean.dim, (total, positions, True)) if positions else total

        centered = rewriter.call(aten.sub.Tensor, (split, average(split)))
        variance = average(rewriter.call(aten.mul.Tensor, (centered, centered)))
        scale = rewriter.call(
            aten.rsqrt.default, (rewriter.call(aten.add.Tensor, (variance, bound["eps"])),)
        )
        result = rewriter.call(aten.mul.Tensor, (centered, scale))
        result = rewriter.call(aten.view.default, (result, [shape[0], size, *shape[2:]]))
        for op, parameter in ((aten.mul.Tensor, bound["weight"]), (aten.add.Tensor, bound["bias"])):
            if parameter is not None:
                affine = rewriter.call(
                    aten.view.default, (reduced[parameter], [1, size, *[1] * (rank - 2)])
                )
                result = rewriter.call(op, (result, affine))
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
        gamma = _numbers(analysis, bound["weight"], size, 1.0)
        beta = _numbers(analysis, bound["bias"], size, 0.0)
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


@register
class Softmax(PerChannel):
    """Softmax and its kin along an axis without colors."""

    targets = overloads(
        "softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "logcumsumexp"
    )

    def mixed_axes(self, analysis: Analysis, node: fx.Node) -> tuple[int, ...]:
        return (analysis.arguments(node)["dim"],)

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.softmax()


__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm", "Softmax", "is_tensor"]
