"""Proof on the spot: the original and the result, on the user's own inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

#: Largest relative error (against the largest absolute output) of an exact compile.  One table.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


@dataclass(frozen=True)
class Difference:
    """How far two lists of outputs are apart.

    Attributes:
        absolute: largest absolute difference; infinite where structures, NaN or integers differ.
        relative: the same over the largest absolute value of the same output.
    """

    absolute: float
    relative: float


@contextlib.contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """On CUDA torch lets convolutions round float32 to ten bits (TF32), which is more than an exact
    result may differ by: not in here.  Elsewhere nothing of torch is touched.
    """
    if not any(parameter.is_cuda for parameter in model.parameters()):
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def difference(expected: Sequence[Any], found: Sequence[Any]) -> Difference:
    """Compare outputs leaf by leaf; integers and booleans must be equal."""
    infinite = Difference(float("inf"), float("inf"))
    if len(expected) != len(found):
        return infinite
    absolute = relative = 0.0
    for a, b in zip(expected, found, strict=True):
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            if a != b:
                return infinite
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return infinite
        if not (a.dtype.is_floating_point or a.dtype.is_complex):
            if not torch.equal(a, b):
                return infinite
            continue
        if a.numel() == 0:
            continue
        wide = torch.complex128 if a.dtype.is_complex else torch.float64
        wide_a, wide_b = a.to(wide), b.to(wide)
        finite = torch.isfinite(wide_a)
        if not torch.equal(finite, torch.isfinite(wide_b)):
            return infinite
        if not torch.equal(wide_a[~finite].nan_to_num(), wide_b[~finite].nan_to_num()):
            return infinite
        if not finite.any():
            continue
        gap = float((wide_a[finite] - wide_b[finite]).abs().max())
        size = float(wide_a[finite].abs().max())
        absolute = max(absolute, gap)
        relative = max(relative, gap / size if size > 0 else (0.0 if gap == 0 else float("inf")))
    return Difference(absolute, relative)


class Float64(fx.Interpreter):
    """Runs a captured graph in float64: parameters are widened one by one, where they are used."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The call on wide operands; a dtype among the arguments is wide too."""
        args, kwargs = torch.utils._pytree.tree_map(_wide, (args, kwargs))
        return super().call_function(target, args, kwargs)


def _wide(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
        return value.to(torch.float64)
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value


def run_float64(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Flat outputs of a captured graph computed in float64 throughout."""
    with torch.no_grad():
        result = Float64(graph_module).run(*inputs)
    return tuple(_wide(value) for value in result)
