"""Watching a training run: what is seen is what is there, and nothing is touched."""

from __future__ import annotations

import copy
import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfib
from fxfib import monitor as monitor_module
from fxfib.errors import InputError
from fxfib.history import COLUMNS, History, Look, changes
from fxfib.vital_signs import VitalSigns, dead_of, effective_rank


def twins() -> nn.Sequential:
    """Nodes 1 and 4 of the first layer are one cover."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = model[0].weight[1], model[0].bias[1]
        model[2].weight[:, 4] = model[2].weight[:, 1]
    return model.double()


def inputs(seed: int = 1, count: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, dtype=torch.float64, generator=generator)


def exact(model: nn.Module, **options: Any) -> fxfib.Monitor:
    return fxfib.Monitor(model, inputs(), 1e-9, **{"every": 1, **options}, criterion="fibration")


def test_what_is_seen_is_what_is_there() -> None:
    model = twins()
    monitor = exact(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(1, 6):
        optimizer.zero_grad()
        (model(inputs(step)) - 1).square().mean().backward()
        optimizer.step()
        look = monitor.step()
        assert look is monitor.history.looks[-1]
        for symmetry, found in look.labels.items():
            colors = fxfib.color(model, inputs(), 1e-9, symmetry)
            if symmetry != "fiber":  # those of `color` are up to a factor
                assert {k: v.tolist() for k, v in found.items()} == {
                    k: v.tolist() for k, v in colors.labels.items()
                }
        assert look.labels["cover"]["0"].tolist() == [0, 1, 2, 3, 1]
    assert monitor.transitions() == ()
    with torch.no_grad():
        model[2].weight[0, 4] += 0.5  # two covers, still one fiber
    monitor.step()
    with torch.no_grad():
        for part, axis in ((model[0].weight, 0), (model[0].bias, 0), (model[2].weight, 1)):
            for to in (2, 4):
                part.select(axis, to).copy_(part.select(axis, 1))
    monitor.step()
    split, merge = monitor.transitions()
    assert (split.kind, split.since, split.step, split.layer) == ("split", 5, 6, "0")
    assert split.parts == ((1,), (4,))
    assert (merge.kind, merge.step, merge.parts) == ("merge", 7, ((1,), (2,), (4,)))
    assert monitor.history.counts("0", "cover").tolist() == [4, 4, 4, 4, 4, 4, 5, 3]
    assert monitor.history.singles("0", "cover").tolist() == [3, 3, 3, 3, 3, 3, 5, 2]
    assert monitor.history.inputs == {"0": (), "2": ("0",), "4": ("2",)}
    first, *_, last = [row for row in monitor.history.rows() if row["layer"] == "0"]
    assert (first["covers_merged"], last["covers_merged"], last["covers_split"]) == (0, 2, 0)
    assert last["cover_sizes"] == "1x2 3x1"
    assert last["cover_largest"] == 3


class Various(nn.Module):
    """What a layer's nodes go through before they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.inner, self.drop = nn.Linear(80, 7), nn.Dropout(0.5)
        self.cell, self.last = nn.LSTM(7, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2).flatten(1)
        x = self.drop(torch.tanh(self.inner(x)))
        return self.last(self.cell(x[:, None])[0][:, 0])


def test_vital_signs() -> None:
    torch.manual_seed(3)
    model = Various()
    with torch.no_grad():
        model.norm.bias[2] = -100.0  # never opens
        model.inner.weight[3], model.inner.bias[3] = 0.0, 0.5  # the same for all
    x = torch.randn(6, 3, 8, 8)
    monitor = fxfib.Monitor(model, x)
    signs = monitor.history.looks[0].signs
    assert signs["conv"].dead == 1
    assert signs["inner"].dead == 1
    assert signs["last"].dead == 0
    hidden = next(own for name, own in signs.items() if name.startswith("cell"))
    assert hidden.dead is None and hidden.effective_rank is None
    model.eval()
    with torch.no_grad():
        y = torch.tanh(model.inner(F.max_pool2d(F.relu(model.norm(model.conv(x))), 2).flatten(1)))
    singular = torch.linalg.svdvals(y.double())
    share = singular / singular.sum()
    expected = math.exp(-float((share * share.log()).sum()))
    assert signs["inner"].effective_rank == pytest.approx(expected, rel=1e-6)
    norm = sum(float(p.detach().square().sum()) for p in model.inner.parameters()) ** 0.5
    assert signs["inner"].weight_norm == pytest.approx(norm, rel=1e-6)


