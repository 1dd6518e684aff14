"""What must hold for every network with planted covers; each check says what is wrong, in words."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import adjoint_checks
import cover_checks
import numpy as np
import torch
from planting_checks import network, says
from torch import Tensor, fx, nn

from fxfib.capture import Captured, capture
from fxfib.coloring import Labels
from fxfib.passes.backward import Colored, Continued
from fxfib.passes.cover import covers_at, labels_of, layers, stable

from strategies import Planted

STEPS = (1, 10, 100)
OPTIMIZERS = tuple(cover_checks.OPTIMIZERS)


@dataclass
class Outcome:
    """Failures of one seed, and what was looked at.

    Attributes:
        failures: one line each; empty: all is well.
        kinds: operators of the network that the two passes were checked through.
        redundant: nodes beyond the first of their planted cover.
        claimed: whether all planted fibers had to be covers: nothing is behind an op without a
            backward rule, which ``notes`` tell, and nothing of :data:`MISSED`.
    """

    seed: int
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    redundant: int = 0
    claimed: bool = False


def redundant(covers: dict[str, Labels]) -> int:
    """Nodes beyond the first of their cover."""
    return sum(len(labels) - len(np.unique(labels)) for labels in covers.values())


def normalized_by_batch(module: nn.Module) -> bool:
    """Whether a batch norm is part of it."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


@dataclass
class Subject:
    """A planted network and its graph over the same tensors, captured once, as that takes long.

    Attributes:
        seed: what it was planted from.
        first: parameters and buffers as they were planted.
    """

    seed: int
    planted: Planted
    captured: Captured
    first: dict[str, Tensor]

    @classmethod
    def of(cls, seed: int) -> Subject:
        """Plant and capture a network."""
        planted = network(seed, covers=True)
        first = copy.deepcopy(planted.wide.state_dict())
        return cls(seed, planted, capture(planted.wide, planted.inputs), first)

    def anew(self) -> Subject:
        """As planted, whatever was done with it."""
        self.planted.wide.load_state_dict(self.first)
        self.planted.wide.eval().zero_grad()
        return self


def gradients(subject: Subject, outcome: Outcome, batch_statistics: bool) -> Continued:
    """Errors at every value as autograd has them, gradients equal where two weights must have them.

    Planted covers are found, every one, and last.
    """
    planted = subject.planted
    errors = adjoint_checks.errors_of(subject.captured, batch_statistics=batch_statistics)
    continued, analysis = errors.continued, errors.analysis
    adjoint_checks.emitted_as_autograd(errors)
    adjoint_checks.equal_in_opfibers(errors)
    planted.wide.train(batch_statistics)
    cover_checks.gradients_equal(analysis, continued, planted.wide, planted.inputs)
    found = labels_of(analysis, continued.values, "cover")
    cover_checks.rows_equal(found, planted.wide, planted.inputs)
    planted.wide.eval()
    outcome.kinds = sorted({*outcome.kinds, *kinds(continued.values)})
    outcome.redundant = max(outcome.redundant, redundant(found))
    opaque = {str(getattr(n.target, "reason", "")) for n in continued.added} - {""}
    if opaque or any(re.search(MISSED, line) for line in planted.log):
        outcome.notes += [line for line in sorted(opaque) if line not in outcome.notes]
    else:
        outcome.claimed = True
        fibers = labels_of(analysis, continued.values, "fiber")
        lasting = labels_of(stable(continued), continued.values, "stable")
        reached = {
            name
            for calls in layers(analysis, continued.values)
            for name, (node, _) in calls
            if all(n in continued.errors for _, (n, _) in calls) and node in continued.errors
        }
        for name, labels in fibers.items():
            if name not in reached:
                continue  # no output reads it, so that it learns nothing
            for kind, own in (("cover", found[name]), ("stable", lasting[name])):
                assert np.array_equal(own, labels), f"{name}: {kind} {own}, planted {labels}"
    return continued


def kinds(nodes: list[fx.Node]) -> set[str]:
    """Names of operators."""
    return {
        n.target.name().removeprefix("aten::").partition(".")[0]
        for n in nodes
        if isinstance(n.target, torch._ops.OpOverload)
    }


