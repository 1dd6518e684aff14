"""Opfibers and covers of a layer's nodes (Eq. 5 to Eq. 9).

Two nodes are in one *opfiber* when their errors are equal, in one *cover* when their activations
are equal too.  Then gradient descent changes their weights alike: the rows of a layer get the
gradient ``error x input``.  So a cover is taken where the weights are read: at the layer's own
output, at whatever scales it channel by channel behind (batch norm has parameters of its own), and
over all the calls that share the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import fx

from fxfib.coloring import FIRST_FREE, Factor, Labels, first_appearance, unique_rows
from fxfib.passes.backward import Colored, Continued, Partition, Within, spread_to
from fxfib.passes.groups import layer_name
from fxfib.passes.relations import Ref, Same
from fxfib.passes.rules import find_rule
from fxfib.passes.rules.base import is_tensor
from fxfib.passes.rules.derivative import equal_nodes, slack
from fxfib.passes.rules.tracing import grid_factor

SYMMETRIES = ("fiber", "opfiber", "cover", "stable")


def plain(analysis: Colored, factor: Factor | None, size: int) -> Labels:
    """Labels of nodes that are equal, factors included; all distinct where nothing is known."""
    return np.arange(size) if factor is None else equal_nodes(factor, slack(analysis))


def size_of(analysis: Colored, ref: Ref) -> int:
    """How many nodes an axis has, one inside an op included."""
    node, axis = ref
    return analysis.inner_sizes[ref] if isinstance(axis, str) else analysis.shape(node)[axis]


def fiber_of(analysis: Colored, ref: Ref) -> Labels:
    """Nodes with equal activations (Eq. 4)."""
    node, axis = ref
    if isinstance(axis, str):
        factor = analysis.value(node).inner.get(axis)
        if factor is not None:
            # Zero states are equal, but the gates behind them need not be.
            fresh = np.arange(len(factor.labels)) + factor.labels.max(initial=0) + 1
            zero = factor.labels < FIRST_FREE
            return unique_rows(np.where(zero, fresh, factor.keyed() + 1))
        return np.arange(size_of(analysis, ref))
    return plain(analysis, analysis.factor(node, axis), analysis.shape(node)[axis])


def opfiber_of(analysis: Colored, ref: Ref) -> Labels:
    """Nodes with equal errors (Eq. 6)."""
    node, axis = ref
    if isinstance(axis, str):
        return plain(analysis, analysis.inner_error(ref), size_of(analysis, ref))
    return plain(analysis, analysis.error_factor(node, axis), analysis.shape(node)[axis])


def channel_by_channel(analysis: Colored, ref: Ref) -> list[Ref]:
    """The axis, and the same axis behind ops with parameters that absorbed it (batch norm)."""
    found = [ref]
    node, axis = ref
    seen: fx.Node | None = node
    while seen is not None and not isinstance(axis, str):
        uses = analysis.gains.get(seen, [])
        seen = None
        for user, _ in uses:
            sources = [s for s in user.all_input_nodes if s is not found[-1][0] and is_tensor(s)]
            if sources and all(analysis.is_constant(s) for s in sources):
                found.append((user, axis))
                seen = user
                break
    return found


def layers(analysis: Colored, forward: list[fx.Node]) -> list[list[tuple[str, Ref]]]:
    """The axes of nodes that layers make, by name; calls that share the nodes' weights together.

    A table that is read along both of its axes (embedding and tied head) makes other nodes there;
    so do parts of one matrix, constants of their own (packed projections of an attention).
    """
    found: dict[Any, list[tuple[str, Ref]]] = {}
    count: dict[str, int] = {}
    for node in forward:
        rule = find_rule(node)
        if rule is not None and node in analysis.by_node:
            for part, ref in rule.produces(analysis, node):
                base = layer_name(node)
                name = f"{base} ({part})" if part else base
                count[name] = count.get(name, 0) + 1
                key = name if count[name] == 1 else f"{name} (call {count[name]})"
                made = name, _made_by(analysis, ref), size_of(analysis, ref)
                found.setdefault(made, []).append((key, ref))
    return list(found.values())


def _made_by(analysis: Colored, ref: Ref) -> frozenset[tuple[str, int]]:
    """The axes of matrices that lie along an output axis."""
    found = set()
    for relation in analysis.by_node.get(ref[0], ()):
        if isinstance(relation, Same) and ref in (relation.a, relation.b):
            source, axis = relation.b if relation.a == ref else relation.a
            matrix = source.op == "get_attr" and len(analysis.shape(source)) > 1
            if matrix and isinstance(axis, int):
                found.add((str(source.target), axis))
    return frozenset(found)


def labels_of(analysis: Colored, forward: list[fx.Node], symmetry: str) -> dict[str, Labels]:
    """Fibers, opfibers or covers of the output nodes of every layer and call.

    Labels are numbered by first appearance.  Fibers are plain ones: activations are equal, not
    merely proportional.
    """
    result: dict[str, Labels] = {}
    for calls in layers(analysis, forward):
        joint: list[Labels] = []
        for _, ref in calls:
            if symmetry in ("cover", "stable"):
                for place in channel_by_channel(analysis, ref):
                    joint += [fiber_of(analysis, place), opfiber_of(analysis, place)]
                grouped = alike(analysis, ref[0])
                joint += [] if grouped is None else [grouped]
        for key, ref in calls:
            if joint:
                result[key] = unique_rows(*joint)
            else:
                of = fiber_of if symmetry == "fiber" else opfiber_of
                result[key] = first_appearance(of(analysis, ref))
    return result


def stable(
    continued: Continued,
    eps: float = 0.0,
    opfiber_eps: float | None = None,
    criterion: str = "fibration",
) -> Colored:
    """Colors of covers that gradient descent cannot split (Theorem 2.1).

    Pairs of fibers and opfibers (Eq. 9) sum weights over fibers and over opfibers; a step changes
    weights alike within covers only, so a fiber that is no cover falls apart, and with it what was
    summed over it.  What lasts is the coarsest partition that is balanced both ways *over itself*:
    colors are refined by the covers they make until nothing changes.
    """
    within: dict[fx.Node | Ref, list[Partition]] = {}
    while True:
        analysis = continued.color(eps, opfiber_eps, criterion, within)
        new: dict[fx.Node | Ref, list[Partition]] = {
            node: list(covers_at(analysis, node))
            for node in continued.errors
            if node not in continued.added
        }
        for node in continued.values:
            for name in analysis.value(node).inner if node in analysis.values else ():
                ref = (node, name)
                both = unique_rows(fiber_of(analysis, ref), opfiber_of(analysis, ref))
                new[ref] = [((), both)]
        for refs in shared(analysis, continued.values):
            columns = [
                spread_to((axis,), own.shape[axes.index(axis) :][:1], axes, own)
                for node, axis in refs
                for axes, own in new.get(node, [])
                if axis in axes
            ]
            for node, axis in refs if columns else ():
                new.setdefault(node, []).append(((axis,), unique_rows(*columns)))
        if _classes_of(new) == _classes_of(within):
            return analysis
        within = new


def covers_at(analysis: Colored, node: fx.Node) -> Iterator[Partition]:
    """Nodes of a value with equal activations and errors, by the axes that are colored jointly."""
    values, errors = analysis.color(node), analysis.color(analysis.continued.errors[node])
    groups: list[set[int]] = []
    for factor in (*values.factors, *errors.factors):
        touched = [g for g in groups if g & set(factor.axes)]
        groups = [g for g in groups if g not in touched]
        groups.append(set(factor.axes).union(*touched))
    for group in groups:
        axes = tuple(sorted(group))
        columns = []
        for value in (values, errors):
            grid = grid_factor(value, axes)
            if grid is None:
                sizes = tuple(value.shape[a] for a in axes)
                columns.append(np.arange(int(np.prod(sizes))).reshape(sizes))
            else:
                columns.append(equal_nodes(grid, slack(analysis)))
        yield axes, unique_rows(*columns)


def _classes_of(found: Within) -> dict[Any, list[int]]:
    return {key: [int(o.max(initial=-1)) for _, o in own] for key, own in found.items()}


def shared(analysis: Colored, forward: list[fx.Node]) -> list[list[tuple[fx.Node, int]]]:
    """Axes of values that calls with the same weights make, or read, by the weights' own axes."""
    found: dict[Ref, list[tuple[fx.Node, int]]] = {}
    for node in forward:
        for relation in analysis.by_node.get(node, ()):
            if not isinstance(relation, Same):
                continue
            for one, (value, axis) in ((relation.a, relation.b), (relation.b, relation.a)):
                tied = analysis.is_constant(one[0]) and not analysis.is_constant(value)
                if tied and isinstance(axis, int):
                    found.setdefault(one, []).append((value, axis))
    return [list(dict.fromkeys(refs)) for refs in found.values() if len(set(refs)) > 1]


