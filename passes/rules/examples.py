"""Small modules in which one op decides what may merge; every generic test runs over them.

Each is a sandwich ``stem -> ReLU -> front -> op -> back``.  The front has planted fibers that are no
plain duplicates (the stem has a fiber, and the front's rows differ by zero-sum changes on its
columns), a node that is a multiple of another, a constant, an unread one, and one that differs from
its neighbours in the bias alone.  Near misses differ in one parameter of the op at one node.
"""

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
        slots: (parameter, axis) -> one label a node; equal labels share a slot, ``DROPPED`` has none.
    """

    name: str
    module: nn.Module
    inputs: tuple[Any, ...]
    slots: Mapping[tuple[str, int], Labels]


def expected(
    *, scaled: bool = False, constant: bool = False, unread: bool = True, near: bool = False
) -> Labels:
    """The front's slots: do scaled nodes merge, constant and unread ones go, is there a near miss?"""
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
        for node in unread:
            for group in range(groups):
                if "Transpose" in back:
                    self.back.weight.data[group * CHANNELS + node] = 0.0  # type: ignore[index]
                else:
                    self.back.weight.data[:, group * CHANNELS + node] = 0.0  # type: ignore[index]

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


# -- element-wise ---------------------------------------------------------------------------------

ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "leaky_relu": (0.3,),
    "rrelu": (),
    "dropout": (0.3, False),
    "alpha_dropout": (0.3, False),
    "feature_dropout": (0.3, False),
    "feature_alpha_dropout": (0.3, False),
    "hardtanh": (-0.4, 0.6),
    "softplus": (0.7, 3.0),
    "elu": (0.7,),
    "celu": (0.7,),
    "softshrink": (0.3,),
    "hardshrink": (0.3,),
    "threshold": (0.3, 0.1),
    "clamp": (-0.3, 0.7),
    "clip": (-0.3, 0.7),
    "clamp_min": (-0.3,),
    "clamp_max": (0.3,),
}
UNIT_INTERVAL = frozenset(
    [
        "log",
        "log2",
        "log10",
        "log1p",
        "sqrt",
        "rsqrt",
        "asin",
        "acos",
        "atanh",
        "erfinv",
        "logit",
        "digamma",
        "lgamma",
        "reciprocal",
    ]
)


def call_of(target: Any) -> Op | None:
    """A call of a one-tensor ATen overload on numbers in its domain; None: not such an op."""
    name = target._schema.name.split("::")[1]
    if target._overloadname == "decimals":
        return module_of(target, decimals=1)
    if name in ("to", "_to_copy"):
        kept = {"dtype": torch.float64}
        if name == "_to_copy":
            return module_of(target, **kept)
        return module_of(target, torch.float64) if target._overloadname == "dtype" else None
    required = [a for a in target._schema.arguments[1:] if not a.has_default_value()]
    if any(str(a.type) == "Tensor" for a in required) or target._overloadname == "Tensor":
        return None
    before: Op | None = None
    if name in UNIT_INTERVAL:
        before = torch.sigmoid
    if name == "acosh":
        before = lambda x: torch.sigmoid(x) + 1.5  # noqa: E731
    if name == "bitwise_not":
        before = lambda x: x > 0  # noqa: E731
    return module_of(target, *ARGUMENTS.get(name, ()), before=before)


def unary(targets: Iterable[Any], *, homogeneous: bool) -> list[Example]:
    """Every op of one number, by its overloads."""
    cases = Cases()
    for target in targets:
        if (op := call_of(target)) is None:
            continue
        name = target._schema.name.split("::")[1]
        labels = expected(scaled=homogeneous, constant=True)
        cases.add(f"{name}_{target._overloadname}", op, labels)
    missed = expected(scaled=homogeneous, constant=True, near=True)
    last = torch.relu if homogeneous else torch.tanh
    cases.add("near", last, missed, near={0: "bias"})
    return [cases.example("all")]


