"""The exporter, tamed: a free batch size where it is true, errors in words, no noise."""

import contextlib
import dataclasses
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxfib.errors import CaptureError
from fxfib.graph_tools import fixed_size, user_line, value_of
from fxfib.lstm_shapes import right_lstm_shapes


def export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.export.ExportedProgram, list[str], tuple[int, ...] | None]:
    """The model as a program, with a free batch size where that works.

    Returns:
        The program; notes; the sizes to be tried (see `doubtful_sizes`), None for a fixed batch.

    Raises:
        CaptureError: the model does not run on the inputs, or is no single graph.
    """
    _register_dataclasses((args, kwargs))
    wide_args, wide_kwargs = repeat_batch(args, kwargs)
    first = _try_export(model, wide_args, wide_kwargs, dynamic=True)
    if isinstance(first, Exception):
        # Is it the inputs, an output type, or the free batch size?  One plain run tells.
        outputs = run_on_examples(model, args, kwargs)
        if _is_data_dependent(first):
            raise _explain(model, first)  # a fixed batch size would not help
        if _register_dataclasses(outputs):
            first = _try_export(model, wide_args, wide_kwargs, dynamic=True)
    if not isinstance(first, Exception) and (doubtful := doubtful_sizes(first)) is not None:
        return first, [], doubtful
    # Also where there is a graph: symbols that turned out fixed would be left all over it.
    program = static_export(model, args, kwargs)
    if isinstance(first, Exception):
        lines = str(first).strip().splitlines()
        reason = f"export with a free one fails ({lines[0].strip(' .') if lines else type(first)})"
    else:
        reason = "the model's own code, or its input without a batch dimension, fixes it"
    return program, [f"the batch size is fixed: {reason}"], None


def _try_export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, dynamic: bool
) -> torch.export.ExportedProgram | Exception:
    args, kwargs = clone_inputs((args, kwargs))
    shapes = torch.export.ShapesCollection()
    for leaf in pytree.tree_leaves((args, kwargs)):
        if dynamic and isinstance(leaf, Tensor) and leaf.ndim:
            shapes[leaf] = {0: torch.export.Dim.AUTO}
    try:
        with right_lstm_shapes():
            return torch.export.export(
                model, args, kwargs, dynamic_shapes=shapes if dynamic else None, strict=False
            )
    except Exception as error:  # export raises anything; the caller words it
        return error


def static_export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.export.ExportedProgram:
    """The model as a program for the shapes of the example inputs alone.

    Raises:
        CaptureError: the model is no single graph.
    """
    program = _try_export(model, args, kwargs, dynamic=False)
    if isinstance(program, Exception):
        raise _explain(model, program)
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


# Sizes at which a condition that was met on the example must hold as well.
_SIZES = (*range(2, 34), 63, 64, 100, 127, 128, 1000, 4096)
# A larger batch than that is not run only to find out.
_LARGEST_TRIED = 33


def doubtful_sizes(program: torch.export.ExportedProgram) -> tuple[int, ...] | None:
    """Batch sizes at which the program may compute something else than the model.

    The program records which conditions on the batch size were decided while it was made (a branch
    in the model, a broadcast), but nothing checks them later.

    Returns:
        None if the first axis of the first tensor input is fixed, or may be free only in part;
        otherwise sizes, from 2 on, at which a recorded condition does not hold: mostly none.
    """
    names = program.graph_signature.user_inputs
    inputs = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    tensors = [value_of(node) for node in inputs if isinstance(value_of(node), Tensor)]
    if not tensors or not tensors[0].ndim or fixed_size(tensors[0].shape[0]) is not None:
        return None
    for bounds in program.range_constraints.values():
        if bounds.lower > 2 or bounds.upper < _SIZES[-1]:
            return None
    doubtful = set()
    for guard in tensors[0].fake_mode.shape_env.guards:
        symbols = guard.expr.free_symbols
        broken = [n for n in _SIZES if guard.expr.subs(dict.fromkeys(symbols, n)) != sympy.true]
        if broken and broken[0] > _LARGEST_TRIED:
            return None
        doubtful.update(broken[:2])
    return tuple(sorted(doubtful)) if len(doubtful) <= 4 else None


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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, log lines or printed graphs: what matters is in the notes and the errors."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
