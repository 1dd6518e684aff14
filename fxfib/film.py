"""A training run as one HTML page: the colored graph moves, look by look."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxfib.files import move_into_place, staging_folder
from fxfib.history import SYMMETRIES, History, Look
from fxfib.layers import encode
from fxfib.page import compose

if TYPE_CHECKING:
    from fxfib.monitor import Monitor

MOST_FRAMES = 240
#: Labels in all, so that a page stays some megabytes.
MOST_LABELS = 2_000_000


def write_film(monitor: Monitor, path: str | os.PathLike[str]) -> None:
    """Write the page; see :meth:`fxfib.Monitor.to_html`."""
    target = Path(path)
    with staging_folder(target) as folder:
        staged = folder / target.name
        text = film(monitor.history, type(monitor.source).__name__, str(monitor))
        staged.write_text(text, encoding="utf-8")
        move_into_place(staged, target)


def film(history: History, model: str, measure: str) -> str:
    """The page as text; names of the model are data, as in the report's page."""
    looks = thinned(history)
    names = list(history.layers)
    place = {name: index for index, name in enumerate(names)}
    frames: dict[str, list[list[str | None]]] = {}
    counts: dict[str, list[list[int]]] = {}
    for symmetry in SYMMETRIES:
        found = [look.labels[symmetry] for look in looks]
        frames[symmetry] = [
            [
                None if at and found[at - 1][name] is own[name] else encode(own[name].tolist())
                for name in names
            ]
            for at, own in enumerate(found)
        ]
        counts[symmetry] = [[int(own[n].max()) + 1 for n in names] for own in found]
    logged: dict[str, list[list[float]]] = {}
    for (step, name), value in sorted(history.logged.items()):
        logged.setdefault(name, []).append([step, value])
    some = (
        "" if len(looks) == len(history.looks) else f"; {len(looks)} of {len(history.looks)} looks"
    )
    data: dict[str, Any] = {
        "model": model,
        "subtitle": f"{measure}{some}",
        "steps": [look.step for look in looks],
        "layers": [
            {
                "name": name,
                "inputs": [
                    place[source] for source in history.inputs.get(name, ())
                    if place[source] < place[name]
                ],
                "group": index,
                "slots": frames["cover"][0][index],
            }
            for index, name in enumerate(names)
        ],
        "frames": frames,
        "counts": counts,
        "logged": logged,
    }  # fmt: skip
    return compose("film.html", data, "film.js")


def thinned(history: History) -> list[Look]:
    """All looks, or as many as a page holds: evenly spaced, the first and the last among them."""
    looks = history.looks
    most = min(MOST_FRAMES, MOST_LABELS // max(1, 3 * sum(history.layers.values())))
    most = max(2, most)
    if len(looks) <= most:
        return looks
    return [looks[round(at * (len(looks) - 1) / (most - 1))] for at in range(most)]
