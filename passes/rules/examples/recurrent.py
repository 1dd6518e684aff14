"""Recurrent layers with hidden nodes that stay equal from step to step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxfib.passes.rules.examples.networks import Example, generator_of

CLASSES = (0, 1, 0, 1, 4)  # nodes of one class have equal rows in all gates
NEAR = (0, 1, 2, 1, 4)
HIDDEN = len(CLASSES)


class Steps(nn.Module):
    """A recurrent layer and a linear one that reads every step."""

    def __init__(self, mode: str, near: bool) -> None:
        super().__init__()
        generator = generator_of(5)
        if mode in ("LSTM", "GRU"):
            self.layer: nn.RNNBase = getattr(nn, mode)(3, HIDDEN, dtype=torch.float64)
        else:
            self.layer = nn.RNN(3, HIDDEN, nonlinearity=mode, dtype=torch.float64)
        self.head = nn.Linear(HIDDEN, 2, dtype=torch.float64)
        plant(self, self.layer, near, generator)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.layer(x)[0])
        return found


class Loop(nn.Module):
    """A recurrent cell that starts from zeros, and a linear layer that reads every step."""

    def __init__(self, mode: str, near: bool) -> None:
        super().__init__()
        generator = generator_of(7)
        if mode in ("LSTMCell", "GRUCell"):
            self.cell: nn.RNNCellBase = getattr(nn, mode)(3, HIDDEN, dtype=torch.float64)
        else:
            self.cell = nn.RNNCell(3, HIDDEN, nonlinearity=mode, dtype=torch.float64)
        self.head = nn.Linear(HIDDEN, 2, dtype=torch.float64)
        plant(self, self.cell, near, generator)

    def forward(self, x: Tensor) -> Tensor:
        steps = []
        state = None
        for step in x.unbind(0):
            state = self.cell(step, state)
            steps.append(self.head(state[0] if isinstance(state, tuple) else state))
        return torch.stack(steps)


def plant(
    model: nn.Module, layer: nn.RNNBase | nn.RNNCellBase, near: bool, generator: torch.Generator
) -> None:
    """Two fibers of hidden nodes; with ``near`` one node of the first differs in one gate."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5, generator=generator)
        for name, parameter in layer.named_parameters():
            for first in range(0, len(parameter), HIDDEN):
                parameter[first + 2] = parameter[first]
                parameter[first + 3] = parameter[first + 1]
            if name.startswith("weight_hh"):
                # No plain duplicates: the columns of equal nodes change by a sum of zero.
                change = torch.randn(len(parameter), dtype=torch.float64, generator=generator)
                parameter[:, 1] += change
                parameter[:, 3] -= change
            if near and name.startswith("bias_ih"):
                parameter[2 - HIDDEN] += 0.25  # node 2 in the last gate


def recurrent(modes: tuple[str, ...]) -> list[Example]:
    """Two fibers; a near miss in one gate keeps the nodes of one apart."""
    return [example(Steps, "layer", "_l0", mode, near) for mode in modes for near in (False, True)]


def cells(modes: tuple[str, ...]) -> list[Example]:
    """The same for cells that the model calls step by step."""
    return [example(Loop, "cell", "", mode, near) for mode in modes for near in (False, True)]


def example(kind: type[nn.Module], path: str, suffix: str, mode: str, near: bool) -> Example:
    """One network with the slots that its parameters must have."""
    module = kind(mode, near).eval()
    labels = NEAR if near else CLASSES
    gates = len(module.get_parameter(f"{path}.weight_hh{suffix}")) // HIDDEN
    rows = tuple(gate * HIDDEN + label for gate in range(gates) for label in labels)
    slots = {
        (f"{path}.weight_ih{suffix}", 0): rows,
        (f"{path}.weight_hh{suffix}", 0): rows,
        (f"{path}.weight_hh{suffix}", 1): labels,
        ("head.weight", 1): labels,
    }
    inputs = (torch.randn(5, 2, 3, dtype=torch.float64, generator=generator_of(6)),)
    return Example(f"{mode}_near" if near else mode, module, inputs, slots)
