"""Recurrent networks trained on MNIST row by row: lifted, recovered, and compiled at several eps.

    FXFIB_DATA=folder python bench/recurrent.py                     # LSTM, GRU and RNN; resumable

An image is a sequence of 28 steps of 28 pixels.  Three linear layers name the digit: from all
steps, from the last state and, of an LSTM, from its last cells, so that every result of the layer
is compared.  Trained networks are kept in ``$XDG_CACHE_HOME/fxfib/recurrent``.  Rows go to
bench/results/recurrent.csv: the network as trained, widened by 1.5 and compiled at eps = 0
(``lifted``), and compiled at every eps, with test accuracy, parameters and hidden sizes.
Test images choose nothing.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tables import read, write
from torch import Tensor, nn
from tqdm import tqdm

import fxfib

RESULTS = Path(__file__).resolve().parent / "results" / "recurrent.csv"
EPS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
HIDDEN = 96
LIFT = 1.5
SHAPES = {"x": {1: torch.export.Dim.AUTO}}
COLUMNS = (
    "network", "model", "eps", "parameters", "hidden", "accuracy", "recovered", "error_float32",
    "error_float64", "error_onnx", "onnx_axes", "lstm_gru_rnn_nodes", "compile_s", "passes",
    "machine", "torch", "fxfib",
)  # fmt: skip
Split = tuple[Tensor, Tensor]


class Rows(nn.Module):
    """``linear -> recurrent -> linear`` on images ``[batch, steps, 28]``.

    Gives logits ``[batch, 10]`` of the last state, of the mean of all steps and, of an LSTM, of the
    last cells.
    """

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(28, 48)
        self.layer = kind(48, HIDDEN, batch_first=True, **options)  # type: ignore[arg-type]
        self.ways = 1 + self.layer.bidirectional
        width = (self.layer.proj_size or HIDDEN) * self.ways
        self.of_state, self.of_steps = nn.Linear(width, 10), nn.Linear(width, 10)
        if kind is nn.LSTM:
            self.of_cells = nn.Linear(HIDDEN * self.ways, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Of ``[batch, steps, 28]``."""
        steps, state = self.layer(F.relu(self.first(x)))
        states = state if isinstance(state, tuple) else (state,)
        h, *c = [part[-self.ways :].transpose(0, 1).flatten(1) for part in states]
        found = [self.of_state(h), self.of_steps(steps.mean(1))]
        return (*found, *(self.of_cells(part) for part in c))


NETWORKS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "lstm, 2 layers, both ways, projected": (
        nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 24}
    ),
    "gru": (nn.GRU, {}),
    "gru, 2 layers, no bias": (nn.GRU, {"num_layers": 2, "bias": False}),
    "rnn, tanh": (nn.RNN, {}),
    "rnn, relu, both ways": (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
}  # fmt: skip


def images() -> tuple[Split, Split]:
    """Training and test images in [0, 1] with their labels.

    Raises:
        OSError, RuntimeError: MNIST is not where ``FXFIB_DATA`` says.
    """
    from torchvision.datasets import MNIST

    root = os.environ.get("FXFIB_DATA")
    if not root:
        raise OSError("FXFIB_DATA is not set: it names the folder that holds MNIST/raw/")
    splits = [MNIST(root, train=train, download=False) for train in (True, False)]
    train, test = [(split.data.float() / 255, split.targets) for split in splits]
    return train, test


def trained(name: str, train: Split, passes: int) -> nn.Module:
    """The network from the cache, or trained now."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root, "fxfib", "recurrent")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{''.join(c if c.isalnum() else '_' for c in name)}-{passes}.pt"
    torch.manual_seed(0)
    kind, options = NETWORKS[name]
    model = Rows(kind, **options)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    steps = passes * (len(train[0]) // 128)
    bar = tqdm(total=steps, desc=name, disable=None)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps + 1)
    for _ in range(passes):
        for some in torch.randperm(len(train[0]))[: steps // passes * 128].split(128):
            loss = sum(F.cross_entropy(f, train[1][some]) for f in model(train[0][some]))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
    bar.close()
    part = path.with_suffix(".part")
    torch.save(model.state_dict(), part)
    part.replace(path)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, test: Split) -> str:
    right = sum(
        int((model(x)[0].argmax(1) == y).sum())
        for x, y in zip(test[0].split(1000), test[1].split(1000), strict=True)
    )
    return f"{100 * right / len(test[1]):.2f}"


def describe(model: nn.Module, test: Split) -> dict[str, Any]:
    """Size and accuracy of any of the networks."""
    layer = model.get_submodule("layer")
    hidden = str(layer.hidden_size) + (f" -> {layer.proj_size}" if layer.proj_size else "")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "hidden": hidden,
        "accuracy": accuracy(model, test),
    }


def onnx_row(small: nn.Module, example: Tensor, folder: Path) -> dict[str, Any]:
    """What ONNX Runtime makes of it at other batch sizes and lengths, and the nodes in the file."""
    import onnx

    path = folder / "recurrent.onnx"
    report = fxfib.export_onnx(small, path, example)  # tries other sizes of every free axis
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    return {
        "error_onnx": report.error,
        "onnx_axes": " ".join(report.dynamic_axes),
        "lstm_gru_rnn_nodes": sum(kind in ("LSTM", "GRU", "RNN") for kind in kinds),
    }


def rows_of(name: str, model: nn.Module, test: Split, passes: int) -> list[dict[str, Any]]:
    """All rows of one network."""
    shared = {
        "network": name, "passes": passes, "torch": torch.__version__, "fxfib": fxfib.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }  # fmt: skip
    example = test[0][:4]
    before = describe(model, test)
    rows = [shared | {"model": "trained"} | before]
    for word, eps in (("lifted", 0.0), *(("compiled", eps) for eps in EPS)):
        start = model
        if word == "lifted":
            start = fxfib.lift(model, LIFT, example, dynamic_shapes=SHAPES)
            rows.append(shared | {"model": f"x {LIFT}"} | describe(start, test))
        small = fxfib.compile(start, eps, example, dynamic_shapes=SHAPES)
        report, after = small.fibration, describe(small, test)
        row = shared | after | {
            "model": word, "eps": eps, "error_float32": report.relative_error,
            "error_float64": report.exact_error, "compile_s": round(report.seconds["compile"], 2),
        }  # fmt: skip
        if word == "lifted":
            row["recovered"] = all(before[key] == after[key] for key in ("parameters", "hidden"))
        with tempfile.TemporaryDirectory() as folder:
            row |= onnx_row(small, example, Path(folder))
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", help="of: " + "; ".join(NETWORKS))
    parser.add_argument("--passes", type=int, default=1, help="over the training images")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    done: dict[str, list[dict[str, Any]]] = {}
    for row in read(options.output):
        done.setdefault(row["network"], []).append(row)
    try:
        train, test = images()
    except (OSError, RuntimeError) as error:
        print(str(error).splitlines()[0], file=sys.stderr)
        return 1
    for name in options.networks or [name for name in NETWORKS if name not in done]:
        done[name] = rows_of(name, trained(name, train, options.passes), test, options.passes)
        rows = [row for key in NETWORKS if key in done for row in done[key]]
        write(options.output, rows, COLUMNS)
    recovered = [row for rows in done.values() for row in rows if row["model"] == "lifted"]
    good = sum(str(row["recovered"]) == "True" for row in recovered)
    print(f"recovered after a lift: {good} of {len(recovered)}")
    return 0 if good == len(recovered) else 1


if __name__ == "__main__":
    sys.exit(main())
