"""What is measured: providers of one result, by name, with what they need and what they promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

PROVIDERS: dict[str, Provider] = {}


@dataclass(frozen=True)
class Provider:
    """One way to color rows.

    Attributes:
        name: as in the CSV.
        run: from rows ``[n, d]`` and eps to int64 labels ``[n]``, or None where there is no result
            (the reading floor).
        exact: it answers eps = 0; approximate: it answers eps > 0.
        gives: ``"colors"`` (complete linkage), ``"components"`` of the closeness graph (a color
            never crosses one), or ``"nothing"``.
        bytes_per_pair: memory that grows with n^2, to leave out what cannot fit.
        devices: where it runs.
    """

    name: str
    run: Callable[[Tensor, float], Tensor | None]
    exact: bool
    approximate: bool
    gives: str
    bytes_per_pair: float
    devices: tuple[str, ...]


def provider(name: str, *, exact: bool = False, approximate: bool = True, gives: str = "colors",
             bytes_per_pair: float = 0.0, devices: tuple[str, ...] = ("cpu",)) -> Any:  # fmt: skip
    """Register a function under a name."""

    def register(run: Callable[[Tensor, float], Tensor | None]) -> Callable[..., Any]:
        PROVIDERS[name] = Provider(name, run, exact, approximate, gives, bytes_per_pair, devices)
        return run

    return register
