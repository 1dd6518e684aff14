"""The public functions: compile, color, and what they share."""

from __future__ import annotations

import fnmatch
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from tqdm import tqdm

from fxfib.capture import capture, normalize_inputs
from fxfib.certificate import report_of, verified
from fxfib.colors import Colors
from fxfib.errors import InputError
from fxfib.modules import FibrationModule, raise_modules, unshare
from fxfib.passes.forward import Analysis
from fxfib.passes.groups import layer_labels
from fxfib.passes.plan import Plan, make_plan
from fxfib.passes.propagation import UnfitError
from fxfib.passes.rewrite import Rewriter
from fxfib.symmetry import check_symmetry, symmetries

# The kernels know more criteria than the passes can merge by.
CRITERIA = ("fibration",)
RESIDUALS = ("joint", "index", "auto")


def compile(
    model: nn.Module,
    eps: float = 0.0,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    criterion: str = "fibration",
    calibration: Any = None,
    round_to: int | None = None,
    residual: str = "joint",
    skip: Iterable[str] = (),
    verify: bool = True,
    progress: bool | None = None,
) -> nn.Module:
    """Merge the fibers of a trained model: a smaller module that computes the same.

    Nodes with the same total input from every color of earlier nodes (Eq. 3) become one node: rows
    averaged, columns summed (Eq. 10).  Constant nodes are folded into biases, unread ones dropped.

    Args:
        model: in eval mode; never modified.
        eps: fiber precision.  0 is exact up to the rounding of sums; larger merges more.
        example_inputs: a tuple of positional arguments, one tensor, or a dict of keyword arguments.
            None: a module is returned that compiles itself at its first call.
        example_kwargs: further keyword arguments.
        dynamic_shapes: axes beside the batch whose size stays free (a length, say), as
            ``torch.export.export`` takes them: ``{"tokens": {1: torch.export.Dim.AUTO}}``.  All
            other sizes but the batch are those of the example inputs.
        criterion: what eps measures; ``"fibration"`` is the largest absolute difference of any
            collapsed entry between any two nodes of a color.
        calibration: not available yet; must be None.
        round_to: keep merged widths multiples of this number where the original width allows it.
        residual: how values are stored that an addition couples, or that an op needs at full width.
            ``"joint"``: all in one layout, nothing is copied.  ``"index"``: each by its own fibers,
            expanded by an ``index_select`` where it is read: fewer parameters and
            multiply-accumulates, more memory traffic.  ``"auto"``: whichever a cost model finds
            cheaper, for every coupled group.
        skip: patterns (``fnmatch``) of module paths whose nodes are left alone.
        verify: run original and result on the example inputs; at eps = 0 a difference above the
            dtype's tolerance raises and nothing is returned.
        progress: show a progress bar on standard error; None: only on a terminal.

    Returns:
        A module of ordinary modules under the user's own names, with the report as ``.fibration``.

    Raises:
        InputError: an argument is out of range.
        RefusedError: the model is one that cannot be compiled (NaN weights, training mode ...).
        CaptureError: the model does not run on the example inputs or cannot be captured,
            or not for free sizes that were asked for.
        VerifyError: the result differs from the original (eps = 0).
    """
    check_options(eps, criterion, calibration, round_to, residual)
    patterns = skip_patterns(skip)
    options = {
        "dynamic_shapes": dynamic_shapes,
        "eps": float(eps),
        "criterion": criterion,
        "round_to": round_to,
        "residual": residual,
        "skip": patterns,
        "verify": verify,
        "progress": progress,
    }
    if example_inputs is None and not example_kwargs:
        from fxfib.deferred import DeferredModule

        return DeferredModule(model, options)
    return compile_now(model, example_inputs, example_kwargs, **options)


def check_options(
    eps: float, criterion: str, calibration: Any, round_to: int | None, residual: str = "joint"
) -> None:
    """Refuse bad options before any work.

    Raises:
        InputError: see :func:`compile`.
    """
    if (
        isinstance(eps, bool)
        or not isinstance(eps, (int, float))
        or not math.isfinite(eps)
        or eps < 0
    ):
        raise InputError(f"eps must be a number that is zero or positive and finite, not {eps!r}.")
    if criterion not in CRITERIA:
        known = ", ".join(repr(name) for name in CRITERIA)
        raise InputError(f"unknown criterion {criterion!r}; known: {known}.")
    if calibration is not None:
        raise InputError("calibration is not available in this version; leave it None.")
    if round_to is not None and (
        isinstance(round_to, bool)
        or not isinstance(round_to, (int, float))
        or round_to < 1
        or round_to != int(round_to)
    ):
        raise InputError(f"round_to must be a positive whole number, not {round_to!r}.")
    if residual not in RESIDUALS:
        known = ", ".join(repr(name) for name in RESIDUALS)
        raise InputError(f"unknown residual {residual!r}; known: {known}.")


