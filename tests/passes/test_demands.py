"""What the outputs demand of nodes is what they change by, in one unit for all layers."""

import pytest
import torch
from torch import nn

import fxfib
from fxfib.passes.demands import demands_of
from fxfib.passes.difference import difference
from fxfib.workshop import Workshop


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(7, 23), nn.ReLU(), nn.Linear(23, 19), nn.Tanh(), nn.Linear(19, 3)
    ).eval()


def convolution() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 11, 3), nn.ReLU(), nn.Conv2d(11, 7, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(28, 5),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize(
    ("model", "inputs"),
    [(perceptron(), torch.randn(500, 7)), (convolution(), torch.randn(500, 3, 6, 6))],
)
def test_it_is_how_far_the_outputs_go(
    model: nn.Sequential, inputs: torch.Tensor, scores: bool
) -> None:
    workshop = Workshop(model, (inputs[:2],), criterion="energy", calibration=inputs)
    places = {(node, 1): node for node, _ in workshop.outlook.asked}
    found = demands_of(workshop.graph_module, places, workshop.batches, scores=scores)
    assert found is not None and len(found) > 1
    layers = [k for k, m in enumerate(model) if hasattr(m, "weight")][: len(found)]
    size, spread = 1e-2, float(model(inputs).detach().var())
    for layer, matrix in zip(layers, found.values(), strict=True):
        with torch.no_grad():
            wanted = model(inputs)
            value = model[: layer + 1](inputs)
            moved = model[layer + 1 :](value + size * torch.randn(value.shape))
            gap = float(difference(moved, wanted, spread, scores=scores))
        assert float(matrix.trace()) * size**2 == pytest.approx(gap, rel=0.2)


def test_the_layer_goes_first_whose_readers_matter_least() -> None:
    """Two branches alike, but the outputs read one of them a hundred times as strongly."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.left, self.right = nn.Linear(9, 20), nn.Linear(9, 20)
            self.a, self.b, self.out = nn.Linear(20, 12), nn.Linear(20, 12), nn.Linear(24, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = self.a(self.left(x).relu()).relu(), self.b(self.right(x).relu()).relu()
            return self.out(torch.cat([a, b / 100], 1))

    inputs = torch.randn(300, 9)
    small = fxfib.tune(
        Branches().eval(), example_inputs=(inputs[:2],), params=0.6, calibration=inputs, refine=0
    )
    widths = [small.get_submodule(n).weight.shape[0] for n in ("left", "right", "a", "b")]
    assert widths[0] > 2 * widths[1] and widths[2] > 2 * widths[3]


def test_what_has_no_such_demand_is_told_by_its_readers() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer = nn.Linear(5, 7), nn.LSTM(7, 11, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.first(x).relu())[0][:, -1]

    class Chooser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = perceptron()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inside(x).argmax(1)

    for model, inputs in ((Reader(), torch.randn(20, 4, 5)), (Chooser(), torch.randn(20, 7))):
        workshop = Workshop(model.eval(), (inputs,), criterion="energy", calibration=inputs)
        assert workshop.activations
        assert not any(known.measured for known in workshop.activations.values())


def test_the_gradients_of_the_model_are_left_alone() -> None:
    for trained in (True, False):
        model, inputs = perceptron().requires_grad_(trained), torch.randn(40, 7)
        workshop = Workshop(model, (inputs[:2],), criterion="energy", calibration=inputs)
        assert all(known.measured for known in workshop.activations.values())
        assert all(p.grad is None for p in workshop.graph_module.parameters())
        assert all(p.grad is None and p.requires_grad == trained for p in model.parameters())
