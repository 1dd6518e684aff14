"""One case measured: answers checked, then all providers timed in turns, then memory."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import check
import providers  # noqa: F401  (registers them)
import torch
from inputs import Missing, make
from registry import CASE_COLUMNS, OURS, PROVIDERS, Case, Problem, Provider
from torch import Tensor

RIGHT = "right"
LEFT_OUT = "left out"
RESULT_COLUMNS = (
    "eps", "provider", "status", "checked_by", "colors", "rounds", "seconds", "seconds_min",
    "seconds_q1", "seconds_q3", "seconds_max", "ratio", "ratio_min", "ratio_q1", "ratio_q3",
    "ratio_max", "peak_mib", "rows_mib", "bytes_per_s", "comparisons_per_s",
)  # fmt: skip
# A short run tells how long a long one of a provider with quadratic growth would be.
TRIAL_ROWS = 1024
# With fewer, the memory of a process is that of its libraries.
PEAK_ROWS = 4096


def measure(case: Case, names: list[str], options: Namespace) -> Iterator[dict[str, Any]]:
    """A row for each of the providers `names`, as soon as it is complete.

    Ours runs along in any case, as ratios are against it in the same round.
    """
    row = dict(zip(CASE_COLUMNS, case.key, strict=True))
    try:
        problem = make(case).to(options.device)
    except Missing as error:
        yield from (row | {"provider": n, "status": f"{LEFT_OUT}: {error}"} for n in names)
        return
    size = problem.rows.numel() * problem.rows.element_size()
    row |= {"eps": f"{problem.eps:.6g}", "rows_mib": f"{size / 2**20:.1f}"}
    results: dict[str, dict[str, Any]] = {name: {} for name in dict.fromkeys([OURS, *names])}
    answers: dict[str, Tensor | None] = {}
    first: dict[str, float] = {}
    for name, result in results.items():
        provider = PROVIDERS[case.operation][name]
        reason = too_much(provider, problem, options)
        if reason:
            result["status"] = f"{LEFT_OUT}: {reason}"
            continue
        try:
            answers[name], first[name] = clocked(provider, problem)
        except (RuntimeError, MemoryError) as error:
            result["status"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"
    judge(problem, answers, results)
    right = {name: first[name] for name in first if results[name]["status"] == RIGHT}
    answers.clear()
    times = in_turns(problem, right, options)
    for name in names:
        result = results[name]
        if name in times:
            result |= figures(times[name], times.get(OURS), size, case)
            telling = options.device == "cuda" or case.count >= PEAK_ROWS
            if options.peak and telling and first[name] <= options.limit / 2:
                result["peak_mib"] = peak(problem, name, options.device)
        yield row | {"provider": name} | result


def too_much(provider: Provider, problem: Problem, options: Namespace) -> str | None:
    """Why a provider is left out, or None: its memory, or its time as a short run foretells it."""
    count = problem.case.count
    need = provider.pair_bytes * count**2 / 2**30
    if need > options.memory:
        return f"about {need:.0f} GiB"
    if provider.growth <= 1 or count <= 2 * TRIAL_ROWS:
        return None
    case = problem.case
    small = Case(case.operation, case.kind, case.batch, TRIAL_ROWS, *case.key[4:])  # type: ignore[arg-type]
    part = Problem(small, problem.rows[..., :TRIAL_ROWS, :].contiguous(), problem.eps)
    clocked(provider, part)
    expected = clocked(provider, part)[1] * (count / TRIAL_ROWS) ** provider.growth
    return f"about {expected:.0f} s" if expected > options.limit else None


def clocked(provider: Provider, problem: Problem) -> tuple[Tensor | None, float]:
    """The answer and the seconds it took, the device's work included."""
    wait: Callable[[], None] = torch.cuda.synchronize if problem.rows.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    answer = provider.run(problem)
    wait()
    return answer, time.perf_counter() - start


