"""A graph run in stages over the same batches, each going on where the one before stopped."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.utils._pytree as pytree
from torch import fx

# Bytes of values that are kept between stages, at most; what does not fit is computed again.
KEPT = 2**30
# What is not computed.
GIVEN = ("get_attr", "placeholder")


class Step(Protocol):
    """Is told what is done now, and, where that is known, which share of it is done."""

    def __call__(self, name: str, share: float | None = None) -> None: ...


def silent(name: str, share: float | None = None) -> None:
    """A step that nobody wants to hear of."""


class Room:
    """Memory that several graphs share for what they keep.

    Args:
        size: in bytes.
    """

    def __init__(self, size: int = KEPT) -> None:
        self.left = size

    def take(self, size: int) -> bool:
        """Whether there is so much; then it is taken."""
        if size > self.left:
            return False
        self.left -= size
        return True

    def give(self, size: int) -> None:
        """Give memory back."""
        self.left += size


class Stages:
    """Values of some nodes in every stage, for every batch.

    Parameters may change from stage to stage, but none that a value of this stage depends on may
    change later: what a stage computed holds for those behind it.  Parameters are read when they
    are needed and never kept.

    Args:
        graph_module: functional.
        wanted: for every stage, the nodes whose values it gives.
        room: where values are kept from stage to stage.

    Attributes:
        fresh: for every stage, the nodes that none before has computed.
    """

    def __init__(
        self, graph_module: fx.GraphModule, wanted: Sequence[Collection[fx.Node]], room: Room
    ) -> None:
        self.wanted = [set(nodes) for nodes in wanted]
        self.room = room
        self.order = {node: place for place, node in enumerate(graph_module.graph.nodes)}
        self.places = {
            node: place
            for place, node in enumerate(graph_module.graph.find_nodes(op="placeholder"))
        }
        self.interpreter = fx.Interpreter(graph_module)
        self.fresh: list[set[fx.Node]] = []
        done: set[fx.Node] = set()
        for nodes in self.wanted:
            self.fresh.append(_behind(nodes, done))
            done |= self.fresh[-1]
        # What is computed in a stage or before, and read or wanted by those that come later.
        self.kept: list[set[fx.Node]] = []
        known: set[fx.Node] = set()
        for stage, fresh in enumerate(self.fresh):
            known |= fresh
            read = {source for node in done - known for source in node.all_input_nodes}
            later = read.union(*self.wanted[stage + 1 :])
            self.kept.append({node for node in later & known if node.op not in GIVEN})
        self.memory: dict[int, tuple[int, dict[fx.Node, Any], int]] = {}

    def run(self, stage: int, number: int, inputs: Sequence[Any]) -> Iterator[tuple[fx.Node, Any]]:
        """Values of the wanted nodes of a stage, each as soon as it is there.

        Args:
            stage: from 0; a batch is given in the order of the stages, each at most once.
            number: of the batch.
            inputs: the batch, flat.
        """
        last, known, size = self.memory.pop(number, (-1, {}, 0))
        env = known if last == stage - 1 else {}
        wanted, kept = self.wanted[stage], self.kept[stage]
        yield from ((node, env[node]) for node in wanted if node in env)
        nodes = sorted(_behind(wanted | kept, env), key=self.order.__getitem__)
        over: dict[fx.Node, list[fx.Node]] = {}
        for source, node in _last_readers(nodes).items():
            if source not in kept:
                over.setdefault(node, []).append(source)
        self.interpreter.env = env
        for node in nodes:
            place = self.places.get(node)
            env[node] = self.interpreter.run_node(node) if place is None else inputs[place]
            if node in wanted:
                yield node, env[node]
            for source in over.get(node, ()):
                del env[source]
        self.interpreter.env = {}
        self.room.give(size)
        later = {node: env[node] for node in kept}
        size = _bytes(later.values())
        if later and self.room.take(size):
            self.memory[number] = stage, later, size


def _last_readers(nodes: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
    """For every value that is read, and every one that nobody reads, where it is over."""
    last = {}
    for node in nodes:
        last[node] = node
        last.update(dict.fromkeys(node.all_input_nodes, node))
    return last


def _behind(goal: Iterable[fx.Node], known: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes of a goal and all that they are computed from, up to those that are known."""
    found: set[fx.Node] = set()
    pending = [node for node in goal if node not in known]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [source for source in node.all_input_nodes if source not in known]
    return found


def _bytes(values: Iterable[Any]) -> int:
    """Memory that tensors hold, each storage once."""
    storages = {}
    for leaf in pytree.tree_leaves(list(values)):
        if isinstance(leaf, torch.Tensor):
            storage = leaf.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
