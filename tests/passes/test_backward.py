"""Errors, opfibers and covers beside what autograd says, in float64."""

from __future__ import annotations

import adjoint_checks
import cover_checks
import numpy as np
import pytest
import torch
from torch import nn

import fxfib
from fxfib.capture import capture
from fxfib.passes.backward import Continued
from fxfib.passes.cover import labels_of, stable
from fxfib.passes.rules import all_rules, derivative
from fxfib.passes.rules.base import PerChannel, Rule
from fxfib.passes.rules.batch_norm import BatchNorm
from fxfib.passes.rules.linear import LinearMap

from strategies import plant

#: The families, each with one set of examples that reaches its ways to carry an error.
EXAMPLES = [
    *("Multiply-mul", "BatchNorm-Conv2d", "Concatenate-cat", "Convolution-Conv2d"),
    *("Convolution-ConvTranspose1d", "GatedLinearUnit-glu", "GroupNorm-group_norm"),
    *("InstanceNorm-instance_norm", "LayerNorm-norm", "RMSNorm-norm", "Linear-linear"),
    *("Embedding-near=False", "MaxPool-antialias", "MaxPool-Conv1d", "PReLU-prelu"),
    *("ConstantPad-pad", "Softmax-softmax", "Rearrange-sequence", "Filling-all"),
]


def example(name: str):
    rule, _, wanted = name.partition("-")
    for owner in all_rules().values():
        if type(owner).__name__ == rule:
            found = next((e for e in owner.examples() if e.name == wanted), None)
            if found is not None:
                return found
    raise AssertionError(f"no example {name}")


@pytest.mark.parametrize("name", EXAMPLES)
def test_errors_are_those_of_autograd_and_equal_in_opfibers(name: str) -> None:
    chosen = example(name)
    errors = adjoint_checks.errors_of(capture(chosen.module, chosen.inputs))
    assert adjoint_checks.emitted_as_autograd(errors) > 2
    adjoint_checks.equal_in_opfibers(errors)
    opaque = {n.target.name for n in errors.continued.added if getattr(n.target, "reason", "")}
    assert not opaque, f"nothing is known behind {opaque}"


@pytest.mark.parametrize("seed", [0, 2, 4, 6])
def test_random_networks_of_sequences(seed: int) -> None:
    """Recurrent layers, attention and tied tables."""
    planted = plant(seed, covers=True, sequences=True)
    errors = adjoint_checks.errors_of(capture(planted.wide, planted.inputs))
    assert adjoint_checks.emitted_as_autograd(errors) > 5
    adjoint_checks.equal_in_opfibers(errors)
    continued, analysis = errors.continued, errors.analysis
    assert cover_checks.gradients_equal(analysis, continued, planted.wide, planted.inputs) > 0
    found = labels_of(analysis, continued.values, "cover")
    cover_checks.rows_equal(found, planted.wide, planted.inputs)
    assert any(len(np.unique(labels)) < len(labels) for labels in found.values())


