"""What optimizers remember of single entries of parameters, and how they forget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxfib.errors import InputError, RefusedError

#: One optimizer, or several that share a model's parameters.
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


class Memory:
    """The states of all optimizers of a model.

    Raises:
        InputError: there is none, or something else.
        RefusedError: one of them is not of ``torch.optim``, or is ``LBFGS``.
    """

    def __init__(self, optimizers: Optimizers) -> None:
        if isinstance(optimizers, torch.optim.Optimizer):
            optimizers = (optimizers,)
        self.optimizers = tuple(optimizers) if isinstance(optimizers, Sequence) else (optimizers,)
        if not self.optimizers:
            raise InputError("there is no optimizer.")
        for optimizer in self.optimizers:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise InputError(f"{type(optimizer).__name__} is no optimizer.")
        for optimizer in self.optimizers:
            _refuse(optimizer)

    def group(self, tensor: Tensor) -> tuple[torch.optim.Optimizer, dict[str, Any]] | None:
        """Who trains a parameter, and with which options; None: nobody."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if any(parameter is tensor for parameter in group["params"]):
                    return optimizer, group
        return None

    def entries(self, tensor: Tensor) -> dict[str, Tensor]:
        """The numbers of single entries, or rows and columns, of a parameter."""
        found = self.group(tensor)
        state = found[0].state.get(tensor, {}) if found else {}
        return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.ndim}

    def forget(self, tensor: Tensor, axis: int, rows: Tensor) -> None:
        """Start anew for rows along an axis, as for a new parameter; their gradients are zero."""
        if tensor.grad is not None:
            tensor.grad.movedim(axis, 0)[rows] = 0.0
        found = self.group(tensor)
        start = {"sum": "initial_accumulator_value", "step_size": "lr"}
        for key, value in self.entries(tensor).items():
            if value.shape[axis] != tensor.shape[axis]:
                continue  # what all nodes share
            if key == "ax":  # an average of the parameter itself
                value.movedim(axis, 0)[rows] = tensor.movedim(axis, 0)[rows]
            else:
                fresh = float(found[1][start[key]]) if found and key in start else 0.0
                value.movedim(axis, 0)[rows] = fresh

    def refuse_shapes(self, tensor: Tensor, name: str) -> None:
        """Stop where a state's shape tells no node from another.

        Raises:
            RefusedError: which one.
        """
        for key, value in self.entries(tensor).items():
            sizes = zip(value.shape, tensor.shape, strict=False)
            if value.ndim != tensor.ndim or any(v not in (1, t) for v, t in sizes):
                raise RefusedError(
                    f"an optimizer keeps {key!r} of {name} in a "
                    "shape that tells no node from another; use another one."
                )


def _refuse(optimizer: torch.optim.Optimizer) -> None:
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise RefusedError("LBFGS keeps a history of whole steps; no entry of it can be reset.")
    known = any(
        f"{cls.__module__}.".startswith("torch.optim.") and cls is not torch.optim.Optimizer
        for cls in type(optimizer).__mro__
    )
    if not known:
        raise RefusedError(
            f"how {name} starts the state of a parameter is not known; use one of torch.optim."
        )
