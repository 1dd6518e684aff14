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
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.5, generator=generator)
            for name, parameter in self.layer.named_parameters():
                for first in range(0, len(parameter), HIDDEN):
                    parameter[first + 2] = parameter[first]
                    parameter[first + 3] = parameter[first + 1]
                if name.startswith("weight_hh"):
                    # No plain duplicates: the columns of equal nodes change by a sum of zero.
                    change = torch.randn(len(parameter), dtype=torch.float64, generator=generator)
                    parameter[:, 1] += change
                    parameter[:, 3] -= change
            if near:
                self.layer.get_parameter("bias_ih_l0")[2 - HIDDEN] += 0.25  # node 2 in the last gate

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.layer(x)[0])
        return found


def recurrent(modes: tuple[str, ...]) -> list[Example]:
    """Two fibers; a near miss in one gate keeps the nodes of one apart."""
    found = []
    for mode in modes:
        for near in (False, True):
            module = Steps(mode, near).eval()
            labels = NEAR if near else CLASSES
            gates = module.layer.get_parameter("weight_hh_l0").shape[0] // HIDDEN
            rows = tuple(gate * HIDDEN + label for gate in range(gates) for label in labels)
            slots = {
                ("layer.weight_ih_l0", 0): rows,
                ("layer.weight_hh_l0", 0): rows,
                ("layer.weight_hh_l0", 1): labels,
                ("head.weight", 1): labels,
            }
            inputs = (torch.randn(5, 2, 3, dtype=torch.float64, generator=generator_of(6)),)
            found.append(Example(f"{mode}_near" if near else mode, module, inputs, slots))
    return found
