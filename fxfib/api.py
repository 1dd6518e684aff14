"""The public functions: compile, color, and what they share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxfib.certificate import report_of
from fxfib.colors import Colors
from fxfib.errors import InputError
from fxfib.modules import FibrationModule
from fxfib.passes.criteria import Eps
from fxfib.passes.forward import Analysis
from fxfib.passes.groups import layer_labels
from fxfib.passes.plan import make_plan
from fxfib.progress import Progress
from fxfib.symmetry import check_symmetry, symmetries
from fxfib.workshop import Workshop, shrink, skip_patterns, skipped_nodes

# The largest eps that means anything.
LARGEST_EPS = {"fibration": math.inf, "cosine": 2.0, "energy": 1.0}
RESIDUALS = ("joint", "index", "auto")


def compile(
    model: nn.Module,
    eps: Eps = 0.0,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    criterion: str = "fibration",
    calibration: Any = None,
    compensate: bool = True,
    refine: int = 0,
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
        eps: fiber precision.  0 is exact up to the rounding of sums; larger merges more.  A mapping
            from patterns (``fnmatch``) of module paths to numbers gives layers their own: the first
            pattern that matches decides, no match is 0, coupled layers get their smallest.
        example_inputs: a tuple of positional arguments, one tensor, or a dict of keyword arguments.
            None: a module is returned that compiles itself at its first call.
        example_kwargs: further keyword arguments.
        dynamic_shapes: axes beside the batch whose size stays free (a length, say), as
            ``torch.export.export`` takes them: ``{"tokens": {1: torch.export.Dim.AUTO}}``.  All
            other sizes but the batch are those of the example inputs.
        criterion: what eps measures.  ``"fibration"``: the largest absolute difference of any
            collapsed entry between any two nodes of a color.  ``"cosine"``: the mean distance, 1 -
            cosine, of two clusters of collapsed rows with their biases that are still joined.
            ``"energy"``: the share of the energy of what its readers compute that may go.  Told
            from the weights, nodes merge or are dropped, whichever loses less; measured on the
            calibration inputs, or on those that batch norm knows of, nodes are dropped whose
            readers can do without.
            At eps = 0 all of them are exact.
        calibration: at eps > 0, inputs like those the model will see, without labels: a tensor, or
            an iterable of batches (tensors, tuples of arguments, dicts), such as a ``DataLoader``
            (what follows the arguments in a batch is left out).  At most the first 4,096 examples
            are used.  None: noise; where there is batch norm, noise that is changed until it has
            the statistics that batch norm knows; where recurrent layers read it nothing is fitted.
        compensate: at eps > 0, fit every layer that reads merged nodes to what the original
            computes on the calibration inputs, by least squares; weights of recurrent layers run
            after run.  With calibration those nodes go that others make up for so: without
            compensation, give none.
        refine: at eps > 0, how often the result is then trained once over the calibration inputs to
            give the original's outputs (Adam, mixtures of inputs); needs no labels.  One input in
            eight is kept apart, from least squares, too: the pass that is nearest there is taken.
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
    check_options(eps, criterion, round_to, residual)
    patterns = skip_patterns(skip)
    options = {
        "dynamic_shapes": dynamic_shapes,
        "eps": eps_of(eps),
        "criterion": criterion,
        "round_to": round_to,
        "residual": residual,
        "skip": patterns,
        "verify": verify,
        "progress": progress,
        "calibration": calibration,
        "compensate": compensate,
        "refine": refine,
    }
    if example_inputs is None and not example_kwargs:
        from fxfib.deferred import DeferredModule

        return DeferredModule(model, options)
    return compile_now(model, example_inputs, example_kwargs, **options)


def eps_of(eps: Eps) -> Eps:
    """The same as plain floats."""
    return {k: float(v) for k, v in eps.items()} if isinstance(eps, Mapping) else float(eps)


def check_options(eps: Eps, criterion: str, round_to: int | None, residual: str = "joint") -> None:
    """Refuse bad options before any work.

    Raises:
        InputError: see :func:`compile`.
    """
    if criterion not in LARGEST_EPS:
        known = ", ".join(repr(name) for name in LARGEST_EPS)
        raise InputError(f"unknown criterion {criterion!r}; known: {known}.")
    if isinstance(eps, Mapping) and not all(isinstance(pattern, str) for pattern in eps):
        raise InputError(f"eps must map patterns of module paths to numbers, not {eps!r}.")
    for value in eps.values() if isinstance(eps, Mapping) else (eps,):
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
            or value < 0
        ):
            raise InputError(
                f"eps must be a number that is zero or positive and finite, not {value!r}."
            )
        if value > LARGEST_EPS[criterion]:
            raise InputError(
                f"eps is at most {LARGEST_EPS[criterion]:g} under {criterion!r}, not {value!r}."
            )
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
    eps: Eps,
    criterion: str,
    round_to: int | None,
    residual: str,
    skip: tuple[str, ...],
    verify: bool,
    progress: bool | None,
    calibration: Any = None,
    compensate: bool = True,
    refine: int = 0,
) -> FibrationModule:
    """Compile on example inputs that are at hand; options as in :func:`compile`."""
    with Progress("fxfib compile", progress) as step:
        step("capture")
        workshop = Workshop(
            model,
            example_inputs,
            example_kwargs,
            criterion=criterion,
            calibration=calibration,
            compensate=compensate,
            refine=refine,
            round_to=round_to,
            residual=residual,
            dynamic_shapes=dynamic_shapes,
            skip=skip,
            step=step,
        )
        return workshop.compiled(eps, verify=verify)


def color(
    model: nn.Module,
    example_inputs: Any,
    eps: Eps = 0.0,
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
    check_options(eps, criterion, None)
    check_symmetry(symmetry)
    if opfiber_eps is not None:
        check_options(opfiber_eps, criterion, None)
    if symmetry != "fiber" and (isinstance(eps, Mapping) or criterion == "energy"):
        raise InputError(
            f"{symmetry!r} is colored with one number as eps, and not by the criterion 'energy'."
        )
    workshop = Workshop(model, example_inputs, example_kwargs, criterion=criterion)
    captured = workshop.captured
    policy = workshop.policy(eps_of(eps))
    plan = make_plan(Analysis(captured.graph_module, policy=policy).run())
    report = report_of(captured, plan, captured.graph_module, eps_of(eps), criterion)
    if symmetry == "fiber":
        found = layer_labels(plan)
    else:
        assert not isinstance(eps, Mapping)
        found, both = symmetries(
            captured, symmetry, float(eps), opfiber_eps, criterion, batch_statistics
        )
        report = replace(report, refusals=tuple(both.refusals))
    labels = {name: torch.from_numpy(own) for name, own in found.items()}
    return Colors(report, labels, symmetry)


__all__ = [
    "Colors",
    "color",
    "compile",
    "compile_now",
    "shrink",
    "skip_patterns",
    "skipped_nodes",
]
