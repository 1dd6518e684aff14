"""What the rules do not cover."""

from __future__ import annotations

import numpy as np
import torch
from planting import Builder, Holder

from strategies.values import Val


def class_token(b: Builder, v: Val) -> Val | None:
    if len(v.space) != 1 or v.first or v.copies.constant.any():
        return None
    own = np.maximum(v.copies.member, 0)
    values = b.normal(v.copies.size)
    wide = np.where(v.copies.member >= 0, values[own] * v.copies.scale, 0.3)
    part = b.part(
        *[Holder(token=torch.from_numpy(n.reshape(1, 1, -1).copy())) for n in (values, wide)],
        "token",
    )
    name = b.step(
        lambda parts, x: torch.cat([parts[part].token.expand(x.shape[0], -1, -1), x], 1), (v.name,)
    )
    b.unclaimed.append("a class token laid beside the others")
    b.log.append(f"{name} = class_token({v.name})")
    return v.then(name, space=(v.space[0] + 1,))


def unknown(b: Builder, v: Val) -> Val | None:
    """An element-wise op that nobody knows."""
    if not v.copies.plain:
        return None
    function = b.pick((torch.special.i0e, torch.special.bessel_j0))
    name = b.step(lambda parts, x: function(x), (v.name,))
    b.unclaimed.append("an op without a rule")
    b.log.append(f"{name} = unknown({v.name})")
    return v.then(name, copies=v.copies.mapped(function))


def flipped(b: Builder, v: Val) -> Val | None:
    axis = v.axis
    name = b.step(lambda parts, x: x.flip(axis), (v.name,))
    b.unclaimed.append("channels in reverse")
    b.log.append(f"{name} = flip({v.name})")
    return v.then(name, copies=v.copies.moved(
        np.arange(v.copies.size)[::-1], np.arange(len(v.copies))[::-1]
    ))  # fmt: skip
