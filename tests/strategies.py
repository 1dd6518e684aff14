"""Random networks with planted fibers and near misses, from a seed.

``plant(seed)`` gives a base network, a wider one that computes the same by construction (see
:mod:`planting`), inputs, and whether the rules are expected to find everything that was planted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from planting import (
    CONSTANT,
    UNREAD,
    Builder,
    Copies,
    Counted,
    Holder,
    Network,
    concatenated,
    identity,
    noise,
)
from torch import Tensor, nn

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True)
class Val:
    """A value of both networks: ``[N, C, *space]`` (``first``) or ``[N, *space, C]``."""

    name: str
    copies: Copies
    space: tuple[int, ...] = ()
    first: bool = True

    @property
    def axis(self) -> int:
        return 1 if self.first or not self.space else 1 + len(self.space)

    def then(self, name: str, **changes: Any) -> Val:
        return replace(self, name=name, **changes)


@dataclass
class Planted:
    """What ``plant`` gives.

    Attributes:
        base, wide: float64 modules in eval mode that compute the same.
        inputs: example inputs in float64 (and int64).
        unclaimed: why a merge of ``wide`` may leave more parameters than ``base`` has; empty: it
            must not.
        log: the steps in words.
        near: the parameter that was changed, and how, for a near miss.
    """

    base: Network
    wide: Network
    inputs: tuple[Tensor, ...]
    unclaimed: list[str]
    log: list[str]
    near: str = ""


def assign(module: nn.Module, **values: Any) -> nn.Module:
    """Fill parameters and buffers with float64 numbers."""
    for name, value in values.items():
        old = getattr(module, name)
        new = torch.as_tensor(np.asarray(value), dtype=torch.float64).reshape(
            old.shape if old is not None and old.numel() == np.size(value) else np.shape(value)
        )
        if isinstance(old, nn.Parameter):
            setattr(module, name, nn.Parameter(new.clone()))
        else:
            setattr(module, name, new.clone())
    return module


# -- linear layers ---------------------------------------------------------------------------------


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


# -- norms -----------------------------------------------------------------------------------------


def batch_norm(b: Builder, v: Val, out: Copies, before: Any = None) -> Val:
    """Fixed statistics; copies get four parts of their own that make the same affine map."""
    size, tag = v.copies.size, b.tag()
    gamma, beta, mean = b.normal(size), b.normal(size), b.normal(size)
    variance = b.numbers.uniform(0.3, 2.0, size)
    dims = len(v.space)
    module = BATCH_NORMS[dims](size)
    gain = gamma / np.sqrt(variance + module.eps)
    shift = beta - mean * gain
    own = np.maximum(v.copies.member, 0)
    divisor = np.where(v.copies.member >= 0, v.copies.scale if before is None else before, 1.0)
    ident = v.copies.ident
    if b.flip() and not b.covers:  # the affine result is the same, its four parts are not
        wide_variance = 0.3 + noise(tag, ident)
        wide_mean = noise(tag + 1, ident) * 2 - 1
    else:
        wide_variance, wide_mean = variance[own], mean[own] * divisor
    wide_gain = gain[own] * out.scale / divisor
    wide_gamma = wide_gain * np.sqrt(wide_variance + module.eps)
    wide_beta = shift[own] * out.scale + wide_mean * wide_gain
    constant = v.copies.constant
    wide_beta = np.where(constant, out.value - (v.copies.value - wide_mean) * wide_gain, wide_beta)
    wide_module = BATCH_NORMS[dims](len(out))
    assign(module, weight=gamma, bias=beta, running_mean=mean, running_var=variance)
    assign(
        wide_module,
        weight=wide_gamma, bias=wide_beta, running_mean=wide_mean, running_var=wide_variance,
    )  # fmt: skip
    part = b.part(module, wide_module, name="bn")
    name = b.step(lambda parts, x: parts[part](x), (v.name,))
    for parameter in ("weight", "bias", "running_mean", "running_var"):
        b.candidate(part, parameter, 0, out)
    b.log.append(f"{name} = batch_norm({v.name})")
    return v.then(name, copies=out)


def norm_alone(b: Builder, v: Val) -> Val | None:
    """A batch norm that does not follow a linear layer."""
    if not v.first and v.space:
        return None
    value = np.where(v.copies.constant, b.pick((0.0, 0.25)), 0.0)
    return batch_norm(b, v, replace(v.copies, value=value))


def axis_norm(b: Builder, v: Val) -> Val | None:
    """Layer, RMS or group norm: statistics that count every copy."""
    if not (v.copies.whole and v.copies.plain) or len(v.copies) < 2:
        return None
    groups = 1
    centered = b.flip(0.7)
    spatial = v.first and bool(v.space)
    if spatial:
        groups, centered = b.pick((1, v.copies.blocks)), True
    counts = v.copies.counts.reshape(groups, -1)
    base = Counted(counts / counts.sum(1, keepdims=True), v.axis, centered, spatial)
    size = len(v.copies)
    wide: nn.Module
    if spatial:
        wide = nn.GroupNorm(groups, size)
    else:
        wide = nn.LayerNorm(size) if centered else nn.RMSNorm(size, eps=1e-5)
    weight, bias = b.normal(v.copies.size), b.normal(v.copies.size)
    own = v.copies.member
    assign(base, weight=weight, **({"bias": bias} if centered else {}))
    assign(wide, weight=weight[own], **({"bias": bias[own]} if centered else {}))
    part = b.part(base, wide, name="norm")
    name = b.step(lambda parts, x: parts[part](x), (v.name,))
    b.candidate(part, "weight", 0, v.copies)
    if centered:
        b.candidate(part, "bias", 0, v.copies)
    b.log.append(f"{name} = {type(wide).__name__}({v.name}) groups {groups}")
    return v.then(name)


def instance_norm(b: Builder, v: Val) -> Val | None:
    if not (v.first and len(v.space) in (1, 2) and v.copies.plain and np.prod(v.space) > 1):
        return None
    if v.copies.constant.any():
        return None
    kind = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d}[len(v.space)]
    weight, bias = b.normal(v.copies.size), b.normal(v.copies.size)
    own = np.maximum(v.copies.member, 0)
    base, wide = kind(v.copies.size, affine=True), kind(len(v.copies), affine=True)
    assign(base, weight=weight, bias=bias)
    assign(wide, weight=weight[own], bias=bias[own])
    part = b.part(base, wide, name="instance")
    name = b.step(lambda parts, x: parts[part](x), (v.name,))
    b.candidate(part, "weight", 0, v.copies)
    if not v.copies.whole:
        b.unclaimed.append("an unread channel in an instance norm")
    b.log.append(f"{name} = instance_norm({v.name})")
    return v.then(name)


# -- element by element ----------------------------------------------------------------------------

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


# -- movement --------------------------------------------------------------------------------------


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


# -- what the rules do not cover -------------------------------------------------------------------


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


# -- whole networks --------------------------------------------------------------------------------


def hidden(b: Builder, v: Val) -> Copies:
    """New channels for a layer that reads ``v``."""
    blocks = v.copies.blocks
    if v.first and v.space and b.flip(0.5 if blocks > 1 else 0.2):
        blocks = blocks if blocks > 1 else b.pick((2, 3))
        return b.copies(blocks * b.pick((2, 3, 4)), blocks=blocks, whole=True)
    if b.flip(0.35):
        return b.copies(b.width(), scaled=False, whole=True)
    return b.copies(b.width(), scaled=b.flip())


def layer(b: Builder, v: Val) -> Val:
    out = hidden(b, v)
    made = affine(b, v, out)
    return activation(b, made) if b.flip(0.8) else made


OPS: tuple[tuple[int, Callable[[Builder, Val], Val | None]], ...] = (
    (8, layer), (4, depthwise), (2, norm_alone), (4, axis_norm), (2, instance_norm),
    (3, activation), (2, prelu), (5, parameter), (5, residual), (3, projected), (3, gate),
    (2, glu), (3, reused), (6, split), (7, shuffle), (2, pixel_shuffle), (2, pixel_unshuffle),
    (4, pool), (2, resize), (2, pad_space), (2, pad_channels), (1, flatten), (1, pooled),
    (4, over_channels), (2, turned), (2, tokens), (3, mixer),
)  # fmt: skip
UNCOVERED = (class_token, unknown, flipped)


def source(b: Builder, name: str) -> tuple[Val, Tensor]:
    """An input and its first value."""
    batch, width = 3, b.pick((3, 5, 4))
    kind = b.pick(("image", "image", "image", "line", "volume", "vector", "tokens", "words"))
    draw = torch.Generator().manual_seed(b.seed)
    if kind == "words":
        table = b.normal(7, b.width())
        copies = b.copies(table.shape[1], scaled=b.flip())
        wide = table[:, np.maximum(copies.member, 0)] * copies.scale
        wide[:, copies.constant] = copies.value[copies.constant]
        wide[:, copies.member == UNREAD] = b.normal(7, int((copies.member == UNREAD).sum()))
        modules = [assign(nn.Embedding(*t.shape), weight=t) for t in (table, wide)]
        part = b.part(*modules, name="embedding")
        made = b.step(lambda parts, x: parts[part](x), (name,))
        b.candidate(part, "weight", 1, copies)
        b.log.append(f"{made} = embedding({name}) {copies.size}/{len(copies)}")
        indices = torch.randint(0, 7, (batch, 6), generator=draw)
        return Val(made, copies, (6,), first=False), indices
    space = {
        "image": (b.pick((4, 6)), b.pick((4, 5))), "line": (b.pick((5, 8)),), "volume": (4, 4, 3),
        "vector": (), "tokens": (5,),
    }[kind]  # fmt: skip
    first = kind != "tokens"
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
) -> Planted:
    """A random network with planted fibers.

    Args:
        seed: decides everything else.
        order: decides the order of the channels in the wider network, and nothing more.
        near: change one parameter of one copy by a relative 1e-3.
        steps: how many operations to try after the inputs; None: 3 to 10.
        covers: copies get equal errors as well.
    """
    b = Builder(seed, order)
    if covers:
        b = Builder(seed, order, scales=(1.0,), before=(1.0,), covers=True)
    names = ["first", "second", "third"][: int(b.rng.choice([1, 1, 1, 2, 3]))]
    made = [source(b, name) for name in names]
    values, inputs = [v for v, _ in made], tuple(x for _, x in made)
    weights = np.array([weight for weight, _ in OPS], dtype=float)
    for _ in range(steps or int(b.rng.integers(3, 11))):
        place = int(b.rng.integers(len(values)))
        v = values[place]
        if b.flip(0.02):
            result = b.pick(UNCOVERED)(b, v)
        elif b.flip(0.12):
            result = concatenate(b, v, b.pick(values))
        else:
            op = OPS[int(b.rng.choice(len(OPS), p=weights / weights.sum()))][1]
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
    tensor = getattr(b.wide.parts[part], name).data
    # Channels stand in another order for another ``order``; a near miss is made for one only.
    place = int(places[int(rng.integers(len(places)))])
    row = tensor.select(axis, place)
    flat = row.reshape(-1)
    entry = int(flat.abs().argmax())
    index = np.unravel_index(entry, row.shape) if row.ndim else ()
    full = (*index[:axis], place, *index[axis:])
    tensor[full] *= 1.001
    return f"{part}.{name}{[int(i) for i in full]}"


__all__ = ["CONSTANT", "UNREAD", "Planted", "plant"]