def judge(
    problem: Problem, answers: dict[str, Tensor | None], results: dict[str, dict[str, Any]]
) -> None:
    """Write a status for every answer."""
    case = problem.case
    known = PROVIDERS[case.operation]
    parts = [problem]
    if case.operation == "color_batch":
        planted = [None] * case.batch if problem.planted is None else problem.planted.unbind()
        pairs = zip(problem.rows.unbind(), planted, strict=True)
        parts = [Problem(case, rows, problem.eps, labels) for rows, labels in pairs]
    colored = case.operation.startswith("color")
    trusted = [trusted_colors(part, answers) for part in parts] if colored else []
    for name, answer in answers.items():
        if answer is None:
            results[name]["status"] = RIGHT
            continue
        each = list(answer.unbind()) if case.operation == "color_batch" else [answer]
        gives = known[name].gives
        faults: list[str | None] = []
        if gives == "sums":
            faults = [check.fault_of_sums(problem, answer)]
        for part, own, expected in zip(parts, each, trusted, strict=False):
            if gives == "colors":
                faults.append(check.fault_of_colors(part, own, expected))
            elif gives == "components":
                faults.append(check.fault_of_components(part, own, expected))
            elif gives == "pairs":
                faults.append(check.fault_of_pairs(int(own), expected))
        fault = next((fault for fault in faults if fault), None)
        results[name]["status"] = f"wrong: {fault}" if fault else RIGHT
        results[name]["checked_by"] = "numpy"
        if colored:
            source = trusted[0].source if trusted[0] is not None else ""
            limits = "numpy's ranges" if gives == "colors" else ""
            source = "" if source == name else source
            results[name]["checked_by"] = " and ".join(filter(None, [limits, source]))
        if gives in ("colors", "components"):
            results[name]["colors"] = sum(len(own.unique()) for own in each)


def trusted_colors(problem: Problem, answers: dict[str, Tensor | None]) -> check.Trusted | None:
    """What was planted; numpy for equal rows; else the reference or scipy, if itself faultless."""
    if problem.planted is not None:
        return check.Trusted(problem.planted.cpu().numpy(), "planted")
    if problem.case.share == "0":
        return check.distinct_rows(problem)
    for source in ("reference", "scipy"):
        answer = answers.get(source)
        if answer is not None and check.fault_of_colors(problem, answer, None) is None:
            return check.Trusted(answer.cpu().numpy(), source)
    return check.all_apart(problem)


def in_turns(
    problem: Problem, first: dict[str, float], options: Namespace
) -> dict[str, list[float]]:
    """Seconds of every provider, round by round; the slow ones take part in fewer rounds."""
    times: dict[str, list[float]] = {name: [] for name in first}
    rounds = {
        name: max(1, min(options.rounds, int(options.limit / max(seconds, 1e-9))))
        for name, seconds in first.items()
    }
    # Ratios are against ours in the same round, so ours misses none.
    if OURS in rounds:
        rounds[OURS] = max(rounds.values())
    for turn in range(options.rounds):
        for name in first:
            if turn < rounds[name]:
                provider = PROVIDERS[problem.case.operation][name]
                times[name].append(clocked(provider, problem)[1])
    return times


def figures(
    seconds: list[float], ours: list[float] | None, size: int, case: Case
) -> dict[str, Any]:
    """Median and spread of the seconds and of the ratios to ours, and what they amount to."""
    found: dict[str, Any] = {"rounds": len(seconds)} | spread("seconds", seconds)
    if ours:
        ratios = [own / our for own, our in zip(seconds, ours, strict=False)]
        found |= spread("ratio", ratios)
    middle = statistics.median(seconds)
    found["bytes_per_s"] = f"{size / middle:.4g}"
    if case.operation.startswith("color"):
        # At least one comparison decides a pair; that is how many the answer is worth.
        pairs = case.batch * case.count * (case.count - 1) / 2
        found["comparisons_per_s"] = f"{pairs / middle:.4g}"
    return found


def spread(name: str, values: list[float]) -> dict[str, str]:
    """Median, quartiles and extremes as columns."""
    low, _, high = (
        statistics.quantiles(values, n=4, method="inclusive") if values[1:] else values * 3
    )
    numbers = {"": statistics.median(values), "_min": min(values), "_q1": low, "_q3": high}
    numbers["_max"] = max(values)
    return {f"{name}{key}": f"{value:.5g}" for key, value in numbers.items()}


def peak(problem: Problem, name: str, device: str) -> str:
    """MiB that a provider needs beyond the rows; empty if unknown.

    A GPU's allocator counts them; of a CPU's, a process of its own is asked.
    """
    case = problem.case
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        clocked(PROVIDERS[case.operation][name], problem)
        return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}"
    command = [sys.executable, str(Path(__file__).resolve()), name, *case.key]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{case}: memory of {name}: {done.stderr.strip()[-200:]}", file=sys.stderr)
        return ""
    return done.stdout.split()[-1]


def print_peak(name: str, case: Case) -> None:
    """The other side of `peak`.  A small run first: libraries are no part of what a call needs."""
    from compile_cost import forget_peak, resident

    run = PROVIDERS[case.operation][name].run
    share = "0" if case.share == "0" else "1e-3"
    run(make(Case(case.operation, case.kind, case.batch, 64, case.width, case.dtype, share)))
    problem = make(case)
    before = forget_peak()
    run(problem)
    print(f"{max(0.0, resident('VmHWM') - before):.0f}")


if __name__ == "__main__":
    print_peak(sys.argv[1], Case.parse(sys.argv[2:]))
