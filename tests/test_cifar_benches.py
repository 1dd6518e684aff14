"""The benches of CIFAR-10 networks and of what tune costs, on small stand-ins."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn


def load(repository: Path, name: str) -> ModuleType:
    sys.path.insert(0, str(repository / "bench"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def training(repository: Path) -> ModuleType:
    return load(repository, "cifar_training")


@pytest.fixture(scope="module")
def tune_cost(repository: Path) -> ModuleType:
    return load(repository, "tune_cost")


def test_it_has_the_published_size(training: ModuleType) -> None:
    model = training.ResNet18(64)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    assert training.ResNet18(3).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_a_vgg_keeps_its_shapes(training: ModuleType) -> None:
    model = training.Vgg(3).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    widths = [m.out_channels for m in model if isinstance(m, nn.Conv2d)]
    assert widths == [3, 3, 6, 6, 12, 12]


def test_a_bench_knows_the_networks_by_width_and_epochs(
    training: ModuleType, repository: Path, tmp_path: Path
) -> None:
    cases = load(repository, "accuracy_networks").CASES
    assert {"cifar_resnet18_w16_e12", "cifar_resnet18_w64_e6", "cifar_vgg_w32_e8"} <= set(cases)
    case = cases["cifar_resnet18_w64_e6"]
    model = case.build(tmp_path)
    assert model.conv1.out_channels == 64
    with pytest.raises((OSError, RuntimeError)):  # an epoch is missing, and so are the images
        torch.save({"epoch": 5}, tmp_path / "kept.pt")
        case.train(model, tmp_path, None, 0, tmp_path / "kept.pt")
    torch.save({"epoch": 6, "model": training.ResNet18(64).state_dict()}, tmp_path / "kept.pt")
    case.train(model, tmp_path, None, 0, tmp_path / "kept.pt")


def test_training_says_what_it_lacks(
    training: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.main(["vgg", "--data-root", str(tmp_path)]) == 1
    assert "the data cannot be had" in capsys.readouterr().err


def test_images_are_moved_and_flipped_and_nothing_else(training: ModuleType) -> None:
    images = torch.rand(40, 3, 32, 32) + 1
    found = training.augmented(images, torch.Generator().manual_seed(0))
    pad = training.PAD
    flipped = 0
    for image, made in zip(nn.functional.pad(images, (pad,) * 4), found, strict=True):
        windows = [image[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
        straight = any(torch.equal(w, made) for w in windows)
        assert straight or any(torch.equal(w.flip(2), made) for w in windows)
        flipped += not straight
    assert 10 < flipped < 30
    assert not torch.equal(found[0], images[0]) or not torch.equal(found[1], images[1])


def test_what_is_held_out_is_not_trained_on(training: ModuleType) -> None:
    labels = torch.arange(10).repeat_interleave(600)
    places = torch.arange(6000)
    kept, of = training.split(places, labels, False)
    held, wanted = training.split(places, labels, True)
    assert len(kept) == 1000
    assert len(held) == 5000
    assert not set(kept.tolist()) & set(held.tolist())
    assert torch.equal(of.bincount(), torch.full((10,), 100))
    assert torch.equal(wanted.bincount(), torch.full((10,), 500))


def test_a_training_goes_on_as_if_nothing_had_been(
    training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    images = torch.randint(256, (560, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(10, (560,))

    def trained(path: Path) -> nn.Module:
        torch.manual_seed(1)
        model = training.ResNet18(2)
        return training.train(model, images, labels, 0, 2, path)

    whole = trained(tmp_path / "whole.pt")

    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "print", stop, raising=False)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts.pt")
    monkeypatch.undo()
    assert torch.load(tmp_path / "parts.pt")["epoch"] == 1
    parts = trained(tmp_path / "parts.pt")
    for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    fresh = training.ResNet18(2)
    training.complete(fresh, tmp_path / "no images", 0, tmp_path / "parts.pt", 2)
    assert torch.equal(fresh.fc.weight, parts.fc.weight)


def test_a_longer_search_starts_from_what_was_found(
    tune_cost: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 23), nn.ReLU(), nn.Linear(23, 19), nn.ReLU(),
                          nn.Linear(19, 3)).eval()  # fmt: skip
    inputs = torch.randn(400, 7)
    labels = model(inputs).argmax(1)
    data = tune_cost.Data((inputs, labels), (inputs, labels))
    monkeypatch.setattr(tune_cost, "VALIDATION", 100)  # and 100 that neither search sees
    monkeypatch.setattr(tune_cost, "network", lambda aim, root, cache: (model, data, 200))
    aim = tune_cost.Aim("", {"max_loss_increase": 0.05})
    monkeypatch.setitem(tune_cost.AIMS, "small", aim)
    path = tmp_path / "rows.csv"
    given = ["--data-root", str(tmp_path), "--cache", str(tmp_path), "--output", str(path),
             "--case", "small"]  # fmt: skip
    tune_cost.main([*given, "--longer", "0"])
    (default,) = tune_cost.read(path)
    assert default["ratio"] == "" and float(default["cpu_seconds"]) > 0
    tune_cost.main([*given, "--longer", "2"])
    (row,) = tune_cost.read(path)
    assert {key: row[key] for key in ("seconds", "found")} == {
        key: default[key] for key in ("seconds", "found")
    }
    found, longer = int(row["found"]), int(row["longer_found"])
    assert longer <= found < int(row["parameters"])
    assert float(row["ratio"]) == round(found / longer, 4) >= 1
    assert float(row["loss_increase"]) <= 0.05
    assert int(row["longer_evaluations"]) > 0
    assert float(row["unseen_ratio"]) == round(int(row["unseen_found"]) / longer, 4)
    if longer == found:
        assert row["unseen_increase"] == row["longer_unseen_increase"]
    before = path.read_text()
    tune_cost.main([*given, "--longer", "2"])  # nothing is missing
    assert path.read_text() == before
