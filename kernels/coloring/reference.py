"""The slow, obvious version of `color`: what the fast ones are tested against.

Plain torch in float64, all n^2 distances, and clusters that are joined one pair at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Clusters = list[list[int]]
Distance = Callable[[list[int], list[int]], float]


def color(
    rows: Tensor,
    eps: float = 0.0,
    criterion: str = "fibration",
    *,
    must_match: Tensor | None = None,
    bound: Tensor | None = None,
    relative: Tensor | None = None,
    scaled: bool = False,
    weights: Tensor | None = None,
    history: list[tuple[float, float]] | None = None,
) -> Tensor:
    """Labels, int64 [n]; the arguments, unchecked, are those of `fxfib.kernels.color`.

    `history` collects the distance of every join and that of the next best join at that moment.
    """
    history = [] if history is None else history
    count = len(rows)
    values = rows.detach().cpu().to(torch.float64)
    bounds = torch.zeros_like(values)
    if bound is not None:
        bounds = bounds + bound.to(torch.float64)
    if relative is not None:
        bounds = bounds + values.abs() * relative.to(torch.float64)
    groups = [0] * count if must_match is None else must_match.tolist()
    mass = torch.ones(count).double() if weights is None else weights.to(torch.float64)

    if count == 0:
        return torch.zeros(0, dtype=torch.int64)
    parallel = scaled or criterion == "cosine"
    if criterion == "fibration" and not scaled:
        return numbered(complete(values, bounds, eps, groups, history), count)
    zero = (values.abs() <= bounds).all(dim=1).tolist()
    if parallel:
        groups = [(group, nothing) for group, nothing in zip(groups, zero, strict=True)]
        compared, around = normalised(values, bounds, zero)
        classes = complete(compared, around, 0.0, groups, history)
    else:
        classes = complete(values, bounds, 0.0, groups, history)
    if eps == 0:
        return numbered(classes, count)

    # One member of every class stands for it: the one of largest norm, then the first by value.
    norms = values.abs().amax(dim=1).tolist() if values.shape[1] else [0.0] * count
    known = values if bound is None else torch.cat([values, bound.expand(count, -1).double()], 1)
    heads = [min(part, key=lambda i: (-norms[i], known[i].tolist())) for part in classes]
    chosen = values[heads]
    if parallel:
        chosen[torch.tensor([zero[i] for i in heads], dtype=torch.bool)] = 0.0
    groups = [groups[i] for i in heads]
    if criterion == "fibration":
        parts = complete(chosen, bounds[heads], eps, groups, history)
    elif criterion == "cosine":
        parts = average(chosen, classes, eps, groups, history)
    else:
        lengths = values.norm(dim=1) if scaled else torch.ones(count).double()
        parts = ward(chosen, classes, mass, lengths, scaled, eps, groups, history)
    return numbered([[i for c in part for i in classes[c]] for part in parts], count)


def complete(
    values: Tensor, bounds: Tensor, eps: float, groups: list, history: list[tuple[float, float]]
) -> Clusters:
    """Complete linkage on the L-infinity distance, never joining rows that are not close."""
    gaps = (values[:, None] - values[None]).abs()
    close = (gaps <= bounds[:, None] + bounds[None] + eps).all(dim=2)
    distances = gaps.amax(dim=2) if values.shape[1] else torch.zeros(close.shape).double()
    table = torch.where(close, distances, torch.inf).tolist()

    def furthest(a: list[int], b: list[int]) -> float:
        if groups[a[0]] != groups[b[0]]:
            return torch.inf
        return max(table[i][k] for i in a for k in b)

    return joined(values, furthest, lambda height, total: height < torch.inf, history)


def average(
    values: Tensor, classes: Clusters, eps: float, groups: list, history: list[tuple[float, float]]
) -> Clusters:
    """Average linkage on 1 - cosine; a class counts as often as it has members."""
    directions = values / values.norm(dim=1, keepdim=True).clamp(min=1e-300)
    table = (1 - directions @ directions.T).tolist()
    sizes = [len(part) for part in classes]

    def mean(a: list[int], b: list[int]) -> float:
        if groups[a[0]] != groups[b[0]]:
            return torch.inf
        weight = sum(sizes[i] * sizes[k] for i in a for k in b)
        return sum(sizes[i] * sizes[k] * table[i][k] for i in a for k in b) / weight

    return joined(directions, mean, lambda height, total: height <= eps, history)


def ward(
    values: Tensor,
    classes: Clusters,
    mass: Tensor,
    lengths: Tensor,
    scaled: bool,
    eps: float,
    groups: list,
    history: list[tuple[float, float]],
) -> Clusters:
    """Ward linkage of the rows times the root of their weights, while little energy is lost."""
    if scaled:
        values = values / values.norm(dim=1, keepdim=True).clamp(min=1e-300)
    sizes = torch.tensor([len(part) for part in classes]).double()
    factors = torch.stack([(mass[part] * lengths[part]).mean() for part in classes])
    points = values * factors.sqrt()[:, None]
    energy = float((sizes * points.square().sum(dim=1)).sum())

    def loss(a: list[int], b: list[int]) -> float:
        if groups[a[0]] != groups[b[0]]:
            return torch.inf
        sums = [(sizes[part, None] * points[part]).sum(dim=0) for part in (a, b)]
        m, n = float(sizes[a].sum()), float(sizes[b].sum())
        return m * n / (m + n) * float((sums[0] / m - sums[1] / n).square().sum())

    return joined(points, loss, lambda height, total: total <= eps * energy, history)


def normalised(values: Tensor, bounds: Tensor, zero: list[bool]) -> tuple[Tensor, Tensor]:
    """Rows divided by their largest absolute value, and what they may then be off by."""
    if not values.shape[1]:
        return values, bounds
    size = values.abs()
    norm = size.amax(dim=1, keepdim=True)
    error = torch.maximum(
        (size + bounds).amax(dim=1, keepdim=True) - norm,
        norm - (size - bounds).amax(dim=1, keepdim=True),
    )
    nothing = torch.tensor(zero, dtype=torch.bool)[:, None]
    norm = torch.where(nothing, 1.0, norm)
    around = ((bounds + size / norm * error) / norm).clamp(max=2.0)
    return (
        torch.where(nothing, 0.0, values / norm),
        torch.where(nothing | (bounds == 0).all(), 0.0, around),
    )


def joined(
    values: Tensor,
    distance: Distance,
    goes_on: Callable[[float, float], bool],
    history: list[tuple[float, float]],
) -> Clusters:
    """Join the nearest two clusters, again and again; ties go to the first rows by value."""
    order = sorted(range(len(values)), key=values.tolist().__getitem__)
    clusters = [[i] for i in order]
    total = 0.0
    between = {
        (a, b): distance(clusters[a], clusters[b]) for b in range(len(clusters)) for a in range(b)
    }
    while between:
        (a, b), height = min(between.items(), key=lambda item: (item[1], item[0]))
        total += height
        others = sorted(between.values())
        history.append((height, others[1] if len(others) > 1 else torch.inf))
        if height == torch.inf or not goes_on(height, total):
            break
        clusters[a] = clusters[a] + clusters[b]
        clusters[b] = []
        between = {pair: value for pair, value in between.items() if b not in pair}
        for pair in between:
            if a in pair:
                between[pair] = distance(clusters[pair[0]], clusters[pair[1]])
    return [part for part in clusters if part]


def numbered(clusters: Clusters, count: int) -> Tensor:
    """Labels in the order of first appearance."""
    labels = torch.zeros(count, dtype=torch.int64)
    for number, part in enumerate(sorted(clusters, key=min)):
        labels[part] = number
    return labels
