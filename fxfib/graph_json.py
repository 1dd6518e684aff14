"""An fx graph as JSON, and back: targets by name, from a list of what may be called."""

import math
import operator
import types
from typing import Any

import torch
from torch import fx

from fxfib.errors import ExportError, LoadError
from fxfib.structure import check_identifier

_NAMESPACES = ("aten", "torchvision")
# `from_file` reads a path of the file's choice.
_FORBIDDEN = ("from_file", "_linalg_check_errors")
_FUNCTIONS = {
    f"{module.__name__.lstrip('_')}.{name}": getattr(module, name)
    for module, names in (
        (
            operator,
            "getitem add sub mul truediv floordiv mod neg pow abs eq ne lt le gt ge and_ or_ not_",
        ),
        (math, "floor ceil trunc sqrt"),
        (torch, "sym_float sym_int sym_max sym_min sym_not sym_sqrt sym_ite sym_sum"),
    )
    for name in names.split()
    if hasattr(module, name)
}
_FUNCTION_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_OPS = ("placeholder", "get_attr", "call_function", "call_module", "output")


def encode_graph(graph: fx.Graph) -> dict[str, Any]:
    """All nodes of `graph` as data that fits JSON; `meta` is left behind.

    Raises:
        ExportError: a node calls what is not on the list, or has an argument that is not data.
    """
    return {
        "nodes": [
            {
                "name": node.name,
                "op": node.op,
                "target": _encode_target(node),
                "args": [_encode(value, node) for value in node.args],
                "kwargs": {key: _encode(value, node) for key, value in node.kwargs.items()},
            }
            for node in graph.nodes
        ]
    }


def decode_graph(data: dict[str, Any]) -> fx.Graph:
    """The inverse of `encode_graph`.  Nothing in `data` can become code but calls on the list.

    Raises:
        LoadError: it is not what `encode_graph` writes.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    try:
        for item in data["nodes"]:
            op, target = item["op"], item["target"]
            args = tuple(_decode(value, nodes) for value in item["args"])
            kwargs = {key: _decode(value, nodes) for key, value in item["kwargs"].items()}
            for key in kwargs:
                check_identifier(key)
            if op not in _OPS:
                raise ValueError(f"unknown kind of node {op!r}")
            node = graph.create_node(op, _decode_target(op, target), args, kwargs, item["name"])
            nodes[item["name"]] = node
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise LoadError(f"the graph in the file is damaged ({error}).") from error
    return graph


def _encode_target(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace in _NAMESPACES:
            return str(target)
    elif target in _FUNCTION_NAMES:
        return _FUNCTION_NAMES[target]
    raise ExportError(f"node {node.name} calls {target}, which cannot be saved.")


def _decode_target(op: str, target: str) -> Any:
    if op == "placeholder":
        check_identifier(target)
        return target
    if op != "call_function":
        # It becomes an attribute access in generated code.
        if any(character in target for character in "\"'\\\n\r") or not target.isprintable():
            raise ValueError(f"{target!r} is not a name")
        return target
    if target in _FUNCTIONS:
        return _FUNCTIONS[target]
    namespace, packet, overload = target.split(".")
    if namespace not in _NAMESPACES or packet in _FORBIDDEN:
        raise ValueError(f"{target} may not be called")
    found = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    if not isinstance(found, torch._ops.OpOverload):
        raise ValueError(f"{target} may not be called")
    return found


def _encode(value: Any, node: fx.Node) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, tuple):
        return {"tuple": [_encode(part, node) for part in value]}
    if isinstance(value, list):
        return [_encode(part, node) for part in value]
    if isinstance(value, dict):
        return {"dict": [[key, _encode(part, node)] for key, part in value.items()]}
    if isinstance(value, slice):
        return {"slice": [_encode(part, node) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, types.EllipsisType):
        return {"ellipsis": True}
    raise ExportError(
        f"node {node.name} has a {type(value).__name__} argument: it cannot be saved."
    )


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if value is None or type(value) in (bool, int, str, float):
        return value
    if isinstance(value, list):
        return [_decode(part, nodes) for part in value]
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(_decode(part, nodes) for part in content)
    if kind == "dict":
        return {key: _decode(part, nodes) for key, part in content}
    if kind == "slice":
        return slice(*(_decode(part, nodes) for part in content))
    if kind == "device":
        return torch.device(content)
    if kind == "ellipsis":
        return ...
    if kind == "torch":
        found = getattr(torch, content)
        if isinstance(found, (torch.dtype, torch.memory_format, torch.layout)):
            return found
    raise ValueError(f"unknown kind of value {kind!r}")
