"""Correlation matrices as a matplotlib figure (paper, Fig. 4a)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fxfib.errors import InputError
from fxfib.history_figures import safe

if TYPE_CHECKING:
    from fxfib.synchronized import Synchrony


def figure(found: Synchrony, layer: str | None, classes: Sequence[int] | None) -> Any:
    """See :meth:`fxfib.Synchrony.plot`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install 'fxfib[plot]'.") from error
    names = list(found.layers)
    chosen = layer if layer is not None else names[-2 if len(names) > 1 else -1]
    if chosen not in found.layers:
        raise InputError(f"no layer {chosen!r}; there are {', '.join(names)}.")
    own = found.layers[chosen]
    known = [label for label in own.correlation if label is not None]
    wanted = known[:3] if classes is None else list(classes)
    for unknown in set(wanted) - set(known):
        raise InputError(f"no class {unknown!r} was seen in {chosen}.")
    made = Figure(figsize=(4.2 * (1 + len(wanted)) + 0.8, 4.6), layout="constrained")
    panels = made.subplots(1, 1 + len(wanted), squeeze=False)[0]
    for axes, label in zip(panels, [None, *wanted], strict=True):
        labels = own.clusters[label]
        # The largest clusters first, and inside them fiber by fiber.
        sizes = torch.bincount(labels)[labels]
        order = np.lexsort((own.fibers.numpy(), labels.numpy(), -sizes.numpy()))
        matrix = own.correlation[label].numpy()[np.ix_(order, order)]
        picture = axes.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        place = 0
        for size in _runs(labels.numpy()[order]):
            if size > 1:
                low, high = place - 0.5, place + size - 0.5
                across, down = (low, high, high, low, low), (low, low, high, high, low)
                axes.plot(across, down, color="#16202c", lw=0.8)
            place += size
        word = "all inputs" if label is None else f"class {label}"
        axes.set_title(f"{word}: {int(labels.max()) + 1} clusters", fontsize=10)
        axes.set_xlim(-0.5, len(labels) - 0.5)
        axes.set_ylim(len(labels) - 0.5, -0.5)
    fibers = int(own.fibers.max()) + 1
    made.suptitle(
        safe(f"{found.model}, {chosen}: {len(own.fibers)} nodes, {fibers} fibers, "
             f"correlation at least {found.threshold:g}", 120), fontsize=11,
    )  # fmt: skip
    made.colorbar(picture, ax=panels, shrink=0.8, label="correlation")
    return made


def _runs(labels: np.ndarray) -> list[int]:
    """Lengths of runs of equal labels."""
    ends = np.flatnonzero(np.diff(labels)) + 1
    return np.diff(np.concatenate(([0], ends, [len(labels)]))).tolist()