def blocks(analysis: Colored, forward: list[fx.Node]) -> dict[tuple[fx.Node, int], Labels]:
    """Along which axes of parameters the loss has equal gradients (Eq. 8).

    Rows whose outputs are in one opfiber, columns whose inputs are in one fiber.  A parameter of
    one number a node enters through its activation, too; one that is used several times has what
    holds in every use.

    Returns:
        For a parameter (its node) and one of its axes, labels of the positions.
    """
    found: dict[tuple[fx.Node, int], list[Labels]] = {}
    for node in forward:
        relations = [r for r in analysis.by_node.get(node, ()) if isinstance(r, Same)]
        for relation in relations:
            for (source, own), ref in ((relation.a, relation.b), (relation.b, relation.a)):
                if isinstance(own, str) or not analysis.is_constant(source):
                    continue
                if analysis.is_constant(ref[0]) or isinstance(ref[1], str):
                    continue
                labels = found.setdefault((source, own), [])
                if ref[0] is not node:
                    labels.append(fiber_of(analysis, ref))
                else:
                    labels.append(opfiber_of(analysis, ref))
                    labels += _entering(analysis, node, ref, relations)
                groups = int(analysis.arguments(node).get("groups") or 1)
                if groups > 1:
                    labels.append(np.arange(len(labels[0])) * groups // len(labels[0]))
    return {ref: unique_rows(*labels) for ref, labels in found.items()}


def _entering(analysis: Colored, node: fx.Node, ref: Ref, relations: list[Same]) -> list[Labels]:
    """What else the gradient of a parameter along an op's output depends on, node by node."""
    beside = []
    values = False
    for relation in relations:
        for one, (other, axis) in ((relation.a, relation.b), (relation.b, relation.a)):
            if one != ref or isinstance(axis, str) or other is node:
                continue
            if not analysis.is_constant(other):
                values = True
                beside.append(fiber_of(analysis, (other, axis)))
            elif len(analysis.shape(other)) == 1:
                numbers = analysis.constant(other).to(torch.float64).numpy()
                beside.append(unique_rows(numbers))
    # A bias or a row meets no activation of its own node.
    return [*beside, fiber_of(analysis, ref)] if values else []


def alike(analysis: Colored, node: fx.Node) -> Labels | None:
    """Output nodes of a grouped convolution that read inputs of equal activations, in order."""
    bound = analysis.arguments(node) if hasattr(node.target, "_schema") else {}
    groups = bound.get("groups") or 1
    if groups == 1 or "weight" not in bound:
        return None
    source = bound["input"]
    axis = len(analysis.shape(source)) - (len(analysis.shape(bound["weight"])) - 1)
    inputs = fiber_of(analysis, (source, axis)).reshape(groups, -1)
    return np.repeat(unique_rows(*inputs.T), analysis.shape(node)[axis] // groups)
