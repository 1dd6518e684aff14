"""Sizes and errors at several eps are those of the networks that compile makes."""

import pytest
import torch
from torch import nn

import fxfib


def network() -> nn.Sequential:
    """Two equal hidden nodes, two that are 1e-3 apart, three others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).eval()
    with torch.no_grad():
        first = model[0]
        first.weight[1], first.bias[1] = first.weight[0], first.bias[0]
        first.weight[3], first.bias[3] = first.weight[2] + 1e-3, first.bias[2]
    return model


def test_points_are_what_compile_makes() -> None:
    inputs = torch.randn(16, 5)
    curve = fxfib.eps_curve(network(), inputs, eps=[0.01, 0.0, 0.01], progress=False)
    assert [point.eps for point in curve] == [0.0, 0.01]
    exact, near = curve
    assert exact.parameters == 6 * 6 + 6 * 3 + 3 and near.parameters == 5 * 6 + 5 * 3 + 3
    assert exact.parameters_kept == exact.parameters / (7 * 6 + 7 * 3 + 3)
    assert exact.error < 1e-6 < near.error < 1e-2
    for point in curve:
        report = fxfib.compile(network(), point.eps, inputs).fibration
        assert (report.parameters_after, report.macs_after) == (point.parameters, point.macs)
        assert report.relative_error == pytest.approx(point.error, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eps": ()}, "at least one number"),
        ({"eps": 0.1}, "several numbers"),
        ({"eps": (-1.0,)}, "eps"),
        ({"eps": (0.0, float("nan"))}, "eps"),
        ({"criterion": "taste"}, "unknown criterion"),
    ],
)
def test_bad_options_are_named(options, words: str) -> None:
    with pytest.raises(fxfib.InputError, match=words):
        fxfib.eps_curve(network(), torch.randn(2, 5), **options)


def test_example_inputs_are_needed() -> None:
    with pytest.raises(fxfib.InputError, match="example inputs"):
        fxfib.eps_curve(network())
