"""Every way through complete linkage gives the same colors."""

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist

from fxfib.errors import InputError
from fxfib.kernels import color
from fxfib.kernels.coloring import dense, linkages, reference

from color_cases import KINDS, PATHS, matrix, random_case, renumbered, weights


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("seed", range(4))
def test_every_path_gives_the_colors_of_the_reference(monkeypatch, path, seed):
    rng = np.random.default_rng(seed)
    cases = [random_case(rng, "fibration") for _ in range(50)]
    expected = [reference.color(rows, eps, **options) for rows, eps, options in cases]
    path(monkeypatch)
    for (rows, eps, options), labels in zip(cases, expected, strict=True):
        assert color(rows, eps, **options).labels.tolist() == labels.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps", [1.0, 2.5, 3.0])
@pytest.mark.parametrize("bounded", [False, True])
def test_every_path_gives_the_same_colors(monkeypatch, kind, eps, bounded):
    rows = weights(kind, 300, 12, seed=6)
    bound = (
        torch.rand(300, 1, generator=torch.Generator().manual_seed(1)) * 0.1 if bounded else None
    )
    labels = [color(rows, eps, bound=bound).labels]
    for path in PATHS:
        with monkeypatch.context() as patch:
            path(patch)
            labels.append(color(rows, eps, bound=bound).labels)
    for other in labels[1:]:
        assert torch.equal(labels[0], other)


def test_float32_ties_are_settled_in_float64(monkeypatch):
    """Distances that differ by less than float32 can tell, in a random order."""
    matrix(monkeypatch)
    rng = np.random.default_rng(7)
    for _ in range(30):
        steps = 1 + rng.permutation(12) * 2.0**-40
        rows = torch.tensor(np.cumsum(steps))[:, None]
        expected = reference.color(rows, 1.5)
        assert color(rows, 1.5).labels.tolist() == expected.tolist()
        assert color(rows, 4.5).labels.tolist() == reference.color(rows, 4.5).tolist()


def test_complete_linkage_is_scipys():
    rows = weights("normal", 900, 40, seed=8).double()
    distances = pdist(rows.numpy(), "chebyshev")
    for quantile in (1e-3, 1e-2, 0.2, 0.7):
        eps = float(np.quantile(distances, quantile))
        expected = fcluster(linkage(distances, "complete"), eps, criterion="distance")
        assert color(rows, eps).labels.tolist() == renumbered(expected)


@pytest.mark.parametrize("eps", [0.02, 0.1, 0.3, 0.8])
def test_average_linkage_is_scipys(monkeypatch, eps):
    rows = weights("normal", 600, 7, seed=12).double()
    tree = linkage(pdist(rows.numpy(), "cosine"), "average")
    expected = renumbered(fcluster(tree, eps, criterion="distance"))
    for few in (0, 1000):
        monkeypatch.setattr(linkages, "_FEW", few)
        assert color(rows, eps, "cosine").labels.tolist() == expected


def test_more_than_fits_in_memory_is_refused(monkeypatch):
    matrix(monkeypatch)
    monkeypatch.setattr(dense, "LARGEST_DENSE", 30)
    rows = torch.arange(31.0)[:, None]
    with pytest.raises(InputError, match="smaller eps"):
        color(rows, 1.0)
    assert color(rows, 30.0).num_classes == 1, "one clique needs no linkage"
    assert color(rows[:30], 1.0).num_classes == 15
