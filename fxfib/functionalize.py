"""In-place operations of the training IR rewritten to functional ones, views and aliases included.

`torch.export` keeps `relu_`, `add_`, `copy_` into slices and so on; its own decomposition removes
them but rewrites batch norm and drops dropout at the same time.  Here every mutation of a value
becomes a new value: the mutated node is renamed for all later uses, the change is carried back to
the tensor it is a view of, and other views of that tensor are taken again where they are used.
Who shares memory with whom is read off the storages of the fake values in `meta["val"]`.
"""

import operator
from typing import Any

import torch
from torch import fx

from fxfib.errors import CaptureError
from fxfib.graph_tools import call, fixed_size, is_idle_dropout, sizes_of, value_of, where

aten = torch.ops.aten


def functionalize(graph: fx.Graph) -> bool:
    """Rewrites `graph` in place; every value keeps its meaning at every use.

    Args:
        graph: training IR with `meta["val"]` on every node, parameters as `get_attr`.

    Returns:
        True when an input of the graph was changed in place (which the result no longer does).

    Raises:
        CaptureError: a parameter, buffer or constant is changed, or a mutation has no functional
            form that is known to be right; the user's line is named.
    """
    return _Functionalizer(graph).run() if any(map(_is_mutation, graph.nodes)) else False


