"""Is an answer right?  Asked before a provider is timed, never by trusting what is measured.

A coloring is judged by what complete linkage promises, computed here with numpy: no color is wider
than eps, and no two colors could be one.  Where eps is small these leave one answer.  Beside that
it is compared with a trusted one: what was planted, numpy's distinct rows, or scipy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from registry import Problem
from torch import Tensor

# Ties in the distances can be broken in more than one way: this part of the rows may differ.
TIED = 1e-3
# Colors that stand for all where almost every pair of them has to be looked at in full.
SAMPLE = 256
# Rows whose place in their component is looked at.
SAMPLE_ROWS = 64
CHUNK = 2**21


@dataclass(frozen=True)
class Trusted:
    """A coloring from elsewhere, int64 ``[n]``, and where it is from."""

    labels: np.ndarray
    source: str


def distinct_rows(problem: Problem) -> Trusted:
    """Eps = 0: numpy's distinct rows, compared byte by byte (adding 0 turns -0 to +0)."""
    rows = np.ascontiguousarray(problem.rows.cpu().double().numpy() + 0.0)
    whole = rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize)))[:, 0]
    return Trusted(np.unique(whole, return_inverse=True)[1].reshape(-1), "numpy")


def all_apart(problem: Problem) -> Trusted | None:
    """Every row a color of its own, where no two rows are close; else None."""
    each = np.arange(len(problem.rows))
    low, high = boxes(problem.rows, each)
    # A sample of the rows would not show that all are apart.
    close = joinable(low, high, problem.eps, sample=False)
    return Trusted(each, "no close rows") if close is False else None


def fault_of_colors(problem: Problem, labels: Tensor, trusted: Trusted | None) -> str | None:
    """What is wrong with a coloring, or None."""
    found = labels.cpu().numpy()
    if found.shape != (len(problem.rows),):
        return f"{found.shape} labels for {len(problem.rows)} rows"
    low, high = boxes(problem.rows, found)
    # Others measure in float32 or round differently; a unit of float32 is no fault.
    slack = problem.eps * (1 + 1e-6)
    if len(low) and float((high - low).max()) > slack:
        return f"a color has diameter {float((high - low).max()):.6g}"
    if joinable(low, high, problem.eps * (1 - 1e-6)):
        return "two colors could be one"
    if trusted is not None:
        apart = differing(found, trusted.labels)
        # scipy breaks ties by position; wherever else an answer is from, there is just one.
        ties = TIED if trusted.source == "scipy" else 0.0
        if apart > ties * len(found):
            return f"{apart} rows have another color than {trusted.source} gives"
    return None


def fault_of_components(problem: Problem, labels: Tensor, trusted: Trusted | None) -> str | None:
    """The weaker relation: colors lie within components, and components hang together.

    The second is looked at for some rows only: each needs another row of its component within eps.
    """
    found = labels.cpu().numpy()
    if found.shape != (len(problem.rows),):
        return f"{found.shape} labels for {len(problem.rows)} rows"
    if trusted is not None:
        both = np.unique(np.stack([trusted.labels, found]), axis=1).shape[1]
        if both != len(np.unique(trusted.labels)):
            return "a component boundary cuts a color"
    rows = problem.rows.cpu().double().numpy()
    several = np.flatnonzero(np.bincount(found)[found] > 1)
    for row in np.random.default_rng(0).permutation(several)[:SAMPLE_ROWS]:
        others = np.flatnonzero(found == found[row])
        distance = np.abs(rows[others[others != row]] - rows[row]).max(axis=1).min()
        if distance > problem.eps * (1 + 1e-6):
            return f"a row is {distance:.6g} away from its component"
    return None


