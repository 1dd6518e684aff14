"""Which axes of the inputs stay free, and sizes at which a captured program has to be tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from fxfib.errors import InputError
from fxfib.graph_tools import fixed_size, value_of

# One entry a leaf of the inputs: what `torch.export` is told about each free axis.
Axes = tuple[dict[int, Any], ...]

# Sizes at which a condition that was met on the example must hold as well.
_SIZES = (*range(2, 34), 63, 64, 100, 127, 128, 1000, 4096)
# A larger batch than that is not run only to find out.
_LARGEST_TRIED = 33


def asked_axes(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> Axes:
    """The axes that the user wants free, for every leaf of `(args, kwargs)`.

    Args:
        model: whose `forward` names the arguments; one that fxfib compiled knows its free axes.
        args: positional arguments.
        kwargs: keyword arguments.
        dynamic_shapes: as `torch.export.export` takes it: a dict by the names of the parameters, or
            a tuple by position; a tensor's entry is None, a dict or a tuple or list with a
            `torch.export.Dim` for each free axis.

    Raises:
        InputError: it does not fit the inputs.
    """
    count = len(pytree.tree_leaves((args, dict(kwargs))))
    if dynamic_shapes is None:
        calling = getattr(model, "_calling", None)
        leaves = calling.leaves if calling is not None else ()
        if len(leaves) != count:
            return ({},) * count
        auto = torch.export.Dim.AUTO
        return tuple(
            {axis: auto for axis, size in enumerate(shape) if axis and size is None}
            if kind == "tensor"
            else {}
            for kind, shape in leaves
        )
    names = _names(model, args, kwargs)
    if isinstance(dynamic_shapes, (tuple, list)):
        if len(dynamic_shapes) > len(names):
            raise InputError(
                f"dynamic_shapes has {len(dynamic_shapes)} entries for {len(names)} inputs."
            )
        dynamic_shapes = dict(zip(names, dynamic_shapes, strict=False))
    if not isinstance(dynamic_shapes, Mapping):
        raise InputError("dynamic_shapes must be a dict by names of inputs, or a tuple.")
    unknown = sorted(set(dynamic_shapes) - set(names))
    if unknown:
        raise InputError(
            f"dynamic_shapes names {unknown[0]!r}, but the inputs given are {', '.join(names)}."
        )
    values = [*args, *kwargs.values()]
    found: list[dict[int, Any]] = []
    for name, value in zip(names, values, strict=True):
        found += _of_leaf(name, value, dynamic_shapes.get(name))
    return tuple(found)


def _names(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    import inspect

    names: list[str] = []
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{name}_{index}" for index in range(len(args) - len(names))]
        elif len(names) < len(args) and parameter.kind is not parameter.KEYWORD_ONLY:
            names.append(name)
    return [*names, *kwargs]


def _of_leaf(name: str, value: Any, spec: Any) -> Iterator[dict[int, Any]]:
    """The entries of one argument, which may hold several tensors."""
    if spec is None:
        yield from ({} for _ in pytree.tree_leaves(value))
    elif isinstance(value, Tensor):
        if isinstance(spec, (tuple, list)):
            spec = dict(enumerate(spec))
        if not isinstance(spec, Mapping) or not all(type(axis) is int for axis in spec):
            raise InputError(f"dynamic_shapes of {name} must map axes to torch.export.Dim.")
        spec = {axis: dim for axis, dim in spec.items() if dim is not None}
        for axis in spec:
            if not 0 <= axis < value.ndim:
                raise InputError(
                    f"dynamic_shapes: {name} has no axis {axis} (it has {value.ndim})."
                )
        yield spec
    else:
        parts = pytree.tree_flatten(value, is_leaf=lambda part: part is not value)[0]
        specs = pytree.tree_flatten(spec, is_leaf=lambda part: part is not spec)[0]
        if len(parts) != len(specs):
            raise InputError(f"dynamic_shapes of {name} has another structure than the input.")
        for index, (part, inner) in enumerate(zip(parts, specs, strict=True)):
            yield from _of_leaf(f"{name}[{index}]", part, inner)


def inputs_of(program: torch.export.ExportedProgram) -> list[fx.Node]:
    """Placeholders of the user's inputs, one a leaf."""
    by_name = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    specs = program.graph_signature.input_specs
    return [by_name[spec.arg.name] for spec in specs if spec.kind is InputKind.USER_INPUT]


def symbol_of(node: fx.Node, axis: int) -> Any:
    """The symbol of a free axis; None where it is fixed."""
    value = value_of(node)
    if not isinstance(value, Tensor) or axis >= value.ndim:
        return None
    size: Any = value.shape[axis]
    return None if fixed_size(size) is not None else size.node.expr


