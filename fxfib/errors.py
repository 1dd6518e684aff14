"""Every error that fxfib raises on purpose.

Each message is one sentence, names the user's own module path where there is one, and says what to
do about it.  Nothing else may be raised for bad input.
"""


class FxfibError(Exception):
    """Base class of all errors of this package."""


class InputError(FxfibError, ValueError):
    """An argument is out of its range or of the wrong kind (negative eps, unknown criterion)."""


class CaptureError(FxfibError):
    """The model could not be captured as a graph on the given example inputs."""


class RefusedError(FxfibError):
    """The model was understood and cannot be compiled (NaN weights, meta device ...)."""


class VerifyError(FxfibError):
    """The result differs from the original by more than the tolerance; nothing is returned."""


class ExportError(FxfibError):
    """The ONNX file could not be written, or does not compute what the module computes."""


class LoadError(FxfibError):
    """A file is not one that fxfib wrote, is damaged, or is of a newer format."""
