"""Shapes of a rewritten graph: it runs on fake tensors, and what does not fit is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from fxfib.recurrent_shapes import shapes_of_recurrent_layers


class UnfitError(Exception):
    """A rewritten op does not fit its operands; ``node`` is the original one."""

    def __init__(self, node: fx.Node, message: str) -> None:
        super().__init__(message)
        self.node = node


def propagate(
    result: fx.GraphModule, original: fx.GraphModule, origin: Mapping[str, fx.Node]
) -> None:
    """Run the new graph on fake tensors and record every value's shape.

    Args:
        origin: for a new node's name, the original node whose rule emitted it.

    Raises:
        UnfitError: a shape does not fit.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._guards import detect_fake_mode

    placeholders = [
        n.meta["val"] for n in original.graph.nodes if n.op == "placeholder" and "val" in n.meta
    ]
    mode = detect_fake_mode([v for v in placeholders if isinstance(v, FakeTensor)])
    if mode is None:
        raise AssertionError("a captured graph carries fake tensors")
    fakes: dict[int, Any] = {}
    fake_mode = mode

    class Propagate(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            try:
                value = super().run_node(n)
            except Exception as error:
                if n.name not in origin:
                    raise
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise UnfitError(origin[n.name], lines[0]) from error
            n.meta["val"] = value
            return value

        def fetch_attr(self, target: str) -> Any:
            tensor = super().fetch_attr(target)
            if isinstance(tensor, torch.Tensor):
                if id(tensor) not in fakes:
                    fakes[id(tensor)] = fake_mode.from_tensor(tensor, static_shapes=True)
                return fakes[id(tensor)]
            return tensor

    # Without the Python dispatcher composite ops written in C++ would fix the dynamic sizes.
    with mode, torch.no_grad(), shapes_of_recurrent_layers(), enable_python_dispatcher():
        Propagate(result).run(*placeholders)
