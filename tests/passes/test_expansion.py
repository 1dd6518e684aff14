"""Values that are stored by their own fibers and expanded by an index where they are read."""

import copy

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxfib
from fxfib.coloring import Factor
from fxfib.errors import InputError, VerifyError
from fxfib.passes import expansion

from strategies import plant

WIDE = torch.float64
STEM, FIRST, SECOND = (0, 1, 0, 2, 1, 3, 4), (0, 0, 1, 1, 2, 2, 3), (0, 1, 2, 0, 1, 2, 0)


def planted(layer: nn.Module, fibers: tuple[int, ...]) -> nn.Module:
    """Equal rows (and biases, and statistics) for nodes of one fiber."""
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.ndim:
            tensor.data = tensor.data[torch.tensor(fibers)].contiguous()
    return layer


def norm(channels: int) -> nn.BatchNorm2d:
    result = nn.BatchNorm2d(channels, dtype=WIDE)
    for tensor in (result.weight, result.running_var, result.bias, result.running_mean):
        assert tensor is not None
        tensor.data.uniform_(0.5, 1.5)
    return result


class Block(nn.Module):
    """Two convolutions and their input."""

    def __init__(self, channels: int, hidden: int, fibers: tuple[int, ...]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1, dtype=WIDE)
        self.conv2 = planted(nn.Conv2d(hidden, channels, 3, padding=1, dtype=WIDE), fibers)
        self.norm = planted(norm(channels), fibers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv2(torch.relu(self.conv1(x)))) + x)


class Residual(nn.Module):
    """All seven nodes of the stream differ, and what is added to it has five, four and three."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = planted(nn.Conv2d(3, 7, 3, padding=1, dtype=WIDE), STEM)
        self.first, self.second = Block(7, 5, FIRST), Block(7, 6, SECOND)
        self.head = nn.Linear(7, 3, dtype=WIDE)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(torch.relu(self.stem(x))))
        return self.head(x.mean((2, 3)))


def images() -> Tensor:
    return torch.randn(2, 3, 8, 9, generator=torch.Generator().manual_seed(2), dtype=WIDE)


def widths(model: nn.Module) -> list[int]:
    names = ("stem.weight", "first.conv2.weight", "second.conv2.weight")
    return [len(model.get_parameter(name)) for name in names]


@pytest.fixture(scope="module")
def indexed() -> nn.Module:
    return fxfib.compile(Residual().eval(), 0.0, (images(),), residual="index")


def test_every_value_by_its_own_fibers(indexed):
    model = Residual().eval()
    assert widths(fxfib.compile(model, 0.0, (images(),))) == [7, 7, 7]
    assert widths(indexed) == [5, 4, 3]
    assert torch.allclose(indexed(images()), model(images()), rtol=1e-12, atol=1e-12)
    assert indexed.get_parameter("first.conv1.weight").shape[1] == 5  # it reads the stem
    assert indexed.get_parameter("second.conv1.weight").shape[1] == 7
    assert len(indexed.get_parameter("first.norm.weight")) == 4
    found = {g.members[0]: (g.fibers, g.expanded) for g in indexed.fibration.groups if g.expanded}
    assert found == {"stem": (5, 7), "first.conv2": (4, 7), "second.conv2": (3, 7)}
    assert "5 stored, 7 read" in str(indexed.fibration)


@pytest.mark.parametrize(
    ("name", "place"),
    [("conv2.weight", (1, 4, 2, 2)), ("conv2.bias", 1), ("norm.weight", 1), ("norm.bias", 1)],
)
def test_near_misses_stay_apart(name, place):
    model = Residual().eval()
    model.first.get_parameter(name).data[place] += 1e-3
    small = fxfib.compile(model, 0.0, (images(),), residual="index")
    assert widths(small) == [5, 5, 3]


def test_saved_exported_trained_compiled_again(indexed, tmp_path):
    fxfib.save(indexed, tmp_path / "small.fxfib")
    assert torch.equal(fxfib.load(tmp_path / "small.fxfib")(images()), indexed(images()))
    single = copy.deepcopy(indexed).to(torch.float32)
    fxfib.export_onnx(single, tmp_path / "small.onnx", (images().float(),))
    nodes = onnx.load(tmp_path / "small.onnx").graph.node
    assert sum(node.op_type == "Gather" for node in nodes) == 3
    single(torch.randn(5, 3, 8, 9)).sum().backward()
    assert all(p.grad is not None for p in single.parameters())
    again = fxfib.compile(indexed, 0.0, (images(),), residual="index")
    assert {k: v.shape for k, v in again.named_parameters()} == {
        k: v.shape for k, v in indexed.named_parameters()
    }


def test_the_cost_decides(monkeypatch, indexed):
    model = Residual().eval()

    def compiled() -> list[int]:
        return widths(fxfib.compile(model, 0.0, (images(),), residual="auto"))

    assert compiled() == [7, 7, 7]  # so small a network loses by one more op
    monkeypatch.setattr(expansion, "CALL", 0.0)
    monkeypatch.setattr(expansion, "MOVED", 5.0)
    assert compiled() == [5, 4, 3]
    monkeypatch.setattr(expansion, "MOVED", 1e9)
    assert compiled() == [7, 7, 7]


class Odd(nn.Module):
    """Differences, broadcasting, one value added twice and read elsewhere, constants, factors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Linear(3, 7, dtype=WIDE)
        self.a = planted(nn.Linear(7, 7, dtype=WIDE), STEM)
        self.b = planted(nn.Linear(7, 7, dtype=WIDE), FIRST)
        self.c = planted(nn.Linear(7, 7, dtype=WIDE), SECOND)
        self.d = nn.Linear(7, 7, dtype=WIDE)
        self.head = nn.Linear(14, 3, dtype=WIDE)
        self.a.weight.data[[1, 4]] = 0.0  # a constant, and another one
        self.a.weight.data[5] = 0.0
        self.a.bias.data[5] = 0.0
        self.b.weight.data[2] = 2 * self.b.weight.data[0]  # a multiple
        self.b.bias.data[2] = 2 * self.b.bias.data[0]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        a = torch.relu(self.a(x))
        y = x - a
        z = a.mean(1, keepdim=True) - torch.relu(self.b(y))
        z = z + a + self.c(x[:, :1])
        return self.head(torch.cat([z + z, torch.rsub(y, self.c(z))], -1)) + self.d(a).sum()


