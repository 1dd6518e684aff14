"""Recurrent layers and cells: hidden nodes are copied in all gates, states and readers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from planting import Builder, Copies, Holder, concatenated, noise
from torch import Tensor, nn

from strategies.linear import affine
from strategies.values import Val, assign

KINDS: dict[str, tuple[type[nn.RNNBase], type[nn.RNNCellBase], int, dict[str, str]]] = {
    "lstm": (nn.LSTM, nn.LSTMCell, 4, {}),
    "gru": (nn.GRU, nn.GRUCell, 3, {}),
    "tanh": (nn.RNN, nn.RNNCell, 1, {}),
    "relu": (nn.RNN, nn.RNNCell, 1, {"nonlinearity": "relu"}),
}


def alike(b: Builder, copies: Copies) -> Copies:
    """Other channels with as many copies in all, of other members, in the same places."""
    order = b.rng.permutation(copies.size)
    ident = copies.ident % (64 * 64) + b.tag() * 64 * 64
    return replace(copies, member=order[copies.member], ident=ident, cuts=(), blocks=1)


def gated(copies: Copies, gates: int) -> Copies:
    """The rows of all gates, gate by gate."""
    return replace(
        concatenated([copies] * gates),
        ident=np.concatenate([copies.ident * 16 + k for k in range(gates)]),
    )


def direction(
    b: Builder,
    source: Copies,
    hidden: Copies,
    output: Copies,
    kind: str,
    bias: bool,
    parted: bool = True,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters of one layer in one direction, of the base and of the wider network.

    Args:
        source: channels that it reads.
        hidden: of the cell.
        output: of what it gives and reads again: ``hidden``, or a projection of it.
        parted: copies share the sum of both biases alone.
    """
    gates = KINDS[kind][2]
    base: dict[str, Any] = {}
    wide: dict[str, Any] = {}
    for name, read in (("ih", source), ("hh", output)):
        weights, offsets, wide_weights, wide_offsets = [], [], [], []
        for gate in range(gates):
            weight = b.normal(hidden.size, read.size) / np.sqrt(read.size)
            offset = b.normal(hidden.size) if bias else None
            if gate < gates - 1:
                # Two nodes that agree in all gates but the last one are no fiber.
                weight[1] = weight[0]
                if offset is not None:
                    offset[1] = offset[0]
            found = b.widen(weight[:, :, None], offset, read, hidden)
            weights.append(weight)
            wide_weights.append(found[0][:, :, 0])
            offsets.append(offset if bias else np.zeros(0))
            wide_offsets.append(found[1])
        base[f"weight_{name}"] = np.concatenate(weights)
        wide[f"weight_{name}"] = np.concatenate(wide_weights)
        if bias:
            base[f"bias_{name}"] = np.concatenate(offsets)
            wide[f"bias_{name}"] = np.concatenate(wide_offsets)
    if bias and parted:
        # Only the sum of both biases counts, but for the gate of a GRU that comes behind a product.
        shift = noise(
            b.tag(), np.tile(hidden.ident, gates), np.repeat(np.arange(gates), len(hidden))
        )
        if kind == "gru":
            shift[2 * len(hidden) :] = 0.0
        wide["bias_ih"] = wide["bias_ih"] + shift
        wide["bias_hh"] = wide["bias_hh"] - shift
    if output is not hidden:
        weight = b.normal(output.size, hidden.size) / np.sqrt(hidden.size)
        base["weight_hr"] = weight
        wide["weight_hr"] = b.widen(weight[:, :, None], None, hidden, output)[0][:, :, 0]
    return base, wide


def first_state(
    b: Builder, v: Val, parts: list[Copies], name: str
) -> tuple[str, tuple[str, ...]] | None:
    """How the layer's first state is made: a word, and the values that it is made from."""
    way = b.pick(("omitted", "omitted", "zeros", "parameter", "computed"))
    if way == "parameter":
        numbers = [b.normal(part.size) for part in parts]
        wide = [n[part.member] for n, part in zip(numbers, parts, strict=True)]
        holders = [Holder(state=torch.from_numpy(np.stack(n)[:, None])) for n in (numbers, wide)]
        return way, (b.part(*holders, name=name),)
    if way == "computed":
        axis = 2 if v.first else 1
        mean = b.step(lambda _, x: x.mean(axis), (v.name,))
        found = [affine(b, Val(mean, v.copies), part, bias=True).name for part in parts]
        return way, tuple(found)
    return way, ()


