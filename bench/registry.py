"""What is measured: an operation, its providers by name, and the cases that they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from torch import Tensor

OURS = "fxfib"
# The published comparison: tools that answer eps > 0, and the one that answers eps = 0.
RIVALS = ("scipy", "scikit-learn", "torch.cdist")


@dataclass(frozen=True)
class Case:
    """One question, small enough to be a key of the CSV.

    Attributes:
        operation: ``"color"``, ``"color_batch"``, ``"collapse"`` or ``"merge"``.
        kind: ``"random"``; ``"planted"``, where every color has about four members; ``"network"``,
            rows of torchvision's networks before training; ``"trained"``, rows of checkpoints.
        batch: number of matrices; 1 but for ``"color_batch"``.
        count: rows of a matrix.
        width: columns of a matrix.
        dtype: a name in torch.
        share: eps over the spread of the entries (largest minus smallest), or ``"half"``: the eps
            at which about half of the rows merge.  Unused, ``"0"``, where nothing is colored.
    """

    operation: str
    kind: str
    batch: int
    count: int
    width: int
    dtype: str
    share: str

    @property
    def key(self) -> tuple[str, ...]:
        """As the CSV has it."""
        return tuple(map(str, astuple(self)))

    @classmethod
    def parse(cls, key: tuple[str, ...] | list[str]) -> Case:
        """The inverse of `key`."""
        operation, kind, batch, count, width, dtype, share = key
        return cls(operation, kind, int(batch), int(count), int(width), dtype, share)

    def __str__(self) -> str:
        size = f"{self.count} x {self.width}"
        size = size if self.batch == 1 else f"{self.batch} x {size}"
        colored = f", eps {self.share}" if self.operation.startswith("color") else ""
        return f"{self.operation}, {self.kind}, {size} {self.dtype}{colored}"


CASE_COLUMNS = tuple(field.name for field in fields(Case))


@dataclass(frozen=True)
class Problem:
    """A case with its numbers.

    Attributes:
        case: where it comes from.
        rows: ``[n, d]``; ``[batch, n, d]`` for ``"color_batch"``.
        eps: as `fxfib.kernels.color` takes it.
        planted: int64 ``[n]``, the only right coloring where it is known beforehand.
        labels: int64, the colors by which to collapse columns or merge rows.
        num_classes: of `labels`.
    """

    case: Case
    rows: Tensor
    eps: float
    planted: Tensor | None = None
    labels: Tensor | None = None
    num_classes: int = 0

    def to(self, device: str) -> Problem:
        """The same, with what providers read on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        rows = self.rows.to(device)
        return Problem(self.case, rows, self.eps, self.planted, labels, self.num_classes)


@dataclass(frozen=True)
class Provider:
    """One way to answer a question.

    Attributes:
        name: as in the CSV.
        run: from a problem to an answer; None is no answer (the reading floor).
        gives: what the answer is, and so how it is checked.  ``"colors"``: labels of complete
            linkage; ``"components"``: labels of the components of the graph of close rows, which
            colors never cross; ``"pairs"``: the number of close pairs; ``"sums"``: a matrix;
            ``"nothing"``.
        eps: which precisions it answers: ``"zero"``, ``"positive"`` or ``"any"``.
        growth: its seconds grow at least like n to this power, for any input: lets a short run tell
            that a long one is hopeless.
        pair_bytes: memory for each of the n^2 pairs, to leave out what cannot fit.
        devices: where it runs.
        most: the most rows it makes sense for.
    """

    name: str
    run: Callable[[Problem], Tensor | None]
    gives: str
    eps: str = "any"
    growth: float = 1.0
    pair_bytes: float = 0.0
    devices: tuple[str, ...] = ("cpu",)
    most: int = 2**31

    def answers(self, case: Case, device: str) -> bool:
        """Whether the case is a question for this provider at all."""
        wanted = "zero" if case.share == "0" else "positive"
        return self.eps in ("any", wanted) and device in self.devices and case.count <= self.most


PROVIDERS: dict[str, dict[str, Provider]] = {}


def provider(operation: str, name: str, gives: str, **details: Any) -> Callable[[Any], Any]:
    """Register a function as a provider; `details` are attributes of `Provider`."""

    def register(run: Callable[[Problem], Tensor | None]) -> Callable[[Problem], Tensor | None]:
        known = PROVIDERS.setdefault(operation, {})
        if name in known:
            raise ValueError(f"two providers of {operation} are called {name}")
        known[name] = Provider(name, run, gives, **details)
        return run

    return register


def dtype_of(case: Case) -> torch.dtype:
    """The dtype that a case names."""
    found = getattr(torch, case.dtype)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{case.dtype} is no dtype")
    return found
