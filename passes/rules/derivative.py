"""Errors behind one op: what a vector-Jacobian product does to colors (Eq. 2 and Eq. 5).

The error of an op's input is linear in the error of its output.  For the ops here it is, node by
node, one linear map whose coefficients depend on the activation of that same node: nodes stay equal
where their errors are equal *and* their activations are.  The color of the activation is the
*flavor*, and it enters a pending form as one more thing that must match, so columns are compared
within a flavor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from fxfib.coloring import (
    FIRST_FREE,
    ONE,
    ZERO,
    Factor,
    Floats,
    Labels,
    Value,
    constant_values,
    renumbered,
    unique_rows,
)
from fxfib.passes.rules.base import Barrier, Flavor, Rule, is_tensor
from fxfib.passes.rules.tracing import constant_factor, grid_factor, strides_of
from fxfib.signature import Form, dense_bound

if TYPE_CHECKING:
    from fxfib.passes.forward import Analysis


@dataclass(frozen=True, eq=False)
class Derivative:
    """A call target: the error of one operand of a function.

    Called with the error of the output and the operands, it returns the gradient of
    ``sum(error * function(*operands))`` by ``operands[place]``, as autograd does.

    Attributes:
        function: of the operands.
        place: the operand.
        name: of the op, for reports.
        rule: how colors pass.
        flavors: what the coefficients depend on, node by node.
        labels: for an axis, further numbers that must agree.
        mixed: axes along which it is not node by node.
        spread: axes that the function reduced: the error is the same all along.
        common: axes along which one number, the same for all nodes, is added.
        broadcast: the operand is first spread to the shape of the output.
        slope: the derivative where the flavor is a known number (float64 to float64).
        kinked: it may have another slope on either side of zero.
        trace: as ``function``, for integers (-1: nothing) in a movement.
        reason, remedy: why nothing is known of the result.
        items: the function has several outputs, and a list of errors comes of these.
        context: what else the rule wants to know.
    """

    function: Callable[..., Any]
    place: int
    name: str
    rule: Rule
    flavors: tuple[Flavor, ...] = ()
    labels: Mapping[int, Labels] = field(default_factory=dict)
    mixed: tuple[int, ...] = ()
    spread: tuple[int, ...] = ()
    common: tuple[int, ...] = ()
    broadcast: bool = False
    slope: Callable[[Floats], Floats] | None = None
    kinked: bool = False
    trace: Callable[..., Any] | None = None
    reason: str = ""
    remedy: str = ""
    items: tuple[int, ...] = ()
    context: Any = None

    @property
    def __name__(self) -> str:
        return f"derivative of {self.name}"

    def __call__(self, error: Any, *operands: Any) -> torch.Tensor:
        given = [o.detach() if isinstance(o, torch.Tensor) else o for o in operands]
        if self.broadcast:
            given[self.place] = given[self.place].expand(error.shape)
        with torch.enable_grad():
            leaf = given[self.place].clone().requires_grad_()
            given[self.place] = leaf
            output = self.function(*given)
            outputs = [output[k] for k in self.items] if self.items else [output]
            errors = list(error) if self.items else [error]
            if not any(out.requires_grad for out in outputs):
                return torch.zeros_like(leaf)
            (gradient,) = torch.autograd.grad(outputs, leaf, errors, allow_unused=True)
        return torch.zeros_like(leaf) if gradient is None else gradient.detach()


class Flavored(Rule):
    """Node by node: equal errors and equal flavors make equal errors."""

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        derivative, (error, *operands) = node.target, node.args
        assert isinstance(derivative, Derivative) and isinstance(error, fx.Node)
        value = analysis.value(error)
        shape = analysis.shape(node)
        pending = value.form if isinstance(value.form, Form) and not value.factors else None
        factors: list[Factor] = []
        form: Form | None = None
        for axis in range(len(shape)):
            if axis in derivative.mixed or not shape[axis]:
                continue
            flavors = flavors_along(analysis, node, axis)
            if flavors is None:
                continue
            labels, known = flavors
            if pending is not None and pending.axis == axis:
                form = flavored_form(pending, labels, known, analysis.roundoff)
                form = shared(form) if axis in derivative.common else form
                continue
            if axis in derivative.spread:
                if analysis.value(operands[derivative.place]).tracked(axis):  # type: ignore[arg-type]
                    factors.append(one_color(node, axis, labels))
                continue
            factor = analysis.factor(error, axis)
            if factor is not None:
                if axis in derivative.common:
                    factor = unscaled(factor, slack(analysis))
                factors.append(flavored_factor(factor, labels, known, axis))
        return Value(shape, tuple(factors), form)


class Opaque(Rule):
    """Nothing is known of the error behind an op without a backward rule."""

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        assert isinstance(node.target, Derivative)
        raise Barrier(node.target.reason, node.target.remedy)


class MovedBack(Rule):
    """Errors of elements that were moved go back where these came from; none came: zero."""

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        derivative, (error, *_operands) = node.target, node.args
        assert isinstance(derivative, Derivative) and isinstance(error, fx.Node)
        value = analysis.color(error)
        if not value.factors:
            return Value(analysis.shape(node))
        inverse = self.inverse(analysis, node)
        dynamic = {a for a in range(value.ndim) if analysis.dynamic(error, a)}
        groups = tuple(f.axes for f in value.factors)
        factors = []
        for ins, outs, index, pattern in scatter_blocks(value.shape, inverse, groups, dynamic):
            factor = grid_factor(value, ins)
            assert factor is not None
            missing = index < 0
            labels = np.where(missing, ZERO, factor.labels.reshape(-1)[index])
            scales = np.where(missing, 1.0, factor.scales.reshape(-1)[index])
            space = renumbered(("moved back", factor.space))
            if np.any(pattern != pattern.flat[0]):
                zero = labels == ZERO
                labels = np.where(zero, ZERO, unique_rows(labels, pattern) + FIRST_FREE)
            if outs:
                factors.append(Factor(outs, labels, scales, space))
        return Value(analysis.shape(node), tuple(factors))

    def inverse(self, analysis: Analysis, node: fx.Node) -> Labels:
        """For every element of the operand, where in the error it went; -1: nowhere."""
        derivative, operands = node.target, node.args[1:]
        assert isinstance(derivative, Derivative)
        shape = analysis.shape(operands[derivative.place])  # type: ignore[arg-type]
        size = int(np.prod(shape))
        given: list[Any] = []
        for place, operand in enumerate(operands):
            if place == derivative.place:
                given.append(torch.arange(size).reshape(shape))
            elif not isinstance(operand, fx.Node):
                given.append(operand)
            elif not is_tensor(operand):
                value = operand.meta["val"]
                given.append(value if isinstance(value, int) else int(value.node.hint))
            elif operand.meta["val"].dtype.is_floating_point:
                given.append(torch.full(analysis.shape(operand), -1))
            elif analysis.is_constant(operand):
                given.append(analysis.constant(operand))
            else:
                raise Barrier("where it moves elements is computed")
        moved = (derivative.trace or derivative.function)(*given).numpy().reshape(-1)
        found = np.flatnonzero(moved >= 0)
        inverse = np.full(size, -1, dtype=np.int64)
        inverse[moved[found]] = found
        if len(np.unique(moved[found])) < len(found):
            raise Barrier("an element goes to several places")
        return inverse.reshape(shape)


FLAVORED, OPAQUE, MOVED_BACK = Flavored(), Opaque(), MovedBack()


def flavors_along(
    analysis: Analysis, node: fx.Node, axis: int
) -> tuple[Labels | None, Floats | None] | None:
    """What must match along one axis, and the derivative where it is a known number (else NaN).

    None where nodes all differ in what the derivative reads.
    """
    derivative, operands = node.target, node.args[1:]
    assert isinstance(derivative, Derivative)
    rank, size = len(analysis.shape(node)), analysis.shape(node)[axis]
    columns: list[Any] = []
    known: Floats | None = None
    if axis in derivative.labels:
        columns.append(derivative.labels[axis])
    for flavor in derivative.flavors:
        operand = operands[flavor.operand]
        if not is_tensor(operand):
            continue
        shape = analysis.shape(operand)  # type: ignore[arg-type]
        own = axis - (rank - len(shape))
        if own < 0 or shape[own] == 1:
            continue  # every node sees the same
        if shape[own] != size:
            return None
        if analysis.is_constant(operand):  # type: ignore[arg-type]
            tensor = analysis.constant(operand)  # type: ignore[arg-type]
            factor: Factor | None = constant_factor(tensor, own, str(operand))
        else:
            factor = analysis.factor(operand, own)  # type: ignore[arg-type]
        if factor is None:
            return None
        number = constant_values(factor)
        at_kink = factor.constant & ~smooth(derivative, number, flavor)
        if derivative.slope is not None:
            usable = factor.constant & ~at_kink
            known = np.where(usable, derivative.slope(number), np.nan)
        labels = np.where(factor.constant, ONE, factor.labels)
        # On which side of a kink a constant lies is decided by its rounding.
        labels = np.where(at_kink, np.arange(size) + factor.labels.max(initial=0) + 1, labels)
        if flavor.direction:
            scales = np.where(factor.constant, np.sign(number), 1.0)
            columns += [labels, scales]
        else:
            columns += [labels, equal_nodes(factor, slack(analysis))]
    joint = unique_rows(*columns) if columns else None
    if joint is not None and known is not None:
        joint = np.where(np.isnan(known), joint + 1, 0)
    return joint, known


def slack(analysis: Analysis) -> float:
    """How far two factors may be apart, relatively, and still be called equal."""
    return 256 * analysis.roundoff + analysis.eps


def equal_nodes(factor: Factor, tolerance: float) -> Labels:
    """Labels of nodes that are equal, not merely proportional; factors are equal but for rounding.

    Factors of one color are sorted; each class reaches ``1 + tolerance`` above its smallest.
    """
    labels, scales = factor.labels.reshape(-1), factor.scales.reshape(-1)
    if np.all(scales == 1.0):
        return unique_rows(factor.labels)
    order = np.lexsort((scales, labels))
    found = np.zeros(len(labels), dtype=np.int64)
    number, first = -1, 0
    for place, node in enumerate(order):
        lead = order[first]
        reach = np.abs(scales[lead]) * tolerance
        if not place or labels[node] != labels[lead] or scales[node] - scales[lead] > reach:
            number, first = number + 1, place
        found[node] = number
    return unique_rows(found.reshape(factor.labels.shape))


def smooth(derivative: Derivative, numbers: Floats, flavor: Flavor) -> npt.NDArray[np.bool_]:
    """Where a number is no kink of the function: its slope is the same on both sides."""
    if derivative.slope is None:
        return (numbers != 0.0) | (not derivative.kinked and not flavor.direction)
    step = 1e-9 * np.maximum(np.abs(numbers), 1.0)
    before, after = derivative.slope(numbers - step), derivative.slope(numbers + step)
    return np.isclose(before, after, rtol=1e-6, atol=1e-6)


def flavored_form(form: Form, labels: Labels | None, known: Floats | None, roundoff: float) -> Form:
    """A pending form times the derivative: rows compare within a flavor."""
    if labels is None:
        return form
    if known is not None and not np.isnan(known).all():
        form = form.scaled(np.where(np.isnan(known), 1.0, known), roundoff)
    match = labels if form.must_match is None else unique_rows(form.must_match, labels)
    return replace(form, must_match=match)


def unscaled(factor: Factor, tolerance: float) -> Factor:
    """Nodes to all of which one number is added: only equal ones stay alike, and none is zero."""
    labels = equal_nodes(factor, tolerance) + FIRST_FREE
    return Factor(factor.axes, labels, np.ones(labels.shape), renumbered(factor.space))


def flavored_factor(
    factor: Factor, labels: Labels | None, known: Floats | None, axis: int
) -> Factor:
    """Colors of errors met with the flavors."""
    scales, zero = factor.scales, factor.labels == ZERO
    columns: list[Any] = [factor.labels]
    if labels is not None:
        columns.append(labels)
    if known is not None:
        slope = np.where(np.isnan(known), 1.0, known)
        zero = zero | (slope == 0.0)
        columns.append(np.sign(slope))
        scales = scales * np.where(slope == 0.0, 1.0, np.abs(slope))
    fresh = np.where(zero, ZERO, unique_rows(*columns) + FIRST_FREE)
    return Factor((axis,), fresh, np.where(zero, 1.0, scales), renumbered(factor.space))


def shared(form: Form) -> Form:
    """The form with one number added to all nodes: none of them is zero or a multiple now."""
    ones = torch.ones(len(form.rows), 1, dtype=torch.float64)
    bound, relative = form.rows_bound, form.relative
    if bound is not None:
        bound = torch.cat([dense_bound(form), torch.zeros(len(form.rows), 1)], 1)
    if relative is not None:
        relative = np.r_[relative, 0.0]
    return replace(
        form,
        rows=torch.cat([form.rows.to(torch.float64), ones], 1),
        rows_bound=bound,
        relative=relative,
        space=("shared", form.space),
    )


def one_color(node: fx.Node, axis: int, labels: Labels | None) -> Factor:
    """All nodes get the same error, as far as their flavors agree."""
    size = int(node.meta["val"].shape[axis])
    found = np.zeros(size, np.int64) if labels is None else unique_rows(labels)
    return Factor((axis,), found + FIRST_FREE, np.ones(size), ("spread", node.name, axis))


Scattered = tuple[tuple[int, ...], tuple[int, ...], Labels, Labels]


def scatter_blocks(
    shape: tuple[int, ...], moved: Labels, groups: tuple[tuple[int, ...], ...], dynamic: set[int]
) -> list[Scattered]:
    """As :func:`fxfib.passes.rules.tracing.trace_blocks`, with places that get nothing.

    Args:
        shape: sizes of the error.
        moved: for each element of the result, the linear number of the element in it, or -1.

    Returns:
        Axes of the error, of the result, for each place the element (-1: zero all along), and a
        number for the pattern of empty places in its slice.
    """
    if moved.size == 0:
        return []
    empty = moved < 0
    strides = strides_of(shape)
    coordinate = {a: (moved // strides[a]) % max(shape[a], 1) for a in range(len(shape))}
    big = np.iinfo(np.int64).max

    def varies(axis: int, out: int) -> bool:
        if shape[axis] <= 1:
            return False
        most = np.where(empty, -1, coordinate[axis]).max(axis=out)
        least = np.where(empty, big, coordinate[axis]).min(axis=out)
        return bool(np.any((most > least) & (most >= 0)))

    together = {axis: set(group) for group in groups for axis in group}
    found: list[Scattered] = []
    done: set[int] = set()
    for seed in list(together):
        if seed in done:
            continue
        ins: set[int] = set(together[seed])
        outs: set[int] = set()
        while True:
            grown = {d for a in ins for d in range(moved.ndim) if varies(a, d)}
            more = {
                a for a in range(len(shape)) if a not in ins and any(varies(a, d) for d in grown)
            }
            more |= {b for a in more for b in together.get(a, ())} - ins
            if not more and grown == outs:
                break
            outs, ins = grown, ins | more
        if ins & dynamic:
            raise Barrier("it mixes channels with the batch", "keep channels on their own axis")
        done |= ins
        in_axes, out_axes = tuple(sorted(ins)), tuple(sorted(outs))
        number = np.zeros(moved.shape, dtype=np.int64)
        for axis in in_axes:
            number = number * shape[axis] + coordinate[axis]
        number = np.where(empty, -1, number)
        rest = tuple(d for d in range(moved.ndim) if d not in outs)
        index = number.max(axis=rest) if rest else number
        spread = np.expand_dims(index, rest) if rest else index
        if np.any((number != spread) & ~empty):
            raise Barrier("it does not move whole channels")
        holes = np.moveaxis(empty, out_axes, tuple(range(len(out_axes))))
        rows = holes.reshape(int(np.prod(index.shape)), -1)
        _, pattern = np.unique(rows, axis=0, return_inverse=True)
        found.append((in_axes, out_axes, index, pattern.reshape(index.shape).astype(np.int64)))
    return found
