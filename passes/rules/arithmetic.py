"""Sums and products: affine forms go through them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from fxfib.coloring import (
    Floats,
    Value,
)
from fxfib.passes.relations import Same
from fxfib.passes.rules.activation import pass_form
from fxfib.passes.rules.base import Barrier, Flavor, is_tensor, overloads, register
from fxfib.passes.rules.elementwise import Elementwise
from fxfib.signature import Form, form_of_factor

if TYPE_CHECKING:
    from fxfib.passes.backward import Adjoint, Error
    from fxfib.passes.forward import Analysis
    from fxfib.passes.rewrite import Rewriter


class Affine(Elementwise):
    """Add, subtract, multiply, divide: pending affine forms pass through where they can."""

    def operands(self, analysis: Analysis, node: fx.Node) -> list[Any]:
        arguments = analysis.arguments(node)
        return [arguments["self"], arguments["other"]]

    def pending(self, analysis: Analysis, node: fx.Node) -> tuple[Any, Form | None]:
        """The operand with a pending form on an axis of its own that no other operand colors."""
        for operand in self.operands(analysis, node):
            if is_tensor(operand) and not analysis.is_constant(operand):
                value = analysis.value(operand)
                form = value.form
                if isinstance(form, Form) and value.shape == analysis.shape(node):
                    return operand, form
        return None, None


def _numbers_along(analysis: Analysis, operand: Any, node: fx.Node, axis: int) -> Floats | None:
    """A constant operand as one number a position of an axis; None if it is more than that.

    Raises:
        Barrier: it holds infinity, with which no row can be shifted or scaled.
    """
    size = analysis.shape(node)[axis]
    numbers: Floats | None = None
    if not is_tensor(operand):
        numbers = np.full(size, float(operand))
    elif (tensor := analysis.constant(operand)).numel() == 1:
        numbers = np.full(size, float(tensor))
    else:
        own = axis - (len(analysis.shape(node)) - tensor.ndim)
        if own >= 0 and tensor.shape[own] == size == tensor.numel():
            numbers = tensor.reshape(-1).to(torch.float64).numpy()
    if numbers is not None and not np.isfinite(numbers).all():
        raise Barrier("a constant operand of it holds infinity along the channels")
    return numbers


def _tie_constant(analysis: Analysis, node: fx.Node, operand: Any, axis: int) -> None:
    if is_tensor(operand) and analysis.constant(operand).numel() > 1:
        own = axis - (len(analysis.shape(node)) - len(analysis.shape(operand)))
        if own >= 0 and analysis.shape(operand)[own] == analysis.shape(node)[axis]:
            analysis.relate(Same((node, axis), (operand, own)))


@register
class Add(Affine):
    """``x + alpha * y`` and ``x - alpha * y``; residual additions are colored jointly."""

    targets = overloads("add", "sub", "rsub", "subtract")
    homogeneity = "joint"

    def signs(self, analysis: Analysis, node: fx.Node) -> tuple[float, float] | None:
        alpha = analysis.arguments(node).get("alpha", 1)
        if isinstance(alpha, fx.Node):
            return None
        name = str(node.target)
        if "rsub" in name:
            return -float(alpha), 1.0
        return 1.0, -float(alpha) if "sub" in name else float(alpha)

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        operands, signs = self.operands(analysis, node), self.signs(analysis, node)
        source, form = self.pending(analysis, node)
        if (
            form is None
            or signs is None
            or any(isinstance(o, fx.Node) and not is_tensor(o) for o in operands)
        ):
            return super().forward(analysis, node)
        value = analysis.value(source)
        other = operands[1] if operands[0] is source else operands[0]
        mine, theirs = signs if operands[0] is source else (signs[1], signs[0])
        if other is source or value.factors:
            return super().forward(analysis, node)
        axis, size = form.axis, value.shape[form.axis]
        form = form.scaled(np.full(size, mine), analysis.roundoff)
        if not is_tensor(other) or analysis.is_constant(other):
            shift = _numbers_along(analysis, other, node, axis)
            if shift is None:
                return super().forward(analysis, node)
            _tie_constant(analysis, node, other, axis)
            form = form.shifted(theirs * shift, analysis.roundoff)
            return pass_form(analysis, node, source, form, np.full(size, mine))
        their_value = analysis.value(other)
        if their_value.shape != value.shape or not their_value.tracked(axis):
            return super().forward(analysis, node)
        if isinstance(their_value.form, Form) and their_value.form.axis == axis:
            their_form = their_value.form
            if their_value.factors:
                return super().forward(analysis, node)
        else:
            if set(their_value.tracked_axes) != {axis}:
                return super().forward(analysis, node)
            their_form = form_of_factor(analysis.factors(other)[axis])
        their_form = their_form.scaled(np.full(size, theirs), analysis.roundoff)
        analysis.relate(Same((node, axis), (other, axis)))
        analysis.gains.setdefault(other, []).append((node, np.full(size, theirs)))
        return pass_form(analysis, node, source, form.plus(their_form), np.full(size, mine))

    def expands(self, analysis: Analysis, node: fx.Node) -> bool:
        """Where two values are added, or one is broadcast."""
        values = [o for o in self.operands(analysis, node) if is_tensor(o)]
        return sum(not analysis.is_constant(o) for o in values) > 1

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        return rewriter.repeat(node, constants=self.reduced_constants(rewriter, node, mean=True))

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """Both operands get the error, times their sign."""
        signs = self.signs(adjoint.analysis, node)
        if signs is None:
            raise Barrier("alpha is computed", "pass a plain number")
        for operand, sign in zip(self.operands(adjoint.analysis, node), signs, strict=True):
            if adjoint.wants(operand):
                found = error
                if sign != 1.0:
                    found = adjoint.call(torch.ops.aten.mul.Tensor, error, sign)
                yield operand, adjoint.sum_to(found, operand)

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return [*examples.binary("add"), *examples.overload_cases(self.targets)]


@register
class Multiply(Affine):
    """``x * y``: gates, layer scale, squeeze-and-excite."""

    targets = overloads("mul", "multiply")
    homogeneity = "product"

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        result = scale_by_constant(self, analysis, node, invert=False)
        return super().forward(analysis, node) if result is None else result

    def flavors(self, adjoint: Adjoint, node: fx.Node, operand: fx.Node) -> tuple[Flavor, ...]:
        operands = self.operands(adjoint.analysis, node)
        return adjoint.flavors(node, [o for o in operands if o is not operand])

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """Each operand's error is multiplied by the other operand: its flavor."""
        first, second = self.operands(adjoint.analysis, node)
        if first is second:
            doubled = adjoint.call(torch.ops.aten.mul.Tensor, first, 2)
            yield first, adjoint.call(torch.ops.aten.mul.Tensor, error, doubled)
            return
        for operand, other in ((first, second), (second, first)):
            if adjoint.wants(operand) and not adjoint.wants(other):
                # Numbers: rows are scaled, not merely told apart.
                found = adjoint.call(torch.ops.aten.mul.Tensor, error, other)
                yield operand, adjoint.sum_to(found, operand)
            elif adjoint.wants(operand):
                place = adjoint.leaf_of(node, operand)
                flavors = self.flavors(adjoint, node, operand)
                found = adjoint.derivative(node, error, place, flavors=flavors, broadcast=True)
                yield operand, adjoint.sum_to(found, operand)

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return [*examples.binary("mul"), *examples.overload_cases(self.targets)]


