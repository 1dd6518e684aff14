"""From an exported program to a plain, functional graph module under the user's own names."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec

from fxfib.errors import CaptureError, RefusedError
from fxfib.functionalize import functionalize
from fxfib.graph_tools import DROPOUTS, where
from fxfib.inlining import inline_idle_regions
from fxfib.simplify import eliminate_dead_code, simplify
from fxfib.written_out import gather_norms

aten = torch.ops.aten


_RECURRENT = frozenset({aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input})


def to_graph_module(model: nn.Module, program: ExportedProgram) -> tuple[fx.GraphModule, list[str]]:
    """The graph module of `fxfib.capture.Captured`, and notes on what it does not keep.

    Raises:
        RefusedError: training-mode batch norm or dropout, or no operation at all.
        CaptureError: control-flow operators, or in-place changes of the model's own tensors.
    """
    inline_idle_regions(program.graph_module)
    _refuse_nodes(program.graph)
    root = nn.Module()
    graph = fx.Graph()
    copies = _copy_inputs(model, program, root, graph)
    for node in program.graph.nodes:
        if node.op == "call_function":
            copies[node] = graph.node_copy(node, copies.__getitem__)
        elif node.op == "output":
            specs = program.graph_signature.output_specs
            values = [
                spec.arg.value if isinstance(spec.arg, ConstantArgument) else copies[old]
                for spec, old in zip(specs, node.args[0], strict=True)
            ]
            graph.output(tuple(values))
    notes = []
    if functionalize(graph):
        notes.append("the model changes an input in place; the captured graph does not")
    simplify(graph, root)
    gather_norms(graph)
    eliminate_dead_code(graph)
    if not any(node.op == "call_function" for node in graph.nodes):
        raise RefusedError(f"{type(model).__name__} has no operations (an empty module).")
    graph.lint()
    graph_module = fx.GraphModule(root, graph, type(model).__name__)
    copy_transience(root, graph_module)
    return graph_module, notes


def assign(root: nn.Module, name: str, tensor: Tensor, *, persistent: bool = True) -> None:
    """Puts a tensor at a dotted name under `root`, plain containers on the way made as needed.

    A parameter becomes a new `nn.Parameter` over the same memory, so that its `.grad` is its own.
    """
    *path, leaf = name.split(".")
    holder = root
    for part in path:
        child = holder._modules.get(part)
        if child is None:
            child = nn.Module()
            child.training = root.training
            holder.add_module(part, child)
        holder = child
    if isinstance(tensor, nn.Parameter):
        shared = nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
        holder.register_parameter(leaf, shared)
    else:
        holder.register_buffer(leaf, tensor.detach(), persistent=persistent)


def copy_transience(source: nn.Module, target: nn.Module) -> None:
    """Buffers outside the `state_dict` of `source` are outside that of `target` too.

    `fx.GraphModule` forgets it on some versions of PyTorch.
    """
    for path, module in target.named_modules():
        try:
            transient = source.get_submodule(path)._non_persistent_buffers_set
        except AttributeError:
            continue
        module._non_persistent_buffers_set.update(transient & set(module._buffers))


def same_tensor_key(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tied tensors: one memory seen in one way (views of other shapes are not tied)."""
    return (
        tensor.untyped_storage()._cdata,
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
    )


def _refuse_nodes(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op == "get_attr" or isinstance(node.target, torch._ops.HigherOrderOperator):
            reader = next(iter(node.users), node) if node.op == "get_attr" else node
            kind = getattr(reader.target, "__name__", None) or "a control-flow operator"
            if kind == "wrap_with_autocast":
                raise CaptureError(
                    f"{where(reader)} runs under torch.autocast; leave it out and give the model "
                    "the dtype that it shall run in, such as model.bfloat16()."
                )
            raise CaptureError(
                f"{where(reader)} uses {kind}, which has a graph of its own and is not supported."
            )
        if node.target is aten.batch_norm.default and node.args[5] and node.args[3] is not None:
            raise RefusedError(
                f"batch norm {where(node)} is in training mode and would change its statistics; "
                "call model.eval() first."
            )
        if node.target in DROPOUTS and node.args[2] and node.args[1] > 0:
            raise RefusedError(
                f"dropout {where(node)} is in training mode; call model.eval() first "
                "(F.dropout needs training=self.training)."
            )
        if node.target in _RECURRENT:
            names = [argument.name for argument in node.target._schema.arguments]
            given = dict(zip(names, node.args, strict=False))
            if given["train"] and given["dropout"] > 0 and given["num_layers"] > 1:
                raise RefusedError(
                    f"the dropout of {where(node)} is in training mode; call model.eval() first."
                )


def _copy_inputs(
    model: nn.Module, program: ExportedProgram, root: nn.Module, graph: fx.Graph
) -> dict[fx.Node, Any]:
    """Placeholders of the user's inputs; everything lifted becomes an attribute again."""
    copies: dict[fx.Node, Any] = {}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        if specs[node.name].kind is InputKind.USER_INPUT:
            copies[node] = graph.node_copy(node)
    # A name of the model itself, and the first of several, in the order of its state_dict.
    names: dict[tuple[Any, ...], str] = {}
    for name, tensor in _named_tensors(model):
        names.setdefault(same_tensor_key(tensor), name)
    attributes: dict[str, fx.Node] = {}
    for node in placeholders:
        if node in copies or not node.users:
            continue
        name, tensor, persistent = _lifted(model, program, specs[node.name])
        known = names.get(same_tensor_key(tensor)) if tensor.numel() else None
        if known is not None and known != name:
            name, tensor, persistent = known, *_attribute(model, known)
        if name not in attributes:
            assign(root, name, tensor, persistent=persistent)
            # The root needs the attribute before a node may point at it.
            attributes[name] = graph.create_node("get_attr", name)
            attributes[name].meta = dict(node.meta)
        copies[node] = attributes[name]
    return copies


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    parameters = list(model.named_parameters(remove_duplicate=False))
    return [*parameters, *model.named_buffers(remove_duplicate=False)]


def _attribute(model: nn.Module, name: str) -> tuple[Tensor, bool]:
    path, _, leaf = name.rpartition(".")
    holder = model.get_submodule(path)
    tensor = {**holder._buffers, **holder._parameters}[leaf]
    assert tensor is not None
    return tensor, leaf not in holder._non_persistent_buffers_set


def _lifted(
    model: nn.Module, program: ExportedProgram, spec: InputSpec
) -> tuple[str, Tensor, bool]:
    name = spec.target
    assert name is not None
    if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
        return name, *_attribute(model, name)
    if spec.kind is InputKind.CONSTANT_TENSOR:
        constant = program.constants[name]
        assert isinstance(constant, Tensor)
        return name, constant, False
    raise CaptureError(
        f"{type(model).__name__} uses the object {name}, which is not a tensor and cannot be "
        "part of a graph."
    )
