"""Crossing: the bracket is never left, and few looks suffice where the prediction is good."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from fxfib.crossing import Crossing

COUNT, CLOSE, LIMIT, ORIGINAL = 751, 0.005, 0.02, 0.1
SIZES = np.geomspace(9e5, 800, COUNT)
PREDICTED = 2.5 * np.linspace(0, 1, COUNT) ** 3


def looks(
    increase: Callable[[float], float],
    low: tuple[int, float] = (0, ORIGINAL),
    sizes: np.ndarray = SIZES,
) -> tuple[Crossing, list[int]]:
    """A search along increases that are functions of the predicted loss."""
    last = COUNT - 1
    high = last, ORIGINAL + increase(PREDICTED[last])
    crossing = Crossing(sizes, PREDICTED, ORIGINAL, ORIGINAL + LIMIT, CLOSE, low, high)
    seen: list[int] = []
    while (place := crossing.next()) is not None:
        before = crossing.low[0], crossing.high[0]
        assert before[0] < place < before[1]
        seen.append(place)
        crossing.saw(place, ORIGINAL + increase(PREDICTED[place]))
        assert len(seen) < 60
    return crossing, seen


def met(crossing: Crossing, increase: Callable[[float], float]) -> bool:
    """Whether the ends are near, one within the limit and one beyond it."""
    low, high = crossing.low[0], crossing.high[0]
    near = high - low == 1 or SIZES[high] >= (1 - CLOSE) * SIZES[low]
    return near and increase(PREDICTED[low]) <= LIMIT and not increase(PREDICTED[high]) <= LIMIT


@pytest.mark.parametrize("power", [0.8, 1.0, 1.3, 2.0, 3.0])
def test_a_power_law_takes_few_looks(power: float) -> None:
    def increase(predicted: float) -> float:
        return float(0.75 * predicted**power)

    start = 30, ORIGINAL + increase(PREDICTED[30])
    crossing, seen = looks(increase, start)
    assert met(crossing, increase)
    assert len(seen) <= 3
    # The original, without any increase, says nothing of the power.
    crossing, seen = looks(increase)
    assert met(crossing, increase)
    assert len(seen) <= 6


@pytest.mark.parametrize("power", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_noise_costs_few_looks(power: float, seed: int) -> None:
    noise = np.random.default_rng(seed).normal(1, 0.1, COUNT)

    def increase(predicted: float) -> float:
        return float(predicted**power * noise[np.searchsorted(PREDICTED, predicted)])

    crossing, seen = looks(increase)
    assert met(crossing, increase)
    assert len(seen) <= 10


@pytest.mark.parametrize(
    "increase",
    [
        lambda p: 0.01 if p < 0.5 else 3.0,
        lambda p: 0.0199999 if p < 0.5 else 1e12,
        lambda p: 0.01 if p < 0.5 else math.nan,
        lambda p: -0.01 if p < 0.5 else math.inf,
        lambda p: p - 0.3,
        lambda p: 0.01 * (math.exp(5 * p) - 1),
        lambda p: math.nan if 0.1 < p < 0.2 or p > 1 else 0.015 * p,
        lambda p: 0.03 * abs(math.sin(40 * p)) + p,
    ],
    ids=["step", "cliff", "NaN", "infinite", "falls first", "exponential", "holes", "waves"],
)
def test_whatever_the_loss_does_the_ends_meet(increase: Callable[[float], float]) -> None:
    crossing, seen = looks(increase)
    assert met(crossing, increase)
    assert len(seen) <= 30  # three times as many as bisection alone


def test_no_increase_is_allowed() -> None:
    last = COUNT - 1
    crossing = Crossing(SIZES, PREDICTED, 0.1, 0.1, CLOSE, (0, 0.1), (last, 1.0))
    seen = 0
    while (place := crossing.next()) is not None:
        crossing.saw(place, 0.1 if place <= 321 else 0.2)
        seen += 1
    assert crossing.low[0] == 321 or SIZES[321] > (1 - CLOSE) * SIZES[crossing.low[0]]
    assert seen < 12


def test_sizes_that_are_equal_are_not_told_apart() -> None:
    sizes = np.full(COUNT, 7.0)
    crossing, seen = looks(lambda p: p, sizes=sizes)
    assert seen == []
    assert crossing.low[0] == 0


def test_a_predicted_loss_that_does_not_rise() -> None:
    flat = np.zeros(COUNT)
    crossing = Crossing(SIZES, flat, 0.0, LIMIT, CLOSE, (0, 0.0), (COUNT - 1, 1.0))
    while (place := crossing.next()) is not None:
        crossing.saw(place, 0.01 if place <= 200 else 0.03)
    assert crossing.low[0] <= 200 < crossing.high[0]
    assert SIZES[crossing.high[0]] >= (1 - CLOSE) * SIZES[crossing.low[0]] * 0.99


def test_of_many_small_steps_only_those_that_can_be_told_apart_are_looked_at() -> None:
    """The power law is never quite right, so that guesses come near from one side alone."""
    count = 100_001
    sizes, predicted = np.geomspace(9e5, 800, count), 2.5 * np.linspace(0, 1, count) ** 3

    def increase(place: int) -> float:
        return float(predicted[place] ** 1.3 * (1 + predicted[place]))

    ends = [(place, increase(place)) for place in (2000, count - 1)]
    crossing = Crossing(sizes, predicted, 0.0, LIMIT, CLOSE, *ends)
    seen = []
    while (place := crossing.next()) is not None:
        seen.append(place)
        crossing.saw(place, increase(place))
    assert len(seen) <= 5
    low, high = crossing.low[0], crossing.high[0]
    assert increase(low) <= LIMIT < increase(high)
    assert high - low > 1 and (1 - CLOSE) * sizes[low] <= sizes[high]


def test_what_cannot_be_told_apart_from_the_end_within_is_not_looked_at() -> None:
    def crossing(sizes: list[float]) -> Crossing:
        return Crossing(sizes, [0.0, 0.1, 0.2], 0.0, LIMIT, CLOSE, (0, 0.0), (2, 1.0))

    assert crossing([100.0, 99.9, 90.0]).next() is None
    assert crossing([100.0, 90.1, 90.0]).next() == 1
