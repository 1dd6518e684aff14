"""Inputs on which the original and the small network are compared while layers are fitted."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from fxfib.capture import Captured, normalize_inputs
from fxfib.errors import InputError
from fxfib.macs import macs_of
from fxfib.passes.rules.base import hint
from fxfib.passes.stages import Step, silent
from fxfib.synthesis import examples_for, matched, norms_that_know, together_for

MOST_EXAMPLES = 4096
BATCH = 256
# Numbers of any value in the graph that are in memory at a time, if it has several examples.
NUMBERS_AT_ONCE = 2**24
# Numbers of synthetic input in all: many small examples, or few large ones; and of such examples
# as many as make for so many multiply-accumulates (under a minute on one core).
MOST_NUMBERS = 2**23
FEWEST_EXAMPLES = 64
WORK = 1e12

Batch = tuple[Any, ...]


def batches_of(calibration: Any, captured: Captured) -> list[Batch]:
    """Flat inputs of the captured graph, batch by batch.

    Args:
        calibration: as in :func:`fxfib.compile`, not None.

    Raises:
        InputError: there is no input in it, or one does not fit the model.
    """
    if isinstance(calibration, (torch.Tensor, Mapping)):
        calibration = [calibration]
    if not isinstance(calibration, Iterable):
        raise InputError(
            "calibration must be a tensor or an iterable of batches, "
            f"not {type(calibration).__name__}."
        )
    found: list[Batch] = []
    count, together = 0, at_once(captured)
    for item in calibration:
        leaves = checked_batch(item, captured)
        batched = _batched(captured)
        total = max((len(leaves[i]) for i in batched), default=1)
        for start in range(0, total, together):
            stop = min(start + together, total, start + MOST_EXAMPLES - count)
            if stop > start:
                part = [leaf[start:stop] if i in batched else leaf for i, leaf in enumerate(leaves)]
                found.append(tuple(part))
                count += stop - start
        if count >= MOST_EXAMPLES:
            break
    if not found:
        raise InputError("calibration holds no inputs.")
    return found


def at_once(captured: Captured) -> int:
    """How many examples are run through the graph at a time, by its largest value."""
    size = _batch_size(captured)
    nodes = (node for node in captured.graph_module.graph.nodes if node.op != "get_attr")
    values = (node.meta.get("val") for node in nodes)
    tensors = (value for value in values if isinstance(value, torch.Tensor))
    largest = max((math.prod(map(hint, t.shape)) for t in tensors), default=1)
    return max(1, min(BATCH, NUMBERS_AT_ONCE * size // max(largest, 1)))


def drawn(
    captured: Captured,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None,
    *,
    seed: int = 0,
) -> list[Batch]:
    """Noise in place of a calibration; another seed gives another.

    Args:
        example_inputs, example_kwargs: those that the model was captured on.
    """
    examples = normalize_inputs(captured.source, example_inputs, example_kwargs)
    leaves = pytree.tree_leaves(examples)
    return list(synthetic(captured, leaves, seed, together=at_once(captured)))


def remembered(
    captured: Captured,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None,
    step: Step = silent,
) -> list[Batch]:
    """Noise that was given the statistics that the batch norms know; see :func:`norms_known`."""
    examples = normalize_inputs(captured.source, example_inputs, example_kwargs)
    leaves = pytree.tree_leaves(examples)
    places = _batched(captured)
    size = _batch_size(captured)
    count = examples_for(captured.graph_module, size)
    together = together_for(captured.graph_module, size)
    noise = list(synthetic(captured, leaves, count=count, together=together))
    return matched(captured.graph_module, noise, places, step)


def norms_known(captured: Captured) -> bool:
    """Whether batch norms know what floating inputs are like, that come in batches.

    Not where a network is so large that making such inputs would take minutes.
    """
    nodes = _placeholders(captured)
    values = [nodes[place].meta["val"] for place in _batched(captured)]
    return (
        any(v.is_floating_point() for v in values)
        and bool(norms_that_know(captured.graph_module))
        and examples_for(captured.graph_module, _batch_size(captured)) > 0
    )


def inputs_known(captured: Captured) -> bool:
    """Whether linear layers alone read the floating inputs: their rows say what inputs are like."""
    floating = [
        place
        for place, node in enumerate(_placeholders(captured))
        if isinstance(value := node.meta.get("val"), torch.Tensor) and value.is_floating_point()
    ]
    return bool(floating) and all(_first_rows(captured, place) is not None for place in floating)


def checked_batch(item: Any, captured: Captured) -> list[Any]:
    """One batch as the flat inputs of the graph; what follows the arguments is left out.

    So are entries of a dict that are no arguments that were captured.  Tensors have no history and
    can be trained on.

    Raises:
        InputError: it does not fit the model.
    """
    leaves = _leaves(item, captured)
    _check(leaves, captured)
    return [_free(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def _free(tensor: torch.Tensor) -> torch.Tensor:
    """The same without history; gradients cannot be computed from what inference mode made."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _leaves(item: Any, captured: Captured) -> list[Any]:
    arguments, keywords = captured.in_spec.unflatten([None] * captured.in_spec.num_leaves)
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = {}
    if _several(item):
        args = tuple(item)
        first: Any = args[0] if args else None
        wanted = arguments[0] if arguments else None
        if isinstance(first, Mapping) and not isinstance(wanted, Mapping):
            args, kwargs = (), first
        elif _several(first) and not _several(wanted):
            args = tuple(first)
    elif isinstance(item, Mapping):
        args, kwargs = (), item
    elif isinstance(item, torch.Tensor) or dataclasses.is_dataclass(item):
        args, kwargs = normalize_inputs(captured.source, item)
    else:
        raise InputError(
            f"a batch of calibration or data is a {type(item).__name__}; give a tensor, a tuple of "
            "arguments or a dict of them."
        )
    if kwargs:
        args, kwargs = _by_name(kwargs, captured, len(arguments), keywords)
    args = args[: len(arguments)] if arguments else args
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    if spec != captured.in_spec:
        raise InputError(
            f"a batch of calibration or data does not fit the model's arguments: {len(args)} "
            f"positional and {sorted(kwargs)} by keyword, where {len(arguments)} and "
            f"{sorted(keywords)} were captured."
        )
    return leaves


