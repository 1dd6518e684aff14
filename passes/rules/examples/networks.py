"""Small networks with planted fibers around one op, and what must be found in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Labels = tuple[int, ...]


Op = Callable[..., Any]


#: The classes of the front's nodes, in order of first appearance.
CLASSES = (0, 1, 0, 2, 1, 3, 0, 4, 5, 6, 7)


SCALED = 5  # twice node 3


CONSTANT = 7  # its row cancels; its bias stays


UNREAD = 9  # nobody reads it


NEAR = 6  # what a near miss changes; otherwise in a class with nodes 0 and 2


CHANNELS = len(CLASSES)


STEM = (0, 1, 2, 0, 3)  # the stem's own fiber: nodes 0 and 3


DROPPED = -1


@dataclass(frozen=True)
class Example:
    """A module and what must become of it at eps = 0.

    Attributes:
        name: unique within the op.
        module: float64, in eval mode.
        inputs: positional arguments.
        slots: (parameter, axis) -> one label a node; equal labels share a slot, ``DROPPED`` has
            none.
    """

    name: str
    module: nn.Module
    inputs: tuple[Any, ...]
    slots: Mapping[tuple[str, int], Labels]


def expected(
    *, scaled: bool = False, constant: bool = False, unread: bool = True, near: bool = False
) -> Labels:
    """The front's slots: do scaled nodes merge, others go, is there a near miss?"""
    labels = list(CLASSES)
    if scaled:
        labels[SCALED] = labels[3]
    if constant:
        labels[CONSTANT] = DROPPED
    if unread:
        labels[UNREAD] = DROPPED
    if near:
        labels[NEAR] = 99
    return tuple(labels)


def per_class(
    generator: torch.Generator, *, near: bool = False, scaled: bool = False, low: float = 0.5
) -> Tensor:
    """float64 ``[CHANNELS]``, one random number in ``[low, low + 1)`` a class."""
    table = torch.rand(CHANNELS, generator=generator, dtype=torch.float64) + low
    values = table[list(expected(scaled=scaled, unread=False))]
    if near:
        values[NEAR] += 0.25
    return values


def affine(kind: str, inputs: int, outputs: int, **options: Any) -> nn.Module:
    """A layer of a kind: ``linear`` or the name of a convolution class."""
    if kind in ("linear", "sequence"):
        return nn.Linear(inputs, outputs, dtype=torch.float64, **options)
    layer: nn.Module = getattr(nn, kind)(inputs, outputs, 2, dtype=torch.float64, **options)
    return layer


