"""Normalisations and softmax."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fxfib.passes.rules.examples.elementwise import Turned, With
from fxfib.passes.rules.examples.networks import (
    CHANNELS,
    DROPPED,
    Cases,
    Example,
    Op,
    expected,
    fill,
    generator_of,
    per_class,
)


def batch_norm() -> list[Example]:
    """Each of four parameters differs once; four others that together say the same; constants."""
    found = []
    for kind in ("linear", "Conv2d"):
        cases = Cases(kind)
        for near in ("", "weight", "bias", "running_mean", "running_var"):
            layer = nn.BatchNorm1d if kind == "linear" else nn.BatchNorm2d
            norm = layer(CHANNELS, dtype=torch.float64, eps=0.01)
            for place, name in enumerate(("weight", "bias", "running_mean", "running_var")):
                values = per_class(generator_of(20 + place), near=near == name)
                getattr(norm, name).data.copy_(values)
            if near == "":
                norm.weight.data[1] *= -1  # a gain may be negative
                norm.weight.data[4] *= -1
                norm.weight.data[8] = 0.0  # and zero: a constant
            labels = list(expected(constant=True, near=bool(near)))
            if near == "":
                labels[8] = DROPPED
            cases.add(
                f"near_{near}" if near else "equal", nn.Sequential(norm, nn.Tanh()), tuple(labels)
            )
        norm = (nn.BatchNorm1d if kind == "linear" else nn.BatchNorm2d)(
            CHANNELS, affine=False, dtype=torch.float64
        )
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(per_class(generator_of(30)))
        norm.running_var.copy_(per_class(generator_of(31)))
        cases.add("not_affine", nn.Sequential(norm, nn.ReLU()), expected(constant=True))
        found.append(cases.example(kind))
    found.append(compensated())
    return found


def compensated() -> Example:
    """Row times -3, statistics and gain to match: four parts differ, the affine result does not."""
    cases = Cases("Conv1d")
    norm = nn.BatchNorm1d(CHANNELS, dtype=torch.float64, eps=0.01)
    for place, name in enumerate(("weight", "bias", "running_mean", "running_var")):
        getattr(norm, name).data.copy_(per_class(generator_of(20 + place)))
    cases.add("norm", nn.Sequential(norm, nn.Tanh()), expected(constant=True))
    front = cases.modules["norm"].front[0]
    front.weight.data[2] *= -3  # type: ignore[index,operator]
    front.bias.data[2] *= -3  # type: ignore[index,operator]
    norm.running_mean.data[2] *= -3  # type: ignore[union-attr]
    norm.weight.data[2] /= -3
    return cases.example("compensated")


# The first is known as the norm that it is, the second is a mean and a quotient.
WRITTEN_OUT: dict[str, Op] = {
    "written_out": lambda x, w: (
        w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.01)).to(w.dtype)
    ),
    "divided": lambda x, w: w * x / torch.sqrt(x.square().mean(-1, keepdim=True) + 0.01),
}


def axis_norm(centered: bool) -> list[Example]:
    """Layer or RMS norm on and off the channel axis; uneven classes are counted."""
    cases = Cases("sequence")
    on = expected(unread=False)

    def norm(near: str = "", shape: tuple[int, ...] = (CHANNELS,), own: bool = True) -> nn.Module:
        layer = nn.LayerNorm if centered else nn.RMSNorm
        result = layer(shape, eps=0.01, elementwise_affine=own, dtype=torch.float64)
        for place, (name, parameter) in enumerate(result.named_parameters()):
            if shape == (CHANNELS,):
                parameter.data.copy_(per_class(generator_of(40 + place), near=near == name))
            else:
                fill(result, generator_of(40))
        return result

    cases.add("equal", norm(), on, unread=())
    cases.add("near_weight", norm("weight"), expected(unread=False, near=True), unread=())
    if centered:
        cases.add("near_bias", norm("bias"), expected(unread=False, near=True), unread=())
        cases.add("no_bias", nn.LayerNorm(CHANNELS, bias=False, dtype=torch.float64), on, unread=())
    cases.add("not_affine", norm(own=False), on, unread=())
    cases.add("after_tanh", nn.Sequential(nn.Tanh(), norm()), on, unread=())
    for near in ("bias", "weight"):
        cases.add(
            f"front_{near}", norm(), expected(unread=False, near=True), unread=(), near={0: near}
        )
    two = per_class(generator_of(44)) + torch.rand(
        7, 1, generator=generator_of(45), dtype=torch.float64
    )
    if centered:
        cases.add("two_axes",
                  With(lambda x, w, b: F.layer_norm(x, (7, CHANNELS), w, b), two, two / 3),
                  on, unread=())  # fmt: skip
    else:
        gain = per_class(generator_of(46))
        for name, op in WRITTEN_OUT.items():
            cases.add(name, With(op, gain), on, unread=())
        # Behind it only a function that is not homogeneous tells a gain from another.
        missed = With(WRITTEN_OUT["written_out"], per_class(generator_of(46), near=True))
        cases.add("written_out_near", nn.Sequential(missed, nn.Tanh()),
                  expected(unread=False, near=True), unread=())  # fmt: skip
    off = nn.Sequential(nn.ReLU(), Turned(norm(shape=(7,))))
    cases.add("off", off, expected(unread=False))
    return [cases.example("norm")]


def group_norm() -> list[Example]:
    """One group and two; only the gain or the bias differs."""
    cases = Cases("Conv2d")

    def norm(copies: int, near: str = "") -> nn.Module:
        result = nn.GroupNorm(copies, copies * CHANNELS, eps=0.01, dtype=torch.float64)
        for place, (name, parameter) in enumerate(result.named_parameters()):
            values = [
                per_class(generator_of(50 + place + 2 * k), near=near == name and k == 0)
                for k in range(copies)
            ]
            parameter.data.copy_(torch.cat(values))
        return result

    for near in ("", "weight", "bias"):
        labels = expected(unread=False, near=bool(near))
        cases.add(f"one{near}", norm(1, near), labels, unread=())
        grid = (*labels, *(label + 200 for label in labels))
        cases.add(f"two{near}", norm(2, near), grid, unread=(), groups=2)
    cases.add(
        "no_affine", nn.GroupNorm(1, CHANNELS, affine=False), expected(unread=False), unread=()
    )
    return [cases.example("group_norm")]


def instance_norm() -> list[Example]:
    """Each channel by itself; only the gain or the bias differs."""
    cases = Cases("Conv2d")
    for near in ("", "weight", "bias"):
        norm = nn.InstanceNorm2d(CHANNELS, affine=True, eps=0.01, dtype=torch.float64)
        for place, (name, parameter) in enumerate(norm.named_parameters()):
            parameter.data.copy_(per_class(generator_of(60 + place), near=near == name))
        cases.add(f"near_{near}", norm, expected(near=bool(near)))
    cases.add("plain", nn.InstanceNorm2d(CHANNELS), expected())
    return [cases.example("instance_norm")]


def softmax() -> list[Example]:
    """Along another axis every channel by itself; along the channels nothing merges."""
    cases = Cases("sequence")
    ops: dict[str, Op] = {
        "softmax": F.softmax, "log_softmax": F.log_softmax, "cumsum": torch.cumsum,
        "logcumsumexp": torch.logcumsumexp,
    }  # fmt: skip
    for name, op in ops.items():
        cases.add(f"{name}_off", lambda x, op=op: op(x, 1), expected())
        cases.add(f"{name}_on", lambda x, op=op: op(x, 2), tuple(range(CHANNELS)))
        cases.add(f"{name}_near", lambda x, op=op: op(x, 1), expected(near=True), near={0: "bias"})
    return [cases.example("softmax")]
