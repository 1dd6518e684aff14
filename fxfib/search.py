"""The points on the way to a target: which are made, which are measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from torch import fx

from fxfib.allocation import Allocation
from fxfib.api import LARGEST_EPS
from fxfib.certificate import batch_of
from fxfib.coloring import Labels
from fxfib.crossing import Crossing
from fxfib.errors import InputError
from fxfib.evaluation import Evaluator
from fxfib.frontier import Key, Point, Store, key_of, loss_of
from fxfib.latency import Stopwatch, Target
from fxfib.macs import macs_of
from fxfib.modules import raise_modules
from fxfib.nearby import Surroundings
from fxfib.passes.forward import OUTPUT
from fxfib.passes.groups import groups_of
from fxfib.passes.plan import make_plan
from fxfib.passes.rewrite import Rewriter
from fxfib.paths import Path
from fxfib.timing import torch_threads
from fxfib.workshop import Workshop

# Points of the path that the report shows besides those that were tried.
SHOWN = 8
# Networks as near as this, as a part of the original's multiply-accumulates, cannot be told apart
# by their times.
NEAR_MACS = 1 / 256
# Sizes so near, as a part of the larger, are not told apart by measured losses; and how near a
# network must be found from which refined ones are searched.
CLOSE = 0.02
NEAR = 0.05
# A loss that is higher by no more, as a part of the original's or of 1, is the original's.
ROUNDING = 1e-6
# Places at which a size is expected, before the rest is halved again and again.
GUESSES = 8
# Networks that are compared have about the same size: how near, and how often it is tried.
ALIKE, TRIES = 0.01, 3
# Groups that stay whole, of which a message tells.
TOLD = 3
# How finely the published strategy searches the eps of a layer.
BISECTIONS = 7


class Network(NamedTuple):
    """A rewritten and fitted graph.

    Attributes:
        rewriter: what made it.
        small: the graph.
        notes: what was not fitted.
    """

    rewriter: Rewriter
    small: fx.GraphModule
    notes: list[str]


class Search:
    """Points on the way to a target.

    Args:
        workshop, evaluator, store: what makes, measures and keeps them.
        part: told which network is made next.
    """

    def __init__(
        self,
        workshop: Workshop,
        evaluator: Evaluator | None,
        store: Store,
        part: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.workshop = workshop
        self.evaluator = evaluator
        self.store = store
        self.part = part
        self.number = 0
        self.tried: dict[Key, Point] = {}
        self.allocation: Allocation | None = None
        self.path: Path | None = None
        # Nodes gone of every group in the network that a loss was searched for.
        self.gone: Labels = np.zeros(0, dtype=np.int64)
        self.precisions: dict[int, dict[str, float]] = {}
        # The last network within the limit: mostly what is returned, so it is not made again.
        self.limit = math.nan
        self.kept: tuple[Key, Network] | None = None

    def made(
        self,
        eps: Mapping[str, float],
        predicted: float | None,
        *,
        measure: bool,
        refine: bool = False,
        below: float = math.inf,
    ) -> Point:
        """A point that was really made; its loss where it is asked for, and it is small enough."""
        key = key_of(eps, refine)
        known = self.tried.get(key) or self.store.get(key)
        if known is None or (measure and known.loss is None and known.parameters < below):
            self.number += 1
            self.part(f"network {self.number}")
            rewriter, small = self.workshop.rewritten(dict(eps))
            sizes = self._sizes(small)
            loss = None
            if measure and sizes["params"] < below:
                assert self.evaluator is not None
                notes = self.workshop.fitted(rewriter, small, refine=refine)
                self.workshop.step("evaluate")
                loss = self.evaluator.loss(small)
                if loss <= self.limit:
                    self.kept = key, Network(rewriter, small, notes)
            known = Point(
                sizes["params"],
                sizes["macs"],
                dict(eps),
                predicted,
                loss,
                made=True,
                refined=refine,
            )
            self.store.put(key, known)
        self.tried[key] = known
        return known

    def network(self, point: Point) -> Network:
        """What a point stands for, rewritten and fitted."""
        if self.kept is not None and self.kept[0] == key_of(point.eps, point.refined):
            return self.kept[1]
        rewriter, small = self.workshop.rewritten(point.eps)
        return Network(rewriter, small, self.workshop.fitted(rewriter, small, refine=point.refined))

    def _keep(self, point: Point) -> None:
        key = key_of(point.eps, point.refined)
        self.tried[key] = point
        self.store.put(key, point)

    @property
    def batch(self) -> int:
        """Examples in the captured input."""
        return batch_of(self.workshop.captured)

    def _marginal(self, kind: str) -> Path:
        with torch_threads(self.workshop.threads):
            self.allocation = Allocation(self.workshop, kind, self.batch)
        return self._follow(self.allocation.even)

    def _follow(self, path: Path) -> Path:
        self.path, self.precisions = path, {}
        return path

    def _allocate(self, kind: str, limit: float) -> int:
        """Follow the path on which a network of this size is nearest to the original.

        Returns:
            Its place there.
        """
        assert self.path is not None and self.allocation is not None
        self.workshop.step("allocate")
        with torch_threads(self.workshop.threads):
            paths = self.allocation.paths(self.path.first(kind, limit))
            best, least, aim = paths[0], math.inf, limit
            for path in paths if len(paths) > 1 else ():
                self._follow(path)
                distance, aim = self._judged(kind, limit, aim)
                if distance < least:
                    best, least = path, distance
        self._follow(best)
        return self._fitting(kind, limit, aim)

    def _judged(self, kind: str, limit: float, aim: float) -> tuple[float, float]:
        """How far the network of about this size on the path is from the original.

        Args:
            aim: the predicted size at which it is expected.

        Returns:
            The distance, and the predicted size that would have been right.
        """
        assert self.path is not None and self.allocation is not None
        for _ in range(TRIES):
            place = self.path.first(kind, aim)
            rewriter, small = self.workshop.rewritten(self._eps(place))
            size = self._sizes(small)[kind]
            aim = limit * self.path.predicted_sizes(kind)[place] / max(size, 1)
            if abs(size - limit) <= ALIKE * limit:
                break
        return self.allocation.distance(rewriter, small), aim

    def _sizes(self, small: fx.GraphModule) -> dict[str, int]:
        parameters = sum(p.numel() for p in small.parameters())
        return {"params": parameters, "macs": macs_of(small) // self.batch}

    def _at(self, place: int, *, measure: bool = False, refine: bool = False) -> Point:
        assert self.path is not None
        eps, predicted = self._eps(place), self.path.predicted(place)
        return self.made(eps, predicted, measure=measure, refine=refine)

    def _eps(self, place: int) -> dict[str, float]:
        assert self.path is not None
        if place not in self.precisions:
            refs = [curve.ref for curve in self.path.curves]
            gone = dict(zip(refs, self.path.gone[place], strict=True))
            self.precisions[place] = self.workshop.eps_for(gone)
        return self.precisions[place]

    def within_size(self, kind: str, target: float) -> Point:
        """The first point of the path that is small enough."""
        path = self._marginal(kind)
        if not path.curves:
            raise InputError(f"no layer of this model has nodes that could merge.{self._stays()}")
        limit = target * self._original(kind) if target <= 1 else target
        if self._at(0).size(kind) <= limit:
            return self._at(0)
        smallest = self._at(len(path) - 1).size(kind)
        if smallest > limit:
            raise InputError(
                f"{kind}={target:g} cannot be met: the smallest network that was found has "
                f"{smallest:,} ({smallest / self._original(kind):.3g} of the original)."
                f"{self._stays()}"
            )
        return self._at(self._allocate(kind, limit))

    def _stays(self) -> str:
        """What does not merge, and why, for a message."""
        groups = groups_of(make_plan(self.workshop.exact))
        groups = tuple(group for group in groups if group.reason not in ("", OUTPUT))
        told = [f"{group.members[0]} ({group.reason})" for group in groups[:TOLD] if group.members]
        return f" All nodes stay of: {'; '.join(told)}." if told else ""

    def _fitting(self, kind: str, limit: float, aim: float) -> int:
        """The first place that is small enough, as the original is not and the last place is.

        Args:
            aim: the predicted size at which it is expected.
        """
        assert self.path is not None
        predicted = self.path.predicted_sizes(kind)
        low, high, guesses = 0, len(self.path) - 1, 0
        while high - low > 1:
            # Predicted sizes are near, and wrong by about the same part at near places; what is
            # returned is counted.
            place = self.path.first(kind, aim) if guesses < GUESSES else (low + high) // 2
            place = min(max(place, low + 1), high - 1)
            size = self._at(place).size(kind)
            low, high = (low, place) if size <= limit else (place, high)
            aim, guesses = limit * predicted[place] / max(size, 1), guesses + 1
        return high

    def within_latency(self, aim: Target, watch: Stopwatch) -> Point:
        """A point of the path that is measured to be fast enough, next to one that is not."""
        self._marginal("macs")

        def fits(place: int) -> bool:
            point = self._at(place)
            if point.latency is None or point.milliseconds is None:
                _, small = self.workshop.rewritten(dict(point.eps))
                self.workshop.step("time")
                found = watch.latency(raise_modules(small, self.workshop.captured))
                point = replace(point, milliseconds=found.milliseconds, latency=found.ratio)
                self._keep(point)
            return aim.met(point.milliseconds or 0.0, point.latency or 0.0)

        assert self.path is not None
        if fits(0):
            return self._at(0)
        if not fits(len(self.path) - 1):
            last = self._at(len(self.path) - 1)
            raise InputError(
                f"latency={aim.text} cannot be met: the smallest network that was found takes "
                f"{last.milliseconds:.3g} ms ({last.latency:.2f} of the original's time)."
            )
        # Groups are weighed where the time would be right if it were all arithmetic.
        first = self._at(0)
        part = aim.ratio or (aim.milliseconds or 0.0) / (first.milliseconds or 1.0)
        most, least = first.macs, self._at(len(self.path) - 1).macs
        self._allocate("macs", min(max(part * self._original("macs"), least), most))
        low, high = 0, len(self.path) - 1
        near = NEAR_MACS * self._original("macs")
        while high - low > 1 and self._at(low).macs - self._at(high).macs > near:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return self._at(high)

    def _original(self, kind: str) -> int:
        return self._sizes(self.workshop.graph_module)[kind]

    def within_loss(self, increase: float) -> Point:
        """The smallest network that was found whose measured loss is within the tolerance."""
        assert self.evaluator is not None
        path = self._marginal("params")
        first = self._at(0, measure=True)
        original, rise = self.evaluator.original, loss_of(first) - self.evaluator.original
        limit = original + increase
        if rise > increase and rise <= ROUNDING * max(1.0, abs(original)):
            limit = loss_of(first)  # sums in another order
        elif not rise <= increase:
            raise InputError(
                f"max_loss_increase={increase:g} cannot be met: even where only equal nodes merge "
                f"the loss is {rise:g} above the original's."
            )
        self.limit = limit
        number, best = self._along(path, (0, first), limit)
        assert self.path is not None
        self.gone, best = Surroundings(self, self.path, limit).best(number, best)
        return best

    def _along(self, path: Path, first: tuple[int, Point], limit: float) -> tuple[int, Point]:
        """The last network of the path within the limit; the path is followed on which it is."""
        end = len(path) - 1
        last = end, self._at(end, measure=True)
        # Refining costs much, so only networks near the end of what is possible are refined.
        close = NEAR if self.workshop.refine else CLOSE
        within = loss_of(last[1]) <= limit
        fitted = last if within else self._last_within(first, last, limit, close, refine=False)
        start = fitted
        if not within and fitted[0]:
            # Groups are weighed here; from now on along the path that is better for this size.
            place = self._allocate("params", fitted[1].parameters)
            assert self.path is not None
            start, last = (place, self._at(place, measure=True)), (len(self.path) - 1, last[1])
        if self.workshop.refine:
            refined = start[0], self._at(start[0], measure=True, refine=True)
            if loss_of(refined[1]) <= limit:
                return self._last_within(refined, last, limit, CLOSE, refine=True)
        elif not within:
            ends = (start, last) if loss_of(start[1]) <= limit else (first, start)
            found = self._last_within(*ends, limit, CLOSE, refine=False)
            if found[1].parameters <= fitted[1].parameters:
                return found
        self._follow(path)
        return fitted

    def _last_within(
        self,
        low: tuple[int, Point],
        high: tuple[int, Point],
        limit: float,
        close: float,
        *,
        refine: bool,
    ) -> tuple[int, Point]:
        """Between a place within the limit and one beyond it."""
        assert self.path is not None and self.evaluator is not None
        crossing = Crossing(
            self.path.parameters,
            self.path.lost,
            self.evaluator.original,
            limit,
            close,
            *((place, loss_of(point)) for place, point in (low, high)),
        )
        while (place := crossing.next()) is not None:
            point = self._at(place, measure=True, refine=refine)
            crossing.saw(place, loss_of(point))
            if crossing.low[0] == place:
                low = place, point
        return low

    def layer_by_layer(self, increase: float) -> Point:
        """As published: in order, the largest eps of each layer that the tolerance allows."""
        assert self.evaluator is not None
        limit = self.limit = self.evaluator.original + increase
        plan = make_plan(self.workshop.exact)
        eps: dict[str, float] = {}
        best = self.made(eps, None, measure=True)
        for group in groups_of(plan):
            if group.reason:
                continue
            layers = [name.partition(" (")[0] for name in group.members]
            low, high = 0.0, min(LARGEST_EPS[self.workshop.criterion], self._spread())
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                trial = {**eps, **dict.fromkeys(layers, middle)}
                point = self.made(trial, None, measure=True)
                if point.loss is not None and point.loss <= limit:
                    low, best = middle, point
                else:
                    high = middle
            if low > 0:
                eps |= dict.fromkeys(layers, low)
        return best

    def _spread(self) -> float:
        """The largest weight: no eps of Eq. 3 beyond twice this says more."""
        tensors = [p.detach().abs().max() for p in self.workshop.graph_module.parameters()]
        return 2.0 * max((float(t) for t in tensors), default=1.0)

    def frontier(self, chosen: Point) -> tuple[Point, ...]:
        """All points that were made, and some that were only predicted, by size."""
        tried = sorted(self.tried.values(), key=lambda p: p.refined)
        points = {tuple(sorted(p.eps.items())): p for p in tried}
        points[tuple(sorted(chosen.eps.items()))] = replace(chosen, chosen=True)
        if self.path is not None:
            for place in range(0, len(self.path), max(1, len(self.path) // SHOWN)):
                eps = self._eps(place)
                key = tuple(sorted(eps.items()))
                if key not in points:
                    points[key] = Point(
                        round(self.path.parameters[place]),
                        round(self.path.macs[place]),
                        eps,
                        self.path.predicted(place),
                    )
        return tuple(sorted(points.values(), key=lambda p: -p.parameters))
