"""Every classifier of torchvision: captured, verified, lifted by 1.5 and recovered.

    python bench/zoo.py                 # all of them; appends to bench/results/zoo.csv, resumable
    python bench/zoo.py resnet50 swin_t # some of them

Weights and batch-norm statistics are random.  Each model runs in a process of its own with a time
limit, so that peak memory is its own and one failure costs one row.
"""

import argparse
import csv
import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "zoo.csv"
COLUMNS = (
    "model", "captured", "verified", "recovered", "parameters", "parameters_compiled",
    "parameters_lifted", "parameters_recovered", "error_float32", "error_float64",
    "error_recovered_float32", "error_recovered_float64", "refusals", "capture_s", "compile_s",
    "lift_s", "compile_lifted_s", "peak_mib", "image", "machine", "torch", "torchvision", "fxfib",
    "failure",
)  # fmt: skip
# Architectures with position tables take the one size they were made for.
FIXED = ("vit", "swin", "maxvit")


def image_size(name: str, model: Any) -> int:
    """The smallest square image that a model is sensibly run on here."""
    if name.startswith("vit"):
        return int(model.image_size)
    if name.startswith("inception"):
        return 128
    return 224 if name.startswith(FIXED) else 64


def randomize(model: Any) -> None:
    """Batch-norm statistics and affine parameters that are not those of a fresh network."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)


def measure(name: str, queue: Any) -> None:
    """One row, sent through a queue piece by piece (what was reached counts)."""
    import torch
    import torchvision

    import fxfib

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    randomize(model)
    side = image_size(name, model)
    inputs = torch.randn(2, 3, side, side)
    row: dict[str, Any] = {
        "image": side,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "fxfib": fxfib.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    try:
        small = fxfib.compile(model, 0.0, inputs)
        report = small.fibration
        row |= {
            "captured": True,
            "verified": report.exact_error <= 1e-9,
            "parameters": report.parameters_before,
            "parameters_compiled": report.parameters_after,
            "error_float32": report.relative_error,
            "error_float64": report.exact_error,
            "refusals": len(report.refusals),
            "capture_s": round(report.seconds["capture"], 2),
            "compile_s": round(report.seconds["compile"], 2),
        }
        del small
        start = time.perf_counter()
        lifted = fxfib.lift(model, 1.5, inputs)
        row["lift_s"] = round(time.perf_counter() - start, 2)
        del model
        back = fxfib.compile(lifted, 0.0, inputs).fibration
        row |= {
            "recovered": back.parameters_after <= report.parameters_before,
            "parameters_lifted": back.parameters_before,
            "parameters_recovered": back.parameters_after,
            "error_recovered_float32": back.relative_error,
            "error_recovered_float64": back.exact_error,
            "compile_lifted_s": round(back.seconds["compile"], 2),
        }
    except fxfib.FxfibError as error:
        row["failure"] = str(error)
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    queue.put(row)


def run_one(name: str, limit: float) -> dict[str, Any]:
    """A model in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure, args=(name, queue))
    process.start()
    row: dict[str, Any] = {}
    end = time.monotonic() + limit
    while not row and process.is_alive() and time.monotonic() < end:
        process.join(0.2)
        if not queue.empty():
            row = queue.get()
    if not row and not queue.empty():
        row = queue.get()
    if not row:
        late = process.is_alive()
        row = {
            "failure": f"no answer in {limit:.0f} s" if late else f"exit code {process.exitcode}"
        }
    process.kill() if process.is_alive() else None
    process.join()
    return {"model": name, **row}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, append rows, say how many hold."""
    import torchvision
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description="lossless compile and recovery over torchvision")
    parser.add_argument("models", nargs="*", help="names; all classifiers if none is given")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds a model may take")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    names = options.models or torchvision.models.list_models(module=torchvision.models)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, dict[str, Any]] = {}
    if options.output.exists():
        with options.output.open(newline="") as file:
            done = {row["model"]: row for row in csv.DictReader(file)}
    waiting = [n for n in names if n in options.models or n not in done]
    # Small ones first: an interrupted run has seen the most architectures.
    weights = {n: torchvision.models.get_model_weights(n).DEFAULT for n in waiting}
    bar = tqdm(sorted(waiting, key=lambda n: weights[n].meta["num_params"]))
    for name in bar:
        bar.set_postfix_str(name)
        done[name] = run_one(name, options.limit)
        partial = options.output.with_suffix(".part")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(done[key] for key in sorted(done))
        partial.replace(options.output)
    rows = [done[name] for name in names]
    for column in ("captured", "verified", "recovered"):
        print(f"{column}: {sum(str(r.get(column)) == 'True' for r in rows)} of {len(rows)}")
    bad = [r for r in rows if str(r.get("recovered")) != "True" or str(r.get("verified")) != "True"]
    for row in bad:
        print(f"  {row['model']}: {row.get('failure') or 'not recovered'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
