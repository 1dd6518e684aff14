"""Size and error of one model at several eps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm import tqdm

from fxfib.api import check_options
from fxfib.errors import InputError
from fxfib.workshop import Workshop, skip_patterns

# Where nothing is known of a model: from exact to where most networks have fallen apart.
GRID = (0.0, 1e-4, 1e-3, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class CurvePoint:
    """What one eps makes of a model.

    Attributes:
        eps: the fiber precision.
        parameters, macs: what is left.
        parameters_kept: the same as a part of the original's parameters.
        error: largest absolute difference of any output on the example inputs over the largest
            absolute output.
    """

    eps: float
    parameters: int
    macs: int
    parameters_kept: float
    error: float | None


def eps_curve(
    model: nn.Module,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    eps: Iterable[float] = GRID,
    criterion: str = "fibration",
    calibration: Any = None,
    compensate: bool = True,
    refine: int = 0,
    round_to: int | None = None,
    residual: str = "joint",
    skip: Iterable[str] = (),
    dynamic_shapes: Any = None,
    progress: bool | None = None,
) -> tuple[CurvePoint, ...]:
    """Compile a model at several eps and tell what each would give: the model is captured once.

    ``small.fibration.to_html(path, curve=fxfib.eps_curve(...))`` shows it in the report.

    Args:
        eps: one number for all layers at a time; each is made once, in growing order.
        model, example_inputs, example_kwargs, criterion, calibration, compensate, refine, round_to,
            residual, skip, dynamic_shapes, progress: as for :func:`fxfib.compile`.

    Returns:
        A point for every eps, in growing order.

    Raises:
        InputError: there is no eps or no example input, or an argument is out of range.
        RefusedError, CaptureError, VerifyError: as :func:`fxfib.compile`.
    """
    try:
        values = sorted(set(eps))
    except TypeError as error:
        raise InputError(f"eps must be several numbers, not {eps!r}.") from error
    if not values:
        raise InputError("eps must hold at least one number.")
    if example_inputs is None and not example_kwargs:
        raise InputError("eps_curve needs example inputs.")
    for value in values:
        check_options(value, criterion, round_to, residual)
    workshop = Workshop(
        model, example_inputs, example_kwargs, criterion=criterion, calibration=calibration,
        compensate=compensate, refine=refine, round_to=round_to, residual=residual,
        skip=skip_patterns(skip), dynamic_shapes=dynamic_shapes,
    )  # fmt: skip
    points = []
    disable = None if progress is None else not progress
    for value in tqdm(values, desc="fxfib eps", leave=False, disable=disable):
        report = workshop.compiled(float(value)).fibration
        assert report is not None
        points.append(
            CurvePoint(
                eps=float(value),
                parameters=report.parameters_after,
                macs=report.macs_after,
                parameters_kept=report.parameters_after / max(report.parameters_before, 1),
                error=report.relative_error,
            )
        )
    return tuple(points)
