"""Which nodes the readers miss least: elimination by the optimal-brain-surgeon score."""

from __future__ import annotations

import torch

from fxfib.coloring import Floats, Labels

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
    """
    count = len(covariance)
    damping = DAMPING * float(covariance.diagonal().mean()) if count else 0.0
    eye = torch.eye(count, dtype=torch.float64)
    inverse = torch.linalg.inv(covariance + max(damping, 1e-30) * eye)
    demand = demand.clone()
    alive = torch.ones(count, dtype=torch.bool)
    order = torch.zeros(count, dtype=torch.int64)
    lost = torch.zeros(count, dtype=torch.float64)
    total = 0.0
    for step in range(count):
        score = demand.diagonal() / inverse.diagonal().clamp(min=1e-300)
        score = torch.where(alive, score, torch.inf)
        node = int(score.argmin())
        total += max(float(score[node]), 0.0)
        order[step], lost[step], alive[node] = node, total, False
        part = inverse[node] / inverse[node, node]
        column = demand[node] - 0.5 * demand[node, node] * part
        demand.addr_(part, column, alpha=-1.0).addr_(column, part, alpha=-1.0)
        inverse.addr_(part, inverse[node].clone(), alpha=-1.0)
        inverse[node, node] = 1.0  # it is gone; its row and column are zero
    return order.numpy(), lost.numpy()
