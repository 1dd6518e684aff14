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

import numpy as np
import torch
from torch import fx, nn

from fxfib.errors import InputError
from fxfib.macs import macs_by_node
from fxfib.passes.batches import examples_of
from fxfib.passes.fits import Fit, Moments, recurrent_fits
from fxfib.passes.forward import module_path
from fxfib.passes.regression import positions_of
from fxfib.passes.rewrite import Rewriter
from fxfib.passes.rules import find_rule
from fxfib.passes.rules.base import overloads
from fxfib.passes.rules.recurrent import Recurrent
from fxfib.passes.stages import Room, Stages, Step, silent

BATCH_NORM = set(overloads("batch_norm", "_native_batch_norm_legit_no_training"))
# Rows beyond this many for each column of a layer's design say little more.
ROWS_PER_COLUMN = 24
FEWEST_ROWS = 40_000
# Numbers of a design that are in memory at a time.
NUMBERS_AT_ONCE = 2**24
# How much the columns that merging gave count, as a part of the inputs' mean second moment.
RIDGE = 1e-2

Batches = Sequence[Sequence[Any]]


def fits_of(rewriter: Rewriter, small: fx.GraphModule) -> tuple[list[Fit], list[str]]:
    """The layers to fit, in order, and notes on layers that cannot be fitted."""
    analysis = rewriter.analysis
    present = set(small.graph.nodes)
    changed: set[fx.Node] = set()
    levels: dict[fx.Node, int] = {}
    found, notes = [], []
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
        if not before:
            continue  # it reads what the original's reads
        if isinstance(rule, Recurrent):
            own = [fit for fit in recurrent_fits(rewriter, node, new, level) if not _shared(fit)]
            found += own
            levels[node] = level + bool(own)
            notes.append(f"{module_path(node)} is fitted on its inputs alone: {node.target}")
            continue
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
        fit = Fit(
            node, new, regression, rows, level, norm, given, node, weight, _bias_of(new)
        )  # fmt: skip
        if _shared(fit):
            notes.append(
                f"{module_path(node)} is not fitted: its parameters are shared or computed"
            )
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
    parameters = [p for p in (fit.regression.weight, fit.regression.bias) if p is not None]
    return any(p.op != "get_attr" or len(p.users) > 1 for p in parameters)


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
    found, notes = fits_of(rewriter, small)
    original = rewriter.analysis.graph_module
    examples = sum(map(examples_of, batches))
    levels = [
        [fit for fit in found if fit.level == level]
        for level in sorted({fit.level for fit in found})
    ]
    room = Room()
    theirs = Stages(original, [{fit.wanted for fit in now} for now in levels], room)
    ours = Stages(small, [{fit.given for fit in now} for now in levels], room)
    macs = macs_by_node(original)
    work = np.cumsum([0, *(1 + sum(macs.get(n, 0) for n in fresh) for fresh in theirs.fresh)])
    with torch.no_grad():
        for stage, now in enumerate(levels):
            for number, batch in enumerate(batches):
                expected = dict(theirs.run(stage, number, batch))
                given = dict(ours.run(stage, number, batch))
                for fit in now:
                    _observe(fit, given[fit.given], expected[fit.wanted], examples)
                done = work[stage] + (work[stage + 1] - work[stage]) * (number + 1) / len(batches)
                step("compensate", done / work[-1])
            for fit in now:
                _solve(fit, small, ridge)
                fit.moments = Moments()
    return notes