def test_effective_rank_and_dead_nodes_of_known_tables() -> None:
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.ones(400, 3)) == pytest.approx(1, abs=1e-5)
    assert effective_rank(torch.zeros(4, 3)) == 0
    assert math.isnan(effective_rank(torch.tensor([[1.0, torch.inf]])))
    assert dead_of(torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.1]])) == 2
    assert dead_of(torch.zeros(1, 3)) == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at everything
@pytest.mark.parametrize("way", ["plain", "compiled", "bfloat16", "accumulated"])
def test_training_is_the_same_with_a_monitor_and_without(way: str) -> None:
    """Dropout, batch norm, groups: every parameter, buffer, gradient and random state."""
    ends = []
    for watched in (False, True):
        torch.manual_seed(4)
        model = Various()
        model.norm.eval()  # a part may be in a mode of its own
        x, y = torch.randn(5, 8, 3, 8, 8), torch.randint(0, 2, (5, 8))
        rest = [p for name, p in model.named_parameters() if not name.startswith("conv")]
        groups = [{"params": model.conv.parameters(), "lr": 0.01}, {"params": rest}]
        optimizer = torch.optim.AdamW(groups, lr=0.02)
        run = torch.compile(model, backend="aot_eager") if way == "compiled" else model
        modes = [part.training for part in model.modules()]
        monitor = fxfib.Monitor(run, x[0], every=2) if watched else None
        for a, b in zip(x, y, strict=True):
            parts = 2 if way == "accumulated" else 1
            for part, labels in zip(a.chunk(parts), b.chunk(parts), strict=True):
                with torch.autocast("cpu", torch.bfloat16, enabled=way == "bfloat16"):
                    F.cross_entropy(run(part), labels).backward()
                    if monitor is not None:
                        monitor.look()  # in the middle of everything
            optimizer.step()
            if monitor is not None:
                monitor.step()
            optimizer.zero_grad()
        F.cross_entropy(run(x[0]), y[0]).backward()
        assert [part.training for part in model.modules()] == modes
        grads = [p.grad for p in model.parameters()]
        ends.append([*model.state_dict().values(), *grads, torch.get_rng_state()])
        if monitor is not None:
            assert [look.step for look in monitor.history.looks] == [0, 1, 2, 3, 4]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_weights_are_those_of_now_and_in_full_precision() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 5)), nn.Linear(5, 2))
    monitor = fxfib.Monitor(model, torch.randn(4, 3), 1e-6, criterion="fibration", every=1)
    with torch.no_grad():
        model[0].parametrizations.weight.original1[3] = model[0].parametrizations.weight.original1[
            1
        ]
        model[0].parametrizations.weight.original0[3] = model[0].parametrizations.weight.original0[
            1
        ]
        model[0].bias[3] = model[0].bias[1]
    with torch.autocast("cpu", torch.bfloat16):
        monitor.step()
    (name,) = [n for n, size in monitor.history.layers.items() if size == 5]
    assert monitor.history.counts(name).tolist() == [5, 4]


