"""Which rows are equal, exactly or up to a precision eps: the public face of coloring."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from fxfib.errors import InputError
from fxfib.kernels.coloring.checks import CRITERIA, check_arguments
from fxfib.kernels.coloring.threads import in_order
from fxfib.kernels.coloring.vectorised import color_rows
from fxfib.kernels.dispatch import backend_of

__all__ = ["CRITERIA", "Coloring", "color", "color_batch"]

T = TypeVar("T")
# Rows, eps, bound, relative bound, groups.
_Problem = tuple[Tensor, float, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class Coloring:
    """A partition of n rows.

    Attributes:
        labels: int64 [n], the color of every row, numbered in the order of first appearance, on the
            device of the rows.
        num_classes: number of colors.
        scales: float64 [n] when colored with ``scaled=True``, else None: row i equals ``scales[i]``
            times the first row of its color.  Positive; 1.0 for the first row of every color.
    """

    labels: Tensor
    num_classes: int
    scales: Tensor | None = None


def color(
    rows: Tensor,
    eps: float = 0.0,
    criterion: str = "fibration",
    *,
    must_match: Tensor | None = None,
    bound: Tensor | None = None,
    relative: Tensor | None = None,
    scaled: bool = False,
    weights: Tensor | None = None,
) -> Coloring:
    r"""Give two rows one color when they are equal, exactly or up to eps.

    **fibration** (Eq. 3 of the paper).

    .. math:: i \sim k \iff \forall c : \Big|\sum_{j \in c} W_{ij} - \sum_{j \in c} W_{kj}\Big| = 0

    where the rows are the sums already (see `collapse`).  Sums round, and eps allows for more, so
    rows i and k may share a color when, in every column,
    :math:`|r_{ic} - r_{kc}| \le eps + b_{ic} + b_{kc}`, with :math:`b` the bound, and in a color
    **every pair** does: the L-infinity diameter of a color is at most eps plus two bounds.  Where
    closeness is not transitive (chains), colors are those of complete linkage.

    **cosine**.  Average linkage on :math:`1 - \cos(r_i, r_k)`: clusters are joined, the nearest
    first, while their mean distance is at most eps, in [0, 2].  A zero row is similar to zero rows
    only.

    **energy**.  Ward linkage on :math:`x_i = \sqrt{w_i}\, r_i`, with :math:`w` the weights:
    clusters are joined, the nearest first, while what all joins together lose is at most its share:

    .. math:: \sum_{\text{colors } C} \sum_{i \in C} |x_i - \bar x_C|^2 \le eps \sum_i |x_i|^2

    With ``scaled=True`` these are :math:`x_i = \sqrt{w_i |r_i|_2}\; r_i / |r_i|_2`, and zero rows
    stand apart.

    eps = 0 is exact under every criterion: equal rows, up to their bounds (cosine: parallel rows,
    as with ``scaled=True``).  At eps > 0 cosine and energy find these classes first; the member of
    largest norm stands for all of its class, which counts as often as it has members, each with the
    mean of their weights.

    With ``scaled=True`` rows that differ by a positive factor are one color too.  At eps = 0 rows
    divided by their largest absolute value :math:`m_i` are compared, with the bound
    :math:`(b_{ic} + |r_{ic}| \nu_i / m_i) / m_i`, where :math:`\nu_i` is what the bound allows
    :math:`m_i` to vary.  Without a bound that is exact for rows of at most 24 significant bits, and
    up to the rounding of one float64 division for float64 rows.  At eps > 0 proportional rows are
    grouped like this first, then the member of largest norm of every group is compared by eps.
    Rows that are zero, or nowhere above their bound, are proportional to nothing but one another.

    The partition does not depend on the order of the rows or on the number of threads: rows are put
    in the order of their values first, and ties go to the first rows in that order.

    Args:
        rows: float16, bfloat16, float32 or float64 [n, d], finite; n and d may be 0.
        eps: at least 0, finite; at most 2 for cosine and 1 for energy.
        criterion: one of `CRITERIA`.
        must_match: int64 [n]; only rows with the same number may share a color.
        bound: floating [n, d] or [n, 1], at least 0, finite; None means 0: equal bit by bit except
            that +0 equals -0.
        relative: floating [d], at least 0, finite: a further bound ``relative[c] * |rows[i, c]|``,
            for entries that were rounded, without a matrix of bounds.
        scaled: look for rows that differ by a positive factor.
        weights: floating [n], at least 0, finite: how much the energy of a row counts (the squared
            norm of its outgoing column); None means 1.  The other criteria do not depend on it.

    Returns:
        The coloring, its tensors on the device of `rows`.

    Raises:
        InputError: NaN or infinite rows, an unknown criterion, an eps, bound or weight that is
            negative or not finite, an eps that is too large, shapes or dtypes that do not fit, or
            more rows than linkage can hold in memory.
    """
    check_arguments(rows, eps, criterion, must_match, bound, relative, weights)
    if not scaled and _has_kernels(rows, eps, criterion):
        return _on_device([(rows, eps, bound, relative, must_match)])[0]
    labels, scales = color_rows(rows, eps, criterion, must_match, bound, relative, scaled, weights)
    return Coloring(
        torch.from_numpy(labels).to(rows.device),
        int(labels.max()) + 1 if len(labels) else 0,
        None if scales is None else torch.from_numpy(scales).to(rows.device),
    )


def _has_kernels(rows: Tensor, eps: float, criterion: str) -> bool:
    """Whether Triton runs, for which rows have to be compared entry by entry."""
    by_entry = criterion == "fibration" or (criterion == "energy" and eps == 0)
    return by_entry and backend_of(rows).name == "triton"


def _on_device(problems: Sequence[_Problem]) -> list[Coloring]:
    """Colorings of matrices that are on one device, all in one launch; arguments are checked."""
    from fxfib.kernels.coloring.triton import Matrix
    from fxfib.kernels.coloring.triton_color import color_on_device

    device = problems[0][0].device

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(device)

    matrices = [
        Matrix(rows.detach(), eps, moved(bound), moved(relative), moved(groups))
        for rows, eps, bound, relative, groups in problems
    ]
    return [
        Coloring(labels, int(labels.max()) + 1 if len(labels) else 0)
        for labels in color_on_device(matrices)
    ]


def color_batch(
    matrices: Sequence[Tensor],
    eps: float | Sequence[float] = 0.0,
    criterion: str = "fibration",
    *,
    must_match: Sequence[Tensor | None] | None = None,
    bound: Sequence[Tensor | None] | None = None,
    relative: Sequence[Tensor | None] | None = None,
    scaled: bool = False,
    weights: Sequence[Tensor | None] | None = None,
) -> list[Coloring]:
    """`color` of several matrices of any sizes: heads, experts, layers that do not wait for others.

    Args:
        matrices: floating [n_i, d_i].
        eps: as for `color`; one number for all, or one for each matrix.
        criterion: as for `color`.
        must_match: one argument of `color` for each matrix; None: None for all.
        bound: likewise.
        relative: likewise.
        scaled: as for `color`.
        weights: likewise, one for each matrix.

    Returns:
        What `color` returns for each matrix, in their order.

    Raises:
        InputError: as for `color`, or a sequence that is not as long as `matrices`.
    """
    count = len(matrices)

    def each(name: str, values: Sequence[T] | None) -> Sequence[T | None]:
        if values is None:
            return [None] * count
        if len(values) != count:
            raise InputError(f"color_batch: {len(values)} entries of {name} for {count} matrices.")
        return values

    precision = [eps] * count if isinstance(eps, (int, float)) else eps
    problems = list(
        zip(
            matrices,
            cast(Sequence[float], each("eps", precision)),
            each("bound", bound),
            each("relative", relative),
            each("must_match", must_match),
            strict=True,
        )
    )
    mass = each("weights", weights)
    together: dict[torch.device, list[int]] = {}
    if not scaled:
        for place, problem in enumerate(problems):
            rows, own_eps, own_bound, own_relative, groups = problem
            if _has_kernels(rows, own_eps, criterion):
                check_arguments(
                    rows, own_eps, criterion, groups, own_bound, own_relative, mass[place]
                )
                together.setdefault(problem[0].device, []).append(place)
    done: dict[int, Coloring] = {}
    for places in together.values():
        colorings = _on_device([problems[place] for place in places])
        done.update(zip(places, colorings, strict=True))

    def one(place: int) -> Coloring:
        rows, own_eps, own_bound, own_relative, groups = problems[place]
        return color(
            rows,
            own_eps,
            criterion,
            must_match=groups,
            bound=own_bound,
            relative=own_relative,
            scaled=scaled,
            weights=mass[place],
        )

    others = [place for place in range(count) if place not in done]
    done.update(zip(others, in_order(one, others), strict=True))
    return [done[place] for place in range(count)]
