"""What eps measures, and how large it is where: the policy by which rows become colors."""

from __future__ import annotations

import copy
import fnmatch
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from fxfib.coloring import FIRST_FREE, ZERO, Factor, Floats, Labels, first_appearance
from fxfib.errors import InputError
from fxfib.passes.elimination import Place, eliminate
from fxfib.passes.relations import Ref
from fxfib.passes.rules import find_rule
from fxfib.passes.rules.base import Rule
from fxfib.passes.weighted_ward import Tree, ward_tree
from fxfib.signature import Form, color_form

if TYPE_CHECKING:
    from fxfib.passes.activations import Activation
    from fxfib.passes.forward import Analysis
    from fxfib.passes.outlook import Outlook

KEPT_TREES = 4
# One number, or for patterns (fnmatch) of module paths one each; what no pattern names has 0.
Eps = float | Mapping[str, float]


def owners(node: fx.Node) -> set[str]:
    """Module paths of the parameters that a node reads."""
    return {
        str(source.target).rpartition(".")[0] or str(source.target)
        for source in node.all_input_nodes
        if source.op == "get_attr"
    }


def layers_behind(node: fx.Node) -> list[fx.Node]:
    """The layers whose outputs reach a value through ops that make no nodes of their own."""
    found, seen, pending = [], {node}, [node]
    while pending:
        current = pending.pop()
        if current.op != "call_function":
            continue
        rule = find_rule(current)
        if rule is not None and type(rule).produces is not Rule.produces:
            found.append(current)
            continue
        for source in current.all_input_nodes:
            if source not in seen and isinstance(source.meta.get("val"), torch.Tensor | tuple):
                seen.add(source)
                pending.append(source)
    return found


class Policy:
    """Colors by one criterion, with one eps or one for every layer.

    Args:
        eps: see :data:`Eps`; 0 is exact.
        criterion: what eps measures.

    Attributes:
        masses: for an axis that was colored, how much each node counts in the average of its color.
    """

    #: Whether :meth:`hidden` decides on recurrent layers; if not, a fixed point at eps does.
    chooses: ClassVar[bool] = False

    def __init__(self, eps: Eps = 0.0, criterion: str = "fibration") -> None:
        self.eps = eps
        self.criterion = criterion
        self.masses: dict[Ref, Floats] = {}

    @property
    def exact(self) -> bool:
        """Whether eps is 0 everywhere."""
        return not any(self.eps.values()) if isinstance(self.eps, Mapping) else self.eps == 0

    def eps_at(self, node: fx.Node | None) -> float:
        """Fiber precision of a value: the smallest of the layers that are coupled in it."""
        if not isinstance(self.eps, Mapping):
            return self.eps
        if node is None:
            return 0.0
        return min((self._of_layer(layer) for layer in layers_behind(node)), default=0.0)

    def _of_layer(self, layer: fx.Node) -> float:
        """The first pattern that matches decides."""
        assert isinstance(self.eps, Mapping)
        paths = owners(layer)
        for pattern, eps in self.eps.items():
            if any(fnmatch.fnmatchcase(path, pattern) for path in paths):
                return eps
        return 0.0

    def check(self, nodes: Iterable[fx.Node]) -> None:
        """Refuse patterns that name no layer.

        Raises:
            InputError: a pattern matches none.
        """
        if not isinstance(self.eps, Mapping):
            return
        paths = {path for node in nodes if node.op == "call_function" for path in owners(node)}
        for pattern in self.eps:
            if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
                raise InputError(
                    f"eps pattern {pattern!r} matches no layer; patterns are module paths such as "
                    "'layer1.*.conv1'."
                )

    def factor(self, analysis: Analysis, node: fx.Node, form: Form, size: int) -> Factor:
        """The colors of the nodes of a value."""
        return color_form(form, size, self.eps_at(node), self.criterion, analysis.roundoff)

    def hidden(self, ref: Ref, form: Form, exact: Factor) -> Factor:
        """The colors of the hidden nodes of a recurrent layer; they take no scales.

        Args:
            ref: the layer and its axis of hidden nodes.
            form: the rows of all gates side by side, ``[hidden, d]``.
            exact: their colors at eps = 0.
        """
        return exact


