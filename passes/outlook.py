"""What reads the nodes of every value: how strongly, and whether a factor passes to there.

Forward coloring goes layer by layer and does not look ahead.  The energy that a merge costs depends
on the weights behind it, so this walk comes first, on the relations of an exact analysis.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import fx

from fxfib.coloring import FIRST_FREE, Factor, Floats, Labels
from fxfib.passes.criteria import Policy
from fxfib.passes.forward import Analysis
from fxfib.passes.plan import make_plan
from fxfib.passes.relations import Full, Move, Ref, Same, components
from fxfib.passes.rules import find_rule
from fxfib.passes.rules.base import is_tensor
from fxfib.passes.shared_nodes import shared_nodes
from fxfib.signature import Form


class Probe(Policy):
    """All nodes of a value are one color, each with a factor of its own.

    Where the passes still let them share a slot, factors pass to the readers; asking the passes
    themselves leaves no second list of which ops are positively homogeneous.

    Attributes:
        asked: every axis that a policy colors, and whether its nodes may have factors at all.
    """

    chooses = True

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[Ref, bool] = {}

    def hidden(self, ref: Ref, form: Form, exact: Factor) -> Factor:
        self.asked[ref] = False
        return exact

    def factor(self, analysis: Analysis, node: fx.Node, form: Form, size: int) -> Factor:
        self.asked[node, form.axis] = True
        labels = np.full(size, FIRST_FREE)
        if form.must_match is not None:
            labels = labels + form.must_match
        scales = 1.0 + np.arange(size) / max(size, 1)
        return Factor((form.axis,), labels, scales, ("probe", node.name))


class Outlook:
    """Readers of every value of a captured graph.

    Args:
        graph_module: functional ATen graph.
        skip: nodes that the user asked to leave alone.
    """

    def __init__(self, graph_module: fx.GraphModule, skip: Iterable[fx.Node] = ()) -> None:
        skip = tuple(skip)
        self.exact = Analysis(graph_module, skip=skip).run()
        self.readers, self.plain = _readers(self.exact)
        probe = Probe()
        plan = make_plan(Analysis(graph_module, skip=skip, policy=probe).run())
        self.asked = tuple(probe.asked)
        relations = self.exact.relations
        self._component = components([*relations, *_same_as_groups(self.exact)])
        full = (relation.a for relation in relations if isinstance(relation, Full))
        self._held = {self._root(ref) for ref in full}
        sizes = {
            self._root((node, axis)): int(node.meta["val"].shape[axis])
            for node, axis in self.asked
            if isinstance(axis, int)
        }
        moves = (relation for relation in relations if isinstance(relation, Move))
        self._shared = shared_nodes(sizes, moves, self._root, self._held)
        self._folds = {
            ref: may and plan.layout(*ref).size < plan.layout(*ref).full
            for ref, may in probe.asked.items()
        }

    def folds(self, ref: Ref) -> bool:
        """Whether nodes that differ by a positive factor can share a slot."""
        return self._folds.get(ref, False)

    def tied(self, ref: Ref, other: Ref) -> bool:
        """Whether nodes of two axes go together.

        So they do before and behind a depthwise layer, too, and where a stream gets new channels.
        """
        return self._stands_for(ref) == self._stands_for(other)

    def _root(self, ref: Ref) -> Ref:
        """An axis that stands for all with the same layout."""
        return self._component.get(ref, ref)

    def _stands_for(self, ref: Ref) -> Ref | int:
        root = self._root(ref)
        return self._shared[root].group if root in self._shared else root

    def nodes(self, ref: Ref, size: int) -> Labels:
        """The nodes of an axis, ``[size]``, as numbered among those of all that are tied to it."""
        root = self._root(ref)
        return self._shared[root].nodes if root in self._shared else np.arange(size)

    def held(self, ref: Ref) -> bool:
        """Whether none of the nodes may go."""
        return self._root(ref) in self._held

    def follows(self, ref: Ref) -> bool:
        """Whether nodes are read one by one, as in a depthwise convolution.

        No other node makes up for what such a reader loses, and it loses nothing that counts where
        its own nodes go, too: what reads those in turn tells who is missed.
        """
        columns = self.columns(ref)
        alone = (
            len(c) == c.shape[1] and not torch.count_nonzero(c - c.diagonal().diag())
            for c in columns
        )
        return bool(columns) and not self.plain.get(ref) and all(alone)

    def columns(self, ref: Ref) -> list[torch.Tensor]:
        """The weights that read the nodes of an axis, each ``[m, nodes]``."""
        return self.readers.get(ref, [])

    def norms(self, ref: Ref, size: int) -> Floats:
        """Norm of everything that reads each node, ``[size]``; readers without a weight count 1."""
        total = np.full(size, self.plain.get(ref, 0.0))
        for columns in self.columns(ref):
            total += columns.to(torch.float64).square().sum(0).numpy()
        return total**0.5


def _readers(analysis: Analysis) -> tuple[dict[Ref, list[torch.Tensor]], dict[Ref, float]]:
    """Backwards through the graph: the weights that read every axis, and other readers' number."""
    readers: dict[Ref, list[torch.Tensor]] = {}
    plain: dict[Ref, float] = {}

    def other(node: fx.Node, known: set[Ref]) -> None:
        for source in node.all_input_nodes:
            if is_tensor(source) and not analysis.is_constant(source):
                for axis in analysis.value(source).tracked_axes:
                    if (source, axis) not in known:
                        plain[source, axis] = plain.get((source, axis), 0.0) + 1.0

    for node in reversed(analysis.graph_module.graph.nodes):
        if node.op == "output":
            other(node, set())
        if node.op != "call_function" or analysis.is_constant(node) or not node.users:
            continue
        rule = None if node in analysis.opaque else find_rule(node)
        if rule is None or node not in analysis.by_node:
            other(node, set())
            continue
        known: set[Ref] = set()
        for ref, columns in rule.columns(analysis, node):
            known.add(ref)
            readers.setdefault(ref, []).append(columns)
        for relation in analysis.by_node[node] if not known else ():
            for ref, out, passed in _passed(node, relation, readers):
                known.add(ref)
                readers.setdefault(ref, []).extend(passed)
                if out in plain:
                    plain[ref] = plain.get(ref, 0.0) + plain[out]
        other(node, known)
    return readers, plain


