"""The task streams and networks of bench/continual.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cifar10
import torch
from torch import Tensor, nn
from torch.nn import functional as F

PER_CLASS = 5000  # what CIFAR-10 has


class Task(NamedTuple):
    """Images and labels to learn, and others to be asked about."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Setting:
    """One benchmark: a stream of tasks, a network, and how it is trained.

    Attributes:
        stream: makes task number n of a seed, whatever came before.
        network: makes the network.
        fresh_head: the last layer is set to zero before every task.
    """

    stream: Callable[[int, int], Task]
    network: Callable[[], nn.Sequential]
    tasks: int
    passes: int
    batch: int
    lr: float
    momentum: float
    fresh_head: bool


def generator(seed: int, number: int) -> torch.Generator:
    """That of one task."""
    return torch.Generator().manual_seed(1_000_003 * seed + number)


def perceptron(width: int = 100, inputs: int = 196) -> nn.Sequential:
    """Three hidden layers."""
    sizes = [inputs, width, width, width, 10]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional() -> nn.Sequential:
    """The published network for images of 32 x 32 and two classes.

    Pooled before the ReLU, which is the same function, and with channels last: both for speed.
    """
    layers: list[nn.Module] = []
    for before, after, size in ((3, 32, 5), (32, 64, 3), (64, 128, 3)):
        layers += [nn.Conv2d(before, after, size), nn.MaxPool2d(2), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(128, 2))
    return network.to(memory_format=torch.channels_last)


class PermutedMnist:
    """MNIST at 14 x 14 (means of 2 x 2 pixels), the pixels in another order for every task."""

    def __init__(self, root: str, train: int = 3200, test: int = 2000) -> None:
        from torchvision.datasets import MNIST

        self.train, self.test = (self._split(MNIST(root, train=part)) for part in (True, False))
        self.sizes = train, test

    @staticmethod
    def _split(split: Any) -> tuple[Tensor, Tensor]:
        pixels = split.data[:, None].float() / 255
        return F.avg_pool2d(pixels, 2).flatten(1), split.targets

    def __call__(self, seed: int, number: int) -> Task:
        """A permutation, and images drawn anew."""
        source = generator(seed, number)
        order = torch.randperm(self.train[0].shape[1], generator=source)
        parts: list[Tensor] = []
        for (images, labels), size in zip((self.train, self.test), self.sizes, strict=True):
            chosen = torch.randperm(len(images), generator=source)[:size]
            parts += [images[chosen][:, order], labels[chosen]]
        return Task(*parts)


class ClassPairs:
    """Two classes a task, told apart; images drawn anew for every task.

    Args:
        train, test: the images of a class, ``[n, 3, 32, 32]`` in [0, 1], by its number.
        classes: how many there are.
        sizes: how many of each are learned and asked about, a class.
    """

    def __init__(
        self,
        train: Callable[[int], Tensor],
        test: Callable[[int], Tensor],
        classes: int,
        sizes: tuple[int, int],
    ) -> None:
        self.sources, self.classes, self.sizes = (train, test), classes, sizes

    def __call__(self, seed: int, number: int) -> Task:
        """Every class once, then every class again in other pairs."""
        each = self.classes // 2
        lap, place = divmod(number, each)
        order = torch.randperm(self.classes, generator=generator(seed, -1 - lap))
        pair = order[2 * place : 2 * place + 2].tolist()
        source = generator(seed, number)
        parts: list[Tensor] = []
        for images_of, size in zip(self.sources, self.sizes, strict=True):
            images = []
            for label in pair:
                found = images_of(label)
                if len(found) < size:
                    raise RuntimeError(f"class {label} has {len(found)} images, not {size}")
                images.append(found[torch.randperm(len(found), generator=source)[:size]])
            parts += [torch.cat(images), torch.arange(2).repeat_interleave(size)]
        return Task(*parts)


