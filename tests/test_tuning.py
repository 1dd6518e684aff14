"""tune: targets are met, or it is said why not; what is promised is what is measured."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxfib
from fxfib.errors import InputError
from fxfib.evaluation import Evaluator
from fxfib.latency import Latency, Stopwatch
from fxfib.timing import torch_threads
from fxfib.workshop import Workshop


def trained() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(400, 6)
    y = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()
    model = nn.Sequential(
        nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 26), nn.ReLU(), nn.Linear(26, 3)
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


MODEL, X, Y = trained()
DATA = [(X[:250], Y[:250]), (X[250:], Y[250:])]
INPUTS = (X[:3],)
LOSS = nn.functional.cross_entropy


def loss(model: nn.Module) -> float:
    with torch.no_grad():
        return float(LOSS(model(X), Y))


@pytest.mark.parametrize(
    ("share", "kind", "calibrated"),
    [(0.7, "params", True), (0.4, "macs", False), (0.15, "params", False), (0.15, "macs", True)],
)
def test_a_size_is_met_and_used(share: float, kind: str, calibrated: bool) -> None:
    calibration = X if calibrated else None
    small = fxfib.tune(MODEL, example_inputs=INPUTS, calibration=calibration, **{kind: share})
    report = small.fibration
    before, after = (
        (report.parameters_before, report.parameters_after)
        if kind == "params"
        else (report.macs_before, report.macs_after)
    )
    assert share - 0.08 < after / before <= share
    torch.testing.assert_close(small(X).shape, MODEL(X).shape)


def test_counts_are_targets_too() -> None:
    small = fxfib.tune(MODEL, example_inputs=INPUTS, params=500)
    assert 400 < small.fibration.parameters_after <= 500


def test_a_loss_is_kept_and_the_promise_is_true() -> None:
    original = loss(MODEL)
    small = fxfib.tune(
        MODEL, DATA, LOSS, example_inputs=INPUTS, max_loss_increase=0.05, calibration=X
    )
    (chosen,) = [p for p in small.fibration.frontier if p.chosen]
    assert chosen.loss == pytest.approx(loss(small), rel=1e-5)
    assert chosen.loss <= original + 0.05
    assert chosen.parameters == small.fibration.parameters_after
    assert small.fibration.parameters_after < 0.7 * small.fibration.parameters_before
    tighter = fxfib.tune(
        MODEL, DATA, LOSS, example_inputs=INPUTS, max_loss_increase=0.005, calibration=X
    )
    assert tighter.fibration.parameters_after > small.fibration.parameters_after


def test_where_any_loss_is_allowed_the_smallest_network_is_taken() -> None:
    small = fxfib.tune(
        MODEL, DATA, LOSS, example_inputs=INPUTS, max_loss_increase=1e6, calibration=X
    )
    assert small.fibration.parameters_after == (6 + 1) + (1 + 1) + (3 + 3)
    assert [p.refined for p in small.fibration.frontier if p.chosen] == [True]


def test_few_networks_are_refined_and_none_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    workshop = importlib.import_module("fxfib.workshop")
    refined, sizes = workshop.refined, []

    def counted(original: Any, small: nn.Module, *given: Any, **options: Any) -> list[str]:
        sizes.append(sum(p.numel() for p in small.parameters()))
        return refined(original, small, *given, **options)

    monkeypatch.setattr(workshop, "refined", counted)
    small = fxfib.tune(
        MODEL, DATA, LOSS, example_inputs=INPUTS, max_loss_increase=0.05, calibration=X
    )
    points = [p for p in small.fibration.frontier if p.refined]
    assert sorted(sizes) == sorted(p.parameters for p in points)
    assert len(points) <= 6
    (chosen,) = [p for p in points if p.chosen]
    monkeypatch.setattr(workshop, "refined", refined)
    again = fxfib.compile(MODEL, chosen.eps, INPUTS, criterion="energy", calibration=X, refine=10)
    torch.testing.assert_close(small(X), again(X))
    assert again.fibration.notes == small.fibration.notes


@pytest.mark.parametrize("few", [True, False])
def test_small_models_are_worked_on_in_one_thread(
    few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that wait for one another on a busy machine take many times as long."""
    workshop = importlib.import_module("fxfib.workshop")
    if not few:
        monkeypatch.setattr(workshop, "FEW_MACS", 1)
    allocation = importlib.import_module("fxfib.allocation")
    refined, compensate, curves = workshop.refined, workshop.compensate, allocation.curves_of
    moved, seen = allocation.sensitivities, []

    def noted(done: Any) -> Any:
        return lambda *given, **options: (
            seen.append(torch.get_num_threads()) or done(*given, **options)
        )

    monkeypatch.setattr(workshop, "refined", noted(refined))
    monkeypatch.setattr(workshop, "compensate", noted(compensate))
    monkeypatch.setattr(allocation, "curves_of", noted(curves))
    monkeypatch.setattr(allocation, "sensitivities", noted(moved))
    with torch_threads(3):
        fxfib.tune(MODEL, example_inputs=INPUTS, params=0.5, calibration=X)
        assert torch.get_num_threads() == 3
    # The judged ways are fitted, too, and the result at last.
    assert len(seen) >= 4 and set(seen) == {1 if few else 3}


