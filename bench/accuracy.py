"""Accuracy against parameters: fxfib beside other ways to make a trained network smaller.

    python bench/accuracy.py --data-root FOLDER [--seeds 0:5] [--output FILE.csv] [--plot]

The network is the MNIST perceptron of the published figures: 784-500-500-500-10, Adam 1e-3,
batches of 100, one pass, trained once for each seed and kept in `--cache`.  Every method makes
networks of at most the same number of parameters.  Calibration is 2,000 training images without
labels; test images choose nothing.  One row of the CSV is one network; rows that are there are not
made again.

Methods: `fxfib` is `fxfib.tune`.  The others keep the same part of the nodes in every hidden layer:
`random`, `l1`, `l2` (norms of rows, bias included, smallest dropped), `cosine` (the published
clustering, average linkage, rows averaged), `folding` (k-means of the rows, means; our own code
after the published description), `tp-magnitude`, `tp-fpgm` (Torch-Pruning's pruner, importances).
Compensation: `none`; `noise` and `images`, fxfib's least squares, the same for all; `refined`,
`images` and then 20 passes over these images towards the original's outputs.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.cluster.vq import kmeans2
from torch import Tensor, fx, nn
from tqdm import tqdm

import fxfib
from fxfib.coloring import FIRST_FREE, ZERO, Factor
from fxfib.files import move_into_place, staging_folder
from fxfib.passes.criteria import Policy
from fxfib.passes.forward import Analysis
from fxfib.signature import Form, color_form
from fxfib.workshop import Workshop, rewrite

FRACTIONS = (0.5, 0.3, 0.17, 0.1, 0.05, 0.025)
COLUMNS = (
    "network", "seed", "method", "compensation", "target", "parameters", "fraction", "macs",
    "accuracy", "original", "seconds", "torch",
)  # fmt: skip
HIDDEN, LAYERS = 500, 3
PASSES = 20


def perceptron(width: int = HIDDEN) -> nn.Sequential:
    """The published network, all hidden layers of one width."""
    sizes = [784, *[width] * LAYERS, 10]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def parameters(width: int) -> int:
    """Number of parameters at one width."""
    return 784 * width + width + (LAYERS - 1) * (width * width + width) + 10 * width + 10


class Data:
    """MNIST as the published experiments read it: pixels in [0, 1]."""

    def __init__(self, root: str) -> None:
        from torchvision.datasets import MNIST

        self.train, self.train_labels = self._split(MNIST(root, train=True))
        self.test, self.test_labels = self._split(MNIST(root, train=False))

    @staticmethod
    def _split(split: Any) -> tuple[Tensor, Tensor]:
        return split.data.flatten(1).float() / 255, split.targets

    def calibration(self, seed: int) -> Tensor:
        """2,000 training images without labels."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        return self.train[order[:2000]]

    def accuracy(self, model: nn.Module) -> float:
        """Test accuracy in percent."""
        with torch.no_grad():
            return 100 * float((model(self.test).argmax(1) == self.test_labels).float().mean())


def trained(data: Data, seed: int, cache: Path) -> nn.Sequential:
    """The network of a seed, from the cache or trained as published."""
    path = cache / f"mnist_mlp_{seed}.pt"
    torch.manual_seed(seed)
    model = perceptron()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    order = torch.randperm(len(data.train))
    for batch in tqdm(order.split(100), desc=f"train seed {seed}", leave=False):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(data.train[batch]), data.train_labels[batch])
        loss.backward()
        optimizer.step()
    cache.mkdir(parents=True, exist_ok=True)
    with staging_folder(path) as folder:
        torch.save(model.state_dict(), folder / path.name)
        move_into_place(folder / path.name, path)
    return model.eval()


class Chosen(Policy):
    """Another way to choose: a number of nodes of every value, dropped or clustered."""

    def __init__(self, method: str, share: float, seed: int) -> None:
        super().__init__(1.0)
        self.method = method
        self.share = share
        self.generator = np.random.default_rng(seed)

    def factor(self, analysis: Analysis, node: fx.Node, form: Form, size: int) -> Factor:
        """Colors of the nodes of a value; those of an output stay."""
        exact = color_form(form, size, 0.0, "fibration", analysis.roundoff)
        count = max(1, round(self.share * size))
        if any(user.op == "output" for user in node.users) or count >= size:
            return exact
        rows = np.concatenate([form.rows.double().numpy(), form.offset[:, None]], 1)
        if self.method in ("cosine", "folding"):
            labels = self.clusters(rows, count) + FIRST_FREE
            return Factor(exact.axes, labels, np.ones(size), exact.space)
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


def torch_pruning(model: nn.Module, method: str, width: int, example: Tensor) -> nn.Module:
    """A network of Torch-Pruning with hidden layers of one width."""
    import copy

    import torch_pruning as tp

    small = copy.deepcopy(model)
    importance = {
        "tp-magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "tp-fpgm": lambda: tp.importance.FPGMImportance(),
    }[method]()
    pruner = tp.pruner.BasePruner(
        small, example, importance, pruning_ratio=1 - width / HIDDEN, ignored_layers=[small[-1]]
    )
    pruner.step()
    return small


