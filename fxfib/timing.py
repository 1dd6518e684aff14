"""Times that can be compared: calls in turns, medians, and the machine in words."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]

# A sample is at least as long as this, or the clock and the scheduler are what is measured.
SHORTEST_SAMPLE = 0.004

# Python keeps its frames in chunks of 16 KiB.  Where a chunk happens to end within what is timed,
# every call there maps and unmaps pages: measured, 1 ms on 6.  Samples start at several depths,
# together as long as a chunk, so that no call is stuck with that, or spared it, by chance.
DEPTHS = range(0, 160, 16)


def in_turns(
    calls: Sequence[Call], rounds: int, place: str = "cpu", shortest: float = SHORTEST_SAMPLE
) -> list[list[float]]:
    """Milliseconds of every call in every round, after two calls to warm up.

    Every round times all calls, every second one in reverse, so that whatever else the machine does
    hits all alike, and at another depth of Python's stack than the round before.

    Args:
        calls: what to time.
        rounds: how often each.
        place: the device they run on.
        shortest: seconds that a measurement takes at least; calls are repeated until then.
    """
    synchronize = torch.cuda.synchronize if place.startswith("cuda") else lambda: None

    def sample(call: Call, repeats: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize()
        return (time.perf_counter() - start) / repeats

    def sample_below(depth: int, call: Call, repeats: int) -> float:
        return sample_below(depth - 1, call, repeats) if depth else sample(call, repeats)

    repeats = []
    for call in calls:
        sample(call, 1)
        repeats.append(max(1, round(shortest / max(sample(call, 1), 1e-7))))
    times: list[list[float]] = [[] for _ in calls]
    order = range(len(calls))
    for turn in range(rounds):
        for which in order if turn % 2 == 0 else reversed(order):
            depth = DEPTHS[turn // 2 % len(DEPTHS)]
            times[which].append(1e3 * sample_below(depth, calls[which], repeats[which]))
    return times


def ratios(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """First over second, round by round."""
    return [one / two for one, two in zip(first, second, strict=True)]


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, tenth and ninetieth percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return statistics.median(values), tenths[0], tenths[-1]


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """As many threads of torch, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def setting(rounds: int, threads: int, what: str = "median") -> str:
    """How and where something was measured."""
    import onnxruntime  # type: ignore[import-untyped]

    between = " (tenth to ninetieth percentile)" if what == "median" else ""
    parts = [
        f"{what} of {rounds} interleaved rounds{between}",
        f"{threads} thread{'s' if threads > 1 else ''}",
        processor(),
        f"torch {torch.__version__}",
        f"onnxruntime {onnxruntime.__version__}",
    ]
    if torch.cuda.is_available():
        parts.insert(3, torch.cuda.get_device_name())
    return ", ".join(parts)


def processor() -> str:
    """Name of the processor, and how many cores this process sees."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({os.cpu_count()} cores)"
