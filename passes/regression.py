"""Layers as linear regressions: which numbers multiply which weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx


@dataclass(frozen=True)
class Regression:
    """A layer as ``response = design @ matrix.T + bias`` in each of its groups, at any width.

    Attributes:
        source: the node that the layer reads.
        weight, bias: its parameters (nodes); the bias may be None.
        axis: the output axis of the layer's nodes.
        design: from the layer's input to ``[groups, m, d]``: ``m`` rows at chosen positions, of the
            columns that each group reads; a weight of the layer's says how many groups there are.
        response: from the layer's output to rows ``[m, out]``, at chosen positions.
        matrix: from the weight to ``[out, d]``, group by group.
        tensor: from ``[out, d]`` to the weight, given a weight of the same shape.
    """

    source: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    axis: int
    design: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
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
        source,
        weight,
        bias,
        rank - 1,
        lambda x, positions, weight: rows(x, positions)[None],
        rows,
        turned,
        lambda matrix, like: turned(matrix),
    )


@dataclass(frozen=True)
class Window:
    """How a convolution looks at its input, dimension by dimension.

    Attributes:
        kernel, stride, dilation: as usual.
        padding: before and behind the input; of a transposed convolution what is cut off there,
            output padding taken off behind.
        transposed: whether it is a transposed convolution.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    transposed: bool = False

    def index(
        self, sizes: Sequence[int], positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which input position every tap multiplies.

        Args:
            sizes: of the input.
            positions: of the flat output, int64.

        Returns:
            Numbers of flat input positions, ``[positions, taps]``, and where there is none: bool of
            the same shape (the number is 0 there).
        """
        taps = torch.arange(math.prod(self.kernel), device=positions.device)
        rest = positions
        found = torch.zeros(len(positions), len(taps), dtype=torch.int64, device=positions.device)
        inside = torch.ones_like(found, dtype=torch.bool)
        unit = 1
        for dim in reversed(range(len(sizes))):
            size, (before, behind) = sizes[dim], self.padding[dim]
            kernel, stride, dilation = self.kernel[dim], self.stride[dim], self.dilation[dim]
            reach = dilation * (kernel - 1)
            if self.transposed:
                out = (size - 1) * stride + reach + 1 - before - behind
            else:
                out = (size + before + behind - reach - 1) // stride + 1
            place, rest = rest % out, rest // out
            tap, taps = taps % kernel, taps // kernel
            if self.transposed:
                start = place[:, None] + before - tap * dilation
                inside &= start % stride == 0
                at = start // stride
            else:
                at = place[:, None] * stride - before + tap * dilation
            inside &= (at >= 0) & (at < size)
            found += at * unit
            unit *= size
        return found.masked_fill(~inside, 0), ~inside


def convolution_regression(
    source: fx.Node, weight: fx.Node, bias: fx.Node | None, window: Window
) -> Regression:
    """A convolution of batches; a transposed one has no groups."""

    def design(x: torch.Tensor, positions: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        index, outside = window.index(x.shape[2:], positions.to(x.device))
        picked = x.flatten(2)[:, :, index].masked_fill_(outside, 0)
        inside = weight.shape[0 if window.transposed else 1]
        # [examples, groups, inside, positions, taps]
        grouped = picked.unflatten(1, (-1, inside)).permute(1, 0, 3, 2, 4)
        return grouped.flatten(3).flatten(1, 2)

    def response(y: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return y.flatten(2)[:, :, positions].transpose(1, 2).flatten(0, 1)

    def turned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(0, 1) if window.transposed else tensor

    return Regression(
        source,
        weight,
        bias,
        1,
        design,
        response,
        lambda tensor: turned(tensor).flatten(1),
        lambda matrix, like: turned(matrix.reshape(turned(like).shape)),
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
