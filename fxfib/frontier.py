"""What a search has seen: points of size and loss, and a file that keeps them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxfib._version import __version__
from fxfib.errors import InputError
from fxfib.files import move_into_place, staging_folder

if TYPE_CHECKING:
    from fxfib.evaluation import Evaluator
    from fxfib.workshop import Workshop

Key = tuple[tuple[tuple[str, float], ...], bool]


def key_of(eps: Mapping[str, float], refined: bool) -> Key:
    """What tells points apart."""
    return tuple(sorted(eps.items())), refined


@dataclass(frozen=True)
class Point:
    """One network.

    Attributes:
        parameters, macs: counted where it was made, else predicted.
        eps: of every group, by module path; ``fxfib.compile(..., eps=point.eps)`` makes it.
        predicted: sum over groups of the share of energy that is lost, as the groups were weighed;
            None: not predicted.
        loss: measured on the data; None: not measured.
        made: whether it was really made.
        chosen: whether it is what was returned.
        milliseconds: its median latency where that was the target; None: not measured.
        latency: the same as a part of the original's.
        refined: whether it was refined before its loss was measured.
    """

    parameters: int
    macs: int
    eps: dict[str, float]
    predicted: float | None = None
    loss: float | None = None
    made: bool = False
    chosen: bool = False
    milliseconds: float | None = None
    latency: float | None = None
    refined: bool = False

    def size(self, kind: str) -> int:
        """Its parameters (``"params"``) or multiply-accumulates (``"macs"``)."""
        return self.parameters if kind == "params" else self.macs


def loss_of(point: Point) -> float:
    """Its loss; NaN, which is beyond every limit, where it is not measured."""
    return math.nan if point.loss is None else point.loss


class Store:
    """Points that were made, in memory and, where a path is given, in a file.

    The file belongs to one search: another model, other options, other data or another version of
    fxfib start afresh, and so does another place (runtime, threads and machine in words) where
    latency is measured.

    Raises:
        InputError: there is a file, and no search has written it.
    """

    def __init__(
        self,
        path: str | None,
        workshop: Workshop,
        evaluator: Evaluator | None,
        place: str | None = None,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.points: dict[Key, Point] = {}
        self.mark = "" if path is None else _mark(workshop, evaluator, place)
        if self.path is not None and self.path.exists():
            for data in _kept(self.path, self.mark):
                point = Point(**data)
                self.points[key_of(point.eps, point.refined)] = point

    def get(self, key: Key) -> Point | None:
        """A point that was made before."""
        return self.points.get(key)

    def put(self, key: Key, point: Point) -> None:
        """Keep a point; the file is whole at any moment."""
        self.points[key] = point
        if self.path is None:
            return
        content: dict[str, Any] = {
            "search": self.mark,
            "points": [asdict(p) for p in self.points.values()],
        }
        with staging_folder(self.path) as folder:
            staged = folder / self.path.name
            staged.write_text(json.dumps(content))
            move_into_place(staged, self.path)


def _kept(path: Path, mark: str) -> list[dict[str, Any]]:
    """The points of a file, if they are of this search."""
    try:
        content = json.loads(path.read_text())
        found = content["points"] if content["search"] == mark else []
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} is no file of an earlier search; give another one as resume."
        ) from error
    assert isinstance(found, list)
    return found


def _mark(workshop: Workshop, evaluator: Evaluator | None, place: str | None) -> str:
    """What the results of a search depend on, as a hash."""
    digest = hashlib.sha256()
    for name, tensor in workshop.graph_module.state_dict().items():
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    options = (
        # Another version may fit and refine in another way.
        __version__, workshop.criterion, workshop.compensate, workshop.refine,
        workshop.round_to, workshop.skip,
        None if evaluator is None else f"{evaluator.original:.6g} {evaluator.mark}",
        evaluator is not None and evaluator.loss_fn is not None, place,
    )  # fmt: skip
    digest.update(repr(options).encode())
    if workshop.compensate or workshop.calibration is not None:
        for batch in workshop.batches:
            for leaf in batch:
                if isinstance(leaf, torch.Tensor):
                    digest.update(f"{tuple(leaf.shape)}{float(leaf.double().sum())!r}".encode())
    return digest.hexdigest()
