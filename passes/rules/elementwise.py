"""Element-wise ops: activations, gates, residual additions, with broadcasting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import fx

from fxfib.coloring import (
    FIRST_FREE,
    ONE,
    Factor,
    Floats,
    Labels,
    Value,
    constant_values,
    opened,
    unique_rows,
    with_constants,
)
from fxfib.passes.relations import Full, Same
from fxfib.passes.rules.base import Barrier, Mask, Rule, is_tensor, overloads, register
from fxfib.signature import Form, form_of_factor

if TYPE_CHECKING:
    from fxfib.passes.forward import Analysis
    from fxfib.passes.rewrite import Rewriter


@dataclass(frozen=True)
class Operand:
    """One operand of an element-wise op, seen along one axis of the output."""

    labels: Labels
    scales: Floats
    constant: Mask  # where the operand is a known number
    values: Floats  # the numbers


class Elementwise(Rule):
    """An op that computes every output element from the operands' elements at the same place.

    ``homogeneity`` says what a common positive factor of the operands does:
    ``none`` (nothing known), ``joint`` (all operands scaled by one factor scale the result: add,
    max, where, and unary ReLU), ``product`` (factors multiply), ``quotient`` (the second divides).
    """

    pointwise = True
    homogeneity: ClassVar[str] = "none"
    #: Positions of operands that must not be scaled even where the op is jointly homogeneous.
    unscaled: ClassVar[tuple[int, ...]] = ()

    def scales_pass(self, node: fx.Node) -> bool:
        """Whether, of one tensor alone, ``f(s x) = s f(x)`` for ``s > 0``."""
        return self.homogeneity == "joint"

    def operands(self, analysis: Analysis, node: fx.Node) -> list[Any]:
        """The arguments that take part element by element: nodes or numbers."""
        return [a for a in node.args if is_tensor(a) or isinstance(a, (int, float))]

    # -- forward -----------------------------------------------------------------------------

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        operands = self.operands(analysis, node)
        for operand in operands:
            if isinstance(operand, fx.Node) and not is_tensor(operand):
                raise Barrier("one of its operands is computed from sizes")
        values = [o for o in operands if is_tensor(o) and not analysis.is_constant(o)]
        if len(operands) == 1 and analysis.shape(values[0]) == analysis.shape(node):
            return self.unary(analysis, node, operands, values[0])
        return self.broadcast(analysis, node, operands)

    def unary(
        self, analysis: Analysis, node: fx.Node, operands: list[Any], source: fx.Node
    ) -> Value:
        """One tensor operand (and perhaps numbers): joint colorings pass as they are."""
        value = analysis.color(source)
        factors = []
        for factor in value.factors:
            for axis in factor.axes:
                analysis.relate(Same((node, axis), (source, axis)))
            space = (str(node.target), str(node.args[1:]), str(node.kwargs), factor.space)
            result = opened(factor, scales=self.scales_pass(node), constants=True, space=space)
            constant = factor.constant
            if constant.any():
                place = np.nonzero(constant)
                new = np.zeros(factor.labels.shape)
                new[place] = self.evaluate(node, operands, [constant_values(factor)[place]])
                labels, scaled = with_constants(result.labels, result.scales, constant, new)
                result = Factor(factor.axes, labels, scaled, result.space)
            factors.append(result)
        return Value(analysis.shape(node), tuple(factors))

    def broadcast(self, analysis: Analysis, node: fx.Node, operands: list[Any]) -> Value:
        shape = analysis.shape(node)
        factors = []
        for axis in range(len(shape)):
            factor = self.along(analysis, node, operands, axis)
            if factor is not None:
                factors.append(factor)
        return Value(shape, tuple(factors))

    def along(
        self, analysis: Analysis, node: fx.Node, operands: list[Any], axis: int
    ) -> Factor | None:
        """The coloring of one axis of the output; records which layouts must agree on it."""
        size = analysis.shape(node)[axis]
        seen: list[Operand] = []
        tied: list[tuple[fx.Node, int]] = []
        discrete = False
        for operand in operands:
            if not is_tensor(operand):
                number = np.full(size, float(operand))
                seen.append(_number(number))
                continue
            shape = analysis.shape(operand)
            own = axis - (len(analysis.shape(node)) - len(shape))
            spread = own >= 0 and shape[own] == size and size > 1
            if analysis.is_constant(operand):
                if spread:
                    tied.append((operand, own))
                seen.append(_of_constant(analysis.constant(operand), own if spread else None, size))
            elif not spread:
                blank = np.full(size, FIRST_FREE, dtype=np.int64)
                seen.append(_plain(blank))
            else:
                factor = analysis.factor(operand, own)
                if factor is None:
                    discrete = True
                    continue
                tied.append((operand, own))
                seen.append(
                    Operand(factor.labels, factor.scales, factor.constant, constant_values(factor))
                )
        values = [ref for ref in tied if not analysis.is_constant(ref[0])]
        if discrete or not values:
            for ref in values:
                analysis.relate(
                    Full(ref, f"{node.target} combines it with a value whose nodes all differ")
                )
            return None
        for ref in tied:
            analysis.relate(Same((node, axis), ref))
        labels, scales = self.combine(node, operands, seen)
        return Factor((axis,), labels, scales, ("along", node.name, axis))

    def combine(
        self, node: fx.Node, operands: list[Any], seen: list[Operand]
    ) -> tuple[Labels, Floats]:
        """Labels and scales of the output nodes from those of the operands."""
        size = len(seen[0].labels)
        known = np.logical_and.reduce([o.constant for o in seen])
        columns: list[Any] = []
        scale = np.ones(size)
        if self.homogeneity == "joint":
            labels, scale = joint_colors(seen, self.unscaled)
            return self.fold(node, operands, seen, known, labels, np.where(known, 1.0, scale))
        if self.homogeneity in ("product", "quotient"):
            zero = np.zeros(size, dtype=bool)
            for place, operand in enumerate(seen):
                size_of = np.where(operand.constant, np.abs(operand.values), operand.scales)
                divides = self.homogeneity == "quotient" and place > 0
                if not divides:
                    zero |= operand.constant & (operand.values == 0.0)
                usable = np.where(size_of == 0.0, 1.0, size_of)
                scale = scale / usable if divides else scale * usable
                columns += [
                    np.where(operand.constant, ONE, operand.labels),
                    np.where(operand.constant, np.sign(operand.values), 0.0),
                ]
            labels = unique_rows(*columns) + FIRST_FREE
            labels, scale = with_constants(labels, scale, zero, np.zeros(size))
            known = known & ~zero
            return self.fold(node, operands, seen, known, labels, scale)
        for operand in seen:
            columns += [operand.labels, np.where(operand.constant, operand.values, operand.scales)]
        labels = unique_rows(*columns) + FIRST_FREE
        return self.fold(node, operands, seen, known, labels, np.ones(size))

    def fold(
        self,
        node: fx.Node,
        operands: list[Any],
        seen: list[Operand],
        known: Mask,
        labels: Labels,
        scales: Floats,
    ) -> tuple[Labels, Floats]:
        """Fold the nodes whose operands are all known numbers."""
        if not known.any():
            return labels, scales
        place = np.flatnonzero(known)
        values = np.zeros(len(labels))
        values[place] = self.evaluate(node, operands, [o.values[place] for o in seen])
        return with_constants(labels, scales, known, values)

    def evaluate(self, node: fx.Node, operands: list[Any], numbers: Sequence[Any]) -> Floats:
        """Run the op itself, in float64, on known numbers."""
        iterator = iter(numbers)
        args = []
        remaining = list(operands)
        for argument in node.args:
            if remaining and argument is remaining[0]:
                remaining.pop(0)
                number = next(iterator)
                args.append(_like(number, argument) if is_tensor(argument) else argument)
            else:
                args.append(argument)
        return np.asarray(node.target(*args, **node.kwargs).to(torch.float64).numpy())  # type: ignore[operator]

    # -- rewrite -----------------------------------------------------------------------------

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        return rewriter.repeat(node, constants=self.reduced_constants(rewriter, node))

    def reduced_constants(
        self, rewriter: Rewriter, node: fx.Node, *, mean: bool = False
    ) -> dict[fx.Node, fx.Node]:
        """Constant operands reduced like the output's axes they are spread along."""
        analysis = rewriter.analysis
        reduced = {}
        rank = len(analysis.shape(node))
        for operand in self.operands(analysis, node):
            if not is_tensor(operand) or not analysis.is_constant(operand):
                continue
            shape = analysis.shape(operand)
            axes = {}
            for own, size in enumerate(shape):
                out = own + rank - len(shape)
                if size == analysis.shape(node)[out] and size > 1:
                    axes[own] = rewriter.rows(node, out) if mean else rewriter.first(node, out)
            reduced[operand] = rewriter.constant(operand, axes)
        return reduced


