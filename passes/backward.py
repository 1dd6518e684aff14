"""Backward coloring: which nodes of every value get the same error (Eq. 2, Eq. 5).

Errors are values too.  The graph of the forward pass is continued by the graph of the backward
pass, op by op, each op's rule saying how (:meth:`fxfib.passes.rules.base.Rule.backward`); then the
one engine that colors activations colors errors.  A fiber of an error is an *opfiber* of the
activation: the columns of a weight summed over the opfibers of its output are the rows of the
transposed weight summed over colors, and flavors come in where a derivative reads an activation.

The graph can be run, so every rule is checked against autograd (:func:`fxfib.check`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from fxfib.coloring import FIRST_FREE, ZERO, Factor, Labels, renumbered, unique_rows
from fxfib.passes.forward import Analysis, op_name
from fxfib.passes.relations import Ref, Same
from fxfib.passes.rules import find_rule
from fxfib.passes.rules.base import Barrier, Flavor, Rule, is_tensor
from fxfib.passes.rules.derivative import (
    FLAVORED,
    MOVED_BACK,
    OPAQUE,
    Derivative,
    equal_nodes,
    slack,
)
from fxfib.passes.rules.taken import Taken, taken_back

aten = torch.ops.aten

NO_RULE = "there is no backward rule for this op"
REMEDY = "add a backward rule (CONTRIBUTING, 'add an op')"

Error = Any  # of a node with several outputs: the errors of its items, by number


class Adjoint:
    """Continues a graph by the errors of its values.

    Args:
        analysis: the finished forward coloring; its graph is continued in place (give it a copy).

    Attributes:
        seeds: the graph's own outputs and the placeholders of their errors, in order.
        errors: the error of every value that the loss depends on.
        nodes: what was added, in order.
        gates: of nodes inside a recurrent cell, how many gates each has, and their values.
    """

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.graph = analysis.graph_module.graph
        self.seeds: list[tuple[fx.Node, fx.Node]] = []
        self.errors: dict[fx.Node, fx.Node] = {}
        self.nodes: list[fx.Node] = []
        self.gates: dict[Ref, tuple[int, list[fx.Node]]] = {}
        self._output = next(n for n in self.graph.nodes if n.op == "output")
        self._current: fx.Node | None = None
        self._parts: dict[fx.Node, list[Any]] = {}
        self._mode = _fake_mode(self.graph)

    # -- emitting ----------------------------------------------------------------------------

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call, with its shape."""
        with self.graph.inserting_before(self._output):
            node = self.graph.call_function(target, args, kwargs)
        given, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        if isinstance(target, Derivative):
            # Shaped as what it is the error of.
            node.meta["val"] = given[0 if target.broadcast else 1 + target.place]
        else:
            node.meta["val"] = self._fake(target, given, named)
        if self._current is not None and "nn_module_stack" in self._current.meta:
            node.meta["nn_module_stack"] = self._current.meta["nn_module_stack"]
        self.nodes.append(node)
        return node

    def _fake(self, target: Any, args: Any, kwargs: Any) -> Any:
        from torch._dispatch.python import enable_python_dispatcher

        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(enable_python_dispatcher())
            if self._mode is not None:
                stack.enter_context(self._mode)
            return target(*args, **kwargs)

    def sizes(self, source: fx.Node) -> list[Any]:
        """The shape of a value as arguments: numbers, and calls where a size is dynamic."""
        return [
            size if isinstance(size, int) else self.call(aten.sym_size.int, source, axis)
            for axis, size in enumerate(source.meta["val"].shape)
        ]

    def operands(self, node: fx.Node) -> Iterator[tuple[int, fx.Node]]:
        """The values that a node reads and whose errors matter, with their places in the call."""
        for place, leaf in enumerate(_leaves(node)):
            if self.wants(leaf):
                yield place, leaf

    def wants(self, source: Any) -> bool:
        """Whether a value has an error: a floating-point one that depends on the input."""
        return (
            is_tensor(source)
            and source.meta["val"].dtype.is_floating_point
            and not self.analysis.is_constant(source)
        )

    def derivative(
        self,
        node: fx.Node,
        error: Error,
        place: int,
        *,
        rule: Rule = FLAVORED,
        **options: Any,
    ) -> fx.Node:
        """The error of one operand of a call; see :class:`Derivative` for the options.

        Args:
            place: among the leaves of the call's arguments, as :meth:`operands` numbers them.
                Flavors number the nodes among them: those of :meth:`flavors`.
        """
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        nodes = [k for k, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]
        target = node.target
        item, given = None, error
        if isinstance(error, dict) and options.get("items"):
            given = [error[k] for k in options["items"]]
        elif isinstance(error, dict):
            if len(error) > 1:
                raise Barrier("errors of several of its outputs meet")
            ((item, given),) = error.items()

        def function(*operands: Any) -> Any:
            filled = list(leaves)
            for k, operand in zip(nodes, operands, strict=True):
                filled[k] = operand
            args, kwargs = pytree.tree_unflatten(filled, spec)
            result = target(*args, **kwargs)  # type: ignore[operator]
            return result if item is None else result[item]

        return self.call(
            Derivative(function, nodes.index(place), op_name(node), rule, **options),
            given,
            *[leaves[k] for k in nodes],
        )

    def leaf_of(self, node: fx.Node, source: fx.Node) -> int:
        """The first place of a value among the leaves of a call's arguments."""
        return next(k for k, leaf in enumerate(_leaves(node)) if leaf is source)

    def flavors(self, node: fx.Node, sources: Iterable[Any]) -> tuple[Flavor, ...]:
        """Some of the values that a call reads, as flavors of its derivative."""
        nodes = [leaf for leaf in _leaves(node) if isinstance(leaf, fx.Node)]
        found = dict.fromkeys(source for source in sources if is_tensor(source))
        return tuple(Flavor(nodes.index(source)) for source in found)

    def of(
        self, function: Callable[..., Any], error: fx.Node, place: int, *operands: fx.Node,
        name: str, **options: Any,
    ) -> fx.Node:  # fmt: skip
        """The error of one operand of any function of values."""
        options.setdefault("rule", FLAVORED)
        return self.call(Derivative(function, place, name, **options), error, *operands)

    def moved_back(self, node: fx.Node, error: Error, place: int, trace: Any = None) -> fx.Node:
        """The error of what a movement moved."""
        return self.derivative(node, error, place, rule=MOVED_BACK, trace=trace)

    def opaque(self, node: fx.Node, error: Error, reason: str, remedy: str) -> Iterator[Any]:
        """Errors of which nothing is known but their numbers."""
        for place, source in self.operands(node):
            for one in [{k: e} for k, e in error.items()] if isinstance(error, dict) else [error]:
                yield (
                    source,
                    self.derivative(node, one, place, rule=OPAQUE, reason=reason, remedy=remedy),
                )

    def sum_to(self, error: fx.Node, source: fx.Node) -> fx.Node:
        """The error of an operand that was broadcast: summed where it was repeated."""
        shape = self.analysis.shape(error)
        own = self.analysis.shape(source)
        added = len(shape) - len(own)
        repeated = [
            axis
            for axis in range(len(shape))
            if axis < added or (own[axis - added] == 1 and shape[axis] != 1)
        ]
        if not repeated:
            return error
        error = self.call(aten.sum.dim_IntList, error, repeated, True)
        return error if not added else self.call(aten.view.default, error, self.sizes(source))

    # -- the walk ----------------------------------------------------------------------------

    def build(self) -> Adjoint:
        """Add the errors of everything, from the outputs back."""
        order = [n for n in self.graph.nodes if n.op != "output"]
        outputs = pytree.tree_leaves(self._output.args)
        for number, node in enumerate(dict.fromkeys(o for o in outputs if self.wants(o))):
            with self.graph.inserting_before(self._output):
                seed = self.graph.placeholder(f"error_{number}")
            seed.meta["val"] = node.meta["val"]
            self.seeds.append((node, seed))
            self.nodes.append(seed)
            self._parts.setdefault(node, []).append(seed)
        self._back(order)
        return self

    def through(self, node: fx.Node, error: Error, result: Any, start: int) -> Iterator[Any]:
        """The errors behind a call that was written out by simpler calls.

        Args:
            result: the value among ``nodes[start:]`` that stands for the output; of several
                outputs, the values by number.
        """
        inner = list(self.nodes[start:])
        outside = [s for _, s in self.operands(node)]
        kept = {s: self._parts.pop(s) for s in outside if s in self._parts}
        for number, part in error.items() if isinstance(error, dict) else [(None, error)]:
            into = result if number is None else result[number]
            self._parts.setdefault(into, []).append(part)
        self._back(inner)
        found = [(s, part) for s in outside for part in self._parts.pop(s, [])]
        self._parts.update(kept)
        yield from found

    def _back(self, order: list[fx.Node]) -> None:
        for node in reversed(order):
            parts = self._parts.pop(node, None)
            if parts is None:
                continue
            self._current = node
            error = self._total(node, parts)
            if is_tensor(node):
                self.errors[node] = error
            if node.op != "call_function":
                continue
            if node.target is operator.getitem:
                self._parts.setdefault(node.args[0], []).append((node.args[1], error))  # type: ignore[arg-type]
                continue
            for source, part in self._behind(node, error):
                if self.wants(source):
                    self._parts.setdefault(source, []).append(part)

    def _behind(self, node: fx.Node, error: Error) -> list[tuple[fx.Node, fx.Node]]:
        rule = find_rule(node)
        if rule is None:
            return list(self.opaque(node, error, NO_RULE, REMEDY))
        before = len(self.nodes)
        try:
            return list(rule.backward(self, node, error))
        except Barrier as stop:
            for extra in reversed(self.nodes[before:]):
                self.graph.erase_node(extra)
            del self.nodes[before:]
            return list(self.opaque(node, error, stop.reason, stop.remedy))

    def _total(self, node: fx.Node, parts: list[Any]) -> Error:
        """Several users: their errors add; those of positions that were taken are laid together."""
        if isinstance(parts[0], tuple):
            items: dict[int, list[Any]] = {}
            for number, part in parts:
                items.setdefault(number, []).append(part)
            return {number: self._total(node, found) for number, found in items.items()}
        taken = [part for part in parts if isinstance(part, Taken)]
        parts = [part for part in parts if not isinstance(part, Taken)]
        parts += taken_back(self, node, taken)
        total = parts[0]
        for part in parts[1:]:
            total = self.call(aten.add.Tensor, total, part)
        return total


