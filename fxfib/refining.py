"""Refining: the small network learns the original's outputs on the calibration inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from fxfib.passes.batches import length_of, pieces_of
from fxfib.passes.compensate import Batches
from fxfib.passes.difference import Yardstick, floating
from fxfib.passes.stages import Step, silent

RATE = 1e-3
# The difference from which on the whole rate pays.  Adam moves every weight by about the rate at
# each step, however near the network is already, and the floor that it reaches goes with the square
# of the rate: a rate that goes with the root of the difference stays below the start.
FAR = 0.1
# How often it is tried, each time at a third of the rate, until something is gained.
ATTEMPTS, SLOWER = 2, 3.0
# Passes over the inputs where nobody asked for a number.
PASSES = 10
BATCH = 32
# Batches of which the original's outputs are asked for at a time.
TOGETHER = 4
# One example in so many is not learned from: it judges.
APART = 8
# Outputs that differ by more units in the last place of the largest are other outputs.
ROUNDING = 256
# Devices on which Adam has a fused form.
FUSED = ("cpu", "cuda")

Pieces = list[Sequence[Any]]


def refined(
    original: fx.GraphModule,
    small: fx.GraphModule,
    inputs: Callable[[int], Batches],
    apart: Batches,
    passes: int,
    *,
    scores: bool = True,
    step: Step = silent,
) -> list[str]:
    r"""Train ``small`` in place to give the outputs of ``original``; no labels are needed.

    Adam with a cosine schedule on :func:`difference`, at a rate of

    .. math:: 10^{-3} \min(1, \sqrt{d / 0.1})

    with :math:`d` the difference at the start, so that a network that is near stays near.  Of
    inputs that come again one half is mixed, each with another of its batch, and the original is
    asked about the mixture (mixup): from few inputs as they are a network learns little that holds
    for others.  Of the network at the start and after every pass that one is returned which is
    nearest to the original on inputs that are kept apart; where none is nearer than the start, all
    is done once more at a third of the rate.  Batch norms keep their statistics.  Deterministic.

    Args:
        inputs: the batches of every pass, by its number from 0; the same object means that inputs
            come again.
        apart: what judges; see :func:`parted`.
        scores: see :func:`difference`.
        step: told which share of the training is done.

    Returns:
        A note, where there was nothing to train, or nothing was gained.
    """
    _own(small)
    trained = _trained(small)
    lessons = _Lessons(original, inputs)
    if not trained or not lessons.pieces:
        return ["nothing was refined: no parameter requires a gradient"]
    if not any(lessons.targets):
        return ["nothing was refined: no output is a floating tensor"]
    judge = Yardstick(original, apart, scores=scores, at_once=BATCH)
    start = judge(small)
    kept = _copies(trained)
    rate = RATE * min(1.0, math.sqrt(max(start, 0.0) / FAR))
    for attempt in range(ATTEMPTS):
        best = start
        for _ in _training(small, lessons, judge, rate / SLOWER**attempt, passes, step):
            now = judge(small)
            if now < best:
                best, kept = now, _copies(trained)
        with torch.no_grad():
            for parameter, value in zip(trained, kept, strict=True):
                parameter.copy_(value)
        if best < start:
            return []
    return ["refining brought nothing nearer to the original: it is undone"]


class _Mixture(NamedTuple):
    """Examples, some of them mixed with others.

    Attributes:
        inputs: flat.
        mixed: bool ``[n]``, which ones.
    """

    inputs: list[torch.Tensor]
    mixed: torch.Tensor


class _Lessons:
    """What is learned in every pass.

    Args:
        inputs: see :func:`refined`.

    Attributes:
        pieces, targets: small batches of the inputs that were asked for last, and the original's
            outputs on them.
        separate: whether examples can be asked about alone; None: it was not tried.  Along the
            first axis there may be steps of time, or examples that are compared with one another.
    """

    def __init__(self, original: fx.GraphModule, inputs: Callable[[int], Batches]) -> None:
        self.original, self.inputs = original, inputs
        self.separate: bool | None = None
        self._take(inputs(0))

    def _take(self, batches: Batches) -> None:
        self.batches = batches
        self.pieces = _cut(batches)
        self.mixable = [_mixable(piece) for piece in self.pieces]
        self.targets = _outputs(self.original, self.pieces)

    def of(
        self, number: int, generator: torch.Generator
    ) -> Iterator[tuple[Sequence[Any], list[torch.Tensor]]]:
        """The pieces of a pass in random order, each with what the original says."""
        given = self.inputs(number)
        again = given is self.batches
        if not again:
            self._take(given)
        for places in torch.randperm(len(self.pieces), generator=generator).split(TOGETHER):
            pieces = {place: self.pieces[place] for place in places.tolist()}
            wanted = {place: self.targets[place] for place in pieces}
            mixtures = {
                p: _mixed(pieces[p], generator) for p in pieces if again and self.mixable[p]
            }
            for place, mixture in mixtures.items():
                pieces[place] = mixture.inputs
            wanted |= self._answers(mixtures)
            yield from zip(pieces.values(), wanted.values(), strict=True)

    def _answers(self, mixtures: Mapping[int, _Mixture]) -> dict[int, list[torch.Tensor]]:
        """What the original says of mixtures; of examples that are as they were it is known."""
        if self.separate is not False and mixtures:
            found = self._changed(mixtures)
            if self.separate is None:
                first = max(mixtures, key=lambda p: int(mixtures[p].mixed.sum()))
                whole = _outputs(self.original, [mixtures[first].inputs])[0]
                self.separate = found is not None and _same(found[first], whole)
            if self.separate and found is not None:
                return found
        return {p: _outputs(self.original, [m.inputs])[0] for p, m in mixtures.items()}

    def _changed(self, mixtures: Mapping[int, _Mixture]) -> dict[int, list[torch.Tensor]] | None:
        """Where every example has outputs of its own, those that are mixed are asked about alone.

        In one call: of small pieces it is the calls that cost.
        """
        asked = [[t[m.mixed] for t in m.inputs] for m in mixtures.values()]
        counts = [int(m.mixed.sum()) for m in mixtures.values()]
        if not sum(counts) or len({tuple((t.shape[1:], t.dtype) for t in a) for a in asked}) != 1:
            return None
        (found,) = _outputs(self.original, [[torch.cat(t) for t in zip(*asked, strict=True)]])
        answers = {p: [t.clone() for t in self.targets[p]] for p in mixtures}
        for number, output in enumerate(found):
            parts = output.split(counts) if output.ndim and len(output) == sum(counts) else None
            if parts is None:
                return None
            for (p, mixture), part in zip(mixtures.items(), parts, strict=True):
                target = answers[p][number]
                if not target.ndim or len(target) != len(mixture.mixed):
                    return None
                if target.shape[1:] != part.shape[1:]:
                    return None
                target[mixture.mixed] = part
        return answers


def _training(
    small: fx.GraphModule,
    lessons: _Lessons,
    judge: Yardstick,
    rate: float,
    passes: int,
    step: Step,
) -> Iterator[None]:
    """One attempt, from the network as it is; it stops behind every pass."""
    trained = _trained(small)
    # A step of Adam is less than what half precision can tell apart.
    wide = [p if p.dtype.itemsize > 2 else nn.Parameter(p.detach().float()) for p in trained]
    optimizer = torch.optim.Adam(wide, rate, fused=_fusible(wide))
    total = passes * len(lessons.pieces)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    generator = torch.Generator().manual_seed(0)
    seen = 0
    for number in range(passes):
        for piece, wanted in lessons.of(number, generator):
            with torch.enable_grad():
                loss = judge.gap(small(*piece), wanted)
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            with torch.no_grad():
                for own, gradient in zip(wide, gradients, strict=True):
                    own.grad = None if gradient is None else gradient.to(own.dtype)
                optimizer.step()
                for own, parameter in zip(wide, trained, strict=True):
                    own.grad = None
                    if own is not parameter:
                        parameter.copy_(own)
            schedule.step()
            seen += 1
            step("refine", seen / total)
        yield


def _same(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> bool:
    """Whether outputs are equal up to rounding, which batches of another size bring along."""
    for a, b in zip(found, wanted, strict=True):
        if a.shape != b.shape:
            return False
        scale = b[b.isfinite()].abs().max() if b.isfinite().any() else b.new_zeros(())
        if not torch.allclose(a, b, 0.0, float(scale) * ROUNDING * torch.finfo(b.dtype).eps):
            return False
    return True


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _fusible(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether Adam can update them in one call; of small networks the calls are what costs."""
    return all(p.is_floating_point() and p.device.type in FUSED for p in parameters)