def test_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    batches = torch.stack([inputs(seed) for seed in range(8)])

    def start(name: str) -> tuple[nn.Module, torch.optim.Optimizer, fxfib.Monitor]:
        model = twins()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        return model, optimizer, exact(model, every=3, csv=tmp_path / name)

    def go(model: Any, optimizer: Any, monitor: fxfib.Monitor, some: torch.Tensor) -> None:
        for x in some:
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            optimizer.step()
            if monitor.step():
                monitor.log(loss=loss)

    model, optimizer, monitor = start("one.csv")
    go(model, optimizer, monitor, batches[:4])
    torch.save([part.state_dict() for part in (model, optimizer, monitor)], tmp_path / "saved.pt")
    go(model, optimizer, monitor, batches[4:])
    again = start("two.csv")
    for part, state in zip(
        again, torch.load(tmp_path / "saved.pt", weights_only=True), strict=True
    ):
        part.load_state_dict(state)
    go(*again, batches[4:])
    assert list(again[2].history.rows()) == list(monitor.history.rows())
    assert again[2].history.logged == monitor.history.logged
    assert [look.step for look in monitor.history.looks] == [0, 3, 6]
    monitor.to_csv(tmp_path / "whole.csv")
    whole = (tmp_path / "whole.csv").read_text()
    assert whole == (tmp_path / "one.csv").read_text() == (tmp_path / "two.csv").read_text()
    with pytest.raises(InputError, match="measured with"):
        fxfib.Monitor(model, inputs()).load_state_dict(monitor.state_dict())
    other = nn.Sequential(nn.Linear(3, 2)).double()
    with pytest.raises(InputError, match="other layers"):
        exact(other).load_state_dict(monitor.state_dict())


def test_equal_labels_are_kept_once() -> None:
    model = twins()
    monitor = exact(model)
    monitor.step()
    one, two = (look.labels["cover"]["0"] for look in monitor.history.looks)
    assert one is two
    copied = copy.deepcopy(monitor.state_dict())["history"]["looks"]
    assert copied[0]["labels"]["cover"]["0"] is copied[1]["labels"]["cover"]["0"]


def test_csv_files_and_a_writer(tmp_path: Path) -> None:
    class Writer:
        def __init__(self) -> None:
            self.seen: dict[tuple[str, int], float] = {}

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.seen[tag, step] = value

    model, writer = twins(), Writer()
    monitor = exact(model, csv=tmp_path / "run.csv", writer=writer)
    with torch.no_grad():
        model[0].bias[4] += 1
    monitor.step()
    monitor.log(accuracy=torch.tensor(0.5))
    monitor.look()  # a second one at the same step replaces the first
    with (tmp_path / "run.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [(r["step"], r["layer"], r["covers"]) for r in rows if r["layer"] == "0"] == [
        ("0", "0", "4"), ("1", "0", "5"),
    ]  # fmt: skip
    assert writer.seen["covers/0", 0] == 4 and writer.seen["covers/0", 1] == 5
    assert writer.seen["accuracy", 1] == 0.5
    for what, expected in (("transitions", "split"), ("logged", "accuracy")):
        monitor.to_csv(tmp_path / "more.csv", what)
        assert expected in (tmp_path / "more.csv").read_text()
    with pytest.raises(InputError, match="what must be"):
        monitor.to_csv(tmp_path / "more.csv", "all")
    with pytest.raises(InputError, match="unknown symmetry"):
        monitor.transitions("group")


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        exact(twins(), writer=writer).step()
    assert any(tmp_path.iterdir())


def test_looking_stays_within_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def clock() -> float:
        return now

    monkeypatch.setattr(monitor_module.time, "perf_counter", clock)
    model = twins()
    monitor = exact(model, every=None, share=0.05)
    right = monitor._look

    def slow() -> Any:
        nonlocal now
        now += 0.3
        return right()

    monkeypatch.setattr(monitor, "_look", slow)
    monitor.look()  # at once, whatever it costs
    seen = []
    for step in range(1, 3001):
        now += 0.01
        if monitor.step():
            seen.append(step)
            assert monitor.seconds["looks"] <= 0.05 * monitor.seconds["training"] + 1e-9
    assert monitor.seconds["training"] == pytest.approx(30)
    assert seen == pytest.approx([1200, 1800, 2400, 3000], abs=2)


def test_broken_weights_are_told_and_training_goes_on() -> None:
    model = twins()
    monitor = exact(model)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.warns(UserWarning, match="2.weight holds NaN or infinity at step 1"):
        assert monitor.step() is None
    with torch.no_grad():
        model[2].weight[0, 0] = 0.0
    assert monitor.step() is not None
    assert [look.step for look in monitor.history.looks] == [0, 2]


