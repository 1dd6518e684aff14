"""What half the multiply-accumulates are worth: latency before and after, operator by operator.

    python bench/speedup.py                      # what is missing, one process a network
    python bench/speedup.py resnet18 vit_small --again

`fxfib.tune(model, macs=0.5, round_to=8)` makes each network smaller (random weights: no accuracy
is told here).  ``efficiency`` is the speed-up over the ratio of multiply-accumulates: 1 where time
falls as the work does.  Rows without an ``operator`` are latencies; those with one are the time
that the runtime's own profiler gives to all operators of that type in one run, and ``excess_ms`` is
what is left of it above the original's over the ratio: the largest ones hold the network back.  All
are the shortest times of many (side_by_side.py says why).
Rows go to bench/results/speedup.csv, the smaller networks to build/speedup.
"""

import argparse
import collections
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline import network, processor
from side_by_side import TIMES, compared, side_by_side
from tables import Row, read, write

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "speedup.csv"
MADE = HERE.parent / "build" / "speedup"
NAMES = ("resnet18", "resnet50", "mobilenet_v2", "vit_small", "bert")
COLUMNS = (
    "model", "runtime", "batch", "operator", "macs_before", "macs_after", "macs_ratio",
    "parameters_before", "parameters_after", *TIMES[:-2], "efficiency", "excess_ms",
    "round_to", "rounds", "threads", "machine", "torch", "onnxruntime", "fxfib",
)  # fmt: skip
ROUND_TO = 8
CALIBRATION = 4
PROFILED = 60
BATCHES = (1, 8)


