"""ONNX export that is checked in ONNX Runtime before anyone sees the file."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxfib.capture import normalize_inputs
from fxfib.errors import ExportError, InputError
from fxfib.exporting import clone_inputs, quiet, repeat_batch
from fxfib.files import move_into_place, staging_folder
from fxfib.free_sizes import asked_axes, doubtful_sizes, fixed_despite, trials
from fxfib.onnx_check import first_line, verify_in_onnx_runtime
from fxfib.onnx_flat import FlatModule
from fxfib.onnx_recurrent import TRANSLATIONS
from fxfib.passes.verify import Difference
from fxfib.recurrent_shapes import no_loops, shapes_of_recurrent_layers
from fxfib.refusals import preserved, refuse_unsupported, unwrap

OLDEST_OPSET = 18
DEFAULT_OPSET = 20
# Protocol buffers hold at most 2 GiB; the graph itself needs some of it.
_LARGEST_FILE = 2**31 - 2**26


@dataclass(frozen=True)
class OnnxReport:
    """What was written, and how far ONNX Runtime is from torch on the example inputs.

    Attributes:
        path: of the model file; its weights are in `path + ".data"` if `external_data`.
        opset: version of the ONNX operators.
        bytes: size on disk, external data included.
        inputs, outputs: names, in order.
        error: largest absolute difference of any output; None if not verified.
        relative_error: the same over the largest absolute value of that output.
        batch_sizes: what was run: the example's, and another where the batch is dynamic.
        dynamic_axes: axes of the inputs that are free in the file, as `name[axis]`.
        external_data: whether the weights are in a file of their own.
    """

    path: str
    opset: int
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    error: float | None
    relative_error: float | None
    batch_sizes: tuple[int, ...]
    dynamic_axes: tuple[str, ...]
    external_data: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers, strings and lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def __str__(self) -> str:
        weights = ", weights in a .data file beside it" if self.external_data else ""
        lines = [f"{self.path}: opset {self.opset}, {self.bytes:,} bytes{weights}"]
        lines.append(f"  {', '.join(self.inputs)} -> {', '.join(self.outputs)}")
        if self.error is None:
            lines.append("  not verified")
        else:
            batches = " and ".join(str(size) for size in self.batch_sizes)
            lines.append(
                f"  ONNX Runtime against torch: {self.error:.2g} absolute, "
                f"{self.relative_error:.2g} relative (batch size {batches})"
            )
        return "\n".join(lines)


def export_onnx(
    module: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    opset: int | None = None,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    verify: bool = True,
    external_data: bool | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> OnnxReport:
    """Writes `module` as an ONNX file that computes what it computes in eval mode.

    The file appears under its name only when it is complete and checked; the same module gives the
    same bytes.  The module is left as it was.

    Args:
        module: any `nn.Module`, compiled or not.
        path: of the file; its folder must exist.
        example_inputs: as for `fxfib.compile`.
        example_kwargs: as for `fxfib.compile`.
        opset: 18 or newer; 20 if None.
        dynamic_batch: leave the first axis of every tensor input free where the model allows it.
        dynamic_shapes: further free axes, as for `fxfib.compile`; None: those that a compiled
            module was captured with.
        verify: run the file in ONNX Runtime, on the example inputs and on others of every free
            size.
        external_data: weights in a file of their own; None decides by the 2 GB limit.
        input_names: of the tensor inputs in order; None takes those of `forward`.
        output_names: of the tensor outputs in order; None takes dict keys and dataclass fields.

    Raises:
        InputError: an opset too old or unknown to the exporter, names that do not fit.
        CaptureError: the module does not run on the example inputs.
        ExportError: torch cannot express it, the file cannot be written, or its outputs differ
            from torch's by more than the tolerance of the dtype.
    """
    opset = DEFAULT_OPSET if opset is None else opset
    if isinstance(opset, bool) or not isinstance(opset, int):
        raise InputError(f"opset must be a whole number, not {opset!r}.")
    if opset < OLDEST_OPSET:
        raise InputError(f"opset {opset} is too old; the oldest that can be written is 18.")
    model = unwrap(module)
    args, kwargs = normalize_inputs(model, example_inputs, example_kwargs)
    refuse_unsupported(model, empty=True)
    axes = asked_axes(model, args, kwargs, dynamic_shapes)
    target = Path(path)
    with preserved(model), torch.no_grad(), staging_folder(target) as folder:
        model.eval()
        with quiet():
            flat = FlatModule(model, args, kwargs, axes)
            ours = _names(input_names, flat.input_names, "input")
            theirs = _names(output_names, flat.output_names, "output")
            if set(ours) & set(theirs):
                theirs = [f"{name}_out" if name in ours else name for name in theirs]
            proto_model, more_sizes, tries = _export(flat, opset, dynamic_batch, verify)
        if (written := proto_model.opset_imports.get("")) != opset:
            # The exporter goes back to one that it knows, and says so in a log alone.
            raise InputError(f"opset {opset} cannot be written; the exporter offers {written}.")
        _tidy(proto_model, ours, theirs)
        free_axes = tuple(
            f"{value.name}[{axis}]"
            for value in proto_model.graph.inputs
            for axis, size in enumerate(value.shape)
            if not isinstance(size, int)
        )
        external = _external(proto_model, external_data)
        staged = folder / target.name
        _write(proto_model, staged, external)
        result: Difference | None = None
        sizes: tuple[int, ...] = ()
        if verify:
            with quiet():
                result, sizes = verify_in_onnx_runtime(
                    staged, flat, ours, theirs, more_sizes, tries
                )
        size = sum(file.stat().st_size for file in folder.iterdir())
        data = folder / f"{target.name}.data"
        if external:
            move_into_place(data, target.with_name(data.name))
        move_into_place(staged, target)
    return OnnxReport(
        path=str(path),
        opset=opset,
        bytes=size,
        inputs=tuple(ours),
        outputs=tuple(theirs),
        error=None if result is None else result.absolute,
        relative_error=None if result is None else result.relative,
        batch_sizes=sizes,
        dynamic_axes=free_axes,
        external_data=external,
    )


def _names(given: Sequence[str] | None, found: list[str], kind: str) -> list[str]:
    if given is None:
        return found
    names = list(given)
    if len(names) != len(found) or len(set(names)) != len(names):
        raise InputError(
            f"{kind}_names must be {len(found)} different names (one per tensor), not {names}."
        )
    return names


def _export(
    flat: FlatModule, opset: int, dynamic_batch: bool, verify: bool
) -> tuple[Any, tuple[int, ...], list[dict[tuple[int, int], int]]]:
    """The model as an `onnx_ir.Model`, and batch and other sizes at which it has to be checked."""
    examples: tuple[Any, ...] = flat.examples
    wide = repeat_batch(examples, {})[0]
    attempts = [(wide, dynamic_batch)] + ([(examples, False)] if dynamic_batch else [])
    failure: Exception | None = None
    for tensors, dynamic in attempts:
        shapes = tuple(
            (({0: torch.export.Dim.AUTO} if dynamic and tensor.ndim else {}) | asked) or None
            for tensor, asked in zip(tensors, flat.axes, strict=True)
        )
        try:
            with shapes_of_recurrent_layers():
                program = torch.export.export(
                    flat, clone_inputs(tensors), dynamic_shapes=(shapes,), strict=False
                )
            if fixed := fixed_despite(program, flat.axes):
                raise ExportError("; ".join(fixed))
            sizes = doubtful_sizes(program, flat.axes) if dynamic else ()
            if sizes is None or (sizes and not verify):
                continue
            # All recurrent layers are translated whole, so shapes will do here too.
            with shapes_of_recurrent_layers(), no_loops():
                exported = torch.onnx.export(
                    program,
                    dynamo=True,
                    opset_version=opset,
                    verbose=False,
                    optimize=True,
                    custom_translation_table=TRANSLATIONS,
                )
            return exported.model, sizes, trials(program, flat.axes)  # type: ignore[union-attr]
        except Exception as error:  # the exporter raises anything
            failure = error
    name = type(flat.module).__name__
    raise ExportError(f"{name} cannot be written as ONNX: {first_line(failure)}") from failure


def _tidy(model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Names that a user knows, and no paths of the machine it was made on."""
    graph = model.graph
    model.metadata_props.clear()
    model.doc_string = None
    for part in (graph, *model.functions.values()):
        part.metadata_props.clear()
        part.doc_string = None
        for node in part.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
                value.doc_string = None
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    reserved = {*inputs, *outputs}
    values = [value for node in graph.all_nodes() for value in node.outputs]
    taken = {value.name for value in (*values, *graph.inputs, *graph.initializers.values())}
    for value in (*graph.inputs, *values):
        if value.name in reserved:
            value.name = _unused(value.name, taken | reserved)
            taken.add(value.name)
    for value in list(graph.initializers.values()):
        name = value.name.removeprefix("module.")
        if name != value.name and (name in reserved or name not in taken):
            value.name = _unused(name, taken | reserved) if name in reserved else name
            taken.add(value.name)
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name
    for value, name in zip(graph.outputs, outputs, strict=True):
        value.name = name


def _unused(name: str, taken: set[str]) -> str:
    count = 1
    while f"{name}_{count}" in taken:
        count += 1
    return f"{name}_{count}"


def _external(model: Any, asked: bool | None) -> bool:
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    if asked is None:
        return bool(size > _LARGEST_FILE)
    if not asked and size > _LARGEST_FILE:
        raise ExportError(
            f"the weights ({size:,} bytes) do not fit one ONNX file, which holds 2 GB; "
            "leave external_data at None."
        )
    return asked


def _write(model: Any, staged: Path, external: bool) -> None:
    import onnx
    import onnx_ir

    onnx_ir.save(model, staged, external_data=f"{staged.name}.data" if external else None)
    try:
        onnx.checker.check_model(str(staged), full_check=False)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the exported ONNX model is not valid: {first_line(error)}") from error
