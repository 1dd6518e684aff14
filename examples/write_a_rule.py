"""Teach fxfib an operator: one class, found by its ATen target.

python examples/write_a_rule.py
"""

import torch
from torch import nn

import fxfib
from fxfib.passes.rules import overloads, register
from fxfib.passes.rules.activation import Unary


class Net(nn.Module):
    """`torch.sinc` is an activation that no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 3)
        with torch.no_grad():
            self.first.weight[4], self.first.bias[4] = self.first.weight[1], self.first.bias[1]

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Two layers with sinc between them."""
        return self.second(torch.sinc(self.first(value)))


def main() -> None:
    """Refused; the rule; merged."""
    torch.manual_seed(0)
    model, inputs = Net().eval(), torch.randn(4, 5)
    report = fxfib.compile(model, 0.0, (inputs,)).fibration
    print(report)
    assert report.refusals and not report.merged_groups

    # 1. The target: print(fxfib.capture.capture(model, (inputs,)).graph_module.graph).
    # 2. The family: it maps every number by itself, and nothing is known of factors: `Unary`.
    # 3. The class.  Its examples and near misses come with the family; `make test` runs them.
    @register
    class Sinc(Unary):
        targets = overloads("sinc")

    report = fxfib.compile(model, 0.0, (inputs,)).fibration
    print(report)
    assert not report.refusals and report.merged_groups[0].merged == 1


if __name__ == "__main__":
    main()
