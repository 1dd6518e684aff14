"""How alive the layers of a training network are: dead units, effective rank, weight norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxfib.passes.backward import Colored, Continued
from fxfib.passes.cover import layers
from fxfib.passes.relations import Ref
from fxfib.passes.rules import find_rule
from fxfib.passes.rules.activation import Homogeneous, Unary
from fxfib.passes.rules.base import is_tensor
from fxfib.passes.rules.batch_norm import BatchNorm
from fxfib.passes.rules.parametric import PReLU

#: What a layer's nodes go through one by one before anybody reads them.
_NODE_BY_NODE = (Homogeneous, Unary, BatchNorm, PReLU)
#: Rows (examples and positions) that an effective rank is taken of.
MOST_ROWS = 256


@dataclass(frozen=True)
class VitalSigns:
    """Figures of one layer on the example inputs.

    Attributes:
        dead: nodes whose activation is one and the same number for all examples and positions, as
            behind a ReLU that never opens.
        effective_rank: exponential of the entropy of the normalised singular values of the
            activations ``[examples and positions, nodes]``, of at most 256 rows.
        weight_norm: Euclidean norm of all parameters of the layer.

    Activations are taken behind the activation function.  None where the layer keeps them to
    itself (recurrent layers).
    """

    dead: int | None
    effective_rank: float | None
    weight_norm: float


class Probe:
    """Takes the vital signs of every layer by one pass through the captured graph.

    Args:
        continued: the graph; only its forward part runs.
        analysis: any coloring of it, which knows where the layers are.
        inputs: flat example inputs.
    """

    def __init__(self, continued: Continued, analysis: Colored, inputs: Sequence[Any]) -> None:
        self.continued, self.inputs = continued, inputs
        forward = set(continued.values)
        self.sources: dict[str, list[str]] = {}
        self.behind: dict[fx.Node, list[tuple[str, int]]] = {}
        for calls in layers(analysis, continued.values):
            for name, ref in calls:
                self.sources[name] = [
                    str(s.target) for s in ref[0].all_input_nodes if s.op == "get_attr"
                ]
                node, axis = _behind(ref, forward)
                if isinstance(axis, int) and is_tensor(node):
                    self.behind.setdefault(node, []).append((name, axis))

    def take(self, weights: Mapping[str, Tensor]) -> dict[str, VitalSigns]:
        """The signs of every layer.

        Args:
            weights: present parameters and buffers by name.
        """
        seen: dict[str, tuple[int, float]] = {}

        def see(name: str, table: Tensor) -> None:
            seen[name] = dead_of(table), effective_rank(table)

        self.run(weights, self.inputs, see)
        found = {}
        for name, sources in self.sources.items():
            dead, rank = seen.get(name, (None, None))
            found[name] = VitalSigns(dead, rank, _norm(sources, weights))
        return found

    def run(
        self,
        weights: Mapping[str, Tensor],
        inputs: Sequence[Any],
        see: Callable[[str, Tensor], None],
    ) -> None:
        """One pass through the forward part.

        Args:
            weights: present parameters and buffers by name.
            inputs: flat inputs of the model.
            see: called with every layer and its activations ``[rows, nodes]``, where rows are
                examples and positions, examples first.
        """
        probe = self

        class Forward(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                if n in probe.continued.added:
                    return None
                value = super().run_node(n)
                for name, axis in probe.behind.get(n, ()):
                    see(name, value.movedim(axis, -1)[None].flatten(0, -2))
                return value

            def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
                own = weights.get(str(target))
                return super().get_attr(target, args, kwargs) if own is None else own

        Forward(self.continued.graph_module).run(*inputs)


def _behind(ref: Ref, forward: set[fx.Node]) -> Ref:
    """Where a layer's nodes are read: behind what they go through one by one."""
    node, axis = ref
    while isinstance(axis, int):
        users = [user for user in node.users if user in forward]
        if len(users) != 1 or not isinstance(find_rule(users[0]), _NODE_BY_NODE):
            break
        same = is_tensor(users[0]) and users[0].meta["val"].shape == node.meta["val"].shape
        if not same or users[0].args[0] is not node:
            break
        node = users[0]
    return node, axis


def _norm(names: Sequence[str], weights: Mapping[str, Tensor]) -> float:
    own = [weights[name] for name in names if name in weights]
    floating = [tensor for tensor in own if tensor.is_floating_point()]
    return sum(float(tensor.float().square().sum()) for tensor in floating) ** 0.5


def dead_of(table: Tensor) -> int:
    """Columns of ``[rows, nodes]`` that hold one number; of a single row nobody knows: none."""
    return int((table == table[:1]).all(0).sum()) if len(table) > 1 else 0


def effective_rank(table: Tensor) -> float:
    r"""``exp(-sum p log p)`` of the singular values ``p`` over their sum; 0 where all are zero."""
    if len(table) > MOST_ROWS:
        places = torch.linspace(0, len(table) - 1, MOST_ROWS, device=table.device)
        table = table[places.round().long()]
    rows = table.cpu().double()
    if not bool(torch.isfinite(rows).all()):
        return float("nan")
    gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt() if gram.numel() else gram
    total = float(singular.sum())
    if total == 0:
        return 0.0
    share = singular[singular > 0] / total
    return float(torch.exp(-(share * share.log()).sum()))
