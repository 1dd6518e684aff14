"""What attention does with positions: rotary embedding, and masks of every kind."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from planting import UNREAD, Builder, Copies, concatenated
from torch import Tensor, nn

SPEEDS = np.array((1.0, 0.3, 0.09))


class Turn(nn.Module):
    """Turns pairs of channels of ``[N, heads, positions, channels]``.

    ``half`` pairs channel ``i`` with ``i + channels / 2``, ``interleaved`` neighbours.
    """

    def __init__(self, style: str, speeds: np.ndarray, positions: int) -> None:
        super().__init__()
        self.style = style
        angle = torch.arange(positions)[:, None] * torch.from_numpy(speeds)
        angle = torch.cat([angle, angle], 1) if style == "half" else angle.repeat_interleave(2, 1)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "half":
            first, second = x.chunk(2, -1)
            partner = torch.cat([-second, first], -1)
        else:
            partner = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        found: Tensor = x * self.cos + partner * self.sin
        return found


def in_pairs(pairs: Copies, style: str) -> Copies:
    """The channels of one head, from its pairs."""
    both = np.arange(2)
    if style == "half":
        member = (pairs.member + both[:, None] * pairs.size).reshape(-1)
    else:
        member = (2 * pairs.member[:, None] + both).reshape(-1)
    ones, start = np.ones(len(member)), pairs.ident.min()
    return Copies(member, ones, 0 * ones, np.arange(len(member)) + start, 2 * pairs.size)


def turned_heads(b: Builder, count: int, pairs: Copies, style: str) -> Copies:
    """Heads of pairs; one table turns all of them, so their pairs stand alike."""
    head = in_pairs(pairs, style)
    width = len(head)
    return concatenated([
        replace(head, ident=np.arange(width) + b.tag() * 64 * 64) for _ in range(count)
    ])  # fmt: skip


def half_alike(channels: int, size: int, style: str) -> np.ndarray:
    """The row of every channel, where two pairs of each head have equal first channels.

    Their second ones differ, so the pairs stay apart, though they turn at one speed.
    """
    heads = np.arange(0, channels, size)
    rows = np.arange(channels)
    rows[heads + (1 if style == "half" else 2)] = heads
    return rows


def turn(b: Builder, style: str, pairs: Copies, positions: int, decoy: bool) -> str:
    """The part that turns queries or keys; with ``decoy`` the first two pairs at one speed."""
    speeds = SPEEDS[: pairs.size].copy()
    if decoy:
        speeds[1] = speeds[0]
    made = [Turn(style, s, positions) for s in (speeds, speeds[pairs.member])]
    part = b.part(*made, name="turn")
    if positions > 1:
        b.candidate(part, "sin", 1, in_pairs(pairs, style))
    return part


def equal_rows(copies: Copies, sums: np.ndarray) -> Copies:
    """Without the rows that add up: one that changes changes the sum, and is no near miss."""
    return replace(copies, member=np.where(sums, UNREAD, copies.member))


@dataclass(frozen=True)
class Padding:
    """A graph input ``[N, positions]`` or ``[N, positions, channels]`` that tells padding."""

    name: str
    positions: int


def opened(padding: Tensor) -> Tensor:
    """True where a position counts; the first one always does, so that no row is empty."""
    seen = padding[..., 0] > -0.5 if padding.ndim == 3 else padding != 0
    return seen | (torch.arange(seen.shape[1]) == 0)


@dataclass(frozen=True)
class Mask:
    """A mask of scores: what it is, the part that holds it, the input it is made from."""

    kind: str = ""
    part: str = ""
    source: str = ""

    def __call__(self, parts: nn.ModuleDict, told: Tensor) -> Tensor | None:
        """``[positions, keys]``, ``[heads, positions, keys]`` or ``[N, 1, 1, keys]``."""
        if self.kind == "padding":
            return opened(told)[:, None, None]
        if self.kind == "padding, additive":
            zero = torch.zeros((), dtype=self.table(parts).dtype)
            return zero.masked_fill(~opened(told)[:, None, None], -torch.inf)
        return self.table(parts) if self.part else None

    def table(self, parts: nn.ModuleDict) -> Tensor:
        found = parts[self.part].mask
        assert isinstance(found, Tensor)
        return found


class Table(nn.Module):
    """Holds a mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)


def mask_of(b: Builder, positions: int, keys: int, heads: int, *, square: bool) -> Mask:
    """None, causal, a table of either kind, or padding that an input tells."""
    pads = [p for p in b.paddings if p.positions == keys]
    kinds = ["", "", "boolean", "additive", "causal", "causal"][: 6 if square else 4]
    kinds += ["heads"] * bool(heads)
    kind = b.pick(kinds + ["padding", "padding", "padding, additive"] * bool(pads))
    if kind in ("", "causal"):
        return Mask(kind)
    shape = (heads, positions, keys) if kind == "heads" else (positions, keys)
    closed = torch.from_numpy(b.rng.random(shape) < 0.4)
    closed[..., torch.arange(positions), torch.arange(positions) % keys] = False
    table = ~closed
    if kind != "boolean":
        level = b.normal(*shape) if b.flip() else np.zeros(shape)
        table = torch.from_numpy(level).masked_fill(closed, -torch.inf)
    part = b.part(Table(table), Table(table.clone()), name="mask")
    return Mask(kind, part, b.pick(pads).name if kind.startswith("padding") else "")


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Minus infinity where a boolean mask is false; others are added."""
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