class EnergyPolicy(Policy):
    r"""Colors that lose little of the energy of what their readers compute, told from the weights.

    With row norms :math:`s_i`, norms :math:`o_i` of what reads the nodes and unit rows :math:`u_i`:
    Ward linkage of the :math:`u_i` with masses :math:`s_i o_i` where a factor passes to the
    readers, :math:`s_i` then being the factor; elsewhere of the rows themselves, with masses
    :math:`o_i`.  A color is represented by its mean with these masses.

    Args:
        eps: the share of the energy that merging may lose.
        outlook: what reads every node.
    """

    chooses = True

    def __init__(self, eps: Eps, outlook: Outlook) -> None:
        super().__init__(eps, "energy")
        self.outlook = outlook
        # A search colors the same rows again and again: the last trees of every value.
        self._trees: dict[Ref, dict[bytes, Tree]] = {}

    def at(self, eps: Eps) -> EnergyPolicy:
        """The same with another eps."""
        other = copy.copy(self)
        other.eps, other.masses = eps, {}
        return other

    def tree(
        self, ref: Ref, form: Form, live: npt.NDArray[np.bool_]
    ) -> tuple[Tree, Floats, Floats]:
        """Joins of the nodes that are not constant; factors and masses of all, ``[size]``."""
        size = len(live)
        rows = np.concatenate([form.rows.to(torch.float64).numpy(), form.offset[:, None]], 1)
        masses = self.outlook.norms(ref, size)
        scales = np.ones(size)
        if self.outlook.folds(ref):
            length = np.linalg.norm(rows, axis=1)
            scales = np.where(length > 0, length, 1.0)
            rows, masses = rows / scales[:, None], masses * length
        match = np.zeros(size, np.int64) if form.must_match is None else form.must_match
        digest = hashlib.sha256(np.ascontiguousarray(rows).tobytes())
        digest.update(masses.tobytes() + match.tobytes() + live.tobytes())
        kept, key = self._trees.setdefault(ref, {}), digest.digest()
        if key not in kept:
            while len(kept) >= KEPT_TREES:
                del kept[next(iter(kept))]
            kept[key] = ward_tree(rows[live], masses[live], match[live])
        return kept[key], scales, masses

    def factor(self, analysis: Analysis, node: fx.Node, form: Form, size: int) -> Factor:
        exact = color_form(form, size, 0.0, "fibration", analysis.roundoff)
        return self.choose((node, form.axis), form, exact)

    def hidden(self, ref: Ref, form: Form, exact: Factor) -> Factor:
        return self.choose(ref, form, exact)

    def lost(self, ref: Ref, form: Form, exact: Factor) -> Floats:
        """The share that is lost when 1, 2, ... of the nodes that are not constant have gone."""
        return np.append(self.tree(ref, form, ~exact.constant)[0].lost, 1.0)

    def choose(self, ref: Ref, form: Form, exact: Factor) -> Factor:
        """Colors at this eps, given those at eps = 0."""
        eps = self.eps_at(ref[0])
        live = ~exact.constant
        if eps == 0 or live.sum() < 2:
            return exact
        tree, scales, self.masses[ref] = self.tree(ref, form, live)
        labels = exact.labels.copy()
        clusters, dropped = tree.cut(eps)
        labels[live] = np.where(dropped, ZERO, first_appearance(clusters) + FIRST_FREE)
        live &= labels != ZERO
        return replace(exact, labels=labels, scales=np.where(live, scales, exact.scales))


class CalibratedPolicy(EnergyPolicy):
    """Drops the nodes whose readers lose least, measured on inputs.

    A dropped node is merged into the constant zero; what it meant to its readers is to be given to
    the others by compensation.  Equal nodes are merged as at eps = 0.

    Args:
        eps: the share of the readers' variance that may be lost.
        outlook: what reads every node.
        activations: covariance of the nodes of every colored axis, and what reads them.
    """

    def __init__(self, eps: Eps, outlook: Outlook, activations: Mapping[Ref, Activation]) -> None:
        super().__init__(eps, outlook)
        self.activations = activations
        self._orders: dict[Ref, tuple[Labels, Floats]] = {}

    def places(self, ref: Ref) -> list[Ref]:
        """The colored axes whose nodes go together with these."""
        return [other for other in self.activations if self.outlook.tied(other, ref)]

    def telling(self, ref: Ref) -> list[Ref]:
        """Those of the :meth:`places` where it shows which nodes are missed."""
        places = self.places(ref)
        found = [place for place in places if not self.outlook.follows(place)]
        own, told = ({n for p in some for n in self.nodes(p).tolist()} for some in (places, found))
        return found if own == told else places

    def nodes(self, ref: Ref) -> Labels:
        """The nodes of an axis as they are numbered in :meth:`order`."""
        return self.outlook.nodes(ref, len(self.activations[ref].covariance))

    def order(self, ref: Ref) -> tuple[Labels, Floats]:
        """The nodes of all :meth:`places` in the order in which they go, and what is lost then."""
        if ref not in self._orders:
            telling = self.telling(ref)
            known = [(self.activations[place], self.nodes(place)) for place in telling]
            found = eliminate([Place(a.covariance, a.demand, a.alone, n) for a, n in known])
            self._orders |= dict.fromkeys(self.places(ref), found)
        return self._orders[ref]

    def lost(self, ref: Ref, form: Form, exact: Factor) -> Floats:
        order, lost = self.order(ref)
        constant = np.zeros(len(order), dtype=bool)
        constant[self.nodes(ref)] = exact.constant
        return lost[~constant[order]]

    def choose(self, ref: Ref, form: Form, exact: Factor) -> Factor:
        eps = self.eps_at(ref[0])
        if eps == 0 or ref not in self.activations:
            return exact
        order, lost = self.order(ref)
        going = np.zeros(len(order), dtype=bool)
        going[order[: int(np.searchsorted(lost, eps, side="right"))]] = True
        gone = going[self.nodes(ref)] & ~exact.constant
        labels = np.where(gone, ZERO, exact.labels)
        return replace(exact, labels=labels, scales=np.where(gone, 1.0, exact.scales))
