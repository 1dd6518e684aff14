"""Compensation: the least squares are those of the equations; the user's model stays as it is."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxfib
from fxfib.calibration import synthetic
from fxfib.capture import capture
from fxfib.errors import InputError
from fxfib.passes.compensate import RIDGE
from fxfib.passes.forward import Analysis
from fxfib.passes.regression import positions_of
from fxfib.passes.rules import find_rule


def perceptron(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(7, 23), activation(), nn.Linear(23, 19), activation(), nn.Linear(19, 3)
    ).eval()


def network() -> nn.Sequential:
    torch.manual_seed(7)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 10, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(40, 5),
    )  # fmt: skip
    # What batch norm keeps is true of the inputs that the tests give.
    with torch.no_grad():
        value = model[0](torch.randn(500, 3, 8, 8) + 0.1)
        model[1].running_mean.copy_(value.mean((0, 2, 3)))
        model[1].running_var.copy_(value.var((0, 2, 3)))
    return model.eval()


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_reader_solves_the_regularised_least_squares(calibrated: bool) -> None:
    """One hidden layer: what is fitted is the solution of the normal equations, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 23), nn.ReLU(), nn.Linear(23, 3)).eval()
    inputs = torch.randn(300, 7) + 0.3
    calibration = inputs if calibrated else None
    given = (
        {"criterion": "energy", "calibration": inputs} if calibrated else {"criterion": "energy"}
    )
    eps = 0.1 if calibrated else 0.4
    plain = fxfib.compile(model, eps, (inputs,), compensate=False, **given)
    small = fxfib.compile(model, eps, (inputs,), **given)
    hidden, before, after = (
        small.get_submodule("0"),
        plain.get_submodule("2"),
        small.get_submodule("2"),
    )
    assert hidden.weight.shape[0] < 23
    assert torch.equal(hidden.weight, plain.get_submodule("0").weight)
    if calibration is None:
        drawn = synthetic(capture(model, (inputs,)), [inputs])
        calibration = torch.cat([batch for (batch,) in drawn])
        assert calibration.shape == (4096, 7)
        size = calibration.square().mean() / inputs.square().mean()
        assert 0.9 < size < 1.1
    with torch.no_grad():
        a = hidden(calibration).relu().double()
        z = model(calibration).double()
    weight = RIDGE * a.square().mean()
    centred = a - a.mean(0)
    gram = centred.t() @ centred / len(a) + weight * torch.eye(a.shape[1])
    cross = centred.t() @ (z - z.mean(0)) / len(a) + weight * before.weight.detach().double().t()
    solution = torch.linalg.solve(gram, cross).t()
    torch.testing.assert_close(after.weight.double(), solution, rtol=1e-3, atol=1e-4)
    bias = z.mean(0) - solution @ a.mean(0)
    torch.testing.assert_close(after.bias.double(), bias, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (1, 2, 2), (1, "same", 2)]
)
def test_a_convolution_is_its_regression(
    kind: type[nn.Module], groups: int, stride: int, padding: int | str, dilation: int
) -> None:
    dims = [nn.Conv1d, nn.Conv2d, nn.Conv3d].index(kind) + 1
    layer = kind(
        6, 12, (3, 2, 3)[:dims], stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    check_regression(layer, torch.randn(3, 6, *(11, 9, 7)[:dims]))


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "more"), [(1, 0, 1, 0), (2, 1, 1, 1), (3, 2, 2, 1)]
)
def test_a_transposed_convolution_is_its_regression(
    kind: type[nn.Module], stride: int, padding: int, dilation: int, more: int
) -> None:
    dims = [nn.ConvTranspose1d, nn.ConvTranspose2d].index(kind) + 1
    kernel = (3, 2)[:dims]
    layer = kind(5, 7, kernel, stride, padding, output_padding=more, dilation=dilation)
    check_regression(layer, torch.randn(3, 5, *(7, 6)[:dims]))


