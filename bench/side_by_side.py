"""Two networks in one runtime, in turns: medians, and the shortest times.

On a machine that others use, too, a call takes now its own time and now twice that, and medians
of what should be equal differ by as much.  What disturbs a call only ever adds to it, so
``best_ratio``, the shortest time of the one over the shortest of the other, is what rows are judged
by.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from fxfib import timing
from fxfib.passes.verify import difference
from fxfib.runtimes import opened, plain_outputs, with_batch

TIMES = (
    "original_ms", "original_low_ms", "original_high_ms", "original_best_ms",
    "small_ms", "small_low_ms", "small_high_ms", "small_best_ms",
    "ratio", "ratio_low", "ratio_high", "best_ratio", "relative_error", "rounds",
)  # fmt: skip
# Short samples, some of which nobody disturbs; seconds for a row; fewest and most rounds.
SAMPLE, SECONDS, FEWEST, MOST = 0.0005, 5.0, 15, 600


def compared(calls: Sequence[timing.Call]) -> dict[str, Any]:
    """Times of the original's call and the small one's, and the difference of their outputs."""
    gap = difference(*(plain_outputs(call) for call in calls))
    (once,), (again,) = timing.in_turns(calls, 1, shortest=SAMPLE)
    spent = max(once + again, 2e3 * SAMPLE) / 1e3
    rounds = int(min(max(SECONDS / spent, FEWEST), MOST))
    original, small = timing.in_turns(calls, rounds, shortest=SAMPLE)
    row: dict[str, Any] = {"rounds": rounds, "relative_error": gap.relative}
    for key, values in (("original", original), ("small", small)):
        names = (f"{key}_ms", f"{key}_low_ms", f"{key}_high_ms")
        row |= dict(zip(names, timing.spread(values), strict=True))
        row[f"{key}_best_ms"] = min(values)
    spread = timing.spread(timing.ratios(original, small))
    row |= dict(zip(("ratio", "ratio_low", "ratio_high"), spread, strict=True))
    row["best_ratio"] = row["original_best_ms"] / row["small_best_ms"]
    return row


def side_by_side(
    runtime: str,
    pair: Sequence[torch.nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batches: Sequence[int],
) -> list[dict[str, Any]]:
    """One row a batch size.

    Args:
        runtime: as for ``fxfib.benchmark``.
        pair: the original and the small network.
        args, kwargs: example inputs, a batch of two.
        batches: sizes to which they are repeated.
    """
    rows = []
    threads = torch.get_num_threads()
    with contextlib.ExitStack() as stack, torch.inference_mode():
        runners = [
            stack.enter_context(opened(runtime, module, (args, kwargs), "cpu", threads))
            for module in pair
        ]
        for batch in batches:
            given = with_batch((args, kwargs), 2, batch)
            rows.append({"batch": batch, **compared([runner(*given) for runner in runners])})
    return rows
