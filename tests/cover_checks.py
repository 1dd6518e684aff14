"""Covers of planted networks: equal gradients, and what training leaves of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxfib.coloring import Labels, unique_rows
from fxfib.passes.backward import Colored, Continued
from fxfib.passes.cover import blocks, labels_of, stable


def loss_of(module: nn.Module, inputs: tuple[Any, ...], seed: int = 11) -> Tensor:
    """A loss in which every output matters, each in a way of its own."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64)
    for output in module(*inputs):
        target = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        total = total + (torch.tanh(output) - target).square().mean()
    return total


def gradients_equal(
    analysis: Colored, continued: Continued, module: nn.Module, inputs: tuple[Any, ...]
) -> int:
    """Eq. 8: gradients are equal on fiber x opfiber blocks of every parameter; pairs compared."""
    module.zero_grad()
    loss_of(module, inputs).backward()
    parameters = dict(module.named_parameters())
    pairs = 0
    for (node, axis), labels in blocks(analysis, continued.values).items():
        parameter = parameters.get(str(node.target)) if node.op == "get_attr" else None
        if parameter is None or parameter.grad is None:
            continue
        gradient = parameter.grad.movedim(axis, 0)
        size = max(float(gradient.abs().max()), 1e-6)
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            gap = float((gradient[members] - gradient[members[0]]).abs().max())
            assert gap <= 1e-10 * max(size, 1.0), (
                f"{node.target}: rows {members} along axis {axis} differ by {gap:.3g} of {size:.3g}"
            )
            pairs += len(members) - 1
    return pairs


def rows_equal(covers: dict[str, Labels], module: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Nodes in one cover have equal gradients by the weights of their own layer."""
    module.zero_grad()
    loss_of(module, inputs).backward()
    pairs = 0
    for name, labels in covers.items():
        layer = module.get_submodule(name) if "(" not in name else None
        if not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            continue
        transposed = getattr(layer, "transposed", False)
        if transposed and layer.groups > 1:
            continue
        for parameter in layer.parameters():
            if parameter.grad is None:
                continue
            axis = 1 if transposed and parameter.ndim > 1 else 0
            gradient = parameter.grad.movedim(axis, 0)
            size = max(float(gradient.abs().max()), 1.0)
            for label in np.unique(labels):
                members = np.flatnonzero(labels == label)
                gap = float((gradient[members] - gradient[members[0]]).abs().max())
                assert gap <= 1e-10 * size, f"{name}: {members} differ by {gap:.3g} of {size:.3g}"
                pairs += len(members) - 1
    return pairs


def covers_of(continued: Continued, symmetry: str = "cover") -> dict[str, Labels]:
    """Covers of every layer."""
    analysis = stable(continued) if symmetry == "stable" else continued.color()
    return labels_of(analysis, continued.values, symmetry)


def coarsens(after: dict[str, Labels], before: dict[str, Labels]) -> list[str]:
    """Layers in which nodes that shared a cover no longer do."""
    split = []
    for name, labels in before.items():
        joint = unique_rows(labels, after[name])
        if joint.max(initial=-1) != labels.max(initial=-1):
            split.append(name)
    return split


OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.02),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "weight_decay": lambda p: torch.optim.SGD(p, lr=0.02, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.003),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.003, weight_decay=0.1),
}


def train(
    module: nn.Module, inputs: tuple[Any, ...], optimizer: torch.optim.Optimizer, steps: int,
    start: int = 0,
) -> None:  # fmt: skip
    """Steps with a target of their own each."""
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(module, inputs, seed=step).backward()
        torch.nn.utils.clip_grad_value_(module.parameters(), 10.0)
        optimizer.step()
