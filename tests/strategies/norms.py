"""Norms with fixed statistics and with those of their input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from planting import Builder, Copies, Counted, noise
from torch import nn

from strategies.values import Val, assign

BATCH_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


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
