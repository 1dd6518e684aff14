"""What the rows say about the goals, and how fast the device could be."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OTHERS = ("scipy", "scikit-learn", "torch.cdist")


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """One line a goal: what was measured and whether it holds."""
    lines = []
    for kind, count, share, name, found in fastest_others(rows):
        lines.append(f"{kind}, n = {count}, eps {share}: {found:.4g} x faster than {name}")
    for kind in ("random", "planted"):
        for share in ("1e-5", "1e-3", "1e-2", "0"):
            points = [
                (math.log(int(r["count"])), math.log(float(r["seconds"])))
                for r in rows
                if (r["kind"], r["share"], r["provider"]) == (kind, share, "fxfib")
                and r.get("seconds") and int(r["count"]) >= 4096
            ]  # fmt: skip
            if len(points) > 2:
                slope = statistics.linear_regression(*zip(*points, strict=True)).slope
                lines.append(f"{kind}, eps {share}: time grows like n^{slope:.2f}")
    for row in rows:
        if row["provider"] == "fxfib" and row.get("peak_mib"):
            lines.append(
                f"{row['kind']}, n = {row['count']}, eps {row['share']}: {row['peak_mib']} MiB "
                f"beyond {float(row['rows_mib']):.0f} MiB of rows, {row['seconds']} s"
            )
    bad = [r for r in rows if r["status"] != "right" and not str(r["status"]).startswith("left")]
    lines += [f"WRONG: {r['provider']} on {r['kind']} {r['count']}: {r['status']}" for r in bad]
    return lines


def fastest_others(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, str, str, float]]:
    """For every case the fastest of the other tools that give colors, and its ratio to ours."""
    keys = dict.fromkeys((r["kind"], str(r["count"]), r["share"]) for r in rows)
    for key in keys:
        same = [r for r in rows if (r["kind"], str(r["count"]), r["share"]) == key]
        exact = key[2] == "0"
        names = ("torch.unique", "torch.sum") if exact else OTHERS
        timed = [r for r in same if r["provider"] in names and r.get("ratio")]
        if exact:
            for row in timed:
                yield *key, row["provider"], float(row["ratio"])
        elif timed:
            best = min(timed, key=lambda r: float(r["ratio"]))
            yield *key, best["provider"], float(best["ratio"])


def device_ceilings(output: Path, about: dict[str, Any]) -> None:
    """Bytes and comparisons a second that the device reaches, ours beside them, as CSV rows.

    The batched case is every up-projection of a language model with 7 billion parameters: 32
    matrices of 11,008 x 4,096 in bfloat16.
    """
    from fxfib.kernels import color, color_batch

    rows: list[dict[str, Any]] = []

    def add(name: str, unit: str, amount: float, seconds: float) -> None:
        rows.append({"what": name, "unit": unit, "per_second": f"{amount / seconds:.4g}",
                     "seconds": f"{seconds:.4g}", **about})  # fmt: skip

    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    add("copy", "bytes", 2.0 * source.numel(), timed(source.clone))
    left = torch.randn(4096, 512, device="cuda")
    seconds = timed(lambda: torch.cdist(left, left, p=float("inf")))
    add("torch.cdist(p=inf)", "comparisons", 4096.0**2 * 512, seconds)
    for count in (8192, 65536):
        matrix = torch.randn(count, 512, device="cuda")
        seconds = timed(lambda: color(matrix, 1e-2))  # noqa: B023
        add(f"coloring of {count} rows", "bytes", 4.0 * matrix.numel(), seconds)
        add(f"coloring of {count} rows", "pairs", count * (count - 1) / 2, seconds)
    layers: list[Tensor] = []
    for seed in range(32):
        generator = torch.Generator("cuda").manual_seed(seed)
        layer = torch.empty(11008, 4096, device="cuda", dtype=torch.bfloat16)
        layers.append(layer.normal_(0, 0.02, generator=generator))
    seconds = timed(lambda: color_batch(layers, 1e-3), repeats=3)
    add("32 x 11,008 x 4,096 bfloat16", "bytes", 2.0 * 32 * 11008 * 4096, seconds)
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def timed(run: Any, repeats: int = 7) -> float:
    """Median seconds of a call on the device, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    return statistics.median(seconds[1:])
