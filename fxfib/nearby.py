"""Networks near the best one so far: a little smaller, with what is lost shared differently."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fxfib.coloring import Labels
from fxfib.frontier import Point, loss_of
from fxfib.passes.batches import examples_of
from fxfib.passes.costs import Costs
from fxfib.paths import Path

if TYPE_CHECKING:
    from fxfib.search import Search

# Networks that are looked at: so many for each group that may lose nodes, in so many rounds where
# what comes out best is refined, and as many as do not cost more multiply-accumulates than so.
# Training counts several times: it is done in small batches.
LOOKS = 4
ROUNDS = 3
LOOKED_AT = 6e12
TRAINING = 8

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
    """

    def __init__(self, costs: Costs, most: Labels, gone: Labels) -> None:
        self.costs, self.most, self.best = costs, most, gone
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
        return self.costs.parameters(self.costs.sizes - gone)


class Surroundings:
    """Looks for a smaller network within a loss near one that is known.

    Args:
        search: makes and measures networks.
        path: what is known is on it.
        limit: the largest loss.
    """

    def __init__(self, search: Search, path: Path, limit: float) -> None:
        assert search.evaluator is not None and search.allocation is not None
        self.search, self.path, self.limit = search, path, limit
        self.evaluator, self.allocation = search.evaluator, search.allocation

    def best(self, number: int, known: Point) -> tuple[Labels, Point]:
        """The smallest network that was found, and how many nodes of every group have gone there.

        Of networks that are refined the fitted ones are looked at, which are made much faster and
        whose loss goes with that of the refined ones; what comes out best is refined.

        Args:
            number: of the known network on the path.
        """
        most, gone = (np.array(self.path.gone[place]) for place in (-1, number))
        nearby = Nearby(self.allocation.costs, most, gone)
        looks = LOOKS * int(np.count_nonzero(most))
        if known.refined:
            return self._refined(nearby, known, looks)
        looks = min(looks, int(LOOKED_AT / self._work(refine=False)))
        trail = self._smaller(nearby, known, self.limit, looks)
        return trail[-1] if trail else (gone, known)

    def _refined(self, nearby: Nearby, best: Point, looks: int) -> tuple[Labels, Point]:
        left, fitted = LOOKED_AT, self._measured(nearby.best)
        for _ in range(ROUNDS):
            left -= self._work(refine=True)
            looks = min(looks, max(0, int(left / self._work(refine=False))))
            left -= looks * self._work(refine=False)
            # Refining leaves about the same part of the loss of networks that are alike.
            part = _part(self._increase(best), self._increase(fitted))
            original = self.evaluator.original
            start = nearby.best
            trail = self._smaller(nearby, fitted, original + (self.limit - original) / part, looks)
            at, nearby.best = len(trail) - 1, start
            while at >= 0:
                gone, found = trail[at]
                point = self._measured(gone, refine=True)
                if loss_of(point) <= self.limit:
                    nearby.best, best, fitted = gone, point, found
                    break
                at = (at - 1) // 2
            if at < 0:
                break
        return nearby.best, best

    def _smaller(
        self, nearby: Nearby, best: Point, limit: float, looks: int
    ) -> list[tuple[Labels, Point]]:
        """Ever smaller networks within a limit, of so many that are looked at."""
        found: list[tuple[Labels, Point]] = []
        for _ in range(looks):
            gone = nearby.next()
            if gone is None:
                break
            point = self._measured(gone, below=best.parameters)
            better = point.parameters < best.parameters and loss_of(point) <= limit
            nearby.saw(gone, better)
            if better:
                best = point
                found.append((gone, point))
        return found

    def _measured(self, gone: Labels, *, refine: bool = False, below: float = math.inf) -> Point:
        """The network in which so many nodes of every group have gone, if it is small enough."""
        refs, counts = (curve.ref for curve in self.path.curves), tuple(map(int, gone))
        eps = self.search.workshop.eps_for(dict(zip(refs, counts, strict=True)))
        predicted = self.path.loss(counts)
        return self.search.made(eps, predicted, measure=True, refine=refine, below=below)

    def _increase(self, point: Point) -> float:
        return loss_of(point) - self.evaluator.original

    def _work(self, *, refine: bool) -> float:
        """Multiply-accumulates that a network costs which is measured, roughly."""
        workshop = self.search.workshop
        learned = sum(map(examples_of, workshop.batches)) if workshop.compensate else 0
        runs = 2 + (TRAINING * workshop.refine if refine else 0)
        return max(self.allocation.macs * (runs * learned + self.evaluator.examples), 1.0)


def _part(of: float, whole: float) -> float:
    return of / whole if of > 0 and whole > 0 else 1.0
