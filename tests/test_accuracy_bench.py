"""The accuracy bench on small stand-ins: sizes are kept, rows are resumed, nothing is invented."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

MODULES = (
    "accuracy", "accuracy_methods", "accuracy_networks", "accuracy_table", "residual_networks",
)  # fmt: skip


@pytest.fixture(scope="module")
def bench(repository: Path) -> dict[str, Any]:
    sys.path.insert(0, str(repository / "bench"))
    try:
        return {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def accuracy(bench: dict[str, Any]) -> Any:
    return bench["accuracy"]


@pytest.fixture(scope="module")
def methods(bench: dict[str, Any]) -> Any:
    return bench["accuracy_methods"]


@pytest.fixture(scope="module")
def digits(bench: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    labels = torch.randint(10, (60,))
    return bench["accuracy_networks"].Data(
        (torch.rand(60, 784), labels), (torch.rand(40, 784), labels[:40])
    )


@pytest.fixture(scope="module")
def network(bench: dict[str, Any]) -> nn.Module:
    torch.manual_seed(1)
    return bench["accuracy_networks"].perceptron().eval()


@pytest.mark.parametrize("method", ["random", "l1", "l2", "cosine", "folding"])
def test_baselines_have_the_width_they_should(
    methods: Any, network: nn.Module, digits: Any, method: str
) -> None:
    small = methods.made(network, method, "none", 0.05, 0, digits, 60)
    widths = [m.weight.shape[0] for m in small.modules() if isinstance(m, nn.Linear)]
    assert len(widths) == 4 and widths[-1] == 10
    assert max(widths[:3]) <= 50 and min(widths[:3]) >= 49
    assert small(torch.rand(3, 784)).shape == (3, 10)


@pytest.mark.parametrize("method", ["random", "l2", "cosine", "folding", "fxfib"])
def test_a_recurrent_layer_is_shrunk_to_the_size_that_was_asked_for(
    bench: dict[str, Any], methods: Any, method: str
) -> None:
    torch.manual_seed(2)
    model = bench["accuracy_networks"].RowReader().eval()
    x, y = torch.rand(20, 28, 28), torch.randint(10, (20,))
    data = bench["accuracy_networks"].Data((x, y), (x, y))
    small = methods.made(model, method, "none", 0.5, 0, data, 20)
    assert 0.46 < methods.count(small) / methods.count(model) <= 0.5
    assert small.get_submodule("layer").hidden_size > 48


def test_l1_keeps_the_largest_rows(methods: Any, network: nn.Module, digits: Any) -> None:
    small = methods.made(network, "l1", "none", 0.05, 0, digits, 60)
    first = network[0]
    size = first.weight.abs().sum(1) + first.bias.abs()
    kept = size.topk(50).indices.sort().values
    torch.testing.assert_close(small.get_submodule("0").weight, first.weight[kept])


def test_every_network_runs_and_is_pruned_to_its_size(bench: dict[str, Any]) -> None:
    networks, methods = bench["accuracy_networks"], bench["accuracy_methods"]
    cases = {
        "mnist_cnn": (networks.convolutional(), (1, 28, 28)),
        "resnet": (bench["residual_networks"].CifarResNet(1), (3, 32, 32)),
    }
    for name, (model, shape) in cases.items():
        torch.manual_seed(0)
        x, y = torch.randn(12, *shape), torch.randint(10, (12,))
        data = networks.Data((x, y), (x, y))
        small = methods.made(model.eval(), "l2", "images", 0.5, 0, data, 12)
        share = methods.count(small) / methods.count(model)
        assert 0.4 < share <= 0.5, name
        assert networks.macs(small, data) < networks.macs(model, data)
        assert small(x).shape == (12, 10)
        assert 0 <= data.right(data.answers(small)) <= 100


def test_the_largest_share_within_a_limit(methods: Any) -> None:
    assert methods.largest(lambda s: round(100 * s), 30) == pytest.approx(0.305, abs=1e-3)
    assert methods.largest(lambda s: 1, 30) == 1.0


def test_rows_come_back_and_are_summed_up(accuracy: Any, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {**dict.fromkeys(accuracy.COLUMNS, 0), "seed": seed, "method": "l1", "original": 97.0,
         "compensation": "none", "target": 0.1, "accuracy": 96.0 - seed}
        for seed in range(3)
    ]  # fmt: skip
    path = tmp_path / "rows.csv"
    accuracy.write(path, rows, accuracy.COLUMNS)
    read = accuracy.read(path)
    assert [accuracy.key(row) for row in read] == [accuracy.key(row) for row in rows]
    line = accuracy.summary(read).splitlines()[1].split()
    assert line[3:7] == ["2.00", "1.00", "3.00", "0.00"]
    unknown = [{**row, "agreement": ""} for row in read]  # as in rows of before it was measured
    assert accuracy.summary(unknown).splitlines()[1].split()[6] == "-"


def a_row(method: str, seed: int, accuracy: float, kind: str = "none", agreement: str = "") -> Any:
    return {"network": "net", "seed": str(seed), "method": method, "compensation": kind,
            "target": "0.5", "original": "97.0", "accuracy": str(accuracy),
            "agreement": agreement}  # fmt: skip


def test_the_table_compares_seed_by_seed(bench: dict[str, Any]) -> None:
    table = bench["accuracy_table"]
    rows = [
        a_row("fxfib", 0, 96.0, agreement="98"), a_row("fxfib", 1, 90.0, agreement="92"),
        a_row("fxfib", 2, 94.0),
        # Better in the mean of its own seeds, but worse on each of them.
        a_row("l1", 0, 95.5), a_row("l1", 2, 93.8, agreement="91"),
        a_row("l2", 1, 80.0),
        a_row("folding", 3, 99.0),  # no seed in common
        a_row("l1", 0, 96.9, "images"),
    ]  # fmt: skip
    ((cell, standing),) = table.standings(rows)
    assert cell == ("net", 0.5, "none") and standing.other == "l1"
    assert standing.ahead == [0.5, 0.2]
    line = table.text(rows).splitlines()[-1]
    assert line == (
        "| 50 % | nothing | 3.00 (1.00 to 7.00) | l1 | 2.35 (1.50 to 3.20) | +0.35 | 3, 2 "
        "| 98.00 % | 91.00 % |"
    )
    assert "1 cells with another method: fxfib is ahead in 1" in table.text(rows)


def test_the_table_says_where_we_are_behind(bench: dict[str, Any], tmp_path: Path) -> None:
    table = bench["accuracy_table"]
    rows = [a_row("fxfib", 0, 96.0), a_row("l1", 0, 95.0), a_row("l2", 0, 96.2)]
    page = table.text(rows)
    assert (
        "ahead in 0, level in 0, behind in 1 (1 of them" in page and "| l2 | 0.80 | -0.20 |" in page
    )
    assert table.main(["--rows", str(tmp_path / "none.csv")]) == 1


def test_missing_data_is_said(
    accuracy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert accuracy.main(["--data-root", str(tmp_path), "--output", str(tmp_path / "a.csv")]) == 1
    assert "the data cannot be had" in capsys.readouterr().err
