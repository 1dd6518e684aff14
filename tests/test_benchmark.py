"""fxfib.benchmark: outputs first, then times; nothing here asserts a time."""

import csv
import json
import sys

import pytest
import torch
from torch import nn

import fxfib
from fxfib import timing
from fxfib.cli import main

FAST = ("torch", "onnxruntime")


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 3)).eval()
    with torch.no_grad():
        for tensor in model[0].parameters():
            tensor[4:9] = tensor[2]
    return model


@pytest.fixture(scope="module")
def result() -> fxfib.Benchmark:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = network(), torch.randn(4, 7)
        small = fxfib.compile(model, 0.0, inputs)
        return fxfib.benchmark(model, small, inputs, runtimes=FAST, devices=["cpu"], rounds=5)


def test_rows(result):
    assert [(row.runtime, row.device, row.batch) for row in result.rows] == [
        ("torch", "cpu", 1),
        ("torch", "cpu", 4),
        ("onnxruntime", "cpu", 1),
        ("onnxruntime", "cpu", 4),
    ]
    assert (result.parameters_before, result.parameters_after) == (124, 69)
    assert (result.macs_before, result.macs_after) == (110, 60)
    for row in result.rows:
        assert row.relative_error < 1e-5 and row.rounds == 5
        assert 0 < row.original_low_ms <= row.original_ms <= row.original_high_ms
        assert 0 < row.small_low_ms <= row.small_ms <= row.small_high_ms
        assert row.ratio_low <= row.ratio <= row.ratio_high
    assert not result.skipped
    assert "1 thread" in result.setting and torch.__version__ in result.setting


def test_table_json_csv_and_plot(result, tmp_path):
    text = str(result)
    assert "124 -> 69 parameters" in text and text.count(" ms (") == 8
    assert json.loads(result.to_json())["rows"][3]["batch"] == 4
    result.to_csv(tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["runtime"] for row in rows] == ["torch", "torch", "onnxruntime", "onnxruntime"]
    assert float(rows[0]["original_ms"]) == pytest.approx(result.rows[0].original_ms, rel=1e-4)
    pytest.importorskip("matplotlib")
    assert len(result.plot().axes[0].patches) == 8


def test_models_threads_and_modes_are_left_alone():
    model, inputs = network(), torch.randn(2, 7)
    model.append(nn.Dropout(0.5).train(False))
    small = fxfib.compile(model, 0.0, inputs)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    threads = torch.get_num_threads()
    fxfib.benchmark(model, small, inputs, runtimes=["torch"], rounds=1, threads=threads + 1)
    assert torch.get_num_threads() == threads
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in small.parameters())


def test_a_wrong_runtime_is_caught(monkeypatch):
    """Outputs are compared before anything is timed."""
    from fxfib import runtimes

    model, inputs = network(), torch.randn(2, 7)
    right = runtimes._onnx_runner
    monkeypatch.setattr(
        runtimes,
        "_onnx_runner",
        lambda module, *rest: right(nn.Sequential(module, nn.Sigmoid()).eval(), *rest),
    )
    with pytest.raises(fxfib.VerifyError, match="onnxruntime on cpu computes something else"):
        fxfib.benchmark(model, model, inputs, runtimes=["onnxruntime"], rounds=1)


def test_what_cannot_be_measured_says_why():
    class OneSize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(7, 3)

        def forward(self, value):
            return self.layer(value).view(4, 3)

    model = OneSize().eval()
    found = fxfib.benchmark(
        model, model, torch.randn(4, 7), runtimes=["torch"], devices=["cpu"], rounds=1
    )
    assert [row.batch for row in found.rows] == [4]
    assert "batch size 1" in found.skipped and "batch size 1" in str(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtimes": ["tensorrt"]}, "unknown runtime 'tensorrt'"),
        ({"runtimes": []}, "runtimes must be a list"),
        ({"runtimes": "torch"}, "runtimes must be a list"),
        ({"devices": "cpu"}, "devices must be a list"),
        ({"devices": ["tpu"]}, "unknown device 'tpu'"),
        ({"batch_sizes": 3}, "batch_sizes must be a list"),
        ({"threads": "a"}, "threads must be"),
        ({"rounds": 0}, "rounds must be"),
        ({"batch_sizes": [0]}, "batch_sizes must be"),
        ({"threads": 1.5}, "threads must be"),
    ],
)
def test_bad_options(options, message):
    model = network()
    with pytest.raises(fxfib.InputError, match=message):
        fxfib.benchmark(model, model, torch.randn(2, 7), **options)
    with pytest.raises(fxfib.InputError, match="training mode"):
        fxfib.benchmark(network().train(), model, torch.randn(2, 7))


def test_work_of_another_model_is_not_told():
    model, inputs = network(), torch.randn(2, 7)
    small = fxfib.compile(fxfib.lift(model, 1.5, inputs), 0.0, inputs)
    found = fxfib.benchmark(model, small, inputs, runtimes=["torch"], rounds=1)
    assert found.macs_before is None and found.macs_after == 60


@pytest.mark.slow
def test_torch_compile_is_measured():
    model, inputs = network(), torch.randn(2, 7)
    found = fxfib.benchmark(
        model, model, inputs, runtimes=["torch.compile"], devices=["cpu"], rounds=2
    )
    assert [row.batch for row in found.rows] == [1, 2], found.skipped


def test_several_inputs_and_nested_outputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(5, 4, batch_first=True)

        def forward(self, value, *, scale):
            out, (last, _) = self.layer(value)
            return {"out": out * scale, "last": [last.sum(0)]}

    model = Two().eval()
    kwargs = {"scale": torch.rand(3, 1, 4)}
    small = fxfib.compile(model, 0.0, (torch.randn(3, 6, 5),), kwargs)
    found = fxfib.benchmark(
        model, small, (torch.randn(3, 6, 5),), kwargs, runtimes=FAST, devices=["cpu"],
        batch_sizes=[2, 3], rounds=1,
    )  # fmt: skip
    assert len(found.rows) == 4 and not found.skipped, found.skipped


def test_command_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "ours.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 3)).eval()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows, page = tmp_path / "rows.csv", tmp_path / "page.html"
    common = ["bench", "ours:build", "--input", "2x7", "--runtime", "torch", "--rounds", "2"]
    assert (
        main([*common, "--batch", "1", "2", "--csv", str(rows), "--html", str(page), "--json"]) == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert [row["batch"] for row in printed["rows"] if row["device"] == "cpu"] == [1, 2]
    assert (
        len(rows.read_text().splitlines()) == 1 + len(printed["rows"])
        and "original_ms" in page.read_text()
    )
    with pytest.raises(SystemExit, match="2"):
        main([*common, "--rounds", "0"])


def test_a_device_that_is_not_here_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, inputs = network(), torch.randn(2, 7)
    found = fxfib.benchmark(
        model, model, inputs, runtimes=["torch"], devices=["cpu", "cuda"], rounds=1
    )
    assert {row.device for row in found.rows} == {"cpu"}
    assert found.skipped == {"cuda": "there is no CUDA device here"}


def test_samples_start_at_every_depth_of_the_stack() -> None:
    depths: list[int] = []

    def call() -> None:
        frame, depth = sys._getframe(), 0
        while frame.f_back is not None:
            frame, depth = frame.f_back, depth + 1
        depths.append(depth)

    timing.in_turns([call, call], 2 * len(timing.DEPTHS), shortest=1e-9)
    measured = set(depths) - {min(depths)}  # the calls that warm up are one frame less deep
    assert {depth - min(measured) for depth in measured} == set(timing.DEPTHS)
