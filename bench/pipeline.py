"""Every way a compiled network is run: equal outputs first, then latency beside the original.

    python bench/pipeline.py                     # all networks; resumable, one process each
    python bench/pipeline.py mlp lstm --rounds 50

Each network is lifted by 1.5 and compiled back.  ``step`` says what a row compares:

- ``torch`` and ``onnxruntime``: original beside compiled; ``ratio`` is original over compiled and
  should be 1, as both have the same widths again.
- ``backend``: the compiled network under ``torch.compile`` beside the lifted one under
  ``torch.compile(backend="fxfib")``; ``ratio`` is the first over the second.
- ``checks``: no times; what holds is in ``note``, what does not is in ``failure``.

``load`` is how many processes wanted a core when a network was begun: times from a busy machine say
little, even interleaved.  Rows go to bench/results/pipeline.csv.  ``bert`` needs ``transformers``.
"""

import argparse
import csv
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "pipeline.csv"
COLUMNS = (
    "model", "step", "batch", "image", "parameters", "parameters_lifted", "parameters_compiled",
    "relative_error", "original_ms", "original_low_ms", "original_high_ms", "small_ms",
    "small_low_ms", "small_high_ms", "ratio", "ratio_low", "ratio_high", "rounds", "threads",
    "note", "failure", "machine", "torch", "onnxruntime", "fxfib", "load",
)  # fmt: skip
VISION = {"resnet18": 128, "mobilenet_v2": 128, "resnet50": 128, "vit_b_16": 224}
NAMES = ("mlp", "lstm", "bert", *VISION)