def test_a_large_table_is_no_small_model() -> None:
    """Although looking up costs no multiply-accumulates."""
    for rows, threads in ((100, 1), (2**18, 3)):
        model = nn.Sequential(nn.Embedding(rows, 17), nn.Linear(17, 2)).eval()
        with torch_threads(3):
            assert Workshop(model, torch.zeros(2, 5, dtype=torch.long)).threads == threads


def test_any_point_of_the_frontier_can_be_made() -> None:
    small = fxfib.tune(MODEL, example_inputs=INPUTS, params=0.4)
    frontier = small.fibration.frontier
    assert len(frontier) > 8 and sum(p.chosen for p in frontier) == 1
    assert [p.parameters for p in frontier] == sorted(p.parameters for p in frontier)[::-1]
    for point in [p for p in frontier if p.made][:4]:
        again = fxfib.compile(MODEL, point.eps, INPUTS, criterion="energy")
        assert again.fibration.parameters_after == point.parameters
    assert type(small.fibration).from_dict(json.loads(small.fibration.to_json())) == small.fibration


def test_without_a_loss_function_outputs_are_compared() -> None:
    small = fxfib.tune(MODEL, X, example_inputs=INPUTS, max_loss_increase=0.02, calibration=X)
    with torch.no_grad():
        gap = (small(X) - MODEL(X)).double().square().mean() / MODEL(X).double().var(correction=0)
    (chosen,) = [p for p in small.fibration.frontier if p.chosen]
    assert chosen.loss == pytest.approx(float(gap), rel=1e-4)
    assert chosen.loss <= 0.02