@pytest.mark.parametrize("covers", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_random_networks(seed: int, covers: bool) -> None:
    """Errors at every node, gradients of every parameter; planted covers are found, all of them."""
    planted = plant(seed, covers=covers)
    captured = capture(planted.wide, planted.inputs)
    errors = adjoint_checks.errors_of(captured)
    assert adjoint_checks.emitted_as_autograd(errors) > 5
    adjoint_checks.equal_in_opfibers(errors)
    continued, analysis = errors.continued, errors.analysis
    pairs = cover_checks.gradients_equal(analysis, continued, planted.wide, planted.inputs)
    assert pairs > 0
    found = labels_of(analysis, continued.values, "cover")
    cover_checks.rows_equal(found, planted.wide, planted.inputs)
    if covers and not any("over channels" in line for line in planted.log):
        # (Of nodes that tie for the largest, rounding decides which gets the error.)
        fibers = labels_of(analysis, continued.values, "fiber")
        assert all(np.array_equal(found[name], fibers[name]) for name in fibers)
        assert any(len(np.unique(labels)) < len(labels) for labels in found.values())
        lasting = labels_of(stable(continued), continued.values, "stable")
        assert all(np.array_equal(found[name], lasting[name]) for name in fibers)


@pytest.mark.parametrize("seed", [0, 1, 2, 4, 7])
def test_near_misses_are_not_covers(seed: int) -> None:
    colors = {}
    for near in (False, True):
        planted = plant(seed, covers=True, near=near)
        continued = Continued(capture(planted.wide, planted.inputs).graph_module)
        analysis = continued.color()
        found = labels_of(analysis, continued.values, "cover")
        cover_checks.rows_equal(found, planted.wide, planted.inputs)
        cover_checks.gradients_equal(analysis, continued, planted.wide, planted.inputs)
        colors[near] = sum(len(np.unique(labels)) for labels in found.values())
    assert colors[True] > colors[False]


@pytest.mark.parametrize("optimizer", cover_checks.OPTIMIZERS)
@pytest.mark.parametrize("seed", [0, 4])
def test_training_does_not_split_planted_covers(seed: int, optimizer: str) -> None:
    planted = plant(seed, covers=True)
    continued = Continued(capture(planted.wide, planted.inputs).graph_module)
    before = cover_checks.covers_of(continued, "stable")
    chosen = cover_checks.OPTIMIZERS[optimizer](planted.wide.parameters())
    done = 0
    for steps in (1, 10, 100):
        cover_checks.train(planted.wide, planted.inputs, chosen, steps - done, done)
        done = steps
        # Copies are summed in another order, so their last digits differ.
        after = labels_of(continued.color(1e-7), continued.values, "cover")
        assert not cover_checks.coarsens(after, before), f"split after {steps} steps"
    assert any(len(np.unique(labels)) < len(labels) for labels in before.values())


def pair_of_layers(planted: bool) -> nn.Sequential:
    """A cover whose rows differ over a fiber that is no cover itself."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)
    ).double()
    first, second, third = model[0], model[2], model[4]
    with torch.no_grad():
        first.weight[1], first.bias[1] = first.weight[0], first.bias[0]
        second.weight[1], second.bias[1] = second.weight[0], second.bias[0]
        third.weight[:, 1] = third.weight[:, 0]
        if planted:
            second.weight[1, 0] += 0.3
            second.weight[1, 1] -= 0.3
    return model


def test_a_cover_by_eq_9_may_split_and_a_stable_one_does_not() -> None:
    """Fibers that are no covers fall apart in one step, and what was summed over them with it."""
    inputs = (torch.randn(7, 3, dtype=torch.float64),)
    model = pair_of_layers(True)
    continued = Continued(capture(model, inputs).graph_module)
    before = cover_checks.covers_of(continued)
    assert before["2"].tolist() == [0, 0, 1, 2, 3]
    assert cover_checks.covers_of(continued, "stable")["2"].tolist() == [0, 1, 2, 3, 4]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (model(*inputs) - 1).square().mean().backward()
    rows = model[2].weight.grad[:2]
    assert torch.equal(rows[0], rows[1])  # learning is synchronised (Eq. 8) ...
    optimizer.step()
    after = cover_checks.covers_of(continued)
    assert cover_checks.coarsens(after, before) == ["2"]  # ... and the cover is gone


def test_pairing_two_colorings_computed_apart_is_no_cover() -> None:
    """Equal columns over the next layer's fibers, equal rows: still the gradients differ."""
    inputs = (torch.randn(7, 3, dtype=torch.float64),)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    model = model.double()
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = model[0].weight[0], model[0].bias[0]
        model[2].weight[:, 0] = torch.tensor([1.0, 0.5])
        model[2].weight[:, 1] = torch.tensor([0.5, 1.0])  # equal sums over both rows
        model[4].weight[:, 1] = model[4].weight[:, 0]  # equal columns, unequal activations
    colors = fxfib.color(model, inputs, symmetry="cover")
    assert colors.labels["0"].tolist() == [0, 1]
    (model(*inputs) - 1).square().mean().backward()
    assert not torch.allclose(*model[0].weight.grad)


# -- wrong rules -----------------------------------------------------------------------------------


def network() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Square layers, a pooled convolution with batch norm, planted columns."""
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(20, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3),
    )  # fmt: skip
    model = model.double().eval()
    with torch.no_grad():
        model[1].running_var.uniform_(0.5, 2.0)
        model[5].weight[:, 4:8] = model[5].weight[:, :4]
        model[7].weight[:, 1] = model[7].weight[:, 0]
    return model, (torch.randn(4, 3, 4, 4, dtype=torch.float64),)


def check_network() -> None:
    errors = adjoint_checks.errors_of(capture(*network()))
    assert adjoint_checks.emitted_as_autograd(errors) > 5
    adjoint_checks.equal_in_opfibers(errors)


def flavor_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(derivative, "flavors_along", lambda *_: (None, None))


def summed_over_inputs(patch: pytest.MonkeyPatch) -> None:
    right = LinearMap.backward

    def backward(self: LinearMap, adjoint, node, error):
        source, weight, _, _ = self.operands(adjoint.analysis, node)
        if weight.meta["val"].shape[0] != weight.meta["val"].shape[1]:
            return right(self, adjoint, node, error)
        return [(source, adjoint.call(torch.ops.aten.linear.default, error, weight))]

    patch.setattr(LinearMap, "backward", backward)


def pooling_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PerChannel, "linear", lambda *_: True)


def batch_norm_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BatchNorm, "backward", lambda self, adjoint, node, e: [(node.args[0], e)])


WRONG = [flavor_ignored, summed_over_inputs, pooling_ignored, batch_norm_ignored]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_backward_rules_are_caught(wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    check_network()
    wrong(monkeypatch)
    with pytest.raises(AssertionError):
        check_network()


def test_every_rule_without_a_backward_part_is_a_barrier() -> None:
    """The default is a refusal, never a guess."""

    class Unknown(Rule):
        pass

    with pytest.raises(Exception, match="no backward rule"):
        list(Unknown().backward(None, None, None))  # type: ignore[arg-type]


# -- recurrence ------------------------------------------------------------------------------------


def planted_rows(weight: torch.Tensor, gates: int, a: int, b: int) -> None:
    """Give node ``b`` the rows of node ``a`` in every gate."""
    size = weight.shape[0] // gates
    for gate in range(gates):
        weight[gate * size + b] = weight[gate * size + a]


class Looped(nn.Module):
    """A cell called step by step, and a head."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = None
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Whole(nn.Module):
    """A recurrent module over all steps, and a head over them."""

    def __init__(self, module: nn.Module, width: int = 5) -> None:
        super().__init__()
        self.cell, self.head = module, nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(x)[0])


