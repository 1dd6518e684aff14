"""How far the outputs of a small network are from the original's, where nothing else is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fxfib.passes.batches import pieces_of

# What the squared difference of class scores counts beside the divergence of their softmax.
SQUARED = 0.1
# In place of minus infinity, whose softmax is 0 as well, but whose differences are no numbers.
MASKED = -1e30
# Examples that are run at a time.
BATCH = 128


def difference(
    found: torch.Tensor, wanted: torch.Tensor, spread: float, *, scores: bool = True
) -> torch.Tensor:
    """How far one output is from the original's; 0 only where both are equal.

    The mean squared difference over ``spread``.  What has the shape of class scores, ``[batch,
    several]``, is compared as such: by the Kullback-Leibler divergence of the softmax, plus a tenth
    of the squared difference, which alone would spend the network on scores of no consequence.
    Not ``scores``: what noise scores highest means nothing, so the squared difference is all.
    Scores that both mask with minus infinity do not differ.
    """
    found, wanted = found.float(), wanted.float()
    masked = (wanted == -torch.inf) & (found == wanted)
    found, wanted = found.masked_fill(masked, MASKED), wanted.masked_fill(masked, MASKED)
    squared = (found - wanted).square().mean() / spread
    if not (scores and has_scores(found)):
        return squared
    ours, theirs = F.log_softmax(found, 1), F.log_softmax(wanted, 1)
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean") + SQUARED * squared


def gap(
    found: object, wanted: Sequence[torch.Tensor], spread: Sequence[float], *, scores: bool = True
) -> torch.Tensor:
    """The sum of :func:`difference` over the floating outputs of a call; 0 where there is none."""
    triples = zip(floating(found), wanted, spread, strict=True)
    parts = (difference(*triple, scores=scores) for triple in triples)
    return sum(parts, start=torch.zeros(()))


class Yardstick:
    """Measures how far a network is from the original on given inputs.

    Args:
        original: called with flat inputs.
        batches: these inputs.
        scores: see :func:`difference`.
        at_once: how many examples are run at a time.
    """

    def __init__(
        self,
        original: Callable[..., Any],
        batches: Sequence[Sequence[Any]],
        *,
        scores: bool = True,
        at_once: int = BATCH,
    ) -> None:
        self.scores = scores
        self.pieces = [piece for batch in batches for piece in pieces_of(batch, at_once)]
        with torch.no_grad():
            self.wanted = [floating(original(*piece)) for piece in self.pieces]
        self.spread = spreads_of(self.wanted)

    def __call__(self, network: Callable[..., Any]) -> float:
        """The mean of :func:`gap` over pieces."""
        total = 0.0
        with torch.no_grad():
            for piece, wanted in zip(self.pieces, self.wanted, strict=True):
                total += float(self.gap(network(*piece), wanted))
        return total / len(self.pieces)

    def gap(self, found: object, wanted: Sequence[torch.Tensor]) -> torch.Tensor:
        """:func:`gap` on the scale of these inputs."""
        return gap(found, wanted, self.spread, scores=self.scores)


def has_scores(output: torch.Tensor) -> bool:
    """Whether an output has the shape of class scores."""
    return output.ndim == 2 and output.shape[1] > 1


def spreads_of(outputs: Sequence[Sequence[torch.Tensor]]) -> list[float]:
    """The variance of every output, over all pieces of the inputs; masked scores do not count."""
    return [
        _spread(torch.cat([pieces[k].flatten() for pieces in outputs]).float())
        for k in range(len(outputs[0]))
    ]


def _spread(values: torch.Tensor) -> float:
    values = values[values != -torch.inf]
    return max(float(values.var()), 1e-12) if len(values) > 1 else 1e-12


def floating(outputs: object) -> list[torch.Tensor]:
    """The floating tensors among the outputs of a call."""
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]
