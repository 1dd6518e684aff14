"""Coloring beside what a user would write instead: seconds, memory, and whether it is right.

    python bench/coloring.py                    # every case of the CPU; resumable
    python bench/coloring.py --quick            # small ones, a few minutes
    python bench/coloring.py --only half 8192   # cases with both words in them
    python bench/coloring.py --device cuda      # the same questions on a GPU

Outputs are checked before anything is timed.  All providers of a case run in turns in one process;
a ratio is the median over turns of another provider's seconds over ours.  Rows of real networks
need torchvision, those of trained ones ``FXFIB_DATA``.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gates
import torch
from measure import RESULT_COLUMNS, measure
from registry import CASE_COLUMNS, PROVIDERS, Case

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "triton", "fxfib")
MACHINE_COLUMNS = ("device", "machine", "threads", "python", *PACKAGES, "commit", "date")
COLUMNS = (*CASE_COLUMNS, *RESULT_COLUMNS, *MACHINE_COLUMNS)


def cases(quick: bool, device: str) -> list[Case]:
    """The sizes that goals are about come first: an interrupted run has seen the most of them."""
    counts = (2048, 512, 1024) if quick else (8192, 65536, 4096, 16384, 32768)
    if device == "cuda" and not quick:
        counts = (8192, 65536, 16384, 32768)
    found = [
        Case("color", kind, 1, count, 512, "float32", share)
        for count in counts
        for share in ("0", "1e-5", "1e-3", "1e-2")
        for kind in ("random", "planted")
    ]
    large = (512, 1024) if quick else (8192, 32768, 4096)
    found[8:8] = [Case("color", "random", 1, n, 512, "float32", "half") for n in large]
    if device == "cuda":
        batch, count, width = (3, 256, 512) if quick else (32, 11008, 4096)
        return found + [
            Case("color_batch", kind, batch, count, width, "bfloat16", share)
            for kind, share in (("random", "0"), ("random", "1e-3"), ("planted", "1e-3"))
        ]
    count = min(8192, counts[0])
    found += [Case("color", "network", 1, count, 512, "float32", s) for s in ("0", "1e-3", "1e-2")]
    # The checkpoints are of small networks: no more rows are in them.
    trained = min(4096, counts[0])
    found += [
        Case("color", "trained", 1, trained, 144, "float32", s) for s in ("0", "1e-3", "half")
    ]
    found += [
        Case("color", "planted", 1, min(4096, counts[0]), 512, dtype, "1e-3")
        for dtype in ("bfloat16", "float16", "float64")
    ]
    found += [Case("color", kind, 1, 128, 16, "float32", "1e-2") for kind in ("random", "planted")]
    found += [Case("color_batch", "planted", 48, 257, 64, "float32", s) for s in ("0", "1e-3")]
    side = 512 if quick else 4096
    return found + [Case(name, "random", 1, side, side, "float32", "0") for name in PROVIDERS
                    if not name.startswith("color")]  # fmt: skip


def machine(device: str) -> dict[str, Any]:
    """What a figure depends on."""
    found: dict[str, Any] = {"device": device, "threads": torch.get_num_threads()}
    found["machine"] = torch.cuda.get_device_name() if device == "cuda" else processor()
    found |= {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    found["commit"] = done.stdout.strip()
    return found


def processor() -> str:
    """The model name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def read(output: Path) -> list[dict[str, str]]:
    """Finished rows; a last line that an interruption cut off is none.

    Raises:
        ValueError: the file has other columns.
    """
    if not output.exists() or not output.stat().st_size:
        return []
    with output.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{output} has other columns; name another --output")
        return [row for row in reader if row["date"]]


def write(output: Path, rows: list[dict[str, str]]) -> None:
    """The whole file at once, or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".part")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(output)


def run(waiting: list[Case], rows: list[dict[str, str]], options: argparse.Namespace) -> None:
    """Measure what has no row yet; every row is in the file as soon as it is known."""
    from tqdm import tqdm

    about = machine(options.device)
    done = {(*(row[name] for name in CASE_COLUMNS), row["provider"]) for row in rows}
    with options.output.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")

        def keep(row: dict[str, Any]) -> None:
            writer.writerow(row | about)
            file.flush()
            rows.append({name: str((row | about).get(name, "")) for name in COLUMNS})

        if options.device == "cuda" and not any(row["operation"] == "ceiling" for row in rows):
            import ceilings

            for row in ceilings.measure(options.rounds):
                keep(row)
        for case in (bar := tqdm(waiting, desc="bench")):
            bar.set_postfix_str(str(case))
            known = PROVIDERS[case.operation].values()
            names = [p.name for p in known if p.answers(case, options.device)]
            names = [name for name in names if (*case.key, name) not in done]
            for row in measure(case, names, options) if names else ():
                keep(row)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing in the CSV, then say which goals hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small matrices")
    parser.add_argument("--only", nargs="*", default=[], help="cases that have all these words")
    parser.add_argument("--force", action="store_true", help="measure finished cases again")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=90.0, help="seconds for one call")
    parser.add_argument("--memory", type=float, default=12.0, help="GiB for one call")
    parser.add_argument("--threads", type=int, help="of torch; what it takes if not given")
    parser.add_argument("--no-peak", dest="peak", action="store_false", help="leave memory out")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        if not torch.cuda.is_available():
            print("bench: torch finds no CUDA device here; nothing was measured.", file=sys.stderr)
            return 1
        # Refuse rather than measure another path under this name.
        os.environ["FXFIB_KERNELS"] = "triton"
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.output is None:
        name = "cpu"
        if options.device == "cuda":
            name = "cuda_" + torch.cuda.get_device_name().replace(" ", "_")
        options.output = RESULTS / f"coloring_{name}.csv"
    waiting = cases(options.quick, options.device)
    waiting = [case for case in waiting if set(options.only) <= set(case.key)]
    try:
        rows = read(options.output)
    except ValueError as error:
        print(f"bench: {error}.", file=sys.stderr)
        return 1
    if options.force:
        again = {case.key for case in waiting}
        rows = [row for row in rows if tuple(row[name] for name in CASE_COLUMNS) not in again]
    write(options.output, rows)
    run(waiting, rows, options)
    print("\n".join(gates.summary(rows, options.device, RESULTS / "compile_cost.csv")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