def _cut(batches: Batches) -> Pieces:
    return [piece for batch in batches for piece in pieces_of(batch, BATCH)]


def _copies(parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in parameters]


def parted(batches: Batches) -> tuple[Batches, Batches]:
    """Inputs to learn from, and one example in eight to judge by, or one batch in eight where
    batches cannot be cut.  So few that none can be spared do both.
    """
    learned: list[Sequence[Any]] = []
    apart: list[Sequence[Any]] = []
    whole: list[Sequence[Any]] = []
    for batch in batches:
        count = length_of(batch)
        if count is None or count < APART:
            whole.append(batch)
            continue
        judges = torch.arange(count) % APART == APART - 1
        learned.append([t[~judges.to(t.device)] for t in batch])
        apart.append([t[judges.to(t.device)] for t in batch])
    for place, batch in enumerate(whole):
        (apart if place % APART == APART - 1 else learned).append(batch)
    return (learned, apart) if learned and apart else (batches, batches)


def _mixable(piece: Sequence[Any]) -> bool:
    """Whether there is an input between two inputs: not of token numbers, nor of masks."""
    return (length_of(piece) or 0) > 1 and all(
        t.is_floating_point() and bool(torch.isfinite(t).all()) for t in piece
    )


def _mixed(piece: Sequence[torch.Tensor], generator: torch.Generator) -> _Mixture:
    """Half of the examples, drawn, each with some of another; at least half is its own."""
    count = len(piece[0])
    other = torch.randperm(count, generator=generator)
    share = 0.5 + 0.5 * torch.rand(count, generator=generator)
    share[torch.rand(count, generator=generator) < 0.5] = 1.0
    inputs = []
    for tensor in piece:
        own = share.to(tensor.device, tensor.dtype).reshape(-1, *[1] * (tensor.ndim - 1))
        inputs.append(own * tensor + (1 - own) * tensor[other.to(tensor.device)])
    return _Mixture(inputs, (share < 1).to(piece[0].device))


def _outputs(original: fx.GraphModule, pieces: Pieces) -> list[list[torch.Tensor]]:
    with torch.no_grad():
        return [floating(original(*piece)) for piece in pieces]


def _own(module: nn.Module) -> None:
    """New memory for every parameter: merging leaves those alone that do not change."""
    fresh: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None:
                if id(parameter) not in fresh:
                    copy = parameter.detach().clone()
                    fresh[id(parameter)] = nn.Parameter(copy, parameter.requires_grad)
                owner._parameters[name] = fresh[id(parameter)]