def _leaves(node: fx.Node) -> list[Any]:
    return pytree.tree_leaves((node.args, node.kwargs))


def _fake_mode(graph: fx.Graph) -> Any:
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            return node.meta["val"].fake_mode
    return None


def transposed(adjoint: Adjoint, weight: fx.Node) -> fx.Node:
    """The transposed matrix of a parameter."""
    return adjoint.call(aten.t.default, weight)


def copied(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same graph over the same tensors, to be continued."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(graph_module.graph, copies)
    graph.output(result)
    for old, new in copies.items():
        new.meta = dict(old.meta)
    return fx.GraphModule(graph_module, graph)


class Continued:
    """A graph and the errors of its values, to be colored as often as the weights change.

    Attributes:
        graph_module: a copy of the graph, continued by the backward pass, over the same tensors.
        values: the nodes of the forward pass.
        errors: the error of every value that the loss depends on.
        seeds: the graph's outputs and the placeholders of their errors.
    """

    def __init__(self, graph_module: fx.GraphModule, batch_statistics: bool = False) -> None:
        """Args:
        graph_module: a captured graph, in eval mode.
        batch_statistics: batch norms normalise by the batch, as they do in training.
        """
        self.graph_module = copied(graph_module)
        if batch_statistics:
            for node in self.graph_module.graph.find_nodes(
                op="call_function", target=aten.batch_norm.default
            ):
                node.args = (*node.args[:3], None, None, True, *node.args[6:])
        self.values = list(self.graph_module.graph.nodes)
        self.template = Analysis(self.graph_module)
        adjoint = Adjoint(self.template).build()
        self.errors, self.seeds, self.added = adjoint.errors, adjoint.seeds, set(adjoint.nodes)
        self.gates = adjoint.gates

    def color(
        self,
        eps: float = 0.0,
        opfiber_eps: float | None = None,
        criterion: str = "fibration",
        within: Within | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> Colored:
        """Color every value and every error.

        Args:
            eps: fiber precision of the activations; of the errors, unless ``opfiber_eps`` is given.
            within: partitions that colors must refine; then nothing is folded into what follows
                (:func:`fxfib.passes.cover.stable`).
            weights: parameters to use instead of the graph's own, by name.
        """
        analysis = Colored(self, eps, eps if opfiber_eps is None else opfiber_eps, criterion)
        analysis.within, analysis.weights = within, weights or {}
        analysis.run()
        return analysis


# Axes, and labels of the nodes along them jointly.
Partition = tuple[tuple[int, ...], Labels]
# Partitions of values (and of their errors); of axes inside an op, by their names.
Within = Mapping[fx.Node | Ref, list[Partition]]


def spread_to(
    axes: tuple[int, ...], shape: tuple[int, ...], own: tuple[int, ...], labels: Labels
) -> Labels:
    """A partition along some axes as labels along others: positions whose slices agree."""
    common = tuple(a for a in own if a in axes)
    if common != own:
        first = np.moveaxis(labels, [own.index(a) for a in common], range(len(common)))
        rows = first.reshape(*first.shape[: len(common)], -1)
        labels = unique_rows(*np.moveaxis(rows, -1, 0))
    sizes = [n if a in common else 1 for a, n in zip(axes, shape, strict=True)]
    return np.broadcast_to(labels.reshape(sizes), shape)


class Colored(Analysis):
    """An analysis of both passes that colors every value before it forgets its rows."""

    merging = False

    def __init__(
        self, continued: Continued, eps: float, opfiber_eps: float, criterion: str
    ) -> None:
        super().__init__(continued.graph_module, eps, criterion)
        self.continued = continued
        self.within: Within | None = None
        self.weights: Mapping[str, torch.Tensor] = {}
        self.inner_errors: dict[Ref, Factor] = {}
        self._precision = (eps, opfiber_eps)
        self._value_of = {error: node for node, error in continued.errors.items()}

    def find(self) -> None:
        """Nothing is merged, so no heads need a layout of their own."""

    def tensor(self, node: fx.Node) -> torch.Tensor:
        if node.op == "get_attr" and str(node.target) in self.weights:
            return self.weights[str(node.target)].detach()
        return super().tensor(node)

    def release(self, node: fx.Node) -> None:
        self.color(node)
        super().release(node)

    def visit(self, node: fx.Node) -> None:
        self.eps = self._precision[node in self.continued.added]
        super().visit(node)
        if self.within is not None and node in self.values and is_tensor(node):
            value = self.color(node)
            value.form = None
            value.factors = tuple(self._refined(node, factor) for factor in value.factors)

    def _refined(self, node: fx.Node, factor: Factor) -> Factor:
        """Nothing that training may change counts: no constants, no factors, no sums of shifts."""
        columns: list[Any] = [equal_nodes(factor, slack(self))]
        known = (self.within or {}).get(self._value_of.get(node, node), [])
        for axes, labels in [*known, *self._own(node)]:
            if set(axes) & set(factor.axes):
                columns.append(spread_to(factor.axes, factor.labels.shape, axes, labels))
        fresh = unique_rows(*columns) + FIRST_FREE
        return Factor(factor.axes, fresh, np.ones(fresh.shape), renumbered(factor.space))

    def _own(self, node: fx.Node) -> list[Partition]:
        """Parameters of one number a node: what follows may see more than their combination."""
        if self.eps > 0:
            return []
        found: list[Partition] = []
        for relation in self.by_node.get(node, ()):
            if isinstance(relation, Same) and relation.a[0] is node:
                (_, axis), (source, own) = relation.a, relation.b
                single = own == 0 and len(self.shape(source)) == 1
                if isinstance(axis, int) and self.is_constant(source) and single:
                    numbers = self.constant(source).to(torch.float64).numpy()
                    found.append(((axis,), unique_rows(numbers)))
        return found

    def allowed(self, ref: Ref, labels: Labels) -> Labels:
        within = (self.within or {}).get(ref, [])
        if not within:
            return labels
        return unique_rows(labels, *[own for _, own in within]) + FIRST_FREE

    def inner_error(self, ref: Ref) -> Factor | None:
        """The opfibers of nodes inside an op: of a recurrent cell, where all gates agree."""
        if ref in self.continued.gates:
            count, values = self.continued.gates[ref]
            rows: list[Labels] = []
            for value in values:
                factor = self.error_factor(value, 1)
                if factor is None:
                    return None
                rows += list(equal_nodes(factor, slack(self)).reshape(count, -1))
            labels = unique_rows(*rows) + FIRST_FREE
            return Factor((0,), labels, np.ones(len(labels)), ("gates", ref))
        return self.inner_errors.get(ref)

    def error_factor(self, node: fx.Node, axis: int) -> Factor | None:
        """The coloring of the errors along one axis of a value: its opfibers."""
        error = self.continued.errors.get(node)
        if error is None:
            size = self.shape(node)[axis]
            return Factor((axis,), np.full(size, ZERO), np.ones(size), ("unread", node.name))
        return self.factor(error, axis)
