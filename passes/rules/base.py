"""What a rule is: everything fxfib knows about one op, in one class.

To add an op, derive from :class:`Rule` (or from one of the families, which is usually enough), name
its ATen ``targets``, and give ``forward``, ``rewrite`` and ``examples``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from fxfib.coloring import Value, opened
from fxfib.passes.regression import Regression
from fxfib.passes.relations import Move, Ref, Same

if TYPE_CHECKING:
    from fxfib.passes.backward import Adjoint, Error
    from fxfib.passes.forward import Analysis
    from fxfib.passes.rewrite import Rewriter
    from fxfib.passes.rules.examples import Example

Mask = npt.NDArray[np.bool_]


def overloads(*names: str) -> tuple[Any, ...]:
    """Every functional overload of the named ATen ops that this version of PyTorch has."""
    found = []
    for name in names:
        packet = getattr(torch.ops.aten, name, None)
        if packet is None:
            continue
        for overload in packet.overloads():
            op = getattr(packet, overload)
            schema = op._schema
            # ATen also names Python's arithmetic on numbers, lists, strings: that is no tensor op.
            tensors = any("Tensor" in str(a.type) for a in schema.arguments)
            # Named dimensions are no positions; no rule reads them.
            named = "name" in overload.lower()
            mutable = schema.is_mutable or "out" in overload.split("_")
            if tensors and not named and not mutable:
                found.append(op)
    return tuple(found)


class Barrier(Exception):
    """Raised by a rule that cannot follow this use of its op; becomes a refusal."""

    def __init__(self, reason: str, remedy: str = "write a rule for this use of the op") -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


def is_tensor(node: object) -> bool:
    """Whether an argument is a node that carries one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def hint(size: int | torch.SymInt) -> int:
    """The example's size of a dimension."""
    return size if isinstance(size, int) else int(size.node.hint)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Flavor:
    """What a derivative reads of an activation.

    Attributes:
        operand: its place among the operands.
        direction: only its sign matters (of ReLU, of the places of maxima): a positive factor of
            its own does not tell two nodes apart.
    """

    operand: int
    direction: bool = False


class Rule:
    """One op (or a family of ops that behave alike)."""

    targets: ClassVar[tuple[Any, ...]] = ()
    #: Ops by qualified name ("library::op"), which exist only once the library is imported.
    named: ClassVar[tuple[str, ...]] = ()
    #: Node by node: an output node reads just the input nodes that ``Same`` and ``Move`` tie to it.
    pointwise: ClassVar[bool] = False

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        """Colors of the output from the colors of the inputs, and the layouts that must agree.

        Returns what is known of the output; records :mod:`fxfib.passes.relations` with
        ``analysis.relate``.  Raises :class:`fxfib.passes.forward.Barrier` for a use of the op that
        the rule does not cover.
        """
        raise NotImplementedError

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """The errors of the inputs from the error of the output, emitted with ``adjoint.call``.

        Args:
            error: the output's error; of a node with several outputs the errors of those that the
                loss depends on, by number.

        Yields:
            An input and its error (or a share of it: those of one input are added).  Raises
            :class:`Barrier` for a use of the op that the rule does not cover; so does every rule
            without a backward part.
        """
        raise Barrier("there is no backward rule for this op", "add one to the op's rule")

    def reads(
        self, analysis: Analysis, node: fx.Node, live: Mapping[Ref, Mask]
    ) -> Iterator[tuple[Ref, Mask]]:
        """Which input nodes matter, given which output nodes do, where that is not all of them.

        Only linear ops say more than "all": a column of zeros is never read.
        """
        return iter(())

    def columns(self, analysis: Analysis, node: fx.Node) -> Iterator[tuple[Ref, torch.Tensor]]:
        """The weights that read input nodes, for ops that are linear in them.

        Yields:
            An input axis, and what multiplies its nodes, ``[m, nodes]``: all outputs and kernel
            positions are rows.
        """
        return iter(())

    def regression(self, analysis: Analysis, node: fx.Node) -> Regression | None:
        """The layer as a linear regression; None where it is none, or cannot be written as one."""
        return None

    def produces(self, analysis: Analysis, node: fx.Node) -> Iterator[tuple[str, Ref]]:
        """The axes of nodes that a layer makes, for the report.

        Yields:
            Which part of the layer's module makes them ("" where it is all of it), and the axis.
        """
        return iter(())

    def expands(self, analysis: Analysis, node: fx.Node) -> bool:
        """Whether operands may be stored smaller than this op needs them, and expanded for it."""
        return False

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        """Emit the op on the smaller operands; the default repeats the call."""
        return rewriter.repeat(node)

    def examples(self) -> Iterable[Example]:
        """Small modules with inputs in which this op decides what may merge."""
        return ()


_RULES: dict[Any, Rule] = {}
_NAMED: dict[str, Rule] = {}


def register(rule: type[Rule]) -> type[Rule]:
    """Class decorator: make a rule known under its targets."""
    instance = rule()
    for target in rule.targets:
        if target in _RULES:
            raise AssertionError(f"two rules for {target}")
        _RULES[target] = instance
    for name in rule.named:
        if name in _NAMED:
            raise AssertionError(f"two rules for {name}")
        _NAMED[name] = instance
    return rule


def find_rule(node: fx.Node) -> Rule | None:
    """The rule of a node's op, or None (a barrier)."""
    if node.op != "call_function":
        return None
    if isinstance(node.target, torch._ops.OpOverload):
        return _RULES.get(node.target) or _NAMED.get(node.target._schema.name)
    # Derivatives carry their own rule.
    return _RULES.get(node.target) or getattr(node.target, "rule", None)


