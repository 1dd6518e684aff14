"""Attention: nodes inside the heads are copied, on the side of the queries or of the keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from planting import Builder, Copies, concatenated, noise
from torch import Tensor, nn

from strategies.linear import affine
from strategies.positions import (
    equal_rows,
    half_alike,
    mask_of,
    masked,
    opened,
    turn,
    turned_heads,
)
from strategies.values import Val, assign


def heads_of(b: Builder, count: int, size: int, width: int, groups: int = 0) -> Copies:
    """Heads end to end, ``size`` channels each in the base and ``width`` in the wider network.

    With ``groups`` the heads that share one key have the same pattern of copies.
    """
    made: list[Copies] = []
    for place in range(count):
        ident = np.arange(width) + b.tag() * 64 * 64
        if groups and place % (count // groups):
            places = made[-1].ident - made[-1].ident.min()
            made.append(replace(made[-1], ident=ident[places]))
            continue
        extra = b.rng.integers(0, size, width - size)
        member = b.rng.permutation(np.r_[np.arange(size), extra]).astype(np.int64)
        # The places of copies depend on the order that was asked for, nothing else does.
        member = (
            member[np.argsort(noise(b.order, np.arange(width), b.tag()))] if b.order else member
        )
        ones = np.ones(width)
        made.append(Copies(member, ones, 0 * ones, ident, size))
    return concatenated(made)


def halved(b: Builder, weight: Any, bias: Any, source: Copies, out: Copies) -> tuple[Any, Any]:
    """The other side of a product: rows that add up, over the copies, to the base's row.

    Every copy has a part of its own of the row and of the bias, and numbers that cancel.
    """
    wide, offset = b.widen(weight[:, :, None], bias, source, out)
    wide, tag = wide[:, :, 0], b.tag()
    onto = np.zeros((len(out), out.size))
    onto[np.arange(len(out)), out.member] = 1.0
    share = 0.3 + noise(tag, out.ident)
    share = share / (onto @ (onto.T @ share))
    counts = onto.sum(0)
    raw = noise(tag + 7919, out.ident[:, None], source.ident[None, :]) * 2 - 1
    raw = raw - onto @ ((onto.T @ raw) / counts[:, None])
    raw[:, source.member < 0] = 0.0
    alone = (onto @ counts) == 1
    raw[alone] = 0.0
    # The rows stand in full before they are cut: each copy's is the base's, of its own kind.
    full = onto @ ((onto.T @ wide) / counts[:, None])
    level = onto @ ((onto.T @ offset) / counts)
    return full * share[:, None] + raw, level * share


def projection(
    b: Builder, v: Val, out: Copies, bias: bool, *, sums: Any = None, alike: Any = None
) -> tuple[Any, Any, Any, Any]:
    """Weight and bias of both networks; heads where ``sums`` is true hold parts that add up.

    ``alike`` gives, for every channel of the base, the one whose row it has.
    """
    weight = b.normal(out.size, v.copies.size) / np.sqrt(v.copies.size)
    offset = b.normal(out.size) if bias else None
    if alike is not None:
        weight, offset = weight[alike], None if offset is None else offset[alike]
    wide, shift = b.widen(weight[:, :, None], offset, v.copies, out)
    wide = wide[:, :, 0]
    if sums is not None and sums.any():
        other, level = halved(b, weight, offset, v.copies, out)
        wide = np.where(sums[:, None], other, wide)
        shift = np.where(sums, level, shift)
    return weight, offset, wide, shift


def balanced(out: Copies, found: tuple[Any, Any, Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Queries or keys whose copies are equal on both sides: each has its part of the product."""
    weight, offset, wide, shift = found
    part = out.counts[out.member] ** -0.5
    return weight, offset, wide * part[:, None], shift * part


def layers_of(found: tuple[Any, Any, Any, Any], bias: bool) -> list[nn.Module]:
    weight, offset, wide, shift = found
    return [
        assign(nn.Linear(*w.shape[::-1], bias=bias), weight=w, **({"bias": c} if bias else {}))
        for w, c in ((weight, offset), (wide, shift))
    ]


def as_tokens(b: Builder, v: Val) -> Val:
    """``[N, T, C]``."""
    if not v.first:
        return v
    return v.then(b.step(lambda _, x: x.transpose(1, 2), (v.name,)), first=False)


