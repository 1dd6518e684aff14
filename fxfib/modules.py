"""The raise: an ATen graph becomes a module of ordinary modules under the user's own names."""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxfib.calling import calling_of
from fxfib.capture import Captured
from fxfib.fibration_module import FibrationModule
from fxfib.graph_tools import module_path
from fxfib.program import same_tensor_key
from fxfib.raise_weighted import RECURRENT
from fxfib.raised import Raised
from fxfib.raising import functional_dropout, raised_of
from fxfib.simplify import eliminate_dead_code

__all__ = ["FibrationModule", "raise_modules", "unshare"]


def raise_modules(graph_module: fx.GraphModule, captured: Captured) -> FibrationModule:
    """Ordinary modules in place of ATen operations, under the names that the parameters have.

    Args:
        graph_module: obeys the contract of `Captured.graph_module`, but for the shapes of its
            parameters and for nodes that a rewrite replaced or added.
        captured: names, calling convention and the user's module, for what no graph holds
            (`num_batches_tracked`, the order of names).

    Where the names or shapes of parameters fit no standard module, or a second use disagrees with
    the first, the operation stays a function that reads the parameters under their own names.
    Memory is shared with `graph_module`; see `unshare`.
    """
    raised, modules = _choose(graph_module, captured.source)
    graph = _new_graph(graph_module.graph, raised)
    root = nn.Module()
    root.training = captured.source.training
    attributes = {
        node.target: _find(graph_module, node.target)
        for node in graph.nodes
        if node.op == "get_attr"
    }
    inside = {target for call in raised.values() for target in call.tensors.values()}
    for name in _in_order([*modules, *(set(attributes) - inside)], captured.source):
        if name in modules:
            _add_module(root, name, modules[name])
        else:
            _assign(root, name, *attributes[name])
    _set_modes(root, captured.source)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    calling = calling_of(captured.source.forward, captured.in_spec, captured.out_spec, placeholders)
    return FibrationModule(root, graph, calling, type(captured.source).__name__)


def unshare(module: nn.Module, source: nn.Module) -> None:
    """Gives `module` its own copy of every tensor whose memory is `source`'s; ties are kept.

    After it, training the one does not change the other.
    """
    theirs = {
        tensor.untyped_storage()._cdata
        for tensor in (*source.parameters(), *source.buffers())
        if tensor.numel()
    }
    copies: dict[tuple[Any, ...], Tensor] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.untyped_storage()._cdata in theirs:
            key = same_tensor_key(tensor)
            if key not in copies:
                copies[key] = tensor.detach().clone()
            tensor.data = copies[key]


def _choose(
    graph_module: fx.GraphModule, source: nn.Module
) -> tuple[dict[fx.Node, Raised], dict[str, nn.Module]]:
    """What each node is raised to, and one module per path."""
    raised: dict[fx.Node, Raised] = {}
    first: dict[str, Raised] = {}
    modules: dict[str, nn.Module] = {}
    taken = {name for name, _ in source.named_modules()}
    taken |= {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}

    # What has parameters below it is no activation, whatever the module stack says.
    parents = {name.rpartition(".")[0] for name in taken}

    def tensor_of(target: str) -> Tensor:
        return _find(graph_module, target)[0]

    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        call = raised_of(node, lambda target: tuple(tensor_of(target).shape))
        if call is None:
            written = functional_dropout(node)
            if written is None:
                continue
            path = _free_path(module_path(node), "dropout", taken, modules)
            call = Raised(path, *written, {}, (node.args[0],))
            taken.add(path)
        if call.path in first:
            if first[call.path].same_module(call):
                raised[node] = call
            continue
        if not call.tensors and (hasattr(fx.GraphModule, call.path) or call.path in parents):
            continue
        module = call.build(tensor_of)
        if module is not None:
            _complete(module, call.path, source)
            raised[node], first[call.path], modules[call.path] = call, call, module
    return raised, modules


def _free_path(parent: str, name: str, taken: set[str], modules: dict[str, nn.Module]) -> str:
    while parent in modules:
        parent = parent.rpartition(".")[0]
    stem = f"{parent}.{name}" if parent else name
    count, path = 0, stem
    while path in taken or path in modules:
        count += 1
        path = f"{stem}_{count}"
    return path


def _complete(module: nn.Module, path: str, source: nn.Module) -> None:
    """What an evaluation graph does not show of a batch norm, from the user's own."""
    if not isinstance(module, nn.modules.batchnorm._NormBase):
        return
    if not module.track_running_stats:
        return
    try:
        theirs = source.get_submodule(path)
    except AttributeError:
        theirs = None
    counted = getattr(theirs, "num_batches_tracked", None)
    assert module.running_mean is not None
    if isinstance(counted, Tensor):
        module.num_batches_tracked = counted.detach().clone()
    elif theirs is not None:
        module.num_batches_tracked = None
    else:
        module.num_batches_tracked = torch.zeros_like(
            module.running_mean[:0].sum(), dtype=torch.long
        )
    if isinstance(theirs, nn.modules.batchnorm._NormBase):
        module.momentum = theirs.momentum  # None averages over all batches; the graph says 0