class RandomLabels:
    """Images and one of two labels each, drawn anew for every task: there is nothing but memory.

    They are asked about, too, so that the accuracy at the end is that of what was learned.

    Args:
        images: 8-bit, ``[n, 3, 32, 32]``, to draw from; as numbers they lie in [-0.5, 0.5].
        size: how many are learned, half of them with either label.
    """

    def __init__(self, images: Tensor, size: int) -> None:
        self.images, self.size = images, size

    def __call__(self, seed: int, number: int) -> Task:
        """The order in which they are drawn says nothing of their classes: nor do the labels."""
        source = generator(seed, number)
        chosen = self.images[torch.randperm(len(self.images), generator=source)[: self.size]]
        chosen = chosen.float() / 255 - 0.5
        labels = torch.arange(self.size) % 2
        return Task(chosen, labels, chosen, labels)


def class_pairs(root: str, sizes: tuple[int, int]) -> ClassPairs:
    """Pairs of the classes of CIFAR-10."""
    parts: list[list[Tensor]] = []
    for train in (True, False):
        images, labels = cifar10.pictures(Path(root), train)
        parts.append([images[labels == c].float() / 255 for c in range(int(labels.max()) + 1)])
    classes = len(parts[0])
    return ClassPairs(parts[0].__getitem__, parts[1].__getitem__, classes, sizes)


def _pixels(source: Path) -> Tensor:
    import numpy as np
    from PIL import Image

    picture = Image.open(source).convert("RGB")
    if picture.size != (32, 32):
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        box = (left, top, left + side, top + side)
        picture = picture.resize((32, 32), Image.Resampling.BOX, box)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


class ImageNet:
    """Folders of images, one a class, as ``ROOT/train`` has them; made 32 x 32 when first wanted.

    The first 600 of a class are learned, the next 100 are asked about, as published.
    """

    def __init__(self, root: str) -> None:
        folder = Path(root) / "train" if (Path(root) / "train").is_dir() else Path(root)
        self.folders = sorted(path for path in folder.iterdir() if path.is_dir())
        if len(self.folders) < 2:
            raise RuntimeError(f"{folder} has no two folders of images")
        self.kept: dict[int, Tensor] = {}

    def images(self, label: int) -> Tensor:
        """The first 700 of a class, 8-bit."""
        if label not in self.kept:
            files = sorted(p for p in self.folders[label].iterdir() if p.is_file())[:700]
            if len(files) < 700:
                raise RuntimeError(f"{self.folders[label]} has {len(files)} images, not 700")
            self.kept[label] = torch.stack([_pixels(file) for file in files])
        return self.kept[label]

    def stream(self) -> ClassPairs:
        """Pairs of its classes."""
        return ClassPairs(
            lambda label: self.images(label)[:600].float() / 255,
            lambda label: self.images(label)[600:].float() / 255,
            len(self.folders), (600, 100),
        )  # fmt: skip


def mnist_setting(root: str) -> Setting:
    """Online: one pass over 3,200 images a task."""
    return Setting(PermutedMnist(root), perceptron, 240, 1, 16, 0.02, 0.9, fresh_head=False)


def cifar_setting(root: str) -> Setting:
    """Labels to be memorised by the published network; step size and momentum as published."""
    stream = RandomLabels(cifar10.pictures(Path(root), train=True)[0], 100)
    return Setting(stream, convolutional, 80, 20, 10, 0.02, 0.9, fresh_head=True)


def pairs_setting(root: str) -> Setting:
    """As published, on CIFAR-10; fewer images and passes, so that it ends in minutes."""
    stream = class_pairs(root, (100, 200))
    return Setting(stream, convolutional, 100, 20, 20, 0.02, 0.9, fresh_head=True)


def imagenet_setting(root: str) -> Setting:
    """As published."""
    stream = ImageNet(root).stream()
    return Setting(stream, convolutional, 5000, 300, 200, 0.02, 0.9, fresh_head=True)


SETTINGS = {
    "mnist": mnist_setting, "cifar": cifar_setting, "pairs": pairs_setting,
    "imagenet": imagenet_setting,
}  # fmt: skip
# The column that says how well it goes, by which tuning chooses: what is memorised is all learned
# in the end, sooner or later.
JUDGED = {name: "online" if name == "cifar" else "accuracy" for name in SETTINGS}
