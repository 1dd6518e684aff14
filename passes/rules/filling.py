"""Tensors as large as another one, filled with one number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx

from fxfib.coloring import FIRST_FREE, Factor, Value, with_constants
from fxfib.passes.relations import Ref, Same
from fxfib.passes.rules.base import Barrier, Mask, Rule, overloads, register

if TYPE_CHECKING:
    from fxfib.passes.backward import Adjoint, Error
    from fxfib.passes.forward import Analysis


@register
class Filling(Rule):
    """``zeros_like``, ``ones_like``, ``full_like``: every node is the same constant."""

    targets = overloads("zeros_like", "ones_like", "full_like")

    def number(self, analysis: Analysis, node: fx.Node) -> float:
        """What the tensor is filled with."""
        if "full" not in str(node.target):
            return float("ones" in str(node.target))
        number = analysis.arguments(node)["fill_value"]
        if not isinstance(number, (int, float)) or not np.isfinite(number):
            raise Barrier("what it fills with is no finite number known beforehand")
        return float(number)

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        number = self.number(analysis, node)
        shape = analysis.shape(node)
        factors = []
        for axis in analysis.factors(source):
            analysis.relate(Same((node, axis), (source, axis)))
            size = shape[axis]
            known = np.ones(size, dtype=bool)
            labels, scales = with_constants(
                np.full(size, FIRST_FREE), np.ones(size), known, np.full(size, number)
            )
            factors.append(Factor((axis,), labels, scales, ("filled", node.name, axis)))
        return Value(shape, tuple(factors))

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """Only the size is read."""
        return ()

    def reads(
        self, analysis: Analysis, node: fx.Node, live: Mapping[Ref, Mask]
    ) -> Iterator[tuple[Ref, Mask]]:
        """Only the size is read."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        for axis in analysis.factors(source):
            yield (source, axis), np.zeros(analysis.shape(source)[axis], dtype=bool)

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.filling()
