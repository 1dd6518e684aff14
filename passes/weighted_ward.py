"""Ward linkage of points that have masses (scipy's gives every point the same), and of zero."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fxfib.coloring import Floats, Labels
from fxfib.errors import InputError

# All distances are held: 512 MiB at this size.
LARGEST = 8192


@dataclass(frozen=True, eq=False)
class Tree:
    """Joins of clusters, the cheapest first.

    Attributes:
        count: number of points; zero has this number.
        left, right: int64, a member of each of the two clusters that are joined.
        cost: float64, not decreasing, the energy that each join loses.
        energy: the energy of all points.
    """

    count: int
    left: Labels
    right: Labels
    cost: Floats
    energy: float

    @property
    def lost(self) -> Floats:
        """Share of the energy that is lost after 1, 2, ... joins."""
        return np.cumsum(self.cost) / max(self.energy, 1e-300)

    def cut(self, eps: float) -> tuple[Labels, npt.NDArray[np.bool_]]:
        """Cluster numbers when joins may lose this share, all together, and what joined zero."""
        # The last join would leave nothing.
        made = min(int(np.searchsorted(self.lost, eps, side="right")), max(len(self.cost) - 1, 0))
        edges = self.left[:made], self.right[:made]
        shape = self.count + 1, self.count + 1
        graph = coo_array((np.ones(made, dtype=bool), edges), shape)
        found = connected_components(graph, directed=False)[1].astype(np.int64)
        return found[:-1], found[:-1] == found[-1]


def ward_tree(points: Floats, masses: Floats, groups: Labels) -> Tree:
    r"""Join clusters, each time those whose join loses least energy.

    Joining A and B, of masses :math:`m` and means :math:`\bar p`, loses

    .. math:: \frac{m_A m_B}{m_A + m_B} |\bar p_A - \bar p_B|^2

    and all energy is :math:`\sum_i m_i |p_i|^2`.  Zero is a point of infinite mass: to join it is
    to be dropped, which loses :math:`m_A |\bar p_A|^2`.

    Args:
        points: float64 ``[n, d]``.
        masses: float64 ``[n]``, at least 0.
        groups: int64 ``[n]``; points of different groups are never joined.

    Raises:
        InputError: a group of more than `LARGEST` points.
    """
    left: list[int] = []
    right: list[int] = []
    cost: list[float] = []
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        if len(members) > LARGEST:
            raise InputError(
                f"{len(members)} nodes of one layer are more than the {LARGEST} that the criterion "
                "'energy' can join; use 'fibration'."
            )
        # In the order of their values, so that ties do not depend on the order of the nodes.
        members = members[np.lexsort(points[members, :8].T[::-1])] if points.shape[1] else members
        names = np.append(members, len(points))
        for a, b, lost in _chain(points[members], masses[members]):
            left.append(int(names[a]))
            right.append(int(names[b]))
            cost.append(lost)
    order = np.argsort(cost, kind="stable")
    energy = float((masses * np.square(points).sum(1)).sum())
    return Tree(
        len(points),
        np.array(left, dtype=np.int64)[order],
        np.array(right, dtype=np.int64)[order],
        np.array(cost, dtype=np.float64)[order],
        energy,
    )


def _chain(points: Floats, masses: Floats) -> list[tuple[int, int, float]]:
    """Joins by the nearest-neighbour chain, in no particular order; the number behind is zero."""
    zero = len(points)
    mass = masses.astype(np.float64)
    squares = np.square(points).sum(1)
    table = np.full((zero + 1, zero + 1), np.inf)
    apart = np.maximum(squares[:, None] + squares - 2 * points @ points.T, 0.0)
    table[:zero, :zero] = apart * _reduced(mass[:, None], mass)
    table[zero, :zero] = table[:zero, zero] = mass * squares
    np.fill_diagonal(table, np.inf)
    alive = np.ones(zero + 1, dtype=bool)
    chain: list[int] = []
    joins = []
    for _ in range(zero):
        if not chain:
            chain.append(int(alive.argmax()))
        while True:
            here = chain[-1]
            nearest = int(table[here].argmin())
            if len(chain) > 1 and table[here, chain[-2]] <= table[here, nearest]:
                break
            chain.append(nearest)
        a, b = sorted((chain.pop(), chain.pop()), key=lambda c: c != zero)
        lost = float(table[a, b])
        joins.append((a, b, lost))
        alive[b] = False
        if a != zero:  # which stays where it is, whatever joins it
            own, others = table[:, :zero], alive[:zero].copy()
            others[a] = False
            total = np.maximum(mass[a] + mass[b] + mass, 1e-300)
            joined = (mass[a] + mass) * own[a] + (mass[b] + mass) * own[b] - mass * lost
            row = np.append(joined / total, table[a, zero] + table[b, zero] - lost)
            # Rounding must not make a join cheaper than what it joins.
            row = np.where(np.append(others, alive[zero]), np.maximum(row, lost), np.inf)
            table[a], table[:, a] = row, row
            mass[a] += mass[b]
        table[b], table[:, b] = np.inf, np.inf
    return joins


def _reduced(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return a * b / np.maximum(a + b, 1e-300)
