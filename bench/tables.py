"""The CSV files of the benches: read if they are there, whole at any moment."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fxfib.files import move_into_place, staging_folder

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows of a file, as text; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Iterable[Row], columns: Sequence[str], digits: int = 0) -> None:
    """Replace a file by all rows, in one step: an interrupted run leaves it as it was.

    Args:
        digits: significant ones of floating-point numbers; 0: as they are.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(path) as folder:
        staged = folder / path.name
        with staged.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            for row in rows:
                writer.writerow({key: _shown(value, digits) for key, value in row.items()})
        move_into_place(staged, path)


def _shown(value: Any, digits: int) -> Any:
    return f"{value:.{digits}g}" if digits and isinstance(value, float) else value
