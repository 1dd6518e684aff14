"""``fxfib.check``: the statements of the theory on planted networks, and on broken ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import fxfib
from fxfib import converse
from fxfib.errors import InputError
from fxfib.passes.rules.linear import LinearMap

from strategies import plant


def squares(outputs: object) -> torch.Tensor:
    leaves = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum((torch.tanh(leaf) - 0.3).square().mean() for leaf in leaves)  # type: ignore[misc]


@pytest.mark.parametrize("seed", [0, 2, 7])
def test_everything_holds_on_planted_networks(seed: int) -> None:
    planted = plant(seed, covers=True)
    before = {name: p.clone() for name, p in planted.wide.named_parameters()}
    found = fxfib.check(planted.wide, planted.inputs, squares)
    assert found.holds, str(found)
    assert [law.equation for law in found.laws if "only if" not in law.equation] == [
        "Eq. 4", "Eq. 2", "Eq. 6", "Eq. 8", "Eq. 9", "Theorem 2.1", "Eq. 10",
    ]  # fmt: skip
    assert all(law.compared > 0 for law in found.laws)
    assert found["Theorem 2.1"].deviation == 0
    assert all(torch.equal(p, before[name]) for name, p in planted.wide.named_parameters())
    assert all(p.grad is None for p in planted.wide.parameters())


def pair(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = model[0].weight[0], model[0].bias[0]
        model[2].weight[1], model[2].bias[1] = model[2].weight[0], model[2].bias[0]
        model[4].weight[:, 1] = model[4].weight[:, 0]
        model[2].weight[1, 0] += 0.25
        model[2].weight[1, 1] -= 0.25
    return model.to(dtype)


def test_a_cover_over_a_fiber_that_is_none_is_reported_as_split() -> None:
    found = fxfib.check(pair(), torch.randn(7, 3, dtype=torch.float64), squares)
    assert found["Eq. 9"].deviation == 1
    assert found["Eq. 9"].holds is None
    assert found["Theorem 2.1"].deviation == 0
    assert found.holds


def test_above_zero_deviations_are_measured_and_nothing_is_claimed() -> None:
    model = pair(torch.float32)
    with torch.no_grad():
        model[2].weight[2] = model[2].weight[3] + 0.01 * torch.randn(4)
        model[2].bias[2] = model[2].bias[3]
    found = fxfib.check(model, torch.randn(7, 3), squares, eps=0.2, opfiber_eps=0.5)
    assert found["Eq. 4"].holds is None
    assert 1e-4 < found["Eq. 4"].deviation < 1
    assert found["Eq. 2"].holds
    assert "not claimed" in str(found)
    assert found.to_dict()["laws"][0]["equation"] == "Eq. 4"


def test_the_result_is_frozen() -> None:
    found = fxfib.check(pair(), torch.randn(7, 3, dtype=torch.float64), squares)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.loss = 0.0  # type: ignore[misc]


def test_a_wrong_backward_rule_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def backward(self, adjoint, node, error):
        source, weight, _, _ = self.operands(adjoint.analysis, node)
        if weight.meta["val"].shape[0] != weight.meta["val"].shape[1]:
            weight = adjoint.call(torch.ops.aten.t.default, weight)
        return [(source, adjoint.call(torch.ops.aten.linear.default, error, weight))]

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    inputs = torch.randn(7, 3, dtype=torch.float64)
    assert fxfib.check(model, inputs, squares).holds
    monkeypatch.setattr(LinearMap, "backward", backward)
    found = fxfib.check(model, inputs, squares)
    assert found["Eq. 2"].holds is False
    assert not found.holds


@pytest.mark.parametrize("loss_fn", [lambda y: y, lambda y: 1.0, lambda y: y.sum() * float("nan")])
def test_a_loss_that_is_none_is_refused(loss_fn: object) -> None:
    with pytest.raises(InputError, match="scalar"):
        fxfib.check(pair(), torch.randn(7, 3, dtype=torch.float64), loss_fn)  # type: ignore[arg-type]


@pytest.mark.parametrize("symmetry", ["fiber", "opfiber", "cover", "stable"])
def test_color_knows_all_symmetries(symmetry: str) -> None:
    colors = fxfib.color(pair(), torch.randn(7, 3, dtype=torch.float64), symmetry=symmetry)
    expected = {"fiber": 4, "opfiber": 4, "cover": 4, "stable": 5}[symmetry]
    assert len(colors.labels["2"].unique()) == expected
    assert colors.to_dict()["symmetry"] == symmetry


# -- the converse ----------------------------------------------------------------------------------


def linear() -> nn.Sequential:
    """No activations: fibers of nodes 0 and 3 behind other rows, opfibers of nodes 1 and 2."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 5))
    model = model.double()
    with torch.no_grad():
        first, second, third = model[0], model[1], model[2]
        first.weight[3], first.bias[3] = first.weight[0], first.bias[0]
        second.weight[4], second.bias[4] = second.weight[2], second.bias[2]
        second.weight[4, 0] += 0.25
        second.weight[4, 3] -= 0.25
        third.weight[:, 1] = third.weight[:, 2]
    return model


