"""`color` against a brute force in plain loops, on small cases full of ties and near misses."""

import itertools
import math

import numpy as np
import pytest
import torch

from fxfib.errors import InputError
from fxfib.kernels import color


def is_close(rows, eps, bounds, groups, i, k):
    if groups[i] != groups[k]:
        return False
    return all(
        abs(rows[i][c] - rows[k][c]) <= bounds[i][c] + bounds[k][c] + eps
        for c in range(len(rows[i]))
    )


def distance(rows, i, k):
    return max((abs(a - b) for a, b in zip(rows[i], rows[k], strict=True)), default=0.0)


def complete_linkage(rows, eps, bounds, groups):
    """Clusters by the definition: join the two nearest clusters while all their pairs are close.

    Returns the clusters and whether two joins were ever equally near.
    """
    clusters = [[i] for i in range(len(rows))]
    tie = False
    while True:
        choices = []
        for a, b in itertools.combinations(range(len(clusters)), 2):
            pairs = list(itertools.product(clusters[a], clusters[b]))
            if all(is_close(rows, eps, bounds, groups, i, k) for i, k in pairs):
                choices.append((max(distance(rows, i, k) for i, k in pairs), a, b))
        if not choices:
            return clusters, tie
        nearest, a, b = min(choices)
        # Bit-identical rows join at distance zero, in whatever order.
        tie |= nearest > 0 and sum(choice[0] == nearest for choice in choices) > 1
        clusters[a] += clusters.pop(b)


def as_labels(clusters, count):
    labels = [0] * count
    ordered = sorted(clusters, key=min)
    for number, cluster in enumerate(ordered):
        for i in cluster:
            labels[i] = number
    return labels


def renumbered(labels):
    seen = {}
    return [seen.setdefault(int(label), len(seen)) for label in labels]


def check_properties(labels, rows, eps, bounds, groups):
    count = len(rows)
    assert labels == renumbered(labels), "numbered in order of first appearance"
    for i, k in itertools.combinations(range(count), 2):
        close = is_close(rows, eps, bounds, groups, i, k)
        if labels[i] == labels[k]:
            assert close, "every pair of a color is close"
        if rows[i] == rows[k] and groups[i] == groups[k]:
            assert labels[i] == labels[k], "equal rows are never apart"
    members = {}
    for i, label in enumerate(labels):
        members.setdefault(label, []).append(i)
    for a, b in itertools.combinations(members.values(), 2):
        pairs = itertools.product(a, b)
        assert not all(is_close(rows, eps, bounds, groups, i, k) for i, k in pairs), (
            "two colors that could be one"
        )


def random_case(rng):
    """Rows on a coarse dyadic grid (all sums are exact, so ties are ties), or perturbed off it."""
    count, width = int(rng.integers(0, 13)), int(rng.integers(0, 6))
    dtype = [torch.float16, torch.bfloat16, torch.float32, torch.float64][rng.integers(4)]
    levels = int(rng.integers(1, 4))
    rows = rng.integers(-levels, levels + 1, (count, width)) * 0.25
    if count and rng.random() < 0.7:
        rows = rows[rng.integers(0, count, count)]
        rows = rows + rng.integers(-2, 3, (count, width)) * (rng.random((count, 1)) < 0.5) / 64
    if rng.random() < 0.3:
        rows = rows + rng.normal(size=(count, width)) * 0.01
    if count and rng.random() < 0.3:
        rows[rng.integers(0, count)] = -0.0
    rows = torch.tensor(rows.reshape(count, width)).to(dtype)
    eps = float(rng.choice([0.0, 0.0, 1 / 64, 1 / 32, 0.25, 0.3, 2.0]))
    bound = None
    kind = rng.integers(4)
    if kind == 1:
        bound = torch.tensor(rng.integers(0, 3, (count, 1)) / 128)
    elif kind == 2:
        bound = torch.tensor(rng.integers(0, 3, (count, width)) / 128).float()
    elif kind == 3:
        bound = torch.full((count, 1), 1 / 64, dtype=torch.float64)
    groups = torch.tensor(rng.integers(-1, 2, count)) if rng.random() < 0.3 else None
    return rows, eps, bound, groups