def fused(
    q: Tensor, k: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> Tensor:
    """One op, with grouped queries where there are more of them than keys."""
    return F.scaled_dot_product_attention(
        q, k, value, mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def written_out(
    q: Tensor, k: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> Tensor:
    """Product, scale, mask, softmax, product."""
    times = q.shape[1] // k.shape[1]
    if times > 1:
        k, value = k.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    scores = q @ k.transpose(-2, -1) * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return masked(scores, mask).softmax(-1) @ value


def attention(b: Builder, v: Val, memory: Val | None = None) -> Val | None:
    """Linear layers for queries, keys and values, heads, a product, perhaps with fewer keys."""
    if any(len(x.space) != 1 or x.space[0] > 30 for x in (v, memory or v)):
        return None
    v = as_tokens(b, v)
    memory = v if memory is None else as_tokens(b, memory)
    groups = b.pick((1, 2, 2, 3))
    heads = groups * b.pick((1, 1, 2))
    size, size_value = b.pick((2, 3)), b.pick((2, 3))
    width, width_value = size + b.pick((0, 1, 2)), size_value + b.pick((0, 1, 2))
    style, pairs, decoy = b.pick(("", "", "half", "interleaved")), None, False
    if style:
        pairs, decoy = heads_of(b, 1, size, width), b.flip(0.6)
        size, width = 2 * size, 2 * width
        queries = turned_heads(b, heads, pairs, style)
    else:
        queries = heads_of(b, heads, size, width, groups)
    shared = np.arange(heads) % (heads // groups) == 0
    first = np.repeat(shared, width)
    keys = Copies(
        np.concatenate([
            queries.member[first][k * width : (k + 1) * width]
            - (heads // groups - 1) * size * k for k in range(groups)
        ]),
        np.ones(groups * width), np.zeros(groups * width),
        np.arange(groups * width) + b.tag() * 64 * 64, groups * size,
    )  # fmt: skip
    values = heads_of(b, groups, size_value, width_value)
    # Each head has its copies on one side: equal rows there, rows that add up on the other.
    sums = b.rng.random(groups) < 0.5
    if b.flip(0.6):
        sums = np.full(groups, sums[0])
    bias = bool(v.copies.constant.any() or memory.copies.constant.any()) or b.flip(0.7)
    parts = []
    one, other = (sums & False, sums & False) if b.covers else (~sums, sums)
    every = (
        ("query", v, queries, np.repeat(np.repeat(one, heads // groups), width)),
        ("key", memory, keys, np.repeat(other, width)),
        ("value", memory, values, None),
    )
    for word, source, out, summed in every:
        alike = half_alike(out.size, size, style) if decoy and word != "value" else None
        found = projection(b, source, out, bias, sums=summed, alike=alike)
        if b.covers and word != "value":
            found = balanced(out, found)
        parts.append(b.part(*layers_of(found, bias), name=word))
        rows = out if summed is None else equal_rows(out, summed)
        b.candidate(parts[-1], "weight", 0, rows)
        if bias:
            b.candidate(parts[-1], "bias", 0, rows)
    turns: list[str] = []
    if pairs is not None:
        turns = [turn(b, style, pairs, v.space[0], decoy)]
        turns.append(turns[0] if memory is v else turn(b, style, pairs, memory.space[0], decoy))
    function = b.pick((fused, fused, written_out))
    mask = mask_of(b, v.space[0], memory.space[0], heads, square=memory is v)
    scale = size**-0.5 if b.flip(0.8) else 0.37

    def call(width: int, width_value: int) -> Callable[..., Tensor]:
        def run(tree: Any, x: Tensor, y: Tensor, told: Tensor) -> Tensor:
            q, k, value = [
                tree[part](source).unflatten(-1, (-1, w)).transpose(1, 2)
                for part, source, w in zip(
                    parts, (x, y, y), (width, width, width_value), strict=True
                )
            ]
            if turns:
                q, k = tree[turns[0]](q), tree[turns[1]](k)
            causal, table = mask.kind == "causal", mask(tree, told)
            return function(q, k, value, scale, causal, table).transpose(1, 2).flatten(2)

        return run

    sources = (v.name, memory.name, mask.source or v.name)
    name = b.step(call(size, size_value), sources, call(width, width_value))
    b.log.append(
        f"{name} = {function.__name__} attention({v.name}, {memory.name}) heads {heads}/{groups} "
        f"of {size}/{width} and {size_value}/{width_value}, sums {sums.astype(int)}"
        f"{'' if bias else ', no bias'}{f', {mask.kind}' if mask.kind else ''}"
        f"{f', rotary, {style}' if style else ''}{', half alike' if decoy else ''}"
    )
    cut = [values.at(np.arange(k * width_value, (k + 1) * width_value)) for k in range(groups)]
    together = []
    for head in range(heads):
        group = head // (heads // groups)
        one = cut[group]
        member = one.member - group * size_value
        together.append(replace(one, member=member, size=size_value))
    return v.then(name, copies=replace(concatenated(together), cuts=()))


def module(b: Builder, v: Val, memory: Val | None = None) -> Val | None:
    """``nn.MultiheadAttention``: queries, keys and values as wide as what they are made from."""
    if any(len(x.space) != 1 or x.space[0] > 30 for x in (v, memory or v)):
        return None
    v = as_tokens(b, v)
    heads, size = b.pick((1, 2, 3)), b.pick((2, 3))
    width = size + b.pick((0, 1, 1, 2))
    queries, values, out = (heads_of(b, heads, size, width) for _ in range(3))
    source = affine(b, v, heads_of(b, heads, size, width), bias=True)
    memory = source if memory is None else as_tokens(b, memory)
    sums = np.repeat(b.rng.random(heads) < 0.5, width)
    bias = bool(memory.copies.constant.any()) or b.flip(0.7)
    keys = replace(queries, ident=queries.ident + b.tag() * 64 * 64)
    one, other = (sums & False, sums & False) if b.covers else (~sums, sums)
    found = {
        "q": projection(b, source, queries, bias, sums=one),
        "k": projection(b, memory, keys, bias, sums=other),
        "v": projection(b, memory, values, bias),
    }
    if b.covers:
        found |= {"q": balanced(queries, found["q"]), "k": balanced(keys, found["k"])}
    # torch divides by the root of its own head's size.
    ratio = np.sqrt(width / size)
    weight, offset, wide, shift = found["q"]
    found["q"] = (weight, offset, wide * ratio, shift * ratio)
    last = projection(b, Val("", values, v.space, False), out, bias)
    separate = memory is not source
    modules = []
    for k, (channels, inside) in enumerate(
        ((source.copies.size, memory.copies.size), (len(source.copies), len(memory.copies)))
    ):
        made = nn.MultiheadAttention(
            channels, heads, bias=bias, batch_first=True,
            **({"kdim": inside, "vdim": inside} if separate else {}),
        )  # fmt: skip
        weights = [found[word][2 * k] for word in "qkv"]
        if made.in_proj_weight is None:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            assign(made, **dict(zip(names, weights, strict=True)))
        else:
            assign(made, in_proj_weight=np.concatenate(weights))
        if bias:
            assign(made, in_proj_bias=np.concatenate([found[word][2 * k + 1] for word in "qkv"]))
        assign(made.out_proj, weight=last[2 * k], **({"bias": last[2 * k + 1]} if bias else {}))
        modules.append(made)
    part = b.part(*modules, name="attention")
    if separate and bias:
        # The whole bias stays beside the parts of it that are made anew.
        b.unclaimed.append("a bias that is read in parts")
    rows = [equal_rows(queries, one), equal_rows(keys, other), values]
    if separate:
        for word, one in zip("qkv", rows, strict=True):
            b.candidate(part, f"{word}_proj_weight", 0, one)
    else:
        b.candidate(part, "in_proj_weight", 0, concatenated(rows))
    if bias:
        b.candidate(part, "in_proj_bias", 0, concatenated(rows))
    needed = b.flip(0.3)
    mask = mask_of(b, v.space[0], memory.space[0], 0, square=memory is source)

    def call(tree: Any, x: Tensor, y: Tensor, told: Tensor) -> Tensor:
        hidden: dict[str, Any] = {}
        if mask.kind == "padding":
            hidden = {"key_padding_mask": ~opened(told)}
        elif mask.kind == "padding, additive":
            hidden = {"key_padding_mask": mask(tree, told)[:, 0, 0]}
        elif mask.kind == "causal":
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            hidden = {"attn_mask": later}
        elif mask.kind:
            table = mask(tree, told)
            hidden = {"attn_mask": ~table if table.dtype == torch.bool else table}
        found: Tensor = tree[part](x, y, y, need_weights=needed, **hidden)[0]
        return found

    name = b.step(call, (source.name, memory.name, mask.source or source.name))
    b.candidate(part, "out_proj.weight", 0, out)
    b.log.append(
        f"{name} = MultiheadAttention attention({source.name}, {memory.name}) {heads} heads of "
        f"{size}/{width}, sums {sums.astype(int)}{'' if bias else ', no bias'}"
        f"{', separate' if separate else ''}{', weights' if needed else ''}"
        f"{f', {mask.kind}' if mask.kind else ''}"
    )
    return source.then(name, copies=replace(out, cuts=()))
