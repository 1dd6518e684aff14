"""Element-wise ops of one operand: activations, casts, and what passes forms on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxfib.coloring import (
    Floats,
    Value,
)
from fxfib.passes.relations import Same
from fxfib.passes.rules.base import Barrier, Flavor, overloads, register
from fxfib.passes.rules.elementwise import Elementwise
from fxfib.signature import Form

if TYPE_CHECKING:
    from fxfib.passes.backward import Adjoint, Error
    from fxfib.passes.forward import Analysis


@register
class Homogeneous(Elementwise):
    """Positively homogeneous activations: ``f(s x) = s f(x)`` for ``s > 0``."""

    targets = (
        *overloads("relu", "leaky_relu", "rrelu", "abs", "neg", "dropout", "alpha_dropout"),
        *overloads("feature_dropout", "clone", "contiguous", "detach", "alias", "positive"),
        *overloads("lift_fresh_copy", "feature_alpha_dropout"),
    )
    homogeneity = "joint"

    def operands(self, analysis: Analysis, node: fx.Node) -> list[Any]:
        return [node.args[0]]

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        value = analysis.value(node.args[0])  # type: ignore[arg-type]
        passes = node.target in PASSES_FORMS and not analysis.arguments(node).get("train", False)
        if passes and value.form is not None and len(analysis.shape(node)) and not value.factors:
            return pass_form(analysis, node, node.args[0], value.form, None)  # type: ignore[arg-type]
        return super().forward(analysis, node)

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """Only the sign matters to the slope; what is linear or no function at all has none."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if node.target in DETACHES:
            return
        if node.target in PASSES_FORMS and not adjoint.analysis.arguments(node).get("train", False):
            yield source, error
        elif node.target in NEGATES:
            yield source, adjoint.call(torch.ops.aten.neg.default, error)
        else:
            direction = (Flavor(0, direction=True),)
            slope = self.slope(node)
            yield source, adjoint.derivative(node, error, 0, flavors=direction, slope=slope)

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.unary(self.targets, homogeneous=True)


DETACHES = set(overloads("detach"))
NEGATES = set(overloads("neg"))
PASSES_FORMS = set(
    overloads(
        "dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "detach", "alias"
    )
    + overloads("lift_fresh_copy", "positive", "feature_alpha_dropout")
)


def pass_form(
    analysis: Analysis, node: fx.Node, source: fx.Node, form: Form, gain: Floats | None
) -> Value:
    """The output takes over a pending affine form of one input (other axes: as they are)."""
    value = analysis.value(source)
    for axis in value.tracked_axes:
        analysis.relate(Same((node, axis), (source, axis)))
    analysis.gains.setdefault(source, []).append((node, gain))
    others = tuple(f for f in value.factors if form.axis not in f.axes)
    return Value(analysis.shape(node), others, form)


@register
class Unary(Elementwise):
    """Activations and functions of one number about whose scaling nothing is assumed."""

    targets = overloads(
        *("gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh", "softplus"),
        *("relu6", "elu", "selu", "celu", "mish", "softsign", "tanhshrink", "softshrink"),
        *("hardshrink", "logsigmoid", "log_sigmoid", "threshold", "exp", "expm1", "log", "log1p"),
        *("log2", "log10", "sqrt", "rsqrt", "square", "reciprocal", "sin", "cos", "tan", "erf"),
        *("erfc", "sinh", "cosh", "asin", "acos", "atan", "asinh", "acosh", "atanh", "sign"),
        *("floor", "ceil", "round", "trunc", "frac", "clamp", "clip", "clamp_min", "clamp_max"),
        *("isnan", "isinf", "isfinite", "logical_not", "nan_to_num", "sgn"),
        *("bitwise_not", "digamma", "lgamma", "erfinv", "logit", "exp2"),
    )

    def operands(self, analysis: Analysis, node: fx.Node) -> list[Any]:
        if any(isinstance(a, fx.Node) for a in [*node.args[1:], *node.kwargs.values()]):
            raise Barrier("an argument of it is computed", "pass a plain number")
        return [node.args[0]]

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        if not analysis.value(node.args[0]).tracked_axes:  # type: ignore[arg-type]
            return Value(analysis.shape(node))
        return super().forward(analysis, node)

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """The activation is the flavor, whole."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        self.operands(adjoint.analysis, node)
        slope = self.slope(node)
        yield source, adjoint.derivative(node, error, 0, flavors=(Flavor(0),), slope=slope)

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.unary(self.targets, homogeneous=False)


@register
class Cast(Unary):
    """Another dtype: a factor passes where numbers stay floating."""

    targets = overloads("to", "_to_copy", "type_as")

    def scales_pass(self, node: fx.Node) -> bool:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return all(n.meta["val"].dtype.is_floating_point for n in (source, node))

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        dtype = source.meta["val"].dtype
        if dtype == node.meta["val"].dtype:
            yield source, error
        else:
            yield source, adjoint.call(torch.ops.aten._to_copy.default, error, dtype=dtype)

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.unary(self.targets, homogeneous=True)
