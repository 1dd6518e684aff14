"""Synchrony clusters of networks in training, over all inputs and class by class (Fig. 4a and b).

    python bench/synchrony.py --data-root FOLDER [--networks mlp,cnn] [--seeds 0:3] [--plot]

A network (bench/trained.py) is looked at early, in the middle and at the end of its training: the
correlations of every layer's activations on 4,000 test images, their clusters, and how they stand
to the fibers.  ``trained`` rows have fibers by the published measure at `eps`: they are only nearly
synchronous, so the share of their pairs that share a cluster is measured.  ``lifted`` rows are of
the network at the end, widened by 1.5: its fibers are exact, and every cluster must be a union of
them.  Rows by class are medians over the classes.  Test images choose nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tables import Row, read, write
from torch import nn
from tqdm import tqdm
from trained import NETWORKS, PASSES, Images, images, steps_of, training, untrained

import fxfib

RESULTS = Path(__file__).resolve().parent / "results"
THRESHOLD = 0.9
EPS = 0.5
COUNT = 4000
WHEN = (1 / 15, 1 / 3, 1.0)
COLUMNS = (
    "network", "seed", "step", "model", "eps", "threshold", "layer", "over", "nodes", "fibers",
    "clusters", "largest", "mean", "constant", "split", "pairs", "kept", "accuracy", "torch",
)  # fmt: skip
NUMBERS = ("clusters", "largest", "mean", "constant", "split", "kept")


def loader(data: Images) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Some test images with their labels."""
    x, y = data.test[:COUNT], data.test_labels[:COUNT]
    yield from zip(x.split(500), y.split(500), strict=True)


def summed(found: fxfib.Synchrony) -> Iterator[Row]:
    """Rows over all inputs, the medians over classes, and the intersection of all classes."""
    for name in found.layers:
        rows = [row for row in found.rows() if row["layer"] == name]
        by_class = [row for row in rows if row["class"] not in ("", "intersection")]
        middle: Row = dict(by_class[0])
        middle |= {key: statistics.median(row[key] for row in by_class) for key in NUMBERS}
        for over, row in (("all inputs", rows[0]), ("a class", middle), ("intersection", rows[-1])):
            numbers = {k: f"{row[k]:.4g}" for k in NUMBERS if k in row}
            yield {"layer": name, "over": over, "nodes": row["nodes"], "fibers": row["fibers"],
                   "pairs": row["pairs"], **numbers}  # fmt: skip


def watched(
    network: str, seed: int, data: Images, draw: Path | None
) -> tuple[list[Row], list[fxfib.Synchrony]]:
    """Rows of one training run; figures of the last hidden layer where wanted."""
    torch.manual_seed(seed)
    model = untrained(network)
    steps = steps_of(network, data)
    wanted = {max(1, round(part * steps)) for part in WHEN}
    rows: list[Row] = []
    seen: list[fxfib.Synchrony] = []
    example = data.train[:4]

    def look(module: nn.Module, kind: str, step: int, eps: float, criterion: str) -> None:
        found = fxfib.synchrony(
            module, loader(data), threshold=THRESHOLD, eps=eps, criterion=criterion, progress=False
        )
        if kind == "lifted" and not found.holds:
            raise AssertionError("a cluster splits an exact fiber")
        fixed = {"network": network, "seed": seed, "step": step, "model": kind, "eps": eps,
                 "threshold": THRESHOLD, "accuracy": f"{data.accuracy(module):.2f}",
                 "torch": torch.__version__}  # fmt: skip
        rows.extend(fixed | row for row in summed(found))
        if kind == "trained":
            seen.append(found)

    done = training(model, data, PASSES[network], seed)
    bar = tqdm(done, total=steps, desc=f"{network} {seed}", leave=False)
    for step, _ in enumerate(bar, 1):
        if step in wanted:
            look(model, "trained", step, EPS, "cosine")
    lifted = fxfib.lift(model.eval(), 1.5, example)
    look(lifted, "lifted", steps, 0.0, "fibration")
    if draw is not None:
        pictures(seen, sorted(wanted), network, draw)
    return rows, seen


