"""Linear layers: where rows are colored and columns are summed (Eq. 3 and Eq. 10)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from fxfib.coloring import Factor, Value, opened
from fxfib.passes.regression import Regression, linear_regression
from fxfib.passes.relations import Full, Ref, Same
from fxfib.passes.rules.attention import multiply_values
from fxfib.passes.rules.base import Barrier, Mask, Rule, columns_read, overloads, register
from fxfib.passes.rules.product import product_back
from fxfib.passes.rules.products import Product, ProductRule, matrix_product
from fxfib.signature import Form, collapse_columns

if TYPE_CHECKING:
    from fxfib.passes.backward import Adjoint, Error
    from fxfib.passes.forward import Analysis
    from fxfib.passes.rewrite import Rewriter

aten = torch.ops.aten


def passed_factors(
    analysis: Analysis, source: fx.Node, node: fx.Node, contracted: int, *, offset: bool
) -> tuple[Factor, ...]:
    """Colorings of the axes that a linear op leaves alone.

    The same map is applied at every position, so equal positions stay equal; scales pass only
    where there is no offset, and a constant position is constant no longer.
    """
    factors = []
    for axis, factor in analysis.factors(source).items():
        if axis == contracted:
            continue
        space = (str(node.target), node.name, factor.space)
        factors.append(opened(factor, scales=not offset, constants=False, space=space))
        analysis.relate(Same((node, axis), (source, axis)))
    return tuple(factors)


class LinearMap(Rule):
    """``y = x W^T + b`` on the last axis, however the op spells it."""

    def operands(
        self, analysis: Analysis, node: fx.Node
    ) -> tuple[fx.Node, fx.Node, fx.Node | None, int]:
        """Input, weight, bias and the weight's output axis (0 or 1)."""
        raise NotImplementedError

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        source, weight, bias, out = self.operands(analysis, node)
        if analysis.is_constant(source) or not analysis.is_constant(weight):
            raise Barrier("its weight is computed from the input", "nothing: it is not a parameter")
        if bias is not None and not analysis.is_constant(bias):
            raise Barrier("its bias is computed from the input", "nothing: it is not a parameter")
        tensor = analysis.constant(weight)
        if tensor.ndim != 2 or not tensor.dtype.is_floating_point:
            raise Barrier("its weight is not a matrix of floating-point numbers")
        last = len(analysis.shape(source)) - 1
        axis = len(analysis.shape(node)) - 1
        matrix = tensor if out == 0 else tensor.t()
        factor = analysis.factor(source, last)
        rows, bound, offset, offset_bound, _columns = collapse_columns(
            matrix, factor, offset_constants=True, roundoff=analysis.roundoff
        )
        form = Form(axis, rows, offset, bound, offset_bound, None, ("linear", node.name))
        if bias is not None:
            values = np.broadcast_to(
                analysis.constant(bias).to(torch.float64).numpy(), (len(offset),)
            )
            form = form.shifted(values, analysis.roundoff)
            if analysis.shape(bias) == (len(offset),):
                analysis.relate(Same((node, axis), (bias, 0)))
            else:
                analysis.full(bias, None, "it is broadcast as a bias")
        analysis.relate(Same((node, axis), (weight, out)), Same((source, last), (weight, 1 - out)))
        others = passed_factors(analysis, source, node, last, offset=bool(form.offset.any()))
        return Value(analysis.shape(node), others, form)

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """``error W``: columns are summed over the colors of the output's errors (Eq. 5)."""
        source, weight, bias, out = self.operands(adjoint.analysis, node)
        constant = adjoint.analysis.is_constant
        computed = constant(source) or not constant(weight) or len(weight.meta["val"].shape) != 2
        if computed or (bias is not None and not constant(bias)):
            raise Barrier("its parameters are computed from the input", "nothing: it is no layer")
        matrix = weight if out == 1 else adjoint.call(aten.t.default, weight)
        yield source, adjoint.call(aten.linear.default, error, matrix)

    def reads(
        self, analysis: Analysis, node: fx.Node, live: Mapping[Ref, Mask]
    ) -> Iterator[tuple[Ref, Mask]]:
        source, weight, _, out = self.operands(analysis, node)
        tensor = analysis.constant(weight)
        matrix = tensor if out == 0 else tensor.t()
        alive = live.get((node, len(analysis.shape(node)) - 1))
        yield (source, len(analysis.shape(source)) - 1), columns_read(matrix, alive)
        for axis in analysis.value(source).tracked_axes:
            if axis != len(analysis.shape(source)) - 1 and (node, axis) in live:
                yield (source, axis), live[node, axis]

    def columns(self, analysis: Analysis, node: fx.Node) -> Iterator[tuple[Ref, torch.Tensor]]:
        source, weight, _, out = self.operands(analysis, node)
        if analysis.is_constant(weight):
            tensor = analysis.constant(weight)
            last = len(analysis.shape(source)) - 1
            yield (source, last), tensor if out == 0 else tensor.t()

    def regression(self, analysis: Analysis, node: fx.Node) -> Regression | None:
        source, weight, bias, out = self.operands(analysis, node)
        rank = len(analysis.shape(node))
        if rank < 2 or not analysis.is_constant(weight) or analysis.is_constant(source):
            return None
        return linear_regression(source, weight, bias, out, rank)

    def produces(self, analysis: Analysis, node: fx.Node) -> Iterator[tuple[str, Ref]]:
        yield "", (node, len(analysis.shape(node)) - 1)

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        source, weight, bias, out = self.operands(rewriter.analysis, node)
        last = len(rewriter.analysis.shape(source)) - 1
        axis = len(rewriter.analysis.shape(node)) - 1
        rows, columns = rewriter.rows(node, axis), rewriter.columns(source, last)
        embedding = rewriter.plan.tables.get(weight)
        if embedding is not None:
            # One tensor for both: an embedding's columns are averages, and here every one counts.
            columns = rewriter.rows(embedding, len(rewriter.analysis.shape(embedding)) - 1)
        reduced = {weight: rewriter.constant(weight, {out: rows, 1 - out: columns})}
        if embedding is not None and np.any(rewriter.layout(source, last).counts != 1.0):
            counts = rewriter.counts(source, last, last + 1, total=True)
            reduced[source] = rewriter.call(aten.mul.Tensor, (rewriter.new(source), counts))
        extra = rewriter.dropped_constants(source, last, weight, inputs=1 - out)
        if bias is not None and (extra is not None or len(rewriter.analysis.shape(bias)) == 1):
            whole = rewriter.analysis.shape(bias) != (rows.full,)
            reduced[bias] = rewriter.constant(bias, {} if whole else {0: rows}, plus=extra)
            return rewriter.repeat(node, constants=reduced)
        if extra is None:
            return rewriter.repeat(node, constants=reduced)
        offset = rewriter.new_constant(weight, rows.apply(extra, 0), "bias")
        call = rewriter.repeat(node, constants=reduced)
        if node.target is aten.linear.default:
            call.args = (*call.args[:2], offset)
            return call
        return rewriter.call(aten.add.Tensor, (call, offset))

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.linear()


