"""`color` of rows on a GPU gives the partition of the CPU, whatever part of it runs where."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fxfib.errors import InputError
from fxfib.kernels import color, color_batch
from fxfib.kernels.coloring import triton_color
from fxfib.kernels.coloring.triton import Matrix
from fxfib.kernels.coloring.triton_color import color_on_device, identical_rows

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def renumbered(labels):
    seen = {}
    return [seen.setdefault(int(label), len(seen)) for label in labels]


def random_case(rng):
    """Chains, cliques, duplicates, ties and zero rows."""
    count, width = int(rng.integers(0, 40)), int(rng.integers(0, 5))
    rows = rng.integers(-1, 2, (count, width)) * 0.5
    rows = rows + rng.integers(-2, 3, (count, width)) * (rng.random((count, 1)) < 0.5) / 64
    if rng.random() < 0.3:
        rows = rows + rng.normal(size=(count, width)) * 0.01
    rows = torch.tensor(rows).to(DTYPES[rng.integers(4)])
    bound = [
        None,
        torch.tensor(rng.integers(0, 3, (count, 1)) / 128),
        torch.tensor(rng.integers(0, 3, (count, width)) / 128).float(),
    ][rng.integers(3)]
    relative = torch.tensor(rng.integers(0, 3, width) / 64) if rng.random() < 0.3 else None
    groups = torch.tensor(rng.integers(-1, 2, count)) if rng.random() < 0.3 else None
    eps = float(rng.choice([0.0, 0.0, 1 / 64, 1 / 32, 0.25]))
    return rows, eps, bound, relative, groups


@pytest.mark.parametrize("batch", range(4))
def test_the_same_partition_as_on_the_cpu(on_triton, monkeypatch, batch):
    rng = np.random.default_rng(batch)
    cases = [random_case(rng) for _ in range(30)]
    matrices, eps, bound, relative, groups = (list(part) for part in zip(*cases, strict=True))
    options = {"bound": bound, "relative": relative, "must_match": groups}
    with monkeypatch.context() as patch:
        patch.setenv("FXFIB_KERNELS", "vectorised")
        expected = [found.labels.tolist() for found in color_batch(matrices, eps, **options)]
    linked = []
    real = triton_color._linked
    monkeypatch.setattr(triton_color, "_linked", lambda *a: linked.append(a) or real(*a))

    def labels(rows, *rest):
        precision, own_bound, own_relative, own_groups = rest
        found = color(
            rows, precision, bound=own_bound, relative=own_relative, must_match=own_groups
        )
        assert found.scales is None
        assert found.num_classes == len(set(found.labels.tolist()))
        return found.labels

    def batched(*arguments, **options):
        return [found.labels for found in color_batch(*arguments, **options)]

    found = on_triton(batched)(matrices, eps, **options)
    assert [one.tolist() for one in found] == expected
    assert linked, "some components are no cliques"
    for case, wanted in list(zip(cases, expected, strict=True))[:8]:
        assert on_triton(labels)(*case).tolist() == wanted


@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_rows(on_triton, dtype):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(90, 20, generator=generator).to(dtype)
    rows = rows[torch.randint(30, (150,), generator=generator)]
    rows[7] = 0.0
    rows[11] = -0.0
    rows[60, 19] = torch.nextafter(rows[60, 19].float(), torch.tensor(9.0)).to(dtype)
    groups = torch.randint(-1, 2, (150,), generator=generator)
    for own in (None, groups):
        ids, first = on_triton(identical_rows)(rows, own)
        keys = [tuple((row + 0.0).tolist()) for row in rows]
        if own is not None:
            keys = list(zip(keys, own.tolist(), strict=True))
        assert ids.tolist() == renumbered_keys(keys)
        assert first.tolist() == [ids.tolist().index(i) for i in range(int(ids.max()) + 1)]


def renumbered_keys(keys):
    seen = {}
    return [seen.setdefault(key, len(seen)) for key in keys]


@pytest.mark.parametrize("classes", [1, 3])
def test_hash_collisions_are_noticed(on_triton, monkeypatch, classes):
    rows = torch.randn(90, 5)[torch.arange(90) % 30]
    expected = renumbered(np.arange(90) % 30)
    real = triton_color.row_hashes
    monkeypatch.setattr(triton_color, "row_hashes", lambda *a: real(*a) % classes)
    assert on_triton(identical_rows)(rows, None)[0].tolist() == expected
    groups = torch.arange(90) // 30
    assert len(on_triton(identical_rows)(rows, groups)[1]) == 90


def test_what_has_no_kernel_runs_on_the_cpu(on_triton):
    """Scaled rows and the other criteria, and mixed batches, whatever the device."""
    rows = torch.tensor([[1.0, 2.0], [2.0, 4.0], [1.0, 2.0], [0.0, 0.0]])

    def labels(*arguments, **options):
        return [found.labels for found in color_batch(*arguments, **options)]

    proportional = [[0, 0, 0, 1]]
    assert [x.tolist() for x in on_triton(labels)([rows], scaled=True)] == proportional
    assert [x.tolist() for x in on_triton(labels)([rows], 0.0, "cosine")] == proportional
    mixed = on_triton(labels)([rows, rows[:0], rows[:1]], [0.0, 0.5, 0.0], "energy")
    assert [x.tolist() for x in mixed] == [[0, 1, 0, 2], [], [0]]


def test_bad_matrices_of_a_batch_are_refused(on_triton):
    rows = torch.ones(2, 2)
    with pytest.raises(InputError, match="NaN"):
        on_triton(color_batch)([rows, rows * torch.nan])
    with pytest.raises(InputError, match="bound"):
        on_triton(color_batch)([rows], bound=[-rows])


def test_nothing_to_color(on_triton):
    assert color_on_device([]) == []
    found = on_triton(lambda rows: color_on_device([Matrix(rows, 1.0)])[0])(torch.ones(0, 3))
    assert found.tolist() == []
