"""What the CSV says about the goals: each with its figure, and whether it holds."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from measure import LEFT_OUT, RIGHT
from registry import OURS, RIVALS

Row = dict[str, str]

SMALL = ("1e-5", "1e-3", "1e-2")
MOST_GROWTH = 1.3
# MiB of a matrix of n^2 float64 at n = 32,768.
SQUARE = 32768**2 * 8 / 2**20
COMPILE_SECONDS = {"resnet50": 1.5, "vit_l_16": 15.0, "llama_1b": 120.0}


@dataclass(frozen=True)
class Gate:
    """One goal.

    Attributes:
        goal: what is asked for.
        measured: the figure; empty where there is none.
        holds: None where nothing was measured.
    """

    goal: str
    measured: str = ""
    holds: bool | None = None

    def __str__(self) -> str:
        verdict = {True: "holds", False: "does not hold", None: "not measured"}[self.holds]
        return f"{verdict:13}  {self.goal}" + (f": {self.measured}" if self.measured else "")


def summary(rows: list[Row], device: str, compile_cost: Path | None = None) -> list[str]:
    """The goals for a device, then what was wrong, failed or left out."""
    gates = [*cpu_gates(rows), *compile_gates(compile_cost)]
    lines = list(map(str, gates if device == "cpu" else cuda_gates(rows)))
    if device == "cuda":
        lines += shares_of_ceilings(rows)
    for row in rows:
        if row["status"] != RIGHT and not row["status"].startswith(LEFT_OUT):
            lines.append(f"{row['status']}: {row['provider']}, {question(row)}")
    left = sum(row["status"].startswith(LEFT_OUT) for row in rows)
    return [*lines, f"{len(rows)} rows, {left} of them left out (too long, too large or no data)"]


def cpu_gates(rows: list[Row]) -> Iterator[Gate]:
    """The goals without a GPU."""
    for kind in ("random", "planted"):
        for share in SMALL:
            goal = f"{kind}, n = 8192, eps {share}: 40 x faster than the fastest other tool"
            yield ratio_gate(rows, goal, RIVALS, 40.0, kind, 8192, share)
    for kind in ("random", "planted"):
        for share in SMALL:
            goal = f"{kind}, n = 65536, eps {share}: within 4 GiB"
            yield memory_gate(rows, goal, 4096.0, kind, 65536, share)
    for kind in ("random", "planted"):
        for share in SMALL:
            yield growth_gate(rows, kind, share)
    for count in (4096, 8192):
        goal = f"random, n = {count}, half of the rows merge: not slower than scipy"
        yield ratio_gate(rows, goal, ("scipy",), 1.0, "random", count, "half")
    goal = "random, n = 32768, half of the rows merge: no n^2 matrix of float64"
    yield memory_gate(rows, goal, SQUARE, "random", 32768, "half")
    for kind in ("random", "planted"):
        goal = f"{kind}, n = 65536, eps 0: 2 x faster than torch.unique"
        yield ratio_gate(rows, goal, ("torch.unique",), 2.0, kind, 65536, "0")
        goal = f"{kind}, n = 65536, eps 0: at most 8 x the time of torch.sum"
        yield ratio_gate(rows, goal, ("torch.sum",), 1 / 8, kind, 65536, "0")


def cuda_gates(rows: list[Row]) -> Iterator[Gate]:
    """The goals on a GPU."""
    rivals = ("torch.cdist", "torch.cdist pairs")
    for kind in ("random", "planted"):
        for count in (8192, 16384, 32768, 65536):
            for share in SMALL:
                goal = f"{kind}, n = {count}, eps {share}: 20 x faster than torch.cdist"
                yield ratio_gate(rows, goal, rivals, 20.0, kind, count, share)


def compile_gates(source: Path | None) -> Iterator[Gate]:
    """Seconds of a compile after capture, which ``bench/compile_cost.py`` measures."""
    found: list[Row] = []
    if source is not None and source.exists():
        with source.open(newline="") as file:
            found = [row for row in csv.DictReader(file) if float(row["lifted_by"]) == 1.0]
    for model, limit in COMPILE_SECONDS.items():
        goal = f"compile of {model} after capture within {limit:g} s"
        seconds = [float(row["compile_s"]) for row in found if row["model"] == model]
        if seconds:
            yield Gate(goal, f"{seconds[-1]:.2f} s", seconds[-1] <= limit)
        else:
            yield Gate(f"{goal} (bench/compile_cost.py {model})")


def select(rows: list[Row], kind: str, count: int, share: str, provider: str = "") -> list[Row]:
    """Rows of one coloring of float32, 512 columns."""
    wanted = ("color", kind, "1", str(count), "512", "float32", share)
    names = ("operation", "kind", "batch", "count", "width", "dtype", "share")
    return [
        row
        for row in rows
        if tuple(row[name] for name in names) == wanted and provider in ("", row["provider"])
    ]


def ratio_gate(
    rows: list[Row], goal: str, rivals: tuple[str, ...], least: float, *where: object
) -> Gate:
    """The smallest median ratio of others' seconds to ours, against what is asked for."""
    same = select(rows, *where)  # type: ignore[arg-type]
    wrong = [r for r in same if r["provider"] == OURS and r["status"] != RIGHT]
    if wrong:
        return Gate(goal, f"ours is {wrong[0]['status']}", False)
    timed = [row for row in same if row["provider"] in rivals and row["ratio"]]
    if not timed:
        return Gate(goal)
    best = min(timed, key=lambda row: float(row["ratio"]))
    ratio = float(best["ratio"])
    low, high = float(best["ratio_min"]), float(best["ratio_max"])
    measured = (
        f"{ratio:.3g} x {best['provider']} ({low:.3g} to {high:.3g}, {best['rounds']} rounds)"
    )
    # A rival that was left out might have been the fastest.
    missing = [name for name in rivals if name not in {row["provider"] for row in timed}]
    measured += f"; no time of {', '.join(missing)}" if missing and len(rivals) > 2 else ""
    return Gate(goal, measured, ratio >= least)


