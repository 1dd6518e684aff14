"""Small modules in which one op decides what may merge; every generic test runs over them.

Each is a sandwich ``stem -> ReLU -> front -> op -> back``.  The front has planted fibers that are
no plain duplicates (the stem has a fiber, and the front's rows differ by zero-sum changes on its
columns), a node that is a multiple of another, a constant, an unread one, and one that differs from
its neighbours in the bias alone.  Near misses differ in one parameter of the op at one node.
"""

from fxfib.passes.rules.examples.attention import attention
from fxfib.passes.rules.examples.elementwise import (
    binary,
    filling,
    glu,
    overload_cases,
    prelu,
    threefold,
    unary,
)
from fxfib.passes.rules.examples.indices import indexing
from fxfib.passes.rules.examples.layers import convolution, embedding, linear
from fxfib.passes.rules.examples.networks import CHANNELS, SHAPES, Example, Sandwich
from fxfib.passes.rules.examples.norms import (
    axis_norm,
    batch_norm,
    group_norm,
    instance_norm,
    softmax,
)
from fxfib.passes.rules.examples.recurrent import cells, recurrent
from fxfib.passes.rules.examples.shapes import concatenation, movement, padding, pooling, reduction

__all__ = [
    "CHANNELS",
    "SHAPES",
    "Example",
    "Sandwich",
    "attention",
    "axis_norm",
    "batch_norm",
    "binary",
    "cells",
    "concatenation",
    "convolution",
    "embedding",
    "filling",
    "glu",
    "group_norm",
    "indexing",
    "instance_norm",
    "linear",
    "movement",
    "overload_cases",
    "padding",
    "pooling",
    "prelu",
    "recurrent",
    "reduction",
    "softmax",
    "threefold",
    "unary",
]
