"""Axes of equal width (``SameSize``) in a lift: other multiplicities, equal sums."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fxfib.coloring import Labels


def equalize(
    times: Labels,
    groups: list[list[Labels]],
    pinned: npt.NDArray[np.bool_],
    generator: np.random.Generator,
) -> int | None:
    """Change numbers of copies until all axes of a group have equally many slots.

    Args:
        times: int64 ``[n]``, the copies of every node; written to.
        groups: of every group and each of its axes the nodes, as indices into ``times``.
        pinned: bool ``[n]``, what cannot change.

    Returns:
        None, or the number of a group for which this was not possible.
    """
    for _ in range(8):
        for axes in groups:
            # A node of one axis alone can follow the others.
            within = [np.bincount(axis, minlength=len(times)) for axis in axes]
            once = np.sum(within, axis=0) == 1
            free = [np.flatnonzero((own > 0) & once & ~pinned) for own in within]
            total = [int(times[a].sum()) for a in axes]
            held = [t for t, f in zip(total, free, strict=True) if not len(f)]
            goal = max(held or total)
            for nodes, own in zip(axes, free, strict=True):
                if not len(own):
                    continue
                if times[nodes].sum() > goal:
                    times[own] = 1
                more = max(0, goal - int(times[nodes].sum()))
                np.add.at(times, generator.choice(own, more), 1)
        unequal = [
            number
            for number, axes in enumerate(groups)
            if len({int(times[a].sum()) for a in axes}) > 1
        ]
        if not unequal:
            return None
    return unequal[0]
