"""Recurrent cells: one step of a recurrence that the model's own code repeats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import fx

from fxfib.coloring import ONE, ZERO, Factor, Labels, Value
from fxfib.passes.relations import Full, Keep, Ref, Refine, Relation, Same
from fxfib.passes.rules.base import Mask, Rule, columns_read, hint, register
from fxfib.passes.rules.recurrence import (
    GRU,
    LSTM,
    RNN,
    Kind,
    Precision,
    gate_forms,
    met,
    plain_factor,
    refined,
    side,
)
from fxfib.passes.rules.recurrent import (
    Layer,
    check_parameters,
    gate_relations,
    rows_alive,
    smaller,
)
from fxfib.passes.rules.recurrent_state import Start, makes_zeros, new_state, start_of

if TYPE_CHECKING:
    from fxfib.passes.backward import Adjoint, Error
    from fxfib.passes.forward import Analysis
    from fxfib.passes.rewrite import Rewriter

aten = torch.ops.aten


class RecurrentCell(Rule):
    """One step: nodes that are equal before it and have equal rows in all gates are equal after it.

    The steps of a loop share their weights, so what merges is what stays equal in every one of
    them.  The equations are those of :mod:`fxfib.passes.rules.recurrence`.
    """

    kind: ClassVar[Kind]
    #: Which states enter node by node, besides through the rows: for an LSTM c, for a GRU h.
    carried: ClassVar[slice]

    def layer(self, analysis: Analysis, node: fx.Node) -> Layer:
        """The parameters of the cell."""
        given = analysis.arguments(node)
        return Layer(0, "cell", given["w_ih"], given["w_hh"], given["b_ih"], given["b_hh"], None)

    def states(self, analysis: Analysis, node: fx.Node) -> list[fx.Node]:
        """The states of the step before: of an LSTM h and c, else h."""
        given = analysis.arguments(node)["hx"]
        return list(given) if isinstance(given, (list, tuple)) else [given]

    # -- colors ----------------------------------------------------------------------------

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        source = analysis.arguments(node)["input"]
        layer = self.layer(analysis, node)
        check_parameters(analysis, source, layer.parameters)
        states = self.states(analysis, node)
        starts = [start_of(analysis, state, 1) for state in states]
        before = met([starts[0].factor])
        labels = self.labels(analysis, source, layer, before, starts[self.carried])
        hidden: Ref = (node, layer.hidden)
        relations: list[Relation] = [Refine(hidden, before), Refine(hidden, labels)]
        relations += gate_relations(analysis, node, layer, self.kind)
        relations += [Same((source, 1), (layer.ih, 1)), Same((layer.hh, 1), hidden)]
        relations += [Same(start.ref, hidden) for start in starts if start.ref is not None]
        factor = analysis.factor(source, 1)
        if layer.bias_ih is None and factor is not None:
            # There is no bias to fold a constant into.
            relations.append(Keep((source, 1), factor.labels == ONE))
        distinct = [start for start in starts if start.distinct]
        if node in analysis.skip:
            relations.append(Full(hidden, "the user asked to skip it"))
        elif distinct:
            relations.append(Full(hidden, distinct[0].reason))
        if distinct:
            analysis.refuse(node, distinct[0].reason, distinct[0].remedy)
        analysis.relate(*relations)
        for operand in (source, *states):
            analysis.full(operand, (0,), "a recurrent cell works along this axis")
        return self.value(analysis, node, layer, plain_factor(labels, node.name))

    def labels(
        self,
        analysis: Analysis,
        source: fx.Node,
        layer: Layer,
        before: Labels,
        carried: list[Start],
    ) -> Labels:
        """Nodes that are equal after the step, ``before`` being the partition of h before it."""
        precision = Precision(analysis.eps, analysis.criterion, analysis.roundoff)
        weights = layer.weights(analysis)
        form, zero = gate_forms(
            self.kind,
            weights,
            side(weights.ih, analysis.factor(source, 1), precision.roundoff),
            side(weights.hh, plain_factor(before, "state"), precision.roundoff),
            precision.roundoff,
        )
        size = len(weights.ih) // self.kind.gates
        allowed = met([s.factor for s in carried]) if carried else np.full(size, ZERO)
        return refined(allowed, form, zero, precision)

    def value(self, analysis: Analysis, node: fx.Node, layer: Layer, factor: Factor) -> Value:
        """What is known of the new state."""
        analysis.relate(Same((node, 1), (node, layer.hidden)))
        shape = tuple(map(hint, node.meta["val"].shape))
        return Value(shape, (on_nodes(factor),), inner={layer.hidden: factor})

    # -- errors ----------------------------------------------------------------------------

    def written_out(
        self, adjoint: Adjoint, node: fx.Node, rows: list[fx.Node], states: list[fx.Node]
    ) -> dict[int, fx.Node]:
        """The new states by simpler ops, from ``W_ih x + b_ih`` and ``W_hh h + b_hh``."""
        raise NotImplementedError

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """The step written out, and the errors behind that."""
        layer, states = self.layer(adjoint.analysis, node), self.states(adjoint.analysis, node)
        source = adjoint.analysis.arguments(node)["input"]
        check_parameters(adjoint.analysis, source, layer.parameters)
        start = len(adjoint.nodes)
        first = adjoint.call(aten.linear.default, source, layer.ih, layer.bias_ih)
        if any(makes_zeros(state) for state in states):
            # Zeros of a size that is computed; these have nodes that can be colored.  (Made of rows
            # of their own: what is added up must not be colored before.)
            other = adjoint.call(aten.linear.default, source, layer.ih)
            zeros = adjoint.call(aten.zeros_like.default, self.gates(adjoint, other)[0])
            states = [zeros if makes_zeros(state) else state for state in states]
        rows = [first, adjoint.call(aten.linear.default, states[0], layer.hh, layer.bias_hh)]
        results = self.written_out(adjoint, node, rows, states)
        given = error if isinstance(error, dict) else {0: error}
        found = list(adjoint.through(node, given, results, start))
        adjoint.gates[node, layer.hidden] = (self.kind.gates, rows[: 1 + self.kind.apart])
        yield from found

    def gates(self, adjoint: Adjoint, rows: fx.Node) -> list[fx.Node]:
        """The gates' rows one by one."""
        size = adjoint.analysis.shape(rows)[1] // self.kind.gates
        return [
            adjoint.call(aten.slice.Tensor, rows, 1, gate * size, (gate + 1) * size)
            for gate in range(self.kind.gates)
        ]

    # -- who reads what --------------------------------------------------------------------

    def outputs(self, node: fx.Node) -> list[fx.Node]:
        """The graph nodes that hold the new states."""
        return [node]

    def reads(
        self, analysis: Analysis, node: fx.Node, live: Mapping[Ref, Mask]
    ) -> Iterator[tuple[Ref, Mask]]:
        """A node that matters reads its own old state and what its rows read."""
        layer = self.layer(analysis, node)
        weights = layer.weights(analysis)
        factor = analysis.value(node).inner[layer.hidden]
        alive = np.zeros(len(factor.labels), dtype=bool)
        for output in self.outputs(node):
            if (output, 1) in live:
                alive |= live[output, 1]
        rows = rows_alive(alive, self.kind.gates)
        yield (node, layer.hidden), alive & (factor.labels != ZERO)
        wanted: dict[fx.Node, Mask] = {}

        def want(operand: fx.Node, mask: Mask) -> None:
            # One tensor may be the input and a state, or both states.
            wanted[operand] = wanted[operand] | mask if operand in wanted else mask

        states = self.states(analysis, node)
        want(analysis.arguments(node)["input"], columns_read(weights.ih, rows))
        want(states[0], columns_read(weights.hh, rows))
        for state in states[self.carried]:
            want(state, alive)
        for operand, mask in wanted.items():
            yield (operand, 1), mask

    def produces(self, analysis: Analysis, node: fx.Node) -> Iterator[tuple[str, Ref]]:
        yield "", (node, self.layer(analysis, node).hidden)

    # -- the smaller op --------------------------------------------------------------------

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        analysis = rewriter.analysis
        source = analysis.arguments(node)["input"]
        layer = self.layer(analysis, node)
        columns = rewriter.columns(source, 1)
        extra = rewriter.dropped_constants(source, 1, layer.ih, inputs=1)
        reduced = smaller(rewriter, layer, columns, extra)
        for state in self.states(analysis, node):
            reduced |= new_state(rewriter, state, 1, rewriter.layout(node, layer.hidden).size)
        return rewriter.repeat(node, constants=reduced)

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.cells(("LSTMCell", "GRUCell", "tanh", "relu"))


