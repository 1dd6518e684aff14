"""Colors of rows on the CPU, in numpy and scipy."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fxfib.kernels.coloring.cluster import bounded_clusters
from fxfib.kernels.coloring.identical import identical
from fxfib.kernels.coloring.linkages import cosine_clusters, energy_clusters
from fxfib.kernels.coloring.products import row_lengths
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
    criterion: str,
    must_match: Tensor | None,
    bound: Tensor | None,
    relative: Tensor | None,
    scaled: bool,
    weights: Tensor | None,
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
    factors: Floats | None = None
    if eps > 0 and criterion != "fibration":
        mass = np.ones(count)
        if weights is not None:
            mass = weights.detach().cpu().to(torch.float64).numpy()
        ids, factors = _linked(values, bounds, eps, criterion, groups, scaled, mass)
    elif scaled or criterion == "cosine":
        ids, factors = _proportional(values, bounds, eps, groups)
    else:
        ids = _equal(PlainRows(values, bounds), eps, groups)
    labels, first = by_appearance(ids)
    if not scaled or factors is None:
        return labels, None
    return labels, factors / factors[first[labels]]


def _equal(rows: Rows, eps: float, groups: Ints) -> Ints:
    """Cluster numbers of rows that are equal within eps and their bounds."""
    ids, first = identical(rows, groups)
    if eps == 0 and not rows.has_bounds:
        return ids
    return bounded_clusters(distinct(rows, ids, first), eps, groups[first])[ids]


def _parallel(values: Floats, bounds: Bounds | None, groups: Ints) -> tuple[Ints, Floats, Ints]:
    """Ids, from 0, of rows that are equal up to a positive factor; largest values; finer groups.

    Zero rows get groups of their own, share one id in each, and count as of largest value 1.
    """
    count, width = values.shape
    zero = np.ones(count, dtype=bool)
    norms = np.ones(count)
    if width:
        # What is off by less than itself is not zero.
        exact = bounds is None or bounds.uniform is not None
        for block in blocks(count, width):
            size = np.abs(values[block])
            norms[block] = size.max(axis=1)
            if bounds is None or exact:
                zero[block] = norms[block] == 0
            else:
                zero[block] = (size <= bounds.at(size, block, slice(None))).all(axis=1)
        norms[zero] = 1.0
    _, groups = np.unique(2 * np.unique(groups, return_inverse=True)[1] + zero, return_inverse=True)
    if not width:
        return groups, norms, groups
    ids = _equal(NormalisedRows(values, bounds, norms), 0.0, groups)
    ids = np.where(zero, ids.max() + 1 + groups, ids)
    return np.unique(ids, return_inverse=True)[1], norms, groups


def _proportional(
    values: Floats, bounds: Bounds | None, eps: float, groups: Ints
) -> tuple[Ints, Floats]:
    """Cluster numbers of rows that are equal up to a positive factor, and comparable scales."""
    ids, norms, groups = _parallel(values, bounds, groups)
    if eps == 0:
        return ids, norms
    chosen = _representatives(values, bounds, norms, ids)
    # The largest member stands for its group, so the factors inside the group are relative to it.
    factors = norms / norms[chosen[ids]]
    representatives = _without_noise(values, bounds, chosen)
    part_bounds = bounds
    if bounds is not None and bounds.absolute is not None:
        part_bounds = replace(bounds, absolute=bounds.absolute[chosen])
    parts = _equal(PlainRows(representatives, part_bounds), eps, groups[chosen])
    return parts[ids], factors


def _linked(
    values: Floats,
    bounds: Bounds | None,
    eps: float,
    criterion: str,
    groups: Ints,
    scaled: bool,
    mass: Floats,
) -> tuple[Ints, Floats]:
    """Cluster numbers by cosine or energy, and comparable scales."""
    if scaled or criterion == "cosine":
        ids, norms, groups = _parallel(values, bounds, groups)
        chosen = _representatives(values, bounds, norms, ids)
        representatives = _without_noise(values, bounds, chosen).astype(np.float64)
        lengths = row_lengths(representatives)
        factors = norms / norms[chosen[ids]] * lengths[ids]
        factors[lengths[ids] == 0] = 1.0
    else:
        ids = by_appearance(_equal(PlainRows(values, bounds), 0.0, groups))[0]
        factors = np.ones(len(values))
        norms = factors
        if bounds is not None and values.shape[1]:
            norms = np.abs(values).max(axis=1).astype(np.float64)
        chosen = _representatives(values, bounds, norms, ids)
        representatives = values[chosen].astype(np.float64)
    sizes = np.bincount(ids)
    if criterion == "cosine":
        return cosine_clusters(representatives, sizes, eps, groups[chosen])[ids], factors
    if scaled:
        representatives /= np.maximum(lengths, 1e-300)[:, None]
        mass = mass * factors
    # Sums in the order of their terms' sizes do not depend on the order of the rows.
    order = np.lexsort((mass, ids))
    means = np.add.reduceat(mass[order], np.cumsum(sizes) - sizes) / sizes
    return energy_clusters(representatives, means, sizes, eps, groups[chosen])[ids], factors


def _without_noise(values: Floats, bounds: Bounds | None, chosen: Ints) -> Floats:
    """The chosen rows, zero where they are nowhere above their bound."""
    result = values[chosen]
    if bounds is not None:
        for block in blocks(*result.shape):
            size = np.abs(result[block])
            below = size <= bounds.at(size, chosen[block], slice(None))
            result[block][below.all(axis=1)] = 0.0
    return result


def _representatives(values: Floats, bounds: Bounds | None, norms: Floats, ids: Ints) -> Ints:
    """For every id the row that stands for it."""
    known = None if bounds is None else bounds.absolute
    return _largest_members(values, known, norms, ids)


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
