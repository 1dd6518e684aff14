"""The pass on a graph that is at hand: `(graph module, example inputs) -> graph module`."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from fxfib.agreement import difference
from fxfib.api import check_options
from fxfib.binding import free_axes
from fxfib.capture import Captured, capture
from fxfib.certificate import report_of, verified
from fxfib.errors import CaptureError, InputError
from fxfib.exporting import clone_inputs, quiet
from fxfib.graph_tools import fixed_size, value_of
from fxfib.program import to_graph_module
from fxfib.refusals import preserved, refuse_unsupported
from fxfib.report import Report
from fxfib.workshop import shrink, skip_patterns

aten = torch.ops.aten


def merge_fibers(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    eps: float = 0.0,
    *,
    criterion: str = "fibration",
    round_to: int | None = None,
    skip: Iterable[str] = (),
    verify: bool = True,
) -> fx.GraphModule:
    """A graph with the same inputs and outputs whose fibers are merged.

    For pipelines that hand graphs from pass to pass; :func:`fxfib.compile` is for models.  The
    sizes that are free in the ``meta`` of the placeholders (``example_value`` or ``val``) stay
    free; without ``meta``, the batch is.

    Args:
        graph_module: takes flat arguments, returns a tuple or one tensor; its parameters are
            attributes (:func:`bind` makes them so).  It is not changed, and computes without
            gradients, in eval mode.
        example_inputs: one value for each placeholder.
        eps, criterion, round_to, skip, verify: as for :func:`fxfib.compile`; patterns of ``skip``
            that match nothing are ignored, as a pipeline has many graphs.

    Returns:
        A graph of ATen operations, ``meta["fibration"]`` its report.  Every output is laid out in
        memory, and shares memory with inputs, as the original does.

    Raises:
        InputError, RefusedError, CaptureError, VerifyError: as :func:`fxfib.compile`.
    """
    return merge_graph(graph_module, example_inputs, eps, criterion, round_to, skip, verify)[0]


@torch.inference_mode(False)
def merge_graph(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    eps: float,
    criterion: str,
    round_to: int | None,
    skip: Iterable[str],
    verify: bool,
) -> tuple[fx.GraphModule, Report]:
    """As :func:`merge_fibers`; also gives the report."""
    # The caller's tracing context, if there is one, knows other fake tensors.
    with torch._guards.tracing(None):
        return _merged(graph_module, example_inputs, eps, criterion, round_to, skip, verify)


def _merged(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    eps: float,
    criterion: str,
    round_to: int | None,
    skip: Iterable[str],
    verify: bool,
) -> tuple[fx.GraphModule, Report]:
    check_options(one_eps(eps), criterion, round_to)
    patterns = skip_patterns(skip)
    inputs = tuple(_plain(value) for value in example_inputs)
    _check(graph_module, inputs)
    captured = _captured(graph_module, example_inputs, inputs)
    start = time.perf_counter()
    layers = {name.rpartition(".")[0] for name, _ in captured.graph_module.named_parameters()}
    patterns = tuple(p for p in patterns if any(fnmatch.fnmatchcase(n, p) for n in layers))
    with quiet():
        plan, rewritten = shrink(captured.graph_module, float(eps), criterion, round_to, patterns)
        report = report_of(captured, plan, rewritten, float(eps), criterion)
        if verify:
            report = verified(report, captured, rewritten, rewritten, (inputs, {}))
        _like_original(rewritten, graph_module, inputs)
    report.seconds.update(capture=captured.seconds, compile=time.perf_counter() - start)
    return _finished(rewritten, graph_module, report), report


def one_eps(eps: Any) -> float:
    """Refuses eps by patterns: layers of a captured graph need not have the names of the model.

    Raises:
        InputError: it is a mapping.
    """
    if isinstance(eps, Mapping):
        raise InputError("a graph takes one eps; eps by patterns is for fxfib.compile.")
    return eps


def _plain(value: Any) -> Any:
    """The example's size for a free one."""
    if isinstance(value, torch.SymInt):
        known = value.node.hint
        if known is None:
            raise CaptureError("an input is a size that depends on data, which has no example.")
        return int(known)
    return value


