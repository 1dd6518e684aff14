"""Symmetry emerges while a network learns: fibers fall, accuracy rises (paper, Fig. 3a and S7).

    python bench/emergence.py --data-root FOLDER [--networks mlp,cnn] [--seeds 0:5] [--plot]

Every so many steps `fxfib.Monitor` looks at the network in training (networks and training:
bench/trained.py).  Fibers are found as published: rows with their bias, average linkage of cosine
distances, one `eps` for all layers.  Afterwards the trained network is compiled at several `eps`
of the same measure, beside the published points of Fig. 3b.  Rows of seeds that are there are not
made again: `emergence.csv` (look by look and layer by layer), `emergence_compressed.csv`.  Test
images choose nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

import torch
from tables import Row, read, write
from torch import nn
from tqdm import tqdm
from trained import NETWORKS, PASSES, Images, images, keep, kept, steps_of, training, untrained

import fxfib
from fxfib.history import COLUMNS as SEEN

RESULTS = Path(__file__).resolve().parent / "results"
EPS = 0.7
EVERY = {"mlp": 20, "cnn": 50}
COMPILED = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
COLUMNS = ("network", "seed", "eps", *SEEN, "loss", "accuracy", "torch")
COMPRESSED = ("network", "seed", "eps", "parameters", "fraction", "accuracy", "original", "torch")
# Fig. 3b: the best of the published grid at or under a part of the parameters; and Fig. 3a's end.
PUBLISHED = {
    0.50: 96.39, 0.40: 96.13, 0.30: 95.14, 0.20: 93.05, 0.17: 91.30, 0.12: 88.40, 0.10: 83.99,
    0.08: 67.22, 0.05: 55.89, 0.03: 53.72,
}  # fmt: skip
PUBLISHED_END = 96.78


def watched(network: str, seed: int, data: Images, cache: Path) -> list[Row]:
    """Train once under a monitor; the rows of all looks."""
    torch.manual_seed(seed)
    model = untrained(network)
    every, steps = EVERY[network], steps_of(network, data)
    monitor = fxfib.Monitor(model, data.train[:64], EPS, every)
    accuracies = {0: data.accuracy(model)}
    losses: dict[int, float] = {}
    recent: list[float] = []
    found = training(model, data, PASSES[network], seed)
    for loss in tqdm(found, total=steps, desc=f"{network} {seed}", leave=False):
        recent.append(loss)
        if (look := monitor.step()) is not None:
            accuracies[look.step] = data.accuracy(model)
            losses[look.step] = statistics.fmean(recent)
            recent = []
    keep(model, kept(network, seed, cache))
    fixed = {"network": network, "seed": seed, "eps": EPS, "torch": torch.__version__}
    rows = []
    for row in monitor.history.rows():
        step = row["step"]
        signs = {k: "" if row[k] is None else f"{row[k]:.4g}"
                 for k in ("effective_rank", "weight_norm")}  # fmt: skip
        loss = f"{losses[step]:.5f}" if step in losses else ""
        rows.append(fixed | row | signs | {"loss": loss, "accuracy": f"{accuracies[step]:.2f}"})
    return rows


def compressed(network: str, seed: int, data: Images, cache: Path) -> list[Row]:
    """The trained network compiled at several eps, nothing fitted afterwards."""
    model = untrained(network)
    model.load_state_dict(torch.load(kept(network, seed, cache), weights_only=True))
    model.eval()
    whole = sum(p.numel() for p in model.parameters())
    original = data.accuracy(model)
    rows = []
    for eps in tqdm(COMPILED, desc=f"compile {network} {seed}", leave=False):
        small: nn.Module = fxfib.compile(
            model, eps, data.train[:4], criterion="cosine", compensate=False, verify=False
        )
        size = sum(p.numel() for p in small.parameters())
        rows.append({
            "network": network, "seed": seed, "eps": eps, "parameters": size,
            "fraction": f"{size / whole:.4f}", "accuracy": f"{data.accuracy(small):.2f}",
            "original": f"{original:.2f}", "torch": torch.__version__,
        })  # fmt: skip
    return rows


def spread(rows: list[Row], column: str) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps, and the median, smallest and largest over the seeds."""
    found: dict[int, list[float]] = {}
    for row in rows:
        found.setdefault(int(row["step"]), []).append(float(row[column]))
    steps = sorted(found)
    return (steps, [statistics.median(found[s]) for s in steps],
            [min(found[s]) for s in steps], [max(found[s]) for s in steps])  # fmt: skip


