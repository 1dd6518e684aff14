"""Whole networks from a seed."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

import numpy as np
import torch
from planting import UNREAD, Builder, identity
from torch import Tensor, nn

from strategies.attention import attention, module
from strategies.blocks import encoder, tied_head
from strategies.branches import gate, glu, layer, mixer, projected, residual, reused
from strategies.elementwise import activation, parameter, prelu
from strategies.linear import affine, depthwise
from strategies.movement import (
    concatenate,
    flatten,
    over_channels,
    pad_channels,
    pad_space,
    pixel_shuffle,
    pixel_unshuffle,
    pool,
    pooled,
    resize,
    shuffle,
    split,
    tokens,
    turned,
)
from strategies.norms import axis_norm, instance_norm, norm_alone
from strategies.positions import Padding
from strategies.recurrent import recurrent, stepped
from strategies.uncovered import class_token, flipped, unknown
from strategies.values import Planted, Val, assign

OPS: tuple[tuple[int, Callable[[Builder, Val], Val | None]], ...] = (
    (8, layer), (4, depthwise), (2, norm_alone), (4, axis_norm), (2, instance_norm),
    (3, activation), (2, prelu), (5, parameter), (5, residual), (3, projected), (3, gate),
    (2, glu), (3, reused), (6, split), (7, shuffle), (2, pixel_shuffle), (2, pixel_unshuffle),
    (4, pool), (2, resize), (2, pad_space), (2, pad_channels), (1, flatten), (1, pooled),
    (4, over_channels), (2, turned), (2, tokens), (3, mixer),
)  # fmt: skip
# Recurrent layers, attention, tied tables, and what stands between them in such networks.
SEQUENCES: tuple[tuple[int, Callable[[Builder, Val], Val | None]], ...] = (
    (8, layer), (4, axis_norm), (3, activation), (2, parameter), (5, residual), (2, gate),
    (2, glu), (3, split), (2, pooled), (2, over_channels), (2, turned), (9, tokens), (2, mixer),
    (9, recurrent), (6, stepped), (8, attention), (7, module), (6, encoder), (6, tied_head),
)  # fmt: skip
PAIRS = (concatenate, attention, module)
KINDS = ("image", "image", "image", "line", "volume", "vector", "tokens", "words")
SEQUENCE_KINDS = ("image", "line", "tokens", "tokens", "words", "words")
UNCOVERED = (class_token, unknown, flipped)


def source(b: Builder, name: str, sequences: bool) -> tuple[Val, Tensor]:
    """An input and its first value."""
    batch, width = 3, b.pick((3, 5, 4))
    kind = b.pick(SEQUENCE_KINDS if sequences else KINDS)
    draw = torch.Generator().manual_seed(b.seed)
    if kind == "words":
        table = b.normal(7, b.width())
        plain = sequences and b.flip()
        copies = b.copies(table.shape[1], whole=plain, scaled=not plain and b.flip())
        wide = table[:, np.maximum(copies.member, 0)] * copies.scale
        wide[:, copies.constant] = copies.value[copies.constant]
        wide[:, copies.member == UNREAD] = b.normal(7, int((copies.member == UNREAD).sum()))
        modules = [assign(nn.Embedding(*t.shape), weight=t) for t in (table, wide)]
        part = b.part(*modules, name="embedding")
        made = b.step(lambda parts, x: parts[part](x), (name,))
        b.candidate(part, "weight", 1, copies)
        b.tables.append((part, copies, len(table)))
        b.log.append(f"{made} = embedding({name}) {copies.size}/{len(copies)}")
        b.paddings.append(Padding(name, 6))
        indices = torch.randint(0, 7, (batch, 6), generator=draw)
        return Val(made, copies, (6,), first=False), indices
    space = {
        "image": (b.pick((4, 6)), b.pick((4, 5))), "line": (b.pick((5, 8)),), "volume": (4, 4, 3),
        "vector": (), "tokens": (5,),
    }[kind]  # fmt: skip
    first = kind != "tokens"
    if not first:
        b.paddings.append(Padding(name, space[0]))
    shape = (batch, width, *space) if first else (batch, *space, width)
    value = torch.randn(shape, generator=draw, dtype=torch.float64)
    v = Val(name, identity(width, start=b.tag() * 64 * 64), space, first)
    b.log.append(f"{name}: {kind} {shape}")
    return layer(b, v), value


def plant(
    seed: int,
    *,
    order: int = 0,
    near: bool = False,
    steps: int | None = None,
    covers: bool = False,
    sequences: bool = False,
) -> Planted:
    """A random network with planted fibers.

    Args:
        seed: decides everything else.
        order: decides the order of the channels in the wider network, and nothing more.
        near: change one parameter of one copy by a relative 1e-3.
        steps: how many operations to try after the inputs; None: 3 to 10.
        covers: copies get equal errors as well.
        sequences: recurrent layers, attention and tied tables in place of convolutions.
    """
    b = Builder(seed, order)
    if covers:
        b = Builder(seed, order, scales=(1.0,), before=(1.0,), covers=True)
    names = ["first", "second", "third"][: int(b.rng.choice([1, 1, 1, 2, 3]))]
    made = [source(b, name, sequences) for name in names]
    values, inputs = [v for v, _ in made], tuple(x for _, x in made)
    ops = SEQUENCES if sequences else OPS
    weights = np.array([weight for weight, _ in ops], dtype=float)
    for _ in range(steps or int(b.rng.integers(3, 11))):
        place = int(b.rng.integers(len(values)))
        v = values[place]
        if b.flip(0.02):
            result = b.pick(UNCOVERED)(b, v)
        elif b.flip(0.12):
            result = (b.pick(PAIRS) if sequences else concatenate)(b, v, b.pick(values))
        else:
            op = ops[int(b.rng.choice(len(ops), p=weights / weights.sum()))][1]
            result = op(b, v)
        if result is None:
            continue
        if len(result.copies) > 40:
            result = layer(b, result)
        if b.flip(0.8):
            values[place] = result
        elif len(values) < 4:
            values.append(result)
    outputs = []
    for v in values:
        if v.space and b.flip():
            v = pooled(b, v) or v
        bias = b.flip()
        tag = b.tag() * 64 * 64
        outputs.append(affine(b, v, identity(b.pick((2, 3)), start=tag), bias=bias).name)
    for network in (b.base, b.wide):
        network.outputs = list(dict.fromkeys(outputs))
        network.double().eval()
    planted = Planted(b.base, b.wide, inputs, b.unclaimed, b.log)
    if near:
        planted.near = miss(b)
    return planted


def miss(b: Builder) -> str:
    """Change one number of one copy by a relative 1e-3; says which."""
    if not b.candidates:
        return ""
    rng = np.random.default_rng([b.seed, 7])
    part, name, axis, places = b.candidates[int(rng.integers(len(b.candidates)))]
    tensor = attrgetter(name)(b.wide.parts[part]).data
    # Channels stand in another order for another ``order``; a near miss is made for one only.
    place = int(places[int(rng.integers(len(places)))])
    row = tensor.select(axis, place)
    flat = row.reshape(-1)
    entry = int(flat.abs().argmax())
    index = np.unravel_index(entry, row.shape) if row.ndim else ()
    full = (*index[:axis], place, *index[axis:])
    tensor[full] *= 1.001
    return f"{part}.{name}{[int(i) for i in full]}"
