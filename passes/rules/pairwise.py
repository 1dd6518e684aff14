"""Element-wise ops of two or three operands that no affine form goes through."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxfib.passes.rules.base import Flavor, overloads, register
from fxfib.passes.rules.elementwise import Elementwise

if TYPE_CHECKING:
    from fxfib.passes.backward import Adjoint


@register
class Jointly(Elementwise):
    """Ops of several tensors that scale when all of them do: maximum, minimum."""

    targets = (
        *overloads("maximum", "minimum", "fmax", "fmin"),
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

    def flavors(self, adjoint: Adjoint, node: fx.Node, operand: fx.Node) -> tuple[Flavor, ...]:
        return adjoint.flavors(node, node.args[:1])

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


@register
class Threefold(Elementwise):
    """``x + value * y * z``, ``x + value * y / z``, ``x + weight * (y - x)``."""

    targets = overloads("addcmul", "addcdiv", "lerp")

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.threefold()