def fixed_despite(program: torch.export.ExportedProgram, axes: Axes) -> list[str]:
    """Axes that were asked to be free and that the model's own code fixes, in words."""
    return [
        f"axis {axis} of input {node.name} is {int(value_of(node).shape[axis])} whatever is asked"
        for node, asked in zip(inputs_of(program), axes, strict=True)
        for axis in asked
        if isinstance(value_of(node), Tensor) and symbol_of(node, axis) is None
    ]


def _guards(program: torch.export.ExportedProgram) -> list[Any]:
    for node in inputs_of(program):
        if isinstance(value_of(node), Tensor):
            return [guard.expr for guard in value_of(node).fake_mode.shape_env.guards]
    return []


def doubtful_sizes(
    program: torch.export.ExportedProgram, axes: Axes | None = None
) -> tuple[int, ...] | None:
    """Batch sizes at which the program may compute something else than the model.

    The program records which conditions on the batch size were decided while it was made (a branch
    in the model, a broadcast), but nothing checks them later.

    Args:
        program: the exported model.
        axes: what else was asked to be free; its conditions are :func:`trials`' matter.

    Returns:
        None if the first axis of the first tensor input is fixed, or may be free only in part;
        otherwise sizes, from 2 on, at which a recorded condition does not hold: mostly none.
    """
    nodes = inputs_of(program)
    tensors = [node for node in nodes if isinstance(value_of(node), Tensor)]
    if not tensors or symbol_of(tensors[0], 0) is None:
        return None
    others = _asked_symbols(program, axes)
    for symbol, bounds in program.range_constraints.items():
        if symbol not in others and (bounds.lower > 2 or bounds.upper < _SIZES[-1]):
            return None
    doubtful = set()
    for guard in _guards(program):
        symbols = guard.free_symbols
        if symbols & others.keys():
            continue
        broken = [n for n in _SIZES if guard.subs(dict.fromkeys(symbols, n)) != sympy.true]
        if broken and broken[0] > _LARGEST_TRIED:
            return None
        doubtful.update(broken[:2])
    return tuple(sorted(doubtful)) if len(doubtful) <= 4 else None


def _asked_symbols(program: torch.export.ExportedProgram, axes: Axes | None) -> dict[Any, int]:
    """Symbols of the asked axes that are no batch's, with the example's size."""
    nodes = inputs_of(program)
    batch = {symbol_of(node, 0) for node in nodes}
    found: dict[Any, int] = {}
    for node, asked in zip(nodes, axes or ({},) * len(nodes), strict=True):
        for axis in asked:
            symbol = symbol_of(node, axis)
            if symbol is not None and symbol not in batch:
                found[symbol] = value_of(node).shape[axis].node.hint
    return found


def trials(program: torch.export.ExportedProgram, axes: Axes) -> list[dict[tuple[int, int], int]]:
    """Inputs of other sizes to try the program on: `{(leaf, axis): size}` each.

    One and another size of every axis that was asked for, all of them at once, and the first sizes
    at which a condition does not hold that was decided while the program was made.
    """
    nodes, asked = inputs_of(program), _asked_symbols(program, axes)
    hints: dict[Any, int] = {}
    for node in nodes:
        for axis in range(getattr(value_of(node), "ndim", 0)):
            if (symbol := symbol_of(node, axis)) is not None:
                hints[symbol] = value_of(node).shape[axis].node.hint
    chosen: list[dict[Any, int]] = []
    guards = _guards(program)
    for symbol, size in asked.items():
        mine = [guard for guard in guards if symbol in guard.free_symbols]
        broken = [
            n
            for n in _SIZES
            if any(guard.subs({**hints, symbol: n}) != sympy.true for guard in mine)
        ]
        chosen += [{symbol: n} for n in dict.fromkeys([1, size + 1, *broken[:2]]) if n != size]
    if len(asked) > 1:
        # Sizes of their own, and one for all: what was told apart on the example may meet.
        chosen.append({symbol: size + 2 + k for k, (symbol, size) in enumerate(asked.items())})
        chosen.append(dict.fromkeys(asked, max(asked.values()) + 1))
    return [
        {
            (leaf, axis): sizes[symbol]
            for leaf, node in enumerate(nodes)
            for axis in range(getattr(value_of(node), "ndim", 0))
            if (symbol := symbol_of(node, axis)) in sizes
        }
        for sizes in chosen
    ]


def resized(leaves: list[Any], sizes: Mapping[tuple[int, int], int]) -> list[Any]:
    """The leaves with other sizes of some axes: entries repeated, or left out."""
    leaves = list(leaves)
    for (leaf, axis), size in sizes.items():
        tensor = leaves[leaf]
        places = torch.arange(size, device=tensor.device) % tensor.shape[axis]
        leaves[leaf] = tensor.index_select(axis, places)
    return leaves


__all__ = [
    "Axes",
    "asked_axes",
    "doubtful_sizes",
    "fixed_despite",
    "resized",
    "trials",
]
