"""What "exact" means at eps = 0: equal up to the rounding of sums, and not a bit more.

python examples/what_exact_means.py
"""

import torch
from torch import nn

import fxfib


def network(gap: float) -> nn.Sequential:
    """Hidden nodes 0 and 1 differ by `gap` in one weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).eval()
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = model[0].weight[0], model[0].bias[0]
        model[0].weight[1, 2] += gap
    return model


def merged(model: nn.Module) -> int:
    """Nodes that were merged away."""
    report = fxfib.compile(model, 0.0, (torch.randn(4, 5),)).fibration
    return sum(group.merged for group in report.groups)


def main() -> None:
    """Equal, a near miss, and a sum that rounds."""
    print(f"equal rows: {merged(network(0.0))} node merged")
    assert merged(network(0.0)) == 1
    # A thousandth is far outside the rounding of float32: it is another function.
    print(f"rows that differ by 0.001: {merged(network(1e-3))} merged")
    assert merged(network(1e-3)) == 0

    # Merged columns are summed: 0.1 + 0.2 and 0.3 are one weight, whatever their last bits say.
    model = nn.Sequential(network(0.0)[0], nn.ReLU(), nn.Linear(7, 2), nn.Tanh(), nn.Linear(2, 3))
    with torch.no_grad():
        hidden = model[2]
        hidden.weight[1], hidden.bias[1] = hidden.weight[0], hidden.bias[0]
        hidden.weight[0, :2] = torch.tensor([0.1, 0.2])
        hidden.weight[1, :2] = torch.tensor([0.3, 0.0])
    report = fxfib.compile(model.eval(), 0.0, (torch.randn(4, 5),)).fibration
    print(report)
    assert [group.merged for group in report.groups] == [1, 1, 0]
    # Both networks were run in float64 too: what is left there is rounding of the weights alone.
    assert report.exact_error < 1e-6 < report.tolerance


if __name__ == "__main__":
    main()
