"""Stages: the values are those of a whole run, and what memory has room for is computed once."""

from collections import Counter

import pytest
import torch
from torch import fx, nn

from fxfib.passes.stages import Room, Stages


class Branches(nn.Module):
    """Two branches that meet; one value is read again at the end."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.a(x).relu()
        second = self.b(first).tanh()
        left, right = (first + second).split([3, 4], 1)
        return self.c(torch.cat([right, left], 1)) + left


@pytest.mark.parametrize("room", [0, 240, 2**20])
def test_values_are_those_of_a_whole_run(room: int) -> None:
    """Whatever there is room for; a weight that changed is read by all that come later."""
    model = Branches()
    graph = fx.symbolic_trace(model)
    named = {node.name: node for node in graph.graph.nodes}
    wanted = [{named["relu"]}, {named["a"], named["tanh"]}, {named["getitem"], named["cat"]}]
    memory = Room(room)
    stages = Stages(graph, wanted, memory)
    computed: Counter[tuple[int, fx.Node]] = Counter()
    number = 0
    plain = stages.interpreter.run_node

    def counted(node: fx.Node) -> object:
        computed[number, node] += 1
        return plain(node)

    stages.interpreter.run_node = counted
    batches = [torch.randn(n, 5) for n in (4, 4, 2)]
    with torch.no_grad():
        for stage, nodes in enumerate(wanted):
            for number, batch in enumerate(batches):
                found = dict(stages.run(stage, number, [batch]))
                assert set(found) == nodes
                for node, value in found.items():
                    torch.testing.assert_close(value, whole(graph, node, batch))
            # What was wanted so far does not depend on the layer that changes now.
            for parameter in [model.b, model.c][min(stage, 1)].parameters():
                parameter.mul_(2.0)
        assert memory.left == room
    repeated = sorted({key[0] for key, times in computed.items() if times > 1})
    assert repeated == {0: [0, 1, 2], 240: [1, 2], 2**20: []}[room]


def whole(graph: fx.GraphModule, node: fx.Node, batch: torch.Tensor) -> torch.Tensor:
    found = {}

    class Watched(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            found[n] = super().run_node(n)
            return found[n]

    Watched(graph).run(batch)
    return found[node]
