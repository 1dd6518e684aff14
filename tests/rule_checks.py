"""Every oracle on one example: what the rules are tested with, and wrong rules are caught by."""

import torch
from torch import nn

import fxfib
from fxfib.capture import Captured, capture
from fxfib.modules import raise_modules
from fxfib.passes.rules.examples import Example
from fxfib.passes.verify import difference, run_float64

import oracles


def as_dtype(example: Example, dtype: torch.dtype) -> tuple[nn.Module, tuple[object, ...]]:
    """Module and inputs in another dtype."""
    inputs = tuple(
        i.to(dtype) if isinstance(i, torch.Tensor) and i.is_floating_point() else i
        for i in example.inputs
    )
    return example.module.to(dtype), inputs


def check_colors(captured: Captured) -> None:
    """The forward oracle, and that it compared something."""
    assert oracles.activations_equal_in_colors(captured, oracles.analyze(captured)) > 0


def check_result(captured: Captured, example: Example, *, slots: bool = True) -> nn.Module:
    """Expected slots, nothing refused for want of fit, the same function in float64."""
    plan, rewritten = oracles.plan_of(captured)
    if slots:
        oracles.planned_as_expected(plan, example.slots)
    inputs = oracles.random_inputs(captured, seed=5)
    gap = difference(run_float64(captured.graph_module, inputs), run_float64(rewritten, inputs))
    tolerance = oracles.tolerance_of(captured.graph_module)
    assert gap.relative <= tolerance, f"outputs differ by {gap.relative:.3g} (relative)"
    return raise_modules(rewritten, captured).eval()


def check_all(
    example: Example, dtype: torch.dtype, captured: Captured | None = None, *, slots: bool = True
) -> nn.Module:
    """Everything on one example; the raised result."""
    module, inputs = as_dtype(example, dtype)
    before = oracles.parameters_unchanged(module)
    captured = captured or capture(module, inputs)
    check_colors(captured)
    small = check_result(captured, example, slots=slots)
    oracles.outputs_equal(module, small, inputs)
    before.check(module)
    return small


def check_again(small: nn.Module, inputs: tuple[object, ...]) -> None:
    """A result compiles to itself."""
    again = fxfib.compile(small, 0.0, inputs)
    before = {name: tuple(p.shape) for name, p in small.named_parameters()}
    after = {name: tuple(p.shape) for name, p in again.named_parameters()}
    assert before == after
