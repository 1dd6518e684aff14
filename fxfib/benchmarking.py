"""Latency of a model and its compiled version, side by side, in every runtime that is here."""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from tqdm import tqdm

from fxfib import timing
from fxfib.capture import normalize_inputs
from fxfib.errors import CaptureError, FxfibError, InputError, VerifyError
from fxfib.exporting import clone_inputs
from fxfib.files import move_into_place, staging_folder
from fxfib.onnx_check import first_line
from fxfib.passes.verify import TOLERANCE, Difference, difference
from fxfib.refusals import unwrap
from fxfib.runtimes import RUNTIMES, on_device, opened, plain_outputs, with_batch


@dataclass(frozen=True)
class Row:
    """One runtime at one batch size; milliseconds for one call.

    Attributes:
        runtime, device, batch, rounds: what was measured and how often.
        original_ms, small_ms: medians over the rounds; low and high are the tenth and the ninetieth
            percentile.
        ratio: median of original over small, round by round: above 1, the small one is faster.
        error, relative_error: between the outputs of original and small in this runtime.
    """

    runtime: str
    device: str
    batch: int
    rounds: int
    original_ms: float
    original_low_ms: float
    original_high_ms: float
    small_ms: float
    small_low_ms: float
    small_high_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    error: float
    relative_error: float


