"""From colors to a smaller graph: analysis, relations, layouts, rewriting, verification.

For people who own a pipeline: `merge_fibers` is the pass, ``(graph module, example inputs) ->
graph module``, and `bind` makes attributes of the parameters that Dynamo gives as inputs.

    def my_backend(graph_module, example_inputs):
        bound = fxfib.passes.bind(graph_module, example_inputs)
        small = fxfib.passes.merge_fibers(bound.graph_module, bound.inputs, eps=0.0)
        run = the_next_pass(small, bound.inputs)
        return lambda *arguments: run(*bound.rest(arguments))

Such a backend holds copies of the weights: unlike `fxfib.backend`, it does not notice when they
change.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxfib.binding import Bound, bind
    from fxfib.graph_pass import merge_fibers

# Loaded at first use: they need the modules of this package themselves.
_HOME = {"Bound": "fxfib.binding", "bind": "fxfib.binding", "merge_fibers": "fxfib.graph_pass"}

__all__ = ["Bound", "bind", "merge_fibers"]


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it."""
    if name not in _HOME:
        raise AttributeError(f"module 'fxfib.passes' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value
