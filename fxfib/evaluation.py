"""Losses of small networks on the user's data."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from fxfib.calibration import checked_batch
from fxfib.capture import Captured
from fxfib.errors import InputError
from fxfib.passes.batches import examples_of
from fxfib.passes.stages import Step, silent


class Evaluator:
    """Mean loss over all batches, weighted by their sizes.

    Args:
        captured: the original.
        data: batches ``(inputs, target)`` with a loss function, inputs without one; iterated once
            for every evaluation, so a list or a ``DataLoader``, no generator.
        loss_fn: ``loss_fn(output, target)``; None: the squared difference from the original's
            outputs over their variance.
        step: told which share of an evaluation is done.

    Attributes:
        original: loss of the original (0 without a loss function).
        examples: how many there are.
        mark: what tells these data from others, in whatever order they come.

    Raises:
        InputError: data that can be read only once, is empty, or does not fit the model; a loss
            that is no number, or not finite for the original.
    """

    def __init__(
        self,
        captured: Captured,
        data: Any,
        loss_fn: Callable[..., Any] | None = None,
        step: Step = silent,
    ) -> None:
        if isinstance(data, torch.Tensor):
            data = [data]
        if iter(data) is data:
            raise InputError("data must be read again and again: a list or a DataLoader.")
        self.captured = captured
        self.data = data
        self.loss_fn = loss_fn
        self.step = step
        self.examples, self.mark = 0, ""
        self.original = self.loss(captured.graph_module)
        if not math.isfinite(self.original):
            raise InputError(f"the original's own loss on data is {self.original}.")

    def loss(self, graph_module: fx.GraphModule) -> float:
        """The loss of a graph that takes the captured inputs.

        Raises:
            InputError: see the class.
        """
        total, count = 0.0, 0
        batches = len(self.data) if hasattr(self.data, "__len__") else 0
        moments, seen = torch.zeros(3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for number, item in enumerate(self.data):
                if self.loss_fn is not None and not (
                    isinstance(item, (tuple, list)) and len(item) > 1
                ):
                    raise InputError("with a loss_fn, data gives batches (inputs, target).")
                leaves = checked_batch(item, self.captured)
                size = examples_of(leaves)
                for leaf in leaves if not self.mark else ():
                    if isinstance(leaf, torch.Tensor):
                        wide = leaf.detach().double()
                        seen += torch.stack([wide.sum(), wide.square().sum()]).cpu()
                found = graph_module(*leaves)
                if self.loss_fn is not None:
                    output = pytree.tree_unflatten(list(found), self.captured.out_spec)
                    total += _number(self.loss_fn(output, item[-1])) * size
                else:
                    expected = self.captured.graph_module(*leaves)
                    for a, b in zip(found, expected, strict=True):
                        if isinstance(b, torch.Tensor) and b.is_floating_point():
                            a, b = a.double(), b.double()
                            moments += torch.stack([(a - b).square().mean(), b.square().mean(),
                                                    b.mean()]).cpu() * size  # fmt: skip
                count += size
                self.step("evaluate", (number + 1) / batches if batches else None)
        if not count:
            raise InputError("data holds no batches.")
        self.examples = count
        # Sums over shuffled batches differ in their last digits.
        self.mark = self.mark or f"{count} {seen[0]:.6g} {seen[1]:.6g}"
        if self.loss_fn is not None:
            return total / count
        gap, square, mean = (moments / count).tolist()
        return gap / max(square - mean**2, 1e-300)


def _number(loss: Any) -> float:
    """A loss as a plain number."""
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        return float(loss)
    if isinstance(loss, numbers.Real):
        return float(loss)
    found = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
    raise InputError(f"loss_fn must give one number, the mean of a batch, not {found}.")
