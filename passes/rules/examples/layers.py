"""Layers with weights: linear, embedding, convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxfib.passes.rules.examples.elementwise import With
from fxfib.passes.rules.examples.networks import (
    CHANNELS,
    CLASSES,
    CONSTANT,
    NEAR,
    SCALED,
    UNREAD,
    Cases,
    Example,
    Op,
    affine,
    expected,
    fill,
    generator_of,
    per_class,
)


def linear() -> list[Example]:
    """A layer by every spelling; only the bias or one weight differs; no bias; more axes."""
    found = []
    for kind in ("linear", "sequence"):
        cases = Cases(kind)
        labels = expected(scaled=True, constant=True)
        cases.add("plain", torch.relu, labels)
        cases.add("affine", lambda x: x, labels)
        for near in ("bias", "weight"):
            missed = expected(scaled=True, constant=True, near=True)
            cases.add(near, torch.relu, missed, near={0: near})
        # Without a bias the constant is zero and nothing tells node 10 from node 6.
        no_bias = list(labels)
        no_bias[10] = no_bias[NEAR]
        cases.add("no_bias", torch.relu, tuple(no_bias), bias=False)
        matrix = torch.randn(CHANNELS, 5, generator=generator_of(1), dtype=torch.float64)
        offset = torch.randn(5, generator=generator_of(2), dtype=torch.float64)
        every = expected(scaled=True, constant=True, unread=False)
        cases.add("matmul", With(lambda x, w: torch.relu(x) @ w, matrix), every, unread=())
        if kind == "linear":
            cases.add("mm", With(lambda x, w: torch.mm(torch.tanh(x), w), matrix),
                      expected(constant=True, unread=False), unread=())  # fmt: skip
            cases.add("addmm",
                      With(lambda x, w, b: torch.addmm(b, torch.relu(x), w), matrix, offset),
                      every, unread=())  # fmt: skip
        cases.add(
            "turned", With(lambda x, w: F.linear(torch.relu(x), w.t()), matrix), every, unread=()
        )
        cases.add("computed",
                      With(lambda x, w, b: F.linear(torch.relu(x), (w * b / w.norm()).t(), b),
                  matrix, offset), every, unread=())  # fmt: skip
        found.append(cases.example(kind))
    return found


def embedding() -> list[Example]:
    """Columns of a table: equal, scaled, constant zero, nearly equal in one row."""
    found = []
    for near in (False, True):
        generator = generator_of(5)
        table = nn.Embedding(7, CHANNELS, dtype=torch.float64)
        bases = torch.randn(CHANNELS, 7, generator=generator, dtype=torch.float64)
        bases[CLASSES[SCALED]] = 2 * bases[CLASSES[3]]
        bases[CLASSES[CONSTANT]] = 0.0
        table.weight.data = bases[list(CLASSES)].t().contiguous()
        if near:
            table.weight.data[3, NEAR] += 0.25
        head = fill(nn.Linear(CHANNELS, 3, dtype=torch.float64), generator)
        head.get_parameter("weight").data[:, UNREAD] = 0.0
        model = nn.Sequential(table, nn.ReLU(), head).eval()
        labels = expected(scaled=True, constant=True, near=near)
        found.append(Example(f"near={near}", model, (torch.tensor([[0, 3, 5], [6, 1, 2]]),),
                             {("0.weight", 1): labels}))  # fmt: skip
    for miss in ("", "table", "branch"):
        slots = {("table.weight", 1): expected(unread=False, near=bool(miss))}
        tokens = torch.tensor([[0, 3, 5], [6, 1, 2]])
        found.append(Example(f"tied_{miss or 'equal'}", TiedHead(miss).eval(), (tokens,), slots))
    return found


class TiedHead(nn.Module):
    """A table that makes a residual stream and reads it again, behind a norm."""

    def __init__(self, miss: str) -> None:
        super().__init__()
        generator = generator_of(6)
        self.table = nn.Embedding(7, CHANNELS, dtype=torch.float64)
        self.up = fill(nn.Linear(CHANNELS, 5, dtype=torch.float64), generator)
        self.down = fill(nn.Linear(5, CHANNELS, dtype=torch.float64), generator)
        self.norm = nn.RMSNorm(CHANNELS, eps=0.01, dtype=torch.float64)
        labels = list(expected(unread=False))
        for parameter, axis in (
            (self.table.weight, 1),
            (self.down.get_parameter("weight"), 0),
            (self.down.get_parameter("bias"), 0),
            (self.norm.weight, 0),
        ):
            parameter.data = parameter.data.index_select(axis, torch.tensor(labels)).contiguous()
        self.norm.weight.data = per_class(generator)
        if miss == "table":
            self.table.weight.data[3, NEAR] += 0.25
        if miss == "branch":
            self.down.get_parameter("bias").data[NEAR] += 0.25

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the seven tokens."""
        x = self.table(tokens)
        x = x + self.down(torch.relu(self.up(x)))
        return nn.functional.linear(self.norm(x), self.table.weight)