RECURRENT = {
    "LSTMCell": (4, lambda: Looped(nn.LSTMCell(3, 5))),
    "GRUCell": (3, lambda: Looped(nn.GRUCell(3, 5))),
    "RNNCell": (1, lambda: Looped(nn.RNNCell(3, 5))),
    "LSTM": (4, lambda: Whole(nn.LSTM(3, 5, batch_first=True))),
    "GRU": (3, lambda: Whole(nn.GRU(3, 5, num_layers=2))),
    "RNN": (1, lambda: Whole(nn.RNN(3, 5, bidirectional=True), 10)),
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_covers_are_a_fixed_point(kind: str) -> None:
    """Nodes 1 and 3 of every layer: equal rows, equal columns over the pair and behind."""
    torch.manual_seed(5)
    gates, make = RECURRENT[kind]
    model = make().double()
    with torch.no_grad():
        for name, weight in model.cell.named_parameters():
            planted_rows(weight, gates, 1, 3)
            if weight.ndim > 1 and ("hh" in name or "ih_l1" in name):
                weight[:, 3] = weight[:, 1]
        for start in range(0, model.head.weight.shape[1], 5):
            model.head.weight[:, start + 3] = model.head.weight[:, start + 1]
    inputs = (torch.randn(4, 6, 3, dtype=torch.float64),)
    captured = capture(model, inputs)
    errors = adjoint_checks.errors_of(captured)
    assert adjoint_checks.emitted_as_autograd(errors) > 2
    adjoint_checks.equal_in_opfibers(errors)
    for symmetry in ("cover", "stable"):
        found = cover_checks.covers_of(errors.continued, symmetry)
        hidden = [labels for name, labels in found.items() if name.startswith("cell")]
        assert hidden
        assert all(labels.tolist() == [0, 1, 2, 1, 3] for labels in hidden)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(20):
        optimizer.zero_grad()
        (model(*inputs) - 1).square().mean().backward()
        for weight in model.cell.parameters():
            rows = weight.grad.reshape(gates, 5, -1)
            assert torch.allclose(rows[:, 1], rows[:, 3], rtol=0, atol=1e-10)
        optimizer.step()
    near = dict(model.cell.named_parameters())
    name = next(n for n in near if "weight_hh" in n)
    with torch.no_grad():
        near[name][0, 3] += 0.01  # one column of the recurrence
    after = cover_checks.covers_of(errors.continued)
    first = next(labels for key, labels in after.items() if key.startswith("cell"))
    assert len(np.unique(first)) == 5


# -- attention -------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Two heads of three channels, fused or written out."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.q, self.k, self.v = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(5, 6)
        self.out = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 3)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.fused:
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) / 3**0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [True, False])
def test_covers_in_attention(fused: bool) -> None:
    """Channels 0 and 2 of the first head: queries, keys, values and the columns behind."""
    torch.manual_seed(3)
    model = SelfAttention(fused).double()
    with torch.no_grad():
        for layer in (model.q, model.k, model.v):
            layer.weight[2], layer.bias[2] = layer.weight[0], layer.bias[0]
            layer.weight[5], layer.bias[5] = layer.weight[0], layer.bias[0]  # of another head
        model.out.weight[:, 2] = model.out.weight[:, 0]
        model.out.weight[:, 5] = model.out.weight[:, 0]
    inputs = (torch.randn(3, 7, 5, dtype=torch.float64),)
    errors = adjoint_checks.errors_of(capture(model, inputs))
    assert adjoint_checks.emitted_as_autograd(errors) > 10
    adjoint_checks.equal_in_opfibers(errors)
    for symmetry in ("cover", "stable"):
        found = cover_checks.covers_of(errors.continued, symmetry)
        for name in "qkv":
            assert found[name].tolist() == [0, 1, 0, 2, 3, 4], (symmetry, name)
    (model(*inputs) - 1).square().mean().backward()
    for layer in (model.q, model.k, model.v):
        assert torch.allclose(layer.weight.grad[0], layer.weight.grad[2], rtol=0, atol=1e-12)
        assert not torch.allclose(layer.weight.grad[0], layer.weight.grad[5], rtol=0, atol=1e-9)
    with torch.no_grad():
        model.k.weight[2, 0] += 0.01
    found = cover_checks.covers_of(errors.continued)
    assert found["q"].tolist() == found["k"].tolist() == [0, 1, 2, 3, 4, 5]
    assert found["v"].tolist() == [0, 1, 0, 2, 3, 4]


