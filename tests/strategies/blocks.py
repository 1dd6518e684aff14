"""Blocks of transformers, and tables that are used at both ends."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from planting import Builder, identity

from strategies.attention import as_tokens, attention
from strategies.elementwise import activation
from strategies.linear import affine, linear
from strategies.norms import axis_norm
from strategies.values import Val


def encoder(b: Builder, v: Val) -> Val | None:
    """Norm, attention, addition; norm, two layers, addition."""
    if len(v.space) != 1 or v.space[0] > 30:
        return None
    v = as_tokens(b, v)
    if not (v.copies.whole and v.copies.plain):
        v = affine(b, v, b.copies(b.width(), scaled=False, whole=True))
    start = axis_norm(b, v)
    found = start and attention(b, start)
    if found is None:
        return None
    back = linear(b, found, v.copies, None, True)
    v = v.then(b.step(lambda _, x, y: x + y, (v.name, back.name)))
    between = axis_norm(b, v)
    assert between is not None
    inner = b.copies(b.width(), scaled=False, whole=True)
    back = linear(b, activation(b, linear(b, between, inner, None, True)), v.copies, None, True)
    name = b.step(lambda _, x, y: x + y, (v.name, back.name))
    b.log.append(f"{name} = encoder block")
    return v.then(name)


def tied_head(b: Builder, v: Val) -> Val | None:
    """A table that was looked up in gives the output too."""
    if not b.tables:
        return None
    part, copies, rows = b.pick(b.tables)
    if not (copies.whole and copies.plain):
        return None
    # The head adds up all copies, so each carries its part.
    onto = replace(copies, scale=1.0 / copies.counts[copies.member])
    made = affine(b, v, onto, keep_space=True)
    if made.first and made.space:
        return None
    name = b.step(lambda parts, x: F.linear(x, parts[part].weight), (made.name,))
    b.log.append(f"{name} = tied head({made.name}, {part})")
    return made.then(name, copies=identity(rows, start=b.tag() * 64 * 64))
