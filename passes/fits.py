"""What there is to fit in compensation: layers, and the two sides of their regressions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import fx, nn

from fxfib.errors import InputError
from fxfib.passes.forward import module_path
from fxfib.passes.layout import Reducer
from fxfib.passes.regression import Regression, positions_of

# Rows beyond this many for each column of a layer's design say little more.
ROWS_PER_COLUMN = 24
FEWEST_ROWS = 40_000
# Numbers of a design that are in memory at a time.
NUMBERS_AT_ONCE = 2**24
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


class Fit(Protocol):
    """Weights of one layer of the small graph that are fitted to what the original computes.

    Attributes:
        node: the original layer.
        level: how many layers have to be fitted before.
        given: values of the small graph that are looked at.
        wanted: values of the original that are looked at.
    """

    node: fx.Node
    level: int
    given: tuple[fx.Node, ...]
    wanted: tuple[fx.Node, ...]

    @property
    def parameters(self) -> list[fx.Node]:
        """What is fitted, in the original."""

    @property
    def runs(self) -> int:
        """How often the layer is run to solve it."""

    def observe(
        self, small: fx.GraphModule, given: Sequence[Any], wanted: Sequence[Any], examples: int
    ) -> None:
        """Take up the values of one batch, of so many examples in all batches."""

    def solve(self, small: fx.GraphModule) -> Iterator[int]:
        """Change the weights in place; tells how many runs there were."""


@dataclass(eq=False)
class LinearFit:
    """One weight to fit, and the bias with it.

    Attributes:
        node: the original layer.
        regression: how its input meets its weight.
        rows: how its outputs were merged.
        level, given, wanted, runs: see :class:`Fit`.
        norm: the batch norm that alone reads the layer, in the small graph.
        weight, bias: names of the merged parameters; the bias may be None.
        ridge: how much the columns that merging gave count.
    """

    node: fx.Node
    regression: Regression
    rows: Reducer
    level: int
    norm: fx.Node | None
    given: tuple[fx.Node, ...]
    wanted: tuple[fx.Node, ...]
    weight: str
    bias: str | None
    ridge: float
    moments: Moments = field(default_factory=Moments)
    runs: ClassVar[int] = 0

    @property
    def parameters(self) -> list[fx.Node]:
        """What is fitted, in the original."""
        return [p for p in (self.regression.weight, self.regression.bias) if p is not None]

    def observe(
        self, small: fx.GraphModule, given: Sequence[Any], wanted: Sequence[Any], examples: int
    ) -> None:
        """Add some rows of the regression."""
        regression = self.regression
        (source,), (expected,) = given, wanted
        weight = tensor_at(small, self.weight)
        width = regression.matrix(weight).shape[1]
        most = max(1, -(-max(FEWEST_ROWS, ROWS_PER_COLUMN * width) // examples))
        shape = tuple(expected.shape) if isinstance(expected, torch.Tensor) else ()
        positions = positions_of(shape, regression.axis, most, self.moments.count)
        one = regression.design(source, positions[:1], weight).numel()
        for chosen in positions.split(max(1, NUMBERS_AT_ONCE // max(1, one))):
            design = wide(regression.design(source, chosen, weight))
            response = wide(self.rows.apply(regression.response(expected, chosen), 1))
            groups = len(design)
            self.moments.add(design, response.unflatten(1, (groups, -1)).transpose(0, 1))

    def solve(self, small: fx.GraphModule) -> Iterator[int]:
        """Least squares, held to what merging gave."""
        regression, moments = self.regression, self.moments
        name = self.weight
        old = tensor_at(small, name)
        count = moments.count
        mean_a, mean_z = moments.a / count, moments.z / count
        groups, width = mean_a.shape
        start = regression.matrix(old).double().reshape(groups, -1, width)
        bias_name = self.bias
        # Batch norm takes up a shift, as a bias does; without either there is none.
        centred = bias_name is not None or self.norm is not None
        shift_a, shift_z = (mean_a, mean_z) if centred else (0 * mean_a, 0 * mean_z)
        # The widest layers' matrices are most of the memory, so they are changed in place.
        gram, cross = moments.aa.div_(count), moments.az.div_(count)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        weight = self.ridge * diagonal.mean(1).clamp(min=1e-30)[:, None, None]
        gram.baddbmm_(shift_a[:, :, None], shift_a[:, None], alpha=-1)
        cross.baddbmm_(shift_a[:, :, None], shift_z[:, None], alpha=-1)
        diagonal += weight[:, 0]
        cross += weight * start.transpose(1, 2)
        check_finite(self.node, gram, cross)
        solved = torch.cholesky_solve(cross, torch.linalg.cholesky(gram)).transpose(1, 2)
        set_tensor(small, name, regression.tensor(solved.flatten(0, 1), old))
        mean = torch.einsum("god,gd->go", solved, mean_a).flatten()
        mean_z = mean_z.flatten()
        if bias_name is not None:
            assert tensor_at(small, bias_name).shape == mean_z.shape
            set_tensor(small, bias_name, mean_z - mean)
        if self.norm is not None:
            offset = 0.0 if bias_name is None else tensor_at(small, bias_name).double()
            variance = (solved @ gram * solved).sum(2) - weight[:, 0] * solved.square().sum(2)
            before = moments.zz.flatten() / count - mean_z**2
            _renormalise(self.norm, small, mean + offset - mean_z, variance.flatten(), before)
        self.moments = Moments()
        yield 0


def check_finite(layer: fx.Node, *values: torch.Tensor) -> None:
    """Raises InputError where a layer cannot be fitted to such values."""
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise InputError(
            f"{module_path(layer)} cannot be fitted: on the calibration inputs it reads or gives "
            "NaN or infinite values; leave those inputs out, or give the model in a wider dtype."
        )


def wide(rows: torch.Tensor) -> torch.Tensor:
    """Float32, or float64 as it is."""
    return rows if rows.dtype == torch.float64 else rows.float()


def _renormalise(
    norm: fx.Node,
    small: fx.GraphModule,
    shift: torch.Tensor,
    variance: torch.Tensor,
    before: torch.Tensor,
) -> None:
    """Statistics of batch norm, changed as its inputs were: robust to inputs of another kind."""
    names = [str(n.target) for n in norm.args[3:5] if isinstance(n, fx.Node)]
    if len(names) != 2 or any(len(n.users) > 1 for n in norm.args[3:5]):  # type: ignore[union-attr]
        return
    mean, var = (tensor_at(small, name) for name in names)
    factor = (variance / before.clamp(min=1e-30)).clamp(0.01, 100.0)
    set_tensor(small, names[0], mean.double() + shift)
    set_tensor(small, names[1], var.double() * torch.where(before > 1e-12, factor, 1.0))


def tensor_at(module: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer of this path, without its history."""
    result: Any = module
    for part in name.split("."):
        result = getattr(result, part)
    return result.detach()


def set_tensor(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """A new tensor in place of an old one, whose memory may be the original model's."""
    owner: Any = module
    *path, leaf = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    old = getattr(owner, leaf)
    fresh = value.to(old.dtype).reshape(old.shape).contiguous()
    if isinstance(old, nn.Parameter):
        fresh = nn.Parameter(fresh, requires_grad=old.requires_grad)
    setattr(owner, leaf, fresh)