def check_regression(layer: nn.Module, x: torch.Tensor) -> None:
    """In every group the rows of the design times the columns of the matrix are the response."""
    torch.manual_seed(1)
    nn.init.normal_(layer.weight)
    captured = capture(layer.eval(), (x,))
    analysis = Analysis(captured.graph_module).run()
    (node,) = [n for n in analysis.graph_module.graph.nodes if "conv" in str(n.target)]
    found = find_rule(node).regression(analysis, node)
    y = layer(x)
    positions = positions_of(tuple(y.shape), 1, 10, seed=3)
    assert len(positions) == min(10, y[0, 0].numel())
    design = found.design(x, positions, layer.weight)
    matrix = found.matrix(layer.weight)
    assert design.shape == (layer.groups, len(x) * len(positions), matrix.shape[1])
    rows = design @ matrix.unflatten(0, (layer.groups, -1)).transpose(1, 2)
    rows = rows.transpose(0, 1).flatten(1) + layer.bias
    torch.testing.assert_close(rows, found.response(y, positions))
    assert torch.equal(found.tensor(matrix, layer.weight), layer.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_depthwise_taps_that_are_known(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two channels are ``h`` and ``1.1 h``, the taps on their mean are a known mean."""
    monkeypatch.setattr("fxfib.workshop.RIDGE", 1e-12)
    torch.manual_seed(3)
    first, last = nn.Conv1d(4, 10, 3, bias=False), nn.Conv1d(10, 3, 1)
    deep = nn.Conv1d(10, 10, 3, padding=1, groups=10)
    model = nn.Sequential(first, deep, last).to(dtype).eval()
    with torch.no_grad():
        first.weight[5:] = first.weight[:5] * 1.1
        # The first two inputs are equal, so these rows are parallel in effect alone.
        first.weight[5:, 0] += 0.02
        first.weight[5:, 1] -= 0.02
        deep.weight[5:] = deep.weight[:5] + 0.03 * torch.randn(5, 1, 3, dtype=dtype)
        deep.bias[5:] = deep.bias[:5] + 0.01
    inputs = torch.randn(300, 4, 12, dtype=dtype)
    inputs[:, 1] = inputs[:, 0]
    small = fxfib.compile(model, {"0": 0.3, "1": 0.3}, (inputs[:2],), calibration=inputs)
    found = small.get_submodule("1")
    assert found.weight.shape == (5, 1, 3) and found.groups == 5
    mean = (deep.weight[:5] + 1.1 * deep.weight[5:]) / 2.1
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(found.weight, mean, **close)
    torch.testing.assert_close(found.bias, (deep.bias[:5] + deep.bias[5:]) / 2, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_make_up_for_a_channel_that_the_others_know(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both groups one channel is a mean of the two others: without it nothing changes."""
    monkeypatch.setattr("fxfib.workshop.RIDGE", 1e-12)
    torch.manual_seed(4)
    first, deep = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 3, padding=1, groups=2)
    model = nn.Sequential(first, deep, nn.Conv2d(8, 3, 1)).to(dtype).eval()
    with torch.no_grad():
        deep.weight[:, 2] *= 0.1
        for parameter in first.parameters():
            for group in (0, 3):
                parameter[group + 2] = 0.5 * parameter[group] - 0.3 * parameter[group + 1]
    inputs = torch.randn(100, 3, 6, 6, dtype=dtype)
    small, plain = (
        fxfib.compile(
            model, {"0": 1e-3}, (inputs[:2],), criterion="energy", calibration=inputs, compensate=on
        )
        for on in (True, False)
    )
    assert small.get_submodule("1").weight.shape == (8, 2, 3, 3)
    bound = 1e-10 if dtype == torch.float32 else 1e-24
    assert gap(model, small, inputs) < bound < gap(model, plain, inputs)


def gap(model: nn.Module, small: nn.Module, inputs: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(inputs) - small(inputs)).square().mean())


@pytest.mark.parametrize("criterion", ["fibration", "cosine", "energy"])
def test_compensation_comes_nearer_on_inputs_it_has_not_seen(criterion: str) -> None:
    model = network()
    inputs = torch.randn(600, 3, 8, 8)
    eps = {"fibration": 0.35, "cosine": 0.9, "energy": 0.3}[criterion]
    small, plain = (
        fxfib.compile(
            model, eps, (inputs[:2],), criterion=criterion, calibration=inputs[:500], compensate=on
        )
        for on in (True, False)
    )
    assert small.fibration.parameters_after == plain.fibration.parameters_after
    assert small.fibration.parameters_after < small.fibration.parameters_before
    assert gap(model, small, inputs[500:]) < 0.8 * gap(model, plain, inputs[500:])


def test_the_statistics_of_batch_norm_follow() -> None:
    """Behind a fitted layer its output has the variance that the norm says it has."""
    model = network()
    inputs = torch.randn(500, 3, 8, 8)
    wide = nn.Sequential(
        nn.Conv2d(3, 17, 3, padding=1), nn.ReLU(), nn.Conv2d(17, 3, 1), *model
    ).eval()
    with torch.no_grad():
        value = wide[:4](inputs)
        wide[4].running_mean.copy_(value.mean((0, 2, 3)))
        wide[4].running_var.copy_(value.var((0, 2, 3)))
    small = fxfib.compile(
        wide, {"0": 0.4}, (inputs[:2],), criterion="energy", calibration=inputs, refine=0
    )
    assert small.get_submodule("0").weight.shape[0] < 17
    found = {}
    small.get_submodule("4").register_forward_hook(lambda m, i, o: found.update(x=i[0]))
    with torch.no_grad():
        small(inputs)
    norm = small.get_submodule("4")
    torch.testing.assert_close(norm.running_mean, found["x"].mean((0, 2, 3)), rtol=0.1, atol=0.02)
    torch.testing.assert_close(norm.running_var, found["x"].var((0, 2, 3)), rtol=0.1, atol=0.02)