def on_nodes(factor: Factor) -> Factor:
    """The coloring of hidden nodes as that of the second axis of a state."""
    return Factor((1,), factor.labels, factor.scales, factor.space)


@register
class LongShortTermMemoryCell(RecurrentCell):
    """``aten.lstm_cell``: h and c."""

    targets = (aten.lstm_cell.default,)
    kind = LSTM
    carried = slice(1, 2)

    def written_out(
        self, adjoint: Adjoint, node: fx.Node, rows: list[fx.Node], states: list[fx.Node]
    ) -> dict[int, fx.Node]:
        call = adjoint.call
        i, f, g, o = self.gates(adjoint, call(aten.add.Tensor, *rows))
        kept = call(aten.mul.Tensor, call(aten.sigmoid.default, f), states[1])
        new = call(aten.mul.Tensor, call(aten.sigmoid.default, i), call(aten.tanh.default, g))
        cell = call(aten.add.Tensor, kept, new)
        gate = call(aten.sigmoid.default, o)
        return {0: call(aten.mul.Tensor, gate, call(aten.tanh.default, cell)), 1: cell}

    def value(self, analysis: Analysis, node: fx.Node, layer: Layer, factor: Factor) -> Value:
        parts = tuple(
            Value(tuple(map(hint, state.shape)), (on_nodes(factor),)) for state in node.meta["val"]
        )
        return Value((), parts=parts, inner={layer.hidden: factor})

    def part(self, analysis: Analysis, node: fx.Node, number: int, out: fx.Node) -> Value:
        """One of the new states, for the getitem that takes it."""
        analysis.relate(Same((out, 1), (node, self.layer(analysis, node).hidden)))
        parts = analysis.value(node).parts
        assert parts is not None
        return parts[number]

    def outputs(self, node: fx.Node) -> list[fx.Node]:
        return list(node.users)


