"""Around the best network: what is drawn is smaller, and good moves are made again."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxfib
from fxfib import nearby, search
from fxfib.coloring import Labels
from fxfib.frontier import Point
from fxfib.modules import FibrationModule
from fxfib.nearby import Nearby
from fxfib.passes.costs import Costs
from fxfib.passes.curves import curves_of
from fxfib.passes.plan import make_plan
from fxfib.workshop import Workshop

WIDTHS = 40, 30, 20


def costs() -> Costs:
    torch.manual_seed(0)
    sizes = (8, *WIDTHS, 3)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    x = torch.randn(50, 8)
    workshop = Workshop(nn.Sequential(*layers[:-1]).eval(), (x,), criterion="energy", calibration=x)
    found = curves_of(workshop.graph_module, workshop.guide)
    assert tuple(curve.size for curve in found) == WIDTHS
    return Costs(make_plan(workshop.exact), found)


COSTS = costs()
MOST: Labels = np.array(WIDTHS) - 1


def size(gone: Labels) -> float:
    return COSTS.parameters(np.array(WIDTHS, dtype=float) - gone)


def test_networks_are_smaller_and_moved_in_two_groups() -> None:
    start = np.array([20, 10, 5])
    draws = Nearby(COSTS, MOST, start)
    for _ in range(50):
        found = draws.next()
        assert found is not None
        assert size(found) < size(start)
        assert ((found >= 0) & (found <= MOST)).all()
        assert (found > start).sum() == 1 and (found < start).sum() <= 1
        draws.saw(found, better=False)
    assert draws.best is start


def test_nodes_come_back_as_far_as_it_stays_smaller() -> None:
    """One more and it would not be by the part that was asked for."""
    start = np.array([20, 10, 5])
    draws = Nearby(COSTS, MOST, start)
    returned = 0
    for _ in range(50):
        limit = (1 - draws.smaller) * size(start)
        found = draws.next()
        assert found is not None
        for group in np.flatnonzero(found < start):
            returned += 1
            more = found.copy()
            more[group] -= 1
            assert size(found) <= limit < size(more)
        draws.saw(found, better=False)
    assert returned > 10


def test_a_good_move_is_made_again_and_larger() -> None:
    draws = Nearby(COSTS, MOST, np.array([10, 10, 10]))
    first = draws.next()
    assert first is not None
    grown = int(np.flatnonzero(first > 10)[0])
    before = draws.smaller
    draws.saw(first, better=True)
    second = draws.next()
    assert second is not None
    assert second[grown] > first[grown]
    assert draws.smaller > before
    draws.saw(second, better=False)
    assert np.array_equal(draws.best, first)


@pytest.mark.parametrize("most", [np.array([0, 5, 0]), np.zeros(3, dtype=np.int64)])
def test_there_is_nothing_near_where_one_group_is_all(most: Labels) -> None:
    assert Nearby(COSTS, most, np.zeros(3, dtype=np.int64)).next() is None


def test_nothing_is_left_where_all_has_gone() -> None:
    assert Nearby(COSTS, MOST, MOST).next() is None


def test_the_same_draws_every_time() -> None:
    def some() -> list[list[int]]:
        draws = Nearby(COSTS, MOST, np.array([20, 10, 5]))
        found = []
        for number in range(12):
            drawn = draws.next()
            assert drawn is not None
            found.append(drawn.tolist())
            draws.saw(drawn, better=number % 3 == 0)
        return found

    assert some() == some()


def tuned(**options: object) -> FibrationModule:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 4)
    ).eval()
    x, y = torch.randn(300, 6), torch.randn(300, 6)
    small = fxfib.tune(
        model, [y], example_inputs=(x,), calibration=x, max_loss_increase=0.02, **options
    )
    with torch.no_grad():
        gap = (small(y) - model(y)).square().mean() / model(y).var(correction=0)
    (chosen,) = (p for p in small.fibration.frontier if p.chosen)
    assert chosen.loss == pytest.approx(float(gap), rel=1e-3)
    assert chosen.loss <= 0.02
    assert chosen.parameters == sum(p.numel() for p in small.parameters())
    assert chosen.parameters == min(
        p.parameters for p in small.fibration.frontier if p.loss is not None and p.loss <= 0.02
    )
    return small


@pytest.mark.parametrize("refine", [0, 3])
def test_tune_finds_what_the_path_misses(refine: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for looks in (0, 4):
        monkeypatch.setattr(nearby, "LOOKS", looks)
        found.append(sum(p.numel() for p in tuned(refine=refine).parameters()))
    assert found[1] < found[0]


def test_refined_networks_decide_and_few_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks good as it is fitted is refined, and given up where it is no good then."""
    made = []
    own = search.Search.made

    def noted(self: search.Search, *given: Any, **options: Any) -> Point:
        point = own(self, *given, **options)
        made.append(point)
        return point

    monkeypatch.setattr(search.Search, "made", noted)
    monkeypatch.setattr(nearby, "_part", lambda of, whole: 0.5)  # so much refining does not help
    small = tuned(refine=3)
    (chosen,) = (p for p in small.fibration.frontier if p.chosen)
    assert chosen.refined
    near = [p for p in made if p.refined and p.parameters < chosen.parameters]
    assert near and all(p.loss is None or p.loss > 0.02 for p in near)
    assert sum(p.refined for p in made) < sum(not p.refined for p in made)


def test_work_bounds_the_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearby, "LOOKED_AT", 0.0)
    few = sum(p.numel() for p in tuned(refine=0).parameters())
    monkeypatch.setattr(nearby, "LOOKS", 0)
    assert few == sum(p.numel() for p in tuned(refine=0).parameters())
