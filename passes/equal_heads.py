"""Heads that compute the same: they merge as wholes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import fx

from fxfib.coloring import Labels, unique_rows
from fxfib.passes.heads_trace import Contraction, Passage
from fxfib.passes.rules.attention import FUSED, sides

if TYPE_CHECKING:
    from fxfib.passes.forward import Analysis


def equal_heads(analysis: Analysis) -> set[fx.Node]:
    """Products of heads of which some have equal queries, keys and values, channel by channel.

    Such heads have one partition, and so can all heads of their ops: then equal ones are nodes of
    the axis of heads, and merge by the rules of any axis, whatever masks and biases lie between.
    """
    found: set[fx.Node] = set()
    for core, contraction in analysis.heads.contractions.items():
        passage = _passage_behind(analysis, core)
        if passage is None:
            continue
        scores, values = _by_scores(analysis, contraction), _by_values(analysis, passage)
        if len(scores) != len(values):
            continue
        both = unique_rows(scores, values)
        if len(np.unique(both)) < len(both):
            found |= {core, passage.core}
    for core, passage in analysis.heads.passages.items():
        if core.target in FUSED and core not in analysis.heads.contractions:
            columns = _by_axis(analysis, core, len(passage.blocks))
            both = unique_rows(_by_values(analysis, passage)[passage.blocks], *columns)
            if len(np.unique(both)) < len(both):
                found.add(core)
    return found


def _by_axis(analysis: Analysis, core: fx.Node, heads: int) -> list[Labels]:
    """Numbers of equal heads of queries and of keys, colored as an axis."""
    found = []
    for operand in sides(analysis, core)[:2]:
        axis = len(analysis.shape(operand)) - 3
        factor = analysis.factor(operand, axis) if axis >= 0 else None
        known = factor is not None and len(factor.labels) == heads
        found.append(factor.keyed() if factor is not None and known else np.arange(heads))
    return found


def _passage_behind(analysis: Analysis, core: fx.Node) -> Passage | None:
    """Where values are averaged by the scores of a contraction."""
    passages = analysis.heads.passages
    if core in passages:
        return passages[core]
    pending, seen = [core], {core}
    while pending:
        for user in pending.pop().users:
            if user in passages:
                return passages[user]
            if user not in seen and user not in analysis.heads.contractions:
                seen.add(user)
                pending.append(user)
    return None


def _by_scores(analysis: Analysis, contraction: Contraction) -> Labels:
    """Numbers of heads of keys; equal ones have equal rows, and so have their queries."""
    colors = analysis.heads.colors
    left = colors[contraction.left.root].keyed()
    right = colors[contraction.right.root].keyed()
    rows = [np.r_[right[key], left[queries].reshape(-1)] for key, queries in contraction.pairs]
    if len({len(row) for row in rows}) > 1:
        return np.arange(len(rows))
    return np.unique(np.stack(rows), axis=0, return_inverse=True)[1].reshape(-1)


def _by_values(analysis: Analysis, passage: Passage) -> Labels:
    """Numbers of heads of values; equal ones have equal rows."""
    labels = analysis.heads.colors[passage.value.root].keyed()[passage.rows]
    return np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
