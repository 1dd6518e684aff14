"""ONNX export: what ONNX Runtime computes, what the file says, and what happens when it fails."""

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from model_zoo import CASES, captured_case, mlp, randomize
from torch import Tensor, nn

import fxfib.onnx as fxfib_onnx
from fxfib.capture import capture
from fxfib.errors import CaptureError, ExportError, InputError
from fxfib.modules import raise_modules
from fxfib.onnx import export_onnx


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run(path: Path, **feed: Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in feed.items()})


@pytest.mark.parametrize(
    ("name", "compiled"),
    [("convolutions", True), ("tied", False), ("block", True), ("sliced", False)],
)
def test_computes_the_same(name: str, compiled: bool, tmp_path: Path) -> None:
    case = CASES[name]
    model, captured = captured_case(name)
    module = raise_modules(captured.graph_module, captured) if compiled else model
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = export_onnx(module, path, case.args(1))
    assert names(tmp_path) == ["model.onnx"]
    assert report.batch_sizes == (1, 2)
    assert report.error is not None
    assert report.relative_error is not None
    assert 0 <= report.relative_error < 1e-4
    assert report.bytes == path.stat().st_size
    assert not report.external_data
    args = case.args(5)
    with torch.no_grad():
        expected = model(*copy.deepcopy(args))
    expected = expected if isinstance(expected, tuple) else (expected,)
    found = run(path, **dict(zip(report.inputs, args, strict=True)))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


class Recurrent(nn.Module):
    def __init__(self, projection: int = 0) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True, bidirectional=True, proj_size=projection)

    def forward(self, x: Tensor) -> Any:
        y, (h, c) = self.lstm(x)
        return y, h + 0, c + 0


def test_recurrent_layers(tmp_path: Path) -> None:
    model = Recurrent().eval()
    captured = capture(model, torch.randn(2, 5, 3))
    report = export_onnx(
        raise_modules(captured.graph_module, captured), tmp_path / "m.onnx", torch.randn(2, 5, 3)
    )
    assert report.batch_sizes == (2, 3)
    operators = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert operators.count("LSTM") == 1


def test_what_onnx_runtime_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"ONNX Runtime cannot (run|load) the model"):
        # It has no convolutions of this dtype on a CPU.
        layer = nn.Conv1d(3, 5, 1).bfloat16().eval()
        export_onnx(layer, tmp_path / "m.onnx", torch.randn(2, 3, 7).bfloat16())
    assert not names(tmp_path)


def test_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, captured = captured_case("convolutions")
    module = raise_modules(captured.graph_module, captured).train()
    for name in ("a.onnx", "b.onnx"):
        report = export_onnx(module, tmp_path / name, torch.randn(2, 3, 16, 16), verify=False)
    assert capfd.readouterr() == ("", "")
    assert module.training
    assert all(child.training for child in module.modules())
    first = (tmp_path / "a.onnx").read_bytes()
    assert first == (tmp_path / "b.onnx").read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in first
    assert str(Path(__file__).parent).encode() not in first
    model = onnx.load(tmp_path / "a.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == report.opset == 20
    assert not model.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    weights = {initializer.name for initializer in model.graph.initializer}
    assert {"3.weight", "13.weight", "13.bias"} <= weights
    assert [value.name for value in model.graph.input] == ["input"]
    assert [value.name for value in model.graph.output] == ["output"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert model.graph.input[0].type.tensor_type.shape.dim[1].dim_value == 3
    assert report.error is None
    assert "not verified" in str(report)
    assert (tmp_path / "a.onnx").stat().st_mode & 0o777 == (0o666 & ~_umask())


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_nested_inputs_and_outputs(tmp_path: Path) -> None:
    model, captured = captured_case("nested")
    module = raise_modules(captured.graph_module, captured)
    args, kwargs = CASES["nested"].args(3), CASES["nested"].kwargs(3)
    for each in (module, model):
        report = export_onnx(each, tmp_path / "n.onnx", args, kwargs)
        assert report.inputs == ("batch_x", "batch_pair_0", "batch_pair_1", "gain")
        assert report.outputs == ("result_score", "result_hidden_0", "result_hidden_1", "sum_0")
        assert report.batch_sizes == (3, 4)
    batch = args[0]
    feed = dict(zip(report.inputs, (batch["x"], *batch["pair"], kwargs["gain"]), strict=True))
    found = run(tmp_path / "n.onnx", **feed)
    with torch.no_grad():
        expected = model(*args, **kwargs)
    np.testing.assert_allclose(found[0], expected["result"].score.numpy(), atol=1e-5)
    np.testing.assert_allclose(found[3], expected["sum"][0].numpy(), atol=1e-5)


def test_names_of_ones_own(tmp_path: Path) -> None:
    model = mlp().eval()
    path = tmp_path / "m.onnx"
    # "linear" is what a value inside is called.
    report = export_onnx(
        model, path, torch.randn(2, 7), input_names=["linear"], output_names=["0.weight"]
    )
    assert (report.inputs, report.outputs) == (("linear",), ("0.weight",))
    x = torch.randn(4, 7)
    with torch.no_grad():
        np.testing.assert_allclose(run(path, linear=x)[0], model(x).numpy(), atol=1e-5)
    for wrong in (["a", "b"], []):
        with pytest.raises(InputError, match="input_names must be 1 different names"):
            export_onnx(model, path, torch.randn(2, 7), input_names=wrong)


@dataclass
class Twice:
    same: Tensor
    again: Tensor
    given: Tensor


def test_one_tensor_twice_among_the_outputs(tmp_path: Path) -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, given: Tensor) -> Twice:
            y = self.layer(given)
            return Twice(y, y, given)

    report = export_onnx(Returns().eval(), tmp_path / "t.onnx", torch.randn(2, 3))
    assert report.inputs == ("given",)
    assert report.outputs == ("same", "again", "given_out")


@pytest.mark.parametrize("opset", [18, 23])
def test_opsets(opset: int, tmp_path: Path) -> None:
    _, captured = captured_case("block")
    module = raise_modules(captured.graph_module, captured)
    report = export_onnx(module, tmp_path / "m.onnx", torch.randn(2, 4, 12), opset=opset)
    assert report.opset == opset
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == opset


@pytest.mark.parametrize("opset", [99, "20", True])
def test_an_opset_that_would_not_be_written_is_refused(opset: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="opset"):
        export_onnx(mlp(), tmp_path / "m.onnx", torch.randn(2, 7), opset=opset)
    assert not (tmp_path / "m.onnx").exists()


def test_old_opset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="opset 17 is too old"):
        export_onnx(mlp(), tmp_path / "m.onnx", torch.randn(2, 7), opset=17)
    assert not names(tmp_path)


