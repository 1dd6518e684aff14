"""What all element-wise ops share: operands broadcast against each other, colors met."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
from fxfib.passes.rules.base import Barrier, Flavor, Mask, Rule, is_tensor

if TYPE_CHECKING:
    from fxfib.passes.backward import Adjoint, Error
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

    # -- backward ----------------------------------------------------------------------------

    def flavors(self, adjoint: Adjoint, node: fx.Node, operand: fx.Node) -> tuple[Flavor, ...]:
        """What the derivative by one operand depends on: all of them, if nothing is known."""
        return adjoint.flavors(node, self.operands(adjoint.analysis, node))

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """Node by node, the operands' activations being the flavors."""
        for place, operand in adjoint.operands(node):
            flavors = self.flavors(adjoint, node, operand)
            found = adjoint.derivative(
                node, error, place, flavors=flavors, broadcast=True, kinked=True
            )
            yield operand, adjoint.sum_to(found, operand)

    @staticmethod
    def slope(node: fx.Node) -> Callable[[Floats], Floats]:
        """The derivative at known numbers of an op of one operand."""

        def slope(numbers: Floats) -> Floats:
            with torch.enable_grad():
                at = torch.from_numpy(numbers).requires_grad_()
                out = node.target(at, *node.args[1:], **node.kwargs)  # type: ignore[operator]
                if not out.requires_grad:
                    return np.zeros(len(numbers))
                (found,) = torch.autograd.grad(out.sum(), at)
            return np.asarray(found.numpy(force=True))

        return slope

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
