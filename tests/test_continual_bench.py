"""The continual-learning bench on small stand-ins: resumed, equal work, nothing is invented."""

import csv
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn


@pytest.fixture(scope="module")
def bench(repository: Path) -> Any:
    sys.path.insert(0, str(repository / "bench"))
    names = ("continual", "continual_methods", "continual_tasks", "continual_plot")
    try:
        return SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.pop(0)


def setting(bench: Any, **changed: Any) -> Any:
    """Random images, labels by the sign of a random direction."""

    def stream(seed: int, number: int) -> Any:
        source = bench.continual_tasks.generator(seed, number)
        images = torch.randn(90, 6, generator=source)
        labels = (images @ torch.randn(6, generator=source) > 0).long()
        return bench.continual_tasks.Task(images[:60], labels[:60], images[60:], labels[60:])

    def network() -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 2)
        )

    options = {"tasks": 4, "passes": 3, "batch": 12, "lr": 0.05, "momentum": 0.9}
    made = options | {"fresh_head": False} | changed
    return bench.continual_tasks.Setting(stream, network, **made)


@pytest.mark.parametrize("method", ["backprop", "breaking"])
def test_weight_decay_can_go_with_both_ways_to_renew_nodes(bench: Any, method: str) -> None:
    own = setting(bench)
    made = bench.continual_methods.METHODS[method]
    for decay in (0.0, 0.25):
        model = own.network()
        optimizer, _ = made(model, torch.randn(5, 6), own, dict(EAGER[method], decay=decay))
        assert [group["weight_decay"] for group in optimizer.param_groups] == [decay]


