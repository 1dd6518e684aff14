"""Lengths and batches that stay free, in torch and in ONNX Runtime."""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import fxfib
from fxfib import recurrent_shapes
from fxfib.errors import CaptureError, InputError

AUTO = torch.export.Dim.AUTO
RECURRENT: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {"batch_first": True}),
    "lstm_both_ways": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "lstm_projected": (nn.LSTM, {"proj_size": 5, "bidirectional": True, "bias": False}),
    "gru": (nn.GRU, {"num_layers": 2, "batch_first": True}),
    "relu": (nn.RNN, {"num_layers": 2, "bidirectional": True, "nonlinearity": "relu"}),
}


class Steps(nn.Module):
    """A recurrent layer whose steps and last states all leave."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(3, 7)
        self.layer = kind(7, 11, **options)  # type: ignore[arg-type]
        width = options.get("proj_size", 11) * (1 + options.get("bidirectional", False))
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        steps, states = self.layer(self.first(x))
        return (self.last(steps), *(states if isinstance(states, tuple) else (states,)))


@pytest.fixture(scope="module", params=RECURRENT)
def recurrent(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, Tensor]:
    kind, options = RECURRENT[request.param]
    torch.manual_seed(1)
    model = Steps(kind, **options).eval()
    x = torch.randn(5, 4, 3)
    wide = fxfib.lift(model, 1.5, (x,), dynamic_shapes={"x": {1: AUTO}})
    return model, fxfib.compile(wide, 0.0, (x,)), x


def test_a_recurrent_layer_takes_any_batch_and_any_length(recurrent: Any) -> None:
    model, small, _ = recurrent
    for shape in ((2, 9, 3), (1, 4, 3), (8, 1, 3), (1, 1, 3)):
        x = torch.randn(shape)
        for ours, theirs in zip(small(x), model(x), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_so_does_its_onnx_file(recurrent: Any, tmp_path: Path) -> None:
    model, small, x = recurrent
    path = tmp_path / "small.onnx"
    report = fxfib.export_onnx(small, path, (x,))
    assert report.dynamic_axes == ("x[0]", "x[1]")
    counts = Counter(node.op_type for node in onnx.load(path).graph.node)
    kind = {"LSTM": "LSTM", "GRU": "GRU", "RNN": "RNN"}[type(model.layer).__name__]
    assert counts[kind] == model.layer.num_layers and not counts["Loop"] + counts["Scan"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in ((2, 9, 3), (8, 1, 3)):
        x = torch.randn(shape)
        for ours, theirs in zip(session.run(None, {"x": x.numpy()}), model(x), strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-4, atol=1e-5)


def test_a_given_state_of_a_projected_lstm_enters_the_onnx_file(tmp_path: Path) -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(3, 7, num_layers=2, proj_size=5, bidirectional=True)

        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
            steps, (h, c) = self.layer(x, (h, c))
            return steps, h, c

    torch.manual_seed(2)
    model = Given().eval()
    inputs = torch.randn(6, 4, 3), torch.randn(4, 4, 5), torch.randn(4, 4, 7)
    shapes = {"x": {1: AUTO}, "h": {1: AUTO}, "c": {1: AUTO}}
    report = fxfib.export_onnx(model, tmp_path / "m.onnx", inputs, dynamic_shapes=shapes)
    assert report.error is not None and report.error < 1e-5
    assert {"x[0]", "x[1]", "h[1]", "c[1]"} <= set(report.dynamic_axes)


class Tiny(nn.Module):
    """Encoder and decoder with pad and causal masks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 12)
        self.positions = nn.Parameter(torch.randn(40, 12))
        options: dict[str, Any] = {"batch_first": True, "norm_first": True}
        self.encoder = nn.TransformerEncoderLayer(12, 2, 20, **options)
        self.decoder = nn.TransformerDecoderLayer(12, 2, 20, **options)
        self.head = nn.Linear(12, 31)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        pad, length = source == 0, target.shape[1]
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        memory = self.encoder(
            self.embed(source) + self.positions[: source.shape[1]], src_key_padding_mask=pad
        )
        found = self.decoder(
            self.embed(target) + self.positions[:length], memory,
            tgt_mask=later, tgt_is_causal=True, memory_key_padding_mask=pad,
        )  # fmt: skip
        logits: Tensor = self.head(found)
        return logits


