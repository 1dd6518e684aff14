"""Real architectures: captured, verified, lifted by 1.5 and recovered.

    python bench/zoo.py                            # torchvision's classifiers; resumable
    python bench/zoo.py --source timm hf --pruner  # a model a family; Torch-Pruning beside it
    python bench/zoo.py --source timm --jobs 2     # two at a time, one thread each
    python bench/zoo.py resnet50 hf:llama          # some of them, again

Weights and batch-norm statistics are random.  Each model runs in a process of its own with a time
limit, so that peak memory is its own and one failure costs one row.  Rows go to
bench/results/zoo.csv: ``refused`` says where nothing merges (how often, op and reason), ``widths``
are the output nodes of all layers together.  ``timm``, ``transformers`` and ``torch-pruning`` must
be installed for what they are asked for.
"""

import argparse
import collections
import concurrent.futures
import multiprocessing
import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tables import read, write

RESULTS = Path(__file__).resolve().parent / "results" / "zoo.csv"
COLUMNS = (
    "model", "captured", "verified", "recovered", "parameters", "parameters_compiled",
    "parameters_lifted", "parameters_recovered", "error_float32", "error_float64",
    "error_recovered_float32", "error_recovered_float64", "refusals", "refused", "widths",
    "widths_lifted", "widths_recovered", "capture_s", "compile_s", "lift_s", "compile_lifted_s",
    "peak_mib", "image", "machine", "torch", "library", "fxfib", "failure",
    "pruner_finished", "pruner_same_shape", "pruner_s", "pruner_parameters", "pruner_failure",
    "pruner",
)  # fmt: skip


def measure(name: str, queue: Any) -> None:
    """One row, sent through a queue piece by piece (what was reached counts)."""
    import torch
    from architectures import build

    import fxfib

    model, (inputs, named) = build(name)
    row: dict[str, Any] = {
        "image": next((t.shape[-1] for t in (*inputs, *named.values()) if t.ndim == 4), ""),
        "torch": torch.__version__,
        "library": library(name),
        "fxfib": fxfib.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    try:
        small = fxfib.compile(model, 0.0, inputs, example_kwargs=named)
        report = small.fibration
        row |= {
            "captured": True,
            "verified": report.exact_error <= 1e-7,  # a merged float32 weight is rounded once
            "parameters": report.parameters_before,
            "parameters_compiled": report.parameters_after,
            "error_float32": report.relative_error,
            "error_float64": report.exact_error,
            "refusals": len(report.refusals),
            "refused": refused(report),
            "widths": sum(group.nodes for group in report.groups),
            "capture_s": round(report.seconds["capture"], 2),
            "compile_s": round(report.seconds["compile"], 2),
        }
        del small
        start = time.perf_counter()
        lifted = fxfib.lift(model, 1.5, inputs, example_kwargs=named)
        row["lift_s"] = round(time.perf_counter() - start, 2)
        del model
        back = fxfib.compile(lifted, 0.0, inputs, example_kwargs=named).fibration
        row |= {
            "recovered": sum(group.fibers for group in back.groups)
            <= sum(group.nodes for group in report.groups)
            and back.macs_after <= report.macs_before,
            "widths_lifted": sum(group.nodes for group in back.groups),
            "widths_recovered": sum(group.fibers for group in back.groups),
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


def library(name: str) -> str:
    """What a network comes from, with its version."""
    from importlib.metadata import version

    package = {"timm": "timm", "hf": "transformers"}.get(name.partition(":")[0], "torchvision")
    return f"{package} {version(package)}"


def refused(report: Any) -> str:
    """Where nothing merges: op, reason and how often, the names of values left out."""
    found = collections.Counter(
        f"{r.op.removeprefix('aten.')}: {re.sub(r'_[0-9]+', '', r.reason)}" for r in report.refusals
    )
    return "; ".join(f"{count} x {what}" for what, count in found.most_common(5))


def prune(name: str, queue: Any) -> None:
    """Torch-Pruning at a ratio of one half: does it finish, has the output its shape?"""
    from importlib.metadata import version

    import torch
    import torch_pruning
    from architectures import build

    model, (inputs, named) = build(name)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with torch.no_grad():
        shapes = shapes_of(model(*inputs, **named))
    last = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))][-1:]
    start = time.perf_counter()
    pruner = torch_pruning.pruner.BasePruner(
        model,
        {**named} if named else inputs,
        importance=torch_pruning.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=last,
        output_transform=first_tensor,
    )
    pruner.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        same = shapes_of(model(*inputs, **named)) == shapes
    queue.put(
        {
            "pruner_finished": True,
            "pruner_same_shape": same,
            "pruner_s": round(seconds, 2),
            "pruner_parameters": sum(p.numel() for p in model.parameters()),
            "pruner": f"torch-pruning {version('torch-pruning')}",
        }
    )


