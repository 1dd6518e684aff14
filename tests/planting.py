"""Copies planted into a network by construction, independently of ``fxfib.lift``.

A base network and a wider one are written side by side.  :class:`Copies` says what each channel of
the wider network is: a copy of a base channel (times a positive factor), a constant, or a channel
that nobody reads.  Outgoing columns are split with zero-sum random numbers of their own for every
row, so copies are no plain duplicates of one another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

CONSTANT = -1
UNREAD = -2

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def noise(seed: int, *keys: Any) -> Floats:
    """Uniform numbers in [0, 1) that depend on the keys alone (broadcast), not on their order."""
    with np.errstate(over="ignore"):
        state = np.asarray(seed, dtype=np.uint64)
        for key in keys:
            state = state ^ (np.asarray(key).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state >> np.uint64(11), dtype=np.float64) / 2.0**53


@dataclass(frozen=True)
class Copies:
    """What the channels of the wider network are, in their order.

    Attributes:
        member: the base channel, ``CONSTANT`` or ``UNREAD``.
        scale: a copy carries this positive factor times its base channel.
        value: of a constant.
        ident: a number of its own for every channel, the same in whatever order they stand.
        size: width of the base network.
        blocks: consecutive blocks (groups) that hold the same pattern of copies; 1: anything.
        cuts: places (base, wide) that no base channel's copies reach across, in any order.
    """

    member: Ints
    scale: Floats
    value: Floats
    ident: Ints
    size: int
    blocks: int = 1
    cuts: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.member)

    @property
    def plain(self) -> bool:
        return bool(np.all(self.scale == 1.0))

    @property
    def whole(self) -> bool:
        """Neither constants nor unread channels."""
        return bool(np.all(self.member >= 0))

    @property
    def constant(self) -> npt.NDArray[np.bool_]:
        return self.member == CONSTANT

    @property
    def counts(self) -> Floats:
        return np.bincount(self.member[self.member >= 0], minlength=self.size).astype(np.float64)

    def at(self, order: Ints) -> Copies:
        """Other places of the same channels."""
        return Copies(
            self.member[order], self.scale[order], self.value[order], self.ident[order], self.size
        )

    def moved(self, base: Ints, order: Ints) -> Copies:
        """After a movement: ``base`` and ``order`` give, for each new place, where it came from."""
        inverse = np.full(self.size, CONSTANT, dtype=np.int64)
        inverse[base] = np.arange(len(base))
        taken = self.at(order)
        member = np.where(taken.member >= 0, inverse[np.maximum(taken.member, 0)], taken.member)
        return replace(taken, member=member, size=len(base))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Copies:
        """After an element-wise function: the constants take their new values."""
        value = function(torch.from_numpy(self.value)).numpy()
        return replace(self, value=np.where(self.constant, value, 0.0))

    def product(self, inner: int, *, outside: bool = False) -> Copies:
        """Every channel once for each of ``inner`` positions (flatten, pixel shuffle)."""
        n, place = len(self), np.arange(inner)
        if outside:  # position first, then channel
            channel, position = np.tile(np.arange(n), inner), np.repeat(place, n)
            member = position * self.size + self.member[channel]
        else:
            channel, position = np.repeat(np.arange(n), inner), np.tile(place, n)
            member = self.member[channel] * inner + position
        own = self.member[channel]
        return Copies(
            np.where(own >= 0, member, own),
            self.scale[channel],
            self.value[channel],
            self.ident[channel] * 4096 + position,
            self.size * inner,
        )


def identity(size: int, start: int = 0) -> Copies:
    """Every channel once."""
    return Copies(np.arange(size), np.ones(size), np.zeros(size), np.arange(size) + start, size)


def concatenated(parts: list[Copies]) -> Copies:
    """Channels laid end to end."""
    member, start, wide = [], 0, 0
    cuts = []
    for part in parts:
        member.append(np.where(part.member >= 0, part.member + start, part.member))
        cuts += [(start + base, wide + place) for base, place in part.cuts]
        start, wide = start + part.size, wide + len(part)
        cuts.append((start, wide))
    return Copies(
        np.concatenate(member),
        np.concatenate([p.scale for p in parts]),
        np.concatenate([p.value for p in parts]),
        np.concatenate([p.ident * 16 + k for k, p in enumerate(parts)]),
        start,
        cuts=tuple(cuts[:-1]),
    )


class Network(nn.Module):
    """Runs a list of steps; layers and parameters are in ``parts``."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        self.steps: list[tuple[str, Callable[..., Tensor], tuple[str, ...]]] = []
        self.outputs: list[str] = []

    def forward(
        self, first: Tensor, second: Tensor | None = None, third: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        values = {"first": first, "second": second, "third": third}
        for name, step, sources in self.steps:
            values[name] = step(self.parts, *[values[s] for s in sources])
        return tuple(values[name] for name in self.outputs)


class Holder(nn.Module):
    """Parameters without a module of their own."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))


class Counted(nn.Module):
    """The base network's norm: statistics that count every copy of the wider network.

    ``weights`` is ``[groups, channels / groups]`` and sums to one in each group.
    """

    def __init__(self, weights: Floats, axis: int, centered: bool, spatial: bool) -> None:
        super().__init__()
        self.register_buffer("weights", torch.from_numpy(weights))
        self.axis, self.centered, self.spatial = axis, centered, spatial
        size = weights.size
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float64))
        if centered:
            self.bias = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(self.axis, -1)
        split = x.unflatten(-1, self.weights.shape)
        middle = list(range(1, split.ndim - 2)) if self.spatial else []

        def average(y: Tensor) -> Tensor:
            y = (y * self.weights).sum(-1, keepdim=True)
            return y.mean(middle, keepdim=True) if middle else y

        if self.centered:
            split = split - average(split)
        split = split * torch.rsqrt(average(split * split) + self.eps)
        x = split.flatten(-2) * self.weight
        return (x + self.bias if self.centered else x).movedim(-1, self.axis)


@dataclass
class Builder:
    """Writes the two networks step by step.

    Attributes:
        seed: decides everything but the order of channels.
        order: decides the order of channels in the wider network.
        unclaimed: why the result of a merge may be larger than the base network.
        candidates: parameters of copies, for near misses: (part, parameter, axis, places).
        tables: embeddings: (part, channels, rows).
        paddings: inputs that tell which positions are padding.
    """

    seed: int
    order: int = 0
    base: Network = field(default_factory=Network)
    wide: Network = field(default_factory=Network)
    unclaimed: list[str] = field(default_factory=list)
    candidates: list[tuple[str, str, int, Ints]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    counter: int = 0
    scales: tuple[float, ...] = (1.0, 1.0, 0.5, 2.0, 4.0)
    before: tuple[float, ...] = (1.0, 1.0, -1.0, 2.0, -0.5)
    tables: list[tuple[str, Copies, int]] = field(default_factory=list)
    paddings: list[Any] = field(default_factory=list)
    covers: bool = False  # copies get equal errors, too: their columns sum alike over copies

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        # Values and noise have a generator of their own, so that structure is stable.
        self.numbers = np.random.default_rng([self.seed, 1])

    # -- random choices ----------------------------------------------------------------------

    def flip(self, probability: float = 0.5) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def width(self) -> int:
        return int(self.pick((3, 4, 5, 6, 7, 8, 9, 11)))

    def normal(self, *shape: int) -> Floats:
        return self.numbers.normal(size=shape)

    def tag(self) -> int:
        self.counter += 1
        return self.counter

    # -- copies ------------------------------------------------------------------------------

    def copies(
        self,
        size: int,
        *,
        blocks: int = 1,
        scaled: bool = False,
        whole: bool = False,
        even: bool = False,
    ) -> Copies:
        """New channels: 1 to 3 copies each, sometimes constants and unread ones."""
        start = self.tag() * 64 * 64
        inside = size // blocks
        whole = whole or self.covers
        scaled = scaled and not self.covers
        times = self.rng.choice([1, 1, 2, 3], size=inside)
        if even:
            times = np.full(inside, self.pick((1, 2, 3)))
        pattern = np.repeat(np.arange(inside), times)
        member = np.concatenate([pattern + inside * block for block in range(blocks)])
        scale = np.ones(len(member))
        if scaled:
            scale = self.rng.choice(self.scales, size=len(member))
        if not whole and blocks == 1:
            extra = np.concatenate([
                np.full(int(self.rng.choice([0, 0, 1, 2])), CONSTANT),
                np.full(int(self.rng.choice([0, 0, 1, 2])), UNREAD),
            ])  # fmt: skip
            member, scale = np.r_[member, extra], np.r_[scale, np.ones(len(extra))]
        ident = np.arange(len(member)) + start
        value = np.where(member == CONSTANT, self.rng.choice([0.0, 0.5, -1.5, 2.0], len(member)), 0)
        block = np.repeat(np.arange(blocks), len(member) // blocks)
        cuts = [(k * inside, k * len(member) // blocks) for k in range(1, blocks)]
        if blocks == 1 and self.flip(0.4):
            # Two parts that no copies reach across, for slices and splits.
            middle = size // 2
            block = np.where(member >= 0, member >= middle, ident % 2)
            cuts = [(middle, int((block == 0).sum()))]
        keys = noise(self.order, ident % (len(member) // blocks if blocks > 1 else 1 << 60), start)
        order = np.lexsort((keys, block))
        made = Copies(member.astype(np.int64), scale, value, ident, size).at(order)
        made = replace(made, cuts=tuple(cuts))
        return replace(made, blocks=blocks)

    # -- steps -------------------------------------------------------------------------------

    def step(
        self,
        base: Callable[..., Tensor],
        sources: tuple[str, ...],
        wide: Callable[..., Tensor] | None = None,
        name: str = "v",
    ) -> str:
        name = f"{name}{self.tag()}"
        self.base.steps.append((name, base, sources))
        self.wide.steps.append((name, wide or base, sources))
        return name

    def part(self, base: nn.Module, wide: nn.Module, name: str) -> str:
        name = f"{name}{self.tag()}"
        self.base.parts[name] = base
        self.wide.parts[name] = wide
        return name

    def candidate(self, part: str, parameter: str, axis: int, copies: Copies) -> None:
        counts = copies.counts
        several = np.flatnonzero((copies.member >= 0) & (counts[np.maximum(copies.member, 0)] > 1))
        if len(several):
            self.candidates.append((part, parameter, axis, several))

    # -- linear maps -------------------------------------------------------------------------

    def widen(
        self,
        weight: Floats,
        bias: Floats | None,
        source: Copies,
        out: Copies,
        *,
        before: Floats | None = None,
        borders: bool = False,
    ) -> tuple[Floats, Floats]:
        """Weight ``[out, in, taps]`` and bias of the wider network.

        Args:
            before: factor of every output channel where a norm that follows undoes it (the output
                then carries ``before`` instead of ``out.scale``).
            borders: padding is seen, so a constant cannot be compensated by the bias.
        """
        tag = self.tag()
        # Extended precision: every number is rounded once, when it is stored, as the bounds assume.
        factor = (out.scale if before is None else before).astype(np.longdouble)
        weight = weight.astype(np.longdouble)
        taps = np.arange(weight.shape[2])
        raw = noise(
            self.seed * 1009 + tag,
            out.ident[:, None, None], source.ident[None, :, None], taps[None, None, :],
        ) * np.longdouble(2) - 1  # fmt: skip
        onto = np.zeros((len(source), source.size))
        own = np.flatnonzero(source.member >= 0)
        onto[own, source.member[own]] = 1.0
        counts = np.maximum(onto.sum(0), 1.0)
        mean = np.einsum("ijt,jc->ict", raw, onto) / counts[None, :, None]
        zero_sum = raw - np.einsum("ict,jc->ijt", mean, onto)
        alone = (onto @ counts) <= 1
        zero_sum[:, alone] = 0.0
        if self.covers:
            several = np.zeros((len(out), out.size))
            read = np.flatnonzero(out.member >= 0)
            several[read, out.member[read]] = 1.0
            share = np.einsum("ijt,ic->cjt", zero_sum, several)
            share /= np.maximum(several.sum(0), 1.0)[:, None, None]
            zero_sum = zero_sum - np.einsum("cjt,ic->ijt", share, several)
        rows = np.where((out.member >= 0)[:, None, None], weight[np.maximum(out.member, 0)], 0.0)
        spread = (
            rows[:, np.maximum(source.member, 0)]
            / counts[np.maximum(source.member, 0)][None, :, None]
        )
        wide = (spread + zero_sum) * np.where(out.member >= 0, factor, 1.0)[:, None, None]
        wide = wide / source.scale[None, :, None]
        wide[out.member == UNREAD] = raw[out.member == UNREAD]
        wide[:, source.member == UNREAD] = 0.0
        constant = source.constant
        wide[:, constant] = raw[:, constant]
        if borders:
            wide[:, constant & (source.value != 0)] = 0.0
        told = np.zeros(len(out)) if bias is None else bias[np.maximum(out.member, 0)] * factor
        told = np.where(out.constant, out.value, told)
        told = np.where(out.member == UNREAD, 0.7, told)
        told = told - np.einsum("ijt,j->i", wide, np.where(constant, source.value, 0.0))
        return wide.astype(np.float64), told.astype(np.float64)
