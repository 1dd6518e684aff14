"""Forward coloring: which nodes of every value compute the same activation (Eq. 3).

One walk over the graph in topological order.  Each op's rule says how colors pass through it and
which layouts must agree; an op without a rule is a barrier: nothing merges across it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from fxfib.coloring import Factor, Floats, Labels, Value
from fxfib.graph_tools import is_idle_dropout
from fxfib.passes.criteria import Policy
from fxfib.passes.equal_heads import equal_heads
from fxfib.passes.expansion import Edge
from fxfib.passes.heads import Heads, find_heads
from fxfib.passes.relations import Full, Ref, Relation
from fxfib.passes.rules import find_rule
from fxfib.passes.rules.attention import color_root, flat_value
from fxfib.passes.rules.base import Barrier, hint, is_tensor
from fxfib.passes.rules.tracing import Block
from fxfib.passes.stages import Step, silent
from fxfib.signature import Form, unit_roundoff

RANDOM = torch.Tag.nondeterministic_seeded
OUTPUT = "it is an output of the network"


@dataclass(frozen=True)
class Refusal:
    """A place where nothing merges, and why.

    Attributes:
        node: the user's module path, or the graph node's own name.
        op: the ATen op.
        reason: one clause.
        remedy: what would help.
    """

    node: str
    op: str
    reason: str
    remedy: str


def module_path(node: fx.Node) -> str:
    """The user's own module path of a node, or the node's name."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        path = str(list(stack.values())[-1][0])
        path = path.removeprefix("L['self'].").removeprefix("L['self']")
        if path:
            return path
    return node.name


def op_name(node: fx.Node) -> str:
    """A readable name of what a node calls."""
    if node.op != "call_function":
        return node.op
    return str(node.target) if hasattr(node.target, "_schema") else node.target.__name__  # type: ignore[union-attr]


