"""What the report knows of single layers: which node went where, and a picture of the weight."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxfib.errors import LoadError

CONSTANT, UNREAD = -1, -2


@dataclass(frozen=True)
class Thumbnail:
    """A weight matrix, small enough to look at: 8-bit magnitudes.

    Attributes:
        rows, columns: of the picture.
        shape: of the matrix (kernel positions are one norm).
        peak: the magnitude that is 255.
        pixels: base64 of ``rows * columns`` bytes, row by row.
    """

    rows: int
    columns: int
    shape: tuple[int, int]
    peak: float
    pixels: str


@dataclass(frozen=True)
class Layer:
    """One layer that makes nodes.

    Attributes:
        name: its module path (and which of its uses or parts, where there are several).
        op: what computes it, such as ``linear``.
        group: its place among the report's groups.
        inputs: the layers whose nodes it reads, by their places; empty: the network's inputs.
        slots: of every node its place in the smaller layer; -1: it was constant, -2: unread.
        before, after: pictures of its weight, nodes of one fiber next to each other.
    """

    name: str
    op: str
    group: int
    inputs: tuple[int, ...]
    slots: tuple[int, ...]
    before: Thumbnail | None = None
    after: Thumbnail | None = None

    @property
    def fibers(self) -> int:
        """Nodes of the smaller layer."""
        return max(self.slots, default=-1) + 1

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Layer:
        """The inverse of :func:`to_dict`."""
        pictures = {
            key: None if data.get(key) is None else _thumbnail(data[key])
            for key in ("before", "after")
        }
        return cls(
            name=data["name"],
            op=data["op"],
            group=data["group"],
            inputs=tuple(data["inputs"]),
            slots=decode(data["slots"]),
            **pictures,
        )


def to_dict(data: dict[str, Any]) -> dict[str, Any]:
    """A layer's fields with the slots as one short text."""
    return {**data, "slots": encode(data["slots"])}


def encode(slots: Sequence[int]) -> str:
    """``0 1 2 3 0 -1`` as ``"0-3,0,c"``; ``c`` is constant, ``u`` unread."""
    parts: list[str] = []
    start = 0
    while start < len(slots):
        end = start + 1
        while end < len(slots) and slots[start] >= 0 and slots[end] == slots[end - 1] + 1:
            end += 1
        first, last = slots[start], slots[end - 1]
        if first < 0:
            parts.append("c" if first == CONSTANT else "u")
        else:
            parts.append(str(first) if end == start + 1 else f"{first}-{last}")
        start = end
    return ",".join(parts)


def decode(text: str) -> tuple[int, ...]:
    """The inverse of :func:`encode`."""
    slots: list[int] = []
    for part in filter(None, text.split(",")):
        if part in ("c", "u"):
            slots.append(CONSTANT if part == "c" else UNREAD)
            continue
        first, _, last = part.partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise LoadError(f"{part!r} is no range of slots.")
        slots.extend(range(int(first), int(last or first) + 1))
    return tuple(slots)


def thumbnail(weight: Tensor, rows: np.ndarray, columns: np.ndarray | None, side: int) -> Thumbnail:
    """A picture of a weight.

    Args:
        weight: ``[out, in, ...]``, any floating dtype and device; read only where it is sampled.
        rows, columns: the order in which outputs and inputs are shown; None: as they are.
        side: the largest number of pixels a side.
    """
    flat = weight.detach()
    if columns is None or len(columns) != flat.shape[1]:
        columns = np.arange(flat.shape[1])
    picked = [_sampled(order, side) for order in (rows, columns)]
    cells = [torch.from_numpy(order).to(flat.device) for order, _ in picked]
    values = flat[cells[0]][:, cells[1]].to(torch.float32)
    if values.ndim > 2:
        values = values.flatten(2).norm(dim=2)
    values = values.abs().cpu()
    values = _pooled(_pooled(values, picked[0][1]).T, picked[1][1]).T
    peak = float(values.max()) if values.numel() else 0.0
    pixels = (values / peak * 255 if peak > 0 else values).round().to(torch.uint8)
    return Thumbnail(
        rows=pixels.shape[0],
        columns=pixels.shape[1],
        shape=(len(rows), len(columns)),
        peak=peak,
        pixels=base64.b64encode(pixels.contiguous().numpy().tobytes()).decode("ascii"),
    )


def _sampled(order: np.ndarray, side: int) -> tuple[np.ndarray, int]:
    """Entries to look at, and how many pixels they become: up to four for each pixel."""
    count = len(order)
    if count <= side:
        return order, count
    each = min(4, -(-count // side))
    places = np.linspace(0, count - 1, side * each).round().astype(np.int64)
    return order[places], side


def _pooled(values: Tensor, pixels: int) -> Tensor:
    return values if len(values) == pixels else values.reshape(pixels, -1, values.shape[1]).mean(1)


def _thumbnail(data: dict[str, Any]) -> Thumbnail:
    return Thumbnail(**{**data, "shape": tuple(data["shape"])})
