"""Which nodes the readers miss least: elimination by the optimal-brain-surgeon score."""

from __future__ import annotations

import numpy as np
import torch

from fxfib.coloring import Floats, Labels
from fxfib.errors import InputError

# What is added to the diagonal of the covariance, as a part of its mean: it has an inverse then.
DAMPING = 1e-4


def eliminate(covariance: torch.Tensor, demand: torch.Tensor) -> tuple[Labels, Floats]:
    r"""Drop one node after another, each time the one whose loss the others make up for best.

    Readers compute :math:`C h`; with covariance :math:`G` of the nodes and demand
    :math:`Q = C^T C`, dropping node :math:`j` and refitting the columns of all others loses

    .. math:: Q_{jj} / (G^{-1})_{jj}

    of the readers' variance.  After each step the columns are the refitted ones, and the inverse is
    that of the nodes that are left.

    Args:
        covariance: float64 ``[n, n]``.
        demand: float64 ``[n, n]``.

    Returns:
        int64 ``[n]``, the nodes in the order in which they go, and float64 ``[n]``, what is lost
        in all when each has gone (not decreasing; the last is everything).

    Raises:
        InputError: the covariance is not finite.
    """
    count = len(covariance)
    damped = _positive(covariance)
    # In units of each node's own deviation: the losses are the same, and the numbers are not spread
    # over as many powers of ten as the variances.
    unit = damped.diagonal().sqrt()
    damped = damped / (unit[:, None] * unit)
    demand = demand * (unit[:, None] * unit)
    alive = torch.arange(count)
    order, lost = [], []
    total = 0.0
    while len(alive):
        # Each step loses digits, as what is left of the inverse shrinks; half of the nodes at a
        # time, and both matrices are made again.
        inverse = torch.linalg.inv(damped[alive[:, None], alive])
        columns = damped[:, alive] @ inverse
        wanted = columns.T @ demand @ columns
        gone = torch.zeros(len(alive), dtype=torch.bool)
        for _ in range((len(alive) + 1) // 2):
            # Of a matrix with ones on its diagonal (G^-1)_jj is at least 1.
            pivots = inverse.diagonal().clamp(min=1.0)
            score = torch.where(gone, torch.inf, wanted.diagonal().clamp(min=0.0) / pivots)
            node = int(score.argmin())
            total += float(score[node])
            order.append(int(alive[node]))
            lost.append(total)
            gone[node] = True
            part = inverse[node] / pivots[node]
            column = wanted[node] - 0.5 * wanted[node, node] * part
            wanted.addr_(part, column, alpha=-1.0).addr_(column, part, alpha=-1.0)
            inverse.addr_(part, inverse[node].clone(), alpha=-1.0)
            inverse[node] = inverse[:, node] = 0.0
        alive = alive[~gone]
    return np.array(order, dtype=np.int64), np.array(lost, dtype=np.float64)


def _positive(covariance: torch.Tensor) -> torch.Tensor:
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