def model_of(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The network and example inputs; ``vit_small`` has the widths of DeiT-S, and 6 layers."""
    if name != "vit_small":
        return network(name)
    import torch
    import torchvision
    from architectures import randomize

    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(
        image_size=224, patch_size=16, num_layers=6, num_heads=6, hidden_dim=384, mlp_dim=1536
    ).eval()
    torch.nn.init.normal_(model.heads.head.weight, 0, 0.05)  # zero in a fresh network
    images = torch.randn(2, 3, 224, 224)
    randomize(model, ((images,), {}))
    return model, (images,), {}


def smaller(name: str, model: Any, args: Any, kwargs: Any) -> Any:
    """The network at half the work; made once."""
    import torch

    import fxfib

    path = MADE / f"{name}.fxfib"
    if path.exists():
        return fxfib.load(path)
    torch.manual_seed(1)
    example = torch.utils._pytree.tree_leaves((args, kwargs))[0]
    if example.is_floating_point():
        calibration: Any = torch.randn(CALIBRATION, *example.shape[1:])
    else:
        shape = (CALIBRATION, *example.shape[1:])
        calibration = [{"input_ids": torch.randint(0, int(example.max()) + 1, shape)}]
    small = fxfib.tune(
        model, example_inputs=args, example_kwargs=kwargs, macs=0.5, round_to=ROUND_TO,
        calibration=calibration, compensate=False, progress=True,
    )  # fmt: skip
    MADE.mkdir(parents=True, exist_ok=True)
    fxfib.save(small, path)
    return small


def files(name: str, pair: Sequence[Any], args: Any, kwargs: Any) -> list[str]:
    """ONNX files of both; written once."""
    import fxfib

    paths = [MADE / f"{name}_{which}.onnx" for which in ("original", "small")]
    for module, path in zip(pair, paths, strict=True):
        if not path.exists():
            fxfib.export_onnx(module, path, args, kwargs, verify=False)
    return [str(path) for path in paths]


def measure(name: str) -> list[dict[str, Any]]:
    """All rows of one network."""
    import onnxruntime
    import torch

    import fxfib

    model, args, kwargs = model_of(name)
    small = smaller(name, model, args, kwargs)
    paths = files(name, (model, small), args, kwargs)
    report = small.fibration
    ratio = report.macs_before / report.macs_after
    common = {
        "model": name, "macs_before": report.macs_before, "macs_after": report.macs_after,
        "macs_ratio": ratio, "parameters_before": report.parameters_before,
        "parameters_after": report.parameters_after, "round_to": ROUND_TO,
        "threads": torch.get_num_threads(), "machine": processor(), "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__, "fxfib": fxfib.__version__,
    }  # fmt: skip
    rows = []
    found = [*in_onnx_runtime(paths, args, kwargs)]
    for row in side_by_side("torch", (model, small), args, kwargs, BATCHES):
        found.append({"runtime": "torch", **row})
    for row in found:
        del row["relative_error"]  # of what is smaller on purpose
        rows.append({**common, **row, "efficiency": row["best_ratio"] / ratio})
    profiles = {
        "onnxruntime": profile(paths, args, kwargs),
        "torch": torch_profile((model, small), args, kwargs),
    }
    for runtime, operators in profiles.items():
        for operator, before, after in operators:
            own = {"excess_ms": after - before / ratio, "rounds": PROFILED}
            own |= {"original_best_ms": before, "small_best_ms": after}
            if after > 0:
                own |= {"best_ratio": before / after, "efficiency": before / after / ratio}
            rows.append({**common, "runtime": runtime, "batch": 1, "operator": operator, **own})
    return rows


def calls_of(sessions: Sequence[Any], args: Any, kwargs: Any, batch: int) -> list[Any]:
    """One call of each session on the example inputs, repeated to a batch."""
    import torch

    from fxfib.runtimes import with_batch

    leaves = torch.utils._pytree.tree_leaves(with_batch((args, kwargs), 2, batch))
    arrays = [leaf.numpy() for leaf in leaves]

    def call(session: Any) -> Any:
        names = [entry.name for entry in session.get_inputs()]
        feed = dict(zip(names, arrays, strict=True))
        return lambda: session.run(None, feed)

    return [call(session) for session in sessions]


def in_onnx_runtime(paths: Sequence[str], args: Any, kwargs: Any) -> Iterator[dict[str, Any]]:
    """Both files, at every batch size."""
    import torch

    from fxfib.runtimes import onnx_session

    sessions = [onnx_session(path, "cpu", torch.get_num_threads()) for path in paths]
    for batch in BATCHES:
        row = compared(calls_of(sessions, args, kwargs, batch))
        yield {"runtime": "onnxruntime", "batch": batch, **row}


def profile(paths: Sequence[str], args: Any, kwargs: Any) -> list[tuple[str, float, float]]:
    """Milliseconds of every type of operator in one run at batch 1, before and after."""
    import torch

    from fxfib.runtimes import onnx_session

    with tempfile.TemporaryDirectory() as folder:
        sessions = [
            onnx_session(
                path, "cpu", torch.get_num_threads(), enable_profiling=True,
                profile_file_prefix=str(Path(folder) / str(number)),
            )
            for number, path in enumerate(paths)
        ]  # fmt: skip
        calls = calls_of(sessions, args, kwargs, 1)
        for _ in range(PROFILED + 2):
            for call in calls:
                call()
        before, after = (operator_times(Path(session.end_profiling())) for session in sessions)
    names = sorted({*before, *after}, key=lambda name: -before.get(name, 0.0))
    return [(name, before.get(name, 0.0), after.get(name, 0.0)) for name in names]


def torch_profile(pair: Sequence[Any], args: Any, kwargs: Any) -> list[tuple[str, float, float]]:
    """The same of torch's operators, each without what it calls."""
    import torch
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as profiled

    from fxfib.runtimes import with_batch

    args, kwargs = with_batch((args, kwargs), 2, 1)
    with torch.inference_mode(), profiled(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(PROFILED + 2):
            for number, module in enumerate(pair):
                with record_function(f"run {number}"):
                    module(*args, **kwargs)
    events = list(seen.events())
    before, after = (self_times(events, f"run {number}") for number in range(2))
    names = sorted({*before, *after}, key=lambda name: -before.get(name, 0.0))
    return [(name, before.get(name, 0.0), after.get(name, 0.0)) for name in names]


def self_times(events: Sequence[Any], run: str) -> dict[str, float]:
    """Of torch's profile: the shortest over runs, the first two left out, by operator."""
    sums = []
    for whole in [event for event in events if event.name == run][2:]:
        total: collections.Counter[str] = collections.Counter()
        waiting = list(whole.cpu_children)
        while waiting:
            event = waiting.pop()
            total[event.name.removeprefix("aten::")] += event.self_cpu_time_total / 1e3
            waiting += event.cpu_children
        sums.append(total)
    names = {name for total in sums for name in total}
    return {name: min(total[name] for total in sums) for name in names}


def operator_times(path: Path) -> dict[str, float]:
    """Of a profile: the shortest over runs, the first two left out, by type of operator."""
    events = json.loads(path.read_text())
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "model_run")[2:]
    sums = [collections.Counter() for _ in runs]
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        for (start, end), total in zip(runs, sums, strict=True):
            if start <= event["ts"] < end:
                total[event["args"]["op_name"]] += event["dur"] / 1e3
    names = {name for total in sums for name in total}
    return {name: min(total[name] for total in sums) for name in names}


def save(path: Path, rows: list[Row]) -> None:
    """All rows, in the order of networks."""
    write(path, sorted(rows, key=lambda row: NAMES.index(row["model"])), COLUMNS, digits=5)


def show(rows: list[dict[str, Any]]) -> None:
    """Efficiencies, and the operators that hold a network back most."""
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        print(f"{name}: multiply-accumulates over {float(own[0]['macs_ratio']):.2f}")
        for row in own:
            if not row["operator"]:
                keys = ("original_best_ms", "small_best_ms", "best_ratio", "ratio", "efficiency")
                before, after, best, ratio, efficiency = (float(row[key]) for key in keys)
                print(
                    f"  {row['runtime']:<12} batch {row['batch']}: {before:8.2f} -> {after:8.2f} "
                    f"ms, {best:.2f} times as fast (medians: {ratio:.2f}), "
                    f"efficiency {efficiency:.2f}"
                )
        for runtime in ("onnxruntime", "torch"):
            held = [row for row in own if row["operator"] and row["runtime"] == runtime]
            held.sort(key=lambda row: -float(row["excess_ms"]))
            print(f"    {runtime}, by what is held back")
            for row in held[:5]:
                print(
                    f"    {row['operator']:<22} {float(row['original_best_ms']):8.3f} -> "
                    f"{float(row['small_best_ms']):8.3f} ms, {float(row['excess_ms']):+.3f} ms"
                )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing, each network in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"of {', '.join(NAMES)}; by default all")
    parser.add_argument("--again", action="store_true", help="also what the CSV has already")
    parser.add_argument("--make", action="store_true", help="only make the smaller networks")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.models) - set(NAMES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if options.here:
        (name,) = options.models
        if options.make:
            model, args, kwargs = model_of(name)
            files(name, (model, smaller(name, model, args, kwargs)), args, kwargs)
            return 0
        rows = measure(name)
        save(options.output, [r for r in read(options.output) if r["model"] != name] + rows)
        return 0
    done = {row["model"] for row in read(options.output)}
    failed = 0
    for name in options.models or NAMES:
        if name in done and not options.again:
            continue
        print(name, file=sys.stderr, flush=True)
        command = [sys.executable, __file__, name, "--here"]
        command += ["--output", str(options.output), *(["--make"] if options.make else [])]
        failed += subprocess.run(command).returncode != 0
    show(read(options.output))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
