"""Following channels from linear layers to a product of two values, and from there on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from fxfib.coloring import Labels
from fxfib.passes.relations import Ref
from fxfib.passes.rules import find_rule
from fxfib.passes.rules.activation import PASSES_FORMS
from fxfib.passes.rules.attention import FUSED, SIDES, sides
from fxfib.passes.rules.base import Barrier, is_tensor
from fxfib.passes.rules.linear import LinearMap
from fxfib.passes.rules.movement import Movement
from fxfib.passes.rules.splitting import GetItem, Parts
from fxfib.passes.rules.tracing import example_arguments

if TYPE_CHECKING:
    from fxfib.passes.forward import Analysis

aten = torch.ops.aten

_SCALINGS = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}


class Unfollowed(Exception):
    """Why the channels of an operand cannot be followed."""


@dataclass(frozen=True, eq=False)
class Operand:
    """A value that a linear layer makes and that is only moved and scaled since.

    Attributes:
        node: the value.
        root: the linear layer.
        path: the nodes from behind the root up to the value.
        numbers: for every element of the root and of the path's tensors, the output of the root
            that is in it; axes along which nothing changes have size 1.
        rows: int64 ``[*batch, d]``: the channels of one head at every batch position.
    """

    node: fx.Node
    root: fx.Node
    path: tuple[fx.Node, ...]
    numbers: dict[fx.Node, Labels]
    rows: Labels


@dataclass(frozen=True, eq=False)
class Contraction:
    """Channels that are summed over: ``q k^T``.

    Attributes:
        core: the op.
        left, right: what it multiplies.
        pairs: for every head of the right side its channels ``[d]``, and those of the heads
            ``[heads, d]`` of the left side that meet it.
    """

    core: fx.Node
    left: Operand
    right: Operand
    pairs: tuple[tuple[Labels, Labels], ...]

    @property
    def operands(self) -> tuple[Operand, ...]:
        return (self.left, self.right)

    @property
    def softmax(self) -> bool:
        """Whether all that reads the product is a softmax over the right side's positions."""
        return self.core.target in FUSED

    def refs(self) -> list[Ref]:
        """An axis for every head of the right side."""
        return [(self.core, f"contracted {k}") for k in range(len(self.pairs))]

    def depths(self) -> list[int]:
        """The sizes of these axes."""
        return [len(right) for right, _ in self.pairs]

    def heads(self) -> Iterator[tuple[Operand, Ref, Labels]]:
        """Every head: the operand it is in, its axis, its channels."""
        for ref, (right, lefts) in zip(self.refs(), self.pairs, strict=True):
            yield self.right, ref, right
            for row in lefts:
                yield self.left, ref, row


@dataclass(frozen=True, eq=False)
class Passage:
    """Channels that pass: the last axis of a value that is averaged over its positions.

    Attributes:
        core: the op.
        value: what passes.
        rows: int64 ``[heads, d]``.
        path: the nodes behind the core, up to the one whose channels lie on one axis again.
        axes: for the core and the path before that one, the axis of the channels of one head.
        flat_axis: where the last one holds all heads end to end, ...
        blocks: ... and which head each of them is.
    """

    core: fx.Node
    value: Operand
    rows: Labels
    path: tuple[fx.Node, ...]
    axes: dict[fx.Node, int]
    flat_axis: int
    blocks: Labels

    @property
    def operands(self) -> tuple[Operand, ...]:
        return (self.value,)

    @property
    def flat(self) -> fx.Node:
        """The last node of the path, or the core itself."""
        return self.path[-1] if self.path else self.core

    def refs(self) -> list[Ref]:
        """An axis for every head."""
        return [(self.core, f"passed {k}") for k in range(len(self.rows))]

    def depths(self) -> list[int]:
        """The sizes of these axes."""
        return [self.rows.shape[1]] * len(self.rows)

    def heads(self) -> Iterator[tuple[Operand, Ref, Labels]]:
        """Every head: the operand it is in, its axis, its channels."""
        for ref, row in zip(self.refs(), self.rows, strict=True):
            yield self.value, ref, row


Role = Contraction | Passage


def is_product(analysis: Analysis, node: fx.Node) -> bool:
    """Whether a node multiplies two values of the network (not a value and a parameter)."""
    if node.op != "call_function" or (node.target not in FUSED and node.target not in SIDES):
        return False
    return all(_changes(analysis, side) for side in sides(analysis, node)[:2])


