"""The report, part by part, and the page it makes.

python examples/read_the_report.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import fxfib


class Sorted(nn.Module):
    """A network with an operator that no rule covers: its inputs keep their width."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 7)
        self.third = nn.Linear(7, 2)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Sorting its hidden nodes is what makes the second layer unmergeable."""
        hidden = self.second(self.first(value).relu())
        return self.third(hidden.sort(1).values)


def main(folder: Path) -> None:
    """Plant one of each kind, compile, read."""
    torch.manual_seed(0)
    model = Sorted().eval()
    with torch.no_grad():
        weight, bias = model.first.weight, model.first.bias
        weight[1], bias[1] = weight[0], bias[0]  # a fiber
        weight[2], bias[2] = 3.0 * weight[0], 3.0 * bias[0]  # of the same fiber, scaled
        weight[3], bias[3] = 0.0, 0.5  # constant
        model.second.weight[:, 4] = 0.0  # unread
    inputs = torch.randn(3, 6)
    report = fxfib.compile(model, 0.0, inputs).fibration
    print(report)

    (group,) = report.merged_groups
    print(f"\n{group.members}: {group.nodes} nodes, {group.fibers} after")
    print(f"  merged {group.merged}, of them scaled {group.scaled}")
    print(f"  constant {group.constant}, unread {group.unread}")
    assert (group.merged, group.scaled, group.constant, group.unread) == (2, 1, 1, 1)
    layer = report.layers[0]
    print(f"  where its nodes went: {layer.slots} (-1 constant, -2 unread)")
    for refusal in report.refusals:
        print(f"refused at {refusal.node}: {refusal.op}, {refusal.reason}; {refusal.remedy}")
    print(f"certificate: {report.error:.1e} absolute, {report.exact_error:.1e} in float64")

    curve = fxfib.eps_curve(model, inputs, eps=(0.0, 0.3, 0.6), progress=False)
    report.to_html(folder / "report.html", curve=curve)
    (folder / "report.json").write_text(report.to_json(), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
