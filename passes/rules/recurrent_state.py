"""Initial states of recurrent layers: what they allow to merge, and their smaller form."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from fxfib.coloring import ZERO, Factor, discrete
from fxfib.passes.relations import Ref
from fxfib.passes.rules.tracing import constant_factor

if TYPE_CHECKING:
    from fxfib.passes.forward import Analysis
    from fxfib.passes.rewrite import Rewriter

aten = torch.ops.aten

DISTINCT = "its initial state is computed elsewhere, and no two of its nodes are known to be equal"
REMEDY = "start from zeros, or from a state that fxfib can color (a parameter, another layer)"


@dataclass(frozen=True)
class Start:
    """What is known of an initial state.

    Attributes:
        factor: its coloring; every node by itself where nothing is known.
        zero: all of it is zero.
        distinct: nothing is known: no nodes may merge.
        ref: its axis of nodes, None where it is made anew with the size it needs.
    """

    factor: Factor
    zero: bool
    distinct: bool
    ref: Ref | None
    reason: str = DISTINCT
    remedy: str = REMEDY


def zeros_of(state: fx.Node) -> tuple[fx.Node, list[Any]] | None:
    """The call that fills a tensor with zeros of which a state is all or a part, and its shape.

    ``hidden = x.new_zeros(layers, batch, size)`` is often made once, and ``hidden[0]`` is a state.
    """
    if state.target is aten.zeros.default:
        return state, list(state.args[0])  # type: ignore[arg-type]
    source = state.args[0] if state.args else None
    if not isinstance(source, fx.Node):
        return None
    if state.target is operator.getitem and source.target is aten.unbind.int:
        state, source = source, source.args[0]
        dropped = True
    elif state.target is aten.select.int:
        dropped = True
    elif state.target is aten.unsqueeze.default:
        dropped = False
    else:
        return None
    assert isinstance(source, fx.Node)
    found = zeros_of(source)
    if found is None:
        return None
    call, shape = found
    axis = state.args[1] if len(state.args) > 1 else 0
    assert isinstance(axis, int)
    if dropped:
        shape.pop(axis)
    else:
        shape.insert(axis if axis >= 0 else len(shape) + 1 + axis, 1)
    return call, shape


def makes_zeros(state: fx.Node) -> bool:
    """Whether a node is zeros, made for nothing else than their size."""
    return zeros_of(state) is not None


def start_of(analysis: Analysis, state: fx.Node, axis: int) -> Start:
    """The partition of hidden nodes that an initial state allows."""
    size = analysis.shape(state)[axis]
    factor: Factor | None
    if makes_zeros(state):
        factor = Factor((axis,), np.full(size, ZERO), np.ones(size), "zeros")
    elif analysis.is_constant(state):
        factor = constant_factor(analysis.constant(state), axis, state.name)
        if not bool(analysis.constant(state).any()):
            factor = Factor((axis,), np.full(size, ZERO), np.ones(size), "zeros")
    else:
        factor = analysis.factor(state, axis)
    if factor is None:
        return Start(discrete(axis, size, state.name), False, True, (state, axis))
    zero = bool(np.all(factor.labels == ZERO))
    return Start(factor, zero, False, None if makes_zeros(state) else (state, axis))


def new_state(rewriter: Rewriter, state: fx.Node, axis: int, size: int) -> dict[fx.Node, fx.Node]:
    """The operand that replaces a state, if it is not rewritten where it comes from."""
    if (zeros := zeros_of(state)) is not None:
        call, shape = zeros
        if call is state and shape[axis] == size:
            return {state: rewriter.repeat(state)}
        shape[axis] = size
        return {state: rewriter.repeat(call, changed={"size": shape})}
    if rewriter.analysis.is_constant(state):
        return {state: rewriter.constant(state, {axis: rewriter.first(state, axis)})}
    return {}
