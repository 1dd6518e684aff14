"""Axes that need equally many slots: what a merge splits again, what a lift copies."""

import numpy as np
import pytest
from torch import fx

from fxfib.equal_copies import equalize
from fxfib.passes.relations import Full, Keep, Ref, Relation, Same, SameSize
from fxfib.passes.solve import Solver


def solve(
    labels: dict[str, list[int]], relations: list[tuple[object, ...]], round_to: int | None = None
) -> dict[str, list[int]]:
    """Slots of named axes; -1 as a label: dropped."""
    node = fx.Graph().placeholder("x")

    def initial(ref: Ref) -> tuple[np.ndarray, np.ndarray]:
        own = np.asarray(labels[str(ref[1])])
        return own, own >= 0

    made: list[Relation] = []
    for kind, *names in relations:
        refs = [(node, name) if isinstance(name, str) else name for name in names]
        made.append(SameSize(tuple(refs)) if kind is SameSize else kind(*refs))
    solver = Solver(made, initial)
    solver.run(round_to)
    return {
        str(ref[1]): np.where(solver.keep[ref], ids, -1).tolist() for ref, ids in solver.ids.items()
    }


def width(slots: list[int]) -> int:
    return len({s for s in slots if s >= 0})


def refines(fine: list[int], coarse: list[int]) -> bool:
    """Nodes that share a slot shared one before."""
    pairs = {(f, c) for f, c in zip(fine, coarse, strict=True) if f >= 0 and c >= 0}
    return len({f for f, _ in pairs}) == len(pairs)


def test_smaller_axes_are_split_until_equal() -> None:
    labels = {"a": [0, 0, 0, 1, 1, 1, 1], "b": [0, 1, 2, 3, 4, 4, 4], "c": [0, 0, 0, 0, 0, 0, 0]}
    found = solve(labels, [(SameSize, "a", "b", "c")])
    assert [width(found[name]) for name in "abc"] == [5, 5, 5]
    assert found["b"] == labels["b"]
    assert all(refines(found[name], labels[name]) for name in "abc")


def test_dropped_nodes_come_back_when_nothing_is_left_to_split() -> None:
    found = solve({"a": [0, 1, 2, 3, 3], "b": [0, 1, -1, 1, -1]}, [(SameSize, "a", "b")])
    assert found["b"][:2] == [0, 1]
    assert width(found["a"]) == width(found["b"]) == 4
    assert found["b"].count(-1) == 1


def test_what_is_tied_to_a_split_axis_grows_with_it() -> None:
    labels = {
        "a": [0, 0, 0, 0, 0],
        "b": [0, 1, 2, 2, 2],
        "c": [0, 0, 1, 1, 1],
        "d": [0, 1, 2, 3, 3],
    }
    relations = [(SameSize, "a", "b"), (Same, "b", "c"), (SameSize, "c", "d")]
    found = solve(labels, relations)
    assert [width(found[name]) for name in "abcd"] == [4, 4, 4, 4]
    assert found["b"] == found["c"]


def test_a_full_axis_makes_all_full() -> None:
    relations = [(SameSize, "a", "b"), (Full, "a", "it is an output")]
    found = solve({"a": [0, 0, 0], "b": [0, 0, 0]}, relations)
    assert found == {"a": [0, 1, 2], "b": [0, 1, 2]}


def test_rounded_and_equal() -> None:
    relations = [(SameSize, "a", "b"), (Same, "b", "c"), (Keep, "c", np.ones(11, dtype=bool))]
    labels = {name: [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1] for name in "abc"}
    labels["a"] = [k % 5 for k in range(11)]
    found = solve(labels, relations, round_to=4)
    assert [width(found[name]) for name in "abc"] == [8, 8, 8]


def test_axes_of_different_length_are_refused() -> None:
    with pytest.raises(AssertionError, match="different length"):
        solve({"a": [0, 0], "b": [0, 0, 0]}, [(SameSize, "a", "b")])


@pytest.mark.parametrize("seed", range(20))
def test_copies_have_equal_sums(seed: int) -> None:
    generator = np.random.default_rng(seed)
    times = generator.integers(1, 4, 30)
    groups = [[np.arange(7), np.arange(7, 14)], [np.arange(14, 19), np.arange(12, 17)]]
    pinned = np.zeros(30, dtype=bool)
    pinned[generator.choice(30, 5)] = True
    before = times.copy()
    assert equalize(times, groups, pinned, generator) is None
    for axes in groups:
        assert len({int(times[a].sum()) for a in axes}) == 1
    assert np.array_equal(times[pinned], before[pinned])
    assert times.min() >= 1


def test_copies_that_cannot_be_equal() -> None:
    times = np.array([2, 2, 1, 1])
    groups = [[np.arange(2), np.arange(2, 4)]]
    assert equalize(times, groups, np.ones(4, dtype=bool), np.random.default_rng(0)) == 0


def test_wide_axes_grow_in_few_steps_and_to_the_very_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a slot more brings one, and where it brings another one by what it is tied to."""
    settled = []
    settle = Solver._settle
    monkeypatch.setattr(Solver, "_settle", lambda *given: settled.append(1) or settle(*given))
    labels = {"a": [*range(300), *[300] * 100], "b": [0] * 400, "c": [0] * 400, "d": [-1] * 400}
    found = solve(labels, [(SameSize, "a", "b"), (Same, "b", "c"), (SameSize, "a", "d")])
    assert width(found["b"]) == width(found["c"]) == width(found["d"]) == 301
    assert found["b"] == found["c"]
    assert len(settled) < 40