class Analysis:
    """Colors of every value of a captured graph, and the relations between their layouts.

    Args:
        graph_module: functional ATen graph, ``meta["val"]`` on every node.
        eps: fiber precision; 0 is exact.
        criterion: what eps measures.
        barriers: nodes to treat as barriers, with the reason.
        skip: nodes whose outputs must not be merged (the user asked).
        separate: also color by itself what could be stored smaller than it is read.
        policy: how rows become colors; None: by eps and criterion alone.
    """

    #: Whether layouts follow from the colors; if not, products of values need no heads.
    merging: ClassVar[bool] = True

    def __init__(
        self,
        graph_module: fx.GraphModule,
        eps: float = 0.0,
        criterion: str = "fibration",
        barriers: Mapping[fx.Node, str] | None = None,
        skip: Iterable[fx.Node] = (),
        separate: bool = False,
        policy: Policy | None = None,
    ) -> None:
        self.graph_module = graph_module
        self.policy = policy or Policy(eps, criterion)
        self.criterion = self.policy.criterion
        self.values: dict[fx.Node, Value] = {}
        self.relations: list[Relation] = []
        self.refusals: list[Refusal] = []
        self.barriers = dict(barriers or {})
        self.skip = set(skip)
        self.separate = separate
        self.edges: list[Edge] = []
        self._alone: dict[tuple[fx.Node, int], Factor] = {}
        self.opaque: set[fx.Node] = set()  # barriers: repeated as they are, on full inputs
        # For a value with a pending form: the nodes that absorbed it, each with its gain.
        self.gains: dict[fx.Node, list[tuple[fx.Node, Floats | None]]] = {}
        self.inner_sizes: dict[Ref, int] = {}  # of axes that exist only inside an op
        self.by_node: dict[fx.Node, list[Relation]] = {}
        self.heads = Heads()
        # Products with equal heads: those merge whole, and the others share one partition.
        self.whole: set[fx.Node] = set()
        # Where movement ops took the elements, or why nobody can say.
        self.traces: dict[Any, list[Block] | Barrier] = {}
        self._current: fx.Node | None = None
        self._constants: dict[fx.Node, torch.Tensor] = {}
        self._copies: dict[fx.Node, torch.Tensor] = {}  # on the CPU, of tensors elsewhere
        self._is_constant: dict[fx.Node, bool] = {}
        self._arguments: dict[fx.Node, dict[str, Any]] = {}
        self.roundoff = unit_roundoff(self._dtype())

    def _dtype(self) -> torch.dtype:
        """The coarsest floating dtype among the parameters: it sets the rounding bounds."""
        found = [
            t.dtype
            for t in [*self.graph_module.parameters(), *self.graph_module.buffers()]
            if t.dtype.is_floating_point
        ]
        return max(found, key=lambda d: torch.finfo(d).eps, default=torch.float32)

    # -- the graph ---------------------------------------------------------------------------

    def arguments(self, node: fx.Node) -> dict[str, Any]:
        """Arguments of an ATen call by name, defaults filled in."""
        if node not in self._arguments:
            schema = node.target._schema  # type: ignore[union-attr]
            bound: dict[str, Any] = {}
            for position, argument in enumerate(schema.arguments):
                if position < len(node.args):
                    bound[argument.name] = node.args[position]
                elif argument.name in node.kwargs:
                    bound[argument.name] = node.kwargs[argument.name]
                else:
                    bound[argument.name] = argument.default_value
            self._arguments[node] = bound
        return self._arguments[node]

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Sizes of a tensor node, the example's where a dimension is dynamic."""
        return tuple(hint(s) for s in node.meta["val"].shape)

    def dynamic(self, node: fx.Node, axis: int) -> bool:
        """Whether the size of an axis is not a plain number."""
        return not isinstance(node.meta["val"].shape[axis], int)

    def is_constant(self, node: fx.Node) -> bool:
        """Whether a node depends on parameters, buffers and literals only."""
        if node not in self._is_constant:
            if node.op == "get_attr":
                answer = True
            elif node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
                answer = node.op == "call_function" and node.target is operator.getitem
                answer = answer and self.is_constant(node.args[0])  # type: ignore[arg-type]
            else:
                # Dropout that is off gives back what it gets.
                certain = RANDOM not in node.target.tags or is_idle_dropout(node)
                answer = certain and all(self.is_constant(s) for s in node.all_input_nodes)
            self._is_constant[node] = answer
        return self._is_constant[node]

    def constant(self, node: fx.Node) -> torch.Tensor:
        """The values of a constant node, on the CPU, where colors are decided."""
        tensor = self.tensor(node)
        if tensor.device.type == "cpu":
            return tensor
        if node not in self._copies:
            self._copies[node] = tensor.cpu()
        return self._copies[node]

    def tensor(self, node: fx.Node) -> torch.Tensor:
        """The tensor of a constant node, on its own device."""
        if node not in self._constants:
            if node.op == "get_attr":
                result: Any = self.graph_module
                for part in str(node.target).split("."):
                    result = getattr(result, part)
                result = result.detach()
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), self.tensor)
                with torch.no_grad():
                    result = node.target(*args, **kwargs)  # type: ignore[operator]
            self._constants[node] = result
        return self._constants[node]

    @property
    def eps(self) -> float:
        """Fiber precision of the op that is being visited."""
        return self.policy.eps_at(self._current)

    @eps.setter
    def eps(self, eps: float) -> None:
        self.policy.eps = eps

    # -- values ------------------------------------------------------------------------------

    def value(self, node: fx.Node) -> Value:
        """What is known of a node (nothing, for constants and inputs)."""
        if node not in self.values:
            self.values[node] = Value(self.shape(node) if is_tensor(node) else ())
        return self.values[node]

    def color(self, node: fx.Node) -> Value:
        """The value of a node with its pending affine form, if any, turned into colors."""
        value = self.value(node)
        if value.form is not None and value.factor(value.form.axis) is None:
            form = value.form
            factor = self.policy.factor(self, node, form, value.shape[form.axis])
            value.factors = (*value.factors, factor)
        return value

    def factors(self, node: fx.Node) -> dict[int, Factor]:
        """Colors of a node axis by axis (of joint colorings what they say of each axis)."""
        value = self.color(node)
        return {axis: f.along(axis) for f in value.factors for axis in f.axes}

    def factor(self, node: fx.Node, axis: int) -> Factor | None:
        """The coloring of one axis of a node, None where every position is distinct."""
        return self.factors(node).get(axis)

    def relate(self, *relations: Relation) -> None:
        """Record what must hold between layouts."""
        self.relations.extend(relations)
        if self._current is not None:
            self.by_node.setdefault(self._current, []).extend(relations)

    def inner(self, node: fx.Node, name: str, size: int) -> Ref:
        """An axis that exists only inside an op, such as the groups of a grouped convolution."""
        self.inner_sizes[node, name] = size
        return (node, name)

    def allowed(self, ref: Ref, labels: Labels) -> Labels:
        """The coarsest partition that an axis inside an op may start from."""
        return labels

    def full(self, node: fx.Node, axes: Iterable[int] | None, reason: str) -> None:
        """No merging on the given axes (all, if None) of a node."""
        for axis in range(len(self.shape(node))) if axes is None else axes:
            if self.is_constant(node) or self.value(node).tracked(axis):
                self.relate(Full((node, axis), reason))

    def refuse(self, node: fx.Node, reason: str, remedy: str) -> None:
        """Put a refusal into the report."""
        self.refusals.append(Refusal(module_path(node), op_name(node), reason, remedy))

    def own_colors(self, node: fx.Node, axis: int) -> Factor | None:
        """The colors of one axis by itself, of a pending form too (which stays pending)."""
        value = self.value(node)
        factor = value.factor(axis)
        if factor is not None:
            return factor if len(factor.axes) == 1 else None
        if not isinstance(value.form, Form) or value.form.axis != axis:
            return None
        if (node, axis) not in self._alone:
            size = value.shape[axis]
            self._alone[node, axis] = self.policy.factor(self, node, value.form, size)
        return self._alone[node, axis]

    def offer(self, reader: fx.Node) -> None:
        """Note what an index in front of an op could expand."""
        named = {ref for relation in self.by_node.get(reader, ()) for ref in relation.refs}
        for source in dict.fromkeys(reader.all_input_nodes):
            if not is_tensor(source) or self.is_constant(source):
                continue
            if source in self.heads.carriers:
                continue
            cut = source in self.heads.roots  # into heads, by this reader
            if cut and (reader not in self.heads.carriers or len(source.users) > 1):
                continue
            for axis in self.value(source).tracked_axes:
                read = axis == self.heads.roots[source] if cut else (source, axis) in named
                own = self.own_colors(source, axis) if read else None
                if own is not None:
                    edge = Edge(reader, source, axis, own)
                    self.inner(reader, edge.name, self.shape(source)[axis])
                    self.edges.append(edge)

    # -- the walk ----------------------------------------------------------------------------

    def find(self) -> None:
        """Look for what spans several ops, before any of them is visited."""
        self.heads = find_heads(self)

    def run(self, step: Step = silent) -> Analysis:
        """Visit every node once; once more, where heads turn out to be equal.

        Args:
            step: told which share of the nodes were visited.
        """
        self._walk(step)
        if self.merging and (equal := equal_heads(self)):
            self._forget()
            self.whole = equal
            self._walk(step)
        return self

    def _forget(self) -> None:
        """Back to the start, but for what is known of the graph alone."""
        self.values, self.by_node, self.gains, self.inner_sizes = {}, {}, {}, {}
        self.relations, self.refusals, self.edges, self._alone = [], [], [], {}
        self.opaque, self.heads = set(), Heads()

    def _walk(self, step: Step) -> None:
        self.find()
        remaining = {node: len(node.users) for node in self.graph_module.graph.nodes}
        for place, node in enumerate(remaining):
            step("color", place / len(remaining))
            self.visit(node)
            for source in node.all_input_nodes:
                remaining[source] -= 1
                if remaining[source] == 0 and source in self.values:
                    if any(self._reads_shared(user) for user in source.users):
                        self.color(source)  # the plan asks for the colors of all such inputs
                    self.release(source)

    def _reads_shared(self, node: fx.Node) -> bool:
        """Whether a node reads a parameter that another node reads too."""
        pending = [source for source in node.all_input_nodes if self.is_constant(source)]
        while pending:
            source = pending.pop()
            if len(source.users) > 1:
                return True
            pending += source.all_input_nodes
        return False

    def release(self, node: fx.Node) -> None:
        """Forget the rows of a value that everybody has read (they may be copies of weights)."""
        value = self.values[node]
        if value.form is not None and value.factor(value.form.axis) is not None:
            value.form = None
        elif value.form is not None:
            value.form = PendingAxis(value.form.axis)

    def visit(self, node: fx.Node) -> None:
        if node.op in ("placeholder", "get_attr"):
            return
        if node.op == "output":
            for source in node.all_input_nodes:
                if is_tensor(source):
                    self.full(source, None, OUTPUT)
            return
        if self.is_constant(node):
            return
        if node in self.barriers:
            self.barrier(node, self.barriers[node], "report this as a missing case")
            return
        if not any(is_tensor(source) for source in node.all_input_nodes) and not isinstance(
            node.meta.get("val"), (torch.Tensor, tuple, list)
        ):
            return  # arithmetic on sizes
        rule = find_rule(node)
        if node in self.heads.carriers:
            self._current = node
            self.relate(*self.heads.relations.get(node, ()))
            self.values[node] = flat_value(self, node) if is_tensor(node) else Value(())
            self._current = None
            if self.separate and rule is not None and rule.expands(self, node):
                self.offer(node)
            return
        if rule is None:
            self.barrier(
                node, "there is no rule for this op", "add a rule (CONTRIBUTING, 'add an op')"
            )
            return
        before = len(self.relations)
        self._current = node
        try:
            self.values[node] = rule.forward(self, node)
            if node in self.heads.roots:
                color_root(self, node)
        except Barrier as stop:
            del self.relations[before:]
            self.by_node.pop(node, None)
            for uses in self.gains.values():
                uses[:] = [use for use in uses if use[0] is not node]
            self.barrier(node, stop.reason, stop.remedy)
            return
        finally:
            self._current = None
        self._hold_the_rest(node)
        if self.separate and rule.expands(self, node):
            self.offer(node)
        if node in self.skip and is_tensor(node):
            self.full(node, None, "the user asked to skip it")

    def _hold_the_rest(self, node: fx.Node) -> None:
        """What a rule says nothing of must not change under its op."""
        if self.values[node].parts is not None:
            return  # the items speak for them
        named = {ref for relation in self.by_node.get(node, ()) for ref in relation.refs}
        for source in node.all_input_nodes:
            if is_tensor(source) and not self.is_constant(source):
                rest = [a for a in self.value(source).tracked_axes if (source, a) not in named]
                self.full(source, rest, f"the rule of {op_name(node)} does not follow this axis")

    def barrier(self, node: fx.Node, reason: str, remedy: str) -> None:
        """Expand every input to full width; the output's nodes are all distinct."""
        tracked = False
        self.opaque.add(node)
        current, self._current = self._current, node
        for source in node.all_input_nodes:
            if is_tensor(source):
                # A weight that nothing follows could have had fibers too; positions and masks that
                # are no floating-point numbers have none that anybody would miss.
                if source.meta["val"].is_floating_point():
                    tracked |= self.is_constant(source) or bool(self.value(source).tracked_axes)
                self.full(source, None, f"{op_name(node)} reads it, and {reason}")
        self._current = current
        if self.separate:
            self.offer(node)
        if tracked:
            self.refuse(node, reason, remedy)
        self.values[node] = Value(self.shape(node) if is_tensor(node) else ())


@dataclass(frozen=True)
class PendingAxis:
    """What is left of a form that nobody had to color: the axis it was on."""

    axis: int


def initial_layout(analysis: Analysis, live: Mapping[Ref, Any], ref: Ref) -> tuple[Any, Any]:
    """Starting labels and kept nodes of an axis, for the solver."""
    node, axis = ref
    if isinstance(axis, str):
        size = analysis.inner_sizes[node, axis]
        return np.zeros(size, np.int64), np.zeros(size, dtype=bool)
    size = analysis.shape(node)[axis]
    value = analysis.value(node)
    factor = value.factor(axis)
    if ref in analysis.heads.free:
        return np.zeros(size, np.int64), np.zeros(size, dtype=bool)
    if factor is not None:
        # Of a joint coloring only what it says of this axis alone: that is what readers fold in.
        alone = factor.along(axis)
        labels, keep = alone.labels, ~alone.constant
    elif analysis.is_constant(node) or value.tracked(axis):
        labels, keep = np.zeros(size, np.int64), np.zeros(size, dtype=bool)
    else:
        labels, keep = np.arange(size, dtype=np.int64), np.ones(size, dtype=bool)
    if ref in live and value.tracked(axis):
        keep = keep & live[ref]
    return labels, keep
