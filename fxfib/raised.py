"""What a raised module is: its path, its constructor, the tensors it takes from the graph."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fxfib.graph_tools import module_path

# Where a subclass behaves exactly like what it is raised to.
_ALSO: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    nn.Hardtanh: (nn.ReLU6,),
}


@dataclass(frozen=True)
class Raised:
    """A module that computes what a node computes.

    `arguments` are those of the constructor, `tensors` maps names inside the module to attribute
    names of the graph, `inputs` are the node's arguments that the module is called with.
    """

    path: str
    kind: type[nn.Module]
    arguments: dict[str, Any]
    tensors: dict[str, str]
    inputs: tuple[Any, ...]

    def same_module(self, other: "Raised") -> bool:
        """Whether both calls are calls of one module."""
        return (self.path, self.kind, self.arguments, self.tensors) == (
            other.path,
            other.kind,
            other.arguments,
            other.tensors,
        )

    def build(self, tensor_of: Callable[[str], Tensor]) -> nn.Module | None:
        """The module over the graph's own tensors; None where their shapes are not its shapes."""
        module = (
            self.kind(**self.arguments, device="meta")
            if self.tensors
            else self.kind(**self.arguments)
        )
        expected = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        expected.pop("num_batches_tracked", None)
        if set(expected) != set(self.tensors):
            return None
        for name, target in self.tensors.items():
            tensor = tensor_of(target)
            if tensor.shape != expected[name].shape:
                return None
            if isinstance(expected[name], nn.Parameter) != isinstance(tensor, nn.Parameter):
                return None
        for name, target in self.tensors.items():
            setattr(module, name, tensor_of(target))
        return module


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """All arguments of an ATen node by name, defaults included; the first is called "self"."""
    schema = node.target._schema  # type: ignore[union-attr]
    given: dict[str, Any] = {}
    for index, argument in enumerate(schema.arguments):
        name = "self" if index == 0 else argument.name
        if index < len(node.args):
            given[name] = node.args[index]
        elif argument.name in node.kwargs:
            given[name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            given[name] = argument.default_value
    return given


def flat_values(arguments: Mapping[str, Any]) -> list[Any]:
    """All values, those inside lists and tuples one by one."""
    flat: list[Any] = []
    for value in arguments.values():
        flat.extend(value if isinstance(value, (list, tuple)) else [value])
    return flat


def made_by(node: fx.Node, kind: type[nn.Module]) -> bool:
    """Whether the user's innermost module is of that kind (its parameter-free call is the node)."""
    stack = node.meta.get("nn_module_stack")
    if not stack or not module_path(node):
        return False
    made_by = list(stack.values())[-1][1]
    name = made_by if isinstance(made_by, str) else f"{made_by.__module__}.{made_by.__qualname__}"
    return name in {f"{k.__module__}.{k.__qualname__}" for k in (kind, *_ALSO.get(kind, ()))}


def same_path(tensors: Mapping[str, Any]) -> tuple[str, dict[str, str]] | None:
    """The module path that all given tensors share, if their last names are the standard ones."""
    targets: dict[str, str] = {}
    paths = set()
    for name, value in tensors.items():
        if value is None:
            continue
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return None
        path, _, leaf = str(value.target).rpartition(".")
        if leaf != name:
            return None
        paths.add(path)
        targets[name] = str(value.target)
    if len(paths) != 1 or "" in paths:
        return None
    return paths.pop(), targets


def per_axis(value: Any, rank: int) -> tuple[int, ...]:
    """One number per spatial axis, where ATen may have one for all."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * rank if len(values) == 1 else values


Shapes = Callable[[str], tuple[int, ...]]