def joint_colors(seen: list[Operand], unscaled: Sequence[int] = ()) -> tuple[Labels, Floats]:
    """Colors of nodes made jointly of several: equal colors, and equal ratios of the scales."""
    size = len(seen[0].labels)
    base = np.ones(size)
    fixed = np.zeros(size, dtype=bool)
    for place, operand in enumerate(seen):
        if place not in unscaled:
            free = ~operand.constant & ~fixed
            base = np.where(free, operand.scales, base)
            fixed |= free
    columns: list[Any] = []
    for place, operand in enumerate(seen):
        divisor = 1.0 if place in unscaled else base
        ratio = np.where(operand.constant, operand.values, operand.scales) / divisor
        columns += [np.where(operand.constant, ONE, operand.labels), ratio]
    return unique_rows(*columns) + FIRST_FREE, base


def _like(numbers: Any, node: fx.Node) -> torch.Tensor:
    """Known numbers as a tensor: float64, or the node's own dtype where it is no float."""
    dtype = node.meta["val"].dtype
    if node.meta["val"].ndim == 0:
        numbers = numbers.flat[0]  # the same everywhere, and some ops insist on a plain number
    return torch.as_tensor(numbers).to(torch.float64 if dtype.is_floating_point else dtype)


def _number(values: Floats) -> Operand:
    labels, scales = with_constants(
        np.zeros(len(values), np.int64), values, np.ones(len(values), dtype=bool), values
    )
    return Operand(labels, scales, np.ones(len(values), dtype=bool), values)


