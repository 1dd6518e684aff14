"""What must hold for every compile: the oracles that the tests share."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

import fxfib
from fxfib.capture import Captured, capture
from fxfib.coloring import FIRST_FREE, ONE, Factor
from fxfib.passes.forward import Analysis
from fxfib.passes.plan import Plan
from fxfib.passes.propagation import UnfitError
from fxfib.passes.verify import TOLERANCE, Float64, difference
from fxfib.workshop import shrink

DYNAMIC = 16  # rows of a batch of any size: enough to see what a ReLU hides in two
UNFIT = "the merged op does not fit"


class Keeping(Analysis):
    """An analysis that forgets no rows, so that every value can still be colored at the end."""

    def release(self, node: fx.Node) -> None:
        pass


def analyze(captured: Captured, eps: float = 0.0) -> Analysis:
    """The forward coloring of a captured model, every value colored."""
    analysis = Keeping(captured.graph_module, eps).run()
    for node in captured.graph_module.graph.nodes:
        if node in analysis.values and isinstance(node.meta.get("val"), Tensor):
            analysis.color(node)
    return analysis


def tolerance_of(module: nn.Module) -> float:
    """The one table, by the coarsest dtype of the parameters."""
    tensors = [*module.parameters(), *module.buffers()]
    return max((TOLERANCE[t.dtype] for t in tensors if t.dtype in TOLERANCE), default=1e-9)


def random_inputs(captured: Captured, seed: int = 3) -> list[Any]:
    """Fresh inputs of the captured shapes: wide normal numbers (a ReLU6 clips), small indices."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for node in captured.graph_module.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        shape = [s if isinstance(s, int) else DYNAMIC for s in value.shape]
        if value.dtype.is_floating_point:
            found.append(3 * torch.randn(shape, generator=generator, dtype=torch.float64))
        else:
            found.append(torch.randint(0, 2, shape, generator=generator).to(value.dtype))
    return found


def activations_equal_in_colors(
    captured: Captured, analysis: Analysis, inputs: list[Any] | None = None
) -> int:
    """Values of equal color agree up to their scales at every node; constants have their value.

    Returns:
        How many pairs of nodes of one color were compared.
    """
    tolerance = tolerance_of(captured.graph_module)
    seen: dict[fx.Node, Any] = {}

    class Recorder(Float64):
        def run_node(self, n: fx.Node) -> Any:
            seen[n] = super().run_node(n)
            return seen[n]

    with torch.no_grad():
        given = random_inputs(captured) if inputs is None else inputs
        given = [
            i.double() if isinstance(i, Tensor) and i.is_floating_point() else i for i in given
        ]
        Recorder(captured.graph_module).run(*given)
    pairs = 0
    for node, value in analysis.values.items():
        if not isinstance(seen.get(node), Tensor):
            continue
        axes = [axis for factor in value.factors for axis in factor.axes]
        assert len(axes) == len(set(axes)), f"{node}: an axis is colored twice"
        alone = [f.along(axis) for f in value.factors for axis in f.axes if len(f.axes) > 1]
        for factor in [*value.factors, *alone]:
            pairs += _agree(node, seen[node], factor, tolerance)
    return pairs


def _agree(node: fx.Node, tensor: Tensor, factor: Factor, tolerance: float) -> int:
    sizes = tuple(tensor.shape[axis] for axis in factor.axes)
    assert sizes == factor.labels.shape, f"{node}: {factor.labels.shape} labels, {sizes} nodes"
    table = tensor.movedim(factor.axes, tuple(range(len(factor.axes)))).reshape(
        int(np.prod(sizes)), -1
    )
    labels, scales = factor.labels.reshape(-1), factor.scales.reshape(-1)
    assert (factor.scales > 0)[factor.labels >= FIRST_FREE].all(), (
        f"{node}: a scale is not positive"
    )
    if table.shape[1] == 0:
        return 0
    wide = table.detach().to(torch.float64)
    finite = wide[torch.isfinite(wide)]
    size = float(finite.abs().max()) if len(finite) else 1.0
    size = size if size > 0 else 1.0
    pairs = 0
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if label >= FIRST_FREE:
            lead = wide[members[0]] / scales[members[0]]
            members = members[1:]
        pairs += len(members)
        for member in members:
            if label < FIRST_FREE:
                want = torch.full_like(wide[member], scales[member] if label == ONE else 0.0)
            else:
                want = lead * scales[member]
            same = (wide[member] == want) | (wide[member].isnan() & want.isnan())
            gap = torch.where(same, 0.0, (wide[member] - want).abs())
            assert bool((gap <= tolerance * size).all()), (
                f"{node} ({node.target}): node {member} of axes {factor.axes} is not of its color "
                f"{label}: {float(gap.max()):.3g} off"
            )
    return pairs