class Turned(nn.Module):
    """A module on the transposed value."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Transposed, through the module, and back."""
        result: Tensor = self.inner(x.transpose(1, 2)).transpose(1, 2)
        return result


class With(nn.Module):
    """An op with parameters of its own: ``op(*operands, *tensors)``."""

    def __init__(self, op: Op, *tensors: Tensor) -> None:
        super().__init__()
        self.op = op
        self.own = nn.ParameterList([nn.Parameter(t.clone()) for t in tensors])

    def forward(self, *operands: Tensor) -> Tensor:
        """The op on the operands and the parameters."""
        result: Tensor = self.op(*operands, *self.own)
        return result


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def binary(name: str) -> list[Example]:
    """Two colored operands, a constant one, a number, and every kind of broadcasting."""
    ops: dict[str, tuple[Op, bool]] = {
        "add": (torch.add, True),
        "sub": (torch.sub, True),
        "mul": (torch.mul, True),
        "div": (lambda x, y: x / (y * y + 0.3), False),
        "maximum": (torch.maximum, True),
        "minimum": (torch.minimum, True),
        "where": (lambda x, y: torch.where(x > 0.1, x, y), False),
        "pow": (lambda x, y: torch.pow(torch.sigmoid(x), y), False),
    }
    op, scaled = ops[name]
    both = dict(fronts=2, activation=F.silu)
    cases = Cases("sequence")
    good = expected(scaled=scaled, constant=True)
    cases.add("both", op, {0: good, 1: good}, **both)
    for near in ("weight", "bias"):
        missed = expected(scaled=scaled, constant=True, near=True)
        cases.add(f"{near}_of_second", op, {0: missed, 1: missed}, near={1: near}, **both)
        cases.add(f"{near}_of_first", op, {0: missed, 1: missed}, near={0: near}, **both)
    # Behind an activation the operands are colors, no longer affine forms.
    relu: Op = lambda x, y: op(torch.relu(x), torch.relu(y))  # noqa: E731
    for near in ("", "bias"):
        labels = expected(scaled=scaled, constant=True, near=bool(near))
        cases.add(f"colors{near}", relu, {0: labels, 1: labels}, near={1: near}, **both)
    mixed: Op = lambda x, y: op(x, torch.tanh(y))  # noqa: E731
    labels = expected(constant=True)
    cases.add("form_and_color", mixed, {0: labels, 1: labels}, **both)
    one_scaled = name in ("mul", "div")
    # A product with another number is a scaled fiber, which the reader's columns take in.
    for near in (False,) if one_scaled else (False, True):
        own = per_class(generator_of(3), near=near)
        # A number a node of its own: a scaled node stays scaled under products alone.
        by_node = expected(scaled=one_scaled, constant=True, near=near)
        suffix = "_near" if near else ""
        cases.add(f"constant{suffix}", With(op, own), by_node)
        cases.add(f"constant_first{suffix}", With(lambda x, c: op(c, x), own),
                  expected(scaled=name == "mul", constant=True, near=near))  # fmt: skip
        cases.add(
            f"constant_after_relu{suffix}",
            With(lambda x, c: op(torch.relu(x), c), own),
            by_node,
        )
        grid = per_class(generator_of(4), near=near) + torch.rand(
            5, 1, generator=generator_of(5), dtype=torch.float64
        )
        kept = expected(scaled=False, constant=False, near=near)
        cases.add(f"constant_rows{suffix}", With(lambda x, c: op(x[:, :5], c), grid), kept)
    column = torch.rand(5, 1, generator=generator_of(6), dtype=torch.float64)
    row_wise = expected(scaled=one_scaled, constant=False)
    cases.add("constant_column", With(lambda x, c: op(x[:, :5], c), column), row_wise)
    number = torch.rand((), generator=generator_of(8), dtype=torch.float64) + 0.3
    cases.add("constant_scalar", With(op, number), expected(scaled=one_scaled, constant=True))
    half: Op = lambda x: (
        op(x, torch.full((), 0.6, dtype=x.dtype))
        if name in ("where", "maximum", "minimum", "pow")
        else op(x, 0.6)
    )
    cases.add("number", half, expected(scaled=one_scaled, constant=True))
    cases.add(
        "gate",
        lambda x, y: op(torch.relu(x), torch.sigmoid(y.mean(1, keepdim=True))),
        {0: expected(scaled=False, constant=True), 1: expected(constant=True)},
        **both,
    )
    cases.add(
        "spread", lambda x: op(x, torch.tanh(x.mean(2, keepdim=True))), expected(unread=False)
    )
    cases.add(
        "itself", lambda x: op(x, x), expected(scaled=scaled and name != "sub", constant=True)
    )
    return [cases.example(name)]


