"""Activations of the nodes that :mod:`fxfib.renewal` replaces, where a module reads them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxfib.passes.units import Place


def plain(module: nn.Module) -> bool:
    """Whether a module's input can be told node by node: it is linear, or a convolution."""
    return isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))


def takes_constants(module: nn.Module) -> bool:
    """Whether a constant node is one with the bias: not without one, nor beside padded zeros."""
    padding = getattr(module, "padding", 0)
    padded = padding != "valid" if isinstance(padding, str) else bool(torch.tensor(padding).any())
    return isinstance(module.bias, Tensor) and not padded


def activations(place: Place, reader: nn.Module, x: Tensor) -> Tensor:
    """What a module reads of every node.

    Args:
        place: of the nodes, along the input axis of its weight.
        reader: linear or a convolution.
        x: its input.

    Returns:
        At least float32, ``[nodes, positions of a node, examples and places]``.
    """
    assert isinstance(reader.weight, Tensor)
    axis = x.ndim - 1 if isinstance(reader, nn.Linear) else x.ndim - reader.weight.ndim + 1
    rows = x.detach().movedim(axis, 0).flatten(1)
    rows = rows.to(torch.promote_types(x.dtype, torch.float32))
    return rows[torch.from_numpy(place.positions).to(x.device)]


def into_bias(place: Place, reader: nn.Module, node: int, value: Tensor) -> None:
    """Add to a module's bias what a node contributes that is constant.

    Args:
        place: of the nodes, along the input axis of its weight.
        reader: linear or a convolution; without a bias nothing happens.
        node: which one.
        value: its constant activations, ``[positions of a node]``.
    """
    weight, bias = reader.weight, reader.bias
    assert isinstance(weight, Tensor)
    if isinstance(bias, Tensor):
        rows = torch.from_numpy(place.positions[node]).to(weight.device)
        columns = weight.movedim(place.axis, 0)[rows]
        columns = columns.flatten(2).sum(2) if columns.ndim > 2 else columns
        bias += columns.T @ value.to(columns)
