"""Colors through products of two values, for analyses that merge nothing: no heads are looked for.

In ``c = a b`` the column ``n`` of ``c`` is a combination of rows of ``a`` with the column ``n`` of
``b`` as coefficients: columns of ``c`` are equal where those of ``b`` are, within one matrix of a
batch (one head).  Errors are products of the same kind, ``e b^T`` and ``a^T e``; through attention
the error of a query's channel is a combination of its key's channel, and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from fxfib.coloring import FIRST_FREE, ZERO, Factor, Labels, Value, renumbered, unique_rows
from fxfib.passes.rules.base import Barrier, Mask, Rule
from fxfib.passes.rules.derivative import Derivative, equal_nodes, slack

if TYPE_CHECKING:
    from fxfib.passes.backward import Adjoint
    from fxfib.passes.forward import Analysis

aten = torch.ops.aten

Colors = tuple[Labels, Mask]  # labels, and where all is zero: over the axes asked for


def along_heads(
    analysis: Analysis, node: fx.Node, axis: int, batch: tuple[int, ...]
) -> Colors | None:
    """Equal slices along one axis, within every position of the batch axes (all static).

    Returns:
        Arrays ``[*batch sizes, size of axis]``; equal labels in different positions of the batch
        mean nothing.  None where all differ.
    """
    value = analysis.color(node)
    axis %= value.ndim
    factor = value.factor(axis)
    if factor is None:
        return None
    if set(factor.axes) - {axis, *batch}:
        factor = factor.along(axis)
    labels = equal_nodes(factor, slack(analysis))
    zero = factor.labels == ZERO
    order = [a for a in (*batch, axis) if a in factor.axes]
    shape = [value.shape[a] if a in factor.axes else 1 for a in (*batch, axis)]
    full = tuple(value.shape[a] for a in (*batch, axis))
    places = [factor.axes.index(a) for a in order]
    found = [
        np.broadcast_to(array.transpose(places).reshape(shape), full) for array in (labels, zero)
    ]
    return found[0], found[1]


def heads_of(analysis: Analysis, node: fx.Node) -> tuple[int, ...]:
    """The batch axes of a batch of matrices whose sizes are known."""
    rank = len(analysis.shape(node))
    return tuple(a for a in range(rank - 2) if not analysis.dynamic(node, a))


def in_heads(colors: Colors, axes: tuple[int, ...], name: str) -> Factor:
    """One coloring of some batch axes and one more: no node of one head is one of another."""
    labels, zero = colors
    heads = np.arange(int(np.prod(labels.shape[:-1]))).reshape(*labels.shape[:-1], 1)
    joint = unique_rows(labels, np.broadcast_to(heads, labels.shape)) + FIRST_FREE
    joint = np.where(zero, ZERO, joint)
    order = np.argsort(axes)
    joint = joint.transpose(order)
    ascending = tuple(axes[k] for k in order)
    return Factor(ascending, joint, np.ones(joint.shape), renumbered(("product", name)))


def product_value(analysis: Analysis, node: fx.Node, a: fx.Node, b: fx.Node) -> Value:
    """Colors of ``a @ b``: of its columns, else of its rows."""
    shape = analysis.shape(node)
    if min(len(analysis.shape(a)), len(analysis.shape(b))) < 2:
        return Value(shape)
    for source, axis in ((b, -1), (a, -2)):
        if analysis.is_constant(source):
            continue
        rank = len(analysis.shape(source))
        batch = heads_of(analysis, source)
        out = tuple(axis_ + len(shape) - rank for axis_ in batch)
        if any(analysis.shape(source)[s] != shape[o] for s, o in zip(batch, out, strict=True)):
            continue  # broadcast over heads
        missing = [d for d in heads_of(analysis, node) if d not in out]
        if any(shape[d] != 1 for d in missing):
            continue
        colors = along_heads(analysis, source, axis, batch)
        if colors is not None:
            factor = in_heads(colors, (*out, len(shape) + axis), node.name)
            return Value(shape, (factor,))
    return Value(shape)


def product_back(
    adjoint: Adjoint, error: fx.Node, a: fx.Node, b: fx.Node
) -> Iterable[tuple[fx.Node, fx.Node]]:
    """``e b^T`` and ``a^T e``."""
    if min(len(adjoint.analysis.shape(x)) for x in (a, b)) < 2:
        raise Barrier("one of its operands is a vector")
    if adjoint.wants(a):
        turned = adjoint.call(aten.transpose.int, b, -2, -1)
        yield a, adjoint.sum_to(adjoint.call(aten.matmul.default, error, turned), a)
    if adjoint.wants(b):
        turned = adjoint.call(aten.transpose.int, a, -2, -1)
        yield b, adjoint.sum_to(adjoint.call(aten.matmul.default, turned, error), b)


def attention_value(analysis: Analysis, node: fx.Node) -> Value:
    """Channels of values pass through the averages of their head."""
    bound = analysis.arguments(node)
    return _from_values(analysis, node, bound["value"], analysis.shape(node))


def _from_values(
    analysis: Analysis, node: fx.Node, source: fx.Node, shape: tuple[int, ...]
) -> Value:
    batch = heads_of(analysis, source)
    colors = along_heads(analysis, source, -1, batch)
    if colors is None:
        return Value(shape)
    fitted = _fit(colors, tuple(shape[a] for a in batch))
    if fitted is None:
        return Value(shape)
    return Value(shape, (in_heads(fitted, (*batch, len(shape) - 1), node.name),))


def _fit(colors: Colors, sizes: tuple[int, ...]) -> Colors | None:
    """The same for other numbers of heads: queries share a head, or errors of a group add."""
    labels, zero = colors
    for axis, size in enumerate(sizes):
        have = labels.shape[axis]
        if have == size:
            continue
        if size % have == 0:
            labels = np.repeat(labels, size // have, axis)
            zero = np.repeat(zero, size // have, axis)
        elif have % size == 0:
            split = (*labels.shape[:axis], size, have // size, *labels.shape[axis + 1 :])
            grid, zeros = labels.reshape(split), zero.reshape(split)
            parts = [grid.take(k, axis + 1) for k in range(have // size)]
            labels, zero = unique_rows(*parts), np.asarray(zeros.all(axis + 1))
        else:
            return None
    return labels, zero


class AttentionBack(Rule):
    """The errors of queries, keys and values of fused attention."""

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        derivative, (error, *operands) = node.target, node.args
        assert isinstance(derivative, Derivative)
        query, key, _ = operands[:3]
        source: Any = {0: key, 1: query, 2: error}[derivative.place]
        return _from_values(analysis, node, source, analysis.shape(node))


ATTENTION_BACK = AttentionBack()
