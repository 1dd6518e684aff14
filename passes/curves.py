"""What merging costs, group by group, before anything is merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import fx

from fxfib.coloring import Factor, Floats
from fxfib.passes.criteria import CalibratedPolicy, EnergyPolicy, layers_behind, owners
from fxfib.passes.forward import Analysis
from fxfib.passes.groups import coloring_of
from fxfib.passes.relations import Ref
from fxfib.signature import Form


@dataclass(frozen=True)
class Curve:
    """The nodes of one value, and what is lost when fewer are left.

    Attributes:
        ref: the value that was colored, and the axis of its nodes; of several axes that share one
            layout (a residual stream), the first.
        layers: module paths of the layers behind it; they share one eps.
        size: number of nodes.
        lost: float64 ``[at most size - 1]``, not decreasing: the share of its readers' variance
            that is lost when 1, 2, ... nodes have gone, measured on inputs; of several axes that
            share one layout, the sum.  Without data the
            linkage of rows says which nodes are alike, and little of how many a layer needs: noise
            sent through the network tells that better.
    """

    ref: Ref
    layers: tuple[str, ...]
    size: int
    lost: Floats


class Recorder(EnergyPolicy):
    """Colors exactly, and notes what approximate colors would cost."""

    def __init__(self, guide: CalibratedPolicy) -> None:
        super().__init__(0.0, guide.outlook)
        self.guide = guide
        self.curves: dict[Ref, Curve] = {}

    def choose(self, ref: Ref, form: Form, exact: Factor) -> Factor:
        if ref not in self.guide.activations or (~exact.constant).sum() < 2:
            return exact
        places = self.guide.places(ref)
        if any(place in self.curves for place in places):
            return exact
        lost = self.guide.lost(ref, form, exact) * len(self.guide.telling(ref))
        behind = (layer for place in places for layer in layers_behind(place[0]))
        layers = {path for layer in behind for path in owners(layer)}
        if len(lost) > 1 and layers:
            names = tuple(sorted(layers))
            self.curves[ref] = Curve(ref, names, len(self.guide.order(ref)[0]), lost[:-1])
        return exact


class CountPolicy(EnergyPolicy):
    """Lets given numbers of nodes go, and notes the eps that does just that.

    What a merge costs depends on what was merged before, so it is known only layer by layer.

    Attributes:
        found: eps of every layer, the least of the values that it is behind.
    """

    def __init__(self, policy: EnergyPolicy, gone: Mapping[Ref, int]) -> None:
        super().__init__(0.0, policy.outlook)
        self.policy = policy
        self.gone = gone
        self.found: dict[str, float] = {}

    def choose(self, ref: Ref, form: Form, exact: Factor) -> Factor:
        if exact.constant.all():
            return exact  # nothing is left to choose, nor to say of the layers behind
        wanted = max((n for r, n in self.gone.items() if self.outlook.tied(r, ref)), default=0)
        lost = self.policy.lost(ref, form, exact) if wanted else np.zeros(0)
        # Behind a depthwise layer those that went before it are constants, and have gone already.
        before = coloring_of(self.outlook.exact, ref)
        already = 0 if before is None else int((exact.constant & ~before.constant).sum())
        if 0 < wanted <= already:
            # Behind a recurrent layer, too, what was to go has gone, at the eps of that layer.
            return exact
        gone = min(wanted - already, len(lost) - 1)
        eps = between(lost, gone) if gone > 0 else 0.0
        for layer in layers_behind(ref[0]):
            for path in owners(layer):
                self.found[path] = min(self.found.get(path, np.inf), eps)
        return self.policy.at(eps).choose(ref, form, exact) if eps else exact


def between(lost: Floats, gone: int) -> float:
    """An eps that lets exactly so many nodes go, away from both ends where there is room."""
    here = float(lost[gone - 1])
    after = float(lost[gone]) if gone < len(lost) else here * 1.01
    return min(here + (after - here) / 2, 1.0)


def curves_of(graph_module: fx.GraphModule, guide: CalibratedPolicy) -> list[Curve]:
    """One curve for every value whose nodes could merge, in order of the graph."""
    recorder = Recorder(guide)
    Analysis(graph_module, policy=recorder).run()
    return list(recorder.curves.values())
