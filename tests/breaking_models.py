"""Networks with covers, and how they are trained, for tests of what breaks these."""

from __future__ import annotations

import torch
from torch import nn


def mlp() -> nn.Sequential:
    """Nodes 1 and 4 of the first layer are one cover, nodes 0, 2 and 5 of the second another."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = model[0].weight[1], model[0].bias[1]
        model[2].weight[:, 4] = model[2].weight[:, 1]
        for twin in (2, 5):
            model[2].weight[twin], model[2].bias[twin] = model[2].weight[0], model[2].bias[0]
            model[4].weight[:, twin] = model[4].weight[:, 0]
    return model.double()


def convolutional() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(),
        nn.Linear(20, 3),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = model[0].weight[1], model[0].bias[1]
        model[1].running_mean.uniform_(-1, 1)
        model[1].running_mean[3] = model[1].running_mean[1]
        model[5].weight[:, 12:16] = model[5].weight[:, 4:8]
    return model.double().eval()


def smooth() -> nn.Sequential:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    return model.double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
