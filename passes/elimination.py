"""Which nodes the readers miss least: elimination by the optimal-brain-surgeon score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from fxfib.coloring import Floats, Labels
from fxfib.errors import InputError

# What is added to the diagonal of the covariance, as a part of its mean: it has an inverse then.
DAMPING = 1e-4


class Place(NamedTuple):
    """What is known of the nodes of one value.

    Attributes:
        covariance: float64 ``[n, n]``.
        demand: float64 ``[n, n]``, products of the columns of linear readers.
        alone: float64 ``[n]``, how strongly every node is read by readers that cannot make up for
            it, as they are not linear; None: there is none.
        nodes: their numbers among those of all places, from 0; None: as they stand.
    """

    covariance: torch.Tensor
    demand: torch.Tensor
    alone: torch.Tensor | None = None
    nodes: Labels | None = None


def eliminate(places: Sequence[Place]) -> tuple[Labels, Floats]:
    r"""Drop one node after another, each time the one whose loss the others make up for best.

    Readers compute :math:`C h`; with covariance :math:`G` of the nodes and demand
    :math:`Q = C^T C`, dropping node :math:`j` and refitting the columns of all others loses

    .. math:: Q_{jj} / (G^{-1})_{jj}

    of the readers' variance.  After each step the columns are the refitted ones, and the inverse is
    that of the nodes that are left.  No other node makes up for what a reader loses that is not
    linear (a product of queries with keys): of it :math:`a_j G_{jj}` is lost.  Nodes that go
    together in several places (the channels of a residual stream) lose the mean of the shares of
    all places.

    Args:
        places: where the nodes are read.

    Returns:
        int64 ``[n]``, the nodes in the order in which they go, and float64 ``[n]``, the share of
        the readers' variance that is lost in all when each has gone (not decreasing; the last is
        1, or 0 where nothing is read).

    Raises:
        InputError: a covariance is not finite.
    """
    nodes = [np.arange(len(p.covariance)) if p.nodes is None else p.nodes for p in places]
    count = max((int(own.max(initial=-1)) + 1 for own in nodes), default=0)
    # Nobody reads a node in a place where it is not.
    damped = torch.eye(count, dtype=torch.float64).repeat(len(places), 1, 1)
    demand = torch.zeros_like(damped)
    alone = torch.zeros(len(places), count, dtype=torch.float64)
    for number, (place, own) in enumerate(zip(places, nodes, strict=True)):
        grid = np.ix_(own, own)
        damped[number][grid] = positive(place.covariance)
        demand[number][grid] = place.demand
        if place.alone is not None:
            alone[number, own] = place.alone * damped[number].diagonal()[own]
    # In units of each node's own deviation: the losses are the same, and the numbers are not spread
    # over as many powers of ten as the variances.
    unit = damped.diagonal(dim1=1, dim2=2).sqrt()
    units = unit[:, :, None] * unit[:, None]
    damped = damped / units
    demand = demand * units
    whole = (demand * damped).sum((1, 2)) + alone.sum(1)
    part_of_all = 1 / (len(places) * whole.clamp(min=1e-300))
    demand = demand * part_of_all[:, None, None]
    alone = alone * part_of_all[:, None]
    alive = torch.arange(count)
    order, lost = [], []
    total = 0.0
    while len(alive):
        # Each step loses digits, as what is left of the inverse shrinks; half of the nodes at a
        # time, and both matrices are made again.
        # One by one: on some CPUs batches of inverses have hung in several threads.
        left = damped[:, alive[:, None], alive]
        inverse = torch.stack([torch.linalg.inv(matrix) for matrix in left])
        columns = damped[:, :, alive] @ inverse
        wanted = columns.mT @ demand @ columns
        gone = torch.zeros(len(alive), dtype=torch.bool)
        for _ in range((len(alive) + 1) // 2):
            # Of a matrix with ones on its diagonal (G^-1)_jj is at least 1.
            pivots = inverse.diagonal(dim1=1, dim2=2).clamp(min=1.0)
            scores = wanted.diagonal(dim1=1, dim2=2).clamp(min=0.0) / pivots
            score = torch.where(gone, torch.inf, scores.sum(0) + alone[:, alive].sum(0))
            node = int(score.argmin())
            total += float(score[node])
            order.append(int(alive[node]))
            lost.append(total)
            gone[node] = True
            part = inverse[:, node] / pivots[:, node, None]
            column = wanted[:, node] - 0.5 * wanted[:, node, node, None] * part
            wanted.baddbmm_(part[:, :, None], column[:, None], alpha=-1.0)
            wanted.baddbmm_(column[:, :, None], part[:, None], alpha=-1.0)
            inverse.baddbmm_(part[:, :, None], inverse[:, node].clone()[:, None], alpha=-1.0)
            inverse[:, node] = inverse[:, :, node] = 0.0
        alive = alive[~gone]
    return np.array(order, dtype=np.int64), np.array(lost, dtype=np.float64)


def positive(covariance: torch.Tensor) -> torch.Tensor:
    """With as much on the diagonal as it takes to have an inverse.

    Products of float32 activations leave eigenvalues a little below zero, and in wide layers of
    which few inputs were seen the usual damping is less than that.
    """
    damping = DAMPING * float(covariance.diagonal().mean()) if len(covariance) else 0.0
    damping = max(damping, 1e-30)
    if not bool(torch.isfinite(covariance).all()):
        raise InputError(
            "on the calibration inputs some layer gives NaN or infinite values, so its nodes "
            "cannot be told apart; leave those inputs out, or give the model in a wider dtype."
        )
    eye = torch.eye(len(covariance), dtype=torch.float64)
    while True:
        damped = covariance + damping * eye
        _, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return damped
        damping *= 10.0
