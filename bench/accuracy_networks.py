"""The networks of bench/accuracy.py, their data, and how they are trained."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cifar10
import cifar_training
import torch
from accuracy_translation import Sentences, trained_translator
from residual_networks import given_resnet
from torch import Tensor, nn
from tqdm import tqdm

from fxfib.files import move_into_place, staging_folder

HIDDEN, LAYERS = 500, 3
Split = tuple[Tensor, Tensor]
AT_ONCE = 500


@dataclass(frozen=True)
class Case:
    """One kind of network.

    Attributes:
        build: a fresh network, or one with the given weights.
        data: its data, from the folder of all data.
        train: how a seed trains a network of its own, in place: the network, the folder of all
            data, its data, the seed, the file that keeps it; None: it draws calibration alone.
        images: number of unlabeled images (or sentences) of calibration.
        pruners: whether Torch-Pruning can shrink it (of an LSTM it cuts the inputs away).
        labels: whether its data have batches to train on once more.
    """

    build: Callable[[Path], nn.Module]
    data: Callable[[Path], Data | Sentences]
    train: Callable[[nn.Module, Path, Any, int, Path], None] | None
    images: int
    pruners: bool = True
    labels: bool = True


class Data:
    """Images for training and calibration, and those on which accuracy is measured.

    Args:
        train, test: images and labels.

    Attributes:
        example: the arguments of one call.
        dynamic_shapes: as for :func:`fxfib.compile`.
    """

    dynamic_shapes: Any = None

    def __init__(self, train: Split, test: Split) -> None:
        self.train, self.train_labels = train
        self.test, self.test_labels = test
        self.example: tuple[Tensor, ...] = (self.train[:2],)

    def calibration(self, seed: int, count: int) -> Any:
        """Training images without labels."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        return self.train[order[:count]]

    def batches(self, seed: int) -> list[Split]:
        """One pass over the training images, 100 at a time."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        return [(self.train[b], self.train_labels[b]) for b in order.split(100)]

    def answers(self, model: nn.Module) -> list[int]:
        """The class of every test image."""
        with torch.no_grad():
            return torch.cat([model(x).argmax(1) for x in self.test.split(AT_ONCE)]).tolist()

    def right(self, answers: list[int]) -> float:
        """Test accuracy in percent, of the answers of a model."""
        return agreement(answers, self.test_labels.tolist())


def agreement(answers: Sequence[Any], others: Sequence[Any]) -> float:
    """How many are the same, in percent."""
    return 100 * sum(a == b for a, b in zip(answers, others, strict=True)) / len(answers)


def perceptron(width: int = HIDDEN) -> nn.Sequential:
    """The published network, all hidden layers of one width."""
    sizes = [784, *[width] * LAYERS, 10]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional() -> nn.Sequential:
    """Two convolutions and two linear layers for digits."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 48, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(48 * 25, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


class RowReader(nn.Module):
    """``linear -> LSTM -> linear`` on an image as 28 steps of 28 pixels: logits of the last step.

    ``forward`` takes ``[batch, 28, 28]`` and gives ``[batch, 10]``.

    Args:
        kind: the recurrent module.
    """

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.first = nn.Linear(28, 48)
        self.layer = kind(48, 96, batch_first=True)
        self.last = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Of ``[batch, steps, 28]``."""
        return self.last(self.layer(self.first(x).relu())[0][:, -1])  # type: ignore[no-any-return]


def mnist(root: Path, shape: tuple[int, ...]) -> Data:
    """Pixels in [0, 1], not normalised."""
    from torchvision.datasets import MNIST

    splits = [MNIST(str(root), train=train) for train in (True, False)]
    train, test = [(s.data.float().reshape(-1, *shape) / 255, s.targets) for s in splits]
    return Data(train, test)


def cifar(root: Path, train: int, test: int) -> Data:
    """So many images a class of either split, the first by name."""
    splits = []
    for of_training, count in ((True, train), (False, test)):
        images, labels = cifar10.pictures(root, of_training, count)
        splits.append((cifar10.normalized(images), labels))
    return Data(*splits)


def one_pass(model: nn.Module, root: Path, data: Data, seed: int, path: Path) -> None:
    """One pass with Adam, kept when it is complete."""
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    order = torch.randperm(len(data.train))
    for batch in tqdm(order.split(100), desc=f"train {path.stem}", leave=False):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(data.train[batch]), data.train_labels[batch])
        loss.backward()
        optimizer.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(path) as folder:
        torch.save(model.state_dict(), folder / path.name)
        move_into_place(folder / path.name, path)


# Per class: 300 training images to draw calibration from, 200 test images.
CIFAR_IMAGES = (300, 200)
# Where the networks are our own and smaller differences count.
MORE_CIFAR_IMAGES = (300, 500)


def trained_here(kind: str, width: int | None = None, epochs: int | None = None) -> dict[str, Case]:
    """A case that `cifar_training.py` trains, or whose training it completes."""
    usual = cifar_training.KINDS[kind]

    def train(model: nn.Module, root: Path, data: Data, seed: int, path: Path) -> None:
        cifar_training.complete(model, root, seed, path, epochs or usual.epochs)

    case = Case(
        lambda root: usual.build(width or usual.width),
        lambda root: cifar(root, *MORE_CIFAR_IMAGES), train, 1024,
    )  # fmt: skip
    return {cifar_training.name_of(kind, width, epochs): case}


def row_reader(kind: type[nn.RNNBase]) -> Case:
    """A case that reads MNIST row by row."""
    return Case(
        lambda root: RowReader(kind), lambda root: mnist(root, (28, 28)), one_pass, 1024,
        pruners=False,
    )  # fmt: skip


CASES = {
    "mnist_mlp": Case(lambda root: perceptron(), lambda root: mnist(root, (784,)), one_pass, 2000),
    "mnist_cnn": Case(
        lambda root: convolutional(), lambda root: mnist(root, (1, 28, 28)), one_pass, 1024
    ),
    "mnist_lstm": row_reader(nn.LSTM),
    "mnist_gru": row_reader(nn.GRU),
    "mnist_rnn": row_reader(nn.RNN),
    "multi30k_transformer": Case(
        trained_translator, lambda root: Sentences(), None, 256, pruners=False, labels=False
    ),
    "cifar_resnet20": Case(
        lambda root: given_resnet(root, 3, "resnet20*"),
        lambda root: cifar(root, *CIFAR_IMAGES), None, 1024,
    ),
    "cifar_resnet32": Case(
        lambda root: given_resnet(root, 5, "resnet32*"),
        lambda root: cifar(root, *CIFAR_IMAGES), None, 1024,
    ),
    **trained_here("resnet18"),
    **trained_here("resnet18", 64, 6),
    **trained_here("vgg"),
}  # fmt: skip


def trained(name: str, root: Path, data: Data | Sentences, seed: int, cache: Path) -> nn.Module:
    """The network of a seed: as given, from the cache, or trained."""
    case = CASES[name]
    torch.manual_seed(seed)
    model = case.build(root)
    if case.train is not None:
        case.train(model, root, data, seed, cache / f"{name}_{seed}.pt")
    return model.eval()


def macs(model: nn.Module, data: Data | Sentences) -> int:
    """Multiply-accumulates of one example, by the shapes that layers see."""
    from fxfib.capture import capture
    from fxfib.macs import macs_of

    captured = capture(model, data.example, None, data.dynamic_shapes)
    return macs_of(captured.graph_module) // len(data.example[0])
