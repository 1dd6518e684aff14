"""Correlations in a stream beside those of everything at once, and fibers inside clusters."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfib
from fxfib import activities
from fxfib.activities import Moments, clusters_of
from fxfib.errors import InputError

from strategies import plant


def network() -> nn.Sequential:
    """Nodes 0 and 3 of the first layer are one fiber, 5 never opens."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 7, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(28, 5), nn.Tanh(),
        nn.Linear(5, 3),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = model[0].weight[0], model[0].bias[0]
        model[0].bias[5] = -100
    return model.double()


def batches(count: int = 6, size: int = 11) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        y = torch.randint(0, 3, (size,), generator=generator)
        x = (
            torch.randn(size, 2, 6, 6, generator=generator, dtype=torch.float64)
            + y[:, None, None, None]
        )
        found.append((x, y))
    return found


def test_a_stream_gives_what_everything_at_once_gives() -> None:
    model, data = network().train(), batches()
    found = fxfib.synchrony(model, data, threshold=0.9)
    assert model.training
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    with torch.no_grad():
        first = F.relu(model[0](x)).permute(0, 2, 3, 1)
        second = torch.tanh(model[4](F.max_pool2d(F.relu(model[0](x)), 2).flatten(1)))
    assert found.holds
    assert found.notes == ()
    for name, values in (("0", first), ("4", second)):
        layer = found.layers[name]
        assert list(layer.correlation) == [None, 0, 1, 2]
        for label, own in layer.correlation.items():
            some = values if label is None else values[y == label]
            rows = some.reshape(-1, values.shape[-1]).numpy()
            assert layer.rows[label] == len(rows)
            moving = rows.std(0) > 0
            expected = np.corrcoef(rows.T[moving])
            assert np.allclose(own.numpy()[np.ix_(moving, moving)], expected, rtol=0, atol=1e-9)
            assert layer.constant[label].tolist() == (~moving).tolist()
            assert not own.numpy()[np.ix_(moving, ~moving)].any()
    assert found.layers["0"].constant[None].tolist() == [k == 5 for k in range(7)]
    one = found.layers["0"].clusters[None]
    assert one[0] == one[3]


def test_a_large_mean_costs_no_digits() -> None:
    torch.manual_seed(2)
    rows = 1e6 + torch.randn(500, 3, dtype=torch.float64)
    moments = Moments(rows[0], rows.dtype)
    for part in rows.split(77):
        moments.add(part)
    found, constant = moments.correlation()
    assert np.allclose(found.numpy(), np.corrcoef(rows.T.numpy()), rtol=0, atol=1e-9)
    assert not constant.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_in_one_class_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    first = torch.randn(40, 3, dtype=dtype)
    second = torch.cat([torch.full((90, 1), 0.3, dtype=dtype), torch.randn(90, 2, dtype=dtype)], 1)
    one, two = Moments(first[0].double(), dtype), Moments(first[0].double(), dtype)
    one.add(first)
    for part in second.split(7):
        two.add(part)
    assert one.correlation()[1].tolist() == [False, False, False]
    assert two.correlation()[1].tolist() == [True, False, False]
    both = torch.cat([first, second]).double().T.numpy()
    found = one.merged(two).correlation()[0].numpy()
    assert np.allclose(found, np.corrcoef(both), rtol=0, atol=1e-9)


def test_clusters_hold_only_what_correlates() -> None:
    matrix = torch.tensor([[1, 0.9, 0.9, 0.1], [0.9, 1, 0.5, 0.1], [0.9, 0.5, 1, 0.1],
                           [0.1, 0.1, 0.1, 1]])  # fmt: skip
    assert clusters_of(matrix, 0.8).tolist() in ([0, 0, 1, 2], [0, 1, 0, 2])  # no chains
    assert clusters_of(matrix, 0.4).tolist() == [0, 0, 0, 1]
    assert clusters_of(torch.ones(1, 1), 0.5).tolist() == [0]
    assert clusters_of(torch.eye(3), 1.0).tolist() == [0, 1, 2]


