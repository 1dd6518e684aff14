"""Every way a compiled network is run: equal outputs first, then latency beside the original.

    python bench/pipeline.py                     # what is missing, one process a network
    python bench/pipeline.py mlp lstm --steps torch onnxruntime --again

Each network is lifted by 1.5 and compiled back.  ``step`` says what a row compares:

- ``torch`` and ``onnxruntime``: original beside compiled; the ratio is original over compiled and
  should be 1, as both have the same widths again.
- ``backend``: the compiled network under ``torch.compile`` beside the lifted one under
  ``torch.compile(backend="fxfib")``; the ratio is the first over the second.
- ``freezing``: the same with inductor's ``freezing`` under our backend: weights may be folded into
  each other and stored as kernels want them, as our backend notices when they change.
- ``checks``: no times; what holds is in ``note``, what does not is in ``failure``.
- ``work``: no times either, so no noise: the ONNX file has the operators and the weights of the
  original's, and inductor makes the same kernels of both.

``ratio`` is the median over rounds, ``best_ratio`` compares the shortest times (side_by_side.py
says why); ``load`` is how many processes wanted a core when a network was begun.  Rows go to
bench/results/pipeline.csv.  ``bert`` needs ``transformers``.
"""

import argparse
import collections
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tables import Row, read, write

RESULTS = Path(__file__).resolve().parent / "results" / "pipeline.csv"
COLUMNS = (
    "model", "step", "batch", "image", "parameters", "parameters_lifted", "parameters_compiled",
    "relative_error", "original_ms", "original_low_ms", "original_high_ms", "original_best_ms",
    "small_ms", "small_low_ms", "small_high_ms", "small_best_ms", "ratio", "ratio_low",
    "ratio_high", "best_ratio", "rounds", "threads", "note", "failure", "machine", "torch",
    "onnxruntime", "fxfib", "load",
)  # fmt: skip
VISION = {"resnet18": 128, "mobilenet_v2": 128, "resnet50": 128, "vit_b_16": 224}
NAMES = ("mlp", "lstm", "bert", *VISION)
STEPS = ("checks", "work", "torch", "onnxruntime", "backend", "freezing")


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


def processor() -> str:
    """The machine in words."""
    from fxfib import timing

    return timing.processor()


def tensors(outputs: Any) -> list[Any]:
    """The tensors of nested outputs."""
    import torch

    return torch.utils._pytree.tree_leaves(dict(outputs) if hasattr(outputs, "keys") else outputs)