def test_odd_additions():
    model = Odd().eval()
    x = torch.randn(2, 5, 3, dtype=WIDE, generator=torch.Generator().manual_seed(4))
    small = fxfib.compile(model, 0.0, (x,), residual="index")
    assert torch.allclose(small(x), model(x), rtol=1e-11, atol=1e-11)
    assert len(small.get_parameter("a.weight")) == 5  # constants of two values, and zero, are kept
    assert len(small.get_parameter("b.weight")) == 5  # an index does not scale
    assert any("index_select" in str(node.target) for node in small.graph.nodes)


class Heads(nn.Module):
    """Queries and keys that are sorted along the head: no head can shrink."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        fibers = (0, 1, 0, 2, 1, 3, 0, 2, 4, 4, 1, 3)
        self.q = planted(nn.Linear(11, 12, dtype=WIDE), fibers)
        self.k = nn.Linear(11, 12, dtype=WIDE)
        self.out = nn.Linear(12, 3, dtype=WIDE)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).reshape(*x.shape[:2], 3, 4).sort(-1).values
        k = self.k(x).reshape(*x.shape[:2], 3, 4)
        return self.out((q * k).flatten(2))


def test_heads_that_cannot_shrink_are_stored_small():
    model = Heads().eval()
    x = torch.randn(2, 5, 11, dtype=WIDE, generator=torch.Generator().manual_seed(6))
    assert len(fxfib.compile(model, 0.0, (x,)).get_parameter("q.weight")) == 12
    small = fxfib.compile(model, 0.0, (x,), residual="index")
    assert len(small.get_parameter("q.weight")) == 5
    assert torch.allclose(small(x), model(x), rtol=1e-12, atol=1e-12)
    # Sequence and batch stay free.
    x = torch.randn(3, 5, 11, dtype=WIDE)
    assert torch.allclose(small(x), model(x), rtol=1e-12, atol=1e-12)


def test_an_unknown_op_gets_all_nodes():
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(7)
            self.up = planted(nn.Linear(3, 7, dtype=WIDE), STEM)
            self.down = nn.Linear(7, 3, dtype=WIDE)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.relu(self.up(x)).sort(-1).values)

    model, x = Unknown().eval(), torch.randn(4, 3, dtype=WIDE)
    small = fxfib.compile(model, 0.0, (x,), residual="index")
    assert len(small.get_parameter("up.weight")) == 5
    assert torch.allclose(small(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eps", [0.05, 0.3])
def test_members_of_a_stored_slot_are_within_eps(eps):
    """At a precision of its own every value is as coarse as its own rows allow, and no coarser."""
    from fxfib.api import shrink
    from fxfib.capture import capture

    torch.manual_seed(8)
    model = Residual().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    captured = capture(model, (images(),))
    plan, _ = shrink(captured.graph_module, eps, residual="index")
    assert plan.expansions or eps < 0.1
    for edge in plan.analysis.edges:
        labels = edge.own.keyed()
        slot = plan.layout(*edge.stored).slot
        for members in (np.flatnonzero(slot == s) for s in range(slot.max() + 1)):
            assert len(np.unique(labels[members])) <= 1 or edge.read not in plan.layouts


@pytest.mark.parametrize("seed", range(12))
def test_random_networks(seed):
    """Nothing but the bookkeeping may change: the oracle in float64 is inside compile."""
    network = plant(seed)
    joint = fxfib.compile(network.wide, 0.0, network.inputs).fibration
    small = fxfib.compile(network.wide, 0.0, network.inputs, residual="index").fibration
    assert small.parameters_after <= joint.parameters_after
    assert small.exact_error <= 1e-9


def test_wrong_versions_are_caught(monkeypatch):
    from fxfib.passes import plan

    model, right = Residual().eval(), plan.expansions

    def rolled(edges, layouts):
        return {
            key: [expansion.Expansion(e.axis, np.roll(e.index, 1), e.read) for e in found]
            for key, found in right(edges, layouts).items()
        }

    with monkeypatch.context() as patch:
        patch.setattr(plan, "expansions", rolled)
        with pytest.raises(VerifyError):
            fxfib.compile(model, 0.0, (images(),), residual="index")
    with monkeypatch.context() as patch:
        patch.setattr(Factor, "keyed", lambda self: np.zeros(len(self.labels), np.int64))
        with pytest.raises(VerifyError):
            fxfib.compile(model, 0.0, (images(),), residual="index")


def test_unknown_forms_are_refused():
    with pytest.raises(InputError, match="residual"):
        fxfib.compile(Residual().eval(), 0.0, (images(),), residual="gather")


class UnevenHeads(nn.Module):
    """Half of the channels of three heads are copies; the fourth head has none, so all stay."""

    def __init__(self, width: int, *, packed: bool = False, turned: bool = False) -> None:
        super().__init__()
        torch.manual_seed(4)
        sizes = [3 * width] if packed else [width] * 3
        self.made = nn.ModuleList(nn.Linear(width, size, dtype=WIDE) for size in sizes)
        self.out, self.turned = nn.Linear(width, width, dtype=WIDE), turned
        half = width // 8
        for layer in self.made:
            for tensor in layer.parameters():
                heads = tensor.data.view(-1, 4, 2 * half, *tensor.shape[1:])
                heads[:, :3, half:] = heads[:, :3, :half]

    def forward(self, x: Tensor) -> Tensor:
        made = [layer(x) for layer in self.made]
        made = list(made[0].chunk(3, -1)) if len(made) == 1 else made
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in made)
        if self.turned:
            angle = torch.arange(1.0, 1 + x.shape[1], dtype=WIDE)[:, None] * torch.arange(
                q.shape[-1] // 2, dtype=WIDE
            ).repeat(2)
            q, k = (
                t * angle.cos()
                + torch.cat([-t.chunk(2, -1)[1], t.chunk(2, -1)[0]], -1) * angle.sin()
                for t in (q, k)
            )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def tokens(width: int, length: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, length, width, generator=generator, dtype=WIDE)


def layer_widths(model: nn.Module) -> list[int]:
    return [len(p) for name, p in model.named_parameters() if name.endswith("weight")]


@pytest.mark.parametrize("packed, turned", [(False, False), (True, False), (False, True)])
def test_heads_of_uneven_sizes_are_stored_small(packed: bool, turned: bool) -> None:
    model = UnevenHeads(24, packed=packed, turned=turned).eval()
    joint = fxfib.compile(model, 0.0, (tokens(24),))
    assert layer_widths(joint) == layer_widths(model)
    small = fxfib.compile(model, 0.0, (tokens(24),), residual="index")
    assert layer_widths(small) == ([45, 24] if packed else [15, 15, 15, 24])
    assert all(group.expanded for group in small.fibration.groups if group.merged)
    assert "stored, " in str(small.fibration) and "read" in str(small.fibration)
    x = torch.randn(3, 5, 24, dtype=WIDE)
    torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-10)


def test_a_near_miss_in_a_head_is_stored_apart() -> None:
    model = UnevenHeads(24).eval()
    with torch.no_grad():
        model.made[0].weight[5, 2] += 1e-6
    small = fxfib.compile(model, 0.0, (tokens(24),), residual="index")
    assert layer_widths(small) == [16, 15, 15, 24]


def test_heads_that_shrink_need_no_index() -> None:
    model = UnevenHeads(24).eval()
    with torch.no_grad():
        for layer in model.made:
            for tensor in layer.parameters():
                tensor[21:24] = tensor[18:21]
    small = fxfib.compile(model, 0.0, (tokens(24),), residual="index")
    assert layer_widths(small) == [12, 12, 12, 24]
    assert not any(group.expanded for group in small.fibration.groups)


@pytest.mark.parametrize("width, chosen", [(24, False), (256, True)])
def test_the_cost_model_chooses_for_heads(width: int, chosen: bool) -> None:
    model = UnevenHeads(width).eval()
    small = fxfib.compile(model, 0.0, (tokens(width, 50),), residual="auto")
    assert (layer_widths(small)[0] < width) == chosen