def overload_cases(targets: Iterable[Any]) -> list[Example]:
    """Every overload of an op of two operands: two values of which one decides, value and number."""
    cases = Cases("sequence")
    for target in targets:
        name = target._schema.name.split("::")[1]
        types = [
            str(a.type)
            for a in target._schema.arguments
            if not a.has_default_value() and not a.kwarg_only
        ]
        kept = {"rounding_mode": "floor"} if "mode" in target._overloadname else {}
        boolean = name.startswith("bitwise")
        number: Any = True if boolean else 0.7

        def positive(x: Tensor, boolean: bool = boolean) -> Tensor:
            return x > 0.1 if boolean else torch.sigmoid(x) + 0.3

        def op(
            *values: Tensor, target: Any = target, types: Any = types, number: Any = number,
            kept: Any = kept, positive: Any = positive, name: str = name,
        ) -> Tensor:  # fmt: skip
            left = [positive(v) for v in values]
            if types[-1] == "Tensor" and name == "masked_fill" and len(types) == 3:
                number = torch.full((), number, dtype=values[0].dtype)
            if name == "where" and types.count("Tensor") == 3:
                left = [left[0], *left]
            arguments = [left.pop(0) if t == "Tensor" and left else number for t in types]
            if name == "where":
                arguments[0] = arguments[0] > 0.7
            if name == "masked_fill":
                arguments[1] = arguments[1] > 0.7
            result: Tensor = target(*arguments, **kept)
            return result.to(values[0].dtype)

        operands = min(types.count("Tensor"), 2)
        if operands == 0 or any(t not in ("Tensor", "number") for t in types):
            continue
        labels = expected(constant=True, near=operands == 2)
        cases.add(f"{name}_{target._overloadname}", op, dict.fromkeys(range(operands), labels),
                  fronts=operands, near={1: "bias"} if operands == 2 else {})  # fmt: skip
    return [cases.example("overloads")]


def prelu() -> list[Example]:
    """One slope a channel, one for all; only a slope differs."""
    cases = Cases("Conv1d")
    for near in (False, True):
        slopes = per_class(generator_of(3), near=near, scaled=True)
        labels = expected(scaled=True, constant=True, near=near)
        cases.add(f"slopes{near}", With(F.prelu, slopes), labels)
    cases.add(
        "one_slope", nn.PReLU(1, 0.3, dtype=torch.float64), expected(scaled=True, constant=True)
    )
    return [cases.example("prelu")]


def glu() -> list[Example]:
    """Both halves decide; only one of them differs."""
    cases = Cases("sequence")
    for near in ({}, {0: "bias"}, {1: "bias"}, {0: "weight"}, {1: "weight"}):
        labels = expected(near=bool(near))
        name = "".join(f"{a}{b}" for a, b in near.items())
        cases.add(f"halves{name}", lambda x, y: F.glu(torch.cat([x, y], -1), -1),
                  {0: labels, 1: labels}, fronts=2, near=near)  # fmt: skip
    cases.add("other_axis", lambda x: F.glu(x[:, :6], 1), expected())
    return [cases.example("glu")]


