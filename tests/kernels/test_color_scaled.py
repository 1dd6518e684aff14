"""`color(..., scaled=True)`: rows that differ by one positive factor."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from fxfib.kernels import color


def proportional(a, b):
    """Whether one positive factor turns the exact numbers `a` into `b`."""
    if not any(a) or not any(b):
        return not any(a) and not any(b)
    pivot = next(i for i, value in enumerate(a) if value)
    if not b[pivot] or (a[pivot] > 0) != (b[pivot] > 0):
        return False
    return all(x * b[pivot] == y * a[pivot] for x, y in zip(a, b, strict=True))


def renumbered(labels):
    seen = {}
    return [seen.setdefault(int(label), len(seen)) for label in labels]


@pytest.mark.parametrize("batch", range(10))
def test_exact_proportions_against_rational_arithmetic(batch):
    rng = np.random.default_rng(batch)
    for _ in range(50):
        count, width = int(rng.integers(1, 12)), int(rng.integers(1, 6))
        dtype = [torch.float16, torch.bfloat16, torch.float32][rng.integers(3)]
        rows = rng.integers(-2, 3, (count, width)) * rng.choice([1.0, 3.0, 7.0], (1, width))
        factors = rng.choice([1.0, 3.0, 0.5, 5.0, -1.0, -3.0], (count, 1))
        rows = torch.tensor(rows[rng.integers(0, max(1, count // 2), count)] * factors).to(dtype)
        if rng.random() < 0.3:
            # One unit in the last place away from proportional.
            i, c = rng.integers(count), rng.integers(width)
            rows[i, c] = torch.nextafter(rows[i, c].float(), torch.tensor(9.0)).to(dtype)
        groups = torch.tensor(rng.integers(0, 2, count))
        result = color(rows, scaled=True, must_match=groups)
        exact = [[Fraction(value) for value in row] for row in rows.tolist()]
        labels = result.labels.tolist()
        for i, k in itertools.combinations(range(count), 2):
            same = groups[i] == groups[k] and proportional(exact[i], exact[k])
            assert (labels[i] == labels[k]) == bool(same)
        check_scales(rows, result, tolerance=1e-15)
        order = torch.tensor(rng.permutation(count))
        permuted = color(rows[order], scaled=True, must_match=groups[order])
        assert permuted.labels.tolist() == renumbered(result.labels[order])


def check_scales(rows, result, tolerance):
    first = {}
    for i, label in enumerate(result.labels.tolist()):
        f = first.setdefault(label, i)
        scale = float(result.scales[i])
        assert scale > 0
        if i == f:
            assert scale == 1.0
        if rows[f].any():
            gap = (rows[i].double() - scale * rows[f].double()).abs().max()
            assert float(gap) <= tolerance * float(rows[i].double().abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("width", [1, 3, 50])
def test_rounded_multiples_within_their_bound(dtype, narrow, width):
    generator = torch.Generator().manual_seed(width)
    base = torch.randn(12, width, generator=generator, dtype=torch.float64)
    planted = torch.arange(60) % 12
    factors = torch.rand(60, 1, generator=generator, dtype=torch.float64) * 10 + 0.01
    rows = (base[planted] * factors).to(dtype)
    bound = rows.double().abs() * torch.finfo(dtype).eps
    if narrow:
        bound = bound.amax(1, keepdim=True)
    if width == 1:
        planted = (base[planted, 0] > 0).long()
    result = color(rows, bound=bound, scaled=True)
    assert result.labels.tolist() == renumbered(planted)
    check_scales(rows, result, tolerance=4 * torch.finfo(dtype).eps)
    if dtype == torch.float32 and width > 1:
        assert color(rows, scaled=True).num_classes > 12, "rounded, so not exactly proportional"


def test_near_misses_are_not_proportional():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(1, 20, generator=generator, dtype=torch.float64).repeat(2, 1)
    rows[1] *= 3
    bound = torch.full((2, 1), 1e-9, dtype=torch.float64)
    bound[1] *= 3
    for column in range(20):
        wrong = rows.clone()
        wrong[1, column] += 3 * 1e-8
        assert color(wrong, bound=bound, scaled=True).num_classes == 2
        fine = rows.clone()
        fine[1, column] += 3 * 1e-9
        assert color(fine, bound=bound, scaled=True).num_classes == 1


def test_the_largest_value_may_be_off_by_its_bound_too():
    error = 1e-6
    exact = torch.tensor([[1.0, 0.75, -0.5], [1.0, 0.75, -0.5]], dtype=torch.float64)
    signs = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]])
    for narrow in (False, True):
        bound = torch.full((2, 1 if narrow else 3), error, dtype=torch.float64)
        factors = torch.tensor([[1.0], [8.0]])
        rows = (exact + 0.99 * error * signs) * factors
        assert color(rows, bound=bound * factors, scaled=True).num_classes == 1
        rows = (exact + 1.1 * error * signs) * factors
        assert color(rows, bound=bound * factors, scaled=True).num_classes == 2


def test_negative_factors_do_not_merge():
    rows = torch.tensor([[1.0, -2.0], [-1.0, 2.0], [2.0, -4.0]])
    assert color(rows, scaled=True).labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize("eps", [0.0, 10.0])
def test_zero_rows_stand_alone(eps):
    rows = torch.tensor([[0.0, 0.0], [1.0, 1.0], [-0.0, 0.0], [1e-30, 0.0], [0.0, 0.0]])
    groups = torch.tensor([0, 0, 0, 0, 1])
    result = color(rows, eps, scaled=True, must_match=groups)
    labels = result.labels.tolist()
    assert labels[0] == labels[2]
    assert labels[0] not in (labels[1], labels[3], labels[4])
    assert [float(result.scales[i]) for i in (0, 2, 4)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_rows_within_their_bound_of_zero_count_as_zero(eps):
    rows = torch.tensor([[0.0, 0.0], [1e-9, -1e-9], [1e-9, -5e-9], [2.0, 4.0], [1.0, 2.0]])
    bound = torch.full((5, 1), 2e-9)
    result = color(rows, eps, scaled=True, bound=bound)
    assert result.labels.tolist() == [0, 0, 1, 2, 2]
    assert result.scales.tolist() == [1.0, 1.0, 1.0, 1.0, 0.5]


def test_approximate_mode_clusters_the_largest_members():
    rows = torch.tensor(
        [[1.0, 2.0], [10.0, 20.0], [10.25, 20.25], [41.0, 81.0], [0.0, 3.0]], dtype=torch.float64
    )
    result = color(rows, 0.5, scaled=True)
    # Rows 0 and 1 are proportional; the larger, row 1, is compared.  Rows 2 and 3 are proportional
    # too, and represented by row 3, which is far from row 1.
    assert result.labels.tolist() == [0, 0, 1, 1, 2]
    assert result.scales.tolist() == [1.0, 10.0, 1.0, 4.0, 1.0]
    assert (
        color(torch.cat([rows[:1] * 2, rows[:1] * 2, rows[1:]]), 0.5, scaled=True).num_classes == 3
    )
    close = torch.cat([rows[:1] * 2, rows[:1] * 2, rows[1:3]])
    assert color(close, 0.5, scaled=True).num_classes == 1
    close = torch.cat([rows[:3], rows[4:]])
    result = color(close, 0.5, scaled=True)
    assert result.labels.tolist() == [0, 0, 0, 1]
    assert torch.allclose(result.scales[:3], torch.tensor([1.0, 10.0, 10.0]).double())


@pytest.mark.parametrize("seed", range(60))
def test_approximate_mode_does_not_depend_on_the_order(seed):
    rng = np.random.default_rng(seed)
    count, width = int(rng.integers(2, 25)), int(rng.integers(1, 4))
    rows = torch.tensor(rng.integers(-2, 3, (count, width)) * 0.25)
    rows = rows * torch.tensor(rng.choice([1.0, 2.0, 4.0], (count, 1)))
    bound = torch.tensor(rng.choice([0.0, 2.0**-6, 0.3], (count, 1))) if seed % 2 else None
    eps = float(rng.choice([0.25, 0.5, 1.0]))
    result = color(rows, eps, scaled=True, bound=bound)
    order = torch.tensor(rng.permutation(count))
    permuted = color(rows[order], eps, scaled=True, bound=None if bound is None else bound[order])
    assert permuted.labels.tolist() == renumbered(result.labels[order])
    assert result.labels.tolist() == renumbered(result.labels)
    assert bool((result.scales > 0).all())
