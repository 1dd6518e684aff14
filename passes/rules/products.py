"""Products of two values whose heads share one partition: matmul, bmm, einsum.

Every axis of a product is named by a letter, as in ``einsum``.  Colors pass along the axes that an
output has from one operand, and meet along those it has from both.  An axis that both operands have
and the output has not is contracted: one operand's fibers merge, the other operand is summed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx

from fxfib.coloring import FIRST_FREE, ONE, ZERO, Factor, Value, unique_rows
from fxfib.passes.relations import Keep, Ref, Refine, Same
from fxfib.passes.rules.base import Barrier, Mask, Rule
from fxfib.passes.rules.tracing import constant_factor

if TYPE_CHECKING:
    from fxfib.passes.forward import Analysis
    from fxfib.passes.rewrite import Rewriter

REMEDY = "make queries and keys by layers, with nothing between that is not linear in a channel"


@dataclass(frozen=True, eq=False)
class Product:
    """``out[...] = sum left[...] * right[...]`` with a letter for every axis.

    Attributes:
        node: the op.
        left, right: the operands.
        left_letters, right_letters, out_letters: one for every axis; those of broadcast axes of
            size 1 are left out (None).
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_letters: tuple[Any, ...]
    right_letters: tuple[Any, ...]
    out_letters: tuple[Any, ...]

    def refs(self, letter: Any) -> list[Ref]:
        """The axes of the operands with this letter."""
        found: list[Ref] = []
        for operand, letters in ((self.left, self.left_letters), (self.right, self.right_letters)):
            found += [(operand, axis) for axis, own in enumerate(letters) if own == letter]
        return found

    @property
    def contracted(self) -> list[Any]:
        """Letters of both operands that the output lacks."""
        both = [x for x in self.left_letters if x is not None and x in self.right_letters]
        return [letter for letter in both if letter not in self.out_letters]

    @property
    def shared(self) -> list[tuple[int, int]]:
        """Axes of the left and the right operand that are one axis of the output."""
        return [
            (self.left_letters.index(letter), self.right_letters.index(letter))
            for letter in self.out_letters
            if letter in self.left_letters and letter in self.right_letters
        ]


def matrix_product(analysis: Analysis, node: fx.Node, left: fx.Node, right: fx.Node) -> Product:
    """The product of the last two axes, the others broadcast.

    Raises:
        Barrier: an operand is a vector.
    """
    ranks = [len(analysis.shape(side)) for side in (left, right)]
    if min(ranks) < 2:
        raise Barrier("it multiplies a vector", "keep an axis of size 1")
    rank = max(ranks)
    letters = []
    for side, own, last in ((left, ranks[0], ("row", "sum")), (right, ranks[1], ("sum", "column"))):
        shape = analysis.shape(side)
        batch = [
            axis + rank - own if shape[axis] > 1 or analysis.dynamic(side, axis) else None
            for axis in range(own - 2)
        ]
        letters.append((*batch, *last))
    return Product(node, left, right, letters[0], letters[1], (*range(rank - 2), "row", "column"))


def color_product(analysis: Analysis, product: Product) -> Value:
    """Colors of a product, axis by axis, and the layouts that must agree."""
    factors = []
    for axis, letter in enumerate(product.out_letters):
        refs = product.refs(letter)
        factor = pass_axis(analysis, product.node, axis, refs)
        if factor is not None:
            factors.append(factor)
    known = {*product.out_letters, *product.contracted}
    for operand, letters in (
        (product.left, product.left_letters),
        (product.right, product.right_letters),
    ):
        rest = [a for a, letter in enumerate(letters) if letter not in known]
        analysis.full(operand, rest, "it is summed over")
    for letter in product.contracted if analysis.merging else ():
        left, right = product.refs(letter)
        contract(analysis, product.node, left, right, product.shared)
    return Value(analysis.shape(product.node), tuple(factors))


def pass_axis(analysis: Analysis, node: fx.Node, axis: int, refs: Sequence[Ref]) -> Factor | None:
    """The coloring of an axis that the output shares with operands, zeros kept."""
    computed = [not analysis.is_constant(n) for n, _ in refs]
    found = [
        analysis.factor(n, int(a)) if own else constant_factor(analysis.constant(n), int(a), n.name)
        for (n, a), own in zip(refs, computed, strict=True)
    ]
    if not any(computed) or any(factor is None for factor in found):
        for (operand, place), factor in zip(refs, found, strict=True):
            if factor is not None and not analysis.is_constant(operand):
                analysis.full(operand, [int(place)], "it meets a value whose positions all differ")
        return None
    labels = []
    for ref, factor in zip(refs, found, strict=True):
        assert factor is not None
        analysis.relate(Same((node, axis), ref))
        # No constant passes a sum of products.
        own = np.where(factor.labels == ONE, factor.scales, 1.0)
        labels.append(unique_rows(factor.labels, own))
        if len(refs) > 1:
            labels[-1] = factor.keyed()
            analysis.relate(Refine(ref, labels[-1]))
    joint = unique_rows(*labels) + FIRST_FREE
    (first, *_) = [factor for factor in found if factor is not None]
    scales = np.ones(len(joint))
    if len(refs) == 1:
        joint = np.where(first.labels == ZERO, ZERO, joint)
        scales = np.where(first.constant, 1.0, first.scales)
    return Factor((axis,), joint, scales, ("product", node.name, axis))