def all_rules() -> dict[Any, Rule]:
    """Every registered rule by target."""
    return dict(_RULES)


class PerChannel(Rule):
    """Ops that treat every channel alike and by itself: pooling, resizing, softmax over space.

    Nodes of equal color stay equal.  Subclasses say which axes are mixed, whether the op is
    positively homogeneous (scales pass) and whether a constant channel stays that constant.
    """

    pointwise = True
    homogeneous: ClassVar[bool] = False

    def source(self, node: fx.Node) -> fx.Node:
        return node.args[0]  # type: ignore[return-value]

    def mixed_axes(self, analysis: Analysis, node: fx.Node) -> tuple[int, ...]:
        """Axes of the input along which the op is not node by node."""
        raise NotImplementedError

    def keeps_constants(self, analysis: Analysis, node: fx.Node) -> bool:
        return False

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        return self.colored(analysis, node, node)

    def linear(self, node: fx.Node) -> bool:
        """Whether the op is linear: its errors depend on no activation."""
        return False

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """Every channel by itself; where the op is not linear, its own activation is the flavor."""
        source = self.source(node)
        rank = len(adjoint.analysis.shape(source))
        mixed = tuple(axis % rank for axis in self.mixed_axes(adjoint.analysis, node))
        flavors = () if self.linear(node) else (Flavor(0, direction=self.homogeneous),)
        yield source, adjoint.derivative(node, error, 0, flavors=flavors, mixed=mixed)

    def colored(self, analysis: Analysis, node: fx.Node, out: fx.Node) -> Value:
        """The value of ``out``: the node itself, or the item that takes its first output."""
        source = self.source(node)
        value = analysis.color(source)
        mixed = {axis % max(value.ndim, 1) for axis in self.mixed_axes(analysis, node)}
        touched = [axis for axis in value.tracked_axes if axis in mixed]
        analysis.full(source, touched, f"{node.target} works along this axis")
        constants = self.keeps_constants(analysis, node)
        factors = []
        for whole in value.factors:
            # Of axes that are colored together with a mixed one, what it says of each by itself.
            own = [axis for axis in whole.axes if axis not in mixed]
            parts = [whole] if len(own) == len(whole.axes) else [whole.along(axis) for axis in own]
            for factor in parts:
                space = (str(node.target), node.name, factor.space)
                factor = opened(factor, scales=self.homogeneous, constants=constants, space=space)
                for axis in factor.axes:
                    analysis.relate(Same((out, axis), (source, axis)))
                factors.append(factor)
        return Value(analysis.shape(out), tuple(factors))


def tied_inputs(
    analysis: Analysis, node: fx.Node, live: Mapping[int, Mask]
) -> Iterator[tuple[Ref, Mask]]:
    """Follow the ``Same`` and ``Move`` relations of one node from its output to its inputs.

    Args:
        live: for every tracked axis of the node, which positions matter.
    """
    for relation in analysis.by_node.get(node, ()):
        if isinstance(relation, Same) and relation.a[0] is node and relation.a[1] in live:
            yield relation.b, live[relation.a[1]]  # type: ignore[index]
        elif isinstance(relation, Move) and all(out[0] is node for out in relation.out):
            if any(isinstance(axis, str) for source in relation.sources for _, axis in source):
                continue  # of axes inside the op: it says how slots lie, not what is read
            chosen = np.ones(relation.index.shape, dtype=bool)
            for place, (_, axis) in enumerate(relation.out):
                shape = [1] * relation.index.ndim
                shape[place] = -1
                if axis in live:
                    chosen &= live[axis].reshape(shape)  # type: ignore[index]
            reached = np.unique(relation.index[chosen & (relation.index >= 0)])
            yield from _reached(analysis, relation, reached)


def _reached(
    analysis: Analysis, move: Move, positions: npt.NDArray[np.int64]
) -> Iterator[tuple[Ref, Mask]]:
    start = 0
    for source in move.sources:
        shape = tuple(analysis.shape(node)[axis] for node, axis in source)  # type: ignore[index]
        size = int(np.prod(shape))
        inside = positions[(positions >= start) & (positions < start + size)] - start
        start += size
        for ref, coordinate in zip(source, np.unravel_index(inside, shape), strict=True):
            node, axis = ref
            assert isinstance(axis, int)
            mask: Mask = np.zeros(analysis.shape(node)[axis], dtype=np.bool_)
            mask[coordinate] = True
            yield ref, mask


def columns_read(weight: torch.Tensor, alive: Mask | None) -> Mask:
    """Which input nodes a weight reads: those with an entry other than zero in a row of interest.

    Args:
        weight: ``[out, in, *kernel]``.
        alive: the output nodes of interest; None: all.
    """
    rows = weight if alive is None or alive.all() else weight[torch.from_numpy(alive)]
    few = rows[:8].flatten(2) if rows.ndim > 2 else rows[:8].unsqueeze(2)
    read = (few != 0).any(2).any(0)
    # A few rows tell of almost every column that it is read; the others are looked at as a whole.
    rest = torch.nonzero(~read).squeeze(1)
    if len(rest):
        others = rows[:, rest]
        others = others.flatten(2) if others.ndim > 2 else others.unsqueeze(2)
        read[rest] = (others != 0).any(2).any(0)
    return np.asarray(read.numpy())
