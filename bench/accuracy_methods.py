"""Ways to make a trained network smaller, behind one call: fxfib, and those beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from accuracy_networks import Data, Sentences
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.cluster.vq import kmeans2
from torch import nn

import fxfib
from fxfib.coloring import FIRST_FREE, ZERO, Factor
from fxfib.passes.criteria import Policy
from fxfib.passes.forward import Analysis
from fxfib.refining import PASSES
from fxfib.signature import Form, color_form
from fxfib.workshop import Workshop, rewrite

OTHERS = ("random", "l1", "l2", "cosine", "folding")
PRUNERS = ("tp-magnitude", "tp-fpgm")
HALVINGS = 14
# Shares that were found, by model: the same with every compensation.
SHARES: WeakKeyDictionary[nn.Module, dict[tuple[str, float, int], float]] = WeakKeyDictionary()
# A size of at least this part of the limit is near enough.
NEAR = 0.97


class Chosen(Policy):
    """Another way to choose: the same part of the nodes of every value, dropped or clustered."""

    chooses = True

    def __init__(self, method: str, share: float, seed: int) -> None:
        super().__init__(1.0)
        self.method = method
        self.share = share
        self.generator = np.random.default_rng(seed)

    def eps_at(self, node: Any) -> float:
        """What is not asked for here merges where it is equal."""
        return 0.0

    def factor(self, analysis: Analysis, node: Any, form: Form, size: int) -> Factor:
        """Colors of the nodes of a value; those of an output stay."""
        exact = color_form(form, size, 0.0, "fibration", analysis.roundoff)
        return exact if any(u.op == "output" for u in node.users) else self.choose(form, exact)

    def hidden(self, ref: Any, form: Form, exact: Factor) -> Factor:
        """Colors of the hidden nodes of a recurrent layer."""
        return self.choose(form, exact)

    def choose(self, form: Form, exact: Factor) -> Factor:
        """Colors of the nodes with these rows."""
        size = len(exact.labels)
        count = max(1, round(self.share * size))
        if count >= size:
            return exact
        rows = np.concatenate([form.rows.double().numpy(), form.offset[:, None]], 1)
        if self.method in ("cosine", "folding"):
            labels = self.clusters(rows, count)
            if form.must_match is not None:
                labels = np.unique(np.stack([labels, form.must_match]), axis=1,
                                   return_inverse=True)[1].reshape(-1)  # fmt: skip
            return Factor(exact.axes, labels + FIRST_FREE, np.ones(size), exact.space)
        score = {
            "random": self.generator.random(size),
            "l1": np.abs(rows).sum(1),
            "l2": np.square(rows).sum(1),
        }[self.method]
        labels = exact.labels.copy()
        labels[np.argsort(score, kind="stable")[: size - count]] = ZERO
        return Factor(exact.axes, labels, np.ones(size), exact.space)

    def clusters(self, rows: np.ndarray, count: int) -> np.ndarray:
        """Cluster numbers from 0."""
        if self.method == "cosine":
            unit = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-300)
            return fcluster(linkage(unit, "average", "cosine"), count, "maxclust").astype(int) - 1
        return kmeans2(rows, count, minit="++", seed=self.generator)[1].astype(np.int64)


def largest(size: Callable[[float], int], limit: float) -> float:
    """The largest share of nodes whose size is within the limit, by bisection."""
    low, high = 0.0, 1.0
    if size(high) <= limit:
        return high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) <= limit else (low, middle)
    return low


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def last_layer(model: nn.Module) -> nn.Module:
    """The layer that gives the scores."""
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]


def torch_pruning(model: nn.Module, method: str, share: float, example: Any) -> nn.Module:
    """A network of Torch-Pruning that keeps a share of the channels of every layer."""
    import torch_pruning as tp

    small = copy.deepcopy(model)
    importance = {
        "tp-magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "tp-fpgm": lambda: tp.importance.FPGMImportance(),
    }[method]()
    tp.pruner.BasePruner(
        small, example, importance, pruning_ratio=1 - share, ignored_layers=[last_layer(small)]
    ).step()
    return small


def made(
    model: nn.Module, method: str, compensation: str, target: float, seed: int,
    data: Data | Sentences, images: int,
) -> nn.Module:  # fmt: skip
    """One smaller network, of at most ``target`` of the parameters.

    Args:
        compensation: ``none``; ``noise`` or ``images``, fxfib's least squares; ``noise-refined`` or
            ``refined``, then passes over such inputs towards the original's outputs; ``trained``,
            then one pass over the training data with labels.
    """
    learned = compensation in ("images", "refined", "trained")
    calibration = data.calibration(seed, images) if learned else None
    refine = PASSES if compensation in ("noise-refined", "refined", "trained") else 0
    if method == "fxfib":
        small: nn.Module = fxfib.tune(
            model, example_inputs=data.example, params=target, calibration=calibration,
            compensate=compensation != "none", refine=refine, progress=False,
            dynamic_shapes=data.dynamic_shapes,
        )  # fmt: skip
    elif method in PRUNERS:
        limit = target * count(model)
        share = largest(lambda s: count(torch_pruning(model, method, s, data.example)), limit)
        small = torch_pruning(model, method, share, data.example)
    else:
        small = chosen(
            model, method, compensation != "none", refine, calibration, target, seed, data
        )
    if compensation == "trained":
        assert isinstance(data, Data), "sentences have no labels to train on once more"
        fxfib.finetune(
            small, data.batches(seed), nn.functional.cross_entropy, teacher=model, progress=False
        )
    return small


def chosen(
    model: nn.Module, method: str, compensate: bool, refine: int, calibration: Any,
    target: float, seed: int, data: Data | Sentences,
) -> nn.Module:  # fmt: skip
    """One of the other ways, rewritten and fitted by fxfib."""
    workshop = Workshop(
        model, data.example, calibration=calibration, compensate=compensate, refine=refine,
        dynamic_shapes=data.dynamic_shapes,
    )  # fmt: skip

    def size(share: float, by: str = method) -> int:
        return count(rewrite(workshop.graph_module, Chosen(by, share, seed))[1])

    # Where layers are coupled, which nodes go decides how many can; elsewhere a cheap way tells.
    limit = target * count(model)
    found = SHARES.setdefault(model, {})
    key = (method, target, seed)
    if key not in found:
        found[key] = largest(lambda s: size(s, "l1"), limit)
        if not NEAR * limit <= size(found[key]) <= limit:
            found[key] = largest(size, limit)
    share = found[key]
    rewriter, small = rewrite(workshop.graph_module, Chosen(method, share, seed))
    notes = workshop.fitted(rewriter, small)
    return workshop.raised(rewriter, small, 1.0, notes, verify=False)
