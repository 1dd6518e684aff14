"""Flat batches of inputs: how many examples are in them, and how they are cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def examples_of(batch: Sequence[Any]) -> int:
    """How many examples a flat batch counts for: its first tensor tells; without any it is one."""
    return next((len(t) for t in batch if isinstance(t, torch.Tensor) and t.ndim), 1)


def length_of(batch: Sequence[Any]) -> int | None:
    """How many examples a flat batch can be cut into; None where its inputs are not as long."""
    if not all(isinstance(t, torch.Tensor) and t.ndim for t in batch):
        return None
    sizes = {len(t) for t in batch}
    return sizes.pop() if len(sizes) == 1 else None


def pieces_of(batch: Sequence[Any], most: int) -> list[Sequence[Any]]:
    """Smaller batches of a flat one, of at most so many examples, where it can be cut."""
    size = length_of(batch)
    if size is None:
        return [batch]
    return [[t[start : start + most] for t in batch] for start in range(0, size, most)]
