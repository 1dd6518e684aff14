"""Which rows are equal: the coloring of Eq. 3, exact or up to a precision eps."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxfib.kernels.coloring.checks import CRITERIA, check_arguments
from fxfib.kernels.coloring.vectorised import color_rows

__all__ = ["CRITERIA", "Coloring", "color"]


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
    r"""Give two rows one color when they are equal in every column (Eq. 3 of the paper).

    .. math:: i \sim k \iff \forall c : \Big|\sum_{j \in c} W_{ij} - \sum_{j \in c} W_{kj}\Big| = 0

    where the rows are the sums already (see `collapse`).  Sums round, and eps allows for more, so
    rows i and k may share a color when, in every column,
    :math:`|r_{ic} - r_{kc}| \le eps + b_{ic} + b_{kc}`, with :math:`b` the bound, and in a color
    **every pair** does: the L-infinity diameter of a color is at most eps plus two bounds.  Where
    closeness is not transitive (chains), colors are those of complete linkage.

    With ``scaled=True`` rows that differ by a positive factor are one color too.  At eps = 0 rows
    divided by their largest absolute value :math:`m_i` are compared, with the bound
    :math:`(b_{ic} + |r_{ic}| \nu_i / m_i) / m_i`, where :math:`\nu_i` is what the bound allows
    :math:`m_i` to vary.  Without a bound that is exact for rows of at most 24 significant bits, and
    up to the rounding of one float64 division for float64 rows.  At eps > 0 proportional rows are
    grouped like this first, then the member of largest norm of every group is compared by eps.
    Rows that are zero, or nowhere above their bound, are proportional to nothing but one another.

    The partition does not depend on the order of the rows or on the number of threads.

    Args:
        rows: float16, bfloat16, float32 or float64 [n, d], finite; n and d may be 0.
        eps: at least 0, finite.
        criterion: one of `CRITERIA`.
        must_match: int64 [n]; only rows with the same number may share a color.
        bound: floating [n, d] or [n, 1], at least 0, finite; None means 0: equal bit by bit except
            that +0 equals -0.
        relative: floating [d], at least 0, finite: a further bound ``relative[c] * |rows[i, c]|``,
            for entries that were rounded, without a matrix of bounds.
        scaled: look for rows that differ by a positive factor.
        weights: floating [n], how much a row counts; a diameter does not depend on it.

    Returns:
        The coloring, its tensors on the device of `rows`.

    Raises:
        InputError: NaN or infinite rows, an unknown criterion, an eps or bound that is negative or
            not finite, shapes or dtypes that do not fit, or more than 20,000 rows in one chain of
            close rows.
    """
    check_arguments(rows, eps, criterion, must_match, bound, relative, weights)
    labels, scales = color_rows(rows, eps, must_match, bound, relative, scaled)
    return Coloring(
        torch.from_numpy(labels).to(rows.device),
        int(labels.max()) + 1 if len(labels) else 0,
        None if scales is None else torch.from_numpy(scales).to(rows.device),
    )
