"""Random networks with planted fibers: ``python bench/fuzz.py --seeds 0:1000``.

Prints every failure with the command that reproduces it, then one line; exit code 1 on any failure.
With ``--results`` finished seeds are kept in a file and not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from planting_checks import check_seed


def finished(path: Path | None) -> dict[int, dict]:
    if path is None or not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return {line["seed"]: line for line in lines}


def seeds_of(text: str) -> range:
    first, colon, last = text.partition(":")
    return range(int(first), int(last) if colon else int(first) + 1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=seeds_of, default=range(100), metavar="A:B")
    parser.add_argument("--thorough", action="store_true", help="every check for every seed")
    parser.add_argument("--results", type=Path, help="JSON lines; finished seeds are left out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    done = finished(options.results)
    claimed = failed = 0
    start = time.perf_counter()
    todo = [seed for seed in options.seeds if seed not in done]
    results = [done[seed] for seed in options.seeds if seed in done]
    for seed in tqdm(todo, desc="fuzz", disable=None):
        begun = time.perf_counter()
        try:
            outcome = vars(check_seed(seed, thorough=options.thorough))
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0]
            failures = [f"{type(error).__name__}: {line[:160]}"]
            outcome = {"seed": seed, "failures": failures, "notes": [], "claimed": False}
        outcome["seconds"] = round(time.perf_counter() - begun, 2)
        results.append(outcome)
        if options.results is not None:
            with options.results.open("a") as file:
                file.write(json.dumps(outcome) + "\n")
    for outcome in results:
        claimed += outcome["claimed"]
        failed += bool(outcome["failures"])
        for line in outcome["failures"]:
            print(f"seed {outcome['seed']}: {line}")
        for line in outcome["notes"]:
            print(f"seed {outcome['seed']}: (note) {line}")
        if outcome["failures"]:
            print(f"    python bench/fuzz.py --thorough --seeds {outcome['seed']}")
    seconds = time.perf_counter() - start
    print(
        f"{len(results)} seeds, {claimed} of them claimed to be recovered, {failed} failed, "
        f"{seconds:.0f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
