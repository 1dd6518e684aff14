"""Small helpers on ATen graphs: new nodes with values, sizes as arguments, the user's own line."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# Their arguments are the tensor, p, and whether to train.
DROPOUTS = frozenset(
    {
        aten.dropout.default,
        aten.dropout_.default,
        aten.feature_dropout.default,
        aten.feature_dropout_.default,
        aten.alpha_dropout.default,
        aten.alpha_dropout_.default,
        aten.feature_alpha_dropout.default,
        aten.feature_alpha_dropout_.default,
    }
)

_TORCH_FOLDER = str(Path(torch.__file__).parent) + os.sep
_OWN_FOLDER = str(Path(__file__).resolve().parent) + os.sep
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def is_idle_dropout(node: fx.Node) -> bool:
    """Whether a node is a dropout that drops nothing."""
    return node.target in DROPOUTS and bool(not node.args[2] or node.args[1] == 0)


def value_of(node: Any) -> Any:
    """`meta["val"]`: a fake tensor, a SymInt, a Python number, or a list of them."""
    return node.meta["val"]


def call(
    graph: fx.Graph,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    like: fx.Node,
) -> fx.Node:
    """A new `call_function` node at the graph's insertion point, its `meta["val"]` computed.

    Module stack and stack trace are those of `like`.
    """
    node = graph.call_function(target, args, dict(kwargs or {}))
    for key in ("nn_module_stack", "stack_trace"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    set_value(node)
    return node


def set_value(node: fx.Node) -> None:
    """Computes `node.meta["val"]` from the values of its arguments; nothing real is computed."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    mode = next(
        (
            value.fake_mode
            for value in (value_of(argument) for argument in node.all_input_nodes)
            if isinstance(value, torch._subclasses.FakeTensor)
        ),
        None,
    )
    assert callable(node.target)
    if mode is None:
        node.meta["val"] = node.target(*args, **kwargs)
    else:
        with torch.no_grad(), mode:
            node.meta["val"] = node.target(*args, **kwargs)


def sizes_of(graph: fx.Graph, node: fx.Node, like: fx.Node) -> list[Any]:
    """The shape of `node` as an argument: numbers where fixed, `sym_size` nodes where not."""
    return [
        fixed_size(size)
        if fixed_size(size) is not None
        else call(graph, aten.sym_size.int, (node, axis), like=like)
        for axis, size in enumerate(value_of(node).shape)
    ]


def fixed_size(size: int | torch.SymInt) -> int | None:
    """The size of an axis as a number; None if it is free.

    Export leaves symbols behind that it found to have one value only: they count as fixed.
    """
    return size if isinstance(size, int) else size.node.maybe_as_int()


def user_line(text: str) -> str | None:
    """The last "file:line" in a stack trace that is neither PyTorch's nor this package's."""
    lines = [
        f"{name}:{number}"
        for name, number in _FRAME.findall(text)
        if not name.startswith((_TORCH_FOLDER, _OWN_FOLDER, "<")) and "/contextlib.py" not in name
    ]
    return lines[-1] if lines else None


def module_path(node: fx.Node) -> str:
    """Dotted path of the user's innermost module that made this node; "" for the model itself."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return "" if path == "_empty_nn_module_stack_from_metadata_hook" else path


def where(node: fx.Node) -> str:
    """Words that point a user at the source of a node: module path, and file:line if known."""
    place = module_path(node) or "the model's forward"
    line = user_line(node.meta.get("stack_trace") or "")
    return f"{place} ({line})" if line else place
