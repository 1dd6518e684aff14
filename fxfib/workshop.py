"""One captured model, and what it takes to shrink it: once, or again and again."""

from __future__ import annotations

import fnmatch
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import fx, nn

from fxfib.calibration import batches_of, drawn, inputs_known, norms_known, remembered
from fxfib.capture import capture, normalize_inputs
from fxfib.certificate import batch_of, report_of, verified
from fxfib.errors import InputError
from fxfib.macs import macs_of
from fxfib.modules import FibrationModule, raise_modules, unshare
from fxfib.passes.activations import Activation, activations_of
from fxfib.passes.compensate import RIDGE, Batches, compensate
from fxfib.passes.criteria import CalibratedPolicy, EnergyPolicy, Eps, Policy
from fxfib.passes.curves import CountPolicy
from fxfib.passes.forward import Analysis
from fxfib.passes.outlook import Outlook
from fxfib.passes.plan import Plan, make_plan
from fxfib.passes.propagation import UnfitError
from fxfib.passes.relations import Ref
from fxfib.passes.rewrite import Rewriter
from fxfib.passes.rules import find_rule
from fxfib.passes.rules.recurrent import Recurrent
from fxfib.passes.rules.recurrent_cell import RecurrentCell
from fxfib.passes.stages import Step, silent
from fxfib.refining import BATCH, PASSES, parted, refined
from fxfib.timing import torch_threads

P = ParamSpec("P")
R = TypeVar("R")

# Multiply-accumulates of a batch that refining takes up at a time, below which one thread does all.
FEW_MACS = 2**27
RECURRENT = (Recurrent, RecurrentCell)
BLIND = (
    "nothing was fitted: there is no calibration, and noise, step after step, says nothing of what "
    "a recurrent layer reads"
)
NOT_MADE_UP_FOR = (
    "with calibration those nodes go that the others can make up for, and compensate=False fits "
    "none of them: without calibration, less is lost"
)


