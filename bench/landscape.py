"""Lifts of one base share its loss: equal along paths of lifts, a tree of merges (Fig. 4c and d).

    python bench/landscape.py --data-root FOLDER [--seeds 0:3] [--plot]

A small perceptron is trained on MNIST: the base.  It is lifted twice, by 1.5 and again to three
times its width, in several ways: which nodes are copied (the seed) and how columns are split (the
size of the changes that cancel in the sum).  In float64 every lift has the loss of the base, and
compiles back to its size at eps = 0.  On straight lines between two lifts of one width:

- ``same fibers``: the same nodes are copied alike.  All that Eq. 10 asks for is linear in the
  weights, so every point on the line is a lift, too, and the loss does not move.
- ``same parent``: copied from one intermediate network, another choice of nodes.
- ``same base``: through another intermediate network.  These lines leave the lifts.
- ``same base, in order``: the same pairs, nodes put in the order of the base's nodes they copy.

``same base, corner by corner`` is a path between the same pairs that stays among the lifts
(bench/landscape_path.py), so its loss does not move either; there ``t`` counts corners.

Rows: `landscape_lifts.csv` (a network each), `landscape.csv` (a point on a line each).  The losses
are those of 500 test images; they choose nothing.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from landscape_path import corners
from tables import Row, read, write
from torch import Tensor, nn
from tqdm import tqdm
from trained import Images, images, training

import fxfib

RESULTS = Path(__file__).resolve().parent / "results"
HIDDEN = (24, 16)
CHANGES = (0.0, 1.0)
POINTS = 11
LIFTS = ("seed", "network", "parent", "nodes", "parameters", "loss", "difference", "compiled",
         "torch")  # fmt: skip
PATHS = ("seed", "kind", "one", "other", "t", "loss", "excess", "torch")
KINDS = ("same fibers", "same parent", "same base", "same base, in order",
         "same base, corner by corner")  # fmt: skip


def base_of(seed: int, data: Images) -> nn.Sequential:
    """The trained base, in float64."""
    torch.manual_seed(seed)
    first, second = HIDDEN
    model = nn.Sequential(nn.Linear(784, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(),
                          nn.Linear(second, 10))  # fmt: skip
    for _ in training(model, data, 1, seed):
        pass
    return model.double().eval()


def loss_of(model: nn.Module, data: Images) -> float:
    """Cross-entropy of some test images."""
    with torch.no_grad():
        return float(F.cross_entropy(model(data.test[:500].double()), data.test_labels[:500]))


def widened(model: nn.Module, factor: float, seed: int, changes: float) -> nn.Sequential:
    """A lift whose layers are exactly so many times as wide.

    Like `fxfib.lift`, whose widths depend on the seed: nodes to copy are drawn, columns are split
    among the copies at random, and changes that sum to zero over the copies are added.
    """
    source = torch.Generator().manual_seed(seed)
    made: list[nn.Module] = []
    layers = linear(model)
    reads = torch.arange(layers[0].in_features)
    for layer in layers:
        count, last = layer.out_features, layer is layers[-1]
        copies = torch.randint(count, (0 if last else round(count * factor) - count,),
                               generator=source)  # fmt: skip
        makes = torch.cat([torch.arange(count), copies])
        makes = makes if last else makes[torch.randperm(len(makes), generator=source)]
        groups = F.one_hot(reads).double()
        share = torch.rand(len(reads), generator=source).double() + 0.2
        share = share / (groups @ (groups.T @ share))
        noise = torch.randn(len(makes), len(reads), generator=source).double()
        noise = noise - noise @ (groups / groups.sum(0)) @ groups.T
        wide = nn.Linear(len(reads), len(makes)).double()
        with torch.no_grad():
            whole = layer.weight[makes][:, reads]
            wide.weight.copy_(whole * share + changes * noise * layer.weight.std())
            wide.bias.copy_(layer.bias[makes])
        made += [wide, nn.ReLU()]
        reads = makes
    return nn.Sequential(*made[:-1]).eval()


def lifts_of(base: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Networks by name, each with its parent's name."""
    found: dict[str, tuple[str, nn.Module]] = {"base": ("", base)}
    for parent in range(2):
        name = f"mid {parent}"
        middle = widened(base, 1.5, parent, 0.5)
        found[name] = ("base", middle)
        for chosen in range(2):
            for changes in CHANGES:
                leaf = widened(middle, 2.0, 10 + 2 * parent + chosen, changes)
                found[f"leaf {parent}.{chosen}, changes {changes:g}"] = (name, leaf)
    return found