def roles_of(analysis: Analysis, core: fx.Node) -> tuple[list[Role], list[str]]:
    """What channels do in a product, and why they cannot be followed where they cannot."""
    makers: list[Any]
    if core.target in FUSED:
        makers = [_contraction, _passage]
    else:
        try:
            makers = [_passage if _is_value(analysis, core) else _contraction]
        except Unfollowed as stop:
            return [], [str(stop)]
    roles: list[Role] = []
    reasons: list[str] = []
    for make in makers:
        try:
            roles.append(make(analysis, core))
        except Unfollowed as stop:
            reasons.append(str(stop))
    return roles, reasons


def _changes(analysis: Analysis, operand: Any) -> bool:
    return is_tensor(operand) and not analysis.is_constant(operand)


def _passes(analysis: Analysis, node: fx.Node) -> fx.Node | None:
    """The operand of an op that moves channels, or treats all of them alike and linearly."""
    if node.op != "call_function" or node in analysis.barriers or node in analysis.skip:
        return None
    source = node.args[0] if node.args else None
    if isinstance(find_rule(node), (Movement, Parts, GetItem)):
        return source if isinstance(source, fx.Node) else None
    if node.target in PASSES_FORMS and not analysis.arguments(node).get("train", False):
        return source if isinstance(source, fx.Node) else None
    if node.target in _SCALINGS:
        first, second = node.args[:2]
        if node.target is aten.mul.Tensor and not _changes(analysis, first):
            first, second = second, first
        if _changes(analysis, first) and _is_number(analysis, second):
            return first  # type: ignore[return-value]
    return None


def _is_number(analysis: Analysis, operand: Any) -> bool:
    if not isinstance(operand, fx.Node):
        return isinstance(operand, (int, float))
    constant = is_tensor(operand) and analysis.is_constant(operand)
    return constant and analysis.shape(operand) == ()


def _trace(
    analysis: Analysis, node: fx.Node
) -> tuple[fx.Node, tuple[fx.Node, ...], dict[fx.Node, Labels]]:
    """The linear layer behind a value, the nodes between, and what is in every element."""
    path: list[fx.Node] = []
    root = node
    while not isinstance(rule := find_rule(root), LinearMap):
        path.append(root)
        source = _passes(analysis, root)
        if source is None or not _known(analysis, source):
            raise Unfollowed(f"{root.name} is not a linear layer's output, moved or scaled")
        root = source
    path.reverse()
    try:
        _, weight, bias, _ = rule.operands(analysis, root)
    except Barrier as stop:
        raise Unfollowed(f"{root.name}: {stop.reason}") from stop
    if root in analysis.barriers or root in analysis.skip or not analysis.is_constant(weight):
        raise Unfollowed(f"{root.name} has no weight that is a parameter")
    if bias is not None and not analysis.is_constant(bias):
        raise Unfollowed(f"the bias of {root.name} is computed")
    shape = analysis.shape(root)
    current: Any = torch.arange(shape[-1], dtype=torch.int32).expand(shape)
    numbers = {root: squeezed(current.numpy())}
    for step in path:
        current = moved_numbers(step, current)
        if isinstance(current, torch.Tensor):
            numbers[step] = squeezed(current.numpy())
    return root, tuple(path), numbers


def _known(analysis: Analysis, node: fx.Node) -> bool:
    return node.op == "call_function" and not analysis.is_constant(node)


def moved_numbers(node: fx.Node, numbers: Any) -> Any:
    """Run an op on numbered elements."""
    rule = find_rule(node)
    if isinstance(rule, GetItem):
        return numbers[node.args[1]]
    if not isinstance(rule, (Movement, Parts)):
        return numbers
    try:
        args, kwargs = example_arguments(node)
    except Barrier as stop:
        raise Unfollowed(f"{node.name}: {stop.reason}") from stop
    return node.target(numbers, *args, **kwargs)  # type: ignore[operator]


def squeezed(array: Labels) -> Labels:
    """The array with size 1 on every axis along which nothing changes."""
    for axis in range(array.ndim):
        first = array.take([0], axis=axis)
        if array.shape[axis] > 1 and np.array_equal(np.broadcast_to(first, array.shape), array):
            array = first
    return array.astype(np.int64)


