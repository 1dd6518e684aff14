"""Forms of attention as published models write them, each with what a lift may widen."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, DEPTH, LENGTH = 24, 4, 6, 5


def cut(x: Tensor, heads: int) -> Tensor:
    """``[B, L, heads * d]`` as ``[B, heads, L, d]``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Form(nn.Module):
    """Query, key, value and output layers; the forms say what happens between."""

    groups = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, self.groups * DEPTH)
        self.v = nn.Linear(WIDTH, self.groups * DEPTH)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return cut(self.q(x), HEADS), cut(self.k(x), self.groups), cut(self.v(x), self.groups)

    def joined(self, y: Tensor) -> Tensor:
        found: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return found


def angles(speeds: tuple[float, ...]) -> Tensor:
    return torch.arange(LENGTH)[:, None] * torch.tensor(speeds)


class Rotary(Form):
    """As LLaMA: the first half of a head is turned with the second one."""

    def __init__(self, groups: int = HEADS, form: str = "fused") -> None:
        self.groups = groups
        super().__init__()
        self.form = form
        angle = angles((1.0, 0.3, 0.09) * 2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def turn(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        turned: Tensor = x * self.cos + torch.cat([-second, first], -1) * self.sin
        return torch.cat([x[:, :, :1], turned[:, :, 1:]], 2) if self.form == "token" else turned

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        q, k = self.turn(q), self.turn(k)
        if self.form == "repeated":
            times = HEADS // self.groups
            k, v = (t[:, :, None].expand(-1, -1, times, -1, -1).reshape(q.shape) for t in (k, v))
        grouped = self.groups != HEADS and self.form != "repeated"
        return self.joined(F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped))


class Partial(Rotary):
    """As GPT-NeoX: the last channels of a head are not turned."""

    def __init__(self, turned: int = 4) -> None:
        super().__init__()
        self.turned = turned
        angle = angles((1.0, 0.3, 0.09)[: turned // 2] * 2)
        self.cos, self.sin = angle.cos(), angle.sin()

    def turn(self, x: Tensor) -> Tensor:
        return torch.cat([super().turn(x[..., : self.turned]), x[..., self.turned :]], -1)


class Interleaved(Rotary):
    """As GPT-J: neighbours are turned together."""

    def __init__(self) -> None:
        super().__init__()
        angle = angles((1.0, 0.3, 0.09)).repeat_interleave(2, -1)
        self.cos, self.sin = angle.cos(), angle.sin()

    def turn(self, x: Tensor) -> Tensor:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * self.cos + turned * self.sin


class Computed(Rotary):
    """Angles that depend on the input."""

    def forward(self, x: Tensor) -> Tensor:
        angle = x[:, None, :, :1].abs() * torch.tensor([1.0, 0.3, 0.09] * 2)
        q, k, v = self.heads(x)
        q, k = (
            t * angle.cos() + torch.cat([-t[..., 3:], t[..., :3]], -1) * angle.sin() for t in (q, k)
        )
        return self.joined(F.scaled_dot_product_attention(q, k, v))


class Biased(Form):
    """As DeBERTa: biases are added to heads."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.ParameterList(torch.empty(1, HEADS, 1, DEPTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t + b for t, b in zip(self.heads(x), self.b, strict=True))
        return self.joined((q @ k.transpose(-1, -2)).softmax(-1) @ v)


class Relative(Form):
    """As XLNet: queries meet keys and positions, each with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.Linear(WIDTH, WIDTH, bias=False)
        self.b = nn.ParameterList(torch.empty(HEADS, DEPTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, r = (f(x).unflatten(-1, (HEADS, -1)) for f in (self.q, self.k, self.v, self.r))
        scores = torch.einsum("bihd,bjhd->bhij", q + self.b[0], k)
        scores = scores + torch.einsum("bihd,bjhd->bhij", q + self.b[1], r)
        y = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
        found: Tensor = self.o(y.flatten(2))
        return found


class Tables(Form):
    """As SAM: queries meet tables of relative positions, too."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.empty(LENGTH, DEPTH))
        self.other = nn.Parameter(torch.empty(HEADS, DEPTH, LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2) + q @ self.one.t() + q @ self.other
        return self.joined(scores.softmax(-1) @ v)


class Talking(Form):
    """As CaiT: scores of all heads are mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = self.before((q @ k.transpose(-1, -2)).permute(0, 2, 3, 1)).softmax(2)
        return self.joined(self.after(scores).permute(0, 3, 1, 2) @ v)


class Normed(Form):
    """As Qwen3: queries and keys are normalised, head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_q, self.norm_k = nn.RMSNorm(DEPTH), nn.RMSNorm(DEPTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        q, k = self.norm_q(q), self.norm_k(k)
        return self.joined(F.scaled_dot_product_attention(q, k, v))


class Cosine(Form):
    """As Swin V2: scores are cosines, times a factor of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(HEADS, 1, 1))
        self.bias = nn.Parameter(torch.empty(HEADS, LENGTH, LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        q, k = (t / t.square().sum(-1, keepdim=True).sqrt() for t in (q, k))
        scores = q @ k.transpose(-1, -2) * self.scale.exp() + self.bias
        return self.joined(scores.softmax(-1) @ v)


class Remembering(Form):
    """Keys and values of earlier calls are inputs."""

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        return self.joined(F.scaled_dot_product_attention(q, k, v))


class Convolved(nn.Module):
    """As CoAtNet: one 1x1 convolution makes queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], HEADS, 3 * DEPTH, -1).chunk(3, 2)
        y = F.scaled_dot_product_attention(*(t.transpose(-1, -2) for t in (q, k, v)))
        found: Tensor = self.o(y.transpose(-1, -2).reshape(x.shape))
        return found


class Unequal(nn.Module):
    """As LeViT: batch norm behind the layer, and values wider than keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, HEADS * (DEPTH + DEPTH + 11), bias=False)
        self.norm = nn.BatchNorm1d(HEADS * 23)
        self.bias = nn.Parameter(torch.empty(HEADS, LENGTH, LENGTH))
        self.o = nn.Linear(HEADS * 11, WIDTH)
        self.norm.running_mean.normal_()  # type: ignore[operator]
        self.norm.running_var.uniform_(0.5, 2)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        made = self.norm(self.qkv(x).flatten(0, 1)).view(-1, LENGTH, HEADS, 23)
        q, k, v = (t.transpose(1, 2) for t in made.split([DEPTH, DEPTH, 11], 3))
        y = (q @ k.transpose(-1, -2) + self.bias).softmax(-1) @ v
        found: Tensor = self.o(F.hardswish(y.transpose(1, 2).flatten(2)))
        return found


class Pooled(nn.Module):
    """As GCNet: one map of positions weights the mean of every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.m = nn.Conv2d(3, 11, 3), nn.Conv2d(11, 1, 1)
        self.o = nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x).relu()
        weights = self.m(x).flatten(2).softmax(-1)
        found: Tensor = self.o((x.flatten(2) @ weights.transpose(1, 2)).flatten(1))
        return found


#: By name: the model, and which of its layers are wider after a lift.
FORMS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "rotary": (Rotary, "qkv"),
    "rotary, grouped": (lambda: Rotary(2), "qkv"),
    "rotary, repeated": (lambda: Rotary(2, "repeated"), "qkv"),
    "rotary, class token": (lambda: Rotary(HEADS, "token"), "qkv"),
    "rotary, partial": (Partial, "qkv"),
    "rotary, nothing left": (lambda: Partial(DEPTH), "qkv"),
    "rotary, interleaved": (Interleaved, "qkv"),
    "rotary, computed": (Computed, "v"),
    "biased heads": (Biased, "qkv"),
    "relative, einsum": (Relative, "qkvr"),
    "tables": (Tables, "qkv"),
    "talking heads": (Talking, "qkv"),
    "normed": (Normed, "v"),
    "cosine": (Cosine, "v"),
    "past keys": (Remembering, ""),
    "convolved": (Convolved, "qkv"),
    "batch norm": (Unequal, "qkv"),
    "pooled": (Pooled, "c"),
}


def inputs_of(name: str) -> tuple[Tensor, ...]:
    """Inputs of a form."""
    if name in ("convolved", "pooled"):
        return (torch.randn(2, WIDTH if name == "convolved" else 3, 4, 3),)
    first = (torch.randn(2, LENGTH, WIDTH),)
    past = tuple(torch.randn(2, HEADS, 3, DEPTH) for _ in range(2))
    return first + past if name == "past keys" else first
