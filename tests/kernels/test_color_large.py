"""`color` where the search matters: windows, hashes, blocks, memory, threads."""

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist

from fxfib.errors import InputError
from fxfib.kernels import color
from fxfib.kernels.coloring import (
    bitmaps,
    closeness,
    cluster,
    dense,
    identical,
    window,
)
from fxfib.kernels.coloring.rows import Bounds, PlainRows

from color_cases import KINDS, PATHS, no_path, renumbered, weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("relative", [1e-7, 1e-3])
def test_all_close_pairs_are_found(kind, relative):
    """Planted copies with noise below their bound, and near misses above it, in one matrix."""
    base = weights(kind, 300, 90)
    rng = np.random.default_rng(1)
    source = rng.integers(0, 150, 300)
    rows = base[source].double()
    bound = torch.tensor(rng.uniform(0.5, 1.0, (300, 1)) * relative)
    rows += bound * torch.tensor(rng.uniform(-0.5, 0.5, (300, 90)))
    rows[::7, 3] += 2.2 * relative
    gap = cdist(rows, rows, "chebyshev")
    close = ((rows[:, None] - rows[None]).abs() <= bound[:, None] + bound[None]).all(-1).numpy()
    assert (np.triu(close, 1)).sum() > 20
    labels = color(rows, bound=bound).labels.numpy()
    together = labels[:, None] == labels[None]
    assert not (together & ~close).any()
    components = connected_components(close)[1]
    for part in range(components.max() + 1):
        members = np.flatnonzero(components == part)
        if close[np.ix_(members, members)].all():
            assert together[np.ix_(members, members)].all()
    assert gap[together].max() <= 2 * relative


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps", [1e-3, 0.3, 1.0, 2.5])
def test_diameter_and_order(kind, eps):
    rows = weights(kind, 150, 12, seed=2)
    result = color(rows, eps)
    labels = result.labels.numpy()
    for label in range(result.num_classes):
        part = rows[labels == label].double()
        assert float((part.amax(0) - part.amin(0)).max()) <= eps
    order = np.random.default_rng(0).permutation(150)
    assert color(rows[order], eps).labels.tolist() == renumbered(labels[order])
    torch.set_num_threads(2)
    try:
        assert torch.equal(color(rows, eps).labels, result.labels)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("options", [{"eps": 0.6}, {"bound": 0.3}, {"bound": 0.3, "scaled": True}])
@pytest.mark.parametrize("groups", [None, torch.arange(120) % 3])
def test_block_sizes_do_not_matter(monkeypatch, options, groups):
    rows = weights("normal", 120, 3, seed=3)
    options = dict(options)
    if "bound" in options:
        options["bound"] = torch.full((120, 1), options["bound"])
    expected = color(rows, must_match=groups, **options)
    assert 5 < expected.num_classes < 110
    monkeypatch.setattr(window, "PAIRS_AT_ONCE", 11)
    monkeypatch.setattr(closeness, "_CACHED_ELEMENTS", 7)
    monkeypatch.setattr(identical, "_BLOCK_WORDS", 5)
    monkeypatch.setattr(cluster, "_CACHED_ELEMENTS", 7)
    monkeypatch.setattr(bitmaps, "_TILE_ROWS", 13)
    monkeypatch.setattr(bitmaps, "_TILE_COLUMNS", 31)
    monkeypatch.setattr(bitmaps, "_BYTES_AT_ONCE", 3)
    monkeypatch.setattr(dense, "_BLOCK_ROWS", 17)
    for path in (no_path, *PATHS):
        path(monkeypatch)
        result = color(rows, must_match=groups, **options)
        assert torch.equal(result.labels, expected.labels)


@pytest.mark.parametrize("classes", [1, 3])
def test_hash_collisions_are_noticed(monkeypatch, classes):
    rows = weights("normal", 90, 20)[torch.arange(90) % 30]
    expected = renumbered(np.arange(90) % 30)
    assert color(rows).labels.tolist() == expected
    real = identical._hash
    monkeypatch.setattr(identical, "_hash", lambda *a: real(*a) % np.uint64(classes))
    assert color(rows).labels.tolist() == expected
    groups = torch.arange(90) // 30
    assert color(rows, must_match=groups).num_classes == 90
    assert color(torch.ones(9, 20), must_match=torch.arange(9) % 3).num_classes == 3


