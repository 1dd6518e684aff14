"""Rows to color: random, with planted fibers, and of real networks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One matrix and one precision.

    Attributes:
        kind: ``"random"``, ``"planted"`` (every color has four members) or ``"network"``.
        share: eps over the spread of the entries (largest minus smallest), or ``"half"``: the eps
            at which half of the rows merge.
    """

    kind: str
    count: int
    width: int
    share: str

    @property
    def key(self) -> tuple[str, int, int, str]:
        """What tells cases apart in the CSV."""
        return self.kind, self.count, self.width, self.share


def make(case: Case, seed: int = 0) -> tuple[Tensor, float, Tensor | None]:
    """Rows, float32 ``[n, d]``; eps; planted labels where they are the only right answer."""
    generator = torch.Generator().manual_seed(seed)
    if case.kind == "network":
        rows = network_rows(case.count, case.width)
    else:
        rows = torch.randn(case.count, case.width, generator=generator)
    if case.share == "half":
        return rows, halving_eps(case), None
    eps = float(case.share) * float(rows.max() - rows.min())
    if case.kind != "planted":
        return rows, eps, None
    source = torch.randint(case.count // 4, (case.count,), generator=generator)
    rows = rows[source]
    if eps > 0:
        rows += 0.45 * eps * (2 * torch.rand(rows.shape, generator=generator) - 1)
    return rows, eps, source


@cache
def halving_eps(case: Case) -> float:
    """Where complete linkage has made half as many clusters as rows; of a part of many rows."""
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import pdist

    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(case.count, case.width, generator=generator)
    if case.kind == "network":
        rows = network_rows(case.count, case.width)
    part = rows[: min(case.count, 4096)].double().numpy()
    heights = np.sort(linkage(pdist(part, "chebyshev"), "complete")[:, 2])
    return float(heights[len(part) // 2])


@cache
def network_rows(count: int, width: int) -> Tensor:
    """Weights of a ResNet-50 and a ViT as torchvision makes them, cut into rows of a width."""
    import torchvision

    torch.manual_seed(0)
    pieces: list[Tensor] = []
    found = 0
    for name in ("resnet50", "vit_b_16"):
        for weight in torchvision.models.get_model(name, weights=None).parameters():
            if weight.ndim < 2 or weight[0].numel() < width:
                continue
            flat = weight.detach().flatten(1)
            flat = flat[:, : flat.shape[1] // width * width].reshape(-1, width)
            pieces.append(flat / flat.std())
            found += len(flat)
            if found >= count:
                return torch.cat(pieces)[:count].clone()
    return torch.cat(pieces)[:count].clone()
