"""The two networks that training is watched on, their images, and their training.

``mlp`` is the published MNIST network and training: 784-500-500-500-10, ReLU, Adam at 1e-3,
batches of 100, pixels in [0, 1], one pass (600 steps).  ``cnn`` is the published ConvNet of
continual learning, here with ten outputs, on CIFAR-10: Adam at 1e-3, batches of 100, one pass
(500 steps).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cifar10
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fxfib.files import move_into_place, staging_folder

NETWORKS = ("mlp", "cnn")
PASSES = {"mlp": 1, "cnn": 1}
BATCH = 100


@dataclass(frozen=True)
class Images:
    """Images in [0, 1] with their labels."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    def accuracy(self, model: nn.Module) -> float:
        """Test accuracy in percent; the model is in a mode that its figures are meant for."""
        right = 0
        with torch.no_grad():
            for x, y in zip(self.test.split(1000), self.test_labels.split(1000), strict=True):
                right += int((model(x).argmax(1) == y).sum())
        return 100 * right / len(self.test)


def images(network: str, root: str | None, cache: Path) -> Images:
    """What a network is trained on.

    Raises:
        RuntimeError, OSError: it is not there.
    """
    if root is None:
        raise RuntimeError("give --data-root, or set FXFIB_DATA")
    if network == "mlp":
        from torchvision.datasets import MNIST

        splits = [MNIST(root, train=train) for train in (True, False)]
        parts = [(s.data.flatten(1).float() / 255, s.targets) for s in splits]
    else:
        parts = [_cifar(Path(root), train, cache) for train in (True, False)]
    return Images(*parts[0], *parts[1])


def _cifar(root: Path, train: bool, cache: Path) -> tuple[Tensor, Tensor]:
    """Decoded once."""
    kept = cache / f"cifar10_{'train' if train else 'test'}.pt"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with staging_folder(kept) as folder:
            torch.save(cifar10.pictures(root, train), folder / kept.name)
            move_into_place(folder / kept.name, kept)
    pixels, labels = torch.load(kept, weights_only=True)
    return pixels.float() / 255, labels


def untrained(network: str) -> nn.Sequential:
    """The network of the present random state."""
    layers: list[nn.Module] = []
    if network == "mlp":
        for before, after in itertools.pairwise((784, 500, 500, 500, 10)):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers[:-1])
    for before, after, kernel in ((3, 32, 5), (32, 64, 3), (64, 128, 3)):
        layers += [nn.Conv2d(before, after, kernel), nn.ReLU(), nn.MaxPool2d(2)]
    dense = [nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers, nn.Flatten(), *dense)


def training(model: nn.Module, data: Images, passes: int, seed: int) -> Iterator[float]:
    """Trains in place; the loss of every step, after it."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(passes):
        for some in torch.randperm(len(data.train), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data.train[some]), data.train_labels[some])
            loss.backward()
            optimizer.step()
            yield float(loss.detach())


def steps_of(network: str, data: Images) -> int:
    """How many steps the training takes."""
    return PASSES[network] * -(-len(data.train) // BATCH)


def kept(network: str, seed: int, cache: Path) -> Path:
    """Where the trained network of a seed is."""
    return cache / f"trained_{network}_{seed}.pt"


def keep(model: nn.Module, path: Path) -> None:
    """Write a network's numbers; the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(path) as folder:
        torch.save(model.state_dict(), folder / path.name)
        move_into_place(folder / path.name, path)


def trained(network: str, seed: int, data: Images, cache: Path) -> nn.Sequential:
    """The network of a seed, from the cache or trained now."""
    torch.manual_seed(seed)
    model = untrained(network)
    path = kept(network, seed, cache)
    if not path.exists():
        steps = steps_of(network, data)
        found = training(model, data, PASSES[network], seed)
        for _ in tqdm(found, total=steps, desc=f"train {network} {seed}", leave=False):
            pass
        keep(model, path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()