def _observe(fit: Fit, given: Any, expected: Any, examples: int) -> None:
    regression = fit.regression
    small = fit.new.graph.owning_module
    assert small is not None
    weight = tensor_at(small, fit.weight)
    width = regression.matrix(weight).shape[1]
    most = max(1, -(-max(FEWEST_ROWS, ROWS_PER_COLUMN * width) // examples))
    shape = tuple(expected.shape) if isinstance(expected, torch.Tensor) else ()
    positions = positions_of(shape, regression.axis, most, fit.moments.count)
    one = regression.design(given, positions[:1], weight).numel()
    for chosen in positions.split(max(1, NUMBERS_AT_ONCE // max(1, one))):
        design = _wide(regression.design(given, chosen, weight))
        response = _wide(fit.rows.apply(regression.response(expected, chosen), 1))
        groups = len(design)
        fit.moments.add(design, response.unflatten(1, (groups, -1)).transpose(0, 1))


def _wide(rows: torch.Tensor) -> torch.Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


def _solve(fit: Fit, small: fx.GraphModule, ridge: float) -> None:
    regression, moments = fit.regression, fit.moments
    name = fit.weight
    old = tensor_at(small, name)
    count = moments.count
    mean_a, mean_z = moments.a / count, moments.z / count
    groups, width = mean_a.shape
    start = regression.matrix(old).double().reshape(groups, -1, width)
    bias_name = fit.bias
    # Batch norm takes up a shift, as a bias does; without either there is none.
    centred = bias_name is not None or fit.norm is not None
    shift_a, shift_z = (mean_a, mean_z) if centred else (0 * mean_a, 0 * mean_z)
    # The widest layers' matrices are most of the memory, so they are changed in place.
    gram, cross = moments.aa.div_(count), moments.az.div_(count)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    weight = ridge * diagonal.mean(1).clamp(min=1e-30)[:, None, None]
    gram.baddbmm_(shift_a[:, :, None], shift_a[:, None], alpha=-1)
    cross.baddbmm_(shift_a[:, :, None], shift_z[:, None], alpha=-1)
    diagonal += weight[:, 0]
    cross += weight * start.transpose(1, 2)
    if not bool(torch.isfinite(gram).all() and torch.isfinite(cross).all()):
        raise InputError(
            f"{module_path(fit.node)} cannot be fitted: on the calibration inputs it reads or "
            "gives NaN or infinite values; leave those inputs out, or give the model in a wider "
            "dtype."
        )
    solved = torch.cholesky_solve(cross, torch.linalg.cholesky(gram)).transpose(1, 2)
    _set(small, name, regression.tensor(solved.flatten(0, 1), old))
    mean = torch.einsum("god,gd->go", solved, mean_a).flatten()
    mean_z = mean_z.flatten()
    if bias_name is not None:
        assert tensor_at(small, bias_name).shape == mean_z.shape
        _set(small, bias_name, mean_z - mean)
    if fit.norm is not None:
        offset = 0.0 if bias_name is None else tensor_at(small, bias_name).double()
        variance = (solved @ gram * solved).sum(2) - weight[:, 0] * solved.square().sum(2)
        before = moments.zz.flatten() / count - mean_z**2
        _renormalise(fit.norm, small, mean + offset - mean_z, variance.flatten(), before)


def _renormalise(
    norm: fx.Node,
    small: fx.GraphModule,
    shift: torch.Tensor,
    variance: torch.Tensor,
    before: torch.Tensor,
) -> None:
    """Statistics of batch norm, changed as its inputs were: robust to inputs of another kind."""
    names = [str(n.target) for n in norm.args[3:5] if isinstance(n, fx.Node)]
    if len(names) != 2 or any(len(n.users) > 1 for n in norm.args[3:5]):  # type: ignore[union-attr]
        return
    mean, var = (tensor_at(small, name) for name in names)
    factor = (variance / before.clamp(min=1e-30)).clamp(0.01, 100.0)
    _set(small, names[0], mean.double() + shift)
    _set(small, names[1], var.double() * torch.where(before > 1e-12, factor, 1.0))


def _bias_of(node: fx.Node) -> str | None:
    """The name of the merged layer's own bias."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    own = "self" if "addmm" in str(node.target) else "bias"
    if own not in names:
        return None
    place = names.index(own)
    bias = node.args[place] if place < len(node.args) else node.kwargs.get("bias")
    return str(bias.target) if isinstance(bias, fx.Node) else None


def tensor_at(module: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer of this path, without its history."""
    result: Any = module
    for part in name.split("."):
        result = getattr(result, part)
    return result.detach()


def _set(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """A new tensor in place of an old one, whose memory may be the original model's."""
    owner: Any = module
    *path, leaf = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    old = getattr(owner, leaf)
    fresh = value.to(old.dtype).reshape(old.shape).contiguous()
    if isinstance(old, nn.Parameter):
        fresh = nn.Parameter(fresh, requires_grad=old.requires_grad)
    setattr(owner, leaf, fresh)
