"""Pooling and resizing: every channel by itself, along axes without colors."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import fx

from fxfib.coloring import Value
from fxfib.passes.rules.base import Barrier, PerChannel, overloads, register

if TYPE_CHECKING:
    from fxfib.passes.forward import Analysis


class Spatial(PerChannel):
    """Works along the last ``dimensions`` axes."""

    homogeneous = True

    def dimensions(self, node: fx.Node) -> int:
        name = str(node.target)
        return next(d for d in (3, 2, 1) if f"{d}d" in name)

    def mixed_axes(self, analysis: Analysis, node: fx.Node) -> tuple[int, ...]:
        return tuple(range(-self.dimensions(node), 0))

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.pooling()


@register
class MaxPool(Spatial):
    """Max pooling: padding never wins, so constants stay."""

    targets = overloads("max_pool1d", "max_pool2d", "max_pool3d")

    def keeps_constants(self, analysis: Analysis, node: fx.Node) -> bool:
        return True


@register
class AveragePool(Spatial):
    """Average pooling: constants stay where padding does not count."""

    targets = overloads(
        *("avg_pool1d", "avg_pool2d", "avg_pool3d"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
        *("_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
    )

    def linear(self, node: fx.Node) -> bool:
        return True

    def keeps_constants(self, analysis: Analysis, node: fx.Node) -> bool:
        bound = analysis.arguments(node)
        if "padding" not in bound:
            return True
        padding = bound["padding"]
        pads = padding if isinstance(padding, (list, tuple)) else [padding]
        counted = bound["count_include_pad"] and any(pads)
        return not counted and bound.get("divisor_override") is None


@register
class MaxPoolWithIndices(Spatial):
    """Max pooling that also returns positions; the values are followed, the positions are not."""

    targets = overloads(
        *("max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool1d_with_indices"),
        *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    )

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        if {user.args[1] for user in node.users if user.target is operator.getitem} != {0}:
            raise Barrier("the positions of the maxima are used", "use the values only")
        analysis.color(self.source(node))  # its rows may be gone when the items are visited
        return Value((), parts=(Value(()),))

    def keeps_constants(self, analysis: Analysis, node: fx.Node) -> bool:
        return True

    def part(self, analysis: Analysis, node: fx.Node, number: int, out: fx.Node) -> Value:
        """The value of the maxima, for the item that takes them."""
        return self.colored(analysis, node, out)


@register
class Resize(Spatial):
    """Interpolation: weights sum to one, so constants stay."""

    targets = overloads(
        *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
        *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"),
        *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
        *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "upsample_bicubic2d"),
    )

    def linear(self, node: fx.Node) -> bool:
        return True

    def dimensions(self, node: fx.Node) -> int:
        name = str(node.target)
        return 3 if "3d" in name else 2 if "2d" in name else 1

    def keeps_constants(self, analysis: Analysis, node: fx.Node) -> bool:
        return True


@register
class BorderPad(Spatial):
    """Padding by reflection or repetition of the border."""

    targets = overloads(
        *("reflection_pad1d", "reflection_pad2d", "reflection_pad3d"),
        *("replication_pad1d", "replication_pad2d", "replication_pad3d"),
    )

    def linear(self, node: fx.Node) -> bool:
        return True

    def keeps_constants(self, analysis: Analysis, node: fx.Node) -> bool:
        return True
