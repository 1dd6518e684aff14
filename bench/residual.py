"""Residual streams in one layout, or stored small and expanded by an index: savings and costs.

    python bench/residual.py                        # all networks; resumable
    python bench/residual.py resnet20 --eps 0.1 0.2

Parameters, multiply-accumulates, accuracy, and the latency of one example in ONNX Runtime on one
thread, where original, joint, index and auto take turns.  Rows go to bench/results/residual.csv.
The checkpoints and images are read from ``$FXFIB_DATA``.  ``..._copies`` have random weights, and a
quarter of the nodes that every block adds to the stream are copies of others, other ones in every
block; ``tiny_vit`` is trained on MNIST here, in one pass.
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from residual_networks import MODELS, Data
from tables import read, write
from torch import Tensor, nn
from tqdm import tqdm

RESULTS = Path(__file__).resolve().parent / "results" / "residual.csv"
MODES = ("joint", "index", "auto")
ROUNDS, CALLS = 40, 5


def accuracy(model: nn.Module, data: Data) -> float | str:
    if data is None:
        return ""
    images, labels = data
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in images.split(250)])
    return round(float((found == labels).float().mean()), 4)


def latencies(models: dict[str, nn.Module], example: Tensor) -> dict[str, list[float]]:
    """Milliseconds of one example in ONNX Runtime, in turns."""
    import onnxruntime
    from demo import open_session

    import fxfib

    onnxruntime.set_default_logger_severity(3)
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for name, model in models.items():
            path = Path(folder, f"{name}.onnx")
            fxfib.export_onnx(model, path, (example,))
            sessions[name] = open_session(path)
        feed = {next(iter(sessions.values())).get_inputs()[0].name: example.numpy()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(ROUNDS):
            for name, session in sessions.items():
                session.run(None, feed)
                start = time.perf_counter()
                for _ in range(CALLS):
                    session.run(None, feed)
                times[name].append((time.perf_counter() - start) / CALLS * 1e3)
    return times


def measure(name: str, model: nn.Module, example: Tensor, data: Data, eps: float) -> list[Any]:
    """The original and its three forms at one precision."""
    import fxfib

    models: dict[str, Any] = {"original": model}
    for mode in MODES:
        models[mode] = fxfib.compile(model, eps, (example,), residual=mode)
    times = latencies(models, example)
    middle = {form: statistics.median(found) for form, found in times.items()}
    # Rounds are pairs: what else the machine did slowed all forms of one round.
    rows = []
    for form, small in models.items():
        ratios = [a / b for a, b in zip(times[form], times["original"], strict=True)]
        against = [a / b for a, b in zip(times[form], times["joint"], strict=True)]
        cuts = statistics.quantiles(ratios, n=10)
        report = models["joint" if form == "original" else form].fibration
        before = "before" if form == "original" else "after"
        rows.append({
            "model": name, "eps": eps, "form": form,
            "parameters": getattr(report, f"parameters_{before}"),
            "macs": getattr(report, f"macs_{before}"),
            "indices": sum("index_select" in str(n.target) for n in small.graph.nodes)
            if form != "original" else 0,
            "accuracy": accuracy(small, data), "images": len(data[1]) if data else 0,
            "error_float64": "" if form == "original" else report.exact_error,
            "onnx_ms": round(middle[form], 4),
            "ratio_to_original": round(statistics.median(ratios), 4),
            "ratio_low": round(cuts[0], 4), "ratio_high": round(cuts[-1], 4),
            "ratio_to_joint": round(statistics.median(against), 4),
        })  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not in the CSV yet; what is named is measured again."""
    parser = argparse.ArgumentParser(description="residual streams: one layout or an index")
    parser.add_argument("models", nargs="*", choices=[*MODELS, []])
    parser.add_argument("--eps", type=float, nargs="*")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    import onnxruntime

    import fxfib

    machine = {
        "machine": platform.machine(), "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__, "fxfib": fxfib.__version__,
    }  # fmt: skip
    kept = read(options.output)
    done = set() if options.models else {(r["model"], float(r["eps"])) for r in kept}
    names = options.models or list(MODELS)
    work = [(n, e) for n in names for e in options.eps or MODELS[n][1] if (n, e) not in done]
    built: tuple[str, Any] = ("", None)
    for name, eps in tqdm(work, unit="precision"):
        if built[0] != name:
            built = (name, MODELS[name][0]())
        rows = [row | machine for row in measure(name, *built[1], eps)]
        kept = [r for r in kept if (r["model"], float(r["eps"])) != (name, eps)] + rows
        write(options.output, kept, list(rows[0]))
        for row in rows:
            tqdm.write(
                f"{name} eps {eps:g} {row['form']}: {row['parameters']:,} parameters, "
                f"{row['macs']:,} MACs, {row['indices']} indices, accuracy {row['accuracy']}, "
                f"{row['onnx_ms']:.3f} ms, {row['ratio_to_original']:.3f} of the original"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
