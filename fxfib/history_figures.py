"""A training run as matplotlib figures, in the manner of the paper's Fig. 3a and Fig. S7."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fxfib.errors import InputError
from fxfib.history import History

#: Panels of one figure.
MOST = 24
STYLES = {"fiber": ("#16202c", "-"), "opfiber": ("#2f6bff", "--"), "cover": ("#12a67a", ":")}
LOGGED = ("#2e9e4f", "#b25e09", "#8d44ad", "#c2334d")


def figures(history: History, title: str) -> list[Any]:
    """See :meth:`fxfib.Monitor.plot`.

    Returns:
        ``matplotlib.figure.Figure``: all layers and what was logged; fibers, opfibers and covers of
        every layer; dead nodes, effective ranks and weight norms.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install 'fxfib[plot]'.") from error
    return [
        _together(Figure, history, title),
        _layers(Figure, history, title),
        _signs(Figure, history, title),
    ]


def safe(text: str, most: int = 40) -> str:
    """A name that fits, and in which a dollar sign starts no mathematics."""
    return (text if len(text) <= most else "..." + text[3 - most :]).replace("$", r"\$")


def _steps(history: History) -> list[int]:
    return [look.step for look in history.looks]


def _together(figure: Any, history: History, title: str) -> Any:
    """Fig. 3a: the share of nodes that are classes of their own falls while the network learns."""
    made = figure(figsize=(7.6, 4.6), layout="constrained")
    axes = made.add_subplot()
    names = list(history.layers)[:MOST]
    for at, name in enumerate(names):
        shade = 0.75 * at / max(1, len(names) - 1)
        singles = history.singles(name) / max(1, history.layers[name])
        axes.plot(_steps(history), singles, "--", color=(shade,) * 3, label=safe(name, 24))
    axes.set_xlabel("step")
    axes.set_ylabel("fibers of one node, share of the layer")
    axes.set_ylim(-0.02, 1.02)
    axes.set_title(safe(title, 90), fontsize=10)
    logged: dict[str, list[tuple[int, float]]] = {}
    for (step, name), value in sorted(history.logged.items()):
        logged.setdefault(name, []).append((step, value))
    handles = axes.get_lines()
    for at, (name, points) in enumerate(list(logged.items())[: len(LOGGED)]):
        beside = axes.twinx()
        if at:
            beside.spines["right"].set_position(("outward", 52 * at))
        color = LOGGED[at]
        handles += beside.plot(*zip(*points, strict=True), color=color, lw=2, label=safe(name))
        beside.set_ylabel(safe(name), color=color)
        beside.tick_params(axis="y", colors=color)
    axes.legend(handles=list(handles), frameon=False, fontsize=8, loc="center right")
    return made


def _layers(figure: Any, history: History, title: str) -> Any:
    """Fig. S7: the classes of every layer."""
    names = list(history.layers)[:MOST]
    made, panels = _grid(figure, len(names))
    for axes, name in zip(panels, names, strict=True):
        for symmetry, (color, style) in STYLES.items():
            counts = history.counts(name, symmetry)
            axes.plot(_steps(history), counts, style, color=color, label=f"{symmetry}s")
        axes.plot(_steps(history), history.singles(name), color="#c2334d", lw=0.9,
                  label="fibers of one node")  # fmt: skip
        axes.set_title(f"{safe(name, 28)}: {history.layers[name]} nodes", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=8)
    panels[0].legend(frameon=False, fontsize=7)
    more = "" if len(history.layers) <= MOST else f" (the first {MOST} layers)"
    made.suptitle(safe(title, 90) + more, fontsize=10)
    return made


def _signs(figure: Any, history: History, title: str) -> Any:
    made, panels = _grid(figure, 3)
    kinds = (("dead", "dead nodes"), ("effective_rank", "effective rank"),
             ("weight_norm", "weight norm"))  # fmt: skip
    names = list(history.layers)[:MOST]
    for axes, (kind, label) in zip(panels, kinds, strict=True):
        for at, name in enumerate(names):
            values = [getattr(look.signs[name], kind) for look in history.looks]
            numbers = np.array([np.nan if v is None else v for v in values], float)
            shade = 0.75 * at / max(1, len(names) - 1)
            axes.plot(_steps(history), numbers, color=(shade,) * 3, label=safe(name, 24))
        axes.set_title(label, fontsize=9)
        axes.set_xlabel("step")
    panels[0].legend(frameon=False, fontsize=7)
    made.suptitle(safe(title, 90), fontsize=10)
    return made


def _grid(figure: Any, count: int) -> tuple[Any, Sequence[Any]]:
    across = min(4, max(1, count))
    down = -(-count // across)
    made = figure(figsize=(3.2 * across + 0.6, 2.5 * down + 0.6), layout="constrained")
    return made, [made.add_subplot(down, across, place + 1) for place in range(count)]
