"""What is checked first: models that cannot be compiled, refused by name and in words."""

import copy
import keyword
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxfib.errors import RefusedError

_QUANTIZED_PACKAGES = (
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.quantized",
    "torch.nn.quantized",
)

# They wait in floating-point models for a quantization that has not happened.
_STILL_FLOAT = ("FloatFunctional", "FXFloatFunctional")


def unwrap(model: Any) -> nn.Module:
    """The module inside `torch.compile`, `DataParallel` and `DistributedDataParallel` wrappers.

    Raises:
        RefusedError: `model` is not an `nn.Module`, or is TorchScript.
    """
    while True:
        if isinstance(model, torch.jit.ScriptModule):
            raise RefusedError(
                f"{type(model).__name__} is TorchScript, whose Python code is gone; "
                "give the original nn.Module instead."
            )
        if not isinstance(model, nn.Module):
            raise RefusedError(
                f"expected an nn.Module, got {type(model).__name__}; "
                "give the model itself, not a function or a state_dict."
            )
        if isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def refuse_unsupported(model: nn.Module, *, empty: bool = False) -> None:
    """Refuses models that no capture could make sense of, in one sentence that names the culprit.

    Args:
        model: is only read.
        empty: whether a model without parameters may pass.

    Raises:
        RefusedError: no parameters, uninitialised, quantized, on the meta device, sparse, complex,
            a tensor subclass, NaN/Inf in a floating tensor (but for minus infinity in a buffer),
            or a name that is a keyword of Python.
    """
    for path, module in model.named_modules():
        _refuse_name(path)
        cls = type(module)
        if cls.__module__.startswith(_QUANTIZED_PACKAGES) and cls.__name__ not in _STILL_FLOAT:
            raise RefusedError(
                f"{path or 'the model'} is a quantized {type(module).__name__}; "
                "compile the floating-point model first and quantize the result."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise RefusedError(f"{path} is TorchScript; give the original nn.Module instead.")
    found = False
    for kind, tensors in (
        ("parameter", model.named_parameters()),
        ("buffer", model.named_buffers()),
    ):
        for name, tensor in tensors:
            _refuse_name(name)
            found = found or kind == "parameter" or tensor.is_floating_point()
            _refuse_tensor(kind, name, tensor)
    if not found and not empty:
        raise RefusedError(
            f"{type(model).__name__} has no parameters, so there is nothing to compile "
            "(an empty module)."
        )


def _refuse_name(path: str) -> None:
    """torch.fx writes `self.in(x)` for a module called "in", and Python cannot read that."""
    word = next((part for part in path.split(".") if keyword.iskeyword(part)), None)
    if word is not None:
        raise RefusedError(
            f"the name {path} holds {word!r}, a word of Python's own, which torch.fx cannot write; "
            "rename that module."
        )
    if any(character in path for character in '"\\\n\r'):
        raise RefusedError(
            f"the name {path!r} holds a quote, a backslash or a line break, which torch.fx cannot "
            "write; rename that module."
        )


def refuse_inference(model: nn.Module) -> None:
    """Refuse tensors that autograd does not know: ``torch.export`` cannot read them.

    Raises:
        RefusedError: a parameter or buffer was made in inference mode.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise RefusedError(
                f"{name} was made in torch.inference_mode(), where nothing can be trained or "
                "exported; make or load the model outside, or give copy.deepcopy(model)."
            )


def _refuse_tensor(kind: str, name: str, tensor: Tensor) -> None:
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        raise RefusedError(f"{kind} {name} is not initialised; run the lazy model once first.")
    if tensor.is_quantized:
        raise RefusedError(
            f"{kind} {name} is quantized; compile the floating-point model and quantize the result."
        )
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        raise RefusedError(
            f"{kind} {name} is a {type(tensor).__name__}, a tensor subclass; "
            "only plain tensors can be compiled."
        )
    if tensor.is_meta:
        raise RefusedError(
            f"{kind} {name} is on the meta device and has no values; load the weights first."
        )
    if tensor.layout != torch.strided:
        raise RefusedError(f"{kind} {name} is sparse ({tensor.layout}); make it dense first.")
    if tensor.is_complex():
        raise RefusedError(f"{kind} {name} is complex ({tensor.dtype}), which is not supported.")
    if tensor.is_floating_point() and not _all_finite(tensor):
        if kind == "buffer" and bool((tensor < torch.inf).all()):
            return  # minus infinity is what a mask of scores holds
        raise RefusedError(f"{kind} {name} holds NaN or Inf; a trained model has finite weights.")


def _all_finite(tensor: Tensor) -> bool:
    # One pass and no boolean copy of the weights: a sum is finite unless some entry is not (or it
    # overflows, which the second, exact test then settles).
    tensor = tensor.detach()
    if tensor.dtype.itemsize == 1:  # float8 has no reductions of its own
        tensor = tensor.to(torch.float32)
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Gives back `model` (attributes, hooks, mode, buffers) and every random state as they were."""
    modules = [(module, _shallow(vars(module))) for module in model.modules()]
    buffers = [(buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers()]
    python_state = random.getstate()
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    numpy_state = numpy_random.get_state() if numpy_random is not None else None
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(python_state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)
        for module, attributes in modules:
            vars(module).clear()
            vars(module).update(attributes)
        with torch.no_grad():
            for buffer, version, value in buffers:
                if buffer._version != version:
                    buffer.copy_(value)


def _shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    return {
        key: copy.copy(value) if type(value) in (dict, list, set) else value
        for key, value in attributes.items()
    }
