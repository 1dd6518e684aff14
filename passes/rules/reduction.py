"""Means and sums: along the channels every merged node counts as often as it was merged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from fxfib.coloring import Value, opened
from fxfib.passes.relations import Keep, Ref, Refine, Same
from fxfib.passes.rules.base import Barrier, Flavor, Mask, Rule, overloads, register
from fxfib.passes.rules.norm import weighted_mean

if TYPE_CHECKING:
    from fxfib.passes.backward import Adjoint, Error
    from fxfib.passes.forward import Analysis
    from fxfib.passes.rewrite import Rewriter

aten = torch.ops.aten


class Reduction(Rule):
    """Reduction over some axes; on the others every position by itself."""

    #: Whether the result scales with its input, and a constant stays that constant.
    homogeneous = True
    keeps_constants = False
    #: Whether errors depend on no activation.
    linear = False
    #: Whether nodes that are equal compete for the error: rounding decides which of them gets it.
    ties = False

    def reduced(self, analysis: Analysis, node: fx.Node) -> tuple[set[int], bool]:
        bound = analysis.arguments(node)
        rank = len(analysis.shape(node.args[0]))  # type: ignore[arg-type]
        dims = bound.get("dim")
        if dims is None or dims == []:
            return set(range(rank)), bool(bound.get("keepdim", False))
        dims = dims if isinstance(dims, (list, tuple)) else [dims]
        return {d % rank for d in dims}, bool(bound.get("keepdim", False))

    def over_channel(self, analysis: Analysis, node: fx.Node, source: fx.Node, axis: int) -> None:
        """Record what a reduction along a colored axis needs."""
        factor = analysis.factors(source)[axis]
        analysis.relate(
            Refine((source, axis), factor.keyed()),
            Keep((source, axis), np.ones(len(factor.labels), dtype=bool)),
        )

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        reduced, keep = self.reduced(analysis, node)
        value = analysis.color(source)
        touched = [a for a in value.tracked_axes if a in reduced]
        joint = [a for a in touched if len(value.factor(a).axes) > 1]  # type: ignore[union-attr]
        if len(touched) > 1 or joint:
            analysis.full(source, touched, "several colored axes are reduced at once")
        else:
            for axis in touched:
                self.over_channel(analysis, node, source, axis)
        factors = []
        for axis, factor in analysis.factors(source).items():
            if axis in reduced:
                continue
            out = axis if keep else axis - sum(r < axis for r in reduced)
            space = (str(node.target), node.name, factor.space)
            result = opened(
                factor, scales=self.homogeneous, constants=self.keeps_constants, space=space
            )
            analysis.relate(Same((node, out), (source, axis)))
            factors.append(type(result)((out,), result.labels, result.scales, result.space))
        return Value(analysis.shape(node), tuple(factors))

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """Spread back along what was reduced; the activation is the flavor where it matters."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        reduced, keep = self.reduced(adjoint.analysis, node)
        if not keep:
            sizes = adjoint.sizes(source)
            shape = [1 if axis in reduced else size for axis, size in enumerate(sizes)]
            error = adjoint.call(aten.view.default, error, shape)
        target, rest, named = node.target, node.args[1:], dict(node.kwargs)

        def function(x: torch.Tensor) -> torch.Tensor:
            out = target(x, *rest, **named)  # type: ignore[operator]
            return out.reshape([1 if a in reduced else n for a, n in enumerate(x.shape)])

        along = tuple(sorted(reduced))
        yield source, adjoint.of(
            function, error, 0, source, name=str(node.target),
            spread=() if self.ties else along, mixed=along if self.ties else (),
            flavors=() if self.linear else (Flavor(0),),
        )  # fmt: skip

    def reads(
        self, analysis: Analysis, node: fx.Node, live: Mapping[Ref, Mask]
    ) -> Iterator[tuple[Ref, Mask]]:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        reduced, keep = self.reduced(analysis, node)
        for axis in analysis.value(source).tracked_axes:
            out = axis if keep else axis - sum(r < axis for r in reduced)
            if axis not in reduced and (node, out) in live:
                yield (source, axis), live[node, out]

    def merged_axis(self, rewriter: Rewriter, node: fx.Node) -> int | None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        reduced, _ = self.reduced(rewriter.analysis, node)
        axes = [a for a in sorted(reduced) if not rewriter.layout(source, a).identity]
        return axes[0] if axes else None

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.reduction()


@register
class Mean(Reduction):
    """Mean; over the channels it still divides by the original number of nodes."""

    targets = (aten.mean.dim, aten.mean.default)
    keeps_constants = True
    linear = True

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        axis = self.merged_axis(rewriter, node)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if axis is None or rewriter.layout(source, axis).even:
            return rewriter.repeat(node)
        reduced, keep = self.reduced(rewriter.analysis, node)
        total = weighted_mean(rewriter, source, rewriter.new(source), axis, sorted(reduced))
        if keep:
            return total
        for gone in sorted(reduced, reverse=True):
            total = rewriter.call(aten.squeeze.dim, (total, gone))
        return total


@register
class Sum(Reduction):
    """Sum; over the channels a merged node counts as often as it was merged."""

    targets = (aten.sum.dim_IntList, aten.sum.default)
    linear = True

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        axis = self.merged_axis(rewriter, node)
        if axis is None:
            return rewriter.repeat(node)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        rank = len(rewriter.analysis.shape(source))
        share = rewriter.counts(source, axis, rank, total=True)
        weighted = rewriter.call(aten.mul.Tensor, (rewriter.new(source), share))
        return rewriter.repeat(node, constants={source: weighted})


@register
class Extreme(Reduction):
    """Largest or smallest value: copies change nothing."""

    targets = (*overloads("amax", "amin"), aten.max.default, aten.min.default)
    keeps_constants = True
    ties = True


@register
class Statistic(Reduction):
    """Other reductions over axes without colors."""

    targets = overloads("var", "std", "logsumexp", "linalg_vector_norm", "prod", "norm")
    homogeneous = False

    def reduced(self, analysis: Analysis, node: fx.Node) -> tuple[set[int], bool]:
        if "dim" not in analysis.arguments(node):
            raise Barrier("this overload has no dimension")
        return super().reduced(analysis, node)

    def over_channel(self, analysis: Analysis, node: fx.Node, source: fx.Node, axis: int) -> None:
        analysis.full(source, [axis], f"{node.target} works along this axis")
