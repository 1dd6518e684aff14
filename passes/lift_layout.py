"""Layouts of a lifted axis: rows are copied, columns divided so that sums are kept."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fxfib.coloring import Floats, Labels
from fxfib.passes.layout import Layout, Reducer


class LiftLayout(Layout):
    """One node, one or more slots."""

    def __init__(self, full: int, copies: Labels, zero_sum: float, seed: tuple[int, ...]) -> None:
        first = np.full(full, -1, dtype=np.int64)
        first[copies[::-1]] = np.arange(len(copies))[::-1]
        super().__init__(first, copies)
        object.__setattr__(self, "zero_sum", zero_sum)
        object.__setattr__(self, "seed", seed)

    zero_sum: float
    seed: tuple[int, ...]

    @cached_property
    def counts(self) -> npt.NDArray[np.float64]:
        """Each copy counts for its share of the node it is a copy of."""
        times = np.bincount(self.representative, minlength=self.full)
        return np.asarray(1.0 / times[self.representative])

    def rows(self, weights: Floats | None, masses: Floats | None = None) -> Reducer:
        """Copies have the row of their node."""
        return self.first

    def columns(self, scales: Floats | None) -> Reducer:
        """Copies share the column of their node."""
        return Split(self)


class Split:
    """Columns divided among the copies of their node: random shares plus changes that cancel."""

    def __init__(self, layout: LiftLayout) -> None:
        self.layout = layout
        self.full = layout.full

    @property
    def identity(self) -> bool:
        """Whether no node has a second copy."""
        return self.layout.identity

    def apply(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """The tensor with the columns of an axis divided; every sum over copies is kept."""
        layout = self.layout
        if self.identity:
            return tensor
        generator = np.random.default_rng([*layout.seed, axis, tensor.ndim])
        copies = layout.representative
        times = np.bincount(copies, minlength=layout.full)
        share = generator.uniform(0.25, 1.0, len(copies))
        share /= np.bincount(copies, share, layout.full)[copies]
        several = np.flatnonzero(times > 1)
        number = np.full(layout.full, -1)
        number[several] = np.arange(len(several))
        touched = np.flatnonzero(times[copies] > 1)  # a node with one copy keeps its column

        def index(values: npt.NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(values).to(tensor.device)

        stored = tensor.detach().movedim(axis, 0)
        result = stored[index(copies)]
        wide = stored[index(several)].to(torch.float64)
        of = index(number[copies[touched]])
        column = (-1, *[1] * (tensor.ndim - 1))
        size = float(stored.abs().mean(dtype=torch.float64)) if stored.numel() else 0.0
        normal = generator.standard_normal((len(touched), *stored.shape[1:]), dtype=np.float32)
        change = torch.from_numpy(normal).to(wide)
        mean = torch.zeros_like(wide).index_add_(0, of, change)
        mean /= index(times[several]).reshape(column)
        change.sub_(mean[of]).mul_(layout.zero_sum * size)
        change.addcmul_(wide[of], index(share[touched]).reshape(column))
        rounded = change.to(tensor.dtype)
        # What rounding took from the sum goes to the last copy: the sum is right to one rounding.
        total = torch.zeros_like(wide).index_add_(0, of, rounded.to(torch.float64))
        last = np.zeros(len(several), dtype=np.int64)
        last[number[copies[touched]]] = np.arange(len(touched))
        fixed = rounded[index(last)].to(torch.float64) + (wide - total)
        rounded[index(last)] = fixed.to(tensor.dtype)
        result[index(touched)] = rounded
        return result.movedim(0, axis).contiguous()
