"""Pictures of bench/continual.py, from the rows of its CSV alone."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

PANELS = {
    "accuracy": "accuracy after the task, %", "online": "accuracy while learning, %",
    "redundant": "redundant nodes", "dead": "dead nodes", "rank": "effective rank, last layer",
    "weight": "mean absolute weight",
}  # fmt: skip


def binned(
    rows: list[dict[str, Any]], method: str, column: str, bins: int = 24
) -> tuple[list[float], list[list[float]]]:
    """Middles of the bins, and in each the means of every seed."""
    own = [row for row in rows if row["method"] == method]
    tasks = 1 + max(int(row["task"]) for row in own)
    width = max(1, tasks // bins)
    means: dict[int, dict[str, list[float]]] = {}
    for row in own:
        seeds = means.setdefault(int(row["task"]) // width, {})
        seeds.setdefault(row["seed"], []).append(float(row[column]))
    full = sorted(k for k in means if (k + 1) * width <= tasks)
    return (
        [(k + 0.5) * width for k in full],
        [[statistics.fmean(v) for v in means[k].values()] for k in full],
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Means of the seeds over the tasks, and from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = {(row["method"], row["options"]) for row in rows}
    several = {m for m, o in kinds if sum(other == m for other, _ in kinds) > 1}
    rows = [
        {**r, "method": f"{r['method']} {r['options']}"} if r["method"] in several else r
        for r in rows
    ]
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8))
    for panel, (column, title) in zip(axes.flat, PANELS.items(), strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            middles, seeds = binned(rows, method, column)
            panel.plot(middles, [statistics.fmean(own) for own in seeds], label=method)
            panel.fill_between(
                middles, [min(own) for own in seeds], [max(own) for own in seeds], alpha=0.2
            )
        panel.set(title=title, xlabel="task")
    figure.tight_layout()
    # Options are long names: below the panels they hide nothing.
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, names, title="mean of the seeds, lowest to highest",
        loc="upper left", bbox_to_anchor=(0.02, 0.0), ncols=2,
    )  # fmt: skip
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