@register
class GatedRecurrentUnitCell(RecurrentCell):
    """``aten.gru_cell``: h."""

    targets = (aten.gru_cell.default,)
    kind = GRU
    carried = slice(0, 1)

    def written_out(
        self, adjoint: Adjoint, node: fx.Node, rows: list[fx.Node], states: list[fx.Node]
    ) -> dict[int, fx.Node]:
        call = adjoint.call
        pairs = zip(*(self.gates(adjoint, row) for row in rows), strict=True)
        (r_x, r_h), (z_x, z_h), (n_x, n_h) = pairs
        reset = call(aten.sigmoid.default, call(aten.add.Tensor, r_x, r_h))
        keep = call(aten.sigmoid.default, call(aten.add.Tensor, z_x, z_h))
        inner = call(aten.add.Tensor, n_x, call(aten.mul.Tensor, reset, n_h))
        new = call(aten.tanh.default, inner)
        change = call(aten.mul.Tensor, keep, call(aten.sub.Tensor, states[0], new))
        return {0: call(aten.add.Tensor, new, change)}


@register
class PlainRecurrentCell(RecurrentCell):
    """``aten.rnn_tanh_cell`` and ``aten.rnn_relu_cell``: h."""

    targets = (aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default)
    kind = RNN
    carried = slice(0, 0)

    def written_out(
        self, adjoint: Adjoint, node: fx.Node, rows: list[fx.Node], states: list[fx.Node]
    ) -> dict[int, fx.Node]:
        name = "relu" if "relu" in str(node.target) else "tanh"
        total = adjoint.call(aten.add.Tensor, *rows)
        return {0: adjoint.call(getattr(aten, name).default, total)}
