"""Which nodes are active together, over all inputs and class by class (paper, section 3.5)."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from tqdm import tqdm

from fxfib.activities import Collector, clusters_of
from fxfib.coloring import unique_rows
from fxfib.errors import InputError
from fxfib.files import move_into_place, staging_folder
from fxfib.refusals import unwrap
from fxfib.renewal import evaluating

COLUMNS = (
    "layer", "class", "rows", "nodes", "fibers", "clusters", "largest", "constant", "mean",
    "split", "pairs", "kept",
)  # fmt: skip


@dataclass(frozen=True)
class LayerSynchrony:
    """One layer.

    Attributes:
        name: its module path.
        fibers: int64 ``[nodes]``.
        correlation: float64 ``[nodes, nodes]`` by class; ``None``: over all inputs.
        clusters: int64 ``[nodes]`` by class.
        constant: bool ``[nodes]`` by class: nodes with one activation for all rows.
        rows: examples and positions, by class.
    """

    name: str
    fibers: Tensor
    correlation: Mapping[int | None, Tensor]
    clusters: Mapping[int | None, Tensor]
    constant: Mapping[int | None, Tensor]
    rows: Mapping[int | None, int]

    @property
    def intersection(self) -> Tensor:
        """Nodes that share a cluster in every class, as labels (over all inputs without any)."""
        found = [own.numpy() for label, own in self.clusters.items() if label is not None]
        return torch.from_numpy(unique_rows(*found)) if found else self.clusters[None]

    def split(self, clusters: Tensor) -> tuple[int, int, int]:
        """How far a partition is from a coarsening of the fibers.

        Returns:
            Fibers whose nodes are in several of its classes, pairs of nodes that share a fiber, and
            how many of these pairs share a class.
        """
        pairs, kept, split = 0, 0, 0
        for fiber in range(int(self.fibers.max()) + 1 if len(self.fibers) else 0):
            own = clusters[self.fibers == fiber]
            counts = torch.unique(own, return_counts=True)[1].tolist()
            split += len(counts) > 1
            pairs += len(own) * (len(own) - 1) // 2
            kept += sum(count * (count - 1) // 2 for count in counts)
        return split, pairs, kept


@dataclass(frozen=True)
class Synchrony:
    """What :func:`synchrony` found; prints as a table.

    Attributes:
        model: its class.
        threshold: the least correlation within a cluster.
        eps, criterion: of the fibers.
        layers: by module path.
        notes: what is not known by class, and why.
    """

    model: str
    threshold: float
    eps: float
    criterion: str
    layers: Mapping[str, LayerSynchrony]
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool | None:
        """Whether clusters coarsen the fibers everywhere; None at eps > 0 (nothing is claimed)."""
        return None if self.eps > 0 else all(row["split"] == 0 for row in self.rows())

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for every layer and class, then one for the intersection of all classes.

        ``class`` is empty for all inputs.  ``mean`` is the mean correlation of different nodes,
        ``split`` the fibers that are in several clusters, ``kept`` the share of the pairs of a
        fiber that share a cluster.
        """
        for layer in self.layers.values():
            parts: list[tuple[Any, Tensor]] = list(layer.clusters.items())
            if len(parts) > 1:
                parts.append(("intersection", layer.intersection))
            for label, clusters in parts:
                split, pairs, kept = layer.split(clusters)
                row: dict[str, Any] = {
                    "layer": layer.name, "class": "" if label is None else label,
                    "nodes": len(clusters), "fibers": int(layer.fibers.max()) + 1,
                    "clusters": int(clusters.max()) + 1,
                    "largest": int(torch.bincount(clusters).max()), "split": split,
                    "pairs": pairs, "kept": kept / pairs if pairs else 1.0,
                }  # fmt: skip
                if label in layer.correlation:
                    own, size = layer.correlation[label], len(clusters)
                    total = float(own.sum()) - size
                    row["mean"] = total / (size * (size - 1)) if size > 1 else 0.0
                    row["constant"] = int(layer.constant[label].sum())
                    row["rows"] = layer.rows[label]
                yield row

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`rows`.

        Raises:
            ExportError: the file cannot be written.
        """
        with staging_folder(path) as folder:
            staged = folder / Path(path).name
            with staged.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(self.rows())
            move_into_place(staged, path)

    def plot(self, layer: str | None = None, classes: Sequence[int] | None = None) -> Any:
        """Matplotlib figure of correlation matrices, nodes ordered by cluster (Fig. 4a).

        Args:
            layer: which one; None: the last but the outputs.
            classes: which ones, beside all inputs; None: the first three.

        Raises:
            InputError: there is no such layer or class, or matplotlib is not installed.
        """
        from fxfib.synchrony_figures import figure

        return figure(self, layer, classes)

    def __str__(self) -> str:
        lines = [f"{self.model}: correlation at least {self.threshold:g}, "
                 f"fibers by {self.criterion} {self.eps:g}"]  # fmt: skip
        width = max(len("layer"), *(len(name) for name in self.layers))
        lines.append(f"  {'layer':<{width}} {'class':>12} {'nodes':>7} {'fibers':>7} "
                     f"{'clusters':>8} {'largest':>7}  fibers split")  # fmt: skip
        for row in self.rows():
            lines.append(
                f"  {row['layer']:<{width}} {row['class'] if row['class'] != '' else 'all':>12} "
                f"{row['nodes']:>7} {row['fibers']:>7} {row['clusters']:>8} {row['largest']:>7}  "
                f"{row['split']}" + (f" ({row['kept']:.1%} of pairs kept)" if row["split"] else "")
            )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def synchrony(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    threshold: float = 0.95,
    eps: float = 0.0,
    criterion: str = "fibration",
    labels: bool | None = None,
    classes: Sequence[int] | None = None,
    layers: Sequence[str] | None = None,
    progress: bool | None = None,
) -> Synchrony:
    """Correlate the activations of every layer's nodes, over all inputs and class by class.

    Nodes of one fiber have equal activations for every input (Eq. 4), so at ``eps=0`` every
    synchrony cluster is a union of fibers, whatever the inputs are drawn from: it is checked.  What
    is more in step than the fibers explain comes from the inputs.

    Activations are taken behind the activation function; every position of a feature map is a row.
    Batch after batch is added to sums (one matrix a layer and class), and forgotten.

    Args:
        model: is only read; runs in eval mode, as captured on the first batch.
        loader: batches ``(inputs, labels)`` or ``inputs``; inputs as for :func:`fxfib.compile`.
        threshold: the least correlation of two nodes of a cluster (complete linkage), in (0, 1].
        eps, criterion: of the fibers, as for :func:`fxfib.color`.
        labels: whether batches have labels; None: where the second of two is a vector of integers,
            one for each example.
        classes: only these labels; all inputs still count together.
        layers: only these.
        progress: show a bar; None: on a terminal.

    Returns:
        Correlations, clusters, and how they stand to the fibers.

    Raises:
        InputError: an option is out of range, the loader is empty or its batches do not fit, an
            activation is not finite, or the sums of so many classes would not fit into memory.
        As :func:`fxfib.color` otherwise.
    """
    from fxfib.api import check_options

    if not 0 < threshold <= 1:
        raise InputError(f"threshold must be in (0, 1], not {threshold!r}.")
    if isinstance(eps, Mapping) or criterion == "energy":
        raise InputError("fibers take one number as eps here, and not the criterion 'energy'.")
    check_options(eps, criterion, None)
    source = unwrap(model)
    collector: Collector | None = None
    bar = tqdm(loader, desc="synchrony", disable=None if progress is None else not progress)
    with evaluating(source), torch.no_grad():
        for item in bar:
            inputs, own = _parts(item, labels)
            if collector is None:
                collector = Collector(source, inputs, float(eps), criterion, layers, classes)
            collector.add(inputs, own)
    if collector is None:
        raise InputError("the loader gives no batch.")
    found = {name: _layer(collector, name, threshold) for name in collector.names}
    return Synchrony(
        type(source).__name__, threshold, float(eps), criterion, found, tuple(collector.notes)
    )


def _layer(collector: Collector, name: str, threshold: float) -> LayerSynchrony:
    moments = collector.layer(name)
    found = {label: own.correlation() for label, own in moments.items()}
    if not all(bool(torch.isfinite(own).all()) for own, _ in found.values()):
        raise InputError(f"activations of {name} are not finite for some batch.")
    clusters = {k: torch.from_numpy(clusters_of(c, threshold)) for k, (c, _) in found.items()}
    return LayerSynchrony(
        name=name,
        fibers=torch.from_numpy(collector.fibers[name]),
        correlation={label: own.cpu() for label, (own, _) in found.items()},
        clusters=clusters,
        constant={label: own.cpu() for label, (_, own) in found.items()},
        rows={label: own.count for label, own in moments.items()},
    )


def _parts(item: Any, labels: bool | None) -> tuple[Any, Tensor | None]:
    """Inputs and labels of one batch."""
    pair = isinstance(item, (tuple, list)) and len(item) == 2
    second = item[1] if pair else None
    vector = isinstance(second, Tensor) and second.ndim == 1 and not second.is_floating_point()
    if labels is None:
        first = next((x for x in pytree.tree_leaves(item) if isinstance(x, Tensor)), None)
        labels = bool(vector and first is not None and len(first) == len(second))  # type: ignore[arg-type]
    if not labels:
        return item, None
    if not vector:
        raise InputError("batches with labels are (inputs, labels), labels a vector of integers.")
    assert isinstance(second, Tensor)
    return item[0], second
