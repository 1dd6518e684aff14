"""What `make demo` runs: train a network, merge its fibers, deploy it, and print what came of it.

The network is the published one: 784-500-500-500-10, ReLU, Adam at 1e-3, batches of 100, one pass
over MNIST with pixels in [0, 1].  Everything is written to `demo-output/`.
"""

import json
import os
import platform
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from tqdm import tqdm

import fxfib

OUTPUT = Path("demo-output")
CACHE = Path.home() / ".cache" / "fxfib"
BATCH = 100
LIFT = 1.5
ROUNDS, CALLS = 30, 20

HONEST = """\
What to make of it.  A network trained once from random weights has hardly any exact fibers, so
eps = 0 leaves it nearly as it is, and that is the right answer.  With eps > 0 the weights of a
color are made equal although they were not: the function changes, and the accuracy shows the cost.
The lifted network shows the other side: it is 1.5 times as wide, its copies are split at random and
shifted by sums of zero so that no two rows need be equal, and it computes the same function.  There
eps = 0 finds every fiber and comes back to the original size with nothing lost but rounding.
Networks in use lie between the two: try eps = 0, then the largest eps whose accuracy you accept.
"""


@dataclass(frozen=True)
class Data:
    """Images in [0, 1], float32 `[n, pixels]`, labels int64 `[n]`, and how to train on them."""

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    passes: int
    eps: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """One line of the table; the error is the largest of any logit over all test images."""

    name: str
    parameters: int
    macs: int
    accuracy: float
    error: float
    error_onnx: float
    torch_ms: float
    onnx_ms: float


def main() -> int:
    """Run the demo; gives the exit code."""
    OUTPUT.mkdir(exist_ok=True)
    data = load_data()
    print(
        f"data: {data.name}, {len(data.train[0]):,} training and {len(data.test[0]):,} test images"
    )
    network = train(data)

    example = data.test[0][:2]
    models: dict[str, nn.Module] = {"trained": network}
    for eps in (0.0, *data.eps):
        models[f"compiled, eps = {eps:g}"] = fxfib.compile(network, eps, example)
    lifted = fxfib.lift(network, LIFT, example, seed=0)
    models[f"lifted x {LIFT:g}"] = lifted
    models["lifted, compiled, eps = 0"] = fxfib.compile(lifted, 0.0, example)

    rows = measure(models, data)
    text = "\n".join([table(rows), "", environment(data), "", HONEST])
    print("\n" + text)
    write(models, rows, text)
    print(f"written to {OUTPUT}/: report.txt, report.json, the ONNX files, recovered.fxfib")
    return check(rows)


def load_data() -> Data:
    """MNIST from FXFIB_DATA, the cache or a download; else the digits that scikit-learn ships."""
    root = os.environ.get("FXFIB_DATA")
    try:
        train = mnist(Path(root) if root else CACHE, train=True, download=not root)
        test = mnist(Path(root) if root else CACHE, train=False, download=not root)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        print(f"MNIST cannot be had ({reason}).")
        print("Using scikit-learn's digits instead: 8 x 8 images, so other figures than MNIST's.")
        return digits()
    return Data("MNIST", train, test, passes=1, eps=(0.1, 0.11, 0.12, 0.13))


def mnist(root: Path, train: bool, download: bool) -> tuple[Tensor, Tensor]:
    """One split of MNIST; raises OSError or RuntimeError where it is not there."""
    from torchvision.datasets import MNIST

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # a network that swallows packets must not hold up the demo
    try:
        split = MNIST(root, train=train, download=download)
    finally:
        socket.setdefaulttimeout(before)
    return split.data.flatten(1).float() / 255, split.targets


