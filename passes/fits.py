"""What there is to fit in compensation: layers, and the two sides of their regressions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx

from fxfib.passes.layout import Reducer
from fxfib.passes.regression import Regression, linear_regression
from fxfib.passes.rewrite import Rewriter
from fxfib.passes.rules import find_rule
from fxfib.passes.rules.recurrent import Recurrent

# Products of fewer columns than twice this are computed at once.
NARROW = 256


@dataclass
class Moments:
    """Sums over all rows so far, group by group, in float64: of both sides, of their products."""

    count: int = 0
    a: Any = 0.0
    z: Any = 0.0
    aa: Any = 0.0
    az: Any = 0.0
    zz: Any = 0.0

    def add(self, design: torch.Tensor, response: torch.Tensor) -> None:
        """Add rows ``[groups, m, d]`` and ``[groups, m, out]``, float32 or float64."""
        if not self.count:
            (groups, _, d), out = design.shape, response.shape[2]
            fresh = partial(design.new_zeros, dtype=torch.float64)
            self.a, self.z, self.zz = fresh(groups, d), fresh(groups, out), fresh(groups, out)
            self.aa, self.az = fresh(groups, d, d), fresh(groups, d, out)
        self.count += design.shape[1]
        self.a += design.sum(1)
        self.z += response.sum(1)
        _add_products(self.aa, design)
        self.az += design.transpose(1, 2) @ response
        self.zz += response.square().sum(1)


def _add_products(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add the products of all columns ``[groups, m, d]`` to ``[groups, d, d]``.

    They are symmetric, so of wide rows a block beside the diagonal is computed once.
    """
    half = rows.shape[2] // 2
    if half < NARROW:
        total += rows.transpose(1, 2) @ rows
        return
    left, right = rows[:, :, :half], rows[:, :, half:]
    _add_products(total[:, :half, :half], left)
    _add_products(total[:, half:, half:], right)
    beside = left.transpose(1, 2) @ right
    total[:, :half, half:] += beside
    total[:, half:, :half] += beside.transpose(1, 2)


@dataclass(eq=False)
class Fit:
    """One weight to fit.

    Attributes:
        node: the original layer.
        new: the merged one.
        regression: how its input meets its weight.
        rows: how its outputs were merged.
        level: how many layers have to be fitted before.
        norm: the batch norm that alone reads the layer, in the small graph.
        given: the value of the small graph from which the design is made.
        wanted: the value of the original from which the response is made.
        weight, bias: names of the merged parameters; the bias may be None.
    """

    node: fx.Node
    new: fx.Node
    regression: Regression
    rows: Reducer
    level: int
    norm: fx.Node | None
    given: fx.Node
    wanted: fx.Node
    weight: str
    bias: str | None
    moments: Moments = field(default_factory=Moments)


def recurrent_fits(rewriter: Rewriter, node: fx.Node, new: fx.Node, level: int) -> Iterator[Fit]:
    """The weights of a recurrent module on an input that has changed, gates side by side.

    Those on its own hidden nodes are left alone: fitted step by step to what the original's make of
    the original's, they drift when the steps are run one after another, far below what merging
    gave.  Layers above the first are not fitted, either.
    """
    analysis = rewriter.analysis
    rule = find_rule(node)
    assert isinstance(rule, Recurrent)
    source = analysis.arguments(node)["input"]
    given: Any = new.args[list(node.args).index(source)]
    names = dict(zip(_parameters(node), [str(p.target) for p in _parameters(new)], strict=True))
    for layer in rule.layers(analysis, node)[: rule.directions(analysis, node)]:
        bias = None if layer.bias_ih is None else names[layer.bias_ih]
        regression = linear_regression(source, layer.ih, layer.bias_ih, 0, 3)
        matrix = analysis.tensor(layer.ih)
        offset = 0.0 if layer.bias_ih is None else analysis.tensor(layer.bias_ih)
        response = partial(_response, regression.response, matrix, offset)
        layout = rewriter.layout(layer.ih, 0)
        rows = layout.rows(np.ones(layout.full))
        regression = replace(regression, response=response)
        yield Fit(
            node, new, regression, rows, level, None, given, source, names[layer.ih], bias
        )  # fmt: skip


def _response(
    rows: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    matrix: torch.Tensor,
    offset: torch.Tensor | float,
    value: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """What a weight makes of the original's input, ``[rows, out]``."""
    return rows(value, positions) @ matrix.t() + offset


def _parameters(node: fx.Node) -> list[fx.Node]:
    """The flat list of parameters, third of the arguments of every recurrent module."""
    return list(node.args[2])  # type: ignore[arg-type]