def _few_threads(
    method: Callable[Concatenate[Workshop, P], R],
) -> Callable[Concatenate[Workshop, P], R]:
    """Done on no more threads than pay for the model."""

    @functools.wraps(method)
    def done(self: Workshop, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch_threads(self.threads):
            return method(self, *args, **kwargs)

    return done


class Workshop:
    """A captured model with its options; what several results need is made once.

    Args:
        model, example_inputs, example_kwargs, criterion, calibration, round_to, residual, skip,
            dynamic_shapes: as in :func:`fxfib.compile`, checked.
        compensate: whether readers of merged nodes are fitted, at eps > 0.
        refine: as in :func:`fxfib.compile`, or None as in :func:`fxfib.tune`.
        step: called with the name of what is done next.

    Raises:
        as :func:`fxfib.compile`, but for ``VerifyError``.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        criterion: str = "fibration",
        calibration: Any = None,
        compensate: bool = True,
        refine: int | None = 0,
        round_to: int | None = None,
        residual: str = "joint",
        skip: tuple[str, ...] = (),
        dynamic_shapes: Any = None,
        step: Step = silent,
    ) -> None:
        self.captured = capture(model, example_inputs, example_kwargs, dynamic_shapes)
        self.start = time.perf_counter()
        self.example = (example_inputs, example_kwargs)
        self.criterion = criterion
        self.calibration = calibration
        self.compensate = compensate
        # Whether inputs are like data: given, or made as batch norms remember them.  The latter are
        # good for fitting layer by layer; a whole network that learns from so few leaves the data.
        remembers = not self.blind and norms_known(self.captured)
        self.like_data = calibration is not None or remembers
        known = calibration is not None or (
            inputs_known(self.captured) and not (self.blind or remembers)
        )
        self.refine = (PASSES if compensate and known else 0) if refine is None else refine
        self.round_to = round_to
        self.residual = residual
        self.skip = skip
        self.step = step
        self.graph_module = self.captured.graph_module

    @cached_property
    def blind(self) -> bool:
        """Whether nothing is known of what layers read: noise has no order of steps."""
        nodes = self.captured.graph_module.graph.nodes
        rules = map(find_rule, nodes)
        return self.calibration is None and any(isinstance(r, RECURRENT) for r in rules)

    @cached_property
    def threads(self) -> int:
        """Threads of torch while networks are made and fitted.

        Operations of microseconds are no faster on several; and on a busy machine, where threads
        wait for one another, many times as slow.
        """
        macs = macs_of(self.graph_module) / batch_of(self.captured)
        # Weights that are only looked up are colored all the same.
        weights = sum(p.numel() for p in self.graph_module.parameters())
        return 1 if BATCH * max(macs, weights) < FEW_MACS else torch.get_num_threads()

    @cached_property
    def skipped(self) -> list[fx.Node]:
        """The layers that the user wants to keep."""
        return skipped_nodes(self.graph_module, self.skip)

    @cached_property
    def batches(self) -> Batches:
        """Calibration or synthetic inputs, flat."""
        if self.calibration is not None:
            return batches_of(self.calibration, self.captured)
        if not self.like_data:
            return drawn(self.captured, *self.example)
        self.step("synthesize")
        return remembered(self.captured, *self.example, step=self.step)

    @cached_property
    def parts(self) -> tuple[Batches, Batches]:
        """What is learned from and what judges, where something is refined."""
        return parted(self.batches)

    def inputs(self, number: int) -> Batches:
        """Inputs of a pass: those like data again and again, or fresh noise every time."""
        if self.like_data or number == 0:
            return self.parts[0]
        return drawn(self.captured, *self.example, seed=number)

    @cached_property
    def outlook(self) -> Outlook:
        """What reads every node."""
        return Outlook(self.graph_module, self.skipped)

    @cached_property
    def activations(self) -> Mapping[Ref, Activation]:
        """Second moments on the calibration inputs."""
        self.step("measure")
        return activations_of(
            self.graph_module, self.outlook, self.batches, self.step, recurrence=not self.blind
        )

    @cached_property
    def exact(self) -> Analysis:
        """The coloring at eps = 0."""
        return Analysis(self.graph_module, skip=self.skipped).run()

    @cached_property
    def energy(self) -> EnergyPolicy:
        """Colors by the energy that readers lose, whatever the eps."""
        # What is measured is who can be done without once the others are fitted.
        measured = self.calibration is not None or (self.like_data and self.compensate)
        return self.guide if measured else EnergyPolicy(0.0, self.outlook)

    @cached_property
    def guide(self) -> CalibratedPolicy:
        """Colors by what is measured on calibration or synthetic inputs."""
        return CalibratedPolicy(0.0, self.outlook, self.activations)

    @_few_threads
    def eps_for(self, gone: Mapping[Ref, int]) -> dict[str, float]:
        """The eps of every layer that lets so many nodes of these values go."""
        policy = CountPolicy(self.energy, gone)
        Analysis(self.graph_module, skip=self.skipped, policy=policy).run()
        return {layer: eps for layer, eps in policy.found.items() if eps > 0}

    def policy(self, eps: Eps) -> Policy:
        """How rows become colors.

        Raises:
            InputError: a pattern of eps matches no layer.
        """
        plain = Policy(eps, self.criterion)
        plain.check(self.graph_module.graph.nodes)
        if self.criterion != "energy" or plain.exact:
            return plain
        return self.energy.at(eps)

    @_few_threads
    def rewritten(self, eps: Eps) -> tuple[Rewriter, fx.GraphModule]:
        """The smaller graph as merging makes it."""
        policy = self.policy(eps)
        return rewrite(
            self.graph_module, policy, self.round_to, self.skip, self.step, self.residual
        )

    @_few_threads
    def fitted(
        self,
        rewriter: Rewriter,
        small: fx.GraphModule,
        *,
        refine: bool = True,
        batches: Batches | None = None,
    ) -> list[str]:
        """Compensate and, as often as asked for, refine in place; notes on what was left out.

        Args:
            batches: what layers are fitted on; None: all there is.
        """
        if rewriter.analysis.policy.exact:
            return []
        notes: list[str] = []
        if not self.compensate and self.calibration is not None and self.criterion == "energy":
            notes.append(NOT_MADE_UP_FOR)
        if self.compensate and self.blind:
            notes.append(BLIND)
        elif self.compensate:
            self.step("compensate")
            # What judges a refined network must not have been fitted to.
            if batches is None:
                batches = self.parts[0] if self.refine and refine else self.batches
            notes = compensate(rewriter, small, batches, ridge=RIDGE, step=self.step)
        if self.refine and refine:
            self.step("refine")
            notes += refined(
                self.graph_module, small, self.inputs, self.parts[1], self.refine,
                scores=self.like_data, step=self.step,
            )  # fmt: skip
        return notes

    def compiled(self, eps: Eps, *, verify: bool = True) -> FibrationModule:
        """The whole way: a module with its report."""
        rewriter, rewritten = self.rewritten(eps)
        notes = self.fitted(rewriter, rewritten)
        return self.raised(rewriter, rewritten, eps, notes, verify=verify)

    def raised(
        self,
        rewriter: Rewriter,
        rewritten: fx.GraphModule,
        eps: Eps,
        notes: Iterable[str] = (),
        *,
        verify: bool = True,
    ) -> FibrationModule:
        """A rewritten graph as ordinary modules, with its report.

        Raises:
            VerifyError: the result differs from the original (eps = 0).
        """
        captured = self.captured
        self.step("verify")
        small = raise_modules(rewritten, captured)
        report = report_of(captured, rewriter.plan, rewritten, eps, self.criterion)
        report = replace(report, notes=(*report.notes, *notes))
        if verify:
            inputs = normalize_inputs(captured.source, *self.example)
            report = verified(report, captured, rewritten, small, inputs)
        unshare(small, captured.source)
        seconds = time.perf_counter() - self.start
        report.seconds.update(capture=captured.seconds, compile=seconds)
        small.fibration = report
        return small


def shrink(
    graph_module: fx.GraphModule,
    eps: Eps = 0.0,
    criterion: str = "fibration",
    round_to: int | None = None,
    skip: Iterable[str] = (),
    residual: str = "joint",
) -> tuple[Plan, fx.GraphModule]:
    """Color, plan and rewrite a captured graph: the plan, and the smaller graph."""
    policy = Policy(eps, criterion)
    if criterion == "energy" and not policy.exact:
        policy = EnergyPolicy(eps, Outlook(graph_module, skipped_nodes(graph_module, skip)))
    rewriter, rewritten = rewrite(graph_module, policy, round_to, skip, residual=residual)
    return rewriter.plan, rewritten


def rewrite(
    graph_module: fx.GraphModule,
    policy: Policy,
    round_to: int | None = None,
    skip: Iterable[str] = (),
    step: Step = silent,
    residual: str = "joint",
) -> tuple[Rewriter, fx.GraphModule]:
    """Color by a policy, plan and rewrite; the rewriter knows which node became which.

    Where a rewritten op does not fit its operands, its node is made a barrier (it is in the
    report's refusals) and the plan is made again, so a wrong rule costs a merge, never a result.
    """
    barriers: dict[fx.Node, str] = {}
    skipped = skipped_nodes(graph_module, skip)
    while True:
        step("color")
        analysis = Analysis(
            graph_module,
            barriers=barriers,
            skip=skipped,
            separate=residual != "joint",
            policy=policy,
        ).run(step)
        step("plan")
        plan = make_plan(analysis, round_to, residual)
        step("rewrite")
        rewriter = Rewriter(plan)
        try:
            return rewriter, rewriter.run()
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
