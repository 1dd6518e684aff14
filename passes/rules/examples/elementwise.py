"""Activations, arithmetic and comparisons."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxfib.passes.rules.examples.networks import (
    Cases,
    Example,
    Op,
    expected,
    generator_of,
    module_of,
    per_class,
)

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
        kept: dict[str, Any] = {"dtype": torch.float64}
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


def filling() -> list[Example]:
    """A sum with a filled tensor: node by node the other operand, shifted."""
    cases = Cases()
    labels = expected(scaled=False, constant=True)
    cases.add("zeros", lambda x: x + torch.zeros_like(x), expected(scaled=True, constant=True))
    cases.add("ones", lambda x: x + torch.ones_like(x), labels)
    cases.add("full", lambda x: x + torch.full_like(x, 0.5), labels)
    cases.add(
        "near",
        lambda x: x + torch.ones_like(x),
        expected(scaled=False, constant=True, near=True),
        near={0: "bias"},
    )
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
    both = {"fronts": 2, "activation": F.silu}
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
    for missing in (False,) if one_scaled else (False, True):
        own = per_class(generator_of(3), near=missing)
        # A number a node of its own: a scaled node stays scaled under products alone.
        by_node = expected(scaled=one_scaled, constant=True, near=missing)
        suffix = "_near" if missing else ""
        cases.add(f"constant{suffix}", With(op, own), by_node)
        cases.add(f"constant_first{suffix}", With(lambda x, c: op(c, x), own),
                  expected(scaled=name == "mul", constant=True, near=missing))  # fmt: skip
        cases.add(
            f"constant_after_relu{suffix}",
            With(lambda x, c: op(torch.relu(x), c), own),
            by_node,
        )
        grid = per_class(generator_of(4), near=missing) + torch.rand(
            5, 1, generator=generator_of(5), dtype=torch.float64
        )
        kept = expected(scaled=False, constant=False, near=missing)
        cases.add(f"constant_rows{suffix}", With(lambda x, c: op(x[:, :5], c), grid), kept)
    column = torch.rand(5, 1, generator=generator_of(6), dtype=torch.float64)
    row_wise = expected(scaled=one_scaled, constant=False)
    cases.add("constant_column", With(lambda x, c: op(x[:, :5], c), column), row_wise)
    number = torch.rand((), generator=generator_of(8), dtype=torch.float64) + 0.3
    cases.add("constant_scalar", With(op, number), expected(scaled=one_scaled, constant=True))

    def half(x: Tensor) -> Tensor:
        takes_tensors = name in ("where", "maximum", "minimum", "pow")
        return op(x, torch.full((), 0.6, dtype=x.dtype) if takes_tensors else 0.6)

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
    """Every overload of an op of two operands: two values, one of which decides; a number."""
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


def threefold() -> list[Example]:
    """Each of three operands decides, as a value and as a parameter."""
    ops: dict[str, Op] = {
        "addcmul": lambda x, y, z: torch.addcmul(x, y, z, value=0.7),
        "addcdiv": lambda x, y, z: torch.addcdiv(x, y, z * z + 0.3, value=0.7),
        "lerp": torch.lerp,
    }
    cases = Cases("sequence")
    for name, op in ops.items():
        for near in ({}, {0: "bias"}, {1: "weight"}):
            labels = expected(constant=True, near=bool(near))
            suffix = "".join(f"{a}{b}" for a, b in near.items())
            cases.add(
                f"{name}{suffix}",
                lambda x, y, op=op: op(torch.tanh(x), torch.sigmoid(y), torch.tanh(x)),
                {0: labels, 1: labels},
                fronts=2,
                near=near,
            )
        for place in range(3):
            for missing in (False, True):
                own = per_class(generator_of(3), near=missing)

                def with_own(x: Tensor, c: Tensor, op: Op = op, place: int = place) -> Tensor:
                    operands = [torch.tanh(x), torch.sigmoid(x)]
                    operands.insert(place, c)
                    result: Tensor = op(*operands)
                    return result

                cases.add(
                    f"{name}_parameter{place}{missing}",
                    With(with_own, own),
                    expected(constant=True, near=missing),
                )
    half: Op = lambda x, y: torch.lerp(torch.tanh(x), torch.tanh(y), 0.3)  # noqa: E731
    labels = expected(constant=True)
    cases.add("number", half, {0: labels, 1: labels}, fronts=2)
    return [cases.example("threefold")]


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