def _check(graph_module: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(inputs):
        raise InputError(
            f"the graph has {len(placeholders)} inputs, and {len(inputs)} examples were given."
        )
    if any(isinstance(value, nn.Parameter) for value in inputs):
        raise InputError(
            "parameters are inputs of this graph; fxfib.passes.bind makes them attributes."
        )
    codegen = graph_module.graph._codegen
    if isinstance(codegen, fx.graph._PyTreeCodeGen):
        raise InputError(
            "the graph takes or gives nested values; give it to fxfib.compile, "
            "which keeps its calling convention."
        )
    (output,) = graph_module.graph.find_nodes(op="output")
    values = output.args[0]
    flat = isinstance(values, fx.Node) or (
        isinstance(values, (tuple, list))
        and all(value is None or isinstance(value, (fx.Node, int, float)) for value in values)
    )
    if not flat:
        raise CaptureError("the outputs of the graph are nested.")


def _captured(
    graph_module: fx.GraphModule, examples: Sequence[Any], inputs: tuple[Any, ...]
) -> Captured:
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    if not any({"example_value", "val"} & set(node.meta) for node in placeholders):
        return capture(graph_module, inputs)
    start = time.perf_counter()
    refuse_unsupported(graph_module)
    shapes = tuple(_shape(n, e) for n, e in zip(placeholders, examples, strict=True))
    with preserved(graph_module), torch.no_grad(), quiet():
        try:
            program = torch.export.export(
                graph_module, clone_inputs(inputs), dynamic_shapes=(*shapes,), strict=False
            )
        except Exception as error:  # export raises anything
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise CaptureError(f"the graph cannot be exported: {lines[0]}") from error
        result, notes = to_graph_module(graph_module, program)
        _check_free(result, shapes)
        found = difference(graph_module, result, inputs, {})
    if found:
        raise CaptureError(f"the captured graph computes something else ({found}).")
    free = any(isinstance(shape, dict) and 0 in shape for shape in shapes)
    return Captured(
        graph_module=result,
        in_spec=program.call_spec.in_spec,
        out_spec=program.call_spec.out_spec,
        dynamic_batch=free,
        notes=tuple(notes),
        source=graph_module,
        seconds=time.perf_counter() - start,
    )


def _shape(node: fx.Node, example: Any) -> Any:
    """What export is told of one input; of a number that nobody reads nothing."""
    if isinstance(example, Tensor):
        return dict.fromkeys(free_axes(node, example), torch.export.Dim.AUTO) or None
    varies = isinstance(node.meta.get("example_value", example), torch.SymInt) and node.users
    return torch.export.Dim.AUTO if varies else None


def _check_free(graph_module: fx.GraphModule, shapes: Sequence[Any]) -> None:
    """Export fixes sizes that it cannot keep free, and says nothing."""
    for node, shape in zip(graph_module.graph.find_nodes(op="placeholder"), shapes, strict=True):
        value = value_of(node)
        sizes = [value.shape[axis] for axis in shape] if isinstance(shape, dict) else []
        if shape is not None and not isinstance(shape, dict):
            sizes = [value]
        if any(fixed_size(size) is not None for size in sizes):
            raise CaptureError(f"a size of {node.name} that varies would become fixed.")


def _like_original(
    rewritten: fx.GraphModule, original: fx.GraphModule, inputs: tuple[Any, ...]
) -> None:
    """Lays outputs out in memory as the original does, whoever uses them next may rely on it.

    Raises:
        CaptureError: the original changes an input, returns its own parameters, or has outputs
            whose memory cannot be made alike.
    """
    expected, wanted = _memory(original, inputs, refuse_changes=True)
    found, shared = _memory(rewritten, inputs)
    (output,) = rewritten.graph.find_nodes(op="output")
    values = list(output.args[0])
    changed = False
    for index, (theirs, ours) in enumerate(zip(expected, found, strict=True)):
        if not isinstance(theirs, Tensor):
            continue
        if shared[index] == wanted[index] and theirs.stride() == ours.stride():
            continue
        kept: torch.memory_format | None = torch.preserve_format
        if theirs.stride() != ours.stride():
            kept = _format(theirs)
        if wanted[index] is not None or kept is None:
            raise CaptureError(
                f"output {index} shares memory, or is laid out, in a way that cannot be kept."
            )
        with rewritten.graph.inserting_before(output):
            values[index] = rewritten.graph.call_function(
                aten.clone.default, (values[index],), {"memory_format": kept}
            )
        changed = True
    if changed:
        output.args = (tuple(values),)
        rewritten.recompile()
        again, shared = _memory(rewritten, inputs)
        same = all(
            not isinstance(a, Tensor) or a.stride() == b.stride()
            for a, b in zip(expected, again, strict=True)
        )
        if shared != wanted or not same:
            raise CaptureError("its outputs share memory in a way that cannot be kept.")


def _format(tensor: Tensor) -> torch.memory_format | None:
    """The memory format that gives these strides."""
    formats = [torch.contiguous_format]
    if tensor.ndim in (4, 5):
        formats += [torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d]
    for kind in formats:
        if tensor.clone(memory_format=kind).stride() == tensor.stride():
            return kind
    return None


def _memory(
    graph_module: fx.GraphModule, inputs: tuple[Any, ...], *, refuse_changes: bool = False
) -> tuple[list[Any], list[tuple[str, int] | None]]:
    """The outputs on the examples; of each the first input or earlier output in the same memory."""
    # Real copies, strides included.
    given = [_copy(value) if isinstance(value, Tensor) else value for value in inputs]
    versions = [value._version if isinstance(value, Tensor) else 0 for value in given]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = pytree.tree_leaves(graph_module(*given), is_leaf=lambda value: value is None)
    now = [value._version if isinstance(value, Tensor) else 0 for value in given]
    if refuse_changes and now != versions:
        raise CaptureError("the graph changes an input in place.")
    owner: dict[int, tuple[str, int]] = {}
    for index, value in enumerate(given):
        _own(owner, value, ("input", index))
    shared: list[tuple[str, int] | None] = []
    own = {_storage(t) for t in (*graph_module.parameters(), *graph_module.buffers())}
    for index, value in enumerate(outputs):
        if isinstance(value, Tensor) and value.numel() and _storage(value) in own:
            if refuse_changes:
                raise CaptureError("the graph returns one of its own tensors.")
            shared.append(("attribute", index))
            continue
        is_tensor = isinstance(value, Tensor) and value.numel() > 0
        shared.append(owner.get(_storage(value)) if is_tensor else None)
        _own(owner, value, ("output", index))
    return outputs, shared


def _own(owner: dict[int, tuple[str, int]], value: Any, token: tuple[str, int]) -> None:
    if isinstance(value, Tensor) and value.numel():
        owner.setdefault(_storage(value), token)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _copy(tensor: Tensor) -> Tensor:
    """A copy with the same strides, those of expanded tensors too."""
    tensor = tensor.detach()
    memory = tensor.untyped_storage().clone()
    place = (tensor.storage_offset(), tensor.shape, tensor.stride())
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(memory, *place)


def _finished(
    rewritten: fx.GraphModule, original: fx.GraphModule, report: Report
) -> fx.GraphModule:
    """The result under the original's inputs, without values of another tracing."""
    graph = rewritten.graph
    pairs = zip(
        graph.find_nodes(op="placeholder"),
        original.graph.find_nodes(op="placeholder"),
        strict=True,
    )
    metas = {ours: dict(theirs.meta) for ours, theirs in pairs}
    for node in graph.nodes:
        kept = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
        node.meta = metas.get(node, kept)
    (output,) = graph.find_nodes(op="output")
    (theirs,) = original.graph.find_nodes(op="output")
    if isinstance(theirs.args[0], fx.Node):
        output.args = (output.args[0][0],)
    rewritten.recompile()
    result = fx.GraphModule(rewritten, graph, type(original).__name__)
    result.eval()
    result.meta["fibration"] = report
    return result
