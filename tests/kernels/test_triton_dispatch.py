"""Which implementation runs, and what is said where it is not the expected one."""

import logging
import subprocess
import sys

import pytest
import torch

from fxfib.errors import InputError
from fxfib.kernels import collapse, dispatch
from fxfib.kernels.dispatch import Backend, backend_of


class OnGpu:
    """As much of a CUDA tensor as the decision looks at."""

    device = torch.device("cuda", 0)

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    caches = (dispatch._import_problem, dispatch._device_problem, dispatch._warn_once)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def pretend(monkeypatch, capability=(9, 0), interpreted=False, problem=None):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old Card")
    monkeypatch.setattr(dispatch, "interprets", lambda: interpreted)
    monkeypatch.setattr(dispatch, "_import_problem", lambda: problem)
    monkeypatch.setenv("CC", "cc")


def test_cpu_tensors_are_vectorised(monkeypatch):
    assert backend_of(torch.ones(1)).name == "vectorised"
    assert "cpu" in backend_of(torch.ones(1)).reason
    monkeypatch.setenv(dispatch.VARIABLE, "vectorised")
    assert backend_of(OnGpu()) == Backend("vectorised", "FXFIB_KERNELS=vectorised.")


def test_gpu_tensors_have_triton(monkeypatch):
    pretend(monkeypatch)
    assert backend_of(OnGpu()).name == "triton"
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    assert backend_of(OnGpu()) == Backend("triton", "FXFIB_KERNELS=triton.")


@pytest.mark.parametrize(
    ("changes", "dtype", "words"),
    [
        ({"capability": (7, 5)}, torch.float32, "Old Card has compute capability 7.5"),
        ({"problem": "triton cannot be imported (x)"}, torch.float32, "cannot be imported"),
        ({}, torch.float8_e5m2, "no Triton kernels for torch.float8_e5m2"),
        ({"compiler": False}, torch.float32, "needs a C compiler"),
    ],
)
def test_obstacles_are_named_once(monkeypatch, caplog, changes, dtype, words):
    changes = dict(changes)
    compiler = changes.pop("compiler", True)
    pretend(monkeypatch, **changes)
    if not compiler:
        monkeypatch.delenv("CC")
        monkeypatch.setattr(dispatch.shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING, "fxfib.kernels"):
        for _ in range(3):
            backend = backend_of(OnGpu(dtype))
            assert backend.name == "vectorised"
            assert words in backend.reason
    assert [words in message for message in caplog.messages] == [True]
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(InputError, match=r"FXFIB_KERNELS=triton cannot be followed"):
        backend_of(OnGpu(dtype))


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    pretend(monkeypatch)
    with pytest.raises(InputError, match="TRITON_INTERPRET=1"):
        collapse(torch.ones(2, 3), torch.tensor([0, 0, 1]), 2)
    pretend(monkeypatch, interpreted=True)
    assert backend_of(torch.ones(1)).name == "triton"


def test_unknown_wishes_are_refused(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(InputError, match="'cuda'"):
        backend_of(torch.ones(1))


def test_triton_is_not_needed_and_not_imported():
    program = """
import sys
sys.modules["triton"] = None
import torch
from fxfib.kernels import collapse, color, merge
from fxfib.kernels.dispatch import _import_problem
weight = torch.tensor([[1.0, 2.0, 1.0]])
labels = color(weight.t()).labels
assert collapse(weight, labels, 2).tolist() == [[2.0, 2.0]]
assert merge(weight, labels, 2, axis=1).tolist() == [[1.0, 2.0]]
assert "triton" in _import_problem()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
