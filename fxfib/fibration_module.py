"""A compiled model: a graph module of ordinary modules that copies, pickles and moves."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxfib.calling import Calling, code_generator
from fxfib.graph_json import decode_graph, encode_graph

# What `fx.GraphModule` keeps of its own, made anew when a copy is made.
_OWN_STATE = frozenset(
    {
        "_graph",
        "_code",
        "_lineno_map",
        "_prologue_start",
        "_tracer_cls",
        "_tracer_extras",
        "_calling",
        "_class_name",
    }
)


class FibrationModule(fx.GraphModule):
    """A compiled model: a graph of ordinary modules, called like the user's own.

    It trains, evaluates, copies, pickles, compiles and exports like any `nn.Module`; moved to
    another device, the constants in its graph move along.  `fibration` is the report of the
    compilation, or None.

    `torch.export` calls every graph module by position: give it keyword arguments in the order of
    `forward`.
    """

    fibration: Any
    _calling: Calling

    def __init__(
        self, root: nn.Module, graph: fx.Graph, calling: Calling, class_name: str = "Model"
    ) -> None:
        # The tree is taken over as it is: `fx.GraphModule` copies attribute by attribute, which
        # loses their order and which buffers are persistent.
        super().__init__(nn.Module(), fx.Graph(), class_name)
        self._calling = calling
        self._class_name = class_name
        self.fibration = None
        self.training = root.training
        for own, theirs in (
            (self._parameters, root._parameters),
            (self._buffers, root._buffers),
            (self._modules, root._modules),
        ):
            own.update(theirs)  # type: ignore[arg-type]
        self._non_persistent_buffers_set.update(root._non_persistent_buffers_set)
        graph.set_codegen(code_generator(calling))
        self.graph = graph

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FibrationModule":
        before = _device_of(self)
        super()._apply(fn, recurse)
        after = _device_of(self)
        if before != after:
            _move_constants(self.graph, before, after)
            self.recompile()
        return self

    def _state(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in _OWN_STATE}

    def __reduce__(self) -> tuple[Any, ...]:
        # By its graph: the base class would run the code again to get one, which not all code
        # survives.
        arguments = (encode_graph(self.graph), self._calling.to_json(), self._class_name)
        return _rebuild, arguments, self._state()

    def __deepcopy__(self, memo: dict[int, Any]) -> "FibrationModule":
        result = FibrationModule(nn.Module(), _copy_graph(self), self._calling, self._class_name)
        memo[id(self)] = result
        vars(result).update(copy.deepcopy(self._state(), memo))
        return result

    def __copy__(self) -> "FibrationModule":
        result = FibrationModule(nn.Module(), _copy_graph(self), self._calling, self._class_name)
        vars(result).update(self._state())
        return result


def _rebuild(graph: dict[str, Any], calling: dict[str, Any], class_name: str) -> FibrationModule:
    convention = Calling.from_json(calling)
    return FibrationModule(nn.Module(), decode_graph(graph), convention, class_name)


def _copy_graph(module: FibrationModule) -> fx.Graph:
    graph = fx.Graph()
    output = graph.graph_copy(module.graph, {})
    graph.output(output)
    return graph


def _device_of(module: nn.Module) -> torch.device | None:
    for tensors in (module.parameters(), module.buffers()):
        for tensor in tensors:
            return tensor.device
    return None


def _move_constants(
    graph: fx.Graph, before: torch.device | None, after: torch.device | None
) -> None:
    def moved(value: Any) -> Any:
        return after if isinstance(value, torch.device) and value == before else value

    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, moved)
        node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