@register
class Divide(Affine):
    """``x / y``."""

    targets = tuple(
        op for op in overloads("div", "divide", "true_divide") if "mode" not in op._overloadname
    )
    homogeneity = "quotient"

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        result = scale_by_constant(self, analysis, node, invert=True)
        return super().forward(analysis, node) if result is None else result

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """By a number: the error over it.  Otherwise both operands are flavors."""
        first, second = self.operands(adjoint.analysis, node)
        if adjoint.wants(first) and not adjoint.wants(second):
            found = adjoint.call(torch.ops.aten.div.Tensor, error, second)
            yield first, adjoint.sum_to(found, first)
            return
        yield from super().backward(adjoint, node, error)

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return [*examples.binary("div"), *examples.overload_cases(self.targets)]


def scale_by_constant(
    rule: Affine, analysis: Analysis, node: fx.Node, *, invert: bool
) -> Value | None:
    """A pending form times (or over) numbers: the form of the product.  None: not this case."""
    operands = rule.operands(analysis, node)
    source, form = rule.pending(analysis, node)
    if form is None or (invert and operands[0] is not source):
        return None
    other = operands[1] if operands[0] is source else operands[0]
    if analysis.value(source).factors or other is source:
        return None
    if isinstance(other, fx.Node) and (not is_tensor(other) or not analysis.is_constant(other)):
        return None
    gain = _numbers_along(analysis, other, node, form.axis)
    if gain is None or (invert and np.any(gain == 0.0)):
        return None
    _tie_constant(analysis, node, other, form.axis)
    gain = 1.0 / gain if invert else gain
    return pass_form(analysis, node, source, form.scaled(gain, analysis.roundoff), gain)
