"""Which implementation runs for a tensor, and why: decided here and nowhere else."""

import logging
import os
import shutil
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from fxfib.errors import InputError

VARIABLE = "FXFIB_KERNELS"

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OLDEST_CAPABILITY = (8, 0)
_log = logging.getLogger("fxfib.kernels")


@dataclass(frozen=True)
class Backend:
    """The implementation for one tensor.

    Attributes:
        name: ``"vectorised"`` (numpy, scipy and plain torch) or ``"triton"``.
        reason: why, in words; for ``"vectorised"`` on a GPU, what keeps Triton from running.
    """

    name: Literal["vectorised", "triton"]
    reason: str


def backend_of(tensor: Tensor) -> Backend:
    """Triton for tensors on a CUDA (or ROCm) device, the vectorised code for all others.

    The environment variable ``FXFIB_KERNELS`` may say ``vectorised`` or ``triton`` instead.  Triton
    on a CPU tensor means Triton's interpreter, which is slow and there for tests; it needs
    ``TRITON_INTERPRET=1`` before triton is imported.  Where a CUDA tensor cannot have Triton, the
    reason is logged once, as a warning of the logger ``fxfib.kernels``.

    Args:
        tensor: floating point, on any device.

    Returns:
        The backend and why it was chosen.

    Raises:
        InputError: ``FXFIB_KERNELS`` has an unknown value, or asks for Triton where it cannot run.
    """
    wish = os.environ.get(VARIABLE, "")
    if wish == "vectorised":
        return Backend("vectorised", f"{VARIABLE}=vectorised.")
    if wish not in ("", "triton"):
        raise InputError(f"{VARIABLE} must be 'vectorised' or 'triton', not {wish!r}.")
    if not wish and tensor.device.type != "cuda":
        return Backend("vectorised", f"the tensor is on {tensor.device}, not on a CUDA device.")
    obstacle = _obstacle(tensor)
    if obstacle is None:
        return Backend("triton", f"{VARIABLE}=triton." if wish else "the tensor is on a GPU.")
    if wish:
        raise InputError(f"{VARIABLE}=triton cannot be followed: {obstacle}.")
    _warn_once(obstacle)
    return Backend("vectorised", f"{obstacle}.")


def _obstacle(tensor: Tensor) -> str | None:
    """What keeps Triton from working on this tensor, or None."""
    if tensor.dtype not in _DTYPES:
        return f"there are no Triton kernels for {tensor.dtype}"
    problem = _import_problem()
    if problem is not None:
        return problem
    interpreted = interprets()
    if tensor.device.type == "cuda":
        return None if interpreted else _device_problem(tensor.device.index or 0)
    if tensor.device.type != "cpu":
        return f"Triton kernels run on CUDA devices, not on {tensor.device}"
    if not interpreted:
        return (
            "the tensor is on the CPU, where only Triton's interpreter runs; it needs "
            "TRITON_INTERPRET=1 in the environment before triton is imported"
        )
    return None


def interprets() -> bool:
    """Whether triton was imported with its interpreter on; kernels are then plain Python.

    Triton decides when a kernel is decorated, its own library at import included, so the variable
    alone does not tell.
    """
    import triton.language

    return type(triton.language.sum).__name__ == "InterpretedFunction"


@cache
def _import_problem() -> str | None:
    try:
        import triton.language  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


@cache
def _device_problem(index: int) -> str | None:
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(index)
        if capability < _OLDEST_CAPABILITY:
            return (
                f"{torch.cuda.get_device_name(index)} has compute capability "
                f"{capability[0]}.{capability[1]}, and Triton needs "
                f"{_OLDEST_CAPABILITY[0]}.{_OLDEST_CAPABILITY[1]}"
            )
    # Triton builds the launcher of every kernel on the user's machine.
    if not os.environ.get("CC") and not shutil.which("gcc") and not shutil.which("clang"):
        return "Triton needs a C compiler, and neither CC nor gcc nor clang is there"
    return None


@cache
def _warn_once(obstacle: str) -> None:
    _log.warning("Tensors on the GPU take the slower path without Triton: %s.", obstacle)
