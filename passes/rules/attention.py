"""Products of two values, head by head: attention, fused or written out.

In ``q k^T`` a sum runs over the channels of a head.  Where queries of a head are a fiber, their
keys are summed instead of kept, so the contraction gets shorter (and the other way round); channels
of values pass through the average over positions, into the columns of the layer behind.  Every head
has its own partition, and all heads of one op the same size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from fxfib.coloring import FIRST_FREE, ZERO, Factor, Value, unique_rows
from fxfib.passes.relations import Keep, Ref, Refine
from fxfib.passes.rules.base import Mask, find_rule, overloads, register
from fxfib.passes.rules.derivative import OPAQUE
from fxfib.passes.rules.product import (
    ATTENTION_BACK,
    attention_value,
    product_back,
    product_value,
)
from fxfib.passes.rules.products import (
    REMEDY,
    Product,
    ProductRule,
    color_product,
    contract,
    matrix_product,
    pass_axis,
)
from fxfib.signature import color_form

if TYPE_CHECKING:
    from fxfib.passes.backward import Adjoint, Error
    from fxfib.passes.forward import Analysis
    from fxfib.passes.rewrite import Rewriter

aten = torch.ops.aten

FUSED = set(overloads("scaled_dot_product_attention"))
SIDES: dict[Any, tuple[str, str]] = {
    aten.matmul.default: ("self", "other"),
    aten.bmm.default: ("self", "mat2"),
    aten.baddbmm.default: ("batch1", "batch2"),
}


def sides(analysis: Analysis, core: fx.Node) -> tuple[Any, Any, Any]:
    """Query, key and value of a fused op; of a plain product its sides, the second one twice."""
    bound = analysis.arguments(core)
    if core.target in FUSED:
        return bound["query"], bound["key"], bound["value"]
    left, right = (bound[name] for name in SIDES[core.target])
    return left, right, right


def color_root(analysis: Analysis, node: fx.Node) -> None:
    """Color the outputs of a layer that makes heads, while its rows are at hand."""
    heads = analysis.heads
    axis = heads.roots[node]
    value = analysis.value(node)
    form = value.form
    analysis.relate(*heads.relations.get(node, ()))
    factor = analysis.color(node).factor(axis)
    assert factor is not None and len(factor.axes) == 1
    heads.colors[node] = factor
    rest = [a for a in value.tracked_axes if a != axis]
    analysis.full(node, rest, "heads are cut from it, and these axes are not followed")
    size = len(factor.labels)
    if any(c.right.root is node and c.softmax for c in heads.contractions.values()):
        # What is added to all keys is added to all scores of a query: softmax does not see it.
        zero = np.zeros(size)
        bare = replace(form, offset=zero, offset_bound=zero)
        heads.unshifted[node] = color_form(
            bare, size, analysis.eps, analysis.criterion, analysis.roundoff
        )


def multiply_values(analysis: Analysis, node: fx.Node) -> Value:
    """Forward of a product of two values.

    Raises:
        Barrier: its operands are vectors, or nothing is known of them.
    """
    if not analysis.merging:
        if node.target in FUSED:
            return attention_value(analysis, node)
        a, b = [s for s in node.args if isinstance(s, fx.Node)][-2:]
        return product_value(analysis, node, a, b)
    heads = analysis.heads
    contraction, passage = heads.contractions.get(node), heads.passages.get(node)
    fused = node.target in FUSED
    analysis.relate(*heads.relations.get(node, ()))
    if contraction is None and passage is None and not fused:
        return color_product(analysis, find_rule(node).product(analysis, node))  # type: ignore[union-attr]
    roles = [role for role in (contraction, passage) if role is not None]
    followed = {operand.node for role in roles for operand in role.operands}
    handled: set[Ref] = set()
    factors: list[Factor] = []
    if contraction is not None:
        _contract(analysis, contraction)
    elif fused:
        query, key, value = sides(analysis, node)
        left, right = (query, len(analysis.shape(query)) - 1), (key, len(analysis.shape(key)) - 1)
        batch = [len(analysis.shape(side)) - 2 for side in (query, key)]
        shared = [(batch[0] - k, batch[1] - k) for k in range(1, min(batch) + 1)]
        contract(analysis, node, left, right, shared)
        handled |= {left, right}
    if passage is not None:
        _pass(analysis, passage)
    elif fused:
        value = sides(analysis, node)[2]
        last = len(analysis.shape(value)) - 1
        factor = pass_axis(analysis, node, len(analysis.shape(node)) - 1, [(value, last)])
        factors += [factor] if factor is not None else []
        handled.add((value, last))
    if fused and not roles:
        for axis in range(len(analysis.shape(node)) - 2):
            refs = meeting(analysis, node, axis)
            factor = pass_axis(analysis, node, axis, refs) if refs else None
            factors += [factor] if factor is not None else []
            handled |= set(refs)
    for source in node.all_input_nodes:
        if source not in followed and not analysis.is_constant(source):
            rest = [a for a in analysis.value(source).tracked_axes if (source, a) not in handled]
            analysis.full(source, rest, "heads and positions of an attention stay")
    if fused and passage is None:
        return Value(analysis.shape(node), tuple(factors))
    return flat_value(analysis, node)


def meeting(analysis: Analysis, node: fx.Node, axis: int) -> list[tuple[fx.Node, int]]:
    """The axes of the operands that meet on a batch axis of a fused op; none if it must stay.

    Heads merge whole where queries, keys, values and masks of two heads are equal.
    """
    rank = len(analysis.shape(node))
    bound = analysis.arguments(node)
    refs: list[tuple[fx.Node, int]] = []
    for operand in (*sides(analysis, node), bound["attn_mask"]):
        if operand is None:
            continue
        own = axis - rank + len(analysis.shape(operand))
        if own < 0 or (analysis.shape(operand)[own] == 1 and not analysis.dynamic(operand, own)):
            continue
        if analysis.shape(operand)[own] != analysis.shape(node)[axis]:
            return []
        refs.append((operand, own))
    return refs


def _contract(analysis: Analysis, contraction: Any) -> None:
    """Per head, merge by the side with fewer fibers and sum what the other side has there."""
    from fxfib.passes.heads import SummedRows

    heads = analysis.heads
    left_root, right_root = contraction.left.root, contraction.right.root
    left = heads.colors[left_root]
    right = heads.unshifted[right_root] if contraction.softmax else heads.colors[right_root]
    left_keyed, right_keyed = left.keyed(), right.keyed()
    summed = {
        root: np.zeros(len(heads.colors[root].labels), dtype=bool)
        for root in (left_root, right_root)
    }
    for ref, (key, queries) in zip(contraction.refs(), contraction.pairs, strict=True):
        by_left = unique_rows(*(left_keyed[row] for row in queries))
        by_right = right_keyed[key]
        nothing = (right.labels[key] == ZERO) | (left.labels[queries] == ZERO).all(0)
        fewer = len(np.unique(by_right[~nothing])) < len(np.unique(by_left[~nothing]))
        analysis.relate(Refine(ref, by_right if fewer else by_left), Keep(ref, ~nothing))
        if fewer:
            summed[left_root][queries] = True
        else:
            summed[right_root][key] = True
    for root, mask in summed.items():
        rows = SummedRows(mask, np.ones(len(mask)), np.arange(len(mask)))
        heads.sum_rows((root, heads.roots[root]), rows)


def _separate(factor: Factor) -> Any:
    """Labels that tell constants of different values apart (no constant passes an average)."""
    return unique_rows(factor.labels, np.where(factor.labels < FIRST_FREE, factor.scales, 1.0))


def _pass(analysis: Analysis, passage: Any) -> None:
    """Equal channels of a head stay equal; zeros stay zeros."""
    factor = analysis.heads.colors[passage.value.root]
    labels = _separate(factor)
    for ref, row in zip(passage.refs(), passage.rows, strict=True):
        analysis.relate(Refine(ref, labels[row]), Keep(ref, factor.labels[row] != ZERO))


def flat_value(analysis: Analysis, node: fx.Node) -> Value:
    """What is known of a node that heads come through: colors where they lie end to end."""
    passage = analysis.heads.flats.get(node)
    shape = analysis.shape(node)
    if passage is None:
        return Value(shape)
    factor = analysis.heads.colors[passage.value.root]
    rows = passage.rows[passage.blocks]
    # Blocks that share a head of values differ in the scores they average by.
    block = np.repeat(np.arange(len(rows)), rows.shape[1])
    channels = rows.reshape(-1)
    labels = unique_rows(_separate(factor)[channels], block) + FIRST_FREE
    labels = np.where(factor.labels[channels] == ZERO, ZERO, labels)
    scales = np.where(factor.constant, 1.0, factor.scales)[channels]
    space = ("heads", passage.core.name, factor.space)
    return Value(shape, (Factor((passage.flat_axis,), labels, scales, space),))


@register
class Attention(ProductRule):
    """``softmax(q k^T * scale + mask) v``: the scale stays that of the original head size."""

    targets = overloads("scaled_dot_product_attention")

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        return multiply_values(analysis, node)

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """Queries get what lies on their keys, keys on their queries, values on the output."""
        for place, operand in adjoint.operands(node):
            if place in (0, 1, 2):
                yield operand, adjoint.derivative(node, error, place, rule=ATTENTION_BACK)
            else:
                reason = "it is the mask of an attention"
                yield (
                    operand,
                    adjoint.derivative(
                        node, error, place, rule=OPAQUE, reason=reason, remedy=REMEDY
                    ),
                )

    def reads(
        self, analysis: Analysis, node: fx.Node, live: Mapping[Ref, Mask]
    ) -> Iterator[tuple[Ref, Mask]]:
        yield from super().reads(analysis, node, live)
        value, last = analysis.arguments(node)["value"], len(analysis.shape(node)) - 1
        if analysis.value(node).tracked(last):
            out = live.get((node, last), np.zeros(analysis.shape(node)[last], dtype=bool))
            yield (value, len(analysis.shape(value)) - 1), out

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        analysis = rewriter.analysis
        bound = analysis.arguments(node)
        query = bound["query"]
        last = len(analysis.shape(query)) - 1
        changed: dict[str, Any] = {}
        if bound["scale"] is None and rewriter.size(query, last) != analysis.shape(query)[last]:
            changed["scale"] = analysis.shape(query)[last] ** -0.5
        mask = bound["attn_mask"]
        constants = {}
        if mask is not None and analysis.is_constant(mask):
            rank = len(analysis.shape(node))
            axes = {
                own: rewriter.first(node, axis)
                for axis in range(rank - 2)
                for operand, own in meeting(analysis, node, axis)
                if operand is mask
            }
            constants[mask] = rewriter.constant(mask, axes)
        return rewriter.repeat(node, constants=constants, changed=changed)

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.attention(("fused", "rotary", "normed"))


@register
class BatchedProduct(ProductRule):
    """``bmm`` and ``baddbmm``: attention written out."""

    targets = (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default)

    def product(self, analysis: Analysis, node: fx.Node) -> Product:
        left, right, _ = sides(analysis, node)
        return matrix_product(analysis, node, left, right)

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        value = multiply_values(analysis, node)
        # What baddbmm adds has rows of its own, and they are not compared.
        return Value(value.shape) if "baddbmm" in str(node.target) else value

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """Products of the same kind."""
        bound = adjoint.analysis.arguments(node)
        if "batch1" in bound:
            beta, alpha = bound["beta"], bound["alpha"]
            if adjoint.wants(bound["self"]):
                found = error if beta == 1 else adjoint.call(aten.mul.Tensor, error, beta)
                yield bound["self"], adjoint.sum_to(found, bound["self"])
            error = error if alpha == 1 else adjoint.call(aten.mul.Tensor, error, alpha)
            yield from product_back(adjoint, error, bound["batch1"], bound["batch2"])
        else:
            yield from product_back(adjoint, error, bound["self"], bound["mat2"])

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.attention(("bmm", "baddbmm"))
