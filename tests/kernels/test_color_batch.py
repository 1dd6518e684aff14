"""`color_batch`, the search for close pairs, and sums that do not depend on their order."""

import numpy as np
import pytest
import torch

from fxfib.errors import InputError
from fxfib.kernels import color, color_batch
from fxfib.kernels.coloring import products
from fxfib.kernels.coloring.closeness import close_pairs
from fxfib.kernels.coloring.products import Points

from color_cases import KINDS, bits, no_path, random_case, weights


@pytest.mark.parametrize("criterion", ["fibration", "cosine", "energy"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_equals_one_call_each(criterion, threads):
    rng = np.random.default_rng(11)
    cases = [random_case(rng, criterion) for _ in range(40)]
    names = ("must_match", "bound", "relative", "weights")
    columns = {name: [options.get(name) for _, _, options in cases] for name in names}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for scaled in (False, True):
            found = color_batch(
                [rows for rows, _, _ in cases],
                [eps for _, eps, _ in cases],
                criterion,
                scaled=scaled,
                **columns,
            )
            assert len(found) == len(cases)
            for result, (rows, eps, options) in zip(found, cases, strict=True):
                alone = color(rows, eps, criterion, **{**options, "scaled": scaled})
                assert torch.equal(result.labels, alone.labels)
                assert result.num_classes == alone.num_classes
                assert (result.scales is None) == (not scaled)
                if scaled:
                    assert torch.equal(result.scales, alone.scales)
    finally:
        torch.set_num_threads(before)


def test_a_batch_of_nothing_and_bad_batches():
    assert color_batch([]) == []
    rows = torch.ones(3, 2)
    assert [c.num_classes for c in color_batch([rows, rows[:0], rows[:, :0]], 0.5)] == [1, 0, 1]
    for options in ({"bound": [None]}, {"eps": [0.0]}, {"must_match": [None] * 3}):
        with pytest.raises(InputError, match="for 2 matrices"):
            color_batch([rows, rows], **options)
    with pytest.raises(InputError, match="NaN"):
        color_batch([rows, rows * torch.nan])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", [no_path, bits])
def test_close_pairs_are_all_found_once(monkeypatch, kind, path):
    path(monkeypatch)
    rows = weights(kind, 300, 10, seed=9)
    rows = rows.unique(dim=0)[torch.randperm(len(rows.unique(dim=0)))]
    count = len(rows)
    generator = torch.Generator().manual_seed(3)
    gaps = (rows[:, None].double() - rows[None].double()).abs()
    for eps in (0.01, 1.0):
        for bound in (None, torch.rand(count, 1, generator=generator) * eps):
            for groups in (torch.zeros(count).long(), torch.arange(count) % 3):
                reach = torch.zeros(count, 1) if bound is None else bound
                near = (gaps <= reach[:, None].double() + reach[None].double() + eps).all(2)
                near &= groups[:, None] == groups[None]
                expected = torch.nonzero(near.triu(1)).tolist()
                left, right = close_pairs(rows, eps, bound, None, groups)
                assert sorted(zip(left.tolist(), right.tolist(), strict=True)) == [
                    tuple(pair) for pair in expected
                ]


def test_distances_do_not_depend_on_place_or_block_size(monkeypatch):
    generator = torch.Generator().manual_seed(5)
    points = torch.randn(200, 37, generator=generator, dtype=torch.float64)
    points = (points / points.norm(dim=1, keepdim=True)).numpy()
    whole = np.concatenate([np.pad(b, ((0, 0), (s, 0))) for s, b in Points(points).blocks(False)])
    true = ((points[:, None] - points[None]) ** 2).sum(2) / 2
    assert np.abs(np.triu(whole - true, 1)).max() < 1e-12
    order = np.random.default_rng(0).permutation(200)
    monkeypatch.setattr(products, "_BLOCK_ELEMENTS", 1400)
    moved = np.concatenate(
        [np.pad(b, ((0, 0), (s, 0))) for s, b in Points(points[order]).blocks(False)]
    )
    symmetric = np.triu(whole, 1) + np.triu(whole, 1).T
    assert np.array_equal(np.triu(moved, 1), np.triu(symmetric[np.ix_(order, order)], 1))


def test_identical_rows_cost_no_energy_whatever_their_weights():
    rows = torch.tensor([[3.0, 4.0], [3.0, 4.0], [1.0, 0.0]])
    mass = torch.tensor([1.0, 9.0, 1.0])
    assert color(rows, 1e-9, "energy", weights=mass).labels.tolist() == [0, 0, 1]
    assert color(rows, 1.0, "energy", weights=mass).num_classes == 1


def test_a_zero_row_is_similar_to_zero_rows_only():
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-0.0, 0.0], [-1.0, 0.5]])
    assert color(rows, 2.0, "cosine").labels.tolist() == [0, 1, 0, 1]
    assert color(rows, 1.5, "cosine").labels.tolist() == [0, 1, 0, 2]
    scaled = color(2 * rows, 2.0, "cosine", scaled=True)
    assert scaled.scales.tolist() == pytest.approx([1.0, 1.0, 1.0, 1.25**0.5])


@pytest.mark.parametrize("criterion", ["cosine", "energy"])
def test_linkage_of_many_rows_does_not_depend_on_order_or_threads(criterion):
    rows = weights("pruned", 700, 9, seed=10)
    mass = torch.rand(700, generator=torch.Generator().manual_seed(2))
    order = torch.randperm(700, generator=torch.Generator().manual_seed(4))
    for eps in (0.02, 0.2):
        found = color(rows, eps, criterion, weights=mass)
        assert 20 < found.num_classes < 690
        moved = color(rows[order], eps, criterion, weights=mass[order])
        pairs = set(zip(found.labels[order].tolist(), moved.labels.tolist(), strict=True))
        assert len(pairs) == found.num_classes == moved.num_classes
