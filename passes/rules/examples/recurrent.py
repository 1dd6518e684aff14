"""Recurrent layers with hidden nodes that stay equal from step to step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxfib.passes.rules.examples.networks import Example, generator_of

CLASSES = (0, 1, 0, 1, 4)  # nodes of one class have equal rows in all gates
NEAR = (0, 1, 2, 1, 4)
HIDDEN = len(CLASSES)


class Recurrence(nn.Module):
    """Hidden nodes, and a linear layer that reads them at every step."""

    def __init__(self, hidden: nn.RNNBase | nn.RNNCellBase, near: str) -> None:
        super().__init__()
        generator = generator_of(5)
        self.hidden = hidden
        self.head = nn.Linear(HIDDEN, 2, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.5, generator=generator)
            plant(hidden, near, generator)
        self.start: nn.Parameter | None = None
        if near == "start":
            # Equal rows, another beginning: node 2 is not node 0 from the first step on.
            start = torch.tensor([0.3, -0.2, 0.9, -0.2, 0.4], dtype=torch.float64)
            self.start = nn.Parameter(start)


class Steps(Recurrence):
    """A recurrent layer as a whole."""

    def __init__(self, mode: str, near: str) -> None:
        super().__init__(recurrent_of(mode, nn.RNN), near)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        if self.start is not None:
            one = self.start.expand(1, x.shape[1], HIDDEN)
            state = (one, one) if isinstance(self.hidden, nn.LSTM) else one
        found: Tensor = self.head(self.hidden(x, state)[0])
        return found


class Loop(Recurrence):
    """A recurrent cell, called step by step."""

    def __init__(self, mode: str, near: str) -> None:
        super().__init__(recurrent_of(mode, nn.RNNCell), near)

    def forward(self, x: Tensor) -> Tensor:
        steps = []
        state = None
        if self.start is not None:
            one = self.start.expand(x.shape[1], HIDDEN)
            state = (one, one) if isinstance(self.hidden, nn.LSTMCell) else one
        for step in x.unbind(0):
            state = self.hidden(step, state)
            steps.append(self.head(state[0] if isinstance(state, tuple) else state))
        return torch.stack(steps)


def recurrent_of(mode: str, plain: type[nn.Module]) -> Any:
    """A module by its name, or the plain one by its nonlinearity."""
    if hasattr(nn, mode):
        return getattr(nn, mode)(3, HIDDEN, dtype=torch.float64)
    return plain(3, HIDDEN, nonlinearity=mode, dtype=torch.float64)


def plant(layer: nn.Module, near: str, generator: torch.Generator) -> None:
    """Two fibers of hidden nodes; node 2 of the first differs in the last gate as ``near`` says."""
    node = 2 - HIDDEN
    for name, parameter in layer.named_parameters():
        for first in range(0, len(parameter), HIDDEN):
            parameter[first + 2] = parameter[first]
            parameter[first + 3] = parameter[first + 1]
        if name.startswith("weight_hh"):
            # No plain duplicates: the columns of equal nodes change by a sum of zero.
            change = torch.randn(len(parameter), dtype=torch.float64, generator=generator)
            parameter[:, 1] += change
            parameter[:, 3] -= change
            parameter[node, 4] += 0.25 * (near == "recurrence")
        if name.startswith("bias_ih"):
            parameter[node] += 0.25 * (near in ("bias", "split"))
        if name.startswith("bias_hh"):
            parameter[node] -= 0.25 * (near == "split")


def nears(mode: str) -> tuple[str, ...]:
    """Ways to miss.  Only a GRU tells its two biases apart: one is inside a product."""
    split = ("split",) if mode.startswith("GRU") else ()
    return ("", "bias", "recurrence", "start", *split)


def recurrent(modes: tuple[str, ...]) -> list[Example]:
    """Two fibers; a near miss keeps the nodes of one apart."""
    return [example(Steps(mode, near), mode, near) for mode in modes for near in nears(mode)]


def cells(modes: tuple[str, ...]) -> list[Example]:
    """The same for cells that the model calls step by step."""
    return [example(Loop(mode, near), mode, near) for mode in modes for near in nears(mode)]


def example(module: Recurrence, mode: str, near: str) -> Example:
    """One network with the slots that its parameters must have."""
    labels = NEAR if near else CLASSES
    slots = {}
    for name, parameter in module.hidden.named_parameters():
        gates = len(parameter) // HIDDEN
        slots[f"hidden.{name}", 0] = tuple(
            g * HIDDEN + label for g in range(gates) for label in labels
        )
        if name.startswith("weight_hh"):
            slots[f"hidden.{name}", 1] = labels
    slots["head.weight", 1] = labels
    inputs = (torch.randn(5, 2, 3, dtype=torch.float64, generator=generator_of(6)),)
    return Example(f"{mode}_{near}" if near else mode, module.eval(), inputs, slots)
