"""Recurrent layers are fitted on the course that the small layer takes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fxfib
from fxfib.errors import InputError
from fxfib.passes import recurrent_fit
from fxfib.workshop import Workshop


class Reader(nn.Module):
    """A recurrent module behind a linear layer, read at every step."""

    def __init__(self, kind: type[nn.RNNBase], width: int = 12, **options: Any) -> None:
        super().__init__()
        options = {"batch_first": True, **options}
        self.first = nn.Linear(5, 7)
        self.layer = kind(7, width, **options)
        outputs = options.get("proj_size") or width
        self.last = nn.Linear(outputs * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(self.first(x).tanh())[0])


class Started(Reader):
    """Its first state is a parameter."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__(kind, **options)
        self.start = nn.Parameter(torch.zeros(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = self.start.expand(1, len(x), 12)
        state = (start, start) if isinstance(self.layer, nn.LSTM) else start
        return self.last(self.layer(self.first(x).tanh(), state)[0])


def redundant(model: Reader) -> Reader:
    """Hidden nodes 6 to 11 do nearly as nodes 0 to 5 do, each half as strongly read."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in model.layer.named_parameters():
            if "hr" in name:
                continue
            rows = weight.unflatten(0, (-1, 12))
            rows[:, 6:] = rows[:, :6] + 0.1 * torch.randn_like(rows[:, :6])
    return model.eval()


def both(model: Reader, x: torch.Tensor, eps: Any) -> tuple[Reader, Reader]:
    """What merging gives, fitted and as it is."""
    options = {"criterion": "energy", "calibration": x}
    fitted, plain = (
        fxfib.compile(model, eps, (x,), compensate=f, **options) for f in (True, False)
    )
    return fitted, plain  # type: ignore[return-value]


def distance(small: nn.Module, model: nn.Module, x: torch.Tensor) -> float:
    """Between what two networks give."""
    with torch.no_grad():
        return float((small(x) - model(x)).norm())


KINDS = [nn.LSTM, nn.GRU, nn.RNN]
FORMS = {
    "plain": {},
    "no bias": {"bias": False},
    "time first": {"batch_first": False},
    "two layers": {"num_layers": 2},
    "both ways": {"bidirectional": True},
    "two layers both ways": {"num_layers": 2, "bidirectional": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_fitted_layers_are_nearer(kind: type[nn.RNNBase], form: str) -> None:
    model = redundant(Reader(kind, **FORMS[form]))
    shape = (8, 300, 5) if form == "time first" else (300, 8, 5)
    x, y = torch.randn(shape), torch.randn(shape)
    fitted, plain = both(model, x, {"layer": 0.02})
    assert fitted.layer.hidden_size < 12
    assert distance(fitted, model, y) < 0.5 * distance(plain, model, y)


@pytest.mark.parametrize("kind", KINDS)
def test_nodes_missing_among_the_inputs_are_made_up_for(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(3)
    model = Reader(kind).eval()
    x, y = torch.randn(300, 6, 5), torch.randn(300, 6, 5)
    fitted, plain = both(model, x, {"first": 0.2})
    assert fitted.first.out_features < 7 and fitted.layer.hidden_size == 12
    assert distance(fitted, model, y) < 0.6 * distance(plain, model, y)


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_state_that_is_no_zero(kind: type[nn.RNNBase]) -> None:
    model = redundant(Started(kind))
    with torch.no_grad():
        model.start += torch.randn(6).repeat(2)
    x, y = torch.randn(300, 4, 5), torch.randn(300, 4, 5)
    fitted, plain = both(model, x, {"layer": 0.02})
    assert fitted.layer.hidden_size < 12
    assert distance(fitted, model, y) < 0.5 * distance(plain, model, y)


def test_inputs_of_a_layer_with_a_projection() -> None:
    torch.manual_seed(3)
    model = Reader(nn.LSTM, proj_size=4).eval()
    x, y = torch.randn(300, 6, 5), torch.randn(300, 6, 5)
    fitted, plain = both(model, x, {"first": 0.2})
    assert fitted.first.out_features < 7
    assert distance(fitted, model, y) < 0.5 * distance(plain, model, y)


@pytest.mark.parametrize("kind", KINDS)
def test_one_move_is_least_squares_on_the_own_course(
    kind: type[nn.RNNBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing holds the weights: by hand, from what the small layer gives at every step."""
    monkeypatch.setattr(recurrent_fit, "RUNS", 1)
    monkeypatch.setattr(recurrent_fit, "DAMPING", 1e-9)
    monkeypatch.setattr(recurrent_fit.RecurrentFit, "_error", lambda *_: next(errors))
    errors = iter([1.0, 0.0])  # whatever is tried is taken
    torch.manual_seed(1)
    model = Reader(kind).double().eval()
    x = torch.randn(200, 5, 5).double()
    fitted, plain = both(model, x, {"layer": 0.05})
    size = plain.layer.hidden_size
    assert size < 12
    given = dict(plain.layer.named_parameters())
    place = [
        int((model.layer.weight_ih_l0[:12] - row).norm(dim=1).argmin())
        for row in given["weight_ih_l0"][:size]
    ]
    rows = [g * 12 + p for g in range(len(given["bias_hh_l0"]) // size) for p in place]
    with torch.no_grad():
        read = model.first(x).tanh()
        theirs, ours = (m.layer(read)[0].roll(1, 1) for m in (model, plain))
        theirs[:, 0], ours[:, 0] = 0.0, 0.0
        own = model.layer
        hidden = (theirs @ own.weight_hh_l0.t() + own.bias_hh_l0)[..., rows].flatten(0, 1)
        inputs = (read @ own.weight_ih_l0.t() + own.bias_ih_l0)[..., rows].flatten(0, 1)
        ones = torch.ones(len(hidden), 1).double()
        design = torch.cat([ours.flatten(0, 1), read.flatten(0, 1), ones], 1)
        wanted = torch.linalg.lstsq(design, hidden + inputs).solution.t()
        alone = torch.linalg.lstsq(torch.cat([design[:, :size], ones], 1), hidden).solution.t()
    found = dict(fitted.layer.named_parameters())
    together = slice(0, 2 * size) if kind is nn.GRU else slice(None)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found["weight_hh_l0"][together], wanted[together, :size], **close)
    torch.testing.assert_close(found["weight_ih_l0"][together], wanted[together, size:-1], **close)
    biases = found["bias_hh_l0"] + found["bias_ih_l0"]
    torch.testing.assert_close(biases[together], wanted[together, -1], **close)
    if kind is nn.GRU:
        # The reset gate stands between the two sums of the new gate.
        new = slice(2 * size, None)
        torch.testing.assert_close(found["weight_hh_l0"][new], alone[new, :-1], **close)
        torch.testing.assert_close(found["bias_hh_l0"][new], alone[new, -1], **close)
        torch.testing.assert_close(
            found["weight_ih_l0"][new], model.layer.weight_ih_l0[rows][new], **close
        )


def test_what_brings_nothing_nearer_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = redundant(Reader(nn.LSTM))
    x = torch.randn(100, 8, 5)
    errors = iter([1.0, *[2.0] * recurrent_fit.RUNS])
    monkeypatch.setattr(recurrent_fit.RecurrentFit, "_error", lambda *_: next(errors))
    fitted, plain = both(model, x, {"layer": 0.02})
    for (name, ours), (_, theirs) in zip(
        fitted.layer.named_parameters(), plain.layer.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_few_sequences_of_many_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent_fit, "FEWEST_STEPS", 100)
    monkeypatch.setattr(recurrent_fit, "STEPS_PER_COLUMN", 1)
    seen = []
    solve = recurrent_fit.RecurrentFit.solve

    def looked_at(self: recurrent_fit.RecurrentFit, small: Any) -> Iterator[int]:
        seen.extend(tuple(batch.x.shape[:2]) for batch in self.seen)
        return solve(self, small)

    monkeypatch.setattr(recurrent_fit.RecurrentFit, "solve", looked_at)
    model, x = redundant(Reader(nn.GRU)), torch.randn(10, 8, 5)
    fxfib.compile(
        model, {"layer": 0.02}, (x,), criterion="energy",
        calibration=[torch.randn(10, 8, 5) for _ in range(4)],
    )  # fmt: skip
    assert seen == [(8, 4)] * 4  # 100 of 320 steps, no sequence cut


def test_a_module_that_is_called_twice_is_left_alone() -> None:
    class Twice(Reader):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            read = self.first(x).tanh()
            return self.last(self.layer(read)[0] + self.layer(read.flip(1))[0])

    model, x = redundant(Twice(nn.LSTM)), torch.randn(50, 6, 5)
    fitted, _ = both(model, x, {"layer": 0.02})
    assert any(
        "layer is not fitted: its parameters are shared" in n for n in fitted.fibration.notes
    )


def test_what_overflows_is_named() -> None:
    class Linear(Reader):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.layer(100 * self.first(x))[0])

    model, x = redundant(Linear(nn.LSTM)), torch.randn(50, 6, 5)
    options = {"criterion": "cosine", "calibration": 1e37 * x}
    with pytest.raises(InputError, match=r"layer cannot be fitted: .* NaN or infinite"):
        fxfib.compile(model, {"layer": 0.3}, (x,), **options)


def test_runs_are_told_as_they_are_done() -> None:
    told: list[float] = []

    def step(name: str, share: float | None = None) -> None:
        if name == "compensate" and share is not None:
            told.append(share)

    model, x = redundant(Reader(nn.LSTM, num_layers=2)), torch.randn(50, 6, 5)
    workshop = Workshop(model, (x,), criterion="energy", calibration=x, step=step)
    workshop.fitted(*workshop.rewritten({"layer": 0.02}))
    assert len(set(told)) > recurrent_fit.RUNS
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)


@pytest.mark.parametrize("tied", ["layers", "sides", "biases"])
def test_weights_that_are_one_tensor_are_left_alone(tied: str) -> None:
    torch.manual_seed(0)
    model = Reader(nn.LSTM, num_layers=2)
    model.first = nn.Linear(5, 12)
    model.layer = layer = nn.LSTM(12, 12, num_layers=2, batch_first=True)
    if tied == "layers":
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(layer, f"{name}_l1", getattr(layer, f"{name}_l0"))
    elif tied == "sides":
        layer.weight_hh_l0 = layer.weight_ih_l0
    else:
        layer.bias_hh_l0 = layer.bias_ih_l0
    x = torch.randn(60, 6, 5)
    fitted, _ = both(model.eval(), x, {"first": 0.1, "layer": 0.1})
    assert any(
        "layer is not fitted: its parameters are shared" in n for n in fitted.fibration.notes
    )
