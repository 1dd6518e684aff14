"""CIFAR-10 for the benches: torchvision's own files, or ``cifar10-jpeg/{train,test}.tar.gz``."""

from __future__ import annotations

import collections
import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

# What the published networks were trained on.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pictures(root: Path, train: bool, per_class: int | None = None) -> tuple[Tensor, Tensor]:
    """Images uint8 ``[n, 3, 32, 32]`` and labels int64 ``[n]``; of every class the first so many.

    Raises:
        RuntimeError, OSError: they are not there.
    """
    archive = root / "cifar10-jpeg" / ("train.tar.gz" if train else "test.tar.gz")
    if archive.exists():
        return _decoded(archive, per_class)
    from torchvision.datasets import CIFAR10

    data = CIFAR10(str(root), train=train)
    images, labels = torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets)
    if per_class is not None:
        classes = [torch.nonzero(labels == c).flatten()[:per_class] for c in labels.unique()]
        images, labels = images[torch.cat(classes)], labels[torch.cat(classes)]
    return images, labels


def _decoded(archive: Path, per_class: int | None) -> tuple[Tensor, Tensor]:
    from PIL import Image

    images: list[Tensor] = []
    names: list[str] = []
    taken: collections.Counter[str] = collections.Counter()
    with tarfile.open(archive) as file:
        members = [m for m in file.getmembers() if m.isfile() and m.name.endswith(".jpg")]
        for member in tqdm(sorted(members, key=lambda m: m.name), desc=archive.name, leave=False):
            name = member.name.split("/")[-2]
            if per_class is not None and taken[name] >= per_class:
                continue
            opened = file.extractfile(member)
            assert opened is not None
            picture = Image.open(io.BytesIO(opened.read())).convert("RGB")
            images.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
            names.append(name)
            taken[name] += 1
    classes = {name: number for number, name in enumerate(sorted(taken))}
    return torch.stack(images), torch.tensor([classes[name] for name in names])


def normalized(images: Tensor) -> Tensor:
    """Of 8-bit images, what the published networks take: float32 of the same shape."""
    mean, deviation = (torch.tensor(v).reshape(3, 1, 1) for v in (MEAN, DEVIATION))
    return (images.float() / 255 - mean) / deviation
