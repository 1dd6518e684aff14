"""The accuracy bench on small stand-ins: sizes are kept, rows are resumed, nothing is invented."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture(scope="module")
def accuracy(repository: Path) -> Any:
    sys.path.insert(0, str(repository / "bench"))
    try:
        return importlib.import_module("accuracy")
    finally:
        sys.path.pop(0)


class Digits:
    """As `accuracy.Data`, of random numbers."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.train = torch.rand(60, 784)
        self.test = torch.rand(40, 784)
        self.test_labels = torch.randint(10, (40,))

    def calibration(self, seed: int) -> Tensor:
        return self.train


@pytest.fixture(scope="module")
def network(accuracy: Any) -> nn.Module:
    torch.manual_seed(1)
    return accuracy.perceptron().eval()


@pytest.mark.parametrize("method", ["random", "l1", "l2", "cosine", "folding"])
def test_baselines_have_the_width_they_should(
    accuracy: Any, network: nn.Module, method: str
) -> None:
    small = accuracy.made(network, method, "none", 0.05, 0, Digits())
    widths = [m.weight.shape[0] for m in small.modules() if isinstance(m, nn.Linear)]
    assert len(widths) == 4 and widths[-1] == 10
    assert max(widths[:3]) <= 50 and min(widths[:3]) >= 49
    assert small(torch.rand(3, 784)).shape == (3, 10)


def test_l1_keeps_the_largest_rows(accuracy: Any, network: nn.Module) -> None:
    small = accuracy.made(network, "l1", "none", 0.05, 0, Digits())
    first = network[0]
    size = first.weight.abs().sum(1) + first.bias.abs()
    kept = size.topk(50).indices.sort().values
    torch.testing.assert_close(small.get_submodule("0").weight, first.weight[kept])


def test_parameters_are_counted(accuracy: Any) -> None:
    for width in (3, 50):
        own = sum(p.numel() for p in accuracy.perceptron(width).parameters())
        assert accuracy.parameters(width) == own


def test_rows_come_back_and_are_summed_up(accuracy: Any, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {**dict.fromkeys(accuracy.COLUMNS, 0), "seed": seed, "method": "l1", "original": 97.0,
         "compensation": "none", "target": 0.1, "accuracy": 96.0 - seed}
        for seed in range(3)
    ]  # fmt: skip
    path = tmp_path / "rows.csv"
    accuracy.write(path, rows)
    read = accuracy.read(path)
    assert [accuracy.key(row) for row in read] == [accuracy.key(row) for row in rows]
    line = accuracy.summary(read).splitlines()[1].split()
    assert line[3:6] == ["2.00", "1.00", "3.00"]


def test_missing_data_is_said(
    accuracy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert accuracy.main(["--data-root", str(tmp_path), "--output", str(tmp_path / "a.csv")]) == 1
    assert "MNIST cannot be had" in capsys.readouterr().err
