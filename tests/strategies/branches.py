"""Values that meet again: residual additions, gates, layers used twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from planting import Builder, Copies, identity
from torch import Tensor, nn

from strategies.elementwise import OTHERS, activation
from strategies.linear import affine, hidden, linear
from strategies.values import Val, assign


def layer(b: Builder, v: Val) -> Val:
    out = hidden(b, v)
    made = affine(b, v, out)
    return activation(b, made) if b.flip(0.8) else made


def residual(b: Builder, v: Val) -> Val:
    """``v + f(v)``: a branch of one or two layers with the channels of ``v``."""
    branch = v
    if b.flip(0.6):
        branch = activation(b, affine(b, branch, hidden(b, branch), keep_space=True))
    onto = replace(v.copies, value=np.where(v.copies.constant, b.pick((0.0, 1.0)), 0.0))
    branch = affine(b, branch, onto, keep_space=True)
    function = b.pick((torch.add, lambda x, y: y + x, lambda x, y: torch.add(x, y, alpha=0.5)))
    name = b.step(lambda parts, x, y: function(x, y), (v.name, branch.name))
    value = function(torch.from_numpy(v.copies.value), torch.from_numpy(onto.value)).numpy()
    b.log.append(f"{name} = residual({v.name}, {branch.name})")
    return v.then(name, copies=replace(v.copies, value=value))


def projected(b: Builder, v: Val) -> Val | None:
    """Two layers onto the same new channels, added: a projected shortcut."""
    if not v.space and b.flip():
        return None
    out = hidden(b, v)
    left = affine(b, v, out, keep_space=True)
    right = affine(
        b, activation(b, affine(b, v, hidden(b, v), keep_space=True)), out, keep_space=True
    )
    name = b.step(lambda parts, x, y: x + y, (left.name, right.name))
    b.log.append(f"{name} = projected({left.name}, {right.name})")
    return left.then(name, copies=replace(out, value=out.value * 2))


def gate(b: Builder, v: Val) -> Val | None:
    """Squeeze and excite: channels times a gate made of their means."""
    if not v.space:
        return None
    places = tuple(range(2, 2 + len(v.space))) if v.first else tuple(range(1, 1 + len(v.space)))
    pooled = b.step(lambda parts, x: x.mean(places), (v.name,))
    squeezed = Val(pooled, v.copies)
    squeezed = activation(b, affine(b, squeezed, hidden(b, squeezed)))
    onto = replace(
        v.copies,
        scale=np.ones(len(v.copies)),
        value=np.where(v.copies.constant, 0.3, 0.0),
    )
    excite = affine(b, squeezed, onto)
    shape = [1] * len(v.space)

    def multiply(parts: Any, x: Tensor, y: Tensor) -> Tensor:
        y = torch.sigmoid(y)
        for _ in shape:
            y = y.unsqueeze(-1 if v.first else 1)
        return x * y

    name = b.step(multiply, (v.name, excite.name))
    value = v.copies.value * torch.sigmoid(torch.from_numpy(onto.value)).numpy()
    b.log.append(f"{name} = gate({v.name}, {excite.name})")
    return v.then(name, copies=replace(v.copies, value=value))


def glu(b: Builder, v: Val) -> Val | None:
    inner = b.copies(b.width(), scaled=False, whole=True)
    n = inner.size
    double = Copies(
        np.r_[inner.member, inner.member + n],
        np.ones(2 * len(inner)),
        np.zeros(2 * len(inner)),
        np.r_[inner.ident * 2, inner.ident * 2 + 1],
        2 * n,
    )
    made = affine(b, v, double, keep_space=True)
    axis = made.axis
    name = b.step(lambda parts, x: F.glu(x, axis), (made.name,))
    b.log.append(f"{name} = glu({made.name})")
    return made.then(name, copies=inner)


def reused(b: Builder, v: Val) -> Val | None:
    """One layer used twice."""
    if not (v.copies.whole and v.copies.plain) or (v.first and v.space):
        return None
    copies = v.copies
    weight = b.normal(copies.size, copies.size) / np.sqrt(copies.size)
    bias = b.normal(copies.size)
    wide_weight, wide_bias = b.widen(weight[:, :, None], bias, copies, copies)
    modules = [
        assign(nn.Linear(*w.shape[::-1]), weight=w, bias=c)
        for w, c in ((weight, bias), (wide_weight[:, :, 0], wide_bias))
    ]
    part = b.part(*modules, name="reused")
    name = b.step(lambda parts, x: parts[part](torch.tanh(parts[part](x))), (v.name,))
    b.log.append(f"{name} = reused({v.name})")
    b.candidate(part, "weight", 0, copies)
    return v.then(name)


def mixer(b: Builder, v: Val) -> Val | None:
    """A two-layer network along the tokens, with copies on its own hidden axis."""
    if len(v.space) != 1 or not v.copies.plain or v.copies.constant.any():
        return None
    length = v.space[0]
    swap = not v.first
    start = v
    if swap:
        start = v.then(b.step(lambda parts, x: x.transpose(1, 2), (v.name,)), first=True)
    line, middle = identity(length), b.copies(b.width())
    along = Val(start.name, line, (v.copies.size,), first=False)
    up = linear(b, along, middle, None, True)
    word, function = b.pick(OTHERS)
    name = b.step(lambda parts, x: function(x), (up.name,))
    down = linear(b, up.then(name, copies=middle.mapped(function)), line, None, True)
    mixed = down.name
    if swap:
        mixed = b.step(lambda parts, x: x.transpose(1, 2), (mixed,))
    name = b.step(lambda parts, x, y: x + y, (v.name, mixed))
    b.log.append(f"{name} = mixer({v.name}, {word})")
    return v.then(name)
