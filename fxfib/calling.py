"""How a compiled module is called: the user's own signature, nested inputs and outputs, as code.

`fx.GraphModule` calls its graph with flat inputs.  Here the generated `forward` has the parameters
of the user's `forward`, takes nested arguments apart and puts outputs together in plain Python,
which `torch.compile`, `torch.export` and a reader all follow.  Everything is data that fits JSON.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.fx.graph import CodeGen

from fxfib.errors import InputError
from fxfib.graph_tools import fixed_size
from fxfib.structure import (
    Leaf,
    Structure,
    check_identifier,
    class_table,
    input_code,
    output_code,
    structure_of,
    take_apart,
    validate,
)


@dataclass(frozen=True)
class Argument:
    """One parameter of `forward`; `structure` is None for one that was left at its default."""

    name: str
    keyword_only: bool
    structure: Structure | None
    has_default: bool
    default: Any


@dataclass(frozen=True)
class Calling:
    """Calling convention of a compiled module.

    `leaves` has one entry per flattened input: `("tensor", shape)` with None for free sizes, or
    `("constant", value)` for what export took as fixed.
    """

    arguments: tuple[Argument, ...]
    leaves: tuple[tuple[str, Any], ...]
    output: Structure

    def to_json(self) -> dict[str, Any]:
        """As nested dicts and lists."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Calling":
        """The inverse of `to_json`, also after a trip through JSON; names are checked."""
        arguments = tuple(Argument(**argument) for argument in data["arguments"])
        for argument in arguments:
            check_identifier(argument.name)
            validate(argument.structure)
        validate(data["output"])
        leaves = tuple((str(kind), value) for kind, value in data["leaves"])
        return cls(arguments, leaves, data["output"])

    def is_constant(self, argument: Argument) -> bool:
        """Whether capture fixed the value of an argument."""
        structure = argument.structure
        if structure is None or structure[0] != "leaf":
            return structure is None
        return self.leaves[structure[1]][0] == "constant"

    def flatten(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The flat inputs of one call, in the order of the graph's placeholders."""
        parameters = [
            inspect.Parameter(
                argument.name,
                inspect.Parameter.KEYWORD_ONLY
                if argument.keyword_only
                else inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=argument.default if argument.has_default else inspect.Parameter.empty,
            )
            for argument in self.arguments
        ]
        bound = inspect.Signature(parameters).bind(*args, **kwargs)
        bound.apply_defaults()
        flat: dict[int, Any] = {}
        others = []
        for argument in self.arguments:
            if argument.structure is None:
                others.append(bound.arguments[argument.name])
            else:
                take_apart(argument.structure, bound.arguments[argument.name], flat)
        leaves = [flat[index] for index in sorted(flat)]
        self.check(leaves, others)
        return leaves

    def unflatten(self, values: Sequence[Any]) -> Any:
        """The user's output from the graph's flat one."""
        namespace = {**class_table(self.output), "values": values, "inf": math.inf, "nan": math.nan}
        code = output_code(self.output, [f"values[{i}]" for i in range(len(values))])
        return eval(code, namespace)

    def check(self, leaves: Sequence[Any], others: Sequence[Any]) -> None:
        """Refuses inputs that the graph was not captured for.

        Raises:
            InputError: another rank, another size of an axis that is fixed, another constant.
        """
        for index, ((kind, expected), leaf) in enumerate(zip(self.leaves, leaves, strict=True)):
            if isinstance(leaf, fx.Proxy):
                continue
            if kind == "constant":
                if leaf is not expected and (isinstance(leaf, Tensor) or leaf != expected):
                    raise InputError(
                        f"input {index} was fixed to {expected!r} at capture; compile again with "
                        "example inputs that have the other value."
                    )
            elif not isinstance(leaf, Tensor):
                raise InputError(
                    f"input {index} was a tensor at capture, not {type(leaf).__name__}."
                )
            else:
                _check_shape(index, expected, leaf)
        unused = [argument for argument in self.arguments if argument.structure is None]
        for argument, value in zip(unused, others, strict=True):
            if value is not argument.default and value != argument.default:
                raise InputError(
                    f"{argument.name} was left at {argument.default!r} at capture; compile again "
                    "with it among the example inputs."
                )


def _check_shape(index: int, expected: Sequence[int | None], leaf: Tensor) -> None:
    fits = len(expected) == leaf.ndim
    if fits:
        for wanted, size in zip(expected, leaf.shape, strict=True):
            if wanted is not None and size != wanted:
                fits = False
    if not fits:
        shape = ", ".join("any" if size is None else str(size) for size in expected)
        raise InputError(
            f"input {index} must have shape [{shape}] as captured, not {list(leaf.shape)}; compile "
            "again with example inputs of the other shape."
        )


def calling_of(
    forward: Callable[..., Any],
    in_spec: pytree.TreeSpec,
    out_spec: pytree.TreeSpec,
    placeholders: Sequence[fx.Node],
) -> Calling:
    """The calling convention of a captured graph.

    Args:
        forward: the user's `forward`, for names and defaults.
        in_spec: of `(args, kwargs)`.
        out_spec: of the output.
        placeholders: of the graph, one per leaf of `in_spec`.

    Raises:
        CaptureError: a container type that cannot be written as code.
    """
    leaves = tuple(_leaf(node.meta["val"]) for node in placeholders)
    args, kwargs = pytree.tree_unflatten([Leaf(i) for i in range(len(leaves))], in_spec)
    output = pytree.tree_unflatten([Leaf(i) for i in range(out_spec.num_leaves)], out_spec)
    arguments: list[Argument] = []
    kinds = inspect.Parameter
    given, named = list(args), dict(kwargs)
    gap = False  # a parameter that cannot be written down: what follows goes by keyword

    def add(name: str, keyword_only: bool, value: Any) -> None:
        structure = structure_of(value)
        fixed = structure[0] == "leaf" and leaves[structure[1]][0] == "constant"
        default = leaves[structure[1]][1] if fixed else None
        arguments.append(Argument(name, keyword_only or gap, structure, fixed, default))

    for name, parameter in inspect.signature(forward).parameters.items():
        if parameter.kind is kinds.VAR_POSITIONAL:
            for position, value in enumerate(given):
                add(f"{name}_{position}", False, value)
            given = []
        elif parameter.kind is kinds.VAR_KEYWORD:
            for key, value in named.items():
                add(key, True, value)
            named = {}
        elif given and parameter.kind is not kinds.KEYWORD_ONLY:
            add(name, False, given.pop(0))
        elif name in named:
            add(name, parameter.kind is kinds.KEYWORD_ONLY, named.pop(name))
        elif parameter.default is None or type(parameter.default) in (bool, int, float, str):
            only = parameter.kind is kinds.KEYWORD_ONLY or gap
            arguments.append(Argument(name, only, None, True, parameter.default))
        else:
            gap = True
    return Calling(_ordered(arguments), leaves, structure_of(output))


def _ordered(arguments: Sequence[Argument]) -> tuple[Argument, ...]:
    """Python wants arguments without a default first.

    A tensor behind one that has a default gets None, which is refused in words when it is called
    (``forward(tokens=None, mask=None, targets=None)``, captured without a mask).  What comes before
    another kind of input loses its default.
    """
    positional = [argument for argument in arguments if not argument.keyword_only]
    optional = False
    for index, argument in enumerate(positional):
        if optional and not argument.has_default and argument.structure[0] == "leaf":  # type: ignore[index]
            positional[index] = dataclasses.replace(argument, has_default=True, default=None)
        optional |= argument.has_default
    last = max((i for i, a in enumerate(positional) if not a.has_default), default=-1)
    for index, argument in enumerate(positional[:last]):
        positional[index] = dataclasses.replace(argument, has_default=False)
    return (*positional, *(argument for argument in arguments if argument.keyword_only))


class _CallCodeGen(CodeGen):
    """Generates `forward` with the user's signature around the flat graph."""

    def __init__(self, calling: Calling) -> None:
        super().__init__()
        self.calling = calling

    def gen_fn_def(
        self,
        free_vars: list[str],
        maybe_return_annotation: str,
        *,
        expanded_def: bool = False,
    ) -> str:
        names = [text.split(":")[0].split("=")[0].strip() for text in free_vars]
        names = [name for name in names if name != "self"]
        parameters, star = ["self"], False
        expressions: dict[int, str] = {}
        others: list[str] = []
        for argument in self.calling.arguments:
            if argument.keyword_only and not star:
                parameters.append("*")
                star = True
            default = f"={argument.default!r}" if argument.has_default else ""
            parameters.append(argument.name + default)
            if argument.structure is None:
                others.append(argument.name)
            else:
                input_code(argument.structure, argument.name, expressions)
        values = [expressions[index] for index in range(len(names))]
        # All names at once: one may be the name of an argument that is still to be read.
        lines = [f"def {self._func_name}({', '.join(parameters)}):"]
        lines.append(f"    self._calling.check([{', '.join(values)}], [{', '.join(others)}])")
        if names and names != values:
            lines.append(f"    {', '.join(names)}, = {', '.join(values)},")
        return "\n".join(lines)

    def generate_output(self, output_args: Any, **options: Any) -> str:
        return "return " + output_code(self.calling.output, [repr(value) for value in output_args])

    def process_inputs(self, *args: Any) -> Any:  # type: ignore[override]
        # `torch.export` runs a graph module through an interpreter, with the values of keyword
        # arguments behind the positional ones and without their names.
        arguments = self.calling.arguments
        if len(args) > len(arguments):
            raise InputError(f"at most {len(arguments)} arguments are taken, not {len(args)}.")
        # As many as were given at capture, or as are no fixed constants: those, whatever optional
        # ones lie between them.
        captured = [a for a in arguments if a.structure is not None]
        required = [a for a in captured if not self.calling.is_constant(a)]
        fitting = (names for names in (captured, required) if len(names) == len(args))
        taken = next(fitting, arguments)
        named = {argument.name: value for argument, value in zip(taken, args, strict=False)}
        return self.calling.flatten(**named)

    def process_outputs(self, outputs: Any) -> Any:
        return self.calling.unflatten(outputs)

    def additional_globals(self) -> list[tuple[str, Any]]:
        return list(class_table(self.calling.output).items())


def code_generator(calling: Calling) -> CodeGen:
    """For `fx.Graph.set_codegen`; the graph's module has `calling` as its attribute `_calling`."""
    return _CallCodeGen(calling)


def _leaf(value: Any) -> tuple[str, Any]:
    if isinstance(value, Tensor):
        return "tensor", [fixed_size(size) for size in value.shape]
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        value = value.node.hint
    return "constant", value
