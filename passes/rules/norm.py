"""Norms over whole axes: layer norm and RMS norm, with counts where an axis shrank."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from fxfib.coloring import Factor, Floats, Value, opened
from fxfib.passes.layout import Times
from fxfib.passes.relations import Even, Keep, Refine, Same
from fxfib.passes.rules.base import Barrier, Flavor, Rule, overloads, register
from fxfib.signature import Form, color_form

if TYPE_CHECKING:
    from fxfib.passes.backward import Adjoint, Error
    from fxfib.passes.forward import Analysis
    from fxfib.passes.rewrite import Rewriter


aten = torch.ops.aten


def parameter_values(analysis: Analysis, node: Any, size: int, default: float) -> Floats:
    """A parameter of a norm as float64; one number everywhere where there is none."""
    if node is None:
        return np.full(size, default)
    if not analysis.is_constant(node):
        raise Barrier("its parameters are computed from the input")
    return analysis.constant(node).to(torch.float64).numpy()


def weighted_mean(
    rewriter: Rewriter, node: fx.Node, value: fx.Node, axis: int, axes: Iterable[int]
) -> fx.Node:
    """The mean over all original positions of some axes (kept, of size 1), of which one merged.

    Args:
        node: the original op, of the value's original shape.
        value: a new node.
        axis: the merged axis; every slot counts as often as it was merged.
        axes: all axes of the mean.
    """
    others = [a for a in axes if a != axis]
    if others:  # first, so that few numbers are left to be weighted
        value = rewriter.call(aten.mean.dim, (value, others, True))
    share = rewriter.counts(node, axis, len(rewriter.analysis.shape(node)))
    weighted = rewriter.call(aten.mul.Tensor, (value, share))
    return rewriter.call(aten.sum.dim_IntList, (weighted, [axis], True))


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
        if len(inside) > 1:
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
        """Equal color in, equal affine row: equal color out.  Every node counts in statistics."""
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

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """Errors times weight, and activations, must agree; statistics add the same to all."""
        source, count, weight, bias, eps = self.operands(adjoint.analysis, node)
        if any(p is not None and not adjoint.analysis.is_constant(p) for p in (weight, bias)):
            raise Barrier("its parameters are computed from the input")
        if weight is not None:
            error = adjoint.call(aten.mul.Tensor, error, weight)
        rank = len(adjoint.analysis.shape(source))

        def function(x: torch.Tensor) -> torch.Tensor:
            shape = x.shape[rank - count :]
            if self.centered:
                return torch.nn.functional.layer_norm(x, shape, eps=eps or 0.0)
            return torch.nn.functional.rms_norm(x, shape, eps=eps)

        yield source, adjoint.of(
            function, error, 0, source, name=str(node.target), flavors=(Flavor(0),),
            common=tuple(range(rank - count, rank)),
        )  # fmt: skip

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        source, count, weight, bias, eps = self.operands(rewriter.analysis, node)
        rank = len(rewriter.analysis.shape(source))
        axes = range(rank - count, rank)
        merged = [a for a in axes if not rewriter.layout(node, a).identity]
        even = all(rewriter.layout(node, a).even for a in merged)
        reduced = {
            p: rewriter.constant(p, {a - (rank - count): rewriter.first(node, a) for a in merged})
            for p in (weight, bias)
            if p is not None and (even or p is bias)
        }
        if even:
            shape = [rewriter.size(node, a) for a in axes]
            return rewriter.repeat(node, constants=reduced, changed={"normalized_shape": shape})
        (axis,) = merged
        x = rewriter.new(source)
        if self.centered:
            x = rewriter.call(aten.sub.Tensor, (x, weighted_mean(rewriter, node, x, axis, axes)))
        # Slot c stands for n_c of N nodes.  Times the root of n_c / N (times the number of slots),
        # the mean of squares over the slots is the one over the nodes: an RMS norm as it is, which
        # is one op in ONNX and in torch, where sums with weights are not.
        gain = rewriter.mean_square_gain(node, axis)
        shape = [rewriter.size(node, a) for a in axes]
        own = axis - (rank - count)
        along = [1] * rank
        along[axis] = -1
        dtype = source.meta["val"].dtype
        scale = rewriter.new_constant(node, gain.reshape(along), "gain", dtype=dtype)
        x = rewriter.call(aten.mul.Tensor, (x, scale))
        if weight is None:
            along = [1] * count
            along[own] = -1
            inverse = np.broadcast_to(1.0 / gain.reshape(along), shape).copy()
            affine = rewriter.new_constant(node, inverse, "inverse_gain", dtype=dtype)
        else:
            affine = rewriter.constant(weight, {own: Times(rewriter.first(node, axis), 1.0 / gain)})
        result = rewriter.call(aten.rms_norm.default, (x, shape, affine, eps))
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
