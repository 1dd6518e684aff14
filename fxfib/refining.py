"""Refining: the small network learns the original's outputs on the calibration inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxfib.passes.compensate import Batches
from fxfib.passes.difference import difference, floating, length_of, pieces_of, spreads_of
from fxfib.passes.stages import Step, silent

RATE = 1e-3
# The difference from which on the whole rate pays.  Adam moves every weight by about the rate at
# each step, however near the network is already, and the floor that it reaches goes with the square
# of the rate: a rate that goes with the root of the difference stays below the start.
FAR = 0.1
# How often it is tried, each time at a third of the rate, until something is gained.
ATTEMPTS, SLOWER = 2, 3.0
# Passes over the inputs where nobody asked for a number.
PASSES = 10
BATCH = 32
# One example in so many is not learned from: it judges.
APART = 8


def refined(
    original: fx.GraphModule,
    small: fx.GraphModule,
    inputs: Callable[[int], Batches],
    apart: Batches,
    passes: int,
    *,
    scores: bool = True,
    step: Step = silent,
) -> list[str]:
    r"""Train ``small`` in place to give the outputs of ``original``; no labels are needed.

    Adam with a cosine schedule on :func:`difference`, at a rate of

    .. math:: 10^{-3} \min(1, \sqrt{d / 0.1})

    with :math:`d` the difference at the start, so that a network that is near stays near.  Of
    inputs that come again one half is mixed, each with another of its batch, and the original is
    asked about the mixture (mixup): from few inputs as they are a network learns little that holds
    for others.  Of the network at the start and after every pass that one is returned which is
    nearest to the original on inputs that are kept apart; where none is nearer than the start, all
    is done once more at a third of the rate.  Batch norms keep their statistics.  Deterministic.

    Args:
        inputs: the batches of every pass, by its number from 0; the same object means that inputs
            come again.
        apart: what judges; see :func:`parted`.
        scores: see :func:`difference`.
        step: told which share of the training is done.

    Returns:
        A note, where there was nothing to train, or nothing was gained.
    """
    _own(small)
    trained = [p for p in small.parameters() if p.requires_grad]
    batches = inputs(0)
    pieces = [piece for batch in batches for piece in pieces_of(batch, BATCH)]
    if not trained or not pieces:
        return ["nothing was refined: no parameter requires a gradient"]
    apart = [piece for batch in apart for piece in pieces_of(batch, BATCH)]
    aims, targets = _outputs(original, apart), _outputs(original, pieces)
    spread = spreads_of(aims + targets)

    def gap(piece: Sequence[Any], wanted: list[torch.Tensor]) -> torch.Tensor:
        found = floating(small(*piece))
        return torch.stack([
            difference(a, b, s, scores=scores)
            for a, b, s in zip(found, wanted, spread, strict=True)
        ]).sum()  # fmt: skip

    def judged() -> float:
        with torch.no_grad():
            return sum(float(gap(*pair)) for pair in zip(apart, aims, strict=True)) / len(apart)

    start = judged()
    best, kept = start, [p.detach().clone() for p in trained]
    rate = RATE * min(1.0, math.sqrt(max(start, 0.0) / FAR))
    for attempt in range(ATTEMPTS):
        # A step of Adam is less than what half precision can tell apart.
        wide = [p if p.dtype.itemsize > 2 else nn.Parameter(p.detach().float()) for p in trained]
        optimizer = torch.optim.Adam(wide, rate / SLOWER**attempt)
        total = passes * len(pieces)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        generator = torch.Generator().manual_seed(0)
        seen = 0
        for number in range(passes):
            given = inputs(number)
            again = given is batches
            if not again:
                batches = given
                pieces = [piece for batch in batches for piece in pieces_of(batch, BATCH)]
                targets = _outputs(original, pieces)
            for place in torch.randperm(len(pieces), generator=generator).tolist():
                piece, wanted = pieces[place], targets[place]
                if again and _mixable(piece):
                    piece = _mixed(piece, generator)
                    (wanted,) = _outputs(original, [piece])
                with torch.enable_grad():
                    loss = gap(piece, wanted)
                gradients = torch.autograd.grad(loss, trained, allow_unused=True)
                with torch.no_grad():
                    for own, gradient in zip(wide, gradients, strict=True):
                        own.grad = None if gradient is None else gradient.to(own.dtype)
                    optimizer.step()
                    for own, parameter in zip(wide, trained, strict=True):
                        if own is not parameter:
                            parameter.copy_(own)
                schedule.step()
                seen += 1
                step("refine", seen / total)
            now = judged()
            if now < best:
                best, kept = now, [p.detach().clone() for p in trained]
        with torch.no_grad():
            for parameter, value in zip(trained, kept, strict=True):
                parameter.copy_(value)
                parameter.grad = None
        if best < start:
            return []
    return ["refining brought nothing nearer to the original: it is undone"]


def parted(batches: Batches) -> tuple[Batches, Batches]:
    """Inputs to learn from, and one example in eight to judge by, or one batch in eight where
    batches cannot be cut.  So few that none can be spared do both.
    """
    learned: list[Sequence[Any]] = []
    apart: list[Sequence[Any]] = []
    whole: list[Sequence[Any]] = []
    for batch in batches:
        count = length_of(batch)
        if count is None or count < APART:
            whole.append(batch)
            continue
        judges = torch.arange(count) % APART == APART - 1
        learned.append([t[~judges.to(t.device)] for t in batch])
        apart.append([t[judges.to(t.device)] for t in batch])
    for place, batch in enumerate(whole):
        (apart if place % APART == APART - 1 else learned).append(batch)
    return (learned, apart) if learned and apart else (batches, batches)


def _mixable(piece: Sequence[Any]) -> bool:
    """Whether there is an input between two inputs: not of token numbers, nor of masks."""
    return all(
        isinstance(t, torch.Tensor)
        and t.is_floating_point()
        and t.ndim > 0
        and len(t) > 1
        and bool(torch.isfinite(t).all())
        for t in piece
    )


def _mixed(piece: Sequence[torch.Tensor], generator: torch.Generator) -> list[torch.Tensor]:
    """Half of the examples, drawn, each with some of another; at least half is its own."""
    count = len(piece[0])
    other = torch.randperm(count, generator=generator)
    share = 0.5 + 0.5 * torch.rand(count, generator=generator)
    share[torch.rand(count, generator=generator) < 0.5] = 1.0
    mixed = []
    for tensor in piece:
        own = share.to(tensor.device, tensor.dtype).reshape(-1, *[1] * (tensor.ndim - 1))
        mixed.append(own * tensor + (1 - own) * tensor[other.to(tensor.device)])
    return mixed


def _outputs(original: fx.GraphModule, pieces: list[Sequence[Any]]) -> list[list[torch.Tensor]]:
    with torch.no_grad():
        return [floating(original(*piece)) for piece in pieces]


def _own(module: nn.Module) -> None:
    """New memory for every parameter: merging leaves those alone that do not change."""
    fresh: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None:
                if id(parameter) not in fresh:
                    copy = parameter.detach().clone()
                    fresh[id(parameter)] = nn.Parameter(copy, parameter.requires_grad)
                owner._parameters[name] = fresh[id(parameter)]
