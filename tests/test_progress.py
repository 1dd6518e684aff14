"""The bar: what is done, which share of it, how long it still takes; nothing where nobody looks."""

import pytest
import torch
from torch import nn

import fxfib
from fxfib.progress import Progress


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Every state of the bar that was written."""
    return [line.strip() for line in capsys.readouterr().err.split("\r") if line.strip()]


def test_a_share_gives_an_estimate_and_the_next_step_starts_anew(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Progress("work", True) as step:
        step.bar.mininterval = 0
        step("read")
        step("fit", 0.25)
        step("fit", 0.75)
        step("check")
        step("check", 0.5)
    lines = shown(capsys)
    assert any(line.startswith("work: read [") for line in lines)
    parts = [(line.split(":")[1].strip(), line.split("%")[0][-3:].strip(), "<" in line)
             for line in lines if "%" in line]  # fmt: skip
    for wanted in (("fit", "25", True), ("fit", "75", True), ("check", "50", True)):
        assert wanted in parts
    assert ("check", "75", True) not in parts


@pytest.mark.parametrize("asked", [True, False])
def test_every_long_step_of_a_compile_tells_its_share(
    asked: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, list[float]] = {}
    call = Progress.__call__

    def listened(self: Progress, name: str, share: float | None = None) -> None:
        if share is not None:
            told.setdefault(name, []).append(share)
        call(self, name, share)

    monkeypatch.setattr(Progress, "__call__", listened)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 3)).eval()
    inputs = torch.randn(600, 5)
    fxfib.compile(model, 0.3, (inputs[:2],), criterion="energy", calibration=inputs, refine=2,
                  progress=asked)  # fmt: skip
    assert set(told) >= {"measure", "color", "compensate", "refine"}
    for shares in told.values():
        assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1
    assert told["compensate"][-1] == told["refine"][-1] == told["measure"][-1] == 1
    assert bool(shown(capsys)) == asked


def test_tune_tells_which_network_it_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[str] = []
    monkeypatch.setattr(Progress, "part", lambda self, name: parts.append(name))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 3)).eval()
    inputs = torch.randn(60, 5)
    small = fxfib.tune(model, example_inputs=(inputs[:2],), params=0.5, calibration=inputs)
    made = [point for point in small.fibration.frontier if point.made]
    assert len(made) > 1
    assert parts == [*(f"network {k + 1}" for k in range(len(made))), "the result"]