def apart(analysis: Colored, planted: Planted, before: dict[str, Labels]) -> list[str]:
    """Layers in which nodes that were one cover have other activations or errors, in numbers."""
    continued = analysis.continued
    with torch.no_grad():
        outputs = [x for x in planted.wide(*planted.inputs) if x.is_floating_point()]
    generator = torch.Generator().manual_seed(5)
    seeds = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs]
    values = adjoint_checks.run(continued.graph_module, [*planted.inputs, *seeds])
    found = []
    for calls in layers(analysis, continued.values):
        for name, (node, axis) in calls:
            for place in (node, continued.errors.get(node)):
                if isinstance(axis, str) or place is None:
                    continue
                rows = values[place].movedim(axis, 0).flatten(1)
                size = max(1.0, float(rows.abs().max()))
                labels = before[name]
                lead = rows[np.unique(labels, return_index=True)[1]][labels]
                if float((rows - lead).abs().max()) > 1e-9 * size:
                    found.append(name)
    return sorted(set(found))


def grown_from_rounding(
    subject: Subject, batch_statistics: bool, optimizer: str = "", steps: int = 0
) -> float:
    """How far any activation or error moves, relatively, if last digits of all weights change.

    Where copies are told apart and this is as large, rounding told them apart: it decides which of
    equal elements is the largest (tokens repeat, a resized line has two ends), and training lets it
    grow (Adam has steps of one size for gradients that are only rounding).
    """
    found: list[list[Tensor]] = []
    for size in (0.0, 1e-15):
        wide = subject.anew().planted.wide
        draw = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for own in wide.parameters():
                own.mul_(1 + size * torch.randn(own.shape, generator=draw, dtype=own.dtype))
        if steps:
            wide.train(batch_statistics)
            chosen = cover_checks.OPTIMIZERS[optimizer](wide.parameters())
            cover_checks.train(wide, subject.planted.inputs, chosen, steps)
        errors = adjoint_checks.errors_of(subject.captured, batch_statistics=batch_statistics)
        values = [x for x in errors.values.values() if isinstance(x, Tensor)]
        found.append([x.detach().clone() for x in values if x.is_floating_point()])
    gaps = [
        float((a - b).abs().max()) / max(1.0, float(a.abs().max()))
        for a, b in zip(*found, strict=True)
        if a.numel() and bool(torch.isfinite(a).all())
    ]
    return max(gaps, default=0.0)


#: As far as rounding may grow and copies must still agree.
ROUNDING = 1e-9
#: Where not all covers are found.  Of nodes that tie for the largest, rounding decides which gets
#: the error.  Errors of keys that heads share (written out) are added up, place by place, so that
#: only what all of them have lasts; so are those of pairs that turn together.  Where the weights of
#: an attention are asked for, torch lays its heads and the batch on one axis.
MISSED = (
    r"over channels|MultiheadAttention.*, weights|rotary|"
    r"written_out attention.* heads (\d+)/(?!\1 )"
)
#: What is colored by its very numbers, so that their last digit tells copies apart; biases of a
#: cell are numbers where its first state is zero.
EXACT = ("numbers(", "prelu(", "state parameter", "state omitted")


def training(subject: Subject, optimizer: str, batch_statistics: bool) -> str:
    """Planted covers have not split after 1, 10 and 100 steps: in numbers, and by their colors.

    Returns:
        What only the last digits of numbers tell apart; empty: nothing.
    """
    planted = subject.planted
    continued = Continued(subject.captured.graph_module, batch_statistics)
    before = cover_checks.covers_of(continued, "stable")
    chosen = cover_checks.OPTIMIZERS[optimizer](planted.wide.parameters())
    planted.wide.train(batch_statistics)
    done = 0
    for steps in STEPS:
        cover_checks.train(planted.wide, planted.inputs, chosen, steps - done, done)
        done = steps
        # Copies are summed in another order, so their last digits differ.
        analysis = continued.color(1e-7)
        split = apart(analysis, planted, before)
        if split:
            # The networks are trained anew there, so this is the end of it.
            grown = grown_from_rounding(subject, batch_statistics, optimizer, steps)
            assert grown > ROUNDING, f"{split} split after {steps} steps"
            return f"after {steps} steps rounding has grown to {grown:.0e}"
        after = labels_of(analysis, continued.values, "cover")
        split = cover_checks.coarsens(after, before)
        if split and any(word in line for word in EXACT for line in planted.log):
            return f"after {steps} steps a last digit tells copies in {split[0]} apart"
        if split:
            grown = grown_from_rounding(subject, batch_statistics, optimizer, steps)
            assert grown > ROUNDING, f"{split} are colored apart after {steps} steps"
            return f"after {steps} steps rounding has grown to {grown:.0e}"
    return ""


