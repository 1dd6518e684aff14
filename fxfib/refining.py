"""Refining: the small network learns the original's outputs on the calibration inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxfib.passes.compensate import Batches
from fxfib.passes.difference import difference, floating, pieces_of, spreads_of
from fxfib.passes.stages import Step, silent

RATE = 1e-3
# The difference from which on the whole rate pays.  Adam moves every weight by about the rate at
# each step, however near the network is already: 10 passes at this rate end 0.003 to 0.006 from the
# original (MNIST perceptron), where the start was nearer, too.  That floor goes with the square of
# the rate; a rate that goes with the root of the difference stays below the start.
FAR = 1e-2
# Passes over the inputs where nobody asked for a number.
PASSES = 10


def refined(
    original: fx.GraphModule,
    small: fx.GraphModule,
    inputs: Callable[[int], Batches],
    passes: int,
    *,
    scores: bool = True,
    step: Step = silent,
) -> list[str]:
    r"""Train ``small`` in place to give the outputs of ``original``; no labels are needed.

    Adam with a cosine schedule on :func:`difference`, at a rate of

    .. math:: 10^{-3} \min(1, \sqrt{d / 0.01})

    with :math:`d` the difference at the start, so that a network that is near stays near.  Batch
    norms keep their statistics.  Deterministic: batches in a fixed random order.

    Args:
        inputs: the batches of every pass, by its number from 0; the same object is not run through
            ``original`` again.
        scores: see :func:`difference`.
        step: told which share of the training is done.

    Returns:
        A note, where there was nothing to train.
    """
    _own(small)
    trained = [p for p in small.parameters() if p.requires_grad]
    batches = inputs(0)
    pieces = [piece for batch in batches for piece in pieces_of(batch)]
    if not trained or not pieces:
        return ["nothing was refined: no parameter requires a gradient"]
    targets = _outputs(original, pieces)
    spread = spreads_of(targets)

    def gap(place: int) -> torch.Tensor:
        found = floating(small(*pieces[place]))
        return torch.stack([
            difference(a, b, s, scores=scores)
            for a, b, s in zip(found, targets[place], spread, strict=True)
        ]).sum()  # fmt: skip

    with torch.no_grad():
        start = sum(float(gap(place)) for place in range(len(pieces))) / len(pieces)
    rate = RATE * min(1.0, math.sqrt(max(start, 0.0) / FAR))
    # A step of Adam is less than what half precision can tell apart.
    wide = [p if p.dtype.itemsize > 2 else nn.Parameter(p.detach().float()) for p in trained]
    optimizer = torch.optim.Adam(wide, rate)
    total = passes * len(pieces)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    generator = torch.Generator().manual_seed(0)
    seen = 0
    for number in range(passes):
        if inputs(number) is not batches:
            batches = inputs(number)
            pieces = [piece for batch in batches for piece in pieces_of(batch)]
            targets = _outputs(original, pieces)
        for place in torch.randperm(len(pieces), generator=generator).tolist():
            with torch.enable_grad():
                loss = gap(place)
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
    optimizer.zero_grad()
    return []


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