def plain(rows, bound, groups):
    values = rows.to(torch.float64).tolist()
    count, width = rows.shape
    bounds = [[0.0] * width] * count
    if bound is not None:
        bounds = bound.to(torch.float64).expand(count, width).tolist()
    return values, bounds, [0] * count if groups is None else groups.tolist()


@pytest.mark.parametrize("batch", range(20))
def test_small_cases_against_brute_force(batch):
    rng = np.random.default_rng(batch)
    for _ in range(75):
        rows, eps, bound, groups = random_case(rng)
        result = color(rows, eps, bound=bound, must_match=groups)
        values, bounds, numbers = plain(rows, bound, groups)
        labels = result.labels.tolist()
        assert result.labels.dtype == torch.int64
        assert result.scales is None
        assert result.num_classes == len(set(labels))
        check_properties(labels, values, eps, bounds, numbers)
        clusters, tie = complete_linkage(values, eps, bounds, numbers)
        if not tie:
            assert labels == as_labels(clusters, len(values))

        order = torch.tensor(rng.permutation(len(values)), dtype=torch.int64)
        permuted = color(
            rows[order],
            eps,
            bound=None if bound is None else bound[order],
            must_match=None if groups is None else groups[order],
        )
        assert permuted.labels.tolist() == renumbered(result.labels[order])


def test_brute_force_has_enough_cases_without_ties():
    decided = several = 0
    for batch in range(4):
        rng = np.random.default_rng(batch)
        for _ in range(75):
            rows, eps, bound, groups = random_case(rng)
            clusters, tie = complete_linkage(
                *[plain(rows, bound, groups)[0], eps], *plain(rows, bound, groups)[1:]
            )
            decided += not tie
            several += not tie and 1 < len(clusters) < len(rows)
            rng.permutation(len(rows))
    assert decided > 150
    assert several > 60


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_chain_does_not_drift(dtype):
    rows = torch.arange(40, dtype=dtype)[:, None] * torch.tensor([[0.25, 0.0, -0.25]], dtype=dtype)
    result = color(rows, 0.5)
    for label in range(result.num_classes):
        part = rows[result.labels == label].double()
        assert float((part.amax(0) - part.amin(0)).max()) <= 0.5
    assert 14 <= result.num_classes <= 20


def test_chain_of_bounds_is_split_into_cliques():
    rows = torch.arange(9, dtype=torch.float64)[:, None]
    result = color(rows, bound=torch.full((9, 1), 0.5, dtype=torch.float64))
    counts = torch.bincount(result.labels)
    assert int(counts.max()) == 2
    assert result.num_classes == 5


def test_near_miss_just_above_the_bound():
    for dtype in (torch.float32, torch.float64):
        bound = torch.full((2, 1), 2.0**-20, dtype=torch.float64)
        for width in (1, 5, 300):
            for column in {0, width // 2, width - 1}:
                rows = torch.randn(1, width, generator=torch.Generator().manual_seed(width))
                rows = ((rows * 64).round() / 64).repeat(2, 1).to(dtype)
                rows[1, column] += 2.0**-19
                assert color(rows, bound=bound).num_classes == 1
                rows[1, column] += 2.0**-19 * 2.0**-3
                assert color(rows, bound=bound).num_classes == 2
                assert color(rows).num_classes == 2


def test_eps_is_the_diameter_itself():
    rows = torch.tensor([[0.0, 1.0], [0.5, 0.5], [0.25, 0.75]])
    assert color(rows, 0.5).num_classes == 1
    assert color(rows, math.nextafter(0.5, 0)).num_classes == 2


def test_differences_are_not_rounded_to_the_rows_precision():
    # In float32 the difference would round to eps exactly.
    rows = torch.tensor([[1.0], [-(2.0**-30)]])
    assert color(rows, 1.0).num_classes == 2


def test_zero_has_one_sign():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        rows = torch.zeros(4, 30, dtype=dtype)
        rows[1:3] *= -1
        assert torch.signbit(rows[1:3]).all()
        assert color(rows).num_classes == 1


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (1, 0), (1, 1), (1, 4)])
@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_empty_and_single(shape, eps, scaled):
    for bound in (None, torch.zeros(shape[0], 1)):
        result = color(torch.ones(shape), eps, scaled=scaled, bound=bound)
        assert result.labels.tolist() == [0] * shape[0]
        assert result.num_classes == shape[0]
        assert (result.scales is not None) == scaled
        if scaled:
            assert result.scales.tolist() == [1.0] * shape[0]


