"""Dense linkage: the fast matrix of distances is that of comparing every pair in every column."""

import numpy as np
import pytest

from fxfib.kernels.coloring.closeness import Closeness
from fxfib.kernels.coloring.dense import _distances, _known_distances
from fxfib.kernels.coloring.rows import Bounds, PlainRows


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("absolute", [None, "row", "entry"])
def test_bounds_make_up_for_what_a_pair_is_too_far_apart(
    absolute: str | None, relative: bool, wide: bool
) -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(size=(700, 11)).astype(np.float64 if wide else np.float32)
    matrix = {
        None: None,
        "row": rng.random((700, 1)) * 0.3,
        "entry": rng.random((700, 11)) * 0.3,
    }[absolute]
    bounds = Bounds(matrix, rng.random(11) * 0.1 if relative else None)
    search = Closeness(PlainRows(values, bounds), 2.0)
    members = rng.permutation(700)
    left, right = np.triu_indices(700, 1)
    wanted = _known_distances(search, members, (left, right))
    found = _distances(search, members, values[members].astype(np.float64))
    assert np.array_equal(found, wanted)
    # Some pairs are close by their bounds alone, and some are not close at all.
    close = np.isfinite(wanted)
    assert 0.05 < close.mean() < 0.95
    assert (wanted[close] > 2.0).any() == (absolute is not None or relative)
