"""Whether a captured graph computes what its model computes."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from fxfib.errors import CaptureError
from fxfib.exporting import clone_inputs, run_on_examples
from fxfib.free_sizes import resized
from fxfib.graph_tools import fixed_size, value_of


def difference_at(
    size: int, model: nn.Module, graph_module: fx.GraphModule, args: Any, kwargs: Any
) -> str | None:
    """As `difference`, for a batch of another size; None where the model itself cannot do that."""
    nodes = graph_module.graph.find_nodes(op="placeholder")
    leaves, spec = pytree.tree_flatten((args, kwargs))
    free = [
        isinstance(leaf, Tensor) and leaf.ndim > 0 and fixed_size(value_of(node).shape[0]) is None
        for leaf, node in zip(leaves, nodes, strict=True)
    ]
    sizes = {leaf.shape[0] for leaf, is_free in zip(leaves, free, strict=True) if is_free}
    if len(sizes) != 1 or sizes == {size}:
        return None
    rows = torch.arange(size) % sizes.pop()
    leaves = [
        leaf[rows.to(leaf.device)] if is_free else leaf
        for leaf, is_free in zip(leaves, free, strict=True)
    ]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    try:
        return difference(model, graph_module, args, kwargs)
    except CaptureError:
        return None


def difference_of_sizes(
    sizes: Mapping[tuple[int, int], int],
    model: nn.Module,
    graph_module: fx.GraphModule,
    args: Any,
    kwargs: Any,
) -> str | None:
    """As `difference`, with other sizes `{(leaf, axis): size}`; None where the model has none."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    args, kwargs = pytree.tree_unflatten(resized(leaves, sizes), spec)
    try:
        return difference(model, graph_module, args, kwargs)
    except CaptureError:
        return None


def difference(
    model: nn.Module, graph_module: fx.GraphModule, args: Any, kwargs: Any
) -> str | None:
    """In what way the graph's outputs differ from the model's; None if they do not.

    Raises:
        CaptureError: the model does not run.
    """
    expected = pytree.tree_leaves(run_on_examples(model, args, kwargs))
    leaves = clone_inputs(pytree.tree_leaves((args, kwargs)))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = graph_module(*leaves)
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if not isinstance(theirs, Tensor):
            if ours != theirs:
                return f"output {index} is {ours}, not {theirs}"
            continue
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            form, wanted = (f"{t.dtype}{list(t.shape)}" for t in (ours, theirs))
            return f"output {index} is {form}, not {wanted}"
        if not _close(ours, theirs):
            off = (ours.double() - theirs.double()).abs().max().item()
            return f"output {index} is off by {off:.2g}"
    return None


def _close(ours: Tensor, theirs: Tensor) -> bool:
    if torch.equal(ours, theirs):
        return True
    if not theirs.is_floating_point():
        return False
    # The same operations run in the same order; only kernels that depend on memory layout may
    # sum in another one.
    finite = theirs.double().nan_to_num(0.0, 0.0, 0.0)
    roundoff = torch.finfo(theirs.dtype).eps
    # Behind norms and softmax a few roundings of small numbers are many of the output's.
    roundings = 256 if roundoff < 1e-5 else 64
    bound = roundings * roundoff * float(finite.abs().max()) if theirs.numel() else 0.0
    return torch.allclose(ours.double(), theirs.double(), rtol=0.0, atol=bound, equal_nan=True)
