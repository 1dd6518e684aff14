"""What the benches of latency are made of: profiles of ONNX Runtime, shortest times, rows."""

import json
from types import ModuleType

import pytest
import torch
from torch import nn

import fxfib


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, repository) -> tuple[ModuleType, ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(str(repository / "bench"))
    import pipeline
    import side_by_side
    import speedup

    return pipeline, side_by_side, speedup


def node(at: int, microseconds: int, operator: str, kind: str = "_kernel_time") -> dict:
    return {
        "cat": "Node", "name": f"{operator}_7{kind}", "ts": at, "dur": microseconds,
        "args": {"op_name": operator},
    }  # fmt: skip


def test_a_profile_is_added_up_by_operator_and_run(bench, tmp_path):
    events = []
    # Two runs to warm up, then three; other events and other kinds of times do not count.
    for run, slow in enumerate((100, 50, 1, 3, 2)):
        start = 1000 * run
        events += [
            {"cat": "Session", "name": "model_run", "ts": start, "dur": 900},
            node(start + 10, 20 * slow, "Conv"),
            node(start + 300, 10 * slow, "Conv"),
            node(start + 500, 5, "Relu"),
            node(start + 500, 400, "Relu", "_fence_before"),
        ]
    events.append(node(5000, 7, "Softmax"))  # outside of every run
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(events))
    assert bench[2].operator_times(path) == {"Conv": 0.03, "Relu": 0.005}


def test_a_real_profile_names_the_operators(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench[2], "MADE", tmp_path)
    monkeypatch.setattr(bench[1], "SECONDS", 0.01)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)).eval()
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)).eval()
    example = (torch.randn(2, 3, 5, 5),)
    paths = bench[2].files("net", (model, small), example, {})
    assert [row["batch"] for row in bench[2].in_onnx_runtime(paths, example, {})] == [1, 8]
    found = bench[2].profile(paths, example, {})
    names = {name for name, _, _ in found}
    assert any("Conv" in name for name in names) and {"Gemm", "MatMul"} & names, names
    assert all(before >= 0 and after >= 0 for _, before, after in found)


def test_rows_compare_outputs_and_shortest_times(bench, monkeypatch):
    _, side_by_side, _ = bench
    monkeypatch.setattr(side_by_side, "SECONDS", 0.01)
    model = nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 3)).eval()
    wide = fxfib.lift(model, 1.5, torch.randn(2, 7))
    for runtime in ("torch", "onnxruntime"):
        one, five = side_by_side.side_by_side(
            runtime, (model, wide), (torch.randn(2, 7),), {}, (1, 5)
        )
        assert (one["batch"], five["batch"]) == (1, 5)
        for row in (one, five):
            assert row["relative_error"] < 1e-5 and row["rounds"] >= side_by_side.FEWEST
            assert row["original_best_ms"] <= row["original_low_ms"] <= row["original_high_ms"]
            assert row["best_ratio"] == row["original_best_ms"] / row["small_best_ms"]
            assert set(side_by_side.TIMES) <= {*row}


def test_all_of_a_network(bench, tmp_path, monkeypatch):
    pipeline, side_by_side, _ = bench
    monkeypatch.setattr(side_by_side, "SECONDS", 0.01)
    path = tmp_path / "rows.csv"
    for step in ("torch", "onnxruntime"):
        arguments = ["mlp", "--here", "--steps", step, "--output", str(path)]
        assert pipeline.main(arguments) == 0
    rows = pipeline.read(path)
    assert [(row["step"], row["batch"]) for row in rows] == [
        ("torch", "1"), ("torch", "8"), ("onnxruntime", "1"), ("onnxruntime", "8"),
    ]  # fmt: skip
    for row in rows:
        assert row["parameters"] == row["parameters_compiled"]
        assert int(row["parameters_lifted"]) > 1.5 * int(row["parameters"])
        assert float(row["relative_error"]) < 1e-5
    # A step that is measured again takes the place of its rows.
    pipeline.main(["mlp", "--here", "--steps", "torch", "--output", str(path)])
    assert len(pipeline.read(path)) == 4
