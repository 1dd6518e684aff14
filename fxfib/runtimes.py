"""The runtimes in which a model can be timed: one call without arguments for each."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxfib.errors import InputError
from fxfib.exporting import quiet
from fxfib.onnx_check import to_numpy
from fxfib.timing import Call

RUNTIMES = ("torch", "torch.compile", "onnxruntime")

Runner = Callable[[Any, Any], Call]


@contextlib.contextmanager
def opened(
    runtime: str, module: nn.Module, examples: tuple[Any, Any], place: str, threads: int
) -> Iterator[Runner]:
    """Gives a function that makes, of positional and keyword arguments, a call of the module.

    Args:
        runtime: one of ``RUNTIMES``.
        module: in eval mode, on the device.
        examples: positional and keyword arguments that it takes, to export it with.
        place: ``"cpu"`` or ``"cuda"``.
        threads: of ONNX Runtime; torch takes those it has.

    Raises:
        InputError: the runtime cannot run there.
        as :func:`fxfib.export_onnx`.
    """
    if runtime == "onnxruntime":
        with tempfile.TemporaryDirectory() as folder:
            yield _onnx_runner(module, examples, place, threads, Path(folder))
        return
    run: Any = module if runtime == "torch" else torch.compile(module, dynamic=False)

    def runner(args: Any, kwargs: Any) -> Call:
        if runtime == "torch.compile":
            with quiet():
                run(*args, **kwargs)
        return lambda: run(*args, **kwargs)

    yield runner


def _onnx_runner(
    module: nn.Module, examples: tuple[Any, Any], place: str, threads: int, folder: Path
) -> Runner:
    import onnxruntime  # type: ignore[import-untyped]

    from fxfib.onnx import export_onnx

    args, kwargs = on_device(place, examples)
    with torch.inference_mode(False):
        # Outputs are compared by the caller, in the very session that is timed.
        report = export_onnx(module, folder / "model.onnx", args, kwargs, verify=False)
    session = onnx_session(report.path, place, threads)
    kept = {entry.name for entry in session.get_inputs()}

    def runner(args: Any, kwargs: Any) -> Call:
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        feed = {n: to_numpy(t) for n, t in zip(report.inputs, leaves, strict=True) if n in kept}
        if place == "cpu":
            return lambda: session.run(list(report.outputs), feed)
        binding = session.io_binding()
        for name, value in feed.items():
            binding.bind_ortvalue_input(
                name, onnxruntime.OrtValue.ortvalue_from_numpy(value, "cuda", 0)
            )
        for name in report.outputs:
            binding.bind_output(name, "cuda")

        def call() -> Any:
            session.run_with_iobinding(binding)
            return binding.copy_outputs_to_cpu

        return call

    return runner


def onnx_session(model: str | bytes, place: str, threads: int, **entries: Any) -> Any:
    """A session of ONNX Runtime whose threads do not spin, so that times repeat.

    Args:
        model: a path, or the bytes of a file.
        place: ``"cpu"`` or ``"cuda"``.
        threads: of one operator.
        entries: further attributes of ``onnxruntime.SessionOptions``.

    Raises:
        InputError: ONNX Runtime has no provider for that place, or cannot start it.
    """
    import onnxruntime

    wanted = "CPUExecutionProvider" if place == "cpu" else "CUDAExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise InputError(f"ONNX Runtime has no {wanted} here")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, value in entries.items():
        setattr(options, name, value)
    session = onnxruntime.InferenceSession(model, options, providers=[wanted])
    if wanted not in session.get_providers():
        raise InputError(f"ONNX Runtime cannot start its {wanted} here")
    return session


def plain_outputs(outputs: Any) -> list[Any]:
    """Tensors on the CPU, whatever runtime made them."""
    from fxfib.onnx_flat import as_dicts

    if callable(outputs):
        outputs = outputs()
    leaves = pytree.tree_leaves(as_dicts(outputs))
    return [
        leaf.detach().cpu() if isinstance(leaf, Tensor) else torch.from_numpy(leaf.copy())
        for leaf in leaves
        if hasattr(leaf, "shape")
    ]


def with_batch(examples: tuple[Any, Any], own: int, size: int) -> tuple[Any, Any]:
    """The examples with their rows repeated or cut."""

    def resized(tensor: Tensor) -> Tensor:
        if not tensor.ndim or tensor.shape[0] != own or own == size:
            return tensor
        return tensor[torch.arange(size, device=tensor.device) % own]

    resized_examples: tuple[Any, Any] = pytree.tree_map_only(Tensor, resized, examples)
    return resized_examples


def on_device(place: str, examples: tuple[Any, Any]) -> tuple[Any, Any]:
    """Copies of the examples on a device."""
    moved: tuple[Any, Any] = pytree.tree_map_only(
        Tensor, lambda tensor: tensor.detach().to(place).clone(), examples
    )
    return moved
