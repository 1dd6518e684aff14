"""Small models that between them use what capture and raise must get right."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from fxfib.capture import Captured, capture


def randomize(model: nn.Module) -> nn.Module:
    """Parameters and statistics that are neither ones nor zeros; eval mode."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(0.3, 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0.0, 0.3)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
        if name.endswith("num_batches_tracked"):
            buffer.fill_(7)
    return model.eval()


def mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(7, 11), nn.ReLU(), nn.Dropout(0.25), nn.Linear(11, 5), nn.GELU("tanh")),
        *(nn.Linear(5, 3), nn.Softmax(dim=-1)),
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8, eps=1e-3, momentum=0.2),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding="same", groups=4, dilation=2),
        nn.BatchNorm2d(8, momentum=None),
        nn.LeakyReLU(0.2, inplace=True),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(8, 5, 3, stride=2, output_padding=1),
        nn.GroupNorm(5, 5),
        nn.PReLU(5),
        nn.Dropout2d(0.3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )


class Reused(nn.Module):
    """One layer called twice, another also with its weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.act = nn.Tanh()
        self.other = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.layer(self.act(self.layer(x))))
        return F.linear(self.other(x), self.other.weight)


class Tied(nn.Module):
    """An embedding tied to the output layer, and a parameter with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 7)
        self.hidden = nn.Linear(7, 7)
        self.twin = nn.Linear(7, 7)
        self.twin.weight = self.hidden.weight
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.twin(torch.relu(self.hidden(self.embedding(tokens)))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 7, num_layers=2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(14, 3, batch_first=True)
        self.projected = nn.LSTM(3, 6, proj_size=2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (h, c) = self.lstm(x)
        z, _ = self.gru(y)
        return self.projected(z)[0], h, c


class Block(nn.Module):
    """A transformer block with a class token, as a vision transformer has it."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.register_buffer("scale", torch.tensor([0.5, 2.0] * 6), persistent=False)
        self.position = torch.randn(1, 5, 12)
        self.norm = nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(12, 20), nn.SiLU(), nn.Linear(20, 12))
        self.out = nn.RMSNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0] * self.scale
        x = x + F.dropout(self.mlp(x), 0.1, self.training)
        return self.out(x)[:, 0]


@dataclass
class Result:
    score: Tensor
    hidden: tuple[Tensor, ...]
    loss: Tensor | None = None


class Nested(nn.Module):
    """Dict and keyword inputs, a dataclass among the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3)

    def forward(
        self, batch: dict[str, Any], *, gain: Tensor, mask: Tensor | None = None, power: int = 2
    ) -> dict[str, Any]:
        hidden = torch.tanh(self.first(batch["x"] + batch["pair"][1])) ** power
        if mask is not None:
            hidden = hidden * mask
        result = Result(self.second(hidden) * gain, (hidden, hidden * 2))
        return {"result": result, "sum": [hidden.sum(1), 3], "none": None}


class Sliced(nn.Module):
    """Writes into slices, reads views taken before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        early = y[:, 2:6]
        y[:, 3] = 1.5
        y[:, 4:].mul_(2)
        window = y.view(-1, 2, 4)
        window[:, 1].clamp_(min=0.1)
        return y + 0, early * 3


def _images(size: int) -> Callable[[int], tuple[Any, ...]]:
    return lambda batch: (torch.randn(batch, 3, size, size),)


def _nested_inputs(batch: int) -> tuple[Any, ...]:
    return ({"x": torch.randn(batch, 4), "pair": (torch.ones(1), torch.randn(batch, 4))},)


@dataclass(frozen=True)
class Case:
    """A model, and its arguments for a batch size."""

    make: Callable[[], nn.Module]
    args: Callable[[int], tuple[Any, ...]]
    kwargs: Callable[[int], dict[str, Any]] = lambda batch: {}


@cache
def captured_case(name: str) -> tuple[nn.Module, Captured]:
    """A model and its capture, made once; no test may change either."""
    case = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = randomize(case.make())
        return model, capture(model, case.args(2), case.kwargs(2))


CASES = {
    "mlp": Case(mlp, lambda batch: (torch.randn(batch, 7),)),
    "convolutions": Case(convolutions, _images(16)),
    "reused": Case(Reused, lambda batch: (torch.randn(batch, 5),)),
    "tied": Case(Tied, lambda batch: (torch.randint(13, (batch, 4)),)),
    "recurrent": Case(Recurrent, lambda batch: (torch.randn(batch, 4, 5),)),
    "block": Case(Block, lambda batch: (torch.randn(batch, 4, 12),)),
    "nested": Case(Nested, _nested_inputs, lambda batch: {"gain": torch.randn(batch, 1)}),
    "sliced": Case(Sliced, lambda batch: (torch.randn(batch, 6),)),
    "resnet18": Case(lambda: torchvision.models.resnet18(num_classes=5), _images(64)),
    "mobilenet": Case(lambda: torchvision.models.mobilenet_v3_small(num_classes=5), _images(64)),
}
