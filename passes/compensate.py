r"""Compensation: the readers of merged nodes are fitted to what the original computes.

Layer by layer, in topological order, with the small network's own activations :math:`a` (behind the
layers that are fitted already) and the original's outputs :math:`z`, each merged as the layer's
nodes are:

.. math:: \min_{W, b}\; E\,|W a + b - z|^2 + \lambda |W - W_0|^2

with :math:`W_0` the columns that merging gave.  Only sums over the inputs are kept: matrices of the
layer's width squared, whatever the number of inputs.  Batch norm behind a fitted layer gets its
statistics changed as the layer's outputs have changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxfib.macs import macs_by_node
from fxfib.passes.batches import examples_of
from fxfib.passes.fits import Fit, LinearFit
from fxfib.passes.forward import module_path
from fxfib.passes.recurrent_fit import RecurrentFit
from fxfib.passes.rewrite import Rewriter
from fxfib.passes.rules import find_rule
from fxfib.passes.rules.base import overloads
from fxfib.passes.rules.recurrent import Recurrent
from fxfib.passes.stages import Room, Stages, Step, silent

BATCH_NORM = set(overloads("batch_norm", "_native_batch_norm_legit_no_training"))
# How much the columns that merging gave count, as a part of the inputs' mean second moment.
RIDGE = 1e-2

SHARED = "{} is not fitted: its parameters are shared or computed"

Batches = Sequence[Sequence[Any]]


def fits_of(rewriter: Rewriter, small: fx.GraphModule, ridge: float) -> tuple[list[Fit], list[str]]:
    """The layers to fit, in order, and notes on layers that cannot be fitted."""
    analysis = rewriter.analysis
    present = set(small.graph.nodes)
    changed: set[fx.Node] = set()
    levels: dict[fx.Node, int] = {}
    found: list[Fit] = []
    notes: list[str] = []
    for node in analysis.graph_module.graph.nodes:
        new = rewriter.images.get(node)
        if node.op != "call_function" or analysis.is_constant(node) or new not in present:
            continue
        assert new is not None
        axes = (
            range(len(node.meta["val"].shape)) if isinstance(node.meta["val"], torch.Tensor) else ()
        )
        narrower = any(rewriter.size(node, a) != analysis.shape(node)[a] for a in axes)
        before = any(source in changed for source in node.all_input_nodes)
        if narrower or before:
            changed.add(node)
        level = max((levels.get(source, 0) for source in node.all_input_nodes), default=0)
        levels[node] = level
        rule = None if node in analysis.opaque else find_rule(node)
        fit: Fit
        if isinstance(rule, Recurrent):
            if not (before or _merged(rewriter, rule, node)):
                continue
            fit = RecurrentFit(rewriter, node, new, level)
            if _shared(fit):
                notes.append(SHARED.format(module_path(node)))
                continue
            levels[node] = level + 1
            found.append(fit)
            continue
        if not before:
            continue  # it reads what the original's reads
        regression = None if rule is None else rule.regression(analysis, node)
        if regression is None:
            if rule is not None and any(rule.produces(analysis, node)):
                notes.append(f"{module_path(node)} is not fitted: {node.target}")
            continue
        if new.target is not node.target:
            notes.append(f"{module_path(node)} is not fitted: merging made it another op")
            continue
        readers = list(new.users)
        norm = readers[0] if len(readers) == 1 and readers[0].target in BATCH_NORM else None
        rows = rewriter.rows(node, regression.axis)
        place = list(node.all_input_nodes).index(regression.source)
        given = list(new.all_input_nodes)[place]
        at = list(node.all_input_nodes).index(regression.weight)
        weight = str(list(new.all_input_nodes)[at].target)
        fit = LinearFit(
            node, regression, rows, level, norm, (given,), (node,), weight, _bias_of(new), ridge
        )
        if _shared(fit):
            notes.append(SHARED.format(module_path(node)))
            continue
        places = [a for a in axes if a != regression.axis % len(axes)]
        if any(rewriter.size(node, a) != analysis.shape(node)[a] for a in places):
            # Rows of both graphs would be paired that are not those of one node.
            notes.append(f"{module_path(node)} is not fitted: what it works along merged, too")
            continue
        levels[node] = level + 1
        found.append(fit)
    return found, notes


def _shared(fit: Fit) -> bool:
    """Whether others read the layer's parameters, too, or they are computed."""
    twice = len(set(fit.parameters)) < len(fit.parameters)
    return twice or any(p.op != "get_attr" or len(p.users) > 1 for p in fit.parameters)


def _merged(rewriter: Rewriter, rule: Recurrent, node: fx.Node) -> bool:
    """Whether nodes of a recurrent module merged."""
    layers = rule.layers(rewriter.analysis, node)
    layouts = [rewriter.layout(node, axis) for x in layers for axis in (x.hidden, x.output)]
    return any(layout.size != layout.full for layout in layouts)


def compensate(
    rewriter: Rewriter,
    small: fx.GraphModule,
    batches: Batches,
    *,
    ridge: float,
    step: Step = silent,
) -> list[str]:
    """Fit every layer that reads merged nodes; ``small`` is changed in place.

    Args:
        rewriter: the one that made ``small``.
        small: the rewritten graph.
        batches: flat inputs of both graphs, batch by batch.
        ridge: weight of the data-free columns, as a part of the mean second moment of the inputs.
        step: told which share of the work is done.

    Returns:
        Notes on layers that were left as they are.
    """
    found, notes = fits_of(rewriter, small, ridge)
    original = rewriter.analysis.graph_module
    examples = sum(map(examples_of, batches))
    levels = [
        [fit for fit in found if fit.level == level]
        for level in sorted({fit.level for fit in found})
    ]
    room = Room()
    theirs = Stages(original, [{n for fit in now for n in fit.wanted} for now in levels], room)
    ours = Stages(small, [{n for fit in now for n in fit.given} for now in levels], room)
    macs = macs_by_node(original)
    # Of every stage what it takes to look, and to solve.
    parts = [
        (1 + sum(macs.get(n, 0) for n in fresh), sum(f.runs * macs.get(f.node, 0) for f in now))
        for fresh, now in zip(theirs.fresh, levels, strict=True)
    ]
    total, done = sum(map(sum, parts)), 0.0
    with torch.no_grad():
        for stage, now in enumerate(levels):
            for number, batch in enumerate(batches):
                expected = dict(theirs.run(stage, number, batch))
                given = dict(ours.run(stage, number, batch))
                for fit in now:
                    ours_read = [given[node] for node in fit.given]
                    fit.observe(small, ours_read, [expected[node] for node in fit.wanted], examples)
                step("compensate", (done + parts[stage][0] * (number + 1) / len(batches)) / total)
            done += parts[stage][0]
            for fit in now:
                own, start = fit.runs * macs.get(fit.node, 0), done
                for run in fit.solve(small):
                    step("compensate", (start + own * run / max(fit.runs, 1)) / total)
                done += own
    return notes


def _bias_of(node: fx.Node) -> str | None:
    """The name of the merged layer's own bias."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    own = "self" if "addmm" in str(node.target) else "bias"
    if own not in names:
        return None
    place = names.index(own)
    bias = node.args[place] if place < len(node.args) else node.kwargs.get("bias")
    return str(bias.target) if isinstance(bias, fx.Node) else None
