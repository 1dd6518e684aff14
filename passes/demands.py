r"""What the outputs demand of the nodes of every value: how much a change of a node changes them.

To second order, when the activations :math:`h` of a layer change by :math:`\delta`, the outputs
:math:`y` leave the original's by

.. math:: E\,\delta^T Q\,\delta, \qquad Q = E[J^T H J], \quad J = \partial y / \partial h

with :math:`H` half the curvature of :func:`fxfib.passes.difference.difference`.  So what layers
lose is known in one unit, and nodes can go whose readers matter little; by the weights of the
readers alone, each for itself, a layer near the outputs counts as much as one far from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxfib.passes.difference import SQUARED, floating, has_scores, pieces_of, spreads_of
from fxfib.passes.relations import Ref

# Examples that are looked at: each says something of every direction of the outputs.
MOST_EXAMPLES = 512


class Leaves(fx.Interpreter):
    """Runs a graph and keeps some values, each with a history."""

    def __init__(self, graph_module: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(graph_module)
        self.wanted = wanted
        self.kept: dict[fx.Node, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The value of one node."""
        value = super().run_node(n)
        if n in self.wanted:
            if not value.requires_grad:
                value = value.detach().requires_grad_()
            self.kept[n] = value
        return value


def demands_of(
    graph_module: fx.GraphModule,
    places: Mapping[Ref, fx.Node],
    batches: Sequence[Sequence[Any]],
    *,
    scores: bool,
) -> dict[Ref, torch.Tensor] | None:
    """See the module; directions of the outputs are drawn, always the same.

    Args:
        places: the value where the nodes of every colored axis are read.
        batches: flat inputs.
        scores: see :func:`fxfib.passes.difference.difference`.

    Returns:
        float64 ``[nodes, nodes]`` of every axis, summed over the positions of an example; None
        where there is no floating output, one of the values reaches none or has no gradient, or
        the nodes of a recurrent layer read each other, which a gradient of its outputs leaves out.
    """
    for ref, place in places.items():
        if isinstance(ref[1], str) or not place.meta["val"].is_floating_point():
            return None
    generator = torch.Generator().manual_seed(0)
    total: dict[Ref, Any] = dict.fromkeys(places, 0.0)
    pieces = [piece for batch in batches for piece in pieces_of(batch)]
    with torch.no_grad():
        outputs = [floating(graph_module(*piece)) for piece in pieces]
    if not outputs or not outputs[0]:
        return None
    spread = spreads_of(outputs)
    seen = 0
    leaves = Leaves(graph_module, set(places.values()))
    for piece in pieces:
        if seen >= MOST_EXAMPLES:
            break
        with torch.enable_grad():
            found = floating(leaves.run(*piece))
            examples = len(found[0]) if found[0].ndim else 1
            seen += examples
            for way in _directions(found, spread, examples, scores, generator):
                values = [leaves.kept[place] for place in places.values()]
                gradients: Sequence[torch.Tensor | None] = torch.autograd.grad(
                    way, values, retain_graph=True, allow_unused=True
                )
                for ref, gradient in zip(places, gradients, strict=True):
                    if gradient is None:
                        return None
                    axis = ref[1]
                    assert isinstance(axis, int)
                    rows = gradient.movedim(axis, -1).reshape(-1, gradient.shape[axis]).float()
                    total[ref] = total[ref] + (rows.t() @ rows).double().cpu()
    return {ref: matrix / seen for ref, matrix in total.items()}


def _directions(
    outputs: list[torch.Tensor],
    spread: list[float],
    examples: int,
    scores: bool,
    generator: torch.Generator,
) -> list[torch.Tensor]:
    """Scalars whose squared gradients, summed over examples, are ``J^T H J`` on average."""
    found = []
    for output, own in zip(outputs, spread, strict=True):
        y = output.float()
        weight = 1.0
        if scores and has_scores(y):
            # The Kullback-Leibler divergence is half of Fisher's form, whose directions these are.
            chosen = torch.multinomial(y.detach().softmax(1).cpu(), 1, generator=generator)
            found.append(y.log_softmax(1).gather(1, chosen.to(y.device)).sum() * 0.5**0.5)
            weight = SQUARED
        signs = torch.randn(y.shape, generator=generator).to(y.device)
        scale = (weight * examples / (max(y.numel(), 1) * own)) ** 0.5
        found.append((signs * y).sum() * scale)
    return found
