"""fxfib inside `torch.compile`, inside a pipeline of one's own, and on `torch.export` programs.

python examples/torch_compile.py
"""

import logging

import torch
from torch import nn

import fxfib
import fxfib.passes

INNER = "eager"  # "inductor" in earnest: it is the default


def main() -> None:
    """Three ways in."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fxfib").setLevel(logging.INFO)  # one line for every graph
    torch.manual_seed(0)
    inputs = torch.randn(4, 9)
    trained = nn.Sequential(nn.Linear(9, 14), nn.ReLU(), nn.Linear(14, 5)).eval()
    model = fxfib.lift(trained, 1.5, (inputs,))

    # 1. By name, as any backend.
    run = torch.compile(model, backend="fxfib", options={"eps": 0.0, "inner": INNER})
    with torch.no_grad():  # graphs that need gradients are left as they are
        torch.testing.assert_close(run(inputs), model(inputs))

    # 2. With a record of every graph; a weight that changes is noticed.
    backend = fxfib.backend(inner=INNER)
    run = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for batch in (2, 7):
            given = torch.randn(batch, 9)
            torch.testing.assert_close(run(given), model(given))
        first = next(model.parameters())
        first.mul_(0.5)
        torch.testing.assert_close(run(inputs), model(inputs))
    print(*backend.graphs, sep="\n")

    # 3. As one pass among others, in a backend of one's own.
    def own(graph_module: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> object:
        bound = fxfib.passes.bind(graph_module, example_inputs)
        small = fxfib.passes.merge_fibers(bound.graph_module, bound.inputs, eps=0.0)
        # The next pass goes here.
        return lambda *arguments: small(*bound.rest(arguments))

    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=own)(inputs), model(inputs))

    # An exported program goes in as a module, and comes out as one.
    program = torch.export.export(model, (inputs,))
    small = fxfib.compile(program.module(), 0.0, (inputs,))
    again = torch.export.export(small, (inputs,))
    with torch.no_grad():
        torch.testing.assert_close(again.module()(inputs), model(inputs))
    print(f"{sum(p.numel() for p in small.parameters())} parameters in the exported program")


if __name__ == "__main__":
    main()
