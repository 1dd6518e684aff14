"""A trained model becomes a functional ATen graph; the model itself is left exactly as it was."""

import dataclasses
import inspect
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from fxfib.agreement import difference, difference_at, difference_of_sizes
from fxfib.errors import CaptureError, InputError
from fxfib.exporting import export, quiet, static_export
from fxfib.free_sizes import asked_axes, trials
from fxfib.program import to_graph_module
from fxfib.refusals import preserved, refuse_inference, refuse_unsupported, unwrap


@dataclass(frozen=True)
class Captured:
    """A model as a graph, and how to call it.

    `graph_module` takes the flattened inputs and returns one flat tuple.  Its `call_function` nodes
    are ATen overloads of the training IR (linear, conv2d, batch_norm, lstm.input ... whole) without
    in-place operations; its parameters, buffers and constants are `get_attr` nodes under their own
    dotted names, sharing memory with the model's.  `in_spec` is that of `(args, kwargs)`.
    """

    graph_module: fx.GraphModule
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    dynamic_batch: bool
    notes: tuple[str, ...]
    source: nn.Module
    seconds: float

    def __str__(self) -> str:
        calls = sum(node.op == "call_function" for node in self.graph_module.graph.nodes)
        batch = "any batch size" if self.dynamic_batch else "one batch size only"
        name = type(self.source).__name__
        head = f"{name} captured in {self.seconds:.1f} s: {calls} operations, {batch}"
        return "\n".join([head, *(f"  {note}" for note in self.notes)])


def capture(
    model: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Captured:
    """Captures `model` on example inputs, for any batch size where the model allows it.

    Args:
        model: an `nn.Module` (or `fx.GraphModule`) in eval mode, on one device.  `torch.compile`,
            `DataParallel` and `DistributedDataParallel` wrappers are taken off.  Forward hooks are
            part of what is captured, and run.
        example_inputs: a tuple or list of positional arguments, one tensor, or a dict: keyword
            arguments where all its keys are parameters of `forward`, otherwise one positional
            argument.
        example_kwargs: keyword arguments.
        dynamic_shapes: axes beside the batch that stay free, as `torch.export.export` takes them:
            `{"tokens": {1: torch.export.Dim.AUTO}}`.

    An output (or input) that is a dataclass unknown to `torch.utils._pytree` is registered there
    with `torch.export.register_dataclass`, as every later export of the result needs it too.

    Raises:
        InputError: the example inputs are of no use as arguments, empty, or hold NaN or infinity.
        RefusedError: the model is one that cannot be compiled.
        CaptureError: it does not run on the example inputs, cannot be made a graph, or not one for
            other sizes of `dynamic_shapes`.
    """
    start = time.perf_counter()
    model = unwrap(model)
    args, kwargs = normalize_inputs(model, example_inputs, example_kwargs)
    _refuse_useless(args, kwargs)
    axes = asked_axes(model, args, kwargs, dynamic_shapes)
    refuse_unsupported(model)
    refuse_inference(model)
    with preserved(model), torch.no_grad(), quiet():
        program, notes, sizes = export(model, args, kwargs, axes)
        graph_module, more_notes = to_graph_module(model, program)
        found = difference(model, graph_module, args, kwargs)
        for size in (1, *sizes) if sizes is not None else ():
            # The exporter never looks at a batch of one.
            found = found or difference_at(size, model, graph_module, args, kwargs)
        if found and sizes is not None:
            program, sizes = static_export(model, args, kwargs, axes), None
            notes = [f"the batch size is fixed: with another one the outputs differ ({found})"]
            graph_module, more_notes = to_graph_module(model, program)
            found = difference(model, graph_module, args, kwargs)
        if found:
            raise CaptureError(
                f"the captured graph of {type(model).__name__} does not compute what the model "
                f"computes ({found}); its forward depends on something outside its inputs."
            )
        for sizes_tried in trials(program, axes):
            found = difference_of_sizes(sizes_tried, model, graph_module, args, kwargs)
            if found:
                raise CaptureError(
                    f"{type(model).__name__} cannot be captured for free sizes: with others than "
                    f"the example's ({', '.join(map(str, sizes_tried.values()))}) the graph does "
                    f"not compute what the model computes ({found}). Sizes that always agree, as "
                    "the lengths of keys and values, need one torch.export.Dim for both."
                )
    return Captured(
        graph_module=graph_module,
        in_spec=program.call_spec.in_spec,
        out_spec=program.call_spec.out_spec,
        dynamic_batch=sizes is not None,
        notes=(*notes, *more_notes),
        source=model,
        seconds=time.perf_counter() - start,
    )


def _refuse_useless(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Example inputs on which no comparison says anything."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if tensors and all(tensor.numel() == 0 for tensor in tensors):
        raise InputError("the example inputs are empty; give a batch of at least one example.")
    for tensor in tensors:
        # Minus infinity is what a mask of scores holds.
        if tensor.is_floating_point() and not bool((tensor < torch.inf).all()):
            raise InputError("an example input holds NaN or infinity; give numbers to compare on.")


def normalize_inputs(
    model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`(args, kwargs)` from all the ways to write example inputs; see `capture`.

    Raises:
        InputError: nothing given, a keyword argument given twice, or too many or too few for a
            graph module.
    """
    kwargs = dict(example_kwargs or {})
    args: tuple[Any, ...]
    if isinstance(example_inputs, Mapping):
        parameters = inspect.signature(model.forward).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        names = {
            n for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        }
        if all(isinstance(key, str) and (open_ended or key in names) for key in example_inputs):
            twice = sorted(set(example_inputs) & set(kwargs))
            if twice:
                raise InputError(f"example input {twice[0]} is given twice.")
            args, kwargs = (), {**example_inputs, **kwargs}
        else:
            args = (example_inputs,)
    elif isinstance(example_inputs, (tuple, list)) and not hasattr(example_inputs, "_fields"):
        args = tuple(example_inputs)
    elif example_inputs is None:
        args = ()
    else:
        args = (example_inputs,)
    if isinstance(model, fx.GraphModule):
        # `torch.export` runs these by position alone: all arguments, in the order of `forward`.
        try:
            bound = inspect.signature(model.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(
                f"the example inputs do not fit the model's forward: {error}."
            ) from error
        bound.apply_defaults()
        args, kwargs = bound.args, bound.kwargs
    leaves = pytree.tree_leaves((args, kwargs))
    if not any(isinstance(leaf, Tensor) or dataclasses.is_dataclass(leaf) for leaf in leaves):
        raise InputError("the example inputs hold no tensor; give the arguments of one call.")
    return args, kwargs
