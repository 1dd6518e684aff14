"""Inputs as users have them: labels beside them, dicts of more, odd tensors."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxfib
from fxfib.calibration import batches_of
from fxfib.capture import capture
from fxfib.errors import InputError, RefusedError

torch.manual_seed(0)
X, MASK, Y = torch.randn(60, 6), torch.rand(60, 1), torch.randint(0, 3, (60,))


class Masked(nn.Module):
    """Two inputs, by position or by name, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(6, 20), nn.Linear(20, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> dict:
        h = F.relu(self.a(x))
        return {"logits": self.b(h if mask is None else h * mask)}


def perceptron() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3)).eval()


NAMED = {"x": X, "mask": MASK}
WAYS = {
    "tuples": [(X, MASK)],
    "tuples with labels": [(X, MASK, Y)],
    "tuples of tuples": [((X, MASK), Y)],
    "lists": DataLoader(TensorDataset(X, MASK, Y), batch_size=60),
    "dicts": [NAMED],
    "dicts with more": [{"labels": Y, "mask": MASK, "x": X}],
    "dicts with labels beside": [(NAMED, Y)],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("named", [False, True])
def test_what_the_model_does_not_read_is_left_out(way: str, named: bool) -> None:
    """However the arguments are written, they are those that were captured."""
    example = {"x": X[:2], "mask": MASK[:2]} if named else (X[:2], MASK[:2])
    captured = capture(Masked().eval(), example)
    if named and way in ("tuples", "tuples with labels", "tuples of tuples", "lists"):
        # A model that was captured by name takes names.
        with pytest.raises(InputError, match="by keyword"):
            batches_of(WAYS[way], captured)
        return
    (batch,) = batches_of(WAYS[way], captured)
    assert all(torch.equal(a, b) for a, b in zip(batch, (X, MASK), strict=True))


def test_a_dict_with_its_target_is_data() -> None:
    small = fxfib.tune(
        Masked().eval(),
        [(NAMED, Y)],
        lambda output, target: F.cross_entropy(output["logits"], target),
        example_inputs={"x": X[:2], "mask": MASK[:2]},
        max_loss_increase=0.1,
        refine=0,
    )
    assert small.fibration.parameters_after < small.fibration.parameters_before


def test_arrays_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="ndarray; give a tensor"):
        batches_of(X.numpy(), capture(perceptron(), (X[:2],)))


def test_inputs_with_a_history_get_no_gradients() -> None:
    inputs = X.clone().requires_grad_()
    fxfib.tune(perceptron(), example_inputs=(X[:2],), params=0.6, calibration=inputs, refine=1)
    assert inputs.grad is None


def test_inputs_made_in_inference_mode_can_be_trained_on() -> None:
    with torch.inference_mode():
        inputs = X.clone()
    small = fxfib.tune(
        perceptron(), example_inputs=(inputs[:2],), params=0.6, calibration=inputs, refine=1
    )
    assert small.fibration.parameters_after < small.fibration.parameters_before


@pytest.mark.parametrize("where", ["parameter", "buffer"])
def test_models_made_in_inference_mode_are_refused_by_name(where: str) -> None:
    with torch.inference_mode():
        layer = nn.Linear(6, 7) if where == "parameter" else nn.BatchNorm1d(6, affine=False)
    name = {"parameter": "1.weight", "buffer": "1.running_mean"}[where]
    with pytest.raises(RefusedError, match=f"{name} was made in torch.inference_mode"):
        fxfib.compile(nn.Sequential(nn.Linear(6, 6), layer).eval(), 0.0, (X[:2],))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refined_in_single(dtype: torch.dtype) -> None:
    """Adam's steps and squares are lost in half precision; the result comes nearer all the same."""
    model, inputs = perceptron().to(dtype), X.to(dtype)
    gaps = []
    for passes in (0, 30):
        small = fxfib.tune(
            model, example_inputs=(inputs[:2],), params=0.5, calibration=inputs, refine=passes
        )
        assert {p.dtype for p in small.parameters()} == {dtype}
        with torch.no_grad():
            gaps.append(float((small(inputs) - model(inputs)).float().square().mean()))
    assert gaps[1] < gaps[0]


@pytest.mark.parametrize("text", ['{"search": "abc', "[1, 2]", '{"points": []}', '"text"'])
def test_a_file_of_something_else_is_not_overwritten(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(InputError, match="no file of an earlier search"):
        fxfib.tune(perceptron(), example_inputs=(X[:2],), params=0.6, resume=str(path))
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (float("nan"), "the original's own loss on data is nan"),
        (None, "must give one number, the mean of a batch, not NoneType"),
        (torch.zeros(60), r"must give one number, the mean of a batch, not shape \(60,\)"),
    ],
)
def test_a_loss_that_says_nothing_is_refused(loss: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fxfib.tune(
            perceptron(),
            [(X, Y)],
            lambda output, target: loss,
            example_inputs=(X[:2],),
            max_loss_increase=0.1,
        )


def test_a_search_goes_on_over_shuffled_data(tmp_path: Path) -> None:
    """The same loss up to the order of its sum is the same search."""
    batches = [(X[k : k + 7], Y[k : k + 7]) for k in range(0, 60, 7)]
    path = tmp_path / "search"
    calls = []

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return F.cross_entropy(output, target)

    made = []
    for order in (batches, batches[::-1], batches[3:] + batches[:3]):
        calls.clear()
        fxfib.tune(
            perceptron(), order, loss, example_inputs=(X[:2],), max_loss_increase=0.02, refine=0,
            resume=str(path),
        )  # fmt: skip
        made.append(len(calls) // len(batches))
    # Afterwards only the original and the result are evaluated.
    assert made[0] > 3 and made[1:] == [2, 2]
