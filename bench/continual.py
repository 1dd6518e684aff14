"""Does a network go on learning, task after task?  Ways to keep it able to, side by side.

    python bench/continual.py mnist --data-root FOLDER [--seeds 0:3] [--methods sgd,breaking]
    python bench/continual.py cifar --data-root FOLDER         # or pairs
    python bench/continual.py imagenet --data-root FOLDER      # 5,000 tasks as published: days
    python bench/continual.py mnist --data-root FOLDER --tune  # options, on other seeds
    python bench/continual.py mnist --plot                     # pictures from the CSV alone

Settings: `mnist`, permuted MNIST at 14 x 14, a perceptron with three hidden layers of 100, 240
tasks of one pass over 3,200 images; `cifar`, the published network for 32 x 32 memorises random
labels of images of CIFAR-10, 80 tasks of 20 passes over 100 images; `pairs`, it tells classes of
CIFAR-10 apart two by two, 100 tasks of 20 passes over 200 images; `imagenet`, the published one.
All methods take the same number of gradient steps with the published optimizer (SGD, 0.02,
momentum 0.9); `seconds` is the time of a task's training, `own_seconds` the method's part of it.

Methods: `sgd`; `l2`, weight decay; `shrink`, shrink and perturb; `backprop`, continual
backpropagation; `breaking`, `fxfib.SymmetryBreaker` by energy; `covers`, the same by the weights
alone (cosine; the published options first).  The options of each are the best of its row of
OPTIONS (with `cifar`, FEWER) on the seeds of `--tune`, if these were run, else the first.

One row of the CSV is one task: test accuracy at its end, accuracy while it was learned (each batch
before its step; what counts with `cifar`, where the images to learn are those of the test, too),
and on up to 256 test images dead nodes (zero for all), redundant ones (dead, or at a correlation
above 0.95 with an earlier node of the layer), covers' redundant nodes by the weights alone,
effective rank of the last hidden layer, mean absolute weight.  What is there is not run again; a
run that was interrupted goes on at its last checkpoint.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from continual_methods import METHODS, name_of, options_of
from continual_tasks import JUDGED, SETTINGS, Setting, Task
from tables import Row, read, write
from torch import Tensor, nn
from tqdm import tqdm

import fxfib
from fxfib.files import move_into_place, staging_folder

COLUMNS = (
    "setting", "method", "options", "seed", "task", "accuracy", "online", "dead", "redundant",
    "covered", "rank", "weight", "replaced", "seconds", "own_seconds", "torch",
)  # fmt: skip
TUNING_SEEDS = range(1000, 1001)


class Run:
    """One method on one stream of tasks; it can be left and taken up again after any task."""

    def __init__(self, setting: Setting, method: str, options: dict[str, Any], seed: int) -> None:
        self.setting, self.method, self.options, self.seed = setting, method, options, seed
        torch.manual_seed(seed)
        self.model = setting.network()
        task = setting.stream(seed, 0)
        self.optimizer, self.keeper = METHODS[method](
            self.model, task.images[:16], setting, dict(options)
        )
        self.rows: list[Row] = []

    def next(self) -> Row:
        """Learn one task."""
        number, setting, model = len(self.rows), self.setting, self.model
        task = setting.stream(self.seed, number)
        if setting.fresh_head:
            with torch.no_grad():
                for parameter in model[-1].parameters():
                    parameter.zero_()
        source = torch.Generator().manual_seed(7919 * self.seed + number)
        right = steps = replaced = 0
        own = 0.0
        start = time.perf_counter()
        for _ in range(setting.passes):
            for batch in torch.randperm(len(task.labels), generator=source).split(setting.batch):
                self.optimizer.zero_grad()
                scores = model(task.images[batch])
                nn.functional.cross_entropy(scores, task.labels[batch]).backward()
                self.optimizer.step()
                right += int((scores.argmax(1) == task.labels[batch]).sum())
                steps += len(batch)
                if self.keeper is not None:
                    begin = time.perf_counter()
                    replaced += len(self.keeper.step(task.images[batch]))
                    own += time.perf_counter() - begin
        seconds = time.perf_counter() - start
        row = {
            "method": self.method, "options": name_of(self.options), "seed": self.seed,
            "task": number, "online": round(100 * right / steps, 3), "replaced": replaced,
            "seconds": round(seconds, 3), "own_seconds": round(own, 3),
            "torch": str(torch.__version__),
            **vital_signs(model, task, number % 20 == 0),
        }  # fmt: skip
        self.rows.append(row)
        return row

    def save(self, path: Path) -> None:
        """A checkpoint, whole or not at all."""
        state = {
            "rows": self.rows, "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(), "random": torch.get_rng_state(),
            "keeper": self.keeper.state_dict() if self.keeper is not None else None,
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        with staging_folder(path) as folder:
            torch.save(state, folder / path.name)
            move_into_place(folder / path.name, path)

    def load(self, path: Path) -> None:
        """Go on where :meth:`save` was called."""
        state = torch.load(path, weights_only=True)
        self.rows = state["rows"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.keeper is not None:
            self.keeper.load_state_dict(state["keeper"])
        torch.set_rng_state(state["random"])


@torch.no_grad()
def vital_signs(model: nn.Sequential, task: Task, covers: bool) -> Row:
    """Accuracy and figures of the hidden layers at the end of a task."""
    right = 0
    for images, labels in zip(
        task.test_images.split(500), task.test_labels.split(500), strict=True
    ):
        right += int((model(images).argmax(1) == labels).sum())
    hidden = task.test_images[:: max(1, len(task.test_images) // 256)][:256]
    dead = redundant = 0
    table = hidden
    for layer in model[:-1]:
        hidden = layer(hidden)
        if isinstance(layer, nn.ReLU):
            table = hidden.transpose(0, 1).flatten(1)
            dead += int((table.amax(1) == 0).sum())
            redundant += redundant_rows(table)
    singular = torch.linalg.svdvals(table)
    share = singular[singular > 0] / singular.sum()
    weights = torch.cat([p.flatten() for p in model.parameters() if p.ndim > 1])
    return {
        "accuracy": round(100 * right / len(task.test_labels), 3), "dead": dead,
        "redundant": redundant, "rank": round(float(torch.exp(-(share * share.log()).sum())), 2),
        "weight": round(float(weights.abs().mean()), 5),
        "covered": covered(model, task.images[:2]) if covers else "",
    }  # fmt: skip


def redundant_rows(table: Tensor, least: float = 0.95) -> int:
    """Rows that are constant, or correlate with an earlier one that does not."""
    centered = table - table.mean(1, keepdim=True)
    norms = centered.norm(dim=1)
    unit = centered[norms > 1e-6] / norms[norms > 1e-6, None]
    like = (unit @ unit.T).tril(-1) > least
    return len(table) - len(unit) + int(like.any(1).sum())


def covered(model: nn.Module, images: Tensor) -> int:
    """Nodes of hidden layers beyond the first of their cover, at the published precision."""
    found = fxfib.color(
        model, (images,), 0.8, "cover", criterion="cosine", opfiber_eps=0.5
    ).labels.values()  # fmt: skip
    return sum(len(labels) - int(labels.max()) - 1 for labels in list(found)[:-1])


def kind(row: Row) -> tuple[str, str, int]:
    """What makes a run one of its kind."""
    return row["method"], row["options"], int(row["seed"])


def perform(
    name: str, setting: Setting, plan: list[tuple[str, dict[str, Any], int]], path: Path,
    cache: Path, tasks: int, every: float = 30.0, minutes: float = math.inf,
) -> list[Row]:  # fmt: skip
    """Run what is missing of a plan; every so many seconds a checkpoint, and the CSV.

    After some minutes of the processor's time it is left for another call.
    """
    end = time.process_time() + 60 * minutes
    runs: dict[tuple[str, str, int], list[Row]] = {}
    for row in read(path):
        runs.setdefault(kind(row), []).append(row)
    bar = tqdm(total=len(plan) * tasks, unit="task", desc=name)
    for method, options, seed in plan:
        key = method, name_of(options), seed
        if len(runs.get(key, [])) >= tasks:
            bar.update(tasks)
            continue
        run = Run(setting, method, options, seed)
        checkpoint = cache / f"{name}-{method}-{name_of(options) or 'plain'}-{seed}.pt"
        if checkpoint.exists():
            run.load(checkpoint)
        bar.update(len(run.rows))
        saved = time.monotonic()
        while len(run.rows) < tasks:
            row = run.next()
            bar.update()
            bar.set_postfix_str(f"{method} {seed}: {row['accuracy']:.1f} %")
            over = time.process_time() > end
            if time.monotonic() - saved > every or len(run.rows) == tasks or over:
                run.save(checkpoint)
                runs[key] = [{"setting": name, **r} for r in run.rows]
                write(path, [r for own in runs.values() for r in own], COLUMNS)
                saved = time.monotonic()
            if over:
                break
        if time.process_time() > end:
            break
    bar.close()
    return [r for own in runs.values() for r in own]


def late(rows: list[Row], column: str, part: float = 0.25) -> dict[tuple[str, str], list[float]]:
    """Means over the last part of the tasks, one for each seed, by method and options."""
    found: dict[tuple[str, str], list[float]] = {}
    runs: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        runs.setdefault(kind(row), []).append(row)
    for (method, options, _), own in runs.items():
        last = own[-max(1, round(part * len(own))) :]
        values = [float(row[column]) for row in last if row[column] != ""]
        found.setdefault((method, options), []).append(statistics.fmean(values or [0.0]))
    return found


def chosen(setting: str, method: str, tuned: list[Row]) -> dict[str, Any]:
    """The best options on the tuning seeds, or the first."""
    offered, judged = options_of(setting, method), JUDGED[setting]
    found = {options: statistics.fmean(v) for (m, options), v in late(tuned, judged).items()
             if m == method}  # fmt: skip
    best = max(offered, key=lambda o: found.get(name_of(o), -1.0))
    return best if found else offered[0]


def table(rows: list[Row], judged: str = "accuracy") -> str:
    """What is judged: mean over seeds of the last quarter of the tasks, with the spread."""
    first = {k: statistics.fmean(v) for k, v in late(early(rows), judged, 1.0).items()}
    columns = (
        "accuracy",
        "online",
        "dead",
        "redundant",
        "rank",
        "weight",
        "replaced",
        "seconds",
        "own_seconds",
    )
    others = {column: late(rows, column) for column in columns}
    lines = ["method      options                         first    last  (from to)      " +
             " ".join(f"{c:>11}" for c in columns)]  # fmt: skip
    for (method, options), values in late(rows, judged).items():
        more = (statistics.fmean(others[c][method, options]) for c in columns)
        lines.append(
            f"{method:<11} {options:<30} {first[method, options]:>6.2f}  "
            f"{statistics.fmean(values):>6.2f}  ({min(values):.2f} {max(values):.2f})  "
            + " ".join(f"{v:>11.3f}" for v in more)
        )
    return "\n".join(lines)


def early(rows: list[Row], part: float = 0.125) -> list[Row]:
    """The first tasks."""
    limit = part * (1 + max((int(r["task"]) for r in rows), default=0))
    return [r for r in rows if int(r["task"]) < limit]


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--data-root", default=os.environ.get("FXFIB_DATA"))
    parser.add_argument("--seeds", default="0:3", help="first:last, the last not included")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--tasks", type=int, help="instead of the setting's own number")
    parser.add_argument("--tune", action="store_true", help="all OPTIONS, on the tuning seeds")
    parser.add_argument("--minutes", type=float, default=math.inf, help="then leave it")
    parser.add_argument("--cache", type=Path, default=Path("bench/cache"))
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="a folder")
    parser.add_argument("--plot", action="store_true", help="only draw, from the CSV")
    options = parser.parse_args(arguments)
    final = options.output / f"continual_{options.setting}.csv"
    tuning = options.output / f"continual_{options.setting}_tuning.csv"
    judged = JUDGED[options.setting]
    if options.plot:
        from continual_plot import plot

        plot(read(final), final.with_suffix(".png"))
        print(table(read(final), judged))
        return 0
    try:
        if options.data_root is None:
            raise RuntimeError("give --data-root, or set FXFIB_DATA")
        setting = SETTINGS[options.setting](options.data_root)
    except (OSError, RuntimeError) as error:
        print(f"the data cannot be had: {error}", file=sys.stderr)
        return 1
    methods = options.methods.split(",")
    if options.tune:
        offered = {m: options_of(options.setting, m) for m in methods}
        plan = [(m, o, s) for m in methods for o in offered[m] for s in TUNING_SEEDS]
        path, tasks = tuning, options.tasks or setting.tasks // 2
    else:
        first, last = map(int, options.seeds.split(":"))
        best = {m: chosen(options.setting, m, read(tuning)) for m in methods}
        plan = [(m, best[m], seed) for seed in range(first, last) for m in methods]
        path, tasks = final, options.tasks or setting.tasks
    rows = perform(
        options.setting, setting, plan, path, options.cache, tasks, minutes=options.minutes
    )
    print(table(rows, judged))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
