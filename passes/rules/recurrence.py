"""Colors of a recurrent layer: its hidden nodes stand on both sides of Eq. 3.

Per step, with ``x`` the input and ``h`` the hidden nodes of the step before:

    LSTM   i, f, g, o = W_ih x + b_ih + W_hh h + b_hh          (rows of the weights in this order)
           c' = sigmoid(f) c + sigmoid(i) tanh(g),   h' = sigmoid(o) tanh(c')   [or W_hr of that]
    GRU    r, z = sigmoid(W_ih x + b_ih + W_hh h + b_hh)
           n = tanh(W_in x + b_in + r (W_hn h + b_hn)),   h' = (1 - z) n + z h
    RNN    h' = tanh or relu of W_ih x + b_ih + W_hh h + b_hh

Two hidden nodes stay equal when the rows of **all** gates agree, the columns of ``W_ih`` summed
over the colors of the input and those of ``W_hh`` over the colors of ``h``: a fixed point.  It
starts from the coarsest partition that the initial state allows and is refined until it no longer
changes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from fxfib.coloring import FIRST_FREE, ZERO, Factor, Floats, Labels, renumbered, unique_rows
from fxfib.signature import ROUNDING_MULTIPLE, Form, collapse_columns, plain_labels, zero_rows

Mask = npt.NDArray[np.bool_]
Side = tuple[torch.Tensor, torch.Tensor | None, Floats, Floats]


@dataclass(frozen=True)
class Kind:
    """One of the recurrent cells.

    Attributes:
        gates: blocks of rows in the weights.
        new: the gate that writes; where its rows are zero, a zero state stays zero.
        apart: in that gate the two biases are not added (they are on two sides of a product).
    """

    gates: int
    new: int
    apart: bool = False


LSTM = Kind(4, 2)
GRU = Kind(3, 2, apart=True)
RNN = Kind(1, 0)


@dataclass(frozen=True)
class Weights:
    """Parameters of one layer in one direction, on the CPU.

    Attributes:
        ih: ``[gates * hidden, inputs]``.
        hh: ``[gates * hidden, outputs]``, with outputs = hidden but for a projection.
        bias_ih, bias_hh: ``[gates * hidden]`` or None.
        hr: ``[outputs, hidden]`` or None, the projection of an LSTM.
    """

    ih: torch.Tensor
    hh: torch.Tensor
    bias_ih: torch.Tensor | None = None
    bias_hh: torch.Tensor | None = None
    hr: torch.Tensor | None = None


@dataclass(frozen=True)
class Precision:
    """How near is equal: eps, what it measures, and the parameters' unit roundoff."""

    eps: float
    criterion: str
    roundoff: float


def plain_factor(labels: Labels, space: object) -> Factor:
    """Labels (``ZERO`` among them) as a coloring of one axis without scales."""
    return Factor((0,), labels, np.ones(len(labels)), renumbered(str(space)))


def side(weight: torch.Tensor, factor: Factor | None, roundoff: float) -> Side:
    """A weight with its columns summed over colors; constants go to the offset."""
    return collapse_columns(weight, factor, offset_constants=True, roundoff=roundoff)[:4]


def gate_forms(
    kind: Kind, weights: Weights, inputs: Side, state: Side, roundoff: float
) -> tuple[Form, Mask]:
    """Rows of all gates side by side, and the nodes whose writing gate is zero.

    Args:
        inputs, state: the collapsed ``W_ih`` and ``W_hh``.

    Returns:
        A form of ``hidden`` nodes, each offset a column of its own; bool ``[hidden]``.
    """
    size = len(weights.ih) // kind.gates
    first = _offset([inputs[2]], weights.bias_ih, inputs[3], roundoff)
    second = _offset([state[2]], weights.bias_hh, state[3], roundoff)
    both = _sum(first, second, roundoff)
    offsets, bounds = [], []
    for gate in range(kind.gates):
        own = slice(gate * size, (gate + 1) * size)
        for values, bound in [first, second] if kind.apart and gate == kind.new else [both]:
            offsets.append(values[own])
            bounds.append(bound[own])
    gates = list(range(kind.gates))
    form = _beside(kind, gates, (inputs, state), offsets, bounds, size)
    last = len(offsets) - kind.gates + 1
    chosen = slice(kind.new, kind.new + last)
    writing = _beside(kind, [kind.new], (inputs, state), offsets[chosen], bounds[chosen], size)
    return form, zero_rows(writing)


def gate_rows(
    kind: Kind,
    weights: Weights,
    source: Factor | None,
    labels: Labels,
    allowed: Labels,
    roundoff: float,
) -> Form:
    """Rows of all gates as points, one for every hidden node, where columns collapse by labels.

    Args:
        source: coloring of the input, None where all inputs are distinct.
        labels: of the hidden nodes.
        allowed: nodes of different numbers start from different states.
    """
    inputs = side(weights.ih, source, roundoff)
    state = side(weights.hh, plain_factor(labels, "state"), roundoff)
    form, _ = gate_forms(kind, weights, inputs, state, roundoff)
    return replace(form, must_match=allowed)


