"""Retuning: targets are met after training, the original is left alone, plateaus end it."""

import copy

import pytest
import torch
from torch import nn

import fxfib
from fxfib.errors import InputError
from fxfib.retuning import mean_loss

LOSS = nn.functional.cross_entropy


def trained() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(600, 6)
    y = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()
    model = nn.Sequential(
        nn.Linear(6, 31), nn.ReLU(), nn.Linear(31, 27), nn.ReLU(), nn.Linear(27, 3)
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        LOSS(model(x[:400]), y[:400]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval(), x, y


MODEL, X, Y = trained()
TRAIN = list(zip(X[:400].split(40), Y[:400].split(40), strict=True))
HELD = [(X[400:], Y[400:])]


def test_a_size_is_met_and_training_helps() -> None:
    before = copy.deepcopy(MODEL.state_dict())
    tuned = fxfib.tune(MODEL, example_inputs=(X[:2],), params=0.15, calibration=X[:400])
    small = fxfib.retune(
        MODEL, TRAIN, LOSS, example_inputs=(X[:2],), params=0.15, rounds=2, passes=4
    )
    assert mean_loss(small, HELD, LOSS) < mean_loss(tuned, HELD, LOSS)
    full = sum(p.numel() for p in MODEL.parameters())
    size = sum(p.numel() for p in small.parameters())
    assert 0.08 * full < size <= 0.15 * full
    assert small.fibration.parameters_before == full
    assert small.fibration.parameters_after == size
    assert sum(note.startswith("round ") for note in small.fibration.notes) == 2
    assert not small.training
    for name, value in before.items():
        assert torch.equal(value, MODEL.state_dict()[name])
    assert all(p.grad is None for p in MODEL.parameters())


def test_a_loss_holds_after_training_and_rounds_go_on() -> None:
    limit = mean_loss(MODEL, HELD, LOSS) + 0.02
    given = {"example_inputs": (X[:2],), "calibration": X[:400]}
    once = fxfib.tune(MODEL, HELD, LOSS, max_loss_increase=0.02, **given)
    small = fxfib.retune(
        MODEL, TRAIN, LOSS, validation=HELD, max_loss_increase=0.02, rounds=3, passes=4, **given
    )
    assert mean_loss(small, HELD, LOSS) <= limit + 1e-6
    assert small.fibration.parameters_after < once.fibration.parameters_after


def test_a_plateau_ends_it() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 3)).eval()
    small = fxfib.retune(
        model, TRAIN, LOSS, validation=HELD, max_loss_increase=0.0, rounds=5, rate=0.0,
        example_inputs=(X[:2],),
    )  # fmt: skip
    rounds = [n for n in small.fibration.notes if n.startswith("round ")]
    assert len(rounds) < 5 and "a plateau" in small.fibration.notes[-1]


def test_a_teacher_alone_is_enough() -> None:
    torch.manual_seed(2)
    student = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    wrong = [(x, torch.zeros_like(y)) for x, y in TRAIN]
    fxfib.finetune(student, wrong, LOSS, teacher=MODEL, weight=1.0, passes=30, rate=1e-2)
    assert student.training
    with torch.no_grad():
        same = (student(X).argmax(1) == MODEL(X).argmax(1)).float().mean()
    assert same > 0.8 > 2 * (MODEL(X).argmax(1) == 0).float().mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "retune needs one of params and max_loss_increase"),
        ({"params": 0.5, "max_loss_increase": 1.0}, "retune needs one of"),
        ({"max_loss_increase": 1.0}, "give validation"),
        ({"params": 0.5, "rounds": 0}, "rounds must be a positive whole number"),
        ({"params": -1.0}, "params must be positive"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fxfib.retune(MODEL, TRAIN, LOSS, example_inputs=(X[:2],), **options)


def test_bad_training_is_refused() -> None:
    model = copy.deepcopy(MODEL)
    with pytest.raises(InputError, match="the loss became nan after 0 steps"):
        fxfib.finetune(model, [(X * float("nan"), Y)], LOSS)
    with pytest.raises(InputError, match="weight must be"):
        fxfib.finetune(model, TRAIN, LOSS, weight=2.0)
    with pytest.raises(InputError, match="data must be read again"):
        fxfib.finetune(model, iter(TRAIN), LOSS, passes=2)
    with pytest.raises(InputError, match="data holds no batches"):
        fxfib.finetune(model, [], LOSS)
