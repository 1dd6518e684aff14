"""Refining: the small network learns the original's outputs on the calibration inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from fxfib.passes.compensate import Batches

RATE = 1e-3
BATCH = 128


def refined(
    original: fx.GraphModule, small: fx.GraphModule, batches: Batches, passes: int
) -> list[str]:
    """Train ``small`` in place to give the outputs of ``original``; no labels are needed.

    Adam with a cosine schedule on the squared difference of all floating outputs, each in units of
    its own variance.  Deterministic: batches in a fixed random order.

    Returns:
        A note, where there was nothing to train.
    """
    _own(small)
    trained = [p for p in small.parameters() if p.requires_grad]
    pieces = [piece for batch in batches for piece in _cut(batch)]
    if not trained or not pieces:
        return ["nothing was refined: no parameter requires a gradient"]
    with torch.no_grad():
        targets = [_floating(original(*piece)) for piece in pieces]
        spread = [
            max(float(torch.cat([t[k].flatten() for t in targets]).float().var()), 1e-12)
            for k in range(len(targets[0]))
        ]
    optimizer = torch.optim.Adam(trained, RATE)
    total = passes * len(pieces)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for _ in range(passes):
            for place in torch.randperm(len(pieces), generator=generator).tolist():
                found = _floating(small(*pieces[place]))
                loss = torch.stack([
                    (a.float() - b.float()).square().mean() / s
                    for a, b, s in zip(found, targets[place], spread, strict=True)
                ]).sum()  # fmt: skip
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    optimizer.zero_grad()
    return []


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


def _floating(outputs: object) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]
