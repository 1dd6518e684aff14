"""Whether an ONNX file computes what a module computes, in ONNX Runtime."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxfib.errors import ExportError
from fxfib.exporting import clone_inputs
from fxfib.free_sizes import resized
from fxfib.onnx_flat import FlatModule
from fxfib.passes.verify import TOLERANCE, Difference, difference


def verify_in_onnx_runtime(
    staged: Path,
    flat: FlatModule,
    inputs: Sequence[str],
    outputs: Sequence[str],
    more_sizes: Sequence[int] = (),
    tries: Sequence[Mapping[tuple[int, int], int]] = (),
) -> tuple[Difference, tuple[int, ...]]:
    """Runs the file on the example inputs and, where the batch is free, on one example more.

    Args:
        staged: the ONNX file.
        flat: what it was made from.
        inputs: names of the file's inputs, one per tensor of `flat.examples`.
        outputs: names of its outputs.
        more_sizes: batch sizes to run as well.
        tries: other sizes of free axes to run as well, where the module itself takes them.

    Returns:
        The worst difference of any output, and the batch sizes that were run.

    Raises:
        ExportError: it does not load or run, or differs by more than the tolerance of the dtype.
    """
    import onnxruntime  # type: ignore[import-untyped]

    device = next((t.device for t in (*flat.parameters(), *flat.examples)), torch.device("cpu"))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, "CUDAExecutionProvider")
    try:
        session = onnxruntime.InferenceSession(str(staged), options, providers=providers)
    except Exception as error:  # onnxruntime's own classes derive from Exception alone
        raise ExportError(f"ONNX Runtime cannot load the model: {first_line(error)}") from error
    kept = {entry.name: entry for entry in session.get_inputs()}
    batches = [flat.examples, *_other_sizes(flat, tries)]
    free = [
        name in kept and tensor.ndim > 0 and not isinstance(kept[name].shape[0], int)
        for name, tensor in zip(inputs, flat.examples, strict=True)
    ]
    if flat.examples and free[0]:
        size = flat.examples[0].shape[0]
        others = sorted({size + 1, *more_sizes} - {size})
        batches += [_another_batch(flat.examples, free, other) for other in others]
    worst = Difference(0.0, 0.0)
    sizes = []
    for tensors in batches:
        size = int(tensors[0].shape[0]) if tensors and tensors[0].ndim else 1
        sizes += [size] if size not in sizes else []
        expected = [tensor.cpu() for tensor in flat(*clone_inputs(tensors))]
        feed = {
            name: to_numpy(tensor)
            for name, tensor in zip(inputs, tensors, strict=True)
            if name in kept
        }
        try:
            values = session.run(list(outputs), feed)
        except Exception as error:
            raise ExportError(f"ONNX Runtime cannot run the model: {first_line(error)}") from error
        found = [
            torch.from_numpy(value.copy()).reshape(tensor.shape).to(tensor.dtype)
            if value.shape == tuple(tensor.shape)
            else torch.empty(value.shape)
            for value, tensor in zip(values, expected, strict=True)
        ]
        gap = difference(expected, found)
        worst = Difference(max(worst.absolute, gap.absolute), max(worst.relative, gap.relative))
        dtypes = [t.dtype for t in (*expected, *flat.parameters()) if t.is_floating_point()]
        tolerance = max((TOLERANCE.get(dtype, 1e-4) for dtype in dtypes), default=0.0)
        if gap.relative > tolerance:
            advice = "; export with dynamic_batch=False" if len(sizes) > 1 else ""
            shapes = " and ".join("x".join(map(str, tensor.shape)) for tensor in tensors)
            raise ExportError(
                f"the ONNX model differs from torch by {gap.relative:.2g} of the largest output "
                f"at batch size {size} ({shapes}; tolerance {tolerance:.0e}), so nothing was "
                f"written{advice}."
            )
    return worst, tuple(sizes)


def _other_sizes(
    flat: FlatModule, tries: Sequence[Mapping[tuple[int, int], int]]
) -> Iterator[tuple[Tensor, ...]]:
    for sizes in tries:
        tensors = tuple(resized(list(flat.examples), sizes))
        try:
            flat(*clone_inputs(tensors))
        except Exception:  # the user's own model says no in its own way
            continue
        yield tensors


def _another_batch(
    examples: tuple[Tensor, ...], free: Sequence[bool], size: int
) -> tuple[Tensor, ...]:
    """Another number of examples, in another order, in every input whose batch is free."""
    before = examples[0].shape[0]
    rows = torch.arange(size).flip(0) % before
    return tuple(
        tensor[rows.to(tensor.device)] if is_free and tensor.shape[0] == before else tensor
        for tensor, is_free in zip(examples, free, strict=True)
    )


def to_numpy(tensor: Tensor) -> Any:
    """The values as ONNX Runtime takes them."""
    tensor = tensor.detach().cpu()
    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def first_line(error: BaseException | None) -> str:
    """The first line of the innermost cause: exporters wrap it in advice to their authors."""
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip()
