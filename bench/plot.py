"""Draws seconds and memory against n from the CSV alone: ``python bench/plot.py [CSV ...]``."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
# One look a provider, the same in every picture; ours is drawn last and thick.
LOOKS = {
    "torch.sum": ("#8c8c8c", "x", "torch.sum (reading floor)"),
    "torch.unique": ("#9467bd", "v", "torch.unique(dim=0)"),
    "torch.cdist pairs": ("#17becf", "D", "torch.cdist + threshold"),
    "torch.cdist": ("#2ca02c", "^", "torch.cdist + threshold + components"),
    "scikit-learn": ("#ff7f0e", "s", "scikit-learn, precomputed"),
    "scipy": ("#1f77b4", "P", "scipy pdist + linkage"),
    "fxfib": ("#d62728", "o", "fxfib"),
}
KINDS = ("random", "planted")
SHARES = {
    "0": "eps = 0",
    "1e-5": "eps = 1e-5 of the spread",
    "1e-3": "eps = 1e-3 of the spread",
    "1e-2": "eps = 1e-2 of the spread",
    "half": "half of the rows merge",
}
COLUMNS = {"seconds": "seconds", "peak_mib": "MiB beyond the rows"}
# A peak of nothing has no place on a logarithmic axis; the kernel counts in pages anyway.
LEAST = {"seconds": 0.0, "peak_mib": 1.0}

Point = tuple[int, float, float, float]


def series(rows: list[dict[str, str]], column: str) -> dict[str, list[Point]]:
    """For every provider: rows, median, smallest and largest; of right answers only."""
    found: dict[str, list[Point]] = {}
    for row in rows:
        if row["status"] != "right" or not row[column] or row["provider"] not in LOOKS:
            continue
        value = max(LEAST[column], float(row[column]))
        low, high = (
            (float(row["seconds_min"]), float(row["seconds_max"]))
            if column == "seconds"
            else (value, value)
        )
        found.setdefault(row["provider"], []).append((int(row["count"]), value, low, high))
    return {name: sorted(found[name]) for name in LOOKS if name in found}


def plain(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Colorings of one float32 matrix of 512 columns: the rows that differ in n, eps and input."""
    wanted = {"operation": "color", "batch": "1", "width": "512", "dtype": "float32"}
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def panel(axes: Any, rows: list[dict[str, str]], column: str) -> None:
    """One line a provider, from the fastest to the slowest run."""
    for name, points in series(rows, column).items():
        colour, marker, label = LOOKS[name]
        count, middle, low, high = zip(*points, strict=True)
        thick = 2.4 if name == "fxfib" else 1.4
        axes.plot(count, middle, color=colour, marker=marker, markersize=5, lw=thick, label=label)
        axes.fill_between(count, low, high, color=colour, alpha=0.18, lw=0)
    counts = sorted({int(row["count"]) for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(counts, [f"{count:,}" for count in counts], rotation=45, fontsize=8)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def draw(source: Path) -> list[Path]:
    """Two pictures, seconds and memory; a panel for each input and eps that has rows.

    Returns:
        The files, beside the CSV.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with source.open(newline="") as file:
        rows = plain(list(csv.DictReader(file)))
    written = []
    for column, title in COLUMNS.items():
        drawn = [row for row in rows if row["status"] == "right" and row[column]]
        kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in drawn)]
        shares = [share for share in SHARES if any(row["share"] == share for row in drawn)]
        if not drawn or not kinds:
            continue
        figure, grid = pyplot.subplots(
            len(kinds),
            len(shares),
            figsize=(max(7.5, 3.1 * len(shares)), 3.1 * len(kinds) + 0.7),
            sharey=True,
            squeeze=False,
        )
        for kind, line in zip(kinds, grid, strict=True):
            for share, axes in zip(shares, line, strict=True):
                here = [row for row in drawn if (row["kind"], row["share"]) == (kind, share)]
                if not here:
                    axes.set_axis_off()
                    continue
                panel(axes, here, column)
                axes.set_title(f"{kind}, {SHARES[share]}", fontsize=9)
            line[0].set_ylabel(title)
        legend: dict[str, Any] = {}
        for axes in grid.flat:
            legend |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.supxlabel("rows of 512 columns, float32", fontsize=10, y=0.07)
        names = [label for _, _, label in reversed(LOOKS.values()) if label in legend]
        handles = [legend[name] for name in names]
        figure.legend(handles, names, loc="lower center", ncols=min(6, len(names)), fontsize=9)
        row = drawn[0]
        figure.suptitle(
            f"{row['machine']}, {row['threads']} threads, torch {row['torch']}", fontsize=9
        )
        figure.tight_layout(rect=(0, 0.05, 1, 1))
        written.append(source.with_name(f"{source.stem}_{column}.png"))
        figure.savefig(written[-1], dpi=110)
        pyplot.close(figure)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw every CSV that is given, or all there are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", type=Path, nargs="*")
    options = parser.parse_args(arguments)
    sources = options.sources or sorted(RESULTS.glob("coloring_*.csv"))
    missing = [str(source) for source in sources if not source.exists()]
    if missing or not sources:
        what = ", ".join(missing) or f"a CSV in {RESULTS}"
        print(f"bench: {what} is not there; run bench/coloring.py first.", file=sys.stderr)
        return 1
    for source in sources:
        for path in draw(source):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
