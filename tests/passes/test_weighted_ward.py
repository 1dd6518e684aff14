"""Ward's joins with masses and with zero, against all pairs looked at one join at a time."""

import numpy as np
import pytest

from fxfib.passes.weighted_ward import ward_tree


def joined_slowly(points: np.ndarray, masses: np.ndarray) -> list[float]:
    """Costs of the cheapest join of any two clusters, zero being one, again and again."""
    clusters = [(m, p) for m, p in zip(masses, points, strict=True)]
    costs = []
    while clusters:
        found = [(m * (p @ p), i, None) for i, (m, p) in enumerate(clusters)]
        for i, (m, p) in enumerate(clusters):
            for j, (n, q) in enumerate(clusters[:i]):
                found.append((m * n / (m + n) * ((p - q) @ (p - q)), i, j))
        cost, i, j = min(found, key=lambda f: f[0])
        m, p = clusters.pop(i)
        if j is not None:
            n, q = clusters[j]
            clusters[j] = m + n, (m * p + n * q) / (m + n)
        costs.append(cost)
    return costs


@pytest.mark.parametrize("seed", range(6))
def test_joins_are_those_of_the_slow_way(seed: int) -> None:
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(23, 5)) * generator.uniform(0.1, 2, size=(23, 1))
    masses = generator.uniform(0.01, 3, size=23)
    tree = ward_tree(points, masses, np.zeros(23, np.int64))
    # A chain finds the same joins in another order; sorted by cost they are the greedy ones.
    np.testing.assert_allclose(tree.cost, joined_slowly(points, masses), rtol=1e-9, atol=1e-12)
    assert tree.lost[-1] == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(6))
def test_no_pruning_of_as_many_nodes_loses_less(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scale = generator.uniform(0.1, 2, size=(29, 1)) ** (seed % 3)
    points = generator.normal(size=(29, 4)) * scale
    masses = generator.uniform(0.01, 3, size=29) ** (1 + seed)
    tree = ward_tree(points, masses, np.zeros(29, np.int64))
    energy = np.sort(masses * np.square(points).sum(1))
    assert (np.cumsum(tree.cost) <= np.cumsum(energy) * (1 + 1e-9)).all()
    labels, dropped = tree.cut(0.3)
    # What a cut says it loses is what merging and dropping these nodes loses.
    lost = 0.0
    for label in np.unique(labels):
        own = labels == label
        mean = np.zeros(4) if dropped[own].any() else np.average(
            points[own], axis=0, weights=masses[own]
        )  # fmt: skip
        lost += float((masses[own] * np.square(points[own] - mean).sum(1)).sum())
    gone = 29 - len(np.unique(labels[~dropped]))
    assert lost == pytest.approx(float(np.cumsum(tree.cost)[gone - 1]), rel=1e-9)
    assert 0 < gone < 29


def test_some_nodes_are_dropped_and_some_merge() -> None:
    points = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, -1.0], [-0.3, 1.0]])
    tree = ward_tree(points, np.array([5.0, 4.0, 1e-3, 7.0]), np.zeros(4, np.int64))
    labels, dropped = tree.cut(0.005)
    assert dropped.tolist() == [False, False, True, False]
    assert labels[0] == labels[1] != labels[3]
    labels, dropped = tree.cut(1.0)  # something is left
    assert not dropped.all()
