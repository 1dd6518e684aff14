"""Lifting through views that split an axis: one factor of the product is copied."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxfib

NORMS = (nn.LayerNorm, nn.RMSNorm)


class SplitAttention(nn.Module):
    """Two branches of channels, weighed against each other channel by channel (ResNeSt)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.branches = nn.Conv2d(6, 14, 3, groups=2)
        self.squeeze = nn.Conv2d(7, 5, 1)
        self.weigh = nn.Conv2d(5, 14, 1)
        self.last = nn.Conv2d(7, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.branches(self.first(x).relu()).relu()
        x = x.reshape(x.shape[0], 2, 7, *x.shape[2:])
        gate = self.weigh(self.squeeze(x.sum(1).mean((2, 3), keepdim=True)).relu())
        gate = gate.view(x.shape[0], 1, 2, 7).transpose(1, 2).softmax(1).reshape(x.shape[0], -1)
        return self.last((x * gate.reshape(x.shape[0], 2, 7, 1, 1)).sum(1))


class Interleaved(nn.Module):
    """The other factor of the product is reduced: channels alternate between the branches."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 14)
        self.last = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu().view(x.shape[0], 7, 2)
        return self.last(x.softmax(2).amax(2))


@pytest.mark.parametrize("model", [SplitAttention, Interleaved])
def test_lifted_and_recovered(model: type[nn.Module]) -> None:
    torch.manual_seed(3)
    original = model().eval()
    x = torch.randn(2, 3, 5, 5) if model is SplitAttention else torch.randn(2, 3)
    wide = fxfib.lift(original, 2.0, x, seed=1)
    small = fxfib.compile(wide, 0.0, x)
    assert not small.fibration.refusals

    def widths(m: nn.Module) -> list[int]:
        return [len(layer.weight) for layer in m.modules() if hasattr(layer, "weight")]

    assert widths(small) == widths(original)
    assert all(w > o for w, o in zip(widths(wide)[:-1], widths(original)[:-1], strict=True))
    x = torch.randn(5, *x.shape[1:])
    with torch.no_grad():
        torch.testing.assert_close(small(x), original(x), rtol=1e-4, atol=1e-5)


class OneNode(nn.Module):
    """An axis of one node is gone behind a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 7)
        self.score = nn.Linear(7, 1)
        self.last = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last(x) * self.score(x).squeeze(-1).sigmoid().unsqueeze(-1)


def test_an_axis_that_is_squeezed_away() -> None:
    torch.manual_seed(3)
    original = OneNode().eval()
    x = torch.randn(2, 4, 3)
    wide = fxfib.lift(original, 2.0, x, seed=1)
    small = fxfib.compile(wide, 0.0, x)
    assert wide.first.out_features > 7 and small.first.out_features == 7
    assert small.score.out_features == 1


class SpatialGate(nn.Module):
    """Half of the hidden channels, normalised and mixed over positions, gate the rest (gMLP)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.outside = nn.Linear(3, 7), nn.LayerNorm(7)
        self.up, self.inside = nn.Linear(7, 22), nn.LayerNorm(11)
        self.mix, self.down = nn.Linear(5, 5), nn.Linear(11, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        kept, gate = nn.functional.gelu(self.up(self.outside(x))).chunk(2, -1)
        gate = self.mix(self.inside(gate).transpose(1, 2)).transpose(1, 2)
        return self.outside(x + self.down(kept * gate)).tanh()


class InsideNorm(nn.Module):
    """One layer's outputs are normalised, before and behind a stream that two layers make."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(3, 7), nn.Linear(7, 11), nn.Linear(11, 7)
        self.outside, self.inside, self.head = kind(7), kind(11), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.outside(x + self.down(self.inside(self.up(x).relu()))))


@pytest.mark.parametrize("make", [SpatialGate, *(lambda k=k: InsideNorm(k) for k in NORMS)])
def test_a_norm_on_what_one_layer_makes_is_lifted(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(3)
    original = make().eval()
    for parameter in original.parameters():
        nn.init.normal_(parameter, 0.0, 0.5)
    x = torch.randn(2, 5, 3)
    wide = fxfib.lift(original, 1.5, x, seed=1)
    assert wide.up.weight.shape == (2 * len(original.up.weight), 7)
    assert wide.stem.weight.shape == (7, 3)  # several layers add to it: rounded down
    small = fxfib.compile(wide, 0.0, x)
    assert not small.fibration.refusals
    assert small.fibration.exact_error < 1e-6
    assert sum(p.numel() for p in small.parameters()) == sum(
        p.numel() for p in original.parameters()
    )
    torch.testing.assert_close(small(x), original(x), rtol=1e-4, atol=1e-5)
