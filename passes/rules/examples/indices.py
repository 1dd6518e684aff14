"""Positions taken at computed places; channels stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxfib.passes.rules.examples.networks import CHANNELS, Cases, Example, Op, expected


class At(nn.Module):
    """An op with constant indices of its own."""

    def __init__(self, op: Op, *indices: list[Any]) -> None:
        super().__init__()
        self.op = op
        for place, index in enumerate(indices):
            self.register_buffer(f"index{place}", torch.tensor(index))

    def forward(self, x: Tensor) -> Tensor:
        """The op on the operand and the indices."""
        result: Tensor = self.op(x, *self.buffers())
        return result


def ordered(x: Tensor) -> Tensor:
    """The rows of every picture in order of their largest values."""
    order = x.amax((1, 3)).argsort(1)
    pictures = torch.arange(x.shape[0])[:, None]
    return x[pictures, :, order].transpose(1, 2)


def indexing() -> list[Example]:
    """Axes beside the channels by one index or two, neighbours or apart; channels themselves."""
    cases = Cases("Conv2d")
    kept = expected(scaled=True, constant=True)
    near = expected(scaled=True, constant=True, near=True)
    rows = At(lambda x, i: x[:, :, i], [2, 0, 3, 2, 1])
    cases.add("rows", rows, kept)
    cases.add("rows_near", At(lambda x, i: x[:, :, i], [2, 0, 3]), near, near={0: "weight"})
    cases.add("grid", At(lambda x, i: x[:, :, i], [[2, 0, 3], [1, 1, 0]]), kept, back="Conv3d")
    cases.add("points", At(lambda x, i, j: x[:, :, i, j], [2, 0, 3], [1, 4, 0]), kept,
              back="Conv1d")  # fmt: skip
    cases.add("apart", At(lambda x, i, j: x[i, :, j], [0, 0, 0], [2, 0, 3]), kept, back="Conv1d")
    every = expected(unread=False)
    cases.add("computed", lambda x: ordered(torch.tanh(x)), every, unread=())
    cases.add("channels", At(lambda x, i: x[:, i], [2, 0, 3]), tuple(range(CHANNELS)), unread=())
    return [cases.example("index")]
