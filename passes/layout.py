"""Layouts: how the nodes of an axis are stored in the rewritten graph.

A :class:`Layout` maps an axis of ``full`` nodes to ``size`` slots.  Merging maps many nodes to one
slot (Eq. 10: rows averaged, columns summed); lifting maps one node to many slots (rows copied,
columns split).  Rewriting a parameter is a linear map of each of its axes in both cases, so rules
speak of ``rows``, ``columns`` and ``first`` and never ask which it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from fxfib.coloring import Floats, Labels, unique_rows
from fxfib.kernels import collapse, merge


class Reducer(Protocol):
    """A linear map of one axis of a parameter."""

    @property
    def full(self) -> int:
        """Entries of the axis before."""
        ...

    def apply(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """The tensor with ``axis`` of ``full`` entries mapped to its slots, in its own dtype."""
        ...

    @property
    def identity(self) -> bool:
        """Whether nothing changes."""
        ...


@dataclass(frozen=True, eq=False)
class Layout:
    """Slots of an axis.

    Attributes:
        slot: int64 ``[full]``, the slot of each node; -1: dropped.  Of a lift: the first slot.
        representative: int64 ``[size]``, the node a slot stands for (its first member).
        constant_dropped: the nodes dropped because they are constant.
    """

    slot: Labels
    representative: Labels

    @property
    def full(self) -> int:
        return len(self.slot)

    @property
    def size(self) -> int:
        return len(self.representative)

    @cached_property
    def identity(self) -> bool:
        return self.full == self.size and bool(
            np.array_equal(self.representative, np.arange(self.full))
        )

    @cached_property
    def counts(self) -> npt.NDArray[np.float64]:
        """How many original nodes each slot stands for (where a node was lifted, a share)."""
        raise NotImplementedError

    @property
    def even(self) -> bool:
        """Whether plain averages over the slots are averages over the nodes."""
        counts = self.counts
        return bool(len(counts) == 0 or np.all(counts == counts[0]))

    def before(self, position: int) -> int:
        """How many slots belong to nodes before a position (no slot reaches across it)."""
        return int((self.representative < position).sum())

    def rows(self, weights: Floats | None, masses: Floats | None = None) -> Reducer:
        """For an output axis: Eq. 10's average over the members of a slot."""
        raise NotImplementedError

    def columns(self, scales: Floats | None) -> Reducer:
        """For an input axis: Eq. 10's sum over the members of a slot."""
        raise NotImplementedError

    def sums(self, scales: Floats, places: Labels) -> Reducer:
        """For an output axis whose nodes are summed by their readers, times a factor each.

        Args:
            scales: float64 ``[full]``, the factors.
            places: int64 ``[full]``; members of a slot at one place are equal, and count once.
        """
        return self.columns(scales)

    @property
    def first(self) -> Reducer:
        """For what is taken from one member as it is."""
        return Take(self)


