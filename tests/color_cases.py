"""Small matrices to color, full of ties, duplicates and zero rows, and ways to force a path."""

import numpy as np
import torch

from fxfib.kernels.coloring import bitmaps, closeness, cluster, complete


def renumbered(labels):
    """Labels in the order of first appearance."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].tolist()


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


def no_path(monkeypatch):
    """What the sizes call for."""


def bits(monkeypatch):
    """Candidates from a bitmap, whatever their number."""
    for module in (closeness, cluster):
        monkeypatch.setattr(
            module, "candidates", lambda rows, eps, groups, _: bitmaps.BitMap(rows, eps, groups)
        )


def rounds(monkeypatch):
    """Complete linkage in rounds over arrays."""
    monkeypatch.setattr(complete, "_FEW_PAIRS", 0)


def matrix(monkeypatch):
    """Complete linkage with a matrix of all distances."""
    monkeypatch.setattr(cluster, "KEPT_PAIRS", -1)


PATHS = [bits, rounds, matrix]


def weights(kind, count, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator)
    if kind == "ternary":
        rows = torch.randint(-1, 2, (count, width), generator=generator).float()
    elif kind == "pruned":
        rows[torch.rand(count, width, generator=generator) < 0.9] = 0
    elif kind == "few columns":
        rows[:, : width // 2] = 0
        rows[:, width // 2 + 2 :] = 1
    elif kind == "one column":
        rows[:, 1:] = 0
    return rows


KINDS = ["normal", "ternary", "pruned", "few columns", "one column"]
