"""The theory as checks: what must hold of a model, measured on it (:func:`check`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxfib import converse
from fxfib.api import check_options, shrink
from fxfib.both_runs import Run, error_of
from fxfib.capture import capture
from fxfib.coloring import FIRST_FREE, ONE, Factor, Labels, unique_rows
from fxfib.errors import InputError
from fxfib.passes.backward import Colored, Continued
from fxfib.passes.cover import blocks, labels_of, stable
from fxfib.passes.verify import TOLERANCE, difference, run_float64

#: After a step equal weights differ by the rounding of their updates.
AFTER_STEP = 1e-9


@dataclass(frozen=True)
class Law:
    """One statement of the theory, measured.

    Attributes:
        name: in words.
        equation: of the paper.
        compared: how many pairs (or layers, or numbers) the statement is about here.
        deviation: the largest one, over the largest absolute value of the same tensor; for
            partitions, how many classes were split (or, in the converse, should be one).
        holds: whether it is within the tolerance; None where eps > 0 and nothing is claimed.
        note: what else there is to say.
    """

    name: str
    equation: str
    compared: int
    deviation: float
    holds: bool | None
    note: str = ""


@dataclass(frozen=True)
class Theorems:
    """All statements for one model; prints as a table.

    Attributes:
        model: its class.
        eps, opfiber_eps: the precisions.
        loss: at the example inputs.
        laws: the statements.
    """

    model: str
    eps: float
    opfiber_eps: float
    loss: float
    laws: tuple[Law, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing that is claimed was found violated."""
        return all(law.holds is not False for law in self.laws)

    def __getitem__(self, equation: str) -> Law:
        """The statement with an equation's name, such as ``"Eq. 8"``."""
        return next(law for law in self.laws if law.equation == equation)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.model}: eps {self.eps:g}, opfibers {self.opfiber_eps:g}, "
                 f"loss {self.loss:.6g}, in float64"]  # fmt: skip
        width = max(len(law.name) for law in self.laws)
        head = f"  {'':<{width}} {'':<12} {'compared':>9} {'deviation':>10}  holds"
        lines.append(head.rstrip())
        for law in self.laws:
            word = {True: "yes", False: "NO", None: "not claimed"}[law.holds]
            note = f" ({law.note})" if law.note else ""
            lines.append(
                f"  {law.name:<{width}} {law.equation:<12} {law.compared:>9,} "
                f"{law.deviation:>10.2g}  {word}{note}"
            )
        return "\n".join(lines)


