"""Streaming correlations of the activations of every layer, over all inputs and by class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor, nn

from fxfib.capture import capture, normalize_inputs
from fxfib.coloring import Labels, first_appearance
from fxfib.errors import InputError
from fxfib.passes.backward import Continued
from fxfib.passes.cover import labels_of
from fxfib.vital_signs import Probe

#: Sums of products that may be held in all, in numbers of 8 bytes.
MOST_NUMBERS = 2**28
#: A spread of so many roundings of a node's largest activation is none.
ROUNDINGS = 4
#: What the difference of two sums cannot tell from nothing, as a share of either.
CANCELLED = 1e-13
#: Correlations that rounding takes below 1.
SLACK = 1e-6


class Moments:
    """Running first and second moments of activations ``[rows, nodes]`` of a dtype, in float64.

    Sums are of differences from a fixed row, so that a mean that is large beside the spread costs
    no digits.  Memory is that of one matrix ``[nodes, nodes]``, whatever the number of rows.
    """

    def __init__(self, origin: Tensor, dtype: torch.dtype) -> None:
        self.origin = origin.double()
        self.count = 0
        self.sums = torch.zeros_like(self.origin)
        self.products = self.origin.new_zeros(len(origin), len(origin))
        self.dtype = dtype
        self.largest = torch.zeros_like(self.origin)

    def add(self, table: Tensor) -> None:
        """Some more rows."""
        if not len(table):
            return
        rows = table.double() - self.origin
        self.count += len(rows)
        self.sums += rows.sum(0)
        self.products.addmm_(rows.T, rows)
        self.largest = torch.maximum(self.largest, table.abs().amax(0).double())

    def merged(self, other: Moments) -> Moments:
        """Those of both; they have one origin."""
        both = Moments(self.origin, self.dtype)
        both.count, both.sums = self.count + other.count, self.sums + other.sums
        both.products = self.products + other.products
        both.largest = torch.maximum(self.largest, other.largest)
        return both

    def correlation(self) -> tuple[Tensor, Tensor]:
        """Pearson correlations ``[nodes, nodes]`` and which nodes are constant.

        A constant node has no correlation: 1 with other constant nodes (they are in step), 0 with
        those that move.
        """
        mean = self.sums / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        variance = covariance.diagonal().clamp_min(0)
        rounding = ROUNDINGS * torch.finfo(self.dtype).eps * self.largest
        cancelled = CANCELLED * self.products.diagonal() / self.count
        constant = variance <= rounding.square() + cancelled
        scale = torch.where(constant, 1.0, variance.sqrt())
        found = (covariance / torch.outer(scale, scale)).clamp(-1, 1)
        found[constant] = 0.0
        found[:, constant] = 0.0
        found[torch.outer(constant, constant)] = 1.0
        found.fill_diagonal_(1.0)
        return found, constant


def clusters_of(correlation: Tensor, threshold: float) -> Labels:
    """Synchrony clusters: complete linkage, so every pair of a cluster correlates that much.

    Args:
        correlation: ``[nodes, nodes]``.
        threshold: the least correlation within a cluster; 1 allows for rounding.

    Returns:
        Labels numbered by first appearance.
    """
    if len(correlation) < 2:
        return np.zeros(len(correlation), np.int64)
    distance = (1 - correlation).clamp_min(0).cpu().numpy()
    distance = (distance + distance.T) / 2
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform(distance, checks=False), "complete")
    flat = fcluster(tree, max(1 - threshold, SLACK), "distance")
    return first_appearance(flat.astype(np.int64))


class Collector:
    """Moments of every layer and class."""

    def __init__(
        self, source: nn.Module, inputs: Any, eps: float, criterion: str,
        layers: Sequence[str] | None, classes: Sequence[int] | None,
    ) -> None:  # fmt: skip
        self.source = source
        self.classes = None if classes is None else {int(c) for c in classes}
        captured = capture(source, inputs)
        continued = Continued(captured.graph_module)
        analysis = continued.color(eps, None, criterion)
        self.fibers = labels_of(analysis, continued.values, "fiber")
        self.probe = Probe(continued, analysis, ())
        known = [name for own in self.probe.behind.values() for name, _ in own]
        for name in layers or ():
            if name not in known:
                raise InputError(f"no layer {name!r}; there are {', '.join(known)}.")
        self.names = [name for name in known if layers is None or name in layers]
        self.notes = [
            f"{name} keeps its activations to itself"
            for name in self.fibers if name not in known and layers is None
        ]  # fmt: skip
        batch = next((str(n.meta["val"].shape[0]) for n in continued.values
                      if n.op == "placeholder" and len(n.meta["val"].shape)), "")  # fmt: skip
        # Labels say whose rows are whose only where examples come first.
        self.first = {
            name: axis != 0 and str(node.meta["val"].shape[0]) == batch
            for node, own in self.probe.behind.items() for name, axis in own
        }  # fmt: skip
        self.weights = {
            name: tensor.detach()
            for name, tensor in (*source.named_parameters(), *source.named_buffers())
        }
        self.home = next(iter(self.weights.values())).device
        self.moments: dict[str, dict[int | None, Moments]] = {name: {} for name in self.names}
        self.held = 0

    def add(self, inputs: Any, labels: Tensor | None) -> None:
        """One batch more; one without examples adds nothing."""
        leaves = [
            leaf.to(self.home) if isinstance(leaf, Tensor) else leaf
            for leaf in pytree.tree_leaves(normalize_inputs(self.source, inputs))
        ]
        own = None if labels is None else labels.to(self.home)
        if any(isinstance(leaf, Tensor) and not leaf.numel() for leaf in leaves):
            return

        def see(name: str, table: Tensor) -> None:
            if name not in self.moments:
                return
            known = self.moments[name]
            origin = next(iter(known.values())).origin if known else table[0]
            if own is None or not self.first[name]:
                self._moments(name, None, origin, table.dtype).add(table)
                return
            rows = own.repeat_interleave(len(table) // len(own))
            for label in own.unique().tolist():
                wanted = self.classes is None or label in self.classes
                kept = self._moments(name, label if wanted else None, origin, table.dtype)
                kept.add(table[rows == label])

        try:
            self.probe.run(self.weights, leaves, see)
        except (RuntimeError, TypeError, AssertionError) as error:
            raise InputError(f"a batch does not fit the model as captured ({error}).") from error

    def _moments(self, name: str, label: int | None, origin: Tensor, dtype: torch.dtype) -> Moments:
        known = self.moments[name]
        if label not in known:
            self.held += len(origin) ** 2
            if self.held > MOST_NUMBERS:
                raise InputError(
                    "correlations of so many classes and nodes do not fit into memory; "
                    "name some with classes= or layers=."
                )
            known[label] = Moments(origin, dtype)
        return known[label]

    def layer(self, name: str) -> dict[int | None, Moments]:
        """The moments of one layer; all inputs first, then class by class."""
        known = self.moments[name]
        whole: Moments | None = None
        for own in known.values():
            whole = own if whole is None else whole.merged(own)
        assert whole is not None
        ordered: dict[int | None, Moments] = {None: whole}
        ordered |= {label: known[label] for label in sorted(k for k in known if k is not None)}
        if len(ordered) == 1 and any(len(own) > 1 for own in self.moments.values()):
            self.notes.append(f"{name} lays examples over each other: not by class")
        return ordered
