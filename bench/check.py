"""Is an answer right?  Asked before a provider is timed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def first_appearance(labels: Tensor) -> Tensor:
    """Labels renumbered in the order in which they first appear."""
    _, first, inverse = np.unique(labels.cpu().numpy(), return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return torch.from_numpy(rank[inverse.reshape(-1)])


def wrong(
    rows: Tensor, eps: float, labels: Tensor, gives: str, trusted: Tensor | None
) -> str | None:
    """What is wrong with an answer, or None.

    Colors: no two members of a color may be further apart than eps, and the partition must be the
    trusted one where there is one (a planted one, else ours, which other providers then confirm).
    Components: every trusted color lies in one.
    """
    labels = first_appearance(labels)
    if labels.shape != (len(rows),):
        return f"{tuple(labels.shape)} labels for {len(rows)} rows"
    if gives == "components":
        if trusted is not None and len(torch.unique(trusted)) != len(
            torch.unique(torch.stack([first_appearance(trusted), labels]), dim=1).T
        ):
            return "a component boundary cuts a color"
        return None
    diameter = widest(rows, labels)
    if diameter > eps * (1 + 1e-6):
        return f"a color has diameter {diameter:.6g}"
    if trusted is not None and not torch.equal(labels, first_appearance(trusted)):
        return "another partition than the trusted one"
    return None


def widest(rows: Tensor, labels: Tensor) -> float:
    """The largest L-infinity diameter of a color, which is its largest range in any column."""
    order = torch.argsort(labels, stable=True)
    ordered = rows.cpu()[order].double().numpy()
    starts = np.flatnonzero(np.r_[True, np.diff(labels[order].numpy()) != 0])
    high = np.maximum.reduceat(ordered, starts, axis=0)
    low = np.minimum.reduceat(ordered, starts, axis=0)
    return float((high - low).max())