def check(
    model: nn.Module,
    example_inputs: Any,
    loss_fn: Callable[[Any], Tensor],
    eps: float = 0.0,
    *,
    opfiber_eps: float | None = None,
    lr: float = 0.1,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Theorems:
    """Measure on a model what the theory says of it.

    Activations are equal in fibers (Eq. 4), errors in opfibers (Eq. 6), weight updates on
    fiber x opfiber blocks (Eq. 8), the covers after a step of gradient descent are a coarsening of
    those before (Theorem 2.1), and compression keeps output and loss (Eq. 10).  The errors that the
    rules propagate are also compared with those of autograd.  At ``eps=0``, where all before (or
    behind) a linear layer is linear, it is tried the other way round, too: nodes with equal
    activations (errors) are in one fiber (opfiber), if the colors that they are sums of are
    linearly independent.

    Theorem 2.1 is measured twice.  Covers by Eq. 9 sum weights over fibers and opfibers that need
    not be covers; such a fiber falls apart in a step, and a cover that rests on it can be split.
    Covers that are balanced over themselves (``symmetry="stable"``) cannot.

    Args:
        model, example_inputs, example_kwargs: as for :func:`fxfib.compile`; in eval mode.
        loss_fn: from the model's output, in float64, to a scalar.  It may hold the targets (and
            weights of classes, in float64), and is called again and again: no noise in it.
        eps, opfiber_eps: as for :func:`fxfib.color`; above 0 deviations are measured, not judged.
        lr: of the one step of gradient descent.

    Returns:
        The statements with their deviations.  They are computed in float64; at ``eps=0`` they hold
        up to the tolerance of the parameters' dtype, as weights are equal only up to its rounding.

    Raises:
        InputError: an argument is out of range, or the loss is no finite scalar.
        As :func:`fxfib.color` otherwise.
    """
    check_options(eps, "fibration", None)
    if not callable(loss_fn):
        raise InputError(f"loss_fn must be callable, not {type(loss_fn).__name__}.")
    if not isinstance(lr, (int, float)) or not math.isfinite(lr):
        raise InputError(f"lr must be a finite number, not {lr!r}.")
    if opfiber_eps is not None:
        check_options(opfiber_eps, "fibration", None)
    captured = capture(model, example_inputs, example_kwargs)
    continued = Continued(captured.graph_module)
    analysis = continued.color(float(eps), opfiber_eps)
    run = Run(captured, continued, loss_fn, example_inputs, example_kwargs)
    exact = eps == 0 and not opfiber_eps
    # All is computed in float64, but weights are equal (at eps = 0) up to the rounding of theirs.
    dtypes = {p.dtype for p in captured.graph_module.parameters()}
    near = max((TOLERANCE[d] for d in dtypes if d in TOLERANCE), default=TOLERANCE[torch.float64])
    laws = [
        _within("activations equal in fibers", "Eq. 4", exact, near, _activations(run, analysis)),
        _within(
            "errors as autograd has them", "Eq. 2", True, TOLERANCE[torch.float64], _propagated(run)
        ),
        _within("errors equal in opfibers", "Eq. 6", exact, near, _errors(run, analysis)),
        _within("weight updates equal on blocks", "Eq. 8", exact, near, _updates(run, analysis)),
        *_coarsening(run, analysis, float(eps), opfiber_eps, lr),
        _compression(run, float(eps), near),
    ]
    if exact:
        laws += _converse(run, analysis)
    return Theorems(
        type(captured.source).__name__, float(eps),
        float(eps if opfiber_eps is None else opfiber_eps), run.loss, tuple(laws),
    )  # fmt: skip


Measured = tuple[int, float]


def _within(
    name: str, equation: str, claimed: bool, tolerated: float, measured: Measured
) -> Law:  # fmt: skip
    compared, deviation = measured
    holds = deviation <= tolerated if claimed else None
    return Law(name, equation, compared, deviation, holds)


def _apart(tensor: Tensor, factor: Factor, floor: float = 0.0) -> Measured:
    """Pairs of one color, and how far they are from their ratio, over the largest value."""
    axes = factor.axes
    table = tensor.detach().movedim(axes, tuple(range(len(axes)))).reshape(factor.labels.size, -1)
    size = max(float(table.abs().max()) if table.numel() else 0.0, floor)
    labels, scales = factor.labels.reshape(-1), factor.scales.reshape(-1)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    constant = labels < FIRST_FREE
    ratio = torch.from_numpy(scales / scales[first][inverse]).to(table.device)
    lead = table[torch.from_numpy(first[inverse]).to(table.device)] * ratio[:, None]
    number = np.where(labels == ONE, scales, 0.0)
    fixed = torch.from_numpy(constant).to(table.device)[:, None]
    want = torch.where(fixed, torch.from_numpy(number).to(table.device)[:, None], lead)
    pairs = int((inverse.size - len(first)) + 0)
    if not size or not table.numel():
        return pairs, 0.0
    return pairs, float((table - want).abs().max()) / size


def _activations(run: Run, analysis: Colored) -> Measured:
    pairs, worst = 0, 0.0
    for node, value in run.values.items():
        if node in analysis.values:
            for factor in analysis.color(node).factors:
                more, gap = _apart(value, factor)
                pairs, worst = pairs + more, max(worst, gap)
    return pairs, worst


def _errors(run: Run, analysis: Colored) -> Measured:
    pairs, worst = 0, 0.0
    largest = max((float(error_of(v).abs().max()) for v in run.values.values() if v.numel()),
                  default=0.0)  # fmt: skip
    for node, error in run.continued.errors.items():
        if node in run.values and node not in run.continued.added and error in analysis.values:
            for factor in analysis.color(error).factors:
                more, gap = _apart(error_of(run.values[node]), factor, 1e-6 * largest)
                pairs, worst = pairs + more, max(worst, gap)
    return pairs, worst


def _propagated(run: Run) -> Measured:
    count, worst = 0, 0.0
    # Autograd has no errors of what is made from no input and no parameter, such as first states.
    tracked = [n for n in run.errors if n in run.values and run.values[n].requires_grad]
    true = {n: error_of(run.values[n]) for n in tracked}
    largest = max((float(t.abs().max()) for t in true.values() if t.numel()), default=0.0)
    for node, expected in true.items():
        if node in run.continued.added or not expected.numel() or not largest:
            continue
        size = max(float(expected.abs().max()), 1e-6 * largest)
        worst = max(worst, float((run.errors[node] - expected).abs().max()) / size)
        count += expected.numel()
    return count, worst


def _updates(run: Run, analysis: Colored) -> Measured:
    pairs, worst = 0, 0.0
    gradients = {k: error_of(p) for k, p in run.parameters.items()}
    largest = max((float(g.abs().max()) for g in gradients.values() if g.numel()), default=0.0)
    for (node, axis), labels in blocks(analysis, run.continued.values).items():
        gradient = gradients.get(str(node.target)) if node.op == "get_attr" else None
        if gradient is not None:
            ones = np.ones(len(labels))
            factor = Factor((axis,), labels + FIRST_FREE, ones, None)
            more, gap = _apart(gradient, factor, 1e-6 * largest)
            pairs, worst = pairs + more, max(worst, gap)
    return pairs, worst


def _converse(run: Run, analysis: Colored) -> list[Law]:
    """What is in step is a fiber, where all is linear."""
    found = []
    for name, equation, part in (
        ("equal activations are fibers (linear)", "Eq. 4, only if", converse.activations),
        ("equal errors are opfibers (linear)", "Eq. 6, only if", converse.errors),
    ):
        seen = part(run, analysis)
        if seen.compared:
            more = f"{seen.dependent} layers read dependent colors" if seen.dependent else ""
            found.append(
                Law(name, equation, seen.compared, float(seen.merged), seen.merged == 0, more)
            )
    return found


def _coarsening(
    run: Run, analysis: Colored, eps: float, opfiber_eps: float | None, lr: float
) -> list[Law]:
    """Theorem 2.1 for both kinds of covers, after one step of gradient descent."""
    continued = run.continued
    with torch.no_grad():
        stepped = {
            name: tensor.detach() - lr * error_of(tensor) for name, tensor in run.parameters.items()
        }
    wide = max(eps, AFTER_STEP), max(eps if opfiber_eps is None else opfiber_eps, AFTER_STEP)
    after = labels_of(continued.color(*wide, weights=stepped), continued.values, "cover")
    found = []
    lasting = stable(continued, eps, opfiber_eps)
    for name, equation, before, claimed in (
        ("covers are not split by a step", "Eq. 9", analysis, False),
        ("stable covers are not split", "Theorem 2.1", lasting, eps == 0 and not opfiber_eps),
    ):
        symmetry = "cover" if before is analysis else "stable"
        own = labels_of(before, continued.values, symmetry)
        shared = sum(_classes(labels) for labels in own.values())
        split = sum(_split(labels, after[layer]) for layer, labels in own.items())
        note = "a fiber under it was no cover" if split and not claimed and eps == 0 else ""
        holds = split == 0 if claimed else None
        found.append(Law(name, equation, shared, float(split), holds, note))
    return found


def _classes(labels: Labels) -> int:
    """Classes of several nodes."""
    return int((np.bincount(labels) > 1).sum()) if len(labels) else 0


def _split(before: Labels, after: Labels) -> int:
    """Classes whose nodes are in several classes afterwards."""
    joint = unique_rows(before, after)
    pairs = {(int(a), int(b)) for a, b in zip(before, joint, strict=True)}
    return len(pairs) - len(np.unique(before))


def _compression(run: Run, eps: float, tolerated: float) -> Law:
    plan, rewritten = shrink(run.captured.graph_module, eps)
    del plan
    outputs = run_float64(run.captured.graph_module, run.inputs)
    small = run_float64(rewritten, run.inputs)
    gap = difference(outputs, small).relative
    with torch.no_grad():
        loss = float(run.loss_of(small))
    gap = max(gap, abs(loss - run.loss) / max(abs(run.loss), 1e-12))
    holds = gap <= tolerated if eps == 0 else None
    merged = sum(p.numel() for p in run.captured.graph_module.parameters())
    merged -= sum(p.numel() for p in rewritten.parameters())
    note = f"loss {loss:.6g}, {merged:,} parameters fewer"
    return Law("compression keeps output and loss", "Eq. 10", len(outputs), gap, holds, note)
