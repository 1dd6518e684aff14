"""Channels and places moved, cut, joined, pooled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from planting import Builder, Copies, concatenated
from torch import Tensor

from strategies.elementwise import activation
from strategies.linear import affine
from strategies.values import Val

MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def concatenate(b: Builder, v: Val, other: Val) -> Val | None:
    if (other.space, other.first) != (v.space, v.first) or len(v.copies) + len(other.copies) > 40:
        return None
    axis = v.axis
    name = b.step(lambda parts, x, y: torch.cat([x, y], axis), (v.name, other.name))
    b.log.append(f"{name} = cat({v.name}, {other.name})")
    return v.then(name, copies=concatenated([v.copies, other.copies]))


def split(b: Builder, v: Val) -> Val | None:
    """Cut in two, one half activated, joined again, perhaps the other way round."""
    if not v.copies.cuts:
        return None
    base, wide = b.pick(v.copies.cuts)
    axis, total = v.axis, len(v.copies)
    way = b.pick(("split", "slice", "narrow"))

    def halves(at: int, width: int) -> list[Callable[..., Tensor]]:
        if way == "split":
            return [lambda parts, x, k=k: torch.split(x, [at, width - at], axis)[k] for k in (0, 1)]
        if way == "slice":
            left, right = (
                [slice(None)] * axis + [slice(0, at)],
                [slice(None)] * axis + [slice(at, None)],
            )
            return [lambda parts, x, s=tuple(s): x[s] for s in (left, right)]
        return [
            lambda parts, x, s=s, n=n: x.narrow(axis, s, n) for s, n in ((0, at), (at, width - at))
        ]

    pieces = []
    for k, (low, high) in enumerate(((0, wide), (wide, total))):
        name = b.step(halves(base, v.copies.size)[k], (v.name,), halves(wide, total)[k])
        member = v.copies.member[low:high]
        size = (base, v.copies.size - base)[k]
        piece = v.copies.at(np.arange(low, high))
        shifted = np.where(member >= 0, member - (base if k else 0), member)
        pieces.append(v.then(name, copies=replace(piece, member=shifted, size=size)))
    b.log.append(f"{pieces[0].name}, {pieces[1].name} = {way}({v.name}) at {base}/{wide}")
    left, right = pieces[0], activation(b, pieces[1])
    return concatenate(b, right, left) if b.flip() else concatenate(b, left, right)


def shuffle(b: Builder, v: Val) -> Val | None:
    groups = v.copies.blocks
    if groups == 1 or not v.first or not v.space:
        return None
    base = np.arange(v.copies.size).reshape(groups, -1).T.reshape(-1)
    order = np.arange(len(v.copies)).reshape(groups, -1).T.reshape(-1)
    if b.flip():
        name = b.step(lambda parts, x: torch.channel_shuffle(x, groups), (v.name,))
    else:
        shape = v.space
        name = b.step(
            lambda parts, x: (
                x.reshape(x.shape[0], groups, -1, *shape).transpose(1, 2).flatten(1, 2)
            ),
            (v.name,),
        )
    b.log.append(f"{name} = shuffle({v.name}, {groups})")
    return v.then(name, copies=v.copies.moved(base, order))


def pixel_shuffle(b: Builder, v: Val) -> Val | None:
    if not (v.first and len(v.space) == 2) or max(v.space) > 4:
        return None
    inner = b.copies(b.pick((3, 4, 5)), scaled=False, whole=True)
    made = affine(b, v, inner.product(4), keep_space=True)
    name = b.step(lambda parts, x: F.pixel_shuffle(x, 2), (made.name,))
    b.log.append(f"{name} = pixel_shuffle({made.name})")
    return made.then(name, copies=inner, space=tuple(2 * s for s in made.space))


def pixel_unshuffle(b: Builder, v: Val) -> Val | None:
    if not (v.first and len(v.space) == 2) or any(s % 2 for s in v.space) or len(v.copies) > 10:
        return None
    name = b.step(lambda parts, x: F.pixel_unshuffle(x, 2), (v.name,))
    b.log.append(f"{name} = pixel_unshuffle({v.name})")
    return v.then(name, copies=v.copies.product(4), space=tuple(s // 2 for s in v.space))


def pool(b: Builder, v: Val) -> Val | None:
    dims = len(v.space)
    if not v.first or not dims or min(v.space) < 2:
        return None
    constant = bool(np.any(v.copies.constant & (v.copies.value != 0)))
    padded = not constant and min(v.space) > 2
    word = b.pick(("max", "avg", "adaptive", *(("padded",) if padded else ())))
    kind = {
        "max": (F.max_pool1d, F.max_pool2d, F.max_pool3d),
        "avg": (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
        "padded": (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
        "adaptive": (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    }[word][dims - 1]
    if word == "adaptive":
        name = b.step(lambda parts, x: kind(x, 2), (v.name,))
        space = (2,) * dims
    elif word == "padded":
        name = b.step(lambda parts, x: kind(x, 3, stride=1, padding=1), (v.name,))
        space = v.space
    else:
        name = b.step(lambda parts, x: kind(x, 2), (v.name,))
        space = tuple(s // 2 for s in v.space)
    b.log.append(f"{name} = {word}_pool({v.name})")
    return v.then(name, space=space)


def resize(b: Builder, v: Val) -> Val | None:
    if not v.first or not v.space or max(v.space) > 4:
        return None
    mode = b.pick(("nearest", MODES[len(v.space)]))
    name = b.step(lambda parts, x: F.interpolate(x, scale_factor=2, mode=mode), (v.name,))
    b.log.append(f"{name} = resize({v.name}, {mode})")
    return v.then(name, space=tuple(2 * s for s in v.space))


def pad_space(b: Builder, v: Val) -> Val | None:
    if not v.first or not v.space or max(v.space) > 7 or min(v.space) < 2:
        return None
    word = b.pick(("constant", "reflect", "replicate"))
    if word == "constant" and np.any(v.copies.constant & (v.copies.value != 0)):
        return None
    if word != "constant" and len(v.space) == 3:
        return None
    pad = (1, 0) * len(v.space)
    name = b.step(lambda parts, x: F.pad(x, pad, mode=word), (v.name,))
    b.log.append(f"{name} = pad({v.name}, {word})")
    return v.then(name, space=tuple(s + 1 for s in v.space))


def pad_channels(b: Builder, v: Val) -> Val | None:
    before, after = b.pick(((0, 1), (1, 2), (2, 0)))
    value = b.pick((0.0, 0.0, 0.5))
    rest = (0, 0) * (len(v.space) if v.first else 0)
    name = b.step(lambda parts, x: F.pad(x, (*rest, before, after), value=value), (v.name,))
    copies = v.copies
    tag = b.tag() * 64 * 64
    number = before + after
    ends = np.arange(number)
    left, right = ends[:before], ends[before:]
    member = np.r_[left, np.where(copies.member >= 0, copies.member + before, copies.member)]
    member = np.r_[member, right + copies.size]

    def around(array: Any, fill: float) -> Any:
        return np.r_[np.full(before, fill), array, np.full(after, fill)]

    padded = Copies(
        member.astype(np.int64),
        around(copies.scale, 1.0),
        around(copies.value, 0.0),
        np.r_[left + tag, copies.ident, right + tag].astype(np.int64),
        copies.size + number,
    )
    b.log.append(f"{name} = pad_channels({v.name}, {before}, {after}, {value})")
    return v.then(name, copies=padded)


def flatten(b: Builder, v: Val) -> Val | None:
    width = int(np.prod(v.space, dtype=int))
    if not v.space or width * len(v.copies) > 400:
        return None
    name = b.step(lambda parts, x: x.flatten(1), (v.name,))
    b.log.append(f"{name} = flatten({v.name})")
    return Val(name, v.copies.product(width, outside=not v.first))


def pooled(b: Builder, v: Val) -> Val | None:
    if not v.space:
        return None
    places = tuple(range(2, 2 + len(v.space))) if v.first else tuple(range(1, 1 + len(v.space)))
    way = b.pick(("mean", "amax", "sum" if not v.copies.constant.any() else "mean"))
    function = {"mean": torch.mean, "amax": torch.amax, "sum": torch.sum}[way]
    name = b.step(lambda parts, x: function(x, places), (v.name,))
    b.log.append(f"{name} = {way} over space({v.name})")
    return Val(name, v.copies)


def over_channels(b: Builder, v: Val) -> Val | None:
    """A mean, sum or maximum over the channels, subtracted from them."""
    if not (v.copies.whole and v.copies.plain):
        return None
    way = b.pick(("mean", "sum", "amax"))
    axis, counts = v.axis, v.copies.counts
    shape = [1] * (1 + len(v.space))
    shape.insert(axis, -1)
    shape = shape[: 2 + len(v.space)]
    weights = counts / counts.sum() if way == "mean" else counts
    numbers = torch.from_numpy(
        weights.reshape([-1 if k == axis else 1 for k in range(2 + len(v.space))])
    )
    keep = b.step(
        lambda parts, x: (
            x.amax(axis, keepdim=True)
            if way == "amax"
            else (x * numbers.to(x.dtype)).sum(axis, keepdim=True)
        ),
        (v.name,),
        lambda parts, x: {"mean": torch.mean, "sum": torch.sum, "amax": torch.amax}[way](
            x, axis, keepdim=True
        ),
    )
    name = b.step(lambda parts, x, y: x - y * 0.5, (v.name, keep))
    b.log.append(f"{name} = minus {way} over channels({v.name})")
    return v.then(name)


def turned(b: Builder, v: Val) -> Val | None:
    """Channels last, or first again."""
    if not v.space:
        return None
    rank = 2 + len(v.space)
    order = (0, *range(2, rank), 1) if v.first else (0, rank - 1, *range(1, rank - 1))
    name = b.step(lambda parts, x: x.permute(order), (v.name,))
    b.log.append(f"{name} = permute({v.name})")
    return v.then(name, first=not v.first)


def tokens(b: Builder, v: Val) -> Val | None:
    """An image as a row of tokens, ``[N, T, C]``."""
    if not v.first or len(v.space) < 2 or np.prod(v.space) > 64:
        return None
    name = b.step(lambda parts, x: x.flatten(2).transpose(1, 2), (v.name,))
    b.log.append(f"{name} = tokens({v.name})")
    return v.then(name, first=False, space=(int(np.prod(v.space)),))
