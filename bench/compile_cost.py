"""Seconds and peak memory of a compile, for a network as it is and lifted.

    python bench/compile_cost.py                  # ResNet-50 at 224 x 224; writes the CSV
    python bench/compile_cost.py vgg16 --image 64
    python bench/compile_cost.py llama_1b --image 32 --repeats 1   # 32 tokens; needs transformers

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
import time
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


# Decoders in bfloat16 with random weights; 22 layers of these widths have 1.12 billion parameters.
LLAMA: dict[str, dict[str, int]] = {
    "llama_1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama_small": {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def build(name: str, size: int, batch: int) -> tuple[Any, Any]:
    """A network in eval mode and an input: an image, or a row of tokens, of the given size."""
    import torch

    torch.manual_seed(0)
    if name in LLAMA:
        from transformers import LlamaConfig, LlamaForCausalLM

        # Made in bfloat16: float32 weights would be in the highest point of memory.
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(LlamaConfig(**LLAMA[name], use_cache=False)).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        for module in model.modules():
            if "RMSNorm" in type(module).__name__:  # ones would be equal by accident
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
        return model, torch.randint(0, LLAMA[name]["vocab_size"], (batch, size))
    import torchvision
    from architectures import randomize

    model = torchvision.models.get_model(name, weights=None).eval()
    images = torch.randn(batch, 3, size, size)
    randomize(model, ((images,), {}))
    return model, images


def once(name: str, image: int, batch: int, factor: float) -> dict[str, float]:
    """One capture and one compile in this process."""
    import torch

    import fxfib
    from fxfib.capture import capture

    model, inputs = build(name, image, batch)
    if factor != 1.0:
        model = fxfib.lift(model, factor, (inputs,))
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / MIB
    with torch.no_grad():
        model(inputs)
    before = forget_peak()
    capture(model, (inputs,), None)
    capture_peak = resident("VmHWM") - before
    before = forget_peak()
    start = time.process_time()
    report = fxfib.compile(model, 0.0, (inputs,)).fibration
    return {
        "weights_mib": weights,
        "parameters_before": report.parameters_before,
        "parameters_after": report.parameters_after,
        "capture_s": report.seconds["capture"],
        "compile_s": report.seconds["compile"],
        # With the capture inside it; the figure to read where others used the machine, too.
        "capture_and_compile_cpu_s": time.process_time() - start,
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
    """Measure, print, replace the rows of these models and factors in the CSV."""
    parser = argparse.ArgumentParser(description="seconds and peak memory of a compile")
    parser.add_argument("models", nargs="*", default=["resnet50"])
    parser.add_argument("--image", type=int, default=224, help="side, or number of tokens")
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
    again = {(row["model"], row["lifted_by"]) for row in rows}
    kept = [
        row
        for row in earlier(options.output)
        if (row["model"], float(row["lifted_by"])) not in again
    ]
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), restval="")
        writer.writeheader()
        writer.writerows([*kept, *rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
