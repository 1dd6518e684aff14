"""The coarsest layouts that obey every relation: a fixed point of refinement.

Each axis starts with its semantic coloring (an axis that nobody has colored yet, one class) and is
only ever refined, so the result is unique and does not depend on the order of the relations.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from fxfib.coloring import Labels, first_appearance, project, unique_rows
from fxfib.passes.relations import (
    Even,
    Finer,
    Full,
    Keep,
    Move,
    Ref,
    Refine,
    Relation,
    Same,
    SameSize,
)

Mask = npt.NDArray[np.bool_]


class Solver:
    """Partitions and kept nodes of every axis that a relation names.

    Args:
        relations: what must hold.
        initial: gives, for an axis, its size, its starting labels and its starting ``keep`` mask.
    """

    def __init__(
        self,
        relations: Iterable[Relation],
        initial: Callable[[Ref], tuple[Labels, Mask]],
    ) -> None:
        self.relations = [r for r in relations if not isinstance(r, Even)]
        self.equal = [r for r in self.relations if isinstance(r, SameSize)]
        self.ids: dict[Ref, Labels] = {}
        self.keep: dict[Ref, Mask] = {}
        self.reasons: dict[Ref, str] = {}
        self.apart: dict[Ref, int] = {}
        self._of: dict[Ref, list[Relation]] = {}
        self._occurrence: dict[int, Labels] = {}
        for relation in self.relations:
            for ref in relation.refs:
                if ref not in self.ids:
                    labels, keep = initial(ref)
                    self.ids[ref] = first_appearance(labels)
                    self.keep[ref] = keep.copy()
                self._of.setdefault(ref, []).append(relation)
        for equal in self.equal:
            lengths = {len(self.ids[ref]) for ref in equal.refs}
            if len(lengths) > 1:
                raise AssertionError(f"axes of different length cannot have one size: {equal}")
            if any(len(self.ids[ref]) >= min(lengths) for ref in equal.above):
                raise AssertionError(f"an axis cannot have fewer slots than a shorter one: {equal}")

    def run(self, round_to: int | None = None) -> None:
        """Refine until nothing changes; then make every axis non-empty and round the widths up."""
        self._settle(self.relations)
        while True:
            emptied = [ref for ref, keep in self.keep.items() if len(keep) and not keep.any()]
            if not emptied:
                break
            queue: deque[Relation] = deque()
            self._keep(emptied[0], _only(len(self.keep[emptied[0]]), 0), queue)
            self._settle(queue)
        alone = {ref: self.classes(ref) for ref in self.ids} if self.equal else {}
        if self._equalize():
            self.apart = {ref: more for ref in alone if (more := self.classes(ref) - alone[ref])}
        if round_to is not None and round_to > 1:
            # Each makes widths grow only, so they come to an end.
            while self._round(round_to) and self._equalize():
                pass

    def _settle(self, work: Iterable[Relation]) -> None:
        queue: deque[Relation] = deque(work)
        waiting = {id(r) for r in queue}
        while queue:
            relation = queue.popleft()
            waiting.discard(id(relation))
            touched: deque[Relation] = deque()
            self._apply(relation, touched)
            for other in touched:
                if id(other) not in waiting and (
                    other is not relation or isinstance(relation, Move)
                ):
                    waiting.add(id(other))
                    queue.append(other)

    def _apply(self, relation: Relation, queue: deque[Relation]) -> None:
        match relation:
            case Same(a, b):
                if len(self.ids[a]) != len(self.ids[b]):
                    raise AssertionError(f"axes of different size: {a}, {b}")
                joint = self._meet(self.ids[a], self.ids[b])
                keep = self.keep[a] | self.keep[b]
                for ref in (a, b):
                    self._set(ref, joint, queue)
                    self._keep(ref, keep, queue)
            case Finer(a, b):
                self._set(a, self._meet(self.ids[a], self.ids[b]), queue)
                self._keep(b, self.keep[a], queue)
            case Full(a, reason):
                self.reasons.setdefault(a, reason)
                self._set(a, np.arange(len(self.ids[a])), queue)
                self._keep(a, np.ones(len(self.ids[a]), dtype=bool), queue)
            case Refine(a, labels):
                self._set(a, self._meet(self.ids[a], labels), queue)
            case Keep(a, mask):
                self._keep(a, self.keep[a] | mask, queue)
            case Move():
                self._move(relation, queue)
            case SameSize():
                pass  # only when all else is settled

    @staticmethod
    def _meet(a: Labels, b: Labels) -> Labels:
        return a if np.array_equal(a, b) else unique_rows(a, b)

    def _set(self, ref: Ref, labels: Labels, queue: deque[Relation]) -> None:
        old = self.ids[ref]
        if labels.max(initial=-1) != old.max(initial=-1):
            # A refinement of a numbering by first appearance has more classes or is the same.
            self.ids[ref] = first_appearance(labels)
            queue.extend(self._of[ref])

    def _keep(self, ref: Ref, mask: Mask, queue: deque[Relation]) -> None:
        if np.any(mask & ~self.keep[ref]):
            self.keep[ref] = self.keep[ref] | mask
            queue.extend(self._of[ref])

    def _grid(self, refs: tuple[Ref, ...]) -> tuple[Labels, Mask, int]:
        """Class numbers and kept elements of a product of axes, and how many numbers there are."""
        ids = np.zeros((1,) * len(refs), dtype=np.int64)
        keep = np.ones((1,) * len(refs), dtype=bool)
        total = 1
        for position, ref in enumerate(refs):
            shape = [1] * len(refs)
            shape[position] = -1
            width = int(self.ids[ref].max(initial=-1)) + 1
            ids = ids * width + self.ids[ref].reshape(shape)
            keep = keep & self.keep[ref].reshape(shape)
            total *= width
        return ids, keep, total

    def _move(self, move: Move, queue: deque[Relation]) -> None:
        index = move.index
        flat_ids, flat_keep, offset = [], [], 0
        for source in move.sources:
            ids, keep, total = self._grid(source)
            flat_ids.append(ids.reshape(-1) + offset)
            flat_keep.append(keep.reshape(-1))
            offset += total
        source_ids = np.concatenate([*flat_ids, np.array([offset])])
        source_keep = np.concatenate([*flat_keep, np.array([False])])
        occurrence = self._occurrences(move)
        copies = int(occurrence.max(initial=0)) + 1
        moved = source_ids[index] * copies + occurrence
        moved_keep = source_keep[index]
        for position, ref in enumerate(move.out):
            others = tuple(a for a in range(index.ndim) if a != position)
            self._set(ref, self._meet(self.ids[ref], project(moved, position)), queue)
            self._keep(ref, np.asarray(moved_keep.any(axis=others)), queue)
        out_ids, out_keep, _ = self._grid(move.out)
        out_ids = np.broadcast_to(out_ids, index.shape)
        out_keep = np.broadcast_to(out_keep, index.shape)
        for copy in range(copies):
            chosen = (occurrence == copy) & (index >= 0)
            pulled = np.full(len(source_ids), -1, dtype=np.int64)
            pulled_keep = np.zeros(len(source_ids), dtype=bool)
            pulled[index[chosen]] = out_ids[chosen]
            pulled_keep[index[chosen]] = out_keep[chosen]
            start = 0
            for source in move.sources:
                shape = tuple(len(self.ids[ref]) for ref in source)
                size = int(np.prod(shape))
                grid = pulled[start : start + size].reshape(shape)
                grid_keep = pulled_keep[start : start + size].reshape(shape)
                start += size
                for position, ref in enumerate(source):
                    others = tuple(a for a in range(len(shape)) if a != position)
                    self._set(ref, self._meet(self.ids[ref], project(grid, position)), queue)
                    self._keep(ref, np.asarray(grid_keep.any(axis=others)), queue)

    def _occurrences(self, move: Move) -> Labels:
        """For each output element, how many earlier ones come from the same source element."""
        key = id(move)
        if key not in self._occurrence:
            flat = move.index.reshape(-1)
            order = np.argsort(flat, kind="stable")
            ordered, place = flat[order], np.arange(len(flat))
            starts = np.r_[True, ordered[1:] != ordered[:-1]][: len(flat)]
            result = np.zeros(len(flat), dtype=np.int64)
            result[order] = place - np.maximum.accumulate(np.where(starts, place, 0))
            result[flat < 0] = 0
            self._occurrence[key] = result.reshape(move.index.shape)
        return self._occurrence[key]

    def classes(self, ref: Ref) -> int:
        """Slots of an axis: classes with at least one kept node."""
        return len(np.unique(self.ids[ref][self.keep[ref]]))

    def _round(self, multiple: int) -> bool:
        """Make widths multiples, where the original is wide enough; whether any grew."""
        grown = False
        for ref in list(self.ids):
            goal = min(len(self.ids[ref]), -(-self.classes(ref) // multiple) * multiple)
            grown |= self._grow_to(ref, goal)
        return grown

    def _equalize(self) -> bool:
        """Make the widths of every ``SameSize`` equal to the largest; whether any grew."""
        grown, again = False, True
        while again:
            again = False
            for equal in self.equal:
                goal = max(
                    max(self.classes(ref) for ref in equal.refs),
                    max((self.classes(ref) + 1 for ref in equal.above), default=0),
                )
                for ref in equal.refs:
                    again |= self._grow_to(ref, goal)  # what it is tied to may be wider now
            grown |= again
        return grown

    def _grow_to(self, ref: Ref, goal: int) -> bool:
        """Slots until there are as many as wanted; whether any came.

        What an axis is tied to is settled after every step, which takes long, and may give the axis
        more slots than the step asked for.  So steps are large, but half of what would do if all
        brought as much as those before.
        """
        size, each = self.classes(ref), 1
        if size >= goal:
            return False
        step = 1
        while size < goal:
            self._grow(ref, step)
            before, size = size, self.classes(ref)
            each = max(each, -(-(size - before) // step))
            step = max(1, (goal - size) // (2 * each))
        return True

    def _grow(self, ref: Ref, count: int) -> None:
        """More slots: split the largest class (of equal ones the first), or drop a node less."""
        ids, keep = self.ids[ref].copy(), self.keep[ref].copy()
        for _ in range(count):
            counts = np.bincount(ids[keep], minlength=int(ids.max()) + 1)
            if counts.max() > 1:
                member = np.flatnonzero((ids == counts.argmax()) & keep)[-1]
            else:
                member = np.flatnonzero(~keep)[0]
                keep[member] = True
            ids[member] = ids.max() + 1
        queue: deque[Relation] = deque()
        self._set(ref, ids, queue)
        self._keep(ref, keep, queue)
        self._settle(queue)


def _only(size: int, position: int) -> Mask:
    """A mask of one position."""
    mask = np.zeros(size, dtype=bool)
    mask[position] = True
    return mask
