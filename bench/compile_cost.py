"""Seconds and peak memory of a compile, for a network as it is and lifted.

    python bench/compile_cost.py                  # ResNet-50 at 224 x 224; writes the CSV
    python bench/compile_cost.py vgg16 --image 64

Every repetition is a process of its own.  Memory is what the process held at its highest point
beyond what it held before (the model is in memory then), over the size of the weights.  Linux only:
the kernel is asked to forget the highest point before each part.
"""

import argparse
import csv
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "compile_cost.csv"
MIB = 2.0**20


def resident(key: str) -> float:
    """MiB that the process holds (``VmRSS``) or has held at most (``VmHWM``)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the kernel reports no memory of a process here")


def forget_peak() -> float:
    """Start a new highest point; MiB held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def once(name: str, image: int, batch: int, factor: float) -> dict[str, float]:
    """One capture and one compile in this process."""
    import torch
    import torchvision
    from architectures import randomize

    import fxfib
    from fxfib.capture import capture

    torch.manual_seed(0)
    model: torch.nn.Module = torchvision.models.get_model(name, weights=None).eval()
    randomize(model)
    inputs = torch.randn(batch, 3, image, image)
    if factor != 1.0:
        model = fxfib.lift(model, factor, (inputs,))
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / MIB
    with torch.no_grad():
        model(inputs)
    before = forget_peak()
    capture(model, (inputs,), None)
    capture_peak = resident("VmHWM") - before
    before = forget_peak()
    report = fxfib.compile(model, 0.0, (inputs,)).fibration
    return {
        "weights_mib": weights,
        "parameters_before": report.parameters_before,
        "parameters_after": report.parameters_after,
        "capture_s": report.seconds["capture"],
        "compile_s": report.seconds["compile"],
        "capture_peak_mib": capture_peak,
        "compile_peak_mib": resident("VmHWM") - before,
    }


def measure(name: str, image: int, batch: int, factor: float, repeats: int) -> dict[str, Any]:
    """Medians over processes, with the spread of the seconds."""
    rows = []
    for _ in range(repeats):
        command = [sys.executable, __file__, name, "--image", str(image), "--batch", str(batch)]
        done = subprocess.run(
            [*command, "--once", str(factor)], check=True, capture_output=True, text=True
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    beyond = (middle["compile_peak_mib"] - middle["capture_peak_mib"]) / middle["weights_mib"]
    seconds = [row["compile_s"] for row in rows]
    return {
        "model": name,
        "lifted_by": factor,
        "image": image,
        "batch": batch,
        "repeats": repeats,
        **{key: round(value, 3) for key, value in middle.items()},
        "compile_s_min": round(min(seconds), 3),
        "compile_s_max": round(max(seconds), 3),
        "peak_beyond_capture_over_weights": round(beyond, 3),
    }


def earlier(path: Path) -> list[dict[str, Any]]:
    """Rows that the CSV holds; none where there is no CSV."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, replace the rows of these models in the CSV."""
    parser = argparse.ArgumentParser(description="seconds and peak memory of a compile")
    parser.add_argument("models", nargs="*", default=["resnet50"])
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--factors", type=float, nargs="*", default=[1.0, 1.5])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--once", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.once is not None:
        (name,) = options.models
        print(json.dumps(once(name, options.image, options.batch, options.once)))
        return 0
    import torch

    import fxfib

    machine = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "fxfib": fxfib.__version__,
    }
    rows = []
    for name in options.models:
        for factor in options.factors:
            row = measure(name, options.image, options.batch, factor, options.repeats) | machine
            rows.append(row)
            print(
                f"{name} lifted by {factor:g}: capture {row['capture_s']:.2f} s, then compile "
                f"{row['compile_s']:.2f} s ({row['compile_s_min']:.2f} to "
                f"{row['compile_s_max']:.2f}); peak beyond capture "
                f"{row['peak_beyond_capture_over_weights']:.2f} x weights"
            )
    kept = [row for row in earlier(options.output) if row["model"] not in options.models]
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows([*kept, *rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
