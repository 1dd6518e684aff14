"""Finds the fibers of a trained PyTorch model and merges each into one unit.

`compile` is the whole tool; `color` only looks; `lift` is the inverse.  The names below are loaded
at first use, so that `import fxfib` does not wait for torch.
"""

from importlib import import_module
from typing import Any

from fxfib._version import __version__

_HOME = {
    "color": "fxfib.api",
    "compile": "fxfib.api",
    "export_onnx": "fxfib.onnx",
    "lift": "fxfib.lift",
    "load": "fxfib.serialize",
    "save": "fxfib.serialize",
    "Report": "fxfib.report",
}
_ERRORS = (
    "CaptureError",
    "ExportError",
    "FxfibError",
    "InputError",
    "LoadError",
    "RefusedError",
    "VerifyError",
)
_HOME.update(dict.fromkeys(_ERRORS, "fxfib.errors"))

__all__ = ["__version__", "errors", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it."""
    if name == "errors":
        return import_module("fxfib.errors")
    if name not in _HOME:
        raise AttributeError(f"module 'fxfib' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # found at once next time, and wins over a sub-module of the same name
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
