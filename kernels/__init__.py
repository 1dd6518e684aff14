"""Coloring, collapsing and merging of weight slices: the arithmetic under every pass.

Three operations, one folder each, every folder with a ``reference.py`` in plain torch, numpy and
scipy:

- `color`: which rows of a collapsed weight are equal (Eq. 3 of the paper);
- `collapse`: sum the slices of a weight over the colors of its input (the inner sums of Eq. 3);
- `merge`: average the slices of a weight over the colors of its output (Eq. 10).
"""

from fxfib.kernels.collapse.reference import collapse
from fxfib.kernels.coloring.color import CRITERIA, Coloring, color, color_batch
from fxfib.kernels.merge.reference import merge

__all__ = ["CRITERIA", "Coloring", "collapse", "color", "color_batch", "merge"]