@dataclass(frozen=True)
class Benchmark:
    """What :func:`benchmark` measured; prints as a table.

    Attributes:
        model: class name.
        parameters_before, parameters_after: numbers of parameter elements.
        macs_before, macs_after: multiply-accumulates of one example, where the report of the small
            model knows them: that before only if it was made from a model of the same size.
        rows: the measurements.
        skipped: what was not measured, and why.
        setting: threads, rounds, machine and versions, in words.
    """

    model: str
    parameters_before: int
    parameters_after: int
    macs_before: int | None
    macs_after: int | None
    rows: tuple[Row, ...]
    skipped: dict[str, str]
    setting: str

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return dict(json.loads(json.dumps(asdict(self))))

    def to_json(self) -> str:
        """The same as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line for each measurement, with model and setting.

        Raises:
            ExportError: the file cannot be written.
        """
        text = io.StringIO()
        names = [field.name for field in fields(Row)]
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["model", *names, "setting"])
        for row in self.rows:
            values = [getattr(row, name) for name in names]
            short = [f"{value:.6g}" if isinstance(value, float) else value for value in values]
            writer.writerow([self.model, *short, self.setting])
        target = Path(path)
        with staging_folder(target) as folder:
            staged = folder / target.name
            staged.write_text(text.getvalue(), encoding="utf-8")
            move_into_place(staged, target)

    def plot(self) -> Any:
        """A matplotlib figure: latency of original and small, one pair of bars a measurement.

        Raises:
            InputError: matplotlib is not installed (``pip install 'fxfib[plot]'``).
        """
        from fxfib.figures import latency_figure

        return latency_figure(self)

    def __str__(self) -> str:
        share = 100 * self.parameters_after / max(self.parameters_before, 1)
        lines = [
            f"{self.model}: {self.parameters_before:,} -> {self.parameters_after:,} parameters "
            f"({share:.1f} %)"
        ]
        if self.macs_before and self.macs_after is not None:
            lines.append(
                f"  MACs an example: {self.macs_before:,} -> {self.macs_after:,} "
                f"(ratio {self.macs_before / max(self.macs_after, 1):.2f})"
            )
        lines.append(f"  {self.setting}")
        if self.rows:
            head = ("runtime", "device", "batch", "original", "small", "speed-up", "difference")
            lines.append("")
            lines.append(
                f"  {head[0]:<14} {head[1]:<6} {head[2]:>5} {head[3]:>25} {head[4]:>25} "
                f"{head[5]:>18} {head[6]:>11}"
            )
        for row in self.rows:
            original = (
                f"{row.original_ms:.3f} ms ({row.original_low_ms:.3f}-{row.original_high_ms:.3f})"
            )
            small = f"{row.small_ms:.3f} ms ({row.small_low_ms:.3f}-{row.small_high_ms:.3f})"
            ratio = f"{row.ratio:.2f} ({row.ratio_low:.2f}-{row.ratio_high:.2f})"
            lines.append(
                f"  {row.runtime:<14} {row.device:<6} {row.batch:>5} {original:>25} {small:>25} "
                f"{ratio:>18} {row.relative_error:>11.1e}"
            )
        lines += [f"  not measured: {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def benchmark(
    model: nn.Module,
    small: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    batch_sizes: Sequence[int] | None = None,
    runtimes: Sequence[str] = RUNTIMES,
    devices: Sequence[str] | None = None,
    rounds: int = 30,
    threads: int | None = None,
    progress: bool | None = None,
) -> Benchmark:
    """Measure the latency of a model and its compiled version, after comparing their outputs.

    Every round times both, in turns, so that whatever else the machine does hits both alike.  ONNX
    Runtime gets files exported for this and as many threads as torch, which do not spin.

    Args:
        model, small: in eval mode; neither is changed.  ``small`` is usually what
            :func:`fxfib.compile` returned.
        example_inputs, example_kwargs: as for :func:`fxfib.compile`.
        batch_sizes: the example's rows are repeated or cut to these; None: 1 and the example's.
        runtimes: of ``"torch"``, ``"torch.compile"`` (inductor) and ``"onnxruntime"``.
        devices: ``"cpu"``, ``"cuda"``; None: the CPU, and CUDA where there is one.
        rounds: measurements of each, after two calls to warm up.
        threads: of torch and ONNX Runtime; None: as many as torch uses now.
        progress: show a progress bar on standard error; None: only on a terminal.

    Returns:
        The measurements; what cannot be measured here is in ``skipped`` with the reason.

    Raises:
        InputError: an argument is out of range, or a module is in training mode.
        CaptureError: a module does not run on the example inputs.
        VerifyError: a runtime computes something else than torch.
    """
    model, small = unwrap(model), unwrap(small)
    _check(model, small, runtimes, rounds, threads, batch_sizes, devices)
    args, kwargs = normalize_inputs(model, example_inputs, example_kwargs)
    found = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    own = int(found[0].shape[0]) if found and found[0].ndim else 1
    sizes = tuple(dict.fromkeys(batch_sizes or (1, own)))
    places = tuple(devices or ("cpu", *(("cuda",) if torch.cuda.is_available() else ())))
    threads = threads or torch.get_num_threads()
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    total = len(places) * len(runtimes) * len(sizes)
    hidden = None if progress is None else not progress
    with (
        timing.torch_threads(threads),
        tqdm(total=total, desc="benchmark", disable=hidden, leave=False) as bar,
    ):
        for place in places:
            if place.startswith("cuda") and not torch.cuda.is_available():
                skipped[place] = "there is no CUDA device here"
                bar.update(len(runtimes) * len(sizes))
                continue
            pair = tuple(copy.deepcopy(module).to(place).eval() for module in (model, small))
            for runtime in runtimes:
                bar.set_postfix_str(f"{runtime} on {place}")
                for row in _measure(
                    runtime, place, pair, (args, kwargs), own, sizes, rounds, threads, skipped
                ):
                    rows.append(row)
                    bar.update()
    report = getattr(small, "fibration", None)
    before = sum(p.numel() for p in model.parameters())
    of_this = report is not None and report.parameters_before == before
    return Benchmark(
        model=type(model).__name__,
        parameters_before=before,
        parameters_after=sum(p.numel() for p in small.parameters()),
        macs_before=getattr(report, "macs_before", None) if of_this else None,
        macs_after=getattr(report, "macs_after", None),
        rows=tuple(rows),
        skipped=skipped,
        setting=timing.setting(rounds, threads),
    )