def tokens(batch: int, source: int, target: int) -> tuple[Tensor, Tensor]:
    first = torch.randint(1, 31, (batch, source))
    first[0, source // 2 + 1 :] = 0
    return first, torch.randint(1, 31, (batch, target))


def test_a_transformer_takes_any_batch_and_any_lengths(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = Tiny().eval()
    inputs = tokens(3, 7, 5)
    wide = fxfib.lift(
        model, 1.5, inputs, dynamic_shapes={"source": (None, AUTO), "target": {1: AUTO}}
    )
    small = fxfib.compile(wide, 0.0, inputs)
    report = small.fibration
    assert report.parameters_after <= sum(p.numel() for p in model.parameters())
    fxfib.export_onnx(small, tmp_path / "t.onnx", inputs)
    session = onnxruntime.InferenceSession(tmp_path / "t.onnx", providers=["CPUExecutionProvider"])
    for sizes in ((2, 9, 4), (5, 6, 6), (1, 1, 1), (2, 3, 33)):
        source, target = tokens(*sizes)
        expected = model(source, target)
        torch.testing.assert_close(small(source, target), expected, rtol=1e-4, atol=1e-4)
        (found,) = session.run(None, {"source": source.numpy(), "target": target.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_sizes_that_nobody_asked_for_stay_fixed() -> None:
    small = fxfib.compile(Tiny().eval(), 0.0, tokens(3, 7, 5))
    with pytest.raises(InputError, match="must have shape"):
        small(*tokens(3, 8, 5))


class Branch(nn.Module):
    """Does something else for long inputs."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.layer, self.longest = nn.Linear(3, 5), longest

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found.relu() if x.shape[1] < self.longest else found


@pytest.mark.parametrize("longest", [9, 900])
def test_a_branch_on_a_free_size_is_refused(longest: int) -> None:
    x = torch.randn(4, 6, 3)
    with pytest.raises(CaptureError, match="free sizes"):
        fxfib.compile(Branch(longest).eval(), 0.0, (x,), dynamic_shapes={"x": {1: AUTO}})


def test_a_size_that_the_model_fixes_is_refused() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(18, 5)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.layer(x.reshape(x.shape[0], 18))
            return found

    with pytest.raises(CaptureError, match=r"axis 1 of input x is 6"):
        fxfib.compile(Fixed().eval(), 0.0, (torch.randn(4, 6, 3),), dynamic_shapes={"x": {1: AUTO}})


@pytest.mark.parametrize(
    ("shapes", "words"),
    [({"y": {1: AUTO}}, "names 'y'"), ({"x": {3: AUTO}}, "no axis 3"), (7, "must be a dict"),
     ({"x": {"1": AUTO}}, "must map axes"), ((None, None), "2 entries for 1")],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(shapes: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        fxfib.compile(Branch(9).eval(), 0.0, (torch.randn(4, 6, 3),), dynamic_shapes=shapes)


def test_nested_inputs_have_free_sizes_too() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 5)

        def forward(self, pair: dict[str, Tensor], *, scale: Tensor) -> Tensor:
            found: Tensor = self.layer(pair["a"]) * scale + pair["b"]
            return found

    a, b, scale = torch.randn(4, 6, 3), torch.randn(4, 6, 5), torch.randn(4, 1, 5)
    model = Nested().eval()
    small = fxfib.compile(
        model, 0.0, ({"a": a, "b": b},), {"scale": scale},
        dynamic_shapes={"pair": {"a": {1: AUTO}, "b": {1: AUTO}}},
    )  # fmt: skip
    more = {"a": torch.randn(2, 9, 3), "b": torch.randn(2, 9, 5)}
    torch.testing.assert_close(small(more, scale=scale[:2]), model(more, scale=scale[:2]))


def test_the_shapes_of_one_step_are_those_of_all() -> None:
    # Nothing is left of the stand-in once a model is captured.
    layer = nn.GRU(3, 5, bidirectional=True)
    with recurrent_shapes.shapes_of_recurrent_layers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its flat weights
        program = torch.export.export(layer.eval(), (torch.randn(4, 2, 3),))
    (node,) = [n for n in program.graph.nodes if n.target is torch.ops.aten.gru.input]
    real = layer(torch.randn(4, 2, 3))
    assert [v.shape for v in node.meta["val"]] == [v.shape for v in real]
    x = torch.randn(4, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.11's, of its own tree specs
        unrolled = program.run_decompositions().module()
    torch.testing.assert_close(unrolled(x), layer(x))
