"""What was done and how far it is off: the report of a compile and its proof on real inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from fxfib._version import __version__
from fxfib.capture import Captured
from fxfib.errors import VerifyError
from fxfib.macs import macs_of
from fxfib.passes.criteria import Eps
from fxfib.passes.groups import groups_of
from fxfib.passes.picture import layers_of
from fxfib.passes.plan import Plan
from fxfib.passes.rules.base import hint
from fxfib.passes.verify import TOLERANCE, Difference, difference, full_precision, run_float64
from fxfib.report import Report


def _parameters(graph_module: nn.Module) -> int:
    return sum(p.numel() for p in graph_module.parameters())


def _unused(captured: Captured) -> list[str]:
    """A note on parameters that forward never reads: they are in no count and not in the result."""
    total = sum(p.numel() for p in captured.source.parameters())
    unused = total - _parameters(captured.graph_module)
    return [f"{unused:,} parameters that forward does not use are left out"] if unused > 0 else []


def batch_of(captured: Captured) -> int:
    """The example's batch size, where MACs can be given for one example."""
    for node in captured.graph_module.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.ndim and captured.dynamic_batch:
            return max(hint(value.shape[0]), 1)
    return 1


def report_of(
    captured: Captured, plan: Plan, rewritten: fx.GraphModule, eps: Eps, criterion: str
) -> Report:
    """Sizes, groups and refusals of a compile, without measured errors."""
    batch = batch_of(captured)
    tensors: list[torch.Tensor] = [*captured.source.parameters()] or [*captured.source.buffers()]
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in tensors})
    groups = groups_of(plan)
    return Report(
        model=type(captured.source).__name__,
        eps=max(eps.values(), default=0.0) if isinstance(eps, Mapping) else eps,
        precisions=dict(eps) if isinstance(eps, Mapping) else {},
        criterion=criterion,
        dtype=", ".join(dtypes),
        device=str(tensors[0].device),
        parameters_before=_parameters(captured.graph_module),
        parameters_after=_parameters(rewritten),
        macs_before=macs_of(captured.graph_module) // batch,
        macs_after=macs_of(rewritten) // batch,
        groups=groups,
        refusals=tuple(plan.analysis.refusals),
        notes=(*captured.notes, *_unused(captured)),
        versions={"fxfib": __version__, "torch": torch.__version__},
        layers=layers_of(plan, groups, rewritten),
    )


def verified(
    report: Report,
    captured: Captured,
    rewritten: fx.GraphModule,
    small: nn.Module,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
) -> Report:
    """The report with measured errors.

    Raises:
        VerifyError: at eps = 0, a relative error above the tolerance of the coarsest dtype.
    """
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), full_precision(captured.source):
        torch.manual_seed(0)
        expected = pytree.tree_leaves(captured.source(*args, **kwargs))
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), inputs)
        torch.manual_seed(0)
        found = pytree.tree_leaves(small(*args, **kwargs))
    gap = difference(expected, found)
    values: dict[str, Any] = {"error": gap.absolute, "relative_error": gap.relative}
    if report.eps == 0.0:
        dtypes = [t.dtype for t in [*captured.source.parameters(), *captured.source.buffers()]]
        tolerance = max((TOLERANCE[d] for d in dtypes if d in TOLERANCE), default=1e-4)
        exact = _exact_difference(captured, rewritten, inputs)
        values |= {"exact_error": exact.relative, "tolerance": tolerance}
        worst = max(gap.relative, exact.relative)
        if not worst <= tolerance:
            raise VerifyError(
                f"the compiled {report.model} differs from the original by {worst:.2g} (relative) "
                f"on the example inputs, above the tolerance of {tolerance:g}; nothing was "
                "returned."
            )
    return Report(**{**vars(report), **values})


def _exact_difference(captured: Captured, rewritten: fx.GraphModule, inputs: Any) -> Difference:
    leaves = pytree.tree_leaves(inputs)
    count = len(captured.graph_module.graph.find_nodes(op="placeholder"))
    assert len(leaves) == count, "captured inputs and example inputs are flattened alike"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = run_float64(captured.graph_module, leaves)
        torch.manual_seed(0)
        found = run_float64(rewritten, leaves)
    return difference(expected, found)