def _operand(analysis: Analysis, node: fx.Node, axis: int) -> Operand:
    """A value whose channels lie on the last axis or on the one before it, at all positions."""
    if len(analysis.shape(node)) < 2:
        raise Unfollowed(f"{node.name} is a vector")
    root, path, numbers = _trace(analysis, node)
    found = np.moveaxis(numbers[node], axis, -1)
    if found.shape[-2] != 1 or found.shape[-1] != analysis.shape(node)[axis]:
        raise Unfollowed(f"the outputs of {root.name} are not on one axis of {node.name}")
    return Operand(node, root, path, numbers, found[..., 0, :])


def _is_value(analysis: Analysis, core: fx.Node) -> bool:
    """Whether the right side of a plain product has its channels on its last axis."""
    right = sides(analysis, core)[1]
    if len(analysis.shape(right)) < 2:
        raise Unfollowed(f"{right.name} is a vector")
    numbers = _trace(analysis, right)[2][right]
    return numbers.shape[-2] == 1


def _repeated(analysis: Analysis, core: fx.Node, rows: Labels, heads: int) -> Labels:
    """Rows of keys or values, once for every head of queries."""
    if core.target in FUSED and analysis.arguments(core).get("enable_gqa") and rows.ndim > 1:
        return np.repeat(rows, heads // rows.shape[-2], axis=-2)
    return rows


def _contraction(analysis: Analysis, core: fx.Node) -> Contraction:
    left_node, right_node, _ = sides(analysis, core)
    left = _operand(analysis, left_node, -1)
    right = _operand(analysis, right_node, -1 if core.target in FUSED else -2)
    heads = analysis.shape(left_node)[-3] if len(analysis.shape(left_node)) > 2 else 1
    rights = _repeated(analysis, core, right.rows, heads)
    depth = left.rows.shape[-1]
    shape = np.broadcast_shapes(left.rows.shape, rights.shape)
    both = [np.broadcast_to(rows, shape).reshape(-1, depth) for rows in (rights, left.rows)]
    met = np.unique(np.concatenate(both, 1), axis=0)
    keys = np.unique(met[:, :depth], axis=0)
    pairs = tuple((key, met[(met[:, :depth] == key).all(1)][:, depth:]) for key in keys)
    if len(np.unique(met[:, depth:], axis=0)) != len(met):
        raise Unfollowed("a head of queries meets several heads of keys")
    return Contraction(core, left, right, pairs)


def _passage(analysis: Analysis, core: fx.Node) -> Passage:
    value = _operand(analysis, sides(analysis, core)[2], -1)
    shape = analysis.shape(core)
    batch, depth = shape[:-2], shape[-1]
    rows = np.unique(value.rows.reshape(-1, depth), axis=0)
    heads = batch[-1] if batch else 1
    own = np.broadcast_to(_repeated(analysis, core, value.rows, heads), (*batch, depth))
    first = {int(row[0]): k for k, row in enumerate(rows)}
    head_of = np.array([first[int(channel)] for channel in own.reshape(-1, depth)[:, 0]])
    # Elements of the output by batch position and channel.  The head of an element follows.
    count = len(head_of) * depth
    numbers: Any = torch.arange(count, dtype=torch.int32).reshape(*batch, 1, depth).expand(shape)
    node = core
    path: list[fx.Node] = []
    axes: dict[fx.Node, int] = {}
    while True:
        array = numbers.numpy()
        within, head = array % depth, head_of[array // depth]
        flat = _end_to_end(within, head, depth)
        if flat is not None:
            return Passage(core, value, rows, tuple(path), axes, *flat)
        carrying = [a for a in range(array.ndim) if np.any(within != within.take([0], axis=a))]
        if len(carrying) != 1 or within.shape[carrying[0]] != depth:
            raise Unfollowed(f"the heads are not joined by a view behind {core.name}")
        axes[node] = carrying[0]
        users = list(node.users)
        if len(users) != 1 or _passes(analysis, users[0]) is not node or not is_tensor(users[0]):
            raise Unfollowed(f"the heads are not joined by a view behind {core.name}")
        node = users[0]
        path.append(node)
        numbers = moved_numbers(node, numbers)


def _end_to_end(within: Labels, head: Labels, depth: int) -> tuple[int, Labels] | None:
    """The one axis on which all heads lie, and which head each block of it is."""
    code = within + depth * head.astype(np.int64)
    for axis in range(code.ndim):
        line = np.moveaxis(code, axis, -1).reshape(-1, code.shape[axis])
        if np.any(line != line[:1]) or line.shape[1] % depth:
            continue
        place, block = line[0] % depth, line[0] // depth
        if np.array_equal(place, np.arange(line.shape[1]) % depth):
            return axis, block[::depth]
    return None
