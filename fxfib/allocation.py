"""How groups share a loss: several ways along which nodes go, and which of them comes nearest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import fx

from fxfib.coloring import Floats
from fxfib.macs import macs_of
from fxfib.passes.batches import length_of
from fxfib.passes.compensate import Batches
from fxfib.passes.costs import Costs
from fxfib.passes.curves import curves_of
from fxfib.passes.difference import Yardstick
from fxfib.passes.plan import make_plan
from fxfib.passes.rewrite import Rewriter
from fxfib.passes.sensitivity import sensitivities
from fxfib.paths import Path, marginal_path
from fxfib.workshop import Workshop

# Powers of the groups' weights: 0 counts the shares of all groups alike; 1 says that outputs move
# by the sum of what single groups move them, as if later layers mended nothing.  All are tried
# where inputs are given; what was made, noise or as batch norms remember it, misjudges networks
# that were fitted to more of the same, so the middle is taken.
POWERS = (0.0, 0.5, 1.0)
MIDDLE = (0.5,)
# The share at which a group is weighed, at least: what is lost below it is next to rounding.
LEVEL = 0.01
# Multiply-accumulates that the choice may cost, for each of its steps, and the fewest examples.
WORK = 2e11
FEWEST = 16


class Allocation:
    """The ways in which the groups of one network can share a loss.

    Args:
        workshop: what makes networks.
        kind: ``"params"`` or ``"macs"``: what is saved.
        batch: examples in the captured input.
    """

    def __init__(self, workshop: Workshop, kind: str, batch: int) -> None:
        self.workshop = workshop
        self.kind = kind
        self.macs = macs_of(workshop.graph_module) / batch
        self.curves = curves_of(workshop.graph_module, workshop.guide)
        self.costs = Costs(make_plan(workshop.exact), self.curves, batch)
        self.even = self.path(np.ones(len(self.curves)))

    def path(self, weights: Floats) -> Path:
        """The way on which the loss of every group counts so much."""
        return marginal_path(self.curves, self.costs, self.kind, weights)

    def paths(self, place: int) -> list[Path]:
        """The ways that are worth trying.

        Args:
            place: the point of the even way near which groups are weighed.
        """
        weights = self.weights(place)
        found: list[Path] = []
        for power in MIDDLE if self.workshop.calibration is None else POWERS:
            path = self.path(weights**power)
            if all(path.gone != other.gone for other in found):
                found.append(path)
        return found

    def weights(self, place: int) -> Floats:
        """How far outputs move for a share that each group loses; what is not known is the mean.

        Args:
            place: see :meth:`paths`.
        """
        result = np.ones(len(self.curves))
        free = [c for c, fixed in zip(self.curves, self.costs.fixed, strict=True) if not fixed]
        if len(free) < 2 or self.workshop.blind:
            return result
        even = dict(zip((c.ref for c in self.curves), self.even.gone[place], strict=True))
        gone = {}
        for curve in free:
            enough = int(np.searchsorted(curve.lost, LEVEL)) + 1
            gone[curve.ref] = min(max(even[curve.ref], enough), len(curve.lost))
        moved = sensitivities(
            self.workshop.graph_module,
            self.workshop.guide,
            gone,
            self.yardstick(len(free)),
            self.workshop.step,
        )
        for curve in free:
            if curve.ref not in moved:
                # Hidden nodes exist inside an op alone: it is seen what the fitted network loses.
                eps = self.workshop.eps_for({curve.ref: gone[curve.ref]})
                moved[curve.ref] = self.distance(*self.workshop.rewritten(eps))
        for number, curve in enumerate(self.curves):
            share = float(curve.lost[gone[curve.ref] - 1]) if curve.ref in gone else 0.0
            movement = moved.get(curve.ref, 0.0)
            result[number] = movement / share if share > 0 and movement > 0 else np.nan
        known = np.isfinite(result)
        mean = np.exp(np.log(result[known]).mean()) if known.any() else 1.0
        return np.where(known, result / mean, 1.0)

    def yardstick(self, times: int) -> Yardstick:
        """What judges, on as many of the inputs kept apart as may be run so often."""
        few = some(self.workshop.parts[1], self.most(times))
        return Yardstick(self.workshop.graph_module, few, scores=self.workshop.like_data)

    def most(self, times: int) -> int:
        """How many examples may be run so often."""
        return max(FEWEST, int(WORK / max(1.0, self.macs * times)))

    @cached_property
    def judge(self) -> Yardstick:
        """What judges the networks that the ways lead to."""
        return self.yardstick(len(POWERS))

    @cached_property
    def learned(self) -> Batches:
        """What these networks are fitted on."""
        return some(self.workshop.parts[0], self.most(1))

    def distance(self, rewriter: Rewriter, small: fx.GraphModule) -> float:
        """How far a rewritten network is from the original once it is fitted, in place."""
        self.workshop.fitted(rewriter, small, refine=False, batches=self.learned)
        return self.judge(small)


def some(batches: Batches, most: int) -> Batches:
    """The first of all examples; of batches that cannot be cut, the first batches."""
    found: list[Sequence[Any]] = []
    count = 0
    for batch in batches:
        size = length_of(batch)
        if count >= most:
            break
        found.append(batch if size is None else _cut(batch, most - count))
        count += size or 1
    return found


def _cut(batch: Iterable[torch.Tensor], count: int) -> list[torch.Tensor]:
    return [tensor[:count] for tensor in batch]
