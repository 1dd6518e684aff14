"""What a training run did to fibers, opfibers and covers, look by look."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxfib.coloring import Labels, first_appearance, unique_rows
from fxfib.errors import InputError
from fxfib.files import move_into_place, staging_folder
from fxfib.vital_signs import VitalSigns

SYMMETRIES = ("fiber", "opfiber", "cover")
COLUMNS = (
    "step", "layer", "nodes",
    *(f"{kind}{what}" for kind in ("fiber", "opfiber", "cover")
      for what in ("s", "s_of_one_node", "_largest", "_sizes")),
    "covers_merged", "covers_split", "dead", "effective_rank", "weight_norm",
)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """One look at the network.

    Attributes:
        step: how many steps of the optimizer came before.
        labels: by symmetry (``"fiber"``, ``"opfiber"``, ``"cover"``) and layer, int32 ``[nodes]``,
            numbered by first appearance.
        signs: by layer, dead units, effective rank and weight norm.
    """

    step: int
    labels: Mapping[str, Mapping[str, Tensor]]
    signs: Mapping[str, VitalSigns]


@dataclass(frozen=True)
class Transition:
    """Classes of one layer that became one, or one that fell apart, between two looks.

    Attributes:
        since, step: the looks before and after.
        layer, symmetry: where, and of what.
        kind: ``"merge"`` or ``"split"``.
        parts: the nodes of every part.
    """

    since: int
    step: int
    layer: str
    symmetry: str
    kind: str
    parts: tuple[tuple[int, ...], ...]


@dataclass
class History:
    """All looks of a run, and what was logged beside them.

    Attributes:
        inputs: of every layer, the layers whose nodes it reads.
        looks: in order of their steps.
        logged: other figures (loss, accuracy) by step and name.
    """

    inputs: dict[str, tuple[str, ...]]
    looks: list[Look] = field(default_factory=list)
    logged: dict[tuple[int, str], float] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, int]:
        """The layers with their numbers of nodes."""
        found = self.looks[0].labels["fiber"] if self.looks else {}
        return {name: len(labels) for name, labels in found.items()}

    def add(self, look: Look) -> None:
        """Append a look; labels that did not change are kept once; a second look at a step counts.

        Raises:
            InputError: it goes back in time, or sees other layers.
        """
        if self.looks:
            last = self.looks[-1]
            if look.step < last.step:
                raise InputError(f"a look at step {look.step} cannot follow that at {last.step}.")
            labels = {
                symmetry: {
                    name: last.labels[symmetry][name]
                    if torch.equal(last.labels[symmetry][name], own) else own
                    for name, own in found.items()
                }
                for symmetry, found in look.labels.items()
            }  # fmt: skip
            look = Look(look.step, labels, look.signs)
            if look.step == last.step:
                self.looks.pop()
        self.looks.append(look)

    # -- what can be read off ----------------------------------------------------------------

    def counts(self, layer: str, symmetry: str = "fiber") -> Labels:
        """Numbers of classes of a layer, look by look."""
        return np.array([int(x.labels[symmetry][layer].max()) + 1 for x in self.looks], np.int64)

    def singles(self, layer: str, symmetry: str = "fiber") -> Labels:
        """Numbers of classes of one node, look by look."""
        sizes = [torch.bincount(look.labels[symmetry][layer]) for look in self.looks]
        return np.array([int((found == 1).sum()) for found in sizes], np.int64)

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for every look and layer, with the columns of the CSV."""
        for place, look in enumerate(self.looks):
            yield from rows_of(look, self.looks[place - 1] if place else None)

    def transitions(self, symmetry: str = "cover") -> Iterator[Transition]:
        """Every merge and split, in order."""
        if symmetry not in SYMMETRIES:
            raise InputError(f"unknown symmetry {symmetry!r}; known: {', '.join(SYMMETRIES)}.")
        for before, after in zip(self.looks, self.looks[1:], strict=False):
            for name, old in before.labels[symmetry].items():
                new = after.labels[symmetry][name]
                if new is old:
                    continue
                one, two = old.numpy(), new.numpy()
                for kind, whole, parts in (("merge", two, one), ("split", one, two)):
                    for found in _joined(whole, parts):
                        yield Transition(before.step, after.step, name, symmetry, kind, found)

    # -- keeping it --------------------------------------------------------------------------

    def to_csv(self, path: str | os.PathLike[str], what: str = "layers") -> None:
        """Write all rows, or ``what="transitions"`` of all symmetries, or what was ``"logged"``.

        Raises:
            InputError: ``what`` is unknown.
            ExportError: the file cannot be written.
        """
        if what == "layers":
            columns, rows = COLUMNS, self.rows()
        elif what == "transitions":
            columns = ("since", "step", "layer", "symmetry", "kind", "parts")
            rows = (
                {**vars(t), "parts": " | ".join(_ranges(part) for part in t.parts)}
                for symmetry in SYMMETRIES
                for t in self.transitions(symmetry)
            )
        elif what == "logged":
            columns = ("step", "name", "value")
            rows = ({"step": s, "name": n, "value": v} for (s, n), v in self.logged.items())
        else:
            raise InputError(f"what must be 'layers', 'transitions' or 'logged', not {what!r}.")
        with staging_folder(path) as folder:
            staged = folder / Path(path).name
            with staged.open("w", newline="", encoding="utf-8") as file:
                file.write(as_csv(rows, columns, head=True))
            move_into_place(staged, path)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors, for ``torch.save``; read with ``weights_only=True``."""
        looks = [
            {
                "step": look.step,
                "labels": {k: dict(found) for k, found in look.labels.items()},
                "signs": {name: asdict(signs) for name, signs in look.signs.items()},
            }
            for look in self.looks
        ]
        return {"looks": looks, "logged": [[s, n, v] for (s, n), v in self.logged.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            InputError: it is of other layers.
        """
        looks = [
            Look(
                look["step"],
                {k: {n: t.cpu() for n, t in f.items()} for k, f in look["labels"].items()},
                {name: VitalSigns(**signs) for name, signs in look["signs"].items()},
            )
            for look in state["looks"]
        ]
        fresh = History(self.inputs)
        for look in looks:
            fresh.add(look)
        if self.looks and fresh.looks and fresh.layers != self.layers:
            raise InputError("the state is that of other layers.")
        self.looks = fresh.looks
        self.logged = {(int(s), str(n)): float(v) for s, n, v in state["logged"]}


