"""A ResNet-18 for CIFAR-10, of any width, and its training: SGD, one cycle, flips and crops.

    python bench/resnet18.py --data-root FOLDER [--seed 0] [--width 16] [--epochs 12]

The network is torchvision's, with the usual 3x3 stem without pooling for images of 32 x 32; its
stages have 1, 2, 4 and 8 times the width.  The last 500 training images of every class (by name)
are never trained on: what has to be chosen is chosen on them.  Training keeps a file after every
epoch and goes on from there; on a CPU it computes in bfloat16 where torch's autocast does so.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import cifar10
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from tqdm import tqdm

from fxfib.files import move_into_place, staging_folder

WIDTH, EPOCHS = 16, 12
HELD_OUT = 500
BATCH = 128
RATE, MOMENTUM, DECAY = 0.1, 0.9, 5e-4
PAD = 4


class ResNet18(ResNet):
    """Four stages of two basic blocks, ``[n, 3, 32, 32]`` to ``[n, 10]``."""

    def __init__(self, width: int = 64) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=10)
        self.inplanes = width
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity()  # type: ignore[assignment]
        self.layer1 = self._make_layer(BasicBlock, width, 2)
        self.layer2 = self._make_layer(BasicBlock, 2 * width, 2, stride=2)
        self.layer3 = self._make_layer(BasicBlock, 4 * width, 2, stride=2)
        self.layer4 = self._make_layer(BasicBlock, 8 * width, 2, stride=2)
        self.fc = nn.Linear(8 * width, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def split(images: Tensor, labels: Tensor, held_out: bool) -> tuple[Tensor, Tensor]:
    """The last images of every class, or all but them; in order of class and name."""
    places = [torch.nonzero(labels == c).flatten() for c in range(10)]
    chosen = torch.cat([p[-HELD_OUT:] if held_out else p[:-HELD_OUT] for p in places])
    return images[chosen], labels[chosen]


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image flipped or not, and moved by up to four pixels; what is new is zero."""
    count, size = len(images), images.shape[-1]
    padded = nn.functional.pad(images, (PAD, PAD, PAD, PAD))
    shift = torch.randint(2 * PAD + 1, (2, count, 1), generator=generator)
    rows, columns = torch.arange(size) + shift[0], torch.arange(size) + shift[1]
    flipped = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    place = torch.arange(count)[:, None, None]
    return padded[place, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(
    model: nn.Module, images: Tensor, labels: Tensor, seed: int, epochs: int, path: Path
) -> nn.Module:
    """Train in place, from ``path`` if there is one; the same seed gives the same batches.

    Args:
        images: uint8 ``[n, 3, 32, 32]``.
        path: kept after every epoch.
    """
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM, 0, DECAY, nesterov=True)
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=epochs * steps, pct_start=0.25
    )
    first = 0
    if path.exists():
        kept: dict[str, Any] = torch.load(path, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
        first = kept["epoch"]
    for epoch in range(first, epochs):
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(images), generator=generator)[: steps * BATCH]
        model.train()
        total, began = 0.0, time.perf_counter()
        for batch in tqdm(order.split(BATCH), desc=f"epoch {epoch + 1} of {epochs}", disable=None):
            x = augmented(cifar10.normalized(images[batch]), generator)
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                 "schedule": schedule.state_dict(), "epoch": epoch + 1}  # fmt: skip
        with staging_folder(path) as folder:
            torch.save(state, folder / path.name)
            move_into_place(folder / path.name, path)
        seconds = time.perf_counter() - began
        print(f"epoch {epoch + 1}: loss {total / steps:.3f}, {seconds:.0f} s", flush=True)
    return model.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def main(arguments: list[str] | None = None) -> int:
    """Train, then say how many of the images that were held out are told right."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", default=os.environ.get("FXFIB_DATA"), required=False)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--cache", type=Path, default=Path("bench/cache"))
    options = parser.parse_args(arguments)
    root = Path(options.data_root)
    torch.manual_seed(options.seed)
    model = ResNet18(options.width)
    path = checkpoint(options.cache, options.width, options.epochs, options.seed)
    complete(model, root, options.seed, path, options.epochs)
    held_out, wanted = split(*cifar10.pictures(root, True), True)
    with torch.no_grad():
        found = torch.cat([model(cifar10.normalized(b)).argmax(1) for b in held_out.split(500)])
    print(f"held out: {100 * float((found == wanted).float().mean()):.2f} %")
    return 0


def complete(model: nn.Module, root: Path, seed: int, path: Path, epochs: int = EPOCHS) -> None:
    """Load what was trained, and train what is left; the images are read only for the latter."""
    if path.exists():
        kept = torch.load(path, weights_only=True)
        if kept["epoch"] == epochs:
            model.load_state_dict(kept["model"])
            model.eval()
            return
    images, labels = split(*cifar10.pictures(root, True), False)
    train(model, images, labels, seed, epochs, path)


def checkpoint(cache: Path, width: int, epochs: int, seed: int) -> Path:
    """Where a training is kept."""
    return cache / f"cifar_resnet18_w{width}_e{epochs}_{seed}.pt"


if __name__ == "__main__":
    raise SystemExit(main())
