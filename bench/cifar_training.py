"""Networks for CIFAR-10, of any width, and their training: SGD, one cycle, flips and crops.

    python bench/cifar_training.py resnet18 --data-root FOLDER [--width 16] [--epochs 12] [--seed 0]
    python bench/cifar_training.py vgg --data-root FOLDER [--width 32] [--epochs 8] [--device cuda]

`resnet18` is torchvision's, with the usual 3x3 stem without pooling for images of 32 x 32; its
stages have 1, 2, 4 and 8 times the width (published: 64).  `vgg` is VGG-like: three pairs of
convolutions with batch norm, of 1, 2 and 4 times the width.  The last 500 training images of every
class (by name) are never trained on: what has to be chosen is chosen on them.  Training keeps a
file after every epoch and goes on from there; it computes in bfloat16 where torch's autocast does.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cifar10
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from tqdm import tqdm

from fxfib.files import move_into_place, staging_folder

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


class Vgg(nn.Sequential):
    """Three pairs of 3x3 convolutions and a linear layer, ``[n, 3, 32, 32]`` to ``[n, 10]``."""

    def __init__(self, width: int = 64) -> None:
        layers: list[nn.Module] = []
        before = 3
        for size in (width, 2 * width, 4 * width):
            for _ in range(2):
                layers += [nn.Conv2d(before, size, 3, 1, 1, bias=False), nn.BatchNorm2d(size)]
                layers.append(nn.ReLU())
                before = size
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, nn.Flatten(), nn.Linear(16 * before, 10))


@dataclass(frozen=True)
class Kind:
    """A family of networks, with the width and the epochs that a CPU has time for."""

    build: Callable[[int], nn.Module]
    width: int
    epochs: int


KINDS = {"resnet18": Kind(ResNet18, 16, 12), "vgg": Kind(Vgg, 32, 8)}


def name_of(kind: str, width: int | None = None, epochs: int | None = None) -> str:
    """What a network is called in the benches: its kind, its width, its epochs."""
    return f"cifar_{kind}_w{width or KINDS[kind].width}_e{epochs or KINDS[kind].epochs}"


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
    place, rows, columns = (
        t.to(images.device) for t in (torch.arange(count)[:, None, None], rows, columns)
    )
    return padded[place, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(
    model: nn.Module, images: Tensor, labels: Tensor, seed: int, epochs: int, path: Path
) -> nn.Module:
    """Train in place, from ``path`` if there is one; the same seed gives the same batches.

    Args:
        model: where it is, there it is trained.
        images: uint8 ``[n, 3, 32, 32]``.
        path: kept after every epoch.
    """
    device = next(model.parameters()).device
    images, labels = images.to(device), labels.to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM, 0, DECAY, nesterov=True)
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=epochs * steps, pct_start=0.25
    )
    first = 0
    if path.exists():
        kept: dict[str, Any] = torch.load(path, weights_only=True, map_location=device)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
        first = kept["epoch"]
    for epoch in range(first, epochs):
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(images), generator=generator)[: steps * BATCH]
        model.train()
        total, began = 0.0, time.perf_counter()
        for batch in tqdm(
            order.to(device).split(BATCH), desc=f"epoch {epoch + 1} of {epochs}", disable=None
        ):
            x = augmented(cifar10.normalized(images[batch]), generator)
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16):
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
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--data-root", default=os.environ.get("FXFIB_DATA"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", type=Path, default=Path("bench/cache"))
    options = parser.parse_args(arguments)
    kind = KINDS[options.kind]
    try:
        if options.data_root is None:
            raise RuntimeError("give --data-root, or set FXFIB_DATA")
        root = Path(options.data_root)
        held_out, wanted = split(*cifar10.pictures(root, True), True)
    except (OSError, RuntimeError) as error:
        print(f"the data cannot be had: {error}", file=sys.stderr)
        return 1
    torch.manual_seed(options.seed)
    model = kind.build(options.width or kind.width).to(options.device)
    name = name_of(options.kind, options.width, options.epochs)
    path = options.cache / f"{name}_{options.seed}.pt"
    complete(model, root, options.seed, path, options.epochs or kind.epochs)
    right = 0
    with torch.no_grad():
        for images, labels in zip(held_out.split(500), wanted.split(500), strict=True):
            scores = model(cifar10.normalized(images).to(options.device))
            right += int((scores.argmax(1).cpu() == labels).sum())
    print(f"{name}, seed {options.seed}, held out: {100 * right / len(wanted):.2f} %")
    return 0


def complete(model: nn.Module, root: Path, seed: int, path: Path, epochs: int) -> None:
    """Load what was trained, and train what is left; the images are read only for the latter."""
    if path.exists():
        kept = torch.load(path, weights_only=True, map_location="cpu")
        if kept["epoch"] == epochs:
            model.load_state_dict(kept["model"])
            model.eval()
            return
    images, labels = split(*cifar10.pictures(root, True), False)
    train(model, images, labels, seed, epochs, path)


if __name__ == "__main__":
    raise SystemExit(main())
