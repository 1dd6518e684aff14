"""Coupled groups: layers whose output nodes share one layout, for the report."""

from __future__ import annotations

import numpy as np
from torch import fx

from fxfib.coloring import Factor, Labels, unique_rows
from fxfib.passes.forward import Analysis, module_path
from fxfib.passes.plan import Plan
from fxfib.passes.relations import Ref, components
from fxfib.passes.rules import find_rule
from fxfib.report import Group


def producers(analysis: Analysis) -> list[tuple[str, Ref]]:
    """The axes of nodes that layers make, each with its layer's module path."""
    found = []
    for node in analysis.graph_module.graph.nodes:
        rule = find_rule(node)
        if rule is not None and node in analysis.by_node:
            name = layer_name(node)
            found += [
                (f"{name} ({part})" if part else name, ref)
                for part, ref in rule.produces(analysis, node)
            ]
    return found


def coloring_of(analysis: Analysis, ref: Ref) -> Factor | None:
    """What is known of an axis, inside an op or of its output; None for axes colored jointly."""
    node, axis = ref
    if isinstance(axis, str):
        return analysis.value(node).inner.get(axis)
    factor = analysis.value(node).factor(axis)
    return None if factor is None or len(factor.axes) > 1 else factor


def layer_name(node: fx.Node) -> str:
    """The path of the parameters that a node reads, or its module's."""
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            return str(source.target).rpartition(".")[0] or str(source.target)
    return module_path(node)


def groups_of(plan: Plan) -> tuple[Group, ...]:
    """Every coupled group of producing layers, in order of the graph."""
    analysis = plan.analysis
    component = components(plan.relations)
    expanded: dict[Ref, int] = {}
    for (_, source), found in plan.expansions.items():
        for expansion in found:
            stored: Ref = (source, expansion.axis)
            expanded[component.get(stored, stored)] = expansion.read.size
    members: dict[Ref, list[tuple[str, Ref]]] = {}
    for name, ref in producers(analysis):
        members.setdefault(component.get(ref, ref), []).append((name, ref))
    reasons = {component.get(ref, ref): reason for ref, reason in plan.reasons.items()}
    groups = []
    for root, layers in members.items():
        layout = plan.layout(*layers[0][1])
        slot = layout.slot
        constant, scaled = 0, 0
        # Constants are known where the coupled value was colored: behind the batch norm, say.
        for ref, other in component.items():
            if other != root or analysis.is_constant(ref[0]):
                continue
            factor = coloring_of(analysis, ref)
            if factor is None:
                continue
            constant = max(constant, int((factor.constant & (slot < 0)).sum()))
            kept = slot >= 0
            lead = np.where(kept, factor.scales[layout.representative][np.maximum(slot, 0)], 1.0)
            off = kept & ~factor.constant & (factor.scales != lead)
            scaled = max(scaled, int(off.sum()))
        dropped = int((slot < 0).sum())
        groups.append(
            Group(
                members=tuple(dict.fromkeys(name for name, _ in layers)),
                nodes=layout.full,
                fibers=layout.size,
                merged=layout.full - dropped - layout.size,
                scaled=scaled,
                constant=constant,
                unread=dropped - constant,
                reason=reasons.get(root, ""),
                expanded=expanded.get(root, 0),
                apart=max(plan.apart.get(ref, 0) for _, ref in layers),
            )
        )
    return tuple(groups)


def layer_labels(plan: Plan) -> dict[str, Labels]:
    """The fibers of every producing layer: labels of its nodes, before any layout is decided."""
    analysis = plan.analysis
    found: dict[str, Labels] = {}
    for name, (node, axis) in producers(analysis):
        factor = coloring_of(analysis, (node, axis))
        if factor is None and isinstance(axis, int):
            # Colored behind an op that absorbed it, such as batch norm.
            seen: fx.Node | None = node
            while seen is not None and factor is None:
                uses = analysis.gains.get(seen, [])
                seen = uses[0][0] if uses else None
                factor = analysis.value(seen).factor(axis) if seen is not None else None
        if factor is None:
            labels = np.arange(plan.layout(node, axis).full)
        else:
            # Constants of different value are different fibers; factors do not matter here.
            labels = unique_rows(factor.labels, np.where(factor.constant, factor.scales, 1.0))
        key, number = name, 1
        while key in found:
            number += 1
            key = f"{name} (call {number})"
        found[key] = labels
    return found
