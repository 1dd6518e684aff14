"""Element by element."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from planting import Builder, Holder
from torch import Tensor, nn

from strategies.values import Val, assign

HOMOGENEOUS: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ("relu", F.relu),
    ("leaky_relu", lambda x: F.leaky_relu(x, 0.1)),
    ("abs", torch.abs),
    ("dropout", lambda x: F.dropout(x, 0.5, training=False)),
    ("halved", lambda x: x * 0.5),
)
OTHERS: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ("gelu", F.gelu),
    ("silu", F.silu),
    ("sigmoid", torch.sigmoid),
    ("tanh", torch.tanh),
    ("hardswish", F.hardswish),
    ("softplus", F.softplus),
    ("elu", F.elu),
    ("relu6", F.relu6),
    ("mish", F.mish),
    ("shifted", lambda x: 1.5 - x),
    ("clamped", lambda x: x.clamp(-0.8, 1.1)),
)


def activation(b: Builder, v: Val) -> Val:
    word, function = b.pick(HOMOGENEOUS if not v.copies.plain or b.flip() else OTHERS)
    name = b.step(lambda parts, x: function(x), (v.name,))
    b.log.append(f"{name} = {word}({v.name})")
    return v.then(name, copies=v.copies.mapped(function))


def prelu(b: Builder, v: Val) -> Val | None:
    if not v.first and v.space:
        return None
    slopes = b.normal(v.copies.size) * 0.3
    wide_slopes = np.where(v.copies.member >= 0, slopes[np.maximum(v.copies.member, 0)], 0.2)
    base = assign(nn.PReLU(v.copies.size), weight=slopes)
    wide = assign(nn.PReLU(len(v.copies)), weight=wide_slopes)
    part = b.part(base, wide, name="prelu")
    name = b.step(lambda parts, x: parts[part](x), (v.name,))
    b.candidate(part, "weight", 0, v.copies)
    b.log.append(f"{name} = prelu({v.name})")
    value = v.copies.value
    value = np.where(value > 0, value, value * wide_slopes)
    return v.then(name, copies=replace(v.copies, value=np.where(v.copies.constant, value, 0.0)))


def parameter(b: Builder, v: Val) -> Val | None:
    """Numbers of every channel added, multiplied, divided by (layer scale, position tables)."""
    size = v.copies.size
    own = np.maximum(v.copies.member, 0)
    known = v.copies.member >= 0
    word = b.pick(("add", "mul", "div", "sub", "positions"))
    shape = [1] * len(v.space)
    shape.insert(v.axis - 1, -1)
    if word == "positions":
        # A class token or position table: another number at every place.
        if not v.space or v.copies.constant.any():
            return None
        table = b.normal(size, *v.space)
        wide = np.where(known, v.copies.scale, 1.0).reshape(-1, *[1] * len(v.space)) * table[own]
        if not v.first:
            table, wide = np.moveaxis(table, 0, -1), np.moveaxis(wide, 0, -1)
        numbers = table[None], wide[None]
        copies = v.copies
        if not v.copies.plain:
            b.unclaimed.append("position tables of which one row is a multiple of another")
    else:
        values = b.normal(size)
        if word in ("mul", "div"):
            values = np.sign(values) * (np.abs(values) + 0.3)
            other = np.where(known, values[own], 1.25)
            result = v.copies.value * other if word == "mul" else v.copies.value / other
        else:
            other = np.where(known, values[own] * v.copies.scale, 0.6)
            result = v.copies.value + other * (1 if word == "add" else -1)
        copies = replace(v.copies, value=np.where(v.copies.constant, result, 0.0))
        numbers = values.reshape(shape), other.reshape(shape)
    tables = [Holder(table=torch.from_numpy(np.ascontiguousarray(n))) for n in numbers]
    part = b.part(*tables, name=word)
    function = {"add": torch.add, "mul": torch.mul, "div": torch.div, "sub": torch.sub}.get(
        word, torch.add
    )
    name = b.step(lambda parts, x: function(x, parts[part].table), (v.name,))
    if word != "positions":
        axis = v.axis - 1 if len(v.space) else 0
        b.candidate(part, "table", axis, v.copies)
    b.log.append(f"{name} = {word} numbers({v.name})")
    return v.then(name, copies=copies)
