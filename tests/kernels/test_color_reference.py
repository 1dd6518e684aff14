"""`color` under every criterion against the slow reference, on small cases full of ties."""

import numpy as np
import pytest
import torch

from fxfib.kernels import color
from fxfib.kernels.coloring import reference

from color_cases import random_case, renumbered


def shuffled(options, order):
    return {
        name: value[order] if isinstance(value, torch.Tensor) and name != "relative" else value
        for name, value in options.items()
    }


@pytest.mark.parametrize("criterion", ["fibration", "cosine", "energy"])
@pytest.mark.parametrize("batch", range(8))
def test_small_cases_against_the_reference(criterion, batch):
    rng = np.random.default_rng(batch)
    decided = 0
    for _ in range(60):
        rows, eps, options = random_case(rng, criterion)
        history = []
        expected = reference.color(rows, eps, criterion, history=history, **options)
        result = color(rows, eps, criterion, **options)
        assert result.num_classes == len(set(result.labels.tolist()))
        # In fibration nothing is rounded and ties have an order.
        undecided = criterion != "fibration" and any(
            second - best < 1e-9 and best > 1e-12 for best, second in history
        )
        if result.labels.tolist() != expected.tolist():
            for moved in (eps * (1 - 1e-9), eps * (1 + 1e-9)):
                again = reference.color(rows, moved, criterion, **options)
                undecided |= criterion != "fibration" and not torch.equal(again, expected)
            assert undecided
        decided += not undecided
        order = torch.tensor(rng.permutation(len(rows)), dtype=torch.int64)
        permuted = color(rows[order], eps, criterion, **shuffled(options, order))
        assert permuted.labels.tolist() == renumbered(result.labels[order])
        exact = color(rows, 0.0, criterion, **options)
        if "bound" not in options and "relative" not in options:
            pairs = set(zip(exact.labels.tolist(), result.labels.tolist(), strict=True))
            assert len(pairs) == exact.num_classes, "what is equal stays together"
    assert decided > 20
