"""One eps for every group of layers: the smallest network at a loss, or least loss at a size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fxfib.api import LARGEST_EPS, check_options
from fxfib.certificate import batch_of
from fxfib.errors import InputError
from fxfib.evaluation import Evaluator
from fxfib.frontier import Point, Store
from fxfib.latency import Stopwatch, Target, check_runtime, setting_of, target_of, widths_for
from fxfib.macs import macs_of
from fxfib.modules import FibrationModule, raise_modules
from fxfib.passes.costs import Costs
from fxfib.passes.curves import curves_of
from fxfib.passes.groups import groups_of
from fxfib.passes.plan import make_plan
from fxfib.paths import Path, marginal_path
from fxfib.workshop import Workshop, skip_patterns

STRATEGIES = ("marginal", "bisection")
# Points of the path that the report shows besides those that were tried.
SHOWN = 8
# Networks as near as this, as a part of the original's multiply-accumulates, cannot be told apart
# by their times.
NEAR_MACS = 1 / 256
# How finely the published strategy searches the eps of a layer.
BISECTIONS = 7


@torch.inference_mode(False)
def tune(
    model: nn.Module,
    data: Any = None,
    loss_fn: Callable[..., Any] | None = None,
    *,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    max_loss_increase: float | None = None,
    params: float | None = None,
    macs: float | None = None,
    latency: float | str | None = None,
    runtime: str = "onnxruntime",
    criterion: str = "energy",
    strategy: str = "marginal",
    calibration: Any = None,
    compensate: bool = True,
    refine: int = 0,
    round_to: int | str | None = None,
    skip: Iterable[str] = (),
    verify: bool = True,
    resume: str | None = None,
    progress: bool | None = None,
) -> FibrationModule:
    """Choose one eps for every group of layers, then compile.

    ``"marginal"``: groups give up nodes one after another, always where the least predicted loss is
    paid for what is saved; the predicted loss is the energy that the readers of each group lose,
    told from the weights, or measured on the calibration inputs.  Along this path the target is
    found by bisection over networks that are really made (sizes) and evaluated (losses).
    ``"bisection"``, as published: layer by layer, in order, the largest eps whose measured loss
    stays within the tolerance; it needs ``max_loss_increase``.

    Args:
        model: in eval mode; never modified.
        data: an iterable of batches ``(inputs, target)``, or of inputs alone where there is no
            ``loss_fn``.  Losses are measured on it; it is not used to fit anything.
        loss_fn: ``loss_fn(output, target)``, a number or a scalar tensor, the mean of a batch.
            None: the squared difference from the original's outputs, over their variance.
        example_inputs, example_kwargs: as for :func:`fxfib.compile`.
        max_loss_increase: the loss may exceed the original's by this much; the smallest such
            network is returned.  Needs data.
        params, macs: at most so many: a count, or, below or equal to 1, a fraction of the original.
        latency: one call with the example inputs takes at most so long in ``runtime``: a part of
            the original's time (0.5), or a time with its unit ("2.5 ms").  Networks are timed
            beside the original, in turns, on as many threads as torch has now.
        runtime: ``"onnxruntime"``, ``"torch"`` or ``"torch.compile"``: where latency is measured,
            and ``round_to="auto"``.
        criterion: as for :func:`fxfib.compile`; only ``"energy"`` can be predicted, the others need
            ``strategy="bisection"``.
        strategy: see above.
        calibration, compensate, refine, skip, verify: as for :func:`fxfib.compile`.
        round_to: as there; ``"auto"``: the multiple that :func:`fxfib.measure_widths` finds to pay
            for the layers of this network, told in the report's notes.
        resume: a file; what was evaluated is kept there, and not evaluated again by a later call of
            the same search.
        progress: show a progress bar on standard error; None: only on a terminal.

    Returns:
        The chosen network.  Its ``.fibration.frontier`` lists every point: sizes, predicted and
        measured loss, and the eps of all groups, with which :func:`fxfib.compile` makes it.

    Raises:
        InputError: not one target is given, it cannot be met (the message says what can), or an
            option is out of range.
        as :func:`fxfib.compile`.
    """
    targets = {"max_loss_increase": max_loss_increase, "params": params, "macs": macs}
    aim = None if latency is None else target_of(latency)
    targets["latency"] = None if aim is None else aim.ratio or aim.milliseconds
    _check(targets, criterion, strategy, data, loss_fn)
    check_runtime(runtime)
    fixed = None if isinstance(round_to, str) else round_to
    if isinstance(round_to, str) and round_to != "auto":
        raise InputError(f"round_to must be a positive whole number or 'auto', not {round_to!r}.")
    check_options(0.0, criterion, fixed)
    if example_inputs is None and not example_kwargs:
        raise InputError("tune needs example_inputs: the arguments of one call.")
    with tqdm(desc="fxfib tune", disable=None if progress is None else not progress,
              leave=False) as bar:  # fmt: skip

        def step(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        workshop = Workshop(
            model,
            example_inputs,
            example_kwargs,
            criterion=criterion,
            calibration=calibration,
            compensate=compensate,
            refine=refine,
            round_to=fixed,
            skip=skip_patterns(skip),
            step=step,
        )
        measured: list[str] = []
        if round_to == "auto":
            step("measure widths")
            workshop.round_to, note = widths_for(workshop.graph_module, runtime)
            measured.append(note)
        evaluator = None if data is None else Evaluator(workshop.captured, data, loss_fn)
        place = None if aim is None else setting_of(runtime)
        search = Search(workshop, evaluator, Store(resume, workshop, evaluator, place))
        if strategy == "bisection":
            assert max_loss_increase is not None
            best = search.layer_by_layer(max_loss_increase)
        elif max_loss_increase is not None:
            best = search.within_loss(max_loss_increase)
        elif aim is not None:
            with Stopwatch(
                workshop.captured.source, example_inputs, example_kwargs, runtime
            ) as watch:
                best = search.within_latency(aim, watch)
                measured.append(watch.note(best.milliseconds or 0.0, best.latency or 0.0))
        else:
            kind = "params" if params is not None else "macs"
            best = search.within_size(kind, params if params is not None else macs or 0.0)
        rewriter, small = workshop.rewritten(best.eps)
        notes = [*measured, *workshop.fitted(rewriter, small)]
        if evaluator is not None and best.loss is None:
            best = replace(best, loss=evaluator.loss(small))
        result = workshop.raised(rewriter, small, best.eps, notes, verify=verify)
        result.fibration = replace(result.fibration, frontier=search.frontier(best))
    return result


def _check(
    targets: Mapping[str, float | None],
    criterion: str,
    strategy: str,
    data: Any,
    loss_fn: Any,
) -> None:
    given = [name for name, value in targets.items() if value is not None]
    if len(given) != 1:
        raise InputError(f"tune needs one of {', '.join(targets)}, not {len(given)} of them.")
    value = targets[given[0]]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{given[0]} must be a number, not {value!r}.")
    if value < 0 or (value == 0 and given[0] != "max_loss_increase"):
        raise InputError(f"{given[0]} must be positive, not {value!r}.")
    if strategy not in STRATEGIES:
        known = ", ".join(map(repr, STRATEGIES))
        raise InputError(f"unknown strategy {strategy!r}; known: {known}.")
    if strategy == "bisection" and given[0] != "max_loss_increase":
        raise InputError("strategy 'bisection' needs max_loss_increase.")
    if strategy == "marginal" and criterion != "energy":
        raise InputError(f"the loss of {criterion!r} is not predicted; use strategy='bisection'.")
    if data is None and (given[0] == "max_loss_increase" or loss_fn is not None):
        raise InputError("a loss is measured on data; give data.")


class Search:
    """Points on the way to a target."""

    def __init__(self, workshop: Workshop, evaluator: Evaluator | None, store: Store) -> None:
        self.workshop = workshop
        self.evaluator = evaluator
        self.store = store
        self.tried: dict[tuple[tuple[str, float], ...], Point] = {}
        self.path: Path | None = None
        self.precisions: dict[int, dict[str, float]] = {}

    def _made(self, eps: Mapping[str, float], predicted: float | None, *, measure: bool) -> Point:
        """A point that was really made; its loss where it is asked for."""
        key = tuple(sorted(eps.items()))
        known = self.tried.get(key) or self.store.get(key)
        if known is None or (measure and known.loss is None):
            rewriter, small = self.workshop.rewritten(dict(eps))
            sizes = sum(p.numel() for p in small.parameters()), macs_of(small) // self.batch
            loss = None
            if measure:
                assert self.evaluator is not None
                self.workshop.fitted(rewriter, small)
                self.workshop.step("evaluate")
                loss = self.evaluator.loss(small)
            known = Point(*sizes, dict(eps), predicted, loss, made=True)
            self.store.put(key, known)
        self.tried[key] = known
        return known

    def _keep(self, point: Point) -> None:
        key = tuple(sorted(point.eps.items()))
        self.tried[key] = point
        self.store.put(key, point)

    @property
    def batch(self) -> int:
        """Examples in the captured input."""
        return batch_of(self.workshop.captured)

    def _marginal(self, kind: str) -> Path:
        curves = curves_of(self.workshop.graph_module, self.workshop.guide)
        if not curves:
            raise InputError("no layer of this model has nodes that could merge.")
        costs = Costs(make_plan(self.workshop.exact), curves, self.batch)
        self.path = marginal_path(curves, costs, kind)
        return self.path

    def _at(self, place: int, *, measure: bool = False) -> Point:
        assert self.path is not None
        return self._made(self._eps(place), self.path.predicted(place), measure=measure)

    def _eps(self, place: int) -> dict[str, float]:
        assert self.path is not None
        if place not in self.precisions:
            nodes = [curve.node for curve in self.path.curves]
            gone = dict(zip(nodes, self.path.gone[place], strict=True))
            self.precisions[place] = self.workshop.eps_for(gone)
        return self.precisions[place]

    def within_size(self, kind: str, target: float) -> Point:
        """The first point of the path that is small enough."""
        path = self._marginal(kind)
        original = self._at(0)
        limit = target * self._original(kind) if target <= 1 else target

        def size(point: Point) -> int:
            return point.parameters if kind == "params" else point.macs

        if size(original) <= limit:
            return original
        last = len(path) - 1
        if size(self._at(last)) > limit:
            raise InputError(
                f"{kind}={target:g} cannot be met: the smallest network that was found has "
                f"{size(self._at(last)):,} ({size(self._at(last)) / self._original(kind):.3g} of "
                "the original)."
            )
        # Predicted sizes are near; what is returned is counted.
        predicted = path.parameters if kind == "params" else path.macs
        place = next((p for p, s in enumerate(predicted) if s <= limit), last)

        def fits(at: int) -> bool:
            return size(self._at(at)) <= limit

        if fits(place):
            low, high = (place - 1 if not fits(place - 1) else 0), place
        else:
            low, high = place, (place + 1 if fits(place + 1) else last)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return self._at(high)

    def within_latency(self, aim: Target, watch: Stopwatch) -> Point:
        """A point of the path that is measured to be fast enough, next to one that is not."""
        path = self._marginal("macs")

        def fits(place: int) -> bool:
            point = self._at(place)
            if point.latency is None or point.milliseconds is None:
                _, small = self.workshop.rewritten(dict(point.eps))
                self.workshop.step("time")
                found = watch.latency(raise_modules(small, self.workshop.captured))
                point = replace(point, milliseconds=found.milliseconds, latency=found.ratio)
                self._keep(point)
            return aim.met(point.milliseconds or 0.0, point.latency or 0.0)

        low, high = 0, len(path) - 1
        if fits(low):
            return self._at(low)
        if not fits(high):
            last = self._at(high)
            raise InputError(
                f"latency={aim.text} cannot be met: the smallest network that was found takes "
                f"{last.milliseconds:.3g} ms ({last.latency:.2f} of the original's time)."
            )
        near = NEAR_MACS * self._original("macs")
        while high - low > 1 and self._at(low).macs - self._at(high).macs > near:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return self._at(high)

    def _original(self, kind: str) -> int:
        graph_module = self.workshop.graph_module
        if kind == "params":
            return sum(p.numel() for p in graph_module.parameters())
        return macs_of(graph_module) // self.batch

    def within_loss(self, increase: float) -> Point:
        """The last point of the path whose measured loss is within the tolerance."""
        assert self.evaluator is not None
        path = self._marginal("params")
        limit = self.evaluator.original + increase
        low, high = 0, len(path) - 1
        first = self._at(0, measure=True)
        if first.loss is not None and first.loss > limit:
            raise InputError(
                f"max_loss_increase={increase:g} cannot be met: even without merging the loss is "
                f"{first.loss - self.evaluator.original:g} above the original's."
            )
        last = self._at(high, measure=True)
        if last.loss is not None and last.loss <= limit:
            return last
        while high - low > 1:
            middle = (low + high) // 2
            loss = self._at(middle, measure=True).loss
            low, high = (middle, high) if loss is not None and loss <= limit else (low, middle)
        return self._at(low, measure=True)

    def layer_by_layer(self, increase: float) -> Point:
        """As published: in order, the largest eps of each layer that the tolerance allows."""
        assert self.evaluator is not None
        limit = self.evaluator.original + increase
        plan = make_plan(self.workshop.exact)
        eps: dict[str, float] = {}
        best = self._made(eps, None, measure=True)
        for group in groups_of(plan):
            if group.reason:
                continue
            layers = [name.partition(" (")[0] for name in group.members]
            low, high = 0.0, min(LARGEST_EPS[self.workshop.criterion], self._spread())
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                trial = {**eps, **dict.fromkeys(layers, middle)}
                point = self._made(trial, None, measure=True)
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
        points = {tuple(sorted(p.eps.items())): p for p in self.tried.values()}
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
