"""Finds the fibers of a trained PyTorch model and merges each into one unit.

`compile` is the whole tool; `color` only looks; `lift` is the inverse.  The names below are loaded
at first use, so that `import fxfib` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fxfib._version import __version__

if TYPE_CHECKING:  # what `__getattr__` below loads, for editors and type checkers
    from fxfib import errors
    from fxfib.api import color, compile
    from fxfib.baselines import ContinualBackpropagation, ShrinkAndPerturb
    from fxfib.benchmarking import Benchmark, benchmark
    from fxfib.breaking import SymmetryBreaker
    from fxfib.curve import CurvePoint, eps_curve
    from fxfib.dynamo import backend
    from fxfib.errors import (
        CaptureError,
        ExportError,
        FxfibError,
        InputError,
        LoadError,
        RefusedError,
        VerifyError,
    )
    from fxfib.lifting import lift
    from fxfib.monitor import Monitor
    from fxfib.onnx import export_onnx
    from fxfib.report import Report
    from fxfib.retuning import finetune, retune
    from fxfib.serialize import load, save
    from fxfib.synchronized import Synchrony, synchrony
    from fxfib.theorems import Theorems, check
    from fxfib.tuning import tune
    from fxfib.widths import Widths, measure_widths

_HOME = {
    "ContinualBackpropagation": "fxfib.baselines",
    "ShrinkAndPerturb": "fxfib.baselines",
    "SymmetryBreaker": "fxfib.breaking",
    "Monitor": "fxfib.monitor",
    "Synchrony": "fxfib.synchronized",
    "synchrony": "fxfib.synchronized",
    "Theorems": "fxfib.theorems",
    "Benchmark": "fxfib.benchmarking",
    "benchmark": "fxfib.benchmarking",
    "backend": "fxfib.dynamo",
    "check": "fxfib.theorems",
    "color": "fxfib.api",
    "compile": "fxfib.api",
    "CurvePoint": "fxfib.curve",
    "eps_curve": "fxfib.curve",
    "export_onnx": "fxfib.onnx",
    "lift": "fxfib.lifting",
    "load": "fxfib.serialize",
    "save": "fxfib.serialize",
    "finetune": "fxfib.retuning",
    "retune": "fxfib.retuning",
    "tune": "fxfib.tuning",
    "Report": "fxfib.report",
    "Widths": "fxfib.widths",
    "measure_widths": "fxfib.widths",
}

__all__ = [
    "Benchmark",
    "CaptureError",
    "ContinualBackpropagation",
    "CurvePoint",
    "ExportError",
    "FxfibError",
    "InputError",
    "LoadError",
    "Monitor",
    "RefusedError",
    "Report",
    "ShrinkAndPerturb",
    "SymmetryBreaker",
    "Synchrony",
    "Theorems",
    "VerifyError",
    "Widths",
    "__version__",
    "backend",
    "benchmark",
    "check",
    "color",
    "compile",
    "eps_curve",
    "errors",
    "export_onnx",
    "finetune",
    "lift",
    "load",
    "measure_widths",
    "retune",
    "save",
    "synchrony",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it."""
    if name == "errors":
        return import_module("fxfib.errors")
    if name not in __all__:
        raise AttributeError(f"module 'fxfib' has no attribute {name!r}")
    value = getattr(import_module(_HOME.get(name, "fxfib.errors")), name)
    globals()[name] = value  # found at once next time
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