def _offset(
    terms: list[Floats], bias: torch.Tensor | None, bound: Floats, roundoff: float
) -> tuple[Floats, Floats]:
    if bias is None:
        return terms[0], bound
    return _sum((terms[0], bound), (bias.double().numpy(), np.zeros(len(bound))), roundoff)


def _sum(
    a: tuple[Floats, Floats], b: tuple[Floats, Floats], roundoff: float
) -> tuple[Floats, Floats]:
    """Two rounded numbers added; one that is zero everywhere costs nothing."""
    bound = a[1] + b[1]
    if a[0].any() and b[0].any():
        bound = bound + ROUNDING_MULTIPLE * roundoff * (np.abs(a[0]) + np.abs(b[0]))
    return a[0] + b[0], bound


def _beside(
    kind: Kind,
    gates: list[int],
    sides: tuple[Side, ...],
    offsets: list[Floats],
    bounds: list[Floats],
    size: int,
) -> Form:
    """Blocks of rows next to one another: ``[size, gates * columns + offsets]``."""

    def blocks(tensor: torch.Tensor) -> torch.Tensor:
        split = tensor.reshape(kind.gates, size, tensor.shape[-1])[gates]
        return split.transpose(0, 1).reshape(size, len(gates) * tensor.shape[-1])

    rows = [blocks(s[0]) for s in sides]
    rows.append(torch.from_numpy(np.stack(offsets, 1)))
    kinds = (
        torch.float32
        if all(s[1] is None or s[1].dtype == torch.float32 for s in sides)
        else (torch.float64)
    )
    limits = [
        torch.zeros(1, dtype=kinds).expand(table.shape) if s[1] is None
        else blocks(s[1].expand(s[0].shape)).to(kinds)
        for s, table in zip(sides, rows, strict=False)
    ]  # fmt: skip
    limits.append(torch.from_numpy(np.stack(bounds, 1)).to(kinds))
    exact = all(s[1] is None for s in sides) and not any(b.any() for b in bounds)
    zero = np.zeros(size)
    return Form(
        0, torch.cat(rows, 1), zero, None if exact else torch.cat(limits, 1), zero, None, "gates"
    )


def refined(labels: Labels, form: Form, zero: Mask, precision: Precision) -> Labels:
    """Nodes that share a label and have equal rows; zeros whose rows are zero stay ``ZERO``."""
    form = replace(form, must_match=labels)
    found = plain_labels(form, precision.eps, precision.criterion) + FIRST_FREE
    return np.where((labels == ZERO) & zero, ZERO, found)


def fixed_point(
    kind: Kind,
    weights: Weights,
    source: Factor | None,
    state: Labels,
    projected: Labels | None,
    precision: Precision,
) -> tuple[Labels, Labels]:
    """The stable partition of the hidden nodes of one layer in one direction.

    Args:
        source: coloring of the input, None where all inputs are distinct.
        state: int64 ``[hidden]``, the partition that the initial state allows (``ZERO``: is zero).
        projected: the same of the projected nodes, None without a projection.
        precision: in every collapsed entry two nodes of one label differ by at most its eps, for
            the partition that is returned.

    Returns:
        Labels of the hidden nodes, and of the outputs (the same, but for a projection).
    """
    inputs = side(weights.ih, source, precision.roundoff)
    hidden = state
    output = hidden if projected is None else projected
    while True:
        columns = side(weights.hh, plain_factor(output, "state"), precision.roundoff)
        form, zero = gate_forms(kind, weights, inputs, columns, precision.roundoff)
        new = refined(hidden, form, zero, precision)
        new_output = new
        if weights.hr is not None:
            factor = plain_factor(new, "cells")
            rows, bound, _, _ = side(weights.hr, factor, precision.roundoff)
            none = np.zeros(len(rows))
            form = Form(0, rows, none, bound, none, None, "projection")
            new_output = refined(output, form, zero_rows(form), precision)
        if _equal(new, hidden) and _equal(new_output, output):
            return new, new_output
        hidden, output = new, new_output


def _equal(new: Labels, old: Labels) -> bool:
    """Whether a refinement changed nothing."""
    return len(np.unique(new)) == len(np.unique(old)) and bool(
        np.array_equal(new == ZERO, old == ZERO)
    )


def met(found: list[Factor]) -> Labels:
    """Nodes that agree in every coloring, factors included; ``ZERO`` where all are."""
    zero = np.logical_and.reduce([f.labels == ZERO for f in found])
    labels = unique_rows(*[f.keyed() for f in found]) + FIRST_FREE
    return np.where(zero, ZERO, labels)
