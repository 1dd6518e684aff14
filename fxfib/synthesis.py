r"""Inputs that a network with batch norm remembers: its running statistics are what they make.

Without data, batch norm tells what data were like: at channel :math:`c` of every such layer the
mean :math:`\mu_c` and the variance :math:`\sigma_c^2` over all of the training.  Noise is changed
by gradient descent until the batch has the same,

.. math:: \min_x \sum_l \frac1{C_l} \sum_c \frac{(m_c - \mu_c)^2}{\sigma_c^2}
          + \Bigl(\log \frac{v_c}{\sigma_c^2}\Bigr)^2

with :math:`m_c, v_c` those of the batch.  What moves are the coefficients of a Fourier transform
over the axes behind the channels, the high ones in smaller steps and from smaller noise: natural
images, sounds and fields have spectra that fall as one over the frequency.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxfib.macs import macs_of
from fxfib.passes.compensate import BATCH_NORM
from fxfib.passes.fits import tensor_at
from fxfib.passes.rules.base import hint
from fxfib.passes.stages import Step, silent

STEPS = 24
RATE = 0.1
# Multiply-accumulates to spend, a step being three times those of a run (under a minute on one
# core); and how many examples.  A network of which that makes fewer is not worth the wait.
WORK = 2e12
FEWEST, MOST = 32, 256
# Examples that have the statistics together, and numbers that are kept for their gradients (4 GiB).
TOGETHER = 128
MOST_KEPT = 2**30
# Ratios of variances beyond this are not told apart.
SMALLEST_RATIO = 1e-6

Batch = tuple[Any, ...]


class Observer(fx.Interpreter):
    """Runs a graph and tells how far the statistics at every batch norm are from the running ones.

    Args:
        norms: the batch norms to look at.
    """

    def __init__(self, graph_module: fx.GraphModule, norms: Sequence[fx.Node]) -> None:
        super().__init__(graph_module)
        self.norms = set(norms)
        self.terms: list[torch.Tensor] = []

    def gap(self, inputs: Sequence[Any]) -> torch.Tensor:
        """The mean over all batch norms, a scalar."""
        self.terms = []
        self.run(*inputs)
        return torch.stack(self.terms).mean()

    def run_node(self, n: fx.Node) -> Any:
        """The value of one node."""
        if n in self.norms:
            args, _ = self.fetch_args_kwargs_from_env(n)
            x, mean, var = (t.float() for t in (args[0], *args[3:5]))
            v, m = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
            size = var.clamp(min=1e-12)
            ratio = (v / size).clamp(min=SMALLEST_RATIO).log().square()
            self.terms.append(((m - mean).square() / size + ratio).mean())
        return super().run_node(n)


def norms_that_know(graph_module: fx.GraphModule) -> list[fx.Node]:
    """Batch norms with statistics that something was learned from: not those of a fresh layer."""
    found = []
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or node.target not in BATCH_NORM or len(node.args) < 5:
            continue
        statistics = node.args[3:5]
        if all(isinstance(s, fx.Node) and s.op == "get_attr" for s in statistics):
            mean, var = (tensor_at(graph_module, str(s.target)) for s in statistics)
            if bool(mean.any()) and bool((var != 1).any()):
                found.append(node)
    return found


def examples_for(graph_module: fx.GraphModule, batch: int) -> int:
    """How many examples the work allows; 0 where they are too few to tell anything."""
    one = max(macs_of(graph_module) / max(batch, 1), 1.0)
    count = int(min(MOST, WORK / (3 * STEPS * one)))
    return count if min(count, together_for(graph_module, batch)) >= FEWEST else 0


def together_for(graph_module: fx.GraphModule, batch: int) -> int:
    """How many examples can have the statistics together."""
    values = (n.meta.get("val") for n in graph_module.graph.nodes if n.op == "call_function")
    tensors = (value for value in values if isinstance(value, torch.Tensor))
    numbers = sum(math.prod(map(hint, value.shape)) for value in tensors)
    return min(TOGETHER, MOST_KEPT * batch // max(numbers, 1))


def matched(
    graph_module: fx.GraphModule,
    batches: Sequence[Batch],
    batched: Sequence[int],
    step: Step = silent,
) -> list[Batch]:
    """Noise, changed until its statistics are those that the batch norms know.

    Args:
        graph_module: with batch norms that know something.
        batches: flat noise; only floating entries that are ``batched`` change.
        batched: places of the inputs whose first axis is the batch.
        step: told which share of the work is done.

    Returns:
        Batches of the same shapes.
    """
    observer = Observer(graph_module, norms_that_know(graph_module))
    found = []
    with torch.enable_grad():
        for number, batch in enumerate(batches):

            def told(share: float, before: int = number) -> None:
                step("synthesize", (before + share) / len(batches))

            found.append(_matched(observer, batch, batched, told))
    return found


def _matched(
    observer: Observer, batch: Batch, batched: Sequence[int], told: Callable[[float], None]
) -> Batch:
    places = [k for k in batched if batch[k].is_floating_point() and len(batch[k])]
    waves = {k: Waves(batch[k]) for k in places}

    def inputs() -> list[Any]:
        return [waves[k].values() if k in waves else leaf for k, leaf in enumerate(batch)]

    moved = [wave.coefficients for wave in waves.values()]
    optimizer = torch.optim.Adam(moved, RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for number in range(STEPS):
        gap = observer.gap(inputs())
        gradients = torch.autograd.grad(gap, moved, allow_unused=True)
        if not bool(torch.isfinite(gap)):
            break
        for coefficient, gradient in zip(moved, gradients, strict=True):
            coefficient.grad = gradient
        optimizer.step()
        schedule.step()
        told((number + 1) / STEPS)
    with torch.no_grad():
        return tuple(leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in inputs())


class Waves:
    """Noise as coefficients of waves along the axes behind the channels.

    Args:
        noise: ``[n, channels, ...]`` or ``[n, features]``; says shape, dtype, device and size.
    """

    def __init__(self, noise: torch.Tensor) -> None:
        self.like = noise
        self.axes = tuple(range(2, noise.ndim))
        wide = noise.detach().float()
        self.size = wide.square().mean().sqrt().clamp(min=1e-30)
        start = wide / self.size
        if self.axes:
            spectrum = torch.fft.rfftn(start, dim=self.axes, norm="ortho")
            self.scale = self._falling(tuple(noise.shape[2:]), noise.device)
            start = torch.view_as_real(spectrum)
        self.coefficients = start.contiguous().requires_grad_()

    @staticmethod
    def _falling(sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """One over the frequency, with a mean square of 1."""
        squares = torch.zeros(())
        for place, size in enumerate(sizes):
            last = place == len(sizes) - 1
            line = torch.fft.rfftfreq(size) if last else torch.fft.fftfreq(size)
            squares = squares[..., None] + line.square()
        scale = 1 / squares.sqrt().clamp(min=1 / max(sizes))
        return (scale / scale.square().mean().sqrt()).to(device)

    def values(self) -> torch.Tensor:
        """The input that the coefficients make."""
        if not self.axes:
            return (self.coefficients * self.size).to(self.like.dtype)
        spectrum = torch.view_as_complex(self.coefficients) * self.scale
        shape = tuple(map(hint, self.like.shape[2:]))
        found = torch.fft.irfftn(spectrum, s=shape, dim=self.axes, norm="ortho")
        return (found * self.size).to(self.like.dtype)
