"""Opfibers of a recurrent layer: errors come back through time, so they are a fixed point, too.

The error of a hidden node at one step is that of the output there, plus ``W_hh^T`` times the errors
of all gates at the next step; and the errors of a node's gates depend on its own activations alone.
So two nodes get equal errors at every step when they have equal activations, the outputs have equal
errors, and their columns of ``W_hh`` agree, summed gate by gate over the partition itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx

from fxfib.coloring import FIRST_FREE, Factor, Labels, Value, unique_rows
from fxfib.passes.rules.base import Rule
from fxfib.passes.rules.derivative import Derivative, equal_nodes, slack
from fxfib.passes.rules.recurrence import Kind, Precision, Weights, plain_factor
from fxfib.signature import Form, collapse_columns, plain_labels

if TYPE_CHECKING:
    import torch

    from fxfib.passes.forward import Analysis


def over_gates(
    kind: Kind, weight: torch.Tensor, hidden: Labels, roundoff: float, match: Labels | None
) -> Form:
    """Columns of ``[gates * hidden, n]`` summed, gate by gate, over a partition of hidden nodes."""
    width = int(hidden.max(initial=0)) + 1
    labels = np.concatenate([hidden + gate * width for gate in range(kind.gates)])
    return _columns(weight, labels, roundoff, match)


def _columns(weight: torch.Tensor, labels: Labels, roundoff: float, match: Labels | None) -> Form:
    factor = plain_factor(labels + FIRST_FREE, "errors")
    rows, bound, offset, offset_bound, _ = collapse_columns(
        weight.t().contiguous(), factor, offset_constants=True, roundoff=roundoff
    )
    return Form(0, rows, offset, bound, offset_bound, match, "errors")


def error_fixed_point(
    kind: Kind, weights: Weights, hidden: Labels, output: Labels, precision: Precision
) -> tuple[Labels, Labels]:
    """The coarsest partition of hidden nodes (and projected ones) with equal errors.

    Args:
        hidden: int64 ``[hidden]``, nodes with equal activations and equal errors from outside.
        output: the same of the outputs; with a projection, another axis.

    Returns:
        Labels of both; the same but for a projection.
    """
    while True:
        form = over_gates(kind, weights.hh, hidden, precision.roundoff, output)
        new_output = plain_labels(form, precision.eps, precision.criterion)
        new = new_output
        if weights.hr is not None:
            form = _columns(weights.hr, new_output, precision.roundoff, hidden)
            new = plain_labels(form, precision.eps, precision.criterion)
        if new.max(initial=-1) == hidden.max(initial=-1) and (
            new_output.max(initial=-1) == output.max(initial=-1)
        ):
            return new, new_output
        hidden, output = new, new_output


class RecurrentBack(Rule):
    """The error of the input of a recurrent module; that of its nodes is found on the way."""

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        derivative, errors = node.target, node.args[0]
        assert isinstance(derivative, Derivative)
        rule, module = derivative.context
        given = dict(zip(derivative.items, errors, strict=True))  # type: ignore[arg-type]
        precision = Precision(analysis.eps, analysis.criterion, analysis.roundoff)
        layers = rule.layers(analysis, module)
        count = rule.directions(analysis, module)
        inner = analysis.value(module).inner
        above: Labels | None = self._labels(analysis, given.get(0))
        width = analysis.shape(layers[0].hh)[1]
        if above is None:
            distinct = 0 in given
            above = np.arange(count * width) if distinct else np.zeros(count * width, np.int64)
        states = [self._labels(analysis, given[k]) for k in (1, 2) if k in given]
        if any(state is None for state in states):
            return Value(analysis.shape(node))
        form: Form | None = None
        for number in reversed(range(len(layers) // count)):
            form = None
            for place in range(count):
                layer = layers[number * count + place]
                weights = layer.weights(analysis)
                own = above[place * width : (place + 1) * width]
                hidden = [_equal(inner[layer.hidden])]
                output = [_equal(inner[layer.output]), own]
                for k, state in zip([k for k in (1, 2) if k in given], states, strict=True):
                    (output if k == 1 else hidden).append(state)  # type: ignore[arg-type]
                if weights.hr is None:
                    hidden = output = [*hidden, *output]
                known = [(hidden, layer.hidden), (output, layer.output)]
                starts = [
                    analysis.allowed((module, axis), unique_rows(*columns))
                    for columns, axis in known
                ]
                found = error_fixed_point(rule.kind, weights, starts[0], starts[1], precision)
                for axis, labels in zip((layer.output, layer.hidden), found[::-1], strict=True):
                    factor = plain_factor(labels + FIRST_FREE, "errors")
                    analysis.inner_errors[module, axis] = factor  # type: ignore[attr-defined]
                part = over_gates(rule.kind, weights.ih, found[0], precision.roundoff, None)
                form = part if form is None else form.plus(part)
            assert form is not None
            above = plain_labels(form, precision.eps, precision.criterion)
        assert form is not None
        axis = len(analysis.shape(node)) - 1
        return Value(analysis.shape(node), (), Form(
            axis, form.rows, form.offset, form.rows_bound, form.offset_bound, None,
            ("recurrent", node.name), form.relative,
        ))  # fmt: skip

    @staticmethod
    def _labels(analysis: Analysis, error: Any) -> Labels | None:
        """Equal errors along the last axis, None where nothing is known or given."""
        if error is None:
            return None
        factor = analysis.factor(error, len(analysis.shape(error)) - 1)
        return None if factor is None else equal_nodes(factor, slack(analysis))


def _equal(factor: Factor) -> Labels:
    """Nodes of equal activations, whose gates agree, too: zeros may have gates of their own."""
    zero = factor.labels < FIRST_FREE
    apart = np.arange(len(factor.labels)) + int(factor.labels.max(initial=0)) + 1
    return unique_rows(np.where(zero, apart, factor.labels))


RECURRENT_BACK = RecurrentBack()
