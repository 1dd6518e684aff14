"""Recurrent modules: LSTM, GRU and RNN with all their layers and directions."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import fx

from fxfib.coloring import FIRST_FREE, ONE, ZERO, Factor, Floats, Labels, Value
from fxfib.passes.relations import Full, Keep, Move, Ref, Refine, Relation, Same, SameSize
from fxfib.passes.rules.base import Barrier, Mask, Rule, columns_read, hint, register
from fxfib.passes.rules.derivative import OPAQUE
from fxfib.passes.rules.recurrence import (
    GRU,
    LSTM,
    RNN,
    Kind,
    Precision,
    Weights,
    fixed_point,
    gate_rows,
    met,
    plain_factor,
)
from fxfib.passes.rules.recurrence_back import RECURRENT_BACK
from fxfib.passes.rules.recurrent_state import Start, new_state, start_of

if TYPE_CHECKING:
    from fxfib.passes.backward import Adjoint, Error
    from fxfib.passes.forward import Analysis
    from fxfib.passes.rewrite import Rewriter

aten = torch.ops.aten

GATES = "the gates of a recurrent layer stay apart"


@dataclass(frozen=True)
class Layer:
    """Parameters of one layer in one direction, as graph nodes.

    Attributes:
        number: layers first, directions within.
        name: as in the names of the parameters: ``l0``, ``l0_reverse``, ``l1`` ...
    """

    number: int
    name: str
    ih: fx.Node
    hh: fx.Node
    bias_ih: fx.Node | None
    bias_hh: fx.Node | None
    hr: fx.Node | None

    @property
    def parameters(self) -> list[fx.Node]:
        given = (self.ih, self.hh, self.bias_ih, self.bias_hh, self.hr)
        return [node for node in given if node is not None]

    @property
    def hidden(self) -> str:
        """The inner axis of the hidden nodes (of an LSTM, its cells)."""
        return f"hidden {self.name}"

    @property
    def output(self) -> str:
        """The inner axis of what leaves the layer: the hidden nodes, or their projection."""
        return f"projected {self.name}" if self.hr is not None else self.hidden

    def weights(self, analysis: Analysis) -> Weights:
        def tensor(node: fx.Node | None) -> torch.Tensor | None:
            return None if node is None else analysis.constant(node)

        return Weights(
            analysis.constant(self.ih), analysis.constant(self.hh),
            tensor(self.bias_ih), tensor(self.bias_hh), tensor(self.hr),
        )  # fmt: skip


def gate_relations(analysis: Analysis, node: fx.Node, layer: Layer, kind: Kind) -> list[Relation]:
    """Rows of all gates lie as the hidden nodes do, gate by gate; columns as the outputs."""
    size = analysis.shape(layer.ih)[0] // kind.gates
    gates = analysis.inner(node, "gates", kind.gates)
    hidden = analysis.inner(node, layer.hidden, size)
    rows: Ref = (layer.ih, 0)
    found: list[Relation] = [
        Full(gates, GATES),
        Move((rows,), ((gates, hidden),), np.arange(kind.gates * size)),
        Same((layer.hh, 0), rows),
    ]
    found += [Same((b, 0), rows) for b in (layer.bias_ih, layer.bias_hh) if b is not None]
    if layer.hr is not None:
        output = analysis.inner(node, layer.output, analysis.shape(layer.hr)[0])
        found += [Same((layer.hr, 0), output), Same((layer.hr, 1), hidden)]
    return found


def check_parameters(analysis: Analysis, source: fx.Node, parameters: Iterable[fx.Node]) -> None:
    """Only layers of which all parameters are constants are followed."""
    if analysis.is_constant(source):
        raise Barrier("its input is a constant", "nothing: it reads no input of the network")
    for parameter in parameters:
        if not analysis.is_constant(parameter):
            raise Barrier("its weights are computed", "nothing: they are no parameters")
        if not parameter.meta["val"].is_floating_point():
            raise Barrier("its weights are not floating-point numbers")


def rows_alive(alive: Mask, gates: int) -> Mask:
    """The rows of all gates of some hidden nodes."""
    return np.tile(alive, gates)


class Recurrent(Rule):
    """A whole recurrent module: one partition for each layer and direction, all equally wide."""

    kind: ClassVar[Kind]

    # -- operands --------------------------------------------------------------------------

    def layers(self, analysis: Analysis, node: fx.Node) -> list[Layer]:
        """The parameters of every layer and direction, in the order of the flat list."""
        bound = analysis.arguments(node)
        names = [
            f"l{number}{direction}"
            for number in range(bound["num_layers"])
            for direction in (("", "_reverse") if bound["bidirectional"] else ("",))
        ]
        flat = list(bound["params"])
        biases = 2 if bound["has_biases"] else 0
        each = len(flat) // len(names)
        if each * len(names) != len(flat) or each not in (2 + biases, 3 + biases):
            raise Barrier("its list of parameters is not that of its layers")
        found = []
        for number, name in enumerate(names):
            own = flat[number * each : (number + 1) * each]
            bias = own[2:4] if biases else [None, None]
            hr = own[-1] if each == 3 + biases else None
            found.append(Layer(number, name, own[0], own[1], bias[0], bias[1], hr))
        return found

    def states(self, analysis: Analysis, node: fx.Node) -> list[fx.Node]:
        """Initial states: of an LSTM h and c, else h."""
        given = analysis.arguments(node)["hx"]
        return list(given) if isinstance(given, (list, tuple)) else [given]

    def directions(self, analysis: Analysis, node: fx.Node) -> int:
        return 2 if analysis.arguments(node)["bidirectional"] else 1

    # -- colors ----------------------------------------------------------------------------

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        source = analysis.arguments(node)["input"]
        layers = self.layers(analysis, node)
        check_parameters(analysis, source, (p for layer in layers for p in layer.parameters))
        starts = [start_of(analysis, state, 2) for state in self.states(analysis, node)]
        inner = self.colors(analysis, node, source, layers, starts)
        relations: list[Relation] = [Refine((node, name), f.labels) for name, f in inner.items()]
        for layer in layers:
            relations += gate_relations(analysis, node, layer, self.kind)
        relations += self.between(analysis, node, source, layers)
        relations += self.sizes(node, layers, starts)
        distinct = [start for start in starts if start.distinct]
        held = node in analysis.skip
        if distinct or held:
            reason = "the user asked to skip it" if held else distinct[0].reason
            relations += [Full((node, name), reason) for name in inner]
            if distinct:
                analysis.refuse(node, distinct[0].reason, distinct[0].remedy)
        analysis.relate(*relations)
        for operand in (source, *self.states(analysis, node)):
            analysis.full(operand, (0, 1), "a recurrent layer steps along this axis")
        return Value((), parts=self.parts(analysis, node, layers, inner), inner=inner)

    def colors(
        self,
        analysis: Analysis,
        node: fx.Node,
        source: fx.Node,
        layers: list[Layer],
        starts: list[Start],
    ) -> dict[str, Factor]:
        """The fixed point of every layer on the colors of the one before, or a policy's choice."""
        chooses = analysis.policy.chooses
        held = node in analysis.skip or any(start.distinct for start in starts)
        precision = Precision(0.0, "fibration", analysis.roundoff)
        if not chooses:
            precision = Precision(analysis.eps, analysis.criterion, analysis.roundoff)
        inner: dict[str, Factor] = {}
        factor = analysis.factor(source, 2)
        below: list[Factor] = []
        for layer in layers:
            if layer.number and layer.number % self.directions(analysis, node) == 0:
                factor, below = _joined(below), []
            projected = None
            own = starts
            if layer.hr is not None:
                projected, own = met([starts[0].factor]), starts[1:]
            weights = layer.weights(analysis)
            first = analysis.allowed((node, layer.hidden), met([start.factor for start in own]))
            hidden, output = fixed_point(
                self.kind,
                weights,
                factor,
                first,
                None if projected is None else analysis.allowed((node, layer.output), projected),
                precision,
            )
            if chooses and layer.hr is None and not held:
                ref = (node, layer.hidden)
                form = gate_rows(self.kind, weights, factor, hidden, first, analysis.roundoff)
                exact = plain_factor(hidden, node.name)
                hidden = output = analysis.policy.hidden(ref, form, exact).labels
            inner[layer.hidden] = plain_factor(hidden, node.name)
            inner[layer.output] = (
                plain_factor(output, node.name) if layer.hr is not None else inner[layer.hidden]
            )
            below.append(inner[layer.output])
        return inner

    def between(
        self, analysis: Analysis, node: fx.Node, source: fx.Node, layers: list[Layer]
    ) -> list[Relation]:
        """Columns: of the recurrence, of the first layer, of a layer on the one before."""
        count = self.directions(analysis, node)
        found: list[Relation] = [Same((layer.hh, 1), (node, layer.output)) for layer in layers]
        factor = analysis.factor(source, 2)
        for layer in layers:
            if layer.number < count:
                found.append(Same((source, 2), (layer.ih, 1)))
                if layer.bias_ih is None and factor is not None:
                    # There is no bias to fold a constant into.
                    found.append(Keep((source, 2), factor.labels == ONE))
                continue
            before = (layer.number // count - 1) * count
            refs = tuple(((node, layers[before + k].output),) for k in range(count))
            if count == 1:
                found.append(Same((layer.ih, 1), refs[0][0]))
            else:
                size = analysis.shape(layer.ih)[1]
                found.append(Move(((layer.ih, 1),), refs, np.arange(size)))
        return found

    def sizes(self, node: fx.Node, layers: list[Layer], starts: list[Start]) -> list[Relation]:
        """All layers are equally wide, and initial states with them."""
        found: list[Relation] = []
        hidden: list[Ref] = [(node, layer.hidden) for layer in layers]
        output: list[Ref] = [(node, layer.output) for layer in layers]
        for number, start in enumerate(starts):
            axes = output if number == 0 else hidden
            if start.zero and start.ref is not None:
                axes.append(start.ref)
            elif start.ref is not None:
                found += [Same(start.ref, ref) for ref in axes if ref[0] is node]
        if layers[0].hr is None:
            return [*found, SameSize(tuple(dict.fromkeys([*hidden, *output])))]
        return [*found, SameSize(tuple(hidden), tuple(output)), SameSize(tuple(output))]

    def parts(
        self, analysis: Analysis, node: fx.Node, layers: list[Layer], inner: dict[str, Factor]
    ) -> tuple[Value, ...]:
        """What is known of the output and the last states."""
        count = self.directions(analysis, node)
        outputs = [inner[layer.output] for layer in layers[-count:]]
        found = [Value(self.part_shape(node, 0), (_on(_joined(outputs), 2),))]
        for number in range(1, len(node.meta["val"])):
            read = self.rows_read(node, number, len(layers))
            chosen = [
                inner[layer.output if number == 1 else layer.hidden]
                for layer in layers
                if read[layer.number]
            ]
            factor = plain_factor(met(chosen), f"{node.name} state {number}")
            found.append(Value(self.part_shape(node, number), (_on(factor, 2),), read={0: read}))
        return tuple(found)

    @staticmethod
    def part_shape(node: fx.Node, number: int) -> tuple[int, ...]:
        return tuple(hint(s) for s in node.meta["val"][number].shape)

    @staticmethod
    def rows_read(node: fx.Node, number: int, count: int, ignored: Container[fx.Node] = ()) -> Mask:
        """Of which layers anybody reads the last state: ``h_n[-1]`` says nothing of the others."""
        read = np.zeros(count, dtype=bool)
        for item in node.users:
            if item.args[1] != number:
                continue
            for user in item.users:
                if user in ignored:
                    continue
                literal = [a for a in user.args[1:] if isinstance(a, int)]
                if user.target is aten.select.int and len(literal) == 2 and literal[0] in (0, -3):
                    read[literal[1]] = True
                elif (
                    user.target is aten.slice.Tensor
                    and not user.kwargs
                    and len(literal) == len(user.args) - 1
                    and (literal or [0])[0] in (0, -3)
                ):
                    read[slice(*literal[1:3], *literal[3:4])] = True
                else:
                    read[:] = True
        return read if read.any() else np.ones(count, dtype=bool)

    def part(self, analysis: Analysis, node: fx.Node, number: int, out: fx.Node) -> Value:
        """One of the outputs, for the getitem that takes it."""
        layers = self.layers(analysis, node)
        count = self.directions(analysis, node)
        value = analysis.value(node).parts[number]  # type: ignore[index]
        if number == 0:
            refs: list[Ref] = [(node, layer.output) for layer in layers[-count:]]
            if count == 1:
                analysis.relate(Same((out, 2), refs[0]))
            else:
                sources = tuple((ref,) for ref in refs)
                analysis.relate(Move(((out, 2),), sources, np.arange(value.shape[2])))
            return value
        for layer in layers:
            if value.read[0][layer.number]:
                name = layer.output if number == 1 else layer.hidden
                analysis.relate(Same((out, 2), (node, name)))
        return value

    # -- errors ----------------------------------------------------------------------------

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """Through all layers and steps at once; of computed initial states nothing is known."""
        source = adjoint.analysis.arguments(node)["input"]
        check_parameters(
            adjoint.analysis, source, [p for x in self.layers(adjoint.analysis, node)
                                       for p in x.parameters]
        )  # fmt: skip
        items = tuple(sorted(error))
        for place, operand in adjoint.operands(node):
            if operand is source:
                yield (
                    source,
                    adjoint.derivative(
                        node, error, place, rule=RECURRENT_BACK, items=items, context=(self, node)
                    ),
                )
            else:
                yield operand, adjoint.derivative(
                    node, error, place, rule=OPAQUE, items=items,
                    reason="it is the initial state of a recurrent layer", remedy="start from zero",
                )  # fmt: skip

    # -- who reads what --------------------------------------------------------------------

    def columns(self, analysis: Analysis, node: fx.Node) -> Iterator[tuple[Ref, torch.Tensor]]:
        """The weights of all gates, on the inputs, the layer below and the step before."""
        layers = self.layers(analysis, node)
        count = self.directions(analysis, node)
        for layer in layers:
            weights = layer.weights(analysis)
            yield (node, layer.output), weights.hh
            if weights.hr is not None:
                yield (node, layer.hidden), weights.hr
            if layer.number < count:
                yield (analysis.arguments(node)["input"], 2), weights.ih
            else:
                before = (layer.number // count - 1) * count
                for k, piece in enumerate(weights.ih.chunk(count, 1)):
                    yield (node, layers[before + k].output), piece

    def observed(
        self, analysis: Analysis, node: fx.Node, axis: str, value: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Hidden nodes as they are read: of all steps; below the last layer, of the last step.

        Args:
            axis: the axis of one layer's hidden nodes.
            value: what the op gave.

        Returns:
            ``[rows, hidden]``.
        """
        layers = self.layers(analysis, node)
        count = self.directions(analysis, node)
        number = next(layer.number for layer in layers if axis == layer.hidden)
        if number < len(layers) - count:
            return value[1][number]
        return value[0].chunk(count, 2)[number % count].flatten(0, 1)

    def reads(
        self, analysis: Analysis, node: fx.Node, live: Mapping[Ref, Mask]
    ) -> Iterator[tuple[Ref, Mask]]:
        """Follows the recurrence: a node matters if an output or a node that matters reads it."""
        layers = self.layers(analysis, node)
        count = self.directions(analysis, node)
        inner = analysis.value(node).inner
        output = {layer.number: np.zeros(len(inner[layer.output].labels), bool) for layer in layers}
        hidden = {layer.number: np.zeros(len(inner[layer.hidden].labels), bool) for layer in layers}
        for item in node.users:
            number = item.args[1]
            mask = live.get((item, 2))
            if mask is None:
                continue
            if number == 0:
                for layer, piece in zip(layers[-count:], np.split(mask, count), strict=True):
                    output[layer.number] |= piece
                continue
            for layer in layers:
                if analysis.value(item).read[0][layer.number]:
                    (output if number == 1 else hidden)[layer.number] |= mask
        below = np.zeros(analysis.shape(layers[0].ih)[1], dtype=bool)
        for layer in reversed(layers):
            out, own = output[layer.number], hidden[layer.number]
            weights = layer.weights(analysis)
            while True:
                if weights.hr is None:
                    own = out = own | out
                else:
                    own = own | columns_read(weights.hr, out)
                alive = rows_alive(own, self.kind.gates)
                more = out | columns_read(weights.hh, alive)
                if not np.any(more & ~out):
                    break
                out = more
            wanted = columns_read(weights.ih, alive)
            if layer.number < count:
                below |= wanted
            else:
                before = (layer.number // count - 1) * count
                for k, piece in enumerate(np.split(wanted, count)):
                    output[before + k] |= piece
            yield (node, layer.hidden), own & (inner[layer.hidden].labels != ZERO)
            if weights.hr is not None:
                yield (node, layer.output), out & (inner[layer.output].labels != ZERO)
        yield (analysis.arguments(node)["input"], 2), below

    def produces(self, analysis: Analysis, node: fx.Node) -> Iterator[tuple[str, Ref]]:
        layers = self.layers(analysis, node)
        for layer in layers:
            for axis in dict.fromkeys((layer.hidden, layer.output)):
                yield "" if len(layers) == 1 and axis == layer.hidden else axis, (node, axis)

    # -- the smaller op --------------------------------------------------------------------

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        analysis = rewriter.analysis
        source = analysis.arguments(node)["input"]
        layers = self.layers(analysis, node)
        reduced: dict[fx.Node, fx.Node] = {}
        for layer in layers:
            columns = (
                rewriter.columns(source, 2)
                if layer.number < self.directions(analysis, node)
                else rewriter.columns(layer.ih, 1)
            )
            extra = None
            if layer.number < self.directions(analysis, node):
                extra = rewriter.dropped_constants(source, 2, layer.ih, inputs=1)
            masses = analysis.policy.masses.get((node, layer.hidden))
            masses = None if masses is None else np.tile(masses, self.kind.gates)
            reduced |= smaller(rewriter, layer, columns, extra, masses)
        axes = [layers[0].output, layers[0].hidden]
        for state, axis in zip(self.states(analysis, node), axes, strict=False):
            reduced |= new_state(rewriter, state, 2, rewriter.layout(node, axis).size)
        return rewriter.repeat(node, constants=reduced)

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.recurrent(("LSTM", "GRU", "tanh", "relu"))


def smaller(
    rewriter: Rewriter,
    layer: Layer,
    columns: Any,
    extra: torch.Tensor | None,
    masses: Floats | None = None,
) -> dict[fx.Node, fx.Node]:
    """The parameters of one layer on the planned slots: rows averaged, columns summed.

    Args:
        masses: how much every row counts in the average; None: all alike.
    """
    layout = rewriter.layout(layer.ih, 0)
    rows = layout.rows(np.ones(layout.full), masses)
    reduced = {
        layer.ih: rewriter.constant(layer.ih, {0: rows, 1: columns}),
        layer.hh: rewriter.constant(layer.hh, {0: rows, 1: rewriter.columns(layer.hh, 1)}),
    }
    if layer.bias_ih is not None and layer.bias_hh is not None:
        reduced[layer.bias_ih] = rewriter.constant(layer.bias_ih, {0: rows}, plus=extra)
        reduced[layer.bias_hh] = rewriter.constant(layer.bias_hh, {0: rows})
    if layer.hr is not None:
        projected = rewriter.layout(layer.hr, 0)
        outputs = projected.rows(np.ones(projected.full))
        axes = {0: outputs, 1: rewriter.columns(layer.hr, 1)}
        reduced[layer.hr] = rewriter.constant(layer.hr, axes)
    return reduced


def _joined(factors: list[Factor]) -> Factor:
    """Directions side by side: no node of one is a node of another, but for zeros."""
    pieces: list[Labels] = []
    start = 0
    for factor in factors:
        zero = factor.labels == ZERO
        pieces.append(np.where(zero, ZERO, factor.labels + start))
        start += int(factor.labels.max(initial=FIRST_FREE)) - FIRST_FREE + 1
    return plain_factor(np.concatenate(pieces), "directions")


def _on(factor: Factor, axis: int) -> Factor:
    return Factor((axis,), factor.labels, factor.scales, factor.space)


@register
class LongShortTermMemory(Recurrent):
    """``aten.lstm``: outputs, h_n and c_n."""

    targets = (aten.lstm.input,)
    kind = LSTM


@register
class GatedRecurrentUnit(Recurrent):
    """``aten.gru``: outputs and h_n."""

    targets = (aten.gru.input,)
    kind = GRU


@register
class PlainRecurrent(Recurrent):
    """``aten.rnn_tanh`` and ``aten.rnn_relu``: outputs and h_n."""

    targets = (aten.rnn_tanh.input, aten.rnn_relu.input)
    kind = RNN