def plain(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What does not depend on the clock."""
    return [{k: str(v) for k, v in r.items() if "seconds" not in k} for r in rows]


EAGER = {
    "sgd": {}, "l2": {"decay": 1e-3}, "shrink": {"shrink": 1e-3, "perturb": 1e-2},
    "backprop": {"replacement_rate": 0.05, "maturity": 4, "decay": 1e-3},
    "breaking": {"criterion": "energy", "eps": 1e-2, "every": 2, "maturity": 4,
                 "replacement_rate": 0.05, "examples": 50},
    "covers": {"criterion": "cosine", "eps": 0.8, "every": 5, "maturity": 4,
               "replacement_rate": 0.2},
}  # fmt: skip


@pytest.mark.parametrize("method", EAGER)
def test_a_run_goes_on_as_if_nothing_had_happened(
    bench: Any, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(EAGER) == set(bench.continual_methods.METHODS)
    plan = [(method, EAGER[method], 3)]
    own = setting(bench)
    (tmp_path / "straight").mkdir()
    straight = bench.continual.perform(
        "toy", own, plan, tmp_path / "straight" / "x.csv", tmp_path / "straight", 4
    )
    path, real = tmp_path / "x.csv", bench.continual.Run.next

    def stopping(run: Any) -> Any:
        if len(run.rows) == 2:
            raise KeyboardInterrupt
        return real(run)

    monkeypatch.setattr(bench.continual.Run, "next", stopping)
    with pytest.raises(KeyboardInterrupt):
        bench.continual.perform("toy", own, plan, path, tmp_path, 4, every=0.0)
    monkeypatch.setattr(bench.continual.Run, "next", real)
    with path.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2
    torch.manual_seed(99)
    bench.continual.perform("toy", own, plan, path, tmp_path, 4)
    again = bench.continual.read(path)
    assert plain(again) == plain(straight)
    assert len(again) == 4
    if method in ("backprop", "breaking", "covers"):
        assert sum(int(row["replaced"]) for row in again) > 0
    # What is there is not run again.
    monkeypatch.setattr(bench.continual.Run, "next", stopping)
    assert plain(bench.continual.perform("toy", own, plan, path, tmp_path, 4)) == plain(again)
    assert method in bench.continual.table(again)


def test_a_fresh_head_starts_at_zero(bench: Any) -> None:
    for fresh, accuracy in ((True, 0.0), (False, None)):
        own = setting(bench, fresh_head=fresh, lr=0.0, passes=1)
        run = bench.continual.Run(own, "sgd", {}, 0)
        run.next()
        assert bool((run.model[-1].weight == 0).all()) == fresh
        assert accuracy is None or run.rows[0]["accuracy"] >= accuracy


def test_figures_of_hidden_layers(bench: Any) -> None:
    table = torch.randn(5, 200)
    table[3], table[4] = 2 * table[0] + 1, 0.0
    assert bench.continual.redundant_rows(table) == 2
    table[3] = -table[0]  # reads the other way: no cover
    assert bench.continual.redundant_rows(table) == 1


def test_pairs_take_every_class_once_a_lap(bench: Any) -> None:
    pairs = bench.continual_tasks.ClassPairs(
        lambda label: torch.full((5, 1), float(label)), lambda label: torch.full((3, 1), 1.0),
        7, (4, 2),
    )  # fmt: skip
    lap = [pairs(0, number) for number in range(6)]
    for part in (lap[:3], lap[3:]):
        assert len({float(x) for task in part for x in task.images.flatten()}) == 6
    assert [float(t.images[0]) for t in lap[:3]] != [float(t.images[0]) for t in lap[3:]]
    assert lap[0].labels.tolist() == [0] * 4 + [1] * 4 and len(lap[0].test_images) == 4
    with pytest.raises(RuntimeError, match="not 6"):
        bench.continual_tasks.ClassPairs(pairs.sources[0], pairs.sources[1], 7, (6, 2))(0, 0)


def test_random_labels_are_drawn_anew_for_every_task(bench: Any) -> None:
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(-1, 3, 2, 2)
    labels = bench.continual_tasks.RandomLabels(images, 20)
    task, same, other = labels(1, 0), labels(1, 0), labels(1, 1)
    assert task.labels.tolist().count(1) == 10
    assert torch.equal(task.images, same.images) and torch.equal(task.test_images, task.images)
    assert len({float(x[0, 0, 0]) for x in task.images}) == 20
    assert task.images.amin() >= -0.5 and task.images.amax() <= 49 / 255 - 0.5
    # Some image of both tasks has the other label.
    first, second = (
        {float(x[0, 0, 0]): int(y) for x, y in zip(t.images, t.labels, strict=True)}
        for t in (task, other)
    )
    assert any(first[x] != second[x] for x in first.keys() & second.keys())
    assert bench.continual_tasks.JUDGED == {
        "mnist": "accuracy", "cifar": "online", "pairs": "accuracy", "imagenet": "accuracy",
    }  # fmt: skip


def test_the_published_network_pools_before_the_relu(bench: Any) -> None:
    torch.manual_seed(3)
    network, images = bench.continual_tasks.convolutional(), torch.rand(4, 3, 32, 32)
    assert [tuple(p.shape) for p in network.parameters() if p.ndim > 1] == [
        (32, 3, 5, 5), (64, 32, 3, 3), (128, 64, 3, 3), (128, 512), (128, 128), (2, 128),
    ]  # fmt: skip
    hidden = images
    for layer in network:
        if isinstance(layer, (nn.MaxPool2d, nn.ReLU)):
            continue
        hidden = layer(hidden)
        if isinstance(layer, nn.Conv2d):
            hidden = nn.functional.max_pool2d(torch.relu(hidden), 2)
        elif isinstance(layer, nn.Linear) and layer is not network[-1]:
            hidden = torch.relu(hidden)
    torch.testing.assert_close(network(images), hidden)


def test_a_folder_of_images(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    for label in ("a", "b", "c"):
        (tmp_path / "train" / label).mkdir(parents=True)
        for k in range(700 if label != "c" else 2):
            picture = image.new("RGB", (40, 48) if k == 650 else (32, 32), (k % 256, 9, 200))
            picture.save(tmp_path / "train" / label / f"{k:04}.png", compress_level=0)
    own = bench.continual_tasks.ImageNet(str(tmp_path))
    assert own.images(1).shape == (700, 3, 32, 32)
    assert own.images(1)[3, :, 0, 0].tolist() == [3, 9, 200]
    with pytest.raises(RuntimeError, match="has 2 images"):
        own.images(2)
    own.folders = own.folders[:2]
    task = own.stream()(0, 0)
    assert task.images.shape == (1200, 3, 32, 32) and task.test_labels.tolist().count(1) == 100
    monkeypatch.delenv("FXFIB_DATA", raising=False)
    assert bench.continual.main(["imagenet"]) == 1
    assert bench.continual.main(["imagenet", "--data-root", str(tmp_path / "train" / "a")]) == 1


def test_the_best_options_are_those_of_the_tuning_seeds(bench: Any) -> None:
    first, second = bench.continual_methods.OPTIONS["l2"][:2]
    name = bench.continual_methods.name_of
    rows = [
        {"method": "l2", "options": name(o), "seed": s, "task": t, "accuracy": a}
        for o, a in ((first, 50.0), (second, 60.0)) for s in (1000, 1001) for t in range(8)
    ]  # fmt: skip
    assert bench.continual.chosen("mnist", "l2", []) == first
    assert bench.continual.chosen("mnist", "l2", rows) == second
    online = [{**row, "online": 100 - row["accuracy"]} for row in rows]
    assert bench.continual.chosen("cifar", "l2", online) == first
    assert set(bench.continual_methods.OPTIONS) == set(bench.continual_methods.METHODS)


def test_a_picture_from_rows_alone(bench: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    columns = bench.continual_plot.PANELS
    rows = [
        {"method": m, "options": "", "seed": s, "task": t, **dict.fromkeys(columns, t + s)}
        for m in ("sgd", "l2") for s in (0, 1) for t in range(9)
    ]  # fmt: skip
    middles, seeds = bench.continual_plot.binned(rows, "sgd", "rank", bins=3)
    assert middles == [1.5, 4.5, 7.5] and seeds == [[1, 2], [4, 5], [7, 8]]
    bench.continual_plot.plot(rows, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