def starting(
    word: str, sources: tuple[str, ...], count: int, width: int
) -> Callable[[Any, Tensor, tuple[Tensor, ...]], Tensor | None]:
    """``[layers * directions, batch, width]`` from the module tree, the input and ``sources``."""

    def start(parts: Any, x: Tensor, states: tuple[Tensor, ...]) -> Tensor | None:
        if word == "zeros":
            return x.new_zeros(count, x.shape[0], width)
        if word == "parameter":
            state: Tensor = parts[sources[0]].state
            return state.expand(-1, x.shape[0], -1).contiguous()
        return torch.stack([torch.tanh(state) for state in states]) if states else None

    return start


def recurrent(b: Builder, v: Val) -> Val | None:
    """``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` over the tokens, one of its results read."""
    if len(v.space) != 1 or v.space[0] > 9:
        return None
    first = v.first
    kind = b.pick(("lstm", "lstm", "gru", "gru", "tanh", "relu"))
    constant = bool(v.copies.constant.any())
    layers, ways = b.pick((1, 1, 2)), b.pick((1, 1, 2))
    bias = constant or b.flip(0.75)
    projected = kind == "lstm" and b.flip(0.25)
    hidden = b.copies(b.pick((3, 4, 5)), whole=True)
    hidden = replace(hidden, cuts=())
    short = b.copies(b.pick((2, 3)), whole=True) if projected else None
    if short is not None and (
        short.size >= hidden.size or len(short) >= len(hidden)
    ):  # torch wants a projection to be smaller
        short = None
    batch_first = b.flip()
    cells, outputs, tensors = [], [], ({}, {})
    source = v.copies
    for layer in range(layers):
        made = []
        for way in range(ways):
            own = hidden if not cells else alike(b, hidden)
            out = own if short is None else (short if not cells else alike(b, short))
            found = direction(b, source, own, out, kind, bias)
            suffix = f"_l{layer}" + ("_reverse" if way else "")
            for tree, values in zip(tensors, found, strict=True):
                tree.update({f"{name}{suffix}": value for name, value in values.items()})
            cells.append(own)
            outputs.append(out)
            made.append(out)
        source = concatenated(made) if ways > 1 else made[0]
    word, states = first_state(b, v, outputs, "state")
    cell_states = states
    if kind == "lstm" and states:
        while True:
            other, cell_states = first_state(b, v, cells, "cell")
            if other == word:
                break
    cls, _, gates, extra = KINDS[kind]
    options = {
        "num_layers": layers, "bidirectional": ways == 2, "bias": bias, "batch_first": batch_first,
    }  # fmt: skip
    sizes = ((v.copies.size, hidden.size, outputs[0].size), (
        len(v.copies), len(hidden), len(outputs[0])
    ))  # fmt: skip
    modules = []
    for values, (inside, width, out) in zip(tensors, sizes, strict=True):
        more = {"proj_size": out} if outputs[0] is not cells[0] else {}
        modules.append(assign(cls(inside, width, **options, **extra, **more), **values))
    part = b.part(*modules, name=kind)
    for name in tensors[0]:
        place = 2 * int(name.split("_l")[1][0]) if ways == 2 else int(name.split("_l")[1][0])
        place += name.endswith("_reverse")
        if "_hr" in name:
            b.candidate(part, name, 0, outputs[place])
        else:
            b.candidate(part, name, 0, gated(cells[place], gates))
    count = layers * ways

    def call(h_width: int, c_width: int) -> Callable[..., Any]:
        start = starting(word, states, count, h_width)
        start_cell = starting(word, cell_states, count, c_width)

        def run(parts: Any, x: Tensor, *given: Tensor) -> Any:
            x = x.transpose(1, 2) if first else x
            h = start(parts, x, given[:count])
            state: Any = h
            if kind == "lstm" and h is not None:
                state = (h, start_cell(parts, x, given[count:]))
            steps, state = parts[part](x if batch_first else x.transpose(0, 1), state)
            steps = steps if batch_first else steps.transpose(0, 1)
            return (steps, *(state if kind == "lstm" else (state,)))

        return run

    given = (*states, *cell_states) if word == "computed" and kind == "lstm" else states
    name = b.step(
        call(outputs[0].size, hidden.size), (v.name, *(given if word == "computed" else ())),
        call(len(outputs[0]), len(hidden)),
    )  # fmt: skip
    b.log.append(
        f"{name} = {kind}({v.name}) {hidden.size}/{len(hidden)} x{layers} "
        f"{'both ways ' * (ways == 2)}{'projected ' * ('proj_size' in more)}"
        f"{'' if bias else 'no bias '}state {word}"
    )
    return read(b, v, name, source, outputs, cells if kind == "lstm" else outputs)


