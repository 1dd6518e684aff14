"""Networks near the best one so far: a little smaller, with what is lost shared differently."""

from __future__ import annotations

import numpy as np

from fxfib.coloring import Labels
from fxfib.passes.costs import Costs

# How much smaller the next network is to be, and which part of the nodes that are left of a group
# goes at most.
SMALLER = 0.01
MOVE = 0.15
# What the former is multiplied with behind a network that was good, and behind one that was not.
BOLDER, SHYER = 1.5, 0.75
# How often a move is drawn until there is one.
DRAWS = 100


class Nearby:
    """Draws networks around the best one, and moves on to those that turn out better.

    Some nodes of one group go, and as many of another come back as leave the network a little
    smaller; a move that was good is made again.  Groups were weighed by what single networks lost,
    and what a network is really worth shows when it is made.  Deterministic.

    Args:
        costs: sizes of networks, and which groups may lose nodes.
        most: how many nodes of every group may go.
        gone: how many have gone, of the best network so far.
        kind: ``"params"`` or ``"macs"``, what is to shrink.
    """

    def __init__(self, costs: Costs, most: Labels, gone: Labels, kind: str = "params") -> None:
        self.costs, self.most, self.best, self.kind = costs, most, gone, kind
        self.free = np.flatnonzero(most)
        self.generator = np.random.default_rng(0)
        self.move: tuple[int, int, float] | None = None
        self.smaller = SMALLER

    def next(self) -> Labels | None:
        """How many nodes of every group have gone in the next network; None: there is none."""
        for _ in range(DRAWS if len(self.free) > 1 else 0):
            if self.move is None:
                more, back = self.generator.choice(self.free, 2, replace=False)
                self.move = int(more), int(back), self.generator.uniform(0, MOVE)
            found = self._moved(*self.move)
            if found is not None:
                return found
            self.move = None
        return None

    def saw(self, gone: Labels, better: bool) -> None:
        """Take up what came of a network."""
        self.smaller *= BOLDER if better else SHYER
        if better:
            self.best = gone
        else:
            self.move = None

    def _moved(self, more: int, back: int, part: float) -> Labels | None:
        """The best network after a move, if that makes it smaller."""
        gone = self.best.copy()
        left = int(self.costs.sizes[more]) - gone[more]
        gone[more] = min(gone[more] + max(1, round(part * left)), self.most[more])
        limit = (1 - self.smaller) * self._size(self.best)
        # The most nodes that may come back, by bisection.
        some, many = 0, int(gone[back]) + 1
        while many - some > 1:
            count = (some + many) // 2
            gone[back] -= count
            some, many = (count, many) if self._size(gone) <= limit else (some, count)
            gone[back] += count
        gone[back] -= some
        enough = (1 - self.smaller / 2) * self._size(self.best)
        return gone if self._size(gone) <= enough else None

    def _size(self, gone: Labels) -> float:
        left = self.costs.sizes - gone
        return self.costs.parameters(left) if self.kind == "params" else self.costs.macs(left)
