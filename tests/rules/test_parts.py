"""Parts of a value, by themselves: what they have in common, and what only looks alike."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfib

CUTS: dict[str, Callable[[Tensor, int], list[Tensor]]] = {
    "unbind": lambda x, axis: list(x.unbind(axis)),
    "select": lambda x, axis: [x.select(axis, k) for k in range(x.shape[axis])],
    "negative": lambda x, axis: [x.select(axis, k - x.shape[axis]) for k in range(x.shape[axis])],
    "split": lambda x, axis: [part.squeeze(axis) for part in x.split(1, axis)],
    "chunk": lambda x, axis: [part.squeeze(axis) for part in x.chunk(x.shape[axis], axis)],
    "slice": lambda x, axis: [x.narrow(axis, k, 1).squeeze(axis) for k in range(x.shape[axis])],
}


class Packed(nn.Module):
    """Query, key and value of one convolution, cut out of ``(3, heads, depth)``.

    With ``pooled`` queries, as in Hiera, no product of two linear layers is left to follow.
    """

    def __init__(self, cut: str, heads: int, *, pooled: bool = False, linear: bool = False) -> None:
        super().__init__()
        self.heads, self.depth, self.cut, self.pooled = heads, 5, cut, pooled
        self.qkv: nn.Module = nn.Conv1d(7, 3 * heads * 5, 1)
        self.out: nn.Module = nn.Conv1d(heads * 5, 7, 1)
        if linear:
            self.qkv, self.out = nn.Linear(7, 3 * heads * 5), nn.Linear(heads * 5, 7)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x.mT).mT if self.linear else self.qkv(x)
        y = y.unflatten(1, (3, self.heads, self.depth))  # [B, 3, heads, depth, L]
        q, k, v = CUTS[self.cut](y, 1)
        if self.pooled:
            q = F.max_pool1d(q.flatten(1, 2), 2).unflatten(1, (self.heads, self.depth))
        z = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT.flatten(1, 2)
        return self.out(z.mT).mT if self.linear else self.out(z)


def made(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return module.eval()


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("cut", "heads", "options"),
    [
        *((cut, 2, {}) for cut in ("unbind", "select", "negative")),
        ("unbind", 1, {}),
        ("select", 3, {"pooled": True}),
        ("unbind", 2, {"pooled": True, "linear": True}),
        ("unbind", 2, {"linear": True}),
    ],
)
def test_lifted_queries_keys_and_values_of_one_layer_come_back(
    cut: str, heads: int, options: dict[str, bool]
) -> None:
    torch.manual_seed(1)
    model = made(Packed(cut, heads, **options))
    inputs = (torch.randn(2, 7, 6),)
    lifted = fxfib.lift(model, 1.5, inputs, seed=1)
    assert size(lifted) > size(model)
    small = fxfib.compile(lifted, 0.0, inputs)
    assert small.fibration.exact_error < 1e-6
    assert size(small) == size(model)
    other = torch.randn(3, 7, 6)
    torch.testing.assert_close(small(other), model(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("merged", "near"), [(True, None), (False, "q"), (False, "v")])
def test_channels_merge_where_queries_and_values_agree(merged: bool, near: str | None) -> None:
    """Keys may be anything; one query or value that differs in one head keeps the channel."""
    torch.manual_seed(1)
    model = made(Packed("unbind", 2))
    with torch.no_grad():
        for tensor in (model.qkv.weight, model.qkv.bias):
            rows = tensor.view(3, 2, 5, -1)
            rows[0, :, 3] = rows[0, :, 1]
            rows[2, :, 3] = 2 * rows[2, :, 1]  # values may differ by a factor
        if near is not None:
            rows = model.qkv.weight.view(3, 2, 5, -1)
            rows["qkv".index(near), 1, 3, 0] += 0.5
    inputs = (torch.randn(2, 7, 6),)
    small = fxfib.compile(model, 0.0, inputs)
    assert small.qkv.weight.shape[0] == (24 if merged else 30)
    other = torch.randn(3, 7, 6)
    torch.testing.assert_close(small(other), model(other), rtol=1e-4, atol=1e-5)


class Beside(nn.Module):
    """Two positions of every channel, one behind the other, and rows that exchange them."""

    def __init__(self, take: Callable[[Tensor], list[Tensor]]) -> None:
        super().__init__()
        self.take = take
        self.first, self.second, self.last = nn.Conv1d(3, 5, 1), nn.Linear(10, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat(self.take(self.first(x).relu()), 1)
        return self.last(torch.tanh(self.second(y)))


TAKEN: dict[str, Callable[[Tensor], list[Tensor]]] = {
    **{name: lambda x, cut=cut: cut(x, 2) for name, cut in CUTS.items()},
    "step": lambda x: [x[:, :, ::2].squeeze(2), x[:, :, 1::2].squeeze(2)],
    "index": lambda x: [x.index_select(2, torch.tensor([k])).squeeze(2) for k in (0, 1)],
    "tensor": lambda x: [x[:, :, torch.tensor([k])].squeeze(2) for k in (0, 1)],
    "flip": lambda x: [x.flip(2)[:, :, 0], x.roll(2, 2)[:, :, 0]],
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_channel_at_different_positions_is_not_one_node(name: str) -> None:
    torch.manual_seed(1)
    model = made(Beside(TAKEN[name]))
    with torch.no_grad():
        weight, bias = model.second.weight, model.second.bias
        weight[1, :5], weight[1, 5:], bias[1] = weight[0, 5:], weight[0, :5], bias[0]
    inputs = (torch.randn(2, 3, 2),)
    small = fxfib.compile(model, 0.0, inputs)
    assert size(small) == size(model)
    torch.testing.assert_close(small(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