@register
class Linear(LinearMap):
    """``aten.linear(x, W[out, in], b)``."""

    targets = overloads("linear")

    def operands(
        self, analysis: Analysis, node: fx.Node
    ) -> tuple[fx.Node, fx.Node, fx.Node | None, int]:
        bound = analysis.arguments(node)
        return bound["input"], bound["weight"], bound["bias"], 0


@register
class MatrixProduct(LinearMap, ProductRule):
    """``x @ W[in, out]`` with a parameter on the right."""

    targets = overloads("matmul", "mm")

    def of_values(self, analysis: Analysis, node: fx.Node) -> bool:
        """Whether this is no layer: two values meet, or a stack of matrices and a value."""
        source, weight, _, _ = self.operands(analysis, node)
        if analysis.is_constant(source) or not analysis.is_constant(weight):
            return True
        return len(analysis.shape(weight)) > 2

    def product(self, analysis: Analysis, node: fx.Node) -> Product:
        source, weight, _, _ = self.operands(analysis, node)
        return matrix_product(analysis, node, source, weight)

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        if self.of_values(analysis, node):
            return multiply_values(analysis, node)
        return super().forward(analysis, node)

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        source, weight, _, _ = self.operands(adjoint.analysis, node)
        if self.of_values(adjoint.analysis, node):
            return product_back(adjoint, error, source, weight)
        return super().backward(adjoint, node, error)

    def reads(
        self, analysis: Analysis, node: fx.Node, live: Mapping[Ref, Mask]
    ) -> Iterator[tuple[Ref, Mask]]:
        if self.of_values(analysis, node):
            return ProductRule.reads(self, analysis, node, live)
        return super().reads(analysis, node, live)

    def produces(self, analysis: Analysis, node: fx.Node) -> Iterator[tuple[str, Ref]]:
        return iter(()) if self.of_values(analysis, node) else super().produces(analysis, node)

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        if self.of_values(rewriter.analysis, node):
            return ProductRule.rewrite(self, rewriter, node)
        return super().rewrite(rewriter, node)

    def operands(
        self, analysis: Analysis, node: fx.Node
    ) -> tuple[fx.Node, fx.Node, fx.Node | None, int]:
        source, weight = node.args
        assert isinstance(source, fx.Node) and isinstance(weight, fx.Node)
        return source, weight, None, 1

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.attention(("batch_norm",))


