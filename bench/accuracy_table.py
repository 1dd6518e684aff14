"""Where fxfib stands among the others, cell by cell, from the rows of `accuracy.py`.

    python bench/accuracy_table.py [--rows bench/results/accuracy.csv] [--output FILE.md]

One line for a network, a part of its parameters that is kept, and what was fitted: the points of
accuracy that fxfib loses, median and range over seeds, and the method that comes nearest to it or
is ahead.  Two methods are compared on the seeds that both have; ahead is the median of these
differences.  Differences of less than the chance of that many test images are no differences, so
the last columns say how many answers are those of the original.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tables import read

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "fxfib"
KINDS = {
    "none": "nothing",
    "noise": "no data",
    "noise-refined": "no data, refined",
    "images": "inputs",
    "refined": "inputs, refined",
    "trained": "trained once more",
}
HEADER = (
    "kept", "fitted on", "fxfib loses", "nearest other", "loses", "fxfib ahead by", "seeds",
    "answers kept", "by the other",
)  # fmt: skip
# Points that 10,000 test images do not tell from none.
NARROW = 0.1
TITLE = """\
# Accuracy at the same number of parameters

Made by `bench/accuracy_table.py` from accuracy.csv; `bench/accuracy.py` says what the networks and
the methods are. Points of accuracy (of BLEU for the transformer) below the original: median (and
range) over seeds. The other method is the one that is ahead of fxfib or nearest to it, with the
same inputs and the same fitting, on the seeds that both have (the second number of seeds); ahead is
the median of the differences there. Negative: fxfib is behind.
"""
Cell = tuple[str, float, str]


class Seen(NamedTuple):
    """One network of a method.

    Attributes:
        below: points of accuracy that are lost.
        agreement: percent of the answers that are the original's; None where it was not asked.
    """

    below: float
    agreement: float | None


class Standing(NamedTuple):
    """A cell of the table.

    Attributes:
        ours: by seed.
        other, theirs: the method that is ahead or nearest, and its networks by seed; "" where
            there is none.
    """

    ours: Mapping[str, Seen]
    other: str
    theirs: Mapping[str, Seen]

    @property
    def ahead(self) -> list[float]:
        """Points by which fewer are lost than by the other, on every seed that both have."""
        return [
            round(self.theirs[seed].below - own.below, 4)
            for seed, own in self.ours.items()
            if seed in self.theirs
        ]


def standings(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Cell, Standing]]:
    """Every cell in which there is a network of fxfib, in the order of networks and sizes."""
    cells: dict[Cell, dict[str, dict[str, Seen]]] = {}
    for row in rows:
        cell = row["network"], float(row["target"]), row["compensation"]
        below = float(row["original"]) - float(row["accuracy"])
        agreement = float(row["agreement"]) if row.get("agreement") else None
        of_method = cells.setdefault(cell, {}).setdefault(row["method"], {})
        of_method[str(row["seed"])] = Seen(below, agreement)
    for cell in sorted(cells, key=lambda c: (c[0], -c[1], list(KINDS).index(c[2]))):
        methods = dict(cells[cell])
        ours = methods.pop(OURS, None)
        if ours is None:
            continue
        rivals = [Standing(ours, name, theirs) for name, theirs in methods.items()]
        rivals = [standing for standing in rivals if standing.ahead]
        nearest = min(rivals, key=lambda s: statistics.median(s.ahead), default=None)
        yield cell, nearest or Standing(ours, "", {})


def lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The table as Markdown, one section a network."""
    network = ""
    for (name, target, kind), standing in standings(rows):
        if name != network:
            network = name
            yield from ("", f"## {name}", "", _line(HEADER), _line(["---"] * len(HEADER)))
        common = [seed for seed in standing.ours if seed in standing.theirs]
        ahead = standing.ahead
        yield _line(
            [
                f"{100 * target:g} %",
                KINDS[kind],
                _spread([seen.below for seen in standing.ours.values()]),
                standing.other,
                _spread([standing.theirs[seed].below for seed in common]),
                f"{statistics.median(ahead):+.2f}" if ahead else "",
                f"{len(standing.ours)}, {len(common)}",
                _kept(standing.ours[seed] for seed in common or standing.ours),
                _kept(standing.theirs[seed] for seed in common),
            ]
        )


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    median = f"{statistics.median(values):.2f}"
    return median if len(values) == 1 else f"{median} ({min(values):.2f} to {max(values):.2f})"


def _kept(seen: Iterable[Seen]) -> str:
    known = [each.agreement for each in seen if each.agreement is not None]
    return f"{statistics.median(known):.2f} %" if known else ""


def _line(entries: Iterable[str]) -> str:
    return "| " + " | ".join(entries) + " |"


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The whole page."""
    ahead = [statistics.median(s.ahead) for _, s in standings(rows) if s.other]
    behind = [points for points in ahead if points < 0]
    found = (
        f"{len(ahead)} cells with another method: fxfib is ahead in {sum(a > 0 for a in ahead)}, "
        f"level in {sum(a == 0 for a in ahead)}, behind in {len(behind)} "
        f"({sum(b < -NARROW for b in behind)} of them by more than {NARROW} points)."
    )
    return "\n".join([TITLE, found, *lines(rows), ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=Path, default=RESULTS / "accuracy.csv")
    parser.add_argument("--output", type=Path, help="a Markdown file; none: standard output")
    options = parser.parse_args(arguments)
    rows = read(options.rows)
    if not rows:
        print(f"there are no rows in {options.rows}", file=sys.stderr)
        return 1
    page = text(rows)
    if options.output is None:
        print(page, end="")
    else:
        options.output.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
