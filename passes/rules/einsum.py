"""``einsum`` of two operands: attention written with letters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxfib.coloring import Value
from fxfib.passes.rules.base import Barrier, register
from fxfib.passes.rules.products import Product, ProductRule, color_product

if TYPE_CHECKING:
    from fxfib.passes.forward import Analysis


@register
class Einsum(ProductRule):
    """``einsum("bihd,bjhd->bhij", q, k)``: sums over the letters that the result lacks."""

    targets = (torch.ops.aten.einsum.default,)

    def product(self, analysis: Analysis, node: fx.Node) -> Product:
        bound = analysis.arguments(node)
        operands = list(bound["tensors"])
        if len(operands) != 2:
            raise Barrier("it has not two operands", "write it as products of two")
        inputs, out = letters_of(bound["equation"], [len(analysis.shape(o)) for o in operands])
        if any(len(set(own)) != len(own) for own in (*inputs, out)):
            raise Barrier("it takes a diagonal", "take the diagonal by itself")
        sizes: dict[str, int] = {}
        for operand, own in zip(operands, inputs, strict=True):
            for axis, letter in enumerate(own):
                sizes[letter] = max(sizes.get(letter, 1), analysis.shape(operand)[axis])
        # A letter of size 1 that is larger in the other operand is broadcast.
        seen = [
            tuple(
                letter if analysis.shape(operand)[axis] == sizes[letter] else None
                for axis, letter in enumerate(own)
            )
            for operand, own in zip(operands, inputs, strict=True)
        ]
        return Product(node, operands[0], operands[1], seen[0], seen[1], tuple(out))

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        return color_product(analysis, self.product(analysis, node))

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.attention(("einsum",))


def letters_of(equation: str, ranks: list[int]) -> tuple[list[list[str]], list[str]]:
    """Letters of the operands and of the result; an ellipsis stands for numbered axes.

    Args:
        equation: as ``torch.einsum`` takes it.
        ranks: number of axes of every operand.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    inputs: list[list[str]] = []
    for term, rank in zip(left.split(","), ranks, strict=True):
        before, dots, after = term.partition("...")
        count = rank - len(before) - len(after) if dots else 0
        inputs.append([*before, *(f".{k}" for k in range(-count, 0)), *after])
    dotted = max((own for own in inputs), key=lambda own: sum(len(x) > 1 for x in own))
    ellipsis = [x for x in dotted if len(x) > 1]
    if arrow:
        before, dots, after = right.partition("...")
        return inputs, [*before, *(ellipsis if dots else []), *after]
    every = [x for own in inputs for x in own]
    once = sorted(x for x in set(every) if len(x) == 1 and every.count(x) == 1)
    return inputs, [*ellipsis, *once]
