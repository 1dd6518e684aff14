"""One forward and one backward pass of a captured model in float64, for the theorems."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fxfib.capture import Captured, normalize_inputs
from fxfib.errors import InputError
from fxfib.passes.backward import Continued
from fxfib.passes.verify import Float64


class Run:
    """One forward and backward pass of a captured model in float64.

    Attributes:
        values: the activations, by node.
        gradients: of the activations.
        updates: gradients of the parameters, by name.
        errors: of the activations, as the rules propagate them.
        loss: its value.
    """

    def __init__(
        self,
        captured: Captured,
        continued: Continued,
        loss_fn: Callable[[Any], Tensor],
        example_inputs: Any,
        example_kwargs: Mapping[str, Any] | None,
    ) -> None:
        self.captured, self.continued, self.loss_fn = captured, continued, loss_fn
        given = normalize_inputs(captured.source, example_inputs, example_kwargs)
        self.inputs = [_wide(leaf) for leaf in pytree.tree_leaves(given)]
        self.values: dict[fx.Node, Tensor] = {}
        self.parameters: dict[str, Tensor] = {}
        trained = dict(captured.graph_module.named_parameters())
        outer = self

        class Forward(Float64):
            def run_node(self, n: fx.Node) -> Any:
                if n in continued.added:
                    return None
                result = super().run_node(n)
                if not isinstance(result, Tensor) or not result.is_floating_point():
                    return result
                if n.op == "get_attr":
                    result = result.detach().double()
                    if str(n.target) in trained:
                        outer.parameters[str(n.target)] = result.requires_grad_()
                elif n.op == "placeholder":
                    result = result.detach().requires_grad_()
                elif result.requires_grad:
                    result = result.view_as(result)
                if result.requires_grad:
                    result.retain_grad()
                outer.values[n] = result
                return result

        with torch.enable_grad():
            outputs = Forward(continued.graph_module).run(*self.inputs)
            loss = self.loss_of(outputs)
            loss.backward()
        self.loss = float(loss.detach())
        seeds = [error_of(self.values[node]) for node, _ in continued.seeds]
        self.errors = self.backward(self.inputs, seeds)

    def loss_of(self, outputs: Any) -> Tensor:
        """The loss of the graph's flat outputs."""
        loss = self.loss_fn(pytree.tree_unflatten(list(outputs), self.captured.out_spec))
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not bool(torch.isfinite(loss)):
            raise InputError("loss_fn must return a finite scalar tensor.")
        if not loss.requires_grad and torch.is_grad_enabled():
            raise InputError("loss_fn must return a tensor that depends on the model's output.")
        return loss

    def forward(self, inputs: list[Any]) -> dict[fx.Node, Tensor]:
        """The values of the forward pass on other inputs."""
        found: dict[fx.Node, Tensor] = {}
        added = self.continued.added

        class Forward(Float64):
            def run_node(self, n: fx.Node) -> Any:
                result = None if n in added else super().run_node(n)
                if isinstance(result, Tensor) and result.is_floating_point():
                    found[n] = result.double()
                return result

        with torch.no_grad():
            Forward(self.continued.graph_module).run(*inputs)
        return found

    def backward(self, inputs: list[Any], seeds: list[Tensor]) -> dict[fx.Node, Tensor]:
        """The errors of the values, propagated from those of the outputs."""
        wanted = {error: node for node, error in self.continued.errors.items()}
        found: dict[fx.Node, Tensor] = {}

        class Backward(Float64):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                if n in wanted:
                    found[n] = result
                return result

        with torch.no_grad():
            Backward(self.continued.graph_module).run(*inputs, *seeds)
        return {node: found[error] for error, node in wanted.items() if error in found}


def _wide(leaf: Any) -> Any:
    floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return leaf.detach().double() if floating else leaf


def error_of(value: Tensor) -> Tensor:
    """What autograd says; zero where the loss does not depend on a value."""
    return torch.zeros_like(value) if value.grad is None else value.grad