# -- linear and convolutional ---------------------------------------------------------------------


def linear() -> list[Example]:
    """A layer by every spelling; only the bias or one weight differs; no bias; more axes."""
    found = []
    for kind in ("linear", "sequence"):
        cases = Cases(kind)
        labels = expected(scaled=True, constant=True)
        cases.add("plain", torch.relu, labels)
        cases.add("affine", lambda x: x, labels)
        for near in ("bias", "weight"):
            missed = expected(scaled=True, constant=True, near=True)
            cases.add(near, torch.relu, missed, near={0: near})
        # Without a bias the constant is zero and nothing tells node 10 from node 6.
        no_bias = list(labels)
        no_bias[10] = no_bias[NEAR]
        cases.add("no_bias", torch.relu, tuple(no_bias), bias=False)
        matrix = torch.randn(CHANNELS, 5, generator=generator_of(1), dtype=torch.float64)
        offset = torch.randn(5, generator=generator_of(2), dtype=torch.float64)
        every = expected(scaled=True, constant=True, unread=False)
        cases.add("matmul", With(lambda x, w: torch.relu(x) @ w, matrix), every, unread=())
        if kind == "linear":
            cases.add("mm", With(lambda x, w: torch.mm(torch.tanh(x), w), matrix),
                      expected(constant=True, unread=False), unread=())  # fmt: skip
            cases.add("addmm", With(lambda x, w, b: torch.addmm(b, torch.relu(x), w), matrix, offset),
                      every, unread=())  # fmt: skip
        cases.add(
            "turned", With(lambda x, w: F.linear(torch.relu(x), w.t()), matrix), every, unread=()
        )
        cases.add("computed", With(lambda x, w, b: F.linear(torch.relu(x), (w * b / w.norm()).t(), b),
                  matrix, offset), every, unread=())  # fmt: skip
        found.append(cases.example(kind))
    return found


def embedding() -> list[Example]:
    """Columns of a table: equal, scaled, constant zero, nearly equal in one row."""
    found = []
    for near in (False, True):
        generator = generator_of(5)
        table = nn.Embedding(7, CHANNELS, dtype=torch.float64)
        bases = torch.randn(CHANNELS, 7, generator=generator, dtype=torch.float64)
        bases[CLASSES[SCALED]] = 2 * bases[CLASSES[3]]
        bases[CLASSES[CONSTANT]] = 0.0
        table.weight.data = bases[list(CLASSES)].t().contiguous()
        if near:
            table.weight.data[3, NEAR] += 0.25
        head = fill(nn.Linear(CHANNELS, 3, dtype=torch.float64), generator)
        head.weight.data[:, UNREAD] = 0.0  # type: ignore[index,union-attr]
        model = nn.Sequential(table, nn.ReLU(), head).eval()
        labels = expected(scaled=True, constant=True, near=near)
        found.append(Example(f"near={near}", model, (torch.tensor([[0, 3, 5], [6, 1, 2]]),),
                             {("0.weight", 1): labels}))  # fmt: skip
    return found