def contract(
    analysis: Analysis,
    node: fx.Node,
    left: Ref,
    right: Ref,
    shared: Sequence[tuple[int, int]] = (),
) -> bool:
    """Merge channels that are summed over: the fibers of one side, sums on the other.

    Where both sides can be summed, every position of the axes that they share (every head) may
    merge by another side.  Returns whether any merging is possible; if it is not, both sides keep
    their size.
    """
    from fxfib.passes.head_sides import choose_sides
    from fxfib.passes.heads_trace import Unfollowed
    from fxfib.passes.summed import Summed, follow_sum

    best: tuple[int, Ref, Ref, Any, Any] | None = None
    followed: dict[Ref, Summed] = {}
    reason = ""
    if any(
        not analysis.is_constant(n) and analysis.factor(n, int(a)) is None for n, a in (left, right)
    ):
        reason = "the positions of the other side all differ"
    else:
        for kept, other in ((left, right), (right, left)):
            if analysis.is_constant(kept[0]):
                continue
            factor = analysis.factors(kept[0])[int(kept[1])]
            found = Summed()
            if not analysis.is_constant(other[0]):
                try:
                    found = followed[other] = follow_sum(analysis, node, other[0], int(other[1]))
                except Unfollowed as stop:
                    reason = str(stop)
                    continue
            count = len(np.unique(factor.keyed()))
            if best is None or count < best[0]:
                best = (count, kept, other, factor, found)
    if best is None:
        for operand, axis in (left, right):
            analysis.full(operand, [int(axis)], f"it is contracted, and {reason}")
        if any(analysis.value(n).tracked(int(a)) for n, a in (left, right)):
            analysis.refuse(node, f"neither side can be summed: {reason}", REMEDY)
        return False
    count, kept, other, factor, found = best
    labels = factor.keyed()
    read = np.ones(len(labels), dtype=bool)
    if other in followed:
        read = analysis.factors(other[0])[int(other[1])].labels != ZERO
    reads, needed = [(kept, read)], read & (factor.labels != ZERO)
    used, summed = [found], list(found.rows.items())
    if len(followed) == 2:
        way = choose_sides(
            analysis,
            (followed[left], followed[right]),
            (int(left[1]), int(right[1])),
            shared,
        )
        if way is not None and way.classes < count:
            labels, needed = way.labels, way.read
            reads = [(left, needed), (right, needed)]
            used, summed = list(followed.values()), list(way.rows)
    for one in used:
        analysis.heads.free |= one.free
        analysis.relate(*one.relations)
    for ref, rows in summed:
        analysis.heads.sum_rows(ref, rows)
    inner = analysis.inner(node, "contracted", len(labels))
    analysis.heads.read[node] = reads
    analysis.relate(
        Same(inner, kept), Same(inner, other), Refine(inner, labels), Keep(inner, needed)
    )
    return True


class ProductRule(Rule):
    """What all products of two values share."""

    def product(self, analysis: Analysis, node: fx.Node) -> Product:
        """Operands and letters.

        Raises:
            Barrier: this is no product of two operands.
        """
        raise NotImplementedError

    def reads(
        self, analysis: Analysis, node: fx.Node, live: Mapping[Ref, Mask]
    ) -> Iterator[tuple[Ref, Mask]]:
        yield from analysis.heads.read.get(node, ())

    def constants(self, rewriter: Rewriter, node: fx.Node, product: Product) -> dict[Any, Any]:
        """Parameters among the operands, on the layouts of what they meet."""
        changed = {}
        for operand, letters in (
            (product.left, product.left_letters),
            (product.right, product.right_letters),
        ):
            if not rewriter.analysis.is_constant(operand):
                continue
            axes = {}
            for axis, letter in enumerate(letters):
                if letter in product.out_letters:
                    axes[axis] = rewriter.first(node, product.out_letters.index(letter))
                for other, own in product.refs(letter):
                    if letter in product.contracted and other is not operand:
                        axes[axis] = rewriter.columns(other, own)
            changed[operand] = rewriter.constant(operand, axes)
        return changed

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        product = self.product(rewriter.analysis, node)
        return rewriter.repeat(node, constants=self.constants(rewriter, node, product))
