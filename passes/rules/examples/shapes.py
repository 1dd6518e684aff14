"""Ops that move, reduce, join or pad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxfib.passes.rules.examples.elementwise import With
from fxfib.passes.rules.examples.networks import (
    CHANNELS,
    DROPPED,
    Cases,
    Example,
    Labels,
    Op,
    expected,
    generator_of,
    per_class,
)


def pooling() -> list[Example]:
    """Every pool and every way to resize; scales pass, constants where no padding counts."""
    found = []
    for dimensions in (1, 2, 3):
        kind = f"Conv{dimensions}d"
        cases = Cases(kind)
        all_kept = expected(scaled=True, constant=True)
        changed = expected(scaled=True, constant=False)

        def call(name: str, *arguments: Any, dimensions: int = dimensions, **options: Any) -> Op:
            function = getattr(F, f"{name}{dimensions}d")
            return lambda x: function(x, *arguments, **options)

        cases.add("max", call("max_pool", 2, 1, 1), all_kept)
        cases.add("average", call("avg_pool", 2, 1), all_kept)
        cases.add("average_padded", call("avg_pool", 2, 1, 1), changed)
        cases.add("average_uncounted", call("avg_pool", 2, 1, 1, count_include_pad=False), all_kept)
        if dimensions > 1:
            cases.add("divided", call("avg_pool", 2, 1, divisor_override=3), changed)
        cases.add("adaptive", call("adaptive_avg_pool", 2), all_kept)
        cases.add("adaptive_max", call("adaptive_max_pool", 2), all_kept)
        linear = {1: "linear", 2: "bilinear", 3: "trilinear"}[dimensions]
        for mode in ("nearest", "nearest-exact", linear, *(["bicubic"] if dimensions == 2 else [])):
            resize: Op = lambda x, mode=mode: F.interpolate(x, scale_factor=2, mode=mode)  # noqa: E731
            cases.add(mode.replace("-", "_"), resize, all_kept)
        for mode in ("reflect", "replicate"):
            pads = (1,) * 2 * dimensions
            cases.add(mode, lambda x, mode=mode, pads=pads: F.pad(x, pads, mode=mode), all_kept)
        missed = expected(scaled=True, constant=True, near=True)
        cases.add("near", call("max_pool", 2, 1), missed, near={0: "bias"})
        found.append(cases.example(kind))
    cases = Cases("Conv2d")
    for mode in ("bilinear", "bicubic"):
        smooth: Op = lambda x, mode=mode: F.interpolate(x, size=(3, 3), mode=mode, antialias=True)  # noqa: E731
        cases.add(mode, smooth, expected(scaled=True, constant=True))
    return [*found, cases.example("antialias")]


def reduction() -> list[Example]:
    """Off the channels every node by itself; along them every merged node counts."""
    cases = Cases("Conv2d")
    off: dict[str, tuple[Op, bool, bool]] = {
        "mean": (lambda x: x.mean((2, 3)), True, True),
        "mean_kept": (lambda x: x.mean((-2, -1), keepdim=True).flatten(1), True, True),
        "sum": (lambda x: x.sum((2, 3)), True, False),
        "amax": (lambda x: x.amax((2, 3)), True, True),
        "amin": (lambda x: x.amin((2, 3)), True, True),
        "var": (lambda x: x.var((2, 3)), False, False),
        "std": (lambda x: x.std((2, 3)), False, False),
        "logsumexp": (lambda x: x.logsumexp((2, 3)), False, False),
        "norm": (lambda x: torch.linalg.vector_norm(x, dim=(2, 3)), False, False),
        "old_norm": (lambda x: torch.ops.aten.norm.ScalarOpt_dim(x, 2, [2, 3]), False, False),
        "prod": (lambda x: x.prod(3).mean(2), False, False),
    }
    for name, (op, scaled, constant) in off.items():
        # A reduction that is no node-by-node op reads every node.
        labels = expected(scaled=scaled, constant=constant, unread=False)
        cases.add(name, op, labels, back="linear", unread=())
        near = expected(scaled=scaled, constant=constant, unread=False, near=True)
        cases.add(f"{name}_near", op, near, back="linear", unread=(), near={0: "weight"})
    every = expected(unread=False)
    on: dict[str, Op] = {
        "mean": lambda x: x.mean(1),
        "mean_all": lambda x: x.mean((1, 3), keepdim=True).flatten(1),
        "sum": lambda x: x.sum(1),
        "sum_kept": lambda x: x.sum((1, 2), keepdim=True).flatten(1),
        "amax": lambda x: x.amax(1),
        "amin": lambda x: x.amin(1),
    }
    for name, op in on.items():
        cases.add(f"{name}_on", lambda x, op=op: op(torch.tanh(x)), every, back="linear", unread=())
    whole: dict[str, Op] = {
        "mean": lambda x: x.mean(), "sum": lambda x: x.sum(),
        "max": lambda x: x.max(), "min": lambda x: x.min(),
    }  # fmt: skip
    for name, op in whole.items():
        cases.add(
            f"{name}_whole",
            lambda x, op=op: x.mean((2, 3)) * op(x),
            every,
            back="linear",
            unread=(),
        )
    for name in ("var", "logsumexp"):
        cases.add(f"{name}_on", lambda x, name=name: getattr(x, name)(1), tuple(range(CHANNELS)),
                  back="linear", unread=())  # fmt: skip
    return [cases.example("reduction")]


def movement() -> list[Example]:
    """Channels carried to other axes, split among several, cut, rolled, tiled, picked."""
    every = expected(scaled=True, constant=True, unread=False)
    kept = expected(scaled=True, constant=True)
    whole = tuple(range(CHANNELS))
    flat = Cases("Conv2d")
    options: dict[str, Any] = {"back": "linear", "unread": ()}
    flat.add("permute", lambda x: x.permute(0, 2, 3, 1), kept, back="linear")
    flat.add("permute_near", lambda x: x.permute(0, 2, 3, 1),
             expected(scaled=True, constant=True, near=True),
             back="linear", near={0: "weight"})  # fmt: skip
    flat.add("movedim", lambda x: x.movedim(1, -1), kept, back="linear")
    flat.add("movedims", lambda x: torch.movedim(x, (1, 2), (3, 1)), kept, back="linear")
    flat.add("swapaxes", lambda x: x.swapaxes(1, 3), kept, back="linear")
    flat.add("swapdims", lambda x: x.swapdims(1, 3), kept, back="linear")
    flat.add("flatten", lambda x: x.flatten(1), every, **options)
    flat.add("reshape", lambda x: x.reshape(x.shape[0], -1), every, **options)
    flat.add("view", lambda x: x.contiguous().view(-1, CHANNELS * 5 * 6), every, **options)
    flat.add("tokens", lambda x: x.flatten(2).transpose(1, 2), kept, back="linear")
    flat.add(
        "unflatten", lambda x: x.flatten(1).unflatten(1, (CHANNELS, 30)).mT, kept, back="linear"
    )
    flat.add("matrix", lambda x: x[:, :, 0].mT, kept, back="linear")
    flat.add("turned", lambda x: x[:, :, 0, 0].t().t(), kept, back="linear")
    flat.add("squeezed", lambda x: x.mean((2, 3), True).squeeze(3).squeeze(-1).unsqueeze(1),
             every, **options)  # fmt: skip
    flat.add("squeezed_at_once", lambda x: x.mean((2, 3), True).squeeze((2, 3)), every, **options)
    flat.add(
        "unshuffle", lambda x: F.pixel_unshuffle(x[..., :4, :], 2).mean((2, 3)), every, **options
    )
    flat.add("expand", lambda x: x.mean((2, 3), True).expand(-1, -1, 3, 2), kept)
    flat.add("broadcast", lambda x: x.amax((2, 3), True).broadcast_to(x.shape), kept)
    flat.add("repeat", lambda x: x.repeat(1, 2, 1, 1), every, unread=())
    flat.add("tile", lambda x: torch.tile(x, (1, 2, 1, 1)), every, unread=())
    flat.add("repeat_space", lambda x: x.repeat(1, 1, 2, 1), kept)
    for missing in (False, True):
        own = per_class(generator_of(3), near=missing).reshape(1, -1, 1, 1)
        flat.add(
            f"repeat_parameter{missing}",
            With(lambda x, c: x + c.repeat(x.shape[0], 1, 5, 6), own),
            expected(scaled=False, constant=True, near=missing),
        )
    flat.add("flip", lambda x: x.flip(1), whole, unread=())
    flat.add("flip_space", lambda x: x.flip(2), kept)
    # No class reaches across a cut at node 4; what is cut off is unread.
    cut = (DROPPED, DROPPED, 0, 1, 2, 1, 0, DROPPED, 4, 5, 6)
    flat.add("slice", lambda x: x[:, 2:], cut, unread=())
    flat.add("slice_end", lambda x: x[:, :-3], (0, 1, 0, 2, 1, 2, 0, -1, -1, -1, -1), unread=())
    flat.add("slice_space", lambda x: x[:, :, 1:4:2], kept)
    flat.add(
        "narrow", lambda x: x.narrow(1, 2, 7), (-1, -1, 0, 1, 2, 1, 0, -1, 4, -1, -1), unread=()
    )
    flat.add("select_space", lambda x: x[:, :, 2], every, back="Conv1d", unread=())
    flat.add("select", lambda x: x[:, 6:7] * x[:, 3].unsqueeze(1), whole, unread=())
    flat.add("roll_space", lambda x: x.roll(1, 2), kept)
    flat.add("roll", lambda x: x.roll(3, 1), (0, 1, 0, 2, 1, 2, 0, -1, 4, 5, 6), unread=())
    flat.add("roll_cut", lambda x: x.roll(-4, 1), (0, 1, 0, 2, 11, 12, 10, -1, 4, 5, 6), unread=())
    index = torch.tensor([8, 0, 2, 1, 6, 3])
    flat.add("index", Pick(index), (0, 1, 0, 2, -1, -1, 0, -1, 4, -1, -1), unread=())
    flat.add("unbind_space", lambda x: torch.stack(x[..., :3].unbind(3)[::2], 2), every, unread=())
    flat.add("unbind", lambda x: torch.stack(x.unbind(1)[:3], 1), whole, unread=())
    flat.add(
        "split",
        lambda x: torch.cat(x.split((4, 7), 1)[::-1], 1),
        (0, 1, 0, 2, 11, 12, 10, -1, 4, 5, 6),
        unread=(),
    )
    flat.add(
        "chunk",
        lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
        (0, 1, 0, 2, 1, 2, 10, -1, 4, 5, 6),
        unread=(),
    )
    flat.add(
        "tensor_split",
        lambda x: torch.cat(x.tensor_split((4,), 1)[::-1], 1),
        (0, 1, 0, 2, 11, 12, 10, -1, 4, 5, 6),
        unread=(),
    )
    flat.add("chunk_space", lambda x: x.chunk(2, 3)[1], kept)
    flat.add("ravel", lambda x: x[:1].ravel()[None], every, **options)
    heads = Cases("sequence")
    doubled: dict[str, Any] = {"groups": 2, "unread": ()}

    def both(**merged: bool) -> Labels:
        half = expected(unread=False, **merged)
        return (*half, *(label + 200 if label >= 0 else label for label in half))

    # The two heads' constants differ, so in their grid a channel is no constant.
    grid = both(scaled=True)
    heads.add("heads", lambda x: x.unflatten(-1, (2, CHANNELS)).transpose(1, 2), grid, **doubled)
    heads.add("shuffle", lambda x: F.channel_shuffle(x.mT, 2).mT,
              both(scaled=True, constant=True), **doubled)  # fmt: skip
    heads.add(
        "shuffle_by_hand", lambda x: x.unflatten(-1, (2, CHANNELS)).mT.flatten(-2), grid, **doubled
    )
    # What mixes the two heads keeps both, and the channels within them merge.
    mixed = both()
    heads.add(
        "softmax_over_heads",
        lambda x: x.unflatten(-1, (2, CHANNELS)).softmax(-2).flatten(-2),
        mixed,
        **doubled,
    )
    heads.add(
        "turned_heads",
        lambda x: x.unflatten(-1, (2, CHANNELS)).transpose(-1, -2).softmax(-1).mT.flatten(-2),
        mixed,
        **doubled,
    )
    found = [flat.example("space"), heads.example("sequence")]
    pixels = Cases("Conv2d")
    pixels.add("interleave", lambda x: x.repeat_interleave(2, 1), every, unread=())
    pixels.add("shuffle", lambda x: F.pixel_shuffle(x.repeat_interleave(4, 1), 2), every, unread=())
    return [*found, pixels.example("pixels")]


class Pick(nn.Module):
    """Channels by a constant index."""

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        """The picked channels."""
        result: Tensor = torch.index_select(x, 1, self.index)  # type: ignore[arg-type]
        return result


def concatenation() -> list[Example]:
    """Along the channels colors lie end to end; along another axis both must agree."""
    cases = Cases("Conv2d")
    good = expected(scaled=True, constant=True)
    every = expected(scaled=True, constant=True, unread=False)
    both: dict[str, Any] = {"fronts": 2}
    cases.add(
        "channels", lambda x, y: torch.cat([x, torch.relu(y)], 1), {0: good, 1: every}, **both
    )
    cases.add("itself", lambda x: torch.cat([x, x], 1), every, unread=())
    # Nodes A, B and B, A of one value: labels of two functions' results are not to be mixed up.
    cut = (0, 1, 2, *[DROPPED] * 8)
    for name, op in {
        "relu": torch.relu,
        "tanh": torch.tanh,
        "shifted": lambda x: (x + 1.5).relu(),
    }.items():
        cases.add(
            f"cut_{name}",
            lambda x, op=op: torch.cat([op(x[:, 0:2]), op(x[:, 1:3])], 1),
            cut,
            unread=(),
        )
    for name, join in {
        "space": lambda x, y: torch.cat([x, y], 2),
        "stacked": lambda x, y: torch.stack([x, y], 2).flatten(2, 3),
    }.items():
        for near in ("", "bias", "weight"):
            # The two constants differ, so the node stays.
            labels = expected(scaled=True, near=bool(near))
            cases.add(f"{name}{near}", join, {0: labels, 1: labels}, near={1: near}, **both)
    return [cases.example("cat")]


def padding() -> list[Example]:
    """Along the channels constants are appended; along space constants are constant no longer."""
    cases = Cases("Conv2d")
    every = expected(scaled=True, constant=True, unread=False)
    cases.add("channels", lambda x: F.pad(x, (0, 0, 0, 0, 2, 3)), every, unread=())
    cases.add("channels_value", lambda x: F.pad(x, (0, 0, 0, 0, 2, 3), value=0.4), every, unread=())
    cases.add("space", lambda x: F.pad(x, (1, 2, 1, 0)), expected(scaled=True))
    cases.add("space_value", lambda x: F.pad(x, (1, 2, 1, 0), value=0.4), expected())
    cases.add(
        "both",
        lambda x: F.pad(x, (1, 2, 0, 0, 2, 3)),
        expected(scaled=True, unread=False),
        unread=(),
    )
    cases.add(
        "near", lambda x: F.pad(x, (1, 2)), expected(scaled=True, near=True), near={0: "bias"}
    )
    return [cases.example("pad")]