def classes(analysis: Colored, continued: Continued) -> list[tuple[str, list[tuple[Any, int]]]]:
    """How many covers every value has, by the axes that are colored jointly."""
    return [
        (node.name, [(axes, int(own.max(initial=-1))) for axes, own in covers_at(analysis, node)])
        for node in continued.values
        if node in continued.errors
    ]


def outputs(planted: Planted) -> list[list[float]]:
    """Every number that the network gives."""
    with torch.no_grad():
        return [x.flatten().tolist() for x in planted.wide(*planted.inputs)]


def near_miss(subject: Subject, claimed: bool) -> None:
    """One number of one copy is another one: gradients are equal in what is still a cover.

    (Behind a table that is added, say, nodes may learn alike whose activations differ.)
    """
    planted = network(subject.seed, covers=True, near=True)
    if not planted.near:
        return
    errors = adjoint_checks.errors_of(capture(planted.wide, planted.inputs))
    continued, analysis = errors.continued, errors.analysis
    adjoint_checks.equal_in_opfibers(errors)
    cover_checks.gradients_equal(analysis, continued, planted.wide, planted.inputs)
    own = labels_of(analysis, continued.values, "cover")
    cover_checks.rows_equal(own, planted.wide, planted.inputs)
    if claimed and outputs(subject.planted) != outputs(planted):
        before = Continued(subject.captured.graph_module)
        seen = classes(before.color(), before) != classes(analysis, continued)
        assert seen, f"{planted.near}: every value has the covers it had"


def one_sided(subject: Subject) -> None:
    """Copies of one layer get rows of their own; their columns stay alike.

    Where errors depend on activations they are no opfiber any more.
    """
    planted, captured = subject.planted, subject.captured
    covers = cover_checks.covers_of(Continued(captured.graph_module))
    names = [
        name
        for name, labels in covers.items()
        if "(" not in name
        and len(np.unique(labels)) < len(labels)
        and isinstance(
            planted.wide.get_submodule(name), (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        )
    ]
    draw = torch.Generator().manual_seed(subject.seed)
    for name in names:
        weight = planted.wide.get_submodule(name).weight
        before = weight.detach().clone()
        factor = 1 + torch.rand(len(weight), generator=draw, dtype=torch.float64)
        with torch.no_grad():
            weight.mul_(factor.view(-1, *[1] * (weight.ndim - 1)))
        errors = adjoint_checks.errors_of(captured)
        adjoint_checks.equal_in_opfibers(errors)
        cover_checks.gradients_equal(
            errors.analysis, errors.continued, planted.wide, planted.inputs
        )
        with torch.no_grad():
            weight.copy_(before)


def check_covers(seed: int, *, thorough: bool = True) -> Outcome:
    """Every check of one seed; ``thorough`` trains with every optimizer, else with one, in turn."""
    outcome = Outcome(seed)

    def run(name: str, check: Callable[[], object], batch: bool | None = None) -> None:
        """``batch``: with which statistics it compares numbers; None: it knows of rounding."""
        try:
            note = check()
            if isinstance(note, str) and note:
                outcome.notes.append(f"{name}: {note}")
        except Exception as error:
            compares = isinstance(error, AssertionError) and batch is not None
            grown = grown_from_rounding(subject, bool(batch)) if compares else 0.0
            if grown > ROUNDING:
                outcome.notes.append(f"{name}: rounding grows to {grown:.0e}: {says(error)}")
            else:
                outcome.failures.append(f"{name}: {says(error)}")

    subject = Subject.of(seed)
    run("gradients", lambda: gradients(subject, outcome, False), False)
    modes = [False, True] if normalized_by_batch(subject.planted.wide) else [False]
    if True in modes:
        run("gradients, batch statistics", lambda: gradients(subject.anew(), outcome, True), True)
    for place, optimizer in enumerate(OPTIMIZERS):
        if thorough or place == seed // 2 % len(OPTIMIZERS):
            for mode in modes:
                run(
                    f"{optimizer}, batch statistics" if mode else optimizer,
                    lambda o=optimizer, m=mode: training(subject.anew(), o, m),
                )
    if outcome.redundant:
        run("near miss", lambda: near_miss(subject.anew(), outcome.claimed), False)
        run("one-sided", lambda: one_sided(subject.anew()), False)
    return outcome