@pytest.mark.parametrize("threshold", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", [0, 2, 7])
def test_clusters_coarsen_planted_fibers(seed: int, threshold: float) -> None:
    planted = plant(seed)
    found = fxfib.synchrony(planted.wide, [planted.inputs], threshold=threshold, labels=False)
    assert found.holds, str(found)
    assert sum(row["pairs"] for row in found.rows()) > 0


def test_fibers_that_are_none_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: a coloring that takes nodes together that are not in step."""
    right = activities.labels_of

    def wrong(analysis: Any, forward: Any, symmetry: str) -> Any:
        return {
            name: np.zeros_like(own) for name, own in right(analysis, forward, symmetry).items()
        }

    monkeypatch.setattr(activities, "labels_of", wrong)
    found = fxfib.synchrony(network(), batches())
    assert found.holds is False
    (row,) = [r for r in found.rows() if r["layer"] == "4" and r["class"] == ""]
    assert row["split"] == 1 and row["pairs"] == 10 and row["kept"] < 1
    assert "of pairs kept" in str(found)


def test_the_intersection_of_all_classes() -> None:
    found = fxfib.synchrony(network(), batches(), threshold=0.6)
    layer = found.layers["0"]
    for label in range(3):
        own, both = layer.clusters[label], layer.intersection
        assert len(torch.unique(torch.stack([own, both]), dim=1).T) == int(both.max()) + 1
    rows = [r for r in found.rows() if r["layer"] == "0"]
    assert [r["class"] for r in rows] == ["", 0, 1, 2, "intersection"]
    assert rows[-1]["split"] == 0
    assert rows[-1]["clusters"] >= max(r["clusters"] for r in rows[1:-1])


def test_above_zero_nothing_is_claimed() -> None:
    found = fxfib.synchrony(network(), batches(), eps=0.7, criterion="cosine")
    assert found.holds is None


def test_inputs_of_other_kinds() -> None:
    model, data = network(), batches()
    alone = fxfib.synchrony(model, [x for x, _ in data], layers=["4"])
    assert list(alone.layers) == ["4"] and list(alone.layers["4"].correlation) == [None]
    both = fxfib.synchrony(model, data, classes=[1], layers=["4"])
    assert list(both.layers["4"].correlation) == [None, 1]
    whole, some = alone.layers["4"].correlation[None], both.layers["4"].correlation[None]
    assert torch.allclose(whole, some, rtol=0, atol=1e-12)
    for loader, why in (([], "no batch"), ([(1, 2, 3)], "tensor")):
        with pytest.raises(InputError, match=why):
            fxfib.synchrony(model, loader)
    with pytest.raises(InputError, match="does not fit"):
        fxfib.synchrony(model, [data[0][0], torch.randn(3, 5, dtype=torch.float64)])
    with pytest.raises(InputError, match="no layer"):
        fxfib.synchrony(model, data, layers=["9"])
    with pytest.raises(InputError, match="threshold"):
        fxfib.synchrony(model, data, threshold=0)
    with pytest.raises(InputError, match="vector of integers"):
        fxfib.synchrony(model, [x for x, _ in data], labels=True)


def test_too_many_classes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activities, "MOST_NUMBERS", 100)
    with pytest.raises(InputError, match="do not fit into memory"):
        fxfib.synchrony(network(), batches())


class Steps(nn.Module):
    """Time comes first, then examples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x.transpose(0, 1))).mean(0))


def test_labels_are_not_given_to_the_wrong_rows() -> None:
    data = [(torch.randn(6, 4, 3), torch.tensor([0, 1, 0, 1, 1, 0])) for _ in range(2)]
    found = fxfib.synchrony(Steps(), data)
    assert list(found.layers["first"].correlation) == [None]
    assert list(found.layers["second"].correlation) == [None, 0, 1]
    assert any("first lays examples over each other" in note for note in found.notes)


def test_table_file_and_figure(tmp_path: Path) -> None:
    found = fxfib.synchrony(network(), batches())
    found.to_csv(tmp_path / "synchrony.csv")
    with (tmp_path / "synchrony.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15 and rows[0]["class"] == ""
    pytest.importorskip("matplotlib")
    figure = found.plot("0", [2])
    assert [axes.get_title() for axes in figure.axes[:2]] == [
        f"{word}: {int(found.layers['0'].clusters[label].max()) + 1} clusters"
        for word, label in (("all inputs", None), ("class 2", 2))
    ]
    shown = figure.axes[0].images[0].get_array()
    correlation = found.layers["0"].correlation[None].numpy()
    assert np.allclose(np.sort(shown, None), np.sort(correlation, None))
    figure.canvas.draw()
    for wrong in (("7", None), ("0", [8])):
        with pytest.raises(InputError):
            found.plot(*wrong)


def test_batches_without_examples_add_nothing() -> None:
    given = batches()
    x, y = given[0]
    found = fxfib.synchrony(network(), [*given, (x[:0], y[:0])], progress=False)
    expected = fxfib.synchrony(network(), given, progress=False)
    assert str(found) == str(expected)


def test_examples_one_by_one() -> None:
    model, x = network()[4:], torch.randn(20, 28, dtype=torch.float64)
    one, all_ = (fxfib.synchrony(model, own, progress=False) for own in (x, [x]))
    assert torch.allclose(one.layers["4"].correlation[None], all_.layers["4"].correlation[None])


def test_activations_that_are_not_finite_are_refused() -> None:
    given = batches()
    x, y = given[0]
    with pytest.raises(InputError, match="activations of 0 are not finite"):
        fxfib.synchrony(network(), [*given, (x * torch.nan, y)], progress=False)
