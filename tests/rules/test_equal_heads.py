"""Heads that compute the same merge as wholes; heads that nearly do not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_forms import DEPTH, HEADS, LENGTH, WIDTH, Form, Rotary
from torch import Tensor, nn

import fxfib
from fxfib.errors import VerifyError
from fxfib.passes.layout import MergeLayout


class Masked(Form):
    """Attention with a bias of its own in every head."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.bias = nn.Parameter(torch.empty(HEADS, LENGTH, LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        if self.fused:
            return self.joined(F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias))
        return self.joined((q @ k.transpose(-1, -2) + self.bias).softmax(-1) @ v)


def head(tensor: Tensor, number: int) -> Tensor:
    return tensor[number * DEPTH : (number + 1) * DEPTH]


def planted(make: Callable[[], Form], pairs: tuple[tuple[int, int], ...]) -> Form:
    """The second head of every pair is a copy of the first one."""
    torch.manual_seed(4)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
        for one, other in pairs:
            for layer in (model.q, model.k, model.v):
                for tensor in (layer.weight, layer.bias):
                    if layer is model.q or model.groups == HEADS:
                        head(tensor, other).copy_(head(tensor, one))
            if isinstance(model, Masked):
                model.bias[other] = model.bias[one]
        if model.groups != HEADS:
            for layer in (model.k, model.v):
                for tensor in (layer.weight, layer.bias):
                    head(tensor, 1).copy_(head(tensor, 0))
    return model


MODELS: dict[str, tuple[Callable[[], Form], tuple[tuple[int, int], ...], int]] = {
    "fused": (lambda: Masked(fused=True), ((0, 2),), 3),
    "written out": (lambda: Masked(fused=False), ((0, 2), (1, 3)), 2),
    "rotary": (Rotary, ((3, 1),), 3),
    "whole groups": (lambda: Rotary(2, "repeated"), ((0, 2), (1, 3)), 2),
}


def change_bias(model: Form) -> None:
    if isinstance(model, Masked):
        model.bias[2, 0, 0] += 1e-3
    else:
        model.v.bias[DEPTH] += 1e-3


CHANGES: dict[str, Callable[[Form], object]] = {
    "": lambda model: None,
    "query": lambda model: model.q.weight[2 * DEPTH - 1, 0].add_(1e-3),
    "value or bias": change_bias,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", MODELS)
def test_equal_heads_merge_as_wholes(name: str, change: str) -> None:
    make, pairs, left = MODELS[name]
    model = planted(make, pairs)
    with torch.no_grad():
        CHANGES[change](model)
    inputs = (torch.randn(2, LENGTH, WIDTH),)
    small = fxfib.compile(model, 0.0, inputs)
    heads = small.q.weight.shape[0] // DEPTH
    if not change:
        assert heads == left and small.o.weight.shape == (WIDTH, left * DEPTH)
        assert small.k.weight.shape[0] == left * DEPTH * model.groups // HEADS
    elif name in ("rotary", "whole groups") or change != "query":
        assert heads > left
    other = torch.randn(3, LENGTH, WIDTH)
    torch.testing.assert_close(small(other), model(other), rtol=1e-4, atol=1e-5)


def test_keys_of_equal_heads_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MergeLayout, "sums", lambda self, scales, places: self.columns(scales))
    model = planted(*MODELS["fused"][:2])
    with pytest.raises(VerifyError):
        fxfib.compile(model, 0.0, (torch.randn(2, LENGTH, WIDTH),))
