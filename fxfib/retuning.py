"""Retuning: the smaller network is trained on, and tuned again, in rounds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fxfib.errors import InputError
from fxfib.modules import FibrationModule
from fxfib.passes.difference import difference, floating
from fxfib.report import Report
from fxfib.tuning import tune

RATE = 1e-3
# How much the teacher counts where there is one; the loss counts the rest.
TEACHER = 0.3
ROUNDS = 3
# A round that saves less than this part of the parameters is the last.
PLATEAU = 0.01
Module = TypeVar("Module", bound=nn.Module)


@torch.inference_mode(False)
def finetune(
    model: Module,
    data: Any,
    loss_fn: Callable[..., Any],
    *,
    teacher: nn.Module | None = None,
    weight: float = TEACHER,
    passes: int = 1,
    rate: float = RATE,
    optimizer: torch.optim.Optimizer | None = None,
    progress: bool | None = None,
) -> Module:
    """Train a network in place, in train mode; an ordinary loop, for those who have none.

    Args:
        model: what :func:`fxfib.compile` or :func:`tune` gave, or any module.
        data: an iterable of batches ``(inputs, target)`` that can be read ``passes`` times.
            ``inputs`` are one tensor, or a tuple of arguments.
        loss_fn: ``loss_fn(output, target)``, a scalar tensor.
        teacher: the original; its outputs are wanted, too: class scores ``[batch, several]`` by
            the divergence of their softmax, others by the squared difference over their variance.
        weight: how much the teacher counts, from 0 to 1; the loss counts ``1 - weight``.
        passes: how often the data are seen.
        rate: learning rate of Adam at the start; it falls to zero by a cosine.
        optimizer: used in place of Adam, at its own rate.
        progress: show a progress bar on standard error; None: only on a terminal.

    Returns:
        ``model``, in the mode in which it was given.

    Raises:
        InputError: data that can be read only once, or are empty; a weight out of range; a loss
            that is not finite.
    """
    if iter(data) is data and passes > 1:
        raise InputError("data must be read again and again: a list or a DataLoader.")
    if not 0 <= weight <= 1:
        raise InputError(f"weight must be from 0 to 1, not {weight!r}.")
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise InputError(f"passes must be a positive whole number, not {passes!r}.")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        return model
    modes = {module: module.training for module in model.modules()}
    learner = optimizer or torch.optim.Adam(trained, rate)
    steps = _length(data, passes)
    schedule = None
    if optimizer is None and steps is not None:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(learner, steps)
    seen = 0
    model.train()
    try:
        with (
            torch.enable_grad(),
            tqdm(total=steps, desc="fxfib finetune", leave=False,
                 disable=None if progress is None else not progress) as bar,
        ):  # fmt: skip
            for _ in range(passes):
                for inputs, target in data:
                    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
                    output = model(*arguments)
                    loss = loss_fn(output, target)
                    if teacher is not None:
                        loss = (1 - weight) * loss + weight * _apart(output, teacher, arguments)
                    if not bool(loss.isfinite()):
                        raise InputError(
                            f"the loss became {float(loss.detach())} after {seen} steps."
                        )
                    learner.zero_grad()
                    loss.backward()
                    learner.step()
                    if schedule is not None:
                        schedule.step()
                    seen += 1
                    bar.update()
            learner.zero_grad()
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not seen:
        raise InputError("data holds no batches.")
    return model


def _length(data: Any, passes: int) -> int | None:
    return len(data) * passes if hasattr(data, "__len__") else None


def _apart(output: Any, teacher: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
    with torch.no_grad():
        wanted = floating(teacher(*arguments))
    found = floating(output)
    return torch.stack([
        difference(a, b, max(float(b.float().var()), 1e-12))
        for a, b in zip(found, wanted, strict=True)
    ]).sum()  # fmt: skip


def retune(
    model: nn.Module,
    data: Any,
    loss_fn: Callable[..., Any],
    *,
    example_inputs: Any,
    validation: Any = None,
    max_loss_increase: float | None = None,
    params: float | None = None,
    rounds: int = ROUNDS,
    passes: int = 1,
    rate: float = RATE,
    teacher: bool = True,
    calibration: Any = None,
    progress: bool | None = None,
    **options: Any,
) -> FibrationModule:
    """Tune, train, tune again: smaller than tuning alone for the same loss.

    With ``params``, the size falls to the target in equal ratios, one a round, and every round ends
    with :func:`finetune`.  With ``max_loss_increase``, every round takes the smallest network
    within the tolerance and trains it, which makes room for the next; it ends after ``rounds``, or
    at a plateau: where a round saves less than one percent.

    Args:
        model: in eval mode; never modified.
        data: training batches ``(inputs, target)``, read again and again.
        loss_fn: ``loss_fn(output, target)``, a scalar tensor.
        example_inputs: as for :func:`tune`.
        validation: batches on which losses are measured; needed by ``max_loss_increase``.
        max_loss_increase: of the loss on ``validation``, above that of ``model``.
        params: at most so many parameters: a count, or a fraction of the original.
        rounds: at most so many.
        passes, rate: of every training, see :func:`finetune`.
        teacher: whether the outputs of ``model`` are learned beside the targets.
        calibration: as for :func:`tune`; None: the inputs of ``data``.
        progress: show progress bars on standard error; None: only on a terminal.
        options: further options of :func:`tune`.

    Returns:
        The network, trained; notes of its report tell every round.  The errors in the report are
        from before the last training.

    Raises:
        InputError: not one target is given, it cannot be met, or an option is out of range.
        as :func:`tune`.
    """
    if (max_loss_increase is None) == (params is None):
        raise InputError("retune needs one of params and max_loss_increase.")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise InputError(f"rounds must be a positive whole number, not {rounds!r}.")
    if max_loss_increase is not None and validation is None:
        raise InputError("max_loss_increase is measured on data; give validation.")
    given: dict[str, Any] = {
        "example_inputs": example_inputs,
        "calibration": data if calibration is None else calibration,
        "progress": progress,
        **options,
    }
    training: dict[str, Any] = {
        "teacher": model if teacher else None, "passes": passes, "rate": rate,
        "progress": progress,
    }  # fmt: skip
    notes: list[str] = []
    if params is not None:
        small, first = _to_size(model, params, rounds, given, data, loss_fn, training, notes)
    else:
        assert max_loss_increase is not None
        limit = mean_loss(model, validation, loss_fn) + max_loss_increase
        small, first = _to_loss(
            model, limit, rounds, given, data, validation, loss_fn, training, notes
        )
    small.fibration = replace(
        small.fibration,
        parameters_before=first.parameters_before,
        macs_before=first.macs_before,
        notes=(*small.fibration.notes, *notes),
    )
    return small


def _to_size(
    model: nn.Module,
    params: float,
    rounds: int,
    given: Mapping[str, Any],
    data: Any,
    loss_fn: Callable[..., Any],
    training: Mapping[str, Any],
    notes: list[str],
) -> tuple[FibrationModule, Report]:
    full = _size(model)
    share = params if params <= 1 else params / full
    if not share > 0:
        raise InputError(f"params must be positive, not {params!r}.")
    current = model
    reports = []
    for number in range(1, rounds + 1):
        wanted = max(2, math.floor(full * share ** (number / rounds)))
        tuned = tune(current, params=wanted, **given)
        reports.append(tuned.fibration)
        current = finetune(tuned, data, loss_fn, **training)
        notes.append(f"round {number}: {_size(current):,} parameters, trained")
    assert isinstance(current, FibrationModule)
    return current, reports[0]


def _to_loss(
    model: nn.Module,
    limit: float,
    rounds: int,
    given: Mapping[str, Any],
    data: Any,
    validation: Any,
    loss_fn: Callable[..., Any],
    training: Mapping[str, Any],
    notes: list[str],
) -> tuple[FibrationModule, Report]:
    best: FibrationModule | None = None
    reports = []
    current, loss = model, mean_loss(model, validation, loss_fn)
    for number in range(1, rounds + 1):
        tuned = tune(current, validation, loss_fn, max_loss_increase=limit - loss, **given)
        reports.append(tuned.fibration)
        saved = 1 - _size(tuned) / _size(current)
        before = mean_loss(tuned, validation, loss_fn)
        trained = finetune(copy.deepcopy(tuned), data, loss_fn, **training)
        after = mean_loss(trained, validation, loss_fn)
        notes.append(
            f"round {number}: {_size(tuned):,} parameters, loss {before:.4g}, trained {after:.4g}"
        )
        # Training may overfit; the tolerance holds for what is returned.
        best, loss = (trained, after) if after <= before else (tuned, before)
        current = best
        if saved < PLATEAU:
            notes.append("the last round saved less than one percent: a plateau")
            break
    assert best is not None
    return best, reports[0]


def mean_loss(model: nn.Module, data: Any, loss_fn: Callable[..., Any]) -> float:
    """The mean over all batches ``(inputs, target)``, weighted by their sizes.

    Raises:
        InputError: there are none.
    """
    total, count = 0.0, 0
    with torch.no_grad():
        for inputs, target in data:
            arguments = inputs if isinstance(inputs, tuple) else (inputs,)
            size = len(arguments[0])
            total += float(loss_fn(model(*arguments), target)) * size
            count += size
    if not count:
        raise InputError("data holds no batches.")
    return total / count


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
