"""Removal of what a captured graph does not need: asserts, copies, casts to itself, dead code."""

import torch
from torch import Tensor, fx, nn

from fxfib.graph_tools import fixed_size, value_of
from fxfib.movement_chains import straighten
from fxfib.sizes import SHAPED_AS, name_sizes, read_sizes_off_inputs

aten = torch.ops.aten

# They give back the values they are given: in a functional graph nothing can tell the difference.
_IDENTITIES = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.lift_fresh.default,
        aten.lift_fresh_copy.default,
    }
)
# They give another dtype, or move to another device.
_MOVES = frozenset(
    {aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten.to.other, aten.type_as.default}
)
_ASSERTS = (
    "_assert_async",
    "_assert_scalar",
    "_assert_tensor_metadata",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
)
# `view` insists on a memory layout that dropped copies, or a caller's strides, may not give.
_RESHAPES = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
}
# They read only dtype and device of the tensor they are called on.
_NEW = {
    aten.new_zeros.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_empty.default: aten.empty.memory_format,
    aten.new_full.default: aten.full.default,
}
_FACTORIES = frozenset(
    {
        *_NEW.values(),
        aten.arange.default,
        aten.arange.start,
        aten.arange.start_step,
        aten.scalar_tensor.default,
    }
)
_LARGEST_FOLDED = 1 << 22


def simplify(graph: fx.Graph, root: nn.Module) -> None:
    """Simplifies a functional graph in place; no value that is left changes.

    Copies and asserts go, `view` becomes `reshape`, `reshape_as` gets numbers in place of the
    tensor whose shape it takes, `new_zeros` and friends lose the tensor they are called on, and
    what is computed from no input and no parameter becomes a constant: a buffer of `root`, outside
    its `state_dict`.
    """
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if _is_assert(node):
            graph.erase_node(node)
        elif node.target in _IDENTITIES or _is_idle_move(node) or _is_whole_slice(node):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        elif node.target is aten.cat.default:
            _join_what_is_there(graph, node)
        elif node.target in _RESHAPES:
            node.target = _RESHAPES[node.target]
        elif node.target in SHAPED_AS:
            name_sizes(graph, node)
        elif node.target is aten.type_as.default:
            node.target, node.args = aten.to.dtype, (node.args[0], value_of(node).dtype)
        elif node.target in _NEW:
            _detach_factory(node)
    eliminate_dead_code(graph)
    read_sizes_off_inputs(graph)
    straighten(graph)
    eliminate_dead_code(graph)
    _fold_constants(graph, root)
    eliminate_dead_code(graph)


def eliminate_dead_code(graph: fx.Graph) -> None:
    """Drops unread nodes other than inputs; the graph is functional, so nothing else is needed."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def _is_assert(node: fx.Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1] in _ASSERTS
    return target is torch._check or getattr(target, "__name__", "") == "sym_constrain_range"


def _is_idle_move(node: fx.Node) -> bool:
    """A move to the device where the tensor already is, at the same dtype."""
    if node.target not in _MOVES:
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = value_of(source), value_of(node)
    return bool(before.device == after.device and before.dtype == after.dtype)


def _is_whole_slice(node: fx.Node) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    given = dict(zip(("self", "dim", "start", "end", "step"), node.args, strict=False))
    start, end = given.get("start"), given.get("end")
    if start not in (None, 0) or given.get("step", 1) != 1 or node.kwargs:
        return False
    size = fixed_size(value_of(node.args[0]).shape[given.get("dim", 0)])
    return end in (None, 2**63 - 1) or (isinstance(end, int) and size is not None and end >= size)


def _join_what_is_there(graph: fx.Graph, node: fx.Node) -> None:
    """Drops empty operands: a rotation of whole heads joins it with the nothing it leaves."""
    operands, *rest = node.args
    assert isinstance(operands, (list, tuple))
    value = value_of(node)
    dim = rest[0] if rest else node.kwargs.get("dim", 0)

    def empty(operand: fx.Node) -> bool:
        shape = value_of(operand).shape
        # Next to tensors of any shape, `cat` takes the empty vector for nothing.
        return fixed_size(shape[dim if len(shape) == value.ndim else 0]) == 0

    left = [o for o in operands if isinstance(o, fx.Node) and not empty(o)]
    if all(value_of(operand).dtype != value.dtype for operand in left):
        return
    if len(left) == 1:
        node.replace_all_uses_with(left[0])
        graph.erase_node(node)
    else:
        node.args = (left, *rest)


def _detach_factory(node: fx.Node) -> None:
    value = value_of(node)
    assert isinstance(node.target, torch._ops.OpOverload)
    node.target = _NEW[node.target]
    node.args = node.args[1:]
    node.kwargs = {"dtype": value.dtype, "device": value.device}


def _fold_constants(graph: fx.Graph, root: nn.Module) -> None:
    """Computes what depends on nothing; plain `zeros` or `arange` stay, they are clear as is."""
    constants: dict[fx.Node, Tensor] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            tensor = root.get_buffer(node.target) if _is_constant(root, node.target) else None
            if tensor is not None:
                constants[node] = tensor
        elif _is_foldable(node, constants):
            args, kwargs = fx.map_arg((node.args, node.kwargs), constants.__getitem__)
            with torch.no_grad():
                constants[node] = node.target(*args, **kwargs)
    count = 0
    for node, tensor in constants.items():
        if node.op == "get_attr" or node.target in _FACTORIES:
            continue
        readers = [user for user in node.users if user not in constants]
        if not readers:
            continue
        while hasattr(root, f"_constant_{count}"):
            count += 1
        name = f"_constant_{count}"
        root.register_buffer(name, tensor.clone(), persistent=False)
        with graph.inserting_before(node):
            folded = graph.create_node("get_attr", name)
        folded.meta = dict(node.meta)
        for reader in readers:
            reader.replace_input_with(node, folded)


def _is_constant(root: nn.Module, name: str) -> bool:
    """Lifted constants are registered at the root and are no part of the state_dict."""
    path, _, leaf = name.rpartition(".")
    holder = root.get_submodule(path)
    return leaf in holder._non_persistent_buffers_set


def _is_foldable(node: fx.Node, constants: dict[fx.Node, Tensor]) -> bool:
    value = node.meta.get("val")
    return (
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and isinstance(value, Tensor)
        and all(fixed_size(size) is not None for size in value.shape)
        and value.numel() <= _LARGEST_FOLDED
        and torch.Tag.nondeterministic_seeded not in node.target.tags
        and all(argument in constants for argument in node.all_input_nodes)
        and node.target not in (aten.empty.memory_format,)
    )
