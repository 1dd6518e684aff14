"""The exporter, tamed: a free batch size where it is true, errors in words, no noise."""

import contextlib
import dataclasses
import io
import logging
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxfib.errors import CaptureError
from fxfib.free_sizes import Axes, doubtful_sizes, fixed_despite
from fxfib.graph_tools import user_line
from fxfib.recurrent_shapes import shapes_of_recurrent_layers


def export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], axes: Axes
) -> tuple[torch.export.ExportedProgram, list[str], tuple[int, ...] | None]:
    """The model as a program, with a free batch size where that works, and `axes` free in any case.

    Returns:
        The program; notes; the sizes to be tried (see `doubtful_sizes`), None for a fixed batch.

    Raises:
        CaptureError: the model does not run on the inputs, is no single graph, or fixes an axis
            that was asked to be free.
    """
    _register_dataclasses((args, kwargs))
    wide_args, wide_kwargs = repeat_batch(args, kwargs)
    first = _try_export(model, wide_args, wide_kwargs, axes, dynamic=True)
    if isinstance(first, Exception):
        # Is it the inputs, an output type, or the free batch size?  One plain run tells.
        outputs = run_on_examples(model, args, kwargs)
        if _is_data_dependent(first):
            raise _explain(model, first)  # a fixed batch size would not help
        if _register_dataclasses(outputs):
            first = _try_export(model, wide_args, wide_kwargs, axes, dynamic=True)
    if not isinstance(first, Exception):
        if fixed := fixed_despite(first, axes):
            raise CaptureError(f"{type(model).__name__} fixes sizes: {'; '.join(fixed)}.")
        if (doubtful := doubtful_sizes(first, axes)) is not None:
            return first, [], doubtful
    # Also where there is a graph: symbols that turned out fixed would be left all over it.
    program = static_export(model, args, kwargs, axes)
    if isinstance(first, Exception):
        lines = str(first).strip().splitlines()
        reason = f"export with a free one fails ({lines[0].strip(' .') if lines else type(first)})"
    else:
        reason = "the model's own code, or its input without a batch dimension, fixes it"
    return program, [f"the batch size is fixed: {reason}"], None


def _try_export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], axes: Axes, *, dynamic: bool
) -> torch.export.ExportedProgram | Exception:
    args, kwargs = clone_inputs((args, kwargs))
    shapes = torch.export.ShapesCollection()
    for leaf, asked in zip(pytree.tree_leaves((args, kwargs)), axes, strict=True):
        if isinstance(leaf, Tensor):
            free = ({0: torch.export.Dim.AUTO} if dynamic and leaf.ndim else {}) | asked
            if free:
                shapes[leaf] = free
    try:
        with shapes_of_recurrent_layers():
            return torch.export.export(
                model,
                args,
                kwargs,
                dynamic_shapes=shapes if dynamic or any(axes) else None,
                strict=False,
            )
    except Exception as error:  # export raises anything; the caller words it
        return error


def static_export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], axes: Axes
) -> torch.export.ExportedProgram:
    """The model as a program for the shapes of the example inputs alone, but for `axes`.

    Raises:
        CaptureError: the model is no single graph, or fixes one of `axes`.
    """
    program = _try_export(model, args, kwargs, axes, dynamic=False)
    if isinstance(program, Exception):
        raise _explain(model, program)
    if fixed := fixed_despite(program, axes):
        raise CaptureError(f"{type(model).__name__} fixes sizes: {'; '.join(fixed)}.")
    return program


def clone_inputs(tree: Any) -> Any:
    """The same nested inputs over new memory: no run may change the user's."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), tree)


def repeat_batch(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """A batch of one would be taken for a constant: it is made two, in every tensor that has it."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not tensors or tensors[0].ndim == 0 or tensors[0].shape[0] != 1:
        return args, kwargs

    def repeat(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor]) if tensor.ndim and tensor.shape[0] == 1 else tensor

    args, kwargs = pytree.tree_map_only(Tensor, repeat, (args, kwargs))
    return args, kwargs


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


def _is_data_dependent(error: Exception) -> bool:
    return "data-dependent" in str(error) or "DataDependent" in type(error).__name__


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
    if _is_data_dependent(error):
        explained = CaptureError(
            f"{name} has data-dependent control flow{place}: what runs next depends on the values "
            "of a tensor; use torch.where, move the decision out of the model, or compile a part "
            "of it, such as its backbone."
        )
    else:
        first = (text.strip().splitlines() or [type(error).__name__])[0]
        explained = CaptureError(f"{name} cannot be exported as one graph{place}: {first}")
    explained.__cause__ = error
    return explained


class _Silence:
    """Streams, warnings and log belong to the whole process: threads that want quiet share it.

    Each with a redirection of its own, the one that leaves last would put back what the other had
    put there, and the process would never print again.
    """

    lock = threading.Lock()
    users = 0
    stack = contextlib.ExitStack()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, log lines or printed graphs: what matters is in the notes and the errors."""
    with _Silence.lock:
        if _Silence.users == 0:
            stack = _Silence.stack = contextlib.ExitStack()
            stack.callback(logging.disable, logging.root.manager.disable)
            logging.disable(logging.ERROR)
            stack.enter_context(warnings.catch_warnings())
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            warnings.simplefilter("ignore")
        _Silence.users += 1
    try:
        yield
    finally:
        with _Silence.lock:
            _Silence.users -= 1
            if _Silence.users == 0:
                _Silence.stack.close()
