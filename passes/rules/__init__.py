"""Rules: one class an op, one file an op family."""

from fxfib.passes.rules.base import Rule, all_rules, find_rule, overloads, register

__all__ = ["Rule", "all_rules", "find_rule", "overloads", "register"]

# Importing a family registers its rules.
from fxfib.passes.rules import (  # noqa: F401
    activation,
    arithmetic,
    attention,
    batch_norm,
    concatenation,
    convolution,
    einsum,
    experts,
    filling,
    gating,
    group_norm,
    indexing,
    linear,
    movement,
    norm,
    padding,
    pairwise,
    parametric,
    pooling,
    recurrent,
    recurrent_cell,
    reduction,
    slicing,
    softmax,
    splitting,
)
