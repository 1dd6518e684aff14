"""Rotary embedding: pairs of channels that turn together merge, by the side that has fibers."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_forms import HEADS, LENGTH, WIDTH, Form, angles
from torch import Tensor, nn

import fxfib

#: The first two of the three pairs of every head turn at one speed.
SPEEDS = (1.0, 1.0, 0.3)
PAIRS = {"half": ((0, 1), (3, 4)), "interleaved": ((0, 2), (1, 3))}


class Turned(Form):
    """Queries and keys are turned by one table."""

    def __init__(self, style: str, groups: int = HEADS, product: str = "fused") -> None:
        self.groups = groups
        super().__init__()
        self.style, self.product = style, product
        angle = angles(SPEEDS * 2) if style == "half" else angles(SPEEDS).repeat_interleave(2, 1)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def turn(self, x: Tensor) -> Tensor:
        if self.style == "half":
            first, second = x.chunk(2, -1)
            partner = torch.cat([-second, first], -1)
        else:
            partner = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * self.cos + partner * self.sin

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        q, k = self.turn(q), self.turn(k)
        if self.product == "fused":
            grouped = self.groups != HEADS
            return self.joined(F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped))
        k, v = (t.repeat_interleave(HEADS // self.groups, 1) for t in (k, v))
        if self.product == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k)
        else:
            scores = q @ k.transpose(-1, -2)
        return self.joined(scores.softmax(-1) @ v)


def copied(layer: nn.Linear, head: int, style: str) -> None:
    """Two pairs of a head are equal."""
    for one, other in PAIRS[style]:
        for tensor in (layer.weight, layer.bias):
            tensor[6 * head + other] = tensor[6 * head + one]


def planted(
    sides: str, style: str, groups: int = HEADS, product: str = "fused"
) -> tuple[Turned, Tensor]:
    """Every head of keys, or the queries that meet it, has two equal pairs; values have, too."""
    torch.manual_seed(5)
    model = Turned(style, groups, product).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
        for group, side in enumerate(sides):
            if side == "k":
                copied(model.k, group, style)
            for head in range(HEADS // groups):
                if side == "q":
                    copied(model.q, group * (HEADS // groups) + head, style)
            for tensor in (model.v.weight, model.v.bias):
                tensor[6 * group + 3] = tensor[6 * group + 4] = tensor[6 * group + 1]
    return model, torch.randn(2, LENGTH, WIDTH)


def rows(model: nn.Module) -> list[int]:
    return [model.get_parameter(f"{name}.weight").shape[0] for name in "qkv"]


def compiled(model: Turned, x: Tensor) -> nn.Module:
    small = fxfib.compile(model, 0.0, (x,))
    assert small.fibration.exact_error < 1e-6
    other = torch.randn(3, LENGTH, WIDTH)
    torch.testing.assert_close(small(other), model(other), rtol=1e-4, atol=1e-5)
    return small


@pytest.mark.parametrize(
    "sides, groups, product",
    [
        *(("qqqq", 4, "fused"), ("qkqk", 4, "fused"), ("kq", 2, "fused"), ("k", 1, "fused")),
        *(("kqqq", 4, "written out"), ("qk", 2, "written out"), ("qkqk", 4, "einsum")),
    ],
)
@pytest.mark.parametrize("style", PAIRS)
def test_every_head_merges_by_its_own_side(
    style: str, sides: str, groups: int, product: str
) -> None:
    model, x = planted(sides, style, groups, product)
    small = compiled(model, x)
    assert rows(small) == [4 * HEADS, 4 * groups, 4 * groups]
    assert small.cos.shape == (LENGTH, 4)


def other_speed(model: Turned) -> None:
    place = 1 if model.style == "half" else 2
    model.cos[-1, place] += 1e-3


def one_query(model: Turned) -> None:
    model.q.bias[0] += 1e-3


def one_key(model: Turned) -> None:
    model.k.weight[6, 3] += 1e-3


def partner_alone(model: Turned) -> None:
    """The other channel of one pair differs."""
    place = 4 if model.style == "half" else 3
    model.q.weight[place] = torch.randn(WIDTH)


@pytest.mark.parametrize("change", [other_speed, one_query, one_key, partner_alone])
@pytest.mark.parametrize("style", PAIRS)
def test_a_near_miss_in_one_head_keeps_all_heads(
    style: str, change: Callable[[Turned], None]
) -> None:
    model, x = planted("qkqk", style)
    with torch.no_grad():
        change(model)
    assert rows(compiled(model, x))[:2] == [6 * HEADS, 6 * HEADS]


def test_equal_heads_merge_whole_beside_heads_of_either_side() -> None:
    model, x = planted("qkqk", "half")
    with torch.no_grad():
        for layer in (model.q, model.k, model.v):
            for tensor in (layer.weight, layer.bias):
                tensor[12:18] = tensor[:6]
    small = compiled(model, x)
    assert rows(small) == [12, 12, 12]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_numbers(dtype: torch.dtype) -> None:
    model, x = planted("qkqk", "half")
    small = fxfib.compile(model.to(dtype), 0.0, (x.to(dtype),))
    assert rows(small) == [16, 16, 16]
