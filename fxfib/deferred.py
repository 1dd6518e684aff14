"""Compilation at the first call, as ``torch.compile`` does it."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxfib.capture import normalize_inputs
from fxfib.errors import InputError


class DeferredModule(nn.Module):
    """Compiles the model it holds on the inputs of its first call, and is the result from then on.

    Attributes:
        fibration: the report; None before the first call.
    """

    def __init__(self, model: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        # Not a sub-module: until the first call this module has no parameters of its own.
        self.__dict__["_original"] = model
        self._options = options
        self.compiled: nn.Module | None = None
        self.training = getattr(model, "training", False)

    @property
    def fibration(self) -> Any:
        """The report; None before the first call."""
        return None if self.compiled is None else self.compiled.fibration

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compile on these inputs if that has not been done; run the result."""
        if self.compiled is None:
            from fxfib.api import compile_now

            if not args and not kwargs:
                raise InputError("the first call compiles the model and needs its inputs.")
            original = self.__dict__["_original"]
            normalize_inputs(original, args, kwargs)
            self.compiled = compile_now(original, args, kwargs, **self._options)
            self.__dict__["_original"] = None
        return self.compiled(*args, **kwargs)
