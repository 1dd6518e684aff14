"""The report as matplotlib figures."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fxfib.errors import InputError

if TYPE_CHECKING:
    from fxfib.benchmarking import Benchmark
    from fxfib.curve import CurvePoint
    from fxfib.layers import Layer
    from fxfib.report import Report

MOST = 40
ACCENT, TRACK, CONSTANT, UNREAD, SINGLE = "#2f6bff", "#e0e5ec", "#e0a11b", "#4d5865", "#c3cdd9"


def figures(report: Report, curve: Sequence[CurvePoint] = ()) -> list[Any]:
    """See :meth:`fxfib.Report.plot`.

    Returns:
        ``matplotlib.figure.Figure``: the groups that lost most nodes, the layers colored by fiber,
        frontier and eps curve where there is one.  They belong to no window and need no closing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install 'fxfib[plot]'.") from error
    made = [_groups(Figure, report)]
    if report.layers:
        made.append(_layers(Figure, report))
    if report.frontier:
        made.append(_frontier(Figure, report))
    if curve:
        made.append(_curve(Figure, report, curve))
    return made


def latency_figure(result: Benchmark) -> Any:
    """See :meth:`fxfib.Benchmark.plot`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install 'fxfib[plot]'.") from error
    made = Figure(figsize=(8, 1.4 + 0.5 * max(len(result.rows), 1)), layout="constrained")
    axes = made.add_subplot()
    places = np.arange(len(result.rows))[::-1]
    for name, shift, color in (("original", 0.2, SINGLE), ("small", -0.2, ACCENT)):
        middle, low, high = (
            np.array([getattr(row, f"{name}_{part}") for row in result.rows])
            for part in ("ms", "low_ms", "high_ms")
        )
        spread = np.abs(np.stack([middle - low, high - middle])) if len(middle) else None
        axes.barh(places + shift, middle, 0.38, xerr=spread, color=color, label=name)
    names = [f"{r.runtime}, {r.device}, batch {r.batch}: {r.ratio:.2f} x" for r in result.rows]
    axes.set_yticks(places, names, fontsize=8)
    axes.set_xlabel("milliseconds a call")
    axes.set_title(_label(f"{result.model}: latency"))
    axes.legend(frameon=False)
    return made


def _title(report: Report, what: str) -> str:
    name = report.model if len(report.model) <= 60 else report.model[:57] + "..."
    # A dollar sign would start mathematics.
    return f"{name}, eps {report.eps:g}: {what}".replace("$", r"\$")


def _label(name: str) -> str:
    return (name if len(name) <= 40 else "..." + name[-37:]).replace("$", r"\$")


def _groups(figure: Any, report: Report) -> Any:
    groups = sorted(report.groups, key=lambda group: group.fibers - group.nodes)[:MOST][::-1]
    made = figure(figsize=(8, 1.2 + 0.24 * max(len(groups), 1)), layout="constrained")
    axes = made.add_subplot()
    places = np.arange(len(groups))
    left = np.zeros(len(groups))
    parts = (("fibers", ACCENT), ("merged", TRACK), ("constant", CONSTANT), ("unread", UNREAD))
    for name, color in parts:
        values = np.array([getattr(group, name) for group in groups], dtype=float)
        axes.barh(places, values, left=left, color=color, label=name)
        left += values
    names = [
        _label(g.members[0] + (f" +{len(g.members) - 1}" if len(g.members) > 1 else ""))
        for g in groups
    ]
    axes.set_yticks(places, names, fontsize=8)
    axes.set_xlabel("nodes")
    axes.set_title(_title(report, "nodes of every group"))
    axes.legend(frameon=False, ncols=4, fontsize=8)
    return made


def _layers(figure: Any, report: Report) -> Any:
    """Every layer as a strip of its nodes, members of a fiber in one color."""
    layers = report.layers[:MOST]
    made = figure(figsize=(max(4.0, 0.34 * len(layers) + 1.5), 4.6), layout="constrained")
    axes = made.add_subplot()
    widest = max(len(layer.slots) for layer in layers) or 1
    for place, layer in enumerate(layers):
        height = 0.22 + 0.78 * (len(layer.slots) / widest) ** 0.5
        axes.imshow(
            _strip(layer), aspect="auto", interpolation="nearest",
            extent=(place - 0.36, place + 0.36, 0.5 - height / 2, 0.5 + height / 2),
        )  # fmt: skip
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks([])
    names = [f"{_label(layer.name)}\n{len(layer.slots)} to {layer.fibers}" for layer in layers]
    axes.set_xticks(range(len(layers)), names, rotation=90, fontsize=7)
    more = "" if len(report.layers) <= MOST else f" (the first {MOST})"
    axes.set_title(_title(report, f"layers, colored by fiber{more}"))
    return made


def _strip(layer: Layer) -> np.ndarray:
    slots = np.array(layer.slots, dtype=np.int64)
    order = np.argsort(np.where(slots < 0, len(slots) - slots, slots), kind="stable")
    counts = np.bincount(slots[slots >= 0], minlength=layer.fibers)
    colors = np.empty((max(len(slots), 1), 1, 3))
    for row, slot in enumerate(slots[order]):
        if slot < 0:
            code = CONSTANT if slot == -1 else UNREAD
        elif counts[slot] == 1:
            code = SINGLE
        else:
            colors[row, 0] = colorsys.hls_to_rgb((slot * 0.381966 + 0.6) % 1.0, 0.5, 0.62)
            continue
        colors[row, 0] = [int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return colors


def _frontier(figure: Any, report: Report) -> Any:
    """What was measured; where nothing was, what was predicted (another quantity)."""
    made = figure(figsize=(6.4, 4.0), layout="constrained")
    axes = made.add_subplot()
    measured = any(point.loss is not None for point in report.frontier)
    points = sorted(
        (point.parameters, value, point.chosen)
        for point in report.frontier
        if (value := point.loss if measured else point.predicted) is not None
    )
    axes.plot([p[0] for p in points], [p[1] for p in points], "o-", color=ACCENT)
    chosen = [p for p in points if p[2]]
    axes.plot([p[0] for p in chosen], [p[1] for p in chosen], "o", ms=11, color=CONSTANT)
    axes.set_xlabel("parameters")
    axes.set_ylabel("loss" if measured else "predicted share of energy lost")
    axes.set_title(_title(report, "size against loss"))
    return made


def _curve(figure: Any, report: Report, curve: Sequence[CurvePoint]) -> Any:
    """What is kept and what it costs, eps by eps."""
    made = figure(figsize=(6.4, 5.0), layout="constrained")
    above, below = made.subplots(2, 1, sharex=True)
    places = range(len(curve))
    above.plot(places, [100 * point.parameters_kept for point in curve], "o-", color=ACCENT)
    above.set_ylabel("parameters kept (%)")
    errors = [float("nan") if p.error is None else 100 * p.error for p in curve]
    below.plot(places, errors, "o-", color=CONSTANT)
    below.set_ylabel("relative error (%)")
    below.set_xticks(places, [f"{point.eps:g}" for point in curve])
    below.set_xlabel("eps")
    above.set_title(_title(report, "size and error at every eps"))
    return made
