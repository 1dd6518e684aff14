"""Layers as linear regressions: which numbers multiply which weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx


@dataclass(frozen=True)
class Regression:
    """A layer as ``response = design @ matrix.T + bias``, at either width.

    Attributes:
        source: the node that the layer reads.
        weight, bias: its parameters (nodes); the bias may be None.
        axis: the output axis of the layer's nodes.
        design: from the layer's input to rows ``[m, d]``, at chosen positions.
        positions: how many rows one example of the output makes.
        response: from the layer's output to rows ``[m, out]``, at chosen positions.
        matrix: from the weight to ``[out, d]``.
        tensor: from ``[out, d]`` to the weight, given a weight of the same shape.
    """

    source: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    axis: int
    design: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    response: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    matrix: Callable[[torch.Tensor], torch.Tensor]
    tensor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def linear_regression(
    source: fx.Node, weight: fx.Node, bias: fx.Node | None, out: int, rank: int
) -> Regression:
    """A linear layer on the last axis; ``out`` is the weight's output axis."""

    def rows(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(len(x), -1, x.shape[-1]) if x.ndim > 1 else x.reshape(1, 1, -1)
        return flat[:, positions].flatten(0, 1)

    def turned(matrix: torch.Tensor) -> torch.Tensor:
        return matrix if out == 0 else matrix.t()

    return Regression(
        source, weight, bias, rank - 1, rows, rows, turned, lambda matrix, like: turned(matrix)
    )


def convolution_regression(
    source: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Regression:
    """A convolution without groups, of one or two spatial dimensions, on batches."""
    flat = len(kernel) == 1
    pad = padding[::-1]
    sizes, strides, dilations = (
        ((1, *numbers) if flat else numbers) for numbers in (kernel, stride, dilation)
    )

    def design(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, [p for side in pad for p in (side, side)])
        x = x.unsqueeze(2) if flat else x
        high, wide = (
            (size - d * (k - 1) - 1) // s + 1
            for size, k, s, d in zip(x.shape[2:], sizes, strides, dilations, strict=True)
        )
        assert high > 0
        at = torch.stack([positions // wide * strides[0], positions % wide * strides[1]])
        taps = torch.cartesian_prod(
            torch.arange(sizes[0], device=x.device) * dilations[0],
            torch.arange(sizes[1], device=x.device) * dilations[1],
        ).reshape(-1, 2)
        picked = x[:, :, at[0][:, None] + taps[:, 0], at[1][:, None] + taps[:, 1]]
        return picked.transpose(1, 2).flatten(2).flatten(0, 1)

    def response(y: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return y.flatten(2)[:, :, positions].transpose(1, 2).flatten(0, 1)

    return Regression(
        source,
        weight,
        bias,
        1,
        design,
        response,
        lambda tensor: tensor.flatten(1),
        lambda matrix, like: matrix.reshape(like.shape),
    )


def positions_of(shape: tuple[int, ...], axis: int, most: int, seed: int) -> torch.Tensor:
    """Which output positions of every example are looked at: all, or ``most`` chosen by seed."""
    count = 1
    for place, size in enumerate(shape):
        if place not in (0, axis):
            count *= size
    if count <= most:
        return torch.arange(count)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most]
    return chosen.sort().values
