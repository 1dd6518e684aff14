r"""Compensation of recurrent layers, on the course that the small layer itself takes.

The sums of all gates :math:`z` are linear in what a layer gave at the step before, :math:`h`, and
in its input :math:`x`.  But fitted to the original's sums on the original's own course, weights
drift when the steps are run one after another: a small error leads to where nothing was fitted.  So
the small layer is run, its weights are moved towards what would have given the original's sums on
the way that it took, and it is run again,

.. math:: W_{k+1} = \arg\min_W\; E\,|W\,(h_k, x, 1) - z|^2 + \lambda\, |W - W_k|^2

with :math:`h_k` of the run with :math:`W_k` (imitation on the imitator's own course, as in DAgger).
What brings the course nearer is kept, and :math:`\lambda` falls; else it rises (as after Levenberg
and Marquardt).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from fxfib.passes.fits import check_finite, set_tensor, tensor_at, wide
from fxfib.passes.layout import Reducer
from fxfib.passes.rewrite import Rewriter
from fxfib.passes.rules import find_rule
from fxfib.passes.rules.recurrence import Weights
from fxfib.passes.rules.recurrent import Recurrent

# Steps of sequences that are looked at: so many, or so many for each column of the weights.
FEWEST_STEPS = 20_000
STEPS_PER_COLUMN = 8
# How often a layer is run, and how strongly weights are held at first, as a part of the mean second
# moment of what they meet; what that is multiplied with behind a run that is nearer, and behind one
# that is not.
RUNS = 32
DAMPING = 10.0
LOOSER, TIGHTER = 0.5, 4.0
# Held so strongly, nothing moves.
HOPELESS = 1e6

# What the step before and what the input adds to the gates.
Sums = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """Rows whose sums are fitted together.

    Attributes:
        rows: int64, which.
        hidden, inputs: what they are sums of.
    """

    rows: torch.Tensor
    hidden: bool
    inputs: bool

    def joined(self, hidden: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Columns on both, side by side."""
        chosen = [t for t, use in ((hidden, self.hidden), (inputs, self.inputs)) if use]
        return torch.cat(chosen, -1)

    def summed(self, hidden: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """The sums of its rows, ``[..., rows]``."""
        total = torch.zeros((), dtype=hidden.dtype, device=hidden.device)
        for sums, use in ((hidden, self.hidden), (inputs, self.inputs)):
            total = total + sums[..., self.rows] if use else total
        return total


@dataclass
class Sequences:
    """Of one batch, time first.

    Attributes:
        x: input of the layer that is fitted next.
        states: initial states of all layers, ``[layers, batch, nodes]``.
        sums: for every layer those of the original, its rows merged as the small layer's are.
        outputs: what the directions of this layer gave so far.
    """

    x: torch.Tensor
    states: list[torch.Tensor]
    sums: list[Sums]
    outputs: list[torch.Tensor] = field(default_factory=list)


@dataclass
class Course:
    """What one layer in one direction does with some sequences, in the order of its steps.

    Attributes:
        before: what it gave at the step before, ``[steps, batch, nodes]``, one for each batch.
        x: what it read.
        output: what it gave.
    """

    before: list[torch.Tensor]
    x: list[torch.Tensor]
    output: list[torch.Tensor]


class RecurrentFit:
    """All weights of a recurrent module but projections.

    Args:
        rewriter: what merged it.
        node, new: the op in the original and in the small graph.
        level: see :class:`Fit`.
    """

    def __init__(self, rewriter: Rewriter, node: fx.Node, new: fx.Node, level: int) -> None:
        analysis = rewriter.analysis
        rule = find_rule(node)
        assert isinstance(rule, Recurrent)
        self.node, self.kind, self.level = node, rule.kind, level
        self.batch_first = bool(analysis.arguments(node)["batch_first"])
        self.directions = rule.directions(analysis, node)
        self.layers = rule.layers(analysis, node)
        self.theirs = [layer.weights(analysis) for layer in self.layers]
        image = dict(zip(node.all_input_nodes, new.all_input_nodes, strict=True))
        self.wanted = (analysis.arguments(node)["input"], *rule.states(analysis, node))
        self.given = tuple(image[operand] for operand in self.wanted)
        self.names = {p: str(image[p].target) for p in self.parameters}
        self.rows: list[Reducer] = []
        for layer in self.layers:
            layout = rewriter.layout(layer.ih, 0)
            masses = analysis.policy.masses.get((node, layer.hidden))
            masses = None if masses is None else np.tile(masses, self.kind.gates)
            self.rows.append(layout.rows(np.ones(layout.full), masses))
        self.seen: list[Sequences] = []

    @property
    def parameters(self) -> list[fx.Node]:
        """What is fitted, in the original."""
        return [parameter for layer in self.layers for parameter in layer.parameters]

    def observe(
        self, small: fx.GraphModule, given: Sequence[Any], wanted: Sequence[Any], examples: int
    ) -> None:
        """Take up some of the sequences of one batch."""
        (x, *states), (source, *starts) = self._ordered(given), self._ordered(wanted)
        ours = [self._ours(small, number) for number in range(len(self.layers))]
        columns = max(w.ih.shape[1] + w.hh.shape[1] for w in ours)
        most = max(FEWEST_STEPS, STEPS_PER_COLUMN * columns)
        count = min(x.shape[1], -(-x.shape[1] * most // max(1, examples * len(x))))
        theirs = Sequences(source[:, :count], [s[:, :count] for s in starts], [])
        sums: list[Sums] = []
        for number, rows in enumerate(self.rows):
            weights = _like(self.theirs[number], source)
            course = self._course(weights, [theirs], number)
            hidden, inputs = _sums(weights, course.before[0], course.x[0])
            sums.append((rows.apply(hidden, 2), rows.apply(inputs, 2)))
            self._passed_on([theirs], course, number)
        self.seen.append(Sequences(x[:, :count], [s[:, :count] for s in states], sums))

    @property
    def runs(self) -> int:
        """How often it is run."""
        return RUNS

    def solve(self, small: fx.GraphModule) -> Iterator[int]:
        """Change the weights in place, layer by layer; tells how many runs there were."""
        for number, layer in enumerate(self.layers):
            weights, course = yield from self._fitted(self._ours(small, number), number)
            self._passed_on(self.seen, course, number)
            fitted = (weights.ih, weights.hh, weights.bias_ih, weights.bias_hh)
            for node, value in zip(
                (layer.ih, layer.hh, layer.bias_ih, layer.bias_hh), fitted, strict=True
            ):
                if node is not None and value is not None:
                    set_tensor(small, self.names[node], value)
        self.seen = []

    def _fitted(
        self, weights: Weights, number: int
    ) -> Generator[int, None, tuple[Weights, Course]]:
        """Weights on whose course the sums are nearest, of those that are tried."""
        course = self._course(weights, self.seen, number)
        sums = [batch.sums[number] for batch in self.seen]
        check_finite(self.node, *course.x, *(t for own in sums for t in own))
        error, damping = self._error(weights, course, sums), DAMPING
        moments = self._moments(weights, course, sums)
        for run in range(RUNS):
            tried = self._moved(weights, moments, damping)
            way = self._course(tried, self.seen, number)
            found = self._error(tried, way, sums)
            if found < error:
                weights, course, error = tried, way, found
                moments = self._moments(weights, course, sums)
                damping *= LOOSER
            else:
                damping *= TIGHTER
            yield (number * RUNS + run + 1) // len(self.layers)
            if damping > HOPELESS:
                break
        return weights, course

    def _parts(self, weights: Weights) -> Iterator[Part]:
        gates = torch.arange(len(weights.ih), device=weights.ih.device).chunk(self.kind.gates)
        if not self.kind.apart:
            yield Part(torch.cat(gates), True, True)
            return
        new = gates[self.kind.new]
        yield Part(torch.cat([g for g in gates if g is not new]), True, True)
        yield Part(new, True, False)
        yield Part(new, False, True)

    def _error(self, weights: Weights, course: Course, sums: Sequence[Sums]) -> float:
        """The squared difference of the sums, of all gates."""
        total = 0.0
        for before, x, (hidden, inputs) in zip(course.before, course.x, sums, strict=True):
            ours = _sums(weights, before, x)
            for part in self._parts(weights):
                gap = part.summed(*ours) - part.summed(hidden, inputs)
                total += float(gap.square().sum(dtype=torch.float64))
        return total

    def _moments(
        self, weights: Weights, course: Course, sums: Sequence[Sums]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of every part products of what its weights meet, with one another and with the sums."""
        found = []
        for part in self._parts(weights):
            gram: Any = 0.0
            cross: Any = 0.0
            for before, x, own in zip(course.before, course.x, sums, strict=True):
                design = part.joined(before, x).flatten(0, 1)
                if weights.bias_ih is not None:
                    design = torch.cat([design, design.new_ones(len(design), 1)], 1)
                gram = gram + (design.t() @ design).double()
                cross = cross + (design.t() @ part.summed(*own).flatten(0, 1)).double()
            found.append((gram, cross))
        return found

    def _moved(
        self,
        weights: Weights,
        moments: Sequence[tuple[torch.Tensor, torch.Tensor]],
        damping: float,
    ) -> Weights:
        """Weights nearer to what would have given the sums."""
        hh, ih = weights.hh.double(), weights.ih.double()
        biased = weights.bias_hh is not None and weights.bias_ih is not None
        bias_hh, bias_ih = (
            b.double() if b is not None else hh.new_zeros(len(hh))
            for b in (weights.bias_hh, weights.bias_ih)
        )
        for part, (gram, cross) in zip(self._parts(weights), moments, strict=True):
            rows, columns = part.rows, part.joined(hh[:1], ih[:1]).shape[1]
            start = part.joined(hh[rows], ih[rows])
            if biased:
                start = torch.cat([start, part.summed(bias_hh, bias_ih)[:, None]], 1)
            held = damping * gram.diagonal()[:columns].mean().clamp(min=1e-30)
            within = torch.linalg.cholesky(gram + held * torch.eye(len(gram)).to(gram))
            solved = torch.cholesky_solve(cross + held * start.t(), within).t()
            split = hh.shape[1] if part.hidden else 0
            if part.hidden:
                hh = hh.index_copy(0, rows, solved[:, :split])
            if part.inputs:
                ih = ih.index_copy(0, rows, solved[:, split:columns])
            if biased and part.inputs:
                rest = bias_hh[rows] if part.hidden else 0.0
                bias_ih = bias_ih.index_copy(0, rows, solved[:, -1] - rest)
            elif biased:
                bias_hh = bias_hh.index_copy(0, rows, solved[:, -1])
        if biased:
            return _like(Weights(ih, hh, bias_ih, bias_hh, weights.hr), weights.ih)
        return _like(Weights(ih, hh, hr=weights.hr), weights.ih)

    def _course(self, weights: Weights, seen: Sequence[Sequences], number: int) -> Course:
        """Run one layer."""
        course = Course([], [], [])
        for batch in seen:
            x = batch.x.flip(0) if number % self.directions else batch.x
            states = [state[number : number + 1].contiguous() for state in batch.states]
            given = (weights.ih, weights.hh, weights.bias_ih, weights.bias_hh, weights.hr)
            output = self.node.target(  # type: ignore[operator]
                x, states if len(states) > 1 else states[0], [t for t in given if t is not None],
                weights.bias_ih is not None, 1, 0.0, False, False, False,
            )[0]  # fmt: skip
            course.before.append(torch.cat([states[0], output[:-1]]))
            course.x.append(x)
            course.output.append(output)
        return course

    def _passed_on(self, seen: Sequence[Sequences], course: Course, number: int) -> None:
        """Behind the last direction of a layer, what it gave is what the next one reads."""
        for batch, output in zip(seen, course.output, strict=True):
            batch.outputs.append(output.flip(0) if number % self.directions else output)
            if len(batch.outputs) == self.directions:
                batch.x, batch.outputs = torch.cat(batch.outputs, 2), []

    def _ordered(self, values: Sequence[Any]) -> list[torch.Tensor]:
        """Input, time first, and initial states."""
        x, *states = (wide(value) for value in values)
        return [x.transpose(0, 1) if self.batch_first else x, *states]

    def _ours(self, small: fx.GraphModule, number: int) -> Weights:
        layer = self.layers[number]
        given = (layer.ih, layer.hh, layer.bias_ih, layer.bias_hh, layer.hr)
        found = (None if p is None else wide(tensor_at(small, self.names[p])) for p in given)
        return Weights(*found)  # type: ignore[arg-type]


def _sums(weights: Weights, before: torch.Tensor, x: torch.Tensor) -> Sums:
    """What the step before and the input add to the gates, each with its bias."""
    return (
        torch.nn.functional.linear(before, weights.hh, weights.bias_hh),
        torch.nn.functional.linear(x, weights.ih, weights.bias_ih),
    )


def _like(weights: Weights, other: torch.Tensor) -> Weights:
    given = (weights.ih, weights.hh, weights.bias_ih, weights.bias_hh, weights.hr)
    return Weights(*(None if t is None else t.to(other) for t in given))  # type: ignore[arg-type]
