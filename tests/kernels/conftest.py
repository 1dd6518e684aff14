"""One test body for every implementation: the fixture `on`."""

import importlib.util
from collections.abc import Callable, Iterator

import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


def moved(value, device):
    """Tensors, also inside lists, tuples and dictionaries, on another device; strides are kept."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(moved(part, device) for part in value)
    if isinstance(value, dict):
        return {name: moved(part, device) for name, part in value.items()}
    return value


@pytest.fixture
def filled_memory(monkeypatch) -> Iterator[None]:
    """Fresh memory holds NaN or a large number, so that a cell nobody writes is seen."""
    real = torch.empty

    def empty(*shape, **options):
        tensor = real(*shape, **options)
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        if tensor.is_floating_point():
            return tensor.fill_(torch.nan)
        return tensor.fill_(torch.iinfo(tensor.dtype).max // 3)

    monkeypatch.setattr(torch, "empty", empty)
    yield


@pytest.fixture
def on_triton(monkeypatch, filled_memory) -> Callable:
    """``on_triton(function)`` runs it on the GPU, or in Triton's interpreter where there is none.

    Arguments go to the device, results come back to the CPU.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setenv("FXFIB_KERNELS", "triton")

    def on(function):
        def call(*arguments, **options):
            return moved(function(*moved(arguments, device), **moved(options, device)), "cpu")

        return call

    return on


@pytest.fixture(params=["vectorised", pytest.param("triton", marks=needs_triton)])
def on(request, monkeypatch) -> Callable:
    """``on(function)`` is the function with the vectorised code, then with Triton."""
    if request.param == "triton":
        return request.getfixturevalue("on_triton")
    monkeypatch.setenv("FXFIB_KERNELS", "vectorised")
    return lambda function: function
