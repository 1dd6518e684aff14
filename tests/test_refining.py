"""Refining: what judges, what is mixed, and that nothing gets worse."""

import copy
import importlib

import pytest
import torch
from torch import Tensor, fx, nn

from fxfib.passes.batches import examples_of, length_of, pieces_of

# The package has a function of a module's name.
refining = importlib.import_module("fxfib.refining")


def graphs(seed: int = 0) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A network and one near it."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 4))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return fx.symbolic_trace(model), fx.symbolic_trace(other)


def gap(one: nn.Module, other: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        return float((one(inputs) - other(inputs)).square().mean())


def test_every_eighth_example_judges() -> None:
    x, y = torch.arange(20)[:, None], torch.arange(20)
    (learned,), (apart,) = refining.parted([[x, y]])
    assert apart[1].tolist() == [7, 15]
    assert torch.equal(apart[0][:, 0], apart[1])
    assert sorted([*learned[1].tolist(), 7, 15]) == list(range(20))


def test_every_eighth_batch_judges_where_batches_cannot_be_cut() -> None:
    batches = [[torch.full((3,), k), torch.zeros(2)] for k in range(9)]
    learned, apart = refining.parted(batches)
    assert [int(b[0][0]) for b in apart] == [7]
    assert len(learned) == 8


def test_so_few_that_none_can_be_spared_do_both() -> None:
    batches = [[torch.randn(3, 5)]]
    learned, apart = refining.parted(batches)
    assert learned is batches
    assert apart is batches


def test_what_judges_is_not_learned_from_and_gets_no_farther(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Learned and judged inputs contradict each other: the original says other things there."""
    original, _ = graphs()
    small = copy.deepcopy(original)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter += 1e-3 * torch.randn_like(parameter)
    before = copy.deepcopy(small)
    inputs = torch.randn(64, 5)
    monkeypatch.setattr(refining, "FAR", 1e-9)  # the whole rate

    class Wrong(nn.Module):
        """Says the opposite of inputs below zero."""

        def forward(self, x: Tensor) -> Tensor:
            y = original(x)
            return torch.where(x[:, :1] < 0, -y, y)

    wrong = Wrong()
    learned = inputs.clone()
    learned[:, 0] = -learned[:, 0].abs() - 1
    apart = inputs.clone()
    apart[:, 0] = apart[:, 0].abs() + 1
    notes = refining.refined(wrong, small, lambda number: [[learned]], [[apart]], 5)
    assert notes == ["refining brought nothing nearer to the original: it is undone"]
    assert gap(before, small, inputs) == 0.0
    # Judged by what it learns from, the same training is kept.
    notes = refining.refined(wrong, small, lambda number: [[learned]], [[learned]], 5)
    assert notes == []
    assert gap(before, small, inputs) > 0


def test_the_best_pass_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a rate that throws the network about, what is returned is still nearer than the start."""
    monkeypatch.setattr(refining, "RATE", 0.03)
    original, small = graphs()
    inputs, apart = torch.randn(256, 5), torch.randn(64, 5)
    start = gap(original, small, apart)
    refining.refined(original, small, lambda number: [[inputs]], [[apart]], 10)
    assert gap(original, small, apart) < start


def test_a_mixture_lies_between_two_examples_and_nearer_to_its_own() -> None:
    x = torch.eye(16)
    y = torch.arange(16.0)[:, None].expand(16, 3)
    (a, b), mixed = refining._mixed([x, y], torch.Generator().manual_seed(0))
    torch.testing.assert_close(a.sum(1), torch.ones(16))
    assert (a.diagonal() >= 0.5).all()
    assert ((a > 0).sum(1) <= 2).all()
    assert 3 < ((a > 0).sum(1) == 2).sum() < 13
    torch.testing.assert_close(b[:, 0], a @ torch.arange(16.0))  # all inputs are mixed alike
    assert torch.equal(mixed, (a > 0).sum(1) == 2)
    again = refining._mixed([x, y], torch.Generator().manual_seed(0))
    assert torch.equal(a, again.inputs[0])


@pytest.mark.parametrize(
    "piece",
    [
        [torch.arange(6)],
        [torch.randn(6, 2), torch.ones(6, dtype=torch.bool)],
        [torch.randn(6, 2), torch.full((6, 2), -torch.inf)],
        [torch.randn(1, 2)],
        [torch.randn(6, 2), 3],
        [torch.randn(6, 2), torch.randn(3, 2)],
    ],
    ids=["tokens", "mask", "additive mask", "one", "number", "not as long"],
)
def test_what_has_nothing_between_is_not_mixed(piece: list[object]) -> None:
    assert not refining._mixable(piece)
    assert refining._mixable([torch.randn(6, 2), torch.randn(6)])


class Total(nn.Module):
    """What it gives of a batch is no output for every example."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x).sum(0)


class Compared(nn.Module):
    """Every example with every other."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) @ torch.tanh(x).t()


class Course(nn.Module):
    """The first axis is time, and nothing but values says so."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x).cumsum(0)


@pytest.mark.parametrize(
    "original",
    [graphs()[0], Total(), Compared(), Course()],
    ids=["rows", "no rows", "compared", "time first"],
)
def test_what_is_to_be_learned_is_what_the_original_says(original: nn.Module) -> None:
    inputs = [[torch.randn(150, 5)], [torch.randn(3, 5)], [torch.randn(1, 5)]]
    lessons = refining._Lessons(original, lambda number: inputs)
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        pairs = list(lessons.of(number, generator))
        assert sum(len(piece[0]) for piece, _ in pairs) == 154
        assert not all(any(piece[0] is own[0] for own in lessons.pieces) for piece, _ in pairs)
        assert lessons.separate == isinstance(original, fx.GraphModule)
        for piece, (wanted,) in pairs:
            torch.testing.assert_close(original(*piece), wanted)


def test_fresh_inputs_are_not_mixed_and_known_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    mixed = refining._mixed
    monkeypatch.setattr(refining, "_mixed", lambda *given: calls.append(1) or mixed(*given))
    original, small = graphs()
    refining.refined(
        original, small, lambda number: [[torch.randn(64, 5)]], [[torch.randn(9, 5)]], 3
    )
    assert len(calls) == 0
    inputs = [[torch.randn(64, 5)]]
    refining.refined(original, small, lambda number: inputs, [[torch.randn(9, 5)]], 3)
    assert len(calls) == 3 * 2


def test_what_large_steps_spoil_is_tried_in_smaller_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    original, small = graphs()
    inputs, apart = torch.randn(256, 5), torch.randn(64, 5)
    monkeypatch.setattr(refining, "RATE", 30.0)
    monkeypatch.setattr(refining, "SLOWER", 1e4)
    monkeypatch.setattr(refining, "ATTEMPTS", 1)
    before = copy.deepcopy(small)
    given = (lambda number: [[inputs]], [[apart]], 5)
    assert refining.refined(original, small, *given) != []
    assert gap(before, small, inputs) == 0.0
    monkeypatch.setattr(refining, "ATTEMPTS", 2)
    assert refining.refined(original, small, *given) == []
    assert gap(original, small, apart) < gap(original, before, apart)


def test_a_complex_parameter_is_refined_too() -> None:
    """Adam has no fused form for it."""

    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 3, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(x.to(self.weight.dtype) @ self.weight).flatten(1)

    torch.manual_seed(0)
    original = fx.symbolic_trace(Wave())
    small = copy.deepcopy(original)
    with torch.no_grad():
        small.weight += 0.3 * torch.randn_like(small.weight)
    inputs, apart = torch.randn(64, 5), torch.randn(16, 5)
    start = gap(original, small, apart)
    assert refining.refined(original, small, lambda number: [[inputs]], [[apart]], 5) == []
    assert gap(original, small, apart) < start


def test_where_no_output_is_a_floating_tensor_nothing_is_refined() -> None:
    """A network that says which class is nearest, and no more."""
    original, small = (fx.symbolic_trace(Arg(graph)) for graph in graphs())
    before = copy.deepcopy(small)
    inputs = torch.randn(16, 5)
    (note,) = refining.refined(original, small, lambda number: [[inputs]], [[inputs]], 1)
    assert "no output is a floating tensor" in note
    for old, new in zip(before.parameters(), small.parameters(), strict=True):
        assert torch.equal(old, new)


class Arg(nn.Module):
    def __init__(self, scores: nn.Module) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x).argmax(1)


def test_examples_are_counted_where_they_cannot_be_cut() -> None:
    batch = [torch.tensor(2.0), torch.zeros(5, 3), torch.zeros(3), 7]
    assert examples_of(batch) == 5
    assert examples_of([3, torch.tensor(2.0)]) == 1
    assert length_of(batch) is None
    assert pieces_of(batch, 2) == [batch]
    assert [len(b) for _, b in pieces_of([torch.zeros(5, 3), torch.zeros(5)], 2)] == [2, 2, 1]
