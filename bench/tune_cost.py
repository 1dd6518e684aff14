"""What `fxfib.tune` costs, and what a search ten times as long would find.

    python bench/tune_cost.py --data-root FOLDER [--case mnist_mlp_loss] [--longer 10]

The default search is timed as users call it.  The longer one starts from its result and goes on
for `--longer` times as many CPU seconds: at random (seed 0) it moves nodes that stay from one group
of layers to another, makes, fits (and refines, where the result was) and measures such networks,
and keeps what is smaller within the same loss.  Both see the same inputs: calibration from the
training images, losses on other training images; test images play no part.

Cases ending in `_loss`: the smallest network whose cross-entropy rises by at most the limit.
Others: a size, where nothing is evaluated, and only the time is of interest.  `resnet18_w64` has
the published widths and random weights, with statistics of batch norm from the images: what the
search costs does not depend on the weights.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accuracy_networks
import cifar_training
import numpy as np
import torch
from accuracy_networks import CASES, Data
from tables import read, write
from torch import nn
from tqdm import tqdm

import fxfib
from fxfib.evaluation import Evaluator
from fxfib.frontier import Point, Store
from fxfib.passes.curves import Curve
from fxfib.search import Search
from fxfib.workshop import Workshop

COLUMNS = (
    "case", "images", "parameters", "seconds", "cpu_seconds", "evaluations", "found",
    "loss_increase", "limit", "longer_seconds", "longer_evaluations", "longer_found", "ratio",
    "threads", "torch",
)  # fmt: skip
# Part of a group's nodes that one move gives back or takes, at most.
MOVE = 0.1
VALIDATION = 1000


@dataclass(frozen=True)
class Aim:
    """What is searched.

    Attributes:
        network: a name of accuracy_networks, or a width of a ResNet-18 with random weights.
        target: options of :func:`fxfib.tune`.
    """

    network: str | int
    target: dict[str, float]


RESNET = cifar_training.name_of("resnet18")
AIMS = {
    "mnist_mlp_loss": Aim("mnist_mlp", {"max_loss_increase": 0.02}),
    "mnist_mlp_params": Aim("mnist_mlp", {"params": 0.1}),
    "resnet18_w16_params": Aim(RESNET, {"params": 0.5}),
    "resnet18_w16_loss": Aim(RESNET, {"max_loss_increase": 0.05}),
    "resnet18_w64_params": Aim(64, {"params": 0.5}),
}


def network(aim: Aim, root: Path, cache: Path) -> tuple[nn.Module, Data, int]:
    """The original, its data, and how many images calibrate."""
    if isinstance(aim.network, str):
        case = CASES[aim.network]
        data = case.data(root)
        return accuracy_networks.trained(aim.network, root, data, 0, cache), data, case.images
    data = accuracy_networks.cifar(root, *accuracy_networks.CIFAR_IMAGES)
    torch.manual_seed(0)
    model = cifar_training.ResNet18(aim.network).train()
    with torch.no_grad():
        for batch in data.train[:512].split(128):
            model(batch)
    return model.eval(), data, 1024


class Longer:
    """Random moves from the point that the default search found.

    Args:
        search: one that has found it already.
        best: what it found.
        limit: the largest loss.
    """

    def __init__(self, search: Search, best: Point, limit: float) -> None:
        assert search.path is not None
        self.search, self.best, self.limit = search, best, limit
        self.curves: list[Curve] = list(search.path.curves)
        self.generator = np.random.default_rng(0)
        place = next(p for p, eps in search.precisions.items() if eps == best.eps)
        self.gone = np.array(search.path.gone[place])
        self.most = np.array([len(curve.lost) for curve in self.curves])
        self.fixed = np.array(search.path.gone[-1]) == 0

    def step(self) -> None:
        """One move, made and measured; kept where it is smaller within the limit."""
        gone = self.gone.copy()
        free = np.flatnonzero(~self.fixed)
        back, more = self.generator.choice(free, 2, replace=False)
        for group, sign in ((back, -1), (more, 1)):
            most = max(1, round(MOVE * self.curves[group].size))
            gone[group] += sign * self.generator.integers(0, most + 1)
        gone = gone.clip(0, self.most)
        refs = [curve.ref for curve in self.curves]
        eps = self.search.workshop.eps_for(dict(zip(refs, map(int, gone), strict=True)))
        size = self.search._made(eps, None, measure=False).parameters
        if size >= self.best.parameters:
            return
        point = self.search._made(eps, None, measure=True, refine=self.best.refined)
        if point.loss is not None and point.loss <= self.limit:
            self.best, self.gone = point, gone


def measure(
    name: str, root: Path, cache: Path, longer: float, announce: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """One row."""
    aim = AIMS[name]
    model, data, images = network(aim, root, cache)
    calibration = data.calibration(0, images)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[images:]
    chosen = order[:VALIDATION].split(250)
    pairs = [(data.train[part], data.train_labels[part]) for part in chosen]
    measured = "max_loss_increase" in aim.target
    start, worked = time.perf_counter(), time.process_time()
    small = fxfib.tune(
        model, pairs if measured else None, nn.functional.cross_entropy if measured else None,
        example_inputs=(data.train[:2],), calibration=calibration, progress=False, **aim.target,
    )  # fmt: skip
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    frontier = small.fibration.frontier
    evaluations = sum(point.loss is not None for point in frontier)
    (found,) = (point for point in frontier if point.chosen)
    row: dict[str, Any] = {
        "case": name, "images": images, "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 1), "cpu_seconds": round(worked, 1),
        "evaluations": evaluations, "found": found.parameters,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "limit": next(iter(aim.target.values())),
    }  # fmt: skip
    if not measured:
        return row
    announce(row)
    workshop = Workshop(
        model, (data.train[:2],), criterion="energy", calibration=calibration, refine=None
    )
    evaluator = Evaluator(workshop.captured, pairs, nn.functional.cross_entropy)
    store = Store(str(cache / f"tune_cost_{name}.json"), workshop, evaluator)
    search = Search(workshop, evaluator, store)
    best = search.within_loss(aim.target["max_loss_increase"])
    row["loss_increase"] = round((best.loss or 0.0) - evaluator.original, 4)
    search_longer = Longer(search, best, evaluator.original + aim.target["max_loss_increase"])
    start, steps, begun = time.perf_counter(), 0, time.process_time()
    with tqdm(total=round(longer * worked), desc=name, disable=None) as bar:
        while (passed := time.process_time() - begun) < longer * worked:
            search_longer.step()
            steps += 1
            bar.update(round(passed) - bar.n)
    row |= {
        "longer_seconds": round(time.perf_counter() - start, 1), "longer_evaluations": steps,
        "longer_found": search_longer.best.parameters,
        "ratio": round(best.parameters / search_longer.best.parameters, 4),
    }  # fmt: skip
    return row


def main(arguments: list[str] | None = None) -> int:
    """Make rows that are missing, and print them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", default=os.environ.get("FXFIB_DATA"))
    parser.add_argument("--case", default=",".join(AIMS), help="only these, comma-separated")
    parser.add_argument("--longer", type=float, default=10.0, help="times as long")
    parser.add_argument("--cache", type=Path, default=Path("bench/cache"))
    parser.add_argument("--output", type=Path, default=Path("bench/results/tune_cost.csv"))
    options = parser.parse_args(arguments)
    if options.data_root is None:
        print("give --data-root, or set FXFIB_DATA", file=sys.stderr)
        return 1
    rows = read(options.output)
    for name in options.case.split(","):
        if any(row["case"] == name for row in rows):
            continue
        row = measure(name, Path(options.data_root), options.cache, options.longer, print)
        rows.append(row)
        write(options.output, rows, COLUMNS)
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