@register
class AddMatrixProduct(LinearMap):
    """``addmm(b, x, W[in, out])``."""

    targets = overloads("addmm")

    def operands(
        self, analysis: Analysis, node: fx.Node
    ) -> tuple[fx.Node, fx.Node, fx.Node | None, int]:
        bound = analysis.arguments(node)
        if bound.get("beta", 1) != 1 or bound.get("alpha", 1) != 1:
            raise Barrier("alpha or beta is not 1", "use a plain linear layer")
        return bound["mat1"], bound["mat2"], bound["self"], 1


@register
class Embedding(Rule):
    """Rows of a table: the nodes are its columns."""

    targets = overloads("embedding")

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        table, indices = node.args[:2]
        assert isinstance(table, fx.Node) and isinstance(indices, fx.Node)
        if not analysis.is_constant(table):
            raise Barrier("its table is computed from the input")
        analysis.full(indices, None, "it is an index")
        axis = len(analysis.shape(node)) - 1
        rows = analysis.constant(table).t()
        zero = np.zeros(rows.shape[0])
        # A column of equal numbers is a constant node: nothing but an offset.
        offset, flat = zero, (rows == rows[:, :1]).all(1)
        if rows.shape[1] and flat.any():
            offset = np.where(flat.numpy(), rows[:, 0].to(torch.float64).numpy(), 0.0)
            rows = torch.where(flat[:, None], 0.0, rows)
        analysis.relate(
            Same((node, axis), (table, 1)), Full((table, 0), "an embedding's rows are its inputs")
        )
        form = Form(axis, rows, offset, None, zero, None, ("embedding", table.name, indices.name))
        return Value(analysis.shape(node), (), form)

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """Indices have no error; the table is a parameter."""
        if not adjoint.analysis.is_constant(node.args[0]):  # type: ignore[arg-type]
            raise Barrier("its table is computed from the input")
        return ()

    def produces(self, analysis: Analysis, node: fx.Node) -> Iterator[tuple[str, Ref]]:
        yield "", (node, len(analysis.shape(node)) - 1)

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        table = node.args[0]
        assert isinstance(table, fx.Node)
        rows = rewriter.rows(node, len(rewriter.analysis.shape(node)) - 1)
        return rewriter.repeat(node, constants={table: rewriter.constant(table, {1: rows})})

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.embedding()