def _several(item: Any) -> bool:
    """Whether it holds arguments one by one: a tuple or a list, but no named tuple."""
    return isinstance(item, (tuple, list)) and not hasattr(item, "_fields")


def _by_name(
    named: Mapping[str, Any], captured: Captured, positional: int, keywords: Mapping[str, Any]
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Entries of a dict as the arguments that were captured: by position first, then by keyword."""
    parameters = list(inspect.signature(captured.source.forward).parameters.values())
    args = tuple(named.get(p.name, p.default) for p in parameters[:positional])
    if inspect.Parameter.empty not in args and all(name in named for name in keywords):
        return args, {name: named[name] for name in keywords}
    # One argument that is a dict itself, or what does not fit.
    return ((named,), {}) if positional == 1 and not keywords else ((), named)


def _check(leaves: Sequence[Any], captured: Captured) -> None:
    for leaf, node in zip(leaves, _placeholders(captured), strict=True):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        if not isinstance(leaf, torch.Tensor):
            raise InputError(f"calibration gives {type(leaf).__name__} for a tensor argument.")
        fixed = [None if not isinstance(s, int) else s for s in value.shape]
        fits = leaf.ndim == len(fixed) and all(
            s is None or s == size for s, size in zip(fixed, leaf.shape, strict=True)
        )
        if not fits or leaf.dtype != value.dtype:
            wanted = "x".join("any" if s is None else str(s) for s in fixed)
            raise InputError(
                f"calibration gives a tensor of {tuple(leaf.shape)} and {leaf.dtype}, where the "
                f"model was captured with {wanted} and {value.dtype}."
            )
        if leaf.is_floating_point() and not bool((leaf < torch.inf).all()):
            raise InputError("calibration holds NaN or infinity.")


def _placeholders(captured: Captured) -> list[fx.Node]:
    return captured.graph_module.graph.find_nodes(op="placeholder")


def _batched(captured: Captured) -> list[int]:
    """Which inputs have the batch as their first axis."""
    if not captured.dynamic_batch:
        return []
    return [
        place
        for place, node in enumerate(_placeholders(captured))
        if isinstance(value := node.meta.get("val"), torch.Tensor)
        and value.ndim
        and not isinstance(value.shape[0], int)
    ]


def _batch_size(captured: Captured) -> int:
    """Of the example inputs."""
    nodes = _placeholders(captured)
    sizes = [hint(nodes[place].meta["val"].shape[0]) for place in _batched(captured)]
    return sizes[0] if sizes else 1


def synthetic(
    captured: Captured,
    leaves: Sequence[Any],
    seed: int = 0,
    *,
    count: int | None = None,
    together: int = BATCH,
) -> Iterator[Batch]:
    """Gaussian noise in place of floating inputs, and drawn entries of the example elsewhere.

    The noise has the root mean square of the example input.  Where a linear layer alone reads it,
    it has the directions of that layer's rows, too: training adds inputs to them.

    Args:
        leaves: the flat example inputs.
        count: how many examples; None: as many as are cheap.
        together: examples of a batch, at most.
    """
    generator = torch.Generator().manual_seed(seed)
    batched = _batched(captured)
    sizes = [
        max(1, leaf.numel() // max(1, len(leaf)))
        for place, leaf in enumerate(leaves)
        if place in batched
    ]
    wished = MOST_NUMBERS // max(sizes, default=1)
    worked = int(WORK * _batch_size(captured) / max(macs_of(captured.graph_module), 1))
    cheap = min(MOST_EXAMPLES, max(FEWEST_EXAMPLES, min(wished, worked)))
    examples = (count or cheap) if batched else 1
    for start in range(0, examples, together):
        here = min(together, examples - start)
        batch = []
        for place, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor) or not leaf.ndim:
                batch.append(leaf)
                continue
            shape = (here, *leaf.shape[1:]) if place in batched else tuple(map(hint, leaf.shape))
            if leaf.is_floating_point():
                rows = _first_rows(captured, place)
                if rows is None:
                    drawn = torch.randn(shape, generator=generator)
                else:
                    wide = torch.randn((*shape[:-1], len(rows)), generator=generator)
                    drawn = wide @ rows / rows.square().sum(0).mean().sqrt().clamp(min=1e-30)
                size = float(leaf.detach().float().square().mean().sqrt())
                drawn = drawn * size if size > 0 else drawn
                batch.append(drawn.to(leaf.dtype).to(leaf.device))
            else:
                flat = leaf.reshape(-1)
                index = torch.randint(len(flat), shape, generator=generator)
                batch.append(flat[index.to(leaf.device)])
        yield tuple(batch)


def _first_rows(captured: Captured, place: int) -> torch.Tensor | None:
    """``[m, d]``, the weight of the linear layer that alone reads an input; None: none does."""
    node = _placeholders(captured)[place]
    users = [u for u in node.users if "sym_size" not in str(u.target)]
    linear = torch.ops.aten.linear.default
    if len(users) != 1 or users[0].target is not linear or users[0].args[0] is not node:
        return None
    weight = users[0].args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    found: Any = captured.graph_module
    for part in str(weight.target).split("."):
        found = getattr(found, part)
    rows: torch.Tensor = found.detach().float().cpu()
    return rows if bool(rows.any()) else None
