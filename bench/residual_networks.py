"""The networks of bench/residual.py, with their images."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import cifar10
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

PER_CLASS = 100
Data = tuple[Tensor, Tensor] | None


class OptionA(nn.Module):
    """Every second pixel, zeros for the channels that are new."""

    def __init__(self, new: int) -> None:
        super().__init__()
        self.new = new

    def forward(self, x: Tensor) -> Tensor:
        """Half the new channels before the old ones, half behind."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.new // 2, self.new // 2))


class Basic(nn.Module):
    """Two convolutions and a shortcut without parameters."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 else OptionA(outputs - inputs)

    def forward(self, x: Tensor) -> Tensor:
        """Half the size where the channels double."""
        hidden = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """The network of the given checkpoints: three stages of 16, 32 and 64 channels."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        width = 16
        for stage, channels in enumerate((16, 32, 64), 1):
            found = [Basic(width if k == 0 else channels, channels) for k in range(blocks)]
            setattr(self, f"layer{stage}", nn.Sequential(*found))
            width = channels
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of ten classes."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def data_folder() -> Path:
    value = os.environ.get("FXFIB_DATA")
    if not value:
        raise SystemExit("FXFIB_DATA is not set: no checkpoints and images here")
    return Path(value)


def given_resnet(root: Path, blocks: int, pattern: str) -> nn.Module:
    """A CIFAR-10 network with its published weights."""
    (file,) = (root / "checkpoints").glob(pattern)
    state = torch.load(file, weights_only=True, map_location="cpu")["state_dict"]
    model = CifarResNet(blocks)
    model.load_state_dict({name.removeprefix("module."): t for name, t in state.items()})
    return model


def checkpoint(blocks: int, pattern: str) -> tuple[nn.Module, Tensor, Data]:
    """With the first test images of every class."""
    model = given_resnet(data_folder(), blocks, pattern)
    pictures, labels = cifar10.pictures(data_folder(), False, PER_CLASS)
    images = cifar10.normalized(pictures)
    return model.eval(), images[:1], (images, labels)


def tiny_vit() -> tuple[nn.Module, Tensor, Data]:
    from torchvision.datasets import MNIST
    from torchvision.models import VisionTransformer

    def digits(train: bool) -> tuple[Tensor, Tensor]:
        data = MNIST(data_folder(), train=train, download=False)
        return data.data[:, None].float().expand(-1, 3, -1, -1) / 255, data.targets

    torch.manual_seed(0)
    model = VisionTransformer(28, 7, 3, 4, hidden_dim=64, mlp_dim=256, num_classes=10)
    images, labels = digits(True)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    order = torch.randperm(len(images)).split(128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=len(order))
    for batch in tqdm(order, desc="training", leave=False):
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    images, labels = digits(False)
    return model.eval(), images[:1].contiguous(), (images[::5], labels[::5])


def copied(layers: Sequence[nn.Module], generator: torch.Generator) -> None:
    """A quarter of the nodes of a layer (and of the norm behind it) become copies of others."""
    size = len(layers[0].get_parameter("weight"))
    fibers, chosen = torch.arange(size), torch.randperm(size, generator=generator)
    fibers[chosen[: size // 4]] = chosen[size // 4 : size // 4 * 2]
    for layer in layers:
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.ndim:
                tensor.data = tensor.data[fibers].contiguous()


def with_copies(name: str) -> tuple[nn.Module, Tensor, Data]:
    import torchvision
    from architectures import randomize

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    image = torch.randn(1, 3, 224, 224)
    randomize(model, ((image,), {}))
    generator = torch.Generator().manual_seed(1)
    for block in model.modules():
        if hasattr(block, "bn2"):
            copied((block.conv2, block.bn2), generator)
        elif hasattr(block, "self_attention"):
            copied((block.self_attention.out_proj,), generator)
            copied((block.mlp[3],), generator)
    return model, image, None


# Every network, and the precisions at which something happens.
MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor, Data]], tuple[float, ...]]] = {
    "resnet20": (lambda: checkpoint(3, "resnet20*"), (0.0, 0.05, 0.08, 0.1, 0.12, 0.15)),
    "resnet18_copies": (lambda: with_copies("resnet18"), (0.0,)),
    "tiny_vit": (tiny_vit, (0.0, 0.1, 0.15, 0.2, 0.3)),
    "resnet32": (lambda: checkpoint(5, "resnet32*"), (0.0, 0.05, 0.08, 0.1, 0.12, 0.15)),
    "vit_b_16_copies": (lambda: with_copies("vit_b_16"), (0.0,)),
}
