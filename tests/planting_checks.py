"""What must hold for every planted network; each check returns what is wrong, in words."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fxfib
from fxfib.capture import capture
from fxfib.passes.verify import difference

import oracles
from strategies import Planted, plant

APPROXIMATE = (1e-3, 0.05, 0.5)


@dataclass
class Outcome:
    """Failures of one seed, and what was looked at.

    Attributes:
        failures: one line each; empty: all is well.
        claimed: whether the result had to be as small as the base network.
        merged: parameters before, after, and of the base network (float64, eps 0).
    """

    seed: int
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    claimed: bool = False
    merged: tuple[int, int, int] = (0, 0, 0)


def network(seed: int, **options: Any) -> Planted:
    """What a seed stands for: with odd ones recurrent layers and attention."""
    return plant(seed, sequences=bool(seed % 2), **options)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def cast(planted: Planted, dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The wider network and the inputs in a dtype."""
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in planted.inputs)
    return copy.deepcopy(planted.wide).to(dtype).eval(), inputs


def outputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return list(module(*inputs))


def says(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def exact(planted: Planted, dtype: torch.dtype, outcome: Outcome) -> nn.Module | None:
    """Compile at eps = 0: equal outputs, nothing planted missed, the user's model untouched."""
    wide, inputs = cast(planted, dtype)
    before = oracles.parameters_unchanged(wide)
    word = str(dtype).removeprefix("torch.")
    try:
        small = fxfib.compile(wide, 0.0, inputs)
        before.check(wide)
        oracles.outputs_equal(wide, small, inputs)
        # Other inputs, of another size where the batch is dynamic: the result is no special case.
        fixed = any("batch size is fixed" in note for note in small.fibration.notes)
        more = inputs if fixed else tuple(torch.cat([x, x.flip(0)[:1]]) for x in inputs)
        more = tuple(x * 1.7 if x.is_floating_point() else x for x in more)
        oracles.outputs_equal(wide, small, more)
    except Exception as error:
        outcome.failures.append(f"{word}: {says(error)}")
        return None
    for refusal in small.fibration.refusals:
        if oracles.UNFIT in refusal.reason:
            line = refusal.reason[:160]
            outcome.failures.append(f"{word}: {refusal.op} at {refusal.node}: {line}")
    found, goal = parameters(small), parameters(planted.base)
    if not planted.unclaimed and found > goal:
        outcome.failures.append(
            f"{word}: {found} parameters are left of {parameters(wide)}, the base has {goal}"
        )
    return small


def stable(planted: Planted, small: nn.Module, outcome: Outcome) -> None:
    """Compiling again changes nothing."""
    try:
        oracles.idempotent(small, planted.inputs)
    except Exception as error:
        outcome.failures.append(f"again: {says(error)}")


def activations(planted: Planted, outcome: Outcome) -> None:
    """Nodes of equal color agree at every value of the graph."""
    try:
        captured = capture(planted.wide, planted.inputs)
        pairs = oracles.activations_equal_in_colors(captured, oracles.analyze(captured))
    except Exception as error:
        outcome.failures.append(f"activations: {says(error)}")
        return
    if not planted.unclaimed and parameters(planted.wide) > parameters(planted.base) and not pairs:
        outcome.failures.append("activations: no two nodes have one color")


def permuted(seed: int, small: nn.Module, outcome: Outcome) -> None:
    """Another order of the channels gives the same sizes."""
    other = network(seed, order=1)
    inner = Outcome(seed)
    result = exact(other, torch.float64, inner)
    outcome.failures += [f"permuted: {line}" for line in inner.failures]
    if result is not None and parameters(result) != parameters(small):
        outcome.failures.append(
            f"permuted: {parameters(result)} parameters instead of {parameters(small)}"
        )


def near_miss(seed: int, small: nn.Module, dtype: torch.dtype, outcome: Outcome) -> None:
    """One number of one copy is another one: that copy stays apart."""
    planted = network(seed, near=True)
    if not planted.near:
        return
    gap = difference(outputs(planted.base, planted.inputs), outputs(planted.wide, planted.inputs))
    inner = Outcome(seed)
    claimed = not planted.unclaimed  # elsewhere nothing may have merged to begin with
    planted.unclaimed.append("a near miss")
    result = exact(planted, dtype, inner)
    outcome.failures += [f"near miss {planted.near}: {line}" for line in inner.failures]
    if result is None or gap.relative < 1e-7 or not claimed:
        return  # the change is one that nobody sees (behind a ReLU that is off, say)
    # A factor of a copy is no difference where everything that follows is linear.
    if parameters(result) <= parameters(small) and planted.near[:3] not in ("mul", "div"):
        outcome.failures.append(f"near miss {planted.near}: it was merged all the same")


def approximate(planted: Planted, small: nn.Module, eps: float, outcome: Outcome) -> int:
    """A positive eps: the graph runs, with outputs of the right shapes."""
    wide, inputs = cast(planted, torch.float64)
    try:
        result = fxfib.compile(wide, eps, inputs)
    except Exception as error:
        outcome.failures.append(f"eps {eps:g}: {says(error)}")
        return 0
    expected, found = outputs(wide, inputs), outputs(result, inputs)
    if [x.shape for x in expected] != [x.shape for x in found]:
        outcome.failures.append(f"eps {eps:g}: the outputs have other shapes")
    if not all(bool(torch.isfinite(x).all()) for x in found):
        outcome.failures.append(f"eps {eps:g}: the outputs are not finite")
    for refusal in result.fibration.refusals:
        if oracles.UNFIT in refusal.reason:
            outcome.failures.append(f"eps {eps:g}: {refusal.op}: {refusal.reason[:160]}")
    if parameters(result) > parameters(small):
        outcome.notes.append(
            f"eps {eps:g}: {parameters(result)} parameters, {parameters(small)} at eps 0"
        )
    return parameters(result)


def check_seed(seed: int, *, thorough: bool = True) -> Outcome:
    """Every check of one seed; ``thorough`` runs those that compile once more for every seed."""
    outcome = Outcome(seed)
    planted = network(seed)
    gap = difference(outputs(planted.base, planted.inputs), outputs(planted.wide, planted.inputs))
    if not gap.relative <= 1e-9:
        outcome.failures.append(
            f"the generator: base and wider network differ by {gap.relative:.2g}"
        )
        return outcome
    outcome.claimed = not planted.unclaimed
    small = exact(planted, torch.float64, outcome)
    exact(planted, torch.float32, outcome)
    if small is None:
        return outcome
    outcome.merged = (parameters(planted.wide), parameters(small), parameters(planted.base))
    turn = -1 if thorough else seed % 6  # otherwise one of the others a seed, in turn
    if turn in (-1, 0):
        stable(planted, small, outcome)
    if turn in (-1, 1):
        permuted(seed, small, outcome)
    if turn in (-1, 2, 5):
        near_miss(seed, small, torch.float32 if seed % 4 == 0 else torch.float64, outcome)
    if turn in (-1, 3):
        activations(planted, outcome)
    if turn in (-1, 4):
        for eps in APPROXIMATE if thorough else [APPROXIMATE[seed // 6 % 3]]:
            approximate(planted, small, eps, outcome)
    return outcome
