"""Recurrent layers: hidden nodes merge where all gates agree, in every layer and direction."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import fxfib

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"num_layers": 2},
    "both_ways": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "no_bias": {"bias": False},
}
KINDS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
}
INPUT = torch.randn(5, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Reader(nn.Module):
    """``linear -> recurrent -> linear``, the last one on all steps or on a last state."""

    def __init__(self, kind: type[nn.RNNBase], read: str = "steps", **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.layer = kind(10, 8, **options)  # type: ignore[arg-type]
        width = options.get("proj_size", 0) or 8
        if read == "steps" and options.get("bidirectional"):
            width *= 2
        self.last = nn.Linear(8 if read == "cells" else width, 3)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        steps, state = self.layer(self.first(x).relu())
        hidden, cells = state if isinstance(self.layer, nn.LSTM) else (state, None)
        value = {"steps": steps, "state": hidden, "last": hidden[-1], "cells": cells}[self.read]
        found: Tensor = self.last(value)
        return found


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def back(model: nn.Module, x: Tensor = INPUT) -> nn.Module:
    """Lifted and compiled: as small as before, the same function."""
    model = model.double().eval()
    wide = fxfib.lift(model, 1.5, example_inputs=(x,), seed=1)
    assert size(wide) > size(model)
    small = fxfib.compile(wide, 0.0, example_inputs=(x,))
    assert size(small) <= size(model)
    torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-9)
    return small


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_lifted_layers_come_back(kind: str, options: str) -> None:
    cls, extra = KINDS[kind]
    torch.manual_seed(1)
    model = Reader(cls, **extra, **OPTIONS[options])
    small = back(model)
    assert type(small.get_submodule("layer")) is cls


@pytest.mark.parametrize(
    ("kind", "read"),
    [("lstm", "state"), ("lstm", "last"), ("lstm", "cells"), ("gru", "state"), ("gru", "last")],
)
def test_last_states_are_read(kind: str, read: str) -> None:
    torch.manual_seed(2)
    back(Reader(KINDS[kind][0], read, num_layers=2))


@pytest.mark.parametrize("read", ["steps", "last", "cells"])
def test_projected_lstm(read: str) -> None:
    torch.manual_seed(3)
    small = back(Reader(nn.LSTM, read, proj_size=5))
    layer = small.get_submodule("layer")
    assert isinstance(layer, nn.LSTM)
    assert (layer.hidden_size, layer.proj_size) == (8, 5)


class Streamed(nn.Module):
    """The initial state is an input: its nodes are whatever the caller gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.GRU(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        steps, state = self.layer(x, state)
        return self.last(steps), state


def test_a_given_state_is_kept_and_the_report_says_so() -> None:
    torch.manual_seed(4)
    model = Streamed().double().eval()
    with torch.no_grad():
        for parameter in model.layer.parameters():
            for first in range(0, len(parameter), 8):
                parameter[first + 1] = parameter[first]
    inputs = (INPUT, torch.randn(1, 4, 8, dtype=torch.float64))
    small = fxfib.compile(model, 0.0, example_inputs=inputs)
    report = small.fibration
    layer = small.get_submodule("layer")
    assert isinstance(layer, nn.GRU) and layer.hidden_size == 8
    for ours, theirs in zip(small(*inputs), model(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert any("initial state" in refusal.reason for refusal in report.refusals)


def test_onnx_holds_one_lstm_node_of_the_small_size(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = Reader(nn.LSTM).eval()
    x = INPUT.float()
    wide = fxfib.lift(model, 2.0, example_inputs=(x,), seed=1)
    small = fxfib.compile(wide, 0.0, example_inputs=(x,))
    path = tmp_path / "small.onnx"
    fxfib.export_onnx(small, path, (x,))
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == "LSTM"]
    assert len(nodes) == 1
    (hidden,) = [a.i for a in nodes[0].attribute if a.name == "hidden_size"]
    assert hidden == 8


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_learned_states_are_exported_with_free_sizes(kind: str, tmp_path: Path) -> None:
    class Learned(nn.Module):
        """Starts from parameters, the same for every example."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = KINDS[kind][0](6, 8, 2, batch_first=True)  # type: ignore[arg-type]
            self.start = nn.Parameter(torch.randn(2, 1, 8))

        def forward(self, x: Tensor) -> Tensor:
            start = self.start.expand(-1, x.shape[0], -1).contiguous()
            found: Tensor = self.layer(x, (start, start) if kind == "lstm" else start)[0]
            return found

    torch.manual_seed(6)
    x, auto = INPUT.float(), torch.export.Dim.AUTO
    small = fxfib.compile(Learned().eval(), 0.0, (x,), dynamic_shapes={"x": {1: auto}})
    report = fxfib.export_onnx(small, tmp_path / "small.onnx", (x,))
    assert report.dynamic_axes == ("x[0]", "x[1]")
    nodes = [node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node]
    assert nodes.count(kind.upper()) == 2


def test_nearly_equal_nodes_merge_within_eps_only() -> None:
    torch.manual_seed(6)
    model = Reader(nn.LSTM).double().eval()
    with torch.no_grad():
        for parameter in model.layer.parameters():
            for first in range(0, len(parameter), 8):
                parameter[first + 1] = parameter[first]
        model.layer.get_parameter("bias_ih_l0")[1] += 1e-3
    exact = fxfib.compile(model, 0.0, example_inputs=(INPUT,))
    near = fxfib.compile(model, 1e-2, example_inputs=(INPUT,))
    assert [m.get_submodule("layer").hidden_size for m in (exact, near)] == [8, 7]
    torch.testing.assert_close(near(INPUT), model(INPUT), rtol=1e-2, atol=1e-2)


CELLS: dict[str, tuple[type[nn.RNNCellBase], dict[str, Any]]] = {
    "lstm": (nn.LSTMCell, {}),
    "gru": (nn.GRUCell, {}),
    "tanh": (nn.RNNCell, {}),
    "relu": (nn.RNNCell, {"nonlinearity": "relu"}),
}


class Loop(nn.Module):
    """``linear -> cell -> linear`` step by step, from zeros, a parameter or a computed state."""

    def __init__(
        self, kind: type[nn.RNNCellBase], start: str = "zeros", read: str = "steps", **options: Any
    ) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.cell = kind(10, 8, **options)  # type: ignore[arg-type]
        self.last = nn.Linear(8, 3)
        self.begin = nn.Linear(6, 8)
        self.initial = nn.Parameter(torch.randn(8))
        self.start, self.read = start, read

    def forward(self, x: Tensor) -> Tensor:
        lstm = isinstance(self.cell, nn.LSTMCell)
        state: Any = None
        if self.start == "parameter":
            state = self.initial.expand(x.shape[1], 8)
        elif self.start == "computed":
            state = self.begin(x[0]).tanh()
        if lstm and state is not None:
            state = (torch.zeros_like(state), state)
        found = []
        for step in x:
            state = self.cell(self.first(step).relu(), state)
            found.append(self.last(state[self.read == "cells"] if lstm else state))
        return torch.stack(found) if self.read != "last" else found[-1]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_lifted_cells_come_back(kind: str, bias: bool) -> None:
    cls, extra = CELLS[kind]
    torch.manual_seed(11)
    model = Loop(cls, **extra, bias=bias)
    # What forward does not use is left out, and that is no merge.
    del model.begin, model.initial
    small = back(model)
    cell = small.get_submodule("cell")
    assert type(cell) is cls and cell.hidden_size == 8


@pytest.mark.parametrize("start", ["parameter", "computed"])
@pytest.mark.parametrize(
    ("kind", "read"),
    [("lstm", "steps"), ("lstm", "last"), ("lstm", "cells"), ("gru", "last"), ("relu", "steps")],
)
def test_cells_merge_where_their_first_state_agrees(kind: str, read: str, start: str) -> None:
    cls, extra = CELLS[kind]
    torch.manual_seed(12)
    model = Loop(cls, start, read, **extra).double().eval()
    with torch.no_grad():
        for parameter in (*model.cell.parameters(), *model.begin.parameters(), model.initial):
            for first in range(0, len(parameter), 8):
                parameter[first + 1] = parameter[first]
        # Equal rows, but another first state: h of an RNN forgets it, c and a gated h do not.
        for parameter in model.cell.parameters():
            for first in range(0, len(parameter), 8):
                parameter[first + 3] = parameter[first + 2]
    small = fxfib.compile(model, 0.0, example_inputs=(INPUT,))
    torch.testing.assert_close(small(INPUT), model(INPUT), rtol=1e-12, atol=1e-12)
    # The first state of a plain RNN meets the columns of the weight too, which tie it to h.
    assert small.get_submodule("cell").hidden_size == 7
    assert any("cell" in group.members for group in small.fibration.merged_groups)


def test_a_state_from_outside_keeps_a_cell_as_it_is() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.last = nn.GRUCell(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            state = self.cell(x, state)
            return self.last(state), state

    model = Step().eval()
    with torch.no_grad():
        for parameter in model.cell.parameters():
            for first in range(0, len(parameter), 8):
                parameter[first + 1] = parameter[first]
    inputs = (torch.randn(4, 6), torch.randn(4, 8))
    small = fxfib.compile(model, 0.0, example_inputs=inputs)
    cell = small.get_submodule("cell")
    assert isinstance(cell, nn.GRUCell) and cell.hidden_size == 8
    assert any("initial state" in refusal.reason for refusal in small.fibration.refusals)


def test_a_compiled_loop_is_saved_loaded_and_exported(tmp_path: Path) -> None:
    torch.manual_seed(13)
    model = Loop(nn.LSTMCell).eval()
    x = INPUT.float()
    small = fxfib.compile(fxfib.lift(model, 1.5, (x,), seed=1), 0.0, (x,))
    fxfib.save(small, tmp_path / "loop.fxfib")
    again = fxfib.load(tmp_path / "loop.fxfib")
    torch.testing.assert_close(again(x), small(x), rtol=0, atol=0)
    fxfib.export_onnx(small, tmp_path / "loop.onnx", (x,))


@pytest.mark.parametrize("kind", ["lstm", "relu"])
def test_what_all_steps_see_alike_is_folded_into_their_weights(kind: str) -> None:
    cls, extra = CELLS[kind]
    torch.manual_seed(14)
    model = Loop(cls, **extra).double().eval()
    with torch.no_grad():
        for parameter in model.first.parameters():
            parameter[3] = 2.0 * parameter[2]
        model.first.weight[5], model.first.bias[5] = 0.0, 1.5
    small = fxfib.compile(model, 0.0, example_inputs=(INPUT,))
    assert small.get_submodule("first").out_features == 8
    torch.testing.assert_close(small(INPUT), model(INPUT), rtol=1e-12, atol=1e-12)