def pictures(seen: list[fxfib.Synchrony], steps: list[int], network: str, path: Path) -> None:
    """Correlation matrices of the last hidden layer over training, one row of panels a look."""
    import io

    from matplotlib.figure import Figure
    from matplotlib.image import imread

    parts = []
    for found in seen:
        held = io.BytesIO()
        found.plot(classes=[0, 1, 2]).savefig(held, dpi=60, format="png")
        held.seek(0)
        parts.append(imread(held))
    high, wide = parts[0].shape[:2]
    made = Figure(figsize=(wide / 60, len(parts) * (high / 60 + 0.3)), layout="constrained")
    for axes, part, step in zip(made.subplots(len(parts), 1), parts, steps, strict=True):
        axes.imshow(part)
        axes.set_axis_off()
        axes.set_title(f"{network}, step {step}", fontsize=11)
    made.savefig(path, dpi=45)


def plot(rows: list[Row], path: Path) -> None:
    """Clusters as a share of the nodes, over training, and pairs of fibers that are kept."""
    from matplotlib.figure import Figure

    networks = [n for n in NETWORKS if any(r["network"] == n for r in rows)]
    made = Figure(figsize=(5.2 * len(networks) + 1, 4.2), layout="constrained")
    looks = {"all inputs": "-", "a class": "--", "intersection": ":"}
    for axes, network in zip(made.subplots(1, len(networks), squeeze=False)[0], networks,
                             strict=True):  # fmt: skip
        own = [r for r in rows if r["network"] == network and r["model"] == "trained"]
        layers = list(dict.fromkeys(r["layer"] for r in own))[:-1]
        for at, layer in enumerate(layers):
            shade = (0.7 * at / max(1, len(layers) - 1),) * 3
            for over, style in looks.items():
                points: dict[int, list[float]] = {}
                for row in own:
                    if (row["layer"], row["over"]) == (layer, over):
                        share = float(row["clusters"]) / int(row["nodes"])
                        points.setdefault(int(row["step"]), []).append(share)
                middle = [statistics.median(points[step]) for step in sorted(points)]
                name = f"layer {layer}, {over}" if not at or over == "all inputs" else None
                axes.plot(sorted(points), middle, style, marker="o", ms=3, color=shade, label=name)
        axes.set(title=f"{network}: synchrony clusters", xlabel="step", ylim=(0, 1.03),
                 ylabel="share of the layer's nodes")  # fmt: skip
        axes.legend(frameon=False, fontsize=7)
    made.savefig(path, dpi=90)


def main(arguments: list[str] | None = None) -> int:
    """Make what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", default=os.environ.get("FXFIB_DATA"))
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--seeds", default="0:3", help="first:last, the last not included")
    parser.add_argument("--cache", type=Path, default=Path("bench/cache"))
    parser.add_argument("--output", type=Path, default=RESULTS / "synchrony.csv")
    parser.add_argument("--plot", action="store_true", help="only draw, from the CSV")
    options = parser.parse_args(arguments)
    rows = read(options.output)
    first, last = map(int, options.seeds.split(":"))
    for network in () if options.plot else options.networks.split(","):
        done = {int(r["seed"]) for r in rows if r["network"] == network}
        missing = [seed for seed in range(first, last) if seed not in done]
        if not missing:
            continue
        try:
            data = images(network, options.data_root, options.cache)
        except (OSError, RuntimeError) as error:
            print(f"the images of {network} cannot be had: {error}", file=sys.stderr)
            return 1
        for seed in tqdm(missing, desc=network):
            picture = options.output.with_name(f"{options.output.stem}_{network}.png")
            more, _ = watched(network, seed, data, picture if seed == first else None)
            rows += more
            write(options.output, rows, COLUMNS)
    plot(read(options.output), options.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
