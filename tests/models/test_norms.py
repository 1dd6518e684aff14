"""Norms over merged channels: counted, and still one op for ONNX Runtime and for compilers."""

import collections

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import fxfib

# Nodes of the same number are a fiber; the norm has to count 3, 1, 2 and 1 of them.
FIBERS = torch.tensor([0, 1, 0, 2, 3, 2, 0])


class WrittenOut(nn.Module):
    """RMS norm as language models write it."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


KINDS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "written_out": WrittenOut}


def network(kind: str, dtype: torch.dtype = torch.float32, even: bool = False) -> nn.Sequential:
    """Linear, norm, linear, with fibers before the norm; ``even``: two nodes each."""
    generator = torch.Generator().manual_seed(3)
    fibers = torch.tensor([0, 1, 2, 0, 2, 1]) if even else FIBERS
    model = nn.Sequential(
        nn.Linear(5, len(fibers)), KINDS[kind](len(fibers), eps=1e-5), nn.Linear(len(fibers), 3)
    )
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    for parameter in (*model[0].parameters(), *model[1].parameters()):
        parameter.data = parameter.data[fibers].contiguous()
    return model.to(dtype).eval()


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 11, 5, generator=torch.Generator().manual_seed(4)).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_one_op_in_onnx_runtime(kind, tmp_path):
    small = fxfib.compile(network(kind), 0.0, (rows(),))
    assert small.get_parameter("0.weight").shape == (4, 5)
    fxfib.export_onnx(small, tmp_path / "small.onnx", (rows(),), opset=23)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(
        tmp_path / "small.onnx", options, providers=["CPUExecutionProvider"]
    )
    found = collections.Counter(
        node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node
    )
    assert found["RMSNormalization"] + found["SimplifiedLayerNormalization"] == 1
    assert not {"ReduceMean", "Sqrt", "Pow"} & set(found)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_counts_are_a_plain_norm(kind):
    small = fxfib.compile(network(kind, even=True), 0.0, (rows(),))
    assert small.get_parameter("0.weight").shape == (3, 5)
    names = {str(node.target) for node in small.graph.nodes if node.op == "call_function"}
    assert not {"aten.sum.dim_IntList", "aten.sub.Tensor"} & names
    if kind != "written_out":
        assert type(small.get_submodule("1")) is KINDS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind, tmp_path):
    small = fxfib.compile(network(kind), 0.0, (rows(),))
    assert set(network(kind).state_dict()) <= set(small.state_dict())
    fxfib.save(small, tmp_path / "small.fxfib")
    loaded = fxfib.load(tmp_path / "small.fxfib")
    assert torch.equal(loaded(rows()), small(rows()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind, dtype):
    """Squares of numbers that float16 holds need not be such numbers."""
    model = network(kind, dtype)
    x = 200 * rows(dtype)
    small = fxfib.compile(model, 0.0, (x,))
    assert small.get_parameter("0.weight").shape == (4, 5)
    assert small.fibration.relative_error < 0.02


def test_the_written_out_norm_is_found():
    """Bit by bit what the model computes, and other formulas are left alone."""
    from fxfib.capture import capture

    model = network("written_out")
    captured = capture(model, (rows(),))
    targets = [str(node.target) for node in captured.graph_module.graph.nodes]
    assert "aten.rms_norm.default" in targets and "aten.rsqrt.default" not in targets
    assert torch.equal(captured.graph_module(rows())[0], model(rows()))

    class Other(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            other = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5)
            cubes = x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True).abs() + 1e-5)
            flat = x * torch.rsqrt(x.pow(2).mean(-1) + 1e-5)[..., None]
            foreign = 2 * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
            mean = x.pow(2).mean(-1, keepdim=True)
            return other, cubes, flat, foreign, x * torch.rsqrt(mean + 1e-5) + mean

    captured = capture(nn.Sequential(nn.Linear(5, 5), Other()), (rows(),))
    targets = [str(node.target) for node in captured.graph_module.graph.nodes]
    assert targets.count("aten.rsqrt.default") == 5 and "aten.rms_norm.default" not in targets
