"""What `fxfib.color` returns."""

from __future__ import annotations

from typing import Any

import torch

from fxfib.report import Report


class Colors:
    """The colors of a captured model; prints as a table.

    Attributes:
        groups: coupled layers with their numbers of nodes and fibers.
        labels: module path of a layer -> int64 labels of its output nodes, in order of first
            appearance (nodes of one fiber have one label).
    """

    def __init__(self, report: Report, labels: dict[str, torch.Tensor], symmetry: str) -> None:
        self.report = report
        self.groups = report.groups
        self.labels = labels
        self.symmetry = symmetry

    def to_dict(self) -> dict[str, Any]:
        """Groups, refusals and labels as plain data."""
        data = self.report.to_dict()
        keys = ("model", "eps", "criterion", "dtype", "groups", "refusals", "notes")
        labels = {name: tensor.tolist() for name, tensor in self.labels.items()}
        return {"symmetry": self.symmetry, **{k: data[k] for k in keys}, "labels": labels}

    def __str__(self) -> str:
        width = max([len("layer"), *(len(name) for name in self.labels)])
        lines = [f"{self.report.model}: {self.symmetry}s at eps {self.report.eps:g}"]
        lines.append(f"  {'layer':<{width}} {'nodes':>8} {'colors':>8} {'largest':>8}")
        for name, labels in self.labels.items():
            sizes = torch.bincount(labels) if len(labels) else torch.zeros(1, dtype=torch.int64)
            lines.append(
                f"  {name:<{width}} {len(labels):>8} {len(sizes):>8} {int(sizes.max()):>8}"
            )
        return "\n".join(lines)
