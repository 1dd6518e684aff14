"""What an op demands of the layouts of its operands: declarative, so one solver reads them all.

A *layout* of an axis says which of its nodes share one slot in the smaller graph, and which
have none (constants folded into their readers, nodes that nobody reads).  A rule never decides; it
returns relations, and :mod:`fxfib.passes.solve` finds the coarsest layouts that obey all of them.
:func:`fxfib.lift` reads the same relations the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import fx

from fxfib.coloring import Labels

# An axis of a value; a string names an axis that exists only inside an op (the groups of a grouped
# convolution, say).
Ref = tuple[fx.Node, int | str]


@dataclass(frozen=True, eq=False)
class Same:
    """Two axes of equal size have equal layouts (element-wise ops, a weight and its output)."""

    a: Ref
    b: Ref

    @property
    def refs(self) -> tuple[Ref, ...]:
        return (self.a, self.b)


@dataclass(frozen=True, eq=False)
class Finer:
    """A slot of ``a`` lies within one slot of ``b``, which keeps all that ``a`` keeps.

    ``a`` is what an index makes of ``b``.
    """

    a: Ref
    b: Ref

    @property
    def refs(self) -> tuple[Ref, ...]:
        return (self.a, self.b)


@dataclass(frozen=True, eq=False)
class Full:
    """Nothing may be merged or dropped on this axis."""

    a: Ref
    reason: str

    @property
    def refs(self) -> tuple[Ref, ...]:
        return (self.a,)


@dataclass(frozen=True, eq=False)
class Refine:
    """Only nodes of equal label may share a slot."""

    a: Ref
    labels: Labels

    @property
    def refs(self) -> tuple[Ref, ...]:
        return (self.a,)


@dataclass(frozen=True, eq=False)
class Keep:
    """The marked nodes need a slot of their own class (they cannot be dropped)."""

    a: Ref
    mask: npt.NDArray[np.bool_]

    @property
    def refs(self) -> tuple[Ref, ...]:
        return (self.a,)


@dataclass(frozen=True, eq=False)
class Even:
    """Every class has the same number of members, and none is dropped (a plain norm's statistics).

    Only a lift needs it: a merge can always count.
    """

    a: Ref

    @property
    def refs(self) -> tuple[Ref, ...]:
        return (self.a,)


@dataclass(frozen=True, eq=False)
class SameSize:
    """Axes of equal length that need equally many slots, whichever nodes share them.

    The layers of one recurrent module, the heads of one attention tensor: each has a partition of
    its own, and one number says how wide they all are.

    Attributes:
        refs: the axes.
        above: shorter axes that must have fewer slots (the projection of an LSTM).
    """

    refs: tuple[Ref, ...]
    above: tuple[Ref, ...] = ()


@dataclass(frozen=True, eq=False)
class Move:
    """Elements are moved, not computed: view, permute, slice, concat, shuffle, roll ...

    ``index`` has the sizes of the output's axes; each entry is a position in the sources' grids,
    laid end to end, or -1 for an element that comes from no source (padding).
    """

    out: tuple[Ref, ...]
    sources: tuple[tuple[Ref, ...], ...]
    index: Labels

    @property
    def refs(self) -> tuple[Ref, ...]:
        return self.out + tuple(ref for source in self.sources for ref in source)


Relation = Same | Finer | Full | Refine | Keep | Even | SameSize | Move


def components(relations: Iterable[Relation]) -> dict[Ref, Ref]:
    """Axes tied by ``Same``: each with one that stands for all of them."""
    parent: dict[Ref, Ref] = {}

    def find(ref: Ref) -> Ref:
        root = ref
        while parent.setdefault(root, root) != root:
            root = parent[root]
        while parent[ref] != root:
            parent[ref], ref = root, parent[ref]
        return root

    for relation in relations:
        if isinstance(relation, Same):
            parent[find(relation.a)] = find(relation.b)
    return {ref: find(ref) for ref in list(parent)}
