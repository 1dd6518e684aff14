"""Random networks with planted fibers: ``python bench/fuzz.py --seeds 0:1000``.

Prints every failure with the command that reproduces it, then one line; exit code 1 on any failure.
With ``--results`` finished seeds are kept in a file and not run again.

``--covers`` plants covers instead, and looks at what is learned: errors and gradients beside those
of autograd (float64), also with batch norms in training mode; training by SGD, momentum, weight
decay, Adam and AdamW (one of them a seed; all with ``--thorough``); near misses.  It ends with the
operators that the networks had.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from covering_checks import check_covers
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
    parser.add_argument("--covers", action="store_true", help="planted covers, and training")
    parser.add_argument("--results", type=Path, help="JSON lines; finished seeds are left out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    check = check_covers if options.covers else check_seed
    done = finished(options.results)
    claimed = failed = 0
    start = time.perf_counter()
    todo = [seed for seed in options.seeds if seed not in done]
    results = [done[seed] for seed in options.seeds if seed in done]
    for seed in tqdm(todo, desc="fuzz", disable=None):
        begun = time.perf_counter()
        try:
            outcome = vars(check(seed, thorough=options.thorough))
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
            kind = "--covers " if options.covers else ""
            print(f"    python bench/fuzz.py {kind}--thorough --seeds {outcome['seed']}")
    if options.covers:
        seen = collections.Counter(kind for outcome in results for kind in outcome.get("kinds", ()))
        print("operators:", ", ".join(f"{name} {count}" for name, count in seen.most_common()))
        print(
            f"{sum(o.get('redundant', 0) for o in results)} nodes beyond the first of their cover"
        )
    word = "found, every cover" if options.covers else "recovered"
    seconds = time.perf_counter() - start
    print(
        f"{len(results)} seeds, {claimed} of them claimed to be {word}, {failed} failed, "
        f"{seconds:.0f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
