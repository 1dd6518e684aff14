"""`collapse` and `merge` against plain loops."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch

from fxfib.errors import InputError
from fxfib.kernels import collapse, merge

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def sums(weight, labels, num_classes, axis, factors):
    """Exact sums by `math.fsum`, one output element at a time; also the sums of magnitudes."""
    moved = weight.double().movedim(axis, 0)
    shape = (num_classes, *moved.shape[1:])
    total, size = torch.zeros(shape).double(), torch.zeros(shape).double()
    for cell in itertools.product(*(range(length) for length in shape)):
        terms = [
            float(moved[(i, *cell[1:])]) * factors[i]
            for i in range(len(labels))
            if labels[i] == cell[0]
        ]
        total[cell] = math.fsum(terms)
        size[cell] = math.fsum(map(abs, terms))
    return total.movedim(0, axis), size.movedim(0, axis)


def random_case(rng):
    shape = [int(length) for length in rng.integers(1, 5, rng.integers(1, 5))]
    axis = int(rng.integers(len(shape)))
    count = shape[axis] = int(rng.integers(0, 12))
    num_classes = int(rng.integers(1, 6))
    dtype = DTYPES[rng.integers(4)]
    order = [int(d) for d in rng.permutation(len(shape))]
    stored = torch.tensor(rng.normal(size=[shape[d] for d in order])).to(dtype)
    weight = stored.permute([order.index(d) for d in range(len(shape))])
    labels = torch.tensor(rng.integers(-1, num_classes, count))
    return weight, labels, num_classes, axis


@pytest.mark.parametrize("batch", range(6))
def test_collapse_against_loops(on, batch):
    rng = np.random.default_rng(batch)
    for _ in range(50):
        weight, labels, num_classes, axis = random_case(rng)
        scale = torch.tensor(rng.uniform(0.1, 3, len(labels))) if rng.random() < 0.5 else None
        factors = [1.0] * len(labels) if scale is None else scale.tolist()
        expected, size = sums(weight, labels.tolist(), num_classes, axis, factors)
        before = weight.clone()
        signed = axis if rng.random() < 0.5 else axis - weight.dim()
        result = on(collapse)(weight, labels, num_classes, axis=signed, scale=scale)
        assert result.dtype == torch.float64
        assert result.shape == expected.shape
        assert bool(((result - expected).abs() <= 8 * 2.0**-53 * size).all())
        assert torch.equal(weight, before)


def test_collapse_sums_do_not_average(on):
    weight = torch.tensor([[1.0, 2.0, 4.0]])
    assert on(collapse)(weight, torch.tensor([0, 0, 0]), 1).tolist() == [[7.0]]


def test_collapse_of_the_identity_is_a_copy():
    weight = torch.randn(3, 4, dtype=torch.float64)
    result = collapse(weight, torch.arange(4), 4)
    assert torch.equal(result, weight)
    assert result.data_ptr() != weight.data_ptr()
    scaled = collapse(weight, torch.arange(4), 4, scale=torch.full((4,), 2.0))
    assert torch.equal(scaled, 2 * weight)


def test_collapse_is_accurate_and_the_same_for_all_threads(on):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 20_000, generator=generator)
    labels = torch.randint(0, 2, (20_000,), generator=generator)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(on(collapse)(weight, labels, 2))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
    expected, size = sums(weight, labels.tolist(), 2, 1, [1.0] * 20_000)
    assert bool(((results[0] - expected).abs() <= 16 * 2.0**-53 * size).all())


def test_large_half_precision_sums_do_not_overflow(on):
    weight = torch.full((1, 10), 60_000.0, dtype=torch.float16)
    labels = torch.zeros(10, dtype=torch.int64)
    assert on(collapse)(weight, labels, 1).item() == 10 * weight[0, 0].item()
    assert torch.equal(on(merge)(weight, labels, 1, axis=1), weight[:, :1])


@pytest.mark.parametrize("batch", range(6))
def test_merge_against_loops(on, batch):
    rng = np.random.default_rng(100 + batch)
    done = 0
    for _ in range(60):
        weight, labels, num_classes, axis = random_case(rng)
        present = labels[labels >= 0].unique()
        if len(present) < num_classes:
            with pytest.raises(InputError, match="no slice"):
                on(merge)(weight, labels, num_classes, axis=axis)
            if not len(present):
                continue
            num_classes = len(present)
            labels = torch.where(labels < 0, -1, torch.searchsorted(present, labels))
        done += 1
        weights = torch.tensor(rng.uniform(0.1, 3, len(labels))) if rng.random() < 0.5 else None
        counts = torch.bincount(labels[labels >= 0], minlength=num_classes)
        factors = (1 / counts.double())[labels] if weights is None else weights
        expected, size = sums(weight, labels.tolist(), num_classes, axis, factors.tolist())
        before = weight.clone()
        result = on(merge)(weight, labels, num_classes, axis=axis, weights=weights)
        assert result.dtype == weight.dtype
        assert result.shape == expected.shape
        roundoff = torch.finfo(weight.dtype).eps / 2
        tiny = torch.finfo(weight.dtype).smallest_normal * roundoff
        allowed = 1.001 * roundoff * expected.abs() + 16 * 2.0**-53 * size + tiny
        assert bool(((result.double() - expected).abs() <= allowed).all())
        assert torch.equal(weight, before)
    assert done > 30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_single_members_keep_their_bits(on, dtype, weighted):
    weight = torch.randn(6, 5).to(dtype)
    weight[3] = -0.0
    labels = torch.tensor([2, 0, 2, 1, -1, 3])
    result = on(merge)(weight, labels, 4, weights=torch.ones(6) if weighted else None)
    for row, color in ((1, 0), (3, 1), (5, 3)):
        assert torch.equal(result[color], weight[row])
    assert bool(torch.signbit(result[1]).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_of_equal_slices_is_that_slice(on, dtype):
    weight = torch.randn(1, 500).to(dtype).repeat(7, 1)
    for count in range(1, 8):
        labels = torch.zeros(count, dtype=torch.int64)
        assert torch.equal(on(merge)(weight[:count], labels, 1), weight[:1])


@pytest.mark.parametrize("function", [collapse, merge])
def test_no_slices_at_all(on, function):
    weight = torch.empty(2, 0, 3)
    result = on(function)(weight, torch.empty(0, dtype=torch.int64), 0, axis=1)
    assert result.shape == (2, 0, 3)
    result = on(function)(torch.empty(0, 4), torch.tensor([0, 0, 1, 0]), 2, axis=1)
    assert result.shape == (0, 2)


def test_collapse_leaves_everything_out(on):
    result = on(collapse)(torch.ones(2, 3), torch.full((3,), -1), 4)
    assert torch.equal(result, torch.zeros(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("function", [collapse, merge])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.ones(2, 3, dtype=torch.int64)}, "floating"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "2 labels for 3"),
        ({"labels": torch.zeros(3)}, "integer vector"),
        ({"labels": torch.zeros(1, 3, dtype=torch.int64)}, "integer vector"),
        ({"labels": torch.tensor([0, 1, 2])}, "allowed are -1 to 1"),
        ({"labels": torch.tensor([0, 1, -2])}, "allowed are -1 to 1"),
        ({"num_classes": -1}, "negative"),
        ({"axis": 2}, "no axis 2"),
        ({"factors": torch.ones(2)}, "3 floating-point numbers"),
        ({"factors": torch.ones(3, dtype=torch.int64)}, "3 floating-point numbers"),
    ],
)
def test_bad_arguments_are_refused(function, change, words):
    arguments = {
        "weight": torch.ones(2, 3),
        "labels": torch.tensor([0, 1, 0]),
        "num_classes": 2,
        "axis": 1,
    } | change
    factors = arguments.pop("factors", None)
    arguments["scale" if function is collapse else "weights"] = factors
    with pytest.raises(InputError, match=words):
        function(**arguments)


@pytest.mark.parametrize("axis", [0, 1])
def test_block_sizes_do_not_matter(monkeypatch, axis):
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(40, 40, 2, generator=generator)
    labels = torch.cat([torch.arange(12), torch.randint(-1, 12, (28,), generator=generator)])
    expected = collapse(weight, labels, 12, axis=axis), merge(weight, labels, 12, axis=axis)
    # The packages are hidden behind the functions of the same names.
    for name in ("collapse", "merge"):
        module = sys.modules[f"fxfib.kernels.{name}.reference"]
        monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 90)
    assert torch.equal(collapse(weight, labels, 12, axis=axis), expected[0])
    assert torch.equal(merge(weight, labels, 12, axis=axis), expected[1])
