"""Colors of rows on the CPU, in numpy and scipy."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fxfib.kernels.coloring.cluster import bounded_clusters
from fxfib.kernels.coloring.identical import identical
from fxfib.kernels.coloring.rows import (
    Bounds,
    Floats,
    Ints,
    NormalisedRows,
    PlainRows,
    Rows,
    blocks,
    by_appearance,
    distinct,
    value_order,
)


def color_rows(
    rows: Tensor,
    eps: float,
    must_match: Tensor | None,
    bound: Tensor | None,
    relative: Tensor | None,
    scaled: bool,
) -> tuple[Ints, Floats | None]:
    """Labels in order of first appearance, and scales; arguments as for `color`, checked."""
    values = _to_numpy(rows)
    bounds = None
    if bound is not None or relative is not None:
        bounds = Bounds(
            None if bound is None else _to_numpy(bound),
            None if relative is None else relative.detach().cpu().to(torch.float64).numpy(),
        )
    count = values.shape[0]
    groups: Ints = np.zeros(count, dtype=np.int64)
    if must_match is not None:
        groups = must_match.detach().cpu().numpy().astype(np.int64)
    if count == 0:
        return groups, np.empty(0) if scaled else None
    if not scaled:
        return by_appearance(_equal(PlainRows(values, bounds), eps, groups))[0], None
    ids, norms = _proportional(values, bounds, eps, groups)
    labels, first = by_appearance(ids)
    return labels, norms / norms[first[labels]]


def _equal(rows: Rows, eps: float, groups: Ints) -> Ints:
    """Cluster numbers of rows that are equal within eps and their bounds."""
    ids, first = identical(rows, groups)
    if eps == 0 and not rows.has_bounds:
        return ids
    return bounded_clusters(distinct(rows, ids, first), eps, groups[first])[ids]


def _proportional(
    values: Floats, bounds: Bounds | None, eps: float, groups: Ints
) -> tuple[Ints, Floats]:
    """Cluster numbers of rows that are equal up to a positive factor, and comparable scales."""
    count, width = values.shape
    if width == 0:
        return groups, np.ones(count)
    zero = np.ones(count, dtype=bool)
    norms = np.empty(count)
    for block in blocks(count, width):
        size = np.abs(values[block])
        norms[block] = size.max(axis=1)
        allowed = 0.0 if bounds is None else bounds.at(size, block, slice(None))
        zero[block] = (size <= allowed).all(axis=1)
    norms[zero] = 1.0
    # Zero rows get groups of their own, and share one color in each.
    _, groups = np.unique(2 * np.unique(groups, return_inverse=True)[1] + zero, return_inverse=True)
    ids = _equal(NormalisedRows(values, bounds, norms), 0.0, groups)
    ids = np.where(zero, ids.max() + 1 + groups, ids)
    ids = np.unique(ids, return_inverse=True)[1]
    if eps == 0:
        return ids, norms
    known = None if bounds is None else bounds.absolute
    largest = _largest_members(values, known, norms, ids)
    # The largest member stands for its group, so the factors inside the group are relative to it.
    factors = norms / norms[largest[ids]]
    separate = zero[largest]
    representatives = values[largest]
    representatives[separate] = 0.0
    part_bounds = bounds
    if bounds is not None and bounds.absolute is not None:
        part_bounds = replace(bounds, absolute=bounds.absolute[largest])
    parts = _equal(PlainRows(representatives, part_bounds), eps, groups[largest])
    return parts[ids], factors


def _largest_members(values: Floats, bounds: Floats | None, norms: Floats, ids: Ints) -> Ints:
    """For every id its row of largest norm; among several, values and bounds alone decide."""
    order = np.lexsort((-norms, ids))
    starts = np.searchsorted(ids[order], np.arange(int(ids.max()) + 1))
    chosen = order[starts]
    after, before = order[1:], order[:-1]
    tied = np.flatnonzero((norms[after] == norms[before]) & (ids[after] == ids[before]))
    for group in np.unique(ids[order[tied]]):
        ends = starts[group + 1] if group + 1 < len(starts) else len(order)
        members = order[starts[group] : ends]
        members = members[norms[members] == norms[members[0]]]
        known = values[members]
        if bounds is not None:
            known = np.concatenate([known, bounds[members]], axis=1)
        chosen[group] = members[value_order(known)[0]]
    return chosen


def _to_numpy(tensor: Tensor) -> Floats:
    """Contiguous float32 or float64 on the CPU, shared with the tensor where possible."""
    tensor = tensor.detach().cpu()
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.to(torch.float32)
    return tensor.contiguous().numpy()
