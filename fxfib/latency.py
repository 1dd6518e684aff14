"""The latency of a network beside the original's, for searches that aim at one."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxfib import timing
from fxfib.capture import normalize_inputs
from fxfib.errors import InputError
from fxfib.macs import CONVOLUTIONS, LINEAR, macs_by_node
from fxfib.runtimes import RUNTIMES, opened
from fxfib.widths import WIDTH_RUNTIMES, Widths, measure_widths

# Enough for a median that can be compared, few enough for a search.
ROUNDS = 15
_UNITS = {"s": 1e3, "ms": 1.0, "us": 1e-3}


@dataclass(frozen=True)
class Target:
    """A latency to reach.

    Attributes:
        text: as it was given.
        ratio: a part of the original's latency, or
        milliseconds: an absolute one.
    """

    text: str
    ratio: float | None
    milliseconds: float | None

    def met(self, milliseconds: float, ratio: float) -> bool:
        """Whether a measured latency is as low."""
        if self.ratio is not None:
            return ratio <= self.ratio
        return self.milliseconds is not None and milliseconds <= self.milliseconds


def target_of(latency: float | str) -> Target:
    """A part of the original's latency (0.5), or a time with its unit ("2.5 ms").

    Raises:
        InputError: it is neither.
    """
    if isinstance(latency, str):
        match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(s|ms|us)\s*", latency)
        try:
            value = float(match[1]) * _UNITS[match[2]] if match else math.nan
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise InputError(f"latency must be like '2.5 ms' (s, ms or us), not {latency!r}.")
        return Target(latency, None, value)
    number = isinstance(latency, (int, float)) and not isinstance(latency, bool)
    if not number or not 0 < latency <= 1:
        raise InputError(
            f"latency must be a part of the original's, such as 0.5, or a time, such as '2.5 ms', "
            f"not {latency!r}."
        )
    return Target(f"{latency:g}", float(latency), None)


@dataclass(frozen=True)
class Latency:
    """Medians: of one call, in milliseconds, and of small over original, round by round."""

    milliseconds: float
    ratio: float


class Stopwatch:
    """Times networks beside the original, with the arguments of one call.

    Args:
        model: the original, in eval mode; not changed.
        example_inputs, example_kwargs: as for :func:`fxfib.compile`.
        runtime: one of ``fxfib.runtimes.RUNTIMES``.

    Raises:
        InputError: the runtime is unknown or not here.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        example_kwargs: Mapping[str, Any] | None,
        runtime: str,
    ) -> None:
        self.runtime = runtime
        self.threads = torch.get_num_threads()
        self.inputs = normalize_inputs(model, example_inputs, example_kwargs)
        tensors = (*model.parameters(), *model.buffers())
        self.place = next((tensor.device.type for tensor in tensors), "cpu")
        self._open = contextlib.ExitStack()
        self._original = self._call(model, self._open)

    def __enter__(self) -> Stopwatch:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def latency(self, small: nn.Module) -> Latency:
        """Median times of the original and of a smaller network, in turns."""
        with contextlib.ExitStack() as stack, torch.inference_mode():
            calls = [self._original, self._call(small, stack)]
            original, ours = timing.in_turns(calls, ROUNDS, self.place)
        ratio = timing.spread(timing.ratios(ours, original))[0]
        return Latency(timing.spread(ours)[0], ratio)

    def note(self, milliseconds: float, ratio: float) -> str:
        """What was measured, for the report."""
        return (
            f"latency {milliseconds:.3g} ms, {ratio:.2f} of the original's, of one call with the "
            f"example inputs in {setting_of(self.runtime)}"
        )

    def _call(self, module: nn.Module, stack: contextlib.ExitStack) -> timing.Call:
        with torch.inference_mode():
            runner = stack.enter_context(
                opened(self.runtime, module, self.inputs, self.place, self.threads)
            )
            return runner(*self.inputs)


def setting_of(runtime: str) -> str:
    """What a measured latency depends on, in words."""
    return f"{runtime}, {timing.setting(ROUNDS, torch.get_num_threads())}"


def check_runtime(runtime: str) -> None:
    """Refuse an unknown runtime.

    Raises:
        InputError: see above.
    """
    if runtime not in RUNTIMES:
        known = ", ".join(map(repr, RUNTIMES))
        raise InputError(f"unknown runtime {runtime!r}; known: {known}.")


def widths_for(graph_module: fx.GraphModule, runtime: str) -> tuple[int, str]:
    """The ``round_to`` that pays for a network in a runtime here, and a note of what was measured.

    Layers of every kind count by their multiply-accumulates.
    """
    # torch.compile calls torch's own kernels for these layers.
    runtime = runtime if runtime in WIDTH_RUNTIMES else "torch"
    shares = {"linear": 0.0, "convolution": 0.0}
    for node, count in macs_by_node(graph_module).items():
        for kind, targets in (("linear", LINEAR), ("convolution", CONVOLUTIONS)):
            if node.target in targets:
                shares[kind] += count
    kinds = [kind for kind, share in shares.items() if share]
    if not kinds:
        return 1, "round_to=1: no linear layers or convolutions to measure"
    place = next((tensor.device.type for tensor in graph_module.parameters()), "cpu")
    widths: Widths = measure_widths(runtime, kinds=kinds, device=place)
    multiple = widths.best(shares)
    costs = ", ".join(f"{kind} {widths.cost(kind, multiple):.2f}" for kind in kinds)
    return multiple, (
        f"round_to={multiple} was measured in {runtime}; time of widths rounded up to its "
        f"multiples, as a part of that of widths as they come: {costs} ({widths.setting})"
    )
