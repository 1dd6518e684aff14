"""The errors of a captured model, colored and run, beside those of autograd."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from fxfib.capture import Captured
from fxfib.passes.backward import Colored, Continued
from fxfib.passes.verify import Float64

import oracles


@dataclass
class Errors:
    """A continued graph with all its numbers.

    Attributes:
        values: of every node, errors among them.
        true: what autograd says of the error of every value that has one.
    """

    analysis: Colored
    continued: Continued
    values: dict[fx.Node, Any]
    true: dict[fx.Node, Tensor | None]


def errors_of(
    captured: Captured | fx.GraphModule,
    eps: float = 0.0,
    seed: int = 3,
    batch_statistics: bool = False,
) -> Errors:
    """Color everything; run both graphs on the same inputs and output errors, in float64."""
    graph = captured if isinstance(captured, fx.GraphModule) else captured.graph_module
    continued = Continued(graph, batch_statistics)
    analysis = continued.color(eps)
    inputs = [
        i.double() if isinstance(i, Tensor) and i.is_floating_point() else i
        for i in oracles.random_inputs(SimpleNamespace(graph_module=graph), seed)
    ]
    kept = autograd(continued, inputs)
    generator = torch.Generator().manual_seed(seed + 1)
    seeds = [torch.randn(kept[n].shape, generator=generator, dtype=torch.float64)
             for n, _ in continued.seeds]  # fmt: skip
    values = run(analysis.graph_module, [*inputs, *seeds])
    torch.autograd.backward([kept[n] for n, _ in continued.seeds], seeds)
    return Errors(analysis, continued, values, {n: t.grad for n, t in kept.items()})


def autograd(continued: Continued, inputs: list[Any]) -> dict[fx.Node, Tensor]:
    """Every value of the forward pass, with its gradient kept."""
    skipped = continued.added
    kept: dict[fx.Node, Tensor] = {}

    class Keeping(Float64):
        def run_node(self, n: fx.Node) -> Any:
            if n in skipped:
                return None
            result = super().run_node(n)
            if isinstance(result, Tensor) and result.is_floating_point() and n.op != "get_attr":
                if n.op == "placeholder":
                    result = result.detach().requires_grad_()
                if result.requires_grad:
                    result = result.view_as(result)
                    result.retain_grad()
                    kept[n] = result
            return result

    with torch.enable_grad():
        Keeping(continued.graph_module).run(*inputs)
    return kept


def run(graph_module: fx.GraphModule, inputs: list[Any]) -> dict[fx.Node, Any]:
    """Every value of a graph."""
    seen: dict[fx.Node, Any] = {}

    class Recorder(Float64):
        def run_node(self, n: fx.Node) -> Any:
            seen[n] = super().run_node(n)
            return seen[n]

    with torch.no_grad():
        Recorder(graph_module).run(*inputs)
    return seen


def emitted_as_autograd(errors: Errors) -> int:
    """Every error that the graph computes is the one of autograd; how many were compared."""
    count = 0
    for node, error in errors.continued.errors.items():
        if node in errors.continued.added or node not in errors.true:
            continue  # of a call that was written out, or filled with a number
        found = errors.values[error]
        expected = errors.true[node]
        if expected is None:
            expected = torch.zeros_like(found)
        finite = torch.isfinite(expected)
        size = float(expected[finite].abs().max()) if finite.any() else 0.0
        gap = float((found - expected)[finite].abs().max()) if finite.any() else 0.0
        assert gap <= 1e-9 * max(size, 1e-3), (
            f"the error of {node} ({node.target}) is {gap:.3g} off of {size:.3g}"
        )
        count += 1
    return count


def equal_in_opfibers(errors: Errors) -> int:
    """Errors of equal color are equal up to their scales, at every node; pairs compared."""
    pairs = 0
    for node in errors.continued.graph_module.graph.nodes:
        if node not in errors.continued.added:
            continue
        value = errors.analysis.values.get(node)
        if value is None or not isinstance(errors.values.get(node), Tensor):
            continue
        if not errors.values[node].is_floating_point():
            continue
        errors.analysis.color(node)
        alone = [f.along(axis) for f in value.factors for axis in f.axes if len(f.axes) > 1]
        for factor in [*value.factors, *alone]:
            pairs += oracles._agree(node, errors.values[node], factor, 1e-9)
    return pairs
