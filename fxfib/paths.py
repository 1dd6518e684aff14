"""Nested networks, from the original to the smallest: what goes next, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fxfib.coloring import Floats
from fxfib.passes.costs import Costs
from fxfib.passes.curves import Curve

# Nodes that go in one step, as a part of a group's size.
STEP = 1 / 256


@dataclass
class Path:
    """Points of falling size.

    Attributes:
        curves: the groups.
        gone: for every point, how many nodes of each group have gone.
        parameters, macs: predicted sizes.
        lost: predicted loss: shares of energy, weighed and summed over groups.
        weights: how much the loss of a group counts.
    """

    curves: Sequence[Curve]
    weights: Floats
    gone: list[tuple[int, ...]] = field(default_factory=list)
    parameters: list[float] = field(default_factory=list)
    macs: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.gone)

    def predicted_sizes(self, kind: str) -> Sequence[float]:
        """Parameters (``"params"``) or multiply-accumulates (``"macs"``) of every point."""
        return self.parameters if kind == "params" else self.macs

    def predicted(self, place: int) -> float:
        """Predicted loss of a point."""
        return self.lost[place]

    def loss(self, gone: Sequence[int]) -> float:
        """Predicted loss of a network off the path, for the nodes gone of every group."""
        groups = zip(self.weights, self.curves, gone, strict=True)
        return float(sum(w * c.lost[g - 1] for w, c, g in groups if g))

    def first(self, kind: str, limit: float) -> int:
        """The first point whose predicted size is small enough; else the last."""
        sizes = self.predicted_sizes(kind)
        return next((p for p, size in enumerate(sizes) if size <= limit), len(self) - 1)


def marginal_path(
    curves: Sequence[Curve], costs: Costs, kind: str, weights: Floats | None = None
) -> Path:
    """Always the step that loses least for what it saves.

    Args:
        curves: what is lost in every group.
        costs: what is saved.
        kind: ``"params"`` or ``"macs"``.
        weights: how much the loss of a group counts; None: all the same.
    """
    counted = np.ones(len(curves)) if weights is None else weights
    path = Path(curves, counted)
    gone = np.zeros(len(curves), dtype=np.int64)
    steps = np.array([max(1, round(c.size * STEP)) for c in curves])
    most = np.array([0 if f else len(c.lost) for c, f in zip(curves, costs.fixed, strict=True)])

    def lost(group: int, count: int) -> float:
        return float(counted[group] * curves[group].lost[count - 1]) if count else 0.0

    while True:
        left = costs.sizes - gone
        path.gone.append(tuple(int(g) for g in gone))
        path.parameters.append(costs.parameters(left))
        path.macs.append(costs.macs(left))
        path.lost.append(path.loss(path.gone[-1]))
        slope = costs.slope(left, kind)
        best, price = -1, np.inf
        for group in range(len(curves)):
            count = min(int(steps[group]), int(most[group] - gone[group]))
            if count > 0:
                paid = lost(group, int(gone[group]) + count) - lost(group, int(gone[group]))
                value = paid / max(slope[group] * count, 1e-300)
                if value < price:
                    best, price = group, value
        if best < 0:
            return path
        gone[best] += min(int(steps[best]), int(most[best] - gone[best]))
