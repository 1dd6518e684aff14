"""The monitor as a callback of PyTorch Lightning, which need not be installed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fxfib.errors import InputError

if TYPE_CHECKING:
    from fxfib.monitor import Monitor


def callback(monitor: Monitor) -> Any:
    """See :meth:`fxfib.Monitor.callback`."""
    base = _callback_class()

    class MonitorCallback(base):  # type: ignore[misc, valid-type]
        """Counts the optimizer's steps as the trainer does, so accumulated gradients are one."""

        def __init__(self) -> None:
            self.monitor = monitor
            self.seen = 0

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if not trainer.is_global_zero:
                return
            while self.seen < trainer.global_step:
                self.seen += 1
                if monitor.step() is not None:
                    monitor.log(**_numbers(trainer))

        def on_validation_end(self, trainer: Any, *_: Any) -> None:
            if trainer.is_global_zero and not trainer.sanity_checking:
                monitor.log(**_numbers(trainer))

        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen, "monitor": monitor.state_dict()}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.seen = state_dict["seen"]
            monitor.load_state_dict(state_dict["monitor"])

    return MonitorCallback()


def _numbers(trainer: Any) -> dict[str, float]:
    """The trainer's scalars, by names."""
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _callback_class() -> Any:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return import_module(name).Callback
        except ImportError:
            continue
    raise InputError("the callback needs PyTorch Lightning: pip install lightning.")