def convolution() -> list[Example]:
    """Every dimension, transposed too, with and without borders, depthwise, grouped."""
    found = []
    for dimensions in (1, 2, 3):
        for prefix in ("Conv", "ConvTranspose"):
            kind = f"{prefix}{dimensions}d"
            cases = Cases(kind)
            # The layer that reads the front has borders if it is transposed.
            folds = prefix == "Conv"
            cases.add("plain", torch.relu, expected(scaled=True, constant=folds))
            for near in ("bias", "weight"):
                missed = expected(scaled=True, constant=folds, near=True)
                cases.add(near, torch.relu, missed, near={0: near})
            if dimensions < 3:
                for near in (False, True):
                    labels = expected(near=near)
                    cases.add(f"depthwise{near}", depthwise(kind, near), labels)
                    if not near:
                        continue
                    labels = expected(near=True)
                    cases.add("depthwise_bias", depthwise(kind, False, bias_near=True), labels)
                cases.add(
                    "padded",
                    conv_on(kind, 1, padding=1),
                    expected(scaled=True, unread=False),
                    unread=(),
                )
                cases.add("strided", conv_on(kind, 1, stride=2, dilation=1),
                          expected(scaled=True, constant=folds, unread=False), unread=())  # fmt: skip
                cases.add("no_bias", conv_on(kind, 1, bias=False),
                          expected(scaled=True, constant=folds, unread=False), unread=())  # fmt: skip
                if prefix == "Conv":
                    cases.add("same", conv_on(kind, 1, padding="same", dilation=2),
                              expected(scaled=True, unread=False), unread=())  # fmt: skip
                    both = expected(unread=False)
                    grid = (*both, *(label + 20 for label in both))
                    cases.add("grouped", conv_on(kind, 2, groups=2), grid, groups=2, unread=())
            found.append(cases.example(kind))
    return found


def conv_on(kind: str, copies: int, **options: Any) -> Op:
    """ReLU, then a random convolution of the front's channels to six."""
    layer = fill(affine(kind, copies * CHANNELS, 6, **options), generator_of(11))
    return nn.Sequential(nn.ReLU(), layer)


def depthwise(kind: str, near: bool, *, bias_near: bool = False) -> Op:
    """One filter a channel, equal inside the classes; perhaps one tap or one bias differs."""
    generator = generator_of(13)
    layer = affine(kind, CHANNELS, CHANNELS, groups=CHANNELS)
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    labels = list(CLASSES)
    shape = weight.shape
    weight.data = torch.randn(shape, generator=generator, dtype=torch.float64)[labels]
    bias.data = per_class(generator, near=bias_near)
    # Nodes 1 and 8 differ only in what they read.
    weight.data[8], bias.data[8] = weight.data[1], bias.data[1]
    if near:
        flat = weight.data.reshape(CHANNELS, -1).clone()
        flat[NEAR, -1] += 0.25
        weight.data = flat.reshape(shape)
    return nn.Sequential(nn.ReLU(), layer)


# -- norms ----------------------------------------------------------------------------------------


def batch_norm() -> list[Example]:
    """Each of the four parameters differs once; four others that together say the same; constants."""
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
        cases.add("two_axes", With(lambda x, w, b: F.layer_norm(x, (7, CHANNELS), w, b), two, two / 3),
                  on, unread=())  # fmt: skip
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


# -- pooling and reductions -----------------------------------------------------------------------


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


# -- movement -------------------------------------------------------------------------------------


def movement() -> list[Example]:
    """Channels carried to other axes, split among several, cut, rolled, tiled, picked."""
    every = expected(scaled=True, constant=True, unread=False)
    kept = expected(scaled=True, constant=True)
    whole = tuple(range(CHANNELS))
    flat = Cases("Conv2d")
    options: dict[str, Any] = dict(back="linear", unread=())
    flat.add("permute", lambda x: x.permute(0, 2, 3, 1), kept, back="linear")
    flat.add("permute_near", lambda x: x.permute(0, 2, 3, 1),
             expected(scaled=True, constant=True, near=True), back="linear", near={0: "weight"})  # fmt: skip
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
    doubled: dict[str, Any] = dict(groups=2, unread=())

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
    both: dict[str, Any] = dict(fronts=2)
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
    for name, op in {
        "space": lambda x, y: torch.cat([x, y], 2),
        "stacked": lambda x, y: torch.stack([x, y], 2).flatten(2, 3),
    }.items():
        for near in ("", "bias", "weight"):
            # The two constants differ, so the node stays.
            labels = expected(scaled=True, near=bool(near))
            cases.add(f"{name}{near}", op, {0: labels, 1: labels}, near={1: near}, **both)
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