def plot(rows: list[Row], small: list[Row], path: Path) -> None:
    """Fig. 3a beside the published end, Fig. 3b beside the published points, S7; from the rows."""
    from matplotlib.figure import Figure

    networks = [n for n in NETWORKS if any(r["network"] == n for r in rows)]
    made = Figure(figsize=(15, 4.3 * len(networks)), layout="constrained")
    panels = made.subplots(len(networks), 3, squeeze=False)
    for (left, middle, right), network in zip(panels, networks, strict=True):
        own = [r for r in rows if r["network"] == network]
        seeds = len({r["seed"] for r in own})
        layers = list(dict.fromkeys(r["layer"] for r in own))[:-1]  # the last: the outputs
        for at, layer in enumerate(layers):
            some = [r for r in own if r["layer"] == layer]
            nodes = int(some[0]["nodes"])
            shade = (0.7 * at / max(1, len(layers) - 1),) * 3
            for panel, column, style in (
                (left, "fibers_of_one_node", "--"),
                (middle, "fibers", "-"),
                (middle, "covers", ":"),
            ):
                steps, values, low, high = spread(some, column)
                name = f"layer {layer}" if panel is left or column == "fibers" else None
                panel.plot(steps, [v / nodes for v in values], style, color=shade, label=name)
                panel.fill_between(steps, [v / nodes for v in low], [v / nodes for v in high],
                                   color=shade, alpha=0.15, lw=0)  # fmt: skip
        last = layers[-1]
        steps, values, low, high = spread([r for r in own if r["layer"] == last], "accuracy")
        beside = left.twinx()
        beside.plot(steps, values, color="#2e9e4f", lw=2)
        beside.fill_between(steps, low, high, color="#2e9e4f", alpha=0.25, lw=0)
        beside.set_ylabel("test accuracy in %", color="#2e9e4f")
        if network == "mlp":
            beside.plot([steps[-1]], [PUBLISHED_END], "*", color="#d62728", ms=13,
                        label=f"published end, {PUBLISHED_END} %")  # fmt: skip
            beside.legend(frameon=False, loc="center")
        left.set(title=f"{network}, {seeds} seeds: fibers of one node", xlabel="step",
                 ylabel="share of the layer's nodes")  # fmt: skip
        left.legend(frameon=False, fontsize=8, loc="center right")
        middle.set(title=f"{network}: fibers (solid) and covers (dotted)", xlabel="step")
        for eps in sorted({r["eps"] for r in small if r["network"] == network}):
            points = [r for r in small if r["network"] == network and r["eps"] == eps]
            sizes, values = ([float(r[c]) for r in points] for c in ("fraction", "accuracy"))
            right.plot(sizes, values, "o", ms=4, label=f"eps {eps}")
        if network == "mlp":
            right.plot(
                list(PUBLISHED), list(PUBLISHED.values()), "r*-", label="published, eps by layer"
            )
        right.set(title=f"{network}: compiled, one eps for all layers", xscale="log",
                  xlabel="parameters kept", ylabel="test accuracy in %")  # fmt: skip
        right.legend(frameon=False, fontsize=7)
    made.savefig(path, dpi=90)


def main(arguments: list[str] | None = None) -> int:
    """Make what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", default=os.environ.get("FXFIB_DATA"))
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--seeds", default="0:5", help="first:last, the last not included")
    parser.add_argument("--cache", type=Path, default=Path("bench/cache"))
    parser.add_argument("--output", type=Path, default=RESULTS / "emergence.csv")
    parser.add_argument("--plot", action="store_true", help="only draw, from the CSV")
    options = parser.parse_args(arguments)
    second = options.output.with_name(f"{options.output.stem}_compressed.csv")
    rows, small = read(options.output), read(second)
    first, last = map(int, options.seeds.split(":"))
    for network in () if options.plot else options.networks.split(","):
        missing = []
        for seed in range(first, last):
            seen, made = (
                any((r["network"], int(r["seed"])) == (network, seed) for r in part)
                for part in (rows, small)
            )
            if not (seen and made):
                missing.append((seed, seen, made))
        if not missing:
            continue
        try:
            data = images(network, options.data_root, options.cache)
        except (OSError, RuntimeError) as error:
            print(f"the images of {network} cannot be had: {error}", file=sys.stderr)
            return 1
        for seed, seen, made in tqdm(missing, desc=network):
            if not seen or not kept(network, seed, options.cache).exists():
                rows = [r for r in rows if (r["network"], int(r["seed"])) != (network, seed)]
                rows += watched(network, seed, data, options.cache)
                write(options.output, rows, COLUMNS)
            if not made:
                small += compressed(network, seed, data, options.cache)
                write(second, small, COMPRESSED)
    plot(read(options.output), read(second), options.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
