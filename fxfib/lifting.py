"""The inverse of a compile: a wider module that computes the same function.

A node becomes several copies; its outgoing columns are split among them at random, with changes
that sum to zero, so copies are fibers without being plain duplicates.  The rules that rewrite a
merged graph rewrite a lifted one: only the layouts differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn

from fxfib.api import skipped_nodes
from fxfib.capture import capture, normalize_inputs
from fxfib.coloring import Floats, Labels
from fxfib.errors import InputError, VerifyError
from fxfib.modules import FibrationModule, raise_modules, unshare
from fxfib.passes.forward import Analysis
from fxfib.passes.layout import Layout, Reducer
from fxfib.passes.plan import Plan
from fxfib.passes.relations import Even, Full, Move, Ref, Same
from fxfib.passes.rewrite import Rewriter
from fxfib.passes.verify import TOLERANCE, difference


def lift(
    module: nn.Module,
    factor: float = 1.5,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    zero_sum: float = 0.5,
    skip: Iterable[str] = (),
    seed: int = 0,
    verify: bool = True,
) -> FibrationModule:
    """A wider module of the same function: every hidden node becomes one or more copies.

    Args:
        module: in eval mode; never modified.
        factor: mean number of copies of a node, at least 1.  Nodes that enter statistics over the
            channels (layer norm, a mean over channels) all need the same number: the whole part of
            the factor.
        example_inputs, example_kwargs: as for :func:`fxfib.compile`.
        zero_sum: size of the changes of the split columns that cancel in the sum, relative to the
            columns' own size; 0 splits only.
        skip: patterns of module paths whose nodes are not copied.
        seed: of the multiplicities, splits and changes; the result depends on nothing else.
        verify: compare outputs on the example inputs.

    Returns:
        A module under the user's own names; compiling it at eps = 0 gives back the original sizes.

    Raises:
        InputError: the factor is not a finite number of at least 1, or inputs are missing.
        VerifyError: the wider module differs by more than the dtype's tolerance.
    """
    if not np.isfinite(factor) or factor < 1:
        raise InputError(f"factor must be a finite number of at least 1, not {factor!r}.")
    if example_inputs is None and not example_kwargs:
        raise InputError("lift needs example_inputs: the arguments of one call.")
    captured = capture(module, example_inputs, example_kwargs)
    skipped = skipped_nodes(captured.graph_module, skip)
    analysis = Analysis(captured.graph_module, skip=skipped).run()
    plan = Plan(analysis, dict(Copies(analysis, factor, zero_sum, seed).layouts()), {}, {})
    lifted = raise_modules(Rewriter(plan).run(), captured)
    lifted.train(captured.source.training)
    if verify:
        args, kwargs = normalize_inputs(captured.source, example_inputs, example_kwargs)
        with torch.no_grad():
            expected = torch.utils._pytree.tree_leaves(captured.source(*args, **kwargs))
            found = torch.utils._pytree.tree_leaves(lifted(*args, **kwargs))
        gap = difference(expected, found).relative
        dtypes = [p.dtype for p in captured.source.parameters()]
        tolerance = max((TOLERANCE[d] for d in dtypes if d in TOLERANCE), default=1e-4)
        if not gap <= tolerance:
            raise VerifyError(
                f"the lifted {type(captured.source).__name__} differs from the original by "
                f"{gap:.2g} (relative), above the tolerance of {tolerance:g}; nothing was returned."
            )
    unshare(lifted, captured.source)
    return lifted


class LiftLayout(Layout):
    """One node, one or more slots."""

    def __init__(self, full: int, copies: Labels, zero_sum: float, seed: tuple[int, ...]) -> None:
        first = np.full(full, -1, dtype=np.int64)
        first[copies[::-1]] = np.arange(len(copies))[::-1]
        super().__init__(first, copies)
        object.__setattr__(self, "zero_sum", zero_sum)
        object.__setattr__(self, "seed", seed)

    zero_sum: float
    seed: tuple[int, ...]

    @cached_property
    def counts(self) -> npt.NDArray[np.float64]:
        """Each copy counts for its share of the node it is a copy of."""
        times = np.bincount(self.representative, minlength=self.full)
        return np.asarray(1.0 / times[self.representative])

    def rows(self, weights: Floats | None) -> Reducer:
        """Copies have the row of their node."""
        return self.first

    def columns(self, scales: Floats | None) -> Reducer:
        """Copies share the column of their node."""
        return Split(self)


class Split:
    """Columns divided among the copies of their node: random shares plus changes that cancel."""

    def __init__(self, layout: LiftLayout) -> None:
        self.layout = layout
        self.full = layout.full

    @property
    def identity(self) -> bool:
        """Whether no node has a second copy."""
        return self.layout.identity

    def apply(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """The tensor with the columns of an axis divided; every sum over copies is kept."""
        layout = self.layout
        if self.identity:
            return tensor
        generator = np.random.default_rng([*layout.seed, axis, tensor.ndim])
        copies = layout.representative
        times = np.bincount(copies, minlength=layout.full)
        share = generator.uniform(0.25, 1.0, len(copies))
        share /= np.bincount(copies, share, layout.full)[copies]
        several = np.flatnonzero(times > 1)
        number = np.full(layout.full, -1)
        number[several] = np.arange(len(several))
        touched = np.flatnonzero(times[copies] > 1)  # a node with one copy keeps its column

        def index(values: npt.NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(values).to(tensor.device)

        stored = tensor.detach().movedim(axis, 0)
        result = stored[index(copies)]
        wide = stored[index(several)].to(torch.float64)
        of = index(number[copies[touched]])
        column = (-1, *[1] * (tensor.ndim - 1))
        size = float(stored.abs().mean(dtype=torch.float64)) if stored.numel() else 0.0
        normal = generator.standard_normal((len(touched), *stored.shape[1:]), dtype=np.float32)
        change = torch.from_numpy(normal).to(wide)
        mean = torch.zeros_like(wide).index_add_(0, of, change)
        mean /= index(times[several]).reshape(column)
        change.sub_(mean[of]).mul_(layout.zero_sum * size)
        change.addcmul_(wide[of], index(share[touched]).reshape(column))
        rounded = change.to(tensor.dtype)
        # What rounding took from the sum goes to the last copy: the sum is right to one rounding.
        total = torch.zeros_like(wide).index_add_(0, of, rounded.to(torch.float64))
        last = np.zeros(len(several), dtype=np.int64)
        last[number[copies[touched]]] = np.arange(len(touched))
        fixed = rounded[index(last)].to(torch.float64) + (wide - total)
        rounded[index(last)] = fixed.to(tensor.dtype)
        result[index(touched)] = rounded
        return result.movedim(0, axis).contiguous()


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
        return not self.analysis.value(node).tracked(axis)

    def length(self, ref: Ref) -> int:
        """The original size of an axis."""
        node, axis = ref
        if isinstance(axis, str):
            return self.analysis.inner_sizes[node, axis]
        return self.analysis.shape(node)[axis]

    def layouts(self) -> dict[Ref, Layout]:
        """The layout of every axis."""
        while True:
            self.choose_factors()
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
        times = np.where(even, int(self.factor), times)
        times = np.where(fixed, 1, times)
        every = times[component]
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

        for move in self.moves:
            derived = self._moved(move, order_of)
            refs = [*move.out, *(r for source in move.sources for r in source)]
            if derived is None:
                if any(len(order_of(r)) != self.length(r) for r in refs):
                    return refs
                continue
            (out,) = move.out
            known = self.order.get(self.find(out))
            if known is None:
                if not np.array_equal(
                    np.bincount(derived, minlength=self.length(out)), multiplicity[self.find(out)]
                ):
                    return refs
                self.order[self.find(out)] = derived
            elif not np.array_equal(known, derived):
                return refs
        for ref in self.parent:
            order_of(ref)
        return None

    def _moved(self, move: Move, order_of: Any) -> Labels | None:
        """The order of a single output axis that the sources' orders imply; None: not a case."""
        if len(move.out) != 1:
            return None
        index = move.index
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
            (source,) = move.sources
            shape = tuple(self.length(r) for r in source)
            grid = np.meshgrid(*[order_of(r) for r in source], indexing="ij")
            return np.ravel_multi_index([g.reshape(-1) for g in grid], shape)
        return None
