"""Recurrent layers as one ONNX node a layer, whatever the number of steps.

The exporter unrolls ``nn.RNN``, and writes an LSTM with projections without them.  ONNX has no
projections either, but they can be moved out of the recurrence: with ``h = P m``, the state
``m = o tanh(c)`` obeys ``W h = (W P) m``, and the outputs are ``P m``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset18

# Its types are those of onnxscript numbers; here they are symbols.
op: Any = opset18


def _joined(parts: Sequence[Any], axis: int = 0) -> Any:
    return op.Concat(*parts, axis=axis) if len(parts) > 1 else parts[0]


def _stacked(parts: Sequence[Any]) -> Any:
    """One slice a direction."""
    return _joined([op.Unsqueeze(part, [0]) for part in parts])


def _run(node: Callable[..., Any], value: Any, tensors: Sequence[Any], **options: Any) -> Any:
    """The ONNX node; all steps as ``[steps, batch, directions * hidden]``, then the last states."""
    weight, recurrence, bias, *states = tensors
    steps, *last = node(value, weight, recurrence, bias, None, *states, **options)
    return (op.Reshape(op.Transpose(steps, perm=[0, 2, 1, 3]), [0, 0, -1]), *last)


def _gated(gates: Sequence[int], tensors: Sequence[Any], hidden: int) -> list[Any]:
    """Weights and biases with their gates in ONNX's order."""
    if len(gates) == 1:
        return list(tensors)
    order = [gate * hidden + node for gate in gates for node in range(hidden)]
    return [op.Gather(tensor, order, axis=0) for tensor in tensors]


def _plain(
    node: Callable[..., Any], gates: Sequence[int], activation: str = "", **more: Any
) -> Callable[..., Any]:
    def translate(
        input: Any,
        hx: Any,
        params: Sequence[Any],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Any, Any]:
        """``rnn_tanh.input``, ``rnn_relu.input``, ``gru.input``: all steps and the last state."""
        value = op.Transpose(input, perm=[1, 0, 2]) if batch_first else input
        states = []
        for own, start, options in _layers(params, num_layers, has_biases, bidirectional, 0):
            hidden = own[0][1].shape[1]
            own = [_gated(gates, part, hidden) for part in own]
            bias = [op.Concat(part[2], part[3], axis=0) for part in own] if has_biases else None
            tensors = (
                _stacked([part[0] for part in own]),
                _stacked([part[1] for part in own]),
                None if bias is None else _stacked(bias),
                start(hx),
            )
            if activation:
                options = {**options, "activations": [activation] * len(own)}
            value, last = _run(node, value, tensors, hidden_size=hidden, **options, **more)
            states.append(last)
        value = op.Transpose(value, perm=[1, 0, 2]) if batch_first else value
        return value, _joined(states)

    return translate


def _long_short_term_memory(
    input: Any,
    hx: Sequence[Any],
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Any, Any, Any]:
    """``lstm.input``, with or without projections: all steps, last h, last c."""
    value = op.Transpose(input, perm=[1, 0, 2]) if batch_first else input
    has_projections = hx[0].shape[2] != hx[1].shape[2]
    hidden = hx[1].shape[2]
    last_h, last_c = [], []
    for own, start, options in _layers(
        params, num_layers, has_biases, bidirectional, has_projections
    ):
        gated = 4 if has_biases else 2  # the projection behind them has no gates
        # i, f, g, o here; i, o, f, g there.
        own = [_gated((0, 3, 1, 2), parts[:gated], hidden) + list(parts[gated:]) for parts in own]
        weight = [parts[0] for parts in own]
        recurrence = [parts[1] for parts in own]
        first = start(hx[0])
        if has_projections:
            # The first state is no product with P: it enters as inputs of the first step alone.
            value, weight = _first_step(value, first, weight, recurrence)
            recurrence = [op.MatMul(parts[1], parts[-1]) for parts in own]
            first = op.Expand(op.CastLike([0.0], hx[1]), op.Shape(start(hx[1])))
        bias = [op.Concat(parts[2], parts[3], axis=0) for parts in own] if has_biases else None
        tensors = (
            _stacked(weight), _stacked(recurrence), None if bias is None else _stacked(bias),
            first, start(hx[1]),
        )  # fmt: skip
        value, state, cell = _run(op.LSTM, value, tensors, hidden_size=hidden, **options)
        if has_projections:
            turned = [op.Transpose(parts[-1], perm=[1, 0]) for parts in own]
            cuts = [([hidden * k], [hidden * (k + 1)]) for k in range(len(own))]
            value = _joined(
                [op.MatMul(op.Slice(value, *cut, [2]), t)
                 for cut, t in zip(cuts, turned, strict=True)],
                axis=2,
            )  # fmt: skip
            state = op.MatMul(state, _stacked(turned))
        last_h.append(state)
        last_c.append(cell)
    value = op.Transpose(value, perm=[1, 0, 2]) if batch_first else value
    return value, _joined(last_h), _joined(last_c)


def _first_step(
    value: Any, first: Any, weight: Sequence[Any], recurrence: Sequence[Any]
) -> tuple[Any, list[Any]]:
    """Inputs with the first state beside those of the first step, the last one going backwards."""
    steps = op.Sub(op.Shape(value, start=0, end=1), [1])
    none = op.Constant(value_ints=[0])
    two = op.Constant(value_ints=[0, 0])
    wide = [value]
    for k in range(len(weight)):
        state = op.Slice(first, [k], [k + 1], [0])
        rest = (none, steps) if k == 0 else (steps, none)
        pads = op.Concat(rest[0], two, rest[1], two, axis=0)
        wide.append(op.Pad(state, pads))
    zero = [op.Sub(part, part) for part in recurrence]
    weights = [
        op.Concat(
            weight[k], *(recurrence[k] if k == j else zero[k] for j in range(len(weight))), axis=1
        )
        for k in range(len(weight))
    ]
    return op.Concat(*wide, axis=2), weights


def _layers(
    params: Sequence[Any], count: int, has_biases: bool, bidirectional: bool, projections: int
) -> Any:
    """Layer by layer: the parameters of each direction, how to cut a state, the node's options."""
    directions = 2 if bidirectional else 1
    each = (4 if has_biases else 2) + int(projections)
    options = {"direction": "bidirectional" if bidirectional else "forward"}
    for layer in range(count):
        low, high = layer * directions, (layer + 1) * directions
        own = [params[place * each : (place + 1) * each] for place in range(low, high)]
        yield own, lambda state, low=low, high=high: op.Slice(state, [low], [high], [0]), options


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.rnn_tanh.input: _plain(op.RNN, (0,), "Tanh"),
    torch.ops.aten.rnn_relu.input: _plain(op.RNN, (0,), "Relu"),
    # r, z, n here; z, r, n there.
    torch.ops.aten.gru.input: _plain(op.GRU, (1, 0, 2), linear_before_reset=1),
    torch.ops.aten.lstm.input: _long_short_term_memory,
}
