"""A trained model becomes a functional ATen graph; the model itself is left exactly as it was."""

import contextlib
import dataclasses
import inspect
import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from fxfib.errors import CaptureError, InputError
from fxfib.graph_tools import fixed_size, user_line, value_of
from fxfib.program import to_graph_module
from fxfib.refusals import preserved, refuse_unsupported, unwrap


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

    An output (or input) that is a dataclass unknown to `torch.utils._pytree` is registered there
    with `torch.export.register_dataclass`, as every later export of the result needs it too.

    Raises:
        InputError: the example inputs are of no use as arguments.
        RefusedError: the model is one that cannot be compiled.
        CaptureError: it does not run on the example inputs, or cannot be made a graph.
    """
    start = time.perf_counter()
    model = unwrap(model)
    args, kwargs = normalize_inputs(model, example_inputs, example_kwargs)
    refuse_unsupported(model)
    with preserved(model), torch.no_grad(), quiet():
        program, notes, dynamic = _export(model, args, kwargs)
        graph_module, more_notes = to_graph_module(model, program)
        expected = _flat_outputs(model, args, kwargs)
        difference = _difference(graph_module, args, kwargs, expected)
        if difference and dynamic:
            # Something in the model depends on the batch size in a way that export missed.
            program = _static_export(model, args, kwargs)
            notes = [f"the batch size is fixed: with a free one the outputs differ ({difference})"]
            dynamic = False
            graph_module, more_notes = to_graph_module(model, program)
            difference = _difference(graph_module, args, kwargs, expected)
        if difference:
            raise CaptureError(
                f"the captured graph of {type(model).__name__} does not compute what the model "
                f"computes ({difference}); its forward depends on something outside its inputs."
            )
    return Captured(
        graph_module=graph_module,
        in_spec=program.call_spec.in_spec,
        out_spec=program.call_spec.out_spec,
        dynamic_batch=dynamic,
        notes=(*notes, *more_notes),
        source=model,
        seconds=time.perf_counter() - start,
    )


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


# ------------------------------------------------------------------------------------ exporting


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.export.ExportedProgram, list[str], bool]:
    _register_dataclasses((args, kwargs))
    wide_args, wide_kwargs, _ = repeat_batch(args, kwargs)
    first = _try_export(model, wide_args, wide_kwargs, dynamic=True)
    if isinstance(first, Exception):
        # Is it the inputs, an output type, or the free batch size?  One plain run tells.
        outputs = run_on_examples(model, args, kwargs)
        if _register_dataclasses(outputs):
            first = _try_export(model, wide_args, wide_kwargs, dynamic=True)
    if not isinstance(first, Exception) and _batch_is_free(first):
        return first, [], True
    # Also where there is a graph: symbols that turned out fixed would be left all over it.
    program = _static_export(model, args, kwargs)
    if isinstance(first, Exception):
        lines = str(first).strip().splitlines()
        reason = f"export with a free one fails ({lines[0].strip(' .') if lines else type(first)})"
    else:
        reason = "the model's own code, or its input without a batch dimension, fixes it"
    return program, [f"the batch size is fixed: {reason}"], False


def _try_export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, dynamic: bool
) -> torch.export.ExportedProgram | Exception:
    args, kwargs = clone_inputs((args, kwargs))
    shapes = torch.export.ShapesCollection()
    for leaf in pytree.tree_leaves((args, kwargs)):
        if dynamic and isinstance(leaf, Tensor) and leaf.ndim:
            shapes[leaf] = {0: torch.export.Dim.AUTO}
    try:
        return torch.export.export(
            model, args, kwargs, dynamic_shapes=shapes if dynamic else None, strict=False
        )
    except Exception as error:  # export raises anything; the caller words it
        return error


def _static_export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.export.ExportedProgram:
    program = _try_export(model, args, kwargs, dynamic=False)
    if isinstance(program, Exception):
        raise _explain(model, program)
    return program


def clone_inputs(tree: Any) -> Any:
    """The same nested inputs over new memory: no run may change the user's."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), tree)