def network(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The network with random weights, and example inputs (a batch of two)."""
    import torch
    from architectures import randomize
    from torch import nn

    torch.manual_seed(0)
    if name in VISION:
        import torchvision

        model = torchvision.models.get_model(name, weights=None).eval()
        images = torch.randn(2, 3, VISION[name], VISION[name])
        randomize(model, ((images,), {}))
        return model, (images,), {}
    if name == "mlp":
        layers = (nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU())
        return nn.Sequential(*layers, nn.Linear(512, 10)).eval(), (torch.randn(2, 784),), {}
    if name == "lstm":

        class Recurrent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lstm = nn.LSTM(64, 128, num_layers=2, batch_first=True)
                self.head = nn.Linear(128, 10)

            def forward(self, value: torch.Tensor) -> torch.Tensor:
                return self.head(self.lstm(value)[0].mean(1))

        return Recurrent().eval(), (torch.randn(2, 8, 64),), {}
    import transformers

    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=1024, max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    return model, (), {"input_ids": torch.randint(0, 1000, (2, 64))}


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """All rows of one network."""
    import onnxruntime
    import torch

    import fxfib
    from fxfib.benchmarking import row_of
    from fxfib.passes.verify import difference

    model, args, kwargs = network(name)
    wide = fxfib.lift(model, 1.5, args, example_kwargs=kwargs)
    small = fxfib.compile(wide, 0.0, args, kwargs)
    size = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_lifted": sum(p.numel() for p in wide.parameters()),
        "parameters_compiled": sum(p.numel() for p in small.parameters()),
    }
    common = {
        "model": name, **size, "image": VISION.get(name, ""), "threads": torch.get_num_threads(),
        "machine": platform.machine(), "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__, "fxfib": fxfib.__version__,
        "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    held: list[str] = []
    failures: list[str] = []

    def check(what: str, test: Callable[[], Any]) -> None:
        try:
            (held if test() else failures).append(what)
        except Exception as error:  # a row says what failed; the rest goes on
            failures.append(f"{what}: {type(error).__name__}: {str(error).splitlines()[0][:160]}")

    def tensors(outputs: Any) -> list[Any]:
        return torch.utils._pytree.tree_leaves(
            dict(outputs) if hasattr(outputs, "keys") else outputs
        )

    try:
        result = fxfib.benchmark(
            model, small, args, kwargs, runtimes=("torch", "onnxruntime"), devices=["cpu"],
            batch_sizes=(1,) if name == "vit_b_16" else (1, 8), rounds=rounds,
        )  # fmt: skip
        for row in result.rows:
            rows.append({**common, **vars(row), "step": row.runtime})
        failures += [f"{what}: {why}" for what, why in result.skipped.items()]
    except fxfib.FxfibError as error:
        failures.append(str(error))

    with tempfile.TemporaryDirectory() as folder:
        _onnx_checks(fxfib, small, args, kwargs, Path(folder), check)

    backend = fxfib.backend()
    torch._dynamo.config.allow_rnn = True  # else recurrent layers are graph breaks
    one = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t[:1].clone(), (args, kwargs))
    with torch.inference_mode():
        expected = tensors(model(*one[0], **one[1]))
        direct = torch.compile(small, dynamic=False)
        through = torch.compile(wide, backend=backend, fullgraph=True, dynamic=False)
        direct(*one[0], **one[1])
        state = {key: value.clone() for key, value in wide.state_dict().items()}
        found = tensors(through(*one[0], **one[1]))
        gap = difference(expected, found)
        merged = [graph.report for graph in backend.graphs if not graph.note]
        check("one graph merged", lambda: len(backend.graphs) == len(merged) == 1)
        check(
            "the backend finds the same size",
            lambda: merged[0].parameters_after == small.fibration.parameters_after,
        )

        def no_recompile() -> bool:
            with torch._dynamo.config.patch(error_on_recompile=True):
                through(*one[0], **one[1])
            return True

        check("a second call does not recompile", no_recompile)
        check(
            "the model is as it was",
            lambda: all(torch.equal(v, state[k]) for k, v in wide.state_dict().items()),
        )
        calls = [lambda: direct(*one[0], **one[1]), lambda: through(*one[0], **one[1])]
        row = row_of("torch.compile", "cpu", 1, calls, rounds, gap)
        rows.append({**common, **vars(row), "step": "backend"})
        check("outputs equal through the backend", lambda: gap.relative < 1e-4)

        def dynamic() -> bool:
            free = fxfib.backend(inner="aot_eager")
            torch._dynamo.reset()
            run = torch.compile(wide, backend=free, dynamic=True, fullgraph=True)
            error = difference(tensors(model(*args, **kwargs)), tensors(run(*args, **kwargs)))
            return error.relative < 1e-4 and all(not graph.note for graph in free.graphs)

        check("dynamic=True and fullgraph=True", dynamic)
    rows.append(
        {
            **common,
            "step": "checks",
            "note": "; ".join(held),
            "failure": "; ".join(failures),
            "relative_error": gap.relative,
        }
    )
    return rows


def _onnx_checks(
    fxfib: Any, small: Any, args: Any, kwargs: Any, folder: Path, check: Callable[..., None]
) -> None:
    import onnx
    import onnxruntime

    first, second = folder / "first.onnx", folder / "second.onnx"
    fxfib.export_onnx(small, first, args, kwargs)
    fxfib.export_onnx(small, second, args, kwargs, verify=False)

    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    check("exporting twice gives the same bytes", lambda: digest(first) == digest(second))

    def valid() -> bool:
        onnx.checker.check_model(str(first), full_check=True)
        onnx.shape_inference.infer_shapes(onnx.load(first), strict_mode=True)
        return True

    check("onnx.checker and strict shape inference", valid)

    def optimized() -> bool:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(folder / "optimized.onnx")
        onnxruntime.InferenceSession(str(first), options, providers=["CPUExecutionProvider"])
        return (folder / "optimized.onnx").exists()

    check("ONNX Runtime's highest optimization level", optimized)


def earlier(path: Path) -> list[dict[str, Any]]:
    """Rows that the CSV holds; none where there is no CSV."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """All rows, in one step."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
    temporary.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing, each network in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"of {', '.join(NAMES)}; by default all missing")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.models) - set(NAMES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if options.here:
        (name,) = options.models
        rows = measure(name, options.rounds)
        write(options.output, [r for r in earlier(options.output) if r["model"] != name] + rows)
        return 0
    done = {row["model"] for row in earlier(options.output)}
    failed = 0
    for name in options.models or [name for name in NAMES if name not in done]:
        command = [sys.executable, __file__, name, "--here", "--rounds", str(options.rounds)]
        print(name, flush=True)
        failed += subprocess.run([*command, "--output", str(options.output)]).returncode != 0
    for row in earlier(options.output):
        times = f"{row['original_ms']} -> {row['small_ms']} ms, ratio {row['ratio']}"
        text = row["failure"] or row["note"] if row["step"] == "checks" else times
        print(f"{row['model']:<13} {row['step']:<12} {row['batch']:>3}  {text}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