def fault_of_pairs(pairs: int, trusted: Trusted | None) -> str | None:
    """All pairs within planted colors are close, and no others; elsewhere there may be more."""
    if trusted is None:
        return None
    sizes = np.unique(trusted.labels, return_counts=True)[1]
    inside = int((sizes * (sizes - 1) // 2).sum())
    if pairs < inside or (trusted.source == "planted" and pairs != inside):
        return f"{pairs} close pairs, and {inside} within colors"
    return None


def fault_of_sums(problem: Problem, sums: Tensor) -> str | None:
    """Against sums in float64 by numpy; rounding of the answer's own dtype is no fault."""
    rows, labels = problem.rows.cpu().double().numpy(), problem.labels.cpu().numpy()
    values = rows.T if problem.case.operation == "collapse" else rows
    expected = np.zeros((problem.num_classes, values.shape[1]))
    np.add.at(expected, labels, values)
    if problem.case.operation == "merge":
        expected /= np.bincount(labels, minlength=problem.num_classes)[:, None]
    else:
        expected = expected.T
    if tuple(sums.shape) != expected.shape:
        return f"shape {tuple(sums.shape)}, not {expected.shape}"
    error = float(np.abs(sums.cpu().double().numpy() - expected).max(initial=0.0))
    bound = 4 * torch.finfo(sums.dtype).eps * float(np.abs(values).max(initial=0.0)) * 8
    return f"off by {error:.3g}" if error > bound else None


def boxes(rows: Tensor, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest entry of every color in every column, ``[colors, d]`` each."""
    values = rows.cpu().float().numpy() if rows.element_size() < 8 else rows.cpu().numpy()
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    if not len(starts):
        return values, values
    ordered = values[order]
    low = np.minimum.reduceat(ordered, starts, axis=0)
    high = np.maximum.reduceat(ordered, starts, axis=0)
    return low, high


def joinable(low: np.ndarray, high: np.ndarray, eps: float, sample: bool = True) -> bool | None:
    """Whether two colors together would be no wider than eps.

    In L-infinity the diameter of a union is its largest range in any column, so boxes tell.  Pairs
    that overlap in the widest column are looked at, column by column, until none is left.  Where
    that is most pairs, some colors stand for all; None is the answer where that is not wanted.
    """
    count, width = low.shape
    if count < 2 or not width:
        return count > 1
    columns = np.argsort(low.min(axis=0) - high.max(axis=0))
    order = np.argsort(low[:, columns[0]], kind="stable")
    # Column-wise: every step below reads one column of many rows.
    low, high = (np.ascontiguousarray(side[order].T) for side in (low, high))
    key = low[columns[0]].astype(np.float64)
    last = np.searchsorted(key, key + eps, side="right")
    sizes = last - np.arange(1, count + 1)
    chosen = np.arange(count)
    if sizes.sum() > max(CHUNK, 0.05 * count * count):
        if not sample:
            return None
        chosen = np.sort(np.random.default_rng(0).permutation(count)[:SAMPLE])
    ends = np.cumsum(sizes[chosen])
    begin = 0
    while begin < len(chosen):
        before = ends[begin - 1] if begin else 0
        stop = max(begin + 1, int(np.searchsorted(ends, before + CHUNK)))
        part = chosen[begin:stop]
        left = np.repeat(part, sizes[part])
        offset = np.arange(len(left)) - np.repeat(np.cumsum(sizes[part]) - sizes[part], sizes[part])
        right = left + 1 + offset
        for column in columns:
            ceiling = np.maximum(high[column, left], high[column, right]).astype(np.float64)
            kept = ceiling - np.minimum(low[column, left], low[column, right]) <= eps
            left, right = left[kept], right[kept]
            if not len(left):
                break
        if len(left):
            return True
        begin = stop
    return False


def differing(labels: np.ndarray, others: np.ndarray) -> int:
    """Rows whose color has other members in the other coloring."""
    _, a = np.unique(labels, return_inverse=True)
    _, b = np.unique(others, return_inverse=True)
    _, both = np.unique(np.stack([a, b]), axis=1, return_inverse=True)
    both = both.reshape(-1)
    size = np.bincount(both)[both]
    return int(((np.bincount(a)[a] != size) | (np.bincount(b)[b] != size)).sum())
