"""Attention, fused and written out: heads shrink, one by one, and stay what they compute."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfib

WIDTH = 24


def cut(x: Tensor, heads: int) -> Tensor:
    """``[B, L, heads * d]`` as ``[B, heads, L, d]``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Separate(nn.Module):
    """Query, key and value by layers of their own; fewer heads of keys than of queries."""

    def __init__(self, heads: int = 4, groups: int = 4, *, fused: bool = True) -> None:
        super().__init__()
        depth = WIDTH // heads
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, groups * depth)
        self.v = nn.Linear(WIDTH, groups * depth)
        self.o = nn.Linear(WIDTH, WIDTH)
        self.heads, self.groups, self.fused = heads, groups, fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            cut(self.q(x), self.heads),
            cut(self.k(x), self.groups),
            cut(self.v(x), self.groups),
        )
        if self.fused:
            grouped = self.groups != self.heads
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            y = scores.softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


class Packed(nn.Module):
    """One layer makes query, key and value, as in Swin or in GPT-2."""

    def __init__(self, heads: int = 4, *, split: bool = False) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.randn(heads, 5, 5))
        self.heads, self.split = heads, split

    def forward(self, x: Tensor) -> Tensor:
        if self.split:
            q, k, v = (cut(part, self.heads) for part in self.qkv(x).split(WIDTH, 2))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        else:
            five = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            q, k, v = five[0], five[1], five[2]
            y = (q @ k.transpose(-2, -1) + self.bias).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(x.shape))


class Library(nn.Module):
    """``nn.MultiheadAttention``."""

    def __init__(self, weights: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.attention(x, x, x, need_weights=self.weights)[0]
        return found


class Normalised(Separate):
    """Queries and keys are normalised: their channels meet in statistics."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (cut(layer(x), self.heads) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(F.normalize(q, dim=-1), F.layer_norm(k, (6,)), v)
        return self.o(y.transpose(1, 2).flatten(2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "separate": Separate,
    "written out": lambda: Separate(fused=False),
    "grouped queries": lambda: Separate(4, 2),
    "one head of keys": lambda: Separate(4, 1),
    "one head": lambda: Separate(1, 1),
    "packed": Packed,
    "packed and split": lambda: Packed(split=True),
    "multi-head": Library,
    "multi-head with weights": lambda: Library(True),
    "encoder layer": lambda: nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=True),
}


def made(name: str) -> tuple[nn.Module, tuple[Tensor]]:
    torch.manual_seed(3)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    return model, (torch.randn(2, 5, WIDTH),)


@pytest.mark.parametrize("name", MODELS)
def test_lifted_heads_are_recovered(name: str) -> None:
    model, inputs = made(name)
    lifted = fxfib.lift(model, 1.5, inputs)
    small = fxfib.compile(lifted, 0.0, inputs)
    report = small.fibration
    assert report.parameters_before > report.parameters_after
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert not report.refusals
    torch.testing.assert_close(small(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    longer = torch.randn(3, 5, WIDTH)
    torch.testing.assert_close(small(longer), model(longer), rtol=1e-4, atol=1e-5)


def planted(copies: list[tuple[int, int]], fused: bool) -> Separate:
    """Queries of a head that are equal, at places that differ from head to head."""
    torch.manual_seed(5)
    model = Separate(fused=fused).eval()
    with torch.no_grad():
        for one, other in copies:
            model.q.weight[other] = model.q.weight[one]
            model.q.bias[other] = model.q.bias[one]
        # Values, too, so that fused heads keep one size.
        for head in range(4):
            model.v.weight[6 * head + 1] = model.v.weight[6 * head + 5]
            model.v.bias[6 * head + 1] = model.v.bias[6 * head + 5]
    return model


@pytest.mark.parametrize("fused", [True, False])
def test_every_head_has_its_own_partition(fused: bool) -> None:
    model = planted([(0, 3), (7, 8), (12, 17), (22, 23)], fused)
    inputs = (torch.randn(2, 5, WIDTH),)
    small = fxfib.compile(model, 0.0, inputs)
    shapes = {name: tuple(p.shape) for name, p in small.named_parameters()}
    assert shapes["q.weight"] == shapes["k.weight"] == shapes["v.weight"] == (20, WIDTH)
    assert shapes["o.weight"] == (WIDTH, 20)
    torch.testing.assert_close(small(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_a_near_miss_in_one_head_keeps_the_size(fused: bool) -> None:
    model = planted([(0, 3), (7, 8), (12, 17), (22, 23)], fused)
    with torch.no_grad():
        model.q.bias[23] += 1e-3
    small = fxfib.compile(model, 0.0, (torch.randn(2, 5, WIDTH),))
    assert small.q.weight.shape == (WIDTH, WIDTH)


def test_keys_with_equal_weights_merge_whatever_their_biases() -> None:
    """A bias of keys adds the same to all scores of a query, which softmax does not see."""
    model = planted([], True)
    with torch.no_grad():
        for head in range(4):
            model.k.weight[6 * head + 2] = model.k.weight[6 * head]
    inputs = (torch.randn(2, 5, WIDTH),)
    small = fxfib.compile(model, 0.0, inputs)
    assert small.k.weight.shape == (20, WIDTH)
    torch.testing.assert_close(small(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


def test_where_no_side_is_linear_only_values_shrink() -> None:
    torch.manual_seed(0)
    model, inputs = Normalised().eval(), (torch.randn(2, 5, WIDTH),)
    report = fxfib.compile(model, 0.0, inputs).fibration
    assert any("neither side can be summed" in refusal.reason for refusal in report.refusals)
    lifted = fxfib.lift(model, 1.5, inputs)
    assert lifted.q.weight.shape == lifted.k.weight.shape == (WIDTH, WIDTH)
    assert lifted.v.weight.shape[0] > WIDTH
    assert fxfib.compile(lifted, 0.0, inputs).v.weight.shape == (WIDTH, WIDTH)


class Probe(nn.Module):
    """A learned query: the same one for every example, so all of its channels are constants."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.o = nn.Linear(WIDTH, 12), nn.Linear(12, 4)
        self.probe = nn.Parameter(torch.randn(1, 1, 12))
        self.mix = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.e(x))
        found: Tensor = self.o(self.mix(self.probe.expand(x.shape[0], 1, 12), x, x)[0])
        return found