def convolution() -> list[Example]:
    """Every dimension, transposed too, with and without borders, depthwise, grouped."""
    found = []
    for dimensions in (1, 2, 3):
        for prefix in ("Conv", "ConvTranspose"):
            kind = f"{prefix}{dimensions}d"
            cases = Cases(kind)
            # The layer that reads the front has borders if it is transposed.
            folds = prefix == "Conv"
            cases.add("plain", torch.relu, expected(scaled=True, constant=folds))
            for near in ("bias", "weight"):
                missed = expected(scaled=True, constant=folds, near=True)
                cases.add(near, torch.relu, missed, near={0: near})
            if dimensions < 3:
                for missing in (False, True):
                    labels = expected(near=missing)
                    cases.add(f"depthwise{missing}", depthwise(kind, missing), labels)
                    if not missing:
                        continue
                    labels = expected(near=True)
                    cases.add("depthwise_bias", depthwise(kind, False, bias_near=True), labels)
                cases.add(
                    "padded",
                    conv_on(kind, 1, padding=1),
                    expected(scaled=True, unread=False),
                    unread=(),
                )
                read = expected(scaled=True, constant=folds, unread=False)
                strided = conv_on(kind, 1, stride=2, dilation=1)
                cases.add("strided", strided, read, unread=())
                cases.add("no_bias", conv_on(kind, 1, bias=False), read, unread=())
                if prefix == "Conv":
                    cases.add("same", conv_on(kind, 1, padding="same", dilation=2),
                              expected(scaled=True, unread=False), unread=())  # fmt: skip
                    both = expected(unread=False)
                    grid = (*both, *(label + 20 for label in both))
                    cases.add("grouped", conv_on(kind, 2, groups=2), grid, groups=2, unread=())
            found.append(cases.example(kind))
    return found


def conv_on(kind: str, copies: int, **options: Any) -> Op:
    """ReLU, then a random convolution of the front's channels to six."""
    layer = fill(affine(kind, copies * CHANNELS, 6, **options), generator_of(11))
    return nn.Sequential(nn.ReLU(), layer)


def depthwise(kind: str, near: bool, *, bias_near: bool = False) -> Op:
    """One filter a channel, equal inside the classes; perhaps one tap or one bias differs."""
    generator = generator_of(13)
    layer = affine(kind, CHANNELS, CHANNELS, groups=CHANNELS)
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    labels = list(CLASSES)
    shape = weight.shape
    weight.data = torch.randn(shape, generator=generator, dtype=torch.float64)[labels]
    bias.data = per_class(generator, near=bias_near)
    # Nodes 1 and 8 differ only in what they read.
    weight.data[8], bias.data[8] = weight.data[1], bias.data[1]
    if near:
        flat = weight.data.reshape(CHANNELS, -1).clone()
        flat[NEAR, -1] += 0.25
        weight.data = flat.reshape(shape)
    return nn.Sequential(nn.ReLU(), layer)
