"""Which ordinary module an ATen node is, and under which of the user's names."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from fxfib.graph_tools import DROPOUTS, module_path
from fxfib.raise_plain import PLAIN
from fxfib.raise_weighted import WEIGHTED
from fxfib.raised import Raised, arguments_of, flat_values, made_by


def raised_of(node: fx.Node, shape_of: Callable[[str], tuple[int, ...]]) -> Raised | None:
    """The module of one `call_function` node, or None where no ordinary module has its tensors.

    Args:
        node: of a captured (or rewritten) graph.
        shape_of: shape of the tensor at an attribute name.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    given = arguments_of(node)
    if node.target in WEIGHTED:
        return WEIGHTED[node.target](node, given, shape_of)
    if node.target in PLAIN:
        kind, arguments = PLAIN[node.target](given)
        if kind is None or not made_by(node, kind):
            return None
        if any(isinstance(value, fx.Node) for value in flat_values(arguments)):
            return None
        return Raised(module_path(node), kind, arguments, {}, (given["self"],))
    return None


def functional_dropout(node: fx.Node) -> tuple[type[nn.Module], dict[str, Any]] | None:
    """The module of a dropout that the user wrote as a function, so that it can be switched on."""
    if node.target not in DROPOUTS:
        return None
    kind, arguments = PLAIN[node.target](arguments_of(node))
    return None if kind is None else (kind, arguments)
