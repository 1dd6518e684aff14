"""Refining: the small network learns the original's outputs on the calibration inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxfib.passes.compensate import Batches
from fxfib.passes.stages import Step, silent

RATE = 1e-3
BATCH = 128
# Passes over the inputs where nobody asked for a number.
PASSES = 10
# What the squared difference of class scores counts beside the divergence of their softmax.
SQUARED = 0.1


def refined(
    original: fx.GraphModule,
    small: fx.GraphModule,
    inputs: Callable[[int], Batches],
    passes: int,
    *,
    scores: bool = True,
    step: Step = silent,
) -> list[str]:
    """Train ``small`` in place to give the outputs of ``original``; no labels are needed.

    Adam with a cosine schedule on :func:`difference`.  Batch norms keep their statistics.
    Deterministic: batches in a fixed random order.

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
    pieces = [piece for batch in batches for piece in _cut(batch)]
    if not trained or not pieces:
        return ["nothing was refined: no parameter requires a gradient"]
    targets = _outputs(original, pieces)
    spread = [
        max(float(torch.cat([t[k].flatten() for t in targets]).float().var()), 1e-12)
        for k in range(len(targets[0]))
    ]
    # A step of Adam is less than what half precision can tell apart.
    wide = [p if p.dtype.itemsize > 2 else nn.Parameter(p.detach().float()) for p in trained]
    optimizer = torch.optim.Adam(wide, RATE)
    total = passes * len(pieces)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    generator = torch.Generator().manual_seed(0)
    seen = 0
    for number in range(passes):
        if inputs(number) is not batches:
            batches = inputs(number)
            pieces = [piece for batch in batches for piece in _cut(batch)]
            targets = _outputs(original, pieces)
        for place in torch.randperm(len(pieces), generator=generator).tolist():
            with torch.enable_grad():
                found = floating(small(*pieces[place]))
                loss = torch.stack([
                    difference(a, b, s, scores=scores)
                    for a, b, s in zip(found, targets[place], spread, strict=True)
                ]).sum()  # fmt: skip
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


def difference(
    found: torch.Tensor, wanted: torch.Tensor, spread: float, *, scores: bool = True
) -> torch.Tensor:
    """How far one output is from the original's; 0 only where both are equal.

    The mean squared difference over ``spread``.  What has the shape of class scores, ``[batch,
    several]``, is compared as such: by the Kullback-Leibler divergence of the softmax, plus a tenth
    of the squared difference, which alone would spend the network on scores of no consequence.
    Not ``scores``: what noise scores highest means nothing, so the squared difference is all.
    """
    found, wanted = found.float(), wanted.float()
    squared = (found - wanted).square().mean() / spread
    if not scores or found.ndim != 2 or found.shape[1] < 2:
        return squared
    ours, theirs = F.log_softmax(found, 1), F.log_softmax(wanted, 1)
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean") + SQUARED * squared


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


def _cut(batch: Sequence[Any]) -> list[Sequence[Any]]:
    """Smaller batches, where all inputs are as long."""
    sizes = {len(t) for t in batch if isinstance(t, torch.Tensor) and t.ndim}
    if len(sizes) != 1 or not all(isinstance(t, torch.Tensor) and t.ndim for t in batch):
        return [batch]
    (size,) = sizes
    return [[t[start : start + BATCH] for t in batch] for start in range(0, size, BATCH)]


def floating(outputs: object) -> list[torch.Tensor]:
    """The floating tensors among the outputs of a call."""
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]