# -- batch norm in training ------------------------------------------------------------------------


def normed() -> tuple[nn.Sequential, tuple[torch.Tensor, ...]]:
    """Channels 0 and 2 agree in everything, 1 and 3 in all but what the norm undoes."""
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)
    ).double()
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = model[0].weight[0], model[0].bias[0]
        model[0].weight[3], model[0].bias[3] = model[0].weight[1], model[0].bias[1] + 0.5
        model[1].weight.copy_(torch.tensor([0.5, 1.5, 0.5, 1.5, -0.7]))
        model[4].weight[:, 8:12] = model[4].weight[:, :4]
        model[4].weight[:, 12:16] = model[4].weight[:, 4:8]
    return model.eval(), (torch.randn(6, 3, 4, 4, dtype=torch.float64),)


def test_batch_norm_in_training_couples_errors_to_activations() -> None:
    model, inputs = normed()
    graph = capture(model, inputs).graph_module
    errors = adjoint_checks.errors_of(graph, batch_statistics=True)
    assert adjoint_checks.emitted_as_autograd(errors) > 4
    adjoint_checks.equal_in_opfibers(errors)
    found = cover_checks.covers_of(errors.continued)
    assert found["0"].tolist() == [0, 1, 0, 2, 3]
    model.train()
    (model(*inputs) - 1).square().mean().backward()
    gradient = model[0].weight.grad
    assert torch.allclose(gradient[0], gradient[2], rtol=0, atol=1e-10)


def test_ignoring_the_coupling_of_batch_norm_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = derivative.flavors_along

    def wrong(analysis, node, axis):
        if "batch_norm" in node.target.name:
            return None, None
        return right(analysis, node, axis)

    monkeypatch.setattr(derivative, "flavors_along", wrong)
    model, inputs = normed()
    with torch.no_grad():
        model[0].weight[3, 0, 0, 0] += 0.3  # other activations, equal errors behind the norm
        model[1].weight[3] = model[1].weight[1]
    model[2] = nn.Identity()
    graph = capture(model, inputs).graph_module
    with pytest.raises(AssertionError):
        adjoint_checks.equal_in_opfibers(adjoint_checks.errors_of(graph, batch_statistics=True))