def test_rows_without_columns_are_all_equal():
    assert color(torch.empty(4, 0)).num_classes == 1
    groups = torch.tensor([1, 0, 1, 0])
    for scaled in (False, True):
        result = color(torch.empty(4, 0), 0.1, must_match=groups, scaled=scaled)
        assert result.labels.tolist() == [0, 1, 0, 1]


def test_strides_and_gradients_do_not_matter():
    wide = torch.randint(-1, 2, (6, 40), generator=torch.Generator().manual_seed(0)).double()
    rows = wide.t()[::2]
    rows.requires_grad_()
    bound = torch.full((1, 6), 0.25).expand(20, 6)
    assert not rows.is_contiguous()
    for options in ({}, {"bound": bound}, {"eps": 1.0}, {"scaled": True}):
        result = color(rows, **options)
        again = color(rows.detach().clone().contiguous(), **options)
        assert torch.equal(result.labels, again.labels)
        assert 1 < result.num_classes < 20


def test_arguments_are_not_changed():
    rows = torch.tensor([[-0.0, 1.0], [0.0, 1.0], [0.0, 2.0]])
    bound = torch.full((3, 2), 0.1)
    before = rows.clone(), bound.clone()
    for scaled, eps in itertools.product((False, True), (0.0, 1.0)):
        color(rows, eps, bound=bound, scaled=scaled)
    assert torch.equal(torch.signbit(rows), torch.signbit(before[0]))
    assert torch.equal(rows, before[0])
    assert torch.equal(bound, before[1])


BAD = [
    ({"rows": torch.tensor([[1.0], [math.nan]])}, "NaN"),
    ({"rows": torch.tensor([[1.0], [-math.inf]])}, "infinite"),
    ({"rows": torch.ones(3)}, "matrix"),
    ({"rows": torch.ones(2, 1, dtype=torch.int64)}, "floating-point"),
    ({"eps": -1e-9}, "eps"),
    ({"eps": math.nan}, "eps"),
    ({"eps": math.inf}, "eps"),
    ({"eps": "0.1"}, "eps"),
    ({"criterion": "cosines"}, "known: fibration"),
    ({"criterion": "cosine", "eps": 2.5}, "at most 2"),
    ({"criterion": "energy", "eps": 1.5}, "at most 1"),
    ({"weights": torch.tensor([1.0, -1.0])}, "weights"),
    ({"weights": torch.tensor([1.0, math.nan])}, "weights"),
    ({"must_match": torch.zeros(3, dtype=torch.int64)}, "must_match"),
    ({"must_match": torch.zeros(2)}, "must_match"),
    ({"bound": torch.zeros(2, 2)}, "bound"),
    ({"bound": torch.zeros(1, 1)}, "bound"),
    ({"bound": torch.zeros(2, 1, dtype=torch.int64)}, "bound"),
    ({"bound": torch.tensor([[0.0], [-1.0]])}, "bound"),
    ({"bound": torch.tensor([[0.0], [math.nan]])}, "bound"),
    ({"bound": torch.tensor([[0.0], [math.inf]])}, "bound"),
    ({"weights": torch.ones(3)}, "weights"),
    ({"weights": torch.ones(2, dtype=torch.int64)}, "weights"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        color(**{"rows": torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])} | arguments)


def test_weights_do_not_change_a_diameter():
    rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(3))
    weights = torch.arange(1.0, 21.0)
    assert torch.equal(color(rows, 0.7).labels, color(rows, 0.7, weights=weights).labels)
