"""Attention of two heads whose fibers lie at different places."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxfib.passes.rules.examples.networks import Example

WIDTH, HEADS = 8, 2
# Equal queries and equal values, head by head.
QUERIES = ((0, 2), (5, 7))
VALUES = ((0, 2), (4, 7))


class Attend(nn.Module):
    """Self-attention by one op or written out with another."""

    def __init__(self, op: str, near: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        self.op = op
        self.q, self.k, self.v, self.o = (
            nn.Linear(6 if k < 3 else WIDTH, WIDTH, dtype=torch.float64) for k in range(4)
        )
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.5, generator=generator)
            for layer, planted in ((self.q, QUERIES), (self.v, VALUES)):
                for one, other in planted:
                    layer.weight[other] = layer.weight[one]
                    layer.bias[other] = layer.bias[one]
            if near:
                self.q.bias[7] += 0.25

    def forward(self, x: Tensor) -> Tensor:
        depth = WIDTH // HEADS
        q, k, v = (
            layer(x).unflatten(-1, (HEADS, depth)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        if self.op == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
            return self.o(y.transpose(1, 2).flatten(2))
        q, k, v = (t.reshape(-1, x.shape[1], depth) for t in (q, k, v))
        if self.op == "bmm":
            scores = torch.bmm(q * depth**-0.5, k.transpose(1, 2))
        else:
            scores = torch.baddbmm(
                torch.zeros(1, 1, 1, dtype=q.dtype), q, k.transpose(1, 2), alpha=0.5
            )
        y = torch.bmm(scores.softmax(-1), v)
        return self.o(y.view(-1, HEADS, x.shape[1], depth).transpose(1, 2).flatten(2))


def attention(ops: tuple[str, ...]) -> list[Example]:
    """Fibers in every head; a near miss in one head keeps the size of all."""
    found = []
    for op in ops:
        for near in (False, True):
            queries, values = list(range(WIDTH)), list(range(WIDTH))
            for labels, planted in ((queries, QUERIES), (values, VALUES)):
                for one, other in planted:
                    labels[other] = labels[one]
            if near:
                queries = list(range(WIDTH))
                values = queries if op == "fused" else values
            slots = {
                ("q.weight", 0): tuple(queries),
                ("k.weight", 0): tuple(queries),
                ("v.weight", 0): tuple(values),
                ("o.weight", 1): tuple(values),
            }
            inputs = (torch.randn(2, 3, 6, dtype=torch.float64),)
            name = f"{op}_near" if near else op
            found.append(Example(name, Attend(op, near).eval(), inputs, slots))
    return found