def test_rows_that_differ_in_one_late_column():
    rows = torch.ones(200, 1000)
    rows[torch.arange(200), 700 + torch.arange(200) % 100] += torch.finfo(torch.float32).eps
    expected = renumbered(np.arange(200) % 100)
    assert color(rows).labels.tolist() == expected
    bound = torch.full((200, 1), 5e-8, dtype=torch.float64)
    assert color(rows, bound=bound).labels.tolist() == expected
    assert color(rows, bound=1.3 * bound).num_classes == 1


@pytest.mark.parametrize("options", [{"eps": 1.0}, {"bound": torch.full((800, 1), 0.5)}])
def test_every_column_counts(options):
    """One pair for every column, apart in that column alone, by less than float32 can tell."""
    rows = 16 * weights("normal", 400, 400).repeat(2, 1)
    column = torch.arange(400)
    rows[column, column] = 1.0
    rows[400 + column, column] = 0.0
    assert color(rows, **options).labels.tolist() == [*range(400), *range(400)]
    rows[400 + column, column] = -(2.0**-30)
    assert color(rows, **options).num_classes == 800


@pytest.mark.parametrize("scaled", [False, True])
def test_must_match_of_many_small_groups(scaled):
    rows = torch.ones(3000, 4) * (torch.arange(3000)[:, None] % 2 + 1)
    groups = torch.arange(3000) // 3 - 500
    bound = torch.full((3000, 1), 1e-3)
    labels = color(rows, bound=bound, must_match=groups, scaled=scaled).labels
    keys = groups if scaled else groups * 2 + torch.arange(3000) % 2
    assert labels.tolist() == renumbered(keys.numpy())


def test_a_window_misses_no_pair_and_repeats_none():
    rng = np.random.default_rng(5)
    for _ in range(200):
        count = int(rng.integers(1, 20))
        centers = rng.integers(-3, 4, count) * 0.5
        radii = rng.integers(0, 3, count) * 0.25
        groups = rng.integers(0, 1 + rng.integers(1, 4), count)
        found = window.interval_window(centers, radii, groups)
        pairs = {tuple(sorted(p)) for i, j in found.pairs() for p in zip(i, j, strict=True)}
        assert sum(len(i) for i, _ in found.pairs()) == len(pairs) == found.size()
        expected = {
            (i, k)
            for i in range(count)
            for k in range(i + 1, count)
            if groups[i] == groups[k] and abs(centers[i] - centers[k]) <= radii[i] + radii[k]
        }
        assert {tuple(map(int, pair)) for pair in pairs} == expected


def test_ternary_weights_do_not_widen_the_window():
    rows = weights("ternary", 2000, 200).numpy()
    source = PlainRows(rows, Bounds(np.full((2000, 1), 1e-5)))
    columns = window.telling_columns(source, 0.0, 8)
    found = window.candidates(source, 0.0, np.zeros(2000, dtype=np.int64), columns)
    assert found.size() < 50_000


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("absolute", [False, True])
def test_relative_bounds_are_bounds_in_short(scaled, absolute):
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    rows = base[torch.randint(40, (120,), generator=generator)]
    rows *= 1 + 3e-6 * torch.rand(120, 12, generator=generator, dtype=torch.float64)
    if scaled:
        rows *= torch.rand(120, 1, generator=generator, dtype=torch.float64) + 0.5
    relative = torch.rand(12, generator=generator, dtype=torch.float64) * 3e-6
    bound = torch.rand(120, 12, generator=generator) * 1e-6 if absolute else None
    dense = rows.abs() * relative + (0 if bound is None else bound)
    expected = color(rows, bound=dense, scaled=scaled)
    found = color(rows, bound=bound, relative=relative, scaled=scaled)
    assert 40 <= expected.num_classes < 120
    assert torch.equal(found.labels, expected.labels)
    with pytest.raises(InputError, match="relative"):
        color(rows, relative=-relative)
    with pytest.raises(InputError, match="relative"):
        color(rows, relative=relative[:-1])
