"""Regions under a context that changes nothing are part of the graph; others are refused."""

import pytest
import torch
from torch import Tensor, nn

import fxfib
from fxfib.capture import capture
from fxfib.errors import CaptureError


class Exact(nn.Module):
    """The middle runs without mixed precision, the branch gives two values."""

    def __init__(self, enabled: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(3, 7)
        self.middle = nn.Linear(7, 11)
        self.last = nn.Linear(11, 5)
        self.enabled = enabled

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
            x = self.middle(x).relu()
            with torch.autocast("cpu", enabled=False):
                scale = x.float().sigmoid()
            both = x * scale, x + torch.ones(11)
        return self.last((both[0] * both[1]).type_as(x))


def test_without_autocast() -> None:
    torch.manual_seed(3)
    model = Exact().eval()
    x = torch.randn(4, 3)
    captured = capture(model, x)
    wide = fxfib.lift(model, 2.0, x)
    small = fxfib.compile(wide, 0.0, x)
    assert captured.dynamic_batch
    assert not small.fibration.refusals
    assert wide.middle.out_features > 11 and small.middle.out_features == 11
    assert small.first.out_features == 7
    x = torch.randn(6, 3)
    with torch.no_grad():
        assert torch.equal(captured.graph_module(x)[0], model(x))
        torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


def test_with_autocast() -> None:
    with pytest.raises(CaptureError, match="autocast"):
        capture(Exact(enabled=True).eval(), torch.randn(4, 3))


class Table(nn.Module):
    """A parameter goes through a dropout that is off before it meets a value."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7))
        self.first = nn.Linear(3, 7)
        self.last = nn.Linear(7, 5)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu() + self.drop(self.table).relu())


def test_dropout_of_a_parameter() -> None:
    torch.manual_seed(3)
    model = Table().eval()
    x = torch.randn(4, 3)
    wide = fxfib.lift(model, 2.0, x)
    small = fxfib.compile(wide, 0.0, x)
    assert not small.fibration.refusals
    assert wide.first.out_features > 7 and small.first.out_features == 7
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