def digits() -> Data:
    """The 1,797 digits that scikit-learn ships; the last 360 are for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.data).float() / 16
    labels = torch.from_numpy(bunch.target).long()
    train, test = (images[:-360], labels[:-360]), (images[-360:], labels[-360:])
    return Data("scikit-learn digits", train, test, passes=30, eps=(0.1, 0.12, 0.15, 0.2))


def train(data: Data) -> nn.Module:
    """The published network after its published training."""
    torch.manual_seed(0)
    pixels = data.train[0].shape[1]
    widths = [pixels, 500, 500, 500, 10]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    network = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    images, labels = data.train
    batches = [
        batch for _ in range(data.passes) for batch in torch.randperm(len(images)).split(BATCH)
    ]
    for batch in tqdm(batches, desc="train", unit="batch", dynamic_ncols=True):
        loss = nn.functional.cross_entropy(network(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@torch.no_grad()
def measure(models: dict[str, nn.Module], data: Data) -> list[Row]:
    """Size, accuracy, error and latency of every model, and its ONNX file run in ONNX Runtime."""
    images, labels = data.test
    expected = models["trained"](images)
    sessions = {}
    calls: dict[str, Callable[[], Any]] = {}
    one = images[:1]
    for name, model in tqdm(models.items(), desc="export", unit="model", dynamic_ncols=True):
        path = OUTPUT / f"{file_name(name)}.onnx"
        fxfib.export_onnx(model, path, images[:2])
        session = open_session(path)
        sessions[name] = session
        feed = {session.get_inputs()[0].name: one.numpy()}
        calls[f"torch {name}"] = lambda model=model: model(one)
        calls[f"onnx {name}"] = lambda session=session, feed=feed: session.run(None, feed)
    latency = interleaved(calls)
    rows = []
    for name, model in models.items():
        output = model(images)
        session = sessions[name]
        (deployed,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        rows.append(
            Row(
                name=name,
                parameters=sum(parameter.numel() for parameter in model.parameters()),
                macs=sum(weight.numel() for weight in model.parameters() if weight.dim() == 2),
                accuracy=(output.argmax(1) == labels).float().mean().item(),
                error=(output - expected).abs().max().item(),
                error_onnx=float(np.abs(deployed - output.numpy()).max()),
                torch_ms=latency[f"torch {name}"],
                onnx_ms=latency[f"onnx {name}"],
            )
        )
    return rows


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """One thread and no spinning: the figures repeat, and torch runs under the same terms."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def interleaved(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds a call: the median over rounds in which every candidate has its turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in tqdm(range(ROUNDS), desc="latency", unit="round", dynamic_ncols=True):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name].append((time.perf_counter() - start) / CALLS * 1e3)
    torch.set_num_threads(threads)
    return {name: statistics.median(values) for name, values in times.items()}


def table(rows: list[Row]) -> str:
    """The rows in columns of equal width."""
    head = (
        "",
        "parameters",
        "MACs",
        "accuracy",
        "max error",
        "ONNX error",
        "torch",
        "ONNX Runtime",
    )
    lines = [head] + [
        (
            row.name,
            f"{row.parameters:,}",
            f"{row.macs:,}",
            f"{row.accuracy:.2%}",
            f"{row.error:.1e}",
            f"{row.error_onnx:.1e}",
            f"{row.torch_ms:.3f} ms",
            f"{row.onnx_ms:.3f} ms",
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def environment(data: Data) -> str:
    """What the figures depend on."""
    return (
        f"{data.name}, {data.passes} pass(es) of training.  max error: of any logit against the\n"
        f"trained network, over {len(data.test[0]):,} test images; ONNX error: of ONNX Runtime\n"
        f"against torch; latency: one image, one thread, median of {ROUNDS} interleaved rounds.\n"
        f"fxfib {fxfib.__version__}, torch {torch.__version__}, "
        f"onnxruntime {onnxruntime.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}, {os.cpu_count()} cores"
    )


def write(models: dict[str, nn.Module], rows: list[Row], text: str) -> None:
    """The table and the reports as text and JSON, and the recovered network."""
    reports = {
        name: model.fibration
        for name, model in models.items()
        if getattr(model, "fibration", None) is not None
    }
    parts = [text] + [f"{name}\n\n{report}\n" for name, report in reports.items()]
    (OUTPUT / "report.txt").write_text("\n".join(parts), encoding="utf-8")
    content = {
        "rows": [asdict(row) for row in rows],
        "reports": {name: report.to_dict() for name, report in reports.items()},
    }
    (OUTPUT / "report.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    fxfib.save(models["lifted, compiled, eps = 0"], OUTPUT / "recovered.fxfib")


def check(rows: list[Row]) -> int:
    """The claims of the text above, held against the figures; 1 if one does not stand."""
    by_name = {row.name: row for row in rows}
    trained, recovered = by_name["trained"], by_name["lifted, compiled, eps = 0"]
    exact = [by_name["compiled, eps = 0"], by_name[f"lifted x {LIFT:g}"], recovered]
    problems = [f"{row.name}: error {row.error:.1e}" for row in exact if row.error > 1e-3]
    problems += [
        f"{row.name}: ONNX error {row.error_onnx:.1e}" for row in rows if row.error_onnx > 1e-3
    ]
    if recovered.parameters > trained.parameters:
        problems.append("the lifted network did not come back to the original size")
    for problem in problems:
        print(f"demo: {problem}", file=sys.stderr)
    return 1 if problems else 0


def file_name(name: str) -> str:
    """A model's name without what file systems dislike."""
    return "-".join(name.replace("=", " ").replace(",", " ").split())


if __name__ == "__main__":
    sys.exit(main())