def test_fixed_batch(tmp_path: Path) -> None:
    report = export_onnx(mlp().eval(), tmp_path / "m.onnx", torch.randn(2, 7), dynamic_batch=False)
    assert report.batch_sizes == (2,)
    dim = onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape.dim[0]
    assert dim.dim_value == 2


def test_model_that_fixes_its_batch(tmp_path: Path) -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.layer(row) * i for i, row in enumerate(x.unbind(0))])

    for size in (1, 3):
        report = export_onnx(Rows().eval(), tmp_path / "m.onnx", torch.randn(size, 3))
        assert report.batch_sizes == (size,)


def test_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3)))
    monkeypatch.setattr(fxfib_onnx, "_LARGEST_FILE", 10_000)
    path = tmp_path / "m.onnx"
    with pytest.raises(ExportError, match="do not fit one ONNX file"):
        export_onnx(model, path, torch.randn(2, 64), external_data=False)
    assert not names(tmp_path)
    report = export_onnx(model, path, torch.randn(2, 64))
    assert report.external_data
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]
    assert report.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert path.stat().st_size < 10_000
    x = torch.randn(4, 64)
    with torch.no_grad():
        np.testing.assert_allclose(run(path, input=x)[0], model(x).numpy(), atol=1e-5)
    report = export_onnx(model, path, torch.randn(2, 64), external_data=True)
    assert report.external_data


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = randomize(mlp()).to(dtype)
    report = export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 7, dtype=dtype))
    assert report.relative_error is not None
    assert report.relative_error < (1e-9 if dtype is torch.float64 else 2e-2)


def test_report_prints(tmp_path: Path) -> None:
    report = export_onnx(mlp().eval(), tmp_path / "m.onnx", torch.randn(2, 7))
    text = str(report)
    assert "opset 20" in text
    assert "input -> output" in text
    assert "absolute" in text
    assert report.to_dict()["batch_sizes"] == [2, 3]


# ---------------------------------------------------------------------------------- failures


def test_wrong_result_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = fxfib_onnx._write

    def spoiled(model: Any, staged: Path, external: bool) -> None:
        original(model, staged, external)
        loaded = onnx.load(staged)
        for initializer in loaded.graph.initializer:
            if initializer.name == "5.bias":
                values = onnx.numpy_helper.to_array(initializer) + np.float32([0.01, 0, 0])
                initializer.CopyFrom(onnx.numpy_helper.from_array(values, "5.bias"))
        onnx.save(loaded, staged)

    monkeypatch.setattr(fxfib_onnx, "_write", spoiled)
    with pytest.raises(ExportError, match=r"differs from torch by .* at batch size 2"):
        export_onnx(mlp().eval(), tmp_path / "m.onnx", torch.randn(2, 7))
    assert not names(tmp_path)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (2 if x.shape[0] > 3 else 1)


def test_branch_on_the_batch_size(tmp_path: Path) -> None:
    report = export_onnx(Branches().eval(), tmp_path / "m.onnx", torch.randn(3, 3))
    assert report.batch_sizes == (3,)


def test_wrong_at_another_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fxfib_onnx, "doubtful_sizes", lambda program, axes=None: ())
    message = r"at batch size 4 .*; export with dynamic_batch=False"
    with pytest.raises(ExportError, match=message) as caught:
        export_onnx(Branches().eval(), tmp_path / "m.onnx", torch.randn(3, 3))
    assert "\n" not in str(caught.value)
    assert not names(tmp_path)


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failed_export_leaves_the_old_file(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def fail(model: Any, staged: Path, external: bool) -> None:
        staged.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(fxfib_onnx, "_write", fail)
    expected = ExportError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        export_onnx(mlp().eval(), path, torch.randn(2, 7))
    assert names(tmp_path) == ["m.onnx"]
    assert path.read_bytes() == b"old"


def test_unwritable_paths(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "m.onnx", tmp_path):
        with pytest.raises(ExportError, match=str(path)):
            export_onnx(mlp(), path, torch.randn(2, 7))
    assert not names(tmp_path)


def test_what_onnx_cannot_express(tmp_path: Path) -> None:
    class Special(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(self.layer(x))

    with pytest.raises(ExportError, match="Special cannot be written as ONNX: ") as caught:
        export_onnx(Special().eval(), tmp_path / "m.onnx", torch.randn(2, 3))
    assert "\n" not in str(caught.value)
    assert not names(tmp_path)


def test_wrong_inputs(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="Sequential does not run on the example inputs"):
        export_onnx(mlp(), tmp_path / "m.onnx", torch.randn(2, 8))
    assert not names(tmp_path)