@pytest.mark.parametrize(
    "options",
    [{"every": 0}, {"share": 1.0}, {"eps": -1.0}, {"criterion": "energy"}, {"writer": object()}],
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        fxfib.Monitor(twins(), inputs(), **options)


def test_histories_do_not_go_back() -> None:
    labels = {k: {"a": torch.tensor([0, 1, 0])} for k in ("fiber", "opfiber", "cover")}
    history = History({"a": ()})
    history.add(Look(5, labels, {"a": VitalSigns(0, 1.0, 1.0)}))
    with pytest.raises(InputError, match="cannot follow"):
        history.add(Look(4, labels, {"a": VitalSigns(0, 1.0, 1.0)}))
    assert changes(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1])) == (2, 1)


def test_figures() -> None:
    pytest.importorskip("matplotlib")
    model = twins()
    monitor = exact(model)
    monitor.log(**{"loss $x$": 1.0, "accuracy": 0.3})
    monitor.step()
    monitor.log(accuracy=0.4)
    together, layers, signs = monitor.plot()
    drawn = {line.get_label(): line.get_ydata().tolist() for line in together.axes[0].lines}
    assert drawn["0"] == [0.6, 0.6]
    assert len(together.axes) == 3
    assert len(layers.axes) == 3 and len(signs.axes) == 3
    for figure in (together, layers, signs):
        figure.canvas.draw()


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = twins()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            loss = (self(batch) - 1).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.DataLoader([inputs(seed, 1)[0] for seed in range(24)], batch_size=2)

    def fit(module: Any, monitor: fxfib.Monitor, epochs: int, resume: str | None = None) -> Any:
        trainer = lightning.Trainer(
            max_epochs=epochs, accumulate_grad_batches=3, callbacks=[monitor.callback()],
            logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, accelerator="cpu", enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=resume)
        return trainer

    module = Module()
    monitor = exact(module, every=2)
    trainer = fit(module, monitor, 1)
    assert [look.step for look in monitor.history.looks] == [0, 2, 4]  # of the optimizer
    assert monitor.history.counts("net.0", "cover").tolist() == [4, 4, 4]
    assert (4, "loss") in monitor.history.logged
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    other = Module()
    second = exact(other, every=2)
    fit(other, second, 2, str(tmp_path / "half.ckpt"))
    assert [look.step for look in second.history.looks] == [0, 2, 4, 6, 8]
    assert (2, "loss") in second.history.logged


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_any_weight_that_is_not_finite_is_told(number: float) -> None:
    model = twins()
    monitor = exact(model)
    with torch.no_grad():
        model[2].weight[3, 1] = number
    with pytest.warns(UserWarning, match=r"2\.weight holds NaN or infinity at step 1"):
        assert monitor.step() is None


def test_minus_infinity_in_a_mask_is_fine() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
            self.register_buffer("mask", torch.full((9, 9), -math.inf).triu(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b((x @ x.T + self.mask).softmax(-1) @ self.a(x).tanh())

    assert exact(Masked().double()).step() is not None


def _another_width(model: nn.Sequential) -> None:
    model[2], model[4] = nn.Linear(5, 6).double(), nn.Linear(6, 2).double()


def _another_dtype(model: nn.Sequential) -> None:
    model.float()


def _one_less(model: nn.Sequential) -> None:
    model[4] = nn.Identity()  # type: ignore[assignment]


@pytest.mark.parametrize("change", [_another_width, _another_dtype, _one_less])
def test_changed_layers_ask_for_another_monitor(change: Any) -> None:
    model = twins()
    monitor = exact(model)
    change(model)
    with pytest.raises(InputError, match="make a new Monitor"):
        monitor.step()


def test_one_example_without_a_batch() -> None:
    look = fxfib.Monitor(twins(), inputs()[0], every=1).step()
    assert look is not None
    assert look.signs["0"].effective_rank == pytest.approx(1.0)


@pytest.mark.parametrize("value", [torch.ones(3), "much"])
def test_what_is_no_number_is_not_logged(value: Any) -> None:
    with pytest.raises(InputError, match="loss is no number"):
        exact(twins()).log(loss=value)