def memory_gate(rows: list[Row], goal: str, most: float, *where: object) -> Gate:
    """Peak memory of ours, the rows included."""
    for row in select(rows, *where, provider=OURS):  # type: ignore[arg-type, misc]
        if row["peak_mib"]:
            peak, held = float(row["peak_mib"]), float(row["rows_mib"])
            measured = (
                f"{peak:.0f} MiB beyond {held:.0f} MiB of rows, {float(row['seconds']):.3g} s"
            )
            return Gate(goal, measured, peak + held < most)
    return Gate(goal)


def growth_gate(rows: list[Row], kind: str, share: str) -> Gate:
    """The slope of log seconds over log n."""
    goal = f"{kind}, eps {share}: time grows no faster than n^{MOST_GROWTH:g}, 4096 to 65536"
    points = []
    for count in (4096, 8192, 16384, 32768, 65536):
        for row in select(rows, kind, count, share, OURS):
            if row["seconds"]:
                points.append((math.log(count), math.log(float(row["seconds"]))))
    if len(points) < 5:
        return Gate(goal)
    slope = statistics.linear_regression(*zip(*points, strict=True)).slope
    return Gate(goal, f"n^{slope:.2f}", slope <= MOST_GROWTH)


def shares_of_ceilings(rows: list[Row]) -> Iterator[str]:
    """What ours reaches of what the device can do at all.

    Reading: bytes of the rows a second, over the bytes a second that a copy moves.  Comparing:
    pairs decided a second, over the comparisons a second of a kernel that does nothing else; a pair
    takes at least one comparison, and one that shares many entries takes many.
    """
    ceiling = {row["provider"]: row for row in rows if row["operation"] == "ceiling"}
    copy, compare = ceiling.get("copy"), ceiling.get("compare")
    if not copy or not compare:
        return
    yield f"ceiling: {float(copy['bytes_per_s']):.3g} bytes/s copied"
    yield f"ceiling: {float(compare['comparisons_per_s']):.3g} comparisons/s"
    for row in rows:
        if row["provider"] == OURS and row.get("comparisons_per_s"):
            reads = float(row["bytes_per_s"])
            pairs = float(row["comparisons_per_s"])
            yield (
                f"{question(row)}: {reads:.3g} bytes/s ({reads / float(copy['bytes_per_s']):.1%}), "
                f"{pairs:.3g} pairs/s ({pairs / float(compare['comparisons_per_s']):.1%})"
            )


def question(row: Row) -> str:
    """A case as words."""
    return f"{row['operation']} {row['kind']} {row['batch']} x {row['count']} x {row['width']} " + (
        f"{row['dtype']}, eps {row['share']}"
    )
