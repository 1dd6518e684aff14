"""Rewriting: emit the graph again on the planned layouts (Eq. 10).

The rewriter decides nothing.  It copies what does not change, parameters included: those keep their
storage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxfib.coloring import Floats, constant_values
from fxfib.passes.expansion import Expansion
from fxfib.passes.layout import Layout, Mixed, Reducer
from fxfib.passes.plan import Plan
from fxfib.passes.propagation import UnfitError, propagate
from fxfib.passes.rules import find_rule
from fxfib.passes.rules.base import is_tensor
from fxfib.simplify import eliminate_dead_code

aten = torch.ops.aten


class Rewriter:
    """Builds the new graph; the rules call back into it.

    Args:
        plan: layouts of every axis.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.analysis = plan.analysis
        self.graph = fx.Graph()
        self.root = nn.Module()
        self._new: dict[fx.Node, fx.Node] = {}
        self._attributes: dict[tuple[Any, ...], fx.Node] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._gathered: dict[tuple[fx.Node, int, bytes], fx.Node] = {}
        self._current: fx.Node | None = None
        self._parted: set[fx.Node] = set()
        self.origin: dict[str, fx.Node] = {}

    @property
    def images(self) -> Mapping[fx.Node, fx.Node]:
        """The new node of every original one that was written."""
        return self._new

    # -- what rules ask --------------------------------------------------------------------

    def layout(self, node: fx.Node, axis: int | str) -> Layout:
        """Slots of an axis of an original node, as the op that is being written reads it."""
        for expansion in self._expansions(node):
            if expansion.axis == axis:
                return expansion.read
        return self.plan.layout(node, axis)

    def size(self, node: fx.Node, axis: int) -> int:
        """New size of an axis of an original node, as the op that is being written reads it."""
        if any(expansion.axis == axis for expansion in self._expansions(node)):
            return self.layout(node, axis).size
        if (node, axis) in self.plan.layouts:
            return self.plan.layouts[node, axis].size
        return self.analysis.shape(node)[axis]

    def rows(self, node: fx.Node, axis: int) -> Reducer:
        """The average over merged output nodes; the sum where heads contract over them."""
        layout = self.layout(node, axis)
        average = layout.rows(self.plan.weights.get(node), self.plan.masses.get(node))
        summed = self.analysis.heads.summed.get((node, axis))
        if summed is None or not summed.chosen.any() or (node, axis) in self.plan.indexed:
            return average
        sums = layout.sums(summed.scales, summed.places)
        return Mixed(layout, sums, average, summed.chosen)

    def columns(self, node: fx.Node, axis: int | str) -> Reducer:
        """The sum over merged input nodes, their factors folded in."""
        scales: Floats | None = None
        if isinstance(axis, int) and not self.analysis.is_constant(node):
            factor = self.analysis.factors(node).get(axis)
            if factor is not None:
                scales = factor.scales
        return self.layout(node, axis).columns(scales)

    def first(self, node: fx.Node, axis: int | str) -> Reducer:
        """The representatives' own entries."""
        return self.layout(node, axis).first

    def counts(self, node: fx.Node, axis: int, rank: int, *, total: bool = False) -> fx.Node:
        """How much each slot counts in an average (or a sum) over an axis, as a constant."""
        counts = self.layout(node, axis).counts
        weights = counts if total else counts / self.analysis.shape(node)[axis]
        shape = [1] * rank
        shape[axis] = -1
        dtype = node.meta["val"].dtype
        return self.new_constant(node, weights.reshape(shape), "count", dtype=dtype)

    def mean_square_gain(self, node: fx.Node, axis: int) -> Floats:
        """``[slots]``: times these, a mean of squares over the slots is the one over all nodes.

        Numbers of the node's dtype, so that what divides by them meets the same numbers.
        """
        counts = self.layout(node, axis).counts
        gain = torch.from_numpy(np.sqrt(counts * len(counts) / self.analysis.shape(node)[axis]))
        return np.asarray(gain.to(node.meta["val"].dtype).to(torch.float64).numpy())

    def dropped_constants(
        self, source: fx.Node, axis: int, weight: fx.Node, *, inputs: int
    ) -> torch.Tensor | None:
        """What the dropped constants on an axis of ``source`` add to a linear op's output.

        ``inputs`` is the weight's input axis.  Returns float64 at the output's full width, or None.
        """
        factor = self.analysis.factors(source).get(axis)
        if factor is None:
            return None
        slot = self.layout(source, axis).slot
        values = np.where(slot < 0, constant_values(factor), 0.0)
        if not values.any():
            return None
        tensor = self.analysis.constant(weight).to(torch.float64).movedim(inputs, 1)
        taps = tensor.flatten(2).sum(2) if tensor.ndim > 2 else tensor
        added = taps @ torch.from_numpy(values).to(tensor.device)
        return added if bool(added.any()) else None

    # -- emitting --------------------------------------------------------------------------

    def new(self, node: fx.Node) -> fx.Node:
        """The new node of an original one; constants are copied when first asked for."""
        if node not in self._new:
            if node.op == "get_attr":
                self._new[node] = self._attribute(str(node.target), self._original(node))
            elif self.analysis.is_constant(node):
                self._new[node] = self._emitted(self.graph.node_copy(node, self.new))
            else:
                raise AssertionError(f"{node} is used before it is written")
        made = self._new[node]
        for expansion in self._expansions(node):
            made = self._expanded(node, made, expansion)
        return made

    def _expansions(self, node: fx.Node) -> Sequence[Expansion]:
        """What an index does to a value before the op that is being written reads it."""
        return () if self._current is None else self.plan.expansions.get((self._current, node), ())

    def _expanded(self, node: fx.Node, made: fx.Node, expansion: Expansion) -> fx.Node:
        """A value behind an index; readers that need the same share it."""
        key = (made, expansion.axis, expansion.index.tobytes())
        if key not in self._gathered:
            index = self.new_constant(node, expansion.index, "index")
            last = len(self.analysis.shape(node)) - 1
            if expansion.axis == last > 0:
                # Numbers that lie side by side move together; one by one takes ten times as long.
                turned = self.call(aten.transpose.int, (made, last - 1, last))
                moved = self.call(aten.index_select.default, (turned, last - 1, index))
                self._gathered[key] = self.call(aten.transpose.int, (moved, last - 1, last))
            else:
                arguments = (made, expansion.axis, index)
                self._gathered[key] = self.call(aten.index_select.default, arguments)
        return self._gathered[key]

    def repeat(
        self,
        node: fx.Node,
        constants: Mapping[fx.Node, fx.Node] | None = None,
        changed: Mapping[str, Any] | None = None,
    ) -> fx.Node:
        """The same call on the new operands.

        Args:
            constants: replacements for some operands.
            changed: arguments by their schema names.
        """
        replaced = dict(constants or {})

        def operand(old: fx.Node) -> fx.Node:
            return replaced[old] if old in replaced else self.new(old)

        copy = self._emitted(self.graph.node_copy(node, operand))
        for name, value in (changed or {}).items():
            value = fx.map_arg(value, lambda n: self.new(n) if n.graph is node.graph else n)
            names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
            place = names.index(name)
            if place < len(copy.args):
                copy.update_arg(place, value)
            elif name in copy.kwargs or node.target._schema.arguments[place].kwarg_only:  # type: ignore[union-attr]
                copy.update_kwarg(name, value)
            else:
                bound = self.analysis.arguments(node)
                middle = [fx.map_arg(bound[n], operand) for n in names[len(copy.args) : place]]
                copy.args = (*copy.args, *middle, value)
        return copy

    def _emitted(self, node: fx.Node) -> fx.Node:
        if self._current is not None:
            self.origin[node.name] = self._current
        return node

    def call(self, target: Any, args: tuple[Any, ...]) -> fx.Node:
        """A new call on new nodes."""
        node = self._emitted(self.graph.call_function(target, args))
        if self._current is not None:
            for key in ("nn_module_stack", "stack_trace"):
                if key in self._current.meta:
                    node.meta[key] = self._current.meta[key]
        return node

    def constant(
        self,
        node: fx.Node,
        axes: Mapping[int, Reducer],
        *,
        plus: torch.Tensor | None = None,
    ) -> fx.Node:
        """A constant operand with some axes mapped to their slots.

        Args:
            node: the original operand.
            axes: what happens along each axis.
            plus: float64 tensor of the original shape, added first (folded constants).
        """
        active = {a: r for a, r in axes.items() if not r.identity}
        if not active and plus is None:
            return self.new(node)
        if plus is None and (narrow := self._before_expand(node, active)) is not None:
            # The narrow tensor stays the parameter, and is broadcast as before.
            source, inner = narrow
            size = [-1 if a in active else s for a, s in enumerate(node.args[1])]  # type: ignore[arg-type]
            return self.repeat(node, {source: self.constant(source, inner)}, {"size": size})
        original = self.analysis.tensor(node)
        tensor = original
        if plus is not None:
            tensor = (tensor.to(torch.float64) + plus.to(tensor.device)).to(tensor.dtype)
        for axis, reducer in active.items():
            tensor = reducer.apply(tensor, axis)
        sources = [node] if node.op == "get_attr" else _leaves(node)
        named = [s for s in sources if s.op == "get_attr"]
        if node.op != "get_attr":
            self._parted.update(named)
        return self._stored(node, tensor, named)

    def _stored(self, node: fx.Node, tensor: torch.Tensor, leaves: list[fx.Node]) -> fx.Node:
        """An attribute in the place of a constant that is one, or is computed from some."""
        name = str(leaves[0].target) if leaves else f"{node.name}_constant"
        if node.op != "get_attr":
            name = f"{name}_of_{node.name}"
        trainable = any(self._original(s).requires_grad for s in leaves)
        return self._attribute(name, tensor, requires_grad=trainable, like=leaves)

    def _before_expand(
        self, node: fx.Node, axes: Mapping[int, Reducer]
    ) -> tuple[fx.Node, dict[int, Reducer]] | None:
        """What a constant is expanded from, and the same axes there; None if they are made anew."""
        if node.target is not torch.ops.aten.expand.default:
            return None
        source = node.args[0]
        assert isinstance(source, fx.Node)
        shape, wide = self.analysis.shape(source), self.analysis.shape(node)
        inner = {axis - len(wide) + len(shape): reducer for axis, reducer in axes.items()}
        if any(a < 0 or shape[a] != wide[a + len(wide) - len(shape)] for a in inner):
            return None
        return source, inner

    def new_constant(
        self,
        node: fx.Node,
        value: Any,
        suffix: str,
        dtype: torch.dtype | None = None,
    ) -> fx.Node:
        """A constant that the original did not have.

        A ``bias`` next to a weight takes the weight's module path; anything else is a buffer.
        """
        tensor = torch.as_tensor(value)
        like = [
            n for n in ([node] if node.op == "get_attr" else _leaves(node)) if n.op == "get_attr"
        ]
        if suffix == "bias":
            # It trains where its weight does, and has its dtype, however the weight is computed.
            weight = self.analysis.tensor(node)
            tensor = tensor.to(weight.dtype).to(weight.device)
            prefix = str(node.target).rpartition(".")[0] if node.op == "get_attr" else ""
            name = f"{prefix}.bias" if prefix else f"{node.name}_bias"
            trains = any(self._original(n).requires_grad for n in like)
            return self._attribute(name, tensor, requires_grad=trains, like=like)
        device = next((t.device for t in self.analysis.graph_module.parameters()), None)
        tensor = tensor.to(dtype or tensor.dtype).to(device or "cpu")
        return self._attribute(f"_fxfib_{node.name}_{suffix}", tensor)

    def shape_arguments(self, node: fx.Node) -> list[Any]:
        """New sizes of an original node as arguments of a view: numbers, or nodes where dynamic."""
        result: list[Any] = []
        for axis in range(len(self.analysis.shape(node))):
            if self.analysis.dynamic(node, axis):
                result.append(self.call(torch.ops.aten.sym_size.int, (self.new(node), axis)))
            else:
                result.append(self.size(node, axis))
        return result

    def _original(self, node: fx.Node) -> torch.Tensor:
        result: Any = self.analysis.graph_module
        for part in str(node.target).split("."):
            result = getattr(result, part)
        return result

    def _attribute(
        self,
        name: str,
        tensor: torch.Tensor,
        requires_grad: bool = False,
        like: list[fx.Node] | None = None,
    ) -> fx.Node:
        """A ``get_attr`` of a tensor; equal tensors of one name are one attribute."""
        original = isinstance(tensor, nn.Parameter) or name in dict(self._buffers())
        base, number = name, 1
        while name in self._tensors and not _same(self._tensors[name], tensor):
            number += 1
            name = f"{base}_{number}"
        key = (name,)
        if key not in self._attributes:
            is_parameter = isinstance(tensor, nn.Parameter) or any(
                isinstance(self._original(n), nn.Parameter) for n in like or []
            )
            is_parameter = is_parameter and tensor.dtype.is_floating_point
            if is_parameter and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=requires_grad)
            _place(self.root, name, tensor, persistent=self._persistent(base, original))
            self._tensors[name] = tensor
            self._attributes[key] = self.graph.get_attr(name)
        return self._attributes[key]

    def _buffers(self) -> list[tuple[str, torch.Tensor]]:
        if not hasattr(self, "_buffer_list"):
            self._buffer_list = list(self.analysis.graph_module.named_buffers())
        return self._buffer_list

    def _persistent(self, name: str, original: bool) -> bool:
        if not original:
            return True
        owner: Any = self.analysis.graph_module
        *path, leaf = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        return leaf not in owner._non_persistent_buffers_set

    # -- the walk --------------------------------------------------------------------------

    def run(self) -> fx.GraphModule:
        """Emit every node in order; values carry fake tensors of their new shapes."""
        graph_module = self.analysis.graph_module
        for node in graph_module.graph.nodes:
            self._current = node
            if node.op == "placeholder":
                self._new[node] = self.graph.node_copy(node)
            elif node.op == "output":
                # An output may be a parameter itself.
                self.graph.node_copy(node, self.new)
            elif node.op == "call_function" and not self.analysis.is_constant(node):
                rule = None if node in self.analysis.opaque else find_rule(node)
                if rule is not None and node in self.analysis.by_node:
                    self._new[node] = rule.rewrite(self, node)
                else:
                    self._new[node] = self.repeat(node)
        self._current = None
        self._store_remainders()
        for name, tensor in self._counters():
            _place(self.root, name, tensor, persistent=True)
        eliminate_dead_code(self.graph)
        result = fx.GraphModule(self.root, self.graph)
        propagate(result, graph_module, self.origin)
        self._check()
        return result

    def _store_remainders(self) -> None:
        """Where a part of a packed parameter became smaller, its other parts are stored alone, too.

        Otherwise the whole parameter would stay for their sake, beside the part.
        """
        if not self._parted:
            return
        constants = [old for old in self._new if self.analysis.is_constant(old)]
        images = {self._new[old] for old in constants}
        rests: dict[fx.Node, list[fx.Node]] = {}
        for old in constants:
            if old.op != "get_attr" and not images.issuperset(self._new[old].users):
                for leaf in self._parted.intersection(_leaves(old)):
                    rests.setdefault(leaf, []).append(old)
        for leaf, parts in rests.items():
            tensors = [self.analysis.tensor(part) for part in parts]
            if sum(t.numel() for t in tensors) >= self._original(leaf).numel():
                continue
            for part, tensor in zip(parts, tensors, strict=True):
                made = self._new[part]
                with self.graph.inserting_before(made):
                    stored = self._stored(part, tensor.clone(), _leaves(part))
                made.replace_all_uses_with(stored)

    def _check(self) -> None:
        """Every rewritten value has the size that was planned."""
        for old, new in self._new.items():
            if not is_tensor(old) or new.graph is not self.graph or "val" not in new.meta:
                continue
            if self.analysis.is_constant(old):
                continue
            for axis, size in enumerate(new.meta["val"].shape):
                planned = self.size(old, axis)
                if isinstance(size, int) and size != planned:
                    raise UnfitError(old, f"axis {axis} has {size} slots, {planned} were planned")

    def _counters(self) -> list[tuple[str, torch.Tensor]]:
        """Batch norm's counters are read by no node and still part of the state."""
        kept = {name.rpartition(".")[0] for name in self._tensors}
        return [
            (name, tensor)
            for name, tensor in self._buffers()
            if name.endswith("num_batches_tracked") and name.rpartition(".")[0] in kept
        ]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b)))


def _leaves(node: fx.Node) -> list[fx.Node]:
    found: dict[fx.Node, None] = {}
    pending, seen = list(node.all_input_nodes), set(node.all_input_nodes)
    while pending:
        source = pending.pop()
        if source.op == "get_attr":
            found[source] = None
        more = [s for s in source.all_input_nodes if s not in seen]
        pending += more
        seen.update(more)
    return list(found)


def _place(root: nn.Module, name: str, tensor: torch.Tensor, *, persistent: bool) -> None:
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor, persistent=persistent)