@pytest.mark.parametrize("criterion", ["fibration", "cosine"])
def test_the_published_bisection(criterion: str) -> None:
    small = fxfib.tune(
        MODEL, DATA, LOSS, example_inputs=INPUTS, max_loss_increase=0.05, criterion=criterion,
        strategy="bisection",
    )  # fmt: skip
    assert loss(small) <= loss(MODEL) + 0.05 + 1e-6
    assert small.fibration.parameters_after < small.fibration.parameters_before


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    measure = Evaluator.loss

    def interrupted(self: Evaluator, graph_module: torch.fx.GraphModule) -> float:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(measure(self, graph_module))
        return calls[-1]

    target = {"example_inputs": INPUTS, "max_loss_increase": 0.05, "resume": tmp_path / "search"}
    monkeypatch.setattr(Evaluator, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fxfib.tune(MODEL, DATA, LOSS, **target)
    kept = json.loads((tmp_path / "search").read_text())["points"]
    assert len(kept) == 2
    calls.clear()
    monkeypatch.setattr(Evaluator, "loss", lambda s, g: calls.append(0) or measure(s, g))
    small = fxfib.tune(MODEL, DATA, LOSS, **target)
    resumed = len(calls)
    calls.clear()
    fresh = fxfib.tune(MODEL, DATA, LOSS, **{**target, "resume": None})
    assert resumed == len(calls) - 2
    assert small.fibration.parameters_after == fresh.fibration.parameters_after
    # A search of another kind takes nothing from the file.
    calls.clear()
    fxfib.tune(MODEL, DATA, LOSS, **target, compensate=False)
    assert len(calls) > 3


def test_another_version_takes_nothing_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = {"example_inputs": INPUTS, "params": 0.5, "refine": 0, "resume": tmp_path / "search"}
    fxfib.tune(MODEL, **target)
    made, rewritten = [], Workshop.rewritten
    monkeypatch.setattr(Workshop, "rewritten", lambda s, e: made.append(e) or rewritten(s, e))
    fxfib.tune(MODEL, **target)
    again = len(made)
    monkeypatch.setattr("fxfib.frontier.__version__", "0.0.0")
    fxfib.tune(MODEL, **target)
    assert again < len(made) - again


def test_what_is_taken_from_a_file_is_made_again(tmp_path: Path) -> None:
    """And not what this search made before it."""
    file = tmp_path / "search"
    target = {"example_inputs": INPUTS, "max_loss_increase": 0.05, "refine": 0, "resume": file}
    small = fxfib.tune(MODEL, DATA, LOSS, **target)
    content = json.loads(file.read_text())
    (chosen,) = [p for p in small.fibration.frontier if p.chosen]
    within = [
        k
        for k, point in enumerate(content["points"])
        if point["eps"] not in ({}, chosen.eps)
        and point["loss"] is not None
        and point["loss"] <= loss(MODEL) + 0.05
    ]
    del content["points"][within[0]]
    file.write_text(json.dumps(content))
    again = fxfib.tune(MODEL, DATA, LOSS, **target)
    assert again.fibration.parameters_after == small.fibration.parameters_after
    assert loss(again) == loss(small)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "tune needs one of"),
        ({"params": 0.5, "macs": 0.5}, "tune needs one of"),
        ({"latency": 1.5}, "a part of the original's, such as 0.5"),
        ({"latency": "fast"}, "latency must be like '2.5 ms'"),
        ({"latency": "-1 ms"}, "latency must be like '2.5 ms'"),
        ({"latency": 0.5, "macs": 0.5}, "tune needs one of"),
        ({"latency": 0.5, "runtime": "abacus"}, "unknown runtime 'abacus'"),
        ({"params": -1}, "params must be positive"),
        ({"params": 0.5, "round_to": "some"}, "a positive whole number or 'auto'"),
        ({"params": 5}, "params=5 cannot be met: the smallest network"),
        ({"max_loss_increase": 0.1}, "a loss is measured on data"),
        ({"params": 0.5, "criterion": "cosine"}, "the loss of 'cosine' is not predicted"),
        ({"params": 0.5, "strategy": "bisection"}, "needs max_loss_increase"),
        ({"params": 0.5, "strategy": "best"}, "unknown strategy"),
        ({"max_loss_increase": 0.1, "data": iter([])}, "data must be read again"),
        ({"max_loss_increase": 0.1, "data": []}, "data holds no batches"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fxfib.tune(MODEL, options.pop("data", None), example_inputs=INPUTS, **options)


class FakeClock:
    """A millisecond for a hundred multiply-accumulates, and what was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def latency(self, watch: Stopwatch, small: nn.Module) -> Latency:
        weights = sum(p.numel() for p in small.parameters() if p.ndim == 2)
        self.asked.append(weights)
        whole = sum(p.numel() for p in MODEL.parameters() if p.ndim == 2)
        return Latency(weights / 100, weights / whole)


@pytest.mark.parametrize(
    ("target", "most"), [(0.5, 519), ("6 ms", 600), ("0.002 s", 200), ("9e3us", 900)]
)
def test_a_latency_is_met_and_used(
    target: float | str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    monkeypatch.setattr(Stopwatch, "latency", lambda *given: clock.latency(*given))
    options = {"example_inputs": INPUTS, "latency": target, "runtime": "torch"}
    small = fxfib.tune(MODEL, calibration=X, **options)
    (chosen,) = [p for p in small.fibration.frontier if p.chosen]
    assert chosen.macs == small.fibration.macs_after
    assert most - 45 < chosen.macs <= most, "the largest that is fast enough"
    assert chosen.milliseconds == chosen.macs / 100
    assert len(clock.asked) < 14
    assert any("of the original's, of one call" in note for note in small.fibration.notes)
    with pytest.raises(InputError, match=r"cannot be met: the smallest .* takes 0.1 ms"):
        fxfib.tune(MODEL, calibration=X, **{**options, "latency": "0.05 ms"})


def test_what_was_timed_is_not_timed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr(Stopwatch, "latency", lambda *given: clock.latency(*given))
    options = {"example_inputs": INPUTS, "latency": 0.5, "resume": tmp_path / "search"}
    first = fxfib.tune(MODEL, runtime="torch", **options)
    count = len(clock.asked)
    again = fxfib.tune(MODEL, runtime="torch", **options)
    assert len(clock.asked) == count > 2
    assert again.fibration.macs_after == first.fibration.macs_after
    fxfib.tune(MODEL, runtime="onnxruntime", **options)
    assert len(clock.asked) == 2 * count, "times of another runtime are others"


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_latency_by_a_real_clock(runtime: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 700), nn.ReLU(), nn.Linear(700, 600), nn.Linear(600, 5))
    given = torch.randn(3, 64)
    small = fxfib.tune(model.eval(), example_inputs=given, latency=0.6, runtime=runtime)
    (chosen,) = [p for p in small.fibration.frontier if p.chosen]
    assert chosen.latency is not None and chosen.latency <= 0.6
    assert runtime in small.fibration.notes[0]


def test_widths_that_pay_are_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxfib import latency

    times = {width: float(-(-width // 8)) for width in range(33, 65)}
    asked = []

    def measure(runtime: str, *, kinds: list[str], device: str) -> fxfib.Widths:
        asked.append((runtime, kinds, device))
        return fxfib.Widths(runtime, {"linear": times}, "a clock of our own")

    monkeypatch.setattr(latency, "measure_widths", measure)
    small = fxfib.tune(MODEL, example_inputs=INPUTS, params=0.6, round_to="auto")
    assert asked == [("onnxruntime", ["linear"], "cpu")]
    sizes = [small.get_submodule(name).out_features for name in ("0", "2")]
    assert all(size % 8 == 0 for size in sizes) and sizes[0] < 30
    (note,) = [note for note in small.fibration.notes if "round_to=8 was measured" in note]
    assert "linear 1.00 (a clock of our own)" in note


def test_refined_unasked_where_inputs_are_known() -> None:
    def gap(small: nn.Module) -> float:
        with torch.no_grad():
            return float((small(X) - MODEL(X)).square().mean())

    for given in ({}, {"calibration": X}):
        fitted = fxfib.tune(MODEL, example_inputs=INPUTS, params=0.2, refine=0, **given)
        refined = fxfib.tune(MODEL, example_inputs=INPUTS, params=0.2, **given)
        assert gap(refined) < gap(fitted)
        assert [p.refined for p in refined.fibration.frontier if p.chosen] == [True]
    images = torch.randn(2, 3, 6, 6)
    convolution = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))
    assert Workshop(convolution.eval(), images, refine=None).refine == 0
    assert Workshop(convolution.eval(), images, refine=None, calibration=images).refine > 0
    assert Workshop(MODEL, INPUTS, refine=None, compensate=False).refine == 0


def test_fresh_noise_in_every_pass_and_the_same_twice() -> None:
    workshop = Workshop(MODEL, INPUTS, refine=None)
    first, second = workshop.inputs(1)[0][0], workshop.inputs(2)[0][0]
    assert first.shape == second.shape and not torch.equal(first, second)
    assert torch.equal(first, workshop.inputs(1)[0][0])
    calibrated = Workshop(MODEL, INPUTS, refine=None, calibration=X)
    assert calibrated.inputs(1) is calibrated.inputs(2)
    once, again = (fxfib.tune(MODEL, example_inputs=INPUTS, params=0.3) for _ in range(2))
    torch.testing.assert_close(once(X), again(X), rtol=0, atol=0)


def test_a_file_of_other_data_tells_nothing(tmp_path: Path) -> None:
    """Without a loss function the original's loss is 0 on all data."""
    path = str(tmp_path / "search.json")
    options = {
        "example_inputs": INPUTS, "max_loss_increase": 0.05, "calibration": X, "refine": 0,
    }  # fmt: skip
    fxfib.tune(MODEL, [X[:100]], resume=path, **options)
    again = fxfib.tune(MODEL, [4 * X[:100]], resume=path, **options)
    fresh = fxfib.tune(MODEL, [4 * X[:100]], **options)
    assert again.fibration.frontier == fresh.fibration.frontier


@pytest.mark.parametrize("loss_fn", [None, LOSS])
def test_no_loss_at_all_is_what_exact_merging_gives(loss_fn: Any) -> None:
    """But for sums in another order."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)
    ).eval()
    with torch.no_grad():
        for layer, a, b in ((model[0], 5, 3), (model[2], 7, 4)):
            layer.weight[a], layer.bias[a] = layer.weight[b], layer.bias[b]
    data = DATA if loss_fn else [X]
    small = fxfib.tune(
        model, data, loss_fn, example_inputs=INPUTS, max_loss_increase=0, calibration=X, refine=0
    )
    exact = fxfib.compile(model, 0.0, INPUTS)
    counts = [sum(p.numel() for p in m.parameters()) for m in (small, exact)]
    assert counts[0] <= counts[1] < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_before_a_batch_norm(kind: type[nn.RNNBase]) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = kind(6, 12, batch_first=True)
            self.norm = nn.BatchNorm1d(12)
            self.last = nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.norm(self.layer(x)[0][:, -1]))

    torch.manual_seed(0)
    model, x = Reader().eval(), torch.randn(60, 9, 6)
    small = fxfib.tune(model, example_inputs=(x[:4],), params=0.6, calibration=x, refine=0)
    whole = sum(p.numel() for p in model.parameters())
    assert 0.4 * whole < sum(p.numel() for p in small.parameters()) <= 0.6 * whole


def test_it_is_said_what_stays_and_why() -> None:
    options = {"example_inputs": INPUTS, "params": 0.5, "calibration": X}
    with pytest.raises(InputError, match=r"could merge\. All nodes stay of: 0 \(the user asked"):
        fxfib.tune(MODEL, skip=["*"], **options)

    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 20), nn.Linear(20, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x).sort(1)[0])

    with pytest.raises(InputError, match=r"first \(aten.sort.* no rule for this op\)\.$"):
        fxfib.tune(Sorted().eval(), **options)