def test_constant_queries_are_equal_but_for_rounding_too() -> None:
    torch.manual_seed(3)
    model = Probe().eval()
    with torch.no_grad():
        model.mix.in_proj_bias.normal_()
    inputs = (torch.randn(2, 5, WIDTH),)
    direct = fxfib.compile(model, 0.0, inputs)
    small = fxfib.compile(fxfib.lift(model, 1.5, inputs), 0.0, inputs)
    torch.testing.assert_close(small(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    assert small.fibration.parameters_after == direct.fibration.parameters_after


def test_a_packed_weight_goes_when_one_of_its_parts_shrinks() -> None:
    torch.manual_seed(4)
    model = Probe().eval()
    inputs = (torch.randn(2, 5, WIDTH),)
    small = fxfib.compile(model, 0.0, inputs)
    # The probe is one number now, and so is its column in the queries' rows.
    saved = 11 + 12 * 11
    assert small.fibration.parameters_after == small.fibration.parameters_before - saved
    assert sorted(p.shape for n, p in small.named_parameters() if "in_proj_weight" in n) == [
        (12, 1),
        (24, 12),
    ]
    torch.testing.assert_close(small(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


def test_the_report_says_why_fibers_of_one_head_stay() -> None:
    model = planted([(0, 3)], fused=True)
    with torch.no_grad():
        for layer in (model.k, model.v):
            layer.weight.normal_()
    report = fxfib.compile(model, 0.0, (torch.randn(2, 5, WIDTH),)).fibration
    assert report.parameters_after == report.parameters_before
    assert [g.apart for g in report.groups if "q" in g.members] == [1]
    text = str(report)
    assert "one size of heads" in text and "no fibers" not in text
    assert type(report).from_dict(report.to_dict()) == report
