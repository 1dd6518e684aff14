"""Indices that are tensors: elements are taken from computed places, channels stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxfib.coloring import Factor, Value
from fxfib.passes.relations import Ref, Refine, Same
from fxfib.passes.rules.base import Barrier, Mask, Rule, overloads, register, tied_inputs

if TYPE_CHECKING:
    from fxfib.passes.forward import Analysis


@register
class Index(Rule):
    """``x[i, :, j]``: indexed axes keep their size, those between keep their colors."""

    targets = tuple(op for op in overloads("index") if op is torch.ops.aten.index.Tensor)

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        bound = analysis.arguments(node)
        source, indices = bound["self"], list(bound["indices"])
        if analysis.is_constant(source):
            raise Barrier("it looks up a constant", "look it up with an embedding")
        given = {axis: index for axis, index in enumerate(indices) if index is not None}
        if any(not isinstance(i, fx.Node) or _is_mask(i) for i in given.values()):
            raise Barrier("it takes what a mask says", "take positions instead")
        analysis.full(source, given, "it is indexed by a computed index")
        for index in given.values():
            if not analysis.is_constant(index):
                analysis.full(index, None, "it is an index")
        value = analysis.color(source)
        factors = []
        for own, out in kept_axes(analysis, node, source, given).items():
            factor = analysis.factor(source, own)
            if factor is None:
                continue
            analysis.relate(Same((node, out), (source, own)))
            joint = value.factor(own)
            assert joint is not None
            if len(joint.axes) > 1:
                # Only what holds for the axis by itself, wherever the others are indexed.
                analysis.relate(Refine((source, own), factor.keyed()))
            space = ("indexed", node.name, factor.space)
            factors.append(Factor((out,), factor.labels, factor.scales, space))
        return Value(analysis.shape(node), tuple(factors))

    def reads(
        self, analysis: Analysis, node: fx.Node, live: Mapping[Ref, Mask]
    ) -> Iterator[tuple[Ref, Mask]]:
        """Channels are read where the result's are; of indices and indexed axes, everything."""
        own = {axis: mask for (value, axis), mask in live.items() if value is node}
        yield from tied_inputs(analysis, node, own)  # type: ignore[arg-type]

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.indexing()


def _is_mask(index: fx.Node) -> bool:
    return index.meta["val"].dtype in (torch.bool, torch.uint8)


def kept_axes(
    analysis: Analysis, node: fx.Node, source: fx.Node, given: Iterable[int]
) -> dict[int, int]:
    """Where the axes that are not indexed lie in the result.

    The index's own axes stand where the indexed axes stood if those are neighbours, else in front.
    """
    taken = sorted(given)
    rank = len(analysis.shape(source))
    own = len(analysis.shape(node)) - (rank - len(taken))
    adjacent = taken == list(range(taken[0], taken[-1] + 1))
    start = taken[0] if adjacent else 0
    rest = [axis for axis in range(rank) if axis not in taken]
    return {axis: place if place < start else place + own for place, axis in enumerate(rest)}