def _check(
    model: nn.Module,
    small: nn.Module,
    runtimes: Sequence[str],
    rounds: int,
    threads: int | None,
    batch_sizes: Sequence[int] | None,
    devices: Sequence[str] | None,
) -> None:
    for name, module in (("model", model), ("small", small)):
        if any(
            part.training for part in module.modules() if next(part.parameters(), None) is not None
        ):
            raise InputError(f"{name} is in training mode; call eval() first.")
    for what, names, every in (
        ("runtime", runtimes, RUNTIMES),
        ("device", devices, ("cpu", "cuda")),
    ):
        if names is None:
            continue
        known = ", ".join(map(repr, every))
        if isinstance(names, str) or not names:
            raise InputError(f"{what}s must be a list of one or more of {known}, not {names!r}.")
        kinds = [n.partition(":")[0] if what == "device" else n for n in map(str, names)]
        unknown = [name for name, kind in zip(names, kinds, strict=True) if kind not in every]
        if unknown:
            raise InputError(f"unknown {what} {unknown[0]!r}; known: {known}.")
    if batch_sizes is not None and not isinstance(batch_sizes, Sequence):
        raise InputError(f"batch_sizes must be a list of whole numbers, not {batch_sizes!r}.")
    numbers: list[tuple[str, Any]] = [
        ("rounds", rounds),
        ("threads", threads),
        *(("batch_sizes", b) for b in batch_sizes or ()),
    ]
    for name, number in numbers:
        whole = isinstance(number, Integral) and not isinstance(number, bool)
        if number is not None and (not whole or number < 1):
            raise InputError(f"{name} must be positive whole numbers, not {number!r}.")


def _measure(
    runtime: str,
    place: str,
    pair: tuple[nn.Module, ...],
    examples: tuple[Any, Any],
    own: int,
    sizes: Sequence[int],
    rounds: int,
    threads: int,
    skipped: dict[str, str],
) -> Iterator[Row]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        try:
            runners = [
                stack.enter_context(opened(runtime, m, examples, place, threads)) for m in pair
            ]
        except FxfibError as error:
            skipped[f"{runtime} on {place}"] = str(error)
            return
        for size in sizes:
            args, kwargs = on_device(place, with_batch(examples, own, size))
            try:
                expected = [
                    plain_outputs(module(*clone_inputs(args), **clone_inputs(kwargs)))
                    for module in pair
                ]
            except Exception as error:
                if size == own:
                    name = type(pair[0]).__name__
                    raise CaptureError(f"{name} does not run: {first_line(error)}") from error
                skipped[f"batch size {size}"] = first_line(error)
                continue
            try:
                calls = [runner(args, kwargs) for runner in runners]
                outputs = [plain_outputs(call()) for call in calls]
            except Exception as error:  # a runtime raises anything
                skipped[f"{runtime} on {place}, batch size {size}"] = first_line(error)
                continue
            for module, theirs, ours in zip(pair, expected, outputs, strict=True):
                _verify(runtime, place, module, difference(theirs, ours))
            yield row_of(runtime, place, size, calls, rounds, difference(*outputs))


def _verify(runtime: str, place: str, module: nn.Module, gap: Difference) -> None:
    tensors = (*module.parameters(), *module.buffers())
    tolerance = max((TOLERANCE[t.dtype] for t in tensors if t.dtype in TOLERANCE), default=1e-4)
    # TF32 and fused kernels round more than the CPU does.
    tolerance *= 1 if place == "cpu" else 20
    if not gap.relative <= tolerance:
        raise VerifyError(
            f"{runtime} on {place} computes something else than torch for "
            f"{type(module).__name__}: {gap.relative:.2g} of the largest output."
        )


def row_of(
    runtime: str, place: str, size: int, calls: Sequence[timing.Call], rounds: int, gap: Difference
) -> Row:
    """Times two calls, the original's and the small one's, whose outputs differ by a gap."""
    original, small = timing.in_turns(calls, rounds, place)
    ratio = timing.spread(timing.ratios(original, small))
    both = (*timing.spread(original), *timing.spread(small))
    return Row(runtime, place, size, rounds, *both, *ratio, gap.absolute, gap.relative)