def made(
    model: nn.Module, method: str, compensation: str, target: float, seed: int, data: Data
) -> nn.Module:
    """One smaller network."""
    example = data.train[:2]
    images = data.calibration(seed) if compensation in ("images", "refined") else None
    refine = PASSES if compensation == "refined" else 0
    compensate = compensation != "none"
    if method == "fxfib":
        return fxfib.tune(
            model, example_inputs=(example,), params=target, calibration=images,
            compensate=compensate, refine=refine, progress=False,
        )  # fmt: skip
    limit = target * parameters(HIDDEN)
    width = max(w for w in range(1, HIDDEN + 1) if parameters(w) <= limit)
    if method.startswith("tp-"):
        return torch_pruning(model, method, width, example)
    workshop = Workshop(model, (example,), calibration=images, compensate=compensate, refine=refine)
    policy = Chosen(method, width / HIDDEN, seed)
    rewriter, small = rewrite(workshop.graph_module, policy)
    notes = workshop.fitted(rewriter, small)
    return workshop.raised(rewriter, small, 1.0, notes, verify=False)


def plan(fractions: tuple[float, ...]) -> Iterator[tuple[str, str, float]]:
    """What is made for every seed: method, compensation, target."""
    for target in fractions:
        for compensation in ("noise", "images", "refined", "none"):
            yield "fxfib", compensation, target
    for target in fractions:
        for method in ("random", "l1", "l2", "cosine", "folding"):
            for compensation in ("none", "noise", "images"):
                yield method, compensation, target
        for method in ("tp-magnitude", "tp-fpgm"):
            yield method, "none", target


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """What makes a row one of its kind."""
    return tuple(str(row[name]) for name in ("network", "seed", "method", "compensation", "target"))


def read(path: Path) -> list[dict[str, Any]]:
    """Rows that are there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """All rows, whole at any moment."""
    with staging_folder(path) as folder:
        with (folder / path.name).open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        move_into_place(folder / path.name, path)


def summary(rows: list[dict[str, Any]]) -> str:
    """Points below the original: median over seeds, smallest and largest."""
    groups: dict[tuple[str, str, float], list[float]] = {}
    for row in rows:
        name = row["method"], row["compensation"], float(row["target"])
        groups.setdefault(name, []).append(float(row["original"]) - float(row["accuracy"]))
    lines = [f"{'method':<14} {'compensation':<12} {'kept':>6} {'median':>8} {'from':>7} {'to':>7}"]
    for (method, compensation, target), below in sorted(groups.items()):
        lines.append(
            f"{method:<14} {compensation:<12} {target:>6} {statistics.median(below):>8.2f} "
            f"{min(below):>7.2f} {max(below):>7.2f}  ({len(below)} seeds)"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Median accuracy against the part of the parameters that is kept, from the rows alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), sharey=True)
    for panel, compensation in zip(axes, ("none", "noise", "images"), strict=True):
        chosen = [r for r in rows if r["compensation"] == compensation]
        for method in dict.fromkeys(r["method"] for r in chosen):
            points: dict[float, list[float]] = {}
            for row in chosen:
                if row["method"] == method:
                    points.setdefault(float(row["target"]), []).append(float(row["accuracy"]))
            shares = sorted(points)
            values = [statistics.median(points[s]) for s in shares]
            panel.plot(shares, values, marker="o", label=method)
        panel.set(title=f"compensation: {compensation}", xscale="log", xlabel="parameters kept")
        panel.legend()
    axes[0].set_ylabel("test accuracy in %, median over seeds")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    """Make what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", default=os.environ.get("FXFIB_DATA"))
    parser.add_argument("--seeds", default="0:5", help="first:last, the last not included")
    parser.add_argument("--fractions", default=",".join(map(str, FRACTIONS)))
    parser.add_argument("--methods", default="", help="only these, comma-separated")
    parser.add_argument("--cache", type=Path, default=Path("bench/cache"))
    parser.add_argument("--output", type=Path, default=Path("bench/results/accuracy_mnist.csv"))
    parser.add_argument("--plot", action="store_true", help="only draw, from the CSV")
    options = parser.parse_args(arguments)
    rows = read(options.output)
    if options.plot:
        plot(rows, options.output.with_suffix(".png"))
        return 0
    try:
        if options.data_root is None:
            raise RuntimeError("give --data-root, or set FXFIB_DATA")
        data = Data(options.data_root)
    except (OSError, RuntimeError) as error:
        print(f"MNIST cannot be had: {error}", file=sys.stderr)
        return 1
    first, last = map(int, options.seeds.split(":"))
    fractions = tuple(float(f) for f in options.fractions.split(","))
    done = {key(row) for row in rows}
    wanted = [
        (seed, *case)
        for case in plan(fractions)
        for seed in range(first, last)
        if not options.methods or case[0] in options.methods.split(",")
    ]
    models = {seed: trained(data, seed, options.cache) for seed in range(first, last)}
    originals = {seed: data.accuracy(model) for seed, model in models.items()}
    for seed, method, compensation, target in tqdm(wanted, desc="accuracy"):
        row: dict[str, Any] = {
            "network": "mnist_mlp", "seed": seed, "method": method,
            "compensation": compensation, "target": target,
        }  # fmt: skip
        if key(row) in done:
            continue
        start = time.perf_counter()
        small = made(models[seed], method, compensation, target, seed, data)
        seconds = time.perf_counter() - start
        size = sum(p.numel() for p in small.parameters())
        if size > math.floor(target * parameters(HIDDEN)):
            raise AssertionError(f"{method} made {size} parameters, more than {target} of all")
        widths = [m.weight.shape for m in small.modules() if isinstance(m, nn.Linear)]
        row |= {
            "parameters": size, "fraction": round(size / parameters(HIDDEN), 5),
            "macs": sum(a * b for a, b in widths), "accuracy": round(data.accuracy(small), 3),
            "original": round(originals[seed], 3), "seconds": round(seconds, 2),
            "torch": torch.__version__,
        }  # fmt: skip
        rows.append(row)
        write(options.output, rows)
    print(summary(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