def tensors_of(value: Any) -> list[Any]:
    """All tensors of an output, in order."""
    import torch
    from torch.utils import _pytree as pytree

    leaves = pytree.tree_leaves(dict(value) if hasattr(value, "items") else value)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def shapes_of(value: Any) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors_of(value)]


def first_tensor(value: Any) -> Any:
    """What Torch-Pruning differentiates to find dependencies."""
    return tensors_of(value)[0].sum()


def guarded(work: Callable[[str, Any], None], name: str, queue: Any) -> None:
    """A process that says in one line why it failed."""
    try:
        work(name, queue)
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        queue.put({"failure": f"{type(error).__name__}: {line[:200]}"})


def run_one(work: Callable[[str, Any], None], name: str, limit: float) -> dict[str, Any]:
    """A model in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    queue = context.Queue()
    process = context.Process(target=guarded, args=(work, name, queue))
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
    return row


def row_of(name: str, old: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The row of a model: what is there already, and what was asked for beyond."""
    row = dict(old)
    if not old or name in options.models:
        row = {"model": name, **run_one(measure, name, options.limit)}
    if options.pruner:
        other = run_one(prune, name, options.limit)
        if "failure" in other:
            other = {"pruner_finished": False, "pruner_failure": other["failure"]}
        row |= other
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write rows, say how many hold."""
    from architectures import names_of
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description="lossless compile and recovery of real networks")
    parser.add_argument("models", nargs="*", help="names; all of the sources if none is given")
    parser.add_argument(
        "--source", nargs="+", choices=("torchvision", "timm", "hf"), default=["torchvision"]
    )
    parser.add_argument("--pruner", action="store_true", help="Torch-Pruning on the same models")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds a model may take")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    names = options.models or [name for source in options.source for name in names_of(source)]
    done = {row["model"]: row for row in read(options.output)}

    def missing(name: str) -> bool:
        return name not in done or (options.pruner and not done[name].get("pruner_finished"))

    waiting = [name for name in names if name in options.models or missing(name)]
    # Imported once: every process starts from there.
    multiprocessing.set_forkserver_preload(["torch", "fxfib.api", "fxfib.lifting", "architectures"])
    with (
        concurrent.futures.ThreadPoolExecutor(options.jobs) as pool,
        tqdm(total=len(waiting)) as bar,
    ):
        runs = {pool.submit(row_of, n, done.get(n, {}), options): n for n in waiting}
        for run in concurrent.futures.as_completed(runs):
            name = runs[run]
            done[name] = run.result()
            write(options.output, [done[key] for key in sorted(done)], COLUMNS)
            bar.set_postfix_str(name)
            bar.update()
    rows = [done[name] for name in names]
    counted = ["captured", "verified", "recovered"]
    if options.pruner:
        counted += ["pruner_finished", "pruner_same_shape"]
    for column in counted:
        print(f"{column}: {sum(str(r.get(column)) == 'True' for r in rows)} of {len(rows)}")
    bad = [r for r in rows if str(r.get("recovered")) != "True" or str(r.get("verified")) != "True"]
    for row in bad:
        print(f"  {row['model']}: {row.get('failure') or 'not recovered'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