# What is made in inference mode could never be trained.
@torch.inference_mode(False)
def compile_now(
    model: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None,
    *,
    dynamic_shapes: Any,
    eps: float,
    criterion: str,
    round_to: int | None,
    residual: str,
    skip: tuple[str, ...],
    verify: bool,
    progress: bool | None,
) -> FibrationModule:
    """Compile on example inputs that are at hand; options as in :func:`compile`."""
    steps = ("capture", "color", "plan", "rewrite", "verify")
    with tqdm(total=len(steps), desc="fxfib", disable=None if progress is None else not progress,
              leave=False) as bar:  # fmt: skip

        def step(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update(bar.n < len(steps) and name != "capture")

        step("capture")
        captured = capture(model, example_inputs, example_kwargs, dynamic_shapes)
        start = time.perf_counter()
        plan, rewritten = shrink(
            captured.graph_module, eps, criterion, round_to, skip, step, residual
        )
        step("verify")
        small = raise_modules(rewritten, captured)
        report = report_of(captured, plan, rewritten, eps, criterion)
        if verify:
            inputs = normalize_inputs(captured.source, example_inputs, example_kwargs)
            report = verified(report, captured, rewritten, small, inputs)
        unshare(small, captured.source)
        report.seconds.update(capture=captured.seconds, compile=time.perf_counter() - start)
        small.fibration = report
        bar.update(len(steps) - bar.n)
    return small


def shrink(
    graph_module: fx.GraphModule,
    eps: float = 0.0,
    criterion: str = "fibration",
    round_to: int | None = None,
    skip: Iterable[str] = (),
    step: Any = lambda name: None,
    residual: str = "joint",
) -> tuple[Plan, fx.GraphModule]:
    """Color, plan and rewrite a captured graph.

    Where a rewritten op does not fit its operands, its node is made a barrier (it is in the
    report's refusals) and the plan is made again, so a wrong rule costs a merge, never a result.
    """
    barriers: dict[fx.Node, str] = {}
    while True:
        step("color")
        analysis = Analysis(
            graph_module,
            eps,
            criterion,
            barriers,
            skipped_nodes(graph_module, skip),
            separate=residual != "joint",
        )
        analysis.run()
        step("plan")
        plan = make_plan(analysis, round_to, residual)
        step("rewrite")
        try:
            return plan, Rewriter(plan).run()
        except UnfitError as error:
            if error.node in barriers:
                raise
            barriers[error.node] = f"the merged op does not fit its operands ({error})"


def skip_patterns(skip: Any) -> tuple[str, ...]:
    """One pattern or several.

    Raises:
        InputError: they are no strings.
    """
    if isinstance(skip, str):
        return (skip,)
    patterns = tuple(skip) if isinstance(skip, Iterable) else (skip,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise InputError(f"skip must be a pattern of module paths or a list of them, not {skip!r}.")
    return patterns


def skipped_nodes(graph_module: fx.GraphModule, patterns: Iterable[str]) -> list[fx.Node]:
    """The layers that the user's patterns name.

    Raises:
        InputError: a pattern matches none.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    patterns = tuple(patterns)
    if not patterns:
        return []
    found, used = [], set()
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        paths = {
            str(source.target).rpartition(".")[0]
            for source in node.all_input_nodes
            if source.op == "get_attr"
        }
        for pattern in patterns:
            if any(fnmatch.fnmatchcase(path, pattern) for path in paths):
                found.append(node)
                used.add(pattern)
    unused = [p for p in patterns if p not in used]
    if unused:
        raise InputError(
            f"skip pattern {unused[0]!r} matches no layer; patterns are module paths "
            "such as 'layer1.*.conv1'."
        )
    return found


def color(
    model: nn.Module,
    example_inputs: Any,
    eps: float = 0.0,
    symmetry: str = "fiber",
    *,
    criterion: str = "fibration",
    opfiber_eps: float | None = None,
    batch_statistics: bool = False,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Colors:
    """Find the fibers, opfibers or covers of a model and change nothing.

    Args:
        model, example_inputs, eps, criterion, example_kwargs: as for :func:`compile`.
        symmetry: ``"fiber"``: equal activations (Eq. 3, as :func:`compile` merges them, up to a
            factor); ``"opfiber"``: equal errors, whatever the loss (Eq. 5); ``"cover"``: both
            (Eq. 9), so that the loss has equal gradients by the nodes' weights; ``"stable"``: the
            covers that gradient descent cannot split, one partition that is balanced both ways over
            itself.
        opfiber_eps: precision of the opfibers; None: ``eps``.
        batch_statistics: for opfibers and covers, batch norms normalise by the batch, as they do
            while the model trains; errors of a channel then depend on its activation.

    Returns:
        Labels of every layer's output nodes, and the coupled groups.

    Raises:
        As :func:`compile`, but for ``VerifyError``.
    """
    check_options(eps, criterion, None, None)
    check_symmetry(symmetry)
    if opfiber_eps is not None:
        check_options(opfiber_eps, criterion, None, None)
    captured = capture(model, example_inputs, example_kwargs)
    analysis = Analysis(captured.graph_module, float(eps), criterion).run()
    plan = make_plan(analysis)
    report = report_of(captured, plan, captured.graph_module, float(eps), criterion)
    if symmetry == "fiber":
        found = layer_labels(plan)
    else:
        found, both = symmetries(
            captured, symmetry, float(eps), opfiber_eps, criterion, batch_statistics
        )
        report = replace(report, refusals=tuple(both.refusals))
    labels = {name: torch.from_numpy(own) for name, own in found.items()}
    return Colors(report, labels, symmetry)


__all__ = ["Colors", "color", "compile", "compile_now", "shrink"]
