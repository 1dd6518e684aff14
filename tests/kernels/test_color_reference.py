"""`color` under every criterion against the slow reference, on small cases full of ties."""

import numpy as np
import pytest
import torch

from fxfib.kernels import color
from fxfib.kernels.coloring import reference


def renumbered(labels):
    seen = {}
    return [seen.setdefault(int(label), len(seen)) for label in labels]


def random_case(rng, criterion):
    """Rows on a coarse dyadic grid, where ties are ties, or moved off it; duplicates, zeros."""
    count, width = int(rng.integers(0, 11)), int(rng.integers(0, 6))
    dtype = [torch.float16, torch.bfloat16, torch.float32, torch.float64][rng.integers(4)]
    rows = rng.integers(-2, 3, (count, width)) * 0.25
    if rng.random() < 0.6:
        rows = rows + rng.normal(size=(count, width)) * 0.02
    if count and rng.random() < 0.5:
        rows = rows[rng.integers(0, count, count)]
    if rng.random() < 0.4:
        rows = rows * rng.choice([0.5, 1.0, 2.0], (count, 1))
    if count and rng.random() < 0.3:
        rows[rng.integers(0, count)] = -0.0
    options = {"scaled": bool(rng.random() < 0.3)}
    kind = rng.integers(4)
    if kind == 1:
        options["bound"] = torch.tensor(rng.integers(0, 3, (count, 1)) / 128)
    elif kind == 2:
        options["bound"] = torch.tensor(rng.integers(0, 3, (count, width)) / 128).float()
    if kind == 3:
        options["relative"] = torch.tensor(rng.integers(0, 3, width) / 64)
    if rng.random() < 0.3:
        options["must_match"] = torch.tensor(rng.integers(-1, 2, count))
    if rng.random() < 0.5:
        options["weights"] = torch.tensor(rng.integers(0, 4, count) / 2)
    precisions = {
        "fibration": [0.0, 1 / 64, 1 / 32, 0.25, 0.3, 2.0],
        "cosine": [0.0, 1e-3, 0.02, 0.1, 0.5, 1.0, 2.0],
        "energy": [0.0, 1e-4, 1e-2, 0.05, 0.3, 1.0],
    }
    eps = float(rng.choice(precisions[criterion]))
    return torch.tensor(rows.reshape(count, width)).to(dtype), eps, options


def shuffled(options, order):
    return {
        name: value[order] if isinstance(value, torch.Tensor) and name != "relative" else value
        for name, value in options.items()
    }


@pytest.mark.parametrize("criterion", ["fibration", "cosine", "energy"])
@pytest.mark.parametrize("batch", range(10))
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