@dataclass(frozen=True, eq=False)
class Take:
    """Entries of the representatives."""

    layout: Layout

    @property
    def full(self) -> int:
        return self.layout.full

    @property
    def identity(self) -> bool:
        return self.layout.identity

    def apply(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        if self.identity:
            return tensor
        index = torch.from_numpy(self.layout.representative).to(tensor.device)
        return tensor.index_select(axis, index)


@dataclass(frozen=True, eq=False)
class Mixed:
    """One map for some slots of a layout, another one for the others."""

    layout: Layout
    some: Reducer
    others: Reducer
    chosen: npt.NDArray[np.bool_]  # [full], alike for all members of a slot

    @property
    def full(self) -> int:
        return self.layout.full

    @property
    def identity(self) -> bool:
        return self.layout.identity

    def apply(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        if self.identity:
            return tensor
        slots = torch.from_numpy(np.flatnonzero(self.chosen[self.layout.representative]))
        slots = slots.to(tensor.device)
        result = self.others.apply(tensor, axis).clone()
        return result.index_copy_(
            axis, slots, self.some.apply(tensor, axis).index_select(axis, slots)
        )


@dataclass(frozen=True, eq=False)
class Times:
    """Another map, then a factor for every slot."""

    reducer: Reducer
    factors: Floats

    @property
    def full(self) -> int:
        return self.reducer.full

    @property
    def identity(self) -> bool:
        return self.reducer.identity and bool(np.all(self.factors == 1.0))

    def apply(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        shape = [1] * tensor.ndim
        shape[axis] = -1
        factors = torch.from_numpy(self.factors).reshape(shape).to(tensor.device)
        reduced = self.reducer.apply(tensor, axis)
        return (reduced.to(torch.float64) * factors).to(tensor.dtype)


@dataclass(frozen=True, eq=False)
class MergeLayout(Layout):
    """Many nodes, one slot."""

    @cached_property
    def counts(self) -> npt.NDArray[np.float64]:
        kept = self.slot[self.slot >= 0]
        return np.bincount(kept, minlength=self.size).astype(np.float64)

    def rows(self, weights: Floats | None, masses: Floats | None = None) -> Reducer:
        return Average(self, weights, masses)

    def columns(self, scales: Floats | None) -> Reducer:
        return Total(self, scales)

    def sums(self, scales: Floats, places: Labels) -> Reducer:
        code = unique_rows(self.slot, places)
        return Total(self, scales, 1.0 / np.bincount(code)[code])


@dataclass(frozen=True, eq=False)
class Average:
    """Mean over the members of a slot, each brought to the representative's scale.

    ``weights[i]`` is the factor that makes node ``i`` comparable with the others of its slot; None:
    the members are comparable only through what follows, so the representative stands for all.
    ``masses[i]`` is how much it counts in the mean; None: all count alike.
    """

    layout: MergeLayout
    weights: Floats | None
    masses: Floats | None = None

    @property
    def full(self) -> int:
        return self.layout.full

    @property
    def identity(self) -> bool:
        return self.layout.identity

    def apply(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        layout = self.layout
        if self.identity:
            return tensor
        if layout.full == layout.size or self.weights is None or layout.counts.max() == 1:
            return layout.first.apply(tensor, axis)
        lead = self.weights[layout.representative]
        members = layout.slot >= 0
        slot = np.where(members, layout.slot, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = self.weights / lead[slot] * self._part(slot, members)
        # A slot whose factors vanish or blow up is represented by its first member alone.
        broken = np.zeros(layout.size, dtype=bool)
        np.logical_or.at(broken, slot[members], ~np.isfinite(share[members]))
        is_lead = np.zeros(layout.full, dtype=bool)
        is_lead[layout.representative] = True
        share = np.where(broken[slot], is_lead.astype(np.float64), share)
        several = layout.counts[slot] > 1
        chosen = np.flatnonzero(members & several)
        number = np.cumsum(layout.counts > 1) - 1
        weights = share[chosen]
        plain = self.masses is None and bool(np.all(weights * layout.counts[slot[chosen]] == 1.0))
        # Slots of one member keep their bits, and so do means of equal members.
        result = layout.first.apply(tensor, axis)
        means = merge(
            tensor.index_select(axis, torch.from_numpy(chosen).to(tensor.device)),
            torch.from_numpy(number[slot[chosen]]),
            int((layout.counts > 1).sum()),
            axis=axis,
            weights=None if plain else torch.from_numpy(weights),
        )
        places = torch.from_numpy(np.flatnonzero(layout.counts > 1)).to(tensor.device)
        result.index_copy_(axis, places, means)
        return result

    def _part(self, slot: Labels, members: npt.NDArray[np.bool_]) -> Floats:
        """What part of its slot each node is."""
        if self.masses is None:
            return 1.0 / self.layout.counts[slot]
        total = np.bincount(slot[members], self.masses[members], minlength=self.layout.size)
        weightless = total[slot] == 0
        return np.where(weightless, 1.0 / self.layout.counts[slot], self.masses / total[slot])


@dataclass(frozen=True, eq=False)
class Total:
    """Sum over the members of a slot, each times its factor relative to the representative.

    ``shares`` weights them further, as they are.
    """

    layout: MergeLayout
    scales: Floats | None
    shares: Floats | None = None

    @property
    def full(self) -> int:
        return self.layout.full

    @property
    def identity(self) -> bool:
        return self.layout.identity

    def apply(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        layout = self.layout
        if self.identity:
            return tensor
        if layout.counts.max(initial=0) <= 1:
            return layout.first.apply(tensor, axis)
        scale = None
        if self.scales is not None:
            slot = np.maximum(layout.slot, 0)
            ratio = np.where(
                layout.slot >= 0, self.scales / self.scales[layout.representative][slot], 0.0
            )
            if self.shares is not None:
                ratio = ratio * self.shares
            if np.any(ratio[layout.slot >= 0] != 1.0):
                scale = torch.from_numpy(ratio)
        total = collapse(tensor, torch.from_numpy(layout.slot), layout.size, axis=axis, scale=scale)
        return total.to(tensor.dtype)


def merge_layout(ids: Labels, keep: npt.NDArray[np.bool_]) -> MergeLayout:
    """The layout of a solved axis: slots in order of first appearance of a kept node."""
    kept = np.flatnonzero(keep)
    _, first, inverse = np.unique(ids[kept], return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first, kind="stable"), kind="stable")
    slot = np.full(len(ids), -1, dtype=np.int64)
    slot[kept] = rank[inverse.reshape(-1)]
    return MergeLayout(slot, kept[np.sort(first)])
