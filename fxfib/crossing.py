"""Where a measured loss crosses its limit along ever smaller networks, found in few looks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


class Crossing:
    r"""Between a network whose loss is within a limit and a smaller one beyond it.

    Along a path of networks the increase of the loss goes nearly with a power of the predicted
    loss, so the next look is where the power law through both ends meets the limit,

    .. math:: \log p = \log p_0
        + \frac{\log l - \log y_0}{\log y_1 - \log y_0} (\log p_1 - \log p_0)

    with :math:`p` predicted losses, :math:`y` increases and :math:`l` the limit's, or a line where
    there is no logarithm.  It is never nearer to an end than what is to be told apart, and behind
    two looks on one side it goes twice as far, so that both ends come near.  Where three looks have
    not halved the bracket, or nothing can be told, the sizes are bisected.  Nothing but what was
    measured decides what is within: a wrong prediction costs looks only.

    Args:
        sizes: of the networks, not rising.
        predicted: their predicted losses, not falling.
        original: the loss of the original.
        limit: the largest loss that is within.
        close: sizes so near, as a part of the larger, are not told apart.
        low, high: the ends: place and measured loss.  NaN is beyond every limit.
    """

    def __init__(
        self,
        sizes: Sequence[float],
        predicted: Sequence[float],
        original: float,
        limit: float,
        close: float,
        low: tuple[int, float],
        high: tuple[int, float],
    ) -> None:
        self.sizes = np.maximum(np.asarray(sizes, dtype=np.float64), 1e-300)
        self.predicted = np.asarray(predicted, dtype=np.float64)
        self.original, self.limit, self.close = original, limit, close
        self.low, self.high = low, high
        self.widths: list[float] = [math.inf, math.inf, math.inf]
        # Of the last look; and whether it is the second on one side of the crossing.
        self.within: bool | None = None
        self.short = False

    def saw(self, place: int, loss: float) -> None:
        """Take up what was measured between the ends."""
        within = loss <= self.limit
        self.short = self.within is within
        self.within = within
        if within:
            self.low = place, loss
        else:
            self.high = place, loss

    def next(self) -> int | None:
        """The place to look at; None where the ends are near enough."""
        low, high = self.low[0], self.high[0]
        larger, smaller = float(self.sizes[low]), float(self.sizes[high])
        apart = 1 - self.close
        # The first place that can be told apart from the end that is within the limit.
        first = self._place(apart * larger)
        if first >= high:
            return None
        self.widths.append(math.log(larger / smaller))
        middle = math.sqrt(larger * smaller)
        size = None if self.widths[-1] > self.widths[-4] / 2 else self._meets()
        if size is None:
            size = middle
        else:
            if self.short:
                size *= size / (larger if self.within else smaller)
            # So that the end there is moved beyond the crossing.
            most, least = apart * larger, smaller / (1 - 0.9 * self.close)
            size = min(max(size, least), most) if least < most else middle
        return min(max(self._place(size), first), high - 1)

    def _place(self, size: float) -> int:
        """The first that is no larger."""
        return int(np.searchsorted(-self.sizes, -size))

    def _meets(self) -> float | None:
        """The size at which the limit is met, as the ends tell."""
        (p0, y0), (p1, y1), wanted = self._seen(self.low), self._seen(self.high), self.limit
        wanted -= self.original
        if wanted <= 0 or not math.isfinite(y1 - y0):
            return None
        if min(p0, y0) > 0:
            p0, p1, y0, y1, wanted = map(math.log, (p0, p1, y0, y1, wanted))
            predicted = math.exp(p0 + (wanted - y0) / (y1 - y0) * (p1 - p0))
        else:
            predicted = p0 + (wanted - y0) / (y1 - y0) * (p1 - p0)
        return float(np.interp(predicted, self.predicted, self.sizes))

    def _seen(self, end: tuple[int, float]) -> tuple[float, float]:
        """Predicted loss and increase."""
        place, loss = end
        return float(self.predicted[place]), loss - self.original
