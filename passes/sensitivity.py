r"""How far outputs move when nodes of one group go and the others stay.

The share of the readers' variance that a group loses says which of its nodes are missed least.  Of
two groups that lose the same share, one may stand where the network makes little of it.  So the
original runs on a few inputs with the nodes :math:`D` of one group replaced by what the kept ones
:math:`K` tell of them, which is all that readers see that are fitted again:

.. math:: x_D \leftarrow \mu_D + G_{DK} G_{KK}^{-1} (x_K - \mu_K)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from fxfib.passes.criteria import CalibratedPolicy
from fxfib.passes.difference import Yardstick
from fxfib.passes.elimination import positive
from fxfib.passes.relations import Ref
from fxfib.passes.stages import Step, silent


@dataclass(frozen=True)
class Told:
    """Some nodes of an axis, as the others tell them.

    Attributes:
        axis: of the value.
        gone, kept: int64, which nodes.
        columns: ``[kept, gone]``.
        shift: ``[gone]``.
    """

    axis: int
    gone: torch.Tensor
    kept: torch.Tensor
    columns: torch.Tensor
    shift: torch.Tensor

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """The value with these nodes replaced."""
        result = value.movedim(self.axis, -1).clone()
        kept, gone = self.kept.to(result.device), self.gone.to(result.device)
        columns, shift = self.columns.to(result), self.shift.to(result)
        result[..., gone] = result[..., kept] @ columns + shift
        return result.movedim(-1, self.axis)


def told(guide: CalibratedPolicy, place: Ref, gone: np.ndarray) -> Told:
    """Least squares from the second moments of a place."""
    known, axis = guide.activations[place], place[1]
    assert isinstance(axis, int)
    chosen = torch.from_numpy(np.sort(gone))
    kept = torch.from_numpy(np.setdiff1d(np.arange(len(known.covariance)), gone))
    damped = positive(known.covariance)
    within = torch.linalg.cholesky(damped[kept[:, None], kept])
    columns = torch.cholesky_solve(damped[kept[:, None], chosen], within)
    if not torch.count_nonzero(known.demand):
        columns = torch.zeros_like(columns)  # there is no linear reader to be fitted
    return Told(axis, chosen, kept, columns, known.mean[chosen] - known.mean[kept] @ columns)


class Replaced(fx.Interpreter):
    """Runs a graph in which some values are not what they were."""

    def __init__(
        self, graph_module: fx.GraphModule, changes: Mapping[fx.Node, Sequence[Told]]
    ) -> None:
        super().__init__(graph_module)
        self.changes = changes

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node."""
        value = super().run_node(n)
        for change in self.changes.get(n, ()):
            value = change(value)
        return value


def sensitivities(
    graph_module: fx.GraphModule,
    guide: CalibratedPolicy,
    gone: Mapping[Ref, int],
    yardstick: Yardstick,
    step: Step = silent,
) -> dict[Ref, float]:
    """How far the outputs move when nodes of one group go, for every group.

    Args:
        gone: for a colored axis how many nodes go from it, and from all that share its layout;
            at least one, not all.
        yardstick: measures how far; its inputs are what is run.
        step: told which share is done.

    Returns:
        For every axis the difference.  Hidden nodes of recurrent layers exist only inside an op,
        and have none.
    """
    found: dict[Ref, float] = {}
    for number, (ref, count) in enumerate(gone.items()):
        places = guide.telling(ref)
        if all(isinstance(axis, int) for _, axis in places):
            changes: dict[fx.Node, list[Told]] = {}
            order = guide.order(ref)[0][:count]
            for place in places:
                read = guide.activations[place].read
                gone_here = np.flatnonzero(np.isin(guide.nodes(place), order))
                changes.setdefault(read, []).append(told(guide, place, gone_here))
            found[ref] = yardstick(Replaced(graph_module, changes).run)
        step("measure", (number + 1) / len(gone))
    return found