def rows_of(look: Look, before: Look | None) -> Iterator[dict[str, Any]]:
    """The rows of one look; merges and splits are those since the look before."""
    for name, signs in look.signs.items():
        row: dict[str, Any] = {"step": look.step, "layer": name}
        for kind in SYMMETRIES:
            labels = look.labels[kind][name]
            row["nodes"] = len(labels)
            sizes, counts = torch.bincount(labels).unique(return_counts=True)
            pairs = list(zip(sizes.tolist(), counts.tolist(), strict=True))
            row[f"{kind}s"] = int(counts.sum())
            row[f"{kind}s_of_one_node"] = dict(pairs).get(1, 0)
            row[f"{kind}_largest"] = max(dict(pairs), default=0)
            row[f"{kind}_sizes"] = " ".join(f"{size}x{count}" for size, count in pairs)
        merged, split = 0, 0
        if before is not None:
            merged, split = changes(before.labels["cover"][name], look.labels["cover"][name])
        row |= {"covers_merged": merged, "covers_split": split}
        yield row | asdict(signs)


def changes(before: Tensor, after: Tensor) -> tuple[int, int]:
    """How many classes fewer by merging, and how many more by splitting."""
    joint = int(unique_rows(before.numpy(), after.numpy()).max(initial=-1)) + 1
    return joint - int(after.max()) - 1, joint - int(before.max()) - 1


def as_csv(rows: Any, columns: tuple[str, ...], *, head: bool) -> str:
    """Rows as text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if head:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def labels_as_tensor(labels: Labels) -> Tensor:
    """Labels numbered by first appearance, int32."""
    return torch.from_numpy(first_appearance(labels).astype(np.int32))


def _joined(whole: Any, parts: Any) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Classes of one partition that hold nodes of several classes of the other."""
    joint = unique_rows(whole, parts)
    _, first = np.unique(joint, return_index=True)
    owners, pieces = np.unique(whole[first], return_counts=True)
    for owner in owners[pieces > 1]:
        members = np.flatnonzero(whole == owner)
        found = joint[members]
        yield tuple(
            tuple(members[found == piece].tolist()) for piece in dict.fromkeys(found.tolist())
        )


def _ranges(nodes: tuple[int, ...]) -> str:
    """``0 1 2 5`` as ``0-2 5``."""
    parts: list[str] = []
    for run in np.split(np.array(nodes), np.flatnonzero(np.diff(nodes) != 1) + 1):
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return " ".join(parts)