def read(
    b: Builder, v: Val, name: str, steps: Copies, outputs: list[Copies], cells: list[Copies]
) -> Val:
    """One of the results, or all steps and a last state together."""
    way = b.pick(("steps", "steps", "last step", "h", "c", "all h", "both"))
    if way == "both" and len(steps) != len(outputs[-1]):
        way = "steps"
    b.log.append(f"  {way} of {name}")
    if way == "steps":
        return Val(b.step(lambda _, x: x[0], (name,)), steps, v.space, first=False)
    if way == "both":
        made = b.step(lambda _, x: x[0] + x[1][-1].unsqueeze(1), (name,))
        return Val(made, steps, v.space, first=False)
    if way == "last step":
        return Val(b.step(lambda _, x: x[0][:, -1], (name,)), steps)
    if way == "all h":
        made = b.step(lambda _, x: x[1].transpose(0, 1).flatten(1), (name,))
        return Val(made, concatenated(outputs) if len(outputs) > 1 else outputs[0])
    copies = (cells if way == "c" else outputs)[-1]
    return Val(b.step(lambda _, x: x[-1 if way == "c" else 1][-1], (name,)), copies)


def stepped(b: Builder, v: Val) -> Val | None:
    """A cell called step by step, its states laid side by side or the last one taken."""
    if len(v.space) != 1 or v.space[0] > 6:
        return None
    first = v.first
    kind = b.pick(("lstm", "gru", "tanh", "relu"))
    constant = bool(v.copies.constant.any())
    bias = constant or b.flip(0.75)
    hidden = replace(b.copies(b.width(), whole=True), cuts=())
    # What cells add up is colored part by part where covers must last.
    found = direction(b, v.copies, hidden, hidden, kind, bias, parted=not b.covers)
    word, states = first_state(b, v, [hidden], "state")
    _, cls, gates, extra = KINDS[kind]
    modules = [
        assign(cls(inside, width, bias=bias, **extra), **values)
        for values, inside, width in (
            (found[0], v.copies.size, hidden.size), (found[1], len(v.copies), len(hidden))
        )
    ]  # fmt: skip
    part = b.part(*modules, name=f"{kind}cell")
    for name in found[0]:
        b.candidate(part, name, 0, gated(hidden, gates))
    way = b.pick(("steps", "last", "cells") if kind == "lstm" else ("steps", "last"))

    def call(width: int) -> Callable[..., Tensor]:
        start = starting(word, states, 1, width)

        def run(parts: Any, x: Tensor, *given: Tensor) -> Tensor:
            x = x.transpose(1, 2) if first else x
            state: Any = start(parts, x, given)
            state = None if state is None else state[0]
            if kind == "lstm" and state is not None:
                state = (state, state)
            results = []
            for step in x.unbind(1):
                state = parts[part](step, state)
                results.append(state[way == "cells"] if kind == "lstm" else state)
            return results[-1] if way == "last" else torch.stack(results, 1)

        return run

    given = states if word == "computed" else ()
    name = b.step(call(hidden.size), (v.name, *given), call(len(hidden)))
    b.log.append(
        f"{name} = {kind} cell({v.name}) {hidden.size}/{len(hidden)} "
        f"{'' if bias else 'no bias '}state {word}, {way}"
    )
    return Val(name, hidden, () if way == "last" else v.space, first=False)