def repeat_batch(args: Any, kwargs: Any) -> tuple[Any, Any, bool]:
    """A batch of one would be taken for a constant: it is made two, in every tensor that has it."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not tensors or tensors[0].ndim == 0 or tensors[0].shape[0] != 1:
        return args, kwargs, False

    def repeat(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor]) if tensor.ndim and tensor.shape[0] == 1 else tensor

    args, kwargs = pytree.tree_map_only(Tensor, repeat, (args, kwargs))
    return args, kwargs, True


def _batch_is_free(program: torch.export.ExportedProgram) -> bool:
    """Whether the first axis of the first tensor input stayed symbolic."""
    names = program.graph_signature.user_inputs
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names and isinstance(value_of(node), Tensor):
            value = value_of(node)
            return value.ndim > 0 and fixed_size(value.shape[0]) is None
    return False


def _register_dataclasses(tree: Any) -> bool:
    """Registers unknown dataclasses among the leaves of `tree`; True where there was one."""
    found = False
    for leaf in pytree.tree_leaves(tree):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            with contextlib.suppress(ValueError):  # two leaves of one class
                torch.export.register_dataclass(type(leaf))
            found = True
            # What it holds has only now become visible.
            _register_dataclasses(leaf)
    return found


# ------------------------------------------------------------------------------------ running


def run_on_examples(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """The outputs of `model` on clones of its inputs, from a fixed random state.

    Raises:
        CaptureError: it does not run; the first line of its error is quoted.
    """
    args, kwargs = clone_inputs((args, kwargs))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return model(*args, **kwargs)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CaptureError(
            f"{type(model).__name__} does not run on the example inputs: {lines[0]}"
        ) from error


def _flat_outputs(model: nn.Module, args: Any, kwargs: Any) -> list[Any]:
    return pytree.tree_leaves(run_on_examples(model, args, kwargs))


def _difference(
    graph_module: fx.GraphModule, args: Any, kwargs: Any, expected: list[Any]
) -> str | None:
    """In what way the graph's outputs differ from the model's; None if they do not."""
    leaves = clone_inputs(pytree.tree_leaves((args, kwargs)))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = graph_module(*leaves)
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if not isinstance(theirs, Tensor):
            if ours != theirs:
                return f"output {index} is {ours}, not {theirs}"
            continue
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            form, wanted = (f"{t.dtype}{list(t.shape)}" for t in (ours, theirs))
            return f"output {index} is {form}, not {wanted}"
        if not _close(ours, theirs):
            off = (ours.double() - theirs.double()).abs().max().item()
            return f"output {index} is off by {off:.2g}"
    return None


def _close(ours: Tensor, theirs: Tensor) -> bool:
    if torch.equal(ours, theirs):
        return True
    if not theirs.is_floating_point():
        return False
    # The same operations run in the same order; only kernels that depend on memory layout may
    # sum in another one.
    finite = theirs.double().nan_to_num(0.0, 0.0, 0.0)
    bound = (
        64 * torch.finfo(theirs.dtype).eps * float(finite.abs().max()) if theirs.numel() else 0.0
    )
    return torch.allclose(ours.double(), theirs.double(), rtol=0.0, atol=bound, equal_nan=True)


def _explain(model: nn.Module, error: Exception) -> CaptureError:
    """One sentence for whatever `torch.export` raised, with the user's own line."""
    text = str(error)
    trace: list[str] = []
    seen: BaseException | None = error
    while seen is not None:
        frame = seen.__traceback__
        while frame is not None:
            trace.append(f'File "{frame.tb_frame.f_code.co_filename}", line {frame.tb_lineno}')
            frame = frame.tb_next
        seen = seen.__cause__ or seen.__context__
    line = user_line("\n".join(trace)) or user_line(text)
    place = f" at {line}" if line else ""
    name = type(model).__name__
    if "data-dependent" in text or "DataDependent" in type(error).__name__:
        explained = CaptureError(
            f"{name} has data-dependent control flow{place}: what runs next depends on the values "
            "of a tensor; use torch.where or move the decision out of the model."
        )
    else:
        first = (text.strip().splitlines() or [type(error).__name__])[0]
        explained = CaptureError(f"{name} cannot be exported as one graph{place}: {first}")
    explained.__cause__ = error
    return explained


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings or log lines of the exporter: what matters is in the notes and the errors."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
