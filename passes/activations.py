"""Second moments of what layers pass on, on given inputs: matrices of the layer's width squared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxfib.passes.compensate import Batches
from fxfib.passes.fits import FEWEST_ROWS, ROWS_PER_COLUMN
from fxfib.passes.forward import Analysis
from fxfib.passes.outlook import Outlook
from fxfib.passes.regression import positions_of
from fxfib.passes.relations import Ref, Same
from fxfib.passes.rules import find_rule
from fxfib.passes.rules.base import is_tensor
from fxfib.passes.rules.recurrent import Recurrent
from fxfib.passes.stages import Room, Stages, Step, silent


@dataclass(frozen=True)
class Activation:
    """What is known of the nodes of one colored value.

    Attributes:
        read: the value in which they are read, behind their activation.
        mean: float64 ``[n]``, of the nodes there.
        covariance: float64 ``[n, n]``.
        demand: float64 ``[n, n]``, products of the columns that read them.
        alone: float64 ``[n]``, how strongly each is read where no other node makes up for it.
    """

    read: fx.Node
    mean: torch.Tensor
    covariance: torch.Tensor
    demand: torch.Tensor
    alone: torch.Tensor


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
    step: Step = silent,
    *,
    recurrence: bool = True,
) -> Mapping[Ref, Activation]:
    """Of the axes whose nodes may go, in one run over all inputs; see :class:`Activation`.

    Args:
        graph_module, outlook, batches: the original, what is known of it, and what it is run on.
        step: told which share is done.
        recurrence: whether weights on hidden nodes of recurrent layers will be fitted.
    """
    analysis = outlook.exact
    places = {
        (node, axis): node if isinstance(axis, str) else as_read(analysis, node, axis)
        for node, axis in outlook.asked
        if node in analysis.values and not outlook.held((node, axis))
    }
    if not places:
        return {}
    refs: dict[fx.Node, list[Ref]] = {}
    for ref, place in places.items():
        refs.setdefault(place, []).append(ref)
    run = Stages(graph_module, [refs], Room(0)).run
    examples = sum(
        next((len(t) for t in batch if isinstance(t, torch.Tensor) and t.ndim), 1)
        for batch in batches
    )
    count: dict[Ref, int] = {}
    first: dict[Ref, torch.Tensor] = {}
    second: dict[Ref, torch.Tensor] = {}
    with torch.no_grad():
        for number, batch in enumerate(batches):
            for node, value in run(0, number, batch):
                for ref in refs[node]:
                    seen = count.get(ref, 0)
                    rows = _rows(analysis, ref, value, examples, seen).float()
                    count[ref] = seen + len(rows)
                    first[ref] = first.get(ref, 0) + rows.sum(0, dtype=torch.float64).cpu()
                    second[ref] = second.get(ref, 0) + (rows.t() @ rows).double().cpu()
            step("measure", (number + 1) / len(batches))
    return {
        ref: Activation(
            places[ref],
            first[ref] / count[ref],
            second[ref] / count[ref]
            - torch.outer(first[ref] / count[ref], first[ref] / count[ref]),
            *_demand(outlook, ref, len(first[ref]), recurrence),
        )
        for ref in places
    }


def _rows(analysis: Analysis, ref: Ref, value: Any, examples: int, seen: int) -> torch.Tensor:
    """Nodes of an axis, ``[rows, nodes]``, at some of all positions."""
    node, axis = ref
    if isinstance(axis, str):
        rule = find_rule(node)
        assert isinstance(rule, Recurrent)
        return rule.observed(analysis, node, axis, value)
    width = value.shape[axis]
    if axis == 0 or not value.is_floating_point():
        return value.movedim(axis, -1).reshape(-1, width)
    most = max(1, -(-max(FEWEST_ROWS, ROWS_PER_COLUMN * width) // examples))
    flat = value.movedim(axis, -1).reshape(len(value), -1, width)
    chosen = positions_of(tuple(value.shape), axis, most, seen)
    return flat[:, chosen].flatten(0, 1)


def _demand(
    outlook: Outlook, ref: Ref, size: int, recurrence: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Products of the columns that read the nodes, and how strongly each is read by itself."""
    total = torch.zeros(size, size, dtype=torch.float64)
    for columns in outlook.columns(ref):
        wide = columns.to(torch.float64)
        total += wide.t() @ wide
    alone = torch.full((size,), outlook.plain.get(ref, 0.0), dtype=torch.float64)
    if isinstance(ref[1], str) and not recurrence:
        # Left as it is, what such a layer loses comes back at every step.
        return torch.zeros_like(total), alone + total.diagonal()
    return total, alone