class Subject:
    """A network, the lifted one, and what compiling makes of that."""

    def __init__(self, name: str) -> None:
        import onnxruntime
        import torch

        import fxfib

        self.name = name
        self.model, self.args, self.kwargs = network(name)
        self.wide = fxfib.lift(self.model, 1.5, self.args, example_kwargs=self.kwargs)
        self.small = fxfib.compile(self.wide, 0.0, self.args, self.kwargs)
        self.one = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: t[:1].clone(), (self.args, self.kwargs)
        )
        self.common = {
            "model": name,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "parameters_lifted": sum(p.numel() for p in self.wide.parameters()),
            "parameters_compiled": sum(p.numel() for p in self.small.parameters()),
            "image": VISION.get(name, ""), "threads": torch.get_num_threads(),
            "machine": processor(), "torch": torch.__version__,
            "onnxruntime": onnxruntime.__version__, "fxfib": fxfib.__version__,
            "load": round(os.getloadavg()[0], 1),
        }  # fmt: skip

    def beside(self, runtime: str) -> list[dict[str, Any]]:
        """The original beside the compiled one in a runtime."""
        from side_by_side import side_by_side

        batches = (1,) if self.name == "vit_b_16" else (1, 8)
        pair = (self.model, self.small)
        rows = side_by_side(runtime, pair, self.args, self.kwargs, batches)
        return [{**self.common, "step": runtime, **row} for row in rows]

    def backend(self, step: str = "backend", **inner_options: Any) -> list[dict[str, Any]]:
        """The small module under inductor beside the lifted one under our backend."""
        import torch
        from side_by_side import compared
        from torch._inductor.utils import fresh_cache

        import fxfib

        args, kwargs = self.one
        direct = torch.compile(self.small, fullgraph=True, dynamic=False)
        ours = fxfib.backend(inner_options=inner_options)
        through = torch.compile(self.wide, backend=ours, fullgraph=True, dynamic=False)
        # What another run left in inductor's cache need not be what it would make now.
        with torch.no_grad(), fresh_cache():  # inductor freezes nothing in inference mode
            row = compared([lambda: direct(*args, **kwargs), lambda: through(*args, **kwargs)])
        return [{**self.common, "step": step, "batch": 1, **row}]

    def checks(self) -> list[dict[str, Any]]:
        """What must hold besides times."""
        import torch

        import fxfib
        from fxfib.passes.verify import difference

        held: list[str] = []
        failures: list[str] = []

        def check(what: str, test: Callable[[], Any]) -> None:
            try:
                (held if test() else failures).append(what)
            except Exception as error:  # a row says what failed; the rest goes on
                line = (str(error).splitlines() or [""])[0][:160]
                failures.append(f"{what}: {type(error).__name__}: {line}")

        with tempfile.TemporaryDirectory() as folder:
            _onnx_checks(fxfib, self.small, self.args, self.kwargs, Path(folder), check)
        args, kwargs = self.one
        state = {key: value.clone() for key, value in self.wide.state_dict().items()}
        before = _global_state(self.wide)
        backend = fxfib.backend()
        with torch.inference_mode():
            expected = tensors(self.model(*args, **kwargs))
            through = torch.compile(self.wide, backend=backend, fullgraph=True, dynamic=False)
            gap = difference(expected, tensors(through(*args, **kwargs)))
            merged = [graph.report for graph in backend.graphs if not graph.note]
            check("outputs equal through the backend", lambda: gap.relative < 1e-4)
            check("one graph merged", lambda: len(backend.graphs) == len(merged) == 1)
            check(
                "the backend finds the same size",
                lambda: merged[0].parameters_after == self.small.fibration.parameters_after,
            )

            def no_recompile() -> bool:
                with torch._dynamo.config.patch(error_on_recompile=True):
                    through(*args, **kwargs)
                return True

            check("a second call does not recompile", no_recompile)

            def with_options(batch: Any, **options: Any) -> bool:
                torch._dynamo.reset()
                free = fxfib.backend(inner=options.pop("inner", "inductor"))
                run = torch.compile(self.wide, backend=free, fullgraph=True, **options)
                args, kwargs = batch
                wanted = tensors(self.model(*args, **kwargs))
                error = difference(wanted, tensors(run(*args, **kwargs)))
                return error.relative < 1e-4 and all(not graph.note for graph in free.graphs)

            whole = (self.args, self.kwargs)
            check(
                "dynamic=True and fullgraph=True",
                lambda: with_options(whole, dynamic=True, inner="aot_eager"),
            )
            check("mode", lambda: with_options(self.one, dynamic=False, mode="reduce-overhead"))
        check(
            "the model is as it was",
            lambda: all(torch.equal(v, state[k]) for k, v in self.wide.state_dict().items()),
        )
        check("mode and torch's state are as they were", lambda: _global_state(self.wide) == before)
        row = {"step": "checks", "note": "; ".join(held), "failure": "; ".join(failures)}
        return [{**self.common, **row, "relative_error": gap.relative}]

    def work(self) -> list[dict[str, Any]]:
        """Whether there is as much to do as in the original; what differs is the failure."""
        import fxfib

        found = []
        with tempfile.TemporaryDirectory() as folder:
            for number, module in enumerate((self.model, self.small)):
                path = Path(folder) / f"{number}.onnx"
                fxfib.export_onnx(module, path, self.args, self.kwargs, verify=False)
                found.append(operators(path))
        differ = {
            "ONNX operators and weights": (found[0] - found[1], found[1] - found[0]),
        }
        ours, theirs = kernels(self.wide, self.one, "fxfib"), kernels(self.small, self.one, None)
        differ["inductor's kernels"] = (theirs - ours, ours - theirs)
        note = [what for what, (less, more) in differ.items() if not less and not more]
        failure = [
            f"{what}: {dict(less)} became {dict(more)}"
            for what, (less, more) in differ.items()
            if less or more
        ]
        row = {"note": "; ".join(f"the same {what}" for what in note)}
        return [{**self.common, **row, "step": "work", "failure": "; ".join(failure)}]

    def rows(self, step: str) -> list[dict[str, Any]]:
        """All rows of a step."""
        import torch

        if step in ("torch", "onnxruntime"):
            return self.beside(step)
        with torch._dynamo.config.patch(allow_rnn=True):  # else recurrent layers are graph breaks
            if step == "freezing":
                return self.backend(step, freezing=True)
            return {"backend": self.backend, "checks": self.checks, "work": self.work}[step]()


