"""Second moments of what layers pass on, on given inputs: matrices of the layer's width squared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from fxfib.passes.compensate import FEWEST_ROWS, ROWS_PER_COLUMN, Batches, Tap
from fxfib.passes.forward import Analysis
from fxfib.passes.outlook import Outlook
from fxfib.passes.regression import positions_of
from fxfib.passes.relations import Same
from fxfib.passes.rules import find_rule
from fxfib.passes.rules.base import is_tensor


@dataclass(frozen=True)
class Activation:
    """What is known of the nodes of one colored value.

    Attributes:
        covariance: float64 ``[n, n]``, of the nodes as they are read (behind their activation).
        demand: float64 ``[n, n]``, products of the columns that read them.
    """

    covariance: torch.Tensor
    demand: torch.Tensor


def as_read(analysis: Analysis, node: fx.Node, axis: int) -> fx.Node:
    """The last value before a colored value's nodes meet others: behind activation and pooling."""
    current = node
    while len(current.users) == 1:
        (user,) = current.users
        rule = find_rule(user)
        operands = [n for n in user.all_input_nodes if not analysis.is_constant(n)]
        if rule is None or not rule.pointwise or operands != [current] or not is_tensor(user):
            break
        ties = [r for r in analysis.by_node.get(user, ()) if isinstance(r, Same)]
        if not any(r.a == (user, axis) and r.b == (current, axis) for r in ties):
            break
        current = user
    return current


def activations_of(
    graph_module: fx.GraphModule,
    outlook: Outlook,
    batches: Batches,
    step: Callable[[str], None] = lambda name: None,
) -> Mapping[fx.Node, Activation]:
    """One run over all inputs; see :class:`Activation`."""
    places = {
        node: as_read(outlook.exact, node, axis)
        for node, axis in outlook.axes.items()
        if node in outlook.exact.values
    }
    if not places:
        return {}
    tap = Tap(graph_module, set(places.values()))
    examples = sum(
        next((len(t) for t in batch if isinstance(t, torch.Tensor) and t.ndim), 1)
        for batch in batches
    )
    count: dict[fx.Node, int] = {}
    first: dict[fx.Node, torch.Tensor] = {}
    second: dict[fx.Node, torch.Tensor] = {}
    with torch.no_grad():
        for batch in batches:
            values = tap.run_on(batch)
            for node, place in places.items():
                axis, value = outlook.axes[node], values[place]
                width = value.shape[axis]
                most = max(1, -(-max(FEWEST_ROWS, ROWS_PER_COLUMN * width) // examples))
                seen = count.get(node, 0)
                if axis == 0 or not value.is_floating_point():
                    rows = value.movedim(axis, -1).reshape(-1, width)
                else:
                    flat = value.movedim(axis, -1).reshape(len(value), -1, width)
                    chosen = positions_of(tuple(value.shape), axis, most, seen)
                    rows = flat[:, chosen].flatten(0, 1)
                rows = rows.float()
                count[node] = seen + len(rows)
                first[node] = first.get(node, 0) + rows.sum(0, dtype=torch.float64).cpu()
                second[node] = second.get(node, 0) + (rows.t() @ rows).double().cpu()
            step("measure")
    return {
        node: Activation(
            second[node] / count[node]
            - torch.outer(first[node] / count[node], first[node] / count[node]),
            _demand(outlook, node, len(first[node])),
        )
        for node in places
    }


def _demand(outlook: Outlook, node: fx.Node, size: int) -> torch.Tensor:
    """Products of the columns that read the nodes; other readers read each by itself."""
    axis = outlook.axes[node]
    total = torch.eye(size, dtype=torch.float64) * outlook.plain.get((node, axis), 0.0)
    for columns in outlook.columns(node, axis):
        wide = columns.to(torch.float64)
        total += wide.t() @ wide
    return total