def _same_as_groups(analysis: Analysis) -> Iterator[Same]:
    """Axes of grouped layers with one node in every group: the groups are the nodes."""
    for relation in analysis.relations:
        if isinstance(relation, Move) and len(relation.out) == 1 and len(relation.sources) == 1:
            (out,), ((group, *inside),) = relation.out, relation.sources
            if [analysis.inner_sizes.get(ref) for ref in inside] == [1]:
                yield Same(out, group)


def _passed(
    node: fx.Node, relation: object, readers: dict[Ref, list[torch.Tensor]]
) -> Iterator[tuple[Ref, Ref, list[torch.Tensor]]]:
    """Readers of an op's output as readers of its inputs: input axis, output axis, weights."""
    if isinstance(relation, Same) and relation.a[0] is node:
        if relation.b[0].op != "get_attr":
            yield relation.b, relation.a, readers.get(relation.a, [])
    elif isinstance(relation, Move) and all(ref[0] is node for ref in relation.out):
        if any(isinstance(axis, str) for source in relation.sources for _, axis in source):
            return
        for place, out in enumerate(relation.out):
            start = 0
            for source in relation.sources:
                shape = tuple(source_node.meta["val"].shape[axis] for source_node, axis in source)
                shape = tuple(int(s) for s in shape)
                size = int(np.prod(shape))
                inside = (relation.index >= start) & (relation.index < start + size)
                to = np.nonzero(inside)[place]
                coordinates = np.unravel_index(relation.index[inside] - start, shape)
                start += size
                for ref, width, at in zip(source, shape, coordinates, strict=True):
                    yield (
                        ref,
                        out,
                        [_moved(c, to, at, width) for c in readers.get(out, [])],
                    )


def _moved(columns: torch.Tensor, to: np.ndarray, at: np.ndarray, width: int) -> torch.Tensor:
    """``[m, out]`` as ``[m * copies, width]``: what read position ``to`` reads node ``at``."""
    pairs = np.unique(np.stack([at, to], 1), axis=0)
    first = np.r_[True, pairs[1:, 0] != pairs[:-1, 0]] if len(pairs) else np.zeros(0, bool)
    position = np.arange(len(pairs))
    copy = position - np.maximum.accumulate(np.where(first, position, 0))
    result = columns.new_zeros(len(columns), int(copy.max(initial=0)) + 1, width)
    result[:, torch.from_numpy(copy), torch.from_numpy(pairs[:, 0])] = columns[
        :, torch.from_numpy(pairs[:, 1])
    ]
    return result.reshape(-1, width)
