"""Watching symmetry emerge while a model trains (:class:`Monitor`)."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxfib.capture import capture, normalize_inputs
from fxfib.errors import InputError, RefusedError
from fxfib.history import (
    COLUMNS,
    SYMMETRIES,
    History,
    Look,
    Transition,
    as_csv,
    labels_as_tensor,
    rows_of,
)
from fxfib.passes.backward import Colored, Continued
from fxfib.passes.cover import labels_of, layers
from fxfib.passes.picture import sources_of
from fxfib.refusals import unwrap
from fxfib.renewal import evaluating, full_precision
from fxfib.vital_signs import Probe

#: What looking may cost, as a share of the training time.
SHARE = 0.04


class Monitor:
    """Watches fibers, opfibers and covers while a model trains.

    Two lines in the loop::

        monitor = fxfib.Monitor(model, images)
        ...
        optimizer.step()
        monitor.step()

    and then ``monitor.plot()``, ``monitor.to_csv("run.csv")``, ``monitor.to_html("film.html")``.

    The model is only read: its mode, gradients, buffers and all random states stay as they are.
    ``torch.compile`` and data parallel wrappers are looked through; with several optimizers or
    accumulated gradients call :meth:`step` once for each update.

    Hardly any two nodes of a trained network agree exactly, and how near weights come depends on
    their scale; so the default measure is the published one, by angles: rows (bias included) are
    clustered by average linkage of ``1 - cosine`` up to ``eps``.

    Args:
        model: looked at once now (step 0).
        example_inputs, example_kwargs: as for :func:`fxfib.compile`; dead units and effective ranks
            are taken on them, so give some tens of examples.
        eps, opfiber_eps, criterion: as for :func:`fxfib.color`.
        every: look every so many steps.  None: as often as looking takes less than ``share`` of
            the time that passes.
        share: for ``every=None``.
        batch_statistics: as for :func:`fxfib.color`.
        csv: a file that gets the rows of every look at once; one that is there is replaced.
        writer: gets scalars at every look; a ``torch.utils.tensorboard.SummaryWriter`` or anything
            with its ``add_scalar``.

    Attributes:
        steps: calls of :meth:`step` so far.
        history: all looks.
        seconds: spent in ``"looks"``, between them (``"training"``), and at the start on capture
            and the first look (``"preparation"``).

    Raises:
        InputError: an option is out of range.
        As :func:`fxfib.color` otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        eps: float = 0.7,
        every: int | None = None,
        *,
        opfiber_eps: float | None = None,
        criterion: str = "cosine",
        share: float = SHARE,
        batch_statistics: bool = False,
        csv: str | os.PathLike[str] | None = None,
        writer: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        from fxfib.api import check_options

        if isinstance(eps, Mapping) or criterion == "energy":
            raise InputError("covers take one number as eps, and not the criterion 'energy'.")
        for value in (eps, eps if opfiber_eps is None else opfiber_eps):
            check_options(value, criterion, None)
        if every is not None and every < 1:
            raise InputError(f"every must be at least 1, or None, not {every!r}.")
        if not 0 < share < 1:
            raise InputError(f"share must be between 0 and 1, not {share!r}.")
        if writer is not None and not callable(getattr(writer, "add_scalar", None)):
            raise InputError("writer must have a method add_scalar, as a SummaryWriter has.")
        self.source = unwrap(model)
        self.eps, self.criterion = float(eps), criterion
        self.opfiber_eps = self.eps if opfiber_eps is None else float(opfiber_eps)
        self.every, self.share, self.batch_statistics = every, share, batch_statistics
        self.writer, self._csv = writer, None if csv is None else Path(csv)
        self._csv_begun, self._written = False, -1
        self.example = normalize_inputs(self.source, example_inputs, example_kwargs)
        self.steps = 0
        self.seconds = {"preparation": 0.0, "looks": 0.0, "training": 0.0}
        self._longest = 0.0
        start = self._since = time.perf_counter()
        self._prepare()
        self.look()
        # The first look comes before all training.
        self.seconds = {"preparation": time.perf_counter() - start, "looks": 0.0, "training": 0.0}

    # -- looking -----------------------------------------------------------------------------

    def step(self) -> Look | None:
        """Call after ``optimizer.step()``; looks when it is time to, and returns what it saw."""
        self.steps += 1
        self._clock()
        if self.every is not None:
            due = self.steps % self.every == 0
        else:
            spent = self.seconds["looks"] + self._longest
            due = spent <= self.share * self.seconds["training"]
        return self.look() if due else None

    def look(self) -> Look | None:
        """Look now, whatever the interval; None (and a warning) where weights are not finite."""
        self._clock()
        start = time.perf_counter()
        try:
            return self._look()
        finally:
            self._since = time.perf_counter()
            took = self._since - start
            self.seconds["looks"] += took
            self._longest = max(took, 0.8 * self._longest)

    def log(self, **values: Any) -> None:
        """Keep other figures of this step, such as ``loss=`` or ``accuracy=``, for the plots.

        Raises:
            InputError: a figure is no number.
        """
        for name, value in values.items():
            try:
                number = float(value.detach() if isinstance(value, Tensor) else value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise InputError(f"{name} is no number: {error}.") from error
            self.history.logged[self.steps, name] = number
            if self.writer is not None:
                self.writer.add_scalar(name, number, self.steps)

    def _clock(self) -> None:
        now = time.perf_counter()
        self.seconds["training"] += now - self._since
        self._since = now

    @torch.no_grad()
    def _look(self) -> Look | None:
        now = self._weights()
        kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in now.items()}
        if kinds != self._kinds:
            changed = sorted({n for n, _ in kinds.items() ^ self._kinds.items()})
            raise InputError(
                f"{changed[0]} is new, gone, or of another shape or dtype; make a new Monitor "
                "when layers have changed."
            )
        for name, tensor in now.items():
            if not tensor.is_floating_point():
                continue
            # Masks in buffers may hold minus infinity.
            fine = torch.isfinite(tensor) if name in self._trained else tensor < torch.inf
            if not bool(fine.all()):
                warnings.warn(
                    f"{name} holds NaN or infinity at step {self.steps}; fxfib.Monitor is blind.",
                    stacklevel=3,
                )
                return None
        if any(now[name].device != device for name, device in self._devices.items()):
            self._prepare()
        with full_precision():
            analysis = self._colored()
            signs = self.probe.take(now)
        labels = {
            symmetry: {
                name: labels_as_tensor(own)
                for name, own in labels_of(analysis, self.continued.values, symmetry).items()
            }
            for symmetry in SYMMETRIES
        }
        before = self.history.looks[-1] if self.history.looks else None
        if before is not None and before.step == self.steps:
            before = self.history.looks[-2] if len(self.history.looks) > 1 else None
        self.history.add(Look(self.steps, labels, signs))
        look = self.history.looks[-1]
        self._report(look, before)
        return look

    def _colored(self) -> Colored:
        return self.continued.color(
            self.eps, self.opfiber_eps, self.criterion, weights=self._weights()
        )

    def _weights(self) -> dict[str, Tensor]:
        """The present parameters and buffers by name."""
        named = (
            *self.source.named_parameters(remove_duplicate=False),
            *self.source.named_buffers(remove_duplicate=False),
        )
        return {name: tensor.detach() for name, tensor in named}

    def _prepare(self) -> None:
        """Capture the model: once, and again when it has moved to another device."""
        now = self._weights()
        self._devices = {name: tensor.device for name, tensor in now.items()}
        self._kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in now.items()}
        self._trained = {n for n, _ in self.source.named_parameters(remove_duplicate=False)}
        home = next(iter(self._devices.values()), torch.device("cpu"))
        args, kwargs = pytree.tree_map(
            lambda leaf: leaf.to(home) if isinstance(leaf, Tensor) else leaf, self.example
        )
        with evaluating(self.source), full_precision():
            captured = capture(self.source, args, kwargs)
        self.continued = Continued(captured.graph_module, self.batch_statistics)
        analysis = self._colored()
        self.probe = Probe(self.continued, analysis, pytree.tree_leaves((args, kwargs)))
        places: dict[Any, list[int]] = {}
        names: list[str] = []
        for calls in layers(analysis, self.continued.values):
            for name, ref in calls:
                places.setdefault(ref[0], []).append(len(names))
                names.append(name)
        if not names:
            raise RefusedError(f"{type(self.source).__name__} has no layer that could be watched.")
        reads = sources_of(analysis, places)
        inputs = {
            names[place]: tuple(names[other] for other in reads[node])
            for node, own in places.items()
            for place in own
        }
        if not hasattr(self, "history"):
            self.history = History(inputs)

    def _report(self, look: Look, before: Look | None) -> None:
        rows = list(rows_of(look, before))
        if self._csv is not None:
            if self._csv_begun and look.step != self._written:
                with self._csv.open("a", newline="", encoding="utf-8") as file:
                    file.write(as_csv(rows, COLUMNS, head=False))
            else:
                self.history.to_csv(self._csv)
            self._csv_begun, self._written = True, look.step
        if self.writer is not None:
            shown = ("fibers", "opfibers", "covers", "dead", "effective_rank", "weight_norm")
            for row in rows:
                for name in shown:
                    if row[name] is not None:
                        self.writer.add_scalar(f"{name}/{row['layer']}", row[name], look.step)

    # -- what came of it ---------------------------------------------------------------------

    def transitions(self, symmetry: str = "cover") -> tuple[Transition, ...]:
        """Which classes merged or split, and when; see :class:`Transition`."""
        return tuple(self.history.transitions(symmetry))

    def to_csv(self, path: str | os.PathLike[str], what: str = "layers") -> None:
        """Write what every look saw of every layer, ``"transitions"``, or what was ``"logged"``.

        Raises:
            ExportError: the file cannot be written.
        """
        self.history.to_csv(path, what)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the run as one page that needs no network: the colored graph, moving.

        Raises:
            ExportError: the file cannot be written.
        """
        from fxfib.film import write_film

        write_film(self, path)

    def plot(self) -> list[Any]:
        """Matplotlib figures: fibers against what was logged, every layer, and the vital signs.

        Raises:
            InputError: matplotlib is not installed (``pip install 'fxfib[plot]'``).
        """
        from fxfib.history_figures import figures

        return figures(self.history, f"{type(self.source).__name__}, {self}")

    def callback(self) -> Any:
        """A callback for the ``Trainer`` of PyTorch Lightning; its checkpoints keep the history.

        Raises:
            InputError: Lightning is not installed.
        """
        from fxfib.lightning import callback

        return callback(self)

    def state_dict(self) -> dict[str, Any]:
        """What to keep in a checkpoint, the history included."""
        return {
            "steps": self.steps, "seconds": dict(self.seconds), "longest": self._longest,
            "measure": [self.eps, self.opfiber_eps, self.criterion, self.batch_statistics],
            "history": self.history.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            InputError: it is none, of other layers, or was measured otherwise.
        """
        own = [self.eps, self.opfiber_eps, self.criterion, self.batch_statistics]
        if state.keys() != self.state_dict().keys():
            raise InputError("the state is none of fxfib.Monitor.")
        if list(state["measure"]) != own:
            raise InputError(
                f"the state was measured with {tuple(state['measure'])}, not {tuple(own)}."
            )
        self.history.load_state_dict(state["history"])
        self.steps, self._longest = state["steps"], state["longest"]
        self.seconds = dict(state["seconds"])
        self._since = time.perf_counter()
        if self._csv is not None:
            self.history.to_csv(self._csv)
            self._csv_begun, self._written = True, self.history.looks[-1].step

    def __str__(self) -> str:
        both = "" if self.eps == self.opfiber_eps else f", opfibers {self.opfiber_eps:g}"
        return f"{self.criterion} {self.eps:g}{both}"
