"""Chains of views that take the batch through another axis, and sizes that belong to no value."""

import pytest
import torch
from torch import Tensor, nn

import fxfib
from fxfib.capture import capture

aten = torch.ops.aten


class Patches(nn.Module):
    """Channels meet the batch in a view, as mobile vision transformers cut images into patches."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 7, 1)
        self.middle = nn.Linear(7, 11)
        self.back = nn.Linear(11, 5)
        self.last = nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        batch, channels = x.shape[:2]
        x = x.reshape(batch * channels * 3, 2, 2, 3).transpose(1, 2)
        x = x.reshape(batch, channels, 6, 6).transpose(1, 3).reshape(batch * 6, 6, channels)
        x = self.back(self.middle(x).relu()).relu()
        x = x.reshape(batch, 6, 6, 5).transpose(1, 3).reshape(batch * 5 * 3, 2, 2, 3)
        return self.last(x.transpose(1, 2).reshape(batch, 5, 6, 6))


class Scaled(nn.Module):
    """A model must have a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.7))


class Windows(Scaled):
    """The batch is joined with positions and stays with them: nothing to write otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(x.shape[0], 5, 2, 3, 2, 3).permute(0, 2, 4, 3, 5, 1)
        return x.reshape(-1, 9, 5) * self.scale


class Regrouped(Scaled):
    """Six numbers an example become four and two thirds of the next: no axis is kept."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        return x.reshape(n * 3, 2).transpose(0, 1).reshape(3, n * 2).transpose(0, 1) * self.scale


class ReadTwice(Scaled):
    """A value on the way is read by another op as well."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        inner = x.reshape(n * 5, 2, 3)
        moved = inner.transpose(1, 2).reshape(n, 5, 6) * self.scale
        return moved + inner.sum((1, 2)).reshape(n, 5, 1)


@pytest.fixture
def weights() -> None:
    torch.manual_seed(3)


def targets(captured: object) -> list[object]:
    nodes = captured.graph_module.graph.nodes  # type: ignore[attr-defined]
    return [node.target for node in nodes if node.op == "call_function"]


@pytest.mark.usefixtures("weights")
def test_channels_that_meet_the_batch_merge() -> None:
    model = Patches().eval()
    images = torch.randn(2, 3, 6, 6)
    captured = capture(model, images)
    assert captured.dynamic_batch
    assert targets(captured).count(aten.permute.default) == 2
    assert aten.transpose.int not in targets(captured)
    wide = fxfib.lift(model, 2.0, images)
    small = fxfib.compile(wide, 0.0, images)
    widths = [m.weight.shape[0] for m in wide.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert widths[0] > 7 and widths[1] > 11 and widths[2] > 5
    sizes = [m.weight.shape[0] for m in small.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert sizes == [7, 11, 5, 3]
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 6, 6)
        with torch.no_grad():
            torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize(
    ("model", "shape"), [(Windows(), (2, 5, 6, 6)), (Regrouped(), (2, 6)), (ReadTwice(), (2, 5, 6))]
)
def test_other_chains_stay_as_they_are(model: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    captured = capture(model.eval(), x)
    plain = [
        n.target for n in torch.export.export(model, (x,)).graph.nodes if n.op == "call_function"
    ]
    moves = {aten.permute.default, aten.transpose.int, aten.reshape.default, aten.view.default}
    assert sum(t in moves for t in targets(captured)) == sum(t in moves for t in plain)
    for batch in (2, 3, 5):
        x = torch.randn(batch, *shape[1:])
        (found,) = captured.graph_module(x)
        assert torch.equal(found, model(x))


class SizesOfOthers(nn.Module):
    """Takes its shapes from values whose channels merge."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 7)
        self.second = nn.Linear(3, 7)
        self.last = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.first(x).relu()
        flat = self.second(x).relu().flatten(0, 1)
        scale = wide.mean(1, keepdim=True).expand_as(wide)
        return self.last((flat.reshape_as(wide) + wide.view_as(wide)) * scale)


@pytest.mark.usefixtures("weights")
def test_shapes_taken_from_other_tensors() -> None:
    model = SizesOfOthers().eval()
    x = torch.randn(2, 5, 3)
    captured = capture(model, x)
    graph = captured.graph_module.graph
    asked = graph.find_nodes(op="call_function", target=aten.sym_size.int)
    assert all(node.args[0].op == "placeholder" for node in asked)
    wide = fxfib.lift(model, 2.0, x)
    small = fxfib.compile(wide, 0.0, x)
    assert not small.fibration.refusals
    assert wide.first.out_features > 7 and small.first.out_features == 7
    x = torch.randn(4, 5, 3)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
