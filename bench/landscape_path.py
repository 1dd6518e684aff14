"""A path of equal loss between any two lifts of one base that have a node to spare.

Straight lines between lifts that copy other nodes leave the lifts.  But a node that nobody reads
can become anything, and a copy can take over what another copy contributes; so a lift turns into
any other, corner by corner: what a color contributes is gathered in one copy, the copy moves to
where the other lift has that color (by way of a free place where all are taken), the rest follow,
and contributions are spread as the other lift does.  Every piece is a straight line among lifts.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def colors_of(model: nn.Module, base: nn.Module, example: Tensor) -> list[list[int]]:
    """Of every hidden layer, which node of the base each node is a copy of."""
    found = []
    h, g = example, example
    layers, bases = ([m for m in n.modules() if isinstance(m, nn.Linear)] for n in (model, base))
    with torch.no_grad():
        for layer, small in zip(layers[:-1], bases[:-1], strict=True):
            h, g = layer(h), small(g)
            exact = "donot_use_mm_for_euclid_dist"
            far = torch.cdist(h.T.contiguous(), g.T.contiguous(), compute_mode=exact)
            nearest = far.argmin(1)
            if float(far.gather(1, nearest[:, None]).max()) > 1e-9 * float(g.norm()):
                raise AssertionError("a node is a copy of none of the base")
            found.append(nearest.tolist())
            h, g = h.relu(), g.relu()
    return found


def corners(
    one: nn.Module, other: nn.Module, base: nn.Module, example: Tensor
) -> Iterator[nn.Module]:
    """The corners of the path; the last is `other`, weight by weight."""
    now = copy.deepcopy(one)
    layers, wanted = ([m for m in n.modules() if isinstance(m, nn.Linear)] for n in (now, other))
    before, after = colors_of(one, base, example), colors_of(other, base, example)
    yield copy.deepcopy(now)
    for place, (layer, reader) in enumerate(itertools.pairwise(layers)):
        old, new = before[place], after[place]
        where = {c: old.index(c) for c in set(old)}
        target = {c: new.index(c) for c in where}
        with torch.no_grad():
            gathered = torch.zeros_like(reader.weight)
            for node, c in enumerate(old):
                gathered[:, where[c]] += reader.weight[:, node]
            reader.weight.copy_(gathered)
        yield copy.deepcopy(now)
        while where != target:
            moves = _moves(where, target, len(old))
            with torch.no_grad():
                for c, to in moves.items():
                    layer.weight[to], layer.bias[to] = layer.weight[where[c]], layer.bias[where[c]]
            yield copy.deepcopy(now)
            with torch.no_grad():
                for c, to in moves.items():
                    reader.weight[:, to] = reader.weight[:, where[c]]
                    reader.weight[:, where[c]] = 0
            where |= moves
            yield copy.deepcopy(now)
        with torch.no_grad():
            layer.weight.copy_(wanted[place].weight)
            layer.bias.copy_(wanted[place].bias)
        yield copy.deepcopy(now)
        with torch.no_grad():
            spread = wanted[place + 1].weight
            if place + 1 < len(before):  # rows as the other lift has them for the same color
                spread = spread[[after[place + 1].index(c) for c in before[place + 1]]]
            reader.weight.copy_(spread)
        yield copy.deepcopy(now)
    with torch.no_grad():
        layers[-1].bias.copy_(wanted[-1].bias)
    yield copy.deepcopy(now)


def _moves(where: dict[int, int], target: dict[int, int], count: int) -> dict[int, int]:
    """Copies that can go to free places now: home if possible."""
    taken = set(where.values())
    home = {c: to for c, to in target.items() if where[c] != to and to not in taken}
    if home:
        return home
    free = next(node for node in range(count) if node not in taken)
    return {next(c for c in where if where[c] != target[c]): free}
