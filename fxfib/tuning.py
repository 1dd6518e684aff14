"""One eps for every group of layers: the smallest network at a loss, or least loss at a size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxfib.api import check_options
from fxfib.errors import InputError
from fxfib.evaluation import Evaluator
from fxfib.frontier import Store
from fxfib.latency import Stopwatch, check_runtime, setting_of, target_of, widths_for
from fxfib.modules import FibrationModule
from fxfib.progress import Progress
from fxfib.search import Search
from fxfib.workshop import Workshop, skip_patterns

STRATEGIES = ("marginal", "bisection")


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
    refine: int | None = None,
    round_to: int | str | None = None,
    skip: Iterable[str] = (),
    dynamic_shapes: Any = None,
    verify: bool = True,
    resume: str | None = None,
    progress: bool | None = None,
) -> FibrationModule:
    """Choose one eps for every group of layers, then compile.

    ``"marginal"``: groups give up nodes one after another, always where the least predicted loss is
    paid for what is saved; the predicted loss is the energy that the readers of each group lose,
    told from the weights, or measured on the calibration inputs, times how far the outputs move
    when that group alone loses it.  Later layers mend a part of what earlier ones lose, so that
    this factor counts whole, by its square root or not at all: of three networks as small, each
    fitted, the one is gone on from that is nearest to the original on inputs kept apart (where
    none are given, the root is taken).  Along its path the target is found by making
    networks (sizes and latencies) and evaluating them (losses), each where the ones before say that
    the limit is; and within a loss, networks around the best one are looked at, too: some nodes of
    one group less, some of another more, four for each group (of refined networks three times as
    many, as they are before that, and the best of each four) and no more work than some 6e12
    multiply-accumulates.  Of small models all is done in one thread.
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
            network that was found is returned.  Needs data; on a few examples what was chosen by
            them is a little lucky, and on others the loss rises more.
        params, macs: at most so many: a count, or, below or equal to 1, a fraction of the original.
        latency: one call with the example inputs takes at most so long in ``runtime``: a part of
            the original's time (0.5), or a time with its unit ("2.5 ms").  Networks are timed
            beside the original, in turns, on as many threads as torch has now.
        runtime: ``"onnxruntime"``, ``"torch"`` or ``"torch.compile"``: where latency is measured,
            and ``round_to="auto"``.
        criterion: as for :func:`fxfib.compile`; only ``"energy"`` can be predicted, the others need
            ``strategy="bisection"``.
        strategy: see above.
        calibration, compensate, skip, dynamic_shapes, verify: as for :func:`fxfib.compile`.
        round_to: as there; ``"auto"``: the multiple that :func:`fxfib.measure_widths` finds to pay
            for the layers of this network, told in the report's notes.
        refine: as for :func:`fxfib.compile`; None: 10 passes where layers are fitted on calibration
            inputs, or on noise that linear layers at the inputs tell something of; else none.
        resume: a file; what was evaluated is kept there, and not evaluated again by a later call of
            the same search.
        progress: show a progress bar on standard error; None: only on a terminal.

    Returns:
        The chosen network.  Its ``.fibration.frontier`` lists every point: sizes, predicted and
        measured loss, and the eps of all groups, with which :func:`fxfib.compile` makes it.

    Raises:
        InputError: not one target is given, it cannot be met (the message says what can), an
            option is out of range, or ``resume`` is a file of something else.
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
    with Progress("fxfib tune", progress) as step:
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
            dynamic_shapes=dynamic_shapes,
            step=step,
        )
        measured: list[str] = []
        if round_to == "auto":
            step("measure widths")
            workshop.round_to, note = widths_for(workshop.graph_module, runtime)
            measured.append(note)
        evaluator = None if data is None else Evaluator(workshop.captured, data, loss_fn, step)
        place = None if aim is None else setting_of(runtime)
        store = Store(resume, workshop, evaluator, place)
        search = Search(workshop, evaluator, store, step.part)
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
        if max_loss_increase is None:
            best = replace(best, refined=workshop.refine > 0)
        step.part("the result")
        rewriter, small, notes = search.network(best)
        notes = [*measured, *notes]
        if evaluator is not None:
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
