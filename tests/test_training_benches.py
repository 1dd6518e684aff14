"""The benches of training on small stand-ins: rows are resumed, drawn, and true."""

from __future__ import annotations

import csv
import importlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

NAMES = ("trained", "emergence", "synchrony", "landscape", "monitor_cost")


@pytest.fixture(scope="module")
def benches(repository: Path) -> Iterator[Any]:
    sys.path.insert(0, str(repository / "bench"))
    try:
        yield type("Benches", (), {name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.pop(0)


@pytest.fixture
def data(benches: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Four steps of random digits, and a smaller perceptron for them."""
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.rand(count, 784, generator=generator)
        return x, torch.arange(count) % 10

    found = benches.trained.Images(*some(400), *some(2000))

    def small(network: str) -> nn.Sequential:
        sizes = (784, 11, 7, 10)
        layers = [
            part for a, b in itertools.pairwise(sizes)
            for part in (nn.Linear(a, b), nn.ReLU())
        ]  # fmt: skip
        return nn.Sequential(*layers[:-1])

    for name in ("trained", "emergence", "synchrony", "monitor_cost"):
        monkeypatch.setattr(getattr(benches, name), "untrained", small)
    for name in ("emergence", "synchrony", "landscape", "monitor_cost"):
        monkeypatch.setattr(getattr(benches, name), "images", lambda *_: found)
    return found


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_networks_are_the_published_ones(benches: Any) -> None:
    mlp, cnn = map(benches.trained.untrained, ("mlp", "cnn"))
    assert sum(p.numel() for p in mlp.parameters()) == 898_510
    assert cnn(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_emergence(
    benches: Any, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    emergence = benches.emergence
    monkeypatch.setattr(emergence, "EVERY", {"mlp": 2})
    monkeypatch.setattr(emergence, "COMPILED", (0.2, 0.9))
    path = tmp_path / "emergence.csv"
    call = ["--networks", "mlp", "--cache", str(tmp_path / "cache"), "--output", str(path)]
    assert emergence.main([*call, "--seeds", "0:1"]) == 0
    first = path.read_text()
    assert emergence.main([*call, "--seeds", "0:2"]) == 0
    assert path.read_text().startswith(first)  # resumed, not made again
    found = rows(path)
    assert [r["step"] for r in found if r["seed"] == "1"] == [*"000", *"222", *"444"]
    small = rows(path.with_name("emergence_compressed.csv"))
    assert [(r["seed"], r["eps"]) for r in small] == [(s, e) for s in "01" for e in ("0.2", "0.9")]
    for row in small:
        last = [r for r in found if r["seed"] == row["seed"] and r["step"] == "4"]
        assert row["original"] == last[0]["accuracy"]
    assert path.with_suffix(".png").stat().st_size > 0


def test_synchrony(benches: Any, data: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "synchrony.csv"
    call = ["--networks", "mlp", "--seeds", "0:1", "--output", str(path)]
    assert benches.synchrony.main(call) == 0
    found = rows(path)
    assert {r["step"] for r in found if r["model"] == "trained"} == {"1", "4"}
    lifted = [r for r in found if r["model"] == "lifted"]
    assert all(float(r["split"]) == 0 and float(r["kept"]) == 1 for r in lifted)
    assert any(int(r["pairs"]) for r in lifted)
    assert len(lifted) == 9
    assert path.with_name("synchrony_mlp.png").exists()


def test_lifts_share_the_loss_and_lines_of_one_partition_keep_it(
    benches: Any, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(benches.landscape, "HIDDEN", (6, 4))
    monkeypatch.setattr(benches.landscape, "POINTS", 3)
    path = tmp_path / "landscape.csv"
    assert benches.landscape.main(["--seeds", "0:1", "--output", str(path)]) == 0
    lifts = rows(path.with_name("landscape_lifts.csv"))
    assert len(lifts) == 11
    assert all(float(r["difference"]) < 1e-12 for r in lifts)
    assert {int(r["nodes"]) for r in lifts if r["network"].startswith("leaf")} == {30}
    lines = rows(path)
    same = [abs(float(r["excess"])) for r in lines if r["kind"] == "same fibers"]
    assert same and max(same) < 1e-12
    assert max(abs(float(r["excess"])) for r in lines if r["kind"] == "same base") > 1e-6
    way = [abs(float(r["excess"])) for r in lines if "corner" in r["kind"]]
    assert len(way) > 100 and max(way) < 1e-12
    assert all(abs(float(r["excess"])) < 1e-12 for r in lines if r["t"] in ("0", "1"))


def test_the_cost_of_watching(
    benches: Any, data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    path = tmp_path / "cost.csv"
    call = ["--networks", "mlp", "--steps", "6", "--output", str(path)]
    try:
        for count in ("1", "2"):
            assert benches.monitor_cost.main([*call, "--rounds", count]) == 0
    finally:
        torch.set_num_threads(threads)
    assert [r["round"] for r in rows(path)] == ["0", "1"]
    assert "watched over plain" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES[1:])
def test_missing_data_is_told_in_one_line(
    benches: Any, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("FXFIB_DATA", raising=False)
    assert getattr(benches, name).main(["--output", str(tmp_path / "none.csv")]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