def _new_graph(old: fx.Graph, raised: dict[fx.Node, Raised]) -> fx.Graph:
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for node in old.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], copies.__getitem__))
        elif node in raised:
            inputs = fx.map_arg(raised[node].inputs, copies.__getitem__)
            copies[node] = graph.call_module(raised[node].path, inputs)
            copies[node].meta = dict(node.meta)
        elif _is_recurrent_part(node, raised):
            copies[node] = _recurrent_output(graph, node, copies[node.args[0]])
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    eliminate_dead_code(graph)
    graph.lint()
    return graph


def _is_recurrent_part(node: fx.Node, raised: dict[fx.Node, Raised]) -> bool:
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return False
    return node.args[0] in raised and node.args[0].target in RECURRENT


def _recurrent_output(graph: fx.Graph, node: fx.Node, call: fx.Node) -> fx.Node:
    """ATen returns (output, h, c); the LSTM module returns (output, (h, c))."""
    result, index = node.args
    assert isinstance(result, fx.Node) and isinstance(index, int)
    if result.target is torch.ops.aten.lstm.input and index > 0:
        call = graph.call_function(operator.getitem, (call, 1))
        index -= 1
    part = graph.call_function(operator.getitem, (call, index))
    part.meta = dict(node.meta)
    return part


def _find(root: nn.Module, name: Any) -> tuple[Tensor, bool]:
    """The tensor at a dotted name, and whether it belongs to the `state_dict`."""
    path, _, leaf = str(name).rpartition(".")
    holder = root.get_submodule(path)
    tensor = getattr(holder, leaf)
    # A tensor object of its own: what happens to the result does not happen to the graph.
    own = tensor.detach()
    if isinstance(tensor, nn.Parameter):
        own = nn.Parameter(own, requires_grad=tensor.requires_grad)
    return own, leaf not in holder._non_persistent_buffers_set


def _in_order(names: list[str], source: nn.Module) -> list[str]:
    """The user's own order; names that are not the user's come last, in alphabetical order."""
    modules = [name for name, _ in source.named_modules(remove_duplicate=False)]
    tensors = [name for name, _ in source.named_parameters(remove_duplicate=False)]
    tensors += [name for name, _ in source.named_buffers(remove_duplicate=False)]
    module_rank = {name: index for index, name in enumerate(modules)}
    tensor_rank = {name: index for index, name in enumerate(tensors)}

    def key(name: str) -> tuple[int, int, str]:
        # A tensor stands where its module stands, behind the standard ones of that module.
        if name in module_rank:
            return module_rank[name], -1, name
        owner = name.rpartition(".")[0]
        last = len(modules) if name not in tensor_rank else 0
        return module_rank.get(owner, last), tensor_rank.get(name, len(tensors)), name

    return sorted(names, key=key)


def _holder(root: nn.Module, path: list[str]) -> nn.Module:
    for part in path:
        child = root._modules.get(part)
        if child is None:
            child = nn.Module()
            child.training = root.training
            root.add_module(part, child)
        root = child
    return root


def _add_module(root: nn.Module, name: str, module: nn.Module) -> None:
    *path, leaf = name.split(".")
    holder = _holder(root, path)
    # Parameters that stand beside the standard ones, or children, may be there already.
    earlier = holder._modules.get(leaf)
    if earlier is not None:
        module._parameters.update(earlier._parameters)
        module._buffers.update(earlier._buffers)
        module._modules.update(earlier._modules)
        module._non_persistent_buffers_set.update(earlier._non_persistent_buffers_set)
    holder._modules[leaf] = module


def _assign(root: nn.Module, name: str, tensor: Tensor, persistent: bool) -> None:
    *path, leaf = name.split(".")
    holder = _holder(root, path)
    if isinstance(tensor, nn.Parameter):
        holder.register_parameter(leaf, tensor)
    else:
        holder.register_buffer(leaf, tensor, persistent=persistent)


def _set_modes(root: nn.Module, source: nn.Module) -> None:
    """Modes of the user's modules; what was captured in evaluation stays in evaluation."""
    theirs = dict(source.named_modules(remove_duplicate=False))
    for path, module in root.named_modules():
        switches = isinstance(
            module,
            (
                nn.modules.batchnorm._NormBase,
                nn.modules.dropout._DropoutNd,
            ),
        )
        training = theirs[path].training if path in theirs else source.training
        module.training = training and not switches
