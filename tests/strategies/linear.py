"""Linear layers and convolutions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from planting import Builder, Copies, Holder, noise
from torch import nn

from strategies.norms import batch_norm
from strategies.values import Val, assign

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def hidden(b: Builder, v: Val) -> Copies:
    """New channels for a layer that reads ``v``."""
    blocks = v.copies.blocks
    if v.first and v.space and b.flip(0.5 if blocks > 1 else 0.2):
        blocks = blocks if blocks > 1 else b.pick((2, 3))
        return b.copies(blocks * b.pick((2, 3, 4)), blocks=blocks, whole=True)
    if b.flip(0.35):
        return b.copies(b.width(), scaled=False, whole=True)
    return b.copies(b.width(), scaled=b.flip())


def output_size(space: tuple[int, ...], kernel: int, stride: int, pad: int, dilation: int) -> Any:
    return tuple((s + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for s in space)


def affine(
    b: Builder, v: Val, out: Copies, *, keep_space: bool = False, bias: bool | None = None
) -> Val:
    """A linear layer or convolution onto the given channels, perhaps with a batch norm."""
    normed = (v.first or not v.space) and b.flip(0.35)
    before = None
    target = out
    if normed:
        # Before a norm a copy may carry any factor, of any sign: the norm's gain undoes it.
        signs = b.rng.choice(b.before, size=10007)
        before = signs[out.ident % 10007]
        values = np.where(out.constant, noise(b.seed, out.ident) * 2 - 1, 0.0)
        target = replace(out, value=values)
    fixed = bool(v.copies.constant.any() or target.constant.any())
    has_bias = fixed or (b.flip(0.7) if bias is None else bias)
    if v.first and v.space:
        made = convolution(b, v, target, before, has_bias, keep_space)
    else:
        made = linear(b, v, target, before, has_bias)
    return batch_norm(b, made, out, before) if normed else made


def linear(b: Builder, v: Val, out: Copies, before: Any, has_bias: bool) -> Val:
    weight = b.normal(out.size, v.copies.size) / np.sqrt(v.copies.size)
    bias = b.normal(out.size) if has_bias else None
    wide_weight, wide_bias = b.widen(weight[:, :, None], bias, v.copies, out, before=before)
    kind = b.pick(("linear", "linear", "matmul", "addmm" if not v.space else "matmul"))
    if kind == "matmul" and v.copies.constant.any() and b.flip(0.9):
        kind = "linear"
    if kind == "linear":
        modules = [
            assign(
                nn.Linear(*w.shape[::-1], bias=has_bias),
                weight=w,
                **({"bias": c} if has_bias else {}),
            )
            for w, c in ((weight, bias), (wide_weight[:, :, 0], wide_bias))
        ]
        part = b.part(*modules, name="linear")
        name = b.step(lambda parts, x: parts[part](x), (v.name,))
        b.candidate(part, "weight", 0, out)
        if has_bias:
            b.candidate(part, "bias", 0, out)
    else:
        modules = []
        for w, c in ((weight, bias), (wide_weight[:, :, 0], wide_bias)):
            tensors = {"weight": torch.from_numpy(np.ascontiguousarray(w.T))}
            if has_bias:
                tensors["bias"] = torch.from_numpy(c.copy())
            modules.append(Holder(**tensors))
        part = b.part(*modules, name=kind)
        b.candidate(part, "weight", 1, out)
        if kind == "addmm" and has_bias:
            name = b.step(
                lambda parts, x: torch.addmm(parts[part].bias, x, parts[part].weight), (v.name,)
            )
        elif has_bias:
            if v.copies.constant.any():
                b.unclaimed.append("constants meet a product whose bias is added apart")
            name = b.step(lambda parts, x: x @ parts[part].weight + parts[part].bias, (v.name,))
        else:
            name = b.step(lambda parts, x: torch.matmul(x, parts[part].weight), (v.name,))
    b.log.append(
        f"{name} = {kind}({v.name}) {v.copies.size}/{len(v.copies)} -> {out.size}/{len(out)}"
    )
    return v.then(name, copies=out)


def convolution(
    b: Builder, v: Val, out: Copies, before: Any, has_bias: bool, keep_space: bool
) -> Val:
    dims = len(v.space)
    groups = 1
    if v.copies.blocks > 1 and v.copies.blocks == out.blocks and v.copies.plain:
        groups = v.copies.blocks
    transposed = groups == 1 and not keep_space and b.flip(0.12)
    changing = ((1, 1, 0, 1), (3, 1, 1, 1), (3, 2, 1, 1), (2, 1, 0, 1), (2, 2, 0, 1))
    keeping = ((1, 1, 0, 1), (3, 1, 1, 1), (3, 1, 2, 2))
    kernel, stride, pad, dilation = b.pick(keeping if keep_space else changing)
    if min(v.space) + 2 * pad < dilation * (kernel - 1) + 1 or (dims == 3 and dilation > 1):
        kernel, stride, pad, dilation = 1, 1, 0, 1
    space = output_size(v.space, kernel, stride, pad, dilation)
    if transposed:
        kernel, stride, pad, dilation = b.pick(((2, 2, 0, 1), (3, 1, 1, 1)))
        space = tuple((s - 1) * stride - 2 * pad + kernel for s in v.space)
        if max(space) > 9:
            transposed, kernel, stride, pad = False, 1, 1, 0
            space = v.space
    taps = kernel**dims
    borders = pad > 0 or transposed
    outs, ins = out.size // groups, v.copies.size // groups
    weight = b.normal(out.size, ins, taps) / np.sqrt(ins * taps)
    bias = b.normal(out.size) if has_bias else None
    pieces = []
    for group in range(groups):
        mine = block_of(v.copies, group, groups)
        theirs = block_of(out, group, groups)
        part_before = None if before is None else before.reshape(groups, -1)[group]
        rows = slice(group * outs, (group + 1) * outs)
        pieces.append(b.widen(
            weight[rows], None if bias is None else bias[rows], mine, theirs,
            before=part_before, borders=borders,
        ))  # fmt: skip
    wide_weight = np.concatenate([p[0] for p in pieces])
    wide_bias = np.concatenate([p[1] for p in pieces])
    modules = []
    for w, c, cin, cout in (
        (weight, bias, v.copies.size, out.size),
        (wide_weight, wide_bias, len(v.copies), len(out)),
    ):
        options = {"stride": stride, "padding": pad, "groups": groups, "bias": has_bias}
        values: dict[str, Any] = {"bias": c} if has_bias else {}
        if transposed:
            module = TRANSPOSED[dims](cin, cout, kernel, **options)
            values["weight"] = np.swapaxes(w, 0, 1).reshape(module.weight.shape)
        else:
            module = CONVOLUTIONS[dims](cin, cout, kernel, dilation=dilation, **options)
            values["weight"] = w.reshape(module.weight.shape)
        modules.append(assign(module, **values))
    part = b.part(*modules, name="conv")
    name = b.step(lambda parts, x: parts[part](x), (v.name,))
    b.candidate(part, "weight", 1 if transposed else 0, out)
    if has_bias:
        b.candidate(part, "bias", 0, out)
    b.log.append(
        f"{name} = conv{dims}d({v.name}) {v.copies.size}/{len(v.copies)} -> {out.size}/{len(out)} "
        f"k{kernel} s{stride} p{pad} d{dilation} g{groups}{' transposed' if transposed else ''}"
    )
    return v.then(name, copies=out, space=space)


def block_of(copies: Copies, block: int, blocks: int) -> Copies:
    if blocks == 1:
        return copies
    size, width = copies.size // blocks, len(copies) // blocks
    mine = copies.at(np.arange(block * width, (block + 1) * width))
    return replace(mine, member=mine.member - block * size, size=size)


def depthwise(b: Builder, v: Val) -> Val | None:
    """A convolution of every channel by itself, perhaps with several outputs a channel."""
    if not (v.first and v.space and v.copies.plain):
        return None
    if np.any(v.copies.constant & (v.copies.value != 0)):
        return None
    dims, several = len(v.space), b.pick((1, 1, 1, 2))
    if several * len(v.copies) > 30:
        several = 1
    kernel, stride, pad = b.pick(((3, 1, 1), (3, 2, 1), (1, 1, 0)))
    out = v.copies.product(several) if several > 1 else v.copies
    out = replace(out, value=np.zeros(len(out)))
    if several > 1 and not v.copies.whole:
        return None
    has_bias = b.flip()
    weight = b.normal(out.size, 1, kernel**dims)
    bias = b.normal(out.size) if has_bias else None
    own = np.maximum(out.member, 0)
    wide_weight = weight[own]
    zero = out.constant
    wide_bias = None if bias is None else np.where(zero, 0.4, bias[own])
    if has_bias:
        out = replace(out, value=np.where(zero, 0.4, 0.0))
    modules = []
    for w, c, copies in (
        (weight, bias, v.copies.size),
        (wide_weight, wide_bias, len(v.copies)),
    ):
        module = CONVOLUTIONS[dims](
            copies,
            copies * several,
            kernel,
            stride=stride,
            padding=pad,
            groups=copies,
            bias=has_bias,
        )
        values = {"weight": w.reshape(module.weight.shape)} | ({"bias": c} if has_bias else {})
        modules.append(assign(module, **values))
    part = b.part(*modules, name="depthwise")
    name = b.step(lambda parts, x: parts[part](x), (v.name,))
    if kernel > 1 or has_bias:  # one number alone is a factor, and factors may differ
        b.candidate(part, "weight", 0, out)
    b.log.append(f"{name} = depthwise({v.name}) x{several} k{kernel} s{stride} p{pad}")
    space = output_size(v.space, kernel, stride, pad, 1)
    return v.then(name, copies=replace(out, blocks=1), space=space)
