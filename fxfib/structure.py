"""Nested inputs and outputs as data that fits JSON, and as the code that takes them apart."""

import builtins
import collections
import dataclasses
import keyword
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxfib.errors import CaptureError

# A structure is nested lists: ["leaf", index], ["none"], ["tuple" | "list", children],
# ["dict" | "OrderedDict", [[key, child], ...]],
# ["dataclass" | "namedtuple", "module:name", [[field, child], ...]].
Structure = list[Any]


@dataclass(frozen=True)
class Leaf:
    """Stands for the flattened input or output of that number."""

    index: int


def _class_name(value: Any) -> str:
    name = f"{type(value).__module__}:{type(value).__qualname__}"
    _SEEN[name] = type(value)
    return name


def structure_of(value: Any) -> Structure:
    """The nested lists that stand for a value whose leaves are `Leaf`."""
    if value is None:
        return ["none"]
    if isinstance(value, Leaf):
        return ["leaf", value.index]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        children = [[name, structure_of(getattr(value, name))] for name in value._fields]
        return ["namedtuple", _class_name(value), children]
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
        children = [[name, structure_of(getattr(value, name))] for name in fields]
        return ["dataclass", _class_name(value), children]
    if type(value) in (tuple, list):
        return [type(value).__name__, [structure_of(child) for child in value]]
    if type(value) in (dict, collections.OrderedDict):
        return [type(value).__name__, [[key, structure_of(child)] for key, child in value.items()]]
    raise CaptureError(
        f"inputs and outputs may be tensors, tuples, lists, dicts and dataclasses, "
        f"not {type(value).__name__}."
    )


def validate(structure: Any) -> None:
    """Refuses what is not a structure, or holds names that are no identifiers.

    Raises:
        ValueError: that is the case.
    """
    if structure is None or structure[0] == "none":
        return
    if structure[0] == "leaf":
        int(structure[1])
    elif structure[0] in ("tuple", "list"):
        for child in structure[1]:
            validate(child)
    elif structure[0] in ("dict", "OrderedDict"):
        for key, child in structure[1]:
            if type(key) not in (str, int, bool, float):
                raise ValueError(f"{key!r} cannot be a key")
            validate(child)
    elif structure[0] in ("dataclass", "namedtuple"):
        for name, child in structure[2]:
            check_identifier(name)
            validate(child)
        check_identifier(_short(structure[1]))
    else:
        raise ValueError(f"{structure[0]!r} is not a kind of structure")


def check_identifier(name: str) -> None:
    """Names from a file become code: nothing but an identifier may pass.

    Raises:
        ValueError: `name` is not one.
    """
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"{name!r} is not an identifier")


def _short(class_name: str) -> str:
    return "_class_" + class_name.replace(":", ".").replace(".", "_").replace("<locals>", "local")


def class_table(structure: Structure) -> dict[str, Any]:
    """Names in generated code -> classes.

    A class is looked up among the modules that are already imported, never imported by name; where
    it is not found, one with the same fields is made.
    """
    table: dict[str, Any] = {}
    if structure[0] == "OrderedDict":
        table["OrderedDict"] = collections.OrderedDict
    if structure[0] in ("tuple", "list"):
        for child in structure[1]:
            table.update(class_table(child))
    elif structure[0] in ("dict", "OrderedDict"):
        for _, child in structure[1]:
            table.update(class_table(child))
    elif structure[0] in ("dataclass", "namedtuple"):
        fields = [name for name, _ in structure[2]]
        table[_short(structure[1])] = _find_class(structure[1], fields, structure[0])
        for _, child in structure[2]:
            table.update(class_table(child))
    return table


_MADE: dict[tuple[str, ...], type] = {}
_SEEN: dict[str, type] = {}  # also classes that no import reaches, made inside a function


def _find_class(name: str, fields: list[str], kind: str) -> type:
    module_name, _, path = name.partition(":")
    found: Any = sys.modules.get(module_name)
    for part in path.split("."):
        found = getattr(found, part, None)
    found = found or _SEEN.get(name)
    if isinstance(found, type) and found is not builtins.object:
        known = (
            {field.name for field in dataclasses.fields(found)}
            if dataclasses.is_dataclass(found)
            else set(getattr(found, "_fields", ()))
        )
        if known >= set(fields):
            return found
    key = (kind, name, *fields)
    if key not in _MADE:
        label = path.split(".")[-1]
        if kind == "namedtuple":
            _MADE[key] = collections.namedtuple(label, fields)
        else:
            made = dataclasses.make_dataclass(label, [(f, Any, None) for f in fields])
            torch.export.register_dataclass(made)
            _MADE[key] = made
    return _MADE[key]


def take_apart(structure: Structure, value: Any, flat: dict[int, Any]) -> None:
    """Puts the leaves of a nested `value` into `flat` under their numbers."""
    expressions: dict[int, str] = {}
    input_code(structure, "value", expressions)
    for index, expression in expressions.items():
        flat[index] = eval(expression, {"value": value})


def input_code(structure: Structure, expression: str, found: dict[int, str]) -> None:
    """Puts the code that reads every leaf of the value of `expression` into `found`."""
    kind = structure[0]
    if kind == "leaf":
        found[structure[1]] = expression
    elif kind in ("tuple", "list"):
        for index, child in enumerate(structure[1]):
            input_code(child, f"{expression}[{index}]", found)
    elif kind in ("dict", "OrderedDict"):
        for key, child in structure[1]:
            input_code(child, f"{expression}[{key!r}]", found)
    elif kind in ("dataclass", "namedtuple"):
        for name, child in structure[2]:
            input_code(child, f"{expression}.{name}", found)


def output_code(structure: Structure, values: Sequence[str]) -> str:
    """The code that builds the nested value from the codes of its leaves."""
    kind = structure[0]
    if kind == "none":
        return "None"
    if kind == "leaf":
        return values[structure[1]]
    if kind in ("tuple", "list"):
        parts = ", ".join(output_code(child, values) for child in structure[1])
        if kind == "list":
            return f"[{parts}]"
        return f"({parts},)" if len(structure[1]) == 1 else f"({parts})"
    if kind in ("dict", "OrderedDict"):
        pairs = ", ".join(f"{key!r}: {output_code(child, values)}" for key, child in structure[1])
        return "{" + pairs + "}" if kind == "dict" else "OrderedDict({" + pairs + "})"
    parts = ", ".join(f"{name}={output_code(child, values)}" for name, child in structure[2])
    return f"{_short(structure[1])}({parts})"