@pytest.mark.parametrize("refine", [0, 2])
def test_the_original_stays_as_it_is(refine: int) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    inputs = torch.randn(40, 3, 8, 8)
    small = fxfib.compile(
        model, {"4": 0.5}, (inputs[:2],), criterion="energy", calibration=inputs, refine=refine
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # And the result is its own.
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_refining_comes_nearer() -> None:
    model, inputs = perceptron(), torch.randn(800, 7)
    eps = {"0": 0.1, "2": 0.1}
    given = {"criterion": "energy", "calibration": inputs[:400]}
    fitted = fxfib.compile(model, eps, (inputs[:2],), **given)
    refined = fxfib.compile(model, eps, (inputs[:2],), **given, refine=60)
    assert gap(model, refined, inputs[400:]) < 0.8 * gap(model, fitted, inputs[400:])


def test_refining_leaves_a_network_near_that_was_near() -> None:
    model, inputs = perceptron(), torch.randn(800, 7)
    given = {"criterion": "energy", "calibration": inputs[:400]}
    eps = {"0": 1e-3, "2": 1e-3}
    fitted = fxfib.compile(model, eps, (inputs[:2],), **given)
    refined = fxfib.compile(model, eps, (inputs[:2],), **given, refine=10)
    assert fitted.fibration.parameters_after < fitted.fibration.parameters_before
    assert gap(model, fitted, inputs[400:]) < 1e-12
    assert gap(model, refined, inputs[400:]) < 1e-12


def test_twice_the_same() -> None:
    model, inputs = network(), torch.randn(40, 3, 8, 8)
    for given in ({}, {"calibration": inputs, "refine": 1}):
        first, second = (
            fxfib.compile(model, 0.3, (inputs[:2],), criterion="energy", **given) for _ in range(2)
        )
        assert all(
            torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
        )


def test_all_ways_to_give_calibration() -> None:
    model, inputs = perceptron(), torch.randn(90, 7)
    labels = torch.zeros(90, dtype=torch.int64)
    ways = [
        inputs,
        [inputs[:50], inputs[50:]],
        [(inputs,)],
        DataLoader(TensorDataset(inputs, labels), batch_size=32),
        (batch for batch in inputs.split(40)),
    ]
    found = [
        fxfib.compile(model, 0.2, (inputs[:2],), criterion="energy", calibration=way)(inputs)
        for way in ways
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (3, "calibration must be a tensor or an iterable"),
        ([], "calibration holds no inputs"),
        (torch.randn(4, 8), "calibration gives a tensor of"),
        (torch.randn(4, 7).double(), "calibration gives a tensor of"),
        (torch.full((4, 7), float("nan")), "calibration holds NaN"),
    ],
)
def test_wrong_calibration_is_refused(calibration: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fxfib.compile(
            perceptron(), 0.2, (torch.randn(2, 7),), criterion="energy", calibration=calibration
        )


def test_what_is_not_fitted_is_in_the_notes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(3, 14, 3), nn.ReLU(), nn.ConvTranspose1d(14, 8, 3, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(80, 5),
    ).eval()  # fmt: skip
    small = fxfib.compile(model, 0.4, (torch.randn(4, 3, 10),), criterion="energy")
    assert small.fibration.parameters_after < small.fibration.parameters_before
    assert any(note.startswith("2 is not fitted") for note in small.fibration.notes)


def test_a_layer_along_an_axis_that_merged_is_left_alone() -> None:
    class Mixer(nn.Module):
        """Channels by a layer, then tokens by another, so its rows are of channels that merged."""

        def __init__(self) -> None:
            super().__init__()
            self.channels, self.tokens = nn.Linear(5, 11), nn.Linear(7, 9)
            self.back, self.last = nn.Linear(9, 3), nn.Linear(11, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.channels(x).relu().transpose(1, 2)
            x = self.back(self.tokens(x).relu()).transpose(1, 2)
            found: torch.Tensor = self.last(x)
            return found

    torch.manual_seed(5)
    model = Mixer().eval()
    with torch.no_grad():
        for layer in (model.channels, model.tokens):
            layer.weight[3:] = layer.weight[:1] + 0.01 * torch.randn_like(layer.weight[3:])
            layer.bias[3:] = layer.bias[:1]
    small = fxfib.compile(model, 0.1, (torch.randn(6, 7, 5),))
    assert small.channels.out_features < 11 and small.tokens.out_features < 9
    assert any("back is not fitted: what it works along" in n for n in small.fibration.notes)


def test_it_is_said_that_nobody_makes_up_for_what_calibration_lets_go() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 2)).eval()
    x = torch.randn(30, 5)
    options = {"criterion": "energy", "compensate": False}
    given = fxfib.compile(model, 0.2, (x,), calibration=x, **options)
    assert any("without calibration, less is lost" in n for n in given.fibration.notes)
    assert not fxfib.compile(model, 0.2, (x,), **options).fibration.notes
    exact = fxfib.compile(model, 0.0, (x,), calibration=x, **options)
    assert not exact.fibration.notes
