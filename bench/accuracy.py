"""Accuracy against parameters: fxfib beside other ways to make a trained network smaller.

    python bench/accuracy.py --data-root FOLDER [--network mnist_mlp] [--seeds 0:5] [--plot]

Networks (`accuracy_networks.py`): the MNIST perceptron of the published figures, a small
convolutional network on MNIST and an LSTM, a GRU and a plain RNN that read digits row by row, each
trained once for each seed (Adam 1e-3, batches of 100, one pass) and kept in `--cache`; a ResNet-18
and a VGG-like network for CIFAR-10, trained for each seed by `cifar_training.py` (width and epochs
stand in the name), on 5,000 test images; the given CIFAR-10 ResNets, on 2,000; the transformer of
`translation.py`, whose accuracy here is the BLEU of 200 validation sentences.  Seeds of the given
ones draw the calibration alone.  CIFAR-10 is read from images stored as JPEG.
Every method makes networks of at most the same number of parameters.  Calibration is 2,000
(perceptron) or 1,024 training images without labels, or 256 sentences; what is measured chooses
nothing.  One row of the CSV is one network; rows that are there are not made again.

Methods: `fxfib` is `fxfib.tune`.  The others keep the same part of the nodes in every hidden layer:
`random`, `l1`, `l2` (norms of rows, bias included, smallest dropped), `cosine` (the published
clustering, average linkage, rows averaged), `folding` (k-means of the rows, means; our own code
after the published description), `tp-magnitude`, `tp-fpgm` (Torch-Pruning's pruner, importances).
Compensation: `none`; `noise` and `images`, fxfib's least squares, the same for all; `refined`,
`images` and then 10 passes over these images towards the original's outputs (what `fxfib.tune` does
unasked where it has images), `noise-refined` the same with noise; `trained`, `refined` and then one
pass over the training data with labels (not the transformer).  Torch-Pruning's networks are only
trained; it shrinks neither the LSTM nor the transformer.

Where networks are hardly smaller, accuracy tells no method from another: on 10,000 images it comes
out 0.05 to 0.1 points higher or lower by chance.  `agreement` is finer: how many answers are those
of the original, in percent, right or wrong.

`--plot` draws the pictures and writes the page of `accuracy_table.py` beside the CSV.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accuracy_methods import OTHERS, PRUNERS, count, made
from accuracy_networks import CASES, agreement, macs, trained
from accuracy_table import text
from tables import read, write
from tqdm import tqdm

FRACTIONS = (0.9, 0.7, 0.5, 0.3, 0.17, 0.1, 0.05, 0.025)
METHODS = ("fxfib", *OTHERS, *PRUNERS)
KINDS = ("none", "noise", "noise-refined", "images", "refined", "trained")
COLUMNS = (
    "network", "seed", "method", "compensation", "target", "parameters", "fraction", "macs",
    "accuracy", "original", "seconds", "torch", "agreement",
)  # fmt: skip


def plan(fractions: tuple[float, ...]) -> Iterator[tuple[str, str, float]]:
    """What is made for every seed: method, compensation, target."""
    for target in fractions:
        for compensation in KINDS:
            yield "fxfib", compensation, target
        for method in OTHERS:
            for compensation in KINDS[:-1]:
                yield method, compensation, target
        for method in PRUNERS:
            for compensation in ("none", "trained"):
                yield method, compensation, target


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """What makes a row one of its kind."""
    return tuple(str(row[name]) for name in ("network", "seed", "method", "compensation", "target"))


def summary(rows: list[dict[str, Any]]) -> str:
    """Points below the original: median over seeds, smallest and largest; median agreement."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for row in rows:
        name = row["method"], row["compensation"], float(row["target"])
        groups.setdefault(name, []).append(row)
    lines = [
        f"{'method':<14} {'compensation':<13} {'kept':>6} {'median':>8} {'from':>7} {'to':>7} "
        f"{'agree':>7}"
    ]
    for (method, compensation, target), own in sorted(groups.items()):
        below = [float(row["original"]) - float(row["accuracy"]) for row in own]
        same = [float(row["agreement"]) for row in own if row.get("agreement")]
        agree = f"{statistics.median(same):.2f}" if same else "-"
        lines.append(
            f"{method:<14} {compensation:<13} {target:>6} {statistics.median(below):>8.2f} "
            f"{min(below):>7.2f} {max(below):>7.2f} {agree:>7}  ({len(below)} seeds)"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], folder: Path) -> None:
    """Median accuracy against the part of the parameters that is kept, from the rows alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for network in dict.fromkeys(r["network"] for r in rows):
        own = [r for r in rows if r["network"] == network]
        kinds = [k for k in KINDS if any(r["compensation"] == k for r in own)]
        figure, panels = pyplot.subplots(
            1, len(kinds), figsize=(4.5 * len(kinds), 4.5), sharey=True, squeeze=False
        )
        for panel, kind in zip(panels[0], kinds, strict=True):
            chosen = [r for r in own if r["compensation"] == kind]
            for method in dict.fromkeys(r["method"] for r in chosen):
                points: dict[float, list[float]] = {}
                for row in chosen:
                    if row["method"] == method:
                        points.setdefault(float(row["target"]), []).append(float(row["accuracy"]))
                shares = sorted(points)
                values = [statistics.median(points[s]) for s in shares]
                color = f"C{METHODS.index(method)}"  # the same in every panel
                panel.plot(shares, values, marker="o", ms=3, label=method, color=color)
            panel.set(title=f"{network}: {kind}", xscale="log", xlabel="parameters kept in %")
            ticks = sorted({float(r["target"]) for r in chosen})
            panel.minorticks_off()
            panel.set_xticks(ticks, [f"{100 * tick:g}" for tick in ticks])
            panel.legend(fontsize=7)
        panels[0][0].set_ylabel("test accuracy in %, median")
        figure.tight_layout()
        figure.savefig(folder / f"accuracy_{network}.png", dpi=90)
        pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Make what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", default=os.environ.get("FXFIB_DATA"))
    parser.add_argument("--network", default="mnist_mlp", choices=list(CASES))
    parser.add_argument("--seeds", default="0:5", help="first:last, the last not included")
    parser.add_argument("--fractions", default=",".join(map(str, FRACTIONS)))
    parser.add_argument("--methods", default="", help="only these, comma-separated")
    parser.add_argument("--compensations", default="", help="only these, comma-separated")
    parser.add_argument("--cache", type=Path, default=Path("bench/cache"))
    parser.add_argument("--output", type=Path, default=Path("bench/results/accuracy.csv"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--plot", action="store_true", help="only draw and tabulate the CSV")
    options = parser.parse_args(arguments)
    rows = read(options.output)
    if options.plot:
        plot(rows, options.output.parent)
        page = options.output.with_suffix(".md")
        page.write_text(text(rows), encoding="utf-8")
        return 0
    case = CASES[options.network]
    try:
        if options.data_root is None:
            raise RuntimeError("give --data-root, or set FXFIB_DATA")
        root = Path(options.data_root)
        data = case.data(root)
    except (OSError, RuntimeError) as error:
        print(f"the data cannot be had: {error}", file=sys.stderr)
        return 1
    first, last = map(int, options.seeds.split(":"))
    fractions = tuple(float(f) for f in options.fractions.split(","))
    done = {key(row) for row in rows}
    wanted = [
        (seed, *entry)
        for seed in range(first, last)
        for entry in plan(fractions)
        if (case.pruners or entry[0] not in PRUNERS)
        and (case.labels or entry[1] != "trained")
        and (not options.methods or entry[0] in options.methods.split(","))
        and (not options.compensations or entry[1] in options.compensations.split(","))
    ]
    wanted = [w for w in wanted
              if (options.network, *map(str, w)) not in done]  # fmt: skip
    began = time.perf_counter()
    models = {
        seed: trained(options.network, root, data, seed, options.cache)
        for seed in dict.fromkeys(w[0] for w in wanted)
    }
    originals = {seed: data.answers(model) for seed, model in models.items()}
    for seed, method, compensation, target in tqdm(wanted, desc=options.network):
        if time.perf_counter() - began > 60 * options.minutes:
            break
        model = models[seed]
        start = time.perf_counter()
        small = made(model, method, compensation, target, seed, data, case.images)
        seconds = time.perf_counter() - start
        size = count(small)
        if size > target * count(model):
            raise AssertionError(f"{method} made {size} parameters, more than {target} of all")
        answers, theirs = data.answers(small), originals[seed]
        rows.append({
            "network": options.network, "seed": seed, "method": method,
            "compensation": compensation, "target": target,
            "parameters": size, "fraction": round(size / count(model), 5),
            "macs": macs(small, data), "accuracy": round(data.right(answers), 3),
            "original": round(data.right(theirs), 3), "seconds": round(seconds, 2),
            "torch": torch.__version__, "agreement": round(agreement(answers, theirs), 3),
        })  # fmt: skip
        write(options.output, rows, COLUMNS)
    print(summary([r for r in rows if r["network"] == options.network]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
