"""Watch symmetry emerge while a network learns, and see which nodes fire together.

python examples/watch_training.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import fxfib


def spirals(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points on three spiral arms, and whose arm it is."""
    arm = torch.arange(count) % 3
    radius = torch.rand(count) * 0.9 + 0.1
    angle = 4 * radius + 2.1 * arm + 0.1 * torch.randn(count)
    return radius[:, None] * torch.stack([angle.sin(), angle.cos()], 1), arm


def main(folder: Path) -> None:
    """Train, resume from a checkpoint, and look at what came of it."""
    torch.manual_seed(0)
    x, y = spirals(600)
    model = nn.Sequential(
        nn.Linear(2, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)

    # By default rows are compared by their angle: at 0.2, nodes of one class read nearly alike.
    monitor = fxfib.Monitor(model, x[:100], eps=0.2, every=20, csv=folder / "run.csv")

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            if monitor.step():
                monitor.log(loss=loss, accuracy=(model(x).argmax(1) == y).float().mean())

    train(100)
    parts = (model, optimizer, monitor)
    torch.save([part.state_dict() for part in parts], folder / "checkpoint.pt")
    for part, state in zip(
        parts, torch.load(folder / "checkpoint.pt", weights_only=True), strict=True
    ):
        part.load_state_dict(state)
    train(200)

    # What every look saw of every layer, and when covers merged or split.
    for look, row in enumerate(row for row in monitor.history.rows() if row["layer"] == "2"):
        if look % 5 == 0:
            print(
                f"step {row['step']:>3}: {row['fibers']:>2} fibers, {row['covers']:>2} covers, "
                f"{row['dead']} dead, effective rank {row['effective_rank']:.1f}"
            )
    fibers = monitor.history.counts("2", "fiber")
    assert fibers[-1] < fibers[0]
    merge = next(t for t in monitor.transitions("fiber") if t.kind == "merge")
    print(f"first merge: by step {merge.step}, layer {merge.layer}, nodes {merge.parts}")

    # The graph in color, moving: one file, no network.
    monitor.to_html(folder / "film.html")

    # Which nodes fire together, over all points and on each arm.
    together = fxfib.synchrony(model, [(x, y)], threshold=0.9, progress=False)
    assert together.holds  # clusters are unions of (exact) fibers
    print(together)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