def outputs_equal(model: nn.Module, small: nn.Module, inputs: Any, kwargs: Any = None) -> None:
    """Both give the same flat outputs, by the one table of tolerances."""
    with torch.no_grad():
        expected = pytree.tree_leaves(model(*inputs, **(kwargs or {})))
        found = pytree.tree_leaves(small(*inputs, **(kwargs or {})))
    gap = difference(expected, found)
    assert gap.relative <= tolerance_of(model), f"outputs differ by {gap.relative:.3g} (relative)"


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def idempotent(small: nn.Module, inputs: Any, eps: float = 0.0) -> nn.Module:
    """Compiling the result once more changes nothing."""
    again = fxfib.compile(small, eps, tuple(inputs))
    first = {name: tuple(p.shape) for name, p in small.named_parameters()}
    second = {name: tuple(p.shape) for name, p in again.named_parameters()}
    assert first == second, "the second compile changes shapes: " + ", ".join(
        f"{name} {first.get(name)} -> {second.get(name)}"
        for name in {**first, **second}
        if first.get(name) != second.get(name)
    )
    outputs_equal(small, again, inputs)
    return again


class Snapshot:
    """Every bit of a module: tensors, their identity, hooks and modes."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {
            name: (tensor, tensor.detach().clone(), tensor.requires_grad, tensor._version)
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        }
        self.modes = {name: module.training for name, module in model.named_modules()}
        self.hooks = self._hooks(model)
        self.attributes = {name: set(vars(module)) for name, module in model.named_modules()}

    @staticmethod
    def _hooks(model: nn.Module) -> dict[str, dict[str, list[Any]]]:
        return {
            name: {
                key: list(value) for key, value in vars(module).items() if "hooks" in key and value
            }
            for name, module in model.named_modules()
        }

    def check(self, model: nn.Module) -> None:
        now = dict([*model.named_parameters(), *model.named_buffers()])
        assert now.keys() == self.tensors.keys()
        for name, (tensor, copied, trains, version) in self.tensors.items():
            assert now[name] is tensor, f"{name} was replaced"
            assert now[name]._version == version, f"{name} was written to"
            assert now[name].requires_grad == trains
            equal = torch.equal(now[name], copied) or bool(copied.isnan().any())
            assert equal, f"{name} changed"
        assert self.modes == {name: module.training for name, module in model.named_modules()}
        assert self.hooks == self._hooks(model)
        assert self.attributes == {name: set(vars(m)) for name, m in model.named_modules()}


def parameters_unchanged(model: nn.Module) -> Snapshot:
    """A snapshot to ``check`` later."""
    return Snapshot(model)


def canonical(slots: Any) -> tuple[int, ...]:
    """A partition with its dropped nodes: -1 for those, classes by first appearance."""
    number: dict[int, int] = {}
    return tuple(-1 if s < 0 else number.setdefault(int(s), len(number)) for s in slots)


def slots_of(plan: Plan, parameter: str, axis: int) -> tuple[int, ...]:
    """The planned slots of one axis of a parameter, canonical."""
    for node in plan.analysis.graph_module.graph.find_nodes(op="get_attr"):
        if node.target == parameter:
            return canonical(plan.layout(node, axis).slot)
    raise AssertionError(f"the graph reads no parameter {parameter}")


def plan_of(captured: Captured, eps: float = 0.0) -> tuple[Plan, fx.GraphModule]:
    """Plan and rewritten graph; a rule whose op does not fit fails the test."""
    try:
        plan, rewritten = shrink(captured.graph_module, eps)
    except UnfitError as error:
        raise AssertionError(f"{error.node}: {error}") from error
    unfit = [r for r in plan.analysis.refusals if UNFIT in r.reason]
    assert not unfit, f"{unfit[0].op} at {unfit[0].node}: {unfit[0].reason}"
    return plan, rewritten


def planned_as_expected(plan: Plan, slots: Mapping[tuple[str, int], tuple[int, ...]]) -> None:
    """Every named parameter has exactly the expected slots."""
    wrong = []
    for (name, axis), labels in slots.items():
        found = slots_of(plan, name, axis)
        if found != canonical(labels):
            wrong.append(f"{name}[{axis}]\n    found    {found}\n    expected {canonical(labels)}")
    assert not wrong, "other slots than expected:\n  " + "\n  ".join(wrong)


def permutation_invariant(
    model: nn.Module, inputs: tuple[Any, ...], layer: str, consumer: str, seed: int = 0
) -> None:
    """Permuting the hidden nodes between two layers permutes the labels, and nothing else."""
    permuted = copy.deepcopy(model)
    first, second = permuted.get_submodule(layer), permuted.get_submodule(consumer)
    size = first.weight.shape[0]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        first.weight.copy_(first.weight[order])
        if first.bias is not None:
            first.bias.copy_(first.bias[order])
        second.weight.copy_(second.weight[:, order])
    outputs_equal(model, permuted, inputs)
    found = []
    for module in (model, permuted):
        plan, _ = plan_of(capture(module, inputs))
        found.append((slots_of(plan, f"{layer}.weight", 0), plan))
    expected = canonical(np.asarray(found[0][0])[order.numpy()])
    assert found[1][0] == expected, f"{found[1][0]} after the permutation, not {expected}"