def _plain(labels: Labels) -> Operand:
    return Operand(
        labels, np.ones(len(labels)), np.zeros(len(labels), dtype=bool), np.zeros(len(labels))
    )


def _of_constant(tensor: torch.Tensor, axis: int | None, size: int) -> Operand:
    """A constant tensor along one of its axes: a number a position where it has no other extent."""
    if tensor.numel() == 1:
        return _number(np.full(size, float(tensor)))
    if axis is None:
        return _plain(np.full(size, FIRST_FREE, dtype=np.int64))
    rows = tensor.movedim(axis, 0).reshape(size, -1)
    if rows.shape[1] == 1:
        return _number(rows[:, 0].to(torch.float64).numpy())
    _, labels = torch.unique(rows, dim=0, return_inverse=True)
    return _plain(labels.numpy().astype(np.int64) + FIRST_FREE)


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

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.unary(self.targets, homogeneous=True)


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

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.unary(self.targets, homogeneous=True)


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
    """A constant operand as one number a position of an axis; None if it is more than that."""
    size = analysis.shape(node)[axis]
    if not is_tensor(operand):
        return np.full(size, float(operand))
    tensor = analysis.constant(operand)
    if tensor.numel() == 1:
        return np.full(size, float(tensor))
    own = axis - (len(analysis.shape(node)) - tensor.ndim)
    if own >= 0 and tensor.shape[own] == size == tensor.numel():
        return tensor.reshape(-1).to(torch.float64).numpy()
    return None


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

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        return rewriter.repeat(node, constants=self.reduced_constants(rewriter, node, mean=True))

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


@register
class Jointly(Elementwise):
    """Ops of several tensors that scale when all of them do: maximum, minimum, where, lerp."""

    targets = overloads("maximum", "minimum", "fmax", "fmin") + (
        torch.ops.aten.max.other,
        torch.ops.aten.min.other,
    )
    homogeneity = "joint"

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return [*examples.binary("maximum"), *examples.overload_cases(self.targets)]


@register
class Where(Elementwise):
    """``where(condition, x, y)``: the condition is no number to be scaled."""

    targets = (
        torch.ops.aten.where.self,
        torch.ops.aten.where.ScalarOther,
        torch.ops.aten.where.ScalarSelf,
    )
    homogeneity = "joint"
    unscaled = (0,)

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return [*examples.binary("where"), *examples.overload_cases(self.targets)]


@register
class Pairwise(Elementwise):
    """Element-wise ops of two operands about which nothing more is assumed."""

    targets = overloads(
        *("pow", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor"),
        *("remainder", "fmod", "atan2", "floor_divide", "hypot", "xlogy", "bitwise_and"),
        *("bitwise_or", "bitwise_xor", "masked_fill", "heaviside", "logaddexp", "copysign"),
    ) + tuple(op for op in overloads("div") if "mode" in op._overloadname)

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return [*examples.binary("pow"), *examples.overload_cases(self.targets)]
