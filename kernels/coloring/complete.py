"""Complete linkage from the pairs that are close alone: no matrix of distances.

Clusters are joined only while all their pairs are close, so a cluster needs to know the clusters
to which it is close as a whole, and forgets the others.  Ties go to the first rows: the pairs of
clusters are ordered by distance, then by the first row of the one, then of the other, a cluster
being known by its first row.  In this order a union is never nearer to a third cluster than the
nearer of its parts was, so clusters that are each other's nearest can be joined at once, wherever
they are, and the result is that of joining the nearest pair of all again and again.
"""

import numpy as np

from fxfib.kernels.coloring.rows import Floats, Ints

# Below this many pairs plain dictionaries are faster than rounds over arrays.
_FEW_PAIRS = 2**17


def complete_linkage(count: int, left: Ints, right: Ints, distances: Floats) -> Ints:
    """Clusters of `count` items, in the order in which ties are broken.

    Args:
        count: n.
        left: int64 [pairs], below `right`: the close pairs, each once.
        right: int64 [pairs].
        distances: float64 [pairs].

    Returns:
        int64 [n]: the first item of every item's cluster.
    """
    cluster = np.arange(count)
    while len(left) > _FEW_PAIRS:
        kept, lost = _mutual_nearest(count, left, right, distances)
        target = np.arange(count)
        target[lost] = kept
        cluster = target[cluster]
        left, right, distances = _contracted(left, right, distances, target, kept)
    return _chains(cluster, left, right, distances)


def _mutual_nearest(count: int, left: Ints, right: Ints, distances: Floats) -> tuple[Ints, Ints]:
    """Pairs of clusters that are each other's nearest; the first of each pair stays."""
    shortest = np.full(count, np.inf)
    np.minimum.at(shortest, left, distances)
    np.minimum.at(shortest, right, distances)
    nearest = np.full(count, count)
    for here, there in ((left, right), (right, left)):
        best = distances == shortest[here]
        np.minimum.at(nearest, here[best], there[best])
    near = np.flatnonzero(nearest < count)
    first = near[(nearest[nearest[near]] == near) & (near < nearest[near])]
    return first, nearest[first]


def _contracted(
    left: Ints, right: Ints, distances: Floats, target: Ints, kept: Ints
) -> tuple[Ints, Ints, Floats]:
    """The close pairs after clusters were joined: those all of whose parts are close."""
    grown = np.zeros(len(target), dtype=np.int64)
    grown[kept] = 1
    a, b = target[left], target[right]
    changed = ((grown[a] + grown[b]) > 0) & (a != b)
    same = (grown[a] + grown[b]) == 0
    code = np.minimum(a[changed], b[changed]) * len(target) + np.maximum(a[changed], b[changed])
    order = np.argsort(code, kind="stable")
    code, lengths = code[order], distances[changed][order]
    starts = np.flatnonzero(np.r_[True, code[1:] != code[:-1]])[: len(code)]
    i, k = code[starts] // len(target), code[starts] % len(target)
    parts = np.diff(np.r_[starts, len(code)])
    whole = parts == (1 + grown[i]) * (1 + grown[k])
    furthest = np.maximum.reduceat(lengths, starts) if len(starts) else lengths
    return (
        np.concatenate([left[same], i[whole]]),
        np.concatenate([right[same], k[whole]]),
        np.concatenate([distances[same], furthest[whole]]),
    )


def _chains(cluster: Ints, left: Ints, right: Ints, distances: Floats) -> Ints:
    """Nearest-neighbour chains over dictionaries of the close clusters and their distances."""
    near: dict[int, dict[int, float]] = {int(i): {} for i in np.unique(np.r_[left, right])}
    for i, k, distance in zip(left.tolist(), right.tolist(), distances.tolist(), strict=True):
        near[i][k] = distance
        near[k][i] = distance
    joined = np.arange(len(cluster))
    for start in list(near):
        chain = [start] if start in near else []
        while chain:
            here = chain[-1]
            if not near[here]:
                break
            _, there = min(zip(near[here].values(), near[here].keys(), strict=True))
            if len(chain) < 2 or there != chain[-2]:
                chain.append(there)
                continue
            del chain[-2:]
            first, second = min(here, there), max(here, there)
            _join(near, first, second)
            joined[second] = first
            if not chain:
                chain.append(first)
    # A cluster that was joined stands behind the one it was joined to.
    for item in range(len(joined)):
        joined[item] = joined[joined[item]]
    return joined[cluster]


def _join(near: dict[int, dict[int, float]], first: int, second: int) -> None:
    """Make `second` a part of `first`."""
    one, other = near[first], near.pop(second)
    del one[second], other[first]
    for third in other:
        del near[third][second]
    for third, distance in list(one.items()):
        if third in other:
            one[third] = near[third][first] = max(distance, other[third])
        else:
            del one[third], near[third][first]
