"""Mixtures of experts: tokens in order of their expert, each with its expert's matrix."""

import pytest
import torch
from torch import Tensor, nn

import fxfib
from fxfib.passes.rules import base, experts
from fxfib.passes.rules.experts import GroupedProduct

NAME = "fxfib_tests::grouped_product"
EXPERTS, WIDTH, HIDDEN = 3, 5, 7
#: Nodes 0, 2 and 5 are one, 4 is twice node 1.
CLASSES = [0, 1, 0, 2, 3, 0, 4]


@torch.library.custom_op(
    NAME, mutates_args=(), schema="(Tensor input, Tensor weight, Tensor offs) -> Tensor"
)
def grouped_product(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """What the named ops compute, on any width and dtype."""
    ends = [0, *offs.tolist()]
    parts = [input[a:b] @ w for a, b, w in zip(ends, ends[1:], weight, strict=False)]
    return torch.cat([*parts, input.new_zeros(len(input) - ends[-1], weight.shape[2])])


@grouped_product.register_fake
def _(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return input.new_empty(input.shape[0], weight.shape[2])


@pytest.fixture(autouse=True)
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule under the name of the op of these tests."""
    assert NAME not in GroupedProduct.named
    monkeypatch.setitem(base._NAMED, NAME, base._NAMED[GroupedProduct.named[0]])


class Experts(nn.Module):
    """Every token by the one or two experts of its largest scores, with a gate or without."""

    def __init__(self, *, gated: bool, near: str = "", chosen: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.chosen, self.gated = chosen, gated
        self.stem = nn.Linear(4, WIDTH, dtype=torch.float64)
        self.stem.weight.data, self.stem.bias.data = random(WIDTH, 4), random(WIDTH)
        self.stem.weight.data[3], self.stem.bias.data[3] = self.stem.weight[0], self.stem.bias[0]
        # A constant input: what it adds differs from expert to expert.
        self.stem.weight.data[1], self.stem.bias.data[1] = 0.0, 0.75
        self.router = nn.Linear(WIDTH, EXPERTS, dtype=torch.float64)
        self.router.weight.data, self.router.bias.data = random(EXPERTS, WIDTH), random(EXPERTS)
        halves = []
        for _ in range(2 if gated else 1):
            bases = random(EXPERTS, len(CLASSES), WIDTH)
            bases[:, 3] = 2 * bases[:, 1]
            half = bases[:, CLASSES]
            shift = random(EXPERTS, HIDDEN)
            half[:, :, 0] += shift  # no plain duplicates: inputs 0 and 3 are one
            half[:, :, 3] -= shift
            halves.append(half)
        if near:
            column = {"near": 4, "constant": 1}[near]
            halves[-1][1, 5, column] += 0.25  # one expert alone
        self.up = nn.Parameter(torch.cat(halves, 1))
        down = random(EXPERTS, WIDTH, HIDDEN)
        down[:, :, 6] = 0.0
        if near:
            down[2, 3, 6] = 0.5  # one expert reads it
        self.down = nn.Parameter(down)

    def forward(self, x: Tensor) -> Tensor:
        """``[tokens, 4]`` to ``[tokens, WIDTH]``."""
        x = torch.relu(self.stem(x))
        scores, places = self.router(x).softmax(-1).topk(self.chosen)
        order = places.reshape(-1).argsort(stable=True)
        counts = nn.functional.one_hot(places.reshape(-1), EXPERTS).sum(0)
        offs = counts.cumsum(0)
        tokens = x[order // self.chosen]
        hidden = grouped_product(tokens, self.up.transpose(-2, -1), offs)
        if self.gated:
            gate, hidden = hidden.chunk(2, -1)
            hidden = nn.functional.silu(gate) * hidden
        else:
            hidden = torch.relu(hidden)
        made = grouped_product(hidden, self.down.transpose(-2, -1), offs)
        made = made * scores.reshape(-1)[order].unsqueeze(-1)
        back = made[order.argsort()]
        result: Tensor = back.view(x.shape[0], self.chosen, WIDTH).sum(1)
        return result


def tokens(count: int) -> Tensor:
    return torch.randn(
        count, 4, generator=torch.Generator().manual_seed(count), dtype=torch.float64
    )


def stacks(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of the experts' matrices, ``[experts, in, out]``, in order."""
    return sorted(tuple(p.shape) for p in model.parameters() if p.ndim == 3)


def compiled(model: nn.Module) -> nn.Module:
    """At eps 0; the same numbers on tokens that it has not seen."""
    small = fxfib.compile(model, 0.0, (tokens(11),))
    for count in (11, 3):
        with torch.no_grad():
            torch.testing.assert_close(small(tokens(count)), model(tokens(count)))
    return small


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("near", ["", "near", "constant"])
def test_hidden_units_equal_in_every_expert_merge(near: str, gated: bool) -> None:
    small = compiled(Experts(gated=gated, near=near, chosen=1 + gated).eval())
    # Without a gate ReLU passes the scale of node 4; node 6 is unread but in the near misses,
    # where node 5, too, stays by itself.
    hidden = (4 if gated else 3) + 2 * bool(near)
    expected = [(EXPERTS, WIDTH - 1, hidden * (1 + gated)), (EXPERTS, hidden, WIDTH)]
    assert stacks(small) == sorted(expected)


def test_experts_that_are_mixed_up_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that looks at the first expert alone merges what must not: these tests see it."""
    monkeypatch.setattr(experts, "taps", lambda weight: weight.permute(2, 1, 0)[..., :1])
    with pytest.raises((AssertionError, fxfib.errors.FxfibError)):
        test_hidden_units_equal_in_every_expert_merge("near", False)


@pytest.mark.parametrize("gated", [False, True])
def test_a_lift_comes_back(gated: bool) -> None:
    small = compiled(Experts(gated=gated).eval())
    large = fxfib.lift(small, 2.0, (tokens(11),))
    assert max(stacks(large)) > max(stacks(small))
    assert stacks(compiled(large)) == stacks(small)


def test_a_product_with_computed_matrices_is_refused() -> None:
    class Scaled(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.up.transpose(-2, -1) * (1 + x.mean())
            hidden = self.stem(x).relu()
            offs = torch.tensor([2, 2, 3])
            return grouped_product(hidden, weight, offs)

    small = fxfib.compile(Scaled(gated=False).eval(), 0.0, (tokens(3),))
    assert small.get_parameter("stem.weight").shape == (WIDTH, 4)
