"""How often every node of a captured graph may be copied, so that all relations hold."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import fx

from fxfib.coloring import Labels
from fxfib.equal_copies import equalize
from fxfib.passes.forward import Analysis
from fxfib.passes.layout import Layout
from fxfib.passes.lift_layout import LiftLayout
from fxfib.passes.relations import Even, Full, Move, Ref, Same, SameSize


class Copies:
    """How often every node is copied, so that all relations hold.

    Axes tied by ``Same`` share one layout.  Where an axis is a product of several (the groups of a
    convolution, the heads of a view) one factor of the product is copied and the others are not.
    """

    def __init__(self, analysis: Analysis, factor: float, zero_sum: float, seed: int) -> None:
        self.analysis = analysis
        self.factor = factor
        self.zero_sum = zero_sum
        self.seed = seed
        self.parent: dict[Ref, Ref] = {}
        self.frozen: set[Ref] = set()  # by the root of their class
        self.moves = [r for r in analysis.relations if isinstance(r, Move)]
        self.equal = [r for r in analysis.relations if isinstance(r, SameSize)]
        for relation in analysis.relations:
            for ref in relation.refs:
                self.find(ref)
        for relation in analysis.relations:
            if isinstance(relation, Same):
                self.parent[self.find(relation.a)] = self.find(relation.b)
        for ref in list(self.parent):
            if self.fixed(ref):
                self.frozen.add(self.find(ref))
        for relation in analysis.relations:
            if isinstance(relation, Full):
                self.frozen.add(self.find(relation.a))
        for relation in self.equal:
            # They stay smaller than what grows.
            self.frozen |= {self.find(ref) for ref in relation.above}
        self.made = self.made_by_layers()
        self.root_number = {
            root: k for k, root in enumerate(dict.fromkeys(self.find(r) for r in self.parent))
        }

    def find(self, ref: Ref) -> Ref:
        """The representative of the axes that share a layout with this one."""
        while self.parent.setdefault(ref, ref) != ref:
            self.parent[ref] = self.parent[self.parent[ref]]
            ref = self.parent[ref]
        return ref

    def fixed(self, ref: Ref) -> bool:
        """Whether an axis must keep its size."""
        node, axis = ref
        if isinstance(axis, str) or self.analysis.is_constant(node):
            return False
        if ref in self.analysis.heads.free:
            return False
        return not self.analysis.value(node).tracked(axis)

    def made_by_layers(self) -> list[Ref]:
        """Axes of layers' outputs: they follow from no axis of what is read."""
        follow: set[Ref] = set()
        for relation in self.analysis.relations:
            nodes = {node for node, _ in relation.refs if not self.analysis.is_constant(node)}
            follow |= {ref for ref in relation.refs if nodes.intersection(_read_by(ref[0]))}
        return [
            (node, axis)
            for node, axis in self.parent
            if isinstance(axis, int)
            and self.analysis.value(node).tracked(axis)
            and (node, axis) not in follow
        ]

    def length(self, ref: Ref) -> int:
        """The original size of an axis."""
        node, axis = ref
        if isinstance(axis, str):
            return self.analysis.inner_sizes[node, axis]
        return self.analysis.shape(node)[axis]

    def layouts(self) -> dict[Ref, Layout]:
        """The layout of every axis."""
        while True:
            self.freeze_equals()
            self.choose_factors()
            self.freeze_equals()
            multiplicity = self.multiplicities()
            conflict = self.arrange(multiplicity)
            if conflict is None:
                break
            self.frozen |= {self.find(ref) for ref in conflict}
        result: dict[Ref, Layout] = {}
        shared: dict[Ref, Layout] = {}
        for ref in self.parent:
            root = self.find(ref)
            if root not in shared:
                order = self.order[root]
                shared[root] = LiftLayout(
                    self.length(ref), order, self.zero_sum, (self.seed, self.root_number[root])
                )
            result[ref] = shared[root]
        return result

    def freeze_equals(self) -> None:
        """Where one of several axes of equal width keeps its size, all do."""
        again = True
        while again:
            again = False
            for relation in self.equal:
                roots = {self.find(ref) for ref in relation.refs}
                if roots & self.frozen and not roots <= self.frozen:
                    self.frozen |= roots
                    again = True

    def choose_factors(self) -> None:
        """In every product of axes, one (the longest that is free) is copied."""
        for move in self.moves:
            for side in (move.out, *move.sources):
                free = [r for r in side if self.find(r) not in self.frozen]
                if len(side) > 1 and len(free) > 1:
                    chosen = max(free, key=self.length)
                    for ref in free:
                        if self.find(ref) != self.find(chosen):
                            self.frozen.add(self.find(ref))

    def multiplicities(self) -> dict[Ref, Labels]:
        """For each class of axes, the number of copies of every node."""
        start: dict[Ref, int] = {}
        total = 0
        for ref in self.parent:
            root = self.find(ref)
            if root not in start:
                start[root] = total
                total += self.length(ref)
        left: list[Labels] = []
        right: list[Labels] = []
        still = np.zeros(total, dtype=bool)
        uniform = np.zeros(total, dtype=bool)

        def positions(ref: Ref) -> Labels:
            return start[self.find(ref)] + np.arange(self.length(ref))

        for root in self.frozen:
            if root in start:
                still[positions(root)] = True
        for relation in self.analysis.relations:
            if isinstance(relation, Even):
                own = positions(relation.a)
                left.append(own[:-1])
                right.append(own[1:])
                uniform[own] = True
        for move in self.moves:
            outs = [r for r in move.out if self.find(r) not in self.frozen]
            index = move.index
            if not outs:
                for source in move.sources:
                    for ref in source:
                        still[self._hit(move, source, ref, positions)] = True
                continue
            place = move.out.index(outs[0])
            mine = np.moveaxis(index, place, 0).reshape(index.shape[place], -1)
            own = positions(outs[0])
            begin = 0
            for source in move.sources:
                shape = tuple(self.length(r) for r in source)
                size = int(np.prod(shape))
                inside = (mine >= begin) & (mine < begin + size)
                free = [r for r in source if self.find(r) not in self.frozen]
                rows, columns = np.nonzero(inside)
                if not free:
                    still[own[rows]] = True
                else:
                    coordinate = np.unravel_index(mine[rows, columns] - begin, shape)
                    theirs = positions(free[0])[coordinate[source.index(free[0])]]
                    left.append(own[rows])
                    right.append(theirs)
                begin += size
            still[own[(mine < 0).any(axis=1)]] = True
        edges = (
            np.concatenate(left) if left else np.zeros(0, np.int64),
            np.concatenate(right) if right else np.zeros(0, np.int64),
        )
        matrix = coo_array((np.ones(len(edges[0]), dtype=np.int8), edges), shape=(total, total))
        count, component = connected_components(matrix, directed=False)
        fixed = np.zeros(count, dtype=bool)
        fixed[component[still]] = True
        even = np.zeros(count, dtype=bool)
        even[component[uniform]] = True
        generator = np.random.default_rng([self.seed, 1])
        times = 1 + generator.poisson(self.factor - 1.0, count)
        # A width that one layer makes is rounded up, a stream of several, which costs more, down.
        makers = np.zeros(count, dtype=np.int64)
        for ref in self.made:
            makers[np.unique(component[positions(ref)])] += 1
        up, down = math.ceil(self.factor), math.floor(self.factor)
        times = np.where(even, np.where(makers == 1, up, down), times)
        times = np.where(fixed, 1, times)
        stuck = equalize(
            times,
            [[component[positions(ref)] for ref in r.refs] for r in self.equal],
            fixed | even,
            generator,
        )
        every = times[component]
        if stuck is not None:
            self.frozen |= {self.find(ref) for ref in self.equal[stuck].refs}
            self.freeze_equals()
            return self.multiplicities()
        return {root: every[begin : begin + self.length(root)] for root, begin in start.items()}

    def _hit(self, move: Move, source: tuple[Ref, ...], ref: Ref, positions: Any) -> Labels:
        begin = 0
        for other in move.sources:
            size = int(np.prod([self.length(r) for r in other]))
            if other is source:
                break
            begin += size
        shape = tuple(self.length(r) for r in source)
        inside = (
            move.index[(move.index >= begin) & (move.index < begin + int(np.prod(shape)))] - begin
        )
        coordinate = np.unravel_index(inside, shape)[source.index(ref)]
        return np.asarray(positions(ref)[np.unique(coordinate)])

    def arrange(self, multiplicity: dict[Ref, Labels]) -> list[Ref] | None:
        """The order of the copies on every axis; the axes of a contradiction, if there is one."""
        self.order: dict[Ref, Labels] = {}

        def order_of(ref: Ref) -> Labels:
            root = self.find(ref)
            if root not in self.order:
                times = multiplicity[root]
                self.order[root] = np.repeat(np.arange(len(times)), times)
            return self.order[root]

        for move in self._in_order():
            derived = self._moved(move, order_of)
            refs = [*move.out, *(r for source in move.sources for r in source)]
            if derived is None:
                if any(len(order_of(r)) != self.length(r) for r in refs):
                    return refs
                continue
            axis = move.out[0] if len(move.out) == 1 else move.sources[0][0]
            known = self.order.get(self.find(axis))
            if known is None:
                if not np.array_equal(
                    np.bincount(derived, minlength=self.length(axis)),
                    multiplicity[self.find(axis)],
                ):
                    return refs
                self.order[self.find(axis)] = derived
            elif not np.array_equal(known, derived):
                return refs
        for ref in self.parent:
            order_of(ref)
        return None

    def _in_order(self) -> list[Move]:
        """The moves, those that decide an axis before those that build on it."""

        def decided(move: Move) -> Ref:
            return self.find(move.out[0] if len(move.out) == 1 else move.sources[0][0])

        usable = [m for m in self.moves if m.out and m.sources and m.sources[0]]
        deciding: dict[Ref, int] = {}
        for move in usable:
            deciding[decided(move)] = deciding.get(decided(move), 0) + 1
        waiting: dict[Ref, list[int]] = {}  # for an axis, the moves that build on it
        missing: list[int] = []
        for number, move in enumerate(usable):
            refs = {self.find(r) for side in (move.out, *move.sources) for r in side}
            needed = {ref for ref in refs if ref != decided(move) and deciding.get(ref)}
            missing.append(len(needed))
            for ref in needed:
                waiting.setdefault(ref, []).append(number)
        done = [False] * len(usable)
        ready = [number for number, count in enumerate(missing) if not count][::-1]
        result: list[Move] = []
        earliest = 0
        while len(result) < len(usable):
            while earliest < len(usable) and done[earliest]:
                earliest += 1
            # Where axes decide each other in a circle, the first op of the graph begins.
            number = ready.pop() if ready else earliest
            if done[number]:
                continue
            done[number] = True
            result.append(usable[number])
            target = decided(usable[number])
            deciding[target] -= 1
            if deciding[target] == 0:
                for other in waiting.get(target, ()):
                    missing[other] -= 1
                    if missing[other] == 0:
                        ready.append(other)
        return [*result, *(m for m in self.moves if not (m.out and m.sources and m.sources[0]))]

    def _moved(self, move: Move, order_of: Any) -> Labels | None:
        """The order of an axis that those of the other side imply; None: not a case.

        It is the only output axis, or the only source of a product of output axes.
        """
        index = move.index
        if len(move.out) != 1:
            single = len(move.sources) == 1 and len(move.sources[0]) == 1
            if (
                not move.out
                or not single
                or not np.array_equal(index.reshape(-1), np.arange(index.size))
            ):
                return None
            if self.length(move.sources[0][0]) != index.size:
                return None
            return self._end_to_end(move.out, order_of)
        if all(len(source) == 1 for source in move.sources):
            pieces, begin = [], 0
            for (ref,) in move.sources:
                pieces.append(order_of(ref) + begin)
                begin += self.length(ref)
            copies = np.concatenate(pieces)
            taken = index[index >= 0]
            if len(taken) and np.any(np.diff(taken) <= 0):
                return None
            place = np.full(begin, -1, dtype=np.int64)
            place[taken] = np.flatnonzero(index >= 0)
            moved = place[copies]
            moved = moved[moved >= 0]
            pads = np.flatnonzero(index < 0)
            low = moved.min() if len(moved) else 0
            return np.concatenate([pads[pads < low], moved, pads[pads >= low]])
        if len(move.sources) == 1 and np.array_equal(index, np.arange(len(index))):
            return self._end_to_end(move.sources[0], order_of)
        return None

    def _end_to_end(self, product: tuple[Ref, ...], order_of: Any) -> Labels:
        """The order of the positions of a product of axes, one after the other."""
        shape = tuple(self.length(r) for r in product)
        grid = np.meshgrid(*[order_of(r) for r in product], indexing="ij")
        return np.asarray(np.ravel_multi_index([g.reshape(-1) for g in grid], shape))


def _read_by(node: fx.Node) -> list[fx.Node]:
    """What a node reads; of an item, what the op with several results reads."""
    sources = node.all_input_nodes
    return sources[0].all_input_nodes if node.target is operator.getitem else sources
