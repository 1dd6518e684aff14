"""What `fxfib.tune` costs, and what a search ten times as long would find.

    python bench/tune_cost.py --data-root FOLDER [--case mnist_mlp_loss] [--longer 10]

The default search is timed as users call it.  The longer one starts from its result and goes on
for `--longer` times as many CPU seconds (0 leaves that to a later call): at random (seed 0) it
moves nodes that stay from one group of layers to another, makes, fits (and refines, where the
result was) and measures such networks, and keeps what is smaller within the same loss.  Both see
the same inputs: calibration from the training images, losses on other training images; test images
play no part.

Who measures long enough finds networks that are lucky on the images that judge.  So both results
are measured on training images that neither has seen, too (`unseen_increase`,
`longer_unseen_increase`), and the default search looks for the smallest network that is as good
there as the longer one's (`unseen_found`): `unseen_ratio` is what the longer search really gained.

Cases with `_loss`: the smallest network whose cross-entropy rises by at most the limit; `_fitted`:
layer by layer, and not refined, which is most of what evaluations of a ResNet cost.
Others: a size, where nothing is evaluated, and only the time is of interest.  `resnet18_w64` has
the published widths and random weights, with statistics of batch norm from the images: what the
search costs does not depend on the weights.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
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
    "unseen_increase", "longer_unseen_increase", "unseen_found", "unseen_ratio", "threads", "torch",
)  # fmt: skip
# Part of a group's nodes that one move gives back or takes, at most.
MOVE = 0.1
VALIDATION = 5000
# Images that judge in the end.
UNSEEN = 5000
# Images of each class of CIFAR-10 to draw all of these from, and test images, which play no part.
ENOUGH = (1200, 200)


@dataclass(frozen=True)
class Aim:
    """What is searched.

    Attributes:
        network: a name of accuracy_networks, or a width of a ResNet-18 with random weights.
        target: options of :func:`fxfib.tune`.
    """

    network: str | int
    target: dict[str, Any]


RESNET = cifar_training.name_of("resnet18")
AIMS = {
    "mnist_mlp_loss": Aim("mnist_mlp", {"max_loss_increase": 0.02}),
    "mnist_mlp_params": Aim("mnist_mlp", {"params": 0.1}),
    "resnet18_w16_params": Aim(RESNET, {"params": 0.5}),
    "resnet18_w16_loss": Aim(RESNET, {"max_loss_increase": 0.05}),
    "resnet18_w16_loss_fitted": Aim(RESNET, {"max_loss_increase": 0.05, "refine": 0}),
    "resnet18_w64_params": Aim(64, {"params": 0.5}),
}


def network(aim: Aim, root: Path, cache: Path) -> tuple[nn.Module, Data, int]:
    """The original, its data, and how many images calibrate."""
    if isinstance(aim.network, str):
        case = CASES[aim.network]
        data = accuracy_networks.cifar(root, *ENOUGH) if aim.network == RESNET else case.data(root)
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
        assert search.path is not None and search.allocation is not None
        self.search, self.best, self.limit = search, best, limit
        self.curves: list[Curve] = list(search.path.curves)
        self.generator = np.random.default_rng(0)
        self.gone = np.array(search.gone)
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
        size = self.search.made(eps, None, measure=False).parameters
        if size >= self.best.parameters:
            return
        point = self.search.made(eps, None, measure=True, refine=self.best.refined)
        if point.loss is not None and point.loss <= self.limit:
            self.best, self.gone = point, gone


class Case:
    """A model with its inputs."""

    def __init__(self, name: str, root: Path, cache: Path) -> None:
        self.name, self.aim, self.cache = name, AIMS[name], cache
        self.model, data, self.images = network(self.aim, root, cache)
        self.example = (data.train[:2],)
        self.calibration = data.calibration(0, self.images)
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
        chosen, unseen = order[self.images :][: VALIDATION + UNSEEN].tensor_split([VALIDATION])
        self.pairs, self.unseen = (
            [(data.train[part], data.train_labels[part]) for part in some.split(250)]
            for some in (chosen, unseen)
        )

    def default(self) -> dict[str, Any]:
        """A row of what users call."""
        evaluated = "max_loss_increase" in self.aim.target
        start, worked = time.perf_counter(), time.process_time()
        small = fxfib.tune(
            self.model,
            self.pairs if evaluated else None,
            nn.functional.cross_entropy if evaluated else None,
            example_inputs=self.example, calibration=self.calibration, progress=False,
            **self.aim.target,
        )  # fmt: skip
        seconds, worked = time.perf_counter() - start, time.process_time() - worked
        frontier = small.fibration.frontier
        (found,) = (point for point in frontier if point.chosen)
        return {
            "case": self.name, "images": self.images,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "seconds": round(seconds, 1), "cpu_seconds": round(worked, 1),
            "evaluations": sum(point.loss is not None for point in frontier),
            "found": found.parameters, "limit": next(iter(self.aim.target.values())),
            "threads": torch.get_num_threads(), "torch": torch.__version__,
        }  # fmt: skip

    def longer(self, seconds: float) -> dict[str, Any]:
        """What a search of so many more CPU seconds adds to the row."""
        workshop = Workshop(
            self.model, self.example, criterion="energy", calibration=self.calibration,
            refine=self.aim.target.get("refine"),
        )  # fmt: skip
        evaluator = Evaluator(workshop.captured, self.pairs, nn.functional.cross_entropy)
        store = Store(str(self.cache / f"tune_cost_{self.name}.json"), workshop, evaluator)
        search, increase = Search(workshop, evaluator, store), self.aim.target["max_loss_increase"]
        best = search.within_loss(increase)
        more = Longer(search, best, evaluator.original + increase)
        start, steps, begun = time.perf_counter(), 0, time.process_time()
        with tqdm(total=round(seconds), desc=self.name, disable=None) as bar:
            while (passed := time.process_time() - begun) < seconds:
                more.step()
                steps += 1
                bar.update(round(passed) - bar.n)
        judge = Evaluator(workshop.captured, self.unseen, nn.functional.cross_entropy)
        ours, theirs = (judge.loss(search.network(p).small) for p in (best, more.best))
        fair = Search(workshop, judge, Store(None, workshop, judge))
        unseen = fair.within_loss(max(0.0, theirs - judge.original))
        return {
            "unseen_increase": round(ours - judge.original, 4),
            "longer_unseen_increase": round(theirs - judge.original, 4),
            "unseen_found": unseen.parameters,
            "unseen_ratio": round(unseen.parameters / more.best.parameters, 4),
            "loss_increase": round((best.loss or 0.0) - evaluator.original, 4),
            "longer_seconds": round(time.perf_counter() - start, 1), "longer_evaluations": steps,
            "longer_found": more.best.parameters,
            "ratio": round(best.parameters / more.best.parameters, 4),
        }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Make rows that are missing, or what is missing of them, and print them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", default=os.environ.get("FXFIB_DATA"))
    parser.add_argument("--case", default=",".join(AIMS), help="only these, comma-separated")
    parser.add_argument("--longer", type=float, default=10.0, help="times as long; 0: later")
    parser.add_argument("--cache", type=Path, default=Path("bench/cache"))
    parser.add_argument("--output", type=Path, default=Path("bench/results/tune_cost.csv"))
    options = parser.parse_args(arguments)
    if options.data_root is None:
        print("give --data-root, or set FXFIB_DATA", file=sys.stderr)
        return 1
    root, rows = Path(options.data_root), read(options.output)
    for name in options.case.split(","):
        row = next((row for row in rows if row["case"] == name), None)
        wanted = options.longer > 0 and "max_loss_increase" in AIMS[name].target
        if row is not None and (row.get("ratio") or not wanted):
            continue
        case = Case(name, root, options.cache)
        if row is None:
            rows.append(row := case.default())
            write(options.output, rows, COLUMNS)
        if wanted:
            row |= case.longer(options.longer * float(row["cpu_seconds"]))
            write(options.output, rows, COLUMNS)
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
