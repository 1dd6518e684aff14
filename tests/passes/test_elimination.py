"""Which nodes go first: beside a search that refits, and where the covariance is a poor one."""

import numpy as np
import pytest
import torch
from torch import nn

import fxfib
from fxfib.capture import capture
from fxfib.passes.activations import activations_of
from fxfib.passes.elimination import Place, eliminate
from fxfib.passes.outlook import Outlook


def loss_of(covariance: torch.Tensor, demand: torch.Tensor, kept: list[int]) -> float:
    """What readers lose when only these nodes are left and their columns are fitted again."""
    inner = covariance[kept][:, kept]
    rest = covariance - covariance[:, kept] @ torch.linalg.inv(inner) @ covariance[kept]
    return float((rest * demand).sum())


@pytest.mark.parametrize(("seed", "count"), [(0, 1), (1, 2), (2, 5), (3, 11), (4, 23)])
def test_losses_are_those_of_the_least_squares_fit(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 60, generator=generator, dtype=torch.float64)
    values *= 10 ** torch.randn(count, 1, generator=generator, dtype=torch.float64)
    readers = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    covariance, demand = values @ values.T / 60, readers @ readers.T
    covariance += 1e-9 * torch.eye(count, dtype=torch.float64)
    order, lost = eliminate([Place(covariance, demand)])
    assert sorted(order) == list(range(count))
    whole = float((covariance * demand).sum())
    for gone in range(1, count):
        kept = sorted(set(range(count)) - set(order[:gone].tolist()))
        wanted = loss_of(covariance, demand, kept)
        assert lost[gone - 1] == pytest.approx(wanted / whole, rel=0.02, abs=2e-3)
    assert lost[-1] == pytest.approx(1.0, rel=1e-6)


def test_places_that_lose_nodes_together_lose_the_mean_share() -> None:
    """Node 0 is missed least where it is weighed alone, and most in the other place."""
    first = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    second = torch.diag(torch.tensor([500.0, 100.0, 400.0], dtype=torch.float64))
    readers = torch.eye(3, dtype=torch.float64)
    assert eliminate([Place(first, readers)])[0].tolist() == [0, 1, 2]
    order, lost = eliminate([Place(first, readers), Place(second, readers)])
    assert order.tolist() == [1, 0, 2]
    shares = np.array([2 / 6 + 0.1, 1 / 6 + 0.5, 3 / 6 + 0.4]) / 2
    assert lost == pytest.approx(np.cumsum(shares), rel=1e-3)


def test_nobody_makes_up_for_what_readers_lose_that_are_not_linear() -> None:
    """Nodes 0 and 1 are one and the same: to be spared where both can be read by one column."""
    covariance = torch.tensor(
        [[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64
    )
    reader = torch.eye(3, dtype=torch.float64)
    order, lost = eliminate([Place(covariance, reader)])
    assert order[0] in (0, 1) and lost[0] < 1e-3
    alone = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)
    order, lost = eliminate([Place(covariance, torch.zeros_like(reader), alone)])
    assert order.tolist()[0] == 2
    assert lost == pytest.approx(np.array([2, 6, 10]) / 10, rel=1e-3)
    # Both kinds of readers: the linear ones have the other node, so the rest decides.
    order, lost = eliminate([Place(covariance, reader, alone)])
    assert order.tolist()[0] == 2
    assert lost[1] - lost[0] == pytest.approx(4 / 19, rel=1e-2)
    assert lost[-1] == pytest.approx(1.0, rel=1e-3)


class Attentive(nn.Module):
    """Queries, keys and values of one packed matrix, 48 nodes of an input of rank 16."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.last = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.attention(x, x, x, need_weights=False)[0])


def test_queries_are_not_spared_since_values_tell_them() -> None:
    torch.manual_seed(3)
    model, inputs = Attentive().eval(), torch.randn(40, 6, 16)
    graph = capture(model, (inputs,)).graph_module
    outlook = Outlook(graph)
    found = activations_of(graph, outlook, [(inputs,)])
    (packed,) = [a for a in found.values() if len(a.covariance) == 48]
    assert torch.linalg.matrix_rank(packed.covariance, rtol=1e-6) == 16
    _, lost = eliminate([Place(packed.covariance, packed.demand, packed.alone)])
    # A third of the variance at the least is in what is half of the nodes.
    assert lost[23] > 0.3


@pytest.mark.parametrize("fitted", [True, False])
def test_what_a_recurrent_layer_loses_comes_back_unless_it_is_fitted(fitted: bool) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(7, 6, batch_first=True)
            self.last = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.layer(x)[0][:, -1])

    torch.manual_seed(4)
    model, steps = Reader().eval(), torch.randn(30, 5, 7)
    graph = capture(model, (steps,)).graph_module
    found = activations_of(graph, Outlook(graph), [(steps,)], recurrence=fitted)
    (hidden,) = [a for (_, axis), a in found.items() if isinstance(axis, str)]
    readers = torch.cat([model.layer.weight_hh_l0, model.last.weight]).detach().double()
    demand, nothing = readers.t() @ readers, torch.zeros(6, 6, dtype=torch.float64)
    torch.testing.assert_close(hidden.demand, demand if fitted else nothing)
    torch.testing.assert_close(hidden.alone, nothing[0] if fitted else demand.diagonal())


def test_a_covariance_that_rounding_left_indefinite() -> None:
    """Wide, of low rank, few large directions: eigenvalues below zero by more than the damping."""
    generator = torch.Generator().manual_seed(0)
    count = 192
    basis, _ = torch.linalg.qr(torch.randn(count, count, generator=generator, dtype=torch.float64))
    spectrum = torch.full((count,), -1e-4, dtype=torch.float64)
    spectrum[:6] = torch.tensor([50.0, 20.0, 5.0, 1.0, 0.5, 0.1])
    covariance = (basis * spectrum) @ basis.T
    readers = torch.randn(count, 40, generator=generator, dtype=torch.float64)
    order, lost = eliminate([Place(covariance, readers @ readers.T)])
    assert sorted(order) == list(range(count))
    assert np.isfinite(lost).all() and (np.diff(lost) >= 0).all()
    # Six directions hold all there is: all but a few nodes go for next to nothing.
    assert lost[count - 30] < 0.01 * lost[-1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    covariance = torch.eye(5, dtype=torch.float64)
    covariance[2, 2] = value
    with pytest.raises(fxfib.InputError, match="NaN or infinite"):
        eliminate([Place(covariance, torch.eye(5, dtype=torch.float64))])


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_what_reads_nodes_apart_does_not_tie_them(groups: int) -> None:
    """Demand is the product of the weight as a matrix: of a depthwise one, a diagonal."""
    torch.manual_seed(2)
    reader = nn.Conv1d(6, 12, 3, groups=groups)
    model = nn.Sequential(nn.Conv1d(4, 6, 1), reader, nn.ReLU(), nn.Conv1d(12, 2, 1)).eval()
    inputs = torch.randn(9, 4, 8)
    graph = capture(model, (inputs,)).graph_module
    first = next(n for n in graph.graph.nodes if "conv1d" in str(n.target))
    found = activations_of(graph, Outlook(graph), [(inputs,)])[first, 1].demand
    wide = torch.zeros(12, 6, 3, dtype=torch.float64)
    per = 6 // groups
    for out in range(12):
        start = out // (12 // groups) * per
        wide[out, start : start + per] = reader.weight[out].detach().double()
    torch.testing.assert_close(found, torch.einsum("oit,ojt->ij", wide, wide))
