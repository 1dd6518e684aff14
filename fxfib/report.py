"""What a compile did, and the proof that the answer still holds."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from fxfib import layers as layer_data
from fxfib.frontier import Point
from fxfib.layers import Layer
from fxfib.passes.forward import Refusal

if TYPE_CHECKING:
    from fxfib.benchmarking import Benchmark
    from fxfib.curve import CurvePoint


@dataclass(frozen=True)
class Group:
    """Layers whose outputs are coupled: they share one coloring.

    Attributes:
        members: module paths of the layers that produce the coupled nodes.
        nodes: nodes before.
        fibers: slots after; equal to the number of fibers that could be kept apart.
        merged: nodes that share a slot with an earlier one.
        scaled: merged nodes that carry a factor of their own (scaled fibers).
        constant: constant nodes folded into their readers.
        unread: nodes dropped because nothing reads them.
        reason: why the group keeps its full width, if it does.
        expanded: the width that an index brings the nodes to where they are read; 0: none does.
        apart: fibers' nodes that do not merge because heads of one attention, directions of one
            recurrent layer, or the like have one size.
    """

    members: tuple[str, ...]
    nodes: int
    fibers: int
    merged: int
    scaled: int
    constant: int
    unread: int
    reason: str = ""
    expanded: int = 0
    apart: int = 0


@dataclass(frozen=True)
class Report:
    """The record of one compile; prints as a table.

    Attributes:
        model: class name of the compiled model.
        eps, criterion, dtype, device: what was asked, and of what; of several eps the largest.
        precisions: eps of every pattern of module paths, where several were given.
        parameters_before, parameters_after: numbers of parameter elements (buffers not counted).
        macs_before, macs_after: multiply-accumulates for one example.
        error: largest absolute difference of any output on the example inputs, in the model's
            dtype.
        relative_error: the same over the largest absolute output.
        exact_error: relative difference when both are computed in float64 (eps = 0 only).
        tolerance: what the relative errors were held against (eps = 0 only).
        groups: coupled layers and what became of their nodes.
        refusals: where nothing merges, and why.
        notes: what else a user should know.
        versions: of the packages that made this.
        seconds: capture and compile times.
        layers: of every layer where each of its nodes went.
        frontier: what :func:`fxfib.tune` has seen, by size.
    """

    model: str
    eps: float
    criterion: str
    dtype: str
    device: str
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    error: float | None = None
    relative_error: float | None = None
    exact_error: float | None = None
    tolerance: float | None = None
    groups: tuple[Group, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    layers: tuple[Layer, ...] = field(default=(), repr=False)
    precisions: dict[str, float] = field(default_factory=dict)
    frontier: tuple[Point, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        data = asdict(self)
        data["layers"] = [layer_data.to_dict(layer) for layer in data["layers"]]
        return dict(json.loads(json.dumps(data)))

    def to_json(self) -> str:
        """The same as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The inverse of :meth:`to_dict`; unknown keys are left out (newer versions add some)."""
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in data.items() if k in known}
        values["groups"] = tuple(
            Group(**{**g, "members": tuple(g["members"])}) for g in values.get("groups", ())
        )
        values["refusals"] = tuple(Refusal(**r) for r in values.get("refusals", ()))
        values["frontier"] = tuple(Point(**p) for p in values.get("frontier", ()))
        values["notes"] = tuple(values.get("notes", ()))
        values["layers"] = tuple(Layer.from_dict(layer) for layer in values.get("layers", ()))
        return cls(**values)

    def to_html(
        self,
        path: str | os.PathLike[str],
        benchmark: Benchmark | None = None,
        curve: Sequence[CurvePoint] = (),
    ) -> None:
        """Write the report as one page that needs no network: the model as a colored graph, layers,
        groups, certificate, refusals and, where they are known, frontier, eps curve and latency.

        Args:
            path: of the file; it appears when it is complete.
            benchmark: what :func:`fxfib.benchmark` returned.
            curve: what :func:`fxfib.eps_curve` returned.

        Raises:
            ExportError: the file cannot be written.
        """
        from fxfib.page import write_page

        write_page(self, path, benchmark, curve)

    def plot(self, curve: Sequence[CurvePoint] = ()) -> list[Any]:
        """Matplotlib figures: the groups, the layers and, where there are any, frontier and curve.

        Args:
            curve: what :func:`fxfib.eps_curve` returned.

        Raises:
            InputError: matplotlib is not installed (``pip install 'fxfib[plot]'``).
        """
        from fxfib.figures import figures

        return figures(self, curve)

    @property
    def merged_groups(self) -> tuple[Group, ...]:
        """Groups that became smaller."""
        return tuple(g for g in self.groups if g.fibers < g.nodes)

    def __str__(self) -> str:
        most = "at most " if self.precisions else ""
        lines = [
            f"{self.model}: eps {most}{self.eps:g}, {self.criterion}, {self.dtype} on {self.device}"
        ]
        lines.append(_before_after("parameters", self.parameters_before, self.parameters_after))
        lines.append(_before_after("MACs", self.macs_before, self.macs_after))
        lines.append(f"  {'error':<12} {self._error_line()}")
        shown = self.merged_groups
        if shown:
            lines += ["", *_table(shown)]
        elif not self.groups:
            lines += ["", "  no layer whose nodes could merge was found"]
        elif not any(g.apart for g in self.groups):
            lines += ["", "  no fibers: every node computes an activation of its own"]
        indexed = [g for g in self.groups if g.expanded]
        if indexed:
            lines += ["", f"  stored small, expanded by an index where read: {len(indexed)} groups"]
            for g in indexed[:8]:
                lines.append(f"    {_names(g.members)}: {g.fibers} stored, {g.expanded} read")
            if len(indexed) > 8:
                lines.append(f"    ... and {len(indexed) - 8} more (to_dict() has them all)")
        apart = [g for g in self.groups if g.apart]
        if apart:
            lines += ["", f"  kept apart, for one size of heads or directions: {len(apart)} groups"]
            lines += [f"    {_names(g.members)}: {g.apart} nodes of fibers" for g in apart[:8]]
            if len(apart) > 8:
                lines.append(f"    ... and {len(apart) - 8} more (to_dict() has them all)")
        kept = [g for g in self.groups if g.reason]
        if kept:
            lines += ["", f"  kept at full width: {len(kept)} of {len(self.groups)} groups"]
            lines += [f"    {_names(g.members)}: {g.reason}" for g in kept[:8]]
            if len(kept) > 8:
                lines.append(f"    ... and {len(kept) - 8} more (to_dict() has them all)")
        if self.refusals:
            lines += ["", f"  refused: {len(self.refusals)}"]
            for refusal in self.refusals[:8]:
                lines.append(
                    f"    {refusal.node} ({refusal.op}): {refusal.reason}; {refusal.remedy}"
                )
            if len(self.refusals) > 8:
                lines.append(f"    ... and {len(self.refusals) - 8} more (to_dict() has them all)")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _error_line(self) -> str:
        if self.error is None:
            return "not measured (verify=False)"
        text = f"{self.error:.2g} absolute, {self.relative_error or 0.0:.2g} relative"
        if self.exact_error is not None:
            text += f"; in float64 {self.exact_error:.2g} (tolerance {self.tolerance:.0e}): exact"
        elif self.eps > 0:
            text += " on the example inputs: approximate"
        return text


def _before_after(name: str, before: int, after: int) -> str:
    share = f"{100 * after / before:.1f} %" if before else "-"
    return f"  {name:<12} {before:>15,} -> {after:>15,}  ({share})"


def _names(members: tuple[str, ...]) -> str:
    shown = ", ".join(members[:3])
    return shown if len(members) <= 3 else f"{shown} and {len(members) - 3} more"


def _table(groups: tuple[Group, ...]) -> list[str]:
    head = ("coupled layers", "nodes", "fibers", "merged", "scaled", "constant", "unread")
    rows = [
        (_names(g.members), *(str(v) for v in (g.nodes, g.fibers, g.merged, g.scaled, g.constant)),
         str(g.unread))
        for g in groups
    ]  # fmt: skip
    width = max(len(head[0]), *(len(r[0]) for r in rows))
    lines = []
    for row in (head, *rows):
        lines.append(f"  {row[0]:<{width}} " + " ".join(f"{cell:>8}" for cell in row[1:]))
    return lines
