"""Where nodes can start anew: recurrent and concatenated layers, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from breaking_models import train
from torch import nn

import fxfib
from fxfib.errors import InputError, RefusedError


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 5)
        self.inner, self.last = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        return self.last(torch.relu(self.inner(x + self.second(x))))


def test_what_is_not_covered_is_refused_with_the_reason() -> None:
    model, x = Residual(), torch.randn(4, 3)
    breaker = fxfib.SymmetryBreaker(model, torch.optim.SGD(model.parameters(), lr=0.1), (x,))
    assert set(breaker.units) == {"inner"}
    assert "meet those of" in breaker.refused["second"]
    assert breaker.refused["last"] == "it is an output of the network"
    with pytest.raises(RefusedError, match="LBFGS"):
        fxfib.SymmetryBreaker(model, torch.optim.LBFGS(model.parameters()), (x,))
    with pytest.raises(InputError, match="no layer's nodes"):
        alone = nn.Sequential(nn.Linear(3, 2))
        fxfib.SymmetryBreaker(alone, torch.optim.SGD(alone.parameters(), lr=0.1), (x,))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.cell = nn.Linear(3, 5), nn.LSTM(5, 7, batch_first=True)
        self.norm, self.inner, self.last = nn.LayerNorm(7), nn.Linear(7, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.cell(torch.tanh(self.into(x)))[0])
        return self.last(torch.tanh(self.inner(x)))


class Sequence(nn.Module):
    """A recurrent layer, and what reads its outputs or the last state of the last layer."""

    def __init__(self, kind: str, layers: int, both: bool, read: str, **more: Any) -> None:
        super().__init__()
        made = getattr(nn, kind)
        self.cell = made(3, 5, layers, bidirectional=both, batch_first=True, **more)
        width = more.get("proj_size", 5) * (1 + (both and read == "outputs"))
        self.read, self.last = read, nn.Linear(width, 2)
        self.state = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = self.state(x[:, 0])[None] if self.read == "started" else None
        out, state = self.cell(x, start)
        state = state[0] if isinstance(state, tuple) else state
        read = {"outputs": out, "last": state[-1], "all": state, "started": out}
        return self.last(read[self.read])

    def plant(self) -> Sequence:
        """Nodes 1 and 3 of every layer and direction are one cover."""
        with torch.no_grad():
            for name, p in self.cell.named_parameters():
                gates = p.view(-1, 5, *p.shape[1:])
                gates[:, 3] = gates[:, 1]
                if name.startswith(("weight_hh", "weight_ih_l1")):
                    p[:, 3] = p[:, 1]
                if p.ndim > 1 and p.shape[1] == 10:
                    p[:, 8] = p[:, 6]
            for own in self.last.weight.split(5, 1):
                own[:, 3] = own[:, 1]
        return self


@pytest.mark.parametrize("read", ["outputs", "last"])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_nodes_start_anew(kind: str, both: bool, read: str) -> None:
    torch.manual_seed(4)
    model = Sequence(kind, 2, both, read).double().plant()
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, x, 3)
    breaker = fxfib.SymmetryBreaker(model, optimizer, (x,), eps=1e-9)
    before = model(x).detach()
    done = breaker.break_all()
    names = ["l0", "l0_reverse", "l1", "l1_reverse"] if both else ["l0", "l1"]
    expected = [(f"cell (hidden {name})", 3, 1) for name in names]
    assert [(r.layer, r.node, r.representative) for r in done] == expected
    assert torch.allclose(model(x), before, rtol=0, atol=1e-12)
    cell = model.cell
    for name in names:
        hh = getattr(cell, f"weight_hh_{name}").detach()
        rows = hh.view(-1, 5, 5)
        assert bool((hh[:, 3] == 0).all())
        assert bool((rows[:, 3, [0, 1, 2, 4]] != 0).all())
        assert bool((rows[:, 3] - rows[:, 1]).abs().amax(1).gt(0.01).all())  # every gate
        assert float(getattr(cell, f"bias_ih_{name}").detach().view(-1, 5)[:, 3].abs().max()) == 0
        moment = optimizer.state[getattr(cell, f"weight_ih_{name}")]["exp_avg"]
        moment = moment.view(-1, 5, moment.shape[1])
        unread = both and read == "last" and name == "l1"  # `state[-1]` is of the other direction
        assert not moment[:, 3].any() and bool(moment[:, 1].any()) != unread
    train(model, optimizer, x, 5)
    covers = breaker.covers()
    assert all(len(set(labels.tolist())) == 5 for name, labels in covers.items())


def test_recurrent_nodes_that_cannot_be_told_apart_are_refused() -> None:
    torch.manual_seed(4)
    x = torch.randn(6, 4, 3)
    for options, why in (
        ({"kind": "GRU", "layers": 2, "read": "all"}, "nodes of several layers"),
        ({"kind": "GRU", "layers": 1, "read": "started"}, "first state"),
    ):
        model = Sequence(both=False, **options)
        with pytest.raises(InputError, match=why):
            fxfib.SymmetryBreaker(model, torch.optim.SGD(model.parameters(), lr=0.1), (x,))
    model = Sequence("LSTM", 1, False, "outputs", proj_size=4)
    breaker = fxfib.SymmetryBreaker(model, torch.optim.SGD(model.parameters(), lr=0.1), (x,))
    assert set(breaker.units) == {"cell"}
    assert "projection stands between" in breaker.refused["cell (projected l0)"]
    assert {p.name for p in breaker.units["cell"].outgoing} == {"cell.weight_hr_l0"}


def test_what_feeds_and_what_reads_a_recurrent_layer() -> None:
    torch.manual_seed(0)
    model, x = Recurrent().double(), torch.randn(2, 4, 3, dtype=torch.float64)
    with torch.no_grad():
        model.into.weight[3], model.into.bias[3] = model.into.weight[0], model.into.bias[0]
        model.cell.weight_ih_l0[:, 3] = model.cell.weight_ih_l0[:, 0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    breaker = fxfib.SymmetryBreaker(model, optimizer, (x,))
    assert set(breaker.units) == {"into", "inner"}
    assert "keep its nodes apart" in breaker.refused["cell"]  # a layer norm behind it
    before = model(x).detach()
    (done,) = breaker.break_all()
    assert (done.layer, done.node, done.representative) == ("into", 3, 0)
    assert torch.allclose(model(x), before, rtol=0, atol=1e-12)


class Joined(nn.Module):
    """Two layers side by side; the second's nodes are also read alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 5), nn.Linear(3, 7)
        self.last, self.alone = nn.Linear(12, 2), nn.Linear(7, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = torch.relu(self.one(x)), torch.tanh(self.two(x))
        return self.last(torch.cat([one, two], 1)) + self.alone(two)


def test_concatenated_nodes() -> None:
    torch.manual_seed(0)
    model, x = Joined().double(), torch.randn(9, 3, dtype=torch.float64)
    with torch.no_grad():
        for layer, node, twin in ((model.one, 4, 0), (model.two, 6, 2)):
            layer.weight[node], layer.bias[node] = layer.weight[twin], layer.bias[twin]
        model.last.weight[:, 4] = model.last.weight[:, 0]
        model.last.weight[:, 5 + 6] = model.last.weight[:, 5 + 2]
        model.alone.weight[:, 6] = model.alone.weight[:, 2]
    breaker = fxfib.SymmetryBreaker(model, torch.optim.SGD(model.parameters(), lr=0.1), (x,))
    before = model(x).detach()
    done = breaker.break_all()
    assert [(r.layer, r.node, r.representative) for r in done] == [("one", 4, 0), ("two", 6, 2)]
    assert torch.allclose(model(x), before, rtol=0, atol=1e-12)
    assert model.last.weight.detach()[:, [4, 11]].abs().max() == 0
    assert model.alone.weight.detach()[:, 6].abs().max() == 0


class Various(nn.Module):
    """What keeps nodes from being replaced, one layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.normed, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6)
        self.split, self.depthwise = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 3, groups=4)
        self.tied, self.frozen = nn.Linear(4, 4), nn.Linear(4, 5)
        self.soft, self.good, self.last = nn.Linear(5, 7), nn.Linear(7, 9), nn.Linear(9, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.split(torch.relu(self.norm(self.normed(x)))).tanh()).tanh()
        x = self.tied(torch.tanh(self.tied(x.amax((2, 3))))).tanh()
        x = torch.softmax(self.soft(torch.tanh(self.frozen(x))), -1)
        return self.last(torch.tanh(self.good(x)))


def test_what_mixes_shares_or_freezes_nodes_is_refused() -> None:
    torch.manual_seed(0)
    model, x = Various(), torch.randn(4, 3, 6, 6)
    trained = [p for name, p in model.named_parameters() if not name.startswith("frozen")]
    breaker = fxfib.SymmetryBreaker(model, torch.optim.SGD(trained, lr=0.1), (x,))
    assert set(breaker.units) == {"good"}
    assert "keep its nodes apart" in breaker.refused["normed"]
    assert "rearranges" in breaker.refused["split"]
    assert "tied.weight is used several times" in breaker.refused["depthwise"]
    assert breaker.refused["tied"] == "it is called several times"
    assert breaker.refused["frozen"].startswith("the optimizer does not train frozen.")
    assert "keep its nodes apart" in breaker.refused["soft"]
