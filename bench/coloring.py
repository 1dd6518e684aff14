"""Coloring beside what a user would write instead: seconds, memory, and whether it is right.

    python bench/coloring.py                    # every case of the CPU; resumable
    python bench/coloring.py --quick            # small ones, a minute
    python bench/coloring.py --device cuda      # the same questions on a GPU

Outputs are checked before anything is timed.  All providers of a case run in turns in one process;
a ratio is the median over turns of another provider's seconds over ours.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gates
import providers  # noqa: F401  (registers them)
import torch
from check import wrong
from inputs import Case, make
from registry import PROVIDERS, Provider
from torch import Tensor

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = (
    "kind", "count", "width", "share", "eps", "provider", "status", "colors", "seconds",
    "seconds_min", "seconds_max", "ratio", "ratio_min", "ratio_max", "rounds", "peak_mib",
    "rows_mib", "device", "machine", "threads", "torch", "triton", "fxfib",
)  # fmt: skip


def cases(quick: bool) -> list[Case]:
    """Small eps at growing n, equal rows, and eps so large that half of the rows merge."""
    counts = (512, 1024, 2048) if quick else (4096, 8192, 16384, 32768, 65536)
    found = [
        Case(kind, count, 512, share)
        for kind in ("random", "planted")
        for share in ("1e-5", "1e-3", "1e-2")
        for count in counts
    ]
    found += [Case(kind, n, 512, "0") for kind in ("random", "planted") for n in counts]
    found += [Case("network", min(8192, counts[-1]), 512, share) for share in ("0", "1e-3", "1e-2")]
    large = (512, 1024) if quick else (4096, 8192, 32768)
    found += [Case("random", n, 512, "half") for n in large]
    return [*found, Case("random", 128, 16, "1e-2"), Case("planted", 128, 16, "1e-2")]


def suits(provider: Provider, case: Case, options: argparse.Namespace) -> str | None:
    """Why a provider is left out of a case; an empty word: it answers another question."""
    exact = case.share == "0"
    if (exact and not provider.exact) or (not exact and not provider.approximate):
        return ""
    if options.device not in provider.devices:
        return ""
    need = provider.bytes_per_pair * case.count**2 / 2**30
    if need > options.memory:
        return f"left out: about {need:.0f} GiB" if provider.name != "reference" else ""
    return None


def clocked(run: Callable[[], Any], device: str) -> float:
    """Seconds of a call, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(case: Case, name: str, options: argparse.Namespace) -> float | None:
    """MiB a provider needs beyond the rows, in a process of its own (on a GPU, on its memory)."""
    command = [sys.executable, __file__, "--device", options.device, "--peak", name]
    done = subprocess.run([*command, *map(str, case.key)], capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def print_peak(case: Case, name: str, device: str) -> None:
    """The other side of `peak`."""
    from compile_cost import forget_peak, resident

    rows, eps, _ = make(case)
    rows = rows.to(device)
    small = Case(case.kind, 64, case.width, "0" if case.share == "0" else "1e-3")
    PROVIDERS[name].run(make(small)[0].to(device), 1e-3 if case.share != "0" else 0.0)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        PROVIDERS[name].run(rows, eps)
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
    else:
        before = forget_peak()
        PROVIDERS[name].run(rows, eps)
        print(resident("VmHWM") - before)


def measure(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a provider."""
    rows, eps, planted = make(case)
    rows = rows.to(options.device)
    row = dict(zip(("kind", "count", "width", "share"), case.key, strict=True)) | {
        "eps": f"{eps:.6g}", "rows_mib": rows.numel() * rows.element_size() / 2**20,
    }  # fmt: skip
    results: dict[str, dict[str, Any]] = {}
    trusted: Tensor | None = planted
    first: dict[str, float] = {}
    for name, provider in PROVIDERS.items():
        reason = suits(provider, case, options)
        if reason is not None:
            if reason:
                results[name] = {"status": reason}
            continue
        expected = options.seconds.get(name, 0.0) * (case.count / 4096) ** 2
        if expected > options.limit:
            results[name] = {"status": f"left out: about {expected:.0f} s"}
            continue
        labels: list[Tensor | None] = []
        first[name] = clocked(lambda: labels.append(provider.run(rows, eps)), options.device)  # noqa: B023
        answer = labels[0]
        fault = wrong(rows, eps, answer, provider.gives, trusted) if answer is not None else None
        if name == "fxfib" and fault is None:
            trusted = answer
        colors = len(answer.unique()) if answer is not None else ""
        results[name] = {"status": fault or "right", "colors": colors}
        if fault:
            print(f"{case.key}: {name} is wrong: {fault}", file=sys.stderr)
            del first[name]
        if case.count >= 4096 and not fault and provider.bytes_per_pair:
            options.seconds[name] = first[name] * (4096 / case.count) ** 2
    times = turns(rows, eps, first, options)
    for name, seconds in times.items():
        ratios = [s / o for s, o in zip(seconds, times.get("fxfib", seconds), strict=False)]
        results[name] |= {
            "seconds": f"{statistics.median(seconds):.5g}",
            "seconds_min": f"{min(seconds):.5g}",
            "seconds_max": f"{max(seconds):.5g}",
            "ratio": f"{statistics.median(ratios):.4g}",
            "ratio_min": f"{min(ratios):.4g}",
            "ratio_max": f"{max(ratios):.4g}",
            "rounds": len(seconds),
        }
        # Below, the memory is that of the libraries.
        if case.count >= 4096 and name != "torch.sum" and first[name] < options.limit / 4:
            found = peak(case, name, options)
            results[name]["peak_mib"] = "" if found is None else f"{found:.0f}"
    return [{**row, "provider": name, **found} for name, found in results.items()]


def turns(
    rows: Tensor, eps: float, first: dict[str, float], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of every provider, in turns; the slow ones take part in fewer of them."""
    times: dict[str, list[float]] = {name: [] for name in first}
    for turn in range(options.rounds):
        for name, seconds in first.items():
            if turn and seconds * (turn + 1) > options.limit / 2:
                continue
            run = PROVIDERS[name].run
            times[name].append(clocked(lambda: run(rows, eps), options.device))  # noqa: B023
    return times


def machine(device: str) -> dict[str, Any]:
    """What a figure depends on."""
    import fxfib

    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = ""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    threads = torch.get_num_threads()
    return {"device": device, "machine": name, "threads": threads, "torch": torch.__version__,
            "triton": version, "fxfib": fxfib.__version__}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing in the CSV, then say which goals hold."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", help="cases whose kind or share is this")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one call")
    parser.add_argument("--memory", type=float, default=12.0, help="GiB for one call")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench: torch finds no CUDA device here; nothing was measured.", file=sys.stderr)
        return 1
    if options.peak:
        name, kind, count, width, share = options.peak
        print_peak(Case(kind, int(count), int(width), share), name, options.device)
        return 0
    options.seconds = {}
    output = options.output or RESULTS / f"coloring_{options.device}.csv"
    rows: list[dict[str, Any]] = []
    if output.exists():
        with output.open(newline="") as file:
            rows = list(csv.DictReader(file))
    done = {(r["kind"], int(r["count"]), int(r["width"]), r["share"]) for r in rows}
    waiting = [c for c in cases(options.quick) if c.key not in done]
    if options.only:
        waiting = [c for c in waiting if options.only in (c.kind, c.share)]
    about = machine(options.device)
    for case in (bar := tqdm(waiting, desc="coloring")):
        bar.set_postfix_str(" ".join(map(str, case.key)))
        rows += [{**row, **about} for row in measure(case, options)]
        with output.with_suffix(".part").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(rows)
        output.with_suffix(".part").replace(output)
    if options.device == "cuda":
        gates.device_ceilings(RESULTS / "coloring_cuda_ceilings.csv", about)
    print("\n".join(gates.summary(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