def test_in_linear_networks_what_is_in_step_is_a_fiber(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = linear(), torch.randn(3, 7, dtype=torch.float64)
    found = fxfib.check(model, x, squares)
    assert found.holds, str(found)
    forward, back = found["Eq. 4, only if"], found["Eq. 6, only if"]
    # The third layer reads five colors that are sums of four, and the bias.
    assert forward.compared == 4 + 5 + 5
    assert forward.note == "1 layers read dependent colors"
    assert forward.holds and back.holds
    assert back.compared > 0
    for name, equation in (("fiber_of", "Eq. 4, only if"), ("opfiber_of", "Eq. 6, only if")):
        with monkeypatch.context() as patch:
            right = getattr(converse, name)
            patch.setattr(converse, name, lambda *a, right=right: np.arange(len(right(*a))))
            wrong = fxfib.check(model, x, squares)
            assert wrong[equation].holds is False
            assert wrong[equation].deviation >= 1
            assert not wrong.holds


def test_dependent_colors_can_be_in_step_without_being_a_fiber() -> None:
    """Node 2 is the sum of nodes 0 and 1; reading it, or both, is the same."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for part in (model[0].weight, model[0].bias):
            part[2] = part[0] + part[1]
        model[1].weight[0] = torch.tensor([1.0, 1.0, 0.0, 0.5])
        model[1].weight[1] = torch.tensor([0.0, 0.0, 1.0, 0.5])
        model[1].bias[1] = model[1].bias[0]
    x = torch.randn(3, 5, dtype=torch.float64)
    assert torch.allclose(*model(x).T[:2])
    found = fxfib.check(model, x, squares)
    assert len(fxfib.color(model, x).labels["1"].unique()) == 3
    law = found["Eq. 4, only if"]
    assert law.holds and law.compared == 4
    assert "1 layers read dependent colors" in law.note


def test_behind_an_activation_nothing_is_claimed_the_other_way() -> None:
    found = fxfib.check(pair(), torch.randn(7, 3, dtype=torch.float64), squares)
    assert found["Eq. 4, only if"].compared == 3  # the first layer, before any activation
    assert all(law.equation != "Eq. 6, only if" for law in found.laws)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("last", [False, True])
def test_errors_of_recurrent_layers_are_autograds(kind: type[nn.RNNBase], last: bool) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells, self.head = kind(4, 5, 2, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            steps, state = self.cells(x)
            ends = state[0] if isinstance(state, tuple) else state
            found: torch.Tensor = self.head(ends[-1] if last else steps.mean(1))
            return found

    torch.manual_seed(0)
    found = fxfib.check(Reader(), (torch.randn(6, 3, 4),), lambda y: y.square().sum())
    (law,) = [law for law in found.laws if law.equation == "Eq. 2"]
    assert law.compared and law.holds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_equal_up_to_the_rounding_of_the_weights_holds(dtype: torch.dtype) -> None:
    model, x = pair().to(dtype), torch.randn(7, 3, dtype=dtype)
    wide = fxfib.lift(model.float(), 1.5, example_inputs=(x.float(),)).to(dtype)
    found = fxfib.check(wide, (x,), squares)
    assert found.holds, str(found)
    assert found["Eq. 2"].deviation < 1e-9


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), "0.1"])
def test_the_step_is_a_number(lr: object) -> None:
    with pytest.raises(InputError, match="lr must be"):
        fxfib.check(pair(), torch.randn(7, 3, dtype=torch.float64), squares, lr=lr)  # type: ignore[arg-type]


def test_the_loss_is_a_function() -> None:
    with pytest.raises(InputError, match="loss_fn must be callable, not Tensor"):
        fxfib.check(pair(), torch.randn(7, 3, dtype=torch.float64), torch.zeros(7))  # type: ignore[arg-type]
