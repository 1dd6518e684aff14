"""The inverse of a compile: a wider module that computes the same function.

A node becomes several copies; its outgoing columns are split among them at random, with changes
that sum to zero, so copies are fibers without being plain duplicates.  The rules that rewrite a
merged graph rewrite a lifted one: only the layouts differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fxfib.capture import capture, normalize_inputs
from fxfib.copies import Copies
from fxfib.errors import InputError, VerifyError
from fxfib.modules import FibrationModule, raise_modules, unshare
from fxfib.passes.forward import Analysis
from fxfib.passes.plan import Plan, tied_tables
from fxfib.passes.rewrite import Rewriter
from fxfib.passes.verify import TOLERANCE, difference, full_precision
from fxfib.workshop import skip_patterns, skipped_nodes

# Larger changes of the columns leave nothing of float32 after the sum.
MOST_ZERO_SUM = 100.0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@torch.inference_mode(False)
def lift(
    module: nn.Module,
    factor: float = 1.5,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    zero_sum: float = 0.5,
    skip: Iterable[str] = (),
    seed: int = 0,
    verify: bool = True,
) -> FibrationModule:
    """A wider module of the same function: every hidden node becomes one or more copies.

    Args:
        module: in eval mode; never modified.
        factor: mean number of copies of a node, at least 1.  Nodes that enter statistics over the
            channels (layer norm, group norm) all need the same number: the whole part of
            the factor.
        example_inputs, example_kwargs, dynamic_shapes: as for :func:`fxfib.compile`.
        zero_sum: size of the changes of the split columns that cancel in the sum, relative to the
            columns' own size; 0 splits only.
        skip: patterns of module paths whose nodes are not copied.
        seed: of the multiplicities, splits and changes; the result depends on nothing else.
        verify: compare outputs on the example inputs.

    Returns:
        A module under the user's own names; compiling it at eps = 0 gives back the original sizes.

    Raises:
        InputError: the factor is not a finite number of at least 1, zero_sum or seed make no sense,
            or inputs are missing.
        VerifyError: the wider module differs by more than the dtype's tolerance.
    """
    if not _is_number(factor) or factor < 1:
        raise InputError(f"factor must be a finite number of at least 1, not {factor!r}.")
    if not _is_number(zero_sum) or not 0 <= zero_sum <= MOST_ZERO_SUM:
        raise InputError(
            f"zero_sum must be a number from 0 to {MOST_ZERO_SUM:g}, not {zero_sum!r}."
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed must be a whole number of at least 0, not {seed!r}.")
    if example_inputs is None and not example_kwargs:
        raise InputError("lift needs example_inputs: the arguments of one call.")
    captured = capture(module, example_inputs, example_kwargs, dynamic_shapes)
    skipped = skipped_nodes(captured.graph_module, skip_patterns(skip))
    analysis = Analysis(captured.graph_module, skip=skipped).run()
    layouts = dict(Copies(analysis, factor, zero_sum, seed).layouts())
    plan = Plan(analysis, layouts, {}, {}, tied_tables(analysis))
    lifted = raise_modules(Rewriter(plan).run(), captured)
    if verify:
        args, kwargs = normalize_inputs(captured.source, example_inputs, example_kwargs)
        with torch.no_grad(), full_precision(captured.source):
            expected = torch.utils._pytree.tree_leaves(captured.source(*args, **kwargs))
            found = torch.utils._pytree.tree_leaves(lifted(*args, **kwargs))
        gap = difference(expected, found).relative
        dtypes = [p.dtype for p in captured.source.parameters()]
        tolerance = max((TOLERANCE[d] for d in dtypes if d in TOLERANCE), default=1e-4)
        if not gap <= tolerance:
            raise VerifyError(
                f"the lifted {type(captured.source).__name__} differs from the original by "
                f"{gap:.2g} (relative), above the tolerance of {tolerance:g}; nothing was returned."
            )
    unshare(lifted, captured.source)
    return lifted
