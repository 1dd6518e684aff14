"""The numbers of a case: random weights, weights with planted fibers, rows of real networks."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from registry import Case, Problem, dtype_of
from torch import Tensor

# Part of the rows from which the eps that halves them is found: all distances are needed for it.
SAMPLE = 4096
# Copies differ by at most this part of eps in any entry.
NOISE = 0.9


class Missing(Exception):
    """Data that a case needs is not on this machine."""


def make(case: Case, seed: int = 0) -> Problem:
    """The same numbers for the same case in every process.

    Raises:
        Missing: the networks or checkpoints of the case are not here.
    """
    generator = torch.Generator().manual_seed(seed)
    if case.operation == "color_batch":
        single = Case("color", case.kind, 1, case.count, case.width, case.dtype, case.share)
        parts = [make(single, seed + index) for index in range(case.batch)]
        planted = [part.planted for part in parts if part.planted is not None]
        # One eps for all: with the largest, the copies in every matrix are still close.
        return Problem(
            case,
            torch.stack([part.rows for part in parts]),
            max(part.eps for part in parts),
            torch.stack(planted) if planted else None,
        )
    if case.operation in ("collapse", "merge"):
        rows = torch.randn(case.count, case.width, generator=generator).to(dtype_of(case))
        length = case.width if case.operation == "collapse" else case.count
        classes = max(1, length // 4)
        # Every color occurs: a mean of nothing is refused.
        labels = torch.arange(length) % classes
        labels = labels[torch.randperm(length, generator=generator)]
        return Problem(case, rows, 0.0, labels=labels, num_classes=classes)
    return _to_color(case, generator)


def _to_color(case: Case, generator: torch.Generator) -> Problem:
    rows = _matrix(case, generator)
    if case.share == "half":
        return Problem(case, rows, _halving_eps(case))
    eps = float(case.share) * float(rows.max() - rows.min())
    if case.kind != "planted":
        return Problem(case, rows, eps)
    source = torch.randint(max(1, case.count // 4), (case.count,), generator=generator)
    rows = rows[source]
    # In 16 bits the next number can be further away than eps: copies are equal there.
    if eps > 0 and rows.element_size() >= 4:
        noise = torch.rand(rows.shape, generator=generator, dtype=torch.float64) - 0.5
        rows = (rows + NOISE * eps * noise).to(rows.dtype)
    return Problem(case, rows, eps, planted=source)


def _matrix(case: Case, generator: torch.Generator) -> Tensor:
    if case.kind in ("network", "trained"):
        rows = _network_rows(case.width) if case.kind == "network" else _trained_rows(case.width)
        if len(rows) < case.count:
            raise Missing(f"{len(rows)} rows of {case.width} are in the networks, not {case.count}")
        # A spread over all layers; the copy lets go of the rest.
        chosen = torch.linspace(0, len(rows) - 1, case.count).long()
        return rows[chosen].to(dtype_of(case))
    return torch.randn(case.count, case.width, generator=generator).to(dtype_of(case))


@cache
def _halving_eps(case: Case) -> float:
    """Where complete linkage, of a part of the rows where they are many, has joined half."""
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import pdist

    rows = _matrix(case, torch.Generator().manual_seed(0))[:SAMPLE].double().numpy()
    heights = np.sort(linkage(pdist(rows, "chebyshev"), "complete")[:, 2])
    # Between two heights, so that rounding of either side decides nothing.
    middle = len(heights) // 2
    return float(heights[middle : middle + 2].mean())


@cache
def _network_rows(width: int) -> Tensor:
    """Weights of a ResNet-50 and a ViT as torchvision makes them, cut into rows of a width."""
    try:
        import torchvision
    except ImportError as error:
        raise Missing("torchvision is not installed") from error

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = [
            weight.detach()
            for name in ("resnet50", "vit_b_16")
            for weight in torchvision.models.get_model(name, weights=None).parameters()
        ]
    return _cut(weights, width)


@cache
def _trained_rows(width: int) -> Tensor:
    """Weights of the checkpoints under ``$FXFIB_DATA/checkpoints``, cut into rows of a width."""
    folder = os.environ.get("FXFIB_DATA")
    if not folder:
        raise Missing("FXFIB_DATA is not set")
    files = sorted(Path(folder, "checkpoints").glob("*.th"))
    if not files:
        raise Missing(f"no checkpoints in {folder}")
    weights: list[Tensor] = []
    for file in files:
        state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
        weights += [value for value in state.values() if value.is_floating_point()]
    return _cut(weights, width)


def _cut(weights: list[Tensor], width: int) -> Tensor:
    """Rows of the matrices that are wide enough, every matrix scaled to unit variance."""
    pieces = []
    for weight in weights:
        if weight.ndim < 2 or weight[0].numel() < width or not float(weight.std()):
            continue
        flat = weight.flatten(1).float()
        flat = flat[:, : flat.shape[1] // width * width].reshape(-1, width)
        pieces.append(flat / flat.std())
    return torch.cat(pieces)
