"""Which nodes of a layer another one, or a constant, can stand for on given inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: So many columns of activations are looked at.
MOST = 8192


@dataclass(frozen=True)
class Substitute:
    """``h_i`` is about ``scale * h_node + constant``.

    Attributes:
        node: which node stands for it; None: the constant alone.
        scale: its factor.
        constant: float64 ``[positions of a node]``.
        cost: the share of what the layer contributes to its reader that is lost.
    """

    node: int | None
    scale: float
    constant: Tensor
    cost: float


def substitutes(
    h: Tensor, read: Tensor, eps: float, young: Tensor, *, constants: bool = True
) -> dict[int, Substitute]:
    r"""Nodes that can go, each with what stands for it; what stands for one does not go itself.

    The cost of node i is the least over j of :math:`r_i\,(1 - \rho_{ij}^2)\operatorname{Var}(h_i)`,
    over :math:`\sum_k r_k \operatorname{Var}(h_k)`; second moments stand for variances and
    correlations where there are no constants.

    Args:
        h: activations ``[nodes, positions, columns]``.
        read: squared norms of the outgoing weights, ``[nodes]``.
        eps: the largest cost.
        young: bool ``[nodes]``: these neither go nor stand for others.
        constants: whether a constant is free (the reader has a bias).
    """
    if h.shape[2] < 3:
        return {}  # any two nodes are in a line on two examples
    h = h[:, :, :: -(-h.shape[2] // MOST)].double()
    means = h.mean(2)
    centered = (h - means[:, :, None] if constants else h).flatten(1)
    gram = centered @ centered.T / centered.shape[1]
    power = gram.diagonal().clone()
    total = float((read * power).sum())
    # A node whose activity is the rounding of a constant can stand for none.
    alive = power > 1e-12 * power.max().clamp_min(1e-300)
    explained = torch.where(alive, gram.square() / power.clamp_min(1e-300), 0.0)
    explained[:, young] = 0.0
    explained.fill_diagonal_(0.0)
    explained = torch.minimum(explained, power[:, None])
    best = (power - explained.amax(1)).clamp_min(0) * read / max(total, 1e-300)
    found: dict[int, Substitute] = {}
    leads: set[int] = set()
    # Rounding is allowed for; where activity is not finite, nothing is found.
    limit = eps + 1e-12
    possible = (best <= limit) & ~young
    order = torch.argsort(torch.where(possible, best, torch.inf), stable=True)
    for node in order[: int(possible.sum())].tolist():
        if node in leads:
            continue
        gain, lead = explained[node].max(0)
        cost = float((power[node] - gain).clamp_min(0) * read[node]) / max(total, 1e-300)
        if cost > limit:  # its best stand-in goes itself
            continue
        other = int(lead) if gain > 0 else None
        scale = float(gram[node, other] / power[other]) if other is not None else 0.0
        base = means[other] if other is not None else torch.zeros_like(means[node])
        constant = means[node] - scale * base
        found[node] = Substitute(other, scale, constant * constants, cost)
        explained[:, node] = 0.0
        if other is not None:
            leads.add(other)
    return found