def rows(layer: nn.Module) -> Tensor:
    """The weight with its output axis first (a view)."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.data.transpose(0, 1) if "Transpose" in type(layer).__name__ else weight.data


def output_axis(layer: nn.Module) -> int:
    """The axis of the weight that makes output nodes."""
    return int("Transpose" in type(layer).__name__)


def plant(layer: nn.Module, generator: torch.Generator, *, near: str = "", groups: int = 1) -> None:
    """Fill a layer that reads a stem: fibers by ``CLASSES``, other bases in every group."""
    weight = rows(layer)
    bias = layer.bias.data if isinstance(layer.bias, Tensor) else None
    for group in range(groups):
        bases = torch.randn(CHANNELS, *weight.shape[1:], generator=generator, dtype=torch.float64)
        shifts = torch.randn(CHANNELS, generator=generator, dtype=torch.float64)
        shifts[CLASSES[CONSTANT]] = shifts[CLASSES[CONSTANT]].abs() + 0.3  # a ReLU leaves it
        bases[CLASSES[SCALED]] = 2 * bases[CLASSES[3]]
        shifts[CLASSES[SCALED]] = 2 * shifts[CLASSES[3]]
        bases[CLASSES[CONSTANT]] = 0.0
        bases[CLASSES[10]] = bases[CLASSES[NEAR]]
        for node, label in enumerate(CLASSES):
            row = weight[group * CHANNELS + node]
            row.copy_(bases[label])
            change = torch.randn(row.shape[1:], generator=generator, dtype=torch.float64)
            row[0] += change
            row[3] -= change
            if bias is not None:
                bias[group * CHANNELS + node] = shifts[label]
    if near == "weight":
        flat = weight[NEAR].reshape(-1)
        flat[-1] += 0.25  # one column, one tap
        weight[NEAR].copy_(flat.reshape(weight[NEAR].shape))
    if near == "bias" and bias is not None:
        bias[NEAR] += 0.25


def fill(layer: nn.Module, generator: torch.Generator) -> nn.Module:
    """Random parameters, nowhere special."""
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


SHAPES = {
    "linear": (2, 3),
    "sequence": (2, 7, 3),
    "Conv1d": (2, 3, 9),
    "Conv2d": (2, 3, 7, 8),
    "Conv3d": (2, 3, 5, 6, 6),
    "ConvTranspose1d": (2, 3, 4),
    "ConvTranspose2d": (2, 3, 3, 4),
    "ConvTranspose3d": (2, 3, 2, 3, 2),
}


class Sandwich(nn.Module):
    """``back(op(front(h), other(h), ...))`` with ``h = relu(stem(x))``."""

    def __init__(
        self,
        op: Op,
        kind: str,
        seed: int,
        *,
        fronts: int = 1,
        near: Mapping[int, str] | None = None,
        groups: int = 1,
        back: str | None = None,
        unread: Iterable[int] = (UNREAD,),
        bias: bool = True,
        activation: Op = F.relu,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.activation = activation
        self.stem = fill(affine(kind, 3, len(STEM)), generator)
        rows(self.stem)[3] = rows(self.stem)[0]
        assert isinstance(self.stem.bias, Tensor)
        self.stem.bias.data[3] = self.stem.bias.data[0]
        self.front = nn.ModuleList()
        for number in range(fronts):
            layer = affine(kind, len(STEM), groups * CHANNELS, bias=bias)
            plant(layer, generator, near=(near or {}).get(number, ""), groups=groups)
            self.front.append(layer)
        self.op = op
        with torch.no_grad():
            probe = self.middle(torch.rand(SHAPES[kind], generator=generator, dtype=torch.float64))
        back = back or kind
        width = probe.shape[-1 if back in ("linear", "sequence") else 1]
        self.back = fill(affine(back, width, 3), generator)
        columns = self.back.get_parameter("weight").data
        columns = columns if "Transpose" in back else columns.movedim(1, 0)
        for node in unread:
            for group in range(groups):
                columns[group * CHANNELS + node] = 0.0

    def middle(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.stem(x))
        result: Tensor = self.op(*[front(hidden) for front in self.front])
        return result

    def forward(self, x: Tensor) -> Tensor:
        """From the input to three outputs."""
        result: Tensor = self.back(self.middle(x))
        return result


class Bundle(nn.Module):
    """Several modules on one input: one capture for many cases."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.cases = nn.ModuleDict(modules)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """One output a case."""
        return tuple(case(x) for case in self.cases.values())


class Cases:
    """Collects sandwiches of one kind into one example."""

    def __init__(self, kind: str = "linear") -> None:
        self.kind = kind
        self.modules: dict[str, Sandwich] = {}
        self.slots: dict[tuple[str, int], Labels] = {}

    def add(self, name: str, op: Op, labels: Labels | Mapping[int, Labels], **options: Any) -> None:
        """A case; ``labels`` of the first front, or by the number of the front."""
        name = name.replace(".", "_")
        case = Sandwich(op, self.kind, 1000 + 17 * len(self.modules), **options)
        self.modules[name] = case
        path = f"cases.{name}"
        for number, found in (labels if isinstance(labels, Mapping) else {0: labels}).items():
            layer = case.front[number]
            self.slots[f"{path}.front.{number}.weight", output_axis(layer)] = found

    def example(self, name: str) -> Example:
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(SHAPES[self.kind], generator=generator, dtype=torch.float64)
        return Example(name, Bundle(self.modules).eval(), (x,), self.slots)


def module_of(target: Any, *arguments: Any, before: Op | None = None, **options: Any) -> Op:
    """A call of an ATen op on one value, with something before it; back to the value's dtype."""

    def op(x: Tensor) -> Tensor:
        y: Tensor = target(x if before is None else before(x), *arguments, **options)
        return y.to(x.dtype)

    return op


def generator_of(seed: int) -> torch.Generator:
    """Random numbers of an example's own."""
    return torch.Generator().manual_seed(seed)