def linear(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def nodes_of(model: nn.Module) -> int:
    """Hidden nodes."""
    return sum(layer.out_features for layer in linear(model)[:-1])


def between(one: nn.Module, other: nn.Module, t: float) -> nn.Module:
    """The point on the straight line."""
    made = copy.deepcopy(one)
    with torch.no_grad():
        for p, q in zip(made.parameters(), other.parameters(), strict=True):
            p.lerp_(q, t)
    return made


def in_order(model: nn.Module, example: Tensor) -> nn.Module:
    """The same function: hidden nodes sorted by what they compute on an example."""
    made = copy.deepcopy(model)
    layers = linear(made)
    with torch.no_grad():
        h = example
        for layer, reader in itertools.pairwise(layers):
            h = F.relu(layer(h))
            order = torch.from_numpy(np.lexsort(np.round(h.numpy(), 9)))
            layer.weight.copy_(layer.weight[order])
            layer.bias.copy_(layer.bias[order])
            reader.weight.copy_(reader.weight[:, order])
            h = h[:, order]
    return made


def pairs_of(names: list[str]) -> list[tuple[str, str, str]]:
    """Kinds and pairs of leaves."""
    leaves = [name for name in names if name.startswith("leaf")]
    found = []
    for at, one in enumerate(leaves):
        for other in leaves[at + 1 :]:
            (p, c), (q, d) = (name.split(",")[0].split()[1].split(".") for name in (one, other))
            kind = "same fibers" if (p, c) == (q, d) else "same parent" if p == q else "same base"
            found.append((kind, one, other))
            if kind == "same base":
                found += [(name, one, other) for name in KINDS if name.startswith(f"{kind},")]
    return found


def points_of(
    kind: str, a: nn.Module, b: nn.Module, base: nn.Module, example: Tensor
) -> Iterator[tuple[float, nn.Module]]:
    """Networks along a line, or along a path of lines: its corners and their middles."""
    if "corner" not in kind:
        for place in range(POINTS):
            t = place / (POINTS - 1)
            yield t, between(a, b, t)
        return
    path = list(corners(a, b, base, example))
    for p, q in zip(path[-1].parameters(), b.parameters(), strict=True):
        if not torch.equal(p, q):
            raise AssertionError("the path does not end where it should")
    for place, point in enumerate(path):
        if place:
            yield (place - 0.5) / (len(path) - 1), between(path[place - 1], point, 0.5)
        yield place / (len(path) - 1), point


def study(seed: int, data: Images) -> tuple[list[Row], list[Row]]:
    """The networks and the lines of one base."""
    base, example = base_of(seed, data), data.test[:50].double()
    start, networks = loss_of(base, data), lifts_of(base)
    size = sum(p.numel() for p in base.parameters())
    lifts, paths = [], []
    for name, (parent, network) in networks.items():
        loss = loss_of(network, data)
        small = fxfib.compile(network, 0.0, example)
        lifts.append({
            "seed": seed, "network": name, "parent": parent, "nodes": nodes_of(network),
            "parameters": sum(p.numel() for p in network.parameters()), "loss": f"{loss:.12g}",
            "difference": f"{abs(loss - start):.2g}",
            "compiled": sum(p.numel() for p in small.parameters()), "torch": torch.__version__,
        })  # fmt: skip
        if lifts[-1]["compiled"] != size:
            raise AssertionError(f"{name} does not compile back to the base")
    ordered = {name: in_order(network, example) for name, (_, network) in networks.items()}
    for kind, one, other in tqdm(pairs_of(list(networks)), desc=f"lines {seed}", leave=False):
        a, b = (ordered[n] if "order" in kind else networks[n][1] for n in (one, other))
        for t, point in points_of(kind, a, b, base, example):
            loss = loss_of(point, data)
            paths.append({
                "seed": seed, "kind": kind, "one": one, "other": other, "t": f"{t:.4g}",
                "loss": f"{loss:.12g}", "excess": f"{loss - start:.3g}",
                "torch": torch.__version__,
            })  # fmt: skip
    return lifts, paths


def plot(lifts: list[Row], paths: list[Row], path: Path) -> None:
    """Loss along the lines, and the tree of merges of the first base."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(14, 5), layout="constrained")
    left, right = made.subplots(1, 2)
    colors = dict(zip(KINDS, ("#12a67a", "#2f6bff", "#c2334d", "#e0a11b", "#16202c"), strict=True))
    for kind in KINDS:
        own = [r for r in paths if r["kind"] == kind]
        for key in {(r["seed"], r["one"], r["other"]) for r in own}:
            line = [r for r in own if (r["seed"], r["one"], r["other"]) == key]
            left.plot([float(r["t"]) for r in line], [float(r["excess"]) for r in line],
                      color=colors[kind], alpha=0.25, lw=1)  # fmt: skip
        highest = max(abs(float(r["excess"])) for r in own)
        left.plot([], [], color=colors[kind], label=f"{kind}: at most {highest:.1e}")
    left.set(title="loss on the way between two lifts, less that of the base",
             xlabel="from one lift to the other", yscale="symlog")  # fmt: skip
    left.set_yscale("symlog", linthresh=1e-3)
    left.legend(frameon=False, fontsize=9)
    own = [r for r in lifts if r["seed"] == lifts[0]["seed"]]
    leaves = [r["network"] for r in own if r["network"].startswith("leaf")]
    across = {name: float(place) for place, name in enumerate(leaves)}
    for level in ("mid", "base"):
        for row in own:
            if row["network"].startswith(level):
                below = [across[r["network"]] for r in own if r["parent"] == row["network"]]
                across[row["network"]] = sum(below) / len(below)
    for row in own:
        x, y = across[row["network"]], int(row["nodes"])
        if row["parent"]:
            top = next(int(r["nodes"]) for r in own if r["network"] == row["parent"])
            over = across[row["parent"]]
            right.plot([x, x, over], [y, top, top], color="#5b6878", lw=1.2)
        right.plot([x], [y], "o", color="#2f6bff")
        leaf = row["network"].startswith("leaf")
        size, loss = int(row["parameters"]), float(row["loss"])
        right.annotate(
            f"{row['network']}\n{size:,} parameters\nloss {loss:.9f}",
            (x, y), xytext=(0, 10) if leaf else (8, -14), textcoords="offset points", fontsize=7,
            ha="center" if leaf else "left", rotation=90 if leaf else 0,
            va="bottom" if leaf else "top",
        )  # fmt: skip
    most = max(int(r["nodes"]) for r in own)
    right.set_ylim(0.1 * most, 1.75 * most)
    right.set_xlim(-0.6, len(leaves) - 0.4)
    right.set(title="the tree of merges: lifts of one base", ylabel="hidden nodes", xticks=[])
    made.savefig(path, dpi=90)


def main(arguments: list[str] | None = None) -> int:
    """Make what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", default=os.environ.get("FXFIB_DATA"))
    parser.add_argument("--seeds", default="0:3", help="first:last, the last not included")
    parser.add_argument("--cache", type=Path, default=Path("bench/cache"))
    parser.add_argument("--output", type=Path, default=RESULTS / "landscape.csv")
    parser.add_argument("--plot", action="store_true", help="only draw, from the CSV")
    options = parser.parse_args(arguments)
    second = options.output.with_name(f"{options.output.stem}_lifts.csv")
    paths, lifts = read(options.output), read(second)
    first, last = map(int, options.seeds.split(":"))
    done = {int(r["seed"]) for r in paths} & {int(r["seed"]) for r in lifts}
    missing = [] if options.plot else [s for s in range(first, last) if s not in done]
    if missing:
        try:
            data = images("mlp", options.data_root, options.cache)
        except (OSError, RuntimeError) as error:
            print(f"MNIST cannot be had: {error}", file=sys.stderr)
            return 1
    for seed in tqdm(missing, desc="landscape"):
        more, lines = study(seed, data)
        lifts = [r for r in lifts if int(r["seed"]) != seed] + more
        paths = [r for r in paths if int(r["seed"]) != seed] + lines
        write(second, lifts, LIFTS)
        write(options.output, paths, PATHS)
    plot(read(second), read(options.output), options.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
