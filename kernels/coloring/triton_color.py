"""Coloring of rows that are on a GPU: only rows that need linkage come to the CPU."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from fxfib.kernels.coloring.cluster import bounded_clusters
from fxfib.kernels.coloring.identical import identical
from fxfib.kernels.coloring.rows import Bounds, Floats, Ints, PlainRows, by_appearance
from fxfib.kernels.coloring.triton import Matrix, close_pairs_batch
from fxfib.kernels.coloring.triton_rows import pairs_close, row_hashes


def color_on_device(matrices: Sequence[Matrix]) -> list[Tensor]:
    """Colors by the criterion `fibration` of each of several matrices, not scaled.

    Equal rows are found by hash and comparison, close pairs of the others in one launch for all
    matrices.  Components of the closeness graph that are cliques are colors; the rows of all others
    go through complete linkage on the CPU, by the same code as on the CPU, so the partition is the
    same bit for bit.

    Args:
        matrices: all on one device, checked as for `color`.

    Returns:
        For each the labels, int64 [n] on its device, in the order of first appearance.
    """
    labels: list[Tensor] = []
    open_matrices: list[Matrix] = []
    for matrix in matrices:
        ids, first = identical_rows(matrix.rows, matrix.groups)
        labels.append(ids)
        if matrix.eps > 0 or matrix.bound is not None or matrix.relative is not None:
            open_matrices.append(_distinct(matrix, ids, first))
        else:
            open_matrices.append(replace(matrix, rows=matrix.rows[:0], groups=None))
    pairs = close_pairs_batch(open_matrices)
    for number, (matrix, (left, right)) in enumerate(zip(open_matrices, pairs, strict=True)):
        if len(left):
            clusters = _clusters(matrix, left.cpu().numpy(), right.cpu().numpy())
            device = left.device
            labels[number] = torch.from_numpy(clusters).to(device)[labels[number]]
    return labels


def identical_rows(rows: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    """Number the classes of rows with the same values (+0 = -0) and the same group.

    Args:
        rows: floating [n, d], finite, any strides.
        groups: int64 [n]; None: one group.

    Returns:
        ids, int64 [n], in the order of first appearance, and the first row of every id.
    """
    rows = rows.detach()
    count, device = rows.shape[0], rows.device
    if groups is None:
        groups = torch.zeros(count, dtype=torch.int64, device=device)
    hashes = row_hashes(rows, groups)
    # Stable: the first row of a class stands first in its run.
    order = torch.argsort(hashes, stable=True)
    hashes = hashes[order]
    following = torch.nonzero(hashes[1:] == hashes[:-1]).squeeze(1) + 1
    repeats = torch.zeros(count, dtype=torch.bool, device=device)
    if len(following):
        left, right = order[following], order[following - 1]
        equal = pairs_close(rows, left, right) & (groups[left] == groups[right])
        if not bool(equal.all()):
            # Two rows of one hash: rare enough to start again where a dictionary is at hand.
            known = identical(PlainRows(_numpy(rows), None), groups.cpu().numpy())
            ids, first = (torch.from_numpy(part).to(device) for part in known)
            return ids, first
        repeats[following] = True
    first = order[~repeats]
    by_first = torch.argsort(first)
    number = torch.empty_like(by_first)
    number[by_first] = torch.arange(len(first), device=device)
    ids = torch.empty_like(order)
    ids[order] = number[torch.cumsum(~repeats, 0) - 1]
    return ids, first[by_first]


def _distinct(matrix: Matrix, ids: Tensor, first: Tensor) -> Matrix:
    """One row for every id, with the smallest bound of all its members."""
    if len(first) == len(ids):
        return matrix
    bound = matrix.bound
    if bound is not None:
        bound = bound.detach()
        smallest = torch.full(
            (len(first), bound.shape[1]), torch.inf, dtype=bound.dtype, device=bound.device
        )
        bound = smallest.scatter_reduce_(0, ids[:, None].expand_as(bound), bound, "amin")
    groups = None if matrix.groups is None else matrix.groups[first]
    return replace(matrix, rows=matrix.rows.detach()[first], bound=bound, groups=groups)


def _clusters(matrix: Matrix, left: Ints, right: Ints) -> Ints:
    """Colors of distinct rows from their close pairs, in the order of first appearance."""
    count = matrix.rows.shape[0]
    graph = coo_array((np.ones(len(left), dtype=bool), (left, right)), (count, count))
    parts = connected_components(graph, directed=False)[1].astype(np.int64)
    size = np.bincount(parts)
    is_open = np.bincount(parts[left], minlength=len(size)) < size * (size - 1) // 2
    members = np.flatnonzero(is_open[parts])
    if len(members):
        place = np.full(count, -1)
        place[members] = np.arange(len(members))
        inside = place[left] >= 0
        linked = _linked(matrix, members, place[left[inside]], place[right[inside]])
        parts[members] = len(size) + linked
    return by_appearance(parts)[0]


def _linked(matrix: Matrix, members: Ints, left: Ints, right: Ints) -> Ints:
    """Clusters of the members by complete linkage; `left` and `right` are their close pairs."""
    index = torch.from_numpy(members).to(matrix.rows.device)
    bounds = None
    if matrix.bound is not None or matrix.relative is not None:
        bounds = Bounds(
            None if matrix.bound is None else _numpy(matrix.bound.detach()[index]),
            None if matrix.relative is None else _numpy(matrix.relative.to(torch.float64)),
        )
    groups = np.zeros(len(members), dtype=np.int64)
    if matrix.groups is not None:
        groups = matrix.groups[index].cpu().numpy()
    pairs = torch.from_numpy(left), torch.from_numpy(right)
    rows = PlainRows(_numpy(matrix.rows.detach()[index]), bounds)
    return bounded_clusters(rows, matrix.eps, groups, lambda *_: pairs)


def _numpy(tensor: Tensor) -> Floats:
    """Contiguous float32 or float64 on the CPU."""
    tensor = tensor.detach().cpu()
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.to(torch.float32)
    return tensor.contiguous().numpy()
