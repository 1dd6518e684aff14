"""Draws seconds and memory against n from the CSV alone: ``python bench/plot.py``."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
COLOURS = {
    "fxfib": "#d62728",
    "scipy": "#1f77b4",
    "scikit-learn": "#ff7f0e",
    "torch.cdist": "#2ca02c",
    "torch.unique": "#9467bd",
    "torch.sum": "#7f7f7f",
}


def panel(axes: Any, rows: list[dict[str, str]], column: str) -> None:
    """One line a provider."""
    for name, colour in COLOURS.items():
        points = sorted(
            (int(r["count"]), float(r[column]))
            for r in rows
            if r["provider"] == name and r[column] and float(r[column]) > 0
        )
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)


def draw(source: Path) -> list[Path]:
    """Two pictures, seconds and memory; one panel for each input and eps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with source.open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if int(r["count"]) >= 512]
    kinds = [k for k in ("random", "planted") if any(r["kind"] == k for r in rows)]
    shares = [
        s for s in ("0", "1e-5", "1e-3", "1e-2", "half") if any(r["share"] == s for r in rows)
    ]
    written = []
    for column, title in (("seconds", "seconds"), ("peak_mib", "MiB beyond the rows")):
        figure, grid = pyplot.subplots(
            len(kinds), len(shares), figsize=(3.2 * len(shares), 2.9 * len(kinds)),
            sharex=True, sharey=True, squeeze=False,
        )  # fmt: skip
        for kind, line in zip(kinds, grid, strict=True):
            for share, axes in zip(shares, line, strict=True):
                panel(axes, [r for r in rows if (r["kind"], r["share"]) == (kind, share)], column)
                name = {"0": "eps = 0", "half": "half of the rows merge"}.get(
                    share, f"eps = {share} of the spread"
                )
                axes.set_title(f"{kind}, {name}", fontsize=9)
            line[0].set_ylabel(title)
        for axes in grid[-1]:
            axes.set_xlabel("rows, of 512 columns")
        seen: dict[str, Any] = {}
        for axes in grid.flat:
            seen |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(seen.values(), seen.keys(), loc="lower center", ncols=len(seen) or 1)
        figure.tight_layout(rect=(0, 0.06, 1, 1))
        written.append(source.with_name(f"{source.stem}_{column}.png"))
        figure.savefig(written[-1], dpi=110)
        pyplot.close(figure)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw one CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, nargs="?", default=RESULTS / "coloring_cpu.csv")
    options = parser.parse_args(arguments)
    if not options.source.exists():
        print(
            f"bench: {options.source} is not there; run bench/coloring.py first.", file=sys.stderr
        )
        return 1
    for path in draw(options.source):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
