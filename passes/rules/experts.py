"""Products of tokens with the matrix of their expert: mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import fx

from fxfib.coloring import ONE, Value
from fxfib.passes.relations import Full, Keep, Ref, Same
from fxfib.passes.rules.base import Barrier, Mask, Rule, columns_read, register
from fxfib.signature import Form, collapse_columns

if TYPE_CHECKING:
    from fxfib.passes.forward import Analysis
    from fxfib.passes.rewrite import Rewriter


@register
class GroupedProduct(Rule):
    """``y[s] = x[s] @ W[e(s)]``: tokens ``x [S, in]`` in order of experts, ``W [E, in, out]``.

    Which expert a token meets depends on the input, so an output node is one only with another
    whose rows are equal in every expert: all experts' rows lie side by side, as the taps of a
    convolution do (Eq. 3).  ``torch._grouped_mm`` has no rule: it takes only widths that fill 16
    bytes, and merged ones need not.
    """

    named = ("transformers::grouped_mm_fallback",)

    def operands(self, analysis: Analysis, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Tokens, the experts' matrices, and where each expert's tokens end."""
        bound = analysis.arguments(node)
        return bound["input"], bound["weight"], bound["offs"]

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        source, weight, ends = self.operands(analysis, node)
        if analysis.is_constant(source) or not analysis.is_constant(weight):
            raise Barrier("its weight is computed from the input", "nothing: it is not a parameter")
        if not analysis.constant(weight).dtype.is_floating_point:
            raise Barrier("its weight is no tensor of floating-point numbers")
        factor = analysis.factor(source, 1)
        # A constant input adds another number in every expert: no offset, but a column a tap.
        rows, bound, offset, offset_bound, _ = collapse_columns(
            taps(analysis.constant(weight)),
            factor,
            offset_constants=False,
            roundoff=analysis.roundoff,
        )
        analysis.full(source, [0], "its tokens go to different experts")
        if not analysis.is_constant(ends):
            analysis.full(ends, None, "it says which expert a token meets")
        analysis.relate(
            Same((node, 1), (weight, 2)),
            Same((source, 1), (weight, 1)),
            Full((weight, 0), "every expert is one"),
        )
        if factor is not None:
            analysis.relate(Keep((source, 1), factor.labels == ONE))
        form = Form(1, rows, offset, bound, offset_bound, None, ("experts", node.name))
        return Value(analysis.shape(node), (), form)

    def reads(
        self, analysis: Analysis, node: fx.Node, live: Mapping[Ref, Mask]
    ) -> Iterator[tuple[Ref, Mask]]:
        source, weight, _ = self.operands(analysis, node)
        # No token reads more than all experts do; the tokens themselves are all read.
        yield (source, 1), columns_read(taps(analysis.constant(weight)), live.get((node, 1)))

    def columns(self, analysis: Analysis, node: fx.Node) -> Iterator[tuple[Ref, torch.Tensor]]:
        source, weight, _ = self.operands(analysis, node)
        if analysis.is_constant(weight):
            tensor = analysis.constant(weight)
            yield (source, 1), tensor.transpose(1, 2).reshape(-1, tensor.shape[1])

    def produces(self, analysis: Analysis, node: fx.Node) -> Iterator[tuple[str, Ref]]:
        _, weight, _ = self.operands(analysis, node)
        while weight.op != "get_attr" and len(weight.all_input_nodes) == 1:
            (weight,) = weight.all_input_nodes
        # One module holds several stacks of matrices.
        yield str(weight.target).rpartition(".")[2] if weight.op == "get_attr" else "", (node, 1)

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        source, weight, _ = self.operands(rewriter.analysis, node)
        axes = {2: rewriter.rows(node, 1), 1: rewriter.columns(source, 1)}
        return rewriter.repeat(node, constants={weight: rewriter.constant(weight, axes)})


def taps(weight: torch.Tensor) -> torch.Tensor:
    """``[experts, in, out]`` as ``[out, in, experts]``: every expert is a tap of one kernel."""
    return weight.permute(2, 1, 0)