class _Functionalizer:
    """State of one walk: which node holds the present value of every node of the old graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.present: dict[fx.Node, fx.Node] = {}  # old node -> node with its value
        self.stamp: dict[fx.Node, int] = {}  # old node -> version of its memory at that time
        self.version: dict[int, int] = {}  # memory -> number of changes so far
        self.view_of: dict[fx.Node, fx.Node] = {}  # old node -> the tensor it is a view of
        self.old_args: dict[fx.Node, tuple[Any, Any]] = {}  # to take a view again
        self.old_target: dict[fx.Node, Any] = {}
        self.reshaped: dict[fx.Node, fx.Node] = {}  # after squeeze_ and friends
        self.owner: dict[int, fx.Node] = {}  # memory -> input or attribute that brought it
        self.input_changed = False
        self.merged: dict[int, int] = {}  # memory -> the memory that it really is

    def memory(self, node: fx.Node) -> int:
        """Identity of the memory of a node's (first) value; 0 for what is not a tensor."""
        found = _storage(node)
        while found in self.merged:
            found = self.merged[found]
        return found

    def run(self) -> bool:
        for node in list(self.graph.nodes):
            with self.graph.inserting_before(node):
                if node.op == "output":
                    node.args = fx.map_arg(node.args, self.use)
                elif node.op != "call_function":
                    self.record(node, node)
                    self.owner.setdefault(self.memory(node), node)
                elif _is_mutation(node):
                    self.mutate(node)
                else:
                    self.keep(node)
        return self.input_changed

    def record(self, node: fx.Node, value: fx.Node) -> None:
        self.present[node] = value
        self.stamp[node] = self.version.get(self.memory(node), 0)

    def resolve(self, node: fx.Node) -> fx.Node:
        while node in self.reshaped:
            node = self.reshaped[node]
        return node

    def use(self, node: fx.Node) -> fx.Node:
        """The node with the value of `node` at this point."""
        return self.fresh(self.resolve(node))

    def fresh(self, node: fx.Node) -> fx.Node:
        """As `use`; a view of something that has changed since is taken again."""
        version = self.version.get(self.memory(node), 0)
        if self.stamp[node] == version or (node not in self.view_of and _is_list(node)):
            return self.present[node]
        if node not in self.view_of:
            raise _refusal(node, "a tensor whose memory is shared in an unknown way")
        args, kwargs = fx.map_arg(self.old_args[node], self.fresh)
        value = call(self.graph, self.old_target[node], args, kwargs, like=node)
        self.present[node], self.stamp[node] = value, version
        return value

    def keep(self, node: fx.Node) -> None:
        """A node that changes nothing: its arguments become present values."""
        self.old_args[node] = fx.map_arg((node.args, dict(node.kwargs)), self.resolve)
        self.old_target[node] = node.target
        if is_idle_dropout(node) and self.memory(node) != self.memory(node.all_input_nodes[0]):
            # It gives back its own input, which not every version of the exporter records.
            self.merged[self.memory(node)] = self.memory(node.all_input_nodes[0])
        memory = self.memory(node)
        for argument in map(self.resolve, node.all_input_nodes):
            if memory and memory == self.memory(argument):
                # A part of a list (split, chunk) is a view of the tensor that was split.
                source = self.view_of.get(argument) if _is_list(argument) else argument
                if source is not None:
                    self.view_of[node] = source
                break
        node.args = fx.map_arg(node.args, self.use)
        node.kwargs = fx.map_arg(node.kwargs, self.use)
        self.record(node, node)

    def mutate(self, node: fx.Node) -> None:
        target = node.target
        assert isinstance(target, torch._ops.OpOverload)
        written = [a for a in target._schema.arguments if a.alias_info and a.alias_info.is_write]
        if len(written) != 1 or not isinstance(node.args[0], fx.Node) or written[0].kwarg_only:
            raise _refusal(node, f"more than one tensor ({target})")
        subject = self.resolve(node.args[0])
        if target is aten.detach_.default or torch.Tag.inplace_view in target.tags:
            # Only the shape changes: later uses of the tensor see a functional view of it.
            node.target = _functional(target, node)
            self.keep(node)
            self.reshaped[subject] = node
            return
        owner = self.owner.get(self.memory(subject))
        if owner is not None and owner.op == "get_attr":
            raise _refusal(node, f"the model's own tensor {owner.target}")
        self.input_changed = self.input_changed or owner is not None
        self.write(subject, self.new_value(node, subject))
        # The result of the operation is the tensor it changed, seen under another name.
        self.view_of[node] = subject
        self.old_target[node], self.old_args[node] = aten.alias.default, ((subject,), {})
        self.record(node, self.present[subject])

    def new_value(self, node: fx.Node, subject: fx.Node) -> fx.Node:
        target = node.target
        new: Any
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self.use)
        like = value_of(subject)
        if target is aten.copy_.default:
            new = args[1]
        elif target is aten.fill_.Scalar:
            new = call(self.graph, aten.full_like.default, (args[0], args[1]), like=node)
        elif target is aten.zero_.default:
            new = call(self.graph, aten.zeros_like.default, (args[0],), like=node)
        elif target is aten.fill_.Tensor:
            new = args[1]
        else:
            new = call(self.graph, _functional(target, node), args, kwargs, like=node)
        # In place, the result keeps the device, dtype and shape of what it is written into.
        if value_of(new).device != like.device:
            new = call(self.graph, aten.to.device, (new, like.device, like.dtype), like=node)
        if value_of(new).dtype != like.dtype:
            new = call(self.graph, aten.to.dtype, (new, like.dtype), like=node)
        if tuple(value_of(new).shape) != tuple(like.shape):
            shape = sizes_of(self.graph, self.fresh(subject), node)
            new = call(self.graph, aten.expand.default, (new, shape), like=node)
        assert isinstance(new, fx.Node)
        return new

    def write(self, subject: fx.Node, new: fx.Node) -> None:
        """`new` becomes the value of `subject`, and of all that `subject` is a view of."""
        memory = self.memory(subject)
        if not memory:
            raise _refusal(subject, "something that is not a tensor")
        chain = [(subject, new)]
        while subject in self.view_of:
            base = self.view_of[subject]
            new = self.unview(subject, base, new)
            chain.append((base, new))
            subject = base
        self.version[memory] = self.version.get(memory, 0) + 1
        for member, value in chain:
            self.record(member, value)

    def unview(self, view: fx.Node, base: fx.Node, new: fx.Node) -> fx.Node:
        """The value of `base` once what its view `view` sees has become `new`."""
        before, after = value_of(base), value_of(view)
        target = self.old_target[view]
        args, _ = self.old_args[view]
        given = {**dict(zip(_argument_names(target), args, strict=False)), **self.old_args[view][1]}
        whole = self.fresh(base)

        def emit(operation: Any, *arguments: Any) -> fx.Node:
            return call(self.graph, operation, arguments, like=view)

        if _same_geometry(before, after) or is_idle_dropout(view):
            return new
        if target in _RESHAPES and before.numel() == after.numel():
            return emit(aten.reshape.default, new, sizes_of(self.graph, whole, view))
        if target is aten.permute.default:
            axes = [axis % before.ndim for axis in given["dims"]]
            return emit(aten.permute.default, new, [axes.index(i) for i in range(before.ndim)])
        if target is aten.transpose.int:
            return emit(aten.transpose.int, new, given["dim0"], given["dim1"])
        if target in (aten.t.default, aten.numpy_T.default, aten.mT.default):
            return emit(target, new)
        axis = given.get("dim", 0)
        if target is aten.select.int:
            return emit(aten.select_scatter.default, whole, new, axis, given["index"])
        if target is aten.slice.Tensor:
            bounds = (given.get("start"), given.get("end"), given.get("step", 1))
            bounds = fx.map_arg(bounds, self.fresh)
            return emit(aten.slice_scatter.default, whole, new, axis, *bounds)
        if target in (aten.narrow.default,):
            start, end = given["start"], given["start"] + given["length"]
            return emit(aten.slice_scatter.default, whole, new, axis, start, end)
        if target is operator.getitem:
            return self.unview_part(view, whole, new)
        raise _refusal(view, f"a view taken by {target}")

    def unview_part(self, view: fx.Node, whole: fx.Node, new: fx.Node) -> fx.Node:
        parts, index = self.old_args[view][0]
        operation = self.old_target[parts]
        args, kwargs = self.old_args[parts]
        given = {**dict(zip(_argument_names(operation), args, strict=False)), **kwargs}
        axis = given.get("dim", 0)
        if operation is aten.unbind.int:
            place = (whole, new, axis, index)
            return call(self.graph, aten.select_scatter.default, place, like=view)
        found = [fixed_size(value.shape[axis]) for value in value_of(parts)]
        sizes = [size for size in found if size is not None]
        if operation not in _SPLITS or len(sizes) < len(found):
            raise _refusal(view, f"a view taken by {operation}")
        start = sum(sizes[:index])
        arguments = (whole, new, axis, start, start + sizes[index])
        return call(self.graph, aten.slice_scatter.default, arguments, like=view)


