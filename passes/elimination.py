"""Which nodes the readers miss least: elimination by the optimal-brain-surgeon score."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fxfib.coloring import Floats, Labels
from fxfib.errors import InputError

# What is added to the diagonal of the covariance, as a part of its mean: it has an inverse then.
DAMPING = 1e-4


def eliminate(
    places: Sequence[tuple[torch.Tensor, torch.Tensor]], nodes: Sequence[Labels] | None = None
) -> tuple[Labels, Floats]:
    r"""Drop one node after another, each time the one whose loss the others make up for best.

    Readers compute :math:`C h`; with covariance :math:`G` of the nodes and demand
    :math:`Q = C^T C`, dropping node :math:`j` and refitting the columns of all others loses

    .. math:: Q_{jj} / (G^{-1})_{jj}

    of the readers' variance.  After each step the columns are the refitted ones, and the inverse is
    that of the nodes that are left.  Nodes that go together in several places (the channels of a
    residual stream) lose the mean of the shares of all places.

    Args:
        places: covariance and demand, float64 ``[n, n]`` each, of every place.
        nodes: the numbers of the nodes of every place, from 0, where not every place has all.

    Returns:
        int64 ``[n]``, the nodes in the order in which they go, and float64 ``[n]``, the share of
        the readers' variance that is lost in all when each has gone (not decreasing; the last is
        1, or 0 where nothing is read).

    Raises:
        InputError: a covariance is not finite.
    """
    if nodes is None:
        nodes = [np.arange(len(covariance)) for covariance, _ in places]
    count = max((int(own.max(initial=-1)) + 1 for own in nodes), default=0)
    # Nobody reads a node in a place where it is not.
    damped = torch.eye(count, dtype=torch.float64).repeat(len(places), 1, 1)
    demand = torch.zeros_like(damped)
    for place, ((own_covariance, own_demand), own) in enumerate(zip(places, nodes, strict=True)):
        grid = np.ix_(own, own)
        damped[place][grid] = positive(own_covariance)
        demand[place][grid] = own_demand
    # In units of each node's own deviation: the losses are the same, and the numbers are not spread
    # over as many powers of ten as the variances.
    unit = damped.diagonal(dim1=1, dim2=2).sqrt()
    units = unit[:, :, None] * unit[:, None]
    damped = damped / units
    demand = demand * units
    whole = (demand * damped).sum((1, 2))
    demand = demand / (len(places) * whole.clamp(min=1e-300))[:, None, None]
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
            score = torch.where(gone, torch.inf, scores.sum(0))
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
