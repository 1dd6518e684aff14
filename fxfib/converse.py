"""The converse of Eq. 4 and Eq. 6 where activations are linear: what is synchronous is a fiber.

Two nodes of a linear layer are ``h_i = sum_c W_ic h_c`` over the colors ``c`` of its input.  If the
activations of these colors (and the constant 1, which the bias reads) are linearly independent,
equal sums have equal coefficients: the nodes are in one fiber.  If they are not, as where
``h_3 = h_1 + h_2``, nodes can be in step without being one, and nothing is claimed of the layer.

What is linear is not looked up but measured: an affine function takes the middle of two inputs to
the middle of its values; an error behind which all is linear does not depend on the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from fxfib.coloring import FIRST_FREE, Labels
from fxfib.kernels import color as color_rows
from fxfib.passes.backward import Colored
from fxfib.passes.cover import fiber_of, layers, opfiber_of
from fxfib.passes.rules import find_rule
from fxfib.passes.rules.base import is_tensor
from fxfib.passes.rules.linear import Linear

if TYPE_CHECKING:
    from fxfib.both_runs import Run

#: Sets of random inputs that are tried for as many rows as there are colors.
MOST_RUNS = 256
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Converse:
    """What was found.

    Attributes:
        compared: classes that were compared with each other.
        merged: classes that are in step with another one though they are not one.
        dependent: linear layers of which nothing is claimed.
    """

    compared: int = 0
    merged: int = 0
    dependent: int = 0

    def __add__(self, other: Converse) -> Converse:
        return Converse(
            self.compared + other.compared,
            self.merged + other.merged,
            self.dependent + other.dependent,
        )


def activations(run: Run, analysis: Colored) -> Converse:
    """The converse of Eq. 4, at every linear layer that is an affine function of the inputs."""
    generator = torch.Generator().manual_seed(0)
    one, other = (_random_inputs(run, generator) for _ in range(2))
    if one is None or other is None:
        return Converse()
    middle = [(a + b) / 2 if _floating(a) else a for a, b in zip(one, other, strict=True)]
    values, others, middles = (run.forward(inputs) for inputs in (one, other, middle))
    found, rows = Converse(), [values, others]
    for node, source in _linear_layers(run, analysis):
        wanted = (values[node], others[node], middles[node])
        if not _close((wanted[0] + wanted[1]) / 2, wanted[2]):
            continue
        factor = analysis.factor(source, _last(analysis, source))
        if factor is not None and len(factor.axes) > 1:
            continue
        size = values[source].shape[-1]
        known = np.arange(size) + FIRST_FREE if factor is None else factor.labels
        free = known >= FIRST_FREE
        colors = np.unique(known[free], return_index=True)[1]
        while _rows(rows, source) <= len(colors) and len(rows) < MOST_RUNS:
            more = _random_inputs(run, generator)
            assert more is not None
            rows.append(run.forward(more))
        table = _table(rows, source)[:, np.flatnonzero(free)[colors]]
        table = torch.cat([table, torch.ones(len(table), 1, dtype=table.dtype)], 1)
        own = fiber_of(analysis, (node, _last(analysis, node)))
        found += _compare(table, _table(rows, node), own)
    return found


def errors(run: Run, analysis: Colored) -> Converse:
    """The converse of Eq. 6, at linear layers that one linear layer reads, and so on to the end."""
    generator = torch.Generator().manual_seed(1)
    one, other = (_random_inputs(run, generator) for _ in range(2))
    if one is None or other is None:
        return Converse()

    def seeds() -> list[Tensor]:
        return [
            torch.randn(run.values[n].shape, generator=generator, dtype=torch.float64)
            for n, _ in run.continued.seeds
        ]

    start = seeds()
    first, second = (run.backward(given, start) for given in (one, other))
    found, rows = Converse(), [first]
    made = {node for node, _ in _linear_layers(run, analysis)}
    for reader, source in _linear_layers(run, analysis):
        readers = [user for user in source.users if user not in run.continued.added]
        known = all(node in first for node in (reader, source))
        if source not in made or len(readers) > 1 or not known:
            continue
        if not all(_close(first[node], second[node]) for node in (reader, source)):
            continue
        labels = opfiber_of(analysis, (reader, _last(analysis, reader)))
        colors = np.unique(labels, return_index=True)[1]
        while _rows(rows, reader) <= len(colors) and len(rows) < MOST_RUNS:
            rows.append(run.backward(one, seeds()))
        table = _table(rows, reader)[:, colors]
        silent = (table == 0).all(0)  # nothing reads them: no unknown
        own = opfiber_of(analysis, (source, _last(analysis, source)))
        found += _compare(table[:, ~silent], _table(rows, source), own)
    return found


def _compare(basis: Tensor, table: Tensor, labels: Labels) -> Converse:
    """Whether columns that are equal have equal labels.

    Args:
        basis: ``[rows, colors]``, what the nodes are sums of.
        table: ``[rows, nodes]``.
        labels: of the nodes.
    """
    size = float(basis.abs().max()) if basis.numel() else 0.0
    independent = len(basis) >= basis.shape[1] and bool(size) and (
        int(torch.linalg.matrix_rank(basis, rtol=TOLERANCE)) == basis.shape[1]
    )  # fmt: skip
    if not independent:
        return Converse(dependent=1)
    first = np.unique(labels, return_index=True)[1]
    columns = table[:, torch.from_numpy(first)].T.contiguous()
    if len(columns) < 2:
        return Converse()
    near = TOLERANCE * max(float(columns.abs().max()), 1e-300)
    return Converse(len(columns), len(columns) - color_rows(columns, near).num_classes)


def _linear_layers(run: Run, analysis: Colored) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Linear layers that are called once, with what they read."""
    for calls in layers(analysis, run.continued.values):
        node = calls[0][1][0]
        if len(calls) == 1 and isinstance(find_rule(node), Linear):
            source = node.args[0]
            if isinstance(source, fx.Node) and is_tensor(source):
                yield node, source


def _last(analysis: Colored, node: fx.Node) -> int:
    return len(analysis.shape(node)) - 1


def _rows(found: list[dict[fx.Node, Tensor]], node: fx.Node) -> int:
    return sum(values[node].numel() // max(1, values[node].shape[-1]) for values in found)


def _table(found: list[dict[fx.Node, Tensor]], node: fx.Node) -> Tensor:
    return torch.cat([values[node].flatten(0, -2).cpu() for values in found])


def _close(one: Tensor, other: Tensor) -> bool:
    size = max(float(one.abs().max()), 1e-300) if one.numel() else 1.0
    return not one.numel() or float((one - other).abs().max()) <= TOLERANCE * size


def _floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _random_inputs(run: Run, generator: torch.Generator) -> list[Any] | None:
    """Inputs of the shapes of the examples; None where one is not of real numbers."""
    made: list[Any] = []
    for leaf in run.inputs:
        if isinstance(leaf, Tensor) and not leaf.is_floating_point():
            return None
        fresh = leaf
        if isinstance(leaf, Tensor):
            fresh = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            fresh = fresh.to(leaf.device)
        made.append(fresh)
    return made
