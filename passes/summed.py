"""The side of a contraction whose channels are summed: ``sum_c q_c k_c`` is linear in ``k``.

Where channels of ``q`` are a fiber, those of ``k`` that they meet become one channel, their sum.
That sum can be taken in the rows of the layers that make ``k``, if everything in between treats all
channels alike and linearly: moves them, adds them up (a rotary embedding adds a turned copy),
multiplies them by numbers that agree within a fiber, or shifts them.  What lies in between keeps no
colors of its own: its layouts follow from the relations alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from fxfib.coloring import Floats, Labels
from fxfib.passes.heads import SummedRows
from fxfib.passes.heads_trace import Unfollowed, moved_numbers
from fxfib.passes.relations import Full, Ref, Refine, Relation
from fxfib.passes.rules import find_rule
from fxfib.passes.rules.activation import PASSES_FORMS, Cast
from fxfib.passes.rules.arithmetic import Add, Divide, Multiply
from fxfib.passes.rules.base import Barrier, is_tensor, overloads
from fxfib.passes.rules.batch_norm import BatchNorm
from fxfib.passes.rules.concatenation import Concatenate, Stack
from fxfib.passes.rules.convolution import Convolution
from fxfib.passes.rules.linear import LinearMap
from fxfib.passes.rules.movement import Movement
from fxfib.passes.rules.norm import parameter_values
from fxfib.passes.rules.splitting import GetItem, Parts
from fxfib.passes.rules.tracing import constant_factor

if TYPE_CHECKING:
    from fxfib.passes.forward import Analysis

Terms = tuple[Any, ...]  # int32 tensors: the channel (of all roots, end to end) in every element

_LINEAR = PASSES_FORMS | set(overloads("neg"))


@dataclass
class Summed:
    """How the channels of one operand of a contraction may be summed.

    Attributes:
        free: the axes that carry them; their layouts follow from the relations alone.
        rows: what is summed when a layer is rewritten, by axis.
        relations: what must hold beyond what the rules on the way say.
        roots: the axes of the layers' outputs, end to end ...
        terms: ... and which of these channels are added up in every element of the operand.
    """

    free: set[Ref] = field(default_factory=set)
    rows: dict[Ref, SummedRows] = field(default_factory=dict)
    relations: list[Relation] = field(default_factory=list)
    roots: tuple[Ref, ...] = ()
    terms: Terms = ()


def follow_sum(analysis: Analysis, core: fx.Node, operand: fx.Node, axis: int) -> Summed:
    """How channels on an axis of an operand of ``core`` can be summed.

    Raises:
        Unfollowed: they cannot, and why.
    """
    return _Follower(analysis, core, operand, axis).run()


def _sources(analysis: Analysis, node: fx.Node) -> list[fx.Node]:
    """The operands through which an op is linear, channel by channel; none for a layer."""
    rule = find_rule(node)
    if node.op != "call_function" or analysis.is_constant(node) or node in analysis.opaque:
        raise Unfollowed(f"{node.name} is not made by a layer")
    if isinstance(rule, (LinearMap, Convolution)) and _is_layer(analysis, rule, node):
        return []
    operands: Iterable[Any]
    if isinstance(rule, (Movement, Parts, GetItem, Cast)) or node.target in _LINEAR:
        operands = node.args[:1]
        if node.target in _LINEAR and analysis.arguments(node).get("train", False):
            raise Unfollowed(f"{node.name} drops at random")
        if isinstance(rule, Cast) and not rule.scales_pass(node):
            raise Unfollowed(f"{node.name} is no floating-point number")
    elif isinstance(rule, (Concatenate, Stack)):
        operands = node.args[0]  # type: ignore[assignment]
        if any(analysis.is_constant(o) for o in operands):
            raise Unfollowed(f"{node.name} joins them with parameters")
    elif isinstance(rule, Add):
        operands = [o for o in rule.operands(analysis, node) if _computed(analysis, o)]
    elif isinstance(rule, (Multiply, Divide)):
        first, second = rule.operands(analysis, node)
        pair = [first] if isinstance(rule, Divide) else [first, second]
        operands = [
            o
            for o in pair
            if _computed(analysis, o)
            and analysis.shape(o) == analysis.shape(node)
            and analysis.value(o).tracked_axes
        ][:1]
        if not operands:
            raise Unfollowed(f"{node.name} multiplies it by a computed value")
    elif isinstance(rule, BatchNorm):
        operands = [analysis.arguments(node)["input"]]
    else:
        raise Unfollowed(f"{node.name} is not linear in it, channel by channel")
    return [o for o in operands if isinstance(o, fx.Node)]


def _computed(analysis: Analysis, operand: Any) -> bool:
    return is_tensor(operand) and not analysis.is_constant(operand)


def _is_layer(analysis: Analysis, rule: LinearMap | Convolution, node: fx.Node) -> bool:
    if isinstance(rule, LinearMap):
        try:
            source, weight, _, _ = rule.operands(analysis, node)
        except Barrier:
            return False
        return analysis.is_constant(weight) and not analysis.is_constant(source)
    bound = analysis.arguments(node)
    grouped = bound["groups"] > 1
    # Of a grouped layer only plain groups of several inputs: their rows read the same columns.
    if grouped and (
        rule.transposed(analysis, node) or rule.weight_of(analysis, node)[0].shape[2] == 1
    ):
        return False
    return analysis.is_constant(bound["weight"])


class _Follower:
    def __init__(self, analysis: Analysis, core: fx.Node, operand: fx.Node, axis: int) -> None:
        self.analysis = analysis
        self.core = core
        self.operand = operand
        self.axis = axis
        self.begin: dict[fx.Node, int] = {}  # of every root, its first channel
        self.total = 0
        self.terms: dict[fx.Node, Any] = {}
        self.scales: Floats = np.ones(0)

    def run(self) -> Summed:
        cone = self.cone()
        self.scales = np.ones(self.total)
        for node in cone:
            self.terms[node] = self.numbers(node)
        places = self.places()
        self.check_readers(cone, places)
        return self.result(cone, places)

    def cone(self) -> list[fx.Node]:
        """The nodes between the layers and the operand, in the order of the graph."""
        found: set[fx.Node] = set()
        pending = [self.operand]
        while pending:
            node = pending.pop()
            if node in found:
                continue
            found.add(node)
            sources = _sources(self.analysis, node)
            pending += sources
            if not sources:
                self.begin[node] = 0
        ordered = sorted(found)
        for node in ordered:
            if node in self.begin:
                self.begin[node] = self.total
                self.total += self.analysis.shape(node)[self.root_axis(node)]
        return ordered

    def root_axis(self, root: fx.Node) -> int:
        rank = len(self.analysis.shape(root))
        if isinstance(find_rule(root), LinearMap):
            return rank - 1
        kernel = len(self.analysis.shape(self.analysis.arguments(root)["weight"])) - 2
        return rank - kernel - 1

    def numbers(self, node: fx.Node) -> Any:
        """The channels in every element: several where several are added up."""
        rule = find_rule(node)
        shape = self.analysis.shape(node) if is_tensor(node) else ()
        if node in self.begin:
            axis = self.root_axis(node)
            sizes = [1] * len(shape)
            sizes[axis] = -1
            line = torch.arange(shape[axis], dtype=torch.int32) + self.begin[node]
            return (line.reshape(sizes).expand(shape),)
        sources = _sources(self.analysis, node)
        if isinstance(rule, (Movement, Parts, GetItem)):
            return self.moved(node, self.terms[sources[0]])
        if isinstance(rule, (Concatenate, Stack)):
            pieces = [self.terms[s] for s in sources]
            count = max(len(p) for p in pieces)
            dim = self.analysis.arguments(node)["dim"]
            join = torch.cat if isinstance(rule, Concatenate) else torch.stack
            padded = [[*p, *[p[-1]] * (count - len(p))] for p in pieces]
            return tuple(join([p[k] for p in padded], dim) for k in range(count))
        spread = [t.expand(shape) for s in sources for t in self.terms[s]]
        if isinstance(rule, BatchNorm):
            self.pass_gain(node, spread)
        distinct: list[Any] = []
        for term in spread:
            if not any(torch.equal(term, other) for other in distinct):
                distinct.append(term)
        return tuple(distinct)

    def moved(self, node: fx.Node, terms: Any) -> Any:
        """Run an op that only moves on all terms; of an op with several outputs, by output."""
        if isinstance(find_rule(node), GetItem):
            return terms[node.args[1]]
        moved = [moved_numbers(node, term) for term in terms]
        if isinstance(moved[0], torch.Tensor):
            return tuple(moved)
        return [tuple(parts) for parts in zip(*moved, strict=True)]

    def pass_gain(self, node: fx.Node, terms: list[Any]) -> None:
        """Batch norm: what it multiplies a channel by."""
        bound = self.analysis.arguments(node)
        size = self.analysis.shape(node)[1]
        lines = [term.movedim(1, 0).reshape(size, -1) for term in terms]
        if len(lines) != 1 or bool((lines[0] != lines[0][:, :1]).any()):
            raise Unfollowed(f"{node.name} scales several channels at once")
        gamma = parameter_values(self.analysis, bound["weight"], size, 1.0)
        variance = parameter_values(self.analysis, bound["running_var"], size, 1.0)
        gain = gamma / np.sqrt(variance + bound["eps"])
        if np.any(gain == 0.0):
            raise Unfollowed(f"{node.name} multiplies a channel by zero")
        self.scales[lines[0][:, 0].numpy()] *= gain

    def places(self) -> Labels:
        """For every channel of the roots, where on the contracted axis it is; -1: nowhere."""
        terms = self.terms[self.operand]
        size = self.analysis.shape(self.operand)[self.axis]
        places = np.full(self.total, -1, dtype=np.int64)
        main = terms[0].movedim(self.axis, 0).reshape(size, -1).numpy()
        places[main] = np.arange(size)[:, None]
        if np.any(places[main] != np.arange(size)[:, None]):
            raise Unfollowed(f"a channel is at several places of {self.operand.name}")
        if any(np.any(places[term.numpy()] < 0) for term in terms[1:]):
            raise Unfollowed(f"{self.operand.name} adds up channels of different layers")
        return places

    def check_readers(self, cone: list[fx.Node], places: Labels) -> None:
        """Nothing else may read what is summed."""
        inside = set(cone)

        def carries(terms: Any) -> bool:
            return any(bool((places[term.numpy()] >= 0).any()) for term in terms)

        pending = [
            (user, self.terms[node]) for node in cone for user in node.users if user not in inside
        ]
        while pending:
            user, terms = pending.pop()
            several = isinstance(terms, list)
            if not (any(carries(t) for t in terms) if several else carries(terms)):
                continue
            if user is self.core:
                continue
            if not isinstance(find_rule(user), (Movement, Parts, GetItem)):
                raise Unfollowed(f"{user.name} reads it, too")
            moved = self.moved(user, terms)
            if isinstance(moved, tuple) and carries(moved):
                raise Unfollowed(f"{user.name} reads it, too")
            if isinstance(moved, list):
                pending += [(other, moved) for other in user.users]
        others = [n for n in self.core.all_input_nodes if n is not self.operand and n in inside]
        twice = sum(a is self.operand for a in _flat_arguments(self.core))
        if any(carries(self.terms[n]) for n in others) or twice > 1:
            raise Unfollowed("it meets itself")

    def result(self, cone: list[fx.Node], places: Labels) -> Summed:
        ordered = sorted(self.begin, key=lambda node: self.begin[node])
        roots = tuple((node, self.root_axis(node)) for node in ordered)
        found = Summed(roots=roots, terms=self.terms[self.operand])
        for node in cone:
            if not is_tensor(node):
                continue
            axes = self.carrying(node, places)
            found.free |= {(node, axis) for axis in axes if not self.laid_along(node, axis)}
            if len(axes) != 1 and self.sums_at(node):
                raise Unfollowed(f"the channels of {node.name} are not on one axis")
            if len(axes) != 1:
                continue
            (axis,) = axes
            if node in self.begin:
                own = slice(self.begin[node], self.begin[node] + self.analysis.shape(node)[axis])
                found.rows[node, axis] = SummedRows(places[own] >= 0, self.scales[own], places[own])
                if isinstance(find_rule(node), Convolution) and (
                    self.analysis.arguments(node)["groups"] > 1
                ):
                    inner = self.analysis.inner(
                        node, "groups", self.analysis.arguments(node)["groups"]
                    )
                    found.relations.append(Full(inner, "keys are summed within a group"))
                continue
            self.numbers_on_the_way(found, node, axis, places)
        return found

    def laid_along(self, node: fx.Node, axis: int) -> bool:
        """Whether an axis is the one along which values are laid side by side."""
        dim = self.analysis.arguments(node)["dim"] if isinstance(find_rule(node), Stack) else None
        return dim is not None and dim % len(self.analysis.shape(node)) == axis

    def sums_at(self, node: fx.Node) -> bool:
        """Whether parameters of an op are summed or compared."""
        return node in self.begin or isinstance(find_rule(node), (Add, Multiply, Divide, BatchNorm))

    def carrying(self, node: fx.Node, places: Labels) -> list[int]:
        """The axes of a value along which the contracted channels lie."""
        at = places[self.terms[node][0].numpy()]
        if at.size == 0:
            return []  # what a rotation of whole heads leaves unturned
        low = np.where(at < 0, len(places), at)
        return [a for a in range(at.ndim) if np.any(at.max(axis=a) > low.min(axis=a))]

    def rows(self, node: fx.Node, axis: int, places: Labels, scales: Floats) -> SummedRows:
        """What is summed on an axis on the way."""
        at = places[self.terms[node][0].numpy()]
        most = np.moveaxis(at, axis, 0).reshape(at.shape[axis], -1).max(1)
        return SummedRows(most >= 0, scales, most)

    def numbers_on_the_way(self, found: Summed, node: fx.Node, axis: int, places: Labels) -> None:
        """Constants that multiply must agree within a fiber; those that are added are summed."""
        rule = find_rule(node)
        size = self.analysis.shape(node)[axis]
        if isinstance(rule, BatchNorm):
            found.rows[node, axis] = self.rows(node, axis, places, np.ones(size))
            source = self.analysis.arguments(node)["input"]
            if source not in self.begin:
                # Its means are subtracted before it scales.
                line = self.terms[source][0].movedim(axis, 0).reshape(size, -1)[:, 0]
                scales = self.scales[line.numpy()]
                found.rows[source, axis] = self.rows(source, axis, places, scales)
            return
        if not isinstance(rule, (Add, Multiply, Divide)):
            return
        operands = rule.operands(self.analysis, node)
        if not isinstance(rule, Add):
            operands.remove(_sources(self.analysis, node)[0])
        for operand in operands:
            if _computed(self.analysis, operand):
                if not isinstance(rule, Add):
                    self.factor_on_the_way(found, node, axis, operand)
                continue
            if not is_tensor(operand):
                if isinstance(rule, Add):
                    raise Unfollowed(f"{node.name} adds a number to all channels")
                continue
            own = axis - (len(self.analysis.shape(node)) - len(self.analysis.shape(operand)))
            spread = own >= 0 and self.analysis.shape(operand)[own] == size and size > 1
            if isinstance(rule, Add):
                if not spread:
                    raise Unfollowed(f"{node.name} adds a number to all channels")
                found.rows[node, axis] = self.rows(node, axis, places, np.ones(size))
            elif spread:
                table = constant_factor(self.analysis.constant(operand), own, operand.name)
                found.relations.append(Refine((node, axis), table.keyed()))

    def factor_on_the_way(self, found: Summed, node: fx.Node, axis: int, operand: fx.Node) -> None:
        """A computed value that multiplies the channels."""
        if operand in self.terms:
            raise Unfollowed(f"{node.name} multiplies it by itself")
        own = axis - (len(self.analysis.shape(node)) - len(self.analysis.shape(operand)))
        color = self.analysis.factor(operand, own) if own >= 0 else None
        if color is not None:
            found.relations.append(Refine((operand, own), color.keyed()))


def _flat_arguments(node: fx.Node) -> list[Any]:
    return [leaf for leaf in tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node)]