_RESHAPES = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten.view_as.default,
        aten.reshape_as.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.expand.default,
        aten.contiguous.default,
    }
)
_SPLITS = frozenset(
    {
        aten.split.Tensor,
        aten.split.sizes,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.tensor_split.sections,
        aten.tensor_split.indices,
    }
)


def _refusal(node: fx.Node, what: str) -> CaptureError:
    return CaptureError(f"{where(node)} changes {what} in place; write it out of place.")


def _is_mutation(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and node.target._schema.is_mutable
    )


def _is_list(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (list, tuple))


def _storage(node: fx.Node) -> int:
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        value = next((part for part in value if isinstance(part, torch.Tensor)), None)
    return int(value.untyped_storage()._cdata) if isinstance(value, torch.Tensor) else 0


def _same_geometry(one: torch.Tensor, two: torch.Tensor) -> bool:
    return bool(
        one.dtype == two.dtype
        and tuple(one.shape) == tuple(two.shape)
        and tuple(one.stride()) == tuple(two.stride())
        and one.storage_offset() == two.storage_offset()
    )


def _argument_names(target: Any) -> list[str]:
    if isinstance(target, torch._ops.OpOverload):
        return [argument.name for argument in target._schema.arguments]
    return []


def _functional(target: Any, node: fx.Node) -> torch._ops.OpOverload:
    """The overload without the trailing underscore that takes the same arguments."""
    name = target._schema.name.split("::")[1]
    packet = getattr(getattr(torch.ops, target.namespace), name.removesuffix("_"), None)
    # The first argument may be named otherwise (dropout_ has `self`, dropout `input`).
    wanted = [(a.name if i else "", str(a.type)) for i, a in enumerate(target._schema.arguments)]
    if packet is not None and name.endswith("_"):
        for overload in packet.overloads():
            candidate = getattr(packet, overload)
            schema = candidate._schema
            found = [(a.name if i else "", str(a.type)) for i, a in enumerate(schema.arguments)]
            if not schema.is_mutable and found == wanted:
                return candidate
    raise _refusal(node, f"a tensor by {target}, which has no functional form, and does so")
