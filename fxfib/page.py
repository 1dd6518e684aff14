"""The report as one HTML page: data, style and script in one file, nothing from the network."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxfib.files import move_into_place, staging_folder

if TYPE_CHECKING:
    from fxfib.benchmarking import Benchmark
    from fxfib.curve import CurvePoint
    from fxfib.report import Report

_FOLDER = Path(__file__).resolve().parent / "html"
# Longer names are cut in the page: nobody reads them there, and the JSON report has them whole.
LONGEST_NAME = 200


def write_page(
    report: Report,
    path: str | os.PathLike[str],
    benchmark: Benchmark | None = None,
    curve: Sequence[CurvePoint] = (),
) -> None:
    """Write the page; see :meth:`fxfib.Report.to_html`."""
    target = Path(path)
    with staging_folder(target) as folder:
        staged = folder / target.name
        staged.write_text(page(report, benchmark, curve), encoding="utf-8")
        move_into_place(staged, target)


def page(
    report: Report, benchmark: Benchmark | None = None, curve: Sequence[CurvePoint] = ()
) -> str:
    """The page as text.

    Everything that comes from a model is data: the script puts it into the page as text only, and
    no name can end the element that holds it.
    """
    data = report.to_dict()
    for point in data["frontier"]:
        # The JSON report has one of every group.
        point["eps"] = max(point["eps"].values(), default=0.0)
    data["benchmark"] = None if benchmark is None else benchmark.to_dict()
    data["curve"] = [asdict(point) for point in curve]
    return compose("page.html", data, "sections.js")


def compose(template: str, data: Any, script: str) -> str:
    """A page of one template: shared style and graph, its own script, and data that stays data."""
    text = json.dumps(_cut(data), separators=(",", ":"), allow_nan=False, default=str)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    code = "\n".join(
        (_FOLDER / name).read_text(encoding="utf-8") for name in ("base.js", "graph.js", script)
    )
    before, rest = (_FOLDER / template).read_text(encoding="utf-8").split("{{STYLE}}")
    middle, rest = rest.split("{{DATA}}")
    between, after = rest.split("{{SCRIPT}}")
    return "".join((before, style, middle, text, between, code, after))


def _cut(value: Any) -> Any:
    """Finite numbers and names of a length that a page can show."""
    if isinstance(value, dict):
        return {str(key): part if key in ("slots", "pixels", "frames") else _cut(part)
                for key, part in value.items()}  # fmt: skip
    if isinstance(value, (list, tuple)):
        return [_cut(part) for part in value]
    if isinstance(value, str) and len(value) > LONGEST_NAME:
        half = LONGEST_NAME // 2
        return f"{value[:half]} … {value[-half:]}"
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value
