"""What watching costs: training with `fxfib.Monitor` at its default interval, and without.

    python bench/monitor_cost.py --data-root FOLDER [--networks mlp,cnn] [--rounds 5] [--steps 1500]

In every round the same steps are trained with a monitor and without, in alternating order, on one
thread and the same batches.  A row is one round: seconds of both by the clock and of the processor
(which say the same on a quiet machine), their ratios, and what the monitor itself counted (capture
and the first look come before training and stand apart).  Weights are compared at the end: watching
must not change them.  Rows are added to `monitor_cost.csv`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from tables import Row, read, write
from torch import nn
from tqdm import tqdm
from trained import NETWORKS, Images, images, training, untrained

import fxfib

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = (
    "network", "round", "steps", "plain_s", "watched_s", "ratio", "plain_cpu_s", "watched_cpu_s",
    "ratio_cpu", "looks", "look_s", "share", "preparation_s", "machine", "torch",
)  # fmt: skip

Seconds = tuple[float, float]


def trained(
    network: str, data: Images, steps: int, watched: bool
) -> tuple[Seconds, Row, nn.Module]:
    """Seconds of the training loop, by the clock and of the processor; what the monitor counted."""
    torch.manual_seed(0)
    model = untrained(network)
    monitor = fxfib.Monitor(model, data.train[:64]) if watched else None
    loop = itertools.islice(training(model, data, 1000, 0), steps)
    next(loop)  # not counted: the first step warms up
    start, begun = time.perf_counter(), time.process_time()
    for _ in loop:
        if monitor is not None:
            monitor.step()
    seconds = time.perf_counter() - start, time.process_time() - begun
    if monitor is None:
        return seconds, {}, model
    spent = monitor.seconds
    looks = len(monitor.history.looks) - 1
    return seconds, {
        "looks": looks, "look_s": round(spent["looks"] / max(1, looks), 4),
        "share": f"{spent['looks'] / spent['training']:.4f}",
        "preparation_s": round(spent["preparation"], 3),
    }, model  # fmt: skip


def one_round(network: str, data: Images, number: int, steps: int) -> Row:
    """A row."""
    found: dict[bool, tuple[Seconds, Row, nn.Module]] = {}
    for watched in (True, False) if number % 2 else (False, True):
        found[watched] = trained(network, data, steps, watched)
    plain, watch = found[False], found[True]
    for a, b in zip(plain[2].parameters(), watch[2].parameters(), strict=True):
        if not torch.equal(a, b):
            raise AssertionError("watching changed the training")
    (plain_s, plain_cpu), (watched_s, watched_cpu) = plain[0], watch[0]
    return {
        "network": network, "round": number, "steps": steps, "plain_s": round(plain_s, 3),
        "watched_s": round(watched_s, 3), "ratio": f"{watched_s / plain_s:.4f}",
        "plain_cpu_s": round(plain_cpu, 3), "watched_cpu_s": round(watched_cpu, 3),
        "ratio_cpu": f"{watched_cpu / plain_cpu:.4f}", **watch[1],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
                   f"{torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Measure, add rows, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", default=os.environ.get("FXFIB_DATA"))
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--cache", type=Path, default=Path("bench/cache"))
    parser.add_argument("--output", type=Path, default=RESULTS / "monitor_cost.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = read(options.output)
    for network in options.networks.split(","):
        done = {int(r["round"]) for r in rows if r["network"] == network}
        missing = [number for number in range(options.rounds) if number not in done]
        if not missing:
            continue
        try:
            data = images(network, options.data_root, options.cache)
        except (OSError, RuntimeError) as error:
            print(f"the images of {network} cannot be had: {error}", file=sys.stderr)
            return 1
        for number in tqdm(missing, desc=network):
            rows.append(one_round(network, data, number, options.steps))
            write(options.output, rows, COLUMNS)
    for network in dict.fromkeys(r["network"] for r in rows):
        own = [r for r in rows if r["network"] == network]
        parts = []
        for name, column in (("clock", "ratio"), ("processor", "ratio_cpu")):
            found = [float(r[column]) for r in own if r[column]]
            if found:
                parts.append(f"{statistics.median(found):.3f} by the {name} ({min(found):.3f} to "
                             f"{max(found):.3f})")  # fmt: skip
        shares = [float(r["share"]) for r in own]
        own_share = f"{statistics.median(shares):.1%} (at most {max(shares):.1%})"
        print(f"{network}: watched over plain {', '.join(parts)}; the monitor counts {own_share}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
