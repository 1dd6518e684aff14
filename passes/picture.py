"""Layer by layer, what a plan does: for the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import fx, nn

from fxfib.coloring import Factor
from fxfib.layers import CONSTANT, UNREAD, Layer, Thumbnail, thumbnail
from fxfib.passes.forward import Analysis
from fxfib.passes.groups import coloring_of, producers
from fxfib.passes.plan import Plan
from fxfib.passes.relations import Ref
from fxfib.report import Group


def layers_of(plan: Plan, groups: Sequence[Group], result: fx.GraphModule) -> tuple[Layer, ...]:
    """Every layer that makes nodes, in order of the graph.

    Args:
        groups: of the report, in which every layer is a member.
        result: the rewritten graph, for pictures of its weights.
    """
    analysis = plan.analysis
    made = producers(analysis)
    side = 48 if len(made) <= 64 else 32 if len(made) <= 256 else 12
    at: dict[fx.Node, list[int]] = {}
    for index, (_, (node, _)) in enumerate(made):
        at.setdefault(node, []).append(index)
    sources = sources_of(analysis, at)
    places: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        for member in group.members:
            places.setdefault(member, []).append(place)
    seen: dict[str, int] = {}
    layers: list[Layer] = []
    for name, (node, axis) in made:
        count = seen[name] = seen.get(name, 0) + 1
        slots = _slots(plan, (node, axis))
        inputs = tuple(i for i in sources[node] if i < len(layers))
        order = _order(slots)
        columns = _order(layers[inputs[0]].slots) if len(inputs) == 1 else None
        before, after = _pictures(analysis, node, axis, result, order, columns, slots, side)
        candidates = [p for p in places.get(name, [0]) if groups[p].nodes == len(slots)]
        layers.append(
            Layer(
                name=name if count == 1 else f"{name} (call {count})",
                op=str(node.target).split(".")[1] if "." in str(node.target) else str(node.target),
                group=(candidates or places.get(name, [0]))[0],
                inputs=inputs,
                slots=tuple(int(slot) for slot in slots),
                before=before,
                after=after,
            )
        )
    return tuple(layers)


def _slots(plan: Plan, ref: Ref) -> np.ndarray:
    """Slots with the dropped nodes told apart: constant or unread."""
    slots = plan.layout(*ref).slot.copy()
    dropped = slots < 0
    if dropped.any():
        factor = _factor(plan.analysis, ref)
        constant = np.zeros(len(slots), bool) if factor is None else factor.constant
        slots[dropped] = np.where(constant[dropped], CONSTANT, UNREAD)
    return slots


def _factor(analysis: Analysis, ref: Ref) -> Factor | None:
    """What is known of an axis, also where an op behind it absorbed it (batch norm)."""
    factor = coloring_of(analysis, ref)
    node: fx.Node | None = ref[0]
    while factor is None and node is not None and isinstance(ref[1], int):
        uses = analysis.gains.get(node, [])
        node = uses[0][0] if uses else None
        factor = coloring_of(analysis, (node, ref[1])) if node is not None else None
    return factor


def _order(slots: Sequence[int] | np.ndarray) -> np.ndarray:
    """Nodes of one slot next to each other, dropped ones last."""
    array = np.asarray(slots)
    return np.argsort(np.where(array < 0, len(array) - array, array), kind="stable")


def sources_of(analysis: Analysis, at: dict[fx.Node, list[int]]) -> dict[fx.Node, tuple[int, ...]]:
    """For every node, the layers that its operands come from, through what makes no nodes."""
    reach: dict[fx.Node, tuple[int, ...]] = {}
    found: dict[fx.Node, tuple[int, ...]] = {}
    for node in analysis.graph_module.graph.nodes:
        below: dict[int, None] = {}
        for source in node.all_input_nodes:
            below.update(dict.fromkeys(reach.get(source, ())))
        found[node] = tuple(sorted(below))
        reach[node] = tuple(at[node]) if node in at else found[node]
    return found


def _pictures(
    analysis: Analysis,
    node: fx.Node,
    axis: int | str,
    result: fx.GraphModule,
    order: np.ndarray,
    columns: np.ndarray | None,
    slots: np.ndarray,
    side: int,
) -> tuple[Thumbnail | None, Thumbnail | None]:
    """The weight before and after, where the layer has one whose rows are its nodes."""
    for source in node.all_input_nodes:
        if source.op != "get_attr" or isinstance(axis, str):
            continue
        weight = analysis.tensor(source)
        if weight.ndim < 2 or not weight.is_floating_point() or weight.shape[0] != len(slots):
            continue
        small = _attribute(result, str(source.target))
        after = None
        if small is not None and small.ndim == weight.ndim:
            after = thumbnail(small, np.arange(len(small)), None, side)
        return thumbnail(weight, order, columns, side), after
    return None, None


def _attribute(module: nn.Module, name: str) -> torch.Tensor | None:
    path, _, leaf = name.rpartition(".")
    try:
        found = getattr(module.get_submodule(path), leaf)
    except AttributeError:
        return None
    return found if isinstance(found, torch.Tensor) else None
