"""What eps > 0 promises: nodes of one color are eps-close in every collapsed entry (Eq. 3)."""

import pytest
import torch
from torch import Tensor, nn

import fxfib


def perceptron() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(12, 60), nn.Tanh(), nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 40), nn.Sigmoid(),
        nn.Linear(40, 5),
    )  # fmt: skip


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 40, 3, padding=1), nn.SiLU(), nn.Conv2d(40, 30, 3, padding=1), nn.ReLU(),
        nn.Conv2d(30, 20, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 5),
    )  # fmt: skip


INPUTS = {perceptron: torch.randn(2, 12), convolutions: torch.randn(2, 3, 8, 8)}


def collapsed(weight: Tensor, bias: Tensor, labels: Tensor | None) -> Tensor:
    """The signature of every output node, straight from the equation."""
    weight = weight.detach().double().flatten(2) if weight.ndim > 2 else weight.detach().double()
    if labels is not None:
        member = nn.functional.one_hot(labels).double()
        weight = torch.einsum("oi...,ic->oc...", weight, member)
    return torch.cat([weight.flatten(1), bias.detach().double()[:, None]], 1)


@pytest.mark.parametrize("eps", [0.02, 0.1, 0.3, 0.8])
@pytest.mark.parametrize("network", [perceptron, convolutions])
def test_colors_are_no_wider_than_eps(network, eps: float) -> None:
    torch.manual_seed(3)
    model = network().eval()
    inputs = INPUTS[network]
    # Near each other at different distances, so that every eps has something to do.
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                source = torch.randint(len(layer.weight), (len(layer.weight),))
                noise = torch.rand(len(source)) * 0.05
                layer.weight.copy_(
                    layer.weight[source]
                    + torch.randn_like(layer.weight)
                    * noise.view(-1, *[1] * (layer.weight.ndim - 1))
                )
                layer.bias.copy_(layer.bias[source])
    colors = fxfib.color(model, inputs, eps)
    before: Tensor | None = None
    merged = 0
    for name, layer in model.named_children():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        labels = colors.labels[name]
        rows = collapsed(layer.weight, layer.bias, before)
        for label in labels.unique():
            members = rows[labels == label]
            merged += len(members) - 1
            assert float(torch.cdist(members, members, p=float("inf")).max()) <= eps * (1 + 1e-6)
        before = labels
    small = fxfib.compile(model, eps, inputs)
    assert (merged == 0) == (small.fibration.parameters_after == small.fibration.parameters_before)
    assert merged > 0 or eps < 0.1
    assert len(labels.unique()) == 5  # the network's outputs stay
