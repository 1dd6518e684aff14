"""Opfibers and covers of a captured model: the coloring of both passes, layer by layer."""

from __future__ import annotations

from fxfib.capture import Captured
from fxfib.coloring import Labels
from fxfib.errors import InputError
from fxfib.passes.backward import Colored, Continued
from fxfib.passes.cover import SYMMETRIES, labels_of, stable


def check_symmetry(symmetry: str) -> None:
    """Refuse what is no symmetry.

    Raises:
        InputError: it is unknown.
    """
    if symmetry not in SYMMETRIES:
        known = ", ".join(repr(name) for name in SYMMETRIES)
        raise InputError(f"unknown symmetry {symmetry!r}; known: {known}.")


def both_passes(
    continued: Continued, symmetry: str, eps: float, opfiber_eps: float | None, criterion: str
) -> tuple[dict[str, Labels], Colored]:
    """Labels of every layer's nodes by one symmetry, and all the colors they come from."""
    if symmetry == "stable":
        analysis = stable(continued, eps, opfiber_eps, criterion)
    else:
        analysis = continued.color(eps, opfiber_eps, criterion)
    return labels_of(analysis, continued.values, symmetry), analysis


def symmetries(
    captured: Captured,
    symmetry: str,
    eps: float = 0.0,
    opfiber_eps: float | None = None,
    criterion: str = "fibration",
    batch_statistics: bool = False,
) -> tuple[dict[str, Labels], Colored]:
    """As :func:`both_passes`, of a captured model."""
    continued = Continued(captured.graph_module, batch_statistics)
    return both_passes(continued, symmetry, eps, opfiber_eps, criterion)
