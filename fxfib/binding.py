"""Graphs whose parameters are inputs, as Dynamo makes them: bind the parameters, keep the rest."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxfib.graph_tools import fixed_size
from fxfib.program import assign

_STEP = re.compile(r"_(?:modules|parameters|buffers)\[(?:'([^']*)'|\"([^\"]*)\")\]")


@dataclass(frozen=True)
class Roles:
    """What the arguments of a graph are; Dynamo tells only while it compiles the graph.

    Attributes:
        weights: positions of parameters and buffers.
        names: of these, in the same order.
        numbers: positions of Python numbers that come as tensors (the eps of a batch norm, say):
            the graph does nothing but call ``item`` on them.
    """

    weights: tuple[int, ...]
    names: tuple[str, ...]
    numbers: tuple[int, ...]


def roles_of(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Roles:
    """The roles of a graph's arguments, while Dynamo compiles it."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    pairs = list(enumerate(zip(placeholders, example_inputs, strict=True)))
    weights = tuple(p for p, (node, value) in pairs if _is_weight(node, value))
    names = _names([placeholders[position] for position in weights], graph_module)
    numbers = tuple(p for p, (node, value) in pairs if _is_number(node, value))
    return Roles(weights, tuple(names), numbers)


@dataclass(frozen=True)
class Bound:
    """A graph that holds its parameters and buffers itself.

    Attributes:
        graph_module: takes the inputs that are left, in their order; its tensors share memory with
            the given ones and have the user's own names where they can be told.
        inputs: example values of the inputs that are left: tensors, numbers, ``torch.SymInt``.
        kept: their positions among the arguments of the original graph.
        roles: what the arguments of the original graph are; its weights became attributes.
        numbers: position and value of the numbers that became constants.
    """

    graph_module: fx.GraphModule
    inputs: tuple[Any, ...]
    kept: tuple[int, ...]
    roles: Roles
    numbers: tuple[tuple[int, float], ...]

    def rest(self, arguments: Sequence[Any]) -> list[Any]:
        """Those of the original graph's arguments that are left."""
        return [arguments[position] for position in self.kept]


def bind(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], roles: Roles | None = None
) -> Bound:
    """Make attributes of the placeholders that Dynamo made for parameters and buffers.

    Sizes that are inputs of their own (``SymInt``) are read off the tensor that has them, so that
    nothing but tensors and true numbers is left to depend on.

    Args:
        graph_module: takes flat arguments; it is not changed.
        example_inputs: one value for each placeholder; the real tensors where these are parameters.
        roles: what an earlier :func:`bind` of the graph found; None: they are read off the graph,
            which Dynamo allows only while it compiles it.
    """
    if roles is None:
        roles = roles_of(graph_module, example_inputs)
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    numbers = {position: float(example_inputs[position]) for position in roles.numbers}
    root = nn.Module()
    root.training = False
    for module_name in dict(graph_module.named_children()):
        root.add_module(module_name, graph_module.get_submodule(module_name))
    for own, theirs in (
        (root._parameters, graph_module._parameters),
        (root._buffers, graph_module._buffers),
    ):
        own.update(theirs)  # type: ignore[arg-type]
    for position, name in zip(roles.weights, roles.names, strict=True):
        assign(root, name, example_inputs[position])
    kept = tuple(p for p in range(len(placeholders)) if p not in {*roles.weights, *numbers})
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for position in kept:
        copies[placeholders[position]] = graph.node_copy(placeholders[position])
    sizes = _sizes(graph, list(copies.values()))
    for position, name in zip(roles.weights, roles.names, strict=True):
        copies[placeholders[position]] = graph.create_node("get_attr", name)
    values = {placeholders[position]: number for position, number in numbers.items()}

    def copied(node: fx.Node) -> Any:
        return sizes.get(copies[node], copies[node])

    for node in graph_module.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], copied))
        elif node.op == "call_method" and node.args[0] in values:
            copies[node] = values[node.args[0]]
        elif node.op != "placeholder" and not _turns_grad_off(node):
            copies[node] = graph.node_copy(node, copied)
    bound = fx.GraphModule(root, graph, type(graph_module).__name__)
    bound.eval()
    return Bound(
        bound,
        tuple(example_inputs[position] for position in kept),
        kept,
        roles,
        tuple(numbers.items()),
    )


def free_axes(node: fx.Node, value: Any) -> tuple[int, ...]:
    """The axes of a placeholder whose sizes the graph does not fix (as Dynamo decided)."""
    fake = node.meta.get("example_value", node.meta.get("val", value))
    if not isinstance(fake, Tensor):
        return ()
    return tuple(axis for axis, size in enumerate(fake.shape) if fixed_size(size) is None)


def _is_weight(node: fx.Node, value: Any) -> bool:
    marked = node.meta.get("tensor_dict") or {}
    return isinstance(value, nn.Parameter) or (
        isinstance(value, Tensor) and "_dynamo_static_input_type" in marked
    )


def _is_number(node: fx.Node, value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.ndim == 0
        and value.device.type == "cpu"
        and node.meta.get("tensor_dict") is None
        and "grapharg" in node.meta
        and bool(node.users)
        and all(u.op == "call_method" and u.target == "item" for u in node.users)
    )


def _turns_grad_off(node: fx.Node) -> bool:
    """Only graphs that run without gradients are bound, and there it changes nothing."""
    return (
        node.target is torch._C._set_grad_enabled
        and not node.args[0]
        and not torch.is_grad_enabled()
    )


def _names(placeholders: Sequence[fx.Node], graph_module: fx.GraphModule) -> list[str]:
    """The user's own names; where two modules give the same, the placeholders' names."""
    found = []
    for node in placeholders:
        source = getattr(node.meta.get("grapharg"), "source", None)
        text = getattr(source, "name", "")
        text = text() if callable(text) else text  # a method before torch 2.12
        steps = [one or two for one, two in _STEP.findall(text)]
        parts = [part for step in steps for part in step.split(".")]
        good = bool(parts) and all(part and "'" not in part for part in parts)
        found.append(".".join(parts) if good else node.name)
    taken = set(graph_module._modules) | set(graph_module._parameters) | set(graph_module._buffers)
    roots = {name.partition(".")[0] for name in found}
    prefixes = {name.rpartition(".")[0] for name in found if "." in name}
    unique = len(set(found)) == len(found) and not taken & roots and not prefixes & set(found)
    return found if unique else [node.name for node in placeholders]


def _sizes(graph: fx.Graph, placeholders: list[fx.Node]) -> dict[Any, fx.Node]:
    """For a size that is an input of its own, a node that reads it off a tensor."""
    where: dict[Any, tuple[fx.Node, int]] = {}
    for node in placeholders:
        fake = node.meta.get("example_value")
        if isinstance(fake, Tensor):
            for axis in free_axes(node, fake):
                size: Any = fake.shape[axis]
                where.setdefault(size.node.expr, (node, axis))
    sizes: dict[Any, fx.Node] = {}
    for node in placeholders:
        fake = node.meta.get("example_value")
        if isinstance(fake, torch.SymInt) and fake.node.expr in where:
            sizes[node] = graph.call_method("size", where[fake.node.expr])
    return sizes
