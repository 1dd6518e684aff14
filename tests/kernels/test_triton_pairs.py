"""Close pairs from tiles of rows, and hashes of rows, against plain float64."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fxfib.kernels.coloring import closeness, identical, triton_tiles
from fxfib.kernels.coloring.rows import PlainRows
from fxfib.kernels.coloring.triton import Matrix, close_pairs, close_pairs_batch
from fxfib.kernels.coloring.triton_rows import pairs_close, row_hashes

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TILE = triton_tiles.TILE


def brute_force(rows, eps, bound=None, relative=None, groups=None):
    """All pairs, by the definition."""
    values = rows.double()
    reach = torch.zeros(len(rows), 1).double() if bound is None else bound.double()
    if relative is not None:
        reach = reach + values.abs() * relative.double()
    close = torch.ones(len(rows), len(rows), dtype=torch.bool).triu(1)
    for i in range(len(rows)):
        allowed = reach[i] + reach + eps
        close[i] &= ((values[i] - values).abs() <= allowed).all(1)
        if groups is not None:
            close[i] &= groups[i] == groups
    return torch.nonzero(close).unbind(1)


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def random_matrix(rng, count=None):
    """Near ties, duplicates, zero rows and rows of any strides; all sizes and dtypes."""
    if count is None:
        count = int(
            rng.choice([0, 1, 2, 7, 33, TILE, TILE + 1, 300], p=[0.1] * 5 + [0.2, 0.2, 0.1])
        )
    width = int(rng.choice([0, 1, 2, 5, 9]))
    rows = rng.integers(-2, 3, (count, width)) * 0.25
    if rng.random() < 0.5:
        rows = rows + rng.integers(-2, 3, (count, width)) / 64
    if rng.random() < 0.3:
        rows = rows + rng.normal(size=(count, width)) * 0.01
    rows[::5] = 0.0
    rows[::10] = -0.0
    rows = torch.tensor(rows).to(DTYPES[rng.integers(4)])
    if rng.random() < 0.3:
        rows = rows.t().contiguous().t()
    elif rng.random() < 0.3:
        rows = torch.cat([rows, rows], 1)[:, :width]
    bound = [
        None,
        torch.tensor(rng.integers(0, 3, (count, 1)) / 128),
        torch.tensor(rng.integers(0, 3, (count, width)) / 128).float(),
    ][rng.integers(3)]
    relative = torch.tensor(rng.integers(0, 3, width) / 64) if rng.random() < 0.4 else None
    groups = torch.tensor(rng.integers(-2, 2, count)) if rng.random() < 0.4 else None
    eps = float(rng.choice([0.0, 1 / 64, 1 / 32, 0.25, 0.3]))
    return Matrix(rows, eps, bound, relative, groups)


def arguments(matrix):
    return matrix.rows, matrix.eps, matrix.bound, matrix.relative, matrix.groups


@pytest.mark.parametrize("batch", range(4))
def test_one_launch_for_matrices_of_many_sizes(on_triton, monkeypatch, batch):
    rng = np.random.default_rng(batch)
    matrices = [random_matrix(rng) for _ in range(25)]
    expected = [brute_force(*arguments(matrix)) for matrix in matrices]
    assert sum(len(left) for left, _ in expected) > 1000
    launches = []
    real = triton_tiles._launch
    monkeypatch.setattr(triton_tiles, "_launch", lambda *a: launches.append(a) or real(*a))

    def batched(*parts):
        return close_pairs_batch([Matrix(rows, *rest) for rows, *rest in parts])

    found = on_triton(batched)(*map(arguments, matrices))
    assert len(launches) == 1
    for pairs, wanted in zip(found, expected, strict=True):
        assert pairs[0].dtype == torch.int64
        assert same(pairs, wanted)
    # Cut into launches, and words unpacked a few at a time.
    monkeypatch.setattr(triton_tiles, "_TILES_AT_ONCE", 7)
    monkeypatch.setattr(triton_tiles, "_WORDS_AT_ONCE", 3 * TILE)
    again = on_triton(batched)(*map(arguments, matrices[:12]))
    assert len(launches) > 2
    assert all(map(same, again, found[:12]))


def test_the_cpu_finds_the_same_pairs(on_triton):
    rng = np.random.default_rng(9)
    for _ in range(10):
        matrix = random_matrix(rng, 60)
        rows, eps, bound, relative, _ = arguments(matrix)
        groups = torch.zeros(60, dtype=torch.int64)
        if not rows.shape[1]:
            continue
        rows = rows.float() if rows.dtype != torch.float64 else rows
        left, right = closeness.close_pairs(rows.contiguous(), eps, bound, relative, groups)
        order = torch.argsort(60 * left + right)
        found = on_triton(close_pairs)(rows, eps, bound, relative, groups)
        assert same(found, (left[order], right[order]))


def test_no_matrix_and_no_rows(on_triton):
    assert close_pairs_batch([]) == []
    for shape in ((0, 3), (1, 3), (1, 0)):
        left, right = on_triton(close_pairs)(torch.ones(shape), 1.0)
        assert len(left) == len(right) == 0
    assert same(on_triton(close_pairs)(torch.ones(3, 0), 0.0), brute_force(torch.ones(3, 0), 0.0))


@pytest.mark.parametrize("width", [1, 4, 5, 37])
def test_tiles_are_given_up_early_and_never_too_early(on_triton, width):
    """One pair for every column, apart in that column alone, by less than float32 can tell."""
    generator = torch.Generator().manual_seed(3)
    base = 16 * torch.randn(width, width, generator=generator)
    column = torch.arange(width)
    rows = base.repeat(2, 1).double()
    rows[column, column] = 1.0
    rows[width + column, column] = 0.0
    assert same(on_triton(close_pairs)(rows, 1.0), brute_force(rows, 1.0))
    rows[width + column, column] = -(2.0**-40)
    assert len(on_triton(close_pairs)(rows, 1.0)[0]) == len(brute_force(rows, 1.0)[0])
    assert len(on_triton(close_pairs)(rows, 1.0 + 2.0**-40)[0]) >= width


def test_most_pairs_need_no_second_look(on_triton, monkeypatch):
    """Pairs that float32 can decide are decided there, close ones too."""
    looked_at = []

    def counted(rows, left, *rest):
        looked_at.append(len(left))
        return pairs_close(rows, left, *rest)

    monkeypatch.setattr("fxfib.kernels.coloring.triton.pairs_close", counted)
    rows = torch.rand(TILE, 3, generator=torch.Generator().manual_seed(1))
    expected = brute_force(rows, 0.75)
    assert 5000 < len(expected[0]) < 7000, "of 8128"
    assert same(on_triton(close_pairs)(rows, 0.75), expected)
    assert sum(looked_at) < 10


def test_windows_leave_tiles_out(on_triton, monkeypatch):
    tables = []
    real = triton_tiles._launch
    monkeypatch.setattr(
        triton_tiles, "_launch", lambda s, t, *a: tables.append(t) or real(s, t, *a)
    )
    rows = torch.randn(10 * TILE, 2, generator=torch.Generator().manual_seed(2))
    rows[5::50] = rows[7::50]
    expected = brute_force(rows, 1e-3)
    assert same(on_triton(close_pairs)(rows, 1e-3), expected)
    assert len(expected[0]) >= 24
    groups = torch.arange(len(rows)) % 5
    assert same(
        on_triton(close_pairs)(rows, 0.01, None, None, groups),
        brute_force(rows, 0.01, None, None, groups),
    )
    assert len(tables[0]) <= 20, "of 55"
    assert len(tables[1]) <= 25, "of 55"


def test_numbers_at_the_ends_of_float64(on_triton):
    rows = torch.tensor([1e300, 1.0, -1e300, 1e300, 1e-300, 0.0, 1e39, 9e38, 3.4e38]).double()
    rows = torch.stack([rows, rows.flip(0)], 1)
    with np.errstate(all="ignore"):  # infinities in float32, that decide nothing
        for eps in (0.0, 1e-300, 2e38, 2e39, 1e300, 3e300):
            assert same(on_triton(close_pairs)(rows, eps), brute_force(rows, eps))


@pytest.mark.parametrize("dtype", DTYPES)
def test_hashes_are_those_of_the_cpu(on_triton, dtype):
    generator = torch.Generator().manual_seed(4)
    for count, width in ((0, 3), (1, 1), (5, 0), (150, 67), (300, 5)):
        rows = torch.randn(count, width, generator=generator).to(dtype)
        rows[::3] = -0.0
        groups = torch.randint(-3, 3, (count,), generator=generator)
        values = rows.float() if dtype != torch.float64 else rows
        everything = slice(None)
        source = PlainRows(values.numpy(), None)
        expected = identical._hash(source, np.arange(count), everything, groups.numpy())
        for stored in (rows, rows.t().contiguous().t()):
            found = on_triton(row_hashes)(stored, groups)
            assert np.array_equal(found.numpy().view(np.uint64), expected)
