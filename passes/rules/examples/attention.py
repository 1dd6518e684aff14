"""Attention of two heads whose fibers lie at different places."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxfib.passes.rules.examples.networks import Example

WIDTH, HEADS, DEPTH, LENGTH = 8, 2, 4, 3
# Equal queries and equal values, head by head.
QUERIES = ((0, 2), (5, 7))
VALUES = ((0, 2), (4, 7))
# Where all heads share one partition, equal at the same places in all of them.
SHARED = ((0, 2), (4, 6))
# Two pairs of a rotary embedding that turns channel i together with i + 2, and half of them.
PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7))
HALF = ((0, 1), (4, 5))

Planted = tuple[tuple[int, int], ...]


class Attend(nn.Module):
    """Self-attention by one op or written out with another."""

    cos: Tensor
    sin: Tensor

    def __init__(self, op: str, queries: Planted, values: Planted, near: str = "") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        self.op = op
        self.q, self.k, self.v, self.o = (
            nn.Linear(6 if k < 3 else WIDTH, WIDTH, dtype=torch.float64) for k in range(4)
        )
        angle = torch.arange(1.0, LENGTH + 1, dtype=torch.float64)[:, None] * 0.7
        # Pairs merge where they turn equally fast.
        speed = [1.0, 1.0 + 0.25 * (near == "speed")] * 2
        angle = angle * torch.tensor(speed, dtype=torch.float64)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        self.bias = nn.Parameter(torch.zeros(HEADS, DEPTH, dtype=torch.float64))
        self.norm_q = nn.BatchNorm1d(WIDTH, dtype=torch.float64)
        self.norm_k = nn.BatchNorm1d(WIDTH, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.5, generator=generator)
            for norm in (self.norm_q, self.norm_k):
                for name, tensor in norm.named_buffers():
                    if name == "running_mean":
                        tensor.normal_(0, 0.5, generator=generator)
                    elif name == "running_var":
                        tensor.uniform_(0.5, 2, generator=generator)
            for one, other in queries:
                for tensor in (self.q.weight, self.q.bias, *self.norm_q.state_dict().values()):
                    if tensor.ndim:
                        tensor[other] = tensor[one]
            for one, other in values:
                for tensor in (self.v.weight, self.v.bias):
                    tensor[other] = tensor[one]
            if near == "query":
                self.q.bias[queries[-1][1]] += 0.25

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.op == "batch_norm":
            q = self.norm_q(q.flatten(0, 1)).view(q.shape)
            k = self.norm_k(k.flatten(0, 1)).view(k.shape)
        q, k, v = (t.unflatten(-1, (HEADS, DEPTH)) for t in (q, k, v))
        if self.op == "einsum":
            scores = torch.einsum("bihd,bjhd->bhij", q, k + self.bias)
            y = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
            return self.o(y.flatten(2))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.op == "rotary":
            q, k = self.turn(q), self.turn(k)
        if self.op == "normed":
            q = F.layer_norm(q, (DEPTH,))
        if self.op in ("bmm", "baddbmm"):
            q, k, v = (t.reshape(-1, x.shape[1], DEPTH) for t in (q, k, v))
            if self.op == "bmm":
                scores = torch.bmm(q * DEPTH**-0.5, k.transpose(1, 2))
            else:
                none = torch.zeros(1, 1, 1, dtype=q.dtype)
                scores = torch.baddbmm(none, q, k.transpose(1, 2), alpha=0.5)
            y = torch.bmm(scores.softmax(-1), v).view(-1, HEADS, x.shape[1], DEPTH)
        elif self.op == "batch_norm":
            y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).flatten(2))

    def turn(self, x: Tensor) -> Tensor:
        """Rotary embedding: every pair of channels is turned by an angle of its own."""
        half = DEPTH // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * self.cos + turned * self.sin


CASES: dict[str, tuple[tuple[str, Planted, Planted, str], ...]] = {
    "fused": (("", QUERIES, VALUES, ""), ("_near", QUERIES, VALUES, "query")),
    "bmm": (("", QUERIES, VALUES, ""), ("_near", QUERIES, VALUES, "query")),
    "baddbmm": (("", QUERIES, VALUES, ""), ("_near", QUERIES, VALUES, "query")),
    "rotary": (
        ("", PAIRS, VALUES, ""),
        ("_near", PAIRS, VALUES, "query"),
        ("_other_speed", PAIRS, VALUES, "speed"),
        ("_half", HALF, VALUES, ""),
    ),
    "einsum": (("", SHARED, SHARED, ""), ("_near", SHARED, SHARED, "query")),
    "normed": (("", SHARED, VALUES, ""), ("_near", SHARED, VALUES, "query")),
    "batch_norm": (("", SHARED, VALUES, ""), ("_near", SHARED, VALUES, "query")),
}


def attention(ops: tuple[str, ...]) -> list[Example]:
    """Fibers in every head; a near miss in one head keeps the size of all."""
    found = []
    for op in ops:
        for suffix, queries, values, near in CASES[op]:
            merged = not near and queries is not HALF
            contracted = planted_labels(queries if merged else ())
            passed = planted_labels(values)
            slots = {
                ("q.weight", 0): contracted,
                ("k.weight", 0): contracted,
                ("v.weight", 0): passed,
                ("o.weight", 1): passed,
            }
            inputs = (torch.randn(2, LENGTH, 6, dtype=torch.float64),)
            module = Attend(op, queries, values, near).eval()
            found.append(Example(op + suffix, module, inputs, slots))
    return found


def planted_labels(planted: Planted) -> tuple[int, ...]:
    """For every channel the first one of its fiber."""
    lead = {other: one for one, other in planted}
    return tuple(lead.get(channel, channel) for channel in range(WIDTH))
