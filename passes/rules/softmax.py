"""Softmax and log-softmax: they mix one axis and leave the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import fx

from fxfib.passes.rules.base import PerChannel, overloads, register

if TYPE_CHECKING:
    from fxfib.passes.forward import Analysis


@register
class Softmax(PerChannel):
    """Softmax and its kin along an axis without colors."""

    targets = overloads(
        "softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "logcumsumexp"
    )

    def mixed_axes(self, analysis: Analysis, node: fx.Node) -> tuple[int, ...]:
        return (analysis.arguments(node)["dim"],)

    def linear(self, node: fx.Node) -> bool:
        return "cumsum" in str(node.target)

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.softmax()