def operators(path: Path) -> "collections.Counter[Any]":
    """Operators of an ONNX file with the shapes of their weights, and how often each."""
    import onnx

    graph = onnx.load(path).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    return collections.Counter(
        (node.op_type, tuple(shapes[n] for n in node.input if len(shapes.get(n, ())) > 1))
        for node in graph.node
    )


def kernels(module: Any, batch: Any, backend: str | None) -> "collections.Counter[str]":
    """Names of the kernels that inductor calls, and how often each."""
    import torch
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    args, kwargs = batch
    run = torch.compile(module, dynamic=False, **({"backend": backend} if backend else {}))
    with torch.inference_mode(), torch._inductor.config.patch(fx_graph_cache=False):
        _, codes = run_and_get_code(run, *args, **kwargs)
    called = r"^ +(?:\w+ = )?(extern_kernels\.\w+|torch\.ops\.[\w.]+|\w*fused\w*)\("
    calls = re.findall(called, "\n".join(codes), re.MULTILINE)
    if not calls:
        raise RuntimeError("no kernels were found in what inductor made")
    return collections.Counter(re.sub(r"_\d+$", "", name) for name in calls)


def _global_state(model: Any) -> tuple[Any, ...]:
    """What of a model and of torch nobody may change."""
    import logging

    import torch

    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads(),
        torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(),
        torch.backends.mkldnn.enabled, torch.get_float32_matmul_precision(),
        logging.root.manager.disable, torch.get_rng_state().tolist(),
    )  # fmt: skip


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


def save(path: Path, rows: list[Row]) -> None:
    """All rows, in the order of networks and steps."""
    write(
        path,
        sorted(rows, key=lambda row: (NAMES.index(row["model"]), STEPS.index(row["step"]))),
        COLUMNS,
        digits=5,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing, each network in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"of {', '.join(NAMES)}; by default all")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--again", action="store_true", help="also what the CSV has already")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.models) - set(NAMES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if options.here:
        (name,) = options.models
        subject = Subject(name)
        for step in options.steps:
            found = subject.rows(step)
            kept = [r for r in read(options.output) if (r["model"], r["step"]) != (name, step)]
            save(options.output, kept + found)
        return 0
    done = {(row["model"], row["step"]) for row in read(options.output)}
    failed = 0
    for name in options.models or NAMES:
        steps = [s for s in options.steps if options.again or (name, s) not in done]
        if not steps:
            continue
        command = [sys.executable, __file__, name, "--here"]
        print(name, flush=True)
        command += ["--output", str(options.output), "--steps", *steps]
        failed += subprocess.run(command).returncode != 0
    for row in read(options.output):
        times = (
            f"{row['original_ms']} -> {row['small_ms']} ms, ratio {row['ratio']}, "
            f"of the shortest times {row['best_ratio']}"
        )
        text = row["failure"] or (row["note"] or times)
        print(f"{row['model']:<13} {row['step']:<12} {row['batch']:>3}  {text}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
