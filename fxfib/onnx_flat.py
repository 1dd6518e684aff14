"""A module with any inputs and outputs, seen as ONNX sees it: tensors in, tensors out."""

import dataclasses
import inspect
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxfib.errors import ExportError
from fxfib.exporting import run_on_examples
from fxfib.free_sizes import Axes


class FlatModule(nn.Module):
    """`module` with its tensor inputs as arguments and its tensor outputs as a tuple.

    `axes` are those that stay free, an entry a tensor.
    """

    def __init__(self, module: nn.Module, args: Any, kwargs: Any, axes: Axes) -> None:
        super().__init__()
        self.module = module
        self.training = False
        leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.examples = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        pairs = zip(leaves, axes, strict=True)
        self.axes = tuple(asked for leaf, asked in pairs if isinstance(leaf, Tensor))
        self.input_names = _input_names(module, args, kwargs)
        outputs = run_on_examples(module, args, kwargs)
        self.output_names = [
            _identifier(pytree.keystr(path)) or "output"
            for path, leaf in pytree.tree_flatten_with_path(as_dicts(outputs))[0]
            if isinstance(leaf, Tensor)
        ]
        if not self.output_names:
            raise ExportError(f"{type(module).__name__} returns no tensor.")

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors among the outputs, in order; constants among the inputs are fixed."""
        given = iter(tensors)
        leaves = [
            next(given) if is_tensor else constant
            for is_tensor, constant in zip(self.is_tensor, self.constants, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        outputs = pytree.tree_leaves(as_dicts(self.module(*args, **kwargs)))
        seen = {id(tensor) for tensor in tensors}
        results = []
        for output in outputs:
            if isinstance(output, Tensor):
                # ONNX wants every output to be a value of its own.
                results.append(output.clone() if id(output) in seen else output)
                seen.add(id(output))
        return tuple(results)


def as_dicts(value: Any) -> Any:
    """Dataclasses as dicts, so that their fields are visible without registering anything."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: as_dicts(getattr(value, field.name)) for field in fields}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {name: as_dicts(getattr(value, name)) for name in value._fields}
    if type(value) in (tuple, list):
        return type(value)(as_dicts(part) for part in value)
    if isinstance(value, dict):
        return {key: as_dicts(part) for key, part in value.items()}
    return value


def _identifier(key: str) -> str:
    """A name from a path such as "['loss'][0]"."""
    parts = "".join(c if c.isalnum() or c == "_" else " " for c in key).split()
    name = "_".join(parts)
    return f"output_{name}" if name[:1].isdigit() else name


def _input_names(module: nn.Module, args: Any, kwargs: Any) -> list[str]:
    named: dict[str, Any] = {}
    left = list(args)
    for name, parameter in inspect.signature(module.forward).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            named.update({f"{name}_{i}": value for i, value in enumerate(left)})
            left = []
        elif left and parameter.kind is not parameter.KEYWORD_ONLY:
            named[name] = left.pop(0)
    # In the order in which the leaves are flattened: positional arguments first.
    named.update(kwargs)
    return [
        _identifier(pytree.keystr(path))
        for path, leaf in pytree.tree_flatten_with_path(named)[0]
        if isinstance(leaf, Tensor)
    ]
